"""Wan 2.1's image-to-video transformer, written to be trained: ComfyUI's tensor names, and the arithmetic of diffusers' and ComfyUI's own.

Dimensions: B clips, S tokens (latent frames x rows x columns / 4), C width, H heads of D = 64, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend

LATENT_CHANNELS, MASK_CHANNELS = 16, 4
FREQUENCIES = 256
EPS = 1e-6
_TIMESTEPS = 1000


@dataclass(frozen=True)
class Size:
    """What the weights' shapes follow from. heads are of 64; latent channels are 16 out, 36 in."""

    heads: int = 4
    layers: int = 6
    ffn: int = 768
    text: int = 64

    @property
    def width(self) -> int:
        return self.heads * 64


class RMSNorm(nn.Module):
    """Over all heads at once, as Wan does it: x / rms(x) * weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, EPS)


class Attention(nn.Module):
    """Self-attention (with rotary positions) or cross-attention to the text."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.q, self.k, self.v, self.o = (nn.Linear(size.width, size.width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(size.width), RMSNorm(size.width)
        self.watch: Callable[[Tensor, Tensor, Tensor], None] | None = None  # sees q, k and v, [B, H, S, D], before they attend

    def forward(self, x: Tensor, context: Tensor, turns: Tensor | None) -> Tensor:
        """x: [B, S, C]. context: what keys and values are of, [B, S or L, C]. turns: of `rotations`, complex64 [S, D/2]."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))  # [B, H, S, D]
        if turns is not None:
            q, k = (_turned(part, turns) for part in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.watch:
            self.watch(q, k, v)
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; all but the middle one shifted, scaled and gated by the timestep."""

    def __init__(self, size: Size):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(size), Attention(size)
        self.norm3 = nn.LayerNorm(size.width, eps=EPS)
        self.ffn = nn.Sequential(nn.Linear(size.width, size.ffn), nn.GELU("tanh"), nn.Linear(size.ffn, size.width))
        self.modulation = nn.Parameter(torch.zeros(1, 6, size.width))

    def forward(self, x: Tensor, text: Tensor, time: Tensor, turns: Tensor) -> Tensor:
        """x: float32 [B, S, C]. text: [B, L, C]. time: [B, 6, C]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).chunk(6, 1)  # each [B, 1, C]
        normed = _modulated(x, shift, scale)
        x = x + self.self_attn(normed, normed, turns) * gate
        x = x + self.cross_attn(self.norm3(x), text, None)
        return x + self.ffn(_modulated(x, ffn_shift, ffn_scale)) * ffn_gate


class Head(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.head = nn.Linear(size.width, LATENT_CHANNELS * 4)
        self.modulation = nn.Parameter(torch.zeros(1, 2, size.width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, 1)
        return self.head(_modulated(x, shift, scale))


class WanVideo(nn.Module):
    """The transformer. `forward` predicts noise - x0."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.patch_embedding = nn.Conv3d(2 * LATENT_CHANNELS + MASK_CHANNELS, size.width, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(size.text, size.width), nn.GELU("tanh"), nn.Linear(size.width, size.width))
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCIES, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(size.width, 6 * size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = Head(size)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """x: noisy latent, mask and first frame, float32 [B, 36, T, H, W], rows and columns even. sigma: [B], 0 to 1.
        text: [B, L, text]. Returns float32 [B, 16, T, H, W]."""
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        tokens = self._patches(x)
        time = self.time_embedding(_waves(sigma * _TIMESTEPS))
        steps = self.time_projection(time).unflatten(1, (6, -1)).float()
        context = self.text_embedding(text)
        turns = rotations(frames, rows, columns, x.device)
        for block in self.blocks:
            tokens = block(tokens, context, steps, turns)
        out = self.head(tokens, time.float()).float()  # [B, S, 2 * 2 * 16], the channel last
        out = out.view(len(x), frames, rows, columns, 2, 2, LATENT_CHANNELS)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), LATENT_CHANNELS, frames, 2 * rows, 2 * columns)

    def _patches(self, x: Tensor) -> Tensor:
        """The convolution of 2x2 voxels, as one product: [B, S, C]."""
        patches = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)  # [B, T, h, w, 36, 2, 2]
        return F.linear(patches.flatten(4).flatten(1, 3), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()


def rotations(frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Wan's rotary positions of head_dim 64, complex64 [S, 32]: 12 pairs turn with the frame, 10 with the row, 10 with the column."""
    angles = []
    for length, pairs in ((frames, 12), (rows, 10), (columns, 10)):
        speed = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angles.append(torch.arange(length, dtype=torch.float64)[:, None] * speed)
    grid = [angle.view(*(-1 if axis == other else 1 for other in range(3)), angle.shape[1]).expand(frames, rows, columns, -1) for axis, angle in
            enumerate(angles)]
    angle = torch.cat(grid, -1).flatten(0, 2)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs of channels. x: float32 [B, H, S, D]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(3, (-1, 2))) * turns).flatten(3)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=EPS) * (1 + scale) + shift


def _waves(timestep: Tensor) -> Tensor:
    """Sinusoids of a timestep, float32 [B, 256]: cosines, then sines."""
    half = FREQUENCIES // 2
    speed = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angle = timestep.float()[:, None] * speed
    return torch.cat([angle.cos(), angle.sin()], 1)


# What a head's place may count on at the beginning, and how much: frames, rows, columns.
_TEMPORAL, _SPATIAL, _NEAR, _FREE = (0.0, 2.0, 2.0), (2.0, 1.0, 1.0), (1.0, 1.2, 1.2), (0.0, 0.0, 0.0)
_KINDS = (_NEAR, _FREE, _TEMPORAL, _SPATIAL)


@torch.no_grad()
def initialise(model: WanVideo, seed: int) -> None:
    """Fresh weights, a pure function of the seed: normal ones, gates at 1, an output of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(("modulation", "bias")):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        else:
            spread = 1 / math.sqrt(weight.flatten(1).shape[1])
            if name.endswith(("_attn.o.weight", "ffn.2.weight")):
                spread /= math.sqrt(model.size.layers)
            weight.normal_(0, spread, generator=generator)
    model.time_projection[1].weight.zero_()
    model.head.head.weight.zero_()
    for block in model.blocks:
        block.modulation[:, 2::3] = 1.0  # the gates


@torch.no_grad()
def place_heads(model: WanVideo, strength: float, sharpen: float = 1.0) -> None:
    """Gives three of a layer's four heads a sense of place, which training from nothing takes long to find.

    A bias of queries and keys on rotary pairs adds a score that depends on the offset alone (in the spirit of "mimetic initialisation",
    Trockman and Kolter, arXiv 2305.09828): highest along time, in the frame, or near by in all three. Nothing keeps a head so.
    sharpen: a factor on every score of self-attention.
    """
    for layer, block in enumerate(model.blocks):
        block.self_attn.norm_q.weight *= sharpen
        for part in (block.self_attn.q, block.self_attn.k):
            bias = part.bias.view(model.size.heads, 32, 2)
            for head in range(model.size.heads):
                # The three fastest pairs of each axis: a peak a token or two wide, and no second one within 40 tokens.
                for weight, first in zip(_KINDS[(head + layer) % len(_KINDS)], (0, 12, 22), strict=True):
                    bias[head, first : first + 3, 0] += strength * weight
