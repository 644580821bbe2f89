"""What a person sets on a patch node, checked. The host does not check what comes through its API, so this does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .schedule import parse_layers
from .words import shortened

BACKEND_CHOICES = ("auto", "triton", "torch", "reference")
PRECISION_CHOICES = ("auto", "int8", "fp8")
MOST_SPARSITY = 0.95
# What stands for "as the model needs it".
AUTOMATIC = -1
AUTOMATIC_LAYERS = "auto"


@dataclass(frozen=True)
class Automatic:
    """What automatic settings come to for a model.

    sparsity: 0 to 0.95. warmup: the share of the schedule that stays dense at the start, as the model's percent_to_sigma takes
    it. dense_layers: as in MethodConfig. min_tokens: None is what was measured for the device.
    """

    sparsity: float
    warmup: float = 0.2
    dense_layers: str = ""
    min_tokens: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """The knobs that every method has.

    sparsity: the share of query-key pairs skipped, 0 to 0.95; -1 is automatic. More is faster and further from dense attention.
    warmup_steps: how many first steps stay dense; -1 is automatic. More keeps the layout of the scene nearer to dense.
    cache_refresh: how often what was found is looked for anew: -1 the method's own way, 0 never, N every N steps.
    dense_layers: layers that stay dense, as "0-2, -1", in execution order; "auto" is automatic.
    end_steps: how many last steps stay dense.
    min_tokens: shorter sequences stay dense; -1 is automatic.
    backend: auto, triton, torch or reference. strict: an error rather than a fall back to dense, to another precision, or on a GPU to torch.
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
        if self.sparsity != AUTOMATIC or isinstance(self.sparsity, bool):
            self._number("sparsity", 0.0, MOST_SPARSITY, "-1 for automatic")
        for name, low in (("warmup_steps", -1), ("cache_refresh", -1), ("end_steps", 0), ("min_tokens", -1)):
            self._number(name, low, math.inf, whole=True)
        self._choice("backend", BACKEND_CHOICES)
        self._choice("precision", PRECISION_CHOICES)
        self._flag("strict")
        if not isinstance(self.dense_layers, str):
            raise ValueError(f"dense_layers: {shortened(repr(self.dense_layers))} is not text")
        if self.dense_layers.strip() != AUTOMATIC_LAYERS:
            parse_layers(self.dense_layers)

    def resolved(self, automatic: Automatic) -> MethodConfig:
        """The same with this model's figures for what is automatic; warm-up stays, since it needs the run's sigmas."""
        return replace(
            self,
            sparsity=automatic.sparsity if self.sparsity == AUTOMATIC else self.sparsity,
            dense_layers=automatic.dense_layers if self.dense_layers.strip() == AUTOMATIC_LAYERS else self.dense_layers,
            min_tokens=automatic.min_tokens if self.min_tokens == AUTOMATIC and automatic.min_tokens is not None else self.min_tokens,
        )

    def _number(self, name: str, low: float, high: float, or_else: str = "", whole: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        # NaN fails every comparison, so it is refused with the rest.
        if not number or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            limit = f"from {low:g}" + (f" to {high:g}" if high < math.inf else " up")
            raise ValueError(f"{name}: {shortened(repr(value))} is not {kind} {limit}" + (f", or {or_else}" if or_else else ""))

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name}: {shortened(repr(getattr(self, name)))} is not on or off")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: {shortened(repr(value))} is not one of {', '.join(choices)}")
