"""The softmax mass of every pair of blocks in Triton (AdaSpa, equation 13; arXiv 2502.21079).

One program takes a tile of BLOCK_M query positions of one head, keeps it, and walks every key tile: a tile's weights
need no running maximum, since the LSE is known, and are summed at once, over each GROUP_M rows: a wanted block may be
lower than a tile. Larger blocks are summed from tiles afterwards. The grid is that of the forward: query tiles fastest,
heads outermost; and as there, rows of keys are loaded an iteration ahead and full tiles take no mask.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import TokenOrder, block_rows, num_blocks
from .triton_config import LOG2E, architecture, block_mass_config, heads_aligned, on_device, padded_head_dim
from .triton_forward import (
    base_2_lse,
    block_row_numbers,
    chosen_order,
    head_start,
    key_order_arguments,
    load_rows,
    mass_tile,
    order_arguments,
    ordered_keys,
    positive_scale,
    query_tile,
    store_mass,
    sum_tiles,
)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "heads", "length_q", "length_k", "lse_length", "groups_q", "tiles_k",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_bias_b", "stride_bias_order",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_full", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def block_mass_kernel(
    q, k, lse, mass, key_bias, q_order, q_choice, k_order, full_tiles, k_choice,
    scale, heads, length_q, length_k, lse_length, groups_q, tiles_k,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_bias_b: tl.int64, stride_bias_order: tl.int64,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_full: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of tiles of mass [B, H, groups_q, tiles_k]. lse: contiguous. scale: > 0, times log2(e)."""
    tile_q = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_Q_ORDER:
        q_order += chosen_order(q_choice, batch, head, stride_q_choice_b, stride_q_choice_h) * stride_q_order
    if HAS_BIAS:
        key_bias += batch * stride_bias_b
    if HAS_K_ORDER:
        chosen = chosen_order(k_choice, batch, head, stride_k_choice_b, stride_k_choice_h)
        k_order += chosen * stride_k_order
        full_tiles += chosen * stride_full
        if HAS_BIAS:
            key_bias += chosen * stride_bias_order
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]
    queries, query_rows, query_present = query_tile(
        q, q_order, tile_q, batch, head, length_q, stride_q_b, stride_q_h, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_Q_ORDER, ALIGNED
    )
    mass += tl.program_id(1).to(tl.int64) * groups_q * tiles_k
    counted, row_lse = base_2_lse(lse + (batch * heads + head) * lse_length, query_rows, query_present)

    if HAS_K_ORDER:
        next_rows, next_full = ordered_keys(0, length_k, k_order, full_tiles, BLOCK_N)
    for tile_k in tl.range(0, tiles_k):
        # [BLOCK_N]
        if HAS_K_ORDER:
            key_rows = next_rows
            key_present = key_rows >= 0
            full = next_full != 0
            next_rows, next_full = ordered_keys(tile_k + 1, length_k, k_order, full_tiles, BLOCK_N)
        else:
            key_rows, key_present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, None, False)
            full = (tile_k + 1) * BLOCK_N <= length_k
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, key_present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale - row_lse[:, None]
        if HAS_BIAS:
            scores += tl.load(key_bias + tile_k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        elif not full:
            if not HAS_K_ORDER:
                tl.load(k, volatile=True)  # what cannot be moved keeps this a branch
            _, present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, HAS_K_ORDER)
            scores = tl.where(present[None, :], scores, float("-inf"))
        row_mass = tl.where(counted, tl.sum(tl.math.exp2(scores), 1), 0.0)
        store_mass(mass, row_mass, tile_q, tile_k, groups_q, tiles_k, BLOCK_M, GROUP_M)


def bias_by_position(key_bias: Tensor, order: TokenOrder | None, length: int) -> Tensor:
    """A key bias [B, S_k] for base 2 at each of `length` positions, minus infinity where there is no key: [B, O, length], O 1 without an order.

    So a tile's biases lie side by side: the scores' layout has many of them in one thread, each a load of its own otherwise.
    """
    padded = torch.nn.functional.pad(key_bias * LOG2E, (0, 1), value=-torch.inf)
    rows = block_rows(order, key_bias.shape[1], length, key_bias.device)[:, 0]
    return padded[:, rows.long()]  # row -1 is the last, the one that was added


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.block_mass`, which refuses blocks that are no multiples of 16."""
    batch, heads, seq_q, head_dim = q.shape
    q, scale = positive_scale(q, scale)
    length_q, length_k = (seq_q if q_order is None else q_order.length), (k.shape[2] if k_order is None else k_order.length)
    config = block_mass_config(q.element_size(), head_dim, architecture(q.device), 128, mass_tile(block_k))
    group = min(mass_tile(block_q), config.block_m)
    shape = num_blocks(length_q, group), num_blocks(length_k, config.block_n)
    mass = torch.empty(batch, heads, *shape, dtype=torch.float32, device=q.device)
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_tables, k_order_strides = key_order_arguments(k_order, batch, heads, config.block_n)
    bias = None if key_bias is None else bias_by_position(key_bias, k_order, shape[1] * config.block_n)
    with on_device(q):
        block_mass_kernel[num_blocks(length_q, config.block_m), batch * heads](
            q, k, lse.contiguous(), mass, bias, q_table, q_choice, *k_tables,
            scale, heads, length_q, length_k, seq_q, *shape,
            *q.stride(), *k.stride(), *((0, 0) if bias is None else bias.stride()[:2]), *q_order_strides, *k_order_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=group,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, HAS_BIAS=key_bias is not None,
            ALIGNED=heads_aligned(q, k), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return sum_tiles(mass, block_q // group, block_k // config.block_n)
