"""The ops at speed in plain torch: what runs on a CPU, and anywhere that Triton does not.

Keys and values are copied once a head, in the blocks of the mask; a query block's kept ones are gathered from there, so
that what remains is ordinary dense attention. Query blocks with equally many kept blocks go through it together. On a CPU the scores are
written out and multiplied as batches of matrices, which a CPU does faster for the 128 queries of a block than torch's
own `scaled_dot_product_attention`; elsewhere that does the arithmetic. Working memory is bounded by the budgets below.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import BlockMask, PooledBlocks, SparsePlan, TokenOrder, block_rows, blocks_of_rows

# Bytes of gathered keys, values and scores at a time: small enough to stay near a CPU's cache, large enough to hide a call.
_GROUP_BYTES = 8 << 20
# And the most that may be taken to give every thread a query block of its own.
_MOST_GROUP_BYTES = 128 << 20
# Query rows that are read, and whose results are written, at a time: enough to hide the calls.
_ROWS = 4096
# Bytes of scores at a time, where whole rows of them are written out.
_SCORE_BYTES = 32 << 20
# Bytes of a large page on x86 and most of the others.
_LARGE_PAGE = 2 << 20
# Queries and keys of a tile of scores that is summed up while it is in cache (4 MiB of float32).
_TILE_ROWS = 1024


def _output(q: Tensor) -> Tensor:
    """Like q, with [B, S, H, D] contiguous: the layout that hosts take it in."""
    batch, heads, seq, dim = q.shape
    return _fresh(q.numel(), q.dtype, q.device).view(batch, seq, heads, dim).transpose(1, 2)


def _exact_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(_exact_dtype(tensor))


def _fresh(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory [size]: in large pages where Linux has them, as the small ones of a large table cost a fault each."""
    length = size * dtype.itemsize
    if device.type != "cpu" or length < 2 * _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, length + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # given back with the last tensor on it
    with contextlib.suppress(OSError):  # a kernel without them takes the advice ill
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % _LARGE_PAGE
    return memory[start : start + length].view(dtype)


