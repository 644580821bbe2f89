"""The video models that are known: for each, where its grid, its other tokens and its layer number are found. One row a model.

Checked against ComfyUI 0.23 and 0.33. What a row says is checked against every call's length, so a wrong guess runs dense
and says both numbers. CONTRIBUTING.md shows how to add one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..attention.call import Dense
from ..attention.config import AUTOMATIC, Automatic
from ..attention.layout import VideoLayout
from .model_row import Call, Evaluation, Grid, VideoModel, counted, grid_of, tokens_in, tokens_of

# --- what is found where ---------------------------------------------------------------------------------------------


def _patch_size(network: Any) -> Grid:
    return tuple(network.patch_size)


def _cosmos_patch(network: Any) -> Grid:
    return network.patch_temporal, network.patch_spatial, network.patch_spatial


def _blocks(network: Any) -> int:
    return len(network.blocks)


def _wan_heads(network: Any) -> tuple[int, int]:
    return network.num_heads, network.dim // network.num_heads


def _ltx_heads(network: Any) -> tuple[int, int]:
    return network.num_attention_heads, network.attention_head_dim


def _heads_of_first(find: Callable[[Any], Any]) -> Callable[[Any], tuple[int, int]]:
    """The heads that the first block's attention has."""
    return lambda network: (getattr(find(network), "num_heads", None) or find(network).heads, find(network).head_dim)


