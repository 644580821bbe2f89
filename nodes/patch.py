"""Puts a method on a model: wrappers that begin a run, install the attention override for it, and end it.

The patched model carries wrappers and a log, no state. OUTER_SAMPLE makes a session, puts the override into the
guider's options of this run, on top of whatever override stands there by then, and undoes it all at the end. APPLY_MODEL
reads the clock once an evaluation and hands the evaluation to the override through its own copy of the options.
"""

from __future__ import annotations

import functools
import itertools
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Dense
from ..attention.clock import mark
from ..attention.config import AUTOMATIC, Automatic, MethodConfig
from ..attention.dispatch import looks_ahead, sparse_attention, stays_dense
from ..attention.layout import VideoLayout
from ..attention.pattern import Keeping, Pattern
from ..attention.probe import Probe, ProbeConfig
from ..attention.record import RunRecord
from ..attention.schedule import Schedule
from ..attention.session import Session
from ..attention.warmup import WARMUP_PERCENT, make_schedule, without_warmup
from . import host, outlook, pattern_files, video_models
from .model_row import Call, Evaluation, Layer, VideoModel
from .status import StatusLine, hint

# Where a probe node leaves its settings, on a clone of the model.
PROBE = host.KEY + "_probe"
# And a node that loads plans from a file.
PATTERN = host.KEY + "_pattern"
_IN_FEW_STEPS = "few steps ({}): no warm-up, and {:.0%} skipped at each step instead of {:.0%}, as much of the run"
# Two ways to skip the same attention: the host's own takes its calls before they come here, so all is left to it.
_LEFT_TO_HOST = "left to Model Sparse Attention"
_TWO_OF_THEM = "Model Sparse Attention is on this model too: it acts and this node does nothing; bypass one of the two"
_MOST_PATTERNS = 4  # of one model's sampler nodes; they may be large
# Of this process: the runs whose pictures of masks are kept. They take megabytes, and ComfyUI caches the models of many prompts.
_MOST_PICTURED = 8
_pictured: deque[weakref.ref[RunRecord]] = deque()


class RunLog:
    """The records of a model's newest runs, shared by its clones.

    patterns: what runs found, by the node that sampled; kept for runs of a prompt that saves it, or once `pattern_wanted` is set.
    """

    def __init__(self):
        self.runs: deque[RunRecord] = deque(maxlen=16)
        self.patterns: dict[str | None, Pattern] = {}
        self.pattern_wanted = False

    def keep_pattern(self, node: str | None, pattern: Pattern | None) -> None:
        """The pattern of a node's newest run, or None."""
        self.patterns.pop(node, None)
        if pattern is not None:
            self.patterns[node] = pattern
            self.pattern_wanted = False
        while len(self.patterns) > _MOST_PATTERNS:
            del self.patterns[next(iter(self.patterns))]

    def add(self, record: RunRecord) -> None:
        """Adds a run; pictures of masks are kept of a model's newest alone, and of the newest models."""
        for run in list(self.runs):
            run.forget_pictures()
        self.runs.append(record)
        _pictured.append(weakref.ref(record))
        while len(_pictured) > _MOST_PICTURED:
            oldest = _pictured.popleft()()
            if oldest is not None:
                oldest.forget_pictures()

    def newest_of(self, node_id: str) -> RunRecord | None:
        """The newest run that this node sampled."""
        return next((run for run in reversed(list(self.runs)) if run.node == node_id), None)


def install(model: Any, method: ModuleType, config: MethodConfig, node_id: str | None) -> Any:
    """A clone of `model` (a ModelPatcher) whose runs use `method`. A patch of ours that it already carries gives way."""
    patched = model.clone()
    replaced = bool(model.get_wrappers(host.OUTER_SAMPLE, host.KEY))
    for kind in (host.OUTER_SAMPLE, host.APPLY_MODEL):
        patched.remove_wrappers_with_key(kind, host.KEY)
    log = RunLog()
    patched.set_attachments(host.KEY, log)
    note = f"An earlier sparse attention patch on this model gave way to this {method.NAME} one" if replaced else None
    lines = [note, outlook.at_the_node(patched, method.NAME, config)]
    if any(lines):
        host.show_text(" · ".join(line for line in lines if line), node_id)
    patched.add_wrapper_with_key(host.OUTER_SAMPLE, host.KEY, _Run(method, config, node_id, log, note))
    patched.add_wrapper_with_key(host.APPLY_MODEL, host.KEY, _evaluate)
    return patched


