"""K and V in 8 bits for the 8-bit forward, in Triton: `quantise.py` says what is rounded and why.

Written once a call, in the positions of the key order and padded to whole blocks, so that the forward reads tiles that lie
in one piece and no table of rows. A first kernel gathers what is to be known of each channel, a second one sums that
up, a third one writes the 8 bits.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import TokenOrder, num_blocks
from .triton_config import LOG2E, heads_aligned, on_device, padded_head_dim
from .triton_forward import block_row_numbers, head_start, load_rows, order_arguments

LOG2E_DEVICE = tl.constexpr(LOG2E)
# As quantise.SMALLEST_SCALE.
SMALLEST_SCALE = tl.constexpr(1e-12)
# Tokens that one program of the first kernel reads, in tiles of so many.
_CHUNK, _TILE = 512, 64
# How many of those programs' results the second kernel takes at a time.
_CHUNKS_AT_ONCE = 16
# Of a channel: what the first kernel finds, and what the second one makes of it.
SUM, COUNT, LOWEST, HIGHEST = (tl.constexpr(number) for number in range(4))
MEAN, REACH, TURNED_MEAN = (tl.constexpr(number) for number in range(3))
_FOUND, _KNOWN = 4, 3


@triton.jit
def rotation(rows, columns):
    """`quantise.rotated`'s matrix without its root: plus and minus one, int32."""
    bits = rows & (columns ^ (rows >> 1))
    bits = bits ^ (bits >> 4)  # to the parity of 8 bits
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return 1 - 2 * (bits & 1)


