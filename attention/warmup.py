"""How long a run warms up and when it searches again, where nobody says: from its sigmas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .schedule import SAME_SIGMA, Schedule

# The paper's schedules are shares of the run: AdaSpa searches at steps 10 and 30 of 50 (section 4.3).
WARMUP_PERCENT = 0.2
REFRESH_PERCENT = 0.6
# A run this short spends exactly one step on warm-up: more would eat the gain.
FEW_STEPS = 8


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
        if sigmas[0] >= sigma_max * (1 - 1e-3):
            warmup = 1 if steps <= FEW_STEPS else max(warmup, 1)
    else:
        warmup = warmup_steps
    # The paper re-searches in the last step above its share, as its first search is in the last warm-up step.
    threshold = percent_to_sigma(REFRESH_PERCENT)
    above = sum(sigma > threshold * (1 + SAME_SIGMA) for sigma in sigmas[:steps])
    return Schedule(sigmas, max(min(warmup, steps), least_warmup), end_steps, above - 1 if above else None)
