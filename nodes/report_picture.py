"""A record as a picture: an IMAGE tensor [1, height, width, 3] in 0 to 1."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.record import KINDS

# Inches: narrow, so that words of 10 points stay readable where a node shows the picture 512 pixels wide.
_WIDTH, _PLOTS, _LINE, _EDGE = 6.0, 3.4, 0.175, 0.1
_LOWER = (3.2, 1.9)  # heights of the second and the third row of plots
_DPI = 160
_LETTERS = 76  # of a line of words


class Mask(NamedTuple):
    """The block mask to draw: of which layer and head, and bool [R, R] of evenly spread tokens, or None where none is kept."""

    layer: int
    head: int
    pairs: Tensor | None


def draw(data: dict, mask: Mask | None = None) -> Tensor:
    """The picture of a record in its JSON form, costs included, and the figures in words.

    Skipped share by layer and step; what the method found; the block mask of one head; the time by layer; the run by step.
    """
    lines = _words(data)
    words = _LINE * len(lines) + _EDGE
    below = sum(_LOWER) if data["sparse_calls"] else 0.0
    plots = _PLOTS + below
    figure = _figure(plots + words)
    if figure is None:
        return _blank()
    figure.get_layout_engine().set(rect=(0, words / (plots + words), 1, plots / (plots + words)))
    rows = figure.add_gridspec(3 if below else 1, 1, height_ratios=(_PLOTS, *_LOWER) if below else (1,))
    upper = rows[0].subgridspec(1, 2, width_ratios=(3, 2))
    _layers_and_steps(figure, figure.add_subplot(upper[0]), data)
    _findings(figure, figure.add_subplot(upper[1]), data)
    if below:
        middle = rows[1].subgridspec(1, 2, width_ratios=(3, 2))
        _block_mask(figure.add_subplot(middle[0]), data, mask or Mask(0, 0, None))
        _times(figure.add_subplot(middle[1]), data)
        _steps(figure.add_subplot(rows[2]), data)
    figure.text(_EDGE / _WIDTH, words / (plots + words), "\n".join(lines), va="top", fontsize=10).set_in_layout(False)
    return _rendered(figure)


def draw_message(message: str) -> Tensor:
    """A picture that says why there is nothing to show."""
    figure = _figure(_PLOTS)
    if figure is None:
        return _blank()
    figure.text(0.5, 0.5, textwrap.fill(message, 40), ha="center", va="center", fontsize=14)
    return _rendered(figure)


def _figure(height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")


def _layers_and_steps(figure, axes, data: dict) -> None:
    values = data["sparsity_by_layer_and_step"]
    if not values:
        axes.axis("off")
        axes.text(0.5, 0.5, "no call on record", ha="center", va="center", transform=axes.transAxes)
        return
    table = _table(values)
    axes.set(title="Skipped share of attention", xlabel="step (the first is 0)", ylabel="layer (the first is 0)")
    image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
    for step in data["search_steps"]:
        axes.axvline(step, color="white", linestyle=":", linewidth=1)
    axes.locator_params(axis="x", integer=True)
    _name_layers(axes, data["layer_names"])
    figure.colorbar(image, ax=axes, label="0 = dense")


def _findings(figure, axes, data: dict) -> None:
    if types := data.get("temporal_share_by_layer_and_head"):
        table = _table(list(types.values()))
        image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="coolwarm", interpolation="nearest")
        axes.set(title="Kinds of heads", xlabel="head")
        _name_layers(axes, list(types))
        axes.locator_params(axis="x", integer=True)
        bar = figure.colorbar(image, ax=axes)
        bar.set_ticks([0, 0.5, 1], labels=["spatial", "both", "temporal"])
    elif recall := data.get("recall_by_layer_and_head"):
        heads = [_numbers(values) for values in recall.values()]
        layers = range(len(recall))
        axes.fill_betweenx(layers, [float(h.min()) for h in heads], [float(h.max()) for h in heads], alpha=0.3, label="all heads")
        axes.plot([float(h.mean()) for h in heads], layers, marker="o", label="mean")
        axes.set(title="Recall", xlabel="kept share of softmax", xlim=(0, 1.02))
        axes.invert_yaxis()
        _name_layers(axes, list(recall))
        axes.legend(loc="best")
    else:
        axes.axis("off")
        axes.text(0.5, 0.5, "nothing ran sparse", ha="center", va="center")


def _block_mask(axes, data: dict, mask: Mask) -> None:
    """Kept pairs of evenly spread tokens, in the model's own order, with the frames' edges drawn in."""
    names = data["layer_names"]
    of = names[mask.layer] if -len(names) <= mask.layer < len(names) else mask.layer
    axes.set_title(f"Kept pairs, layer {of}, head {mask.head}")
    if mask.pairs is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no mask of this\nlayer and head", ha="center", va="center", transform=axes.transAxes)
        return
    axes.imshow(mask.pairs.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    layout, size = data["layout"], len(mask.pairs)
    per_frame, total = layout["height"] * layout["width"], data["tokens"]
    edges = [layout["prefix"] + frame * per_frame for frame in range(layout["frames"] + 1)]
    every = 1 + len(edges) // 24
    for edge in [*edges[:-1:every], edges[-1]]:
        for line in (axes.axhline, axes.axvline):
            line(edge * size / total - 0.5, color="0.5", linewidth=0.5)
    axes.set(xlabel="keys; lines: frames", ylabel="queries", xticks=[], yticks=[])


def _times(axes, data: dict) -> None:
    """Mean milliseconds of a call, by layer and kind."""
    found = data.get("costs", {}).get("call_ms_by_layer") or {}
    if not found:
        axes.axis("off")
        axes.text(0.5, 0.5, "no times", ha="center", va="center", transform=axes.transAxes)
        return
    for kind in KINDS:
        places = [place for place, kinds in enumerate(found.values()) if kind in kinds]
        if places:
            axes.plot([list(found.values())[place][kind] for place in places], places, marker="o", markersize=3, linewidth=1, label=kind)
    axes.set(title="Time of a call", xlabel="milliseconds")
    axes.set_xlim(left=0)
    _name_layers(axes, list(found))
    axes.invert_yaxis()
    axes.legend(loc="best")


def _steps(axes, data: dict) -> None:
    """How many calls ran sparse and dense, step by step, searches marked."""
    calls = data["calls_by_step"]
    steps = range(len(calls["sparse"]))
    axes.bar(steps, calls["sparse"], color="tab:blue", label="sparse")
    axes.bar(steps, calls["dense"], bottom=calls["sparse"], color="0.75", label="dense")
    for number, step in enumerate(data["search_steps"]):
        axes.axvline(step, color="black", linestyle=":", label="search" if number == 0 else None)
    axes.set(title="Calls by step", xlabel="step (the first is 0)", ylabel="calls")
    axes.locator_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _name_layers(axes, names: list[str]) -> None:
    """Names the rows from 0 on the vertical axis, as many as fit."""
    every = 1 + len(names) // 16
    axes.set_yticks(range(0, len(names), every), names[::every])


def _numbers(values: list[float | None]) -> Tensor:
    """A list with gaps, as floats with NaN in them."""
    return torch.tensor([float("nan") if value is None else value for value in values])


def _table(rows: list[list[float | None]]) -> Tensor:
    """Rows as one matrix; shorter ones end in NaN."""
    return torch.nn.utils.rnn.pad_sequence([_numbers(row) for row in rows], batch_first=True, padding_value=float("nan"))


def _words(data: dict) -> list[str]:
    """The lines below the plots."""
    reasons = "; ".join(f"{reason} ({count})" for reason, count in data["reasons"].items())
    asked, achieved, whole = (f"{data[name]:.1%}" for name in ("asked_sparsity", "achieved_sparsity", "run_sparsity"))
    skipped = f"{achieved} skipped in sparse calls (asked {asked}), {whole} over the whole run" if data["sparse_calls"] else "nothing ran sparse"
    calls = f"{data['sparse_calls']} sparse and {data['dense_calls']} dense calls" + (f" of {data['tokens']} tokens" if data["tokens"] else "")
    backend = f", backend {data['backend']}" if data["backend"] else ""
    lines = [f"{data['method']} on {data['model']}, {data['outcome']}", skipped, f"{calls}, {data['steps']} steps{backend}"]
    lines += [f"dense: {reasons}"] if reasons else []
    lines += data["notes"]
    return [part for line in lines for part in textwrap.wrap(line, _LETTERS, subsequent_indent="   ")]


def _rendered(figure) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return (pixels.view(height, width, 4)[None, ..., :3].float() / 255).contiguous()


def _blank() -> Tensor:
    """What is shown where matplotlib is missing; the JSON has it all."""
    return torch.ones(1, 64, 64, 3)