@triton.jit
def turn(tile, N: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr):
    """Rows [N, BLOCK_D] times the rotation, TURNED channels at a time: float32 [N, BLOCK_D], exact but for the order of its sums."""
    matrix = rotation(tl.arange(0, TURNED)[:, None], tl.arange(0, TURNED)[None, :]).to(tile.dtype)
    tile = tl.reshape(tile, [N * BLOCK_D // TURNED, TURNED])
    return tl.reshape(tl.dot(tile, matrix, input_precision="ieee"), [N, BLOCK_D])


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def to_8_bits(x, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """Rounded to int8, halves upwards, or e4m3, to nearest even, in which what is not finite becomes NaN."""
    clamped = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if dtype == tl.int8:
        return tl.floor(clamped + 0.5).to(dtype)
    else:
        return tl.where(is_finite(x), clamped, float("nan")).to(dtype)


@triton.jit
def poison(x):
    """[M] for x [M, N]: 0 where a row is finite, NaN where it is not. Added to its scale it makes NaN of what the row takes part in."""
    return tl.sum(x * 0.0, 1)


@triton.jit(do_not_specialize=["heads", "length", "stride_b", "stride_h"])
def gather_statistics_kernel(
    x, found, heads, length, stride_b: tl.int64, stride_h: tl.int64, stride_s, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of a head's tokens: the sum, number, lowest and highest of each channel's finite values. found: [B x H, chunks, 4, BLOCK_D]."""
    start = head_start(x, (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64), stride_b, stride_h, ALIGNED)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_D], tl.float32)
    lowest = tl.full([BLOCK_D], float("inf"), tl.float32)
    highest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for tile in range(CHUNK // TILE):
        rows = tl.program_id(0) * CHUNK + tile * TILE + tl.arange(0, TILE)
        # [TILE, BLOCK_D]
        values = load_rows(start, rows, rows < length, stride_s, stride_d, HEAD_DIM, BLOCK_D).to(tl.float32)
        counted = is_finite(values) & (rows < length)[:, None]
        total += tl.sum(tl.where(counted, values, 0.0), 0)
        count += tl.sum(counted.to(tl.float32), 0)
        lowest = tl.minimum(lowest, tl.min(tl.where(counted, values, float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(counted, values, float("-inf")), 0))
    found += ((tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 4) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(found + SUM * BLOCK_D, total)
    tl.store(found + COUNT * BLOCK_D, count)
    tl.store(found + LOWEST * BLOCK_D, lowest)
    tl.store(found + HIGHEST * BLOCK_D, highest)


@triton.jit(do_not_specialize=["chunks"])
def sum_statistics_kernel(found, known, chunks, BLOCK_D: tl.constexpr, TURNED: tl.constexpr, AT_ONCE: tl.constexpr):
    """One head: the mean of each channel, the largest distance from it, and the mean's rotation. known: [B x H, 3, BLOCK_D]."""
    offsets_d = tl.arange(0, BLOCK_D)
    found += tl.program_id(0).to(tl.int64) * chunks * 4 * BLOCK_D + offsets_d[None, :]
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_D], tl.float32)
    lowest = tl.full([BLOCK_D], float("inf"), tl.float32)
    highest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, chunks, AT_ONCE):
        chunk = (start + tl.arange(0, AT_ONCE))[:, None]
        # [AT_ONCE, BLOCK_D]
        pointers = found + chunk * 4 * BLOCK_D
        total += tl.sum(tl.load(pointers + SUM * BLOCK_D, mask=chunk < chunks, other=0.0), 0)
        count += tl.sum(tl.load(pointers + COUNT * BLOCK_D, mask=chunk < chunks, other=0.0), 0)
        lowest = tl.minimum(lowest, tl.min(tl.load(pointers + LOWEST * BLOCK_D, mask=chunk < chunks, other=float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.load(pointers + HIGHEST * BLOCK_D, mask=chunk < chunks, other=float("-inf")), 0))
    mean = total / tl.maximum(count, 1.0)
    known += tl.program_id(0).to(tl.int64) * 3 * BLOCK_D
    tl.store(known + MEAN * BLOCK_D + offsets_d, mean)
    tl.store(known + REACH * BLOCK_D + offsets_d, tl.maximum(tl.maximum(highest - mean, mean - lowest), 0.0))
    offsets = tl.arange(0, TURNED)
    # [BLOCK_D / TURNED, TURNED, TURNED], the mean's channels along the last
    terms = rotation(offsets[None, None, :], offsets[None, :, None]) * tl.reshape(mean, [BLOCK_D // TURNED, TURNED])[:, None, :]
    tl.store(known + TURNED_MEAN * BLOCK_D + offsets_d, tl.reshape(tl.sum(terms, 2), [BLOCK_D]))


@triton.jit(
    do_not_specialize=[
        "heads", "length_k", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_bias_b",
        "stride_k_order", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def quantise_kernel(
    k, v, key_bias, k_known, v_known, keys, key_scales, values, biases, k_order, k_choice, heads, length_k,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d, stride_bias_b: tl.int64, stride_bias_s,
    stride_k_order: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    LARGEST: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr,
    HAS_V: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head: see `Quantised`."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_K_ORDER:
        k_order += tl.load(k_choice + batch * stride_k_choice_b + head * stride_k_choice_h).to(tl.int64) * stride_k_order
    rows, present = block_row_numbers(tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), length_k, k_order, HAS_K_ORDER)
    offsets_n = tl.arange(0, BLOCK_K)
    offsets_d = tl.arange(0, BLOCK_D)
    number = tl.program_id(1).to(tl.int64)
    block = number * tl.num_programs(0) + tl.program_id(0)

    # [BLOCK_K, BLOCK_D]
    tile = load_rows(head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED), rows, present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
    broken = poison(tile.to(tl.float32))
    turned = turn(tile, BLOCK_K, BLOCK_D, TURNED) - tl.load(k_known + (number * 3 + TURNED_MEAN) * BLOCK_D + offsets_d)[None, :]
    turned = tl.where(present[:, None], turned, 0.0)
    # [1]: as matrices of one row, since Triton 3.7 cannot reduce a vector to a number on sm_100 (TritonNvidiaGPUOptimizeTMemLayouts fails).
    scale = tl.maximum(tl.max(tl.reshape(tl.max(tl.abs(turned), 1), [1, BLOCK_K]), 1) / LARGEST, SMALLEST_SCALE)
    eight = to_8_bits(turned / scale[:, None], keys.dtype.element_ty, LARGEST)
    tl.store(keys + block * BLOCK_K * BLOCK_D + offsets_n[:, None] * BLOCK_D + offsets_d[None, :], eight)
    scale += tl.sum(tl.reshape(broken, [1, BLOCK_K]), 1)
    padded = tl.sum(tl.reshape(present.to(tl.int32), [1, BLOCK_K]), 1) < BLOCK_K
    tl.store(key_scales + block + tl.arange(0, 1), tl.where(padded, -scale, scale))
    if HAS_V:
        start = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
        tile = load_rows(start, rows, present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D).to(tl.float32)
        tile -= tl.load(v_known + (number * 3 + MEAN) * BLOCK_D + offsets_d)[None, :]
        tile /= tl.maximum(tl.load(v_known + (number * 3 + REACH) * BLOCK_D + offsets_d) / LARGEST, SMALLEST_SCALE)[None, :]
        tile = to_8_bits(tl.where(present[:, None], tile, 0.0), values.dtype.element_ty, LARGEST)
        places = offsets_n
        if INTERLEAVED:  # of every 16 keys, 2c, 2c + 1, 2c + 8 and 2c + 9 come to stand at 4c: see the forward
            places = (offsets_n & -16) | ((offsets_n & 6) << 1) | ((offsets_n & 8) >> 2) | (offsets_n & 1)
        tl.store(values + block * BLOCK_K * BLOCK_D + offsets_d[:, None] * BLOCK_K + places[None, :], tl.trans(tile))
    if HAS_BIAS:
        bias = tl.where(present, 0.0, float("-inf"))
        if key_bias is not None:
            bias += tl.load(key_bias + batch * stride_bias_b + rows.to(tl.int64) * stride_bias_s, mask=present, other=0.0) * LOG2E_DEVICE
        tl.store(biases + block * BLOCK_K + offsets_n, bias)


@dataclass(frozen=True)
class Quantised:
    """K, and for "fp8" V, of some heads in 8 bits, by the blocks of a mask. N positions a block, P head_dim's power of two.

    keys: [B x H, K, N, P], rotated and smoothed. key_scales: [B x H, K] float32, negative for a block with padding.
    values: [B x H, K, P, N], smoothed, for "fp8": 8-bit matrix instructions want both operands along the sum, and a block
    in one piece. biases: [B x H, K, N] float32, the key bias times log2(e), minus infinity at padding; None where neither is wanted so.
    k_known, v_known: [B x H, 3, P] float32, of each channel the mean, the largest distance from it, and the mean rotated.
    """

    keys: Tensor
    key_scales: Tensor
    values: Tensor | None
    biases: Tensor | None
    k_known: Tensor
    v_known: Tensor | None


def turned_at_once(head_dim: int) -> int:
    """How many channels the rotation mixes, as in `quantise.rotated`."""
    return min(padded_head_dim(head_dim), 64)


def _statistics(x: Tensor) -> Tensor:
    """[B x H, 3, P]: see `Quantised`."""
    batch, heads, length, head_dim = x.shape
    chunks, padded = num_blocks(length, _CHUNK), padded_head_dim(head_dim)
    found = torch.empty(batch * heads, chunks, _FOUND, padded, dtype=torch.float32, device=x.device)
    known = torch.empty(batch * heads, _KNOWN, padded, dtype=torch.float32, device=x.device)
    gather_statistics_kernel[chunks, batch * heads](
        x, found, heads, length, *x.stride(),
        HEAD_DIM=head_dim, BLOCK_D=padded, CHUNK=_CHUNK, TILE=_TILE, ALIGNED=heads_aligned(x), num_warps=4,
    )  # fmt: skip
    turned = turned_at_once(head_dim)
    sum_statistics_kernel[(batch * heads,)](found, known, chunks, BLOCK_D=padded, TURNED=turned, AT_ONCE=_CHUNKS_AT_ONCE, num_warps=4)
    return known


def quantise(
    k: Tensor, v: Tensor | None, k_order: TokenOrder | None, key_bias: Tensor | None, blocks: int, block: int, kind: torch.dtype, largest: float,
    has_bias: bool, interleaved: bool,
) -> Quantised:
    """K, and V where given, in 8 bits. k, v: [B, H, S, D]. blocks of `block` positions.

    kind: int8 or an e4m3, whose largest number is `largest`. has_bias: biases are written, for padding alone where there is no
    key bias. interleaved: the keys of V stand in the order in which the forward's threads hold the weights.
    """
    batch, heads, length, head_dim = k.shape
    padded = padded_head_dim(head_dim)
    keys = torch.empty(batch * heads, blocks, block, padded, dtype=kind, device=k.device)
    scales = torch.empty(batch * heads, blocks, dtype=torch.float32, device=k.device)
    values = None if v is None else torch.empty(batch * heads, blocks, padded, block, dtype=kind, device=k.device)
    biases = None if not has_bias else torch.empty(batch * heads, blocks, block, dtype=torch.float32, device=k.device)
    table, choice, order_strides = order_arguments(k_order, batch, heads)
    with on_device(k):
        k_known, v_known = _statistics(k), None if v is None else _statistics(v)
        quantise_kernel[blocks, batch * heads](
            k, v, key_bias, k_known, v_known, keys, scales, values, biases, table, choice,
            heads, length if k_order is None else k_order.length,
            *k.stride(), *((0,) * 4 if v is None else v.stride()), *((0, 0) if key_bias is None else key_bias.stride()), *order_strides,
            LARGEST=largest, HEAD_DIM=head_dim, BLOCK_D=padded, BLOCK_K=block, TURNED=turned_at_once(head_dim),
            HAS_V=v is not None, INTERLEAVED=interleaved, HAS_K_ORDER=k_order is not None, HAS_BIAS=has_bias,
            ALIGNED=heads_aligned(k) if v is None else heads_aligned(k, v),
            num_warps=max(1, min(8, block * padded // 1024)),
        )  # fmt: skip
    return Quantised(keys, scales, values, biases, k_known, v_known)
