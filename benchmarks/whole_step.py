"""Whole denoising steps of Wan-shaped transformers: python -m benchmarks.whole_step [--device cpu|cuda] [--dry-run].

Plain torch with random weights, self-attention through the real dispatch, so that profiling, search, planning and
Python show. A few layers are run and their time is scaled to the model's number of layers.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pack.attention.call import AttentionCall, Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS
from pack.attention.session import Found, Session
from torch import Tensor, nn

from . import opponents
from .inputs import STEPS, session_of
from .measuring import MissingError, Report, Stopwatch, described, machine, raiser, table

ABOUT = f"""
Wan-shaped transformers of plain torch (modulation, self-attention with RMS norms and rotary positions, cross-attention to 512 text
tokens, feed-forward), random weights, one condition. step_ms is the time of the layers run, scaled to the model's number of layers;
no embedding, head or VAE. The methods run through the real dispatch at their default settings, Auto at the sparsity of AdaSpa's
(attention under random weights leaves it next to nothing to skip at its fidelity); dense layers and steps run the default SDPA.
"sparse" is one sparse step, SVG's profiling included; "search" AdaSpa's and Auto's first search, whose step is dense besides, as is
AdaSpa's one before it; "refresh" AdaSpa's second search. run_ms: the mean step over a run of {STEPS} steps, warm-up and searches included;
run_gain: the default dense step over it. peak_mib: the most memory allocated during a step, with the weights of the layers run and
what a method keeps for them: only differences between rows of one model speak.
"""


@dataclass(frozen=True)
class Model:
    """A transformer's shape. layers: of the real model; run: how many of them are run."""

    name: str
    layers: int
    run: int
    heads: int
    head_dim: int
    ffn: int
    text: int = 512

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


