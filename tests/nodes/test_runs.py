"""Whole runs of patched models: what they compute, and what other nodes may do around them. How they end is in test_lifecycle.py."""

import pytest
import torch
from oracle import assert_same_figures, relative_error

METHODS = ("svg", "adaspa", "auto")
FAMILIES = ("wan", "hunyuan", "ltxv", "cogvideox", "unlisted")

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)


# --- what a run computes ---------------------------------------------------------------------------------------------


@every_method
@every_family
@pytest.mark.parametrize("cfg", [1.0, 5.0], ids=["cfg 1", "cfg 5"])
def test_sparsity_0_equals_the_unpatched_model(host, family, method, cfg):
    model = host.load(family)
    dense = host.sample(model, family, cfg=cfg)
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, family, cfg=cfg), dense) < 1e-5
    record = host.record(patched)
    conditions = 1 if cfg == 1 else 2
    assert record.sparse_calls == 3 * host.layers[family] * conditions
    assert record.achieved_sparsity == 0
    assert record.layout.seq_len == host.tokens[family]


@every_method
@every_family
def test_a_sparse_run_skips_what_was_asked(host, family, method):
    model = host.load(family)
    dense = host.sample(model, family)
    patched = host.patch(method, model, sparsity=0.4)
    error = relative_error(host.sample(patched, family), dense)
    record = host.record(patched)
    assert abs(record.achieved_sparsity - 0.4) <= 64 / host.tokens[family]
    assert 1e-5 < error < 0.3
    assert (record.sparse_calls, record.dense_calls) == (3 * host.layers[family], host.layers[family])
    assert record.run_sparsity == pytest.approx(record.achieved_sparsity * 3 / 4)
    assert record.outcome == "finished"


@every_method
@every_family
def test_conditions_batched_and_apart_give_the_same(host, family, method, batched):
    patched = host.patch(method, host.load(family), sparsity=0.4)
    outputs, data = [], []
    for together in (True, False):
        batched(together)
        outputs.append(host.sample(patched, family, cfg=5.0))
        data.append(host.record(patched).to_json())
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert_same_figures(data[1], data[0])


@every_method
def test_conditions_may_change_between_batched_and_apart_during_a_run(host, method, batched):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    expected = host.sample(patched, "wan", cfg=5.0)
    out = host.sample(patched, "wan", cfg=5.0, callback=lambda step, *_: batched(step % 2 == 1))
    assert relative_error(out, expected) < 1e-5
    first, second = host.records(patched)
    assert_same_figures(second.to_json(), first.to_json())


@every_method
@every_family
def test_a_batch_of_two_is_two_videos(host, family, method):
    patched = host.patch(method, host.load(family), sparsity=0.4)
    both = host.sample(patched, family, batch=2)
    record = host.record(patched)
    assert both.shape[0] == 2 and record.sparse_calls == 3 * host.layers[family]
    assert abs(record.achieved_sparsity - 0.4) <= 64 / host.tokens[family]
    # Two videos of one seed differ by their noise; a plan of one must not be the other's.
    assert relative_error(both[1], both[0]) > 0.1


@every_method
def test_padded_text_stays_sparse_and_exact(host, method):
    model = host.load("hunyuan")
    dense = host.sample(model, "hunyuan", padded=True)
    assert relative_error(host.sample(model, "hunyuan"), dense) > 1e-4, "the padding mask does nothing here"
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, "hunyuan", padded=True), dense) < 1e-5
    record = host.record(patched)
    assert record.sparse_calls == 9 and set(record.reasons) <= {"warm-up step", "search step"}


@every_method
def test_bypassing_undoes_all(host, method):
    model = host.load("wan")
    before = host.sample(model, "wan")
    patched = host.patch(method, model, sparsity=0.4)
    assert not torch.equal(host.sample(patched, "wan"), before)
    assert torch.equal(host.sample(model, "wan"), before)
    assert model.model_options["transformer_options"] == {} and model.get_attachment(host.module("host").KEY) is None


