"""One call's way: every gate's sentence, dense equality at sparsity 0, and what bad input, little memory and other conditions do."""

import dataclasses
import gc
import weakref

import pytest
import torch
from oracle import attention, relative_error
from pack import kernels
from pack.attention.call import Dense
from pack.attention.dispatch import MIN_TOKENS, sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS, adaspa, auto, svg
from video_oracle import LAYOUTS, as_one_key, is_text, make_call, make_session, random_qkv, token_mask

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
that_search = pytest.mark.parametrize("method", [adaspa, auto], ids=["AdaSpa", "Auto"])
SMALL = LAYOUTS["4x7x9"]  # 252 tokens
WITH_TEXT = LAYOUTS["5x10x13+prefix"]


def meta(*shape):
    """A tensor that has no values to read."""
    return torch.empty(shape, device="meta")


def gated(session=None, step=3, layer=1, layout=SMALL, q=None, k=None, **call):
    """The answer to a call of which only shapes can be read."""
    q = meta(1, 4, layout.seq_len, 16) if q is None else q
    k = q if k is None else k
    return sparse_attention(make_call(layout, (q, k, k), step=step, layer=layer, **call), session or make_session(svg))


@pytest.mark.parametrize("reason, planned, answer", [
    pytest.param("warm-up step", True, lambda: gated(step=1), id="warm-up"),
    pytest.param("warm-up step", True, lambda: gated(make_session(adaspa, warmup=4), step=1), id="before AdaSpa's search"),
    pytest.param("warm-up step", True, lambda: gated(make_session(auto, warmup=3), step=1), id="before Auto's search"),
    pytest.param("one of the last steps", True, lambda: gated(make_session(svg, end=2), step=8), id="end"),
    pytest.param("dense layer", True, lambda: gated(make_session(svg, dense_layers="1-2")), id="dense layer"),
    pytest.param("dense layer", True, lambda: gated(make_session(svg, dense_layers="-1", layers=6), layer=5), id="dense layer from the end"),
    pytest.param(
        "the sequence has 250 tokens, the layout 4 x 7 x 9 video tokens has 252", False, lambda: gated(q=meta(1, 4, 250, 16)), id="another length",
    ),
    pytest.param(
        "the sequence has 650 tokens, the layout 19 + 5 x 10 x 13 video tokens + 0 has 669", False,
        lambda: gated(layout=WITH_TEXT, q=meta(1, 4, 650, 16)), id="text missing",
    ),
    pytest.param("one latent frame: there are no other frames to skip", False, lambda: gated(layout=VideoLayout(1, 16, 16)), id="one frame"),
    pytest.param(
        "q (1, 4, 252, 16), k (1, 2, 252, 16) and v (1, 2, 252, 16) differ (grouped heads or another length)", False,
        lambda: gated(k=meta(1, 2, 252, 16)), id="grouped heads",
    ),
    pytest.param(
        "q (1, 4, 252, 16), k (1, 4, 77, 16) and v (1, 4, 77, 16) differ (grouped heads or another length)", False,
        lambda: gated(k=meta(1, 4, 77, 16)), id="other keys",
    ),
    pytest.param("252 tokens are fewer than min_tokens (253)", True, lambda: gated(make_session(svg, min_tokens=253)), id="min_tokens"),
    pytest.param(
        f"252 tokens are fewer than min_tokens ({MIN_TOKENS['gpu']:,})", True,
        lambda: gated(make_session(svg, min_tokens=-1)), id="min_tokens of a GPU",
    ),
    pytest.param(
        f"252 tokens are fewer than min_tokens ({MIN_TOKENS['cpu']:,})", True,
        lambda: sparse_attention(make_call(SMALL), make_session(svg, min_tokens=-1)), id="min_tokens of a CPU",
    ),
])
def test_gates_say_why(reason, planned, answer):
    answer = answer()
    assert isinstance(answer, Dense)
    assert (answer.reason, answer.planned, answer.output) == (reason, planned, None)


@pytest.mark.parametrize("knobs, layer", [
    ({"dense_layers": "0, 2-9"}, 1), ({"dense_layers": "-1"}, 5), ({"min_tokens": 252}, 1), ({"end": 6}, 1), ({"warmup": 3}, 1),
], ids=str)
def test_gates_let_the_rest_through(knobs, layer):
    """One off from each limit; a negative layer counts only where the number of layers is known."""
    assert isinstance(sparse_attention(make_call(SMALL, layer=layer), make_session(svg, **knobs)), torch.Tensor)


