"""What a trained model is worth as a yardstick: its videos against the true clips, and what its attention looks like.

Dimensions: N windows, H heads, S tokens, Q and K blocks of 128 queries and 64 keys.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from pack import kernels
from pack.attention.layout import VideoLayout
from pack.attention.methods import svg
from pack.demo.clips import first_frames, model_input, start_noise, to_pixels
from pack.demo.sampler import make_sigmas, sample
from torch import Tensor

from .clips import Clips
from .model import WanVideo

BLOCK_Q, BLOCK_K = 128, 64
STEPS = 20
# The steps of a run whose attention is looked at, each on clips made as noisy as the sampler has them there.
LOOKED_AT = (4, 9, 14)
# What SVG's bands keep when it judges the heads: its default, and what the project promises of the trained model.
SPARSITIES = (0.7, 0.8)


@torch.inference_mode()
def videos(model: WanVideo, clips: Clips, steps: int = STEPS, seed: int = 0) -> Tensor:
    """Each window continued from its first frame, latents float32 [N, 16, T, H, W]: Euler, one window at a time."""
    made = []
    for latents, text in zip(clips.latents.split(1), clips.text.split(1), strict=True):
        given = first_frames(latents)

        def predict(x: Tensor, sigma: float, step: int, given: Tensor = given, text: Tensor = text) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return model(model_input(x, given), torch.full((1,), sigma, device=x.device), text)

        made.append(sample(predict, start_noise(tuple(latents.shape), seed).to(latents.device), make_sigmas(steps)))
    return torch.cat(made)


def video_figures(made: Tensor, clips: Clips) -> list[dict]:
    """A row a window: PSNR in dB against the true clip, of the model's video and of the first frame standing still; frames 1 and later."""
    rows = []
    for name, ours, true in zip(clips.names, to_pixels(made), to_pixels(clips.latents), strict=True):
        rows.append({"clip": name, "psnr_db": _psnr(ours[1:], true[1:]), "standing_still_db": _psnr(true[:1], true[1:]), "last_frame_db": _psnr(
            ours[-1], true[-1]), "last_frame_standing_still_db": _psnr(true[0], true[-1])})
    return rows


def _psnr(ours: Tensor, true: Tensor) -> float:
    return round(float(-10 * (ours - true).square().mean().log10()), 2)


@torch.inference_mode()
def attention_figures(model: WanVideo, clips: Clips, seed: int = 0) -> dict:
    """By layer and head, means over windows and the steps `LOOKED_AT`, each [layers][H].

    top_fifth: the share of a row of blocks' softmax mass that its fullest fifth of 128x64 blocks holds (0.2 where all are alike).
    temporal: how often SVG's profiling (all rows, bands at each of `SPARSITIES`) finds a head temporal; the rest is spatial.
    band_error: mean squared error of the better band's output, over the dense output's mean square. frame_0: mass on the first frame.
    """
    frames, rows, columns = (int(size) for size in clips.latents.shape[2:])
    layout = VideoLayout(frames, rows // 2, columns // 2)
    device = clips.latents.device
    bands = {sparsity: svg.Bands.build(layout, sparsity, device) for sparsity in SPARSITIES}
    sums: dict[str, Tensor] = {}
    calls = 0

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        q, k, v = (part.float() for part in (q, k, v))
        out, lse = kernels.attention_with_lse(q, k, v)
        mass = kernels.block_mass(q, k, lse, BLOCK_Q, BLOCK_K)  # [1, H, Q, K]
        share = mass / mass.sum(-1, keepdim=True)
        found = {
            "top_fifth": top_fifth(share).mean((0, 2)),
            "frame_0": _frame_0(share, layout),
        }
        rows = svg.sampled_rows(seed, calls, layer, 256, q.shape[2]).to(q.device)
        power = out.square().mean((0, 2, 3))
        for sparsity, band in bands.items():
            errors = kernels.sampled_errors(q, k, v, rows, band.candidates())[:, 0]  # [2, H]
            found[f"temporal_at_{sparsity}"] = (errors[svg.TEMPORAL] < errors[svg.SPATIAL]).float()
            found[f"band_error_at_{sparsity}"] = errors.min(0).values / power
        for name, values in found.items():
            sums.setdefault(name, torch.zeros(len(model.blocks), values.numel()))[layer] += values.cpu()

    sigmas = make_sigmas(STEPS)
    with _watched(model, look):
        for number, (latents, text) in enumerate(zip(clips.latents.split(1), clips.text.split(1), strict=True)):
            noise = start_noise(tuple(latents.shape), seed + number).to(device)
            for step in LOOKED_AT:
                sigma = float(sigmas[step])
                with torch.autocast(device.type, torch.bfloat16):
                    x = model_input((1 - sigma) * latents + sigma * noise, first_frames(latents))
                    model(x, torch.full((1,), sigma, device=device), text)
                calls += 1
    tables = {name: (total / calls) for name, total in sums.items()}
    return {
        "tokens": layout.seq_len, "layout": str(layout), "steps": list(LOOKED_AT), "windows": len(clips.names),
        "mean": {name: round(float(table.mean()), 4) for name, table in tables.items()},
        "by_layer_and_head": {name: [[round(value, 4) for value in row] for row in table.tolist()] for name, table in tables.items()},
    }


def top_fifth(share: Tensor) -> Tensor:
    """What the largest fifth of the last dimension's entries sum to; a part of the next one where a fifth is not whole."""
    largest = share.sort(-1, descending=True).values
    whole, part = divmod(share.shape[-1] / 5, 1)
    return largest[..., : int(whole)].sum(-1) + largest[..., int(whole)] * part


def _frame_0(share: Tensor, layout: VideoLayout) -> Tensor:
    """The mass on frame 0, [H]; on the blocks that lie wholly in it, where it ends inside of one."""
    return share[..., : layout.tokens_per_frame // BLOCK_K].sum(-1).mean((0, 2))


@contextmanager
def _watched(model: WanVideo, look):
    """While it lasts, `look(layer, q, k, v)` sees every self-attention call, q and k after norm and rotation."""
    for layer, block in enumerate(model.blocks):
        block.self_attn.watch = lambda q, k, v, layer=layer: look(layer, q, k, v)
    try:
        yield
    finally:
        for block in model.blocks:
            block.self_attn.watch = None
