"""The probe: errors as the definition has them, other sparsities as runs at them would have it, and what is suggested."""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from oracle import attention, relative_error
from pack.attention.call import Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS, adaspa, auto, svg
from pack.attention.probe import Probe, ProbeConfig, ProbeRecord, evenly_spaced, parse_sparsities, relative_errors, suggest
from pack.attention.session import LayerState, Session
from video_oracle import as_one_key, make_call, make_session, random_qkv, token_mask

LAYOUT = VideoLayout(9, 8, 8)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def exact_of(call):
    """The call's dense output, float32, from the definition."""
    return attention(call.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias)[0].float()


def calls_of(layer, steps=range(10), layout=LAYOUT, **call):
    """One layer's calls of a run, step by step; what it attends with drifts a little."""
    first, second = random_qkv(layout, seed=layer), random_qkv(layout, seed=layer + 50)
    return [make_call(layout, 2 * (first + 0.1 * step * second), step=step, layer=layer, **call) for step in steps]


def run(session, config, layers=(1,), steps=range(10), dense=exact_of, **call):
    """A probed run; (what was found, output or Dense by layer and step)."""
    probe = Probe(config, session)
    outputs = {}
    for layer in layers:
        for one in calls_of(layer, steps, **call):
            outputs[layer, one.step] = probe.attend(one, lambda one=one: dense(one))[0]
            probe.flush()
    session.end()
    return probe.end(), outputs


def record_of(errors, asked=(0.8,), achieved=None, layers=None, dense_layers=""):
    """A record of the errors by rung, then layer's number or (number, stack)."""
    record = ProbeRecord(ProbeConfig(), tuple(asked), layers, dense_layers)
    record.achieved = list(achieved or asked)
    for rung, by_layer in enumerate(errors):
        for layer, heads in by_layer.items():
            record.add(rung, layer if isinstance(layer, tuple) else (layer, ""), heads if isinstance(heads, list) else [heads])
    return record


def test_an_error_is_the_norm_of_the_difference_over_that_of_the_dense_output():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 3, 300, 16, generator=generator) * torch.tensor([1.0, 50.0, 1e-3])[:, None, None]
    off = 0.1 * torch.randn(2, 3, 300, 16, generator=generator)
    found = relative_errors(dense + off, dense)
    for entry in range(2):
        for head in range(3):
            assert float(found[entry, head]) == pytest.approx(relative_error((dense + off)[entry, head], dense[entry, head]), rel=1e-5)


def test_errors_of_nothing_and_of_bfloat16():
    zeros = torch.zeros(1, 2, 10, 4)
    assert relative_errors(zeros, zeros).tolist() == [[0.0, 0.0]]
    dense = torch.ones(1, 1, 70_000, 16, dtype=torch.bfloat16)  # summed in bfloat16, the norm would be far off
    assert float(relative_errors(1.5 * dense, dense)) == pytest.approx(0.5, rel=1e-5)


@every_method
def test_the_errors_are_those_of_the_plan_that_ran(method):
    """Against the definition in float64, under the mask of the very plan that the run made."""
    session = make_session(method, sparsity=0.6, layers=3)
    plans = {}
    right = method.plan

    def plan(call, config, state):
        made = right(call, config, state)
        if not isinstance(made, Dense) and state.run is session:
            plans[call.step] = made
        return made

    spied = dataclasses.replace(session, method=type("Method", (), {**vars(method), "plan": staticmethod(plan)}))
    spied.record, session = session.record, spied
    found, _ = run(session, ProbeConfig(steps=0, sparsities=""))
    assert sorted(plans) == list(range(2, 10)) == sorted(found.steps) and found.calls == 8
    expected = torch.zeros(2, dtype=torch.float64)
    for call in calls_of(1):
        if call.step in plans:
            exact = attention(call.q, call.k, call.v)[0]
            seen = attention(call.q, call.k, call.v, token_mask(plans[call.step], LAYOUT, heads=2), blocks=as_one_key(session.config, LAYOUT))[0]
            expected += torch.tensor([relative_error(seen[:, head], exact[:, head]) for head in range(2)]) / 8
    assert found.heads()[1, ""] == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(expected) > 0.05  # there is something to measure


