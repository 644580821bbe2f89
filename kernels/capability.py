"""Why a backend cannot take a call: a sentence for the person, or None."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import subprocess

import torch
from torch import Tensor

from .block_mask import BlockMask

BACKENDS = ("triton", "torch", "reference")
PRECISIONS = ("auto", "int8", "fp8")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TORCH_DTYPES = (*TRITON_DTYPES, torch.float64)
TRITON_MAX_HEAD_DIM = 256
# Triton's matrix instructions need 16 rows; more than 128 by 128 does not fit the registers of any chip.
TRITON_BLOCKS = (16, 32, 64, 128)

# The Triton release that each torch release was built with, where torch's own metadata does not say so (Windows, CPU wheels).
_TRITON_OF_TORCH = {"2.7": "3.3", "2.8": "3.4", "2.9": "3.5", "2.10": "3.6", "2.13": "3.7"}


def why_not(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, precision: str = "auto") -> str | None:
    """Why `backend` ("triton", "torch", "reference") cannot take this call, as a sentence; None where it can.

    q, k, v: [B, H, S, D]; only shape, dtype and device are read. precision: "auto" is the tensors' own, "int8" and "fp8"
    are asked of the block-sparse forward alone. Raises ValueError for a name that is no backend or precision.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if backend == "torch" and precision != "auto":
        return "the torch backend computes in the tensors' own precision alone"
    if backend != "triton":
        return None if q.dtype in TORCH_DTYPES else f"torch's operations take no attention in {_name(q.dtype)}"
    return _why_not_triton(q, mask) or (None if precision == "auto" else _why_not_8_bits(q, precision))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_not_8_bits(q: Tensor, precision: str) -> str | None:
    """Where the Triton kernels run at all."""
    if interpreted():
        return None
    if q.dtype == torch.float32:
        return "8 bits are offered for tensors of 16, and these are float32"
    if precision == "int8":
        return None  # every GPU that the Triton kernels take has matrix instructions for it
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(q.device).gcnArchName.split(":")[0]
        return None if e4m3_kind(arch) else f"{arch} has no matrix instructions in e4m3: that takes gfx942, gfx950 or gfx12"
    if torch.cuda.get_device_capability(q.device) < (8, 9):
        return f"fp8 takes compute capability 8.9, and {torch.cuda.get_device_name(q.device)} is older"
    return None


def e4m3_kind(arch: str) -> torch.dtype | None:
    """The e4m3 that an architecture ("sm_90", "gfx942") multiplies in, None where it has none. gfx94x has one of its own."""
    if arch.startswith("gfx"):
        return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn if arch.startswith(("gfx95", "gfx12")) else None
    return torch.float8_e4m3fn if int(arch.removeprefix("sm_")) >= 89 else None


def _why_not_triton(q: Tensor, mask: BlockMask | None) -> str | None:
    missing = _why_no_triton()
    if missing:
        return missing
    if q.dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {_name(q.dtype)}"
    if q.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"the Triton kernels take a head_dim up to {TRITON_MAX_HEAD_DIM}, not {q.shape[-1]}"
    if mask is not None and not (mask.block_q in TRITON_BLOCKS and mask.block_k in TRITON_BLOCKS):
        return f"the Triton kernels take blocks of {', '.join(map(str, TRITON_BLOCKS))}, not {mask.block_q} by {mask.block_k}"
    if interpreted():
        return "Triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else None
    if q.device.type != "cuda":
        return f"Triton needs a GPU (CUDA or ROCm), and these tensors are on {q.device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        # Triton 3.2 and later compile for 7.5, but without its matrix instructions.
        return f"Triton uses no matrix instructions below compute capability 8.0, and {torch.cuda.get_device_name(q.device)} is older"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, through its interpreter (TRITON_INTERPRET=1), for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
        import triton.language  # a broken install often fails only here
    except Exception as error:  # a wrong build fails with whatever its C extension raises
        return f"Triton cannot be imported ({type(error).__name__}: {error}); for this torch install {fitting_triton()}"
    wanted = _fitting_version()
    have = _major_minor(triton.__version__)
    if wanted and tuple(map(int, have.split("."))) < tuple(map(int, wanted.split("."))):
        return f"Triton {triton.__version__} is too old for torch {torch.__version__}; install {fitting_triton()}"
    return None


# The longest part of an error's own words that is told.
_MOST_WORDS = 200


def why_failed(error: Exception) -> str:
    """What to say of a Triton kernel that did not compile or run, and what to install where that helps."""
    # A compiler's errors are pages long: Triton's own keep the reason apart from the source that they quote.
    words = " ".join(str(getattr(error, "error_message", None) or error).split())
    words = words if len(words) <= _MOST_WORDS else words[: _MOST_WORDS - 3] + "..."
    sentence = f"Triton failed ({type(error).__name__}" + (f": {words})" if words else ")")
    if "C compiler" in words:
        return f"{sentence}; install a C compiler, such as gcc"
    if isinstance(error, subprocess.CalledProcessError):  # the C compiler ran: what it lacks as a rule is Python.h
        headers = "the folders include and libs of the same Python" if platform.system() == "Windows" else "Python's headers, as in python3-dev"
        return f"{sentence}; its C compiler may lack {headers}"
    wanted = _fitting_version()
    if wanted and wanted != _major_minor(_triton_version()):
        return f"{sentence}; for this torch install {fitting_triton()}"
    return sentence


def _triton_version() -> str:
    import triton

    return triton.__version__


def _major_minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def fitting_triton() -> str:
    """The package, as pip takes it, whose Triton fits the running torch."""
    wanted = _fitting_version()
    if platform.system() == "Windows":
        if wanted is None:
            return "the triton-windows release that its page names for this torch"
        major, minor = map(int, wanted.split("."))
        return f'"triton-windows<{major}.{minor + 1}"'
    return f'"triton=={wanted}.*"' if wanted else "the triton release that came with this torch"


@functools.cache
def _fitting_version() -> str | None:
    """major.minor of the Triton that torch's own metadata asks for, else of the table."""
    try:
        for requirement in importlib.metadata.requires("torch") or ():
            found = re.match(r"(?:pytorch-)?triton(?:-rocm)?\s*\(?==\s*(\d+\.\d+)", requirement)
            if found:
                return found.group(1)
    except importlib.metadata.PackageNotFoundError:
        pass
    return _TRITON_OF_TORCH.get(".".join(torch.__version__.split(".")[:2]))
