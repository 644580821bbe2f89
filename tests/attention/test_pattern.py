"""Patterns: what a file holds is what was found, a plan is found again by role and noise level, and damage never reaches a kernel."""

from dataclasses import fields, replace

import pytest
import torch
from pack import kernels
from pack.attention import pattern as module
from pack.attention.blocks import VideoBlocks, pack
from pack.attention.call import Dense
from pack.attention.layout import VideoLayout
from pack.attention.methods import adaspa, auto, svg
from pack.attention.pattern import Keeping, Kept, Pattern, PlanKey, Plans, Role, Roles
from pack.kernels import PooledBlocks
from video_oracle import make_call, make_session, random_qkv, token_mask

LAYOUT = VideoLayout(4, 8, 9, prefix=20)


def a_pattern():
    generator = torch.Generator().manual_seed(1)

    def plans(*sigmas):
        return Plans(sigmas, {"temporal": torch.rand(len(sigmas), 1, 2, generator=generator) > 0.5})

    windows = [Role("0"), Role("1"), Role("0.1"), Role("0", (0, 1, 2))]
    table = {PlanKey(layer, stack, role): plans(9.0, 4.0) for layer in (0, 3) for stack in ("", "vace") for role in windows}
    return Pattern("SVG", "Wan", 4, 2, LAYOUT, {"sparsity": 0.4, "backend": "auto"}, table, "pattern a")


def found_by(method, steps=6, **knobs):
    """A run of one layer and two conditions that keeps what it finds, and the plans that it ran with: (session, by step and condition)."""
    qkv = random_qkv(LAYOUT, heads=3, seed=5)
    run = make_session(method, steps=steps, **knobs)
    run.keeping, run.record.layout, run.record.model = Keeping(), LAYOUT, "Wan"
    for number, name in enumerate(("positive", "negative")):
        run.roles.add(name, number)
    return run, _plans(run, qkv, steps), qkv


def _plans(run, qkv, steps):
    plans = {}
    for step in range(run.schedule.warmup - 1 if run.pattern is None and run.method.LEAST_WARMUP else run.schedule.warmup, steps):
        for name, scale in (("positive", 1.0), ("negative", -0.5)):
            call = make_call(LAYOUT, (qkv[0] * scale, *qkv[1:]), step=step, condition=(name, None))
            plan = run.method.plan(call, run.config, run.state(call))
            if not isinstance(plan, Dense):
                plans[step, name] = plan
    return plans


@pytest.mark.parametrize("method, knobs", [
    (svg, {"sparsity": 0.3}), (svg, {"sparsity": 0.3, "cache_refresh": 0}), (adaspa, {"sparsity": 0.4, "refresh_at": 4}),
    (adaspa, {"sparsity": 0.4, "cache_refresh": 1, "token_order": "raster"}), (adaspa, {"sparsity": 0.4, "skipped_blocks": "drop"}),
    (auto, {"fidelity": 0.6}), (auto, {"sparsity": 0.4, "token_order": "tile"}),
])
def test_a_run_from_a_file_has_the_plans_of_the_run_that_made_it(method, knobs, monkeypatch):
    run, expected, qkv = found_by(method, **knobs)
    pattern = Pattern.from_file(*run.found_pattern(2).to_file())
    for name in ("sampled_errors", "block_mass", "block_errors", "attention_with_mass", "attention_with_lse"):
        monkeypatch.setattr(kernels, name, None)
    again = make_session(method, steps=6, **knobs)
    for number, name in enumerate(("positive", "negative")):
        again.roles.add(name, number)
    again.start_from(pattern, again.schedule)
    found = _plans(again, qkv, 6)
    assert found.keys() == expected.keys() and len(found) >= 8
    for key, plan in found.items():
        assert torch.equal(token_mask(plan, LAYOUT, 1, 3), token_mask(expected[key], LAYOUT, 1, 3)), key
        for part in fields(PooledBlocks) if plan.pooled is not None else ():  # of this call's keys and values, not of the file
            assert torch.equal(getattr(plan.pooled, part.name), getattr(expected[key].pooled, part.name))
        assert (plan.pooled is None) == (expected[key].pooled is None)
    masks = [token_mask(plan, LAYOUT, 1, 3) for plan in expected.values()]
    assert any(not torch.equal(masks[0], mask) for mask in masks), "all plans are alike: this shows nothing"
    assert again.record.to_json()["search_steps"] == []


