"""Queries, keys and values as video models have them: the trained model's own, and made-up ones with their hard traits."""

from __future__ import annotations

import torch
from pack.attention.layout import VideoLayout
from pack.demo.attention_call import make_tensors
from pack.demo.clips import load_clips, start_noise
from pack.demo.embedded import EmbeddedHost, SparseSelfAttention
from pack.demo.runs import Job


class _Catcher(SparseSelfAttention):
    """Keeps what a layer's self-attention is called with, and computes it dense."""

    def __init__(self, layer: int, caught: list):
        super().__init__(None, None, layer)
        self.caught = caught

    def _attend(self, q, k, v):
        self.caught.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@torch.inference_mode()
def trained_qkv(sigma: float) -> tuple[VideoLayout, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """What each layer of the demo's model attends with, float32 [1, 4, 4992, 64], on a clip with so much noise on it."""
    host, job = EmbeddedHost(), Job(load_clips(1), 4, 0)
    clean, caught = job.clips.latents, []
    for layer, block in enumerate(host.model.blocks):
        block.attn1.set_processor(_Catcher(layer, caught))
    host._predict(job, (1 - sigma) * clean + sigma * start_noise(tuple(clean.shape), 0), sigma)
    return job.layout, caught


def _plain(q, k, v, generator):
    return q, k, v


def _key_mean(q, k, v, generator):
    """A mean over the keys that is ten times what tells them apart."""
    return q, k + 10 * k.std() * torch.randn(1, k.shape[1], 1, k.shape[3], generator=generator), v


def _outlier_channels(q, k, v, generator):
    """Two channels of q and k, and one of v, ten times as large as the others."""
    q, k, v = q.clone(), k.clone(), v.clone()
    k[..., 5] *= 10
    q[..., 40] *= 10
    v[..., 17] *= 10
    return q, k, v


def _outlier_tokens(q, k, v, generator):
    """One key in a hundred five times as large, as sinks are."""
    large = torch.where(torch.rand(1, k.shape[1], k.shape[2], 1, generator=generator) < 0.01, 5.0, 1.0)
    return q, k * large, v


def _value_mean(q, k, v, generator):
    """A mean over the values that is three times what tells them apart."""
    return q, k, v + 3 * torch.randn(1, v.shape[1], 1, v.shape[3], generator=generator)


STRUCTURES = {
    "plain": _plain, "key mean": _key_mean, "outlier channels": _outlier_channels, "outlier tokens": _outlier_tokens, "value mean": _value_mean,
}  # fmt: skip


def structured_qkv(name: str, layout: VideoLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, float32 [1, 4, S, 64]: heads that look around in their frame and heads that look along time, with a trait."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = make_tensors(layout)
    # A video's values change smoothly from token to token, so an average over neighbours is no noise.
    smooth = q @ torch.randn(1, 4, 64, 64, generator=generator) / 8
    return STRUCTURES[name](q, k, 0.5 * v + smooth * v.std() / smooth.std(), generator)
