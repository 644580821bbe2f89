"""A run's plans as something to keep: what a method found, by layer and condition, and which model and video it belongs to.

Conditions are named anew in every run, so a plan belongs to a role: "0" the positive prompt, "1" the negative one, as hosts
count them, then "0.1" for a second positive one. A plan holds from the noise level that it was found at, so that another
number of steps finds its way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import VideoLayout

SCHEMA = 1
POSITIVE = "0"
_SAME_SIGMA = 1e-4  # sigmas went through other dtypes
_MOST_TOKENS = 1 << 31
# Of a run's finds beyond the first of each layer and condition: AdaSpa's may be searched for at every step.
MOST_KEPT_BYTES = 1 << 30


class Role(NamedTuple):
    """Which condition of a run, and the latent frames of its context window, or None for all."""

    name: str
    window: tuple[int, ...] | None = None


class PlanKey(NamedTuple):
    layer: int
    stack: str
    role: Role


@dataclass(frozen=True)
class Plans:
    """The plans of one layer and condition, in the order in which they were found.

    sigmas: where each was found, falling. tensors: by name, [plans, B, H, ...] each, on the CPU.
    """

    sigmas: tuple[float, ...]
    tensors: Mapping[str, Tensor]

    @property
    def heads(self) -> int:
        return next(iter(self.tensors.values())).shape[2]

    def place_at(self, sigma: float) -> int:
        """Which plan holds at a noise level: the newest one found at or above it; the first one before any was."""
        return max(sum(found * (1 + _SAME_SIGMA) >= sigma for found in self.sigmas) - 1, 0)

    def at(self, place: int, batch: int) -> dict[str, Tensor]:
        """The tensors of one plan, [B, H, ...] each; for another batch size those of its first video serve all."""
        parts = {name: tensor[place] for name, tensor in self.tensors.items()}
        return {name: part if len(part) == batch else part[:1].expand(batch, *part.shape[1:]) for name, part in parts.items()}


@dataclass(frozen=True)
class Pattern:
    """What one run found. layers: how many the model has, where known. settings: the run's, as plain data. source: what to call it."""

    method: str
    model: str | None
    layers: int | None
    heads: int
    layout: VideoLayout
    settings: Mapping[str, Any]
    plans: Mapping[PlanKey, Plans]
    source: str = "pattern"

    def find(self, layer: int, stack: str, role: Role) -> Plans | None:
        """The plans of a condition, or of the positive one where the file has none for it."""
        for name in (role.name, POSITIVE):
            plans = self.plans.get(PlanKey(layer, stack, Role(name, role.window)))
            if plans is not None:
                return plans
        return None

    def why_not_model(self, method: str | None, model: str | None, layers: int | None) -> str | None:
        """Why it does not fit a method or a model, as the end of a sentence; None where it does. None stands for "not known"."""
        if method is not None and method != self.method:
            return f"it was made with {self.method}, this model's patch is {method}"
        if model is not None and model != self.model:
            return f"it was made for {self.model}, this model is {model}"
        if layers is not None and self.layers is not None and layers != self.layers:
            return f"it was made for a model with {self.layers} layers, this one has {layers}"
        return None

    def why_not_layout(self, layout: VideoLayout) -> str | None:
        """Why it does not fit a video, as the end of a sentence; None where it does."""
        if layout == self.layout:
            return None
        return f"it was made for another resolution or length ({self.layout}), this video is {layout}"

    def why_not_heads(self, heads: int) -> str | None:
        """Why it does not fit so many heads, as the end of a sentence; None where it does."""
        return None if heads == self.heads else f"it was made for {self.heads} heads, a call has {heads}"

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata, as a .safetensors file takes them."""
        tensors, entries = {}, []
        for number, (key, plans) in enumerate(self.plans.items()):
            entries.append({"layer": key.layer, "stack": key.stack, "role": key.role.name, "window": key.role.window, "sigmas": plans.sigmas})
            for name, tensor in plans.tensors.items():
                tensors[f"{number}.{name}"] = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
        about = {
            "schema": SCHEMA, "method": self.method, "model": self.model, "layers": self.layers, "heads": self.heads,
            "layout": asdict(self.layout), "settings": dict(self.settings), "plans": entries,
        }
        return tensors, {"sparse_attention_pattern": json.dumps(about)}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, source: str = "pattern") -> Pattern:
        """The inverse of `to_file`. Raises ValueError with a sentence for what is no pattern, or one that contradicts itself."""
        text = (metadata or {}).get("sparse_attention_pattern")
        if text is None:
            raise ValueError("it is not a file of sparse attention patterns")
        try:
            about = json.loads(text)
            if about["schema"] != SCHEMA:
                raise ValueError(f"it has form {about['schema']}, this version of the nodes reads form {SCHEMA}")
            return cls._of(about, tensors, source)
        except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError("its description is damaged") from error

    @classmethod
    def _of(cls, about: dict, tensors: Mapping[str, Tensor], source: str) -> Pattern:
        layout = VideoLayout(**{field.name: _whole(about["layout"][field.name]) for field in fields(VideoLayout)})
        if min(layout.frames, layout.height, layout.width) < 1 or layout.seq_len > _MOST_TOKENS:
            raise ValueError("its description is damaged")
        by_number: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, part = name.partition(".")
            by_number.setdefault(number, {})[part] = tensor
        plans = {}
        for number, entry in enumerate(about["plans"]):
            window = entry["window"]
            role = Role(_text(entry["role"]), None if window is None else tuple(map(_whole, window)))
            sigmas = tuple(float(sigma) for sigma in entry["sigmas"])
            parts = by_number.get(str(number), {})
            if not parts or not sigmas or any(part.dim() < 3 or len(part) != len(sigmas) or not part.numel() for part in parts.values()):
                raise ValueError("its plans are damaged or incomplete")
            if {part.shape[2] for part in parts.values()} != {about["heads"]} or len({part.shape[1] for part in parts.values()}) != 1:
                raise ValueError("its plans are damaged or incomplete")
            plans[PlanKey(_whole(entry["layer"]), _text(entry["stack"]), role)] = Plans(sigmas, parts)
        if not plans:
            raise ValueError("it holds no plan")
        layers = None if about["layers"] is None else _whole(about["layers"])
        model = None if about["model"] is None else _text(about["model"])
        return cls(_text(about["method"]), model, layers, _whole(about["heads"]), layout, dict(about["settings"]), plans, source)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a whole number from 0")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


class Roles:
    """The roles of a run's conditions, in the order in which they come."""

    def __init__(self):
        self._names: dict[str, str] = {}
        self._counts: dict[int, int] = {}

    def add(self, identity: str, number: int) -> None:
        """A condition by its name in this run, and the host's number for its kind: 0 positive, 1 negative."""
        if identity not in self._names:
            count = self._counts[number] = self._counts.get(number, -1) + 1
            self._names[identity] = f"{number}.{count}" if count else str(number)

    def of(self, condition: Any) -> Role:
        """The role of a condition, (name, frames of its window or None)."""
        identity, window = condition if isinstance(condition, tuple) and len(condition) == 2 else (str(condition), None)
        return Role(self._names.get(identity, POSITIVE), window)


