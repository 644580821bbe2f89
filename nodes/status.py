"""The words on the node: one line while sampling, one when the run ends."""

from __future__ import annotations

import math
import time

from ..attention.config import MethodConfig
from ..attention.record import KINDS, RunRecord
from . import host

# A browser redraws the node for every line; twice a second is enough to read.
_SECONDS_BETWEEN = 0.5


def line(record: RunRecord) -> str:
    """The line of a run under way: the figures first, since a small node shows two lines."""
    return f"{record.method} {record.step + 1}/{record.steps} · {_figures(record)}"


def closing_line(record: RunRecord) -> str:
    """The line that stays when a run has ended."""
    if record.sparse_calls == 0 and record.outcome == "finished":
        return f"⚠ {record.method}: nothing ran sparse. {_advice(record)}{_notes(record)}"
    start = f"{record.method} · {record.outcome}" if record.outcome != "finished" else f"{record.method} · done"
    whole = f"{record.run_sparsity:.0%} of the whole run's attention skipped"
    sparse = "in sparse calls " if record.sparse_calls else ""
    return f"{start} · {whole} · {sparse}{_figures(record)}{_notes(record)}"


def figures(record: RunRecord) -> dict:
    """The same for the panel, as plain data. asked and achieved: shares of pairs skipped, the latter over the sparse calls.

    asked_error and error: the relative L2 error that sparse calls may have, where that was asked for instead of a share, and the one measured.
    state: "running", "done", "warning" (nothing ran sparse) or "stopped".
    """
    state = {"running": "running", "finished": "done"}.get(record.outcome, "stopped")
    if state == "done" and record.sparse_calls == 0:
        state = "warning"
    achieved = record.achieved_sparsity
    return {
        "state": state, "method": record.method, "step": min(record.step + 1, record.steps), "steps": record.steps,
        "asked": record.asked_sparsity, "achieved": achieved if math.isfinite(achieved) else None,  # JSON has no word for NaN
        "asked_error": record.asked_error, "error": record.measured_error,
        "sparse_calls": record.sparse_calls, "dense_calls": record.dense_calls,
    }


def _figures(record: RunRecord) -> str:
    parts = []
    if record.sparse_calls:
        parts.append(_skipped(record))
    parts.append(f"{record.sparse_calls} sparse, {record.dense_calls} dense calls")
    if record.reasons:
        parts.append("dense: " + "; ".join(f"{reason} ({count})" for reason, count in record.reasons.most_common(3)))
    parts += _spread(record) + _costs(record)
    return " · ".join(parts)


def _skipped(record: RunRecord) -> str:
    """What was skipped, how far off that is where it was measured, and what was asked."""
    share, error = f"{record.achieved_sparsity:.0%} skipped", record.measured_error
    off = "" if error is None else f", off by {percent(error)}"
    if record.asked_sparsity is not None:
        return f"{share}{off} (asked {record.asked_sparsity:.0%})"
    return f"{share}{off} (at most {percent(record.asked_error)}{' off' if error is None else ''} asked)"


def percent(share: float) -> str:
    """Whole percent; below 2 percent with two digits, since errors may be small."""
    return f"{share:.0%}" if share >= 0.02 else f"{100 * share:.2g}%"


def _spread(record: RunRecord) -> list[str]:
    """How far heads differ, where they do: a tenth of them skip less than the first figure, a tenth more than the last."""
    low, middle, high = (f"{share:.0%}" for share in record.head_percentiles() or (0, 0, 0))
    return [] if low == high else [f"heads {low} to {high}, median {middle}"]


def _costs(record: RunRecord) -> list[str]:
    """Milliseconds of a call of each kind, and the memory that plans take."""
    times = [f"{_figure(took)} ms a {kind} call" for kind in KINDS if (took := record.call_ms(kind)) is not None]
    memory = [f"{record.plan_bytes / 2**20:.3g} MiB of plans"] if record.plan_bytes else []
    return [", ".join(times + memory)] if record.sparse_calls and times else memory if record.sparse_calls else []


def _figure(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _notes(record: RunRecord) -> str:
    return "".join(f" · {note}" for note in record.notes)


# What to change for a planned reason; the first that applies is the one that matters most when nothing ran sparse.
_HINTS = {
    "min_tokens": "Raise the resolution or length, or set min_tokens (an advanced input) to 0 to try it anyway.",
    "at this fidelity": "Lower fidelity.",
    "search step": "{method} needs a step after its search: use more steps.",
    "dense layer": "Shorten dense_layers.",
    "warm-up": "Lower warmup_steps or use more steps.",
    "last steps": "Lower end_steps.",
}


def hint(reason: str, config: MethodConfig | None) -> str:
    """What to change for a reason that nobody chose, with a space before it; nothing where no setting helps."""
    if config is None or "Triton" not in reason or reason.startswith("precision"):
        return ""
    if config.backend == "auto":  # `strict`, on a GPU
        return " Set backend to torch if torch is to compute it."
    return " Set backend to auto: torch then computes what Triton cannot." if config.backend == "triton" else ""


def _advice(record: RunRecord) -> str:
    """Why nothing ran sparse, and what to change."""
    if not record.reasons:
        return "No self-attention call of a video reached this node: another node may have replaced the attention, or a cache skipped every step."
    hindrances = [reason for reason in record.reasons if not any(key in reason for key in _HINTS)]
    if hindrances:
        return f"Reason: {hindrances[0]}.{hint(hindrances[0], record.config)}"
    key, reason = next((key, reason) for key in _HINTS for reason in record.reasons if key in reason)
    return f"Reason: {reason}. {_HINTS[key].format(method=record.method)}"


class StatusLine:
    """Shows a run on the node that patched the model."""

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self._next = 0.0

    def begin(self, text: str | None) -> None:
        """The line when sampling starts."""
        if text:
            self._next = time.monotonic() + _SECONDS_BETWEEN
            host.show_text(text, self.node_id)
            host.log.info(text)

    def due(self) -> bool:
        """Whether the live line may be shown again: at most twice a second."""
        return time.monotonic() >= self._next

    def show(self, record: RunRecord) -> None:
        """The live line; for when it is due."""
        self._next = time.monotonic() + _SECONDS_BETWEEN
        host.show_text(line(record), self.node_id, figures(record))

    def close(self, record: RunRecord) -> None:
        """The closing line, always; also in the log, for those who run without a browser."""
        text = closing_line(record)
        host.show_text(text, self.node_id, figures(record))
        (host.log.warning if text.startswith("⚠") else host.log.info)(text)
