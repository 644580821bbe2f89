"""The files a person looks at: a video for each run, and all runs side by side."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_VIDEO_SCALE = 3
_FRAMES_PER_SECOND = 6
_COLUMNS = 5
_LABEL_WIDTH, _GAP, _TITLE_HEIGHT = 190, 6, 34
_INK, _PAPER = 30, 250


def write_video(path: Path, video: Tensor) -> None:
    """All clips next to each other, each pixel a crisp square. video: luminance from 0 to 1, [B, T, H, W]."""
    frames = np.concatenate([_bytes(clip, _VIDEO_SCALE) for clip in video], axis=2)
    imageio.imwrite(path, frames[..., None].repeat(3, -1), fps=_FRAMES_PER_SECOND, codec="libx264", quality=9, macro_block_size=4)


def write_side_by_side(path: Path, clips: list[tuple[str, list[tuple[str, Tensor]]]], scale: int = 2) -> None:
    """One block a clip, one row a video, one column a frame.

    clips: for each a title and its rows, each a label and a video, luminance from 0 to 1, [T, H, W]. scale: the side of a pixel.
    """
    blocks = [_block(title, rows, scale) for title, rows in clips]
    picture = Image.new("L", (blocks[0].width, sum(block.height for block in blocks)), _PAPER)
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height
    picture.save(path)


def _block(title: str, rows: list[tuple[str, Tensor]], scale: int) -> Image.Image:
    frames, height, width = rows[0][1].shape
    height, width = height * scale, width * scale
    shown = np.linspace(0, frames - 1, min(_COLUMNS, frames)).round().astype(int)
    block = Image.new("L", (_LABEL_WIDTH + len(shown) * (width + _GAP), _TITLE_HEIGHT + len(rows) * (height + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(block)
    font = ImageFont.load_default(16)
    draw.text((_GAP, _GAP), title, fill=_INK, font=font)
    for column, frame in enumerate(shown):
        left = _LABEL_WIDTH + column * (width + _GAP)
        draw.text((left, _GAP), f"frame {frame + 1} of {frames}", fill=_INK, font=font)
        for row, (label, video) in enumerate(rows):
            top = _TITLE_HEIGHT + row * (height + _GAP)
            draw.text((_GAP, top + _GAP), label, fill=_INK, font=font)
            block.paste(Image.fromarray(_bytes(video[frame][None], scale)[0]), (left, top))
    return block


def _bytes(video: Tensor, scale: int) -> np.ndarray:
    """[T, H, W] from 0 to 1 as uint8 [T, H * scale, W * scale], pixels repeated."""
    pixels = (video.numpy() * 255).round().astype(np.uint8)
    return pixels.repeat(scale, 1).repeat(scale, 2)
