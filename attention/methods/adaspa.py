"""AdaSpa: the blocks that matter are searched once, exactly, and reused across denoising steps.

Paper: arXiv 2502.21079 v1 (ICCV 2025), section 4. No code by its authors is public; the choices below are ours.

The last warm-up step runs dense, the softmax mass of every pair of blocks is summed with each row's log-sum-exp
(equation 13), and each row of blocks keeps its heaviest ones (equation 14). Later searches reuse that first LSE and
need one pass over q and k, no softmax. Text is always kept, as keys and as queries.
What the paper leaves open, and what is done here:
- Text counts in the budget, and the video rows of a head keep equally many blocks.
- Head-adaptive sparsity (section 4.2) is decided for each batch entry alone. It is tried out in the search against equal counts, on a
  part of the queries, and taken where it comes nearer to dense attention: heads that are given more may gain less than the others
  lose. At most half of the heads can be raised, and the step up and down is cut so that both ends stay possible; so the mean is always
  the one asked for. It ranks the heads of a call, and evens their rounding out; without it each head is planned for itself, whichever
  others the call brings. `always_adapt` takes it untried, as the paper does.
- Recall is the kept share of the actual sum of masses, since a cached LSE makes rows not sum to one.
- The first search takes no second pass over q and k, as the paper's does: the warm-up step before it keeps its LSE, and
  the masses are gathered under that while the search step computes its dense output. With one warm-up step, or where a
  cache skipped the step before, there is no earlier LSE, and the paper's second pass is made with the current one.
- Search steps {10, 30} of 50 are the last steps above 20 and 60 percent of the run. A stage that ends above may have its last
  step there: a search that no later sparse step can use is not made.
- Blocks are 128 queries by 64 keys (the paper: 64 by 64; `block_q` 64). They are runs of a Hilbert curve, so compact in time,
  height and width, rather than runs of a raster line; `token_order` "raster" is the paper's.
- A skipped block is not dropped: it counts as one key, its mean, with its mean value (`kernels.pool_blocks`). That is 1/64 of its
  work, and docs/FIDELITY.md has what it brings. `skipped_blocks` "drop" is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from ...kernels import SparsePlan
from ..blocks import BlockConfig, Choice, VideoBlocks, choice_from_pattern, pack, to_pattern
from ..budget import BLOCK_K
from ..call import AttentionCall, Dense
from ..config import Automatic
from ..record import Figures
from ..schedule import Schedule
from ..session import Found, LayerState, Session
from ..trial import Trial

__all__ = ["AUTOMATIC", "CONFIG", "LEAST_WARMUP", "NAME", "PATTERN_SETTINGS", "first_step", "from_pattern", "plan", "to_pattern"]

NAME = "AdaSpa"
LEAST_WARMUP = 1
# What a loaded pattern brings along: blocks are chosen for a sparsity, in an order of tokens.
PATTERN_SETTINGS = ("sparsity", "token_order")
# Above this recall a head has more blocks than it needs (section 4.2).
_EASY_RECALL = 0.8
_THE_LAST = "AdaSpa's search step would be the last"
# Bytes of block masses searched at a time; sorting them takes about five times as much.
_SEARCH_BYTES = 64 << 20


@dataclass(frozen=True)
class AdaSpaConfig(BlockConfig):
    """AdaSpa's knobs.

    head_adaptive: heads that need less give blocks to heads that need more, around the same mean, where that comes nearer to dense;
    always_adapt: untried (the paper).
    lse_cache: later searches use the first one's log-sum-exp; off, each computes its own.
    The paper's blocks are token_order "raster", block_q 64 and skipped_blocks "drop".
    """

    head_adaptive: bool = True
    lse_cache: bool = True
    always_adapt: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._flag("head_adaptive")
        self._flag("lse_cache")
        self._flag("always_adapt")


CONFIG = AdaSpaConfig
AUTOMATIC = Automatic(AdaSpaConfig.sparsity, dense_layers=AdaSpaConfig.dense_layers)


def first_step(schedule: Schedule) -> int:
    """The first step that this method has a part in: the search is in the last warm-up step, and the step before keeps its LSE."""
    return max(schedule.warmup - 2, 0)


def plan(call: AttentionCall, config: AdaSpaConfig, state: LayerState) -> SparsePlan | Dense:
    """The newest blocks found; searches where that is due. A first search computes the call's dense output on its way."""
    run = state.run
    blocks = _blocks(call, config, run)
    if blocks.limit:
        run.note(blocks.limit)
    given = run.given(call, state)
    if isinstance(given, Dense):
        return given
    if given is None:
        found = state.found
        if found is None or found.what is None:
            if not run.schedule.sparse_after(call.step) and run.keeping is None:  # a saved pattern is of use to other runs
                return Dense("warm-up step" if call.step < run.schedule.warmup - 1 else _THE_LAST, planned=True)
            return _keep_lse(call, state) if call.step < run.schedule.warmup - 1 else _first_search(call, config, state, blocks)
        if call.step < run.schedule.warmup:
            return Dense("warm-up step", planned=True)
        if _due(config.cache_refresh, run.schedule, found.step, call.step) and (lse := _lse_for_search(call, config, state)) is not None:
            state.found = _found(_Masses(call, state, blocks, lse), call, config, state, blocks, lse, None)
    state.figures = state.found.what.figures
    return blocks.plan(state.found.what, blocks.stand_ins(call, config, run.backend))