@every_method
@pytest.mark.parametrize("refresh", [-1, 3])
@pytest.mark.parametrize("warmup", [1, 3])
def test_another_sparsity_is_measured_as_a_run_at_it_would_be(method, refresh, warmup):
    """The same tensors through a run of that sparsity, without any probe."""
    knobs = {"cache_refresh": refresh, "warmup": warmup}
    found, _ = run(make_session(method, sparsity=0.7, **knobs), ProbeConfig(steps=2, sparsities="0.4"))
    other = make_session(method, sparsity=0.4, **knobs)
    errors = []
    for call in calls_of(1):
        out = sparse_attention(call, other)
        if call.step in found.steps:
            exact = exact_of(call)
            errors.append([relative_error(out[:, head], exact[:, head]) for head in range(2)])
    assert found.sparsities == (0.7, 0.4) and found.steps == {warmup, 9} and len(errors) == 2
    assert found.heads(1)[1, ""] == pytest.approx(torch.tensor(errors).mean(0).tolist(), rel=1e-4)
    assert found.achieved[1] == pytest.approx(0.4, abs=64 / LAYOUT.seq_len)
    assert found.by_layer(1)[1, ""] < found.by_layer(0)[1, ""]


@every_method
def test_what_was_skipped_is_that_of_the_measured_calls(method, monkeypatch):
    """Pairs counted in the masks of the very plans: SVG's two kinds of head skip differently, and which a head is changes from call to call."""
    kept, right = {}, method.plan

    def plan(call, config, state):
        made = right(call, config, state)
        if not isinstance(made, Dense):
            kept.setdefault(config.sparsity, {})[call.step] = 1 - token_mask(made, LAYOUT, heads=2).double().mean().item()
        return made

    monkeypatch.setattr(method, "plan", plan)
    session = make_session(method, sparsity=0.6)
    found, _ = run(session, ProbeConfig(steps=2, sparsities="0.4"))
    assert found.steps == {2, 9} and sorted(kept[0.6]) == list(range(2, 10))
    assert found.achieved == pytest.approx([(kept[asked][2] + kept[asked][9]) / 2 for asked in (0.6, 0.4)], abs=1e-5)
    whole = sum(kept[0.6].values()) / 8
    assert session.record.achieved_sparsity == pytest.approx(whole, abs=1e-5)
    assert method is not svg or abs(whole - found.achieved[0]) > 0.004, "the whole run's figure is another"


@pytest.mark.parametrize("method", [svg, adaspa], ids=["SVG", "AdaSpa"])
@pytest.mark.parametrize("asked, below", [(0.8, "0.7, 0.6"), (0.7, "0.8, 0.6"), (0.6, "0.8, 0.7"), (0.95, "0.94, 0.9")])
def test_where_a_short_video_skips_alike_at_every_sparsity_the_patchs_own_is_kept(method, asked, below):
    """Two latent frames, of which the first is always kept by SVG, and four blocks, of which AdaSpa keeps half: both skip less than any asks for."""
    layout = VideoLayout(2, 8, 16) if method is svg else VideoLayout(3, 8, 8)
    found, _ = run(make_session(method, sparsity=asked), ProbeConfig(steps=2, sparsities=below), layout=layout)
    assert len(found.sparsities) == 3 and max(found.achieved) < 0.5
    assert found.achieved == pytest.approx([found.achieved[0]] * 3, abs=1e-6) and found.by_layer(0) == found.by_layer(1) == found.by_layer(2)
    advice = suggest(found, 2.0)
    assert (advice.dense_layers, advice.sparsity, advice.skipped) == ("", asked, pytest.approx(found.achieved[0]))


@every_method
def test_the_run_goes_on_as_without_a_probe(method):
    plain = make_session(method, sparsity=0.6)
    expected = [sparse_attention(call, plain) for call in calls_of(1)]
    session = make_session(method, sparsity=0.6)
    _, outputs = run(session, ProbeConfig(steps=0))
    for step, wanted in enumerate(expected):
        got = outputs[1, step]
        assert type(got) is type(wanted)
        assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got.reason == wanted.reason
    assert session.record.sparse_calls == plain.record.sparse_calls == 8 and session.record.searches == plain.record.searches


@pytest.mark.parametrize("sparsities", ["auto", "0.5, 0.3"])
def test_what_a_fidelity_leaves_is_the_only_sparsity_that_is_measured(sparsities):
    """Another sparsity would be another method; the run's own is told with its errors."""
    session = make_session(auto, fidelity=0.6, layers=4)
    found, outputs = run(session, ProbeConfig(steps=0, sparsities=sparsities))
    assert found.sparsities == (-1,) and found.steps == set(range(2, 10)) and found.calls == 8
    assert found.achieved == [pytest.approx(session.record.achieved_sparsity)] and 0 < found.achieved[0] < 1
    errors = [relative_error(outputs[1, call.step], exact_of(call)) for call in calls_of(1) if call.step in found.steps]
    assert found.by_layer()[1, ""] == pytest.approx(sum(errors) / 8, rel=0.05)
    for bound, layers, way in ((2.0, "", None), (0.001, "1", "raise the patch's fidelity")):
        advice = suggest(found, bound)
        assert (advice.sparsity, advice.dense_layers) == (-1, layers)
        assert "how much is skipped follows from the patch's fidelity, which is kept: it alone was measured" in advice.notes
        assert way is None or any(way in note for note in advice.notes)


