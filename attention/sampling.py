"""Which rows stand for a sequence where something is judged on a sample of it."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_rows(seed: int, step: int, layer: int, count: int, total: int) -> Tensor:
    """Rows to profile, int64 [min(count, total)], one from each of equal strata: a pure function of seed, step and layer."""
    if count >= total:
        return torch.arange(total)
    mixed = 0
    for part in (seed, step, layer):
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    place = torch.rand(count, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)
    return ((torch.arange(count) + place) * (total / count)).long().clamp_(max=total - 1)
