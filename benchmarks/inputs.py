"""The attention calls that are measured: shapes of video models, and q, k, v that are random or look like a video's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pack import kernels
from pack.attention.call import AttentionCall, Dense
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS
from pack.attention.record import RunRecord
from pack.attention.session import Session
from pack.attention.warmup import make_schedule
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One self-attention call of a video model, batch 1."""

    name: str
    about: str
    layout: VideoLayout
    heads: int
    head_dim: int


SHAPES = (
    Shape("wan-720p", "Wan 14B, 1280x720, 81 frames", VideoLayout(21, 45, 80), 40, 128),
    Shape("wan-480p", "Wan 14B, 832x480, 81 frames", VideoLayout(21, 30, 52), 40, 128),
    Shape("hunyuan-720p", "HunyuanVideo, 1280x720, 129 frames, 256 text tokens", VideoLayout(33, 45, 80, suffix=256), 24, 128),
    Shape("ltx-2", "LTX-2, 1920x1088, 153 frames", VideoLayout(20, 34, 60), 32, 128),
    Shape("cogvideox", "CogVideoX 1.5, 1360x768, 81 frames, 226 text tokens", VideoLayout(11, 48, 85, prefix=226), 48, 64),
)
# For the interpreter: every path in seconds. Ragged ends, text, both usual head_dims.
TINY_SHAPES = (
    Shape("tiny", "no model's", VideoLayout(3, 8, 9), 2, 64),
    Shape("tiny-text", "no model's", VideoLayout(3, 6, 8, suffix=20), 2, 128),
)


def random_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Normal q, k, v: [1, H, S, D] views of [1, S, H, D], as a host gives them."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, shape.layout.seq_len, shape.heads, shape.head_dim)
    return [torch.empty(size, dtype=dtype, device=device).normal_(generator=generator).transpose(1, 2) for _ in range(3)]


# Standard deviations of what a head looks at, in latent tokens (frames, rows, columns): a spatial, a temporal, a local and a wide head.
_SIGHT = ((1.0, 12.0, 12.0), (16.0, 1.5, 1.5), (2.0, 4.0, 4.0), (12.0, 20.0, 20.0))
# The logit of a token with itself, and what text and first frame get on top of theirs.
_PEAK, _SINK = 9.0, 4.0


def structured_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v with a video's habits, [1, H, S, D] views of [1, S, H, D].

    Heads take turns in what they look at (`_SIGHT`): the scores fall off with the distance in space and time, since q
    and k carry random Fourier features of the position. Text and the first frame draw every query. K has a bias by
    channel with a few channels far out, as trained models have; v is smooth in space and time, with noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    layout, dim = shape.layout, shape.head_dim
    q, k, v = (torch.empty(1, layout.seq_len, shape.heads, dim, dtype=dtype, device=device) for _ in range(3))
    places = _places(layout, device)
    first_frame = torch.zeros(layout.seq_len, 1, device=device)
    first_frame[layout.sink_rows(torch.device(device)).long()] = 1
    first_frame[layout.video_rows(torch.device(device))[0].flatten().long()] = 1
    for head in range(shape.heads):
        sight = torch.tensor(_SIGHT[head % len(_SIGHT)], device=device)
        # phi(a) . phi(b) is about exp(-|a - b|^2 / 2) for places in units of the head's sight.
        features = _fourier(places / sight, dim, generator)
        pull = torch.nn.functional.normalize(torch.randn(dim, generator=generator, device=device), dim=0)
        amplitude = (_PEAK * dim**0.5) ** 0.5
        sink = (_SINK * dim**0.5) ** 0.5
        bias = 2 * torch.randn(dim, generator=generator, device=device)
        bias[torch.randperm(dim, generator=generator, device=device)[: dim // 32]] *= 6
        noise = torch.randn(3, layout.seq_len, dim, generator=generator, device=device)
        q[0, :, head] = amplitude * features + sink * pull + 0.3 * noise[0]
        k[0, :, head] = amplitude * features + sink * pull * first_frame + bias + 0.3 * noise[1]
        v[0, :, head] = dim**0.5 * _fourier(places / 8, dim, generator) + 0.3 * noise[2]
    return [tensor.transpose(1, 2) for tensor in (q, k, v)]


def _places(layout: VideoLayout, device: str) -> Tensor:
    """(frame, row, column) of each token, float [S, 3]; text tokens lie far from the video and from one another."""
    places = torch.arange(layout.seq_len, device=device, dtype=torch.float32)[:, None].repeat(1, 3) * 1000 + 1e5
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (layout.frames, layout.height, layout.width)]
    places[layout.prefix : layout.prefix + layout.video_tokens] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    return places


def _fourier(places: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Random Fourier features of a Gaussian kernel: [S, dim], each row of norm about 1."""
    frequencies = torch.randn(places.shape[1], dim, generator=generator, device=places.device)
    phases = 2 * math.pi * torch.rand(dim, generator=generator, device=places.device)
    return (places @ frequencies + phases).cos() * math.sqrt(2 / dim)


INPUTS = {"random": random_inputs, "structured": structured_inputs}
# Flow models' sigmas without a shift.
STEPS = 20


def session_of(method_name: str, steps: int = STEPS, **settings) -> Session:
    """A run of a method on sigmas that fall evenly from 1 to 0."""
    method = METHODS[method_name]
    config = method.CONFIG(min_tokens=0, **settings)
    sigmas = [1 - step / steps for step in range(steps + 1)]
    schedule = make_schedule(sigmas, lambda percent: 1 - percent, 1.0, least_warmup=method.LEAST_WARMUP)
    return Session(method, config, schedule, 0, RunRecord(method_name, config, steps))


def method_plan(method_name: str, q: Tensor, k: Tensor, v: Tensor, layout: VideoLayout, density: float, backend: str = "auto") -> kernels.SparsePlan:
    """What a method plans for these tensors: SVG's classified bands, AdaSpa's searched blocks."""
    session = session_of(method_name, sparsity=1 - density, dense_layers="", backend=backend)
    for step in range(session.first_step, session.schedule.warmup + 1):
        call = AttentionCall(q, k, v, layout, 0, step, "a")
        plan = session.method.plan(call, session.config, session.state(call))
    if isinstance(plan, Dense):
        raise RuntimeError(f"{method_name} made no plan: {plan.reason}")
    return plan
