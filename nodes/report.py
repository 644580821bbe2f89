"""The node "Sparse Attention Report": what a run did, as a picture and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..attention.record import SCHEMA, RunRecord
from ..attention.schedule import in_layers, parse_layers
from ..attention.words import shortened
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
            search_aliases=["sparse attention report", "sparsity report", "SVG report", "AdaSpa report", "fidelity report"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled: the output of a sparse attention patch, or a later node's."),
                io.Latent.Input("samples", tooltip="The sampler's output; it passes through, so that the report comes after the run."),
                io.Int.Input(
                    "layer", default=0, min=-1000, max=1000, step=1, optional=True,
                    tooltip="Whose block mask is drawn: the layer, counted from 0; -1 is the last. Other stacks (VACE) follow the main one. "
                    "Where it has none, as a dense layer, the nearest that has one is drawn.",
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
        for name, value in (("layer", layer), ("head", head)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}: {shortened(repr(value))} is not a whole number")
        record = find_record(model, cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        if isinstance(record, RunRecord):
            data = {**record.to_json(), "costs": record.costs()}
            image = draw(data, chosen_mask(record, data, layer, head))
        else:
            data = {"schema": SCHEMA, "method": None, "why": record}
            image = draw_message(record)
        return io.NodeOutput(samples, image, json.dumps(data, indent=1), ui=ui.PreviewImage(image, cls=cls))


def find_record(model: Any, prompt: dict, node_id: str) -> RunRecord | str:
    """The newest record of the nearest node above `samples` that sampled this model, or why there is none."""
    log = model.get_attachment(host.KEY)
    if not isinstance(log, RunLog):
        return "No sparse attention patch in this run: it is bypassed or muted, or this model does not come out of one."
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


def chosen_mask(record: RunRecord, data: dict, layer: int, head: int) -> Mask:
    """The block mask of a layer, by its place among `layer_names`, and a head, negative ones from the end; else of the nearest that has one.

    data: the record's JSON form. What is shown instead, and why, is said in the mask's remarks.
    """
    names, remarks = data["layer_names"], []
    asked = layer + len(names) if layer < 0 else layer
    nearest = sorted(range(len(names)), key=lambda place: (abs(place - asked), place))
    place = next((place for place in nearest if record.mask_picture(place, 0) is not None), None)
    if place is None:
        return Mask(layer, head, None, ("no mask is kept: only the newest run of a model has them",) if data["sparse_calls"] else ())
    if not 0 <= asked < len(names):
        remarks.append(f"this model has {_range('layer', names)}: layer {names[place]} is shown")
    elif place != asked:
        remarks.append(f"layer {names[asked]} {_why_without(record, data, asked)}: layer {names[place]} is shown")
    heads = len(data["sparsity_by_layer_and_head"][names[place]])
    column = head + heads if head < 0 else head
    if not 0 <= column < heads:
        column = min(max(column, 0), heads - 1)
        remarks.append(f"this layer has {_range('head', range(heads))}: head {column} is shown")
    return Mask(place, column, record.mask_picture(place, column), tuple(remarks))


def _range(what: str, names: Sequence) -> str:
    """Such as "layers 0 to 29", or "layer 0" alone."""
    return f"{what} {names[0]} alone" if len(names) == 1 else f"{what}s {names[0]} to {names[-1]}"


def _why_without(record: RunRecord, data: dict, place: int) -> str:
    """What kept a layer from having a block mask, as a verb."""
    dense = parse_layers(record.config.dense_layers) if record.config else ()
    if in_layers(int(data["layer_names"][place].split()[0]), dense, record.layers):
        return "ran dense (dense layer)"
    called = any(value is not None for value in data["sparsity_by_layer_and_step"][place])
    return "ran dense" if called else "was not called"


def _source(prompt: dict, node_id: str, name: str) -> str | None:
    """The node that an input is linked to."""
    link = prompt.get(node_id, {}).get("inputs", {}).get(name)
    return str(link[0]) if isinstance(link, (list, tuple)) and link else None
