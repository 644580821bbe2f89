"""The softmax mass of every pair of blocks in Triton (AdaSpa, equation 13; arXiv 2502.21079).

One program takes a tile of BLOCK_M query positions of one head, keeps it, and walks every key tile: a tile's weights
need no running maximum, since the LSE is known, and are summed to one number that is written at once. Blocks larger
than a tile are summed from tiles afterwards. The grid is that of the forward: query tiles fastest, heads outermost.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import TokenOrder, num_blocks
from .triton_config import architecture, block_mass_config, heads_aligned, on_device, padded_head_dim
from .triton_forward import LOG2E_DEVICE, block_row_numbers, head_start, load_rows, order_arguments, positive_scale


@triton.jit(
    do_not_specialize=[
        "heads", "length_q", "length_k", "lse_length", "tiles_k",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_bias_b",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def block_mass_kernel(
    q, k, lse, mass, key_bias, q_order, q_choice, k_order, k_choice,
    scale, heads, length_q, length_k, lse_length, tiles_k,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_bias_b: tl.int64, stride_bias_s,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of tiles of mass, [B, H, tiles_q, tiles_k]. lse: contiguous. scale: > 0, times log2(e)."""
    tile_q = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_Q_ORDER:
        q_order += tl.load(q_choice + batch * stride_q_choice_b + head * stride_q_choice_h).to(tl.int64) * stride_q_order
    if HAS_K_ORDER:
        k_order += tl.load(k_choice + batch * stride_k_choice_b + head * stride_k_choice_h).to(tl.int64) * stride_k_order
    if HAS_BIAS:
        key_bias += batch * stride_bias_b
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    mass += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile_q) * tiles_k

    # [BLOCK_M]
    query_rows, query_present = block_row_numbers(tile_q * BLOCK_M + tl.arange(0, BLOCK_M), length_q, q_order, HAS_Q_ORDER)
    row_lse = tl.load(lse + (batch * heads + head) * lse_length + query_rows, mask=query_present, other=float("-inf"))
    # A row that saw no key has no mass, and neither has padding. Its LSE is made finite: the row is dropped from the sums.
    counted = row_lse != float("-inf")
    row_lse = tl.where(counted, row_lse, 0.0) * LOG2E_DEVICE
    # [BLOCK_M, BLOCK_D]
    queries = load_rows(q, query_rows, query_present, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)

    for tile_k in tl.range(0, tiles_k):
        # [BLOCK_N]
        key_rows, key_present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, HAS_K_ORDER)
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, key_present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale - row_lse[:, None]
        if HAS_BIAS:
            bias = tl.load(key_bias + key_rows.to(tl.int64) * stride_bias_s, mask=key_present, other=0.0) * LOG2E_DEVICE
            scores += bias[None, :]
        if HAS_K_ORDER:
            scores = tl.where(key_present[None, :], scores, float("-inf"))
        elif (tile_k + 1) * BLOCK_N > length_k:
            # Only the last tile can be ragged: the others are spared the comparison.
            scores = tl.where(key_present[None, :], scores, float("-inf"))
        row_mass = tl.where(counted, tl.sum(tl.math.exp2(scores), 1), 0.0)
        # As a [1, BLOCK_M] matrix: Triton 3.7 cannot reduce a vector to a number on sm_100 (TritonNvidiaGPUOptimizeTMemLayouts fails).
        tl.store(mass + tile_k + tl.arange(0, 1), tl.sum(row_mass[None, :], 1))


def _tile(block: int, name: str) -> int:
    """The largest tile, at most 128, that `block` is a multiple of. Raises ValueError where that is under the 16 of a matrix instruction."""
    tile = min(block & -block, 128)
    if tile < 16:
        raise ValueError(f"the Triton kernels take blocks that are multiples of 16, and {name} is {block}")
    return tile


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.block_mass`. Raises ValueError for blocks that are no multiples of 16."""
    batch, heads, seq_q, head_dim = q.shape
    q, scale = positive_scale(q, scale)
    length_q, length_k = (seq_q if q_order is None else q_order.length), (k.shape[2] if k_order is None else k_order.length)
    config = block_mass_config(q.element_size(), head_dim, architecture(q.device), _tile(block_q, "block_q"), _tile(block_k, "block_k"))
    blocks_q, blocks_k = num_blocks(length_q, block_q), num_blocks(length_k, block_k)
    split_q, split_k = block_q // config.block_m, block_k // config.block_n
    tiles = torch.empty(batch, heads, blocks_q * split_q, blocks_k * split_k, dtype=torch.float32, device=q.device)
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_table, k_choice, k_order_strides = order_arguments(k_order, batch, heads)
    with on_device(q):
        block_mass_kernel[tiles.shape[2], batch * heads](
            q, k, lse.contiguous(), tiles, key_bias, q_table, q_choice, k_table, k_choice,
            scale, heads, length_q, length_k, seq_q, tiles.shape[3],
            *q.stride(), *k.stride(), *((0, 0) if key_bias is None else key_bias.stride()), *q_order_strides, *k_order_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, HAS_BIAS=key_bias is not None,
            ALIGNED=heads_aligned(q, k), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if split_q == split_k == 1:
        return tiles
    return tiles.view(batch, heads, blocks_q, split_q, blocks_k, split_k).sum((3, 5))
