"""What a person sets on a patch node, checked. The host does not check what comes through its API, so this does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedule import parse_layers

BACKEND_CHOICES = ("auto", "triton", "torch", "reference")
PRECISION_CHOICES = ("auto", "int8", "fp8")
MOST_SPARSITY = 0.95


@dataclass(frozen=True)
class MethodConfig:
    """The knobs that every method has.

    sparsity: the share of query-key pairs skipped, 0 to 0.95. More is faster and further from dense attention.
    warmup_steps: how many first steps stay dense; -1 is automatic. More keeps the layout of the scene nearer to dense.
    cache_refresh: how often what was found is looked for anew: -1 the method's own way, 0 never, N every N steps.
    dense_layers: layers that stay dense, as "0-2, -1", in execution order.
    end_steps: how many last steps stay dense.
    min_tokens: shorter sequences stay dense; -1 is automatic.
    backend: auto, triton, torch or reference. strict: an error rather than a fall back to dense, or to another precision.
    precision: of sparse calls; auto is the tensors' own, int8 takes Q times K in 8 bits, fp8 the weights times V too. Where it
    cannot be had, the call runs in the tensors' own and the run's notes say why.
    Raises ValueError naming the knob.
    """

    sparsity: float = 0.8
    warmup_steps: int = -1
    cache_refresh: int = -1
    dense_layers: str = ""
    end_steps: int = 0
    min_tokens: int = -1
    backend: str = "auto"
    strict: bool = False
    precision: str = "auto"

    def __post_init__(self):
        self._number("sparsity", 0.0, MOST_SPARSITY)
        for name, low in (("warmup_steps", -1), ("cache_refresh", -1), ("end_steps", 0), ("min_tokens", -1)):
            self._number(name, low, math.inf, whole=True)
        self._choice("backend", BACKEND_CHOICES)
        self._choice("precision", PRECISION_CHOICES)
        self._flag("strict")
        if not isinstance(self.dense_layers, str):
            raise ValueError(f"dense_layers: {self.dense_layers!r} is not text")
        parse_layers(self.dense_layers)

    def _number(self, name: str, low: float, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        # NaN fails every comparison, so it is refused with the rest.
        if not number or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            limit = f"from {low:g}" + (f" to {high:g}" if high < math.inf else " up")
            raise ValueError(f"{name}: {value!r} is not {kind} {limit}")

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name}: {getattr(self, name)!r} is not on or off")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
