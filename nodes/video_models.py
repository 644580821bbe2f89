"""The video models that are known: for each, where its grid, its text and its layer number are found. One row a model.

Checked against ComfyUI 0.23 and 0.33. A row's figures are checked against every call's length, so a wrong guess runs
dense and says both numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attention.call import Dense
from ..attention.layout import VideoLayout


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a model is given: its latent x [B, C, T, H, W], its text [B, L, C] and the other conditioning."""

    network: Any
    x: Tensor
    context: Tensor | None
    extra: dict[str, Any]

    @property
    def text_tokens(self) -> int:
        return 0 if self.context is None else self.context.shape[1]


@dataclass(frozen=True)
class VideoModel:
    """One row.

    name: for the person. patch: latent voxels of a token, (frames, height, width). prefix: tokens before the video.
    layers: how many self-attention layers. layer: the number of the layer that calls, in execution order, from the
    options of the call and the layers that have called in this evaluation; None for what is no layer of the video.
    """

    name: str
    patch: Callable[[Any], tuple[int, int, int]]
    prefix: Callable[[Evaluation], int]
    layers: Callable[[Any], int]
    layer: Callable[[Any, dict, list[int]], int | None]

    def layout(self, evaluation: Evaluation, options: dict) -> VideoLayout | Dense:
        """The layout of this evaluation's self-attention; the model's own grid where it publishes one."""
        shape = evaluation.x.shape
        if len(shape) != 5:
            return Dense(f"the latent has {len(shape)} dimensions {tuple(shape)}, not the 5 of a video")
        patch = self.patch(evaluation.network)
        grid = options.get("grid_sizes") or tuple(-(-size // edge) for size, edge in zip(shape[2:], patch, strict=True))
        return VideoLayout(*(int(size) for size in grid), prefix=self.prefix(evaluation))


def _published(network: Any, options: dict, called: list[int]) -> int | None:
    return options.get("block_index")


def _hunyuan_layer(network: Any, options: dict, called: list[int]) -> int | None:
    """Double blocks, then single ones, which count from 0 again. The text refiner publishes no index."""
    index = options.get("block_index")
    if index is None:
        return None
    return index + len(network.double_blocks) if options.get("block_type") == "single" else index


def _hunyuan_text(evaluation: Evaluation) -> int:
    """All text streams stand before the video: the prompt's, and in later models those of glyphs and of a reference picture."""
    tokens = evaluation.text_tokens
    for name, part in (("txt_byt5", "byt5_in"), ("clip_fea", "vision_in")):
        stream = evaluation.extra.get(name)
        if stream is not None and getattr(evaluation.network, part, None) is not None:
            tokens += stream.shape[1]
    return tokens


_WAN = VideoModel(
    name="Wan 2.1 / 2.2",
    patch=lambda network: tuple(network.patch_size),
    prefix=lambda evaluation: 0,
    layers=lambda network: len(network.blocks),
    layer=_published,
)
_HUNYUAN = VideoModel(
    name="HunyuanVideo",
    patch=lambda network: tuple(network.patch_size),
    prefix=_hunyuan_text,
    layers=lambda network: len(network.double_blocks) + len(network.single_blocks),
    layer=_hunyuan_layer,
)
_LTXV = VideoModel(
    name="LTX-Video",
    patch=lambda network: (1, 1, 1),
    prefix=lambda evaluation: 0,
    layers=lambda network: len(network.transformer_blocks),
    layer=lambda network, options, called: len(called),
)

VIDEO_MODELS: dict[str, VideoModel] = {"WanModel": _WAN, "HunyuanVideo": _HUNYUAN, "LTXVModel": _LTXV}


def find(network: Any) -> VideoModel | Dense:
    """The row of a diffusion model, by its class; torch.compile's wrapper is looked through."""
    kind, *bases = (base.__name__ for base in type(getattr(network, "_orig_mod", network)).__mro__)
    if kind in VIDEO_MODELS:
        return VIDEO_MODELS[kind]
    names = ", ".join(row.name for row in VIDEO_MODELS.values())
    parent = next((VIDEO_MODELS[base].name for base in bases if base in VIDEO_MODELS), None)
    if parent is not None:  # a subclass may attend in a way of its own, so its parent's row is not taken for it
        return Dense(f"{kind} is a variant of {parent} that is not covered yet; covered in their plain form: {names}")
    return Dense(f"{kind} is not one of the video models that are covered: {names}")
