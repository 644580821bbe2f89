"""How long a call takes, without waiting for the device."""

from __future__ import annotations

import time

import torch

# A point in time: seconds on a CPU, an event on a CUDA or HIP device, None where work cannot be timed without waiting.
Mark = "float | torch.cuda.Event | None"


def mark(device: torch.device) -> Mark:
    """Now, in the device's own order of work."""
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(start: Mark, end: Mark, wait: bool = False) -> float | None:
    """From one mark to another; None where there is none, or the device has not come so far and `wait` is off."""
    if start is None or end is None:
        return None
    if isinstance(start, float):
        return 1000 * (end - start)
    if wait:
        end.synchronize()
    return start.elapsed_time(end) if end.query() else None
