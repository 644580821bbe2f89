"""The node "Sparse Attention Patch (Auto)": schema, settings, patch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.methods import auto
from .inputs import ALIASES, CATEGORY, advanced_inputs, common_inputs, model_input, told_its_id
from .patch import install


class SparseAttentionPatchAuto(io.ComfyNode):
    """As much as a wanted fidelity leaves to skip, on a video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionPatchAuto",
            display_name="Sparse Attention Patch (Auto)",
            category=CATEGORY,
            description="Makes a video model faster by computing only the attention that matters: you say how close to dense attention it is to "
            "stay, and each layer skips as much as that leaves. The error is measured while sampling. Text is always kept.",
            search_aliases=[*ALIASES, "fidelity"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "fidelity", default=auto.CONFIG.fidelity, min=0.5, max=0.99, step=0.01, optional=True,
                    tooltip="How close each layer's attention stays to dense attention: 0.9 means off by at most about a tenth. Up: closer, less is "
                    "skipped. Down: faster. How much is skipped follows from it, and is told.",
                ),
                *common_inputs(
                    "When blocks are searched anew. -1: in layers whose measured error has come to 1.25 times what fidelity allows. 0: never. "
                    "N: every N steps; more often follows the video more closely and costs more.",
                    " The search is in the last of them, so 0 means 1.",
                ),
                *advanced_inputs(auto.CONFIG),
            ],
            outputs=[io.Model.Output(tooltip="The model; sample it as usual.")],
            **told_its_id(),
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(install(model, auto, auto.CONFIG(**settings), cls.hidden.unique_id))