def _wan_grid(evaluation: Evaluation, grid: Grid) -> Grid:
    """The grid with the frames that are appended in time (Phantom's subjects). Those that publish a grid count them already."""
    given = evaluation.latent[2] + evaluation.frames_of("time_dim_concat")
    return -(-given // evaluation.network.patch_size[0]), *grid[1:]


def _wan(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """Fun Control's reference picture stands before the video; subjects (Phantom) and in-context references (Bernini) after it."""
    patch = _patch_size(evaluation.network)
    frames, height, width = _wan_grid(evaluation, grid)
    appended = evaluation.frames_of("time_dim_concat") // patch[0]
    before = 0
    if getattr(evaluation.network, "ref_conv", None) is not None and evaluation.inputs.get("reference_latent") is not None:
        before = tokens_in((1, *evaluation.inputs["reference_latent"].shape[-2:]), (1, *patch[1:]), padded=False)
    after = sum(tokens_in(latent.shape, patch) for latent in evaluation.inputs.get("context_latents") or ())
    return VideoLayout(frames - appended, height, width, before, appended * height * width + after)


def _wan_animate(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """The first latent frame is the character's picture."""
    layout = _wan(evaluation, grid)
    if layout.frames == 1:
        return layout
    return replace(layout, frames=layout.frames - 1, prefix=layout.prefix + layout.tokens_per_frame)


def _wan_animate2(evaluation: Evaluation, grid: Grid) -> VideoLayout | Dense:
    """As Animate where no pose is given; with one, each latent frame attends in a call of its own, to keys of the pose too."""
    if evaluation.inputs.get("pose_latents") is not None:
        return Dense("with a pose, Wan-Animate2 attends one latent frame at a time")
    return _wan_animate(evaluation, grid)


def _wan_speech(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """S2V and HuMo: after the video come reference pictures, and in S2V the frames before it, packed ever coarser (FramePack)."""
    patch = _patch_size(evaluation.network)
    layout = _wan(evaluation, grid)
    reference, motion = evaluation.inputs.get("reference_latent"), evaluation.inputs.get("reference_motion")
    after = 0 if reference is None else tokens_in(reference.shape, patch, padded=False)
    packer = getattr(evaluation.network, "frame_packer", None)
    if motion is not None and packer is not None:
        height, width = motion.shape[-2:]
        for scale, frames in zip((1, 2, 4), packer.zip_frame_buckets, strict=True):
            after += (frames // scale) * (height // (2 * scale)) * (width // (2 * scale))
    return replace(layout, suffix=layout.suffix + after)


def _scail(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """Reference pictures are the first frames of the grid; the pose stream comes after the video."""
    patch = _patch_size(evaluation.network)
    pictures = evaluation.frames_of("reference_latent") // patch[0]
    appended = evaluation.frames_of("time_dim_concat") // patch[0]
    pose = evaluation.inputs.get("pose_latents")
    after = 0 if pose is None else tokens_in(pose.shape, patch)
    frames, height, width = grid
    return VideoLayout(frames - pictures - appended, height, width, pictures * height * width, appended * height * width + after)


def _hunyuan(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """All text streams stand before the video: the prompt's, and in later models those of glyphs and of a picture; then a reference latent."""
    before = evaluation.text_tokens
    for name, part in (("txt_byt5", "byt5_in"), ("clip_fea", "vision_in")):
        if getattr(evaluation.network, part, None) is not None:
            before += tokens_of(evaluation.inputs.get(name))
    reference = evaluation.inputs.get("ref_latent")
    if reference is not None:
        before += tokens_in(reference.shape, _patch_size(evaluation.network))
    return VideoLayout(*grid, prefix=before)


def _hunyuan_number(evaluation: Evaluation, options: dict) -> int | None:
    """Double blocks, then single ones, which count from 0 again. The text refiner publishes no index."""
    index = options.get("block_index")
    if index is None:
        return None
    return index + len(evaluation.network.double_blocks) if options.get("block_type") == "single" else index


def _ltx(evaluation: Evaluation, grid: Grid) -> VideoLayout | Dense:
    """Guides are the last frames of the latent. The mask takes some of their tokens out; what is left of them are sinks."""
    frames, height, width = grid
    guides = evaluation.inputs.get("keyframe_idxs")
    if guides is None or guides.shape[2] == 0:
        return VideoLayout(*grid)
    guide_frames = guides.shape[2] // (height * width)
    kept = (evaluation.inputs["denoise_mask"][0] >= 0).all(0)  # [T, H, W], as the model takes it: from the batch's first
    video, left = kept[: frames - guide_frames], kept[frames - guide_frames :]
    # One read of the device an evaluation.
    in_video, in_guides = video.sum(), left.sum()
    missing, after = (int(number) for number in (video.numel() - in_video, in_guides))
    if missing:
        return Dense(f"{missing} tokens of the video itself are masked out of the sequence, so what is left is no grid")
    return VideoLayout(frames - guide_frames, height, width, suffix=after)


def _ltx_number(evaluation: Evaluation, options: dict) -> int:
    """The calls in order; layers whose self-attention is left out (spatio-temporal guidance) keep their numbers."""
    skipped = options.get("stg_self_attn_blocks") or ()
    calling = [layer for layer in range(len(evaluation.network.transformer_blocks)) if layer not in skipped]
    return options.get("block_index", calling[evaluation.layers] if evaluation.layers < len(calling) else evaluation.layers)


def _ltx_blocks(network: Any) -> int:
    return len(network.transformer_blocks)


def _h3(evaluation: Evaluation, grid: Grid) -> VideoLayout | Dense:
    """Text, references and audio stand before the video, packed as the model's own layout says."""
    payload = evaluation.inputs.get("minimax_payload") or {}
    audio_frames = evaluation.inputs["latent_shapes"][1][-1] if len(evaluation.inputs.get("latent_shapes") or ()) > 1 else 0
    size = (evaluation.latent[2], *(edge * tokens for edge, tokens in zip(evaluation.network.patch_size[1:], grid[1:], strict=True)))
    signature = (evaluation.text_tokens, *size, audio_frames)
    packed = payload.get("layout")
    if packed is None or tuple(packed.signature) != signature:  # as the model does; a context window has other frames than the run
        make = sys.modules[type(evaluation.network).__module__].PackedLayout
        packed = make(*signature, keyframes=payload.get("keyframes"), refs=payload.get("refs"))
    start, stop = next((start, stop) for start, stop, kind in packed.segments if kind == "video")
    return VideoLayout(*grid, prefix=start, suffix=packed.seq_len - stop)


def _cogvideox(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    return VideoLayout(*grid, prefix=evaluation.text_tokens)


def _cogvideox_patch(network: Any) -> Grid:
    return network.patch_size_t or 1, network.patch_size, network.patch_size


def _mochi(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """The text stands after the video, without its padding."""
    return VideoLayout(*grid, suffix=min(evaluation.text_tokens, int(evaluation.inputs.get("num_tokens", 256))))


# --- what "automatic" means ------------------------------------------------------------------------------------------

_NO_FIGURES = "no published figures for it: the nodes' own defaults"


def _settings(svg: float, warmup: float = 0.2, adaspa: float = 0.8) -> Callable[[Any], Mapping[str, Automatic]]:
    """SVG's and AdaSpa's sparsity, and the warm-up's share of the run. Auto has no sparsity of its own: it follows from its fidelity."""
    return lambda network: {"SVG": Automatic(svg, warmup, "0"), "AdaSpa": Automatic(adaspa, warmup, ""), "Auto": Automatic(AUTOMATIC, warmup, "")}


# Wan 1.3B is 1,536 wide, 5B 3,072 and 14B 5,120. Narrower ones are nobody's video models, but test pieces.
_SMALL_WIDTHS = range(1024, 2049)


def _wan_is_small(network: Any) -> bool:
    return getattr(network, "dim", None) in _SMALL_WIDTHS


def _wan_automatic(network: Any) -> Mapping[str, Automatic]:
    return (_settings(0.6, 0.3, 0.7) if _wan_is_small(network) else _settings(0.7))(network)


def _wan_source(network: Any) -> str:
    if _wan_is_small(network):
        return "SVG's authors on Wan 1.3B (Sparse-VideoGen issue 19): keep more, or warm up longer; by how much is our choice, not measured"
    return "SVG's scripts for Wan 2.1 14B: 0.30 kept, the first 20 % of steps and one layer dense"


_SVG_SCRIPT = "SVG's script for it: 0.25 kept, {} of steps and one layer dense; AdaSpa's paper, section 4.3: 0.8"

# --- the table -------------------------------------------------------------------------------------------------------

_WAN = VideoModel(
    "Wan 2.1 / 2.2", ("WanModel", "CameraWanModel", "WanDancerModel"), _patch_size, _blocks, _wan, heads=_wan_heads,
    automatic=_wan_automatic, source=_wan_source,
)
_LTX = VideoModel(
    "LTX-Video", ("LTXVModel",), lambda network: (1, 1, 1), _ltx_blocks, _ltx, _ltx_number, heads=_ltx_heads, automatic=_settings(0.7),
    source=lambda network: _NO_FIGURES,
)
_COSMOS = VideoModel(
    "Cosmos 1", ("GeneralDIT",), _cosmos_patch, _blocks, number=counted,
    heads=lambda network: (network.num_heads, network.model_channels // network.num_heads), automatic=_settings(0.75, 0.3),
    source=lambda network: "SVG's script for Cosmos 14B: 0.25 kept, the first 30 % of steps and one layer dense",
)

ROWS: tuple[VideoModel, ...] = (
    _WAN,
    replace(_WAN, name="Wan VACE", classes=("VaceWanModel",), stacks=("vace", "vace 2", "vace 3")),
    replace(_WAN, name="Wan 2.2 S2V", classes=("WanModel_S2V",), layout=_wan_speech),
    replace(_WAN, name="HuMo", classes=("HumoWanModel",), layout=_wan_speech),
    replace(_WAN, name="Wan 2.2 Animate", classes=("AnimateWanModel",), layout=_wan_animate),
    replace(_WAN, name="Wan-Animate2", classes=("WanAnimate2Model",), layout=_wan_animate2),
    replace(_WAN, name="SCAIL", classes=("SCAILWanModel", "SCAIL2WanModel"), layout=_scail),
    VideoModel(
        "HunyuanVideo", ("HunyuanVideo",), _patch_size, lambda network: len(network.double_blocks) + len(network.single_blocks), _hunyuan,
        _hunyuan_number, cross_attends=False, heads=lambda network: (network.num_heads, network.hidden_size // network.num_heads),
        automatic=_settings(0.75),
        source=lambda network: _SVG_SCRIPT.format("the first 10 %") + " and the first 20 %, which is taken for both",
    ),
    _LTX,
    replace(_LTX, name="LTX-2", classes=("LTXAVModel",), width=lambda network: network.inner_dim),
    VideoModel(
        "MiniMax H3", ("MiniMaxH3Model",), _patch_size, _blocks, _h3, counted, cross_attends=False,
        heads=_heads_of_first(lambda network: network.blocks[0].attn), automatic=_settings(0.7),
        source=lambda network: _NO_FIGURES,
    ),
    VideoModel(
        "CogVideoX", ("CogVideoXTransformer3DModel",), _cogvideox_patch, _blocks, _cogvideox, counted, cross_attends=False,
        heads=_heads_of_first(lambda network: network.blocks[0]),
        automatic=_settings(0.75), source=lambda network: _SVG_SCRIPT.format("the first 20 %"),
    ),
    VideoModel(
        "Mochi", ("AsymmDiTJoint",), lambda network: (1, network.patch_size, network.patch_size), _blocks, _mochi, counted, cross_attends=False,
        heads=lambda network: (network.num_heads, network.head_dim), automatic=_settings(0.7), source=lambda network: _NO_FIGURES,
    ),
    _COSMOS,
    replace(_COSMOS, name="Cosmos-Predict2", classes=("MiniTrainDIT",)),
    VideoModel(
        "Kandinsky 5", ("Kandinsky5",), _patch_size, lambda network: len(network.visual_transformer_blocks),
        heads=_heads_of_first(lambda network: network.visual_transformer_blocks[0].self_attention), automatic=_settings(0.7),
        source=lambda network: _NO_FIGURES,
    ),
)
_BY_CLASS = {name: row for row in ROWS for name in row.classes}

# --- models without a row --------------------------------------------------------------------------------------------

# The patches of today's video models, tried where a model does not say its own.
_USUAL_PATCHES: tuple[Grid, ...] = ((1, 2, 2), (1, 1, 1), (2, 2, 2))


def _patches_of(network: Any) -> tuple[Grid, ...]:
    """What a network's attributes say of its patches, as the known models name them; else the usual ones."""
    size = getattr(network, "patch_size", None)
    if isinstance(size, (tuple, list)) and len(size) == 3:
        return (tuple(size),)
    if isinstance(size, int):
        return ((getattr(network, "patch_size_t", None) or 1, size, size),)
    if isinstance(getattr(network, "patch_spatial", None), int):
        return ((getattr(network, "patch_temporal", None) or 1, network.patch_spatial, network.patch_spatial),)
    return _USUAL_PATCHES


class Inferred(VideoModel):
    """A model that nobody listed: a video where the calls are as long as its latent has patches."""

    def layout_of(self, evaluation: Evaluation, call: Call) -> VideoLayout | Dense:
        kind = type(evaluation.network).__name__
        if len(evaluation.latent) != 5:
            return Dense(f"{kind} {_NOT_COVERED}")
        for patch in _patches_of(evaluation.network):
            grid = grid_of(evaluation.latent, patch)
            if grid[0] * grid[1] * grid[2] == call.seq_q:
                return VideoLayout(*grid)
        return Dense(f"{kind} {_NOT_COVERED}; its calls of {call.seq_q} tokens do not fit a latent of {' x '.join(map(str, evaluation.latent[2:]))}")

    @property
    def note(self) -> str:
        return f"layout inferred: {self.name} is not one of the models that were tried, but its calls are as long as its video"


_NOT_COVERED = "is not one of the video models that are covered: " + ", ".join(row.name for row in ROWS)


def _inferred(kind: str, network: Any) -> Inferred:
    blocks = next((part for name in ("blocks", "transformer_blocks") if (part := getattr(network, name, None)) is not None), None)
    layers = len(blocks) if blocks is not None and hasattr(blocks, "__len__") else None
    return Inferred(kind, (kind,), lambda network: _USUAL_PATCHES[0], lambda network: layers, number=counted)


def plain(network: Any) -> Any:
    """The network inside torch.compile's wrapper."""
    return getattr(network, "_orig_mod", network)


def network_of(patcher: Any) -> Any:
    """The diffusion model of a ModelPatcher, without torch.compile's wrapper."""
    return plain(patcher.get_model_object("diffusion_model"))


def find(network: Any) -> VideoModel:
    """The row of a diffusion model, by its class; one that is inferred, where it has none. torch.compile's wrapper is looked through."""
    kind = type(plain(network)).__name__
    return _BY_CLASS.get(kind) or _inferred(kind, plain(network))


def latent_shape(x: Tensor, inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """The video's latent shape [B, C, T, H, W]. Hosts pack a video with audio into one tensor and pass the shapes beside it."""
    shapes = inputs.get("latent_shapes")
    return tuple(shapes[0]) if shapes else tuple(x.shape)
