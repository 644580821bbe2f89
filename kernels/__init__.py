"""The public ops over block masks, and the choice of a backend.

Three implementations of one definition: `reference` (plain torch, obviously right), `torch` (plain torch at speed, any
device) and `triton`. A backend asked for by name is used or refused, never replaced; "auto" takes Triton where it can
run and torch where it cannot.

q, k, v are [B, H, S, D] views with any strides. Masked-out keys: `key_bias` values at or below half of float32's
lowest (or of the bias's own dtype's lowest) mean minus infinity. A row with no visible key gives output 0, LSE minus
infinity and mass 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import BlockMask, PooledBlocks, SparsePlan, TokenOrder, density, kept_pairs, num_blocks
from .capability import BACKENDS, PRECISIONS, why_failed, why_not

__all__ = [
    "BACKENDS", "PRECISIONS", "BlockMask", "OutOfMemoryError", "PooledBlocks", "SparsePlan", "TokenOrder", "TritonError",
    "attention_with_lse", "attention_with_mass", "block_errors", "block_mass", "block_sparse_attention", "choose_backend", "density",
    "is_out_of_memory", "kept_pairs", "pool_blocks", "sampled_errors", "why_not",
]


def choose_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, precision: str = "auto") -> str:
    """The backend that takes this call. "auto" is Triton where it can, else torch, which has no 8 bits.

    Raises ValueError with the reason where a named backend, or any in a named precision, cannot.
    """
    if backend == "auto" and precision != "auto":
        backend = "triton"
    if backend == "auto":
        return "triton" if why_not("triton", q, k, v, mask) is None else "torch"
    reason = why_not(backend, q, k, v, mask, precision)
    if reason is not None:
        raise ValueError(reason)
    return backend


class TritonError(RuntimeError):
    """A Triton kernel did not compile, or broke off; the message is a sentence for the person. Memory that runs out is no such failure."""


# torch's own name since 2.5.
OutOfMemoryError = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


# What devices say that raise a plain RuntimeError or OSError: Apple's, a driver below torch, and the CPU's two allocators.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _NO_MEMORY)


def _implementation(backend: str):
    if backend == "reference":
        from . import reference as ops
    elif backend == "torch":
        from . import torch_ops as ops
    else:
        return _Triton()
    return ops


class _Triton:
    """The ops in Triton, whose failures say that they are Triton's."""

    def __getattr__(self, name: str):
        def op(*arguments):
            try:
                from . import triton_ops

                return getattr(triton_ops, name)(*arguments)
            except Exception as error:
                if is_out_of_memory(error):  # a kernel's own launch has a plain RuntimeError
                    raise
                raise TritonError(why_failed(error)) from error

        return op


def _check_qkv(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}" + ("" if v is None else f", v {tuple(v.shape)}")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected q, k, v [B, H, S, D] with equal B, H and D: {shapes}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"expected k and v of one shape: {shapes}")
    if k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        raise ValueError(f"expected q, k and v of one dtype: q {q.dtype}, k {k.dtype}" + ("" if v is None else f", v {v.dtype}"))


def _check_plan(q: Tensor, k: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None) -> None:
    for name, length, order, tensor in (("seq_q", mask.seq_q, q_order, q), ("seq_k", mask.seq_k, k_order, k)):
        expected = tensor.shape[2] if order is None else order.length
        if length != expected:
            raise ValueError(f"the mask's {name} is {length}, and the {'tensor' if order is None else 'order'} has {expected}")
    for name, shape in (("mask", mask.kv_num_blocks.shape), *((n, o.head_order.shape) for n, o in (("q_order", q_order), ("k_order", k_order)) if o)):
        if shape[0] not in (1, q.shape[0]) or shape[1] not in (1, q.shape[1]):
            raise ValueError(f"{name} has B, H {tuple(shape[:2])}, and q has {tuple(q.shape[:2])}")


def _check_pooled(pooled: PooledBlocks, k: Tensor, blocks: int) -> None:
    shape = (*k.shape[:2], blocks, k.shape[3])
    for name, tensor, expected in (("keys", pooled.keys, shape), ("values", pooled.values, shape), ("log_size", pooled.log_size, shape[:3])):
        if tensor.shape != expected:
            raise ValueError(f"pooled.{name} is {tuple(tensor.shape)}: expected {expected}")
    for name, tensor, dtype in (("keys", pooled.keys, k.dtype), ("values", pooled.values, k.dtype), ("log_size", pooled.log_size, torch.float32)):
        if tensor.dtype != dtype:
            raise ValueError(f"pooled.{name} is {tensor.dtype}: expected {dtype}")


