"""What happened in a run, by step, layer and head. The one source for the live line, the report and the benchmarks.

Calls note small tensors (a density a head) that are read back together, once a forward, so that nothing waits for a
device in between. A flushed record holds numbers only.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .call import AttentionCall
from .config import MethodConfig
from .layout import VideoLayout

SCHEMA = 1

# A layer by its number, and by its stack where several stacks count alike; the main one is "".
LayerKey = tuple[int, str]


@dataclass(frozen=True)
class Figures:
    """What is worth telling about one sparse call, each [B, H], on any device.

    density: the computed share of pairs. temporal: SVG's head types. recall: AdaSpa's kept share of softmax mass.
    """

    density: Tensor
    temporal: Tensor | None = None
    recall: Tensor | None = None


def _name_of(layer: LayerKey) -> str:
    number, stack = layer
    return f"{number} {stack}" if stack else str(number)


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
    """The record of one run. `method` is its name, `asked_sparsity` what the person set."""

    def __init__(self, method: str, config: MethodConfig | None = None, steps: int = 0, layers: int | None = None, seed: int = 0, warmup: int = 0):
        self.method, self.config = method, config
        self.steps, self.layers, self.seed, self.warmup = steps, layers, seed, warmup
        self.model: str | None = None
        self.automatic: str | None = None
        self.backend: str | None = None
        self.layout: VideoLayout | None = None
        self.node: str | None = None
        self.outcome = "running"
        self.sparse_calls = self.dense_calls = 0
        self.reasons: Counter[str] = Counter()
        self.searches: Counter[int] = Counter()
        self.notes: list[str] = []
        self.step = 0
        self._sparsity = _Mean()
        self._cells: dict[tuple[int, LayerKey], _Mean] = defaultdict(_Mean)
        self._heads: dict[str, dict[LayerKey, list[_Mean]]] = {name: {} for name in ("sparsity", "temporal", "recall")}
        self._pending: list[tuple[int, LayerKey, Tensor, str]] = []
        self._lock = threading.Lock()

    @property
    def asked_sparsity(self) -> float:
        return self.config.sparsity if self.config else 0.0

    @property
    def achieved_sparsity(self) -> float:
        """Skipped share of query-key pairs, mean over the sparse calls."""
        return self._sparsity.value

    @property
    def run_sparsity(self) -> float:
        """The same over all self-attention calls of the video, dense ones included."""
        calls = self.sparse_calls + self.dense_calls
        return self.achieved_sparsity * self.sparse_calls / calls if calls else 0.0

    def note(self, sentence: str) -> None:
        with self._lock:
            if sentence not in self.notes:
                self.notes.append(sentence)

    def sparse(self, call: AttentionCall, figures: Figures) -> None:
        """A call ran sparse, with these figures."""
        named = (("sparsity", figures.density), ("temporal", figures.temporal), ("recall", figures.recall))
        with self._lock:
            self.sparse_calls += 1
            self.layout = call.layout
            self._pending += [(call.step, (call.layer, call.stack), value, name) for name, value in named if value is not None]

    def dense(self, step: int, layer: int | None, reason: str, calls: int = 1, stack: str = "") -> None:
        """So many calls ran dense, for one reason. layer: None for calls of no known layer."""
        with self._lock:
            self.dense_calls += calls
            self.reasons[reason] += calls
            if layer is not None:
                self._cells[step, (layer, stack)].add(0.0, calls)

    def searched(self, step: int) -> None:
        with self._lock:
            self.searches[step] += 1

    def flush(self) -> None:
        """Reads the noted tensors back, all of a device at once."""
        with self._lock:
            pending, self._pending = self._pending, []
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
        return [_name_of(layer) for layer in self._layers()]

    def by_layer_and_step(self) -> list[list[float | None]]:
        """Skipped share by layer, then step; None where no call came. The rows are those of `layer_names`."""
        steps = max(self.steps, max((step for step, _ in self._cells), default=-1) + 1)

        def value(step: int, layer: LayerKey) -> float | None:
            return round(self._cells[step, layer].value, 6) if (step, layer) in self._cells else None

        return [[value(step, layer) for step in range(steps)] for layer in self._layers()]

    def by_layer_and_head(self, name: str) -> dict[str, list[float | None]]:
        """"sparsity", "temporal" (share of classifications) or "recall", by layer's name: one number a head, None where it never was one."""
        rows = sorted(self._heads[name].items(), key=lambda row: (row[0][1], row[0][0]))
        return {_name_of(layer): [round(mean.value, 6) if mean.count else None for mean in means] for layer, means in rows}

    def to_json(self) -> dict:
        """The record as plain data; its form is versioned by "schema"."""
        self.flush()
        data = {
            "schema": SCHEMA, "method": self.method, "model": self.model, "automatic_settings": self.automatic, "outcome": self.outcome,
            "asked_sparsity": self.asked_sparsity, "achieved_sparsity": round(self.achieved_sparsity, 6), "run_sparsity": round(self.run_sparsity, 6),
            "sparse_calls": self.sparse_calls, "dense_calls": self.dense_calls, "reasons": dict(self.reasons),
            "tokens": self.layout.seq_len if self.layout else None, "layout": asdict(self.layout) if self.layout else None,
            "steps": self.steps, "warmup_steps": self.warmup, "layers": self.layers, "seed": self.seed, "backend": self.backend,
            "search_steps": sorted(self.searches), "notes": list(self.notes), "config": asdict(self.config) if self.config else None,
            "layer_names": self.layer_names(), "sparsity_by_layer_and_step": self.by_layer_and_step(),
        }
        for name, key in (("sparsity", "sparsity"), ("temporal", "temporal_share"), ("recall", "recall")):
            if self._heads[name]:
                data[f"{key}_by_layer_and_head"] = self.by_layer_and_head(name)
        return data