def test_a_disabled_run_says_what_disabled_it():
    run = make_session(svg)
    run.disabled = "an unexpected error: KeyError"
    assert gated(run) == Dense("an unexpected error: KeyError")


def test_a_backend_that_cannot_is_said(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda backend, *_: "no Triton here" if backend == "triton" else None)
    assert gated(make_session(svg, backend="triton")) == Dense("no Triton here")
    run = make_session(svg)
    for step in (3, 4):
        assert isinstance(sparse_attention(make_call(SMALL, step=step), run), torch.Tensor)
    assert run.record.backend == "torch" and [note for note in run.record.notes if "Triton" in note] == ["torch backend: no Triton here"]
    run = make_session(svg, backend="reference")
    sparse_attention(make_call(SMALL), run)
    assert run.record.backend == "reference" and not any("Triton" in note for note in run.record.notes)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_precision_is_the_kernels(precision):
    """In the reference, which has them all: the dispatch hands it on, in chunks of heads too, and says nothing."""
    qkv = random_qkv(WITH_TEXT, heads=3, dim=32)
    run = make_session(svg, sparsity=0.5, backend="reference", precision=precision, strict=True)
    out = sparse_attention(make_call(WITH_TEXT, qkv), run)
    exact = sparse_attention(make_call(WITH_TEXT, qkv), make_session(svg, sparsity=0.5, backend="reference"))
    assert 1e-4 < relative_error(out, exact) < 0.1 and not any("precision" in note for note in run.record.notes)
    run.head_chunk = 2
    assert relative_error(sparse_attention(make_call(WITH_TEXT, qkv), run), out) < 1e-6
    call = make_call(WITH_TEXT, qkv)
    plan = svg.plan(call, run.config, run.state(call))
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "backend": "reference", "precision": precision}
    assert torch.equal(out, kernels.block_sparse_attention(*qkv, plan.mask, **options))


@every_method
def test_a_precision_that_cannot_be_had_is_said_once(method):
    layout, qkv = WITH_TEXT, random_qkv(WITH_TEXT, heads=2)
    expected = outputs(make_session(method, sparsity=0.5, backend="torch"), layout, qkv, (1, 2, 3) if method.LEAST_WARMUP else (3, 4))
    run = make_session(method, sparsity=0.5, backend="torch", precision="int8")
    assert all(torch.equal(a, b) for a, b in zip(outputs(run, layout, qkv, (1, 2, 3) if method.LEAST_WARMUP else (3, 4)), expected, strict=True))
    said = "precision int8: the torch backend computes in the tensors' own precision alone"
    assert [note for note in run.record.notes if "precision" in note] == [f"{said}; computed in float32"] and run.record.sparse_calls == 2
    strict = make_session(method, sparsity=0.5, backend="torch", precision="int8", strict=True)
    assert gated(strict, step=0) == gated(strict) == Dense(said, otherwise="in float32") and not Dense(said).planned


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's Triton may well do it")
def test_an_automatic_backend_names_what_triton_lacks():
    run = make_session(svg, precision="fp8")
    assert isinstance(sparse_attention(make_call(SMALL), run), torch.Tensor)
    reason = kernels.why_not("triton", *random_qkv(SMALL), precision="fp8")
    assert f"precision fp8: {reason}; computed in float32" in run.record.notes


def test_sparse_calls_are_on_record_and_dense_ones_are_the_callers():
    run = make_session(svg, sparsity=0.3)
    gated(run, step=0)
    sparse_attention(make_call(WITH_TEXT), run)
    run.record.flush()
    assert (run.record.sparse_calls, run.record.dense_calls, run.record.layout) == (1, 0, WITH_TEXT)
    assert run.record.achieved_sparsity == pytest.approx(0.3, abs=64 / WITH_TEXT.seq_len)