def method_of(model: Any) -> str | None:
    """The method of the patch that a model carries, by name."""
    runs = [run for run in model.get_wrappers(host.OUTER_SAMPLE, host.KEY) if isinstance(run, _Run)]
    return runs[-1].method.NAME if runs else None


@dataclass(frozen=True)
class _Run:
    """The OUTER_SAMPLE wrapper: one call is one run. It holds settings, and the log that records go into."""

    method: ModuleType
    config: MethodConfig
    node_id: str | None
    log: RunLog
    note: str | None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        kept = guider.model_options
        options = host.clone_model_options(kept)
        session = self._session(guider, *args, **kwargs)
        asked = guider.model_patcher.get_attachment(PROBE)
        probe = Probe(asked, session) if isinstance(asked, ProbeConfig) else None
        status = StatusLine(self.node_id)
        status.begin(_TWO_OF_THEM if session.left_to else outlook.at_the_start(guider.model_patcher, session, *args, **kwargs))
        transformer_options = options.setdefault("transformer_options", {})
        override = _make_override(session, transformer_options.get(host.OVERRIDE))
        transformer_options[host.OVERRIDE] = override
        transformer_options[host.KEY] = _Active(session, status, override, probe)
        guider.model_options = options
        record = session.record
        try:
            result = executor(*args, **kwargs)
            record.outcome = "finished"
            if (gaps := record.steps_without_calls) and not session.left_to:
                record.note(f"in {gaps} of {record.steps} steps no attention came here, as with a step cache or a sampler that picks its own steps")
            return result
        except BaseException as error:  # an interrupt too: the record says how the run ended
            record.outcome = "interrupted" if "Interrupt" in type(error).__name__ else f"failed ({type(error).__name__})"
            raise
        finally:
            guider.model_options = kept
            self._keep_pattern(session)
            session.end()
            if probe is not None:
                record.probe = probe.end()
            self.log.add(record)
            status.close(record)

    def _keep_pattern(self, session: Session) -> None:
        """Takes what the run found out of it, where that was asked for."""
        pattern = None
        if session.keeping is not None and session.record.outcome == "finished":
            try:
                pattern = session.found_pattern(session.layers)
            except Exception as error:  # no reason to lose a video
                host.log.warning("could not keep the pattern of this run", exc_info=True)
                session.note(f"the pattern of this run could not be kept ({type(error).__name__}: {error})")
        self.log.keep_pattern(session.record.node, pattern)

    def _session(
        self, guider: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Tensor,
        denoise_mask: Any = None, callback: Any = None, disable_pbar: bool = False, seed: int | None = None, **kwargs: Any,
    ) -> Session:
        """A fresh session. Thresholds are read now, since a later node may have changed the model's sampling."""
        sampling = guider.model_patcher.get_model_object("model_sampling")
        network = video_models.network_of(guider.model_patcher)
        row = video_models.find(network)
        layers, automatic, source = _facts(row, network, self.method)
        pattern = guider.model_patcher.get_attachment(PATTERN)
        config, short = self.config.resolved(automatic), None
        if self.config.sparsity == AUTOMATIC and config.warmup_steps < 0 and not (self.method.LEAST_WARMUP or isinstance(pattern, Pattern)):
            usual, config = config, without_warmup(config, sigmas.tolist(), float(sampling.sigma_max))
            short = _IN_FEW_STEPS.format(len(sigmas) - 1, config.sparsity, usual.sparsity) if config != usual else None

        def with_least(warmup: int) -> Schedule:
            return make_schedule(
                sigmas.tolist(), lambda percent: float(sampling.percent_to_sigma(percent)), float(sampling.sigma_max),
                config.warmup_steps, config.end_steps, warmup, automatic.warmup,
            )

        schedule = with_least(self.method.LEAST_WARMUP)
        record = RunRecord(self.method.NAME, config, schedule.steps, layers, seed or 0, schedule.warmup)
        record.model, record.node = row.name, host.executing_node()
        if config != self.config or (config.warmup_steps < 0 and automatic.warmup != WARMUP_PERCENT):
            record.automatic = source  # the table had a say
        for note in filter(None, (self.note, short)):
            record.note(note)
        session = Session(self.method, config, schedule, seed or 0, record, layers)
        if host.has_model_sparse_attention(guider.model_patcher):
            if config.strict:
                raise RuntimeError(f"{self.method.NAME}, strict: {_TWO_OF_THEM}")
            session.left_to = _LEFT_TO_HOST
            record.note(_TWO_OF_THEM)
        session.keeping = Keeping() if self.log.pattern_wanted or pattern_files.is_saved() else None
        if isinstance(pattern, Pattern):
            _start_from(pattern, session, with_least(0))
        return session


