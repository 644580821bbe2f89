"""Draws the pack's icon and banner into assets/: python tools/make_art.py

A block mask over a film strip: each row of blocks looks at the first frame (left column), at itself and its neighbours
(the band), and, in the banner, at the same places of other frames (the stripes beside it).
"""

from __future__ import annotations

from load_pack import ROOT
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

FOLDER = ROOT / "assets"
ICON, BANNER = (400, 400), (1260, 540)  # the registry's limits: a square of at most 400 px, and 21:9
FINE = 4  # drawn this much larger, then made smaller: smooth edges
BACK, FILM, HOLE, EMPTY = "#12161f", "#262d3b", "#12161f", "#2f3848"
SINK, BAND, STRIPE, WORDS, QUIET = "#f2b84b", "#3fb8af", "#7fd8cf", "#f4f6fa", "#9aa6b8"


def _rounded(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, radius: float, fill: str) -> None:
    draw.rounded_rectangle([FINE * x, FINE * y, FINE * (x + width) - 1, FINE * (y + height) - 1], FINE * radius, fill)


def _film(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, height: float, holes: int, hole: float) -> None:
    """A strip from x on, with `holes` holes along each edge."""
    draw.rectangle([FINE * x, FINE * y, FINE * (x + width), FINE * (y + height)], FILM)
    pitch = width / holes
    for number in range(holes):
        left = x + pitch * (number + 0.5) - hole / 2
        for top in (y + 0.45 * hole, y + height - 1.3 * hole):
            _rounded(draw, left, top, hole, 0.85 * hole, hole / 5, HOLE)


def _mask(draw: ImageDraw.ImageDraw, x: float, y: float, side: float, blocks: int, stripe: int | None = None) -> None:
    """A mask of blocks by blocks: the first frame, the band, and stripes every `stripe` blocks beside it."""
    pitch = side / blocks
    for row in range(blocks):
        for column in range(blocks):
            away = abs(row - column)
            fill = EMPTY
            if stripe and away and away % stripe == 0:
                fill = STRIPE
            if away <= 1:
                fill = BAND
            if column == 0:
                fill = SINK
            _rounded(draw, x + column * pitch + 0.07 * pitch, y + row * pitch + 0.07 * pitch, 0.86 * pitch, 0.86 * pitch, 0.16 * pitch, fill)


def _font(size: float, weight: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), round(FINE * size))


def icon() -> Image.Image:
    width, height = ICON
    image = Image.new("RGBA", (FINE * width, FINE * height))
    draw = ImageDraw.Draw(image)
    _rounded(draw, 0, 0, width, height, 64, BACK)
    _film(draw, 0, 46, width, 308, 7, 30)
    _rounded(draw, 91, 91, 218, 218, 14, BACK)
    _mask(draw, 98, 98, 204, 7)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = BANNER
    image = Image.new("RGB", (FINE * width, FINE * height), BACK)
    draw = ImageDraw.Draw(image)
    _film(draw, 0, 60, width, 420, 21, 30)
    _rounded(draw, 56, 108, 324, 324, 16, BACK)
    _mask(draw, 66, 118, 304, 12, 4)
    for size, weight, top, fill, text in (
        (64, "bold", 140, WORDS, "Sparse Video"),
        (64, "bold", 214, WORDS, "Attention"),
        (27, "normal", 312, QUIET, "SVG and AdaSpa for video models in ComfyUI."),
        (27, "normal", 352, QUIET, "No training, nothing to build."),
    ):
        draw.text((FINE * 436, FINE * top), text, fill, _font(size, weight))
    return image.resize(BANNER, Image.Resampling.LANCZOS)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, image in (("icon", icon()), ("banner", banner())):
        path = FOLDER / f"{name}.png"
        image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