def _bias(key_bias: Tensor | None, k: Tensor) -> Tensor | None:
    """float32 [B, S_k], minus infinity where the bias means it."""
    if key_bias is None:
        return None
    if key_bias.dim() != 2 or key_bias.shape[0] not in (1, k.shape[0]) or key_bias.shape[1] != k.shape[2]:
        raise ValueError(f"key_bias is {tuple(key_bias.shape)}: expected [{k.shape[0]} or 1, {k.shape[2]}]")
    # Hosts write "never" as their own dtype's lowest number; half of it leaves room for what was added since.
    floor = torch.finfo(key_bias.dtype).min / 2
    bias = torch.where(key_bias <= floor, -torch.inf, key_bias.float())
    return bias.expand(k.shape[0], -1)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, q_order: TokenOrder | None = None, k_order: TokenOrder | None = None,
    scale: float | None = None, key_bias: Tensor | None = None, return_lse: bool = False, backend: str = "auto", precision: str = "auto",
    pooled: PooledBlocks | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the kept blocks alone, or with `pooled` over them and each other block as one key.

    q, k, v: [B, H, S, D]. With an order, the mask's positions are the order's. scale: 1/sqrt(D) where None.
    key_bias: [B or 1, S_k], added to the scores, in tensor row order. Returns out [B, H, S_q, D] (laid out so that
    [B, S, H, D] is contiguous), and with `return_lse` the log-sum-exp [B, H, S_q], float32, natural logarithm, in
    tensor row order. precision: "auto" is the tensors' own, "int8" takes Q times K in 8 bits and "fp8" weights times V
    too (`quantise.py`). pooled: what `pool_blocks` made of this k and v with this mask's block_k, order and bias. A block that a row
    of the mask does not keep then takes part in its softmax, and so in the LSE, as one key with the score scale q.key + log_size, in
    the tensors' own precision (the zeroth-order correction of PISA, arXiv 2602.01077). Raises ValueError where shapes contradict one
    another, or a named backend or precision cannot be had.
    """
    _check_qkv(q, k, v)
    _check_plan(q, k, mask, q_order, k_order)
    if pooled is not None:
        _check_pooled(pooled, k, mask.num_k_blocks)
    ops = _implementation(choose_backend(backend, q, k, v, mask, precision))
    arguments = (q, k, v, mask, q_order, k_order, _scale(scale, q), _bias(key_bias, k), return_lse)
    if precision == "auto":
        out, lse = ops.block_sparse_attention(*arguments, pooled)
    else:
        out, lse = ops.block_sparse_attention_8bit(*arguments, precision, pooled)
    return (out, lse) if return_lse else out


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_bias: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense attention and its log-sum-exp [B, H, S_q], float32, natural logarithm. Arguments as for `block_sparse_attention`."""
    _check_qkv(q, k, v)
    ops = _implementation(choose_backend(backend, q, k, v))
    return ops.attention_with_lse(q, k, v, _scale(scale, q), _bias(key_bias, k))


def _by_blocks(backend: str, q: Tensor, k: Tensor, v: Tensor, **blocks: int):
    """What computes an op over all blocks of the sizes named. Raises ValueError for a backend that cannot take the call."""
    odd = next((f"{name} is {block}" for name, block in blocks.items() if block % 16), None)
    if backend == "auto" and odd:
        backend = "torch"  # Triton's tiles are multiples of 16
    backend = choose_backend(backend, q, k, v)
    if backend == "triton" and odd:
        raise ValueError(f"the Triton kernels take blocks that are multiples of 16, and {odd}")
    return _implementation(backend)


def _check_lse(lse: Tensor, q: Tensor) -> None:
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse is {tuple(lse.shape)}: expected {tuple(q.shape[:3])}")


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, *, q_order: TokenOrder | None = None, k_order: TokenOrder | None = None,
    scale: float | None = None, key_bias: Tensor | None = None, backend: str = "auto",
) -> Tensor:
    """The softmax mass of every pair of blocks (AdaSpa, equation 13), float32 [B, H, Q, K].

    lse: [B, H, S_q], current or from an earlier step; a row of minus infinity has no mass. With a current LSE the
    masses of a row of blocks sum to its number of real rows.
    """
    _check_qkv(q, k, None)
    _check_lse(lse, q)
    ops = _by_blocks(backend, q, k, k, block_q=block_q, block_k=block_k)
    return ops.block_mass(q, k, lse.float(), block_q, block_k, q_order, k_order, _scale(scale, q), _bias(key_bias, k))