def _start_from(pattern: Pattern, session: Session, schedule: Schedule) -> None:
    """Gives a run its plans, or says why not. `schedule`: the run's where nothing has to be searched for."""
    reason = pattern.why_not_model(session.method.NAME, session.record.model, session.layers)
    if reason is None:
        try:
            session.start_from(pattern, schedule)
        except (TypeError, ValueError):
            reason = "its settings are damaged"
    if reason is not None:
        session.say_refused(pattern, reason)


def _facts(row: VideoModel, network: Any, method: ModuleType) -> tuple[int | None, Automatic, str | None]:
    """How many layers a model has, what automatic settings come to, and where that comes from; as for an unknown one, where it cannot be read."""
    try:
        return row.layers(network), row.automatic(network).get(method.NAME, method.AUTOMATIC), row.source(network) or None
    except Exception:  # a network that has changed since its row was written: its layout will say so
        host.log.warning("could not read the facts of %s", row.name, exc_info=True)
        return None, method.AUTOMATIC, None


@dataclass(frozen=True)
class _Active:
    """What a run leaves in its own options for its evaluations."""

    session: Session
    status: StatusLine
    override: Callable
    probe: Probe | None = None


@dataclass
class _Forward:
    """One evaluation of the model: who asks (conditions), when (step), about what (evaluation).

    reached: whether any attention call came to our override. videos: how many of the video's did. kind, layer: of the newest of
    those, for the clock.
    """

    active: _Active
    model: VideoModel
    evaluation: Evaluation
    step: int
    conditions: tuple[Hashable, ...]
    reached: bool = False
    videos: int = 0
    kind: str = "dense"
    layer: Layer | None = None
    layout: VideoLayout | None = None
    probed: bool = False

    def layout_for(self, call: Call) -> VideoLayout | Dense:
        """The layout of this evaluation, kept once a call has shown it."""
        if self.layout is None:
            layout = self.model.layout_of(self.evaluation, call)
            if isinstance(layout, Dense):
                return layout
            self.layout = self.active.session.record.layout = layout
            self.active.session.check_pattern(layout)
            if self.model.note:
                self.active.session.note(self.model.note)
        return self.layout


def _evaluate(
    executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict | None = None, **kwargs: Any,
) -> Any:
    """The APPLY_MODEL wrapper: once an evaluation, outside of any block."""
    options = dict(transformer_options or {})
    active = options.get(host.KEY)
    if not isinstance(active, _Active):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    session = active.session
    step = session.schedule.step_of(float(t.flatten()[0]))
    session.record.step = step
    session.flush()
    if active.probe is not None:
        active.probe.flush()
    if active.status.due():
        session.record.plan_bytes = max(session.record.plan_bytes, session.held_bytes())
        active.status.show(session.record)
    network = video_models.plain(executor.class_obj.diffusion_model)
    evaluation = Evaluation(network, video_models.latent_shape(x, kwargs), {**kwargs, "context": c_crossattn})
    forward = options[host.KEY] = _Forward(active, video_models.find(network), evaluation, step, _conditions(options))
    for number, (identity, _) in zip(options.get("cond_or_uncond") or range(len(forward.conditions)), forward.conditions, strict=False):
        session.roles.add(identity, number)
    result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if evaluation.longest and not evaluation.layers and forward.layout is not None:
        expected = f"{forward.layout} are {forward.layout.seq_len} tokens"
        _stay_dense(forward, None, Dense(f"no attention call was as long as the video: {expected}, the longest call had {evaluation.longest}"))
    if session.config.strict and not session.record.calls:
        raise RuntimeError(f"{session.method.NAME}, strict: no self-attention call of a video reached this node in its first step")
    # Another override on top of ours may well pass its calls on; one that does not has taken our place.
    if options.get(host.OVERRIDE) is not active.override and not session.left_to:
        if not forward.reached:
            session.note("another node replaced the attention override during this run, so its attention is not this node's")
        elif forward.videos < (session.layers or 0):
            session.note("another node's attention override stood before this one during this run and kept some layers to itself")
    return result


def _conditions(options: dict) -> tuple[Hashable, ...]:
    """A name for each condition in the batch that stays the same through the run, whichever come together."""
    window = options.get("context_window")
    frames = None if window is None else tuple(getattr(window, "index_list", ()))
    kinds = options.get("cond_or_uncond") or ("all",)
    names = options.get("uuids") or kinds
    # Both, since the negative that the host makes for the area of a positive bears the positive's uuid.
    return tuple((f"{name} {kind}", frames) for name, kind in itertools.zip_longest(names, kinds))


