"""Whatever video, settings and sequence of calls a run consists of: each call is attention under its own plan, or dense for a reason that is true.

Runs are made up by hypothesis: layouts, key masks, the sigmas of a sampler, settings, and which layer calls when, for which condition. 300 runs,
always the same ones; with SVA_NIGHTLY set (`make nightly`) 10,000 others each time, and what fails is printed with how to bring it back.
What is expected is worked out here, from the definitions in the docstrings and the papers, apart from the code.
"""

import functools
import os
import re
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from kernel_cases import shown_by
from oracle import attention, relative_error
from pack import kernels
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.call import AttentionCall, Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS
from pack.attention.record import RunRecord
from pack.attention.session import Session
from pack.attention.warmup import make_schedule
from pack.kernels import SparsePlan
from video_oracle import chunks, frame_and_patch, is_text, key_blocks, place, video_rows

NIGHTLY = bool(os.environ.get("SVA_NIGHTLY"))


def examples(count):
    """So many runs of each method in `make test`, and in a night 10,000 of all methods for 300."""
    return settings(
        max_examples=count * 10_000 // 300 if NIGHTLY else count, derandomize=not NIGHTLY, print_blob=True, deadline=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        # The fixture that poisons memory holds nothing of an example. Runs differ in size, on purpose.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Query-key pairs that a run may come to, over its heads and calls: some tenths of a second of float64.
MOST_PAIRS = 4_000_000
# Where what a call loses lies. A result is rounded once, its weights at most once more: half a unit in the last place each, which few values
# can come to more than. Scores are float32, and what they lose is far below 1e-5 at the sizes here.
LOST = {torch.float32: 1e-5, torch.float16: 1.25 * torch.finfo(torch.float16).eps, torch.bfloat16: 1.25 * torch.finfo(torch.bfloat16).eps}
# percent_to_sigma and sigma_max of kinds of models: flow at shifts, and a noise schedule in the thousands of units that eps models have.
SAMPLINGS = {
    **{f"flow {shift}": (lambda percent, shift=shift: shift * (1 - percent) / (1 + (shift - 1) * (1 - percent)), 1.0) for shift in (1, 3, 8)},
    "eps": (lambda percent: 14.6 * (1 - percent) ** 2, 14.6),
}
# dense_layers, and what it means for a layer's number; -1 means nothing where nobody knows how many layers there are.
DENSE_LAYERS = {
    "": lambda number, layers: False, "0": lambda number, layers: number == 0, " 1-2": lambda number, layers: 1 <= number <= 2,
    "-1": lambda number, layers: layers is not None and number == layers - 1,
    "0, 2--1": lambda number, layers: number == 0 or (layers or 0) > number >= 2,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A prompt of the run. mask: of its keys. window: latent frames that it has fewer than the run, as a context window."""

    mask: str
    batch: int
    window: int


@dataclass(frozen=True)
class Layer:
    """Where calls come from. heads: a stack may have its own."""

    number: int
    stack: str
    heads: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network. at: where in its step its sigma lies. odd: a call that is not the whole video's among itself."""

    step: int
    at: str
    conditions: tuple[int, ...]
    batched: bool
    odd: str = ""


@dataclass(frozen=True)
class Run:
    """All that a run hangs on."""

    method: str
    layout: VideoLayout
    sampling: str
    sigmas: tuple[float, ...]
    settings: dict = field(hash=False)
    conditions: tuple[Condition, ...]
    layers: tuple[Layer, ...]
    number_of_layers: int | None
    evaluations: tuple[Evaluation, ...]
    head_dim: int
    dtype: torch.dtype
    scale: float | None
    sharpness: float
    head_chunk: int | None
    seed: int


def draw_layout(draw, most, frames):
    """At most so many tokens. Several blocks as often as not, and less than one at times."""
    frames = min(frames, max(1, most // 2))
    size = st.sampled_from([1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16, 16, 18])
    height = min(draw(size), max(1, most // frames))
    width = min(draw(size), max(1, most // (frames * height)))
    beside = st.sampled_from([0, 0, 0, 1, 7, 20, 63, 64, 65, 127, 128, 129, 150])
    room = most - frames * height * width
    prefix = min(draw(beside), room)
    return VideoLayout(frames, height, width, prefix, min(draw(beside), room - prefix))


def draw_evaluations(draw, steps, conditions, odd):
    """Which steps are computed, and with what: all of a few, those that a cache does not skip, or any, as where a sampler starts anew."""
    walk = draw(st.sampled_from(["every step", "some steps", "any"]))
    if walk == "any":
        walked = draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=5))
    else:
        first = draw(st.integers(0, max(0, steps - 5)))
        walked = list(range(first, min(first + 5, steps)))
        if walk == "some steps":
            walked = [step for step in walked if draw(st.sampled_from([True, True, False]))] or walked
    some = st.lists(st.integers(0, conditions - 1), min_size=1, max_size=conditions, unique=True).map(tuple)
    found = []
    for step in walked:
        for at in draw(st.sampled_from([("start",), ("start",), ("start",), ("start",), ("start", "between"), ("start", "end"), ("between",)])):
            # A prompt may come and go, as with regions that are switched on for a part of the run.
            numbers = draw(st.sampled_from([tuple(range(conditions)), tuple(range(conditions)), None])) or draw(some)
            found.append(Evaluation(step, at, numbers, draw(st.booleans()), draw(st.sampled_from([""] * 8 + [odd]))))
    return tuple(found)


@st.composite
def runs(draw, method):
    """A run of a method, small enough to be compared in float64."""
    sampling = draw(st.sampled_from(sorted(SAMPLINGS)))
    steps = draw(st.sampled_from([4, 1, 2, 3, 5, 6, 7, 9, 10, 14]))
    # Any falling sigmas: from full noise or below (denoise under 1, a second stage), to none or above (a first stage).
    gaps = draw(st.lists(st.integers(1, 999 // (steps + 1)), min_size=steps + 1, max_size=steps + 1))
    marks = [sum(gaps[step:]) for step in range(steps + 1)]
    marks[0] = draw(st.sampled_from([1000, 1000, marks[0]]))
    marks[-1] = draw(st.sampled_from([0, 0, marks[-1]]))
    sigmas = tuple(mark / 1000 * SAMPLINGS[sampling][1] for mark in marks)

    # At most one thing that keeps a run or its calls dense, or few would be sparse.
    obstacles = ["min_tokens", "dense_layers", "dense_layers", "end_steps", "warmup_steps", "one frame", "odd calls"]
    obstacle = draw(st.sampled_from([""] * 12 + obstacles))
    masks = st.sampled_from(["none", "none", "padded text", "other padding", "additive", "some hidden"])
    condition = st.builds(Condition, mask=masks, batch=st.sampled_from([1, 1, 1, 2]), window=st.sampled_from([0, 0, 0, 1, 2]))
    conditions = tuple(draw(st.lists(condition, min_size=1, max_size=draw(st.sampled_from([2, 1, 3])))))
    numbers = draw(st.sampled_from([((0, ""),), ((1, ""),), ((0, ""), (1, "")), ((2, ""), (2, "vace")), ((1, ""), (3, ""), (1, "vace"))]))
    layers = tuple(Layer(number, stack, draw(st.integers(1, 4))) for number, stack in numbers)
    odd = draw(st.sampled_from(["longer", "text as keys"])) if obstacle == "odd calls" else ""
    evaluations = draw_evaluations(draw, steps, len(conditions), odd)

    calls = sum(conditions[number].batch * layer.heads for each in evaluations for number in each.conditions for layer in layers)
    most = max(70, min(1000, int((MOST_PAIRS / calls) ** 0.5)))
    layout = draw_layout(draw, most, 1 if obstacle == "one frame" else draw(st.sampled_from([5, 2, 3, 4, 6, 7, 9])))
    knobs = {
        "sparsity": draw(st.one_of(st.floats(0, 0.95), st.floats(0, 0.95), st.sampled_from([0.0, 0.5, 0.95]))),
        "warmup_steps": draw(st.sampled_from([3, 99]) if obstacle == "warmup_steps" else st.sampled_from([1, -1, 0, 2])),
        "cache_refresh": draw(st.sampled_from([-1, -1, 0, 1, 2, 5])),
        "dense_layers": draw(st.sampled_from([*DENSE_LAYERS][1:])) if obstacle == "dense_layers" else "",
        "end_steps": draw(st.sampled_from([1, 3])) if obstacle == "end_steps" else 0,
        "min_tokens": draw(st.sampled_from([-1, layout.seq_len, layout.seq_len + 1])) if obstacle == "min_tokens" else 0,
        "backend": draw(st.sampled_from(["auto", "auto", "torch", "reference"])),
    }
    if method in ("SVG", "Auto"):
        knobs["sampled_rows"] = draw(st.integers(1, 64))
    if method != "SVG":
        knobs["token_order"] = draw(st.sampled_from(["tile", "raster", "hilbert"]))
        knobs["block_q"] = draw(st.sampled_from([BLOCK_Q, BLOCK_Q, BLOCK_K]))
        knobs["skipped_blocks"] = draw(st.sampled_from(["mean", "mean", "drop"]))
    if method == "AdaSpa":
        knobs |= {name: draw(st.booleans()) for name in ("head_adaptive", "lse_cache", "always_adapt")}
    if method == "Auto":
        knobs["scope"] = draw(st.sampled_from(["layer", "layer", "head", "row"]))
        if draw(st.booleans()):
            knobs |= {"sparsity": -1, "fidelity": draw(st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.9, 0.999])))}
        else:
            knobs["selection"] = draw(st.sampled_from(["error", "error", "mass", "share"]))
    return Run(
        method, layout, sampling, sigmas, knobs, conditions, layers, draw(st.sampled_from([None, 4])), evaluations,
        draw(st.sampled_from([8, 16, 40, 64, 128])), draw(st.sampled_from(list(LOST))), draw(st.sampled_from([None, 0.2])),
        draw(st.sampled_from([0.2, 1.0, 3.0])), draw(st.sampled_from([None, None, None, 1, 2])), draw(st.integers(0, 2**32)),
    )  # fmt: skip


def sigma_of(run, evaluation):
    """The sigma that an evaluation comes with."""
    high, low = run.sigmas[evaluation.step], run.sigmas[evaluation.step + 1]
    return {"start": high, "between": (high + 2 * low) / 3, "end": low}[evaluation.at]


def step_of(run, sigma):
    """The step that an evaluation counts for: the last that starts at or above its sigma."""
    return max((step for step, start in enumerate(run.sigmas[:-1]) if start >= sigma - 1e-9), default=0)


def layout_of(run, condition):
    return replace(run.layout, frames=max(min(2, run.layout.frames), run.layout.frames - condition.window))


def key_bias(run, condition, number):
    """[1 or batch, S], or None."""
    layout = layout_of(run, condition)
    generator = torch.Generator().manual_seed(run.seed + number)
    if condition.mask == "none":
        return None
    bias = torch.zeros(1, layout.seq_len)
    text = is_text(layout).nonzero()[:, 0]
    if condition.mask == "additive":
        return torch.randn(condition.batch, layout.seq_len, generator=generator)
    if condition.mask == "some hidden":
        bias[:, torch.rand(layout.seq_len, generator=generator) < 0.2] = -torch.inf
        bias[:, layout.prefix] = 0.0  # not every key
        return bias
    bias = bias.repeat(condition.batch, 1)
    for entry in range(condition.batch):  # a prompt of its own length each
        length = int(torch.randint(0, len(text) + 1, (1,), generator=generator))
        bias[entry, text[length:]] = -torch.inf if condition.mask == "other padding" else torch.finfo(torch.float32).min
    return bias


@dataclass
class Played:
    """One call, and what came of it.

    plan: bool [B, H, S, S], which key each query was shown, of a call that ran sparse; counted: whether the blocks that it was not shown were there
    as one key each.
    """

    call: AttentionCall
    answer: torch.Tensor | Dense
    plan: torch.Tensor | None
    counted: bool
    figures: object


def calls_of(run):
    """(call, odd, name) in the order in which a host makes them. Tensors hang on where a call comes from, its name, not on when it comes."""
    for index, evaluation in enumerate(run.evaluations):
        step = step_of(run, sigma_of(run, evaluation))
        pairs = [(number, layer) for number in evaluation.conditions for layer in run.layers]
        if evaluation.batched:
            pairs = [(number, layer) for layer in run.layers for number in evaluation.conditions]
        for number, layer in pairs:
            condition = run.conditions[number]
            layout = layout_of(run, condition)
            length = layout.seq_len + (evaluation.odd == "longer")
            name = 1000 * index + 100 * number + 10 * layer.number + len(layer.stack)
            generator = torch.Generator().manual_seed(run.seed + name)
            # Views into one projection, of one more batch entry than the call's.
            shape = (condition.batch + 1, length, 3, layer.heads, run.head_dim)
            q, k, v = torch.randn(shape, generator=generator).to(run.dtype).permute(2, 0, 3, 1, 4)[:, 1:]
            # From heads that look at a few keys to heads that look at all.
            q *= run.sharpness * torch.linspace(1, 2, layer.heads)[:, None, None].to(run.dtype)
            if evaluation.odd == "text as keys":
                k, v = k[:, :, : max(1, length // 3)], v[:, :, : max(1, length // 3)]
            bias = key_bias(run, condition, number) if k.shape[2] == layout.seq_len else None
            yield AttentionCall(q, k, v, layout, layer.number, step, f"prompt {number}", run.scale, bias, layer.stack), evaluation.odd, name


def session_of(run):
    method = METHODS[run.method]
    config = method.CONFIG(**run.settings)
    percent_to_sigma, sigma_max = SAMPLINGS[run.sampling]
    schedule = make_schedule(run.sigmas, percent_to_sigma, sigma_max, config.warmup_steps, config.end_steps, method.LEAST_WARMUP)
    record = RunRecord(method.NAME, config, schedule.steps, run.number_of_layers, run.seed, schedule.warmup)
    session = Session(method, config, schedule, run.seed, record, run.number_of_layers)
    session.head_chunk = run.head_chunk
    return session


def play(session, calls):
    """Hands each call on, as the host's override does, and yields it with what came of it."""
    attend, ran, counted = kernels.block_sparse_attention, [], []

    def spy(q, k, v, mask, *, q_order=None, k_order=None, pooled=None, **options):
        if q.untyped_storage().data_ptr() == call.q.untyped_storage().data_ptr():  # else a plan is tried out on some of the rows
            ran.append(shown_by(SparsePlan(mask, q_order, k_order), *q.shape[:3], k.shape[2]))
            counted.append(pooled is not None)
        return attend(q, k, v, mask, q_order=q_order, k_order=k_order, pooled=pooled, **options)

    with mock.patch.object(kernels, "block_sparse_attention", spy):
        for call, *_ in calls:
            ran.clear(), counted.clear()
            answer = sparse_attention(call, session)
            if isinstance(answer, Dense):
                session.record.dense(call.step, call.layer, answer.reason, stack=call.stack)
            yield Played(call, answer, torch.cat(ran, 1) if ran else None, any(counted), session.state(call).figures if ran else None)


class Expected:
    """What each call of a run may answer, from what the settings promise: None for sparse, or the reasons that would be true, as patterns."""

    def __init__(self, run):
        self.run, self.found = run, {}
        self.steps = len(run.sigmas) - 1
        warmup = run.settings["warmup_steps"]
        if warmup < 0:
            percent_to_sigma, sigma_max = SAMPLINGS[run.sampling]
            warmup = sum(sigma > percent_to_sigma(0.2) + 1e-9 for sigma in run.sigmas[:-1])
            if run.sigmas[0] == sigma_max:
                warmup = 1 if self.steps <= 8 else max(warmup, 1)
        self.warmup = min(warmup, self.steps)
        if run.method != "SVG":  # a search is in the last warm-up step
            self.warmup = max(self.warmup, 1)

    def reasons(self, call, odd):
        run, knobs = self.run, self.run.settings
        seq, layout = call.q.shape[2], call.layout
        true = []
        if call.step < self.warmup - {"SVG": 0, "AdaSpa": 2, "Auto": 1}[run.method]:  # AdaSpa's step before its search keeps the LSE
            true.append("warm-up step")
        if call.step >= self.steps - knobs["end_steps"]:
            true.append("one of the last steps")
        if DENSE_LAYERS[knobs["dense_layers"]](call.layer, run.number_of_layers):
            true.append("dense layer")
        if odd == "longer":
            true.append(rf"the sequence has {seq} tokens, the layout .* has {layout.seq_len}")
        if call.k.shape[2] != seq:
            true.append(r"q \(.*\), k \(.*\) and v \(.*\) differ .*")
        if layout.frames == 1:
            true.append("one latent frame: .*")
        least = 4096 if knobs["min_tokens"] < 0 else knobs["min_tokens"]
        if seq < least:
            true.append(rf"{seq:,} tokens are fewer than min_tokens \({least:,}\)")
        if true or run.method == "SVG":
            return true or None
        return self._search(call)

    def _search(self, call):
        """Blocks are looked for in the last warm-up step, or in the first later one that is not skipped.

        AdaSpa looks for them again in steps that run sparse. Auto's searches are dense: every N steps, and nobody reads its errors back here.
        """
        key, shape = (call.condition, call.layer, call.stack), (call.q.shape, call.layout)
        of_use = max(call.step + 1, self.warmup) < self.steps - self.run.settings["end_steps"]  # a later step is sparse
        refresh = self.run.settings["cache_refresh"]
        known, found_at = self.found.get(key, (None, 0))
        if known == shape:
            if call.step < self.warmup:
                return ["warm-up step"]
            if not (self.run.method == "Auto" and 0 < refresh <= call.step - found_at and of_use):
                return None
        if call.step < self.warmup - 1:
            return ["warm-up step"]
        if not of_use:
            return [f"{self.run.method}'s search step would be the last"]
        self.found[key] = shape, call.step
        return ["search step"]


@functools.cache
def svg_floor(layout, kind):
    """Pairs of the text, of frame 0 as keys, and of the blocks of later keys that a query block of this kind overlaps with."""
    places, first = place(layout, kind), layout.height * layout.width
    frame, text = frame_and_patch(layout)[0], layout.prefix + layout.suffix
    ordered = video_rows(layout, kind)
    queries, keys = chunks(ordered, BLOCK_Q), chunks([row for row in ordered if frame[row] > 0], BLOCK_K)
    own = sum(len(q) * len(k) for q in queries for k in keys if places[k[0]] <= places[q[-1]] and places[q[0]] <= places[k[-1]])
    return text * layout.seq_len + layout.video_tokens * (text + first) + own


def sinks_floor(layout):
    """Pairs of the text."""
    text, video = layout.prefix + layout.suffix, layout.video_tokens
    return text * layout.seq_len + video * text


def adaspa_floor(layout, block_q):
    """Pairs of the text, and of as many blocks of the video as a query block's own keys fill."""
    return sinks_floor(layout) + layout.video_tokens * min(block_q, layout.video_tokens)


def check_budget(run, played):
    """The pairs that were computed are those asked for, or the least that there is, and then that has been said."""
    layout, figures = played.call.layout, played.figures
    density, asked, block = played.plan.double().mean((2, 3)), 1 - run.settings["sparsity"], BLOCK_K / layout.seq_len
    assert torch.allclose(figures.density.double(), density, atol=1e-6), "the record tells another density"
    if run.method == "Auto":
        return check_budget_of_auto(run, layout, density)
    limits = []
    if run.method == "SVG":
        for kind, heads in (("spatial", ~figures.temporal), ("temporal", figures.temporal)):
            floor = svg_floor(layout, kind) / layout.seq_len**2
            if floor <= asked:
                assert ((density[heads] - asked).abs() <= block + 1e-9).all()
            else:
                assert torch.allclose(density[heads], torch.tensor(floor, dtype=torch.float64), atol=1e-9)
                limits.append((kind, floor))
    else:
        floor = adaspa_floor(layout, run.settings["block_q"]) / layout.seq_len**2
        if floor <= asked:
            assert ((density.mean(1) - asked).abs() <= block + 1e-9).all()
        else:  # a video block that is short makes it less
            assert (density <= floor + 1e-9).all() and (density > floor - block).all()
            limits.append(("", floor))
    return [(layout.frames if kind else layout.video_tokens, kind, floor) for kind, floor in limits]


def check_budget_of_auto(run, layout, density):
    """What is left of a budget is less than a block for each group that shares a threshold; only the text may be more than the budget."""
    floor, asked = sinks_floor(layout) / layout.seq_len**2, 1 - run.settings["sparsity"]
    if run.settings["sparsity"] < 0:
        assert (density >= floor - 1e-9).all()
        return []
    if floor > asked:
        assert torch.allclose(density, torch.tensor(floor, dtype=torch.float64), atol=1e-9)
        return [(layout.video_tokens, "", floor)]
    heads, block_q = density.shape[1], run.settings["block_q"]
    rows = -(-layout.video_tokens // block_q)
    groups = {"layer": -(-heads // (run.head_chunk or heads)), "head": heads, "row": heads * rows}[run.settings["scope"]]
    left = asked - density.mean(1)
    assert (left >= -1e-9).all() and (left < groups * block_q * BLOCK_K / layout.seq_len**2 / heads + 1e-9).all()
    return []


def check_sparse(run, played):
    call, plan = played.call, played.plan
    text, layout = is_text(call.layout), call.layout
    assert plan[:, :, text].all() and plan[:, :, :, text].all(), "a sink was left out"
    if run.method == "SVG":
        first = ~text & (frame_and_patch(layout)[0] == 0)
        assert plan[:, :, :, first].all(), "frame 0 was left out"
    assert run.method == "Auto" or plan.any(-1).all(), "a row has no keys"
    if run.settings["sparsity"] == 0:
        assert plan.all()
    if run.method == "AdaSpa":  # keys that are masked have no mass, so no row is left with those alone
        visible = plan if call.key_bias is None else plan & (call.key_bias > -1e30)[:, None, None]
        assert visible.any(-1).all(), "a row has only masked keys"
    as_one = run.settings.get("skipped_blocks") == "mean"
    assert played.counted == as_one
    check_output(run, call, played.answer, plan, key_blocks(layout, run.settings["token_order"]) if as_one else None)


def check_output(run, call, out, shown, blocks=None):
    """shown: which keys each query is to see, masked ones among them; None: all. blocks: which count as one key where none of them is shown."""
    assert out.shape == call.q.shape and out.dtype == run.dtype
    bias = None if call.key_bias is None else call.key_bias.masked_fill(call.key_bias < -1e30, -torch.inf)
    expected, _ = attention(call.q, call.k, call.v, shown, call.scale, bias, blocks)
    assert relative_error(out, expected) <= LOST[run.dtype]


def check_dense(run, played, reasons):
    call, answer = played.call, played.answer
    assert reasons is not None, f"dense, and nothing is in the way: {answer.reason}"
    assert any(re.fullmatch(reason, answer.reason) for reason in reasons), f"{answer.reason!r} is not why: {reasons}"
    assert played.plan is None, "computed sparsely, and dense all the same"
    assert answer.planned == bool(re.match(r"warm-up|one of the last|dense layer|.*search|[\d,]+ tokens", answer.reason))
    if answer.output is not None:
        check_output(run, call, answer.output, None)
    if answer.reason == "search step":
        assert answer.output is not None


def check_record(run, record, played, limits):
    """Every call is counted once, each dense one under its reason, and what is told of the sparse ones is what was computed."""
    sparse = [each for each in played if each.plan is not None]
    dense = [each for each in played if each.plan is None]
    record.flush()
    assert (record.sparse_calls, record.dense_calls, sum(record.reasons.values())) == (len(sparse), len(dense), len(dense))
    assert all(record.reasons.values()) and "" not in record.reasons
    by_step = record.calls_by_step()
    for step in range(len(run.sigmas) - 1):
        count = [sum(each.call.step == step for each in some) for some in (sparse, dense)]
        assert [by_step["sparse"][step], by_step["dense"][step]] == count
    skipped = [1 - float(each.plan.double().mean()) for each in sparse]
    assert record.achieved_sparsity == pytest.approx(sum(skipped) / len(skipped) if skipped else 0.0, abs=1e-6)
    assert record.run_sparsity == pytest.approx(sum(skipped) / len(played), abs=1e-6)

    limit = re.compile(r"([\d,]+) (?:latent frames|video tokens.*): at most (\d\.\d\d) can be skipped(?: by (\w+) heads)?")
    said = [limit.fullmatch(note) for note in record.notes]
    for size, kind, floor in limits:
        most = max(0.0, 1 - floor)
        assert any(
            match and int(match[1].replace(",", "")) == size and abs(float(match[2]) - most) <= 0.0051 and match[3] in (None, kind) for match in said
        ), f"{size} can skip {most:.3f} at most, and nobody said so: {record.notes}"
    assert all(match or note.startswith("torch backend: ") for match, note in zip(said, record.notes, strict=True)), record.notes


def check(run):
    """Plays a run and compares each call. Returns what was played."""
    session, expected, calls, every, limits = session_of(run), Expected(run), list(calls_of(run)), [], set()
    assert session.schedule.warmup == expected.warmup
    versions = [[tensor._version for tensor in (call.q, call.k, call.v)] for call, *_ in calls]
    for (call, odd, _), played in zip(calls, play(session, calls), strict=True):
        reasons = expected.reasons(call, odd)
        if isinstance(played.answer, Dense):
            check_dense(run, played, reasons)
        else:
            assert reasons is None, f"sparse, and should be dense: {reasons}"
            check_sparse(run, played)
            limits |= set(check_budget(run, played))
        every.append(played)
    assert [[tensor._version for tensor in (call.q, call.k, call.v)] for call, *_ in calls] == versions, "the host's tensors were written to"
    check_record(run, session.record, every, limits)
    return every


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@examples(100)
@given(run=runs("SVG"))
def test_svg(run):
    tell(check(run))


@examples(100)
@given(run=runs("AdaSpa"))
def test_adaspa(run):
    tell(check(run))


@examples(100)
@given(run=runs("Auto"))
def test_auto(run):
    tell(check(run))


@pytest.mark.parametrize("method", METHODS)
@examples(7)
@given(data=st.data())
def test_batched_or_split_changes_nothing(method, data):
    """Each call gives what it gives where conditions are computed in another order; exactly, since each is computed alone."""
    run = data.draw(runs(method))
    answers = []
    for batched in (False, True):
        other = replace(run, evaluations=tuple(replace(each, batched=batched) for each in run.evaluations))
        calls = list(calls_of(other))
        names = [name for *_, name in calls]
        answers.append(dict(zip(names, (each.answer for each in play(session_of(other), calls)), strict=True)))
    for name, answer in answers[0].items():
        other = answers[1][name]
        assert type(answer) is type(other)
        if isinstance(answer, Dense):
            assert answer.reason == other.reason
            answer, other = answer.output, other.output
        assert answer is other is None or torch.equal(answer, other)


def tell(every):
    """For `--hypothesis-show-statistics`."""
    event(f"sparse calls: {'none' if not any(each.plan is not None for each in every) else 'some'}")
