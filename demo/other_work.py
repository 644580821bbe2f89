"""How much of the processors other programs take while this one measures: its seconds mean little where that is much."""

from __future__ import annotations

import os
import time
from pathlib import Path

# The share of all processors from which on seconds are not to be relied on.
MUCH = 0.2


class OtherWork:
    """Counts from when it is made. Linux only: elsewhere `share()` is None."""

    def __init__(self, process_ids: tuple[int, ...]):
        """process_ids: the processes whose work is not other programs'."""
        self._ids = process_ids
        self._start = self._read()

    def share(self) -> float | None:
        """The share of all processors' time so far that neither these processes took nor nobody; None where the system does not tell."""
        now = self._read()
        if self._start is None or now is None:
            return None
        seconds, busy, own = (later - earlier for later, earlier in zip(now, self._start, strict=True))
        return min(max((busy - own) / max(seconds, 1e-9) / (os.cpu_count() or 1), 0.0), 1.0)

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds so far: of the clock, of all processors' work, of the processes' work."""
        try:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
            # utime and stime, the 14th and 15th field; the second is a name in brackets, which may hold anything.
            fields = [Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split() for number in self._ids]
            ticks = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        own = sum(int(field[11]) + int(field[12]) for field in fields)
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, own / ticks
