"""What is known about one attention call, and the answer when it has to stay dense."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from .layout import VideoLayout


@dataclass(frozen=True)
class Dense:
    """This call runs dense, and why, as a sentence for the person.

    `planned` tells a choice (warm-up, a dense layer) from something that stood in the way; `strict` raises for the
    latter. output: the dense output [B, H, S, D], where finding a plan computed it on the way. otherwise: how the call runs
    instead; another word than "dense" where `strict` alone stands in the way.
    """

    reason: str
    planned: bool = False
    output: Tensor | None = None
    otherwise: str = "dense"


@dataclass(frozen=True)
class AttentionCall:
    """One self-attention call of a video model, for one condition.

    q, k, v: [B, H, S, D] views. key_bias: [B or 1, S] or None. scale: None is 1/sqrt(D).
    layer: number in execution order; stack: which of those that bear the number, where several do. step: index into the
    run's sigmas. condition: a name that stays the same through the run for the same prompt and context window.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: VideoLayout
    layer: int
    step: int
    condition: Hashable
    scale: float | None = None
    key_bias: Tensor | None = None
    stack: str = ""
