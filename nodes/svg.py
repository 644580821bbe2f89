"""The node "Sparse Attention Patch (SVG)": schema, settings, patch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.methods import svg
from .inputs import ALIASES, CATEGORY, advanced_inputs, common_inputs, model_input, sparsity_input, told_its_id
from .patch import install


class SparseAttentionPatchSVG(io.ComfyNode):
    """Sparse VideoGen on a video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionPatchSVG",
            display_name="Sparse Attention Patch (SVG)",
            category=CATEGORY,
            description="Makes a video model faster by computing only the attention that matters (Sparse VideoGen): each head is "
            "found to look around in space or along time, while sampling, and only that is computed. Text and the first frame are always kept.",
            search_aliases=ALIASES,
            inputs=[
                model_input(),
                sparsity_input(svg.CONFIG),
                *common_inputs(
                    "How often heads are classified anew. -1: at every sparse step (the paper). 0: once. N: every N steps, a little faster.",
                    " In runs of 4 to 8 steps with sparsity -1 too: none, and each step skips less instead.",
                ),
                *advanced_inputs(svg.CONFIG, [
                    io.Int.Input(
                        "sampled_rows", default=svg.CONFIG.sampled_rows, min=1, max=4096, step=1, optional=True, advanced=True,
                        tooltip="How many tokens a head is judged by. Up: surer, a little slower. The paper uses 32 to 64.",
                    ),
                ]),
            ],
            outputs=[io.Model.Output(tooltip="The model; sample it as usual.")],
            **told_its_id(),
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(install(model, svg, svg.CONFIG(**settings), cls.hidden.unique_id))
