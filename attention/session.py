"""The state of one sampling run: born when it starts, freed when it ends, however it ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall, Dense
from .config import MethodConfig
from .layout import VideoLayout
from .pattern import MOST_KEPT_BYTES, Keeping, Kept, Pattern, PlanKey, Roles
from .record import Figures, RunRecord
from .schedule import Schedule, parse_layers, without_layers


@dataclass
class Found:
    """What a method found for one layer and condition, and at which step. `lse` is kept while another search is due.

    place: which of a loaded pattern's plans it is, or None. again: found because the search before it had come out no better from the start.
    """

    step: int
    what: Any
    lse: Any = None
    place: int | None = None
    again: bool = False


@dataclass
class LayerState:
    """One layer of one condition on one device: what its method found, and the figures of its newest plan.

    unread: the relative L2 error of its newest sparse call, still on the device, where its method measures it, with the call's step and what was
    found for it; measured: those read back since `found` was found.
    A new shape of call starts it anew.
    """

    run: Session
    shape: tuple
    found: Found | None = None
    figures: Figures | None = None
    unread: tuple[int, Found, Tensor] | None = None
    measured: tuple[float, ...] = ()


@dataclass
class Session:
    """One run. Threads of a multi-device run share it: each has its own device in the key of its states.

    method: a module of `attention.methods`. layers: how many self-attention layers the model has, where known.
    `disabled`: why sparsity is off for the rest of the run, or None. `left_to`: why the whole run is left to another node, or
    None. `head_chunk`: heads computed at a time after
    memory ran out, or None. pattern: plans that it starts from, or None. keeping: finds that are to outlive it, or None.
    """

    method: ModuleType
    config: MethodConfig
    schedule: Schedule
    seed: int
    record: RunRecord
    layers: int | None = None
    disabled: str | None = None
    left_to: str | None = None
    head_chunk: int | None = None
    pattern: Pattern | None = field(default=None, init=False)
    keeping: Keeping | None = None
    roles: Roles = field(default_factory=Roles)
    _layout_checked: bool = False
    _states: dict[Hashable, LayerState] = field(default_factory=dict)
    _shared: dict[Hashable, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.config = self.config.resolved(self.method.AUTOMATIC)  # what its caller has not resolved for a model
        self.dense_layers = parse_layers(self.config.dense_layers)
        for part in without_layers(self.dense_layers, self.layers):
            self.note(f"dense_layers: this model has layers 0 to {self.layers - 1}, and {part} is none of them")
        self.backend = self.config.backend
        self.precision = self.config.precision
        self.first_step = self.method.first_step(self.schedule)

    def state(self, call: AttentionCall) -> LayerState:
        """What is known of this call's layer for its condition on its device."""
        key = (call.q.device, call.condition, call.layer, call.stack)
        shape = (tuple(call.q.shape), call.layout)
        with self._lock:
            known = self._states.get(key)
            if known is None or known.shape != shape:
                known = self._states[key] = LayerState(self, shape)
            return known

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What all layers share (orders, masks by layout), made once."""
        with self._lock:
            if key not in self._shared:
                self._shared[key] = make()
            return self._shared[key]

    def start_from(self, pattern: Pattern, schedule: Schedule) -> None:
        """Takes its plans from a pattern. `schedule`: the run's own where nothing has to be searched for.

        Raises ValueError where the pattern's settings are none.
        """
        settings = {name: pattern.settings[name] for name in self.method.PATTERN_SETTINGS if name in pattern.settings}
        config = replace(self.config, **settings)
        changed = ", ".join(f"{name} {value}" for name, value in settings.items() if value != getattr(self.config, name))
        self._without_pattern = self.schedule, self.config, self.first_step
        self.pattern, self.schedule, self.config, self.first_step = pattern, schedule, config, schedule.warmup
        self.record.config, self.record.warmup = config, schedule.warmup
        self._started = f"started from {pattern.source}" + (f", with its {changed}" if changed else "")
        self.note(self._started)

    def refuse_pattern(self, reason: str) -> None:
        """Goes on without the pattern. Raises RuntimeError where `strict` is set."""
        with self._lock:
            pattern, self.pattern = self.pattern, None
            if pattern is None:  # another thread was first
                return
            self.schedule, self.config, self.first_step = self._without_pattern
            self.record.config, self.record.warmup = self.config, self.schedule.warmup
            self._states.clear()
            self._shared.clear()
        self.record.withdraw(self._started)
        self.say_refused(pattern, reason)

    def check_pattern(self, layout: VideoLayout) -> None:
        """Refuses a pattern for another video, when the first layout of the run is known; later ones may be windows of other sizes."""
        checked, self._layout_checked = self._layout_checked, True
        if not checked and self.pattern is not None and (reason := self.pattern.why_not_layout(layout)):
            self.refuse_pattern(reason)

    def say_refused(self, pattern: Pattern, reason: str) -> None:
        """A pattern is not used, and why. Raises RuntimeError where `strict` is set."""
        sentence = f"{pattern.source} was not used: {reason}"
        if self.config.strict:
            raise RuntimeError(f"{self.method.NAME}, strict: {sentence}")
        self.note(sentence)

    def given(self, call: AttentionCall, state: LayerState) -> Found | Dense | None:
        """What the pattern says of a call: its plan, Dense where it has none that fits, or None without a pattern."""
        pattern = self.pattern
        if pattern is None:
            return None
        if reason := pattern.why_not_layout(call.layout):
            return Dense(f"{pattern.source} has no plan for this call: {reason}")
        plans = pattern.find(call.layer, call.stack, self.roles.of(call.condition))
        if plans is None:
            return Dense("layer without a plan in the loaded pattern", planned=True)
        place = plans.place_at(self.schedule.sigmas[call.step])
        if state.found is None or state.found.place != place:
            reason = pattern.why_not_heads(call.q.shape[1])
            try:
                what = None if reason else self.method.from_pattern(plans.at(place, len(call.q)), call, self.config, self)
            except (KeyError, ValueError):
                reason = "its plans are damaged or incomplete"
            if reason:
                self.refuse_pattern(reason)
                return Dense(f"{pattern.source} was not used: {reason}")
            state.found = Found(call.step, what, place=place)
        return state.found

    def keep(self, call: AttentionCall, found: Found) -> Found:
        """A method has found something; it outlives the run where that is asked for."""
        if self.keeping is not None:
            key = PlanKey(call.layer, call.stack, self.roles.of(call.condition))
            kept = Kept(key, call.layout, self.schedule.sigmas[call.step], self.method.to_pattern(found.what))
            with self._lock:
                room = self.keeping.add(kept)
            if not room:
                self.note(f"to be saved: finds up to step {call.step}, since more would take over {MOST_KEPT_BYTES >> 20} MiB")
        return found

    def found_pattern(self, layers: int | None) -> Pattern | None:
        """What the run found, on the CPU, or the pattern that it used; None where nothing was kept. To be asked before `end`."""
        if self.keeping is None or self.pattern is not None or self.record.layout is None:
            return None if self.keeping is None else self.pattern
        return self.keeping.pattern(self.method.NAME, self.record.model, layers, self.record.layout, asdict(self.config))

    def flush(self) -> None:
        """Between two evaluations: reads back what calls have noted, all of a device at once."""
        self.record.flush()
        with self._lock:
            waiting = [(key[2:], state, *state.unread) for key, state in self._states.items() if state.unread is not None]
            for _, state, *_ in waiting:
                state.unread = None
        for device in {error.device for *_, error in waiting}:
            here = [item for item in waiting if item[-1].device == device]
            for (layer, state, step, found, _), error in zip(here, torch.stack([error for *_, error in here]).tolist(), strict=True):
                if state.found is found and math.isfinite(error):  # another thread may have searched meanwhile
                    state.measured = (*state.measured, error)
                self.record.measured(step, layer, error)

    def note(self, sentence: str) -> None:
        """Something the person should know; said once."""
        self.record.note(sentence)

    def held_bytes(self) -> int:
        """Bytes of the tensors that the run keeps between calls: plans, orders, what a search left."""
        with self._lock:
            tensors = {id(tensor): tensor for tensor in _tensors([*self._states.values(), *self._shared.values()])}
        return sum(tensor.nbytes for tensor in tensors.values())

    def end(self) -> RunRecord:
        """Frees every tensor of the run and returns its record."""
        self.flush()
        self.record.flush(wait=True)
        with self._lock:
            self._states.clear()
            self._shared.clear()
            self.keeping = self.pattern = None
        return self.record


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in dataclasses and containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, Session):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
