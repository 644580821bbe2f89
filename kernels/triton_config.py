"""Which tile, how many warps and how many stages a Triton kernel runs with, by dtype, head_dim and architecture.

The choice is made here, on the host, from a table: an autotuner would stop a user's first step for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .capability import interpreted

LOG2E = math.log2(math.e)


class Config(NamedTuple):
    """A kernel's tile of BLOCK_M queries by BLOCK_N keys, and how it is compiled for it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (family, bytes an element) -> one Config for each head_dim up to 64, 128 and 256. The tiles are the largest: a smaller
# mask block shrinks them. The rows fit the family's shared memory and its registers (tests/triton_kernels/test_compile.py); which
# is fastest has not been measured. sm_75 and float32 get by without matrix instructions: Triton gives the first none
# since 3.2, and the second's would round to TF32.
_FORWARD = {
    ("sm_75", 2): (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 16, 8, 1)),
    ("sm_80", 2): (Config(128, 64, 4, 4), Config(128, 64, 8, 4), Config(64, 32, 4, 3)),
    ("sm_86", 2): (Config(128, 64, 8, 4), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    ("sm_90", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)),
    ("sm_100", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("gfx9", 2): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 1)),
    ("gfx11", 2): (Config(128, 32, 8, 1), Config(128, 16, 8, 1), Config(32, 16, 4, 1)),
    ("gfx12", 2): (Config(128, 32, 8, 1), Config(128, 32, 8, 1), Config(32, 16, 4, 1)),
    ("sm_75", 4): (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 16, 8, 1)),
}
# As _FORWARD, for the dense forward that gathers block masses on its way, which needs some registers more.
_ONE_PASS = _FORWARD | {("sm_86", 2): (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2))}
_FORWARD_FLOAT32 = (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 16, 8, 2))

# As _FORWARD, for the kernel that has no output to accumulate and so more room.
_BLOCK_MASS = {
    ("sm_75", 2): (Config(64, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 16, 8, 1)),
    ("sm_80", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)),
    ("sm_86", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    ("sm_90", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
    ("sm_100", 2): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)),
    ("gfx9", 2): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 2)),
    ("gfx11", 2): (Config(128, 64, 8, 1), Config(128, 32, 8, 1), Config(32, 16, 4, 1)),
    ("gfx12", 2): (Config(128, 64, 8, 1), Config(128, 64, 8, 1), Config(32, 16, 4, 1)),
    ("sm_75", 4): (Config(64, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 16, 8, 1)),
}
_BLOCK_MASS_FLOAT32 = (Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 2))

