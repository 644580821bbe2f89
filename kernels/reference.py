"""The definition of every op, in plain torch: any device, any dtype, slow and obviously right.

Signatures are those of the public ops with everything made explicit: `scale` a number, `key_bias` float32 [B, S_k]
with minus infinity already in place, orders and masks expanded by the reader. It materialises S x S scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import quantise
from .block_mask import BlockMask, SparsePlan, TokenOrder


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


def block_sparse_attention(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse=True) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys of each row. Returns out like q and lse [B, H, S_q], asked for or not."""
    visible = token_mask(mask, q_order, k_order, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = _softmax_attention(_scores(q, k, scale, key_bias).masked_fill(~visible, -torch.inf), v)
    return out.to(q.dtype), lse


def block_sparse_attention_8bit(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse, precision) -> tuple[Tensor, Tensor]:
    """The same in "int8" or "fp8", as quantise.py defines them."""
    visible = token_mask(mask, q_order, k_order, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = quantise.attention(q, k, v, visible, _key_blocks(mask, k_order, k), scale, key_bias, precision)
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
