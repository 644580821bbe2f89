"""One call's way: gates, then the method's plan, then the kernel; or Dense with the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask, SparsePlan, TokenOrder
from .call import AttentionCall, Dense
from .config import MethodConfig
from .layout import picture_rows
from .schedule import in_layers
from .session import Session

# Below these lengths planning and short index lists cost more than the skipped pairs save.
# "cpu": measured, benchmarks/results/cpu_min_tokens.md. "gpu": not measured yet; low enough to leave no video out.
MIN_TOKENS = {"cpu": 4096, "gpu": 4096}
_OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # torch's own name since 2.5


def least_tokens(config: MethodConfig, device: torch.device) -> int:
    """Sequences shorter than this stay dense."""
    return config.min_tokens if config.min_tokens >= 0 else MIN_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def sparse_attention(call: AttentionCall, session: Session) -> Tensor | Dense:
    """The call's output [B, H, S, D], computed sparsely; or Dense, with the output where planning computed it."""
    refusal = _gate(call, session)
    if refusal is not None:
        return refusal
    try:
        return _plan_and_run(call, session)
    except _OUT_OF_MEMORY:
        heads = session.head_chunk or call.q.shape[1]
        session.head_chunk = max(1, heads // 2)
        session.note(f"out of memory in the sparse path: that call ran dense, and from then on {session.head_chunk} heads are computed at a time")
        return Dense("out of memory in the sparse path")


def _plan_and_run(call: AttentionCall, session: Session) -> Tensor | Dense:
    state = session.state(call)
    plan = session.method.plan(call, session.config, state)
    if isinstance(plan, Dense):
        return plan
    out = _run(call, plan, session)
    session.record.sparse(call, state.figures)
    if session.record.wants_picture(call):
        rows = picture_rows(call.layout).to(call.q.device)
        session.record.picture(call, kernels.kept_pairs(plan, rows, rows, (*call.q.shape[:3], call.k.shape[2])))
    return out


def stays_dense(session: Session, step: int, layer: int) -> Dense | None:
    """Why a layer stays dense in a step, whatever its tensors are; None where it may be sparse."""
    if session.disabled:
        return Dense(session.disabled)
    if step < session.first_step:
        return Dense("warm-up step", planned=True)
    if session.schedule.is_end(step):
        return Dense("one of the last steps", planned=True)
    if in_layers(layer, session.dense_layers, session.layers):
        return Dense("dense layer", planned=True)
    return None


def _gate(call: AttentionCall, session: Session) -> Dense | None:
    """Why this call stays dense before any tensor is read."""
    refusal = stays_dense(session, call.step, call.layer)
    if refusal is not None:
        return refusal
    config = session.config
    if call.q.shape[2] != call.layout.seq_len:
        return Dense(f"the sequence has {call.q.shape[2]} tokens, the layout {call.layout} has {call.layout.seq_len}")
    if call.layout.frames == 1:
        return Dense("one latent frame: there are no other frames to skip")
    if not call.q.shape == call.k.shape == call.v.shape:
        shapes = f"q {tuple(call.q.shape)}, k {tuple(call.k.shape)} and v {tuple(call.v.shape)}"
        return Dense(f"{shapes} differ (grouped heads or another length)")
    least = least_tokens(config, call.q.device)
    if call.q.shape[2] < least:
        return Dense(f"{call.q.shape[2]} tokens are fewer than min_tokens ({least})", planned=True)
    if session.backend != "auto":
        reason = kernels.why_not(session.backend, call.q, call.k, call.v)
        if reason is not None:
            return Dense(reason)
    if config.strict and (reason := _why_not_in_precision(call, session)):
        return Dense(reason)
    if session.record.backend is None:
        _say_backend(call, session)
    return None


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
        session.note(f"{reason}; computed in {str(call.q.dtype).removeprefix('torch.')}")
    heads = call.q.shape[1]
    if session.head_chunk is None or session.head_chunk >= heads:
        return _kernel(call, plan, session.backend, precision, slice(None))
    step = session.head_chunk
    parts = [_kernel(call, plan, session.backend, precision, slice(start, start + step)) for start in range(0, heads, step)]
    return torch.cat(parts, 1)


def _kernel(call: AttentionCall, plan: SparsePlan, backend: str, precision: str, heads: slice) -> Tensor:
    mask, q_order, k_order = (_heads_of(part, call.q.shape, heads) for part in (plan.mask, plan.q_order, plan.k_order))
    return kernels.block_sparse_attention(
        call.q[:, heads], call.k[:, heads], call.v[:, heads], mask, q_order=q_order, k_order=k_order,
        scale=call.scale, key_bias=call.key_bias, backend=backend, precision=precision,
    )


def _heads_of(part: BlockMask | TokenOrder | None, shape: torch.Size, heads: slice) -> BlockMask | TokenOrder | None:
    """The mask or order of some heads, as a view."""
    if part is None or heads == slice(None):
        return part
    part = part.expand(shape[0], shape[1])
    if isinstance(part, TokenOrder):
        return part.for_heads(part.head_order[:, heads])
    return BlockMask(part.kv_num_blocks[:, heads], part.kv_indices[:, heads], part.block_q, part.block_k, part.seq_q, part.seq_k)