def _blocks(call: AttentionCall, config: AdaSpaConfig, run: Session) -> VideoBlocks:
    return run.shared(("adaspa", call.q.device, call.layout), lambda: VideoBlocks.build(call.layout, config, call.q.device))


def from_pattern(tensors: dict[str, Tensor], call: AttentionCall, config: AdaSpaConfig, run: Session) -> Choice:
    """The inverse of `to_pattern`, on the call's device. Raises ValueError where it does not fit the call."""
    return choice_from_pattern(tensors, call, _blocks(call, config, run))


def _due(refresh: int, schedule: Schedule, found_at: int, step: int) -> bool:
    """Whether another search is due; never where no later sparse step could use it."""
    if not schedule.sparse_after(step):
        return False
    if refresh < 0:  # the paper: once more
        return schedule.refresh_at is not None and found_at < schedule.refresh_at <= step
    return refresh > 0 and step - found_at >= refresh


def _due_later(refresh: int, schedule: Schedule, step: int) -> bool:
    """Whether another search will be due, in a step that a sparse one follows."""
    if refresh < 0:
        return schedule.refresh_at is not None and step < schedule.refresh_at and schedule.sparse_after(schedule.refresh_at)
    return refresh > 0 and schedule.sparse_after(step + refresh)


def _keep_lse(call: AttentionCall, state: LayerState) -> Dense:
    """The step before the search: dense attention that hands out its LSE."""
    out, lse = kernels.attention_with_lse(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=state.run.backend)
    state.found = Found(call.step, None, lse.half())
    return Dense("warm-up step", planned=True, output=out)


def _lse_for_search(call: AttentionCall, config: AdaSpaConfig, state: LayerState) -> Tensor | None:
    """The LSE that a later search weighs scores by: the first one's, or without the cache this step's own, [B, H, S]."""
    if config.lse_cache:
        return state.found.lse
    return kernels.attention_with_lse(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=state.run.backend)[1]


def _first_search(call: AttentionCall, config: AdaSpaConfig, state: LayerState, blocks: VideoBlocks) -> Dense:
    """Dense attention and the block masses: in one pass under the LSE of the step before, in two where there is none."""
    if state.found is not None and config.lse_cache:
        masses = _Masses(call, state, blocks, state.found.lse, dense=True)
        out, lse = masses.output()
    else:
        out, lse = kernels.attention_with_lse(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=state.run.backend)
        masses = _Masses(call, state, blocks, lse)
    state.found = _found(masses, call, config, state, blocks, lse, out)
    return Dense("search step", planned=True, output=out)


