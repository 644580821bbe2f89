"""A small double of ComfyUI: what nodes/ relies on of it, and models, guider and samplers to run it with.

It keeps the host's contract, as read in ComfyUI 0.23 and 0.33: who copies which options when, in which order wrappers
run, how conditions come batched or apart, and how each model family calls its attention. The same test bodies run on
the real classes (host_real.py), which is what holds this double to them.
"""

import contextlib
import contextvars
import functools
import itertools
import sys
import types
import uuid
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

NAME = "double"
UNKNOWN = ("packed", "image")


# --- comfy.patcher_extension -----------------------------------------------------------------------------------------


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class CallbacksMP:
    ON_PREPARE_STATE = "on_prepare_state"


class WrapperExecutor:
    """Calls wrappers in order, each with the executor of what is inside it; `class_obj` is whose method is wrapped."""

    def __init__(self, original, class_obj, wrappers, index=0):
        self.original, self.class_obj, self.wrappers, self.index = original, class_obj, list(wrappers), index

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.index + 1).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        if self.index == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.index](self, *args, **kwargs)


def get_all_wrappers(kind, options, is_model_options=False):
    options = options.get("transformer_options", {}) if is_model_options else options
    return [wrapper for wrappers in options.get("wrappers", {}).get(kind, {}).values() for wrapper in wrappers]


def copy_nested_dicts(options):
    """Containers are copied, values are shared."""
    copies = {dict: copy_nested_dicts, list: list.copy}
    return {key: copies[type(value)](value) if type(value) in copies else value for key, value in options.items()}


# --- comfy.model_patcher ---------------------------------------------------------------------------------------------


class ModelPatcher:
    """A model, and what nodes put on it. Clones share the model; each has its own options, wrappers and attachments."""

    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.callbacks, self.attachments = {}, {}, {}

    def clone(self):
        copy = ModelPatcher(self.model)
        copy.model_options = copy_nested_dicts(self.model_options)
        for ours, theirs in ((copy.wrappers, self.wrappers), (copy.callbacks, self.callbacks)):
            ours.update({kind: {key: functions.copy() for key, functions in by_key.items()} for kind, by_key in theirs.items()})
        copy.attachments = self.attachments.copy()
        return copy

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def get_callbacks(self, kind, key):
        return self.callbacks.get(kind, {}).get(key, [])

    def prepare_state(self, timestep, model_options):
        for callbacks in self.callbacks.get(CallbacksMP.ON_PREPARE_STATE, {}).values():
            for callback in callbacks:
                callback(self, timestep, model_options)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def get_attachment(self, key):
        return self.attachments.get(key)

    def get_model_object(self, name):
        return functools.reduce(getattr, name.split("."), self.model)

    def get_free_memory(self, device):
        return 1e12


# --- comfy_api.latest ------------------------------------------------------------------------------------------------


class _Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"


class _Input:
    def __init__(self, id, display_name=None, optional=False, tooltip=None, lazy=None, advanced=None, default=None, **limits):
        self.id, self.display_name, self.optional, self.tooltip, self.advanced, self.default = id, display_name, optional, tooltip, advanced, default
        unknown = set(limits) - self.LIMITS
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        for name in self.LIMITS:
            setattr(self, name, limits.get(name))


class _Output:
    def __init__(self, id=None, display_name=None, tooltip=None, is_output_list=False):
        self.id, self.display_name, self.tooltip = id, display_name, tooltip


def _kind(name, *limits):
    """A type of the node API, such as io.Int, with its Input and Output."""
    io_type = name.upper()
    return SimpleNamespace(
        Input=type("Input", (_Input,), {"LIMITS": set(limits), "io_type": io_type}), Output=type("Output", (_Output,), {"io_type": io_type}),
    )


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution

    @property
    def result(self):
        return self.args or None


@dataclass
class _Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    hidden: list = field(default_factory=list)
    description: str = ""
    search_aliases: list = field(default_factory=list)
    is_output_node: bool = False
    not_idempotent: bool = False


class ComfyNode:
    """A node class. Hidden inputs are on a copy of the class that is made for each call; all others are arguments of execute."""

    hidden = None

    @classmethod
    def GET_SCHEMA(cls):  # noqa: N802 (the host's name)
        return cls.define_schema()

    @classmethod
    def PREPARE_CLASS_CLONE(cls, data):  # noqa: N802 (the host's name)
        inputs = data["hidden_inputs"] if data else {}
        return type(cls.__name__, (cls,), {"hidden": SimpleNamespace(**{name.name: inputs.get(name) for name in _Hidden})})

    @classmethod
    def EXECUTE_NORMALIZED(cls, *args, **kwargs):  # noqa: N802 (the host's name)
        return cls.execute(*args, **kwargs)


class _PreviewImage:
    def __init__(self, image, cls=None, **kwargs):
        self.image = image


