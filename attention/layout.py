"""Where the video's tokens lie in an attention call's sequence, and the orders that its planners put them in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The boxes of tile order, (frames, height, width) in latent tokens: each fills a key block of 64.
TILE = (4, 4, 4)


@dataclass(frozen=True)
class VideoLayout:
    """A sequence of `prefix` tokens, then frames x height x width video tokens in raster order, then `suffix` tokens.

    frames, height, width: latent frames and the tokens of one after patchifying. Tokens before and after (text,
    references) are sinks: always kept as keys, and always attending to everything.
    """

    frames: int
    height: int
    width: int
    prefix: int = 0
    suffix: int = 0

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def sink_tokens(self) -> int:
        return self.prefix + self.suffix

    @property
    def seq_len(self) -> int:
        return self.prefix + self.video_tokens + self.suffix

    def __str__(self) -> str:
        video = f"{self.frames} x {self.height} x {self.width} video tokens"
        return f"{self.prefix} + {video} + {self.suffix}" if self.sink_tokens else video

    def sink_rows(self, device: torch.device) -> Tensor:
        """Tensor rows of the tokens before and after the video, int32 [prefix + suffix]."""
        rows = torch.arange(self.seq_len, dtype=torch.int32, device=device)
        return torch.cat([rows[: self.prefix], rows[self.prefix + self.video_tokens :]])

    def video_rows(self, device: torch.device) -> Tensor:
        """Tensor rows of the video, int32 [frames, height, width]."""
        rows = torch.arange(self.prefix, self.prefix + self.video_tokens, dtype=torch.int32, device=device)
        return rows.view(self.frames, self.height, self.width)


def tile_major(rows: Tensor, tile: tuple[int, int, int] = TILE) -> Tensor:
    """Video rows [frames, height, width] as one list in which every run of a tile's size is a compact box.

    Boxes at the far edges are smaller, so blocks may straddle boxes, and one of 128 queries
    may hold the end of a line of boxes and the start of the next: `hilbert` keeps blocks compact there. Nothing is padded.
    """
    ranks = [torch.arange(size, device=rows.device) for size in rows.shape]
    counts = [math.ceil(size / edge) for size, edge in zip(rows.shape, tile, strict=True)]
    box = [rank // edge for rank, edge in zip(ranks, tile, strict=True)]
    inside = [rank % edge for rank, edge in zip(ranks, tile, strict=True)]
    key = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
    for parts, sizes in ((box, counts), (inside, tile)):
        for axis, size in enumerate(sizes):
            shape = [1, 1, 1]
            shape[axis] = -1
            key = key * size + parts[axis].view(shape)
    return rows.flatten()[key.flatten().argsort()]


def hilbert(rows: Tensor) -> Tensor:
    """Video rows [frames, height, width] as one list along a Hilbert curve: every step of a full cube goes to a neighbour.

    The curve is that of the smallest cube of a power of two; what lies outside of the video is left out of it. From the coordinates
    to the place on the curve by J. Skilling, Programming the Hilbert curve (AIP Conference Proceedings 707, 2004).
    """
    axes = list(torch.meshgrid(*(torch.arange(size, device=rows.device) for size in rows.shape), indexing="ij"))
    bits = max(1, (max(rows.shape) - 1).bit_length())
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for axis in range(3):
            turned = (axes[axis] >> bit) & 1 == 1
            swap = torch.where(turned, 0, (axes[0] ^ axes[axis]) & low)
            axes[0] = torch.where(turned, axes[0] ^ low, axes[0] ^ swap)
            if axis:
                axes[axis] = axes[axis] ^ swap
    for axis in (1, 2):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    turned = torch.zeros_like(axes[2])
    for bit in range(1, bits):
        turned ^= torch.where((axes[2] >> bit) & 1 == 1, (1 << bit) - 1, 0)
    place = torch.zeros_like(turned)
    for bit in reversed(range(bits)):
        for axis in axes:
            place = place << 1 | ((axis ^ turned) >> bit) & 1
    return rows.flatten()[place.flatten().argsort()]


def in_sections(sections: list[Tensor], block: int) -> Tensor:
    """Sections of tensor rows, one after the other, each padded with -1 to a block's edge: int32 [P].

    So no block holds two kinds of token, and "always keep the text" is a range of columns.
    """
    padded = [torch.nn.functional.pad(rows.flatten(), (0, -rows.numel() % block), value=-1) for rows in sections if rows.numel()]
    return torch.cat(padded)


# Rows and columns of the picture of a mask: enough to see frames and bands, little enough to keep one of every head.
PICTURE_ROWS = 128


def picture_rows(layout: VideoLayout) -> Tensor:
    """The tensor rows that a picture of a mask shows, int64 [at most PICTURE_ROWS], evenly spread."""
    count = min(PICTURE_ROWS, layout.seq_len)
    return (torch.arange(count) * layout.seq_len) // count
