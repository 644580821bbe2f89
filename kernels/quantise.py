"""The definition of 8-bit attention in plain torch: what is rounded, to what, and by which scale.

"int8" multiplies Q with K in INT8 and leaves the weights and V as they are (SageAttention, arXiv 2410.02367); "fp8" takes
both products in e4m3 (of weights and V, SageAttention2, arXiv 2411.10958). What the two share:

- K is smoothed: its mean over the tokens is taken out, for each batch, head and channel. Softmax does not see that,
  since every score of a row falls by the same number; the LSE gets it back.
- Q and K are rotated, 64 channels at a time, by one orthogonal matrix, which leaves their products alone and spreads a large
  channel over all 64 (FlashAttention-3, arXiv 2407.08608, section 3.3). On the demo model's q and k that takes off a third to a half
  of the scores' error.
- Q has one scale a row, K one a block of the mask: the largest magnitude over the largest number of the 8 bits.

And in "fp8" alone:

- V has its mean over the tokens taken out, which every row gets back, and one scale a head and channel.
- A weight is a power of two below its row's maximum, and that maximum is rounded up to a whole number. So the rounding of a
  weight does not hang on which maximum a kernel had at hand when it came to the block. LIFT puts the largest weight
  just below the largest e4m3 number.
- The output is divided by the sum of the rounded weights: what rounding does to all weights alike cancels. The LSE is that of
  the weights before rounding.

Statistics are of finite values alone: a NaN or an infinity in Q or K makes NaN of the rows that see its block, one in V
of the rows that see it, and of nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRECISIONS = ("auto", "int8", "fp8")
INT8_MAX = 127.0
# The largest number of each e4m3: that of all chips but one family, and that of gfx94x, which has other exponents.
E4M3_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
LIFT = {torch.float8_e4m3fn: 8.0, torch.float8_e4m3fnuz: 7.0}
# Below these a scale counts as this: a row or block of zeros needs one to divide by, and a product of two must not become 0.
SMALLEST_SCALE = 1e-12
_LOG2E = math.log2(math.e)


def token_mean(x: Tensor) -> Tensor:
    """The mean over the tokens, [B, H, 1, D]; of finite values alone, and 0 where there is none."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0).sum(2, keepdim=True) / finite.sum(2, keepdim=True).clamp(min=1)


def scale_of(x: Tensor, dims: int | tuple[int, ...], largest: float) -> Tensor:
    """The scale that puts the largest magnitude along `dims` at `largest`; NaN where x has a value that is not finite."""
    return x.abs().amax(dims, keepdim=True).clamp(min=SMALLEST_SCALE * largest) / largest + (x * 0.0).sum(dims, keepdim=True)


def block_scales(k: Tensor, blocks: Tensor, largest: float) -> Tensor:
    """The scale of each key's block, [B, H, S, 1]. k: smoothed. blocks: [B, H, S], the block that holds each key, -1 for none."""
    by_key = scale_of(k, 3, largest)[..., 0]
    slots = blocks.long() + 1  # the keys of no block share slot 0
    by_block = torch.full((*k.shape[:2], int(slots.max()) + 1 if slots.numel() else 1), SMALLEST_SCALE, dtype=k.dtype, device=k.device)
    by_block = by_block.scatter_reduce(2, slots, by_key.nan_to_num(0.0), "amax").scatter_add(2, slots, by_key * 0.0)
    return by_block.gather(2, slots)[..., None]


def rotated(x: Tensor) -> Tensor:
    """[..., P]: the last dimension D, padded with zeros to the power of two P, at least 16, times an orthogonal matrix, up to 64 channels at a time.

    The matrix is Hadamard's with signs of the Rudin-Shapiro sequence on its rows, over a root: so neither one large channel,
    nor one of the patterns of signs that Hadamard's own columns are, comes out as one large number.
    """
    padded = max(16, 1 << (x.shape[-1] - 1).bit_length())
    size = min(padded, 64)
    rows, columns = torch.arange(size, device=x.device)[:, None], torch.arange(size, device=x.device)[None, :]
    bits = rows & (columns ^ (rows >> 1))
    for shift in (4, 2, 1):  # to the parity of each
        bits = bits ^ (bits >> shift)
    matrix = (1 - 2 * (bits & 1)).to(x.dtype) / size**0.5
    return (torch.nn.functional.pad(x, (0, padded - x.shape[-1])).unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def to_int8(x: Tensor) -> Tensor:
    """Rounded to the whole numbers from -127 to 127, halves upwards; still in x's dtype."""
    return (x + 0.5).floor().clamp(-INT8_MAX, INT8_MAX)


def to_e4m3(x: Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Rounded to e4m3; still in x's dtype. What is not finite becomes NaN, which e4m3 has."""
    rounded = x.float().clamp(-E4M3_MAX[kind], E4M3_MAX[kind]).to(kind).to(x.dtype)
    return torch.where(x.isfinite(), rounded, torch.nan)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, key_blocks: Tensor, scale: float, key_bias: Tensor | None, precision: str,
    kind: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """8-bit attention under a mask of tokens. Returns out [B, H, S_q, D] and the LSE [B, H, S_q], both float32.

    visible: bool [B, H, S_q, S_k]. key_blocks: [B, H, S_k], the block of the mask that holds each key, -1 for none.
    key_bias: [B, S_k], minus infinity in place. precision: "int8" or "fp8", the latter in the e4m3 `kind`.
    """
    q, k, v = q.float(), k.float(), v.float()
    fp8 = precision == "fp8"
    largest = E4M3_MAX[kind] if fp8 else INT8_MAX

    def rounded(x: Tensor) -> Tensor:
        return to_e4m3(x, kind) if fp8 else to_int8(x)

    k_mean = token_mean(k)
    shift = scale * (q * k_mean).sum(-1)
    q, k = rotated(q), rotated(k - k_mean)
    q_scale, k_scale = scale_of(q, 3, largest), block_scales(k, key_blocks, largest)
    products = rounded(q / q_scale).nan_to_num() @ rounded(k / k_scale).nan_to_num().transpose(-1, -2)
    scores = products * (q_scale * k_scale.transpose(-1, -2)) * (scale * _LOG2E)
    if key_bias is not None:
        scores = scores + key_bias[:, None, None].float() * _LOG2E
    scores = scores.masked_fill(~visible, -torch.inf)

    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak.ceil() if fp8 else peak)
    weights = (scores - peak + (LIFT[kind] if fp8 else 0.0)).exp2()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    if fp8:
        v_mean = token_mean(v)
        v = v - v_mean
        v_scale = torch.where(v.isfinite(), v, 0.0).abs().amax(2, keepdim=True).clamp(min=SMALLEST_SCALE * largest) / largest
        weights = rounded(weights)
        broken = ~v.isfinite()
        out = weights @ rounded(v / v_scale).masked_fill(broken, 0.0) / weights.sum(-1, keepdim=True) * v_scale + v_mean
        out = out.masked_fill(visible.float() @ broken.float() > 0, torch.nan)  # 0 x NaN would reach the rows that do not see it
        peak = peak - LIFT[kind]
    else:
        out = weights @ v / total
    lse = (peak + total.log2())[..., 0] / _LOG2E + shift
    return torch.where(empty, 0.0, out), torch.where(empty[..., 0], -torch.inf, lse)