# As _FORWARD, for the kernel of the block errors, which accumulates an output as well, a block of keys at a time.
_BLOCK_ERRORS = {
    ("sm_75", 2): (Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    ("sm_80", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    ("sm_86", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    ("sm_90", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 2)),
    ("sm_100", 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("gfx9", 2): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 1)),
    ("gfx11", 2): (Config(128, 32, 8, 1), Config(128, 16, 8, 1), Config(32, 16, 4, 1)),
    ("gfx12", 2): (Config(128, 32, 8, 1), Config(128, 32, 8, 1), Config(32, 16, 4, 1)),
    ("sm_75", 4): (Config(32, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}

# As _FORWARD, for the kernel of the sampled errors, which accumulates three outputs. More tiles mean more passes over K and V.
_SAMPLED = {
    ("sm_75", 2): (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    ("sm_80", 2): (Config(64, 64, 4, 3), Config(64, 64, 8, 3), Config(32, 32, 8, 2)),
    ("sm_86", 2): (Config(64, 32, 4, 3), Config(32, 64, 8, 3), Config(32, 16, 8, 2)),
    ("sm_90", 2): (Config(64, 64, 4, 3), Config(64, 64, 8, 3), Config(32, 32, 8, 2)),
    ("sm_100", 2): (Config(64, 64, 4, 3), Config(64, 64, 8, 3), Config(32, 16, 8, 2)),
    ("gfx9", 2): (Config(64, 32, 4, 2), Config(64, 16, 4, 2), Config(32, 16, 4, 1)),
    ("gfx11", 2): (Config(64, 32, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
    ("gfx12", 2): (Config(64, 64, 8, 1), Config(64, 16, 8, 1), Config(16, 16, 8, 1)),
    ("sm_75", 4): (Config(32, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}
_SAMPLED_FLOAT32 = (Config(32, 32, 8, 2), Config(16, 32, 8, 2), Config(16, 16, 8, 2))

# (family, precision) as _FORWARD, for the forward in 8 bits. More stages, since a mask's index list and an order's table are loaded ahead
# too: five leave two tiles of K and V in flight, or three with wgmma. On sm_100 Triton multiplies INT8 by mma.sync, for want of tcgen05's.
_FORWARD_8BIT = {
    ("sm_80", "int8"): (Config(128, 64, 8, 5), Config(128, 32, 8, 5), Config(64, 16, 8, 3)),
    ("sm_86", "int8"): (Config(128, 64, 8, 5), Config(128, 32, 8, 5), Config(64, 16, 8, 3)),
    ("sm_86", "fp8"): (Config(128, 64, 8, 5), Config(128, 64, 8, 5), Config(64, 32, 8, 3)),
    ("sm_90", "int8"): (Config(128, 64, 8, 5), Config(128, 64, 8, 5), Config(128, 64, 8, 3)),
    ("sm_90", "fp8"): (Config(128, 64, 8, 5), Config(128, 64, 8, 5), Config(128, 32, 8, 3)),
    ("sm_100", "int8"): (Config(128, 64, 8, 4), Config(128, 64, 8, 5), Config(64, 32, 8, 3)),
    ("sm_100", "fp8"): (Config(128, 64, 8, 4), Config(128, 64, 8, 5), Config(128, 32, 8, 3)),
    ("gfx9", "int8"): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 1)),
    ("gfx9", "fp8"): (Config(128, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 1)),
    ("gfx11", "int8"): (Config(128, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 16, 4, 1)),
    ("gfx12", "int8"): (Config(128, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 16, 4, 1)),
    ("gfx12", "fp8"): (Config(128, 64, 8, 1), Config(64, 32, 8, 1), Config(32, 16, 4, 1)),
}


def architecture(device: torch.device) -> str:
    """What a device's kernels are compiled for: "sm_90", "gfx942". The interpreter counts as sm_89, which has every precision."""
    return "sm_89" if interpreted() else _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _family(arch: str) -> str:
    """The row of the tables that an architecture shares."""
    if arch.startswith("gfx"):
        return "gfx9" if arch.startswith("gfx9") else "gfx12" if arch.startswith("gfx12") else "gfx11"
    capability = int(arch.removeprefix("sm_"))
    if capability in (86, 89) or capability >= 120:
        return "sm_86"  # 99 KiB of shared memory
    return next(f"sm_{lowest}" for lowest in (100, 90, 80, 75) if capability >= lowest)


def _choose(table: dict, float32: tuple | None, kind: int | str, head_dim: int, arch: str, block_m: int, block_n: int) -> Config:
    """The table's row, with its tile cut to the mask's blocks and its warps to the tile. kind: bytes an element, or a precision."""
    rows = table.get((_family(arch), kind), float32)
    row = rows[0 if head_dim <= 64 else 1 if head_dim <= 128 else 2]
    tile = min(row.block_m, block_m)
    # A smaller tile keeps its rows a warp, since warps that share rows have to talk for each maximum. But 64 rows have the
    # four warps that one wgmma or tcgen05 instruction takes.
    num_warps = max(row.num_warps * tile // row.block_m, min(tile // 16, 4))
    return Config(tile, min(row.block_n, block_n), num_warps, row.num_stages)


def forward_config(element_size: int, head_dim: int, arch: str, block_m: int = 128, block_n: int = 64) -> Config:
    """For the forward kernels. element_size: bytes. block_m, block_n: the largest tile that the mask allows."""
    return _choose(_FORWARD, _FORWARD_FLOAT32, element_size, head_dim, arch, block_m, block_n)


def one_pass_config(element_size: int, head_dim: int, arch: str, block_m: int = 128, block_n: int = 64) -> Config:
    """For the dense forward with block mass. Arguments as for `forward_config`."""
    return _choose(_ONE_PASS, _FORWARD_FLOAT32, element_size, head_dim, arch, block_m, block_n)


def pooled_config(config: Config) -> dict[str, int]:
    """How a forward kernel of a row walks the pooled keys before its main loop, as its arguments.

    In narrow tiles, and few of them ahead: a wide first loop takes registers from the main one, whose work is ten times as much.
    """
    return {"POOLED_N": min(config.block_n, 32), "POOLED_STAGES": max(1, min(config.num_stages - 1, 2))}


def block_mass_config(element_size: int, head_dim: int, arch: str, block_m: int = 128, block_n: int = 64) -> Config:
    """For the block mass. element_size: bytes. block_m, block_n: the largest tile that the wanted blocks allow."""
    return _choose(_BLOCK_MASS, _BLOCK_MASS_FLOAT32, element_size, head_dim, arch, block_m, block_n)


def block_errors_config(element_size: int, head_dim: int, arch: str, block_m: int = 128, block_n: int = 64) -> Config:
    """For the block errors. Arguments as for `block_mass_config`."""
    return _choose(_BLOCK_ERRORS, _FORWARD_FLOAT32, element_size, head_dim, arch, block_m, block_n)


def sampled_config(element_size: int, head_dim: int, arch: str, block_m: int = 64) -> Config:
    """For the sampled errors. element_size: bytes. block_m: the largest tile of sampled rows, at most 64.

    Fewer rows keep the warps, which then share the keys: three outputs leave none of them registers to spare.
    """
    row = _choose(_SAMPLED, _SAMPLED_FLOAT32, element_size, head_dim, arch, 64, 64)
    return row._replace(block_m=min(row.block_m, block_m))


def forward_8bit_config(precision: str, head_dim: int, arch: str, block_m: int = 128, block_n: int = 64) -> tuple[Config, bool, bool]:
    """For the forward in 8 bits. precision: "int8" or "fp8". block_m, block_n: the mask's blocks.

    Returns the row, whether V's keys are interleaved (where a thread's part of the first product is not, byte by byte, that
    of the second), and whether padding is masked by a bias. That costs an addition a score; but a branch between the two
    products makes Triton give mma.sync's warps other rows in each, and the weights then go through shared memory.
    """
    family = _family(arch)
    fp8 = precision == "fp8"
    row = _choose(_FORWARD_8BIT, None, precision, head_dim, arch, block_m, block_n)
    return row, fp8 and family in ("sm_86", "sm_90"), family in ("sm_80", "sm_86")


def padded_head_dim(head_dim: int) -> int:
    """BLOCK_D: the power of two, at least the 16 of a matrix instruction, that holds head_dim."""
    return max(16, 1 << (head_dim - 1).bit_length())


def heads_aligned(*tensors: Tensor) -> bool:
    """Whether each head of [B, H, S, D] tensors starts at a multiple of 16 bytes, which wide loads need to be told."""
    return all(
        (tensor.data_ptr() | (tensor.stride(0) * (tensor.shape[0] > 1) | tensor.stride(1) * (tensor.shape[1] > 1)) * tensor.element_size()) % 16 == 0
        for tensor in tensors
    )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches on that, whatever its arguments lie on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
