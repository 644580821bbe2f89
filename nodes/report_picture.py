"""A record as a picture: an IMAGE tensor [1, height, width, 3] in 0 to 1."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.record import KINDS
from .status import percent

# Lengths are points, and a point is a pixel where a node shows the picture 512 pixels wide; the picture itself has three for each.
_WIDTH, _FINER = 512, 3
_FONT, _LINE, _EDGE = 11, 13.2, 6
_UPPER, _LOWER = 138, 112  # heights of the two rows of panels
_LETTERS, _TITLE_LETTERS = 80, 27  # of a line of words, of a title's line
_MOST_LINES = 12
# What the host or another node has set for its own figures, such as light words for a dark ground, is none of ours.
_STYLE = {
    "font.size": _FONT, "axes.titlesize": _FONT, "axes.labelsize": _FONT, "xtick.labelsize": _FONT, "ytick.labelsize": _FONT,
    "legend.fontsize": _FONT, "axes.titlepad": 4, "axes.labelpad": 2, "xtick.major.pad": 2, "ytick.major.pad": 2,
    "text.parse_math": False,  # a note may hold dollars
}
# By kind of call: colour and marker.
_LOOKS = {"sparse": ("tab:blue", "o"), "dense": ("0.6", "s"), "search": ("black", "^"), "probed": ("tab:red", "D")}


class Mask(NamedTuple):
    """The block mask to draw: of which layer, by its place among the record's, and which head; bool [R, R] of evenly spread tokens, or None.

    remarks: why it is not the layer or the head that was asked for; without pairs, why there are none.
    """

    layer: int
    head: int
    pairs: Tensor | None
    remarks: tuple[str, ...] = ()


def draw(data: dict, mask: Mask | None = None) -> Tensor:
    """The picture of a record in its JSON form, costs included, and the figures in words.

    Above: skipped share by layer and step, what the method found, one head's block mask. Below: the time by layer, the run by step.
    """
    mask = mask or Mask(0, 0, None)
    lines = _words(data)
    words = _LINE * len(lines) + _EDGE
    sparse, title = bool(data["sparse_calls"]), _title_of_mask(data, mask)
    upper = _UPPER + (_LINE * (len(title) - 1) if sparse else 0)
    plots = upper + (_LOWER if sparse else 0)

    def panels(figure) -> None:
        figure.get_layout_engine().set(rect=(0, words / (plots + words), 1, plots / (plots + words)))
        rows = figure.add_gridspec(2 if sparse else 1, 1, height_ratios=(upper, _LOWER) if sparse else None)
        # Each panel has a grid of its own, or one with a tall title would press on its neighbours.
        above = [part.subgridspec(1, 1)[0] for part in rows[0].subgridspec(1, 3 if sparse else 2, width_ratios=(19, 16, 16) if sparse else None)]
        _layers_and_steps(figure, figure.add_subplot(above[0]), data)
        if sparse:
            _findings(figure, figure.add_subplot(above[1]), data)
            _block_mask(figure.add_subplot(above[2]), data, mask, title)
            below = [part.subgridspec(1, 1)[0] for part in rows[1].subgridspec(1, 2)]
            _times(figure.add_subplot(below[0]), data)
        _steps(figure.add_subplot(below[1] if sparse else above[1]), data)
        figure.text(_EDGE / _WIDTH, words / (plots + words), "\n".join(lines), va="top").set_in_layout(False)

    return _drawn(plots + words, panels)


def draw_message(message: str) -> Tensor:
    """A picture that says why there is nothing to show."""
    return _drawn(_UPPER, lambda figure: figure.text(0.5, 0.5, textwrap.fill(message, 46), ha="center", va="center", fontsize=_FONT * 1.5))


def _drawn(height: float, panels) -> Tensor:
    """A figure of this height that `panels` filled; blank where there is no matplotlib: the JSON has it all."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return torch.ones(1, 64, 64, 3)
    with _style():
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72 * _FINER, layout="constrained", facecolor="white")
        panels(figure)
        return _rendered(figure)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _nothing(axes, why: str) -> None:
    """An empty panel, and why it is."""
    axes.axis("off")
    axes.text(0.5, 0.5, textwrap.fill(why, 22), ha="center", va="center", transform=axes.transAxes)


def _layers_and_steps(figure, axes, data: dict) -> None:
    values = data["sparsity_by_layer_and_step"]
    if not values:
        return _nothing(axes, "no call on record")
    table = _table(values)
    axes.set(title="Attention skipped", xlabel="step (from 0)", ylabel="layer (from 0)")
    image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
    for step in data["search_steps"]:
        axes.axvline(step, color="white", linestyle=":", linewidth=1)
    _number(axes, table.shape[1], 6)
    _name_layers(axes, data["layer_names"])
    figure.colorbar(image, ax=axes, pad=0.03, ticks=(0, 0.5, 1)).set_ticklabels(("0%", "50%", "100%"))


