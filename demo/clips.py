"""What the demo continues: real clips' latents with their text, and the way from a latent to pixels.

Dimensions: B clips, T latent frames, H and W latent rows and columns (a quarter of the pixels'). demo/model/README.md
says where the clips come from and what a latent is; there is no VAE.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MODEL_FILE = Path(__file__).parent / "model" / "tiny_wan_clips.safetensors"
CLIPS_FILE = Path(__file__).parent / "model" / "clips.safetensors"
# One of each source first, so that a small number of clips shows different ones.
ORDER = (0, 2, 4, 1, 3, 5)
# Channels between the noisy latent and the first frame: a mask that this model was trained to find zero.
_MASK_CHANNELS = 4
_PIXELS_PER_LATENT = 4


@dataclass(frozen=True)
class Clips:
    """latents: float32 [B, 16, T, H, W] in model space; text: float32 [B, 8, 64]; names and numbers: of each in the file."""

    latents: Tensor
    text: Tensor
    names: tuple[str, ...]
    numbers: tuple[int, ...]


def load_clips(count: int) -> Clips:
    """The first `count` clips of `ORDER`."""
    numbers = ORDER[:count]
    with safe_open(CLIPS_FILE, "pt") as file:
        names, prompts = (json.loads(file.metadata()[key]) for key in ("clips", "prompt_of_clip"))
        latents = file.get_tensor("latents")[list(numbers)].float()
        text = file.get_tensor("prompts")[[prompts[number] for number in numbers]].float()
    return Clips(latents, text, tuple(names[number] for number in numbers), numbers)


def first_frames(latents: Tensor) -> Tensor:
    """The latents with all but frame 0 set to zero: what the model is given of a clip."""
    given = torch.zeros_like(latents)
    given[:, :, 0] = latents[:, :, 0]
    return given


def model_input(x: Tensor, given: Tensor) -> Tensor:
    """[noisy latent | mask, always zero | first frame], float32 [B, 36, T, H, W]."""
    return torch.cat([x, torch.zeros_like(x[:, :_MASK_CHANNELS]), given], 1)


def start_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise that ComfyUI's samplers start from for this seed, so that both hosts draw the same video."""
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def to_pixels(latents: Tensor) -> Tensor:
    """Luminance from 0 to 1, float32 [B, T, 4H, 4W]: halved, then space from depth (channel = 4 dy + dx)."""
    frames = latents.float().transpose(1, 2)
    pixels = torch.nn.functional.pixel_shuffle(frames / 2, _PIXELS_PER_LATENT)[:, :, 0]
    return ((pixels + 1) / 2).clamp(0, 1)
