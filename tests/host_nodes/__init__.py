"""Test-only ComfyUI nodes: random CONDITIONING in place of a text encoder, and a LATENT written to disk. No part of the pack."""

from pathlib import Path

import folder_paths
import torch


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


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestConditioning, TestSaveLatent, TestSaveImage)}
