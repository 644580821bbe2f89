"""What a budget leaves after the tokens that are always kept, and what to say when it leaves too little.

A budget is a number of query-key pairs of real tokens: (1 - sparsity) of all of them. Sinks are paid first.
"""

from __future__ import annotations

from .layout import VideoLayout

# Mask blocks, queries by keys. A query block twice the key block halves the reads of K and V for one choice of keys.
BLOCK_Q = 128
BLOCK_K = 64


def pairs_allowed(layout: VideoLayout, sparsity: float) -> float:
    """Query-key pairs that may be computed at this sparsity."""
    return (1 - sparsity) * layout.seq_len**2


def pairs_of_sinks(layout: VideoLayout, video_sinks: int = 0) -> int:
    """Pairs always computed: every pair with a token before or after the video, and each video query with `video_sinks` keys."""
    return layout.sink_tokens * layout.seq_len + layout.video_tokens * (layout.sink_tokens + video_sinks)


def limit_note(layout: VideoLayout, least_pairs: float, of: str, heads: str = "") -> str:
    """The sentence for a budget below what has to be kept. of: what of the video sets the limit; `heads` says which, where not all."""
    most = max(0.0, 1 - least_pairs / layout.seq_len**2)
    return f"{of}: at most {most:.2f} can be skipped" + (f" by {heads} heads" if heads else "")


def limit_notes(layout: VideoLayout, least_pairs: dict[str, float | None]) -> tuple[str, ...]:
    """The sentences for kinds of heads that keep the first frame, None for one whose budget is met; a single one where all have the same limit."""
    frames = f"{layout.frames} latent frame{'s' if layout.frames != 1 else ''}"
    short = {kind: pairs for kind, pairs in least_pairs.items() if pairs is not None}
    alike = {limit_note(layout, pairs, frames) for pairs in short.values()}
    if len(short) == len(least_pairs) and len(alike) == 1:
        return tuple(alike)
    return tuple(limit_note(layout, pairs, frames, kind) for kind, pairs in short.items())