# --- comfy_execution.utils and server --------------------------------------------------------------------------------

_executing = contextvars.ContextVar("executing", default=None)


@contextlib.contextmanager
def executing(node_id):
    """As while the host executes a node."""
    token = _executing.set(SimpleNamespace(prompt_id="prompt", node_id=node_id, list_index=None))
    try:
        yield
    finally:
        _executing.reset(token)


class PromptServer:
    instance: Any = None


# --- installing ------------------------------------------------------------------------------------------------------


def _modules():
    io = SimpleNamespace(
        ComfyNode=ComfyNode, Schema=_Schema, NodeOutput=NodeOutput, Hidden=_Hidden, Input=_Input,
        Model=_kind("Model"), Latent=_kind("Latent"), Image=_kind("Image"), String=_kind("String", "multiline", "placeholder"),
        Float=_kind("Float", "min", "max", "step", "round"), Int=_kind("Int", "min", "max", "step"),
        Boolean=_kind("Boolean", "label_on", "label_off"), Combo=_kind("Combo", "options"),
    )
    contents = {
        "comfy": {},
        "comfy.patcher_extension": {
            "WrappersMP": WrappersMP, "CallbacksMP": CallbacksMP, "WrapperExecutor": WrapperExecutor, "get_all_wrappers": get_all_wrappers,
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher, "create_model_options_clone": copy_nested_dicts},
        "comfy.model_prefetch": {},
        "comfy_api": {},
        "comfy_api.latest": {"io": io, "ui": SimpleNamespace(PreviewImage=_PreviewImage), "ComfyExtension": object},
        "comfy_execution": {},
        "comfy_execution.utils": {"get_executing_context": _executing.get},
        "server": {"PromptServer": PromptServer},
    }
    made = {}
    for name, members in contents.items():
        made[name] = types.ModuleType(name)
        made[name].__path__ = []  # so that submodules can be imported
        vars(made[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, made[name])
    return made


@contextlib.contextmanager
def installed(folder):
    """Puts the double where ComfyUI's modules are imported from; leaves no trace. `folder` is not needed."""
    before = dict(sys.modules)
    sys.modules.update(_modules())
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] in ("comfy", "comfy_api", "comfy_execution", "server") or name.startswith("pack.nodes"):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


# --- attention -------------------------------------------------------------------------------------------------------


