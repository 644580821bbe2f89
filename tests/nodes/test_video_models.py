"""Every row of the table of video models, on the real ComfyUI's own classes (SVA_HOST=real), with every method."""

import functools
import json
import os
from collections import Counter

import pytest
import torch
import zoo
from oracle import relative_error

METHODS = ("svg", "adaspa", "auto")
BLOCK_K = 64
_CASES = {case.name: case for case in zoo.CASES}

every_case = pytest.mark.parametrize("name", _CASES)
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Frees the models while their host still stands."""
    yield
    zoo.forget()
    _dense.cache_clear()


@pytest.fixture
def case(host, name):
    if host.name != "real":
        pytest.skip("the double has a few families only")
    case = _CASES[name]
    if reason := zoo.why_missing(case):
        pytest.skip(reason)
    return case


def _runs(case, method):
    """(size, batch, cfg): every size, every batch and every guidance at least once. The last alone for Auto, whose blocks lie as AdaSpa's."""
    first, second, odd = case.sizes
    batch, cfg = case.batches[-1], case.cfgs[-1]
    return [(first, 1, 1.0), (second, batch, cfg), (odd, 1, cfg)][2 if method == "auto" else 0 :]


@functools.cache
def _dense(name, size, batch, cfg):
    """(the unpatched model's video, its attention calls by (query tokens, key tokens))."""
    calls = Counter()
    return zoo.sample(_watched(zoo.load(_CASES[name]), calls), _CASES[name], size, batch, cfg), calls


def _watched(model, calls):
    """A clone of the model that counts the calls which reach ComfyUI's own attention, by (query tokens, key tokens)."""
    def watch(func, q, k, *args, **kwargs):
        calls[q.shape[-2], k.shape[-2]] += 1
        return func(q, k, *args, **kwargs)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = watch
    return watched


def _keep(case, method, **figures):
    """Puts a result where tools/capability_matrix.py looks for it."""
    if path := os.environ.get("SVA_MATRIX"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case.name, "row": case.row, "method": method, **figures}) + "\n")


@every_method
@every_case
def test_at_sparsity_0_the_video_is_the_unpatched_models(host, case, method, name):
    worst = 0.0
    for size, batch, cfg in _runs(case, method):
        dense, _ = _dense(name, size, batch, cfg)
        patched = host.patch(method, zoo.load(case), sparsity=0.0)
        worst = max(worst, relative_error(zoo.sample(patched, case, size, batch, cfg), dense))
        record = host.record(patched)
        assert record.sparse_calls == (case.layers + case.stacks) * (1 if cfg == 1 else 2) and record.achieved_sparsity == 0
        assert (record.model, record.layout) == (case.row, case.expected(size))
    assert worst < 1e-5
    _keep(case, method, error=worst)


@every_method
@every_case
def test_half_is_skipped_where_half_is_asked_and_nothing_else_is_touched(host, case, method, name):
    achieved = []
    for size, batch, cfg in _runs(case, method):
        dense, before = _dense(name, size, batch, cfg)
        after = Counter()
        patched = host.patch(method, _watched(zoo.load(case), after), sparsity=0.5)
        assert 1e-6 < relative_error(zoo.sample(patched, case, size, batch, cfg), dense) < 1
        record = host.record(patched)
        # In a short video what is always kept may leave less than half to skip; it is said then, and not in the first size.
        limited = size != case.sizes[0] and any("can be skipped" in note for note in record.notes)
        assert limited or abs(record.achieved_sparsity - 0.5) <= BLOCK_K / record.layout.seq_len, (size, record.achieved_sparsity)
        assert record.achieved_sparsity > 0.1, (size, record.notes)
        layers = case.layers + case.stacks
        assert record.sparse_calls == record.dense_calls == layers * (1 if cfg == 1 else 2)
        assert set(record.reasons) == {"warm-up step" if method == "svg" else "search step"}
        assert len(record.layer_names()) == layers
        tokens = record.layout.seq_len
        video = Counter({(tokens, tokens): before[tokens, tokens]})
        assert after - video == before - video, "calls that are not the video's"
        assert video[tokens, tokens] == 2 * layers * (1 if after[tokens, tokens] <= layers else 2) or method != "svg"
        achieved.append(record.achieved_sparsity)
    _keep(case, method, achieved=achieved, asked=0.5, tokens=[case.expected(size).seq_len for size in case.sizes])