def masked_text(layout):
    """HunyuanVideo's: the later half of the text is padding, at minus the largest float."""
    text = is_text(layout).nonzero()[:, 0]
    bias = torch.zeros(1, layout.seq_len)
    bias[:, text[len(text) // 2 :]] = -torch.finfo(torch.float32).max
    return bias


def outputs(run, layout, qkv, steps, **call):
    """What each step gives, the search's own dense output included."""
    answers = [sparse_attention(make_call(layout, qkv, step=step, **call), run) for step in steps]
    return [answer.output if isinstance(answer, Dense) else answer for answer in answers]


@every_method
@pytest.mark.parametrize("name, padded, knobs", [
    *[pytest.param(name, False, {}, id=name) for name in LAYOUTS],
    *[pytest.param(name, True, {}, id=f"{name}-padded") for name in LAYOUTS if "+" in name],
    pytest.param("4x7x9", False, {"backend": "reference"}, id="reference"),
])
def test_sparsity_zero_is_dense_attention(method, name, padded, knobs):
    layout = LAYOUTS[name]
    qkv = random_qkv(layout, batch=2, heads=1, dim=64)
    bias = masked_text(layout) if padded else None
    expected, _ = attention(*qkv, None if bias is None else (bias == 0)[:, None, None])
    run = make_session(method, sparsity=0.0, **knobs)
    answers = outputs(run, layout, qkv, (1, 2, 5) if method.LEAST_WARMUP else (3, 4), key_bias=bias)
    assert all(relative_error(out, expected) < 1e-5 for out in answers)
    assert run.record.sparse_calls == 2


@every_method
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_the_output_is_attention_under_the_plan(method, padded):
    assert_output_is_attention_under_the_plan(method, padded)


@that_search
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("knobs", [
    {"skipped_blocks": "drop"}, {"skipped_blocks": "drop", "token_order": "hilbert"}, {"token_order": "hilbert"}, {"token_order": "raster"},
    {"block_q": 64}, {"backend": "reference"},
], ids=str)
def test_the_output_is_attention_under_the_plan_whatever_counts_as_a_block(method, padded, knobs):
    assert_output_is_attention_under_the_plan(method, padded, **knobs)


def assert_output_is_attention_under_the_plan(method, padded, **knobs):
    layout = LAYOUTS["7x9x11+suffix"]
    qkv = random_qkv(layout, batch=2, heads=2, dim=64)
    bias = masked_text(layout) if padded else None
    run = make_session(method, sparsity=0.5, **knobs)
    out = outputs(run, layout, qkv, (1, 2) if method.LEAST_WARMUP else (2,), key_bias=bias)[-1]
    call = make_call(layout, qkv, step=2, key_bias=bias)
    visible = token_mask(method.plan(call, run.config, run.state(call)), layout, 2, 2)
    assert not visible.all()
    blocks = as_one_key(run.config, layout)
    expected = attention(*qkv, visible, key_bias=bias, blocks=blocks)[0]
    assert relative_error(out, expected) < 1e-5
    if blocks is not None:
        assert relative_error(attention(*qkv, visible, key_bias=bias)[0], expected) > 1e-2, "skipped blocks count for nothing here"


def searched_session(method, layout, qkv, **knobs):
    """A run whose next step is sparse."""
    run = make_session(method, **knobs)
    if method.LEAST_WARMUP:
        sparse_attention(make_call(layout, qkv, step=1), run)
    return run


@every_method
def test_out_of_memory_goes_dense_then_in_chunks_of_heads(method, monkeypatch):
    layout, qkv = WITH_TEXT, random_qkv(WITH_TEXT, batch=2, heads=5)
    expected = sparse_attention(make_call(layout, qkv), searched_session(method, layout, qkv, sparsity=0.5))
    run = searched_session(method, layout, qkv, sparsity=0.5)
    attend, heads = kernels.block_sparse_attention, []

    def tight(q, *args, **kwargs):
        heads.append(q.shape[1])
        if q.shape[1] > 2:
            raise torch.OutOfMemoryError("tight")
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(kernels, "block_sparse_attention", tight)
    answer = sparse_attention(make_call(layout, qkv), run)
    assert answer == Dense("out of memory in the sparse path") and run.record.sparse_calls == 0
    assert "out of memory in the sparse path: such calls ran dense, and later ones compute fewer heads at a time" in run.record.notes
    assert relative_error(sparse_attention(make_call(layout, qkv), run), expected) < 1e-6
    assert heads == [5, 2, 2, 1] and run.record.sparse_calls == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(), OSError(12, "Cannot allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB)"), RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
    ],
    ids=["torch's", "Python's", "the system's", "Apple's", "the driver's", "the CPU's on Linux", "the CPU's on Windows"],
)
def test_out_of_memory_again_and_again_ends_the_sparse_path_at_one_head(monkeypatch, error):
    tried = []

    def full(q, *_, **__):
        tried.append(q.shape[1])
        raise error

    monkeypatch.setattr(kernels, "block_sparse_attention", full)
    run = make_session(svg)
    answers = [sparse_attention(make_call(SMALL, random_qkv(SMALL, heads=5)), run) for _ in range(5)]
    assert tried == [5, 2, 1]
    short = Dense("out of memory in the sparse path")
    assert answers == [short, short, *3 * [Dense("out of memory in the sparse path, one head at a time")]] and run.disabled
    assert [note for note in run.record.notes if "out of memory" in note] == [
        "out of memory in the sparse path: such calls ran dense, and later ones compute fewer heads at a time",
        "out of memory in the sparse path, one head at a time: the rest of this run is dense",
    ]


