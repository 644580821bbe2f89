"""Test-only ComfyUI nodes: random CONDITIONING, text encoders and VAEs that need no files, and what is written to disk. No part of the pack."""

import zlib
from pathlib import Path

import folder_paths
import torch

from .memory import TestMemory


class TestConditioning:
    """CONDITIONING [1, tokens, width] of unit normals, the same for the same seed; `padded` masks its second half as padding."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {
            "required": {"seed": ("INT", {"default": 0}), "width": ("INT", {"default": 4096})},
            "optional": {"tokens": ("INT", {"default": 32}), "pooled": ("INT", {"default": 0}), "padded": ("BOOLEAN", {"default": False})},
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "test"

    def run(self, seed, width, tokens=32, pooled=0, padded=False):
        generator = torch.Generator().manual_seed(seed)
        embedding, extra = torch.randn(1, tokens, width, generator=generator), {}
        if pooled:
            extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if padded:
            extra["attention_mask"] = (torch.arange(tokens)[None] < tokens // 2).long()
        return ([[embedding, extra]],)


class _TextEncoder:
    """What nodes ask of a CLIP: conditioning of unit normals, the same for the same words."""

    def __init__(self, width: int, tokens: int):
        self.width, self.tokens = width, tokens

    def tokenize(self, text, **_):
        return text

    def encode_from_tokens_scheduled(self, text, **_):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return [[torch.randn(1, self.tokens, self.width, generator=generator), {"pooled_output": None}]]


class TestTextEncoder:
    """A CLIP whose tokens are noise of a width."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {"required": {"width": ("INT", {"default": 64}), "tokens": ("INT", {"default": 32})}}

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "run"
    CATEGORY = "test"

    def run(self, width, tokens):
        return (_TextEncoder(width, tokens),)


class _VAE:
    """What nodes ask of a VAE: a latent's first channels as pixels (or as sound), and pixels as the channels of a latent."""

    audio_sample_rate = 16000

    def __init__(self, sound: bool):
        self.sound = sound

    def decode(self, latent):
        if self.sound:  # [B, channels, ..., T] to [B, T, 2]
            return latent.float().flatten(2, -2)[:, :2, 0].repeat_interleave(400, -1).movedim(1, -1)
        return latent.float()[:, :3].sigmoid().repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)

    def encode(self, pixels):
        """[F, H, W, 3] to Wan's [1, 16, 1 + (F - 1) // 4, H / 8, W / 8]."""
        small = torch.nn.functional.avg_pool2d(pixels[::4, ..., :1].movedim(-1, 1), 8)
        return small.movedim(0, 1)[None].expand(-1, 16, -1, -1, -1) * 2 - 1


class TestVAE:
    """A VAE that shows latents as they are."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {"required": {"sound": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "run"
    CATEGORY = "test"

    def run(self, sound):
        return (_VAE(sound),)


class TestSaveLatent:
    """Writes a LATENT's tensor as output/<name>.pt."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def run(self, samples, name):
        torch.save(samples["samples"].detach().float().cpu(), Path(folder_paths.get_output_directory()) / f"{name}.pt")
        return {"ui": {"text": [str(tuple(samples["samples"].shape))]}}


class TestSaveImage:
    """Writes an IMAGE's tensor as output/<name>.pt."""

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {"required": {"image": ("IMAGE",), "name": ("STRING", {"default": "image"})}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def run(self, image, name):
        torch.save(image.detach().cpu(), Path(folder_paths.get_output_directory()) / f"{name}.pt")
        return {"ui": {"text": [str(tuple(image.shape))]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestConditioning, TestTextEncoder, TestVAE, TestSaveLatent, TestSaveImage, TestMemory)}
