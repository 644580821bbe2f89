"""A record as a picture: an IMAGE tensor [1, height, width, 3] in 0 to 1."""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

# Inches: narrow, so that words of 10 points stay readable where a node shows the picture 512 pixels wide.
_WIDTH, _PLOTS, _LINE, _EDGE = 6.0, 3.4, 0.175, 0.1
_DPI = 160
_LETTERS = 76  # of a line of words


def draw(data: dict) -> Tensor:
    """The picture of a record in its JSON form: skipped share by layer and step, what the method found, and the figures in words."""
    lines = _words(data)
    words = _LINE * len(lines) + _EDGE
    height = _PLOTS + words
    figure = _figure(height)
    if figure is None:
        return _blank()
    figure.get_layout_engine().set(rect=(0, words / height, 1, _PLOTS / height))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _layers_and_steps(figure, left, data)
    _findings(figure, right, data)
    figure.text(_EDGE / _WIDTH, words / height, "\n".join(lines), va="top", fontsize=10).set_in_layout(False)
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