def test_under_strict_out_of_memory_is_the_hosts_to_see(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kernels, "block_sparse_attention", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        sparse_attention(make_call(SMALL, random_qkv(SMALL, heads=5)), make_session(svg, strict=True))


@pytest.mark.parametrize("method, op, knobs", [
    pytest.param(adaspa, "block_mass", {}, id="AdaSpa"),
    pytest.param(auto, "block_errors", {"scope": "head"}, id="Auto"),  # a threshold for all heads is one for those that fit
])
def test_out_of_memory_in_a_search_is_made_up_for(method, op, knobs, monkeypatch):
    knobs = {"sparsity": 0.3, **knobs}
    qkv, run = random_qkv(SMALL, heads=4), make_session(method, **knobs)
    expected = outputs(searched_session(method, SMALL, qkv, **knobs), SMALL, qkv, (3,))[0]
    measure, heads = getattr(kernels, op), []

    def tight(q, *args, **kwargs):
        heads.append(q.shape[1])
        if q.shape[1] > 2:
            raise torch.OutOfMemoryError("tight")
        return measure(q, *args, **kwargs)

    monkeypatch.setattr(kernels, op, tight)
    answers = [sparse_attention(make_call(SMALL, qkv, step=step), run) for step in (1, 2, 3)]
    assert [getattr(answer, "reason", "sparse") for answer in answers] == ["out of memory in the sparse path", "search step", "sparse"]
    assert heads == [4, 2, 2] and relative_error(answers[-1], expected) < 1e-6


@every_method
def test_other_errors_are_the_callers(method, monkeypatch):
    qkv = random_qkv(SMALL)
    run = searched_session(method, SMALL, qkv)

    def broken(*_, **__):
        raise KeyError("unexpected")

    monkeypatch.setattr(kernels, "block_sparse_attention", broken)
    with pytest.raises(KeyError, match="unexpected"):
        sparse_attention(make_call(SMALL, qkv), run)
    assert run.record.sparse_calls == 0


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which, row", [(0, 300), (1, 4), (2, 4)], ids=["q", "k", "v"])
def test_nan_and_inf_pass_through_as_in_dense_attention(method, which, row, bad):
    """In a text key, which every query sees, and in one video query."""
    qkv = random_qkv(WITH_TEXT, heads=2)
    qkv[which, 0, 1, row, 3] = bad
    shown = ~attention(*qkv)[0].isfinite().all(-1)
    assert shown.any() and not shown.all()
    for out in outputs(make_session(method, sparsity=0.5), WITH_TEXT, qkv, (1, 2, 5) if method.LEAST_WARMUP else (3, 4)):
        assert torch.equal(~out.isfinite().all(-1), shown)


@that_search
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
def test_nan_and_inf_in_a_skipped_block_pass_through_as_in_dense_attention(method, which, bad):
    """A block that counts as one key still shows what is in it."""
    layout = LAYOUTS["9x16x16"]
    qkv = random_qkv(layout, heads=2)
    run = make_session(method, sparsity=0.6)
    sparse_attention(make_call(layout, qkv, step=1), run)
    qkv[which, 0, 1, 700, 3] = bad
    shown = ~attention(*qkv)[0].isfinite().all(-1)
    assert shown[0, 1].any() and not shown[0, 0].any()
    call = make_call(layout, qkv, step=2)
    out = sparse_attention(call, run)
    seen = token_mask(method.plan(call, run.config, run.state(call)), layout, 1, 2)[..., 700]
    assert not seen[shown].all(), "every row keeps the block: this shows nothing"
    assert torch.equal(~out.isfinite().all(-1), shown)


@every_method
@pytest.mark.parametrize("sparsity", [0.5, 0.65])
def test_a_batch_together_or_apart_gives_the_same(method, sparsity):
    qkv = random_qkv(WITH_TEXT, batch=2, heads=5, seed=3)
    steps = (1, 2, 5) if method.LEAST_WARMUP else (3, 4)
    together = outputs(make_session(method, sparsity=sparsity), WITH_TEXT, qkv, steps)
    run = make_session(method, sparsity=sparsity)
    apart = [outputs(run, WITH_TEXT, qkv[:, b : b + 1], steps, condition=b) for b in range(2)]
    for out, *parts in zip(together, *apart, strict=True):
        assert torch.allclose(out, torch.cat(parts), atol=1e-6)


@every_method
@pytest.mark.parametrize("other", [{"condition": "negative"}, {"layer": 2}], ids=["condition", "layer"])
def test_states_do_not_mix(method, other):
    """Two taking turns give what each gives alone."""
    mine, theirs = random_qkv(WITH_TEXT, seed=1), random_qkv(WITH_TEXT, seed=2)
    steps = (1, 2, 3) if method.LEAST_WARMUP else (3, 4, 5)
    knobs = {"sparsity": 0.5, "cache_refresh": 0}
    alone = outputs(make_session(method, **knobs), WITH_TEXT, mine, steps), outputs(make_session(method, **knobs), WITH_TEXT, theirs, steps, **other)
    run, turns = make_session(method, **knobs), ([], [])
    for step in steps:
        turns[0].extend(outputs(run, WITH_TEXT, mine, (step,)))
        turns[1].extend(outputs(run, WITH_TEXT, theirs, (step,), **other))
    for expected, seen in zip(alone, turns, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, seen, strict=True))
    calls = make_call(WITH_TEXT, mine), make_call(WITH_TEXT, theirs, **other)
    assert run.state(calls[0]) is not run.state(calls[1]) and run.state(calls[0]) is run.state(dataclasses.replace(calls[0], step=9))


