"""Which steps and layers of a run stay dense. Steps are told from sigmas, never by counting calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .words import shortened

# Samplers hand back sigmas that went through other dtypes and devices.
SAME_SIGMA = 1e-4


def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """Ranges of layers from "0-2, -1": inclusive pairs, negative numbers counted from the end.

    Raises ValueError naming the part that does not parse.
    """
    ranges = []
    for part in text.split(","):
        if not part.strip():
            continue
        found = re.fullmatch(r"\s*(-?\d{1,9})\s*(?:-\s*(-?\d{1,9})\s*)?", part)
        if not found:
            raise ValueError(f'dense_layers: cannot read "{shortened(part.strip())}"; write numbers and ranges, as in "0-2, -1"')
        first = int(found.group(1))
        last = first if found.group(2) is None else int(found.group(2))
        if (first < 0) == (last < 0) and last < first:
            raise ValueError(f'dense_layers: "{part.strip()}" runs backwards')
        ranges.append((first, last))
    return tuple(ranges)


def in_layers(layer: int, ranges: Sequence[tuple[int, int]], layers: int | None) -> bool:
    """Whether `layer` lies in the ranges. Negative ends count only where the number of layers is known."""
    for first, last in ranges:
        if layers is None and (first < 0 or last < 0):
            continue
        low = first if first >= 0 else layers + first
        high = last if last >= 0 else layers + last
        if low <= layer <= high:
            return True
    return False


def without_layers(ranges: Sequence[tuple[int, int]], layers: int | None) -> list[str]:
    """The ranges, as a person writes them, that none of a model's layers is in; none where the number of layers is not known."""
    empty = [(first, last) for first, last in ranges if layers and not any(in_layers(layer, [(first, last)], layers) for layer in range(layers))]
    return [str(first) if first == last else f"{first}-{last}" for first, last in empty]


@dataclass(frozen=True)
class Schedule:
    """One run's steps: the first `warmup` and the last `end` of `steps` are dense; a refresh is due at `refresh_at`.

    sigmas: the run's own, steps + 1 of them, falling.
    """

    sigmas: tuple[float, ...]
    warmup: int
    end: int
    refresh_at: int | None

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    def step_of(self, sigma: float) -> int:
        """The step that a sigma belongs to: the last one that starts at or above it."""
        step = 0
        for index in range(self.steps):
            if self.sigmas[index] * (1 + SAME_SIGMA) >= sigma:
                step = index
        return step

    def is_warmup(self, step: int) -> bool:
        return step < self.warmup

    def is_end(self, step: int) -> bool:
        return step >= self.steps - self.end

    def sparse_after(self, step: int) -> bool:
        """Whether a step after this one may be sparse: what is found in this one is of use only then."""
        return max(step + 1, self.warmup) < self.steps - self.end
