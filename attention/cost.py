"""What a run is likely to gain, before it starts: a model of the cost of a step, with speeds measured on the device.

A self-attention layer multiplies queries with keys and weights with values: 4 S^2 W operations for S tokens of width
W = heads x head_dim. Everything else multiplies each token with the weights of its block: 2 S P operations, P the
weights that a token passes. Both are turned into seconds by rates that are measured once a process for each device,
dtype and head_dim, with the attention that dense calls take there; the gain of sparse calls is measured with them.

What this leaves out (norms, rotations, modulation, the text's share, planning) is the range: LEFT_OUT more work beside
attention, and sparse calls slower by LEFT_OUT, make its lower end. The upper end leaves nothing out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask
from .budget import BLOCK_K, BLOCK_Q

# A share of the work: what the model does not count. Our choice, wide on purpose.
LEFT_OUT = 0.25
# Below this gain a run is called hardly worth it.
WORTH = 1.05
# Sizes of the measurement: enough work that a launch does not count, little enough that nobody waits.
_TOKENS = {"cpu": 2048, "gpu": 8192}
_HEADS = {"cpu": 2, "gpu": 8}
_WIDTH = {"cpu": 512, "gpu": 4096}
_DENSITY = 0.25
_REPEATS = 5

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rates:
    """Speeds of one device for one dtype and head_dim.

    attention, matmul: operations a second, dense. sparse: the share of the ideal gain, 1 / density, that sparse attention reaches.
    """

    attention: float
    matmul: float
    sparse: float


@dataclass(frozen=True)
class Step:
    """The work of one evaluation for one video: S tokens, layers of width W, P weights that each token passes."""

    tokens: int
    layers: int
    width: int
    weights: int

    def seconds(self, rates: Rates) -> tuple[float, float]:
        """(attention, everything else), dense."""
        return self.layers * 4 * self.tokens**2 * self.width / rates.attention, 2 * self.tokens * self.weights / rates.matmul

    def attention_share(self, rates: Rates) -> float:
        """Attention's share of a dense step, 0 to 1."""
        attention, rest = self.seconds(rates)
        return attention / (attention + rest)


@dataclass(frozen=True)
class Gain:
    """What a run gains over a dense one: from `low` to `high` times as fast. attention_share: of a dense step."""

    attention_share: float
    low: float
    high: float


def expected_gain(step: Step, rates: Rates, sparsity: float, steps: int, sparse_steps: int, dense_layers: int = 0) -> Gain:
    """The gain of a run of `steps`, of which `sparse_steps` skip `sparsity` of the attention in all but `dense_layers` layers."""
    attention, rest = step.seconds(rates)
    dense = dense_layers / step.layers if step.layers else 0.0

    def gain(more_rest: float, efficiency: float) -> float:
        beside = rest * (1 + more_rest)
        sparse = attention * (dense + (1 - dense) * min(1.0, (1 - sparsity) / efficiency))
        return steps * (attention + beside) / ((steps - sparse_steps) * (attention + beside) + sparse_steps * (sparse + beside))

    return Gain(step.attention_share(rates), gain(LEFT_OUT, rates.sparse * (1 - LEFT_OUT)), gain(0.0, rates.sparse))


_measured: dict[tuple, Rates] = {}
_lock = threading.Lock()


def rates_of(device: torch.device, dtype: torch.dtype, head_dim: int, attention: Attention, name: str, backend: str = "auto") -> Rates:
    """The rates of a device, measured on first use.

    attention(q, k, v) [B, H, S, D] -> any layout: what dense calls take; name: of it, since another has other rates.
    Raises whatever the device raises where it cannot run it.
    """
    key = (str(device), dtype, head_dim, name, backend)
    with _lock:
        if key not in _measured:
            with torch.no_grad():
                _measured[key] = _measure(device, dtype, head_dim, attention, backend)
        return _measured[key]


def _measure(device: torch.device, dtype: torch.dtype, head_dim: int, attention: Attention, backend: str) -> Rates:
    kind = "cpu" if device.type == "cpu" else "gpu"
    tokens, heads, width = _TOKENS[kind], _HEADS[kind], _WIDTH[kind]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (random(1, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
    x, weight = random(tokens, width), random(width, width)
    columns = tokens // BLOCK_K
    kept = max(1, round(columns * _DENSITY))
    order = torch.rand(1, heads, tokens // BLOCK_Q, columns, generator=generator).argsort(-1)
    mask = BlockMask.from_blocks((order < kept).to(device), BLOCK_Q, BLOCK_K, tokens, tokens)
    dense = _seconds(lambda: attention(q, k, v), device)
    matmul = _seconds(lambda: x @ weight, device)
    sparse = _seconds(lambda: kernels.block_sparse_attention(q, k, v, mask, backend=backend), device)
    operations = 4 * tokens**2 * heads * head_dim
    return Rates(operations / dense, 2 * tokens * width**2 / matmul, min(1.0, dense * kept / columns / sparse))


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of a call at its quickest, after one that compiles and warms up: other work on the machine only ever adds."""
    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_REPEATS))