def test_the_run_may_go_on_with_the_dense_output():
    _, outputs = run(make_session(svg, sparsity=0.6), ProbeConfig(steps=2, continue_with="dense"))
    for call in calls_of(1):
        exact = exact_of(call)
        assert isinstance(outputs[1, call.step], Dense) or torch.equal(outputs[1, call.step], exact) == (call.step in (2, 9))


@every_method
def test_what_is_not_probed_is_not_computed_twice(method):
    asked = []

    def dense(call):
        asked.append((call.layer, call.step))
        return exact_of(call)

    session = make_session(method, end=1, layers=4, dense_layers="0")
    found, _ = run(session, ProbeConfig(layers="0, 2-3", steps=3), layers=range(4), dense=dense)
    assert asked == [(layer, step) for layer in (2, 3) for step in (2, 5, 8)]  # 0 is dense anyway
    assert list(found.heads()) == [(2, ""), (3, "")] and found.calls == 6


def test_stacks_that_count_alike_are_measured_apart():
    session = make_session(svg, sparsity=0.6)
    probe = Probe(ProbeConfig(steps=1, sparsities=""), session)
    for call in calls_of(1):
        for one in (call, dataclasses.replace(call, v=call.v + 5, stack="vace")):
            probe.attend(one, lambda one=one: exact_of(one))
    session.end()
    errors = probe.end().by_layer()
    assert list(errors) == [(1, ""), (1, "vace")] and errors[1, "vace"] < errors[1, ""] / 2


def test_a_step_that_a_cache_skipped_is_made_up_for():
    found, _ = run(make_session(svg), ProbeConfig(steps=3), steps=[0, 1, 3, 4, 6, 7, 9])  # chosen: 2, 6 and 9 of 2 to 9
    assert found.steps == {3, 6, 9} and found.calls == 3


@pytest.mark.parametrize("most, layers", [(0, list(range(1, 8))), (1, [4]), (2, [1, 7]), (3, [1, 4, 7])])
def test_layers_are_evenly_spaced_among_those_that_can_be_sparse(most, layers):
    found, _ = run(make_session(svg, layers=9, dense_layers="0, -1"), ProbeConfig(most_layers=most, steps=1, sparsities=""), layers=range(9))
    assert [layer for layer, _ in found.heads()] == layers


@pytest.mark.parametrize("count, expected", [(1, [12]), (2, [10, 14]), (3, [10, 12, 14]), (4, [10, 11, 13, 14]), (5, None), (9, None), (0, None)])
def test_evenly_spaced(count, expected):
    items = [10, 11, 12, 13, 14]
    assert evenly_spaced(items, count) == (items if expected is None else expected)


@pytest.mark.parametrize("asked, expected", [(0.8, (0.7, 0.6)), (0.7, (0.55, 0.4)), (0.3, (0.2, 0.1)), (0.95, (0.93, 0.9)), (0.0, ())])
def test_automatic_sparsities_are_below_the_patchs_own(asked, expected):
    assert ProbeConfig().rungs(asked) == pytest.approx(expected, abs=0.011)
    assert ProbeConfig(sparsities="0.2, 0.9, 0.8").rungs(0.8) == (0.9, 0.2)


@every_method
def test_nothing_of_a_call_is_kept_and_nothing_of_the_run(method):
    session = make_session(method, sparsity=0.6)
    probe = Probe(ProbeConfig(steps=0), session)
    seen = []
    for call in calls_of(1, range(4)):
        call = dataclasses.replace(call, q=call.q.clone(), k=call.k.clone(), v=call.v.clone())
        exact = exact_of(call)
        seen += [weakref.ref(tensor) for tensor in (call.q, call.k, call.v, exact)]
        out = probe.attend(call, lambda exact=exact: exact)[0]
        seen += [weakref.ref(out)] if isinstance(out, torch.Tensor) else []
        del call, exact, out
    gc.collect()
    assert not [one for one in seen if one() is not None]
    session.end()
    record = probe.end()
    del probe, session
    gc.collect()
    held = [kind for kind in (torch.Tensor, Session, LayerState) for one in _reached(record) if isinstance(one, kind)]
    assert held == [] and record.calls == 2


