"""The definition of every op, in plain torch: any device, any dtype, slow and obviously right.

Signatures are those of the public ops with everything made explicit: `scale` a number, `key_bias` float32 [B, S_k]
with minus infinity already in place, orders and masks expanded by the reader. It materialises S x S scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import quantise
from .block_mask import BlockMask, PooledBlocks, SparsePlan, TokenOrder, block_rows


def token_mask(mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None, batch: int, heads: int, seq_q: int, seq_k: int) -> Tensor:
    """Which key row each query row sees, bool [B, H, S_q, S_k] in tensor row order."""
    visible = mask.to_dense().expand(batch, heads, -1, -1)
    if k_order is not None:
        visible = _to_rows(visible, k_order, seq_k)
    if q_order is not None:
        visible = _to_rows(visible.transpose(2, 3), q_order, seq_q).transpose(2, 3)
    return visible


def _to_rows(by_position: Tensor, order: TokenOrder, seq: int) -> Tensor:
    """Moves the last dimension from order positions to tensor rows; rows that the order leaves out see nothing."""
    batch, heads = by_position.shape[:2]
    rows = order.rows[order.head_order.expand(batch, heads).long()]  # [B, H, P]
    targets = torch.where(rows < 0, seq, rows).long()[:, :, None].expand(by_position.shape)
    result = torch.zeros(*by_position.shape[:3], seq + 1, dtype=torch.bool, device=by_position.device)
    return result.scatter_(-1, targets, by_position)[..., :seq]


def _scores(q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None) -> Tensor:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * scale
    return scores if key_bias is None else scores + key_bias[:, None, None].to(exact)


def _softmax_attention(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE; a row whose scores are all minus infinity gives 0 and minus infinity."""
    lse = scores.logsumexp(-1)
    weights = torch.where((lse == -torch.inf)[..., None], 0.0, (scores - lse[..., None]).exp())
    return weights @ v.to(scores.dtype), lse