@every_method
def test_a_second_stage_starts_below_the_warm_up(host, method):
    """A KSamplerAdvanced that takes over at step 3 of 6."""
    model = host.load("wan")
    sigmas = host.sigmas(model, 6)[3:]
    dense = host.sample(model, "wan", sigmas=sigmas)
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, "wan", sigmas=sigmas), dense) < 1e-5
    record = host.record(patched)
    # AdaSpa's search is dense, so it needs one step of any stage.
    assert record.steps == 3 and record.warmup == (0 if method == "svg" else 1)
    assert record.dense_calls == (0 if method == "svg" else 2)


@every_method
def test_a_sampler_that_looks_between_the_sigmas(host, method):
    model = host.load("wan")
    dense = host.sample(model, "wan", sampler="heun")
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, "wan", sampler="heun"), dense) < 1e-5
    record = host.record(patched)
    # 4 steps are 7 evaluations of 2 layers. The first step's second look is at step 2's sigma, so it is sparse.
    assert (record.sparse_calls, record.dense_calls) == (12, 2)
    rows = record.by_layer_and_step()
    assert [len(row) for row in rows] == [4, 4] and None not in rows[0]


@every_method
def test_evaluations_that_a_cache_skips_leave_gaps_and_nothing_else(host, method):
    """As EasyCache does: the model is not called, so no attention is seen; here in the step of AdaSpa's search."""
    count, last = [], []

    def cache(executor, *args, **kwargs):
        count.append(None)
        if len(count) == 2:
            return last[-1]
        last.append(executor(*args, **kwargs))
        return last[-1]

    model = host.load("wan")
    patched = host.patch(method, host.wrap(model, "DIFFUSION_MODEL", cache), sparsity=0.0, warmup_steps=2)
    out = host.sample(patched, "wan", steps=5)
    count.clear()
    assert relative_error(out, host.sample(host.wrap(model, "DIFFUSION_MODEL", cache), "wan", steps=5)) < 1e-5
    record = host.record(patched)
    assert [row[1] for row in record.by_layer_and_step()] == [None, None]
    assert record.sparse_calls == (6 if method == "svg" else 4)  # the search came a step late, and is dense
    assert sorted(record.searches) == ([] if method == "svg" else [2])


@every_method
def test_context_windows_have_plans_of_their_own(host, method):
    """The host calls each window with the same condition names; the windows' frames tell them apart."""
    windows = [list(range(0, 5)), list(range(5, 10))]

    class Window:
        def __init__(self, index_list):
            self.index_list = index_list

    def in_windows(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        out = torch.zeros_like(x)
        for frames in windows:
            options = {**transformer_options, "context_window": Window(frames)}
            out[:, :, frames] = executor(x[:, :, frames], t, c_concat, c_crossattn, control, options, **kwargs)
        return out

    model = host.wrap(host.load("wan"), "APPLY_MODEL", in_windows)
    dense = host.sample(model, "wan", frames=10)
    exact = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(exact, "wan", frames=10), dense) < 1e-5
    record = host.record(exact)
    assert record.layout.frames == 5 and record.sparse_calls == 3 * 2 * 2
    if method == "adaspa":
        assert set(record.searches.values()) == {4}, "each of 2 layers searches in each of 2 windows"
    # What is found in one window is used in that window alone, so it does not matter which comes first.
    sparse = host.patch(method, model, sparsity=0.3)
    forwards = host.sample(sparse, "wan", frames=10)
    windows.reverse()
    assert relative_error(host.sample(sparse, "wan", frames=10), forwards) < 1e-6


# --- other nodes -----------------------------------------------------------------------------------------------------


def counting(calls, name):
    """An override that counts the calls it gets, by whether they are self-attention of the video, and passes them on."""

    def override(before, func, q, k, *args, **kwargs):
        if q.shape == k.shape:
            calls.append(name)
        return func(q, k, *args, **kwargs) if before is None else before(func, q, k, *args, **kwargs)

    return override


@every_method
@pytest.mark.parametrize("places", [("before",), ("after",), ("before", "after")], ids="+".join)
def test_overrides_before_and_after_ours_compute_the_dense_calls(host, method, places):
    calls = []
    model = host.load("wan")
    if "before" in places:
        model = host.override(model, counting(calls, "before"))
    model = host.patch(method, model, sparsity=0.4, dense_layers="1")
    if "after" in places:
        model = host.override(model, counting(calls, "after"))
    host.sample(model, "wan")
    record = host.record(model)
    # Layer 1 in 4 steps; layer 0 in the warm-up, which is AdaSpa's search and computed by it.
    dense_by_host = 5 if method == "svg" else 4
    assert (record.sparse_calls, record.dense_calls) == (3, 5)
    assert sorted(calls) == sorted(dense_by_host * list(places))
    assert not [note for note in record.notes if "override" in note]


