"""One call's way: gates, then the method's plan, then the kernel; or Dense with the reason."""

from __future__ import annotations

import logging
import traceback
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask, PooledBlocks, SparsePlan, TokenOrder
from .budget import BLOCK_K, BLOCK_Q
from .call import AttentionCall, Dense
from .config import MethodConfig
from .layout import picture_rows
from .schedule import in_layers
from .session import Session

# Below these lengths planning and short index lists cost more than the skipped pairs save.
# "cpu": measured, benchmarks/results/cpu_min_tokens.md. "gpu": not measured yet; low enough to leave no video out.
MIN_TOKENS = {"cpu": 4096, "gpu": 4096}
_log = logging.getLogger("sparse_video_attention")
_OfHeads = TypeVar("_OfHeads", BlockMask, TokenOrder, PooledBlocks)


def least_tokens(config: MethodConfig, device: torch.device) -> int:
    """Sequences shorter than this stay dense."""
    return config.min_tokens if config.min_tokens >= 0 else MIN_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def sparse_attention(call: AttentionCall, session: Session) -> Tensor | Dense:
    """The call's output [B, H, S, D], computed sparsely; or Dense, with the output where planning computed it."""
    refusal = _gate(call, session)
    if refusal is not None:
        return refusal
    chunk = session.head_chunk
    try:
        return _plan_and_run(call, session)
    except kernels.TritonError as error:
        if session.config.strict:
            raise
        _go_on_without_triton(error, call.step, session)
    except Exception as error:
        if session.config.strict or not kernels.is_out_of_memory(error):
            raise
        return _with_fewer_heads(call, chunk, session)
    return sparse_attention(call, session)  # once more: in torch, or dense


