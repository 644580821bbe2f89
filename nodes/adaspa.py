"""The node "AdaSpa Patch": schema, settings, patch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.blocks import SKIPPED_BLOCKS, TOKEN_ORDERS
from ..attention.methods import adaspa
from .inputs import ALIASES, CATEGORY, advanced_inputs, common_inputs, model_input, sparsity_input, told_its_id
from .patch import install


class SparseAttentionPatchAdaSpa(io.ComfyNode):
    """AdaSpa on a video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionPatchAdaSpa",
            display_name="AdaSpa Patch",
            category=CATEGORY,
            description="Makes a video model faster by computing only the attention that matters (AdaSpa): the blocks that hold most "
            "of each head's attention are searched once, exactly, and reused in later steps. Text is always kept.",
            search_aliases=ALIASES,
            inputs=[
                model_input(),
                sparsity_input(adaspa.CONFIG),
                *common_inputs(
                    "How often blocks are searched anew. -1: once more, at about 60 percent of the run (the paper). 0: never. "
                    "N: every N steps; more often follows the video more closely and costs more.",
                    " The search is in the last of them, so 0 means 1.",
                ),
                *advanced_inputs(adaspa.CONFIG, [
                    io.Boolean.Input(
                        "head_adaptive", default=adaspa.CONFIG.head_adaptive, optional=True, advanced=True,
                        tooltip="On: heads that need less give blocks to heads that need more; the mean stays what you asked for. Tried out in each "
                        "layer's search, and taken where it comes nearer to dense attention.",
                    ),
                    io.Combo.Input(
                        "token_order", options=list(TOKEN_ORDERS), default=adaspa.CONFIG.token_order, optional=True, advanced=True,
                        tooltip="How tokens are put into blocks. hilbert: runs of a curve, compact in time, height and width in videos of "
                        "every size. tile: boxes of 4 by 4 by 4, compact where the size is a multiple of that. raster: runs of a line, "
                        "as in the paper.",
                    ),
                ], [
                    io.Combo.Input(
                        "skipped_blocks", options=list(SKIPPED_BLOCKS), default=adaspa.CONFIG.skipped_blocks, optional=True, advanced=True,
                        tooltip="What becomes of skipped blocks. mean: each still counts as one token, its mean, which costs little and stays closer "
                        "to the dense video. drop: they are left out altogether, as in the paper.",
                    ),
                ]),
            ],
            outputs=[io.Model.Output(tooltip="The model; sample it as usual.")],
            **told_its_id(),
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(install(model, adaspa, adaspa.CONFIG(**settings), cls.hidden.unique_id))