WAN_1_3B = Model("Wan 1.3B", 30, 4, 12, 128, 8960)
WAN_14B = Model("Wan 14B", 40, 2, 40, 128, 13824)
VIDEOS = {"832x480, 81 frames": VideoLayout(21, 30, 52), "1280x720, 81 frames": VideoLayout(21, 45, 80)}
CASES = [(model, video, layout) for model in (WAN_1_3B, WAN_14B) for video, layout in VIDEOS.items()]
TINY_CASES = [(Model("tiny", 4, 2, 2, 64, 256, text=16), "no video", VideoLayout(3, 8, 9))]
CPU_CASES = [(Model("small", 8, 2, 4, 64, 1024, text=64), "no video", VideoLayout(9, 26, 26))]

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Block(nn.Module):
    """One layer of a Wan transformer."""

    def __init__(self, model: Model):
        super().__init__()
        dim = model.dim
        self.heads = model.heads
        self.modulation = nn.Parameter(torch.randn(6, 1, dim) / dim**0.5)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.text_q, self.text_k, self.text_v, self.text_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k, self.text_norm_q, self.text_norm_k = (nn.RMSNorm(dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, model.ffn), nn.GELU(approximate="tanh"), nn.Linear(model.ffn, dim))

    def forward(self, x: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor], layer: int, attention: Attention) -> Tensor:
        """x: [1, S, dim]; text: [1, T, dim]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k = (rotated(self._split(norm(part(y))), rotation) for part, norm in ((self.q, self.norm_q), (self.k, self.norm_k)))
        x = x + self.out(self._join(attention(q, k, self._split(self.v(y)), layer))) * gate
        y = self.norm(x)
        q, k = self._split(self.text_norm_q(self.text_q(y))), self._split(self.text_norm_k(self.text_k(text)))
        x = x + self.text_out(self._join(F.scaled_dot_product_attention(q, k, self._split(self.text_v(text)))))
        y = F.layer_norm(x, x.shape[-1:]) * (1 + ffn_scale) + ffn_shift
        return x + self.ffn(y) * ffn_gate

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def _join(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def rotation_of(layout: VideoLayout, head_dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles, [S, head_dim / 2]: about a third of the channels for each of frame, row and column."""
    half = head_dim // 2
    parts = (half - 2 * (half // 3), half // 3, half // 3)
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in (layout.frames, layout.height, layout.width)), indexing="ij")
    angles = [
        axis.flatten()[:, None] / 10000 ** (torch.arange(size, device=device) / size) for axis, size in zip(axes, parts, strict=True)
    ]
    angles = torch.cat(angles, -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x: [1, H, S, D] as a view of [1, S, H, D], and so the result."""
    cos, sin = (part[None, :, None] for part in rotation)
    even, odd = x.transpose(1, 2).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).transpose(1, 2)


class Steps:
    """A model on one video: its layers, its input, and a step of it with any attention."""

    def __init__(self, model: Model, layout: VideoLayout, device: str, dtype: torch.dtype):
        self.model, self.layout = model, layout
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            self.blocks = nn.ModuleList(Block(model).to(dtype) for _ in range(model.run)).requires_grad_(False)
            self.x = torch.randn(1, layout.seq_len, model.dim, generator=generator).to(dtype)
            self.text = torch.randn(1, model.text, model.dim, generator=generator).to(dtype)
        self.rotation = rotation_of(layout, model.head_dim, device, dtype)

    @torch.no_grad()
    def __call__(self, attention: Attention) -> Tensor:
        x = self.x
        for layer, block in enumerate(self.blocks):
            # The first number is left out: SVG's default keeps layer 0 dense.
            x = block(x, self.text, self.rotation, layer + 1, attention)
        return x

    def dense(self, backend: str | None = None) -> Callable[[], Tensor]:
        return lambda: self(lambda q, k, v, layer: opponents.sdpa(q, k, v, backend)())

    def sparse(self, session: Session, step: int, expect_dense: bool = False, found: dict[int, Found | None] | None = None) -> Tensor:
        """A step through the dispatch. found: what each layer is to have found so far; filled where it is empty.

        Raises RuntimeError where a call ran dense that should not, or the other way round.
        """

        def attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            call = AttentionCall(q, k, v, self.layout, layer, step, "a")
            if found is not None:
                state = session.state(call)
                state.found = found.setdefault(layer, state.found)
            result = sparse_attention(call, session)
            if isinstance(result, Dense) != expect_dense:
                raise RuntimeError(f"step {step} of {session.method.NAME} ran {f'dense: {result.reason}' if isinstance(result, Dense) else 'sparse'}")
            if found is not None and state.found.step != step:
                raise RuntimeError(f"step {step} of {session.method.NAME} did not search")
            if isinstance(result, Dense):
                return F.scaled_dot_product_attention(q, k, v) if result.output is None else result.output
            return result

        return self(attention)


def measure(report: Report, time: Stopwatch, device: str, dtype: torch.dtype, cases: list[tuple[Model, str, VideoLayout]]) -> None:
    """Rows of whole steps: dense, and each method on each case."""
    for model, video, layout in cases:
        labels = {"section": "steps", "model": model.name, "video": video, "tokens": layout.seq_len, "layers": model.layers, "run": model.run}
        try:
            if report.over():
                raise MissingError("skipped: the time was up")
            steps = Steps(model, layout, device, dtype)
        except Exception as error:  # a model that does not fit is no reason to end
            report.attempt(labels, raiser(error))
            continue
        _Measured(report, time, labels, steps).all()
        del steps
        if device == "cuda":
            torch.cuda.empty_cache()


class _Measured:
    """The rows of one model on one video."""

    def __init__(self, report: Report, time: Stopwatch, labels: dict, steps: Steps):
        self.report, self.time, self.labels, self.steps = report, time, labels, steps
        self.scale = steps.model.layers / steps.model.run

    def all(self) -> None:
        default = self.row("dense, default SDPA", lambda: self.steps.dense())
        kinds = {name: self.row(f"dense, SDPA {name}", lambda name=name: self.steps.dense(name)) for name in opponents.SDPA_BACKENDS}
        known = [row for row in (default, *kinds.values()) if row]
        if known:
            best = min(known, key=lambda row: row["step_ms"])
            self.report.attempt({**self.labels, "by": "dense, best SDPA"}, lambda: {key: best[key] for key in ("step_ms", "peak_mib") if key in best})
        for method in METHODS:
            self.method(method, default)

    def method(self, name: str, dense: dict | None) -> None:
        """A method's kinds of step, and the mean over a run."""
        session = session_of(name, sparsity=self.sparsity(name))
        warmup, refresh = session.schedule.warmup, session.schedule.refresh_at
        before = []
        for step in range(session.first_step, warmup):
            # Each starts from what the steps before it found, however often it is repeated.
            found: dict[int, Found | None] = {}
            by = f"{name}, search" if step == warmup - 1 else f"{name}, before the search"
            before.append(self.row(by, lambda step=step, found=found: lambda: self.steps.sparse(session, step, True, found)))
        # What has been found in a step is not looked for again in the same: SVG, which looks in every step, gets two in turn.
        turns = itertools.cycle((warmup,) if before else (warmup, warmup + 1))
        sparse = self.row(f"{name}, sparse", lambda: lambda: self.steps.sparse(session, next(turns)))
        again = []
        # Auto has no second search by the calendar: what it has found holds until a layer drifts, which the same tensors do not.
        if before and refresh is not None and not hasattr(METHODS[name], "observe"):
            found = {}
            again.append(self.row(f"{name}, refresh", lambda: lambda: self.steps.sparse(session, refresh, found=found)))
        if dense and sparse and all(before) and all(again):
            self.report.attempt({**self.labels, "by": f"{name}, run"}, lambda: self.run(name, warmup, dense, before, sparse, again))

    @staticmethod
    def sparsity(name: str) -> float:
        """What a method is asked to skip: its default, and where that follows from a fidelity, AdaSpa's."""
        default = METHODS[name].CONFIG().sparsity
        return default if default >= 0 else METHODS["AdaSpa"].CONFIG().sparsity

    def run(self, name: str, warmup: int, dense: dict, before: list[dict], sparse: dict, again: list[dict]) -> dict:
        """The mean step over a run. before: the method's own warm-up steps; again: its sparse steps that search.

        SVG's layer 0 stays dense by default; a step's other layers are as measured.
        """
        share = (1 if METHODS[name].CONFIG().dense_layers else 0) / self.steps.model.layers

        def step_ms(row: dict) -> float:
            return share * dense["step_ms"] + (1 - share) * row["step_ms"]

        rows = [dense] * (warmup - len(before)) + before + [sparse] * (STEPS - warmup - len(again)) + again
        mean = sum(map(step_ms, rows)) / STEPS
        gains = {"step_gain": dense["step_ms"] / step_ms(sparse), "run_ms": mean, "run_gain": dense["step_ms"] / mean}
        return {"sparsity": self.sparsity(name), "step_ms": step_ms(sparse), **gains}

    def row(self, by: str, make: Callable[[], Callable[[], Tensor]]) -> dict | None:
        def measured() -> dict:
            call = make()
            if not bool(call().isfinite().all()):
                raise RuntimeError("the step's output is not finite")
            times, _ = self.time(call)
            peak = {"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if self.time.device == "cuda" else {}
            return {"step_ms": times.median * self.scale, "p10": times.low * self.scale, "p90": times.high * self.scale, **peak}

        return self.report.attempt({**self.labels, "by": by}, measured)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_step", description="Whole steps of Wan-shaped transformers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: a small model")
    parser.add_argument("--budget-minutes", type=float, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="cpu: timed calls of each kind")
    parser.add_argument("--dry-run", action="store_true", help="tiny and through Triton's interpreter; its times mean nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # has to stand before Triton is imported
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here (CUDA or ROCm); --device cpu takes a small model, --dry-run a tiny one")
    device = "cpu" if arguments.dry_run else arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float16 if arguments.dry_run else torch.float32
    print(described(machine(device)) + "\n" + ABOUT, flush=True)
    time = Stopwatch(device, least=1 if arguments.dry_run else arguments.repeats) if device == "cpu" else Stopwatch(device)
    report = Report(arguments.budget_minutes)
    measure(report, time, device, dtype, cases=TINY_CASES if arguments.dry_run else CPU_CASES if device == "cpu" else CASES)
    print("\n" + table([{key: value for key, value in row.items() if key != "section"} for row in report.rows]))


if __name__ == "__main__":
    main()
