"""What every measurement shares: timing, the exact answer on sampled rows, the machine's description, tables."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pack import kernels
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


class MissingError(Exception):
    """Something cannot take part in a measurement, and why."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of a repeated call: the median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        values = sorted(milliseconds)
        return cls(statistics.median(values), values[int(0.1 * (len(values) - 1))], values[math.ceil(0.9 * (len(values) - 1))])


def milliseconds(function: Callable[[], object]) -> float:
    """One call by the host's clock."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Times of several calls on the CPU, one after the other in each repeat, so that a machine's drift meets all alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            taken[name].append(milliseconds(function))
    return {name: Times.of(values) for name, values in taken.items()}


class Stopwatch:
    """Times calls on a device; on a CPU, which is for trials, with few repeats."""

    def __init__(self, device: str, seconds: float = 0.5, least: int = 5, most: int = 50):
        """seconds: about how long one measurement may take, between `least` and `most` calls."""
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        # Written before each call, so that no call finds the last one's tensors in the L2 cache.
        self._flush = None if device == "cpu" else torch.empty(2 * max(_l2_bytes(), 32 * MIB), dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], object]) -> tuple[Times, float]:
        """The call's times by the device's own clock, and the MiB that it takes beyond what is allocated, output included."""
        if self._flush is None:
            return Times.of([milliseconds(function) for _ in range(self.least)]), math.nan
        function()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        expected = self._timed(function, 1)[0]
        memory = (torch.cuda.max_memory_allocated() - before) / MIB
        repeats = max(self.least, min(self.most, int(1000 * self.seconds / max(expected, 1e-3))))
        return Times.of(self._timed(function, repeats)), memory

    def _timed(self, function: Callable[[], object], repeats: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def _l2_bytes() -> int:
    properties = torch.cuda.get_device_properties(0)
    return getattr(properties, "L2_cache_size", 64 * MIB)


class Report:
    """Rows as they come: printed at once, written after each, so that whatever ends a run early leaves what was measured."""

    def __init__(self, minutes: float, save: Callable[[], None] = lambda: None):
        self.rows: list[dict] = []
        self.save = save
        self._end = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def attempt(self, labels: Mapping[str, object], measure: Callable[[], Mapping[str, object]]) -> dict | None:
        """One measurement. A failure is a row too, with its reason; None then."""
        if self.over():
            return self._failed(labels, "skipped: the time was up")
        try:
            row = {**labels, **measure()}
        except Exception as error:  # an opponent may fail with anything; the others still run
            first_line = (str(error).strip().splitlines() or [""])[0]
            reason = first_line if isinstance(error, MissingError) else f"{type(error).__name__}: {first_line}"
            row = None
        if row is None:  # outside the handler, which holds the failed call's tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._failed(labels, reason)
        self._add(row)
        return row

    def _failed(self, labels: Mapping[str, object], reason: str) -> None:
        self._add({**labels, "failed": reason[:200]})

    def _add(self, row: dict) -> None:
        self.rows.append(row)
        print("  ".join(f"{key} {_cell(value)}" for key, value in row.items() if key != "section" and value is not None), flush=True)
        self.save()


def raiser(error: Exception) -> Callable[[], dict]:
    """A measurement that fails with an error met before it could begin."""

    def fail() -> dict:
        raise error

    return fail


def random_mask(batch: int, heads: int, seq_q: int, seq_k: int, density: float, block_q: int, block_k: int, device="cpu", seed: int = 0):
    """A BlockMask whose rows all keep equally many blocks, drawn anew for each row of each head."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = -(-seq_q // block_q), -(-seq_k // block_k)
    count = max(1, round(density * columns))
    kept = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    for b in range(batch):
        for h in range(heads):  # one head at a time: the scores take 4 bytes a block
            chosen = torch.rand(rows, columns, generator=generator, device=device).topk(count, dim=-1).indices
            kept[b, h].scatter_(-1, chosen, True)
    return kernels.BlockMask.from_blocks(kept, block_q, block_k, seq_q, seq_k, max_count=count)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, plan: kernels.SparsePlan | None = None, heads: Iterable[int] | None = None) -> Tensor:
    """Attention of some rows in float64, from the definition: [B, heads, R, D]. plan: None is dense. heads: all where None."""
    batch, all_heads, seq_q, dim = q.shape
    heads = range(all_heads) if heads is None else list(heads)
    result = torch.empty(batch, len(heads), len(rows), dim, dtype=torch.float64, device=q.device)
    blocks = None if plan is None else plan.mask.to_blocks().expand(batch, all_heads, -1, -1)
    for b in range(batch):
        for place, h in enumerate(heads):
            scores = q[b, h, rows].double() @ k[b, h].double().T * dim**-0.5
            if plan is not None:
                at_q = _positions(plan.q_order, b, h, seq_q, q.device)[rows] // plan.mask.block_q
                at_k = _positions(plan.k_order, b, h, k.shape[2], q.device)
                seen = blocks[b, h][at_q][:, at_k.clamp(min=0) // plan.mask.block_k] & (at_k >= 0)
                scores.masked_fill_(~seen, -torch.inf)
            values = v[b, h].double()
            if plan is not None and plan.pooled is not None:
                as_one = q[b, h, rows].double() @ plan.pooled.keys[b, h].double().T * dim**-0.5 + plan.pooled.log_size[b, h].double()
                scores = torch.cat([scores, as_one.masked_fill(blocks[b, h][at_q], -torch.inf)], 1)
                values = torch.cat([values, plan.pooled.values[b, h].double()])
            result[b, place] = scores.softmax(-1).nan_to_num(0.0) @ values
    return result


def _positions(order: kernels.TokenOrder | None, b: int, h: int, seq: int, device) -> Tensor:
    if order is None:
        return torch.arange(seq, device=device)
    which = order.head_order
    return order.positions(seq)[int(which[b % which.shape[0], h % which.shape[1]])].long()


def relative_error(out: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact; infinity where anything is not finite."""
    error = ((out.double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def machine(device: str) -> dict[str, str]:
    """What a measurement was made on."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "commit": _commit()}
    if device == "cuda":
        import triton

        found = {
            "gpu": torch.cuda.get_device_name(), "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB",
            "driver": _driver(), "triton": triton.__version__, "cuda": str(torch.version.cuda or torch.version.hip), **found,
        }
    else:
        found = {"cpu": _cpu(), "threads": str(torch.get_num_threads()), **found}
    return found


def described(facts: Mapping[str, str]) -> str:
    """`machine`'s facts in words."""
    return "; ".join(f"{key} {value}" for key, value in facts.items())


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _commit() -> str:
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    # Only the code that is measured: a benchmark writes its own results into the tree.
    changed = _run("git", "status", "--porcelain", "--", "kernels", "attention", "benchmarks/*.py")
    return (commit or "unknown") + (" with changes" if changed else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"


def markdown(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """A table; a column that no row has is left out, and numbers get about three digits."""
    columns = [name for name in (columns or dict.fromkeys(name for row in rows for name in row)) if any(name in row for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """What was measured as `markdown`, then what was not, each reason once."""
    measured = [row for row in rows if "failed" not in row]
    reasons: dict[object, list[str]] = {}
    for row in rows:
        if "failed" in row:
            reasons.setdefault(row["failed"], []).append(" ".join(str(value) for key, value in row.items() if key != "failed"))
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
    return (markdown(measured, columns) if measured else "") + ("\nNot measured:\n\n" + "\n".join(lines) + "\n" if lines else "")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(folder: Path, name: str, title: str, facts: Mapping[str, str], text: str, data: object) -> None:
    """NAME.md for people and NAME.json for programs, both with the machine's description."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(f"# {title}\n\n{described(facts)}.\n\n{text}", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps({"machine": dict(facts), "results": data}, indent=1) + "\n", encoding="utf-8")
