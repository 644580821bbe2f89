"""The two hosts of the demo, as comparisons need them: any settings, and in the embedded one attention's own error and time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pack.attention.call import AttentionCall, Dense
from pack.attention.clock import Mark, mark, milliseconds
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.sampling import sampled_rows
from pack.attention.session import Session
from pack.demo.clips import first_frames, model_input
from pack.demo.comfy_host import ComfyHost, NoComfyUIError, find_comfyui
from pack.demo.embedded import EmbeddedHost, SparseSelfAttention
from pack.demo.runs import Job, Run
from pack.demo.sampler import TIMESTEPS
from torch import Tensor

from .variants import Variant

_DENSE = Run("dense", "dense")
# The condition that the demo's own host names.
_CONDITION = "clips"


@dataclass(frozen=True)
class Done:
    """One run. latents: [B, 16, T, H, W]. record: a RunRecord's JSON. errors: relative L2 of attention's output by layer, then clip,
    the mean over its sparse calls, None for a layer without any; None where the host cannot tell. milliseconds: of a call, by kind.
    """

    latents: Tensor
    seconds: float
    record: dict
    errors: list[list[float] | None] | None
    milliseconds: dict[str, float]

    def digest(self) -> str:
        """Of the video's bits."""
        return hashlib.sha256(self.latents.contiguous().numpy().tobytes()).hexdigest()


class FidelityHost(Protocol):
    """What runs the model. facts: what its videos depend on besides model, clips and code."""

    name: str
    facts: dict[str, Any]
    triton: bool
    nodes: bool

    def why_not(self, variant: Variant) -> str | None:
        """Why the host cannot run a variant; None where it can."""

    def dense(self, job: Job) -> Done:
        """The run that all are compared with."""

    def sparse(self, variant: Variant, budget: float, job: Job) -> Done:
        """The run of a variant."""


class AttentionFigures:
    """What a run's self-attention calls were: how far each sparse one was from dense, and how long calls took."""

    def __init__(self, error_rows: int):
        """error_rows: how many query rows of a call are compared, one from each of equal strata; 0 is all."""
        self.error_rows = error_rows
        self._errors: dict[int, list[Tensor]] = defaultdict(list)
        self._marks: list[tuple[str, Mark, Mark]] = []

    def timed(self, kind: str, start: Mark, end: Mark) -> None:
        self._marks.append((kind, start, end))

    def compare(self, call: AttentionCall, out: Tensor) -> None:
        """Notes a sparse call's distance from dense attention, by clip. out: [B, H, S, D]."""
        q, seq = call.q, call.q.shape[2]
        if 0 < self.error_rows < seq:
            rows = sampled_rows(0, call.step, call.layer, self.error_rows, seq).to(q.device)
            q, out = q.index_select(2, rows), out.index_select(2, rows)
        exact = F.scaled_dot_product_attention(q, call.k, call.v).double()
        off = (out.double() - exact).square().sum((1, 2, 3))
        self._errors[call.layer].append((off / exact.square().sum((1, 2, 3))).sqrt())

    def by_layer(self, layers: int) -> list[list[float] | None]:
        """Relative L2 by layer, then clip: the mean over the layer's sparse calls."""
        means = {layer: torch.stack(found).mean(0).tolist() for layer, found in self._errors.items()}
        return [means.get(layer) for layer in range(layers)]

    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds of a call, by kind: sparse, search (computes the dense output too), dense."""
        found: dict[str, list[float]] = defaultdict(list)
        for kind, start, end in self._marks:
            took = milliseconds(start, end, wait=True)
            if took is not None:
                found[kind].append(took)
        return {kind: sum(times) / len(times) for kind, times in sorted(found.items())}


class MeasuredSelfAttention(SparseSelfAttention):
    """The demo's processor, whose calls are timed and, where they ran sparse, compared with dense attention outside of that time."""

    def __init__(self, session: Session, layout: VideoLayout, layer: int, figures: AttentionFigures):
        super().__init__(session, layout, layer)
        self.figures = figures

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        record = self.session.record
        call = AttentionCall(q, k, v, self.layout, self.layer, record.step, _CONDITION)
        start = mark(q.device)
        result = sparse_attention(call, self.session)
        if not isinstance(result, Dense):
            self.figures.timed("sparse", start, mark(q.device))
            self.figures.compare(call, result)
            return result
        record.dense(record.step, self.layer, result.reason)
        out = F.scaled_dot_product_attention(q, k, v) if result.output is None else result.output
        self.figures.timed("dense" if result.output is None else "search", start, mark(q.device))
        return out


