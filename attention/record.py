"""What happened in a run, by step, layer and head. The one source for the live line, the report and the benchmarks.

Calls note small tensors (a density a head) that are read back together, once a forward, so that nothing waits for a
device in between. A flushed record holds numbers only.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import AttentionCall
from .clock import Mark, milliseconds
from .config import MethodConfig
from .cost import Gain
from .layout import VideoLayout

if TYPE_CHECKING:
    from .probe import ProbeRecord

SCHEMA = 1

# Kinds of calls of the video that are timed: a search computes the dense output too.
KINDS = ("sparse", "dense", "search")
# A layer by its number, and by its stack where several stacks count alike; the main one is "".
LayerKey = tuple[int, str]


@dataclass(frozen=True)
class Figures:
    """What is worth telling about one sparse call, each [B, H], on any device.

    density: the computed share of pairs. temporal: SVG's head types. recall: AdaSpa's kept share of softmax mass. error: Auto's
    measured relative L2 against dense attention, on a sample of rows.
    """

    density: Tensor
    temporal: Tensor | None = None
    recall: Tensor | None = None
    error: Tensor | None = None


def name_of_layer(layer: LayerKey) -> str:
    """What a layer is called: "3", or "3 vace"."""
    number, stack = layer
    return f"{number} {stack}" if stack else str(number)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True)
class _Bits:
    """A table bool [heads, size, size] in plain bytes, 8 entries each."""

    heads: int
    size: int
    packed: bytes

    @classmethod
    def of(cls, table: Tensor) -> _Bits:
        padded = torch.nn.functional.pad(table.cpu(), (0, -table.shape[-1] % 8))
        return cls(len(table), table.shape[-1], (padded.unflatten(-1, (-1, 8)) * _BITS).sum(-1, dtype=torch.uint8).numpy().tobytes())

    def table(self) -> Tensor:
        """bool [heads, size, size]."""
        packed = torch.frombuffer(bytearray(self.packed), dtype=torch.uint8).view(self.heads, self.size, -1)
        return ((packed[..., None] & _BITS) > 0).flatten(-2)[..., : self.size]


class _Mean:
    """A running mean."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value: float, weight: int = 1) -> None:
        self.total += value * weight
        self.count += weight

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class RunRecord:
    """The record of one run. `method` is its name."""

    def __init__(self, method: str, config: MethodConfig | None = None, steps: int = 0, layers: int | None = None, seed: int = 0, warmup: int = 0):
        self.method, self.config = method, config
        self.steps, self.layers, self.seed, self.warmup = steps, layers, seed, warmup
        self.model: str | None = None
        self.automatic: str | None = None
        self.backend: str | None = None
        self.layout: VideoLayout | None = None
        self.node: str | None = None
        self.expected: Gain | None = None
        self.plan_bytes = 0
        self.probe: ProbeRecord | None = None
        self.outcome = "running"
        self.sparse_calls = self.dense_calls = 0
        self.reasons: Counter[str] = Counter()
        self.searches: Counter[int] = Counter()
        self._steps: Counter[tuple[int, str]] = Counter()
        self.notes: list[str] = []
        self.step = 0
        self._sparsity, self._error = _Mean(), _Mean()
        self._errors: dict[tuple[int, LayerKey], _Mean] = defaultdict(_Mean)
        self._cells: dict[tuple[int, LayerKey], _Mean] = defaultdict(_Mean)
        self._heads: dict[str, dict[LayerKey, list[_Mean]]] = {name: {} for name in ("sparsity", "temporal", "recall", "error")}
        self._pending: list[tuple[int, LayerKey, Tensor, str]] = []
        self._pictures: dict[LayerKey, Tensor | _Bits] = {}
        self._marks: list[tuple[str, LayerKey | None, Mark, Mark]] = []
        self._times: dict[tuple[str, LayerKey | None], _Mean] = defaultdict(_Mean)
        self._lock = threading.Lock()

    @property
    def asked_sparsity(self) -> float | None:
        """What the person set; None where the share is what something else leaves, as Auto's fidelity."""
        if self.config is None:
            return 0.0
        return self.config.sparsity if self.config.sparsity >= 0 else None

    @property
    def asked_error(self) -> float | None:
        """The relative L2 error that sparse calls may have; None where a share to skip was asked for."""
        return round(1 - self.config.fidelity, 6) if self.asked_sparsity is None else None

    @property
    def measured_error(self) -> float | None:
        """The relative L2 error against dense attention, mean over the sparse calls that were measured; None where none was."""
        return self._error.value if self._error.count else None

    @property
    def achieved_sparsity(self) -> float:
        """Skipped share of query-key pairs, mean over the sparse calls."""
        return self._sparsity.value

    def sparsity_in(self, cells: Iterable[tuple[int, LayerKey]]) -> float:
        """Skipped share of query-key pairs, mean over the calls of these steps and layers; 0 where none of them has been read back."""
        mean = _Mean()
        for cell in sorted(cells):
            if cell in self._cells:
                mean.add(self._cells[cell].value, self._cells[cell].count)
        return mean.value

    @property
    def calls(self) -> int:
        """All self-attention calls of the video so far."""
        return self.sparse_calls + self.dense_calls

    @property
    def run_sparsity(self) -> float:
        """The same over all self-attention calls of the video, dense ones included."""
        return self.achieved_sparsity * self.sparse_calls / self.calls if self.calls else 0.0

    def note(self, sentence: str) -> None:
        with self._lock:
            if sentence not in self.notes:
                self.notes.append(sentence)

    def withdraw(self, sentence: str) -> None:
        """Takes a note back that has turned out wrong."""
        with self._lock:
            self.notes = [note for note in self.notes if note != sentence]

    def sparse(self, call: AttentionCall, figures: Figures) -> None:
        """A call ran sparse, with these figures."""
        named = (("sparsity", figures.density), *((name, getattr(figures, name)) for name in ("temporal", "recall", "error")))
        with self._lock:
            self.sparse_calls += 1
            self._steps[call.step, "sparse"] += 1
            self.layout = call.layout
            self._pending += [(call.step, (call.layer, call.stack), value, name) for name, value in named if value is not None]

    def dense(self, step: int, layer: int | None, reason: str, calls: int = 1, stack: str = "") -> None:
        """So many calls ran dense, for one reason. layer: None for calls of no known layer."""
        with self._lock:
            self.dense_calls += calls
            self._steps[step, "dense"] += calls
            self.reasons[reason] += calls
            if layer is not None:
                self._cells[step, (layer, stack)].add(0.0, calls)

    def timed(self, kind: str, layer: LayerKey | None, start: Mark, end: Mark) -> None:
        """A call of one of KINDS took from one mark to another."""
        with self._lock:
            self._marks.append((kind, layer, start, end))

    def call_ms(self, kind: str) -> float | None:
        """Mean milliseconds of a call of a kind; None where none was timed."""
        means = [mean for (of, _), mean in list(self._times.items()) if of == kind]
        count = sum(mean.count for mean in means)
        return sum(mean.total for mean in means) / count if count else None

    def ms_by_layer(self) -> dict[str, dict[str, float]]:
        """Mean milliseconds of a call, by layer's name, then kind."""
        found: dict[str, dict[str, float]] = {}
        for (kind, layer), mean in sorted(self._times.items(), key=lambda row: (row[0][1] is None, (row[0][1] or (0, ""))[::-1], row[0][0])):
            if layer is not None:
                found.setdefault(name_of_layer(layer), {})[kind] = round(mean.value, 3)
        return found

    def calls_by_step(self) -> dict[str, list[int]]:
        """How many calls of the video ran sparse and dense, by step."""
        steps = max(self.steps, max((step for step, _ in self._steps), default=-1) + 1)
        return {kind: [self._steps[step, kind] for step in range(steps)] for kind in ("sparse", "dense")}

    @property
    def steps_without_calls(self) -> int:
        """How many steps saw no call of the video; 0 where none did in the whole run."""
        seen = len({step for step, _ in self._steps})
        return max(self.steps - seen, 0) if seen else 0

    def head_percentiles(self) -> tuple[float, float, float] | None:
        """The 10th, 50th and 90th percentile of the heads' skipped share, over all layers; None where nothing ran sparse."""
        means = sorted(mean.value for heads in list(self._heads["sparsity"].values()) for mean in heads if mean.count)
        if not means:
            return None
        return tuple(means[round(share * (len(means) - 1))] for share in (0.1, 0.5, 0.9))

    def wants_picture(self, call: AttentionCall) -> bool:
        """Whether no picture of this layer's masks is kept yet."""
        return (call.layer, call.stack) not in self._pictures

    def picture(self, call: AttentionCall, pairs: Tensor) -> None:
        """Keeps which of the layout's picture_rows see which: bool [B, H, R, R], of the batch's first. Read back with the figures."""
        with self._lock:
            self._pictures[call.layer, call.stack] = pairs[0]

    def mask_picture(self, layer: int, head: int) -> Tensor | None:
        """bool [R, R] of a layer, by its place among `layer_names`, and a head; None where none is kept."""
        names = self._layers()
        self.flush()
        kept = self._pictures.get(names[layer]) if -len(names) <= layer < len(names) else None
        return kept.table()[head] if kept is not None and -kept.heads <= head < kept.heads else None

    def forget_pictures(self) -> None:
        """Frees the pictures of masks, as for a record that is not the newest."""
        with self._lock:
            self._pictures.clear()

    def measured(self, step: int, layer: LayerKey, error: float) -> None:
        """A sparse call was compared with dense attention: its relative L2 error, over all heads."""
        if math.isfinite(error):
            with self._lock:
                self._error.add(error)
                self._errors[step, layer].add(error)

    def searched(self, step: int) -> None:
        with self._lock:
            self.searches[step] += 1

    def flush(self, wait: bool = False) -> None:
        """Reads the noted tensors back, all of a device at once, and the times of calls that are through; `wait`: of all calls."""
        with self._lock:
            pending, self._pending = self._pending, []
            marks, self._marks = self._marks, []
            for layer, picture in self._pictures.items():
                if isinstance(picture, Tensor):
                    self._pictures[layer] = _Bits.of(picture)
            for kind, layer, start, end in marks:
                took = milliseconds(start, end, wait)
                if took is not None:
                    self._times[kind, layer].add(took)
                elif start is not None and not wait:
                    self._marks.append((kind, layer, start, end))
        by_device: dict[torch.device, list] = defaultdict(list)
        for item in pending:
            by_device[item[2].device].append(item)
        for items in by_device.values():
            values = torch.cat([value.detach().float().flatten() for *_, value, _ in items]).cpu()
            sizes = [value.numel() for *_, value, _ in items]
            for (step, layer, value, name), figures in zip(items, values.split(sizes), strict=True):
                self._add(step, layer, name, figures.view(value.shape).double().mean(0))

    def _add(self, step: int, layer: LayerKey, name: str, heads: Tensor) -> None:
        """heads: [H], the mean over the batch."""
        with self._lock:
            if name == "sparsity":
                heads = 1 - heads
                self._sparsity.add(float(heads.mean()))
                self._cells[step, layer].add(float(heads.mean()))
            means = self._heads[name].get(layer, [])
            if len(means) != len(heads):
                means = self._heads[name][layer] = [_Mean() for _ in heads]  # a part of the heads was called: keep the newest
            for mean, value in zip(means, heads.tolist(), strict=True):
                if math.isfinite(value):  # activations that are not numbers have no recall, and JSON no word for it
                    mean.add(value)

    def _layers(self) -> list[LayerKey]:
        """The layers of the main stack up to the last that called, then those of other stacks, by number."""
        seen = {layer for _, layer in self._cells}
        last = max((number for number, _ in seen), default=-1)
        return [(number, "") for number in range(last + 1)] + sorted(layer for layer in seen if layer[1])

    def layer_names(self) -> list[str]:
        """What the rows of by_layer_and_step are called: "0", "1", then such as "0 vace"."""
        return [name_of_layer(layer) for layer in self._layers()]

    def by_layer_and_step(self, name: str = "sparsity") -> list[list[float | None]]:
        """Skipped share, or measured "error", by layer, then step; None where no call came. The rows are those of `layer_names`."""
        steps = max(self.steps, max((step for step, _ in self._cells), default=-1) + 1)
        cells = self._errors if name == "error" else self._cells

        def value(step: int, layer: LayerKey) -> float | None:
            return round(cells[step, layer].value, 6) if (step, layer) in cells else None

        return [[value(step, layer) for step in range(steps)] for layer in self._layers()]

    def by_layer_and_head(self, name: str) -> dict[str, list[float | None]]:
        """"sparsity", "temporal" (share of classifications), "recall" or "error", by layer's name: one number a head, None where it never was one."""
        rows = sorted(self._heads[name].items(), key=lambda row: (row[0][1], row[0][0]))
        return {name_of_layer(layer): [round(mean.value, 6) if mean.count else None for mean in means] for layer, means in rows}

    def costs(self) -> dict:
        """What the run cost and was expected to gain, as plain data: unlike the rest of the record, other in every run."""
        self.flush(wait=True)
        return {
            "expected": asdict(self.expected) if self.expected else None, "plan_bytes": self.plan_bytes,
            "call_ms": {kind: round(took, 3) for kind in KINDS if (took := self.call_ms(kind)) is not None}, "call_ms_by_layer": self.ms_by_layer(),
        }

    def to_json(self) -> dict:
        """The record as plain data, without its costs; its form is versioned by "schema". The same input gives the same record."""
        self.flush(wait=True)
        data = {
            "schema": SCHEMA, "method": self.method, "model": self.model, "automatic_settings": self.automatic, "outcome": self.outcome,
            "asked_sparsity": self.asked_sparsity, "asked_error": self.asked_error,
            "achieved_sparsity": round(self.achieved_sparsity, 6), "run_sparsity": round(self.run_sparsity, 6),
            "sparse_calls": self.sparse_calls, "dense_calls": self.dense_calls, "reasons": dict(self.reasons),
            "tokens": self.layout.seq_len if self.layout else None, "layout": asdict(self.layout) if self.layout else None,
            "steps": self.steps, "warmup_steps": self.warmup, "layers": self.layers, "seed": self.seed, "backend": self.backend,
            "search_steps": sorted(self.searches), "calls_by_step": self.calls_by_step(), "notes": list(self.notes),
            "config": asdict(self.config) if self.config else None,
            "layer_names": self.layer_names(), "sparsity_by_layer_and_step": self.by_layer_and_step(),
        }
        for name, key in (("sparsity", "sparsity"), ("temporal", "temporal_share"), ("recall", "recall"), ("error", "error")):
            if self._heads[name]:
                data[f"{key}_by_layer_and_head"] = self.by_layer_and_head(name)
        if self.measured_error is not None:
            data["measured_error"] = round(self.measured_error, 6)
            data["error_by_layer_and_step"] = self.by_layer_and_step("error")
        return data
