"""A test-only node that tells what of the pack is alive in this process."""

import gc
import itertools
import json
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import torch


def _pack():
    """(the pack's folder as its files name it, its name as a module)."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".attention.session"):
            return str(Path(module.__file__).parent.parent), name.removesuffix(".attention.session")
    raise RuntimeError("the pack is not loaded")


def _is_from(kind, package):
    return str(getattr(kind, "__module__", "")).startswith(f"{package}.")


class TestMemory:
    """As text in JSON: bytes that the pack's files hold, its objects by class, and all the process's tensors by what they look like.

    trace: on starts tracing, off ends it afterwards. after: what to wait for.
    """

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (the host's name)
        return {"required": {"trace": ("BOOLEAN", {"default": True})}, "optional": {"after": ("LATENT",)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802 (the host's name)
        return float("nan")

    def run(self, trace, after=None):
        folder, name = _pack()
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        gc.collect()
        # Each class is looked at once: there are many objects, and tracing makes everything slow.
        known = gc.get_objects()
        kinds = {kind: issubclass(kind, torch.Tensor) or _is_from(kind, name) for kind in set(map(type, known))}
        tensors, objects = Counter(), Counter()
        for found in itertools.compress(known, map(kinds.get, map(type, known))):
            if isinstance(found, torch.Tensor):
                tensors[f"{found.dtype} {tuple(found.shape)}"] += 1
            else:
                objects[type(found).__name__] += 1
        del known, found
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, folder + "/*")])
        told = {"bytes": sum(statistic.size for statistic in ours.statistics("filename")), "tensors": tensors, "objects": objects}
        if not trace:
            tracemalloc.stop()
        return {"ui": {"text": [json.dumps(told)]}}