class Embedded(EmbeddedHost):
    """The demo's own host, on a CPU or a GPU."""

    nodes = False

    def __init__(self, device: str = "cpu", error_rows: int = 0):
        super().__init__()
        self.device, self.error_rows = torch.device(device), error_rows
        self.model.to(self.device)
        self.triton = self.device.type != "cpu"
        self.facts = {"host": self.name, "torch": torch.__version__, "device": _name_of(self.device), "error_rows": error_rows}
        self._figures: AttentionFigures | None = None

    def why_not(self, variant: Variant) -> str | None:
        return variant.why_not()

    def dense(self, job: Job) -> Done:
        outcome = self.run(_DENSE, job, lambda *step: None)
        return Done(outcome.latents, outcome.seconds, outcome.record, None, {})

    def sparse(self, variant: Variant, budget: float, job: Job) -> Done:
        self._figures = figures = AttentionFigures(self.error_rows)
        run = Run(variant.name, variant.title, variant.method, settings=vars(variant.config(budget, job.steps)))
        try:
            outcome = self.run(run, job, lambda *step: None)
        finally:
            self._figures = None
        return Done(outcome.latents, outcome.seconds, outcome.record, figures.by_layer(len(self.model.blocks)), figures.milliseconds())

    @torch.inference_mode()
    def _predict(self, job: Job, x: Tensor, sigma: float) -> Tensor:
        """As the demo's, with the model on any device."""
        timestep = torch.full((len(x),), sigma * TIMESTEPS, device=self.device)
        given = model_input(x, first_frames(job.clips.latents)).to(self.device)
        return self.model(given, timestep, job.clips.text.to(self.device), return_dict=False)[0].cpu()

    def _install(self, session: Session | None, layout: VideoLayout) -> None:
        super()._install(session, layout)
        if session is not None and self._figures is not None:
            for layer, block in enumerate(self.model.blocks):
                block.attn1.set_processor(MeasuredSelfAttention(session, layout, layer, self._figures))


class Comfy:
    """A real ComfyUI, through its HTTP API. It does not tell how far a call was from dense attention, and runs what nodes can be set to."""

    nodes = True

    def __init__(self, stack: ExitStack):
        comfyui = find_comfyui()
        if comfyui is None:
            raise NoComfyUIError("no ComfyUI: COMFYUI_PATH is not set, and this folder does not lie in a custom_nodes")
        self._host = stack.enter_context(ComfyHost(comfyui))
        self.name = self._host.name
        self.triton = True
        self.facts = {"host": self.name}
        self._nodes = self._host.server.get("/object_info")

    def why_not(self, variant: Variant) -> str | None:
        if reason := variant.why_not():
            return reason
        if variant.node not in self._nodes:
            return "no node does this"
        inputs = self._nodes[variant.node]["input"]
        known = {**inputs.get("required", {}), **inputs.get("optional", {})}
        missing = sorted(set(variant.node_settings(0.5, 50)) - set(known)) if variant.config(0.5, 50) else []
        return f"the node has no input {', '.join(missing)}" if missing else None

    def dense(self, job: Job) -> Done:
        outcome = self._host.run(_DENSE, job, lambda *step: None)
        return Done(outcome.latents, outcome.seconds, outcome.record, None, {})

    def sparse(self, variant: Variant, budget: float, job: Job) -> Done:
        run = Run(variant.name, variant.title, variant.method, variant.node, variant.node_settings(budget, job.steps))
        outcome = self._host.run(run, job, lambda *step: None)
        costs = outcome.record.pop("costs", None) or {}
        return Done(outcome.latents, outcome.seconds, outcome.record, None, costs.get("call_ms", {}))


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