def _findings(figure, axes, data: dict) -> None:
    if types := data.get("temporal_share_by_layer_and_head"):
        table = _table(list(types.values()))
        image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="coolwarm", interpolation="nearest")
        axes.set(title="Types of heads", xlabel="head (from 0)", ylabel="layer")
        _number(axes, table.shape[1], 4)
        _name_layers(axes, list(types))
        figure.colorbar(image, ax=axes, pad=0.04, ticks=(0, 0.5, 1)).set_ticklabels(("spatial", "both", "temporal"))
    elif recall := data.get("recall_by_layer_and_head"):
        _heads_of_layers(axes, recall)
        axes.set(title="Attention weight kept", xlabel="dot: mean of heads,\nbar: all heads", xlim=(-0.03, 1.03), xticks=(0, 0.5, 1))
        axes.set_xticklabels(("0%", "50%", "100%"))
    elif errors := data.get("error_by_layer_and_head"):
        most, asked = _heads_of_layers(axes, errors), data.get("asked_error")
        axes.set(title="Off from dense attention", xlabel="dot: mean of heads,\nbar: all heads")
        if asked is not None:
            axes.axvline(asked, color="black", linestyle="--", linewidth=1)
            axes.set_xlabel("dot: mean of heads, bar:\nall; dashed: most asked")
            most = max(most, asked)
        axes.set_xlim(-0.03 * most, 1.12 * most or 1)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    else:
        _nothing(axes, "nothing was found")


def _heads_of_layers(axes, found: dict[str, list[float | None]]) -> float:
    """For each layer the mean over its heads and their range, where any is a number. Returns the largest."""
    layers, heads = range(len(found)), [_numbers(values) for values in found.values()]
    known = [numbers[~numbers.isnan()] for numbers in heads]
    spans = [(place, float(numbers.min()), float(numbers.max())) for place, numbers in zip(layers, known, strict=True) if len(numbers)]
    width = min(6.0, 60 / len(found))
    for place, low, high in spans:
        axes.plot([low, high], [place, place], color="tab:blue", alpha=0.35, linewidth=width, solid_capstyle="butt")
    axes.plot([float(numbers.mean()) for numbers in known], layers, color="tab:blue", linestyle="none", marker="o", markersize=min(5.0, width + 1))
    axes.set(ylabel="layer", ylim=(len(found) - 0.5, -0.5))
    _name_layers(axes, list(found))
    return max((high for *_, high in spans), default=0.0)


def _title_of_mask(data: dict, mask: Mask) -> list[str]:
    """The lines above the block mask: what it is, and why it is not the one asked for."""
    names = data["layer_names"]
    if mask.pairs is None:
        return ["Pairs computed"]
    layer, head = f"layer {names[mask.layer]}", f"head {mask.head}"
    said = [what for what in (layer, head) if not any(remark.endswith(f"{what} is shown") for remark in mask.remarks)]
    first = "Pairs computed" + (f", {said[0]}" if len(said) == 1 else "") + ":"
    rest = mask.remarks or (f"{layer}, {head}",)
    return [first, *(part for line in rest for part in textwrap.wrap(line, _TITLE_LETTERS))]


