"""Block-sparse and dense attention in Triton.

One program takes a tile of BLOCK_M query positions of one head and walks the key tiles of its query block: those of
the mask's index list, or with DENSE all of them. The softmax is online and in base 2. Query tiles are the fastest
dimension of the grid and heads the slowest, so that the programs in flight share one head's K and V in the L2 cache.
Orders are read inside: a tile's rows come from the order's table, and q, k and v are never permuted or copied.

Nothing is specialised on a sequence length, a count or the stride of a batch or head: another resolution compiles nothing.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask, TokenOrder, num_blocks
from .triton_config import LOG2E, architecture, forward_config, heads_aligned, on_device, padded_head_dim

LOG2E_DEVICE = tl.constexpr(LOG2E)


@triton.jit
def head_start(tensor, batch, head, stride_b, stride_h, ALIGNED: tl.constexpr):
    """A pointer to one head of a [B, H, S, D] tensor. batch, head: int64."""
    start = tensor + batch * stride_b + head * stride_h
    if ALIGNED:
        # The strides are not specialised, so the compiler must be told what the host has checked.
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def block_row_numbers(positions, length, table, HAS_ORDER: tl.constexpr):
    """The tensor row at each position and whether there is one. length: positions in all."""
    if HAS_ORDER:
        rows = tl.load(table + positions, mask=positions < length, other=-1)
        present = rows >= 0
    else:
        rows = positions
        present = positions < length
    return rows, present


@triton.jit
def load_rows(start, rows, present, stride_s, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zeros where none is present: [rows, BLOCK_D]."""
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = start + rows.to(tl.int64)[:, None] * stride_s + offsets_d.to(tl.int64)[None, :] * stride_d
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=present[:, None] & (offsets_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def online_softmax_step(scores, scale, v, running_max, running_sum, accumulator):
    """Takes one tile of keys into the softmax. scores [M, N] are scaled here; scale > 0, and times log2(e)."""
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    # A row that has seen no key yet stays at minus infinity: 0 in its place keeps (-inf) - (-inf) out of the exponents.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    # [M, N]
    weights = tl.math.exp2(scores * scale - finite_max[:, None])
    correction = tl.math.exp2(running_max - finite_max)
    running_sum = running_sum * correction + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision="ieee")
    return new_max, running_sum, accumulator


@triton.jit
def normalise(running_max, running_sum, accumulator):
    """Output [M, D] and natural LSE [M]. A row without a visible key has the sum 0: it gives 0 and minus infinity."""
    empty = running_sum == 0.0
    divisor = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), (running_max + tl.math.log2(divisor)) / LOG2E_DEVICE)
    return accumulator / divisor[:, None], lse


