"""What each token of a video is, from the definition; and the runs and calls that the tests play."""

import functools

import torch
from pack.attention.budget import BLOCK_K
from pack.attention.call import AttentionCall
from pack.attention.layout import VideoLayout
from pack.attention.record import RunRecord
from pack.attention.schedule import Schedule
from pack.attention.session import Session
from pack.kernels import reference

LAYOUTS = {
    "9x16x16": VideoLayout(9, 16, 16),
    "5x10x13+prefix": VideoLayout(5, 10, 13, prefix=19),
    "3x12x12+both": VideoLayout(3, 12, 12, prefix=5, suffix=11),
    "7x9x11+suffix": VideoLayout(7, 9, 11, suffix=137),
    "4x7x9": VideoLayout(4, 7, 9),
    "2x3x5+prefix": VideoLayout(2, 3, 5, prefix=3),
}


def is_text(layout):
    """bool [S]: the tokens before and after the video."""
    row = torch.arange(layout.seq_len)
    return (row < layout.prefix) | (row >= layout.prefix + layout.frames * layout.height * layout.width)


def frame_and_patch(layout):
    """int64 [S] each; meaningless where the token is text."""
    number = torch.arange(layout.seq_len) - layout.prefix
    per_frame = layout.height * layout.width
    return number // per_frame, number % per_frame


def place(layout, kind):
    """int64 [S]: v = frame x N + patch for "spatial", u = patch x F + frame for "temporal"."""
    frame, patch = frame_and_patch(layout)
    return frame * layout.height * layout.width + patch if kind == "spatial" else patch * layout.frames + frame


def hilbert_curve(bits):
    """Every (x, y, z) of a cube of 2^bits along Hilbert's curve: from the place to the coordinates, by J. Skilling's algorithm (2004)."""
    walk = []
    for place in range(8**bits):
        # Every third bit of the place, the highest first, is one coordinate's.
        axes = [sum(((place >> (3 * bit + 2 - axis)) & 1) << bit for bit in range(bits)) for axis in range(3)]
        carry = axes[2] >> 1
        axes = [axes[0] ^ carry, axes[1] ^ axes[0], axes[2] ^ axes[1]]  # out of Gray code
        for bit in range(1, bits):
            low = (1 << bit) - 1
            for axis in (2, 1, 0):
                if axes[axis] >> bit & 1:
                    axes[0] ^= low
                else:
                    swap = (axes[0] ^ axes[axis]) & low
                    axes[0] ^= swap
                    axes[axis] ^= swap
        walk.append(tuple(axes))
    return walk


@functools.cache
def video_rows(layout, kind):
    """Tensor rows of the video in a kind's order, a list."""
    if kind == "hilbert":
        size = (layout.frames, layout.height, layout.width)
        inside = [at for at in hilbert_curve(max(1, (max(size) - 1).bit_length())) if all(x < most for x, most in zip(at, size, strict=True))]
        return [layout.prefix + (f * layout.height + y) * layout.width + x for f, y, x in inside]
    box = [(f, y, x) for f in range(layout.frames) for y in range(layout.height) for x in range(layout.width)]
    keys = {
        "spatial": lambda f, y, x: (f, y, x), "raster": lambda f, y, x: (f, y, x), "temporal": lambda f, y, x: (y, x, f),
        "tile": lambda f, y, x: (f // 4, y // 4, x // 4, f % 4, y % 4, x % 4),
    }
    return [layout.prefix + (f * layout.height + y) * layout.width + x for f, y, x in sorted(box, key=lambda fyx: keys[kind](*fyx))]


def chunks(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def key_blocks(layout, token_order):
    """Rows of each block of 64 keys where text comes first and then the video in an order, lists of lists."""
    return chunks(is_text(layout).nonzero()[:, 0].tolist(), BLOCK_K) + chunks(video_rows(layout, token_order), BLOCK_K)


def query_blocks(layout, token_order, block_q=128):
    """The same of queries."""
    return chunks(is_text(layout).nonzero()[:, 0].tolist(), block_q) + chunks(video_rows(layout, token_order), block_q)


def as_one_key(config, layout):
    """The blocks that a method's skipped keys count as, as `oracle.attention` takes them; None where they count as nothing."""
    return key_blocks(layout, config.token_order) if getattr(config, "skipped_blocks", "drop") == "mean" else None


def token_mask(plan, layout, batch=1, heads=1):
    """bool [B, H, S, S]: which key row each query row sees under a plan."""
    return reference.token_mask(plan.mask, plan.q_order, plan.k_order, batch, heads, layout.seq_len, layout.seq_len)


def make_session(method, steps=10, warmup=2, end=0, refresh_at=5, layers=None, seed=7, **knobs):
    """A run on a linear schedule that leaves no video out for being short."""
    config = method.CONFIG(**{"min_tokens": 0, "dense_layers": "", **knobs})
    schedule = Schedule(tuple(1 - step / steps for step in range(steps + 1)), warmup, end, refresh_at)
    record = RunRecord(method.NAME, config, steps=steps, layers=layers, seed=seed, warmup=warmup)
    return Session(method, config, schedule, seed, record, layers=layers)


def random_qkv(layout, batch=1, heads=2, dim=16, seed=0):
    """[B, H, S, D] views, as a projection of [B, S, H x D] leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, layout.seq_len, heads, dim, generator=generator).transpose(2, 3)


def local_qk(places, length, peak, dim=64, seed=0):
    """q = k, [S, D]: scores (at scale 1/sqrt(D)) of about `peak` between tokens at one place, falling off over `length` places."""
    generator = torch.Generator().manual_seed(seed)
    phase = places[:, None] * torch.randn(dim // 2, generator=generator) / length
    return torch.cat([phase.cos(), phase.sin()], 1) * (2 * peak / dim**0.5) ** 0.5


def make_call(layout, qkv=None, step=3, layer=1, condition="positive", key_bias=None, scale=None):
    q, k, v = random_qkv(layout) if qkv is None else qkv
    return AttentionCall(q, k, v, layout, layer, step, condition, scale, key_bias)