class _Workspace:
    """Memory that is used again and again within a call: fresh pages would cost as much as the arithmetic on them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a shape. It overwrites the last that had the name."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size or memory.dtype != dtype:
            memory = self._memory[name] = _fresh(size, dtype, self.device)
        return memory[:size].view(shape)

    def gather(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        """table[rows] for a table [S, X] and rows [n]: [n, X]."""
        return torch.index_select(table, 0, rows, out=self.take(name, (len(rows), table.shape[1]), table.dtype))

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype; itself, where it has that."""
        return tensor if tensor.dtype == dtype else self.take(name, tensor.shape, dtype).copy_(tensor)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, return_lse: bool = False, pooled: PooledBlocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.block_sparse_attention`. Returns out and, where asked for, lse."""
    mask = mask.expand(*q.shape[:2])
    full_rows = mask.full_rows
    blocks = _BlocksOfHeads(q, k, mask.block_q, mask.block_k, q_order, k_order, key_bias)
    out = _output(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    work = _Workspace(q.device)
    for b, h in blocks.heads():
        query_rows, keys = blocks.of_head(b, h, k[b, h], v[b, h], work)
        pooled_keys = None if pooled is None else (pooled.keys[b, h], pooled.values[b, h], pooled.log_size[b, h])
        head = _Head(q[b, h], keys, scale, out[b, h], None if lse is None else lse[b, h], work, pooled_keys)
        head.attend_blocks(query_rows, mask.kv_num_blocks[b, h], mask.kv_indices[b, h], full_rows[b, h])
    return out, lse


class _Keys:
    """One head's keys and values in the blocks of a mask, copied once, into memory that the next head overwrites.

    keys: [K, block_k, D]; values: [K, block_k, D]. offset: [K, block_k], what is added to a key's scores, minus infinity where
    there is no key or it is masked out; None where that is nothing anywhere. count: [K], visible keys of each block.
    """

    def __init__(self, k: Tensor, v: Tensor | None, rows: Tensor, bias: Tensor | None, work: _Workspace):
        """k, v: [S, D]. rows: [K, block_k], -1 where there is none. bias: [S] or None."""
        places = rows.clamp(min=0).long()
        offset = torch.zeros(rows.shape, dtype=torch.float32, device=k.device) if bias is None else bias[places]
        offset = offset.masked_fill(rows < 0, -torch.inf)
        hidden = offset == -torch.inf
        self.count = rows.shape[1] - hidden.sum(1)
        self.offset = offset if bool((offset != 0).any()) else None

        def in_blocks(name: str, table: Tensor) -> Tensor:
            blocks = work.gather(name, table, places.flatten())
            if self.offset is not None:  # what lies where no key is visible must not reach a sum, not even as 0 times NaN
                blocks.masked_fill_(hidden.view(-1, 1), 0)
            return blocks.view(*rows.shape, -1)

        self.keys = in_blocks("head's keys", k)
        self.values = None if v is None else in_blocks("head's values", v)


class _BlocksOfHeads:
    """Which rows of each head's q and k lie in which block, and the keys' bias."""

    def __init__(
        self, q: Tensor, k: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None, key_bias: Tensor | None,
    ):
        self.shape, self.q_order, self.k_order, self.key_bias = q.shape[:2], q_order, k_order, key_bias
        self.query_rows = block_rows(q_order, q.shape[2], block_q, q.device)
        self.key_rows = block_rows(k_order, k.shape[2], block_k, q.device)

    def empty_mass(self) -> Tensor:
        """[B, H, Q, K], unwritten."""
        return torch.empty(*self.shape, self.query_rows.shape[1], self.key_rows.shape[1], dtype=torch.float32, device=self.query_rows.device)

    def heads(self) -> Iterator[tuple[int, int]]:
        """Every (batch entry, head)."""
        return itertools.product(range(self.shape[0]), range(self.shape[1]))

    def of_head(self, b: int, h: int, k: Tensor, v: Tensor | None, work: _Workspace) -> tuple[Tensor, _Keys]:
        """Query rows [Q, block_q], -1 where there is none, and the keys of k and v, [S, D], in their blocks."""
        key_rows = self.key_rows[_order_of(self.k_order, b, h)]
        keys = _Keys(k, v, key_rows, None if self.key_bias is None else self.key_bias[b], work)
        return self.query_rows[_order_of(self.q_order, b, h)], keys


def _order_of(order: TokenOrder | None, b: int, h: int) -> int:
    if order is None:
        return 0
    heads = order.head_order
    return int(heads[b % heads.shape[0], h % heads.shape[1]])


class _Head:
    """One head's attention to blocks of keys. q, out: [S, D]; lse: [S] or None.

    pooled: keys [K, D], values [K, D] and log_size [K] of the blocks as one key each, for those that a row of blocks leaves out.
    """

    def __init__(
        self, q: Tensor, keys: _Keys, scale: float, out: Tensor, lse: Tensor | None, work: _Workspace,
        pooled: tuple[Tensor, Tensor, Tensor] | None = None,
    ):
        self.q, self.keys, self.scale, self.out, self.lse, self.work, self.pooled = q, keys, scale, out, lse, work, pooled
        self.writes_scores = q.device.type == "cpu" or lse is not None

    @functools.cached_property
    def weighted_values(self) -> Tensor:
        """The values as weights multiply them: [K, block_k, D]."""
        return self.work.cast("head's weighted values", self.keys.values, _weighted_dtype(self.keys.values))

    @functools.cached_property
    def score_keys(self) -> Tensor:
        """The keys as scores are made from them, [K, block_k, D], or D + 1: one more column takes their offset into the matrix product."""
        # Scores are float32, whatever comes in: 8 bits of mantissa are too few for an exponent.
        keys, offset, name = self.keys.keys, self.keys.offset, "head's score keys"
        if offset is None:
            return self.work.cast(name, keys, _exact_dtype(keys))
        result = self.work.take(name, (*keys.shape[:2], keys.shape[2] + 1), _exact_dtype(keys))
        result[..., :-1], result[..., -1] = keys, offset
        return result

    @functools.cached_property
    def pooled_score_keys(self) -> Tensor:
        """[K, D], or D + 1 beside keys that have an offset: what is added to their own scores is another for each row of blocks."""
        return F.pad(self.pooled[0].to(self.score_keys.dtype), (0, self.score_keys.shape[2] - self.pooled[0].shape[1]))

    @functools.cached_property
    def pooled_weighted_values(self) -> Tensor:
        """[K, D]"""
        return self.pooled[1].to(self.weighted_values.dtype)

    def attend_blocks(self, query_rows: Tensor, counts: Tensor, indices: Tensor, full_rows: Tensor) -> None:
        """query_rows: [Q, block_q], -1 where there is none; counts, indices, full_rows: the mask's, [Q], [Q, M] and [Q].

        Query blocks with equally many rows and kept blocks go together.
        """
        present = query_rows >= 0
        used = (torch.arange(indices.shape[1], device=indices.device) < counts[:, None]) & ~full_rows[:, None]
        seen = torch.where(used, self.keys.count[torch.where(used, indices, 0).long()], 0).sum(1)
        offsets = None  # [Q, K], what is added to the score of each block as one key: minus infinity for those that are kept
        if self.pooled is not None:
            columns = len(self.keys.count)
            kept = torch.zeros(len(indices), columns + 1, dtype=torch.bool, device=indices.device)
            kept.scatter_(1, torch.where(used, indices, columns).long(), True)
            offsets = self.pooled[2].expand(len(indices), -1).masked_fill(kept[:, :-1], -torch.inf)
            seen += (offsets != -torch.inf).sum(1)  # what is no number is seen
        # -1 for rows of blocks that see no key.
        counts = torch.where(torch.where(full_rows, self.keys.count.sum(), seen) == 0, -1, counts)
        kinds, kind_of_block = torch.stack([counts, present.sum(1)], 1).unique(dim=0, return_inverse=True)
        for kind, (count, size) in enumerate(kinds.tolist()):
            if size == 0:
                continue
            blocks = (kind_of_block == kind).nonzero()[:, 0]
            rows = query_rows[blocks][present[blocks]].view(len(blocks), size).long()
            if count < 0:
                self.write(rows, torch.zeros(rows.numel(), self.out.shape[1], dtype=self.out.dtype, device=rows.device), -torch.inf)
            elif count == len(self.keys.count):
                self.attend_to_all(rows.flatten())
            else:
                self._attend_listed(rows, indices[blocks, :count].long(), None if offsets is None else offsets[blocks])

    def attend_to_all(self, rows: Tensor) -> None:
        """Rows [n] that see every key: dense attention."""
        if self.lse is None:
            present = slice(None) if self.keys.offset is None else self.keys.offset.flatten() != -torch.inf
            keys, values = (table.flatten(0, 1)[present][None] for table in (self.keys.keys, self.keys.values))
            self._attend_fused(rows[None], keys, values, None if self.keys.offset is None else self.keys.offset.flatten()[present][None])
            return
        keys, values = (table.view(1, -1, table.shape[2]) for table in (self.score_keys, self.weighted_values))
        step = max(1, _SCORE_BYTES // (4 * keys.shape[1]))
        for start in range(0, len(rows), step):
            with self._rows(rows[None, start : start + step]) as (queries, result, row_lse):
                self._attend_written_out(queries, keys, lambda: values, result, row_lse)

    def _group(self, size: int, count: int) -> int:
        """How many query blocks of `size` rows and `count` key blocks to take at a time: equally many for each thread."""
        tables = (self.score_keys, self.weighted_values) if self.writes_scores else (self.keys.keys, self.keys.values)
        bytes_a_key = sum(table.shape[2] * table.element_size() for table in tables) + (4 * size if self.writes_scores else 0)
        bytes_a_block = bytes_a_key * (count * tables[0].shape[1] + (0 if self.pooled is None else len(self.pooled[0])))
        threads = torch.get_num_threads() if self.q.device.type == "cpu" else 1
        return max(1, min(threads * max(1, _GROUP_BYTES // (bytes_a_block * threads)), _MOST_GROUP_BYTES // bytes_a_block))

    def _attend_listed(self, rows: Tensor, lists: Tensor, offsets: Tensor | None) -> None:
        """Rows [n, size] to the key blocks [n, count], and with offsets [n, K] to the pooled ones. Written to out and lse at those rows."""
        group = self._group(rows.shape[1], lists.shape[1])
        slab = group * max(1, _ROWS // (group * rows.shape[1]))
        for start in range(0, len(rows), slab):
            some_rows, some_lists = rows[start : start + slab], lists[start : start + slab]
            some_offsets = None if offsets is None else offsets[start : start + slab]
            parts = [slice(part, part + group) for part in range(0, len(some_rows), group)]
            if self.writes_scores:
                with self._rows(some_rows) as (queries, result, row_lse):
                    for part in parts:
                        given = None if some_offsets is None else some_offsets[part]
                        self._attend_group(queries[part], some_lists[part], given, result[part], None if row_lse is None else row_lse[part])
            else:
                for part in parts:
                    keys, values = (
                        self._gathered(name, table, some_lists[part]) for name, table in (("keys", self.keys.keys), ("values", self.keys.values))
                    )
                    offset = None if self.keys.offset is None else self.keys.offset[some_lists[part]].flatten(1)
                    if offsets is not None:
                        listed = torch.zeros(keys.shape[:2], device=keys.device) if offset is None else offset
                        offset = torch.cat([listed, some_offsets[part]], 1)
                        pooled = (table.expand(len(keys), -1, -1) for table in self.pooled[:2])
                        keys, values = (torch.cat(tables, 1) for tables in zip((keys, values), pooled, strict=True))
                    self._attend_fused(some_rows[part], keys, values, offset)

    @contextlib.contextmanager
    def _rows(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The scaled queries of rows [n, size], and room for their results and LSE, which are written to those rows at the end."""
        queries = self.scaled_queries(rows.flatten()).view(*rows.shape, -1)
        result = self.work.take("result", (*rows.shape, self.out.shape[1]), self.weighted_values.dtype)
        row_lse = None if self.lse is None else torch.empty(rows.shape, dtype=queries.dtype, device=rows.device)
        yield queries, result, row_lse
        self.write(rows, result, row_lse)

    def _attend_group(self, queries: Tensor, lists: Tensor, offsets: Tensor | None, result: Tensor, row_lse: Tensor | None) -> None:
        """Queries [n, size, D] to the key blocks [n, count], and with offsets [n, K] to the pooled ones behind them."""
        # The values are gathered when the keys are done with, into the same memory where they can: it is still in cache.
        name = "keys" if self.score_keys.dtype == self.weighted_values.dtype else "values"
        keys = self._gathered("keys", self.score_keys, lists)
        self._attend_written_out(queries, keys, lambda: self._gathered(name, self.weighted_values, lists), result, row_lse, offsets)

    def _gathered(self, name: str, table: Tensor, lists: Tensor) -> Tensor:
        """The blocks [K, block_k, D] of each list as one matrix: [n, count * block_k, D]."""
        return self.work.gather(name, table.flatten(1), lists.flatten()).view(len(lists), -1, table.shape[2])

    def _attend_written_out(
        self, queries: Tensor, keys: Tensor, values: Callable[[], Tensor], result: Tensor, row_lse: Tensor | None, offsets: Tensor | None = None,
    ) -> None:
        """queries: [n, size, D]; keys: [n, length, D]; both D + 1 with the keys' offset; values: [n, length, D]. Fills result and row_lse.

        offsets: [n, K], of the pooled keys, which come after the others. They are the same for all queries: one matrix product of two
        dimensions, and nothing to gather.
        """
        length = keys.shape[1]
        scores = self.work.take("scores", (*queries.shape[:2], length + (0 if offsets is None else offsets.shape[1])), queries.dtype)
        torch.bmm(queries, keys.transpose(1, 2), out=scores[..., :length])
        if offsets is not None:
            torch.mm(queries.flatten(0, 1), self.pooled_score_keys.T, out=scores.flatten(0, 1)[:, length:])
            scores[..., length:] += offsets[:, None]
        lse = _softmax_(scores, with_lse=row_lse is not None)
        weights = self.work.cast("weights", scores, result.dtype)
        torch.bmm(weights[..., :length], values(), out=result)
        if offsets is not None:
            result.flatten(0, 1).addmm_(weights.flatten(0, 1)[:, length:], self.pooled_weighted_values)
        if row_lse is not None:
            row_lse.copy_(lse)

    def scaled_queries(self, rows: Tensor) -> Tensor:
        """Queries [n, D], or [n, D + 1] where keys have an offset, for scores by one matrix product."""
        queries = self.work.take("queries", (len(rows), self.score_keys.shape[2]), self.score_keys.dtype)
        dim = self.q.shape[1]
        queries[:, :dim] = self.work.gather("query rows", self.q, rows)
        queries[:, :dim] *= self.scale  # in the exact dtype: a product in 16 bits would round every query
        queries[:, dim:] = 1
        return queries

    def _attend_fused(self, rows: Tensor, keys: Tensor, values: Tensor, offset: Tensor | None) -> None:
        """torch's own attention. keys, values: [n, length, D]; offset: [n, length] or None."""
        queries = self.q.index_select(0, rows.flatten()).view(len(rows), 1, rows.shape[1], -1)
        bias = None if offset is None or not offset.any() else offset[:, None, None].to(queries.dtype).expand(-1, -1, rows.shape[1], -1)
        self.write(rows, F.scaled_dot_product_attention(queries, keys[:, None], values[:, None], attn_mask=bias, scale=self.scale), None)

    def write(self, rows: Tensor, result: Tensor, row_lse: Tensor | float | None) -> None:
        """Results [..., D] and their LSE, to tensor rows."""
        rows = rows.flatten()
        self.out.index_copy_(0, rows, result.reshape(-1, self.out.shape[-1]).to(self.out.dtype))
        if self.lse is not None:
            self.lse[rows] = row_lse.flatten().float() if isinstance(row_lse, Tensor) else row_lse


def _softmax_(scores: Tensor, with_lse: bool) -> Tensor | None:
    """Turns scores [..., K] into their softmax in place. Returns their log-sum-exp [...] where asked for.

    A row without a visible key, all minus infinity, gets zero weights and the LSE minus infinity.
    """
    largest = scores.amax(-1, keepdim=True) if with_lse else None
    torch.softmax(scores, -1, out=scores)
    if largest is None:
        return None
    # A weight is exp(score - LSE). The largest is at least 1/K, so the LSE can be read back from it.
    lse = (largest - scores.amax(-1, keepdim=True).log())[..., 0]
    hidden = largest[..., 0] == -torch.inf
    if hidden.any():
        scores.masked_fill_(hidden[..., None], 0.0)
        lse.masked_fill_(hidden, -torch.inf)
    return lse


def _weighted_dtype(v: Tensor) -> torch.dtype:
    """In what weights multiply values: float32, or bfloat16 where the CPU multiplies that at least as fast."""
    return v.dtype if v.dtype == torch.bfloat16 and v.device.type == "cpu" and _has_fast_bfloat16() else _exact_dtype(v)


@functools.cache
def _has_fast_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.attention_with_lse`."""
    fused = _fused_attention_with_lse(q, k, v, scale) if key_bias is None else None
    if fused is not None:
        return fused
    blocks = _BlocksOfHeads(q, k, q.shape[2], k.shape[2], None, None, key_bias)
    out, lse = _output(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    work = _Workspace(q.device)
    for b, h in blocks.heads():
        query_rows, keys = blocks.of_head(b, h, k[b, h], v[b, h], work)
        _Head(q[b, h], keys, scale, out[b, h], lse[b, h], work).attend_to_all(query_rows.flatten().long())
    return out, lse


def _fused_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """torch's own flash attention where it also hands out the LSE; None where it does not."""
    if q.device.type == "cpu" and q.dtype != torch.float64:
        op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and torch.backends.cuda.flash_sdp_enabled():
        op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
    else:
        op = None
    # Called past torch's own checks: it reads a head's channels as if they lay side by side.
    if op is None or any(tensor.stride(3) != 1 and tensor.shape[3] > 1 for tensor in (q, k, v)):
        return None
    try:
        out, lse = op(q, k, v, scale=scale)[:2]
    except (RuntimeError, TypeError):  # a private op: a shape or build that it does not take is ours to compute
        return None
    return out, lse.float()


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.block_mass`."""
    blocks = _BlocksOfHeads(q, k, block_q, block_k, q_order, k_order, key_bias)
    mass = blocks.empty_mass()
    work = _Workspace(q.device)
    for b, h in blocks.heads():
        query_rows, keys = blocks.of_head(b, h, k[b, h], None, work)
        _mass_of_head(q[b, h], lse[b, h], query_rows, keys, scale, mass[b, h])
    return mass


def _mass_of_head(q: Tensor, lse: Tensor, query_rows: Tensor, keys: _Keys, scale: float, mass: Tensor) -> None:
    """One head: q [S, D], lse [S], query_rows [Q, block_q], mass [Q, K].

    Two more columns take what is added to a score into the matrix product: one for the query's -LSE, one for the key's
    offset. A tile of the product is then exponentiated and summed while in cache.
    """
    rows = query_rows.flatten()
    some = rows.clamp(min=0)
    # exp(score - inf) is the 0 that padding, and a row without an LSE, must give.
    row_lse = torch.where((rows < 0) | (lse[some] == -torch.inf), torch.inf, lse[some])
    flat_keys = _exact(keys.keys).flatten(0, 1)
    offset = torch.zeros_like(flat_keys[:, 0]) if keys.offset is None else keys.offset.flatten()
    queries = _exact(q.index_select(0, some)) * scale
    flat_keys = torch.cat([flat_keys, torch.ones_like(flat_keys[:, :1]), offset[:, None].to(flat_keys.dtype)], 1)
    queries = torch.cat([queries, -row_lse[:, None].to(queries.dtype), torch.ones_like(queries[:, :1])], 1)
    block_q, block_k = query_rows.shape[1], keys.keys.shape[1]
    step_q, step_k = max(1, _TILE_ROWS // block_q), max(1, _TILE_ROWS // block_k)
    for start_q in range(0, len(query_rows), step_q):
        for start_k in range(0, len(keys.keys), step_k):
            some_queries = queries[start_q * block_q : (start_q + step_q) * block_q]
            some_keys = flat_keys[start_k * block_k : (start_k + step_k) * block_k]
            weights = (some_queries @ some_keys.T).exp_()
            # Whole key blocks first, along memory; then the rows of each query block.
            sums = weights.view(len(some_queries), -1, block_k).sum(-1).view(-1, block_q, len(some_keys) // block_k).sum(1)
            mass[start_q : start_q + step_q, start_k : start_k + step_k] = sums


def attention_with_mass(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.attention_with_mass`."""
    blocks = _BlocksOfHeads(q, k, block_q, block_k, q_order, k_order, key_bias)
    out, mass = _output(q), blocks.empty_mass()
    new_lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    work = _Workspace(q.device)
    for b, h in blocks.heads():
        query_rows, keys = blocks.of_head(b, h, k[b, h], v[b, h], work)
        head = _Head(q[b, h], keys, scale, out[b, h], new_lse[b, h], work)
        _attend_and_weigh(head, lse[b, h], query_rows, mass[b, h])
    return out, new_lse, mass


def _attend_and_weigh(head: _Head, old_lse: Tensor, query_rows: Tensor, mass: Tensor) -> None:
    """One head's dense attention, and from its weights the block masses [Q, K] under an earlier LSE, [S]."""
    keys, values = head.score_keys.flatten(0, 1), head.weighted_values.flatten(0, 1)
    block_q, block_k = query_rows.shape[1], head.score_keys.shape[1]
    step = max(1, _SCORE_BYTES // (4 * block_q * len(keys)))
    for start in range(0, len(query_rows), step):
        rows = query_rows[start : start + step].flatten()
        present, some = rows >= 0, rows.clamp(min=0).long()
        queries = head.scaled_queries(some)
        weights = torch.mm(queries, keys.T, out=head.work.take("scores", (len(rows), len(keys)), queries.dtype))
        row_lse = _softmax_(weights, with_lse=True)
        # A weight of today's softmax is exp(score - today's LSE): the change of the LSE makes it what the earlier one gives.
        change = torch.where(present & (old_lse[some] > -torch.inf), (row_lse - old_lse[some]).exp(), 0.0)
        sums = weights.view(len(rows), -1, block_k).sum(-1) * change[:, None]
        mass[start : start + step] = sums.view(-1, block_q, mass.shape[1]).sum(1)
        result = torch.mm(head.work.cast("weights", weights, values.dtype), values)
        head.write(some[present], result[present], row_lse[present])


def pool_blocks(k: Tensor, v: Tensor, block_k: int, k_order: TokenOrder | None, key_bias: Tensor | None) -> PooledBlocks:
    """See `kernels.pool_blocks`."""
    blocks = _BlocksOfHeads(k, k, block_k, block_k, None, k_order, key_bias)
    shape = (*k.shape[:2], blocks.key_rows.shape[1])
    pooled = PooledBlocks(
        torch.empty(*shape, k.shape[3], dtype=k.dtype, device=k.device), torch.empty(*shape, k.shape[3], dtype=v.dtype, device=k.device),
        torch.empty(shape, dtype=torch.float32, device=k.device),
    )  # fmt: skip
    work = _Workspace(k.device)
    for b, h in blocks.heads():
        _, keys = blocks.of_head(b, h, k[b, h], v[b, h], work)
        if keys.offset is None:
            weights = None
            pooled.log_size[b, h] = math.log(block_k)
        else:
            log_size = pooled.log_size[b, h] = keys.offset.logsumexp(1)
            weights = (keys.offset - torch.where(log_size == -torch.inf, 0.0, log_size)[:, None]).exp()[:, None]  # [K, 1, block_k]
        for table, means in ((keys.keys, pooled.keys[b, h]), (keys.values, pooled.values[b, h])):
            exact = work.cast("exact", table, _exact_dtype(table))
            means.copy_(exact.mean(1) if weights is None else torch.bmm(weights.to(exact.dtype), exact)[:, 0])
    return pooled


def block_errors(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, pooled: PooledBlocks, q_order: TokenOrder | None,
    k_order: TokenOrder | None, scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.block_errors`."""
    blocks = _BlocksOfHeads(q, k, block_q, block_k, q_order, k_order, key_bias)
    errors = blocks.empty_mass()
    work = _Workspace(q.device)
    for b, h in blocks.heads():
        query_rows, keys = blocks.of_head(b, h, k[b, h], v[b, h], work)
        pooled_keys = (pooled.keys[b, h], pooled.values[b, h], pooled.log_size[b, h])
        _errors_of_head(q[b, h], lse[b, h], query_rows, keys, pooled_keys, scale, errors[b, h], work)
    return errors


def _errors_of_head(
    q: Tensor, lse: Tensor, query_rows: Tensor, keys: _Keys, pooled: tuple[Tensor, Tensor, Tensor], scale: float, errors: Tensor, work: _Workspace,
) -> None:
    """One head: q [S, D], lse [S], query_rows [Q, block_q], errors [Q, K]; pooled as of `_Head`.

    A block's pooled key goes behind its keys, with minus its value, so that one product gives the difference. The columns that take the
    LSE and the offsets into the scores are those of `_mass_of_head`.
    """
    rows = query_rows.flatten()
    some = rows.clamp(min=0)
    counted = (rows >= 0) & (lse[some] > -torch.inf)
    dtype, (count, block_k, dim), block_q = _exact_dtype(q), keys.keys.shape, query_rows.shape[1]
    queries = work.take("queries", (len(rows), dim + 2), dtype)
    queries[:, :dim] = work.gather("query rows", q, some)
    queries[:, :dim] *= scale
    queries[:, dim] = torch.where(counted, -lse[some], -torch.inf)  # exp(score - inf) is the 0 that a row which does not count must give
    queries[:, dim + 1] = 1
    queries[:, :dim].masked_fill_(~counted[:, None], 0)
    score_keys = work.take("score keys", (count, block_k + 1, dim + 2), dtype)
    score_keys[:, :-1, :dim], score_keys[:, -1, :dim] = keys.keys, pooled[0]
    score_keys[..., dim] = 1
    score_keys[:, :-1, dim + 1], score_keys[:, -1, dim + 1] = 0 if keys.offset is None else keys.offset, pooled[2]
    values = work.take("values", (count, block_k + 1, dim), dtype)
    values[:, :-1] = keys.values
    torch.neg(pooled[1].to(dtype), out=values[:, -1])
    score_keys = score_keys.flatten(0, 1)
    step_q, step_k = max(1, _TILE_ROWS // block_q), max(1, _TILE_ROWS // block_k)
    for start_q in range(0, len(query_rows), step_q):
        tile_rows = slice(start_q * block_q, (start_q + step_q) * block_q)
        some_queries = queries[tile_rows]
        idle = (~counted[tile_rows]).nonzero()[:, 0]
        for start_k in range(0, count, step_k):
            some_values = values[start_k : start_k + step_k]
            some_keys = score_keys[start_k * (block_k + 1) : (start_k + step_k) * (block_k + 1)]
            weights = torch.mm(some_queries, some_keys.T, out=work.take("weights", (len(some_queries), len(some_keys)), dtype)).exp_()
            output = work.take("output", (len(some_values), len(some_queries), dim), dtype)
            torch.bmm(weights.view(len(some_queries), -1, block_k + 1).transpose(0, 1), some_values, out=output)
            if len(idle):  # 0 times a value that is not finite
                output.index_fill_(1, idle, 0)
            lengths = torch.linalg.vector_norm(output.view(len(some_values), -1, block_q * dim), dim=-1)
            errors[start_q : start_q + step_q, start_k : start_k + step_k] = lengths.square().T


def sampled_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, candidates: list[SparsePlan], scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.sampled_errors`."""
    batch, heads, _, dim = q.shape
    rows = rows.long()
    seen = [_KeysOfRows(plan, rows, q.shape, k.shape[2]) for plan in candidates]
    errors = torch.empty(len(candidates), batch, heads, dtype=torch.float32, device=q.device)
    for b in range(batch):
        bias = None if key_bias is None else key_bias[b]
        for h in range(heads):
            keys, values = _exact(k[b, h]), _exact(v[b, h])
            scores = _exact(q[b, h].index_select(0, rows)) @ keys.T * scale  # [R, S_k]
            if bias is not None:
                scores = scores + bias
            stacked = torch.stack([scores, *(scores.masked_fill(~each.visible(b, h), -torch.inf) for each in seen)])
            lse = stacked.logsumexp(-1)
            weights = (stacked - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
            outputs = (weights.view(-1, weights.shape[-1]) @ values).view(len(seen) + 1, -1, dim)
            errors[:, b, h] = (outputs[1:] - outputs[:1]).square().mean((1, 2)).float()
    return errors


class _KeysOfRows:
    """Which keys a plan shows to each sampled row: by position, block by block, one head at a time."""

    def __init__(self, plan: SparsePlan, rows: Tensor, q_shape: torch.Size, seq_k: int):
        self.plan = plan
        self.mask = plan.mask.expand(q_shape[0], q_shape[1])
        self.row_blocks = blocks_of_rows(plan.q_order, rows, q_shape[2], plan.mask.block_q)
        self.key_blocks = blocks_of_rows(plan.k_order, torch.arange(seq_k, device=rows.device), seq_k, plan.mask.block_k)

    def visible(self, b: int, h: int) -> Tensor:
        """bool [R, S_k] of one head."""
        row_blocks = self.row_blocks[_order_of(self.plan.q_order, b, h)]
        key_blocks = self.key_blocks[_order_of(self.plan.k_order, b, h)]
        indices, counts = self.mask.kv_indices[b, h][row_blocks].long(), self.mask.kv_num_blocks[b, h][row_blocks][:, None]
        full = self.mask.full_rows[b, h][row_blocks][:, None]
        used = (torch.arange(indices.shape[1], device=indices.device) < counts) & ~full
        # One column more than there are blocks takes what is unused, and keys that the order leaves out.
        blocks = torch.zeros(len(row_blocks), self.mask.num_k_blocks + 1, dtype=torch.bool, device=indices.device)
        blocks.scatter_(1, torch.where(used, indices, self.mask.num_k_blocks), True)
        blocks |= full
        blocks[:, -1] = False
        return blocks[:, key_blocks]