class _Masses:
    """What the choice of blocks needs of the block masses, taken from them by groups of heads: all of them at once are large.

    ranks: [B, H, Qv, Kv] integers, the place of each video block in its row, heaviest first. share: [B, H, Kv], the mass that
    each count of blocks keeps. totals: [B, H], all mass, sinks included.
    """

    def __init__(self, call: AttentionCall, state: LayerState, blocks: VideoBlocks, lse: Tensor, dense: bool = False):
        """lse: [B, H, S], current or earlier. dense: compute the call's dense output on the way."""
        self._blocks, self._dense = blocks, []
        batch, heads = call.q.shape[:2]
        group = max(1, min(state.run.head_chunk or heads, _SEARCH_BYTES // (batch * blocks.rows * blocks.columns * 4)))
        found = []
        for start in range(0, heads, group):
            part = slice(start, start + group)
            q, k, v = call.q[:, part], call.k[:, part], call.v[:, part]
            options = {
                "q_order": blocks.q_order, "k_order": blocks.k_order, "scale": call.scale, "key_bias": call.key_bias, "backend": state.run.backend,
            }
            if dense:
                out, own_lse, mass = kernels.attention_with_mass(q, k, v, lse[:, part], blocks.block_q, BLOCK_K, **options)
                self._dense.append((out, own_lse))
            else:
                mass = kernels.block_mass(q, k, lse[:, part], blocks.block_q, BLOCK_K, **options)
            found.append(self._of(mass))
        self.ranks, self.share, self.totals = (torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def _of(self, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video = mass[:, :, self._blocks.sink_rows :, self._blocks.sink_columns :]
        ordered, places = video.sort(dim=-1, descending=True, stable=True)
        counting = torch.arange(video.shape[-1], dtype=torch.int16 if video.shape[-1] < 2**15 else torch.int32, device=mass.device)
        ranks = torch.empty(video.shape, dtype=counting.dtype, device=mass.device).scatter_(-1, places, counting.expand(video.shape))
        # One count serves all rows of a head, so what a count keeps is summed over its rows once, for every count.
        return ranks, ordered.sum(2, dtype=torch.float32).cumsum(-1), mass.sum((2, 3))

    def output(self) -> tuple[Tensor, Tensor]:
        """The dense output [B, H, S, D] and its LSE [B, H, S]."""
        if len(self._dense) == 1:
            return self._dense[0]
        return torch.cat([out for out, _ in self._dense], 1), torch.cat([lse for _, lse in self._dense], 1)


def _found(
    masses: _Masses, call: AttentionCall, config: AdaSpaConfig, state: LayerState, blocks: VideoBlocks, lse: Tensor, out: Tensor | None,
) -> Found:
    """The choice of blocks over all heads together; the LSE is kept while another search is due. out: the call's dense output, where it is known."""
    choice = _choose(masses, call, config, state, blocks, out)
    state.run.record.searched(call.step)
    kept_lse = lse.half() if config.lse_cache and _due_later(config.cache_refresh, state.run.schedule, call.step) else None
    return state.run.keep(call, Found(call.step, choice, kept_lse))


def _choose(masses: _Masses, call: AttentionCall, config: AdaSpaConfig, state: LayerState, blocks: VideoBlocks, out: Tensor | None) -> Choice:
    """Equation 14 and section 4.2."""
    costs = blocks.costs(masses.ranks[..., -1].cpu(), masses.ranks.shape[-1])
    share, totals = masses.share.cpu().double(), masses.totals.cpu().double()
    always = totals - share[..., -1]  # the sinks' mass

    def recall(counts: Tensor) -> Tensor:
        return (share.gather(-1, counts[..., None] - 1)[..., 0] + always) / totals

    def kept(counts: Tensor) -> Tensor:
        return masses.ranks < counts.to(masses.ranks.device)[..., None, None]

    def choice(counts: Tensor) -> Choice:
        pairs = blocks.paid + costs.gather(-1, counts[..., None] - 1)[..., 0]
        figures = Figures(density=(pairs / blocks.layout.seq_len**2).float(), recall=recall(counts).float())
        return Choice(pack(blocks.with_sinks(kept(counts))), blocks.sink_columns + int(counts.max()), figures)

    uniform = torch.full(totals.shape, config.sparsity, dtype=torch.float64)
    if not config.head_adaptive:
        return choice(blocks.counts(costs, uniform))
    adapted_to = adapted_sparsity(recall(blocks.counts(costs, uniform)), config.sparsity, blocks.most_sparsity)
    adapted = blocks.counts(costs, adapted_to, even_out=True)
    equal = blocks.counts(costs, uniform, even_out=True)  # the same mean, which more blocks would win by
    if config.always_adapt or bool((adapted == equal).all()):
        return choice(adapted)
    trial = Trial(call, blocks, blocks.stand_ins(call, config, state.run.backend), state.run.backend, out)
    of_adapted, of_equal = (trial.errors(kept(counts)).cpu() for counts in (adapted, equal))
    return choice(torch.where((of_adapted < of_equal)[:, None], adapted, equal))


def adapted_sparsity(recall: Tensor, sparsity: float, most: float) -> Tensor:
    """Each head's own sparsity around the mean (section 4.2): float64 [B, H] from recall [B, H].

    n heads of recall above 0.8 may be sparser; as many of the lowest recall are denser: (1+s)/2 and (3s-1)/2, both
    half the distance to 1 from s; less where that would leave what is possible, 0 to `most`.
    """
    step = max(min((1 - sparsity) / 2, most - sparsity, sparsity), 0.0)
    result = torch.full(recall.shape, sparsity, dtype=torch.float64)
    for entry, of_heads in zip(result, recall, strict=True):
        easy = min(int((of_heads > _EASY_RECALL).sum()), recall.shape[1] // 2)
        by_recall = of_heads.argsort(descending=True, stable=True)
        entry[by_recall[:easy]] += step
        entry[by_recall[len(by_recall) - easy :]] -= step
    return result