def block_sparse_attention(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse=True, pooled=None) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys of each row, and with `pooled` over each block that is not kept as one more key.

    Returns out like q and lse [B, H, S_q], asked for or not.
    """
    visible = token_mask(mask, q_order, k_order, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    scores = _scores(q, k, scale, key_bias).masked_fill(~visible, -torch.inf)
    if pooled is not None:
        scores = torch.cat([scores, pooled_scores(q, mask, q_order, scale, pooled)], 3)
        v = torch.cat([v, pooled.values], 2)
    out, lse = _softmax_attention(scores, v)
    return out.to(q.dtype), lse


def pooled_scores(q: Tensor, mask: BlockMask, q_order: TokenOrder | None, scale: float, pooled: PooledBlocks) -> Tensor:
    """The score of each row with each block as one key, [B, H, S_q, K]: minus infinity for a block that the row keeps."""
    kept = mask.to_blocks().repeat_interleave(mask.block_q, 2)[:, :, : mask.seq_q].expand(*q.shape[:2], -1, -1)  # by position
    if q_order is not None:
        kept = _to_rows(kept.transpose(2, 3), q_order, q.shape[2]).transpose(2, 3)
    scores = _scores(q, pooled.keys, scale, None) + pooled.log_size[:, :, None]
    return scores.masked_fill(kept, -torch.inf)


def block_sparse_attention_8bit(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse, precision, pooled=None) -> tuple[Tensor, Tensor]:
    """The same in "int8" or "fp8", as quantise.py defines them. Pooled blocks, in the tensors' own precision, are joined to that by both LSEs."""
    visible = token_mask(mask, q_order, k_order, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = quantise.attention(q, k, v, visible, _key_blocks(mask, k_order, k), scale, key_bias, precision)
    if pooled is not None:
        pooled_out, pooled_lse = _softmax_attention(pooled_scores(q.float(), mask, q_order, scale, pooled), pooled.values)
        both = torch.stack([lse, pooled_lse])
        lse = both.logsumexp(0)
        shares = torch.where(lse == -torch.inf, 0.0, (both - lse).exp())[..., None]
        out = shares[0] * out + shares[1] * pooled_out
    return out.to(q.dtype), lse


def _key_blocks(mask: BlockMask, k_order: TokenOrder | None, k: Tensor) -> Tensor:
    """The block of the mask that holds each key, [B, H, S_k]; -1 for one that the order leaves out."""
    if k_order is None:
        return (torch.arange(k.shape[2], device=k.device) // mask.block_k).expand(*k.shape[:3])
    positions = k_order.positions(k.shape[2])[k_order.head_order.expand(*k.shape[:2]).long()]
    return torch.where(positions < 0, -1, positions // mask.block_k)


def attention_with_lse(q, k, v, scale, key_bias) -> tuple[Tensor, Tensor]:
    """Dense attention. Returns out like q and lse [B, H, S_q]."""
    out, lse = _softmax_attention(_scores(q, k, scale, key_bias), v)
    return out.to(q.dtype), lse


def block_mass(q, k, lse, block_q, block_k, q_order, k_order, scale, key_bias) -> Tensor:
    """Sum of exp(score - lse) over the real rows and keys of each pair of blocks, [B, H, Q, K] (AdaSpa, equation 13)."""
    scores = _scores(q, k, scale, key_bias)
    weights = torch.where((lse == -torch.inf)[..., None], 0.0, (scores - lse[..., None].to(scores.dtype)).exp())
    by_key_block = _sum_blocks(weights, k_order, block_k)
    return _sum_blocks(by_key_block.transpose(2, 3), q_order, block_q).transpose(2, 3).float()


def attention_with_mass(q, k, v, lse, block_q, block_k, q_order, k_order, scale, key_bias) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_with_lse`, and `block_mass` with the LSE handed in."""
    return *attention_with_lse(q, k, v, scale, key_bias), block_mass(q, k, lse, block_q, block_k, q_order, k_order, scale, key_bias)


def _sum_blocks(values: Tensor, order: TokenOrder | None, block: int) -> Tensor:
    """Sums the last dimension, tensor rows, into blocks of an order's positions."""
    batch, heads, _, seq = values.shape
    if order is None:
        positions = torch.arange(seq, device=values.device).expand(batch, heads, seq)
        length = seq
    else:
        positions = order.positions(seq)[order.head_order.expand(batch, heads).long()].long()
        length = order.length
    blocks = -(-length // block)
    target = torch.where(positions < 0, blocks, positions // block)[:, :, None].expand(values.shape)
    sums = torch.zeros(*values.shape[:3], blocks + 1, dtype=values.dtype, device=values.device)
    return sums.scatter_add_(-1, target, values)[..., :blocks]


def _rows_of_blocks(k_order: TokenOrder | None, k: Tensor, block_k: int) -> Tensor:
    """The tensor rows of each block of keys, int64 [B, H, K, block_k]; -1 where a place holds none."""
    rows = block_rows(k_order, k.shape[2], block_k, k.device).long()
    return rows.expand(*k.shape[:2], -1, -1) if k_order is None else rows[k_order.head_order.expand(*k.shape[:2]).long()]


def _at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, S, D] at rows [B, H, K, N], any row where there is none: [B, H, K, N, D]."""
    return x.gather(2, rows.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])).unflatten(2, rows.shape[2:])


def _log_weights(rows: Tensor, key_bias: Tensor | None) -> Tensor:
    """The logarithm of what each key of each block counts, float32 [B, H, K, N]: its bias, and minus infinity where there is none."""
    if key_bias is None:
        bias = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    else:
        bias = key_bias[:, None, None].expand(*rows.shape[:3], -1).gather(3, rows.clamp(min=0))
    return bias.masked_fill(rows < 0, -torch.inf)


def pool_blocks(k, v, block_k, k_order, key_bias) -> PooledBlocks:
    """The mean key and value of each block, keys weighted by exp(bias), and the logarithm of the sum of those weights."""
    rows = _rows_of_blocks(k_order, k, block_k)
    logs = _log_weights(rows, key_bias)
    log_size = logs.logsumexp(-1)
    weights = (logs - torch.where(log_size == -torch.inf, 0.0, log_size)[..., None]).exp()

    def mean(x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        terms = weights[..., None].to(exact) * _at_rows(x, rows).to(exact)
        return terms.masked_fill((logs == -torch.inf)[..., None], 0.0).sum(3).to(x.dtype)

    return PooledBlocks(mean(k), mean(v), log_size)


def block_errors(q, k, v, lse, block_q, block_k, pooled, q_order, k_order, scale, key_bias) -> Tensor:
    """Sum over the real rows of a query block of |sum of p v over a key block's keys - p v of the block as one key|^2, [B, H, Q, K]."""
    rows = _rows_of_blocks(k_order, k, block_k)
    logs = _log_weights(rows, key_bias)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    counted = (lse > -torch.inf)[..., None]
    row_lse = torch.where(counted, lse[..., None], 0.0).to(exact)
    keys, values = (_at_rows(x, rows).to(exact) for x in (k, v))
    by_row = []
    for block in range(rows.shape[2]):
        log, absent = logs[:, :, block, None].to(exact), (logs[:, :, block] == -torch.inf)[..., None]
        scores = q.to(exact) @ keys[:, :, block].masked_fill(absent, 0.0).transpose(-1, -2) * scale + log  # [B, H, S_q, N]
        output = (scores - row_lse).exp() @ values[:, :, block].masked_fill(absent, 0.0)
        log_size = pooled.log_size[:, :, block, None, None].to(exact)
        score = q.to(exact) @ pooled.keys[:, :, block, :, None].to(exact) * scale + log_size  # [B, H, S_q, 1]
        pooled_output = (score - row_lse).exp() * pooled.values[:, :, block, None].to(exact)
        by_row.append(torch.where(counted, output - pooled_output, 0.0).square().sum(-1))
    return _sum_blocks(torch.stack(by_row, 2), q_order, block_q).transpose(2, 3).float()


def sampled_errors(q, k, v, rows, candidates: list[SparsePlan], scale, key_bias) -> Tensor:
    """Mean squared error of each candidate against dense attention, over the sampled rows and D: [C, B, H] (SVG, algorithm 1)."""
    rows = rows.long()
    scores = _scores(q, k, scale, key_bias)[:, :, rows]
    dense, _ = _softmax_attention(scores, v)
    errors = []
    for plan in candidates:
        visible = token_mask(plan.mask, plan.q_order, plan.k_order, q.shape[0], q.shape[1], q.shape[2], k.shape[2])[:, :, rows]
        sparse, _ = _softmax_attention(scores.masked_fill(~visible, -torch.inf), v)
        errors.append((sparse - dense).square().mean((2, 3)))
    return torch.stack(errors).float()
