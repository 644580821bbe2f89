"""Blocks of a video's queries and keys, as methods choose them: where they lie, what they cost, and what a choice of them is.

The tokens before and after the video are sinks: their blocks come first, all of them are kept as keys, and as queries they keep all.
A choice is a bit a block, so that the plans of a whole model stay small; a call writes it out as index lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask, PooledBlocks, SparsePlan, TokenOrder
from .budget import BLOCK_K, BLOCK_Q, limit_note, pairs_allowed, pairs_of_sinks
from .call import AttentionCall
from .config import MethodConfig
from .layout import VideoLayout, hilbert, in_sections, tile_major
from .record import Figures
from .words import shortened

TOKEN_ORDERS = ("raster", "tile", "hilbert")
SKIPPED_BLOCKS = ("mean", "drop")


@dataclass(frozen=True)
class BlockConfig(MethodConfig):
    """The knobs of methods that choose blocks. sparsity is asked of each head; below 0, nothing is.

    token_order: "hilbert" (blocks are runs of that curve, compact in videos of every size), "tile" (boxes of 4 by 4 by 4) or "raster"
    (runs of lines). block_q: queries of a block, 128 or 64. skipped_blocks: "mean" (each counts as one key, its mean) or "drop".
    """

    token_order: str = "hilbert"
    block_q: int = BLOCK_Q
    skipped_blocks: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        self._choice("token_order", TOKEN_ORDERS)
        self._choice("skipped_blocks", SKIPPED_BLOCKS)
        if self.block_q not in (BLOCK_K, BLOCK_Q):
            raise ValueError(f"block_q: {shortened(repr(self.block_q))} is not {BLOCK_K} or {BLOCK_Q}")


@dataclass(frozen=True)
class Choice:
    """The blocks of one layer and condition. bits: uint8 [B, H, Q, ceil(K/8)]; figures: of [B, H], on the CPU.

    max_count: the most blocks of a video row. Rows of text keep all and need no list.
    """

    bits: Tensor
    max_count: int
    figures: Figures


@dataclass(frozen=True)
class VideoBlocks:
    """The blocks of one layout on one device: sinks first, then the video.

    q_order, k_order: None where positions are rows. block_q: queries of a block. rows, columns: blocks in all; sink_rows, sink_columns: those of
    the tokens before and after the video. paid: pairs of the sinks. limit: what to say where the budget cannot be met.
    """

    layout: VideoLayout
    q_order: TokenOrder | None
    k_order: TokenOrder | None
    positions_q: int
    positions_k: int
    block_q: int
    paid: int
    limit: str | None

    @classmethod
    def build(cls, layout: VideoLayout, config: BlockConfig, device: torch.device, least: bool = True) -> VideoBlocks:
        """Orders and budget of a layout. least: whether each row keeps its least count, whatever the budget is."""
        if config.token_order == "raster" and not layout.sink_tokens:
            q_order = k_order = None
            positions_q = positions_k = layout.seq_len
        else:
            video = layout.video_rows(torch.device("cpu"))
            video = _ORDERED[config.token_order](video)
            sections = [layout.sink_rows(video.device), video]
            q_rows, k_rows = in_sections(sections, config.block_q), in_sections(sections, BLOCK_K)
            q_order, k_order = TokenOrder.shared(q_rows.to(device)), TokenOrder.shared(k_rows.to(device))
            positions_q, positions_k = len(q_rows), len(k_rows)
        paid = pairs_of_sinks(layout)
        blocks = cls(layout, q_order, k_order, positions_q, positions_k, config.block_q, paid, None)
        least_pairs = blocks.least_pairs if least else paid
        if config.sparsity >= 0 and least_pairs > pairs_allowed(layout, config.sparsity):
            others = f" and {layout.sink_tokens:,} others" if layout.sink_tokens else ""
            return replace(blocks, limit=limit_note(layout, least_pairs, f"{layout.video_tokens:,} video tokens{others}"))
        return blocks

    @property
    def rows(self) -> int:
        return -(-self.positions_q // self.block_q)

    @property
    def columns(self) -> int:
        return -(-self.positions_k // BLOCK_K)

    @property
    def sink_rows(self) -> int:
        return -(-self.layout.sink_tokens // self.block_q)

    @property
    def sink_columns(self) -> int:
        return -(-self.layout.sink_tokens // BLOCK_K)

    @property
    def least_count(self) -> int:
        """As many video blocks as a query block's own keys fill."""
        return min(self.block_q // BLOCK_K, self.columns - self.sink_columns)

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
        row_sizes = torch.full((rows,), self.block_q, dtype=torch.float64)
        row_sizes[-1] -= rows * self.block_q - video
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

    def plan(self, choice: Choice, pooled: PooledBlocks | None = None) -> SparsePlan:
        """The plan of a choice, its bits written out as index lists. pooled: what stands for the blocks that it skips."""
        blocks = unpack(choice.bits, self.columns)
        mask = BlockMask.from_blocks(blocks, self.block_q, BLOCK_K, self.positions_q, self.positions_k, max_count=choice.max_count)
        return SparsePlan(mask, self.q_order, self.k_order, pooled)

    def pooled(self, call: AttentionCall, backend: str) -> PooledBlocks:
        """The mean key and value of each block of a call."""
        return kernels.pool_blocks(call.k, call.v, BLOCK_K, k_order=self.k_order, key_bias=call.key_bias, backend=backend)

    def stand_ins(self, call: AttentionCall, config: BlockConfig, backend: str) -> PooledBlocks | None:
        """What the blocks that are not kept count as; None where they are dropped."""
        return self.pooled(call, backend) if config.skipped_blocks == "mean" else None


def to_pattern(choice: Choice) -> dict[str, Tensor]:
    """What was found, for a file; off the device at once, since a run may find several."""
    figures = choice.figures
    return {"bits": choice.bits.cpu(), "density": figures.density} | ({} if figures.recall is None else {"recall": figures.recall})


def choice_from_pattern(tensors: dict[str, Tensor], call: AttentionCall, blocks: VideoBlocks, least_count: int = 1) -> Choice:
    """The inverse of `to_pattern`, on the call's device. Raises ValueError where it does not fit the call.

    least_count: the fewest blocks that a row may have.

    What kernels rely on is worked out anew, never read from the file.
    """
    bits, density = tensors["bits"], tensors["density"].float()
    recall = tensors["recall"].float() if "recall" in tensors else None
    heads = tuple(call.q.shape[:2])
    if tuple(bits.shape) != (*heads, blocks.rows, -(-blocks.columns // 8)) or bits.dtype != torch.uint8:
        raise ValueError(f"bits is {bits.dtype} {tuple(bits.shape)}: these are not the blocks of {call.layout}")
    known = (density >= 0) & (density <= 1) & (density.bool() | (least_count == 0))
    if density.shape != heads or (recall is not None and recall.shape != heads) or not bool(known.all()):
        raise ValueError("density or recall is not one figure a head")
    if blocks.columns % 8 and bool((bits[..., -1] >> (blocks.columns % 8)).any()):
        raise ValueError("bits has blocks past the last one")
    counts = _BITS_SET[bits.long()].sum(-1, dtype=torch.int32)
    if int(counts.min()) < least_count:
        raise ValueError("bits has a row without a block")
    return Choice(bits.to(call.q.device), max(int((counts * (counts < blocks.columns)).max()), 1), Figures(density, recall=recall))


def pack(blocks: Tensor) -> Tensor:
    """bool [..., K] as bits, uint8 [..., ceil(K/8)]: a plan of 60 layers has to stay small."""
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[-1] % 8)).view(*blocks.shape[:-1], -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (padded * weights).sum(-1, dtype=torch.uint8)


_ORDERED = {"raster": Tensor.flatten, "tile": tile_major, "hilbert": hilbert}

# How many bits a byte has set.
_BITS_SET = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] & weights) != 0).flatten(-2)[..., :columns]
