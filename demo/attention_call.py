"""One attention call of a longer video, dense against sparse: where the time goes once there is something to skip.

Dense and sparse are timed in turns, so that whatever else the machine does falls on all alike. Finding a plan is timed
apart: SVG does it at every sparse step, AdaSpa twice a run and Auto once, the first time together with a dense output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..attention.call import AttentionCall
from ..attention.layout import VideoLayout
from ..attention.record import RunRecord
from ..attention.schedule import Schedule
from ..attention.session import Session
from ..attention.warmup import make_schedule
from ..kernels import SparsePlan
from .runs import HEAD_DIM, HEADS, RUNS, Run
from .sampler import make_sigmas, percent_to_sigma

LAYOUT = VideoLayout(16, 32, 32)
REPEATS = 5
# How far each kind of head looks, in frames, rows and columns: two look around in their frame, two along time.
_REACH = ((1.0, 6.0, 6.0), (1.0, 3.0, 9.0), (30.0, 1.5, 1.5), (12.0, 1.0, 3.0))
# The score of a token with itself; that of a token out of reach is about 0.
_PEAK = 8.0


def make_tensors(layout: VideoLayout = LAYOUT, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, float32 [1, H, S, D], whose heads look where `_REACH` says (random Fourier features of a Gaussian)."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(size, dtype=torch.float32) for size in (layout.frames, layout.height, layout.width)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [S, 3]
    heads = []
    for reach in _REACH[:HEADS]:
        waves = torch.randn(3, HEAD_DIM, generator=generator) / torch.tensor(reach)[:, None]
        phases = torch.rand(HEAD_DIM, generator=generator) * 2 * torch.pi
        heads.append(torch.cos(places @ waves + phases) * (2 / HEAD_DIM) ** 0.5)
    features = torch.stack(heads)[None] * (_PEAK * HEAD_DIM**0.5) ** 0.5
    q, k = (features + 0.1 * torch.randn(features.shape, generator=generator) for _ in range(2))
    return q, k, torch.randn(features.shape, generator=generator)


@dataclass(frozen=True)
class Planned:
    """A method's plan for one call. Seconds: planning, as often as `planning_steps` of a run, for Auto checking what came out; searching: the
    warm-up steps that a search is in, `searching_steps` of them, with their dense outputs."""

    plan: SparsePlan
    sparsity: float
    planning: float
    planning_steps: int
    searching: float
    searching_steps: int


@torch.inference_mode()
def measure(layout: VideoLayout = LAYOUT, steps: int = 20, tick: Callable[[], Any] = lambda: None) -> dict:
    """What report.json has under "attention_call", added up over a run of `steps`. `tick` is called `count_ticks()` times on the way."""
    q, k, v = make_tensors(layout)
    plans = {}
    for run in RUNS[1:]:
        plans[run.name] = _plan(run, q, k, v, layout, steps)
        tick()

    def attend(name: str) -> Tensor:
        if name == "dense":
            return F.scaled_dot_product_attention(q, k, v)
        return _attend(plans[name].plan, q, k, v)

    seconds, outputs = {run.name: [] for run in RUNS}, {}
    for _ in range(REPEATS):
        for name, times in seconds.items():
            took, outputs[name] = _timed(lambda name=name: attend(name))
            times.append(took)
            tick()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens": layout.seq_len, "layout": str(layout), "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "repeats": REPEATS, "steps": steps,
        "dense_seconds": medians["dense"],
        "methods": {name: _row(found, steps, medians[name], medians["dense"], outputs[name], outputs["dense"]) for name, found in plans.items()},
    }


def _attend(plan: SparsePlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sparse call, with what each of them makes anew."""
    pooled = None if plan.pooled is None else kernels.pool_blocks(k, v, plan.mask.block_k, k_order=plan.k_order)
    return kernels.block_sparse_attention(q, k, v, plan.mask, q_order=plan.q_order, k_order=plan.k_order, pooled=pooled)


def count_ticks() -> int:
    """How often `measure` calls `tick`."""
    return len(RUNS) - 1 + REPEATS * len(RUNS)


def _plan(run: Run, q: Tensor, k: Tensor, v: Tensor, layout: VideoLayout, steps: int) -> Planned:
    """Plays a run's steps on the method: its first plan, one where a later one is due, one that reuses it."""
    schedule = _schedule(run, steps)
    session = Session(run.method, run.config, schedule, 0, RunRecord(run.method.NAME, run.config, steps), 1)

    def plan(step: int) -> Any:
        call = AttentionCall(q, k, v, layout, 0, step, "call")
        return run.method.plan(call, session.config, session.state(call))

    searching_steps = range(run.method.first_step(schedule), schedule.warmup)
    searching = sum(_timed(lambda step=step: plan(step))[0] for step in searching_steps)
    searches = len(searching_steps) > 0
    if not searches:
        plan(schedule.warmup)  # what is made once a run
    observe = getattr(run.method, "observe", None)
    # Auto searches anew where it has drifted, which tensors that stay the same do not: it only looks at what comes out.
    again = schedule.refresh_at if searches and not observe else schedule.warmup + 1
    planning, found = _timed(lambda: plan(again))
    call = AttentionCall(q, k, v, layout, 0, again, "call")
    density = float(session.state(call).figures.density.mean())
    if observe:
        out = _attend(found, q, k, v)
        planning, _ = _timed(lambda: observe(call, session.config, session.state(call), out))
    session.end()
    every_step = not searches or observe is not None
    return Planned(found, 1 - density, planning, steps - schedule.warmup if every_step else 1, searching, len(searching_steps))


def _schedule(run: Run, steps: int) -> Schedule:
    return make_schedule(make_sigmas(steps).tolist(), percent_to_sigma, 1.0, least_warmup=run.method.LEAST_WARMUP)


def _row(found: Planned, steps: int, seconds: float, dense: float, out: Tensor, expected: Tensor) -> dict:
    """One method's figures. run_seconds: this layer's self-attention over a whole run, planning and warm-up included."""
    warmup = _schedule(RUNS[1], steps).warmup
    run_seconds = (warmup - found.searching_steps) * dense + found.searching + found.planning_steps * found.planning + (steps - warmup) * seconds
    return {
        "sparsity": found.sparsity, "seconds": seconds, "speed_up": dense / seconds, "planning_seconds": found.planning,
        "planning_steps": found.planning_steps, "searching_seconds": found.searching, "searching_steps": found.searching_steps,
        "run_steps": steps, "run_seconds": run_seconds, "run_speed_up": steps * dense / run_seconds,
        "relative_error": float((out - expected).norm() / expected.norm()),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
