"""Proposes rows of kernels/triton_config.py for a GPU: python -m benchmarks.tune --device cuda [--kernels ...] [--head-dims 64,128].

Starting at the table's row, one number of a configuration is changed at a time for as long as that is faster. Every
configuration is first compared with the reference on a small problem. Nothing here runs on a user's machine: what is
found is written into the table by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from pack import kernels
from pack.attention.layout import VideoLayout, hilbert, in_sections
from pack.kernels import triton_config
from pack.kernels.triton_config import Config
from torch import Tensor

from .inputs import Shape, structured_inputs
from .measuring import MissingError, Report, Stopwatch, machine, raiser, random_mask, relative_error, table, write

BLOCK_Q, BLOCK_K = 128, 64
# By more than this share a configuration has to be faster than the table's, or the table's stays.
LEAST_GAIN = 0.02
# The largest relative error from the reference. 8 bits have their own.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
TOLERANCE_8_BIT = 0.08


class Problem:
    """Tensors for every kernel, with orders and masks like a run's."""

    def __init__(self, layout: VideoLayout, heads: int, head_dim: int, dtype: torch.dtype, device: str):
        self.q, self.k, self.v = structured_inputs(Shape("tuning", "", layout, heads, head_dim), dtype, device)
        rows = [layout.sink_rows(torch.device(device)), hilbert(layout.video_rows(torch.device(device)))]
        orders = [kernels.TokenOrder.shared(in_sections(rows, block)) for block in (BLOCK_Q, BLOCK_K)]
        self.orders = dict(zip(("q_order", "k_order"), orders, strict=True))
        lengths = [order.length for order in orders]
        self.plans = [kernels.SparsePlan(random_mask(1, heads, *lengths, 0.2, BLOCK_Q, BLOCK_K, device, seed=seed), *orders) for seed in (0, 1)]
        self.lse = kernels.attention_with_lse(self.q, self.k, self.v)[1]
        self.rows = torch.arange(0, layout.seq_len, -(-layout.seq_len // 64), device=device)

    def forward(self, backend: str, **options) -> Tensor:
        return kernels.block_sparse_attention(self.q, self.k, self.v, self.plans[0].mask, **self.orders, backend=backend, **options)

    def block_mass(self, backend: str) -> Tensor:
        return kernels.block_mass(self.q, self.k, self.lse, BLOCK_Q, BLOCK_K, **self.orders, backend=backend)

    def int8(self, backend: str) -> Tensor:
        return self.forward(backend, precision="int8")

    def fp8(self, backend: str) -> Tensor:
        return self.forward(backend, precision="fp8")

    def dense(self, backend: str) -> tuple[Tensor, ...]:
        return kernels.attention_with_lse(self.q, self.k, self.v, backend=backend)

    def one_pass(self, backend: str) -> tuple[Tensor, ...]:
        return kernels.attention_with_mass(self.q, self.k, self.v, self.lse, BLOCK_Q, BLOCK_K, **self.orders, backend=backend)

    def sampled_errors(self, backend: str) -> Tensor:
        return kernels.sampled_errors(self.q, self.k, self.v, self.rows, self.plans, backend=backend)


@dataclass(frozen=True)
class Kernel:
    """What a table is tuned by.

    op: of a problem and a backend. exact: the op that it is compared with, where that is not the same in the reference.
    largest: the tile that the problem's blocks allow. tolerance: where `TOLERANCE` does not hold. kind: the second half
    of the table's keys, where it is not the bytes of an element.
    """

    table: str
    op: Callable
    largest: tuple[int, int] = (BLOCK_Q, BLOCK_K)
    exact: Callable | None = None
    tolerance: float | None = None
    kind: str | None = None


KERNELS = {
    "forward": Kernel("_FORWARD", Problem.forward),
    "block_mass": Kernel("_BLOCK_MASS", Problem.block_mass),
    "sampled_errors": Kernel("_SAMPLED", Problem.sampled_errors, (64, 128)),
    "int8": Kernel("_FORWARD_8BIT", Problem.int8, exact=Problem.forward, tolerance=TOLERANCE_8_BIT, kind="int8"),
    "fp8": Kernel("_FORWARD_8BIT", Problem.fp8, exact=Problem.forward, tolerance=TOLERANCE_8_BIT, kind="fp8"),
    # These two run with the forward's row; what suits them may not suit it.
    "dense": Kernel("_FORWARD", Problem.dense),
    "one_pass": Kernel("_ONE_PASS", Problem.one_pass),
}
_SLOTS = (64, 128, 256)


class Table:
    """One table of triton_config, for one GPU's family and a size of element or a precision."""

    def __init__(self, name: str, kind: int | str, device: str):
        if not hasattr(triton_config, name):
            raise MissingError(f"triton_config has no table {name}")
        self.name, self.rows = name, getattr(triton_config, name)
        family = triton_config._family(triton_config.architecture(torch.device(device)))
        self.key = (family, kind)

    def row(self) -> tuple[Config, ...]:
        """The Configs for head_dim up to 64, 128 and 256."""
        row = self.rows.get(self.key) or getattr(triton_config, f"{self.name}_FLOAT32", None)
        if row is None:
            raise MissingError(f"{self.name} has no row for {self.key[0]}, {self.key[1]}")
        return row

    @contextlib.contextmanager
    def holding(self, slot: int, config: Config) -> Iterator[None]:
        """The table with one entry replaced: the kernels read it at each launch."""
        row = list(self.row())
        row[slot] = config
        with mock.patch.dict(self.rows, {self.key: tuple(row)}):
            yield


def neighbours(config: Config, largest: tuple[int, int]) -> list[Config]:
    """Configurations that differ in one number."""
    found = [config._replace(block_m=size) for size in (config.block_m // 2, config.block_m * 2) if 16 <= size <= largest[0]]
    found += [config._replace(block_n=size) for size in (config.block_n // 2, config.block_n * 2) if 16 <= size <= largest[1]]
    found += [config._replace(num_warps=count) for count in (config.num_warps // 2, config.num_warps * 2) if 2 <= count <= 16]
    return found + [config._replace(num_stages=count) for count in (config.num_stages - 1, config.num_stages + 1) if 1 <= count <= 5]


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty full of NaN: what a kernel leaves unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch, "empty", poisoned):
        yield


class Tuner:
    """One kernel at one head_dim: the search from the table's configuration."""

    def __init__(self, name: str, head_dim: int, dtype: torch.dtype, device: str, time: Stopwatch, report: Report, most: int):
        self.kernel, self.time, self.report, self.most = KERNELS[name], time, report, most
        self.labels = {"kernel": name, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
        self.table = Table(self.kernel.table, self.kernel.kind or dtype.itemsize, device)
        self.table.row()
        self.slot = next(slot for slot, limit in enumerate(_SLOTS) if head_dim <= limit)
        # Ragged ends and text; then a video at 480p, or in a trial the same small one.
        self.small = Problem(VideoLayout(3, 9, 10, suffix=21), 2, head_dim, dtype, device)
        self.large = self.small if device == "cpu" else Problem(VideoLayout(21, 30, 52), 12, head_dim, dtype, device)
        self.tolerance = self.kernel.tolerance or TOLERANCE[dtype]
        self.expected = self._parts((self.kernel.exact or self.kernel.op)(self.small, "reference"))
        self.known: dict[Config, float | None] = {}

    def search(self) -> tuple[Config, Config]:
        """The table's configuration and the fastest near it. Raises MissingError where the table's own does not run."""
        start = self.table.row()[self.slot]
        # The table's tile is the largest; what a launch gets is cut to the blocks.
        best = first = start._replace(block_m=min(start.block_m, self.kernel.largest[0]), block_n=min(start.block_n, self.kernel.largest[1]))
        if self._measure(first) is None:
            raise MissingError("the table's own configuration does not run")
        while len(self.known) < self.most:
            near = [config for config in neighbours(best, self.kernel.largest) if config not in self.known][: self.most - len(self.known)]
            fastest = min((config for config in near if self._measure(config) is not None), key=self.known.get, default=None)
            if fastest is None or self.known[fastest] >= self.known[best]:
                break
            best = fastest
        return start, (best if self.known[best] < (1 - LEAST_GAIN) * self.known[first] else start)

    def _measure(self, config: Config) -> float | None:
        def row() -> dict:
            with self.table.holding(self.slot, config):
                with _poisoned():
                    found = self._parts(self.kernel.op(self.small, "triton"))
                error = max(relative_error(part, exact.double()) for part, exact in zip(found, self.expected, strict=True))
                if not error <= self.tolerance:
                    raise RuntimeError(f"wrong: its relative error is {error:.2g}, {self.tolerance:.2g} is allowed")
                times, _ = self.time(lambda: self.kernel.op(self.large, "triton"))
            return {"error": error, "ms": times.median, "p10": times.low, "p90": times.high}

        measured = self.report.attempt({**self.labels, **config._asdict()}, row)
        self.known[config] = measured and measured["ms"]
        return self.known[config]

    @staticmethod
    def _parts(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return result if isinstance(result, tuple) else (result,)


def proposal(tuned: Table, found: dict[int, Config]) -> str:
    """A row in the table's own form."""
    configs = [found.get(slot, config) for slot, config in enumerate(tuned.row())]
    inside = ", ".join(f"Config({', '.join(map(str, config))})" for config in configs)
    kind = f'"{tuned.key[1]}"' if isinstance(tuned.key[1], str) else tuned.key[1]
    return f'    ("{tuned.key[0]}", {kind}): ({inside}),'


def tune(arguments: argparse.Namespace, device: str, report: Report) -> list[str]:
    """Searches all that was asked for; the proposed rows as lines."""
    time = Stopwatch(device, least=1) if device == "cpu" else Stopwatch(device, seconds=0.1)
    dtype, lines = getattr(torch, arguments.dtype), []
    for name in arguments.kernels.split(","):
        found: dict[int, Config] = {}
        tuned = None
        for head_dim in map(int, arguments.head_dims.split(",")):
            print(f"\n{name}, head_dim {head_dim}", flush=True)
            try:
                tuner = Tuner(name, head_dim, dtype, device, time, report, arguments.most)
                tuned = tuner.table
                start, best = tuner.search()
            except Exception as error:  # one kernel's failure is named and ends no other's search
                report.attempt({"kernel": name, "head_dim": head_dim}, raiser(error))
                continue
            if best != start:
                found[tuner.slot] = best
        if tuned is not None:
            lines += [f"{tuned.name} by {name}: {'changed' if found else 'as it is'}", proposal(tuned, found)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description="Proposes rows of kernels/triton_config.py for this GPU.")
    parser.add_argument("--device", choices=("cuda",), default="cuda", help="also ROCm")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="with commas between")
    parser.add_argument("--head-dims", default="128,64")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--most", type=int, default=24, help="configurations tried for a kernel and head_dim")
    parser.add_argument("--budget-minutes", type=float, default=25, help="what has not begun by then is skipped by name")
    parser.add_argument("--out", type=Path, help="also write what was tried to this folder, as markdown and JSON")
    parser.add_argument("--dry-run", action="store_true", help="a few configurations through Triton's interpreter; its times mean nothing")
    arguments = parser.parse_args()
    unknown = set(arguments.kernels.split(",")) - set(KERNELS)
    if unknown:
        parser.error(f"--kernels: {', '.join(sorted(unknown))} is not one of {', '.join(KERNELS)}")
    device = "cuda"
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # has to stand before Triton is imported
        # bfloat16 goes wrong in the interpreter.
        device, arguments.dtype, arguments.head_dims, arguments.most = "cpu", "float16", "64", min(arguments.most, 3)
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU here (CUDA or ROCm). --dry-run tries a few configurations on a CPU, without meaning for speed")
    facts = machine(device)
    report = Report(arguments.budget_minutes)
    lines = tune(arguments, device, report)
    note = "A dry run through Triton's interpreter: its times mean nothing, and so does the proposal.\n\n" if arguments.dry_run else ""
    text = f"{note}{table(report.rows)}\nProposed rows (kernels/triton_config.py):\n\n```\n" + "\n".join(lines) + "\n```\n"
    print("\n" + text)
    if arguments.out:
        name = "tune_dry_run" if arguments.dry_run else "tune_" + re.sub(r"\W+", "_", facts["gpu"].lower()).strip("_")
        write(arguments.out, name, "Kernel configurations tried", facts, text, report.rows)


if __name__ == "__main__":
    main()
