"""Some calls of a run computed both ways, sparse and dense: how far each layer and head is from dense attention, and what keeps them near.

Errors are relative L2: the norm of (sparse - dense) over that of the dense output, of one head, over all its rows and
channels. Nothing of a call is kept: the norms are a few numbers, read back together once an evaluation.

Lower and higher sparsities are measured, not guessed. Each has a session of its own, a rung, in which the method plans as it
would at that sparsity: its searches are made in the calls in which the run makes its own, on the same tensors. The
log-sum-exp of a search belongs to the call and not to the budget, so rungs share the run's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import AttentionCall, Dense
from .config import MOST_SPARSITY, shortened
from .dispatch import sparse_attention
from .record import LayerKey, RunRecord
from .schedule import Schedule, in_layers, parse_layers
from .session import Session

SCHEMA = 1
CONTINUE_CHOICES = ("sparse", "dense")
AUTOMATIC_SPARSITIES = "auto"
_MOST_RUNGS = 8


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed.

    layers: "0-2, -1", in execution order; "" is all. most_layers: at most so many of them, evenly spaced; 0 is no limit.
    steps: how many of the run's sparse steps, evenly spaced; 0 is every one. sparsities: further ones to measure, as
    "0.5, 0.6"; "auto" is two below the run's own, "" none. continue_with: the output that a probed call hands on, sparse or dense.
    Raises ValueError naming the knob.
    """

    layers: str = ""
    most_layers: int = 0
    steps: int = 3
    sparsities: str = AUTOMATIC_SPARSITIES
    continue_with: str = "sparse"

    def __post_init__(self):
        for name in ("layers", "sparsities"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: {shortened(repr(getattr(self, name)))} is not text")
        try:
            parse_layers(self.layers)
        except ValueError as error:
            raise ValueError(str(error).replace("dense_layers", "layers", 1)) from None
        for name in ("most_layers", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: {shortened(repr(value))} is not a whole number from 0 up")
        if not isinstance(self.continue_with, str) or self.continue_with not in CONTINUE_CHOICES:
            raise ValueError(f"continue_with: {shortened(repr(self.continue_with))} is not one of {', '.join(CONTINUE_CHOICES)}")
        if self.sparsities.strip() != AUTOMATIC_SPARSITIES:
            parse_sparsities(self.sparsities)

    def rungs(self, asked: float) -> tuple[float, ...]:
        """The sparsities to measure beside `asked`, the highest first; none beside one that is below 0, which follows from something else."""
        if asked < 0:
            return ()
        if self.sparsities.strip() != AUTOMATIC_SPARSITIES:
            return tuple(value for value in parse_sparsities(self.sparsities) if value != asked)
        step = min((1 - asked) / 2, asked / 3)
        return tuple(sorted({round(asked - step, 2), round(asked - 2 * step, 2)} - {round(asked, 2)}, reverse=True))


def parse_sparsities(text: str) -> tuple[float, ...]:
    """Sparsities from "0.5, 0.6", the highest first. Raises ValueError naming the part that is none."""
    values = set()
    for part in filter(str.strip, text.split(",")):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= MOST_SPARSITY:
            raise ValueError(f'sparsities: "{shortened(part.strip())}" is not a number from 0 to {MOST_SPARSITY:g}; write them as in "0.5, 0.6"')
        values.add(value)
    if len(values) > _MOST_RUNGS:
        raise ValueError(f"sparsities: {len(values)} are more than {_MOST_RUNGS}, and each is computed for every probed call")
    return tuple(sorted(values, reverse=True))


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """`count` of the items, the first and the last among them; the middle one where count is 1; all of them where it is 0 or more than there are."""
    if count <= 0 or count >= len(items):
        return items
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def relative_errors(sparse: Tensor, dense: Tensor) -> Tensor:
    """The relative L2 error of each head, float32 [B, H], from outputs [B, H, S, D]. Head by head: float32 copies of all are large."""
    norms = []
    for head in range(dense.shape[1]):
        exact = dense[:, head].float()
        off = torch.linalg.vector_norm(sparse[:, head].float() - exact, dim=(1, 2))
        norms.append(off / torch.linalg.vector_norm(exact, dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(norms, 1)


class ProbeRecord:
    """What a probed run found, in numbers alone.

    sparsities: those measured, the run's own first; below 0 where it follows from a fidelity, and is the only one then.
    achieved: the share that each skipped in fact, mean over the calls that were measured; known once the run has ended. Where what is
    always kept leaves no room for more, as in short videos, several are the same.
    """

    def __init__(self, config: ProbeConfig, sparsities: tuple[float, ...], layers: int | None, dense_layers: str):
        self.config, self.sparsities, self.layers, self.dense_layers = config, sparsities, layers, dense_layers
        self.achieved = [0.0] * len(sparsities)
        self.calls = 0
        self.steps: set[int] = set()
        self.why: str | None = None  # why probing ended early
        self._sums: dict[tuple[int, LayerKey], list[tuple[float, int]]] = {}

    def add(self, rung: int, layer: LayerKey, heads: list[float]) -> None:
        """The errors of one call's heads; what is no number is left out."""
        sums = self._sums.get((rung, layer), [])
        if len(sums) != len(heads):
            sums = [(0.0, 0) for _ in heads]  # a part of the heads was called: keep the newest
        self._sums[rung, layer] = [
            (total + value, count + 1) if math.isfinite(value) else (total, count) for (total, count), value in zip(sums, heads, strict=True)
        ]

    def heads(self, rung: int = 0) -> dict[LayerKey, list[float | None]]:
        """The mean error of each head over the probed calls, by layer; None where it never was a number."""
        rows = sorted(((layer, sums) for (number, layer), sums in self._sums.items() if number == rung), key=lambda row: (row[0][1], row[0][0]))
        return {layer: [total / count if count else None for total, count in sums] for layer, sums in rows}

    def by_layer(self, rung: int = 0) -> dict[LayerKey, float | None]:
        """The mean over a layer's heads."""
        means = {}
        for layer, heads in self.heads(rung).items():
            known = [value for value in heads if value is not None]
            means[layer] = sum(known) / len(known) if known else None
        return means

    def worst(self) -> list[tuple[int, str, int, float]]:
        """(layer, stack, head, error) at the run's own sparsity, the largest error first."""
        rows = [
            (number, stack, head, value) for (number, stack), heads in self.heads().items() for head, value in enumerate(heads) if value is not None
        ]
        return sorted(rows, key=lambda row: (-row[3], row[:3]))


@dataclass(frozen=True)
class Suggestion:
    """What keeps every layer that stays sparse under a bound.

    dense_layers: text, as the patch nodes take it. sparsity: the one of those measured that goes with it. skipped: the share
    of the probed layers' attention that the two leave out. notes: what has to be known about it.
    """

    dense_layers: str
    sparsity: float
    skipped: float
    notes: tuple[str, ...]


def suggest(record: ProbeRecord, max_error: float) -> Suggestion:
    """The measured sparsity that skips most once every layer whose mean error is above `max_error` is dense.

    Where several skip alike, as where each is more than a short video allows, the patch's own goes first, then the highest below it.

    Raises ValueError for a bound that is no positive number.
    """
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not 0 < max_error < math.inf:
        raise ValueError(f"max_error: {shortened(repr(max_error))} is not a number above 0")
    measured = [layer for layer, error in record.by_layer().items() if error is not None]
    if not measured:
        why = record.why or "no call ran sparse in the probed layers and steps"
        return Suggestion(record.dense_layers, record.sparsities[0], 0.0, (f"nothing was measured ({why}): the patch's own settings are kept",))
    best = None
    for rung, sparsity in enumerate(record.sparsities):
        errors = record.by_layer(rung)
        # A number is dense in all stacks that bear it. What was not measured at this sparsity is not promised.
        bad = {layer[0] for layer in measured if errors.get(layer) is None or errors[layer] > max_error}
        share = record.achieved[rung] * sum(layer[0] not in bad for layer in measured) / len(measured)
        # Alike in what they skip: fewer dense layers, then what skips less by itself, then the highest asked that is not above the patch's own.
        above = sparsity > record.sparsities[0]
        key = (round(share, 6), -len(bad), -round(record.achieved[rung], 6), not above, -sparsity if above else sparsity)
        if best is None or key > best[0]:
            best = key, sparsity, bad, share
    _, sparsity, bad, share = best
    return Suggestion(_as_text(record, bad), sparsity, share, tuple(_notes(record, measured, bad, max_error)))


def _notes(record: ProbeRecord, measured: list[LayerKey], bad: set[int], max_error: float) -> list[str]:
    notes = [] if record.why is None else [f"probing ended early: {record.why}"]
    if bad >= {number for number, _ in measured}:
        if record.sparsities[0] < 0:
            notes.append(f"no probed layer stays at or under {max_error:g}: allow a larger error, or raise the patch's fidelity")
        else:
            notes.append(f"no measured sparsity keeps a probed layer at or under {max_error:g}: allow a larger error, or measure lower sparsities")
    left = set(range(record.layers or 0)) - {number for number, _ in measured} - _dense_already(record)
    if left:
        notes.append(f"{len(left)} of {record.layers} layers were not measured and are left sparse")
    if record.sparsities[0] < 0:
        notes.append("how much is skipped follows from the patch's fidelity, which is kept: it alone was measured")
    elif len(record.sparsities) == 1:
        notes.append("only the patch's own sparsity was measured, so it is kept")
    lost = len(record.by_layer()) - len(measured)
    if lost:
        notes.append(f"{lost} layers gave no finite error and are left out")
    return notes


def _dense_already(record: ProbeRecord) -> set[int]:
    """The layers that the patch keeps dense, where the number of layers is known."""
    ranges = parse_layers(record.dense_layers)
    return {layer for layer in range(record.layers or 0) if in_layers(layer, ranges, record.layers)}


def _as_text(record: ProbeRecord, bad: set[int]) -> str:
    """The patch's dense layers and these, as text."""
    numbers, parts = set(bad), []
    if record.layers is None and record.dense_layers.strip():
        parts.append(record.dense_layers.strip())
    ordered = sorted(numbers | _dense_already(record))
    while ordered:
        run = next((length for length in range(1, len(ordered)) if ordered[length] != ordered[0] + length), len(ordered))
        parts.append(str(ordered[0]) if run == 1 else f"{ordered[0]}-{ordered[run - 1]}")
        ordered = ordered[run:]
    return ", ".join(parts)


class Probe:
    """The probing of one run: it holds what the rungs found, and is gone with the run. Threads of a multi-device run share it."""

    def __init__(self, config: ProbeConfig, session: Session):
        self.config, self._session = config, session
        # The plans of a loaded pattern are for one sparsity.
        rungs = config.rungs(session.config.sparsity) if session.pattern is None else ()
        self._rungs = [_rung(session, sparsity) for sparsity in rungs]
        self.record = ProbeRecord(config, (session.config.sparsity, *rungs), session.layers, session.config.dense_layers)
        self._layers = _layers_of(config, session)
        self._steps = evenly_spaced(_sparse_steps(session.schedule), config.steps)
        self._seen: set[Hashable] = set()
        self._pending: list[tuple[int, LayerKey, Tensor]] = []
        self._measured: set[tuple[int, LayerKey]] = set()
        self._lock = threading.Lock()

    def attend(self, call: AttentionCall, dense: Callable[[], Tensor]) -> tuple[Tensor | Dense, bool]:
        """What `sparse_attention` returns, measured on the way where the call is to be probed; and whether anything was done beside it.

        dense: computes the call's output [B, H, S, D] as the host does.
        """
        result = sparse_attention(call, self._session)
        if self.record.why is not None or not self._concerns(call):
            return result, False
        try:
            return self._measure(call, result, dense)
        except Exception as error:  # the video is worth more than its probe
            if self._session.config.strict:
                raise
            self.record.why = f"{type(error).__name__}: {error}"
            self._session.note(f"probing ended early, the video did not ({self.record.why})")
            self._free()
            return result, True

    def flush(self) -> None:
        """Reads the measured errors back, all of a device at once."""
        with self._lock:
            pending, self._pending = self._pending, []
        for device in {errors.device for *_, errors in pending}:
            items = [item for item in pending if item[2].device == device]
            values = torch.cat([errors.flatten() for *_, errors in items]).cpu().split([errors.numel() for *_, errors in items])
            for (rung, layer, errors), flat in zip(items, values, strict=True):
                self.record.add(rung, layer, flat.view(errors.shape).double().mean(0).tolist())
        for rung in self._rungs:
            rung.flush()

    def end(self) -> ProbeRecord:
        """Frees every tensor and returns what was found."""
        self.flush()
        self._free()
        if self.record.calls:
            self._session.note(f"slower than usual: a probe computed {self.record.calls} calls both ways")
        # The run has made more calls than were measured: over all of them, its figure would not compare with a rung's.
        for number, session in enumerate([self._session, *self._rungs]):
            session.record.flush()
            self.record.achieved[number] = session.record.sparsity_in(self._measured)
        return self.record

    def _free(self) -> None:
        for rung in self._rungs:
            rung.end()

    def _concerns(self, call: AttentionCall) -> bool:
        return self._layers is None or in_layers(call.layer, self._layers, self._session.layers)

    def _due(self, call: AttentionCall) -> bool:
        """Whether this call is one to measure. Where a cache skips a chosen step, the next one that comes stands in for it."""
        passed = sum(step <= call.step for step in self._steps)
        if not passed:
            return False
        if not self.config.steps:
            return True
        key = (passed, call.q.device, call.condition, call.layer, call.stack)
        with self._lock:
            return key not in self._seen and not self._seen.add(key)

    def _measure(self, call: AttentionCall, result: Tensor | Dense, dense: Callable[[], Tensor]) -> tuple[Tensor | Dense, bool]:
        found = self._session.state(call).found
        due = isinstance(result, Tensor) and self._due(call)
        searched = found is not None and found.step == call.step
        exact = dense() if due else None
        if due:
            self._note(0, call, result, exact)
        for number, rung in enumerate(self._rungs, 1):
            rung.head_chunk = self._session.head_chunk if rung.head_chunk is None else rung.head_chunk
            rung.backend, rung.precision = self._session.backend, self._session.precision
            state = rung.state(call)
            if found is not None and found.what is None:
                state.found = found  # an LSE for the search to come: the same for every budget
                continue
            if due:
                output = sparse_attention(call, rung)
                if isinstance(output, Tensor):
                    self._note(number, call, output, exact)
                del output
            elif searched:  # so does this rung, as the run did
                rung.method.plan(call, rung.config, state)
            if found is not None and state.found is not None and state.found.lse is not None:
                state.found.lse = found.lse
        return (exact if due and self.config.continue_with == "dense" else result), due or (searched and bool(self._rungs))

    def _note(self, rung: int, call: AttentionCall, sparse: Tensor, exact: Tensor) -> None:
        errors = relative_errors(sparse, exact)
        with self._lock:
            self._pending.append((rung, (call.layer, call.stack), errors))
            self._measured.add((call.step, (call.layer, call.stack)))
            self.record.steps.add(call.step)
            self.record.calls += rung == 0


def _rung(session: Session, sparsity: float) -> Session:
    """The same run at another sparsity, with figures of its own that nobody is shown."""
    config = replace(session.config, sparsity=sparsity)
    schedule, seed = session.schedule, session.seed
    record = RunRecord(session.method.NAME, config, schedule.steps, session.layers, seed, schedule.warmup)
    return Session(session.method, config, schedule, seed, record, session.layers)


def _sparse_steps(schedule: Schedule) -> list[int]:
    return [step for step in range(schedule.steps) if not schedule.is_warmup(step) and not schedule.is_end(step)]


def _layers_of(config: ProbeConfig, session: Session) -> list[tuple[int, int]] | None:
    """The ranges of layers to probe; None is all. Those that are dense anyway take no place among the evenly spaced."""
    asked = parse_layers(config.layers)
    if session.layers is None or not config.most_layers:
        return list(asked) or None
    numbers = [
        layer for layer in range(session.layers)
        if (not asked or in_layers(layer, asked, session.layers)) and not in_layers(layer, session.dense_layers, session.layers)
    ]
    return [(layer, layer) for layer in evenly_spaced(numbers, config.most_layers)]
