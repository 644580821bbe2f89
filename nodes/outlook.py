"""What a person is told before a run: tokens, layers, what will be sparse, and what that is likely to gain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import cost
from ..attention.config import MethodConfig
from ..attention.dispatch import least_tokens
from ..attention.schedule import in_layers, parse_layers
from ..attention.session import Session
from . import host
from .model_row import VideoModel, grid_of
from .video_models import find, latent_shape, network_of

# Weights that tokens of the video do not pass: of modulation, embeddings, text and other streams, and of the keys and values of cross-attention.
_NOT_PER_TOKEN = re.compile(
    r"mod|adaln|ada_|time|emb|context|txt|text|caption|audio|vace|face|motion|music|refiner|connector|cross_attn\.(k|v)|attn2\.to_(k|v)|final|head\.",
)
# From this share of a step on it is not attention's share that makes a run not worth it.
_MUCH = 0.3
# What a video of today has at low and at high resolution; for the line at the node, where no video is known yet.
_EXAMPLES = (16_384, 65_536)


@dataclass(frozen=True)
class Prospect:
    """A model on a device, as the cost model needs it. device, dtype: where and in what it will run."""

    row: VideoModel
    network: Any
    device: torch.device
    dtype: torch.dtype
    layers: int
    heads: int
    head_dim: int
    weights: int

    def step(self, tokens: int) -> cost.Step:
        return cost.Step(tokens, self.layers, self.heads * self.head_dim, self.weights)

    def rates(self, backend: str) -> cost.Rates:
        """Raises what the device raises where it cannot measure."""
        attention, name = host.dense_attention()
        return cost.rates_of(self.device, self.dtype, self.head_dim, attention, name, backend)


def prospect_of(patcher: Any) -> Prospect | None:
    """What is known of a model before it runs; None where its row does not say how its attention is made."""
    network = network_of(patcher)
    row = find(network)
    layers = row.layers(network) if row.heads is not None else None
    if not layers:
        return None
    weights = sum(part.numel() for name, part in network.named_parameters() if part.dim() == 2 and not _NOT_PER_TOKEN.search(name))
    return Prospect(row, network, torch.device(patcher.load_device), host.compute_dtype(patcher), layers, *row.heads(network), weights)


def _quiet(tell: Callable[[], str | None]) -> str | None:
    """A line that cannot be reckoned is left out: it is no reason to lose a video."""
    try:
        return tell()
    except Exception:
        host.log.debug("no outlook", exc_info=True)
        return None


def at_the_node(patcher: Any, name: str, config: MethodConfig) -> str | None:
    """The line when the node is executed: no video is known yet."""
    def tell() -> str | None:
        prospect = prospect_of(patcher)
        if prospect is None:
            return None
        rates = prospect.rates(config.backend)
        shares = ", ".join(f"{prospect.step(tokens).attention_share(rates):.0%} at {tokens:,}" for tokens in _EXAMPLES)
        least = least_tokens(config, prospect.device)
        line = f"{name} · {prospect.row.name}, {prospect.layers} layers · attention is about {shares} tokens of a step here"
        return f"{line} · not worth it below {least:,} tokens, which stay dense" if least else line

    return _quiet(tell)


def at_the_start(patcher: Any, session: Session, noise: Tensor, *args: Any, latent_shapes: list | None = None, **kwargs: Any) -> str | None:
    """The line when sampling starts, from what OUTER_SAMPLE is given. The gain goes on record."""
    def tell() -> str | None:
        latent = latent_shape(noise, {"latent_shapes": latent_shapes})
        if len(latent) != 5:
            return None
        name, config, schedule = session.method.NAME, session.config, session.schedule
        prospect = prospect_of(patcher)
        if prospect is None:
            return None
        tokens = math.prod(grid_of(latent, prospect.row.patch(prospect.network)))
        least = least_tokens(config, prospect.device)
        start = f"{name} starts · {tokens:,} video tokens, {prospect.layers} layers"
        if tokens < least:
            return f"{start} · not worth it: below {least:,} tokens (min_tokens), its text counted, calls stay dense"
        ranges = parse_layers(config.dense_layers)
        dense_layers = sum(in_layers(layer, ranges, prospect.layers) for layer in range(prospect.layers))
        sparse_steps = max(0, schedule.steps - schedule.warmup - schedule.end)
        if not sparse_steps:
            return f"{start} · no step is left for sparse attention: use more steps, or lower warmup_steps or end_steps"
        start += f" · {prospect.layers - dense_layers} of them sparse in up to {sparse_steps} of {schedule.steps} steps"
        rates = prospect.rates(config.backend)
        unknown = config.sparsity < 0  # what a fidelity leaves: the most that it could be bounds the gain
        gain = cost.expected_gain(prospect.step(tokens), rates, 1.0 if unknown else config.sparsity, schedule.steps, sparse_steps, dense_layers)
        share = f"attention is about {gain.attention_share:.0%} of a step here"
        if not unknown:
            session.record.expected = gain
        if gain.high < cost.WORTH:
            return f"{start} · hardly worth it: {share}{_but(gain.attention_share, sparse_steps / schedule.steps)}"
        if unknown:
            found = "is what the loaded pattern has" if session.pattern is not None else "is found in the search"
            return f"{start} · {share} · how much is skipped {found}"
        low, high = (f"{max(1.0, value):.1f}" for value in (gain.low, gain.high))
        expect = f"{low} to {high}" if low != high else f"about {high}"
        return f"{start} · {share}: expect {expect} times the speed (reckoned from the model's size and speeds measured on this device)"

    return _quiet(tell)


def _but(attention_share: float, steps_share: float) -> str:
    """Why little is gained though attention is much of a step."""
    if attention_share <= _MUCH:
        return ""
    if steps_share < _MUCH:
        return ", but few of the steps can be sparse"
    return ", but sparse calls were measured to be hardly faster than dense ones"