@every_case
def test_a_fidelity_leaves_what_it_leaves_and_the_error_is_measured(host, case, name):
    size = case.sizes[0]
    dense, _ = _dense(name, size, 1, 1.0)
    patched = host.patch("auto", zoo.load(case), fidelity=0.9)
    assert 1e-7 < relative_error(zoo.sample(patched, case, size), dense) < 1
    record, layers = host.record(patched), case.layers + case.stacks
    assert record.sparse_calls == record.dense_calls == layers and set(record.reasons) == {"search step"} and record.asked_sparsity is None
    errors = record.by_layer_and_head("error")
    assert len(errors) == layers and 0 < record.measured_error < 0.5 and 0 < record.achieved_sparsity <= 1


@every_case
def test_automatic_settings_come_from_the_table(host, case, method="svg", name=None):
    patched = host.patch(method, zoo.load(case), sparsity=-1, dense_layers="auto")
    zoo.sample(patched, case, case.sizes[0])
    record = host.record(patched)
    assert 0.5 <= record.config.sparsity <= 0.8 and record.config.dense_layers == "0" and record.automatic
    assert record.reasons["dense layer"] == 1 + case.stacks


def test_every_row_has_a_case(host):
    rows = {row.name for row in host.module("video_models").ROWS}
    assert rows == {case.row for case in zoo.CASES}


def test_vace_blocks_have_plans_of_their_own(host):
    if host.name != "real":
        pytest.skip("the double has a few families only")
    case = _CASES["Wan VACE"]
    patched = host.patch("adaspa", zoo.load(case), sparsity=0.5)
    zoo.sample(patched, case, case.sizes[0], steps=3)
    record = host.record(patched)
    assert record.layer_names() == ["0", "1", "0 vace", "0 vace 2"]
    recall = record.by_layer_and_head("recall")
    assert len(recall) == 4 and recall["0"] != recall["0 vace"] != recall["0 vace 2"]


def test_the_picture_names_the_stacks(host):
    """Both plots of a record with two stacks: main blocks and VACE blocks."""
    module = host.module("report_picture")
    names = ["0", "1", "0 vace"]
    record = {
        "method": "AdaSpa", "model": "Wan VACE", "outcome": "finished", "asked_sparsity": 0.5, "achieved_sparsity": 0.5, "run_sparsity": 0.25,
        "sparse_calls": 3, "dense_calls": 3, "reasons": {}, "tokens": 576, "steps": 2, "backend": "torch", "notes": [], "search_steps": [0],
        "layer_names": names, "sparsity_by_layer_and_step": [[0.0, 0.5]] * 3,
        "calls_by_step": {"sparse": [0, 3], "dense": [3, 0]}, "layout": {"prefix": 0, "frames": 9, "height": 8, "width": 8},
        "costs": {"call_ms_by_layer": {name: {"sparse": 1.0, "dense": 2.0} for name in names}},
    }
    for key in ("recall_by_layer_and_head", "temporal_share_by_layer_and_head"):
        image = module.draw({**record, key: {name: [0.5, 1.0] for name in names}}, module.Mask(2, 0, torch.eye(64, dtype=torch.bool)))
        assert image.std() > 0.02


def test_animate2_with_a_pose_says_why_it_is_dense(host):
    if host.name != "real":
        pytest.skip("the double has a few families only")
    case = _CASES["Wan-Animate2 without a pose"]
    if reason := zoo.why_missing(case):
        pytest.skip(reason)
    posed = zoo.replace(case, extra=zoo._together(
        case.extra, lambda size, generator: {"pose_video_latent": torch.randn(1, 16, size[0] - 1, *size[1:], generator=generator)},
    ))
    model = zoo.load(case)
    patched = host.patch("svg", model, sparsity=0.5)
    assert torch.equal(zoo.sample(patched, posed, case.sizes[0]), zoo.sample(model, posed, case.sizes[0]))
    record = host.record(patched)
    assert set(record.reasons) == {"with a pose, Wan-Animate2 attends one latent frame at a time"} and record.dense_calls > 0


def test_a_video_under_guides_of_uneven_strength_runs_dense_and_says_so(host):
    if host.name != "real":
        pytest.skip("the double has a few families only")
    case = _CASES["LTX-Video with guides"]
    size = case.sizes[0]
    tokens = zoo._GUIDE_FRAMES * size[1] * size[2]
    entry = {"pre_filter_count": tokens, "strength": 0.5, "pixel_mask": None, "latent_shape": None}
    uneven = zoo.replace(case, extra=zoo._together(case.extra, lambda size, generator: {"guide_attention_entries": [entry]}))
    model = zoo.load(case)
    patched = host.patch("svg", model, sparsity=0.5)
    assert torch.equal(zoo.sample(patched, uneven, size), zoo.sample(model, uneven, size))
    record = host.record(patched)
    assert record.sparse_calls == 0 and any("guides that have a strength of their own" in reason for reason in record.reasons)
