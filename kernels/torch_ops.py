"""The ops at speed in plain torch: what runs on a CPU, and anywhere that Triton does not.

A query block's kept keys are gathered, padding and masked-out keys left behind, so that what remains is ordinary
dense attention without a mask: torch's own `scaled_dot_product_attention` does the arithmetic. Query blocks with
equally many keys go through it together. Working memory is bounded by the two budgets below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import BlockMask, SparsePlan, TokenOrder, block_rows

# Bytes of gathered keys and values at a time: small enough to stay in a CPU's cache, large enough to hide a call.
_GATHER_BYTES = 8 << 20
# Bytes of scores at a time, where scores are written out with their LSE.
_SCORE_BYTES = 64 << 20
# Queries and keys of a tile of scores that is summed up while it is in cache (4 MiB of float32).
_TILE_ROWS = 1024


def _output(q: Tensor) -> Tensor:
    """Like q, with [B, S, H, D] contiguous: the layout that hosts take it in."""
    batch, heads, seq, dim = q.shape
    return torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _HeadKeys:
    """The visible key rows of one head's query blocks, as lists without holes."""

    def __init__(self, counts: Tensor, indices: Tensor, key_rows: Tensor):
        """counts [Q], indices [Q, M] of the block mask; key_rows [K, block_k], -1 where there is no key."""
        self.indices = indices
        self.key_rows = key_rows
        self.used = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        keys_in_block = (key_rows >= 0).sum(1)
        self.total = int(keys_in_block.sum())
        self.lengths = torch.where(self.used, keys_in_block[torch.where(self.used, indices, 0).long()], 0).sum(1)

    def rows(self, blocks: Tensor, length: int) -> Tensor:
        """The key rows of query blocks that all see `length` keys: int64 [blocks, length]."""
        chosen = self.key_rows[torch.where(self.used[blocks], self.indices[blocks], 0).long()]  # [n, M, block_k]
        present = (chosen >= 0) & self.used[blocks][..., None]
        return chosen[present].view(len(blocks), length).long()


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.block_sparse_attention`. Returns out and, where asked for, lse."""
    batch, heads, seq_q, _ = q.shape
    mask = mask.expand(batch, heads)
    out = _output(q)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device) if return_lse else None
    query_rows = block_rows(q_order, seq_q, mask.block_q, q.device)
    key_rows = block_rows(k_order, k.shape[2], mask.block_k, q.device)
    for b in range(batch):
        bias = None if key_bias is None else key_bias[b]
        for h in range(heads):
            head_keys = _drop_masked(key_rows[_order_of(k_order, b, h)], bias)
            keys = _HeadKeys(mask.kv_num_blocks[b, h], mask.kv_indices[b, h], head_keys)
            _one_head(
                q[b, h], k[b, h], v[b, h], keys, query_rows[_order_of(q_order, b, h)], scale, _finite(bias),
                out[b, h], None if lse is None else lse[b, h],
            )
    return out, lse


def _order_of(order: TokenOrder | None, b: int, h: int) -> int:
    if order is None:
        return 0
    heads = order.head_order
    return int(heads[b % heads.shape[0], h % heads.shape[1]])


def _drop_masked(key_rows: Tensor, bias: Tensor | None) -> Tensor:
    """Keys whose bias is minus infinity are padding to everyone."""
    if bias is None:
        return key_rows
    masked = (bias == -torch.inf)[key_rows.clamp(min=0).long()]
    return torch.where(masked, -1, key_rows)


def _finite(bias: Tensor | None) -> Tensor | None:
    """The bias of the keys that are left; None where it changes nothing."""
    if bias is None:
        return None
    bias = torch.where(bias == -torch.inf, 0.0, bias)
    return bias if bool((bias != 0).any()) else None


def _one_head(q, k, v, keys: _HeadKeys, query_rows: Tensor, scale: float, bias: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """One head: q, k, v, out [S, D], query_rows [Q, block_q], lse [S]. Query blocks of one size and one key count go together."""
    present = query_rows >= 0
    sizes = torch.stack([keys.lengths, present.sum(1)], 1)
    kinds, kind_of_block = sizes.unique(dim=0, return_inverse=True)
    for kind, (length, size) in enumerate(kinds.tolist()):
        if size == 0:
            continue
        blocks = (kind_of_block == kind).nonzero()[:, 0]
        rows = query_rows[blocks][present[blocks]].view(len(blocks), size).long()
        if length == 0:
            out.index_fill_(0, rows.flatten(), 0)
            if lse is not None:
                lse.index_fill_(0, rows.flatten(), -torch.inf)
            continue
        if length == keys.total:  # rows that see every key share one gather
            rows = rows.view(1, -1)
            blocks = blocks[:1]
        gathered = length * k.shape[-1] * (k.element_size() * 2)
        scores = rows.shape[1] * length * 4 if lse is not None else 0
        step = max(1, min(_GATHER_BYTES // gathered, _SCORE_BYTES // max(scores, 1)))
        for start in range(0, len(blocks), step):
            key_rows = keys.rows(blocks[start : start + step], length)
            _attend(q, k, v, rows[start : start + step], key_rows, scale, bias, out, lse)


def _attend(q, k, v, rows: Tensor, key_rows: Tensor, scale: float, bias: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Dense attention of rows [n, size] to key_rows [n, length], written to out and lse at those rows."""
    count, dim = rows.shape[0], q.shape[-1]
    gathered_q = q.index_select(0, rows.flatten()).view(count, 1, -1, dim)
    gathered_k = k.index_select(0, key_rows.flatten()).view(count, 1, -1, dim)
    gathered_v = v.index_select(0, key_rows.flatten()).view(count, 1, -1, dim)
    extra = None if bias is None else bias[key_rows][:, None, None]
    if lse is None:
        extra = None if extra is None else extra.to(q.dtype).expand(-1, -1, rows.shape[1], -1)
        result = F.scaled_dot_product_attention(gathered_q, gathered_k, gathered_v, attn_mask=extra, scale=scale)
    else:
        result, row_lse = _attention(gathered_q, gathered_k, gathered_v, scale, extra)
        lse.index_copy_(0, rows.flatten(), row_lse.flatten().float())
    out.index_copy_(0, rows.flatten(), result.reshape(-1, dim).to(out.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention with the scores written out: out [..., S_q, D] in float32 and lse [..., S_q]. Rows without a key give 0 and minus infinity."""
    scores = _exact(q) @ _exact(k).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp()
    return weights @ _exact(v), lse


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.attention_with_lse`."""
    fused = _fused_attention_with_lse(q, k, v, scale) if key_bias is None else None
    if fused is not None:
        return fused
    out = _output(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    step = max(1, _SCORE_BYTES // (q.shape[1] * k.shape[2] * 4))
    for b in range(q.shape[0]):
        bias = None if key_bias is None else key_bias[b]
        for start in range(0, q.shape[2], step):
            rows = slice(start, start + step)
            result, row_lse = _attention(q[b, :, rows], k[b], v[b], scale, bias)
            out[b, :, rows] = result.to(out.dtype)
            lse[b, :, rows] = row_lse
    return out, lse


def _fused_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """torch's own flash attention where it also hands out the LSE; None where it does not."""
    if q.device.type == "cpu" and q.dtype != torch.float64:
        op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and torch.backends.cuda.flash_sdp_enabled():
        op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
    else:
        op = None
    if op is None:
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
    batch, heads, seq_q, _ = q.shape
    query_rows = block_rows(q_order, seq_q, block_q, q.device)
    key_rows = block_rows(k_order, k.shape[2], block_k, q.device)
    mass = torch.empty(batch, heads, query_rows.shape[1], key_rows.shape[1], dtype=torch.float32, device=q.device)
    # exp(score - inf) is the 0 that a row without an LSE must give.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    for b in range(batch):
        bias = None if key_bias is None else key_bias[b]
        for h in range(heads):
            _mass_of_head(
                q[b, h], k[b, h], lse[b, h], query_rows[_order_of(q_order, b, h)],
                _drop_masked(key_rows[_order_of(k_order, b, h)], bias), scale, _finite(bias), mass[b, h],
            )
    return mass


