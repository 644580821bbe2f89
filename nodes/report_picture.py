"""A record as a picture: an IMAGE tensor [1, height, width, 3] in 0 to 1."""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

_SIZE = (8.0, 6.5)  # inches: small, so that words stay readable when a node shrinks the picture
_DPI = 120


def draw(data: dict) -> Tensor:
    """The picture of a record in its JSON form: skipped share by layer and step, what the method found, and the figures in words."""
    figure = _figure()
    if figure is None:
        return _blank()
    grid = figure.add_gridspec(2, 2, height_ratios=(7, 3), width_ratios=(3, 2))
    _layers_and_steps(figure, figure.add_subplot(grid[0, 0]), data)
    _findings(figure, figure.add_subplot(grid[0, 1]), data)
    words = figure.add_subplot(grid[1, :])
    words.axis("off")
    words.text(0, 1, _words(data), va="top", fontsize=10).set_in_layout(False)
    return _rendered(figure)


def draw_message(message: str) -> Tensor:
    """A picture that says why there is nothing to show."""
    figure = _figure()
    if figure is None:
        return _blank()
    figure.text(0.5, 0.5, textwrap.fill(message, 50), ha="center", va="center", fontsize=16)
    return _rendered(figure)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor="white")


def _layers_and_steps(figure, axes, data: dict) -> None:
    values = data["sparsity_by_layer_and_step"]
    axes.set(title="Skipped share of attention", xlabel="step", ylabel="layer")
    if not values:
        axes.text(0.5, 0.5, "no call on record", ha="center", va="center", transform=axes.transAxes)
        return
    table = _table(values)
    extent = (0.5, table.shape[1] + 0.5, table.shape[0] - 0.5, -0.5)
    image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    for step in data["search_steps"]:
        axes.axvline(step + 1, color="white", linestyle=":", linewidth=1)
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="0 = dense")


def _findings(figure, axes, data: dict) -> None:
    if types := data.get("temporal_share_by_layer_and_head"):
        table = _table(list(types.values()))
        image = axes.imshow(table.numpy(), vmin=0, vmax=1, aspect="auto", cmap="coolwarm", interpolation="nearest")
        axes.set(title="Heads: spatial or temporal", xlabel="head", ylabel="layer")
        names = list(types)
        every = 1 + len(names) // 16
        axes.set_yticks(range(0, len(names), every), names[::every])
        axes.locator_params(axis="x", integer=True)
        bar = figure.colorbar(image, ax=axes)
        bar.set_ticks([0, 0.5, 1], labels=["spatial", "both", "temporal"])
    elif recall := data.get("recall_by_layer_and_head"):
        heads = [_numbers(values) for values in recall.values()]
        layers = [int(layer) for layer in recall]
        axes.fill_betweenx(layers, [float(h.min()) for h in heads], [float(h.max()) for h in heads], alpha=0.3, label="all heads")
        axes.plot([float(h.mean()) for h in heads], layers, marker="o", label="mean")
        axes.set(title="Recall by layer", xlabel="kept share of softmax mass", ylabel="layer", xlim=(0, 1.02))
        axes.invert_yaxis()
        axes.locator_params(axis="y", integer=True)
        axes.legend(loc="best")
    else:
        axes.axis("off")
        axes.text(0.5, 0.5, "nothing ran sparse", ha="center", va="center")


def _numbers(values: list[float | None]) -> Tensor:
    """A list with gaps, as floats with NaN in them."""
    return torch.tensor([float("nan") if value is None else value for value in values])


def _table(rows: list[list[float | None]]) -> Tensor:
    """Rows as one matrix; shorter ones end in NaN."""
    return torch.nn.utils.rnn.pad_sequence([_numbers(row) for row in rows], batch_first=True, padding_value=float("nan"))


def _words(data: dict) -> str:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in data["reasons"].items())
    asked, achieved, whole = (f"{data[name]:.1%}" for name in ("asked_sparsity", "achieved_sparsity", "run_sparsity"))
    skipped = f"{achieved} skipped in sparse calls (asked {asked}), {whole} over the whole run" if data["sparse_calls"] else "nothing ran sparse"
    calls = f"{data['sparse_calls']} sparse and {data['dense_calls']} dense calls" + (f" of {data['tokens']} tokens" if data["tokens"] else "")
    backend = f", backend {data['backend']}" if data["backend"] else ""
    lines = [f"{data['method']} on {data['model']}, {data['outcome']}", skipped, f"{calls}, {data['steps']} steps{backend}"]
    lines += [f"dense: {reasons}"] if reasons else []
    lines += data["notes"]
    return "\n".join(textwrap.fill(line, 105) for line in lines)


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
