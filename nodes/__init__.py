"""The only room that knows ComfyUI. Here: the extension, an explicit list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .adaspa import SparseAttentionPatchAdaSpa
from .auto import SparseAttentionPatchAuto
from .pattern import SparseAttentionLoadPattern, SparseAttentionSavePattern
from .probe import SparseAttentionProbe, SparseAttentionProbeResults
from .report import SparseAttentionReport
from .svg import SparseAttentionPatchSVG

NODES: list[type[io.ComfyNode]] = [
    SparseAttentionPatchSVG,
    SparseAttentionPatchAdaSpa,
    SparseAttentionPatchAuto,
    SparseAttentionReport,
    SparseAttentionProbe,
    SparseAttentionProbeResults,
    SparseAttentionSavePattern,
    SparseAttentionLoadPattern,
]


class SparseVideoAttentionExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
