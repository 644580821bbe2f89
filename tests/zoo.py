"""One tiny model for every row of the table of video models, and for every way that its sequence can be made up.

Built by the host's own classes from its own configurations, so it runs with the host's Python, in this process.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from pack.attention.layout import VideoLayout
from torch import Tensor

Size = tuple[int, int, int]
TEXT = 32


@dataclass(frozen=True)
class Case:
    """One tiny model.

    row: the table's name for it. config: the host's class of it, in comfy.supported_models. unet: the network's arguments.
    channels: of its latent. sizes: latents (frames, height, width) to try, the last of them a multiple of nothing. patch: latent
    voxels of a token. text: width of a text token. extra: more conditioning, from a latent's size and a generator. layout: what
    is expected, from the grid of tokens and the latent's size. audio: the shape of a second latent, without its batch.
    stacks: layers beyond `layers` that count alike. batches, cfgs: how many videos at a time, and which guidance,
    the host itself can run. unused: parts of the network that are left out, as they would only take memory. needs: a word in
    the host's source of the model's conditioning, where older hosts do not know it.
    """

    name: str
    row: str
    config: str
    unet: dict[str, Any]
    channels: int = 16
    sizes: tuple[Size, ...] = ((9, 16, 16), (7, 12, 20), (7, 15, 17))
    patch: Size = (1, 2, 2)
    text: int = 64
    layers: int = 2
    stacks: int = 0
    extra: Callable[[Size, torch.Generator], dict[str, Any]] = lambda size, generator: {}
    layout: Callable[[Size, Size], VideoLayout] = lambda grid, size: VideoLayout(*grid)
    audio: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 2)
    cfgs: tuple[float, ...] = (1.0, 4.0)
    unused: tuple[str, ...] = ()
    needs: str = ""

    def grid(self, size: Size) -> Size:
        return tuple(-(-edge // step) for edge, step in zip(size, self.patch, strict=True))

    def expected(self, size: Size) -> VideoLayout:
        return self.layout(self.grid(size), size)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _tokens(size: Size) -> int:
    """Tokens of a picture of the size, in patches of 2 by 2 without padding."""
    return (size[1] // 2) * (size[2] // 2)


def _like(channels: int, name: str, frames: int | None = None, as_list: bool = False):
    """Conditioning under a name: a latent of the run's height and width."""
    def extra(size: Size, generator: torch.Generator) -> dict[str, Any]:
        latent = _random(generator, 1, channels, frames or size[0], *size[1:])
        return {name: [latent] if as_list else latent}
    return extra


def _together(*parts):
    return lambda size, generator: {name: value for part in parts for name, value in part(size, generator).items()}


_HEADS = 2
# Where the model or its nodes take no odd latent: an odd number of tokens instead.
_EVEN = ((9, 16, 16), (7, 12, 20), (7, 14, 18))
# With many other tokens it takes more frames until half can be skipped.
_LONG = ((19, 16, 16), (7, 12, 20), (7, 15, 17))
_WAN = {"image_model": "wan2.1", "dim": 256, "num_heads": _HEADS, "num_layers": 2, "ffn_dim": 128, "freq_dim": 64, "text_dim": 64, "out_dim": 16}


def _wan(name: str, row: str = "Wan 2.1 / 2.2", config: str = "WAN21_T2V", kind: str = "t2v", in_dim: int = 16, unet=None, **rest) -> Case:
    return Case(name, row, config, {**_WAN, "model_type": kind, "in_dim": in_dim, **(unet or {})}, **rest)


def _vision(width: int, tokens: int = 257):
    """CLIP's view of the first picture."""
    def extra(size: Size, generator: torch.Generator) -> dict[str, Any]:
        states = _random(generator, 1, tokens, width)
        return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states)}
    return extra


