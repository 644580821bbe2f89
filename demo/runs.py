"""The four runs, what each is asked for, and what a host hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

from torch import Tensor

from ..attention.config import MethodConfig
from ..attention.layout import VideoLayout
from ..attention.methods import adaspa, auto, svg
from ..attention.record import RunRecord
from .clips import Clips

LAYERS = 6
HEADS = 4
HEAD_DIM = 64
# Latent voxels of a token: (frames, height, width).
PATCH = (1, 2, 2)
# All else as the nodes have it. Left alone, so short a video would stay dense: there is nothing to gain.
SETTINGS = {"min_tokens": 0}


@dataclass(frozen=True)
class Run:
    """One of the four. name: of its file. method: a module of attention.methods, None for dense. node: the patch node's id in ComfyUI.

    settings: of the method's config, and inputs of the node.
    """

    name: str
    title: str
    method: ModuleType | None = None
    node: str | None = None
    settings: Mapping[str, object] = field(default_factory=lambda: SETTINGS, hash=False)

    @property
    def config(self) -> MethodConfig | None:
        return self.method.CONFIG(**self.settings) if self.method else None


RUNS = (
    Run("dense", "dense"),
    Run("svg", "SVG", svg, "SparseAttentionPatchSVG"),
    Run("adaspa", "AdaSpa", adaspa, "SparseAttentionPatchAdaSpa"),
    Run("auto", "Auto", auto, "SparseAttentionPatchAuto"),
)


@dataclass(frozen=True)
class Job:
    """What every run is asked for alike: a continuation of each clip, all in one batch."""

    clips: Clips
    steps: int
    seed: int

    @property
    def layout(self) -> VideoLayout:
        return VideoLayout(*(size // edge for size, edge in zip(self.clips.latents.shape[2:], PATCH, strict=True)))


@dataclass(frozen=True)
class Outcome:
    """latents: float32 [B, 16, T, H, W] in model space. seconds: of the sampling alone. record: a RunRecord's JSON."""

    latents: Tensor
    seconds: float
    record: dict


# Called after each step with the steps done and the run's sparsity so far over all its calls.
OnStep = Callable[[int, float], None]


class Host(Protocol):
    """What runs the model. `name` goes into the report."""

    name: str

    def warm_up(self, job: Job) -> None:
        """One model evaluation that nobody times: threads, caches and allocators are ready after it."""

    def run(self, run: Run, job: Job, on_step: OnStep) -> Outcome:
        """Samples the job once."""

    def process_ids(self) -> tuple[int, ...]:
        """Of the processes that do the work."""


def dense_record(job: Job) -> dict:
    """The record of the run without a method: every call was dense, by choice."""
    record = RunRecord("dense", steps=job.steps, layers=LAYERS, seed=job.seed, warmup=job.steps)
    record.model, record.outcome, record.layout = "Wan 2.1 / 2.2", "finished", job.layout
    for step in range(job.steps):
        for layer in range(LAYERS):
            record.dense(step, layer, "the dense run, for comparison")
    return record.to_json()