def test_a_file_is_what_was_put_into_it():
    pattern = a_pattern()
    again = Pattern.from_file(*pattern.to_file(), source="pattern a")
    assert replace(again, plans={}) == replace(pattern, plans={})
    assert again.plans.keys() == pattern.plans.keys() and len(again.plans) == 16
    for key, plans in pattern.plans.items():
        assert again.plans[key].sigmas == plans.sigmas
        assert torch.equal(again.plans[key].tensors["temporal"].bool(), plans.tensors["temporal"])


@pytest.mark.parametrize("sigma, place", [(12.0, 0), (9.0, 0), (8.9, 0), (4.00001, 1), (4.0, 1), (3.99, 1), (2.0, 2), (0.1, 2)])
def test_a_plan_holds_from_the_noise_level_that_it_was_found_at(sigma, place):
    assert Plans((9.0, 4.0, 2.0), {"temporal": torch.zeros(3, 1, 2)}).place_at(sigma) == place


def test_another_batch_takes_the_first_videos_plan():
    plans = Plans((9.0, 4.0), {"temporal": torch.arange(12).view(2, 2, 3)})
    assert plans.at(1, 2)["temporal"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert plans.at(1, 3)["temporal"].tolist() == [[6, 7, 8]] * 3
    assert plans.at(0, 1)["temporal"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("layer, stack, role, key", [
    (0, "", Role("0"), (0, "", Role("0"))), (3, "vace", Role("1"), (3, "vace", Role("1"))), (0, "", Role("0.1"), (0, "", Role("0.1"))),
    (0, "", Role("2"), (0, "", Role("0"))), (0, "", Role("1", (0, 1, 2)), (0, "", Role("0", (0, 1, 2)))),
    (1, "", Role("0"), None), (0, "other", Role("0"), None), (0, "", Role("0", (5, 6)), None),
])
def test_plans_are_found_by_layer_stack_and_role_else_the_positive_one(layer, stack, role, key):
    pattern = a_pattern()
    assert pattern.find(layer, stack, role) is (None if key is None else pattern.plans[PlanKey(*key)])


def test_roles_follow_the_hosts_numbers_not_the_order_of_a_batch():
    roles = Roles()
    for identity, number in (("c", 1), ("a", 0), ("b", 0), ("a", 0), ("d", 2)):
        roles.add(identity, number)
    assert [roles.of((name, None)).name for name in "abcd"] == ["0", "0.1", "1", "2"]
    assert roles.of(("a", (1, 2))) == Role("0", (1, 2))
    assert roles.of("unknown") == Role("0")


@pytest.mark.parametrize("asked, words", [
    (("AdaSpa", None, None), "made with SVG, this model's patch is AdaSpa"), (("SVG", "LTX", 4), "made for Wan, this model is LTX"),
    (("SVG", "Wan", 40), "a model with 4 layers, this one has 40"), ((None, None, None), None), (("SVG", "Wan", 4), None),
])
def test_what_does_not_fit_is_told(asked, words):
    reason = a_pattern().why_not_model(*asked)
    assert reason is None if words is None else words in reason


def test_another_layout_or_number_of_heads_is_told():
    pattern = a_pattern()
    assert pattern.why_not_layout(LAYOUT) is pattern.why_not_heads(2) is None
    assert "this video is 20 + 5 x 8 x 9 video tokens + 0" in pattern.why_not_layout(replace(LAYOUT, frames=5))
    assert pattern.why_not_heads(3) == "it was made for 2 heads, a call has 3"


def test_a_long_run_keeps_the_first_of_each_layer_and_no_more_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT_BYTES", 100)
    keeping = Keeping()

    def find(layer, sigma):
        return Kept(PlanKey(layer, "", Role("0")), LAYOUT, sigma, {"bits": torch.full((1, 2, 20), int(sigma), dtype=torch.uint8)})

    assert [keeping.add(find(layer, sigma)) for layer, sigma in ((0, 9), (0, 8), (1, 9), (1, 8), (0, 7))] == [True, True, True, False, False]
    pattern = keeping.pattern("AdaSpa", None, None, LAYOUT, {})
    assert {key.layer: plans.sigmas for key, plans in pattern.plans.items()} == {0: (9, 8), 1: (9,)}
    assert keeping.pattern("AdaSpa", None, None, replace(LAYOUT, frames=5), {}) is None


def test_a_pattern_brings_the_fidelity_that_it_was_made_for():
    run, _, _ = found_by(auto, fidelity=0.6)
    pattern = Pattern.from_file(*run.found_pattern(2).to_file(), source="pattern a")
    again = make_session(auto, steps=6, fidelity=0.95, token_order="raster")
    again.start_from(pattern, replace(again.schedule, warmup=0))
    assert (again.config.fidelity, again.config.sparsity, again.config.token_order) == (0.6, -1, "hilbert")
    assert again.record.notes == ["started from pattern a, with its fidelity 0.6, token_order hilbert"]
    assert again.record.asked_error == pytest.approx(0.4)


@pytest.mark.parametrize("last", range(8))
def test_the_longest_list_is_counted_from_the_bits(last):
    """Every number of columns modulo 8; a file cannot make a kernel write past its lists."""
    layout = VideoLayout(2, 8, 4 * (9 + last))  # a key block of 64 is two lines
    run = make_session(adaspa, sparsity=0.4, token_order="raster")
    call = make_call(layout, random_qkv(layout, heads=2))
    blocks = VideoBlocks.build(layout, run.config, torch.device("cpu"))
    keep = torch.rand(1, 2, blocks.rows, blocks.columns, generator=torch.Generator().manual_seed(last)) > 0.5
    keep[..., 0] = True
    keep[0, 0, 0] = True  # a row that keeps all needs no list
    figures = torch.full((1, 2), 0.5)
    tensors = {"bits": pack(keep), "density": figures, "recall": figures}
    choice = adaspa.from_pattern(tensors, call, run.config, run)
    counts = keep.sum(-1)
    assert choice.max_count == int(counts[counts < blocks.columns].max())
    assert torch.equal(blocks.plan(choice).mask.to_blocks(), keep)
    if blocks.columns % 8:
        tensors["bits"] = tensors["bits"].clone()
        tensors["bits"][0, 1, 0, -1] |= 128
        with pytest.raises(ValueError, match="past the last"):
            adaspa.from_pattern(tensors, call, run.config, run)


def test_a_session_goes_back_to_its_own_way_without_its_pattern():
    run = make_session(adaspa, sparsity=0.3, token_order="raster")
    own = run.schedule, run.config, run.first_step
    pattern = replace(a_pattern(), settings={"sparsity": 0.6, "token_order": "tile"})
    run.start_from(pattern, replace(run.schedule, warmup=0))
    assert (run.first_step, run.schedule.warmup, run.config.sparsity, run.config.token_order, run.record.warmup) == (0, 0, 0.6, "tile", 0)
    run.check_pattern(LAYOUT)
    assert run.pattern is pattern
    run.refuse_pattern("a reason")
    assert (run.schedule, run.config, run.first_step) == own and run.pattern is None and run.record.config is own[1]
    assert run.record.notes == ["pattern a was not used: a reason"], "that it was started from is no longer true"
    run.refuse_pattern("another")  # another thread, too late
    assert len(run.record.notes) == 1
