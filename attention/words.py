"""How messages quote what somebody gave."""

from __future__ import annotations


def shortened(text: str) -> str:
    """What somebody gave, as a message quotes it: of a long text, the start."""
    return text if len(text) <= 80 else text[:77] + "..."
