"""AdaSpa: the blocks that matter are searched once, exactly, and reused across denoising steps.

Paper: arXiv 2502.21079 v1 (ICCV 2025), section 4. No code by its authors is public; the choices below are ours.

The last warm-up step runs dense, the softmax mass of every pair of blocks is summed with each row's log-sum-exp
(equation 13), and each row of blocks keeps its heaviest ones (equation 14). Later searches reuse that first LSE and
need one pass over q and k, no softmax. Text is always kept, as keys and as queries.
What the paper leaves open, and what is done here:
- Text counts in the budget, and the video rows of a head keep equally many blocks.
- Head-adaptive sparsity (section 4.2) is decided for each batch entry alone. At most half of the heads can be raised,
  and the step up and down is cut so that both ends stay possible; so the mean is always the one asked for. It ranks the heads of
  a call, and evens their rounding out; without it each head is planned for itself, whichever others the call brings.
- Recall is the kept share of the actual sum of masses, since a cached LSE makes rows not sum to one.
- The first search takes no second pass over q and k, as the paper's does: the warm-up step before it keeps its LSE, and
  the masses are gathered under that while the search step computes its dense output. With one warm-up step, or where a
  cache skipped the step before, there is no earlier LSE, and the paper's second pass is made with the current one.
- Search steps {10, 30} of 50 are the last steps above 20 and 60 percent of the run. A stage that ends above may have its last
  step there: a search that no later sparse step can use is not made.
- Blocks are 128 queries by 64 keys (the paper: 64 by 64). With `token_order` "tile", blocks are compact boxes of video
  rather than runs of a raster line; "raster" is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import kernels
from ...kernels import BlockMask, SparsePlan, TokenOrder
from ..budget import BLOCK_K, BLOCK_Q, limit_note, pairs_allowed, pairs_of_sinks
from ..call import AttentionCall, Dense
from ..config import Automatic, MethodConfig
from ..layout import VideoLayout, in_sections, tile_major
from ..record import Figures
from ..schedule import Schedule
from ..session import Found, LayerState, Session

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
class AdaSpaConfig(MethodConfig):
    """AdaSpa's knobs.

    head_adaptive: heads that need less give blocks to heads that need more, around the same mean.
    token_order: "tile" (blocks are compact boxes) or "raster" (the paper).
    """

    head_adaptive: bool = True
    token_order: str = "tile"

    def __post_init__(self):
        super().__post_init__()
        self._flag("head_adaptive")
        self._choice("token_order", ("raster", "tile"))


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
        if found.lse is not None and _due(config.cache_refresh, run.schedule, found.step, call.step):
            masses = _Masses(call, state, blocks, found.lse)
            state.found = _found(masses, call, config, state, blocks, found.lse)
    state.figures = Figures(density=state.found.what.density, recall=state.found.what.recall)
    return blocks.plan(state.found.what)


def _blocks(call: AttentionCall, config: AdaSpaConfig, run: Session) -> VideoBlocks:
    return run.shared(("adaspa", call.q.device, call.layout), lambda: VideoBlocks.build(call.layout, config, call.q.device))


def to_pattern(choice: Choice) -> dict[str, Tensor]:
    """What was found, for a file; off the device at once, since a run may find several."""
    return {"bits": choice.bits.cpu(), "density": choice.density, "recall": choice.recall}


def from_pattern(tensors: dict[str, Tensor], call: AttentionCall, config: AdaSpaConfig, run: Session) -> Choice:
    """The inverse of `to_pattern`, on the call's device. Raises ValueError where it does not fit the call.

    What kernels rely on is worked out anew, never read from the file.
    """
    blocks = _blocks(call, config, run)
    bits, density, recall = tensors["bits"], tensors["density"].float(), tensors["recall"].float()
    heads = tuple(call.q.shape[:2])
    if tuple(bits.shape) != (*heads, blocks.rows, -(-blocks.columns // 8)) or bits.dtype != torch.uint8:
        raise ValueError(f"bits is {bits.dtype} {tuple(bits.shape)}: these are not the blocks of {call.layout}")
    if not density.shape == recall.shape == heads or not bool(((density > 0) & (density <= 1)).all()):
        raise ValueError("density or recall is not one figure a head")
    if blocks.columns % 8 and bool((bits[..., -1] >> (blocks.columns % 8)).any()):
        raise ValueError("bits has blocks past the last one")
    counts = _BITS_SET[bits.long()].sum(-1, dtype=torch.int32)
    if int(counts.min()) < 1:
        raise ValueError("bits has a row without a block")
    return Choice(bits.to(call.q.device), max(int((counts * (counts < blocks.columns)).max()), 1), density, recall)


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


def _first_search(call: AttentionCall, config: AdaSpaConfig, state: LayerState, blocks: VideoBlocks) -> Dense:
    """Dense attention and the block masses: in one pass under the LSE of the step before, in two where there is none."""
    if state.found is not None:
        masses = _Masses(call, state, blocks, state.found.lse, dense=True)
        out, lse = masses.output()
    else:
        out, lse = kernels.attention_with_lse(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=state.run.backend)
        masses = _Masses(call, state, blocks, lse)
    state.found = _found(masses, call, config, state, blocks, lse)
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
                out, own_lse, mass = kernels.attention_with_mass(q, k, v, lse[:, part], BLOCK_Q, BLOCK_K, **options)
                self._dense.append((out, own_lse))
            else:
                mass = kernels.block_mass(q, k, lse[:, part], BLOCK_Q, BLOCK_K, **options)
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


def _found(masses: _Masses, call: AttentionCall, config: AdaSpaConfig, state: LayerState, blocks: VideoBlocks, lse: Tensor) -> Found:
    """The choice of blocks over all heads together; the LSE is kept while another search is due."""
    choice = _choose(masses.ranks, masses.share, masses.totals, blocks, config)
    state.run.record.searched(call.step)
    kept_lse = lse.half() if _due_later(config.cache_refresh, state.run.schedule, call.step) else None
    return state.run.keep(call, Found(call.step, choice, kept_lse))


@dataclass(frozen=True)
class Choice:
    """The blocks of one layer and condition. bits: uint8 [B, H, Q, ceil(K/8)]; density, recall: [B, H], on the CPU.

    max_count: the most blocks of a video row. Rows of text keep all and need no list.
    """

    bits: Tensor
    max_count: int
    density: Tensor
    recall: Tensor


def _choose(ranks: Tensor, share: Tensor, totals: Tensor, blocks: VideoBlocks, config: AdaSpaConfig) -> Choice:
    """Equation 14 and section 4.2, from what `_Masses` says."""
    costs = blocks.costs(ranks[..., -1].cpu(), ranks.shape[-1])
    share, totals = share.cpu().double(), totals.cpu().double()
    always = totals - share[..., -1]  # the sinks' mass

    def recall(counts: Tensor) -> Tensor:
        return (share.gather(-1, counts[..., None] - 1)[..., 0] + always) / totals

    uniform = torch.full(totals.shape, config.sparsity, dtype=torch.float64)
    counts = blocks.counts(costs, uniform)
    if config.head_adaptive:
        counts = blocks.counts(costs, adapted_sparsity(recall(counts), config.sparsity, blocks.most_sparsity), even_out=True)
    keep = blocks.with_sinks(ranks < counts.to(ranks.device)[..., None, None])
    pairs = blocks.paid + costs.gather(-1, counts[..., None] - 1)[..., 0]
    return Choice(
        bits=_pack(keep), max_count=blocks.sink_columns + int(counts.max()),
        density=(pairs / blocks.layout.seq_len**2).float(), recall=recall(counts).float(),
    )


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


@dataclass(frozen=True)
class VideoBlocks:
    """The blocks of one layout on one device: sinks first, then the video.

    q_order, k_order: None where positions are rows. rows, columns: blocks in all; sink_rows, sink_columns: those of
    the tokens before and after the video. paid: pairs of the sinks. limit: what to say where the budget cannot be met.
    """

    layout: VideoLayout
    q_order: TokenOrder | None
    k_order: TokenOrder | None
    positions_q: int
    positions_k: int
    paid: int
    limit: str | None
    sparsity: float

    @classmethod
    def build(cls, layout: VideoLayout, config: AdaSpaConfig, device: torch.device) -> VideoBlocks:
        """Orders and budget of a layout."""
        if config.token_order == "raster" and not layout.sink_tokens:
            q_order = k_order = None
            positions_q = positions_k = layout.seq_len
        else:
            video = layout.video_rows(torch.device("cpu"))
            video = tile_major(video) if config.token_order == "tile" else video.flatten()
            sections = [layout.sink_rows(video.device), video]
            q_rows, k_rows = in_sections(sections, BLOCK_Q), in_sections(sections, BLOCK_K)
            q_order, k_order = TokenOrder.shared(q_rows.to(device)), TokenOrder.shared(k_rows.to(device))
            positions_q, positions_k = len(q_rows), len(k_rows)
        paid = pairs_of_sinks(layout)
        blocks = cls(layout, q_order, k_order, positions_q, positions_k, paid, None, config.sparsity)
        if blocks.least_pairs > pairs_allowed(layout, config.sparsity):
            others = f" and {layout.sink_tokens:,} others" if layout.sink_tokens else ""
            return replace(blocks, limit=limit_note(layout, blocks.least_pairs, f"{layout.video_tokens:,} video tokens{others}"))
        return blocks

    @property
    def rows(self) -> int:
        return -(-self.positions_q // BLOCK_Q)

    @property
    def columns(self) -> int:
        return -(-self.positions_k // BLOCK_K)

    @property
    def sink_rows(self) -> int:
        return -(-self.layout.sink_tokens // BLOCK_Q)

    @property
    def sink_columns(self) -> int:
        return -(-self.layout.sink_tokens // BLOCK_K)

    @property
    def least_count(self) -> int:
        """As many video blocks as a query block's own keys fill."""
        return min(BLOCK_Q // BLOCK_K, self.columns - self.sink_columns)

    @property
    def least_pairs(self) -> int:
        """Pairs of the sinks and of each row's least count."""
        return self.paid + self.layout.video_tokens * min(self.least_count * BLOCK_K, self.layout.video_tokens)

    @property
    def most_sparsity(self) -> float:
        """The largest sparsity that leaves every row the sinks and its least count."""
        return 1 - self.least_pairs / self.layout.seq_len**2

    def costs(self, last: Tensor, columns: int) -> Tensor:
        """Pairs that each count of video blocks costs a head, float64 [B, H, Kv]: exact, though the last block may be short.

        last: [B, H, Qv], the rank of the last video block in each row. columns: Kv.
        """
        video, rows = self.layout.video_tokens, last.shape[2]
        full = torch.arange(1, columns + 1, dtype=torch.float64) * (BLOCK_K * video)
        missing = columns * BLOCK_K - video
        row_sizes = torch.full((rows,), BLOCK_Q, dtype=torch.float64)
        row_sizes[-1] -= rows * BLOCK_Q - video
        # A row has the short last block from the count on that exceeds the block's rank.
        with_last = torch.zeros(*last.shape[:2], columns, dtype=torch.float64)
        with_last.scatter_add_(-1, last.long(), row_sizes.expand(last.shape))
        return full - missing * with_last.cumsum(-1)

    def counts(self, costs: Tensor, sparsity: Tensor, even_out: bool = False) -> Tensor:
        """Video blocks a row for each head, int64 [B, H], so that each head's cost is nearest to its target.

        costs: [B, H, Kv] of `costs`; sparsity: [B, H], each head's own. even_out: the mean cost of each batch entry is to be
        nearest instead, over the heads that are there. Without it a head's count depends on no other head.
        """
        target = (1 - sparsity) * self.layout.seq_len**2 - self.paid
        counts = (costs - target[..., None]).abs().argmin(-1).clamp(min=self.least_count - 1)
        if not even_out:
            return counts + 1
        short = target - costs.gather(-1, counts[..., None])[..., 0]
        # Each head is off by up to half a block a row; the heads that are off most make up for the sum.
        for entry, missing in zip(counts, short, strict=True):
            steps = round(float(missing.sum()) / (BLOCK_K * self.layout.video_tokens))
            worst = (missing if steps > 0 else -missing).argsort(descending=True, stable=True)[: abs(steps)]
            entry[worst] += 1 if steps > 0 else -1
        return counts.clamp(self.least_count - 1, costs.shape[-1] - 1) + 1

    def with_sinks(self, video: Tensor) -> Tensor:
        """The map of all blocks from that of the video's: bool [B, H, Q, K]."""
        blocks = torch.ones(*video.shape[:2], self.rows, self.columns, dtype=torch.bool, device=video.device)
        blocks[:, :, self.sink_rows :, self.sink_columns :] = video
        return blocks

    def plan(self, choice: Choice) -> SparsePlan:
        """The plan of a choice, its bits written out as index lists."""
        blocks = _unpack(choice.bits, self.columns)
        mask = BlockMask.from_blocks(blocks, BLOCK_Q, BLOCK_K, self.positions_q, self.positions_k, max_count=choice.max_count)
        return SparsePlan(mask, self.q_order, self.k_order)


def _pack(blocks: Tensor) -> Tensor:
    """bool [..., K] as bits, uint8 [..., ceil(K/8)]: a plan of 60 layers has to stay small."""
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % 8)).view(*blocks.shape[:-1], -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


# How many bits a byte has set.
_BITS_SET = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def _unpack(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `_pack`."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] & weights) != 0).flatten(-2)[..., :columns]