def _reached(one, seen=None):
    seen = {} if seen is None else seen
    if id(one) not in seen and not isinstance(one, type):
        seen[id(one)] = one
        for part in gc.get_referents(one):
            if not callable(part):
                _reached(part, seen)
    return list(seen.values())


def test_rungs_share_the_lse_of_the_run():
    """It is as large as all else that a search leaves behind, and does not depend on the budget."""
    session = make_session(adaspa, warmup=3, cache_refresh=2)
    probe = Probe(ProbeConfig(), session)
    for call in calls_of(1, range(7)):
        probe.attend(call, lambda call=call: exact_of(call))
        kept = session.state(call).found
        if kept is not None and kept.lse is not None:
            assert all(rung.state(call).found.lse is kept.lse for rung in probe._rungs) and call.step >= 1
    assert kept.lse is not None and kept.step == 6


def test_a_probe_that_fails_ends_alone():
    def broken(call):
        if call.step > 3:
            raise RuntimeError("no memory for both")
        return exact_of(call)

    session = make_session(svg, sparsity=0.6)
    found, outputs = run(session, ProbeConfig(steps=0), dense=broken)
    assert found.why == "RuntimeError: no memory for both" and found.steps == {2, 3} and found.calls == 2
    assert all(isinstance(outputs[1, step], torch.Tensor) for step in range(2, 10)) and session.disabled is None
    assert any("no memory for both" in note for note in session.record.notes)
    assert "no memory for both" in suggest(found, 0.5).notes[0]
    with pytest.raises(RuntimeError, match="no memory"):
        run(make_session(svg, strict=True), ProbeConfig(steps=0), dense=broken)


def test_errors_that_are_no_numbers_are_left_out():
    record = record_of([{1: [math.nan, 0.2], 2: [math.inf, math.nan]}])
    record.add(0, (1, ""), [0.4, 0.4])
    assert record.heads() == {(1, ""): [0.4, pytest.approx(0.3)], (2, ""): [None, None]}
    assert record.worst() == [(1, "", 0, 0.4), (1, "", 1, pytest.approx(0.3))]
    assert suggest(record, 0.5).notes[-1] == "1 layers gave no finite error and are left out"


def test_the_worst_come_first():
    record = record_of([{1: [0.1, 0.5], (1, "vace"): [0.3, 0.9], 2: [0.2, 0.4]}])
    assert [(layer, stack, head) for layer, stack, head, _ in record.worst()] == [
        (1, "vace", 1), (1, "", 1), (2, "", 1), (1, "vace", 0), (2, "", 0), (1, "", 0),
    ]


def test_a_bad_layer_is_suggested_and_the_others_keep_the_bound():
    """Layer 2 attends sharply and at random, so that no band or block of it is enough; the others hardly at all."""
    session = make_session(svg, sparsity=0.6, layers=4)
    probe = Probe(ProbeConfig(steps=2), session)
    for layer in range(4):
        for call in calls_of(layer):
            scale = 4.0 if layer == 2 else 0.01
            qk = dataclasses.replace(call, q=call.q * scale, k=call.k, v=call.v + (0 if layer == 2 else 3))
            probe.attend(qk, lambda qk=qk: exact_of(qk))
    session.end()
    found = probe.end()
    assert {layer for layer, *_ in found.worst()[:2]} == {2}
    advice = suggest(found, 0.1)
    assert (advice.dense_layers, advice.sparsity) == ("2", 0.6)
    assert advice.skipped == pytest.approx(found.achieved[0] * 3 / 4)
    assert all(error <= 0.1 for (layer, _), error in found.by_layer().items() if layer != 2) and found.by_layer()[2, ""] > 0.1


# Errors of four layers at 0.8, 0.6 and 0.4.
ERRORS = [{0: 0.3, 1: 0.5, 2: 0.6, 3: 0.7}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.5}, {0: 0.05, 1: 0.1, 2: 0.15, 3: 0.2}]


@pytest.mark.parametrize("bound, dense_layers, sparsity, skipped", [
    (1.0, "", 0.8, 0.8),  # all are good at 0.8
    (0.65, "", 0.6, 0.6),  # 0.8 in three of four layers skips as much: fewer dense layers are kept
    (0.5, "", 0.6, 0.6),
    (0.3, "3", 0.6, 0.45),
    (0.2, "", 0.4, 0.4),
    (0.1, "2-3", 0.4, 0.2),
    (0.04, "0-3", 0.4, 0.0),
])
def test_the_suggestion_skips_most_under_the_bound(bound, dense_layers, sparsity, skipped):
    advice = suggest(record_of(ERRORS, (0.8, 0.6, 0.4), layers=4), bound)
    assert (advice.dense_layers, advice.sparsity, advice.skipped) == (dense_layers, sparsity, pytest.approx(skipped))
    assert bool(advice.notes) == (bound == 0.04)


