"""Auto: as many blocks as the fidelity that is asked for needs, found by the error that skipping them makes, and checked by measurement.

Our own, built on AdaSpa (arXiv 2502.21079, section 4): blocks are searched in the last warm-up step, whose output is dense, and
reused in later steps. What differs:
- A skipped block counts as one key, its mean, with its mean value (`kernels.pool_blocks`), so that what is lost is not a block's
  attention but its unevenness. Other work corrects skipped blocks in kind: PISA (arXiv 2602.01077), Sol-Attn (2607.24027).
- Blocks are chosen by exactly that loss: the squared error that the one key makes in the output (`kernels.block_errors`), not by the mass
  that a block holds. A heavy but even block need not be computed.
- One threshold serves all heads and rows of a layer. Heads and rows get what they need, with no count and no target of their own.
- The threshold is set by the error that may remain, `fidelity`, so that layers, prompts and steps that need more get more. A share to
  skip can be asked for instead (`sparsity`), for comparisons under equal budgets.
- What comes out is compared with dense attention on a sample of rows at every sparse call. Where a layer has drifted from what was asked, it
  is searched anew in the next step; there is no calendar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import kernels
from ...kernels import PooledBlocks, SparsePlan
from ..blocks import BlockConfig, Choice, VideoBlocks, choice_from_pattern, pack, to_pattern
from ..budget import BLOCK_K, pairs_allowed
from ..call import AttentionCall, Dense
from ..config import AUTOMATIC as AUTOMATIC_NUMBER
from ..config import Automatic
from ..record import Figures
from ..sampling import sampled_rows
from ..schedule import Schedule
from ..session import Found, LayerState, Session
from ..trial import Trial

__all__ = ["AUTOMATIC", "CONFIG", "LEAST_WARMUP", "NAME", "PATTERN_SETTINGS", "first_step", "from_pattern", "observe", "plan", "to_pattern"]

NAME = "Auto"
LEAST_WARMUP = 1
PATTERN_SETTINGS = ("fidelity", "sparsity", "token_order")
SELECTIONS = ("error", "mass", "share")
SCOPES = ("layer", "head", "row")
# A layer is searched anew when it is further from dense attention than this many times what was asked, or than it was at first.
_DRIFT = 1.25
# Bytes of blocks' worths that one threshold is found over; finding it takes several times as much.
_SEARCH_BYTES = 512 << 20
# How often a choice is tried out, twice as often where none is good, and what of the allowed error it is to come to. The squared errors of
# single blocks do not tell what comes of all that are left out, since those of a row are not independent.
_TRIES = 4
_AIM, _CLOSE = 0.97, 0.9
# What of the allowed error a search may leave: it grows from then on, until it is searched anew.
_START = 0.92
# A layer that could skip less than this is left dense: what a sparse call costs beside the attention is more than it would save (on a CPU, at
# 8,192 tokens, the two cost the same at about 0.15).
_LEAST_SKIPPED = 0.1
_THE_LAST = "Auto's search step would be the last"
_TOO_LITTLE = "too little to skip at this fidelity"


@dataclass(frozen=True)
class AutoConfig(BlockConfig):
    """Auto's one knob, and switches that comparisons turn.

    fidelity: 1 minus the error that attention's output may have in each layer, relative L2. More is closer and slower.
    sparsity: the share to skip instead; -1: what the fidelity leaves. cache_refresh: -1 searches anew where the error has grown.
    selection: blocks by "error" (what skipping them changes), "mass" (what they hold), or "share"
    (the fewest that hold a share of a row's mass, the same share everywhere). scope: what shares a threshold: "layer", "head" or "row".
    sampled_rows: how many rows a call is checked on.
    """

    sparsity: float = AUTOMATIC_NUMBER
    fidelity: float = 0.9
    selection: str = "error"
    scope: str = "layer"
    sampled_rows: int = 64

    def __post_init__(self):
        super().__post_init__()
        self._number("fidelity", 0.0, 0.999)
        self._number("sampled_rows", 1, 4096, whole=True)
        self._choice("selection", SELECTIONS)
        self._choice("scope", SCOPES)


CONFIG = AutoConfig
AUTOMATIC = Automatic(AutoConfig.sparsity, dense_layers=AutoConfig.dense_layers)


def first_step(schedule: Schedule) -> int:
    """The first step that this method has a part in: the search is in the last warm-up step."""
    return max(schedule.warmup - 1, 0)


def plan(call: AttentionCall, config: AutoConfig, state: LayerState) -> SparsePlan | Dense:
    """The newest blocks found; searches where that is due, which computes the call's dense output on its way."""
    run = state.run
    blocks = _blocks(call, config, run)
    if blocks.limit:
        run.note(blocks.limit)
    given = run.given(call, state)
    if isinstance(given, Dense):
        return given
    if given is None:
        found = state.found
        if found is None and not run.schedule.sparse_after(call.step) and run.keeping is None:
            return Dense(_THE_LAST, planned=True)
        if found is not None and call.step < run.schedule.warmup:
            return Dense("warm-up step", planned=True)
        if found is None or _due(config, run.schedule, state, call.step):
            return _search(call, config, state, blocks)
    state.figures = state.found.what.figures
    if not _worthwhile(state.found, config):
        return Dense(_TOO_LITTLE, planned=True)
    return blocks.plan(state.found.what, blocks.stand_ins(call, config, run.backend))


def observe(call: AttentionCall, config: AutoConfig, state: LayerState, out: Tensor) -> None:
    """Compares a sparse call's output [B, H, S, D] with dense attention on a sample of rows. The figures are read back later."""
    # The video's: text comes out exact.
    rows = call.layout.prefix + sampled_rows(state.run.seed, call.step, call.layer, config.sampled_rows, call.layout.video_tokens)
    rows = rows.to(call.q.device, non_blocking=True)
    exact, _ = kernels.attention_with_lse(
        call.q.index_select(2, rows), call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=state.run.backend,
    )
    exact = exact.float()
    off = (out.index_select(2, rows).float() - exact).square().sum((2, 3))
    size = exact.square().sum((2, 3))
    tiny = torch.finfo(torch.float32).tiny
    state.figures = replace(state.figures, error=(off / size.clamp(min=tiny)).sqrt())
    state.unread = call.step, state.found, (off.sum() / size.sum().clamp(min=tiny)).sqrt()


def from_pattern(tensors: dict[str, Tensor], call: AttentionCall, config: AutoConfig, run: Session) -> Choice:
    """The inverse of `to_pattern`, on the call's device. Raises ValueError where it does not fit the call."""
    return choice_from_pattern(tensors, call, _blocks(call, config, run), least_count=0)


def _blocks(call: AttentionCall, config: AutoConfig, run: Session) -> VideoBlocks:
    return run.shared(("auto", call.q.device, call.layout), lambda: VideoBlocks.build(call.layout, config, call.q.device, least=False))


def _due(config: AutoConfig, schedule: Schedule, state: LayerState, step: int) -> bool:
    """Whether another search is due; never where no later sparse step could use it."""
    if not schedule.sparse_after(step):
        return False
    if config.cache_refresh >= 0:
        return config.cache_refresh > 0 and step - state.found.step >= config.cache_refresh
    if not _worthwhile(state.found, config):  # nothing is measured; once more where AdaSpa searches again, when heads are sharper
        return schedule.refresh_at is not None and state.found.step < schedule.refresh_at <= step
    if not state.measured:
        return False
    # What a search comes out at is the norm where nothing else was asked for, or where a second one came out too high as well.
    allowed = 1 - config.fidelity if config.sparsity < 0 else state.measured[0]
    if state.found.again:
        allowed = max(allowed, state.measured[0])
    return state.measured[-1] > _DRIFT * allowed


def _worthwhile(found: Found, config: AutoConfig) -> bool:
    """Whether what was found skips enough to gain by it. A share that was asked for is kept to, whatever it is."""
    return config.sparsity >= 0 or 1 - float(found.what.figures.density.mean()) >= _LEAST_SKIPPED


def _search(call: AttentionCall, config: AutoConfig, state: LayerState, blocks: VideoBlocks) -> Dense:
    """Dense attention, and under its LSE the choice of blocks: over all heads together, or by groups of them where memory is short."""
    run, heads = state.run, call.q.shape[1]
    out, lse = kernels.attention_with_lse(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=run.backend)
    group = max(1, min(run.head_chunk or heads, _SEARCH_BYTES // (len(call.q) * blocks.rows * blocks.columns * 4)))
    parts = []
    for start in range(0, heads, group):
        part = slice(start, start + group)
        some = replace(call, q=call.q[:, part], k=call.k[:, part], v=call.v[:, part])
        parts.append(_choose(some, out[:, part], lse[:, part], config, blocks, run.backend))
    figures = Figures(torch.cat([choice.figures.density for choice in parts], 1))
    choice = Choice(torch.cat([choice.bits for choice in parts], 1), max(choice.max_count for choice in parts), figures)
    run.record.searched(call.step)
    again = state.found is not None and len(state.measured) == 1
    state.found, state.measured, state.unread = run.keep(call, Found(call.step, choice, again=again)), (), None
    return Dense("search step", planned=True, output=out)


def _choose(call: AttentionCall, out: Tensor, lse: Tensor, config: AutoConfig, blocks: VideoBlocks, backend: str) -> Choice:
    """The blocks of some heads, from their dense output [B, H, S, D] and its LSE [B, H, S]."""
    by_knob = config.sparsity < 0
    pools = config.selection == "error" or (by_knob and config.skipped_blocks == "mean")
    pooled = blocks.pooled(call, backend) if pools else None
    worth = _worth(call, lse, config, blocks, pooled, backend)
    pairs = _pairs(blocks, worth.device)
    groups = {"layer": 1, "head": worth.shape[1], "row": worth.shape[1] * worth.shape[2]}[config.scope]
    grouped = worth.reshape(len(worth), groups, -1)
    if not by_knob:
        costs = pairs.expand(worth.shape).reshape(grouped.shape)
        allowed = (pairs_allowed(call.layout, config.sparsity) - blocks.paid) / call.layout.video_tokens**2 * costs.sum(-1, dtype=_wide(costs.device))
        return _choice(largest_within(grouped, costs, allowed).view(worth.shape), pairs, blocks)
    size = _size(out[:, :, call.layout.prefix : call.layout.prefix + call.layout.video_tokens])
    trial = Trial(call, blocks, pooled if config.skipped_blocks == "mean" else None, backend, out)
    target = _START * (1 - config.fidelity)
    allowed = torch.full_like(size, target)  # [B]: each entry by itself
    # What never comes near enough keeps everything. Each entry stops for itself, or its plan would hang on the others'.
    found, best = torch.ones_like(worth, dtype=torch.bool), torch.full_like(size, -1.0)  # the largest error that is allowed skips most
    done = best >= 0
    for tried in range(1, 2 * _TRIES + 1):
        keep = all_but(grouped, (allowed**2 * size / groups)[:, None].expand(grouped.shape[:2])).view(worth.shape)
        errors = trial.errors(keep).to(allowed.dtype)
        good = (errors <= target) & (errors > best) & ~done
        found, best = torch.where(good[:, None, None, None], keep, found), torch.where(good, errors, best)
        done |= best >= 0 if tried >= _TRIES else best > _CLOSE * target
        if bool(done.all()):
            break
        allowed = allowed * (_AIM * target / errors.clamp(min=1e-9)).clamp(0.25, 4.0)
    return _choice(found, pairs, blocks)


def _size(out: Tensor) -> Tensor:
    """The sum of squares of [B, H, S, D], by batch entry: [B]. What is no number has none. Head by head: wide copies of all are large."""
    wide = _wide(out.device)
    return sum(head.to(wide).square().nan_to_num(0.0, 0.0, 0.0).sum((1, 2)) for head in out.unbind(1))


def _worth(call: AttentionCall, lse: Tensor, config: AutoConfig, blocks: VideoBlocks, pooled: PooledBlocks | None, backend: str) -> Tensor:
    """What each of the video's blocks is worth, float32 [B, H, Qv, Kv]: the most is kept first. pooled: the blocks as one key each."""
    options = {"q_order": blocks.q_order, "k_order": blocks.k_order, "scale": call.scale, "key_bias": call.key_bias, "backend": backend}
    if config.selection == "error":
        worth = kernels.block_errors(call.q, call.k, call.v, lse, blocks.block_q, BLOCK_K, pooled=pooled, **options)
    else:
        worth = kernels.block_mass(call.q, call.k, lse, blocks.block_q, BLOCK_K, **options)
    # What is no number is kept before all else: it is to come out as dense attention would have it.
    worth = worth[:, :, blocks.sink_rows :, blocks.sink_columns :].nan_to_num(torch.inf, torch.inf)
    return _held_before(worth) if config.selection == "share" else worth


def _choice(keep: Tensor, pairs: Tensor, blocks: VideoBlocks) -> Choice:
    """The choice of the video's blocks `keep`, bool [B, H, Qv, Kv]."""
    kept = blocks.paid + (keep * pairs).sum((2, 3), dtype=_wide(pairs.device))
    counts = keep.sum(-1, dtype=torch.int32)
    listed = counts * (counts < blocks.columns - blocks.sink_columns)
    figures = Figures(density=(kept / blocks.layout.seq_len**2).float().cpu())
    return Choice(pack(blocks.with_sinks(keep)), blocks.sink_columns + int(listed.max()), figures)


def _pairs(blocks: VideoBlocks, device: torch.device) -> Tensor:
    """Query-key pairs of each block of the video, float32 [Qv, Kv]."""
    sizes = []
    for block, count in ((blocks.block_q, blocks.rows - blocks.sink_rows), (BLOCK_K, blocks.columns - blocks.sink_columns)):
        size = torch.full((count,), float(block), device=device)
        size[-1] -= count * block - blocks.layout.video_tokens
        sizes.append(size)
    return sizes[0][:, None] * sizes[1][None]


def _held_before(mass: Tensor) -> Tensor:
    """What lies beneath a block's last bit of mass: 1 minus the share of its row that heavier blocks hold, of mass [..., K]."""
    ordered, places = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(mass).scatter_(-1, places, 1 - before / ordered.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny))


def largest_within(values: Tensor, costs: Tensor, allowed: Tensor) -> Tensor:
    """The largest values whose costs come to no more than what is allowed: bool like values.

    values, costs: float32 [..., N], values at least 0, and no NaN; allowed: [...]. Of equal values at the edge the first ones are taken.
    """
    bits = _ordered_bits(values)
    edge = _bisect(bits, lambda middle: torch.where(bits > middle, costs, 0.0).sum(-1, dtype=_wide(costs.device)) <= allowed)
    above, ties = bits > edge[..., None], bits == edge[..., None]
    left = allowed - torch.where(above, costs, 0.0).sum(-1, dtype=_wide(costs.device))
    return above | (ties & (torch.where(ties, costs, 0.0).cumsum(-1, dtype=_wide(costs.device)) <= left[..., None]))


def all_but(values: Tensor, allowed: Tensor) -> Tensor:
    """All values but the smallest ones, whose sum is no more than what is allowed: bool like values. Arguments as for `largest_within`."""
    bits = _ordered_bits(values)
    # The smallest edge that leaves too much below it: what lies at it is kept.
    edge = _bisect(bits, lambda middle: torch.where(bits <= middle, values, 0.0).sum(-1, dtype=_wide(values.device)) > allowed)
    return bits >= edge[..., None]


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of float32 values that are at least 0 and numbers."""
    return (values.clamp(min=0.0) + 0.0).contiguous().view(torch.int32)


def _wide(device: torch.device) -> torch.dtype:
    """What sums are made in. Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _bisect(bits: Tensor, enough) -> Tensor:
    """The smallest int32 [...] from -1 to the largest value's that `enough`, false and then true as it grows, is true for."""
    low = torch.full(bits.shape[:-1], -1, dtype=torch.int32, device=bits.device)
    high = torch.full_like(low, torch.iinfo(torch.int32).max - 1)
    for _ in range(32):
        middle = low + ((high - low) >> 1)
        good = enough(middle[..., None])
        low, high = torch.where(good, low, middle + 1), torch.where(good, middle, high)
    return high