def _mass_of_head(q, k, lse, query_rows: Tensor, key_rows: Tensor, scale: float, bias: Tensor | None, mass: Tensor) -> None:
    """One head: q, k [S, D], lse [S], query_rows [Q, block_q], key_rows [K, block_k], mass [Q, K].

    Two more columns take what is added to a score into the matrix product: one for the query's -LSE, one for the key's
    bias, minus infinity where there is no key. A tile of the product is then exponentiated and summed while in cache.
    """
    flat_queries, flat_keys = query_rows.flatten(), key_rows.flatten()
    offset = torch.zeros(len(flat_keys), device=q.device) if bias is None else bias[flat_keys.clamp(min=0).long()]
    offset = torch.where(flat_keys < 0, -torch.inf, offset)
    row_lse = torch.where(flat_queries < 0, torch.inf, lse[flat_queries.clamp(min=0).long()])
    keys = _exact(k.index_select(0, flat_keys.clamp(min=0)))
    queries = _exact(q.index_select(0, flat_queries.clamp(min=0))) * scale
    keys = torch.cat([keys, torch.ones_like(keys[:, :1]), offset[:, None].to(keys.dtype)], 1)
    queries = torch.cat([queries, -row_lse[:, None].to(queries.dtype), torch.ones_like(queries[:, :1])], 1)
    block_q, block_k = query_rows.shape[1], key_rows.shape[1]
    step_q, step_k = max(1, _TILE_ROWS // block_q), max(1, _TILE_ROWS // block_k)
    for start_q in range(0, len(query_rows), step_q):
        for start_k in range(0, len(key_rows), step_k):
            some_queries = queries[start_q * block_q : (start_q + step_q) * block_q]
            some_keys = keys[start_k * block_k : (start_k + step_k) * block_k]
            weights = (some_queries @ some_keys.T).exp_()
            # Whole key blocks first, along memory; then the rows of each query block.
            sums = weights.view(len(some_queries), -1, block_k).sum(-1).view(-1, block_q, len(some_keys) // block_k).sum(1)
            mass[start_q : start_q + step_q, start_k : start_k + step_k] = sums


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
        self.row_blocks = _blocks_of_rows(plan.q_order, rows, q_shape[2], plan.mask.block_q)
        self.key_blocks = _blocks_of_rows(plan.k_order, torch.arange(seq_k, device=rows.device), seq_k, plan.mask.block_k)

    def visible(self, b: int, h: int) -> Tensor:
        """bool [R, S_k] of one head."""
        row_blocks = self.row_blocks[_order_of(self.plan.q_order, b, h)]
        key_blocks = self.key_blocks[_order_of(self.plan.k_order, b, h)]
        indices = self.mask.kv_indices[b, h][row_blocks].long()
        used = torch.arange(indices.shape[1], device=indices.device) < self.mask.kv_num_blocks[b, h][row_blocks][:, None]
        # One column more than there are blocks takes what is unused, and keys that the order leaves out.
        blocks = torch.zeros(len(row_blocks), self.mask.num_k_blocks + 1, dtype=torch.bool, device=indices.device)
        blocks.scatter_(1, torch.where(used, indices, self.mask.num_k_blocks), True)
        blocks[:, -1] = False
        return blocks[:, key_blocks]


def _blocks_of_rows(order: TokenOrder | None, rows: Tensor, seq: int, block: int) -> Tensor:
    """The block that holds each tensor row, int64 [O, rows]; -1 where the order leaves it out."""
    if order is None:
        return (rows // block)[None]
    positions = order.positions(seq)[:, rows].long()
    return torch.where(positions < 0, -1, positions // block)
