"""The nodes "Sparse Attention Probe" and "Sparse Attention Probe Results": how far each layer and head is from dense attention."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..attention.config import AUTOMATIC, AUTOMATIC_LAYERS
from ..attention.probe import CONTINUE_CHOICES, SCHEMA, ProbeConfig, ProbeRecord, Suggestion, suggest
from ..attention.record import LayerKey, RunRecord, name_of_layer
from . import host
from .inputs import CATEGORY, told_its_id
from .patch import PROBE, RunLog
from .report import find_record

_ALIASES = ["sparse attention probe", "sparsity probe", "block probe", "attention error", "which layers dense", "dense layers"]
_MOST_ROWS = 200  # of the table: a wide model has thousands of heads, the JSON has them all
_MOST_ERROR = 0.3


class SparseAttentionProbe(io.ComfyNode):
    """Marks a patched model: its runs compute some calls both ways."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionProbe",
            display_name="Sparse Attention Probe",
            category=CATEGORY,
            description="Measures what sparse attention costs in quality: some calls of the run are computed both ways, sparse and dense, and "
            "compared. Put it after a sparse attention patch; Sparse Attention Probe Results, after the sampler, tells what was found.",
            search_aliases=_ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="A model with a sparse attention patch: the output of a patch node, or of a node after it."),
                io.String.Input(
                    "layers", default=ProbeConfig.layers, optional=True,
                    tooltip='Which layers to measure, as "0-2, -1" (the first three and the last), in execution order. Empty: all. '
                    "Layers that the patch keeps dense are not measured.",
                ),
                io.Int.Input(
                    "most_layers", default=ProbeConfig.most_layers, min=0, max=10_000, step=1, optional=True,
                    tooltip="At most so many of these layers, evenly spaced. Down: a faster run that tells of fewer layers. 0: all of them.",
                ),
                io.Int.Input(
                    "steps", default=ProbeConfig.steps, min=0, max=10_000, step=1, optional=True,
                    tooltip="In how many sparse steps to measure, spread over the run. Up: surer and slower. 0: in every one.",
                ),
                io.String.Input(
                    "sparsities", default=ProbeConfig.sparsities, optional=True,
                    tooltip='Other sparsities to measure beside the patch\'s own, as "0.5, 0.6". More: a finer suggestion and a slower run. '
                    "auto: two below the patch's own. Empty: none, and the suggestion keeps the patch's own. Not for the Auto patch, which has none.",
                ),
                io.Combo.Input(
                    "continue_with", options=list(CONTINUE_CHOICES), default=ProbeConfig.continue_with, optional=True,
                    tooltip="What the video goes on with after a measured call. sparse: the same video as without this node. "
                    "dense: measured calls do not pass their error on to later ones.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; sample it as usual. The run is slower than without this node.")],
            **told_its_id(),
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        config = ProbeConfig(**settings)
        if not isinstance(model.get_attachment(host.KEY), RunLog):
            host.show_text("⚠ Nothing to measure: this model carries no sparse attention patch. Put this node after one.", cls.hidden.unique_id)
            return io.NodeOutput(model)
        probed = model.clone()
        probed.set_attachments(PROBE, config)
        return io.NodeOutput(probed)


