"""Flow matching with Euler steps: x = (1 - sigma) x0 + sigma noise, and the model predicts noise - x0.

The arithmetic is that of ComfyUI's "euler" sampler and "simple" schedule, so that both hosts walk the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHIFT = 3.0
TIMESTEPS = 1000


def shifted(time: float) -> float:
    """Sigma at a time from 0 (no noise) to 1 (noise alone)."""
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def percent_to_sigma(percent: float) -> float:
    """Sigma when this share of a run, 0 to 1, is over."""
    return shifted(1 - percent)


def make_sigmas(steps: int) -> Tensor:
    """A run's sigmas from 1 to 0, float32 [steps + 1], on the model's grid of 1000 timesteps."""
    times = [(TIMESTEPS - int(step * TIMESTEPS / steps)) / TIMESTEPS for step in range(steps)]
    return torch.tensor([shifted(time) for time in times] + [0.0])


def sample(predict: Callable[[Tensor, float, int], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """The latent at the end. predict(x, sigma, step) is noise - x0, of x's shape."""
    x = noise
    for step in range(len(sigmas) - 1):
        sigma, following = sigmas[step], sigmas[step + 1]
        x0 = x - predict(x, float(sigma), step) * sigma
        x = x + (x - x0) / sigma * (following - sigma)
    return x
