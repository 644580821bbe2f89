"""Which steps and layers stay dense: the warm-up rules on the schedules that samplers make."""

from dataclasses import replace

import pytest
from pack.attention.methods import adaspa, svg
from pack.attention.schedule import Schedule, in_layers, parse_layers, without_layers
from pack.attention.warmup import make_schedule, without_warmup


def flow(shift):
    """percent_to_sigma of a flow model with this shift: sigma = shift t / (1 + (shift - 1) t) at t = 1 - percent."""
    return lambda percent: shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def run(steps, shift=1.0, first=0.0, last=1.0, **knobs):
    """A run of equal steps in percent from `first` to `last`."""
    sigmas = [flow(shift)(first + (last - first) * index / steps) for index in range(steps + 1)]
    return make_schedule(sigmas, flow(shift), 1.0, **knobs)


@pytest.mark.parametrize("shift", [1, 3, 5, 8])
@pytest.mark.parametrize("steps, warmup, refresh_at", [(50, 10, 29), (30, 6, 17), (20, 4, 11), (12, 3, 7), (10, 2, 5), (9, 2, 5)])
def test_automatic_warmup_is_a_fifth_of_the_run_and_refresh_at_three_fifths(steps, warmup, refresh_at, shift):
    """The paper's {10, 30} of 50, counted from one; whatever the shift, since both sides are shifted."""
    schedule = run(steps, shift)
    assert (schedule.warmup, schedule.refresh_at, schedule.steps) == (warmup, refresh_at, steps)


@pytest.mark.parametrize("shift", [3, 5, 8])
def test_sigmas_that_the_scheduler_did_not_shift(shift):
    """A "beta" or hand-made list: linear sigmas on a shifted model. The rule counts the sigmas above, nothing else."""
    sigmas = [1 - index / 20 for index in range(21)]
    schedule = make_schedule(sigmas, flow(shift), 1.0)
    assert schedule.warmup == max(1, len([sigma for sigma in sigmas if sigma > flow(shift)(0.2) + 1e-3]))
    assert schedule.refresh_at == len([sigma for sigma in sigmas if sigma > flow(shift)(0.6) + 1e-3]) - 1


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("shift", [1, 8])
def test_a_short_run_spends_exactly_one_step(steps, shift):
    assert run(steps, shift).warmup == 1


def test_a_run_from_full_noise_has_at_least_one_step_of_warmup():
    sigmas = [1.0] + [0.7 - 0.05 * index for index in range(12)] + [0.0]
    assert make_schedule(sigmas, flow(1), 1.0).warmup == 1
    assert make_schedule([0.9996, *sigmas[1:]], flow(3), 1.0).warmup == 1  # 1000 timesteps do not always reach sigma_max


@pytest.mark.parametrize("steps", [2, 4, 10, 30])
@pytest.mark.parametrize("first", [0.2, 0.5, 0.9])
def test_a_second_stage_that_starts_below_has_none(steps, first):
    assert run(steps, shift=5, first=first).warmup == 0


def test_a_stage_that_starts_past_the_refresh_has_none_due():
    assert run(4, first=0.7).refresh_at is None
    assert run(10, first=0.5).refresh_at == 1  # 0.50, 0.55, then 0.60


@pytest.mark.parametrize("asked, warmup", [(0, 0), (1, 1), (7, 7), (20, 20), (99, 20)])
def test_a_number_is_this_runs_first_steps(asked, warmup):
    assert run(20, warmup_steps=asked).warmup == warmup
    assert run(20, first=0.5, warmup_steps=asked).warmup == warmup


@pytest.mark.parametrize("steps", range(4, 9))
@pytest.mark.parametrize("end", [0, 1])
def test_a_short_run_without_warmup_skips_as_much(steps, end):
    usual = svg.CONFIG(sparsity=0.7, end_steps=end)
    sigmas = run(steps).sigmas
    config = without_warmup(usual, sigmas, 1.0)
    assert config.warmup_steps == 0 and config.sparsity * (steps - end) == pytest.approx(0.7 * (steps - end - 1), abs=0.005)
    assert replace(config, warmup_steps=-1, sparsity=0.7) == usual


def test_other_runs_keep_their_warmup():
    config = svg.CONFIG(sparsity=0.7)
    for schedule in (run(3), run(9), run(20), run(6, first=0.5)):
        assert without_warmup(config, schedule.sigmas, 1.0) == config
    ends = replace(config, end_steps=5)
    assert without_warmup(ends, run(6).sigmas, 1.0) == ends  # one sparse step: nothing to spread


