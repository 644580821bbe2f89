"""The widgets that the patch nodes share: ids, defaults, limits and words in one place. Ids and options never change once released."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.config import BACKEND_CHOICES, MOST_SPARSITY, MethodConfig

CATEGORY = "model/patch"
ALIASES = ["sparse attention", "SVG", "Sparse VideoGen", "AdaSpa", "sparse video", "video attention", "faster video"]
_MANY = 10_000


def model_input() -> io.Input:
    return io.Model.Input("model", tooltip="A video diffusion model. LoRAs, shifts and caches may stand on either side of this node.")


def common_inputs(defaults: type[MethodConfig], refresh_way: str, warmup_extra: str = "") -> list[io.Input]:
    """Sparsity, warm-up and refresh."""
    return [
        io.Float.Input(
            "sparsity", default=defaults.sparsity, min=0.0, max=MOST_SPARSITY, step=0.01, optional=True,
            tooltip="The share of attention that is skipped. Up: faster, and further from the dense video. Down: slower and closer. 0 skips nothing.",
        ),
        io.Int.Input(
            "warmup_steps", default=-1, min=-1, max=_MANY, step=1, optional=True,
            tooltip="How many first steps stay dense. They fix the composition. Up: closer to the dense video, less gain. "
            "-1: automatic, about the first fifth, one step in runs of 8 or fewer." + warmup_extra,
        ),
        io.Int.Input("cache_refresh", default=-1, min=-1, max=_MANY, step=1, optional=True, tooltip=refresh_way),
    ]


def advanced_inputs(defaults: type[MethodConfig], own: list[io.Input]) -> list[io.Input]:
    """What most people leave alone; `own` are the method's."""
    return [
        io.String.Input(
            "dense_layers", default=defaults.dense_layers, optional=True, advanced=True,
            tooltip='Layers that stay dense, as "0-2, -1" (the first three and the last), in execution order. More: closer and slower.',
        ),
        io.Int.Input(
            "end_steps", default=0, min=0, max=_MANY, step=1, optional=True, advanced=True,
            tooltip="How many last steps stay dense. Up: finer detail nearer to the dense video, less gain.",
        ),
        io.Int.Input(
            "min_tokens", default=-1, min=-1, max=10_000_000, step=1, optional=True, advanced=True,
            tooltip="Videos with fewer tokens stay dense, since there is nothing to gain. -1: automatic. 0: never for this reason.",
        ),
        *own,
        io.Combo.Input(
            "backend", options=list(BACKEND_CHOICES), default="auto", optional=True, advanced=True,
            tooltip="What computes it. auto: Triton on a GPU that can, else torch. reference is slow, for checking.",
        ),
        io.Boolean.Input(
            "strict", default=False, optional=True, advanced=True,
            tooltip="On: an error whenever a call would have to run dense for a reason that you did not choose. Off: it runs dense and says why.",
        ),
    ]