def wrap_attn(func):
    """An override gets the undecorated function; what it calls in turn does not come back to it."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            options = kwargs.get("transformer_options")
            if options is not None and "optimized_attention_override" in options:
                return options["optimized_attention_override"](func, *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


@wrap_attn
def optimized_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


# --- diffusion models ------------------------------------------------------------------------------------------------

_WIDTH, _HEADS = 128, 2


class _Network(nn.Module):
    """Tokens of latent boxes, blocks, and back. Families differ in how they call attention."""

    patch_size = (1, 2, 2)
    layers = 2

    def __init__(self, channels, text_width):
        super().__init__()
        box = self.box[0] * self.box[1] * self.box[2] * channels
        self.embed, self.unembed = nn.Linear(box, _WIDTH), nn.Linear(_WIDTH, box)
        self.text, self.time = nn.Linear(text_width, _WIDTH), nn.Linear(1, _WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(_WIDTH, 3 * _WIDTH) for _ in range(self.layers + 1))
        self.cross = nn.ModuleList(nn.Linear(_WIDTH, 3 * _WIDTH) for _ in range(self.layers))

    @property
    def box(self):
        """Latent voxels of a token, (frames, height, width)."""
        return self.patch_size

    def forward(self, x, t, context, control=None, transformer_options=None, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        return WrapperExecutor(self._forward, self, wrappers).execute(x, t, context, transformer_options, **kwargs)

    def _forward(self, x, t, context, options, **kwargs):
        flat = x.dim() == 4
        x = x[:, :, None] if flat else x
        batch, channels, *sizes = x.shape
        grid = [size // edge for size, edge in zip(sizes, self.box, strict=True)]
        split = [part for pair in zip(grid, self.box, strict=True) for part in pair]
        boxes = x.reshape(batch, channels, *split).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, grid[0] * grid[1] * grid[2], -1)
        tokens = self.run(self.embed(boxes) + self.time(t[:, None, None]), self.text(context), grid, options, **kwargs)
        boxes = self.unembed(tokens).reshape(batch, *grid, channels, *self.box)
        out = boxes.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(x.shape)
        return out[:, :, 0] if flat else out

    def split_qkv(self, layer, tokens):
        """[B, S, H*D] each; scaled up so that attention is no mere mean."""
        q, k, v = self.qkv[layer](F.layer_norm(tokens, [_WIDTH])).chunk(3, -1)
        return 2 * q, 2 * k, v

    def split_heads(self, layer, tokens):
        """[B, H, S, D] each, as views."""
        return [part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in self.split_qkv(layer, tokens)]

    def cross_attention(self, layer, tokens, text, **kwargs):
        q = self.cross[layer](tokens)[..., :_WIDTH]
        k, v = self.cross[layer](text)[..., _WIDTH:].chunk(2, -1)
        return optimized_attention(q, k, v, **kwargs)


class WanModel(_Network):
    """[B, S, H*D], heads by keyword; a cross-attention call after each self-attention."""

    @property
    def blocks(self):
        return range(self.layers)

    def run(self, tokens, text, grid, options, **kwargs):
        options.update(grid_sizes=torch.Size(grid), total_blocks=self.layers, block_type="double")
        for layer in range(self.layers):
            options["block_index"] = layer
            tokens = tokens + optimized_attention(*self.split_qkv(layer, tokens), heads=_HEADS, transformer_options=options)
            tokens = tokens + self.cross_attention(layer, tokens, text, heads=_HEADS, transformer_options=options)
        return tokens


class HunyuanVideo(_Network):
    """[B, H, S, D] views, heads by position, text first; a refiner without a layer number; single blocks count from 0 again."""

    layers = 3

    def __init__(self, channels, text_width):
        super().__init__(channels, text_width)
        self.double_blocks, self.single_blocks = range(1), range(2)

    def attend(self, layer, tokens, mask, options):
        q, k, v = self.split_heads(layer, tokens)
        return tokens + optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options)

    def run(self, tokens, text, grid, options, attention_mask=None, **kwargs):
        mask = padding = None
        if attention_mask is not None:
            padding = (attention_mask - 1).to(tokens.dtype) * torch.finfo(tokens.dtype).max
            mask = torch.zeros(1, 1, text.shape[1] + tokens.shape[1])
            mask[:, 0, : text.shape[1]] = padding
        for _ in range(2):
            text = self.attend(self.layers, text, None if padding is None else padding[:, None, None].expand(-1, 1, text.shape[1], -1), options)
        tokens = torch.cat([text, tokens], 1)
        for kind, blocks, first in (("double", self.double_blocks, 0), ("single", self.single_blocks, len(self.double_blocks))):
            options.update(total_blocks=len(blocks), block_type=kind)
            for index in blocks:
                options["block_index"] = index
                tokens = self.attend(first + index, tokens, mask, options)
        return tokens[:, text.shape[1] :]


class LTXVModel(_Network):
    """[B, S, H*D], heads by position, no layer number and no grid; a masked cross-attention call after each self-attention."""

    patch_size = (1, 1, 1)

    @property
    def transformer_blocks(self):
        return range(self.layers)

    def run(self, tokens, text, grid, options, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else (attention_mask - 1).to(tokens.dtype)[:, None, None] * torch.finfo(tokens.dtype).max
        for layer in range(self.layers):
            tokens = tokens + optimized_attention(*self.split_qkv(layer, tokens), _HEADS, attn_precision=None, transformer_options=options)
            crossed = self.cross_attention(layer, tokens, text, heads=_HEADS, mask=mask, attn_precision=None, transformer_options=options)
            tokens = tokens + crossed
        return tokens


class CogVideoXTransformer3DModel(_Network):
    """[B, S, H*D], text first, no layer number and no grid; its patch size is two numbers."""

    patch_size, patch_size_t = 2, None

    @property
    def box(self):
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def blocks(self):
        return range(self.layers)

    def run(self, tokens, text, grid, options, **kwargs):
        joint = torch.cat([text, tokens], 1)
        for layer in range(self.layers):
            joint = joint + optimized_attention(*self.split_qkv(layer, joint), heads=_HEADS, transformer_options=options)
        return joint[:, text.shape[1] :]


class PackedVideo(CogVideoXTransformer3DModel):
    """A video model that the pack does not know, with text in the sequence."""


class UnlistedVideo(LTXVModel):
    """A video model that the pack does not know, with the video alone in the sequence."""


class UNetModel(CogVideoXTransformer3DModel):
    """An image model: its latents have four dimensions."""


# --- comfy.model_base, comfy.samplers --------------------------------------------------------------------------------


class ModelSampling:
    """Rectified flow, shifted as video models are."""

    shift = 3.0
    sigma_max = torch.tensor(1.0)

    def percent_to_sigma(self, percent):
        noise = min(max(1 - percent, 0.0), 1.0)
        return self.shift * noise / (1 + (self.shift - 1) * noise)


class BaseModel:
    def __init__(self, network):
        self.diffusion_model, self.model_sampling = network, ModelSampling()

    def memory_required(self, shape):
        return 1e6

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options.copy()
        out = self.diffusion_model(x, t, context=c_crossattn, control=control, transformer_options=options, **kwargs)
        return x - t.view(-1, *[1] * (x.dim() - 1)) * out


class CFGGuider:
    def __init__(self, model_patcher):
        self.model_patcher, self.model_options = model_patcher, model_patcher.model_options
        self.cfg = 1.0

    def set_conds(self, positive, negative):
        named = {"positive": positive, "negative": negative}
        self.conds = {name: {"cross_attn": cond[0][0], "uuid": uuid.uuid4(), **cond[0][1]} for name, cond in named.items()}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        kept = self.model_options
        try:
            self.model_options = copy_nested_dicts(kept)
            ours = self.model_options["transformer_options"].setdefault("wrappers", {})
            for kind, by_key in self.model_patcher.wrappers.items():
                for key, wrappers in by_key.items():
                    ours.setdefault(kind, {}).setdefault(key, []).extend(wrappers)
            executor = WrapperExecutor(self.outer_sample, self, get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options, is_model_options=True))
            return executor.execute(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, latent_shapes=[noise.shape])
        finally:
            self.model_options = kept

    def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None, latent_shapes=None):
        options = copy_nested_dicts(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        return sampler.sample(self, sigmas, {"model_options": options, "seed": seed}, callback, noise, latent_image)

    def __call__(self, x, sigma, model_options, seed=None):
        named = ("positive",) if self.cfg == 1 else ("positive", "negative")
        outputs = _each_condition(self.model_patcher, [self.conds[name] for name in named], x, sigma, model_options)
        return outputs[0] if self.cfg == 1 else outputs[1] + (outputs[0] - outputs[1]) * self.cfg


def _each_condition(patcher, conds, x, sigma, model_options):
    """Every condition's output: in one batch, the last condition first, where memory allows; else apart."""
    together = patcher.model.memory_required(x.shape) * 1.5 < patcher.get_free_memory(x.device)
    order = list(reversed(range(len(conds))))
    outputs = [None] * len(conds)
    patcher.prepare_state(sigma, model_options)
    for group in [order] if together else [[number] for number in order]:
        options = copy_nested_dicts(model_options["transformer_options"])
        options.update(cond_or_uncond=group[:], uuids=[conds[number]["uuid"] for number in group], sigmas=sigma)
        extra = {
            name: torch.cat([conds[number][name].expand(len(x), *conds[number][name].shape[1:]) for number in group])
            for name in ("cross_attn", "attention_mask") if name in conds[0]
        }
        text = extra.pop("cross_attn")
        joined = patcher.model.apply_model(
            torch.cat([x] * len(group)), torch.cat([sigma] * len(group)), c_crossattn=text, transformer_options=options, **extra,
        )
        for number, output in zip(group, joined.chunk(len(group)), strict=True):
            outputs[number] = output
    return outputs