@pytest.mark.parametrize("asked, warmup", [(0, 1), (1, 1), (2, 2)])
def test_a_method_may_need_one(asked, warmup):
    assert run(20, warmup_steps=asked, least_warmup=1).warmup == warmup
    assert run(20, first=0.5, warmup_steps=-1, least_warmup=1).warmup == 1


def test_each_methods_first_step():
    assert (svg.LEAST_WARMUP, adaspa.LEAST_WARMUP) == (0, 1)
    assert [svg.first_step(Schedule((1.0, 0.0), warmup, 0, None)) for warmup in (0, 1, 10)] == [0, 1, 10]
    assert [adaspa.first_step(Schedule((1.0, 0.0), warmup, 0, None)) for warmup in (0, 1, 2, 10)] == [0, 0, 0, 8]


def test_warmup_and_end_steps():
    schedule = run(10, warmup_steps=3, end_steps=2)
    assert [step for step in range(10) if schedule.is_warmup(step)] == [0, 1, 2]
    assert [step for step in range(10) if schedule.is_end(step)] == [8, 9]
    assert not any(run(10).is_end(step) for step in range(10))
    assert all(run(4, end_steps=9).is_end(step) for step in range(4))


@pytest.mark.parametrize("warmup, end, steps", [(3, 2, range(7)), (0, 0, range(9)), (10, 0, ()), (4, 6, ()), (4, 5, range(4))])
def test_a_step_is_followed_by_a_sparse_one_or_not(warmup, end, steps):
    """Ten steps, of which those from `warmup` to the last `end` may be sparse."""
    schedule = run(10, warmup_steps=warmup, end_steps=end)
    assert [step for step in range(10) if schedule.sparse_after(step)] == list(steps)


@pytest.mark.parametrize("shift", [1, 3, 5, 8])
def test_a_sigma_names_its_step_through_rounding(shift):
    schedule = run(50, shift)
    for step, sigma in enumerate(schedule.sigmas[:-1]):
        assert [schedule.step_of(sigma * noise) for noise in (1, 1 - 2e-5, 1 + 2e-5)] == [step] * 3
    assert schedule.step_of(schedule.sigmas[0] * 1.5) == 0


def test_sigmas_between_steps_belong_to_the_step_that_started():
    """What second-order samplers evaluate: 0.75 of step 2, a midpoint, and the end."""
    schedule = run(10)
    assert [schedule.step_of(sigma) for sigma in (0.95, 0.79, 0.75, 0.7001, 0.15, 0.05, 0.0)] == [0, 2, 2, 2, 8, 9, 9]


@pytest.mark.parametrize("text, ranges", [
    ("", ()), (" ", ()), (",", ()), ("0", ((0, 0),)), ("0-2, -1", ((0, 2), (-1, -1))), ("-3--1", ((-3, -1),)), (" 4 - 6 ,7,", ((4, 6), (7, 7))),
    ("0--1", ((0, -1),)), ("-2 - -1", ((-2, -1),)), ("5-5", ((5, 5),)),
])
def test_layers_are_numbers_and_ranges(text, ranges):
    assert parse_layers(text) == ranges


@pytest.mark.parametrize("text, part", [
    ("x", "x"), ("0, 1.5", "1.5"), ("0-2, 3-", "3-"), ("1;2", "1;2"), ("0, 1 2", "1 2"), ("--1", "--1"), ("all", "all"), ("1-2-3", "1-2-3"),
    ("3-1", "3-1"), ("0, -1--3", "-1--3"),
])
def test_what_does_not_parse_is_named(text, part):
    with pytest.raises(ValueError, match=r"^dense_layers: ") as caught:
        parse_layers(text)
    assert f'"{part}"' in str(caught.value)


@pytest.mark.parametrize("text, layers, dense", [
    ("0-2, -1", 6, [0, 1, 2, 5]), ("-2", 6, [4]), ("-3--2", 6, [3, 4]), ("1--2", 6, [1, 2, 3, 4]), ("0-99", 6, range(6)), ("-9", 6, []), ("", 6, []),
    ("0-2, -1", None, [0, 1, 2]), ("-2", None, []), ("4", None, [4]),
])
def test_negative_layers_count_from_the_end_where_it_is_known(text, layers, dense):
    assert [layer for layer in range(6) if in_layers(layer, parse_layers(text), layers)] == list(dense)


@pytest.mark.parametrize("text, layers, none", [
    ("0-2, -1", 6, []), ("7", 2, ["7"]), ("0, 2-5", 2, ["2-5"]), ("1-5", 2, []), ("-3", 2, ["-3"]), ("-9, 1, 8-9", 6, ["-9", "8-9"]),
    ("7", None, []), ("", 2, []),
])
def test_layers_that_a_model_does_not_have_are_named(text, layers, none):
    assert without_layers(parse_layers(text), layers) == none