@pytest.mark.parametrize("layout, batch", [(LAYOUTS["3x12x12+both"], 1), (SMALL, 2), (VideoLayout(4, 9, 7), 1)], ids=["size", "batch", "same length"])
def test_a_new_shape_starts_anew(layout, batch):
    qkv, run = random_qkv(SMALL), make_session(adaspa, sparsity=0.2)
    outputs(run, SMALL, qkv, (1, 2))
    answer = sparse_attention(make_call(layout, random_qkv(layout, batch=batch), step=3), run)
    assert isinstance(answer, Dense) and answer.reason == "search step"


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@every_method
@pytest.mark.parametrize("interrupted", [False, True], ids=["", "interrupted"])
def test_a_run_that_ended_leaves_no_tensor_and_the_next_starts_clean(method, interrupted, monkeypatch):
    qkv = random_qkv(WITH_TEXT)
    calls = [make_call(WITH_TEXT, qkv, step=step) for step in (1, 2, 3)]
    before = tensors_alive()
    run = make_session(method, sparsity=0.5, warmup=2 if method.LEAST_WARMUP else 1)
    for call in calls:
        sparse_attention(call, run)
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "block_sparse_attention", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sparse_attention(calls[-1], run)
    what = run.state(calls[0]).found.what
    held = weakref.ref(what if method is svg else what.bits)
    del what
    assert held() is not None and tensors_alive() > before
    record = run.end()
    assert held() is None and tensors_alive() <= before
    assert record is run.record and record.sparse_calls >= 2 and record.achieved_sparsity == pytest.approx(0.5, abs=64 / WITH_TEXT.seq_len)
    assert run.end() is record  # twice does no harm
    again = make_session(method)
    assert again.state(calls[0]).found is None and again.record.sparse_calls == 0