def test_what_was_skipped_in_fact_counts():
    """Few frames: 0.8 was asked for, and no more than 0.61 could be skipped."""
    advice = suggest(record_of(ERRORS, (0.8, 0.6, 0.4), achieved=(0.61, 0.6, 0.4), layers=4), 0.65)
    assert (advice.dense_layers, advice.sparsity) == ("", 0.6)


@pytest.mark.parametrize("asked, achieved, sparsity", [
    ((0.8, 0.7, 0.6), (0.31, 0.31, 0.31), 0.8),
    ((0.7, 0.9, 0.8, 0.6), (0.31, 0.31, 0.31, 0.31), 0.7),
    ((0.8, 0.9, 0.7, 0.6), (0.3, 0.31, 0.31, 0.31), 0.7),  # what the patch asks is not among the tied
    ((0.6, 0.9, 0.8, 0.4), (0.5, 0.55, 0.55, 0.4), 0.8),  # all that are tied are above: the nearest
    ((0.8, 0.7, 0.6), (0.31, 0.3100000001, 0.31), 0.8),  # a rounding error is no difference
    ((0.8, 0.7, 0.6), (0.31, 0.32, 0.31), 0.7),
])
def test_at_equal_shares_the_patchs_own_or_the_next_below_is_suggested(asked, achieved, sparsity):
    advice = suggest(record_of([{0: 0.1, 1: 0.2}] * len(asked), asked, achieved, layers=2), 0.5)
    assert (advice.dense_layers, advice.sparsity) == ("", sparsity)
    advice = suggest(record_of([{0: 0.1, 1: 0.9}] * len(asked), asked, achieved, layers=2), 0.5)
    assert (advice.dense_layers, advice.sparsity) == ("1", sparsity)


def test_the_patchs_own_dense_layers_are_kept():
    errors = [{2: 0.9, 3: 0.1, 4: 0.9, 5: 0.9}]
    assert suggest(record_of(errors, layers=7, dense_layers="0-1, -1"), 0.5).dense_layers == "0-2, 4-6"
    assert suggest(record_of(errors, layers=None, dense_layers="0-1, -1"), 0.5).dense_layers == "0-1, -1, 2, 4-5"
    assert suggest(record_of(errors, layers=None), 0.5).dense_layers == "2, 4-5"


def test_a_bad_layer_of_one_stack_takes_its_number():
    advice = suggest(record_of([{0: 0.1, (0, "vace"): 0.9, 1: 0.1, (1, "vace"): 0.1}], layers=2), 0.5)
    assert (advice.dense_layers, advice.skipped) == ("0", pytest.approx(0.4))


def test_what_was_not_measured_is_not_promised():
    advice = suggest(record_of([{0: 0.9, 1: 0.1}, {0: 0.1}], (0.8, 0.6), layers=2), 0.5)
    assert (advice.dense_layers, advice.sparsity) == ("0", 0.8)
    assert suggest(record_of([{0: 0.1}], layers=5, dense_layers="-1"), 0.5).notes == (
        "3 of 5 layers were not measured and are left sparse", "only the patch's own sparsity was measured, so it is kept",
    )
    nothing = suggest(record_of([{}], (0.8,), layers=5, dense_layers="1"), 0.5)
    assert (nothing.dense_layers, nothing.sparsity, nothing.skipped) == ("1", 0.8, 0.0) and "nothing was measured" in nothing.notes[0]


@pytest.mark.parametrize("bound", [0, -1, math.nan, math.inf, "0.1", None, True])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match=r"^max_error: "):
        suggest(record_of(ERRORS, (0.8, 0.6, 0.4)), bound)


@pytest.mark.parametrize("knob, value", [
    ("layers", "0-"), ("layers", 3), ("layers", None), ("most_layers", -1), ("most_layers", 1.5), ("steps", -1), ("steps", math.nan), ("steps", True),
    ("sparsities", "half"), ("sparsities", "0.5, 0.96"), ("sparsities", "-0.1"), ("sparsities", "nan"), ("sparsities", 0.5),
    ("sparsities", ", ".join(f"0.{number}" for number in range(1, 10))), ("continue_with", "both"), ("continue_with", None),
])
def test_a_bad_value_is_refused_by_name(knob, value):
    with pytest.raises(ValueError, match=f"^{knob}: "):
        ProbeConfig(**{knob: value})


def test_sparsities_are_read_as_they_are_written():
    assert parse_sparsities(" 0.5,0.25 , 0.5,") == (0.5, 0.25) and parse_sparsities("") == ()
