"""Who our kernels are measured against. Each maker returns a call without arguments, or raises `MissingError` with the reason."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pack import kernels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .measuring import MissingError

Call = Callable[[], Tensor]
SDPA_BACKENDS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def own_dense(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Call:
    """Our dense attention, with its LSE."""
    return lambda: kernels.attention_with_lse(q, k, v, backend=backend)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Call:
    """torch's scaled_dot_product_attention; with a backend of `SDPA_BACKENDS` that one alone."""
    if backend is None:
        return lambda: F.scaled_dot_product_attention(q, k, v)
    kind = getattr(SDPBackend, SDPA_BACKENDS[backend], None)
    if kind is None:
        raise MissingError(f"torch {torch.__version__} has no such backend")

    def call() -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def sage(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """SageAttention: dense, QK in 8 bits."""
    module = _module("sageattention")
    return lambda: module.sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def dense_opponents(q: Tensor, k: Tensor, v: Tensor, backend: str) -> dict[str, Callable[[], Call]]:
    """Name -> maker of a call."""
    makers = {"ours, dense": lambda: own_dense(q, k, v, backend), "SDPA, default": lambda: sdpa(q, k, v)}
    makers |= {f"SDPA, {name}": lambda name=name: sdpa(q, k, v, name) for name in SDPA_BACKENDS}
    return makers | {"SageAttention": lambda: sage(q, k, v)}


def exact_16_bit(name: str) -> bool:
    """Whether a dense opponent computes what we compute, in the tensors' own precision: the ideal is measured by these."""
    return name == "ours, dense" or name.startswith("SDPA")


def flex(q: Tensor, k: Tensor, v: Tensor, mask: kernels.BlockMask) -> Call:
    """FlexAttention over the same blocks; compiled on a GPU, eager on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = flex_mask(mask, compiled=q.is_cuda)
    if not q.is_cuda:
        return lambda: flex_attention(q, k, v, block_mask=block_mask)
    # Tiles that divide the mask's blocks: Flex refuses others.
    options = {"BLOCK_M": mask.block_q, "BLOCK_N": mask.block_k}
    return lambda: _compiled_flex()(q, k, v, block_mask=block_mask, kernel_options=options)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # Each shape is compiled once more, so that none runs a slower kernel for any shape; past the limit torch would run eagerly.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(mask: kernels.BlockMask, compiled: bool):
    """The mask as FlexAttention's own, every kept block a full one, which takes its fast path."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = mask.to_blocks()
    counts = blocks.sum(-1, dtype=torch.int32)
    # Kept blocks first, in order; as many slots as columns, so that one compiled kernel serves every density.
    indices = (~blocks).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)

    def visible(b, h, q_row, k_row):
        return blocks[b, h, q_row // mask.block_q, k_row // mask.block_k]

    arguments = {"BLOCK_SIZE": (mask.block_q, mask.block_k), "seq_lengths": (mask.seq_q, mask.seq_k), "compute_q_blocks": False}
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices,
        # Eager evaluates the function for every pair; compiled, a full block never asks.
        mask_mod=None if compiled else visible, **{name: value for name, value in arguments.items() if name in known},
    )


def sol(q: Tensor, k: Tensor, v: Tensor, density: float) -> Call:
    """comfy-kitchen's sol_attn keeping this share of key blocks exactly; it adds a pooled term for each of the others."""
    reason, module = why_no_sol(), sys.modules.get("comfy_kitchen")
    if reason is not None:
        raise MissingError(reason)
    parts = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    return lambda: module.sol_attn(*parts, topk_ratio=density).transpose(1, 2)


def why_no_sol() -> str | None:
    """Why sol_attn cannot take part, or None."""
    try:
        module = _module("comfy_kitchen")
    except MissingError as error:
        return str(error)
    if not hasattr(module, "sol_attn"):
        return "this comfy-kitchen has no sol_attn"
    available = getattr(module, "sol_attn_is_available", None)
    return "comfy-kitchen says that its sol_attn is not available here" if available is not None and not available() else None


def _module(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another torch fails with whatever its extension raises
        raise MissingError(f"{name} cannot be imported ({type(error).__name__}: {error})") from error
