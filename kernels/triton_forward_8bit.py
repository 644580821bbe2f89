"""Block-sparse attention in 8 bits in Triton: `quantise.py` is its definition.

As triton_forward.py, over K (and V, for "fp8") that `triton_quantise` has written out in 8 bits: Q is rounded here, in
registers, and its scale takes in the softmax's. Some heads at a time, so that the 8-bit copies take no more than
WORKING_BYTES: of 119k tokens of 24 heads of 128 they are 350 MiB for "int8", twice that for "fp8".

Pooled blocks are attended to in the tensors' own precision, by the forward of that, and a last kernel joins both results by their LSEs: in
one kernel, the products of both and the rotation of Q would not fit the registers.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask, PooledBlocks, TokenOrder, num_blocks
from .capability import e4m3_kind
from .triton_config import LOG2E, architecture, forward_8bit_config, heads_aligned, on_device, padded_head_dim
from .triton_forward import block_row_numbers, head_start, load_rows, normalise, order_arguments, pooled_alone, positive_scale
from .triton_quantise import MEAN, REACH, poison, quantise, to_8_bits, turn, turned_at_once

LOG2E_DEVICE = tl.constexpr(LOG2E)
# What the 8-bit copies of K and V may take at a time; at least one head's are made.
WORKING_BYTES = 256 << 20
# Rows that a program joins.
_JOINED_ROWS = 64
# kind -> its largest number, and the power of two that weights are lifted by: as in quantise.py.
_KINDS = {torch.int8: (127.0, 0.0), torch.float8_e4m3fn: (448.0, 8.0), torch.float8_e4m3fnuz: (240.0, 7.0)}
# Below this a row's scale counts as this: times a block's smallest it must not become 0, since padding's minus infinity times 0 is NaN.
SMALLEST_ROW_SCALE = tl.constexpr(1e-24)
# As triton_quantise has them.
SMALLEST_SCALE = tl.constexpr(1e-12)


@triton.jit(
    do_not_specialize=[
        "lse", "kv_num_blocks", "kv_indices", "q_choice", "k_choice",  # cut by heads, at offsets that the resolution decides
        "heads", "length_q", "length_k", "blocks_k",
        "stride_q_b", "stride_q_h", "stride_v_b", "stride_v_h", "stride_out_b", "stride_out_h", "stride_lse_b", "stride_lse_h",
        "stride_count_b", "stride_count_h", "stride_count_q", "stride_index_b", "stride_index_h", "stride_index_q",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def forward_8bit_kernel(
    q, keys, key_scales, k_known, v, values, v_known, biases, out, lse, kv_num_blocks, kv_indices, q_order, q_choice, k_order, k_choice,
    scale, heads, length_q, length_k, blocks_k,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_out_b: tl.int64, stride_out_h: tl.int64, stride_out_s, stride_out_d,
    stride_lse_b: tl.int64, stride_lse_h: tl.int64,
    stride_count_b: tl.int64, stride_count_h: tl.int64, stride_count_q: tl.int64,
    stride_index_b: tl.int64, stride_index_h: tl.int64, stride_index_q: tl.int64, stride_index_m,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    FP8: tl.constexpr, INTERLEAVED: tl.constexpr, LARGEST: tl.constexpr, LIFT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of queries. TILES_Q, TILES_K: tiles in a block of the mask. scale: > 0, times log2(e). keys to biases: see `Quantised`."""
    BLOCK_K: tl.constexpr = TILES_K * BLOCK_N  # noqa: N806
    tile_q = tl.program_id(0)
    number = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_Q_ORDER:
        q_order += tl.load(q_choice + batch * stride_q_choice_b + head * stride_q_choice_h).to(tl.int64) * stride_q_order
    if HAS_K_ORDER:
        k_order += tl.load(k_choice + batch * stride_k_choice_b + head * stride_k_choice_h).to(tl.int64) * stride_k_order
    # Whole blocks are powers of two from 16 on, so the compiler sees that a head's start is aligned.
    keys += number * blocks_k * (BLOCK_K * BLOCK_D)
    key_scales += number * blocks_k
    if HAS_BIAS:
        biases += number * blocks_k * BLOCK_K
    if FP8:
        values += number * blocks_k * (BLOCK_K * BLOCK_D)
    else:
        v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    offsets_n = tl.arange(0, BLOCK_N)
    offsets_d = tl.arange(0, BLOCK_D)

    # [BLOCK_M]
    query_rows, query_present = block_row_numbers(tile_q * BLOCK_M + tl.arange(0, BLOCK_M), length_q, q_order, HAS_Q_ORDER)
    # [BLOCK_M, BLOCK_D]
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)
    given = load_rows(q, query_rows, query_present, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)
    turned = turn(given, BLOCK_M, BLOCK_D, TURNED)
    query_scale = tl.maximum(tl.max(tl.abs(turned), 1) / LARGEST, SMALLEST_SCALE)
    queries = to_8_bits(turned / query_scale[:, None], keys.dtype.element_ty, LARGEST)
    # TURNED makes up for the roots that both rotations left out.
    query_scale = tl.maximum(query_scale * (scale / TURNED), SMALLEST_ROW_SCALE) + poison(given.to(tl.float32))
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    exact_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    block_q = (tile_q // TILES_Q).to(tl.int64)
    kv_indices += batch * stride_index_b + head * stride_index_h + block_q * stride_index_q
    count = tl.load(kv_num_blocks + batch * stride_count_b + head * stride_count_h + block_q * stride_count_q)
    listed = count < blocks_k  # a row of all blocks has no list
    for step in tl.range(0, count * TILES_K):
        block = step // TILES_K
        block = tl.where(listed, tl.load(kv_indices + block * stride_index_m, mask=listed, other=0), block)
        inner = step % TILES_K
        key_scale = tl.load(key_scales + block)
        # [BLOCK_N, BLOCK_D]
        start = block.to(tl.int64) * (BLOCK_K * BLOCK_D)
        key_tile = tl.load(keys + start + inner * (BLOCK_N * BLOCK_D) + offsets_n[:, None] * BLOCK_D + offsets_d[None, :])
        positions = block * BLOCK_K + inner * BLOCK_N + offsets_n
        if FP8:
            # [BLOCK_D, BLOCK_N]
            value_tile = tl.trans(tl.load(values + start + inner * BLOCK_N + offsets_d[:, None] * BLOCK_K + offsets_n[None, :]))
        else:
            value_rows, value_present = block_row_numbers(positions, length_k, k_order, HAS_K_ORDER)
            value_tile = load_rows(v, value_rows, value_present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(key_tile)).to(tl.float32)
        score_scale = query_scale * tl.abs(key_scale)
        if HAS_BIAS:
            bias = tl.load(biases + block.to(tl.int64) * BLOCK_K + inner * BLOCK_N + offsets_n)
            scores = scores * score_scale[:, None] + bias[None, :]
            new_max = tl.maximum(running_max, tl.max(scores, 1))
        else:
            if key_scale < 0:
                _, key_present = block_row_numbers(positions, length_k, k_order, HAS_K_ORDER)
                scores = tl.where(key_present[None, :], scores, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(scores, 1) * score_scale)
        if FP8:
            new_max = tl.ceil(new_max)
        # A row that has seen no key yet stays at minus infinity: 0 in its place keeps (-inf) - (-inf) out of the exponents.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        if HAS_BIAS:
            weights = tl.math.exp2(scores + (LIFT - finite_max)[:, None])
        else:
            weights = tl.math.exp2(scores * score_scale[:, None] + (LIFT - finite_max)[:, None])
        correction = tl.math.exp2(running_max - finite_max)
        running_max = new_max
        if FP8:
            rounded = weights.to(keys.dtype.element_ty)
            if HAS_LSE:
                exact_sum = exact_sum * correction + tl.sum(weights, 1)
            running_sum = running_sum * correction + tl.sum(rounded.to(tl.float32), 1)
            # 8-bit matrix instructions add up in fewer bits than float32 has: a tile at a time, no sum is long.
            if INTERLEAVED:
                # A thread holds keys 2c, 2c + 1, 2c + 8 and 2c + 9 of every 16, and the second product wants four in a row from it:
                # the weights are renamed, which costs nothing, and V has been written with its keys in that order.
                rounded = tl.permute(tl.reshape(rounded, [BLOCK_M, BLOCK_N // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
                rounded = tl.reshape(rounded, [BLOCK_M, BLOCK_N])
            accumulator = accumulator * correction[:, None] + tl.dot(rounded, value_tile)
        else:
            running_sum = running_sum * correction + tl.sum(weights, 1)
            accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator * correction[:, None], input_precision="ieee")

    empty = running_sum == 0.0
    result, row_lse = normalise(running_max - LIFT, running_sum, accumulator)
    if FP8:
        v_known += number * 3 * BLOCK_D + offsets_d
        reach = tl.maximum(tl.load(v_known + REACH * BLOCK_D) / LARGEST, SMALLEST_SCALE)
        result = tl.where(empty[:, None], 0.0, result * reach[None, :] + tl.load(v_known + MEAN * BLOCK_D)[None, :])
    pointers = head_start(out, batch, head, stride_out_b, stride_out_h, ALIGNED) + query_rows.to(tl.int64)[:, None] * stride_out_s
    pointers += offsets_d[None, :] * stride_out_d
    tl.store(pointers, result.to(out.dtype.element_ty), mask=query_present[:, None] & (offsets_d < HEAD_DIM)[None, :])
    if HAS_LSE:
        if FP8:
            _, row_lse = normalise(running_max - LIFT, exact_sum, accumulator)
        # What smoothing took off each of a row's scores.
        given = load_rows(q, query_rows, query_present, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)
        mean = tl.load(k_known + (number * 3 + MEAN) * BLOCK_D + offsets_d)
        shift = tl.sum(given.to(tl.float32) * mean[None, :], 1) * (scale / LOG2E_DEVICE)
        row_lse = tl.where(empty, float("-inf"), row_lse + shift)
        tl.store(lse + batch * stride_lse_b + head * stride_lse_h + query_rows, row_lse, mask=query_present)


@triton.jit(do_not_specialize=["heads", "length", "stride_b", "stride_h"])
def join_kernel(
    out, lse, other_out, other_lse, heads, length, stride_b: tl.int64, stride_h: tl.int64, stride_s, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Attention to two sets of keys from what each gives alone, written to the first. Outputs of one layout; LSEs [B, H, length], contiguous."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = rows < length
    # [BLOCK_M]
    places = tl.program_id(1).to(tl.int64) * length + rows
    own_lse = tl.load(lse + places, mask=present, other=0.0)
    their_lse = tl.load(other_lse + places, mask=present, other=0.0)
    larger = tl.maximum(own_lse, their_lse)
    larger = tl.where(larger == float("-inf"), 0.0, larger)  # of rows that neither shows a key
    own, theirs = tl.exp(own_lse - larger), tl.exp(their_lse - larger)
    total = own + theirs
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + places, tl.where(total == 0.0, float("-inf"), larger + tl.log(divisor)), mask=present)
    # [BLOCK_M, BLOCK_D]
    start = head_start(out, batch, head, stride_b, stride_h, ALIGNED)
    result = load_rows(start, rows, present, stride_s, stride_d, HEAD_DIM, BLOCK_D).to(tl.float32) * (own / divisor)[:, None]
    other = head_start(other_out, batch, head, stride_b, stride_h, ALIGNED)
    result += load_rows(other, rows, present, stride_s, stride_d, HEAD_DIM, BLOCK_D).to(tl.float32) * (theirs / divisor)[:, None]
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = start + rows.to(tl.int64)[:, None] * stride_s + offsets_d[None, :] * stride_d
    tl.store(pointers, result.to(out.dtype.element_ty), mask=present[:, None] & (offsets_d < HEAD_DIM)[None, :])


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds to attention to some keys that to some others. Outputs [B, H, S, D] of one layout, LSEs [B, H, S]."""
    batch, heads, length, head_dim = out.shape
    with on_device(out):
        join_kernel[num_blocks(length, _JOINED_ROWS), batch * heads](
            out, lse, other_out, other_lse, heads, length, *out.stride(),
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=_JOINED_ROWS, ALIGNED=heads_aligned(out, other_out), num_warps=4,
        )  # fmt: skip


def block_sparse_attention_8bit(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, return_lse: bool, precision: str, pooled: PooledBlocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.block_sparse_attention`; precision: "int8" or "fp8". Returns out and, where asked for, lse."""
    batch, heads, seq_q, head_dim = q.shape
    more = None if pooled is None else pooled_alone(q, k, v, mask, q_order, scale, pooled)
    return_lse = return_lse or pooled is not None
    q, scale = positive_scale(q, scale)
    out = torch.empty(batch, seq_q, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device) if return_lse else None
    kind = torch.int8 if precision == "int8" else e4m3_kind(architecture(q.device))
    bytes_a_head = batch * mask.num_k_blocks * mask.block_k * padded_head_dim(head_dim) * (1 if precision == "int8" else 2)
    mask = mask.expand(batch, heads)
    step = max(1, WORKING_BYTES // bytes_a_head)
    for start in range(0, heads, step):
        some = slice(start, start + step)
        orders = [None if order is None else order.for_heads(order.head_order.expand(batch, heads)[:, some]) for order in (q_order, k_order)]
        counts, indices = mask.kv_num_blocks[:, some], mask.kv_indices[:, some]
        part = None if lse is None else lse[:, some]
        _launch(q[:, some], k[:, some], v[:, some], out[:, some], part, mask, counts, indices, *orders, scale, key_bias, kind)
    if more is not None:
        _join(out, lse, *more)
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, mask: BlockMask, counts: Tensor, indices: Tensor,
    q_order: TokenOrder | None, k_order: TokenOrder | None, scale: float, key_bias: Tensor | None, kind: torch.dtype,
) -> None:
    """Some heads: their K and V into 8 bits, then the forward. counts, indices: those heads' part of the mask."""
    batch, heads, _, head_dim = q.shape
    fp8 = kind != torch.int8
    largest, lift = _KINDS[kind]
    precision = "fp8" if fp8 else "int8"
    config, interleaved, mask_as_bias = forward_8bit_config(precision, head_dim, architecture(q.device), mask.block_q, mask.block_k)
    has_bias = key_bias is not None or mask_as_bias
    eight = quantise(k, v if fp8 else None, k_order, key_bias, mask.num_k_blocks, mask.block_k, kind, largest, has_bias, interleaved)
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_table, k_choice, k_order_strides = order_arguments(k_order, batch, heads)
    with on_device(q):
        forward_8bit_kernel[num_blocks(mask.seq_q, config.block_m), batch * heads](
            q, eight.keys, eight.key_scales, eight.k_known, v, eight.values, eight.v_known, eight.biases, out, lse,
            counts, indices, q_table, q_choice, k_table, k_choice,
            scale, heads, mask.seq_q, mask.seq_k, mask.num_k_blocks,
            *q.stride(), *v.stride(), *out.stride(), *((0, 0) if lse is None else lse.stride()[:2]),
            *counts.stride(), *indices.stride(), *q_order_strides, *k_order_strides,
            FP8=fp8, INTERLEAVED=interleaved, LARGEST=largest, LIFT=lift,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), TURNED=turned_at_once(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            TILES_Q=mask.block_q // config.block_m, TILES_K=mask.block_k // config.block_n, HAS_Q_ORDER=q_order is not None,
            HAS_K_ORDER=k_order is not None, HAS_BIAS=has_bias, HAS_LSE=lse is not None, ALIGNED=heads_aligned(q, v, out),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