def _block_mask(axes, data: dict, mask: Mask, title: list[str]) -> None:
    """Kept pairs of evenly spread tokens, in the model's own order, with the frames' edges drawn in."""
    axes.set_title("\n".join(title))
    if mask.pairs is None:
        return _nothing(axes, " ".join(mask.remarks) or "no mask of this layer and head")
    axes.imshow(mask.pairs.numpy(), cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    layout, size = data["layout"], len(mask.pairs)
    per_frame, total = layout["height"] * layout["width"], data["tokens"]
    edges = [layout["prefix"] + frame * per_frame for frame in range(layout["frames"] + 1)]
    every = 1 + len(edges) // 24
    for edge in [*edges[:-1:every], edges[-1]]:
        for line in (axes.axhline, axes.axvline):
            line(edge * size / total - 0.5, color="0.5", linewidth=0.5)
    axes.set(xlabel="keys; a line per " + ("frame" if every == 1 else f"{every} frames"), ylabel="queries", xticks=[], yticks=[], anchor="N")


def _times(axes, data: dict) -> None:
    """Mean milliseconds of a call, by layer and kind."""
    found = data.get("costs", {}).get("call_ms_by_layer") or {}
    axes.set_title("Time of a call (ms)")
    if not found:
        return _nothing(axes, "no call was timed")
    for kind in (*KINDS, "probed"):
        places = [place for place, kinds in enumerate(found.values()) if kind in kinds]
        if places:
            colour, marker = _LOOKS[kind]
            took = [list(found.values())[place][kind] for place in places]
            axes.plot(places, took, color=colour, marker=marker, linestyle="none", markersize=5 if len(found) <= 24 else 3, label=kind)
    most = max(took for kinds in found.values() for took in kinds.values())
    axes.set(xlabel="layer (from 0)", xlim=(-0.5, len(found) - 0.5), ylim=(0, 1.12 * most or 1))
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    _name_layers(axes, list(found), across=True)
    _explain(axes)


def _steps(axes, data: dict) -> None:
    """How many calls ran sparse and dense, step by step, searches marked."""
    calls = data["calls_by_step"]
    count = len(calls["sparse"])
    if not count:
        return _nothing(axes, "no step on record")
    below = [0] * count
    for kind in ("sparse", "dense"):
        axes.bar(range(count), calls[kind], bottom=below, width=0.8 if count <= 24 else 1, color=_LOOKS[kind][0], label=kind)
        below = [under + number for under, number in zip(below, calls[kind], strict=True)]
    for number, step in enumerate(data["search_steps"]):
        axes.axvline(step, color=_LOOKS["search"][0], linestyle=":", label="search" if number == 0 else None)
    axes.set(title="Calls by step", xlabel="step (from 0)", xlim=(-0.5, count - 0.5), ylim=(0, 1.08 * max(below) or 1))
    axes.locator_params(axis="y", integer=True, nbins=4)
    _number(axes, count, 6)
    _explain(axes)


def _explain(axes) -> None:
    """The legend, beside the plot."""
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    kinds = [kind for kind in _LOOKS if kind in lines]
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    axes.legend([lines[kind] for kind in kinds], kinds, **beside, frameon=False, handlelength=1, handletextpad=0.5)


def _every(count: int, most: int) -> int:
    """How far apart numbers stand where at most so many of `count` fit: 1, 2, 5, 10, 20, as people count."""
    return next(unit * 10**power for power in range(9) for unit in (1, 2, 5) if count <= most * unit * 10**power)


def _number(axes, count: int, most: int) -> None:
    """Numbers the columns from 0, at most so many of them."""
    axes.set_xticks(range(0, count, _every(count, most)))


def _name_layers(axes, names: list[str], across: bool = False) -> None:
    """Names the rows, or the columns, by round numbers, as many as fit; the first of a stack goes before the last of the one above."""
    every = _every(len(names), max(150 // (7 * (1 + max(map(len, names)))), 1) if across else 7)
    places = []
    for place in reversed(range(len(names))):
        if int(names[place].split()[0]) % every == 0 and (not places or places[-1] - place > every / 2):
            places.append(place)
    (axes.set_xticks if across else axes.set_yticks)(places, [names[place] for place in places])


def _numbers(values: list[float | None]) -> Tensor:
    """A list with gaps, as floats with NaN in them."""
    return torch.tensor([float("nan") if value is None else value for value in values])


def _table(rows: list[list[float | None]]) -> Tensor:
    """Rows as one matrix; shorter ones end in NaN."""
    return torch.nn.utils.rnn.pad_sequence([_numbers(row) for row in rows], batch_first=True, padding_value=float("nan"))


def _words(data: dict) -> list[str]:
    """The lines below the plots."""
    reasons = "; ".join(f"{reason} ({count})" for reason, count in data["reasons"].items())
    achieved, whole = (f"{data[name]:.1%}" for name in ("achieved_sparsity", "run_sparsity"))
    error, most = data.get("measured_error"), data.get("asked_error")
    off = "" if error is None else f", off by {percent(error)}"
    asked = f" (asked {data['asked_sparsity']:.1%})" if most is None else f" (at most {percent(most)}{' off' if error is None else ''} asked)"
    skipped = f"{achieved} skipped in sparse calls{off}{asked}, {whole} over the whole run" if data["sparse_calls"] else "nothing ran sparse"
    calls = f"{data['sparse_calls']} sparse, {data['dense_calls']} dense calls" + (f" of {data['tokens']} tokens" if data["tokens"] else "")
    steps = f"{data['steps']} step" + ("" if data["steps"] == 1 else "s")
    backend = f", backend {data['backend']}" if data["backend"] else ""
    on = f" on {data['model']}" if data["model"] else ""
    lines = [f"{data['method']}{on}, {data['outcome']}", skipped, f"{calls}, {steps}{backend}"]
    lines += [f"dense: {reasons}"] if reasons else []
    if any(value is None for row in data["sparsity_by_layer_and_step"] for value in row):
        lines.append("white in the first panel: no call of that layer came in that step")
    lines += data["notes"]
    wrapped = [part for line in lines for part in textwrap.wrap(line, _LETTERS, subsequent_indent="   ")]
    more = len(wrapped) - _MOST_LINES
    return wrapped if more <= 0 else [*wrapped[: _MOST_LINES - 1], f"... and {more + 1} more lines, all of which are in the JSON"]


def _rendered(figure) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return (pixels.view(height, width, 4)[None, ..., :3].float() / 255).contiguous()