class _Sampler:
    """Euler or Heun over the run's sigmas; Heun looks at the next sigma too, before it gets there."""

    def __init__(self, name):
        self.heun = {"euler": False, "heun": True}[name]

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image):
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        ones = x.new_ones(len(x))
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            denoised = guider(x, sigma * ones, **extra_args)
            slope = (x - denoised) / sigma
            if callback is not None:
                callback(step, denoised, x, len(sigmas) - 1)
            if self.heun and following > 0:
                ahead = x + slope * (following - sigma)
                slope = (slope + (ahead - guider(ahead, following * ones, **extra_args)) / following) / 2
            x = x + slope * (following - sigma)
        return x


# --- what the test bodies ask for ------------------------------------------------------------------------------------


class InterruptProcessingException(BaseException):
    """The person pressed stop; no Exception, so that nodes do not swallow it."""


Interrupt = InterruptProcessingException
sampler = _Sampler


class _Family(NamedTuple):
    network: type
    channels: int
    text_width: int


_FAMILIES = {
    "wan": _Family(WanModel, 16, 4096), "hunyuan": _Family(HunyuanVideo, 16, 128), "ltxv": _Family(LTXVModel, 128, 128),
    "cogvideox": _Family(CogVideoXTransformer3DModel, 16, 128),
    "packed": _Family(PackedVideo, 16, 128), "unlisted": _Family(UnlistedVideo, 128, 128), "image": _Family(UNetModel, 4, 128),
}


@functools.cache
def _network(family):
    row = _FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return row.network(row.channels, row.text_width).requires_grad_(False)


def load(family):
    """An unpatched model; all of a family share their weights."""
    return ModelPatcher(BaseModel(_network(family)))


def attention():
    """The attention that models call."""
    return optimized_attention


def replace_attention(monkeypatch, func):
    """Puts another function in the place of the attention that models call."""
    monkeypatch.setitem(globals(), "optimized_attention", func)


honouring, weights = wrap_attn, None


def sigmas(model, steps):
    """The schedule "simple"."""
    sampling = model.get_model_object("model_sampling")
    return torch.tensor([sampling.percent_to_sigma(step / steps) for step in range(steps)] + [0.0])
