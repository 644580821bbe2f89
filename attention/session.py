"""The state of one sampling run: born when it starts, freed when it ends, however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from .call import AttentionCall
from .config import MethodConfig
from .record import Figures, RunRecord
from .schedule import Schedule, parse_layers


@dataclass
class Found:
    """What a method found for one layer and condition, and at which step. `lse` is kept while another search is due."""

    step: int
    what: Any
    lse: Any = None


@dataclass
class LayerState:
    """One layer of one condition on one device: what its method found, and the figures of its newest plan.

    A new shape of call starts it anew.
    """

    run: Session
    shape: tuple
    found: Found | None = None
    figures: Figures | None = None


@dataclass
class Session:
    """One run. Threads of a multi-device run share it: each has its own device in the key of its states.

    method: a module of `attention.methods`. layers: how many self-attention layers the model has, where known.
    `disabled`: why sparsity is off for the rest of the run, or None. `head_chunk`: heads computed at a time after
    memory ran out, or None.
    """

    method: ModuleType
    config: MethodConfig
    schedule: Schedule
    seed: int
    record: RunRecord
    layers: int | None = None
    disabled: str | None = None
    head_chunk: int | None = None
    _states: dict[Hashable, LayerState] = field(default_factory=dict)
    _shared: dict[Hashable, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.config = self.config.resolved(self.method.AUTOMATIC)  # what its caller has not resolved for a model
        self.dense_layers = parse_layers(self.config.dense_layers)
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

    def note(self, sentence: str) -> None:
        """Something the person should know; said once."""
        self.record.note(sentence)

    def end(self) -> RunRecord:
        """Frees every tensor of the run and returns its record."""
        self.record.flush()
        with self._lock:
            self._states.clear()
            self._shared.clear()
        return self.record
