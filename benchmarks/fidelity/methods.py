"""Methods that only comparisons need: each is what a module of attention.methods is, and most are one with a part exchanged."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pack import kernels
from pack.attention.blocks import VideoBlocks
from pack.attention.budget import BLOCK_K, pairs_allowed
from pack.attention.call import AttentionCall, Dense
from pack.attention.config import MethodConfig
from pack.attention.methods import adaspa, auto, svg
from pack.attention.record import Figures
from pack.attention.schedule import Schedule
from pack.attention.session import Found, LayerState
from pack.kernels import BlockMask, PooledBlocks, SparsePlan, TokenOrder
from pack.kernels.block_mask import block_rows
from torch import Tensor

# The papers' runs.
PAPER_STEPS = 50


def of_fifty(count: int, steps: int) -> int:
    """So many steps of the papers' 50, in a run of `steps`."""
    return round(count * steps / PAPER_STEPS)


def identity(method: Any) -> str:
    """What tells a method from another one: its name, and for a wrapped one what is different."""
    return getattr(method, "IDENTITY", method.NAME)


def module_of(method: Any) -> Any:
    """The module of attention.methods that does the work."""
    return getattr(method, "INNER", method)


def _like(method: Any, identity: str, plan: Any, **others: Any) -> SimpleNamespace:
    """A method that is another one but for its plan."""
    names = ("NAME", "CONFIG", "AUTOMATIC", "LEAST_WARMUP", "PATTERN_SETTINGS", "first_step", "to_pattern", "from_pattern")
    found = {name: getattr(method, name) for name in names} | ({"observe": method.observe} if hasattr(method, "observe") else {})
    return SimpleNamespace(**{**found, "IDENTITY": identity, "INNER": method, "plan": plan, **others})


def searches_at(*of_50: int) -> SimpleNamespace:
    """AdaSpa that searches at these steps of 50, the first of them the last of warm-up, scaled to the run."""
    if list(of_50) != sorted(set(of_50)) or not of_50:
        raise ValueError(f"searches at {of_50}: these do not rise")

    def plan(call: AttentionCall, config: MethodConfig, state: LayerState) -> SparsePlan | Dense:
        schedule, found = state.run.schedule, state.found
        searched = found.step if found is not None and found.what is not None else schedule.warmup - 1
        # Numbered from 1, as in the paper's figure 7. A search is due so many steps after the one before.
        later = [step for step in (max(of_fifty(step, schedule.steps), 1) - 1 for step in of_50[1:]) if step > searched]
        return adaspa.plan(call, replace(config, cache_refresh=later[0] - searched if later else 0), state)

    return _like(adaspa, f"AdaSpa, searches at {list(of_50)}", plan)


def one_kind(temporal: bool) -> SimpleNamespace:
    """SVG whose heads are all of one kind, unlooked at: the paper's "temporal only", and its opposite."""

    def plan(call: AttentionCall, config: MethodConfig, state: LayerState) -> SparsePlan | Dense:
        kind = torch.full(call.q.shape[:2], temporal, dtype=torch.bool, device=call.q.device)
        state.found = state.found or Found(call.step, kind)
        return svg.plan(call, replace(config, cache_refresh=0), state)

    return _like(svg, f"SVG, {'temporal' if temporal else 'spatial'} heads alone", plan)


# The edge of a compact block of 64 tokens: what "beside" means for blocks.
_BOX = 4.0


def with_bands() -> SimpleNamespace:
    """Auto that keeps narrow bands beside what it finds: a row's own place in every frame, and its surroundings in its own frames."""
    worth_of = auto._worth

    def worth(
        call: AttentionCall, lse: Tensor, config: MethodConfig, blocks: VideoBlocks, pooled: PooledBlocks | None, backend: str,
    ) -> Tensor:
        queries, keys = (_centres(call, blocks, order, size) for order, size in ((blocks.q_order, blocks.block_q), (blocks.k_order, BLOCK_K)))
        apart = (queries[blocks.sink_rows :, None] - keys[None, blocks.sink_columns :]).abs() / _BOX  # [Qv, Kv, 3]: frames, rows, columns
        place = apart[..., 1:].amax(-1)
        band = (place < 1) | ((apart[..., 0] < 1) & (place < 2))
        return worth_of(call, lse, config, blocks, pooled, backend).masked_fill(band.to(call.q.device), torch.inf)

    def plan(call: AttentionCall, config: MethodConfig, state: LayerState) -> SparsePlan | Dense:
        with mock.patch.object(auto, "_worth", worth):
            return auto.plan(call, config, state)

    return _like(auto, "Auto with bands", plan)


def _centres(call: AttentionCall, blocks: VideoBlocks, order: TokenOrder | None, size: int) -> Tensor:
    """Where each block lies, on average: float32 [blocks, 3], in latent frames and tokens of height and width."""
    layout = call.layout
    rows = block_rows(order, layout.seq_len, size, torch.device("cpu") if order is None else order.rows.device)[0].cpu()
    place = (rows.clamp(min=0) - layout.prefix).clamp(0, layout.video_tokens - 1)
    where = torch.stack([place // layout.tokens_per_frame, place // layout.width % layout.height, place % layout.width], -1).float()
    present = (rows >= 0)[..., None]
    return (where * present).sum(1) / present.sum(1).clamp(min=1)


def _first_sparse_step(schedule: Schedule) -> int:
    return schedule.warmup


def _random_plan(call: AttentionCall, config: MethodConfig, state: LayerState) -> SparsePlan:
    """Blocks drawn once for each layer: every row of every head keeps equally many, none of them for a reason."""
    run = state.run
    blocks = run.shared(("random", call.q.device, call.layout), lambda: VideoBlocks.build(call.layout, config, call.q.device))
    if state.found is None:
        keep = _drawn(call, blocks, config.sparsity, f"{run.seed} {call.layer} {call.stack}")
        mask = BlockMask.from_blocks(blocks.with_sinks(keep), blocks.block_q, BLOCK_K, blocks.positions_q, blocks.positions_k)
        plan = SparsePlan(mask, blocks.q_order, blocks.k_order)
        state.found = Found(call.step, plan)
        state.figures = Figures(density=kernels.density(plan, call.layout.seq_len, call.layout.seq_len).float())
    return state.found.what


def _drawn(call: AttentionCall, blocks: VideoBlocks, sparsity: float, seed: str) -> Tensor:
    """Which blocks of the video are kept, bool [B, H, Qv, Kv]; alike for the whole batch."""
    rows, columns = blocks.rows - blocks.sink_rows, blocks.columns - blocks.sink_columns
    video = call.layout.video_tokens
    count = round((pairs_allowed(call.layout, sparsity) - blocks.paid) / video**2 * columns)
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    order = torch.rand(call.q.shape[1], rows, columns, generator=generator).argsort(-1)
    keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., : min(max(count, 1), columns)], True)
    return keep.to(call.q.device).expand(call.q.shape[0], *keep.shape)


RANDOM_BLOCKS = _like(adaspa, "random blocks", _random_plan, NAME="Random blocks", LEAST_WARMUP=0, first_step=_first_sparse_step)