# What a host's attention function takes after q, k and v. Models pass them by position or by name, as they please.
_POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


def _make_override(session: Session, previous: Callable | None) -> Callable:
    """The attention override of one run. `previous` is the override that dense calls go through, if there is one."""

    def run_dense(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    @torch.compiler.disable
    def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs.get("transformer_options") or {}
        forward = options.get(host.KEY)
        if not isinstance(forward, _Forward):
            return run_dense(func, q, k, v, *args, **kwargs)
        forward.reached = True
        forward.layer, start = None, mark(q.device)
        named = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        split = named.get("skip_reshape", False)
        width = q.shape[1] * q.shape[3] if split else q.shape[-1]
        layer = _told(forward, None, lambda: _layer_of(forward, Call(q.shape[-2], k.shape[-2], width, options)))
        forward.videos += layer is not _NOT_OURS
        if isinstance(layer, Dense):
            out = run_dense(func, q, k, v, *args, **kwargs)
            if layer is not _NOT_OURS:
                session.record.timed("dense", forward.layer, start, mark(q.device))
            return out
        if split:
            parts = [q, k, v]
        else:
            dim = q.shape[-1] // named["heads"]
            parts = [tensor.unflatten(-1, (-1, dim)).transpose(1, 2) for tensor in (q, k, v)]
        result = _attend(forward, layer, *parts, named.get("mask"), named.get("scale"), lambda: run_dense(func, q, k, v, *args, **kwargs))
        if isinstance(result, Dense):
            out = run_dense(func, q, k, v, *args, **kwargs)
        else:
            out = result if named.get("skip_output_reshape", False) else result.transpose(1, 2).flatten(2)
        session.record.timed("dense" if isinstance(result, Dense) else forward.kind, layer, start, mark(q.device))
        return out

    return override


_NOT_OURS = Dense("cross-attention, or another stream's attention", planned=True)  # no business of ours, and not counted


def _layer_of(forward: _Forward, call: Call) -> Layer | Dense:
    """The layer of the video that calls, from lengths alone; Dense for a call that is not the video's, or stays dense anyway."""
    model, evaluation, session = forward.model, forward.evaluation, forward.active.session
    if session.disabled and forward.layout is None:  # reading the layout may be what failed
        return _stay_dense(forward, None, Dense(session.disabled)) if call.seq_q == call.seq_k else _NOT_OURS
    if not model.concerns(evaluation, call):
        return _NOT_OURS
    if call.seq_q > call.seq_k:
        return _NOT_OURS
    if call.seq_q < call.seq_k:
        whole = forward.layout_for(call._replace(seq_q=call.seq_k))
        return _stay_dense(forward, None, _A_PART) if isinstance(whole, VideoLayout) and whole.seq_len == call.seq_k else _NOT_OURS
    layout = forward.layout_for(call)
    if isinstance(layout, Dense):
        return _stay_dense(forward, None, layout)
    if call.seq_q < layout.video_tokens:  # text or sound among itself
        evaluation.longest = max(evaluation.longest, call.seq_q)
        return _NOT_OURS
    layer = model.layer_of(evaluation, call)
    if layer is None:
        return _NOT_OURS if call.seq_q == evaluation.text_tokens else _stay_dense(forward, None, _UNNUMBERED)
    dense = stays_dense(session, forward.step, layer.number)
    return layer if dense is None or looks_ahead(session, forward.step, layer.number) else _stay_dense(forward, layer, dense)


_UNNUMBERED = Dense("a call outside of the model's numbered layers", planned=True)
_A_PART = Dense(
    "the model attends for a part of the video at a time, as with guides that have a strength of their own or a sequence split over GPUs",
)


def _attend(
    forward: _Forward, layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, run_dense: Callable[[], Tensor],
) -> Tensor | Dense:
    """One call of the host's, [B, H, S, D] in and out, condition by condition; Dense where it is the host's to compute."""
    bias = _key_bias(mask, k)
    if isinstance(bias, Dense):
        return _stay_dense(forward, layer, bias)
    if len(q) % len(forward.conditions):
        return _stay_dense(forward, layer, Dense(f"{len(q)} rows do not divide among {len(forward.conditions)} conditions"))
    size = len(q) // len(forward.conditions)
    if forward.active.probe is not None:
        forward.probed, run_dense = False, functools.cache(run_dense)  # one dense output serves all conditions
    outputs = []
    for number, condition in enumerate(forward.conditions):
        rows = slice(number * size, (number + 1) * size)
        part = bias if bias is None or len(bias) == 1 else bias[rows]
        call = AttentionCall(q[rows], k[rows], v[rows], forward.layout, layer.number, forward.step, condition, scale, part, layer.stack)
        outputs.append(_compute(call, forward, lambda rows=rows: _by_head(run_dense(), q.shape)[rows]))
    if all(isinstance(output, Dense) and output.output is None for output in outputs):
        return outputs[0]
    forward.kind = "search" if any(isinstance(output, Dense) for output in outputs) else "sparse"
    if forward.probed:
        forward.kind = "probed"  # no measure of what a call takes
    return _join(outputs, q.shape, size, run_dense)


def _compute(call: AttentionCall, forward: _Forward, run_dense: Callable[[], Tensor]) -> Tensor | Dense:
    """One condition's call; run_dense is its share of the host's own output, [B, H, S, D]."""
    layer, probe = Layer(call.layer, call.stack), forward.active.probe

    def probed(probe: Probe, outside: host.OutsideRecording) -> Tensor | Dense:
        result, measured = probe.attend(call, lambda: outside.host_call(run_dense))
        forward.probed |= measured
        return result

    def compute() -> Tensor | Dense:
        with host.OutsideRecording() as outside:
            result = sparse_attention(call, forward.active.session) if probe is None else probed(probe, outside)
        return _stay_dense(forward, layer, result, 1) if isinstance(result, Dense) else result

    return _told(forward, layer, compute, 1)


def _told(forward: _Forward, layer: Layer | None, compute: Callable[[], Any], conditions: int | None = None) -> Any:
    """What `compute` returns. An unexpected error is told once, and the rest of the run is dense; `strict` raises it."""
    session = forward.active.session
    try:
        return compute()
    except Exception as error:
        if session.config.strict:
            raise
        if session.disabled is None:
            # As text: a handler that keeps records would keep the call's tensors with the traceback.
            host.log.error("the sparse path failed; the rest of this run is dense\n%s", traceback.format_exc())
            session.disabled = f"the sparse path failed ({type(error).__name__}: {error})"
        return _stay_dense(forward, layer, Dense(session.disabled), conditions)


def _stay_dense(forward: _Forward, layer: Layer | None, dense: Dense, conditions: int | None = None) -> Dense:
    """Puts a dense call on record; `strict` makes an error of what was not planned."""
    session = forward.active.session
    if session.config.strict and not dense.planned:
        advice = hint(dense.reason, session.config)
        raise RuntimeError(f"{session.method.NAME}, strict: a call would run {dense.otherwise}: {dense.reason}.{advice}")
    forward.layer = layer
    number, stack = layer or (None, "")
    session.record.dense(forward.step, number, dense.reason, conditions or len(forward.conditions), stack)
    return dense


def _join(outputs: list[Tensor | Dense], shape: torch.Size, size: int, run_dense: Callable[[], Tensor]) -> Tensor:
    """The outputs of all conditions, [B, H, S, D]. Where one has none, the host computes the call and its part is taken."""
    whole = None
    parts = []
    for number, output in enumerate(outputs):
        part = output.output if isinstance(output, Dense) else output
        if part is None:
            if whole is None:
                whole = _by_head(run_dense(), shape)
            part = whole[number * size : (number + 1) * size]
        parts.append(part)
    # Joined as [B, S, H, D], the layout that hosts take it in.
    return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


def _by_head(whole: Tensor, shape: torch.Size) -> Tensor:
    """A host's output, [B, H, S, D] or [B, S, H*D], as [B, H, S, D]; shape: that of q."""
    return whole if whole.dim() == 4 else whole.unflatten(2, (shape[1], -1)).transpose(1, 2)


def _key_bias(mask: Tensor | None, k: Tensor) -> Tensor | Dense | None:
    """A mask that says the same to every head and query, as a bias [B or 1, S_k]; Dense for any other."""
    if mask is None:
        return None
    shape = tuple(mask.shape)
    if mask.dim() > 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return Dense(f"the attention mask {shape} of {str(mask.dtype).removeprefix('torch.')} is not one of keys")
    while mask.dim() < 4:  # as the host reads them: [q, k], [batch, q, k], [batch, head, q, k]
        mask = mask.unsqueeze(0 if mask.dim() == 2 else 1) if mask.dim() >= 2 else mask.unsqueeze(0)
    if mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != k.shape[2] or mask.shape[0] not in (1, len(k)):
        return Dense(f"the attention mask {shape} is not one of keys")
    bias = mask[:, 0, 0]
    if bias.dtype == torch.bool:
        return torch.where(bias, 0.0, -torch.inf)
    return bias
