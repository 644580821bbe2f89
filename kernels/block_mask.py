"""What a kernel is told to compute: which blocks (BlockMask), in which order of tokens (TokenOrder), for which head, and what
stands for the blocks that are left out (PooledBlocks).

Dimensions, here and everywhere in the project:
B batch, H heads, S tokens (rows of a tensor), D head_dim, Q and K blocks of queries and of keys,
M the room for block indices, O orders, P positions of an order, R sampled rows, C candidate plans.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Bytes of scratch that writing out a block mask may take at a time.
_SCRATCH_BYTES = 128 << 20


def num_blocks(length: int, block: int) -> int:
    """How many blocks of `block` positions cover `length` positions."""
    return -(-length // block)


@dataclass(frozen=True)
class BlockMask:
    """The key blocks that each query block attends to, in FlexAttention's terms.

    kv_num_blocks: [B, H, Q] int32, how many key blocks a query block keeps.
    kv_indices: [B, H, Q, M] int32, which ones; entries past the count are unread. A row that keeps every key block needs no
    list and all its entries are unread, so M is at least the largest count below that. B and H may be 1 and then hold for all.
    block_q, block_k: positions a block. seq_q, seq_k: positions in all (tokens, or an order's padded positions).
    Raises ValueError where the shapes contradict one another.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_q: int
    block_k: int
    seq_q: int
    seq_k: int

    def __post_init__(self):
        rows = num_blocks(self.seq_q, self.block_q)
        if self.kv_num_blocks.dim() != 3 or self.kv_num_blocks.shape[2] != rows:
            shape = tuple(self.kv_num_blocks.shape)
            raise ValueError(f"kv_num_blocks is {shape}: expected [B, H, {rows}] for {self.seq_q} positions in blocks of {self.block_q}")
        if self.kv_indices.dim() != 4 or self.kv_indices.shape[:3] != self.kv_num_blocks.shape:
            raise ValueError(f"kv_indices is {tuple(self.kv_indices.shape)}: expected [*{tuple(self.kv_num_blocks.shape)}, M]")

    @property
    def num_q_blocks(self) -> int:
        return num_blocks(self.seq_q, self.block_q)

    @property
    def num_k_blocks(self) -> int:
        return num_blocks(self.seq_k, self.block_k)

    @property
    def full_rows(self) -> Tensor:
        """Which rows keep every key block and so have no index list: bool [B, H, Q]."""
        return self.kv_num_blocks == self.num_k_blocks

    @classmethod
    def from_blocks(cls, blocks: Tensor, block_q: int, block_k: int, seq_q: int, seq_k: int, max_count: int | None = None) -> BlockMask:
        """From a map of kept blocks, bool [B, H, Q, K].

        `max_count` is the largest number of kept blocks of a row that is not full, where the caller knows it; without it the
        map is read for it, which waits for the device. Raises ValueError where the map does not fit the lengths.
        """
        expected = (num_blocks(seq_q, block_q), num_blocks(seq_k, block_k))
        if blocks.dim() != 4 or tuple(blocks.shape[2:]) != expected:
            raise ValueError(f"blocks is {tuple(blocks.shape)}: expected [B, H, {expected[0]}, {expected[1]}]")
        counts = blocks.sum(-1, dtype=torch.int32)
        listed = counts < expected[1]
        room = int((counts * listed).max()) if max_count is None else max_count
        room = max(min(room, expected[1] - 1), 1)
        numbers = torch.arange(expected[1], dtype=torch.int32, device=blocks.device)
        indices = torch.zeros(*blocks.shape[:3], room + 1, dtype=torch.int32, device=blocks.device)
        # Some heads at a time: the slots take 8 bytes a block of the map.
        step = max(1, _SCRATCH_BYTES // (8 * max(1, blocks[:, :1].numel())))
        for start in range(0, blocks.shape[1], step):
            some = blocks[:, start : start + step]
            # Each kept block goes to the slot that its running count names; the others, and full rows, all go to one slot past the end.
            kept = some & listed[:, start : start + step, :, None]
            slots = torch.where(kept, some.cumsum(-1, dtype=torch.int32) - 1, room).long()
            indices[:, start : start + step].scatter_(-1, slots, numbers.expand(some.shape))
        return cls(counts, indices[..., :room], block_q, block_k, seq_q, seq_k)

    def to_blocks(self) -> Tensor:
        """The map of kept blocks, bool [B, H, Q, K]."""
        slots = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        full = self.full_rows[..., None]
        used = (slots < self.kv_num_blocks[..., None]) & ~full
        columns = torch.where(used, self.kv_indices, self.num_k_blocks).long()
        blocks = torch.zeros(*self.kv_indices.shape[:3], self.num_k_blocks + 1, dtype=torch.bool, device=self.kv_indices.device)
        return blocks.scatter_(-1, columns, True)[..., :-1] | full

    def to_dense(self) -> Tensor:
        """The mask by position, bool [B, H, seq_q, seq_k]. For tests and pictures: its size is quadratic."""
        blocks = self.to_blocks().repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        return blocks[:, :, : self.seq_q, : self.seq_k]

    def expand(self, batch: int, heads: int) -> BlockMask:
        """The same mask with B and H written out, as views."""
        return BlockMask(
            self.kv_num_blocks.expand(batch, heads, -1),
            self.kv_indices.expand(batch, heads, -1, -1),
            self.block_q, self.block_k, self.seq_q, self.seq_k,
        )


@dataclass(frozen=True)
class TokenOrder:
    """In which order a head's tokens are put into blocks, without moving them.

    rows: [O, P] int32, the tensor row at each position; -1 is padding and contributes nothing. Not to be written to afterwards.
    head_order: [B, H] integers, which of the O orders a head uses; B and H may be 1.
    A query order holds every row once, a key order at most once.

    What is worked out from the rows (`positions`, `full_blocks`) is kept, and shared with the orders that `for_heads`,
    `expand` and `dataclasses.replace` make of the same rows.
    """

    rows: Tensor
    head_order: Tensor
    _tables: _Tables | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self):
        if self._tables is None or self._tables.rows is not self.rows:
            object.__setattr__(self, "_tables", _Tables(self.rows))
        if self.rows.dim() != 2 or self.rows.dtype != torch.int32:
            raise ValueError(f"rows is {self.rows.dtype} {tuple(self.rows.shape)}: expected int32 [O, P]")
        if self.head_order.dim() != 2 or self.head_order.is_floating_point():
            raise ValueError(f"head_order is {self.head_order.dtype} {tuple(self.head_order.shape)}: expected integers [B, H]")

    @property
    def length(self) -> int:
        """P, the number of positions, padding included."""
        return self.rows.shape[1]

    @classmethod
    def shared(cls, rows: Tensor) -> TokenOrder:
        """One order, [P] int32, for every head."""
        return cls(rows[None], torch.zeros(1, 1, dtype=torch.int64, device=rows.device))

    def for_heads(self, head_order: Tensor) -> TokenOrder:
        """The same orders for other heads: head_order [B, H] integers."""
        return replace(self, head_order=head_order)

    def expand(self, batch: int, heads: int) -> TokenOrder:
        """The same order with B and H written out, as a view."""
        return self.for_heads(self.head_order.expand(batch, heads))

    def full_blocks(self, block: int) -> Tensor:
        """Which blocks of `block` positions are full, a row at each, and need no mask: bool [O, blocks]. Not to be written to."""
        return self._tables.get(("full_blocks", block), lambda: (block_rows(self, self.length, block, self.rows.device) >= 0).all(-1))

    def positions(self, seq: int) -> Tensor:
        """The inverse: [O, seq] int32, the position of each tensor row; -1 where the order leaves a row out. Not to be written to."""
        return self._tables.get(("positions", seq), lambda: self._positions(seq))

    def _positions(self, seq: int) -> Tensor:
        result = torch.full((self.rows.shape[0], seq + 1), -1, dtype=torch.int32, device=self.rows.device)
        targets = torch.where(self.rows < 0, seq, self.rows).long()
        places = torch.arange(self.length, dtype=torch.int32, device=self.rows.device).expand_as(targets)
        return result.scatter_(1, targets, places)[:, :seq]


class _Tables:
    """What has been worked out from the rows of an order, by name. Holds the rows themselves, so that no other order can take it for its own."""

    def __init__(self, rows: Tensor):
        self.rows = rows
        self._found: dict[Hashable, Tensor] = {}

    def get(self, name: Hashable, work_out: Callable[[], Tensor]) -> Tensor:
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = work_out()
        return found


@dataclass(frozen=True)
class PooledBlocks:
    """Each block of keys as one key: what a skipped block may count as (`kernels.pool_blocks` makes it).

    keys, values: [B, H, K, D], a block's mean key and mean value, in the dtype of k and v; 0 where a block has no visible key.
    log_size: [B, H, K] float32, the natural logarithm of how many keys a block stands for, biases counted in; minus infinity for none.
    """

    keys: Tensor
    values: Tensor
    log_size: Tensor


@dataclass(frozen=True)
class SparsePlan:
    """All that a sparse call needs beside q, k and v. What is profiled is what is executed.

    pooled: what the blocks that the mask leaves out count as, of this call's own k and v; None where they count as nothing.
    """

    mask: BlockMask
    q_order: TokenOrder | None = None
    k_order: TokenOrder | None = None
    pooled: PooledBlocks | None = None


def block_rows(order: TokenOrder | None, length: int, block: int, device: torch.device) -> Tensor:
    """The tensor rows of each block: int32 [O, blocks, block], -1 where a place holds none. O is 1 without an order."""
    rows = torch.arange(length, dtype=torch.int32, device=device)[None] if order is None else order.rows
    room = num_blocks(rows.shape[1], block) * block
    rows = torch.nn.functional.pad(rows, (0, room - rows.shape[1]), value=-1)
    return rows.view(rows.shape[0], -1, block)


def _rows_in_blocks(order: TokenOrder | None, length: int, block: int, batch: int, heads: int, device: torch.device) -> Tensor:
    """How many real rows each block holds: [B, H, blocks] int64."""
    counts = (block_rows(order, length, block, device) >= 0).sum(-1)
    if order is None:
        return counts[None].expand(batch, heads, -1)
    return counts[order.head_order.expand(batch, heads).long()]


def density(plan: SparsePlan, seq_q: int, seq_k: int) -> Tensor:
    """The share of query-key pairs that the plan computes, float64 [B, H]; only pairs of real rows count.

    seq_q, seq_k: tokens (rows of q and of k), not positions. `plan.pooled` is not counted: a skipped block stays skipped.
    """
    mask = plan.mask
    orders = [order.head_order for order in (plan.q_order, plan.k_order) if order is not None]
    batch = max([mask.kv_indices.shape[0], *(order.shape[0] for order in orders)])
    heads = max([mask.kv_indices.shape[1], *(order.shape[1] for order in orders)])
    device = mask.kv_indices.device
    queries = _rows_in_blocks(plan.q_order, seq_q, mask.block_q, batch, heads, device)
    keys = _rows_in_blocks(plan.k_order, seq_k, mask.block_k, batch, heads, device)
    indices = mask.kv_indices.expand(batch, heads, -1, -1)
    full = mask.full_rows
    used = (torch.arange(indices.shape[-1], device=device) < mask.kv_num_blocks[..., None]) & ~full[..., None]
    kept = keys[:, :, None].expand(-1, -1, indices.shape[2], -1).gather(-1, (indices * used).long()) * used
    pairs = (torch.where(full, keys.sum(-1, keepdim=True), kept.sum(-1)) * queries).sum(-1)
    return pairs.to(torch.float64 if device.type != "mps" else torch.float32) / (seq_q * seq_k)


def kept_pairs(plan: SparsePlan, q_rows: Tensor, k_rows: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Which pairs of some query rows and some key rows the plan computes: bool [B, H, len(q_rows), len(k_rows)].

    q_rows, k_rows: tensor rows, integers. shape: (B, H, S_q, S_k). For pictures: its size is the pairs asked for. Only kept blocks
    count, whatever `plan.pooled` makes of the others.
    """
    batch, heads, seq_q, seq_k = shape
    mask = plan.mask.expand(batch, heads)

    def blocks(order: TokenOrder | None, rows: Tensor, seq: int, block: int) -> Tensor:
        """[B, H, rows]"""
        by_order = blocks_of_rows(order, rows.long(), seq, block)
        return by_order.expand(batch, heads, -1) if order is None else by_order[order.head_order.expand(batch, heads).long()]

    q_blocks = blocks(plan.q_order, q_rows, seq_q, mask.block_q)
    k_blocks = blocks(plan.k_order, k_rows, seq_k, mask.block_k)
    picked = q_blocks.clamp(min=0)
    lists = mask.kv_indices.gather(2, picked[..., None].expand(-1, -1, -1, mask.kv_indices.shape[-1]))
    some = BlockMask(mask.kv_num_blocks.gather(2, picked), lists, 1, mask.block_k, len(q_rows), mask.seq_k)
    kept = some.to_blocks().gather(3, k_blocks.clamp(min=0)[:, :, None].expand(-1, -1, len(q_rows), -1))
    return kept & (q_blocks >= 0)[..., None] & (k_blocks >= 0)[:, :, None]


def blocks_of_rows(order: TokenOrder | None, rows: Tensor, seq: int, block: int) -> Tensor:
    """The block that holds each tensor row, int64 [O, rows], O being 1 without an order; -1 where the order leaves it out."""
    if order is None:
        return (rows // block)[None]
    positions = order.positions(seq)[:, rows].long()
    return torch.where(positions < 0, -1, positions // block)