def replacing(override):
    """An APPLY_MODEL wrapper of a node that puts its own override on in each evaluation: override(ours, func, ...)."""

    def replace(executor, *args, **kwargs):
        options = next(value for value in args if isinstance(value, dict) and "sigmas" in value)
        ours = options["optimized_attention_override"]
        options["optimized_attention_override"] = lambda *a, **k: override(ours, *a, **k)
        return executor(*args, **kwargs)

    return replace


@every_method
def test_an_override_that_is_taken_away_during_the_run_is_said(host, method):
    model = host.load("wan")
    theirs = replacing(lambda ours, func, *args, **kwargs: func(*args, **kwargs))
    patched = host.patch(method, host.wrap(model, "APPLY_MODEL", theirs), sparsity=0.4)
    assert torch.equal(host.sample(patched, "wan"), host.sample(model, "wan"))
    record = host.record(patched)
    assert record.sparse_calls == 0
    assert [note for note in record.notes if "another node replaced the attention override" in note]
    assert "another node replaced the attention override" in host.shown[-1].text


@every_method
def test_an_override_that_passes_calls_on_to_ours_takes_nothing_away(host, method):
    """As nodes do that put themselves on again in every step, and call what stood there."""
    model = host.load("wan")
    theirs = replacing(lambda ours, func, *args, **kwargs: ours(func, *args, **kwargs))
    patched = host.patch(method, host.wrap(model, "APPLY_MODEL", theirs), sparsity=0.4)
    assert torch.equal(host.sample(patched, "wan"), host.sample(host.patch(method, model, sparsity=0.4), "wan"))
    record = host.record(patched)
    assert record.sparse_calls == 6 and not [note for note in record.notes if "another node" in note]


@pytest.mark.parametrize("first, second", [("svg", "adaspa"), ("adaspa", "svg"), ("svg", "svg")])
def test_of_two_patch_nodes_the_later_wins_and_says_so(host, first, second):
    once = host.patch(first, host.load("wan"), node_id="4", sparsity=0.2)
    twice = host.patch(second, once, node_id="5", sparsity=0.4)
    assert [line.node for line in host.shown] == ["5"] and "gave way" in host.shown[0].text
    out = host.sample(twice, "wan")
    alone = host.patch(second, host.load("wan"), sparsity=0.4)
    assert torch.equal(out, host.sample(alone, "wan"))
    (record,) = host.records(twice)
    assert record.asked_sparsity == 0.4 and [note for note in record.notes if "gave way" in note]
    assert host.records(once) == []
    host.sample(once, "wan")
    assert host.record(once).asked_sparsity == 0.2 and len(host.records(twice)) == 1


@every_method
def test_clones_of_a_patched_model_share_its_log(host, method):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    later = host.wrap(patched, "DIFFUSION_MODEL", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    host.sample(later, "wan")
    assert len(host.records(patched)) == 1


@pytest.mark.parametrize("knobs, warmup, sparsity", [
    ({"sparsity": -1}, 0, 0.562), ({"sparsity": 0.4}, 1, 0.4), ({"sparsity": -1, "warmup_steps": 1}, 1, 0.75),
], ids=str)
def test_svg_spreads_what_a_short_run_skips_where_both_are_automatic(host, knobs, warmup, sparsity):
    """As much of the run, in every step instead of all but one; and the node says so."""
    patched = host.patch("svg", host.load("hunyuan"), **knobs)
    host.sample(patched, "hunyuan", steps=4)
    record = host.record(patched)
    assert (record.warmup, record.config.sparsity) == (warmup, sparsity)
    said = [note for note in record.notes if note.startswith("few steps")]
    assert said == ([] if warmup else ["few steps (4): no warm-up, and 56% skipped at each step instead of 75%, as much of the run"])
    assert ("warm-up step" in record.reasons) == bool(warmup) and record.sparse_calls == (4 - warmup) * host.layers["hunyuan"]
