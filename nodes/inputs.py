"""The widgets that the patch nodes share: ids, defaults, limits and words in one place. Ids and options never change once released."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..attention.config import AUTOMATIC, BACKEND_CHOICES, MOST_SPARSITY, PRECISION_CHOICES, MethodConfig
from ..attention.dispatch import MIN_TOKENS

CATEGORY = "model/patch"
ALIASES = ["sparse attention", "SVG", "Sparse VideoGen", "AdaSpa", "sparse video", "video attention", "faster video", "auto sparse attention"]
_MANY = 10_000
# The automatic min_tokens, in words; one number where all devices have the same.
_LEAST_TOKENS = " or ".join(f"{tokens:,}" for tokens in sorted(set(MIN_TOKENS.values())))


def told_its_id(*more: io.Hidden) -> dict:
    """What the schema of a node says that is told its own id, and more.

    The id is then part of the key of ComfyUI's cache, so that a copy of a node is not served the first one's output, whose words go to
    the first one's id.
    """
    return {"hidden": [io.Hidden.unique_id, *more], "not_idempotent": True}


def model_input() -> io.Input:
    return io.Model.Input("model", tooltip="A video diffusion model. LoRAs, shifts and caches may stand on either side of this node.")


def sparsity_input(defaults: type[MethodConfig]) -> io.Input:
    return io.Float.Input(
        "sparsity", default=defaults.sparsity, min=float(AUTOMATIC), max=MOST_SPARSITY, step=0.01, optional=True,
        tooltip="The share of attention that is skipped. Up: faster, and further from the dense video. Down: slower and closer. 0 skips nothing. "
        "-1: automatic, what suits the model, gentler for small ones.",
    )


def common_inputs(refresh_way: str, warmup_extra: str = "") -> list[io.Input]:
    """Warm-up and refresh, which come after the method's own measure of how much is skipped."""
    return [
        io.Int.Input(
            "warmup_steps", default=-1, min=-1, max=_MANY, step=1, optional=True,
            tooltip="How many first steps stay dense. They fix the composition. Up: closer to the dense video, less gain. "
            "-1: automatic, about the first fifth, more for some models, one step in runs of 8 or fewer." + warmup_extra,
        ),
        io.Int.Input("cache_refresh", default=-1, min=-1, max=_MANY, step=1, optional=True, tooltip=refresh_way),
    ]


def advanced_inputs(defaults: type[MethodConfig], own: Sequence[io.Input] = (), newest: Sequence[io.Input] = ()) -> list[io.Input]:
    """What most people leave alone; `own` are the method's, `newest` those that it got after it was released."""
    return [
        io.String.Input(
            "dense_layers", default=defaults.dense_layers, optional=True, advanced=True,
            tooltip='Layers that stay dense, as "0-2, -1" (the first three and the last), in execution order. More: closer and slower. '
            "auto: what suits the model.",
        ),
        io.Int.Input(
            "end_steps", default=0, min=0, max=_MANY, step=1, optional=True, advanced=True,
            tooltip="How many last steps stay dense. Up: finer detail nearer to the dense video, less gain.",
        ),
        io.Int.Input(
            "min_tokens", default=-1, min=-1, max=10_000_000, step=1, optional=True, advanced=True,
            tooltip="Videos with fewer tokens stay dense, since there is little or nothing to gain. "
            f"-1: automatic, {_LEAST_TOKENS}. 0: never for this reason.",
        ),
        *own,
        io.Combo.Input(
            "backend", options=list(BACKEND_CHOICES), default="auto", optional=True, advanced=True,
            tooltip="What computes it. auto: Triton on a GPU that can, else torch. triton: calls stay dense where it cannot run. "
            "torch: plain torch operations, anywhere. reference: slow, for checking.",
        ),
        io.Boolean.Input(
            "strict", default=False, optional=True, advanced=True,
            tooltip="On: an error whenever a call would have to run dense for a reason that you did not choose, in another precision, or by "
            "torch on a GPU. Off: it does, and says why. Warm-up, dense_layers, end_steps and min_tokens count as chosen, never as a failure.",
        ),
        # New inputs come after this one: saved workflows carry their values by place.
        io.Combo.Input(
            "precision", options=list(PRECISION_CHOICES), default="auto", optional=True, advanced=True,
            tooltip="What sparse calls are computed in. auto: the model's own precision, 16 bits as a rule. int8: queries times keys in INT8. "
            "fp8: that product and weights times values in FP8, on GPUs that have it. Both are a little less exact. Where one cannot run, "
            "the model's own precision is used and the node says why.",
        ),
        *newest,
    ]
