"""How near two videos are, and tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor


def psnr_db(reference: Tensor, video: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB: over all pixels of a clip, then the mean over clips. None where they are equal (it is infinite).

    reference, video: luminance from 0 to 1, [B, T, H, W].
    """
    if bool((reference == video).all()):
        return None
    pairs = zip(reference.numpy(), video.numpy(), strict=True)
    return float(np.mean([peak_signal_noise_ratio(one, other, data_range=1) for one, other in pairs]))


def ssim(reference: Tensor, video: Tensor) -> float:
    """Structural similarity, 1 where equal: the mean over frames and clips. Arguments as for `psnr_db`."""
    pairs = zip(reference.flatten(0, 1).numpy(), video.flatten(0, 1).numpy(), strict=True)
    return float(np.mean([structural_similarity(one, other, data_range=1) for one, other in pairs]))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; the first reads from the left, figures from the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *figures = row
        return "  ".join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(figures, widths[1:], strict=True))])

    return "\n".join([line(heads), line(["-" * width for width in widths]), *(line(row) for row in rows)])