@dataclass(frozen=True)
class Kept:
    """One find of a run that is to be saved: tensors [B, H, ...]."""

    key: PlanKey
    layout: VideoLayout
    sigma: float
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Keeping:
    """The finds of a run that are to outlive it."""

    def __init__(self):
        self._finds: dict[PlanKey, list[Kept]] = {}
        self._bytes = 0

    def add(self, find: Kept) -> bool:
        """Takes a find, or says that there is no room. The first of each layer and condition is always taken."""
        if find.key in self._finds and self._bytes + find.nbytes > MOST_KEPT_BYTES:
            return False
        self._bytes += find.nbytes
        self._finds.setdefault(find.key, []).append(find)
        return True

    def pattern(self, method: str, model: str | None, layers: int | None, layout: VideoLayout, settings: Mapping[str, Any]) -> Pattern | None:
        """The finds of one layout as a pattern, on the CPU; None where there are none."""
        plans = {}
        heads = None
        for key, finds in self._finds.items():
            finds = [find for find in finds if find.layout == layout]
            if not finds:
                continue
            newest = _shapes(finds[-1])  # batch and heads of the newest call count
            finds = [find for find in finds if _shapes(find) == newest]
            tensors = {name: torch.stack([find.tensors[name].cpu() for find in finds]) for name in newest}
            plans[key] = Plans(tuple(find.sigma for find in finds), tensors)
            heads = plans[key].heads
        plans = {key: each for key, each in plans.items() if each.heads == heads}
        return Pattern(method, model, layers, heads, layout, settings, plans) if heads else None


def _shapes(find: Kept) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in find.tensors.items()}
