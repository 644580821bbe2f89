"""The node "Sparse Attention Report": what a run did, as a picture and as JSON."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..attention.record import SCHEMA, RunRecord
from . import host
from .inputs import CATEGORY, told_its_id
from .patch import RunLog
from .report_picture import Mask, draw, draw_message


class SparseAttentionReport(io.ComfyNode):
    """The record of the run that made `samples`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionReport",
            display_name="Sparse Attention Report",
            category=CATEGORY,
            description="Tells what the sparse attention of a run did: how much was skipped, by layer and step, why calls stayed dense, "
            "and what the method found. Put it between the sampler and the decoder.",
            search_aliases=["sparse attention report", "sparsity report", "SVG report", "AdaSpa report"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled: the output of a sparse attention patch, or a later node's."),
                io.Latent.Input("samples", tooltip="The sampler's output; it passes through, so that the report comes after the run."),
                io.Int.Input(
                    "layer", default=0, min=-1000, max=1000, step=1, optional=True,
                    tooltip="Whose block mask is drawn: the layer, counted from 0; -1 is the last. Other stacks (VACE) follow the main one.",
                ),
                io.Int.Input("head", default=0, min=-1000, max=1000, step=1, optional=True, tooltip="And the head, counted from 0; -1 is the last."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The same latent."),
                io.Image.Output(display_name="picture", tooltip="Skipped share by layer and step, what the method found, a block mask, times."),
                io.String.Output(display_name="json", tooltip="The record as JSON."),
            ],
            **told_its_id(io.Hidden.prompt),
            is_output_node=True,  # so that it runs, and shows its picture, with nothing after it
        )

    @classmethod
    def execute(cls, model: Any, samples: dict, layer: int = 0, head: int = 0) -> io.NodeOutput:
        record = find_record(model, cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        if isinstance(record, RunRecord):
            data = {**record.to_json(), "costs": record.costs()}
            image = draw(data, Mask(layer, head, record.mask_picture(layer, head)))
        else:
            data = {"schema": SCHEMA, "method": None, "why": record}
            image = draw_message(record)
        return io.NodeOutput(samples, image, json.dumps(data, indent=1), ui=ui.PreviewImage(image, cls=cls))


def find_record(model: Any, prompt: dict, node_id: str) -> RunRecord | str:
    """The newest record of the nearest node above `samples` that sampled this model, or why there is none."""
    log = model.get_attachment(host.KEY)
    if not isinstance(log, RunLog):
        return "This model carries no sparse attention patch: connect the output of a patch node, or of a node after it."
    if not log.runs:
        return "This model has not been sampled yet: connect the sampler's output to samples."
    seen, waiting = {node_id}, [_source(prompt, node_id, "samples")]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        record = log.newest_of(node)
        if record is not None:
            return record
        waiting += [_source(prompt, node, name) for name in prompt.get(node, {}).get("inputs", {})]
    return "These samples come from the cache of a run with another model object: change the seed, or sample again, to see a record."


def _source(prompt: dict, node_id: str, name: str) -> str | None:
    """The node that an input is linked to."""
    link = prompt.get(node_id, {}).get("inputs", {}).get(name)
    return str(link[0]) if isinstance(link, (list, tuple)) and link else None
