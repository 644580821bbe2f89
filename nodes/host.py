"""What is taken from ComfyUI beyond its node API, and what is looked for before it is used. 0.23 is the oldest supported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

OUTER_SAMPLE = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_PREPARE_STATE = comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE
OVERRIDE = "optimized_attention_override"
# Our name in everything of the host's that is shared by name.
KEY = "sparse_video_attention"
# What the panel on the patch nodes listens to; the same word stands in web/panel.js.
RUN_EVENT = KEY + ".run"

log = logging.getLogger(KEY)


def clone_model_options(options: dict) -> dict:
    """A copy of a guider's model_options whose containers are its own and whose values are shared."""
    return comfy.model_patcher.create_model_options_clone(options)


class OutsideRecording:
    """While it is entered, the host records none of this thread's allocations.

    ComfyUI 0.34 and later may record a block's allocations and replay them: what outlives the block must not be among them, nor what a first
    compile takes. A pause is a switch there that does not count, and the host's own kernels use it too: what is the host's is called by `host_call`.
    """

    def __init__(self):
        try:
            import comfy.model_prefetch

            self._make = getattr(comfy.model_prefetch, "pause_malloc_graph", contextlib.nullcontext)
        except ImportError:
            self._make = contextlib.nullcontext

    def __enter__(self) -> OutsideRecording:
        self._pause = self._make()
        self._pause.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._pause.__exit__(*error)

    def host_call(self, call: Callable[[], Any]) -> Any:
        """What `call` returns. It is made as if from outside; afterwards the pause is on again, whatever the host did with it."""
        self.__exit__(None, None, None)
        try:
            return call()
        finally:
            self.__enter__()


def has_model_sparse_attention(patcher: Any) -> bool:
    """Whether a model carries the host's own node Model Sparse Attention (0.34 and later), which puts its override on top in every evaluation."""
    return bool(patcher.get_callbacks(_PREPARE_STATE, "block_sparse_attention"))


def dense_attention() -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]:
    """(the host's own attention for q, k, v [B, H, S, D], its name): the backend that it was started with."""
    try:
        from comfy.ldm.modules.attention import optimized_attention
    except ImportError:
        return torch.nn.functional.scaled_dot_product_attention, "scaled_dot_product_attention"
    inner = getattr(optimized_attention, "__wrapped__", optimized_attention)  # no override may meet what is no model's call
    return lambda q, k, v: inner(q, k, v, q.shape[1], skip_reshape=True, _inside_attn_wrapper=True), inner.__name__


def compute_dtype(patcher: Any) -> torch.dtype:
    """What a model computes in."""
    find = getattr(patcher.model, "get_dtype_inference", None) or getattr(patcher.model, "get_dtype", None)
    return find() if find is not None else torch.float32


def executing_node() -> str | None:
    """The id of the node that runs now; None outside a prompt."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return None if context is None else str(context.node_id)


def running_prompt() -> tuple | None:
    """The server's entry for the prompt that runs now: (number, id, nodes by id, extra data, ...). None where the host does not tell."""
    try:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer

        prompt_id = getattr(get_executing_context(), "prompt_id", None)
        running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
        return next((item for item in running if item[1] == prompt_id), None)
    except Exception:  # no server, or one that has changed
        log.debug("could not look into the running prompt", exc_info=True)
        return None


def _running_workflow() -> str | None:
    """The id of the workflow whose prompt runs now; None where the prompt came without one: the panel then goes by the node's id alone."""
    try:
        found = running_prompt()[3]["extra_pnginfo"]["workflow"]["id"]
    except (LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def show_text(text: str, node_id: str | None, figures: dict | None = None) -> None:
    """Writes a line on a node, in the browser that queued the prompt. Without a server or a node it does nothing.

    The panel of web/panel.js gets the line first, with these figures (plain data); it then holds the text itself back.
    """
    if node_id is None:
        return
    try:
        from server import PromptServer

        server: Any = getattr(PromptServer, "instance", None)
    except ImportError:
        return
    if server is not None:
        try:
            if hasattr(server, "send_sync"):
                told = {"state": "note", **(figures or {}), "node": node_id, "workflow": _running_workflow(), "line": text}
                server.send_sync(RUN_EVENT, told, server.client_id)
            server.send_progress_text(text, node_id, server.client_id)
        except Exception:  # a line that cannot be shown is no reason to lose a video
            log.warning("could not show the status line on node %s", node_id, exc_info=True)
