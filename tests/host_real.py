"""The real ComfyUI, in this process, behind the names that host_double.py has: for the same test bodies."""

import contextlib
import functools
import os
from pathlib import Path

NAME = "real"
UNKNOWN = ("packed",)
# Models under names that nobody listed: the file, and the class that its network gets.
_UNLISTED = {"packed": ("cogvideox", "PackedVideo"), "unlisted": ("ltxv", "UnlistedVideo")}
_models = Path()


@contextlib.contextmanager
def installed(folder):
    """Makes `import comfy` find the checkout at COMFYUI_PATH; `folder` takes the tiny models and what the host writes."""
    global _models, Interrupt
    import tiny_models

    _models = folder / "models"
    tiny_models.host_on_cpu(Path(os.environ["COMFYUI_PATH"]).resolve())
    # As main.py does, first: 0.23's nodes.py puts comfy/ on the path, where another module has that name.
    import utils.extra_config  # noqa: F401

    tiny_models.write(_models)
    import comfy.model_management
    import folder_paths

    Interrupt = comfy.model_management.InterruptProcessingException
    folder_paths.set_temp_directory(str(folder))
    yield


def CFGGuider(model):  # noqa: N802 (the host's name)
    import comfy.samplers

    return comfy.samplers.CFGGuider(model)


def executing(node_id):
    """As while the host executes a node."""
    from comfy_execution.utils import CurrentNodeContext

    return CurrentNodeContext("prompt", node_id)


@functools.cache
def _loaded(family):
    import comfy.sd

    file, kind = _UNLISTED.get(family, (family, None))
    model = comfy.sd.load_diffusion_model(str(_models / f"{file}.safetensors"))
    if kind:
        network = model.get_model_object("diffusion_model")
        network.__class__ = type(kind, (type(network),), {})
    return model


def load(family):
    """An unpatched model; all of a family share their weights."""
    return _loaded(family).clone()


def weights(family):
    """The tensors of a tiny model's file."""
    import comfy.utils

    return comfy.utils.load_torch_file(str(_models / f"{family}.safetensors"))


def attention():
    """The attention that models call."""
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention.optimized_attention


def replace_attention(monkeypatch, func):
    """Puts another function in the place of the attention that models call; Wan's has taken it over by name."""
    import comfy.ldm.modules.attention
    import comfy.ldm.wan.model

    for module in (comfy.ldm.modules.attention, comfy.ldm.wan.model):
        monkeypatch.setattr(module, "optimized_attention", func)


def honouring(func):
    """`func` as an attention function that asks for overrides."""
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention.wrap_attn(func)


def sampler(name):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def sigmas(model, steps):
    """The schedule "simple"."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