class SparseAttentionProbeResults(io.ComfyNode):
    """What a probed run found, and what to set."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionProbeResults",
            display_name="Sparse Attention Probe Results",
            category=CATEGORY,
            description="Tells how far each layer and head of a probed run is from dense attention, worst first, and suggests dense_layers and "
            "sparsity that keep the error under a bound. Put it after the sampler of a model with a Sparse Attention Probe.",
            search_aliases=_ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled: the output of Sparse Attention Probe, or of a node after it."),
                io.Latent.Input("samples", tooltip="The sampler's output; it passes through, so that the results come after the run."),
                io.Float.Input(
                    "max_error", default=_MOST_ERROR, min=0.001, max=10.0, step=0.01, optional=True,
                    tooltip="The largest error that a sparse layer may have: 0.1 means off by a tenth of what dense attention gives. "
                    "Down: closer to the dense video, more layers dense and less skipped. Turning it needs no new run.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The same latent."),
                io.String.Output(display_name="table", tooltip="Layer, head and error, worst first, and the suggestion in words."),
                io.String.Output(display_name="json", tooltip="All that was measured, as JSON."),
                io.String.Output(display_name="dense_layers", tooltip="The suggestion: connect it to dense_layers of a patch node."),
                io.Float.Output(display_name="sparsity", tooltip="The suggestion: connect it to sparsity of a patch node. -1 where that has none."),
            ],
            **told_its_id(io.Hidden.prompt),
            is_output_node=True,  # so that it tells what was found with nothing after it
        )

    @classmethod
    def execute(cls, model: Any, samples: dict, max_error: float = _MOST_ERROR) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        record = find_record(model, cls.hidden.prompt or {}, node_id)
        found = record.probe if isinstance(record, RunRecord) else None
        if found is None:
            why = record if isinstance(record, str) else "This run was not measured: put Sparse Attention Probe between the patch and the sampler."
            host.show_text(f"⚠ {why}", cls.hidden.unique_id)
            data = {"schema": SCHEMA, "method": None, "why": why}
            text = f"{why}\ndense_layers and sparsity are left to the patch's automatic values."
            return io.NodeOutput(samples, text, json.dumps(data, indent=1), AUTOMATIC_LAYERS, float(AUTOMATIC), ui={"text": (text,)})
        advice = suggest(found, max_error)
        text = _table(found, advice, max_error)
        host.show_text(_words(found, advice), cls.hidden.unique_id)
        data = _to_json(record, found, advice, max_error)
        return io.NodeOutput(samples, text, json.dumps(data, indent=1), advice.dense_layers, float(advice.sparsity), ui={"text": (text,)})


def _words(found: ProbeRecord, advice: Suggestion) -> str:
    """The line on the node."""
    worst = [f"worst: layer {name_of_layer((layer, stack))}, head {head}: {error:.3f}" for layer, stack, head, error in found.worst()[:1]]
    return " · ".join([*worst, f'suggested: dense_layers "{advice.dense_layers}"{_of_sparsity(advice)}', *advice.notes])


def _of_sparsity(advice: Suggestion) -> str:
    """The suggested sparsity, after the layers; nothing where the patch has none."""
    return f", sparsity {advice.sparsity:g}" if advice.sparsity >= 0 else ""


def _table(found: ProbeRecord, advice: Suggestion, max_error: float) -> str:
    """The suggestion and the errors as text in columns, worst first."""
    steps = ", ".join(str(step) for step in sorted(found.steps)) or "none"
    lines = [
        f'Suggested for errors up to {max_error:g}: dense_layers "{advice.dense_layers}"{_of_sparsity(advice)} '
        f"({advice.skipped:.0%} of the measured layers' attention skipped)",
        *(f"Note: {note}" for note in advice.notes),
        f"Measured: {found.calls} calls in steps {steps}; layers, heads and steps count from 0.",
    ]
    # One column of layers a sparsity, then the heads at the patch's own.
    columns = [found.by_layer(rung) for rung in range(len(found.sparsities))]
    layers = sorted(columns[0], key=lambda layer: (-(columns[0][layer] or 0.0), layer))
    lines += ["", "mean error of each layer, by sparsity; skipped: what each came to in the measured calls"]
    asked = [f"{sparsity:g}" if sparsity >= 0 else "-" for sparsity in found.sparsities]
    lines.append(f"{'asked':<10}" + "".join(f"{text:>8}" for text in asked))
    lines += [f"{'skipped':<10}" + "".join(_figure(achieved) for achieved in found.achieved), "layer"]
    lines += [f"{name_of_layer(layer):<10}" + "".join(_figure(column.get(layer)) for column in columns) for layer in layers[:_MOST_ROWS]]
    rows = found.worst()
    own = f" at sparsity {found.sparsities[0]:g}" if found.sparsities[0] >= 0 else ""
    lines += ["", f"error of each head{own}", f"{'layer':>5}  {'stack':<8}{'head':>5}{'error':>8}"]
    lines += [f"{layer:>5}  {stack or '-':<8}{head:>5}{_figure(error)}" for layer, stack, head, error in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append(f"... and {len(rows) - _MOST_ROWS} more heads in the JSON")
    return "\n".join(lines)


def _figure(error: float | None) -> str:
    return f"{'-':>8}" if error is None else f"{error:>8.3f}"


def _to_json(record: RunRecord, found: ProbeRecord, advice: Suggestion, max_error: float) -> dict:
    """All that was measured as plain data; its form is versioned by "schema"."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    def share(sparsity: float) -> float | None:
        return sparsity if sparsity >= 0 else None

    def by_name(errors: dict[LayerKey, float | None]) -> dict[str, float | None]:
        return {name_of_layer(layer): rounded(error) for layer, error in errors.items()}

    return {
        "schema": SCHEMA, "method": record.method, "model": record.model, "outcome": record.outcome, "probe_ended_early": found.why,
        "max_error": max_error, "calls": found.calls, "steps": sorted(found.steps), "continue_with": found.config.continue_with,
        "suggestion": {
            "dense_layers": advice.dense_layers, "sparsity": share(advice.sparsity), "skipped": rounded(advice.skipped), "notes": list(advice.notes),
        },
        "sparsities": [
            {"asked": share(asked), "achieved": rounded(achieved), "error_by_layer": by_name(found.by_layer(rung))}
            for rung, (asked, achieved) in enumerate(zip(found.sparsities, found.achieved, strict=True))
        ],
        "worst": [{"layer": layer, "stack": stack, "head": head, "error": rounded(error)} for layer, stack, head, error in found.worst()],
    }
