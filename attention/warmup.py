"""How long a run warms up and when it searches again, where nobody says: from its sigmas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .config import MethodConfig
from .schedule import SAME_SIGMA, Schedule

# The paper's schedules are shares of the run: AdaSpa searches at steps 10 and 30 of 50 (section 4.3).
WARMUP_PERCENT = 0.2
REFRESH_PERCENT = 0.6
# A run this short spends at most one step on warm-up: more of them would have to be paid for with more sparsity in the others, which costs
# more than they bring (docs/FIDELITY.md, "Few steps").
FEW_STEPS = 8
# Runs that `without_warmup` was measured on.
_SPREAD = range(4, FEW_STEPS + 1)


def make_schedule(
    sigmas: Sequence[float], percent_to_sigma: Callable[[float], float], sigma_max: float,
    warmup_steps: int = -1, end_steps: int = 0, least_warmup: int = 0, warmup_percent: float = WARMUP_PERCENT,
) -> Schedule:
    """The schedule of a run.

    sigmas: the run's, falling. percent_to_sigma: the model's (0 is full noise, 1 is none). sigma_max: the model's.
    warmup_steps: -1 is automatic: the steps above warmup_percent; at least one when the run starts at full noise, exactly
    one then where it has 8 steps or fewer; none in a second stage that starts below. N is this run's first N.
    least_warmup: what a method needs at least.
    """
    sigmas = tuple(float(sigma) for sigma in sigmas)
    steps = max(len(sigmas) - 1, 1)
    if warmup_steps < 0:
        threshold = percent_to_sigma(warmup_percent)
        warmup = sum(sigma > threshold * (1 + SAME_SIGMA) for sigma in sigmas[:steps])
        if _is_from_full_noise(sigmas, sigma_max):
            warmup = 1 if steps <= FEW_STEPS else max(warmup, 1)
    else:
        warmup = warmup_steps
    # The paper re-searches in the last step above its share, as its first search is in the last warm-up step.
    threshold = percent_to_sigma(REFRESH_PERCENT)
    above = sum(sigma > threshold * (1 + SAME_SIGMA) for sigma in sigmas[:steps])
    return Schedule(sigmas, max(min(warmup, steps), least_warmup), end_steps, above - 1 if above else None)


def without_warmup(config: MethodConfig, sigmas: Sequence[float], sigma_max: float) -> MethodConfig:
    """The settings of a run of few steps with its one warm-up step exchanged for less sparsity: as much of the run is skipped.

    The same settings where the run is longer, or starts below full noise. For methods that need no warm-up, where both knobs are automatic.
    """
    steps = len(sigmas) - 1
    sparse = steps - config.end_steps
    if steps not in _SPREAD or sparse < 2 or not _is_from_full_noise(sigmas, sigma_max):
        return config
    return replace(config, warmup_steps=0, sparsity=round(config.sparsity * (sparse - 1) / sparse, 3))


def _is_from_full_noise(sigmas: Sequence[float], sigma_max: float) -> bool:
    return sigmas[0] >= sigma_max * (1 - 1e-3)
