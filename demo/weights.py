"""The names of a Wan 2.1 transformer's tensors, as ComfyUI writes them and as diffusers does. Values are the same."""

from __future__ import annotations

import re

from torch import Tensor

# Outside of the blocks: (ComfyUI, diffusers).
_MODEL = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
# Inside of "blocks.N.".
_BLOCK = (
    *((f"self_attn.{comfy}", f"attn1.{diffusers}") for comfy, diffusers in _ATTENTION),
    *((f"cross_attn.{comfy}", f"attn2.{diffusers}") for comfy, diffusers in _ATTENTION),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),  # the norm before cross-attention: the only one with weights
    ("modulation", "scale_shift_table"),
)
_KEY = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<name>.+?)(?P<kind>\.weight|\.bias)?")


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's names to diffusers'. Raises KeyError naming a tensor that no Wan 2.1 text- or image-to-video transformer of ours has."""
    return _rename(tensors, dict(_MODEL), dict(_BLOCK))


def to_comfyui(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    return _rename(tensors, {new: old for old, new in _MODEL}, {new: old for old, new in _BLOCK})


def _rename(tensors: dict[str, Tensor], model: dict[str, str], block: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in tensors.items():
        parts = _KEY.fullmatch(key)
        names = block if parts["block"] else model
        if parts["name"] not in names:
            raise KeyError(f"{key} is not a tensor of the Wan 2.1 transformers that this converts")
        renamed[f"{parts['block'] or ''}{names[parts['name']]}{parts['kind'] or ''}"] = value
    return renamed