def _with_fewer_heads(call: AttentionCall, chunk: int | None, session: Session) -> Dense:
    """Memory ran out, for `chunk` heads at a time or for all: dense this time, and later calls take half as many. After one head, nothing is left."""
    if chunk == 1:
        session.disabled = session.disabled or "out of memory in the sparse path, one head at a time"
        session.note(f"{session.disabled}: the rest of this run is dense")
        return Dense(session.disabled)
    # Another thread may have come down further.
    session.head_chunk = min(session.head_chunk or call.q.shape[1], max(1, (chunk or call.q.shape[1]) // 2))
    session.note("out of memory in the sparse path: such calls ran dense, and later ones compute fewer heads at a time")
    return Dense("out of memory in the sparse path")


def _go_on_without_triton(error: kernels.TritonError, step: int, session: Session) -> None:
    """The rest of the run is torch's; or dense, where Triton was asked for by name."""
    # As text: a handler that keeps records would keep the call's tensors with the traceback.
    if session.backend == "triton":
        _log.error("a Triton kernel failed; the rest of this run is dense\n%s", traceback.format_exc())
        session.disabled = str(error)
    elif session.backend == "auto":  # not where another thread has been here
        _log.warning("a Triton kernel failed; torch computes the rest of this run\n%s", traceback.format_exc())
        session.backend = session.record.backend = "torch"
        session.note(f"torch backend from step {step + 1} on: {error}")


def _plan_and_run(call: AttentionCall, session: Session) -> Tensor | Dense:
    state = session.state(call)
    plan = session.method.plan(call, session.config, state)
    if isinstance(plan, Dense):
        return plan
    out = _run(call, plan, session)
    if observe := getattr(session.method, "observe", None):
        observe(call, session.config, state, out)
    if session.record.wants_picture(call):
        rows = picture_rows(call.layout).to(call.q.device)
        session.record.picture(call, kernels.kept_pairs(plan, rows, rows, (*call.q.shape[:3], call.k.shape[2])))
    session.record.sparse(call, state.figures)  # last: a call that fails above is a dense one
    return out


def stays_dense(session: Session, step: int, layer: int) -> Dense | None:
    """Why a layer stays dense in a step, whatever its tensors are; None where it may be sparse."""
    if refusal := session.disabled or session.left_to:
        return Dense(refusal)
    if step < session.first_step:
        return Dense("warm-up step", planned=True)
    if session.schedule.is_end(step):
        return Dense("one of the last steps", planned=True)
    if in_layers(layer, session.dense_layers, session.layers):
        return Dense("dense layer", planned=True)
    return None


def looks_ahead(session: Session, step: int, layer: int) -> bool:
    """Whether a dense warm-up call is asked all the same whether it could run sparse: `strict` fails in the first step, not after a warm-up."""
    warming_up = session.config.strict and not session.disabled and step < session.first_step and session.schedule.sparse_after(step)
    return warming_up and not in_layers(layer, session.dense_layers, session.layers)


def _gate(call: AttentionCall, session: Session) -> Dense | None:
    """Why this call stays dense before any tensor is read."""
    dense = stays_dense(session, call.step, call.layer)
    if dense is not None and not looks_ahead(session, call.step, call.layer):
        return dense
    hindrance = _hindrance(call, session)
    if dense is not None:
        return dense if hindrance is None or hindrance.planned else hindrance
    if hindrance is None and session.record.backend is None:
        _say_backend(call, session)
    return hindrance


def _hindrance(call: AttentionCall, session: Session) -> Dense | None:
    """Why this call cannot run sparse, whatever its step and layer."""
    config = session.config
    if 0 in call.q.shape or not call.layout.video_tokens:
        return Dense(f"an empty video: q is {tuple(call.q.shape)}, the layout {call.layout}")
    if call.q.shape[2] != call.layout.seq_len:
        return Dense(f"the sequence has {call.q.shape[2]} tokens, the layout {call.layout} has {call.layout.seq_len}")
    if call.layout.frames == 1:
        return Dense("one latent frame: there are no other frames to skip")
    if not call.q.shape == call.k.shape == call.v.shape:
        shapes = f"q {tuple(call.q.shape)}, k {tuple(call.k.shape)} and v {tuple(call.v.shape)}"
        return Dense(f"{shapes} differ (grouped heads or another length)")
    least = least_tokens(config, call.q.device)
    if call.q.shape[2] < least:
        return Dense(f"{call.q.shape[2]:,} tokens are fewer than min_tokens ({least:,})", planned=True)
    # torch takes every dtype that Triton takes.
    reason = kernels.why_not("torch" if session.backend == "auto" else session.backend, call.q, call.k, call.v)
    if reason is not None:
        return Dense(reason)
    return _hindrance_of_strict(call, session) if config.strict else None


def _hindrance_of_strict(call: AttentionCall, session: Session) -> Dense | None:
    """What `strict` does not let pass: another backend on a GPU, another precision, a kernel that does not compile (raises TritonError)."""
    if session.backend == "auto" and call.q.device.type == "cuda" and (reason := kernels.why_not("triton", call.q, call.k, call.v)):
        return Dense(reason, otherwise="on the torch backend")
    if reason := _why_not_in_precision(call, session):
        return Dense(reason, otherwise=f"in {_dtype(call)}")
    backend = kernels.choose_backend(session.backend, call.q, call.k, call.v, precision=session.precision)
    if backend == "triton":
        session.shared(("tried", call.q.device, call.q.dtype, call.q.shape[3]), lambda: _try_out(call, session))
    return None


def _try_out(call: AttentionCall, session: Session) -> None:
    """Attention over one block, as sparse calls compute it: what does not compile fails here."""
    q, k, v = (tensor[:1, :1, :BLOCK_Q] for tensor in (call.q, call.k, call.v))
    rows = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    blocks = torch.ones(1, 1, -(-len(rows) // BLOCK_Q), -(-len(rows) // BLOCK_K), dtype=torch.bool, device=q.device)
    order = TokenOrder.shared(rows)
    mask = BlockMask.from_blocks(blocks, BLOCK_Q, BLOCK_K, len(rows), len(rows))
    pooled = None
    if getattr(session.config, "skipped_blocks", None) == "mean":
        pooled = kernels.pool_blocks(k, v, BLOCK_K, k_order=order, backend=session.backend)
    kernels.block_sparse_attention(
        q, k, v, mask, q_order=order, k_order=order, scale=call.scale, backend=session.backend, precision=session.precision, pooled=pooled,
    )


def _dtype(call: AttentionCall) -> str:
    return str(call.q.dtype).removeprefix("torch.")


def _say_backend(call: AttentionCall, session: Session) -> None:
    session.record.backend = kernels.choose_backend(session.backend, call.q, call.k, call.v)
    reason = kernels.why_not("triton", call.q, call.k, call.v) if session.record.backend != "triton" and session.backend == "auto" else None
    if reason:
        session.note(f"torch backend: {reason}")


def _why_not_in_precision(call: AttentionCall, session: Session, mask: BlockMask | None = None) -> str | None:
    """Why the call cannot run in the precision that was asked for; None where it can."""
    if session.precision == "auto":
        return None
    backend = "triton" if session.backend == "auto" else session.backend
    reason = kernels.why_not(backend, call.q, call.k, call.v, mask, precision=session.precision)
    return reason and f"precision {session.precision}: {reason}"


def _run(call: AttentionCall, plan: SparsePlan, session: Session) -> Tensor:
    precision, reason = session.precision, _why_not_in_precision(call, session, plan.mask)
    if reason:
        precision = "auto"
        session.note(f"{reason}; computed in {_dtype(call)}")
    try:
        return _in_chunks(call, plan, session, precision)
    except kernels.TritonError as error:
        if precision == "auto" or session.config.strict:
            raise
        _log.warning("a Triton kernel in 8 bits failed; the rest of this run is in %s\n%s", _dtype(call), traceback.format_exc())
        session.note(f"precision {precision}: {error}; computed in {_dtype(call)}")
        session.precision = "auto"
    return _in_chunks(call, plan, session, "auto")


def _in_chunks(call: AttentionCall, plan: SparsePlan, session: Session, precision: str) -> Tensor:
    heads = call.q.shape[1]
    if session.head_chunk is None or session.head_chunk >= heads:
        return _kernel(call, plan, session.backend, precision, slice(None))
    step = session.head_chunk
    parts = [_kernel(call, plan, session.backend, precision, slice(start, start + step)) for start in range(0, heads, step)]
    return torch.cat(parts, 1)


def _kernel(call: AttentionCall, plan: SparsePlan, backend: str, precision: str, heads: slice) -> Tensor:
    mask, q_order, k_order, pooled = (_heads_of(part, call.q.shape, heads) for part in (plan.mask, plan.q_order, plan.k_order, plan.pooled))
    return kernels.block_sparse_attention(
        call.q[:, heads], call.k[:, heads], call.v[:, heads], mask, q_order=q_order, k_order=k_order,
        scale=call.scale, key_bias=call.key_bias, backend=backend, precision=precision, pooled=pooled,
    )


def _heads_of(part: _OfHeads | None, shape: torch.Size, heads: slice) -> _OfHeads | None:
    """What a plan says of some heads, as a view."""
    if part is None or heads == slice(None):
        return part
    if isinstance(part, PooledBlocks):
        return PooledBlocks(*(getattr(part, field.name)[:, heads] for field in fields(part)))
    part = part.expand(shape[0], shape[1])
    if isinstance(part, TokenOrder):
        return part.for_heads(part.head_order[:, heads])
    return BlockMask(part.kv_num_blocks[:, heads], part.kv_indices[:, heads], part.block_q, part.block_k, part.seq_q, part.seq_k)