def attention_with_mass(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, *, q_order: TokenOrder | None = None, k_order: TokenOrder | None = None,
    scale: float | None = None, key_bias: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention that gathers the block masses on its way: a search without a second pass over q and k.

    lse: [B, H, S_q] of an earlier step, since this step's own is only known at the end. Returns out and this step's
    LSE as `attention_with_lse` does, and the mass [B, H, Q, K] that `block_mass` gives for the `lse` handed in. An
    extension of AdaSpa (arXiv 2502.21079, section 4.1), which spends a second pass. Each order holds every row.
    """
    _check_qkv(q, k, v)
    _check_lse(lse, q)
    ops = _by_blocks(backend, q, k, v, block_q=block_q, block_k=block_k)
    return ops.attention_with_mass(q, k, v, lse.float(), block_q, block_k, q_order, k_order, _scale(scale, q), _bias(key_bias, k))


def pool_blocks(
    k: Tensor, v: Tensor, block_k: int, *, k_order: TokenOrder | None = None, key_bias: Tensor | None = None, backend: str = "auto",
) -> PooledBlocks:
    """Each block of keys as one key: its mean key, its mean value and the logarithm of its size.

    k, v: [B, H, S_k, D]. With an order, blocks are of its positions, and padding counts nothing. key_bias: [B or 1, S_k]; a key
    counts exp(bias), so one of minus infinity counts nothing, whatever is in its memory. A block without a visible key is 0, with
    a log_size of minus infinity. Means are summed in float32 (float64 of such tensors) and rounded to k's dtype once. Raises
    ValueError where shapes contradict one another or a named backend cannot be had.
    """
    _check_qkv(k, k, v)
    ops = _by_blocks(backend, k, k, v, block_k=block_k)
    return ops.pool_blocks(k, v, block_k, k_order, _bias(key_bias, k))


def block_errors(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, *, pooled: PooledBlocks | None = None,
    q_order: TokenOrder | None = None, k_order: TokenOrder | None = None, scale: float | None = None, key_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What each pair of blocks loses where the key block counts as one key, float32 [B, H, Q, K].

    The sum, over the real rows of the query block, of the squared length of what the key block's keys add to the output less what
    the pooled key adds in their place: |sum_j p_j v_j - p v|^2 with p_j = exp(score_j - LSE), p = exp(scale q.key + log_size - LSE) and
    v the pooled value. lse: [B, H, S_q] of dense attention, current or of an earlier step; a row of minus infinity adds nothing.
    pooled: made of k and v by `pool_blocks` where None. Raises ValueError as `block_mass` does, and for pooled blocks of another shape.
    """
    _check_qkv(q, k, v)
    _check_lse(lse, q)
    ops = _by_blocks(backend, q, k, v, block_q=block_q, block_k=block_k)
    bias = _bias(key_bias, k)
    if pooled is None:
        pooled = ops.pool_blocks(k, v, block_k, k_order, bias)
    _check_pooled(pooled, k, num_blocks(k.shape[2] if k_order is None else k_order.length, block_k))
    return ops.block_errors(q, k, v, lse.float(), block_q, block_k, pooled, q_order, k_order, _scale(scale, q), bias)


def sampled_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, candidates: list[SparsePlan], *, scale: float | None = None,
    key_bias: Tensor | None = None, backend: str = "auto",
) -> Tensor:
    """What each candidate plan would cost on a sample of rows (SVG, algorithm 1), float32 [C, B, H].

    rows: [R] integers, tensor rows. The error is the mean square, over the sampled rows and D, of the candidate's
    output minus dense attention's. What a plan has pooled is left out: its skipped blocks count as nothing here.
    """
    _check_qkv(q, k, v)
    for plan in candidates:
        _check_plan(q, k, plan.mask, plan.q_order, plan.k_order)
    ops = _implementation(choose_backend(backend, q, k, v))
    return ops.sampled_errors(q, k, v, rows, candidates, _scale(scale, q), _bias(key_bias, k))
