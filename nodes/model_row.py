"""What a row of the table of video models says, and what it is asked with. The rows themselves are in video_models.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..attention.call import Dense
from ..attention.config import Automatic
from ..attention.layout import VideoLayout

Grid = tuple[int, int, int]


class Layer(NamedTuple):
    """Which self-attention layer calls: its number in execution order, and the stack it is of where several count alike."""

    number: int
    stack: str = ""


class Call(NamedTuple):
    """What is seen of an attention call before any tensor is read. width: heads times head_dim. options: the host's, of this call."""

    seq_q: int
    seq_k: int
    width: int
    options: dict


@dataclass
class Evaluation:
    """One evaluation of a model: its network, and what that is given.

    latent: shape of the video's latent, [B, C, T, H, W]. inputs: the conditioning by the names that the model gives it, and the
    text as "context", [B, L, C]. The rest counts the calls so far: `numbers` how often each layer number has called, `longest`
    the longest self-attention among those that were none of a layer.
    """

    network: Any
    latent: tuple[int, ...]
    inputs: dict[str, Any]
    calls: int = 0
    layers: int = 0
    longest: int = 0
    numbers: Counter[int] = field(default_factory=Counter)

    @property
    def text_tokens(self) -> int:
        return tokens_of(self.inputs.get("context"))

    def frames_of(self, name: str) -> int:
        """Latent frames of a conditioning latent [B, C, T, H, W]; 0 where it is not given."""
        tensor = self.inputs.get(name)
        return 0 if tensor is None else tensor.shape[-3]


def tokens_of(stream: Any) -> int:
    """Tokens of a stream [B, L, C]; 0 for None."""
    return 0 if stream is None else stream.shape[1]


def grid_of(shape: tuple[int, ...], patch: Grid) -> Grid:
    """Tokens of a latent [..., T, H, W] that is padded to whole patches."""
    return tuple(-(-size // edge) for size, edge in zip(shape[-3:], patch, strict=True))


def tokens_in(shape: tuple[int, ...], patch: Grid, padded: bool = True) -> int:
    """How many tokens a latent [..., T, H, W] makes; without padding, what does not fill a patch at its ends is left out."""
    frames, height, width = grid_of(shape, patch) if padded else (size // edge for size, edge in zip(shape[-3:], patch, strict=True))
    return frames * height * width


def raster(evaluation: Evaluation, grid: Grid) -> VideoLayout:
    """The video alone, in raster order."""
    return VideoLayout(*grid)


def published(evaluation: Evaluation, options: dict) -> int | None:
    """The number that the model publishes for each of its blocks; None outside of them."""
    return options.get("block_index")


def counted(evaluation: Evaluation, options: dict) -> int:
    """The number of the call, where every one is a layer and the model publishes nothing."""
    return options.get("block_index", evaluation.layers)


@dataclass(frozen=True)
class VideoModel:
    """One row.

    name: for the person. classes: the networks it stands for, by class name. patch: latent voxels of a token, (frames, height,
    width). layers: how many self-attention layers of the video there are. layout: where the video lies in the sequence, from the
    grid of tokens. number: the number of the layer that calls, or None for what is no layer of the video. stacks: names for
    the second, third call under one number. width: heads times head_dim of the video's self-attention, where other streams
    attend too. heads: how many heads the video's self-attention has, and their dim. cross_attends: whether every self-attention
    call is followed by one to the text. automatic: what "automatic" means, by method. source: where that comes from.
    """

    name: str
    classes: tuple[str, ...]
    patch: Callable[[Any], Grid]
    layers: Callable[[Any], int | None]
    layout: Callable[[Evaluation, Grid], VideoLayout | Dense] = raster
    number: Callable[[Evaluation, dict], int | None] = published
    stacks: tuple[str, ...] = ()
    width: Callable[[Any], int] | None = None
    heads: Callable[[Any], tuple[int, int]] | None = None
    cross_attends: bool = True
    automatic: Callable[[Any], Mapping[str, Automatic]] = lambda network: {}
    source: Callable[[Any], str] = lambda network: ""

    @property
    def note(self) -> str | None:
        """What the person should know about the layout."""
        return None

    def layout_of(self, evaluation: Evaluation, call: Call) -> VideoLayout | Dense:
        """The layout of this evaluation's self-attention; from the model's own grid where it publishes one."""
        if len(evaluation.latent) != 5:
            return Dense(f"the latent has {len(evaluation.latent)} dimensions {tuple(evaluation.latent)}, not the 5 of a video")
        grid = call.options.get("grid_sizes") or grid_of(evaluation.latent, self.patch(evaluation.network))
        return self.layout(evaluation, tuple(int(size) for size in grid))

    def concerns(self, evaluation: Evaluation, call: Call) -> bool:
        """Whether a call is of the video's stream, from its width."""
        return self.width is None or call.width == self.width(evaluation.network)

    def layer_of(self, evaluation: Evaluation, call: Call) -> Layer | None:
        """The layer that makes a self-attention call, which this counts; None for cross-attention, and for what is no layer of the video."""
        number = self.number(evaluation, call.options)
        if number is None:
            return None
        nth, evaluation.calls = evaluation.calls, evaluation.calls + 1
        # Lengths tell cross-attention, except where the text is as long as the video. Then the order does: self, cross, self, cross.
        if self.cross_attends and evaluation.text_tokens == call.seq_q and nth % 2:
            return None
        evaluation.layers += 1
        times, evaluation.numbers[number] = evaluation.numbers[number], evaluation.numbers[number] + 1
        if times == 0:
            return Layer(number)
        return Layer(number, self.stacks[times - 1] if times <= len(self.stacks) else f"call {times + 1}")
