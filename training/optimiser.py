"""Muon for the blocks' matrices, Adam for all else; plain functions of tensors, so that a checkpoint is a dictionary.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ : a step's direction is the momentum with all its singular values
brought near to 1, by five iterations of a quintic. Matrices of one shape go through it together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.99), 1e-9
# Matrices that go through the iterations together.
_TOGETHER = 6


class Optimiser:
    """Steps of a model. Rates are handed to `step`, so that a schedule needs no state here."""

    def __init__(self, model: nn.Module):
        named = dict(model.named_parameters())
        self.matrices = {name: weight for name, weight in named.items() if by_muon(name)}
        self.others = {name: weight for name, weight in named.items() if not by_muon(name)}
        self.count = 0
        self.momentum = {name: torch.zeros_like(weight) for name, weight in named.items()}
        self.square = {name: torch.zeros_like(weight) for name, weight in self.others.items()}

    @torch.no_grad()
    def step(self, muon_rate: float, adam_rate: float, spread: Callable = map) -> None:
        """spread: `map`, or that of threads to share the matrices among."""
        self.count += 1
        shapes: dict[torch.Size, list[str]] = {}
        for name, weight in self.matrices.items():
            shapes.setdefault(weight.shape, []).append(name)
        groups = [names[start : start + _TOGETHER] for names in shapes.values() for start in range(0, len(names), _TOGETHER)]
        for names, directions in zip(groups, spread(self._directions, groups), strict=True):
            for name, direction in zip(names, directions, strict=True):
                rows, columns = direction.shape
                self.matrices[name].sub_(direction, alpha=muon_rate * max(1.0, rows / columns) ** 0.5)
        for name, weight in self.others.items():
            first, second = self.momentum[name], self.square[name]
            first.lerp_(weight.grad, 1 - BETAS[0])
            second.lerp_(weight.grad.square(), 1 - BETAS[1])
            corrected = (second / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPS)
            weight.addcdiv_(first, corrected, value=-adam_rate / (1 - BETAS[0] ** self.count))

    @torch.no_grad()
    def _directions(self, names: list[str]) -> Tensor:
        """Where Muon goes with matrices of one shape, [N, rows, columns]; their momentum moves on."""
        gradients = torch.stack([self.matrices[name].grad for name in names])
        momenta = torch.stack([self.momentum[name].lerp_(gradient, 1 - MOMENTUM) for name, gradient in zip(names, gradients, strict=True)])
        return orthogonal(gradients.lerp(momenta, MOMENTUM))  # Nesterov's

    def state_dict(self) -> dict:
        return {"count": self.count, "momentum": self.momentum, "square": self.square}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for mine, stored in ((self.momentum, state["momentum"]), (self.square, state["square"])):
            for name, tensor in mine.items():
                tensor.copy_(stored[name])


def by_muon(name: str) -> bool:
    """Whether Muon steps a parameter: matrices of the blocks that see every video token's channels."""
    return name.startswith("blocks.") and name.endswith(".weight") and (".self_attn." in name or ".ffn." in name) and "norm" not in name


def orthogonal(matrices: Tensor) -> Tensor:
    """Each with its singular values brought near to 1 (0.7 to 1.2), float32 [N, rows, columns]; computed in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