@triton.jit(
    do_not_specialize=[
        "heads", "length_q", "length_k", "lse_length",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_out_b", "stride_out_h",
        "stride_bias_b", "stride_count_b", "stride_count_h", "stride_count_q", "stride_index_b", "stride_index_h", "stride_index_q",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def forward_kernel(
    q, k, v, out, lse, key_bias, kv_num_blocks, kv_indices, q_order, q_choice, k_order, k_choice,
    scale, heads, length_q, length_k, lse_length,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_out_b: tl.int64, stride_out_h: tl.int64, stride_out_s, stride_out_d,
    stride_bias_b: tl.int64, stride_bias_s,
    stride_count_b: tl.int64, stride_count_h: tl.int64, stride_count_q: tl.int64,
    stride_index_b: tl.int64, stride_index_h: tl.int64, stride_index_q: tl.int64, stride_index_m,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES_Q: tl.constexpr, TILES_K: tl.constexpr, DENSE: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of queries. TILES_Q, TILES_K: tiles in a block of the mask. scale: > 0, times log2(e)."""
    tile_q = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_Q_ORDER:
        q_order += tl.load(q_choice + batch * stride_q_choice_b + head * stride_q_choice_h).to(tl.int64) * stride_q_order
    if HAS_K_ORDER:
        k_order += tl.load(k_choice + batch * stride_k_choice_b + head * stride_k_choice_h).to(tl.int64) * stride_k_order
    if HAS_BIAS:
        key_bias += batch * stride_bias_b
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)

    # [BLOCK_M]
    query_rows, query_present = block_row_numbers(tile_q * BLOCK_M + tl.arange(0, BLOCK_M), length_q, q_order, HAS_Q_ORDER)
    # [BLOCK_M, BLOCK_D]
    queries = load_rows(q, query_rows, query_present, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if DENSE:
        steps = tl.cdiv(length_k, BLOCK_N)
    else:
        block_q = (tile_q // TILES_Q).to(tl.int64)
        kv_indices += batch * stride_index_b + head * stride_index_h + block_q * stride_index_q
        steps = tl.load(kv_num_blocks + batch * stride_count_b + head * stride_count_h + block_q * stride_count_q) * TILES_K
    for step in tl.range(0, steps):
        if DENSE:
            tile_k = step
        else:
            tile_k = tl.load(kv_indices + (step // TILES_K) * stride_index_m) * TILES_K + step % TILES_K
        # [BLOCK_N]
        key_rows, key_present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, HAS_K_ORDER)
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, key_present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        values = load_rows(v, key_rows, key_present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if HAS_K_ORDER:
            scores = tl.where(key_present[None, :], scores, float("-inf"))
        elif (tile_k + 1) * BLOCK_N > length_k:
            # Only the last tile can be ragged: the others are spared the comparison.
            scores = tl.where(key_present[None, :], scores, float("-inf"))
        if HAS_BIAS:
            bias = tl.load(key_bias + key_rows.to(tl.int64) * stride_bias_s, mask=key_present, other=0.0) * LOG2E_DEVICE
            running_max, running_sum, accumulator = online_softmax_step(
                scores * scale + bias[None, :], 1.0, values, running_max, running_sum, accumulator
            )
        else:
            running_max, running_sum, accumulator = online_softmax_step(scores, scale, values, running_max, running_sum, accumulator)

    result, row_lse = normalise(running_max, running_sum, accumulator)
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = head_start(out, batch, head, stride_out_b, stride_out_h, ALIGNED) + query_rows.to(tl.int64)[:, None] * stride_out_s
    pointers += offsets_d[None, :] * stride_out_d
    tl.store(pointers, result.to(out.dtype.element_ty), mask=query_present[:, None] & (offsets_d < HEAD_DIM)[None, :])
    if HAS_LSE:
        tl.store(lse + (batch * heads + head) * lse_length + query_rows, row_lse, mask=query_present)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take a row's maximum before they scale it, which is right for a scale above 0 alone: its sign goes to q."""
    return (-q if scale < 0 else q), max(abs(scale), 1e-30) * LOG2E


def order_arguments(order: TokenOrder | None, batch: int, heads: int) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """The table of an order, each head's choice of a row of it, and the strides (order, choice over B, choice over H)."""
    if order is None:
        return None, None, (0, 0, 0)
    table = order.rows.contiguous()
    choice = order.head_order.expand(batch, heads)
    return table, choice, (table.stride(0), *choice.stride())


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, has_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel over a mask, or dense without one."""
    batch, heads, seq_q, head_dim = q.shape
    q, scale = positive_scale(q, scale)
    out = torch.empty(batch, seq_q, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device) if has_lse else None
    blocks = (128, 64) if mask is None else (mask.block_q, mask.block_k)
    config = forward_config(q.element_size(), head_dim, architecture(q.device), *blocks)
    if mask is None:
        lengths, counts, indices, mask_strides = (seq_q, k.shape[2]), None, None, (0,) * 7
    else:
        mask = mask.expand(batch, heads)
        lengths, counts, indices = (mask.seq_q, mask.seq_k), mask.kv_num_blocks, mask.kv_indices
        mask_strides = (*counts.stride(), *indices.stride())
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_table, k_choice, k_order_strides = order_arguments(k_order, batch, heads)
    with on_device(q):
        forward_kernel[num_blocks(lengths[0], config.block_m), batch * heads](
            q, k, v, out, lse, key_bias, counts, indices, q_table, q_choice, k_table, k_choice,
            scale, heads, *lengths, seq_q,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *((0, 0) if key_bias is None else key_bias.stride()),
            *mask_strides, *q_order_strides, *k_order_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            TILES_Q=blocks[0] // config.block_m, TILES_K=blocks[1] // config.block_n, DENSE=mask is None,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, HAS_BIAS=key_bias is not None,
            HAS_LSE=has_lse, ALIGNED=heads_aligned(q, k, v, out), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.block_sparse_attention`. Returns out and, where asked for, lse."""
    return _launch(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.attention_with_lse`."""
    return _launch(q, k, v, None, None, None, scale, key_bias, True)