def _vace(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {
        "vace_frames": [_random(generator, 1, 32, *size) for _ in range(2)], "vace_mask": [torch.ones(1, 64, *size)] * 2, "vace_strength": [1.0, 0.5],
    }


def _after(tokens: Callable[[Size], int]):
    return lambda grid, size: VideoLayout(*grid, suffix=tokens(size))


def _before(tokens: Callable[[Size], int]):
    return lambda grid, size: VideoLayout(*grid, prefix=tokens(size))


def _animate(grid: Size, size: Size) -> VideoLayout:
    return VideoLayout(grid[0] - 1, *grid[1:], prefix=grid[1] * grid[2])


def _reference_after(grid: Size, size: Size) -> VideoLayout:
    return VideoLayout(*grid, suffix=grid[1] * grid[2])


def _subjects(grid: Size, size: Size) -> VideoLayout:
    return VideoLayout(*grid, suffix=2 * grid[1] * grid[2])


def _speech_sound(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {"audio_embed": _random(generator, 1, 25, 64, 4 * size[0])}


def _packed_motion(size: Size) -> int:
    height, width = size[1:]
    return (height // 2) * (width // 2) + (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8)


def _scail_pose(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {"pose_video_latent": _random(generator, 1, 16, size[0], size[1] // 2, size[2] // 2)}


def _pose_tokens(size: Size) -> int:
    return size[0] * -(-(size[1] // 2) // 2) * -(-(size[2] // 2) // 2)


def _scail(grid: Size, size: Size) -> VideoLayout:
    return VideoLayout(*grid, prefix=grid[1] * grid[2], suffix=_pose_tokens(size))


_WAN_CASES = (
    _wan("Wan T2V"),
    _wan("Wan I2V", config="WAN21_I2V", kind="i2v", in_dim=36, extra=_together(_like(16, "concat_latent_image"), _vision(1280))),
    _wan("Wan 2.2 TI2V-5B", config="WAN22_T2V", in_dim=48, channels=48, unet={"out_dim": 48}),
    _wan(
        "Wan Fun Control", config="WAN21_FunControl2V", kind="i2v", in_dim=48, unet={"in_dim_ref_conv": 16},
        extra=_together(_like(32, "concat_latent_image"), _like(16, "reference_latents", 1, as_list=True)), layout=_before(_tokens), sizes=_EVEN,
    ),
    _wan("Phantom", sizes=_LONG, extra=_like(16, "time_dim_concat", 2), layout=_subjects),
    _wan("Bernini", needs="context_latents", extra=_like(16, "context_latents", 1, as_list=True), layout=_reference_after),
    _wan(
        "Wan VACE", "Wan VACE", "WAN21_Vace", "vace", unet={"vace_layers": 1, "vace_in_dim": 96}, extra=_vace, stacks=2, sizes=_EVEN,
    ),
    _wan("Wan Camera", config="WAN21_Camera", kind="camera", in_dim=32, extra=_like(16, "concat_latent_image")),
    _wan(
        "Wan 2.2 S2V", "Wan 2.2 S2V", "WAN22_S2V", "s2v", unet={"audio_dim": 64, "audio_inject_layers": [0], "num_audio_token": 4},
        extra=_together(_like(16, "reference_latents", 1, as_list=True), _like(16, "reference_motion", 19), _speech_sound),
        layout=_after(lambda size: _tokens(size) + _packed_motion(size)), sizes=((17, 16, 16), (7, 16, 24), (7, 14, 18)),
    ),
    _wan(
        "HuMo", "HuMo", "WAN21_HuMo", "humo", unet={"audio_token_num": 16}, extra=_together(
            _like(16, "reference_latents", 1, as_list=True), lambda size, generator: {"audio_embed": _random(generator, 1, size[0], 8, 5, 1280)},
        ), layout=_after(_tokens), sizes=_EVEN,
    ),
    _wan(
        "Wan 2.2 Animate", "Wan 2.2 Animate", "WAN22_Animate", "animate", in_dim=36, extra=_together(
            _like(16, "concat_latent_image"), lambda size, generator: {"pose_video_latent": _random(generator, 1, 16, size[0] - 1, *size[1:])},
        ), layout=_animate, unused=("motion_encoder",), sizes=_EVEN,
    ),
    _wan(
        "Wan-Animate2 without a pose", "Wan-Animate2", "WAN_Animate2", "animate2", in_dim=36, extra=_like(16, "concat_latent_image"), layout=_animate,
        sizes=_EVEN,
    ),
    _wan(
        "SCAIL", "SCAIL", "WAN21_SCAIL", "scail", in_dim=20,
        extra=_together(_scail_pose, _like(16, "reference_latents", 1, as_list=True)),
        layout=_scail, sizes=((33, 16, 16), (13, 12, 20), (13, 15, 17)),
    ),
    _wan(
        "WanDancer", config="WAN22_WanDancer", kind="wandancer", in_dim=36, unet={"audio_inject_layers": [0]},
        extra=_together(
            _like(16, "concat_latent_image"), lambda size, generator: {"audio_embed": _random(generator, 1, 8 * size[0], 35)},
        ),
        sizes=((9, 16, 16), (7, 16, 20), (7, 15, 18)),
    ),
)

_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 256,
    "mlp_ratio": 2.0, "num_heads": _HEADS, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}


def _pooled(width: int):
    return lambda size, generator: {"pooled_output": _random(generator, 1, width)}


_HUNYUAN_CASE = Case(
    "HunyuanVideo", "HunyuanVideo", "HunyuanVideo", _HUNYUAN, layers=3, sizes=_EVEN, extra=_pooled(64), layout=_before(lambda size: TEXT),
)
_HUNYUAN_CASES = (
    _HUNYUAN_CASE,
    replace(
        _HUNYUAN_CASE, name="HunyuanVideo I2V", config="HunyuanVideoI2V", unet={**_HUNYUAN, "in_channels": 33},
        extra=_together(_pooled(64), _like(16, "concat_latent_image")),
    ),
    replace(
        _HUNYUAN_CASE, name="HunyuanVideo with a reference", extra=_together(_pooled(64), _like(16, "ref_latent", 1)), batches=(1,), cfgs=(1.0,),
        layout=_before(lambda size: TEXT + _tokens(size)),
    ),
    replace(
        _HUNYUAN_CASE, name="HunyuanVideo 1.5", config="HunyuanVideo15", channels=32, layers=3, patch=(1, 1, 1),
        unet={
            **_HUNYUAN, "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "patch_size": [1, 1, 1], "depth": 3, "depth_single_blocks": 0,
            "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 48,
        },
        extra=_together(_vision(48, 11), lambda size, generator: {"conditioning_byt5small": _random(generator, 1, 13, 1472), "pooled_output": None}),
        layout=_before(lambda size: TEXT + 13 + 11), sizes=((9, 8, 8), (7, 6, 10), (7, 7, 11)),
    ),
)

_LTX = {
    "image_model": "ltxv", "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "caption_channels": 64,
}
_LTX_SIZES = ((9, 8, 8), (7, 6, 10), (7, 7, 11))
_GUIDE_FRAMES = 2


def _guides(size: Size, generator: torch.Generator) -> dict[str, Any]:
    """The last two frames are guides, of which a quarter of the tokens is masked out."""
    tokens = _GUIDE_FRAMES * size[1] * size[2]
    mask = torch.ones(1, 1, *size)
    mask[:, :, -_GUIDE_FRAMES:] = 0
    mask[:, :, -1, : size[1] // 2] = -1
    places = torch.rand(1, 3, tokens, 2, generator=generator)
    return {"keyframe_idxs": 8 * places, "concat_mask": mask}


def _guided(grid: Size, size: Size) -> VideoLayout:
    left = _GUIDE_FRAMES * size[1] * size[2] - (size[1] // 2) * size[2]
    return VideoLayout(size[0] - _GUIDE_FRAMES, size[1], size[2], suffix=left)


def _padded(size: Size, generator: torch.Generator) -> dict[str, Any]:
    return {"attention_mask": (torch.arange(TEXT) < 20)[None].long()}


_LTX_CASE = Case("LTX-Video 2B", "LTX-Video", "LTXV", _LTX, channels=128, sizes=_LTX_SIZES, patch=(1, 1, 1), extra=_padded)
_LTX_CASES = (
    _LTX_CASE,
    replace(_LTX_CASE, name="LTX-Video 13B", unet={**_LTX, "num_attention_heads": 2, "attention_head_dim": 128}),
    replace(_LTX_CASE, name="LTX-Video with guides", extra=_together(_padded, _guides), layout=_guided, sizes=((17, 8, 8), (9, 6, 10), (9, 7, 11))),
    replace(
        _LTX_CASE, name="LTX-2", row="LTX-2", config="LTXAV", audio=(8, 24, 16), text=128,
        unet={
            **_LTX, "image_model": "ltxav", "num_attention_heads": 2, "attention_head_dim": 128, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 64, "audio_cross_attention_dim": 128, "connector_num_attention_heads": 1, "connector_num_layers": 1,
        },
    ),
)

_H3 = {
    "image_model": "minimax_h3", "hidden_size": 256, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": _HEADS,
    "attention_head_dim": 128, "ffn_hidden_size": 128, "text_dim": 64, "timestep_input_dim": 64, "time_embed_hidden_size": 64, "time_embed_dim": 64,
}
_SOUND = 12


def _keyframes(size: Size, generator: torch.Generator) -> dict[str, Any]:
    height, width = (-(-edge // 2) * 2 for edge in size[1:])
    picture = {"kind": "image", "latent_h": 6, "latent_w": 8, "latent": _random(generator, 1, 24, 1, 6, 8), "ref_audio_t": 0, "latent_t": 1}
    return {
        "minimax_keyframes": [{"resolved_frame_index": 0, "latent": _random(generator, 1, 24, 1, height, width)}], "minimax_refs": [picture],
    }


_H3_CASE = Case(
    "MiniMax H3", "MiniMax H3", "MiniMaxH3", _H3, channels=24, audio=(32, 2, _SOUND), batches=(1,), layout=_before(lambda size: TEXT + 2 * _SOUND),
)
_H3_CASES = (
    _H3_CASE,
    replace(
        _H3_CASE, name="MiniMax H3 with references", extra=_keyframes, sizes=_LONG,
        layout=lambda grid, size: VideoLayout(*grid, prefix=TEXT + grid[1] * grid[2] + 12 + 2 * _SOUND),
    ),
)

_COGVIDEOX = {
    "image_model": "cogvideox", "num_attention_heads": 4, "attention_head_dim": 64, "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2,
    "use_rotary_positional_embeddings": True,
}
_COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 32, "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 256, "num_blocks": 2, "num_heads": _HEADS, "mlp_ratio": 1.0, "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 32, "concat_padding_mask": True,
}

CASES: tuple[Case, ...] = (
    *_WAN_CASES, *_HUNYUAN_CASES, *_LTX_CASES, *_H3_CASES,
    Case("CogVideoX", "CogVideoX", "CogVideoX_T2V", _COGVIDEOX, layout=_before(lambda size: TEXT)),
    Case(
        "CogVideoX 1.5", "CogVideoX", "CogVideoX_T2V", {**_COGVIDEOX, "patch_size_t": 2}, patch=(2, 2, 2), layout=_before(lambda size: TEXT),
        sizes=((18, 16, 16), (10, 12, 20), (11, 15, 17)),
    ),
    Case(
        "Mochi", "Mochi", "GenmoMochi", {
            "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": _HEADS, "hidden_size_x": 128, "hidden_size_y": 64,
            "mlp_ratio_x": 96.0, "mlp_ratio_y": 1.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True,
            "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
            "use_t5": True, "t5_feat_dim": 64, "t5_token_length": TEXT, "rope_theta": 10000.0,
        }, channels=12, sizes=_EVEN, layout=_after(lambda size: 20),
        extra=_padded,
    ),
    Case(
        "Cosmos 1", "Cosmos 1", "CosmosT2V", {
            **_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
        }, sizes=_EVEN,
    ),
    Case("Cosmos-Predict2", "Cosmos-Predict2", "CosmosT2IPredict2", {**_COSMOS, "image_model": "cosmos_predict2"}),
    Case(
        "Kandinsky 5", "Kandinsky 5", "Kandinsky5", {
            "image_model": "kandinsky5", "model_dim": 256, "ff_dim": 256, "time_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
            "in_text_dim": 64, "in_text_dim2": 32, "visual_embed_dim": 132,
        }, extra=_pooled(32), sizes=_EVEN,
    ),
)


@functools.cache
def _loaded(name: str):
    import comfy.model_patcher
    import tiny_models

    case = next(case for case in CASES if case.name == name)
    config = getattr(importlib.import_module("comfy.supported_models"), case.config)(dict(case.unet))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    for part in case.unused:
        delattr(model.diffusion_model, part)
    tiny_models.fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def forget() -> None:
    """Frees all models."""
    _loaded.cache_clear()


def why_missing(case: Case) -> str | None:
    """Why this host cannot have the model; None where it can."""
    if not hasattr(importlib.import_module("comfy.supported_models"), case.config):
        return f"this ComfyUI has no {case.config}"
    if case.needs and case.needs not in inspect.getsource(importlib.import_module("comfy.model_base")):
        return f"this ComfyUI's {case.config} takes no {case.needs}"
    return None


def load(case: Case):
    """An unpatched model; all loads of a case share their weights."""
    return _loaded(case.name).clone()


def sample(model, case: Case, size: Size, batch: int = 1, cfg: float = 1.0, steps: int = 2) -> Tensor:
    """One run, as a sampler node does it; the video's latent."""
    import comfy.nested_tensor
    import comfy.samplers

    generator = torch.Generator().manual_seed(sum(size))
    guider = comfy.samplers.CFGGuider(model)
    shared = case.extra(size, generator)  # as the host's nodes put it on both sides
    guider.set_conds(*([[_random(generator, 1, TEXT, case.text), dict(shared)]] for _ in range(2)))
    guider.set_cfg(cfg)
    shapes = [(batch, case.channels, *size)] + ([(batch, *case.audio)] if case.audio else [])
    noise, latent = [_random(generator, *shape) for shape in shapes], [torch.zeros(shape) for shape in shapes]
    if case.audio:
        noise, latent = comfy.nested_tensor.NestedTensor(noise), comfy.nested_tensor.NestedTensor(latent)
    else:
        noise, latent = noise[0], latent[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    with torch.no_grad():
        out = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, None, None, True, 0)
    return out.unbind()[0] if getattr(out, "is_nested", False) else out
