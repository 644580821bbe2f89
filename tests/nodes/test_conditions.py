"""Conditions, batches, samplers and schedules: at sparsity 0 the unpatched video, at 0.3 the budget, and every call accounted for.

All but the batches run on ComfyUI's own samplers and nodes (SVA_HOST=real): the double has Euler and Heun alone, and skips the rest.
"""

import functools
import importlib
import itertools
from collections import Counter

import pytest
import torch
from oracle import relative_error

METHODS = ("svg", "adaspa", "auto")
FRAMES = 5  # tokens: 64 a latent frame
TOKENS = 64 * FRAMES

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def real(host):
    """The host, where it is ComfyUI itself."""
    if host.name != "real":
        pytest.skip("the double has no such samplers and conditions")
    return host


def core(name):
    """A node of ComfyUI's own that is no node of the newer API."""
    for file in ("nodes", "comfy_extras.nodes_model_advanced"):
        if node := importlib.import_module(file).NODE_CLASS_MAPPINGS.get(name):
            return getattr(node(), node.FUNCTION)
    raise LookupError(name)


def ksampler(host, model, steps=4, cfg=1.0, sampler="euler", scheduler="simple", denoise=1.0, latent=None, conditions=None, node="6", **how):
    """What a KSampler node computes, or with start_step, last_step, disable_noise and force_full_denoise a KSamplerAdvanced."""
    sample = importlib.import_module("comfy.sample")
    latent = torch.zeros(1, 16, FRAMES, 16, 16) if latent is None else latent
    noise = torch.zeros_like(latent) if how.get("disable_noise") else torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    positive, negative = conditions or (host.text("wan", 1), host.text("wan", 2))
    with host.executing(node), torch.no_grad():
        return sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise, seed=1, disable_pbar=True, **how,
        )


def plain(model):
    """build(patch) for Host.compare: the patch alone."""
    return lambda patch: patch(model)


# --- conditions ------------------------------------------------------------------------------------------------------


def regions(host):
    """(positive, negative) of CONDITIONING: the whole picture, a masked half, the other half as an area, and one that begins late."""
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1.0
    positive = host.text("wan", 1)
    for more in (
        core("ConditioningSetArea")(host.text("wan", 3), width=64, height=128, x=0, y=0, strength=1.0)[0],
        core("ConditioningSetMask")(host.text("wan", 4), mask, "default", 0.8)[0],
        core("ConditioningSetTimestepRange")(host.text("wan", 6), 0.1, 1.0)[0],
    ):
        positive = core("ConditioningCombine")(positive, more)[0]
    return positive, host.text("wan", 2)


@every_method
def test_regions_have_plans_of_their_own_whichever_are_batched(real, method, batched):
    """Four positive conditions, one of them for an area, and two negative ones: ComfyUI adds one for the area, under the positive's uuid."""
    model, latent = real.load("wan"), torch.zeros(1, 16, 7, 16, 16)
    run = functools.partial(ksampler, real, steps=3, cfg=4.0, conditions=regions(real), latent=latent)
    record, evaluations = real.compare(method, plain(model), run, tokens=7 * 32, counted=False)
    conditions = Counter()
    for sigma, count in evaluations:
        conditions[sigma] += count
    first, *then = (conditions[sigma] for sigma in sorted(conditions, reverse=True))
    assert first == 5 and then == [6, 6], "one condition begins in the second step"
    late = 0 if method == "svg" else 2
    assert (record.dense_calls, record.sparse_calls) == (2 * first + late, 2 * sum(then) - late)
    searches = {"svg": {}, "adaspa": {0: 2 * 5, 1: 2 * 6}, "auto": {0: 2 * 5, 1: 2}}[method]
    assert dict(record.searches) == searches, "AdaSpa's second search is in step 1 too"
    patched = real.patch(method, model, sparsity=0.3)
    together = run(patched)
    batched(False)
    assert relative_error(run(patched), together) < 1e-5
    assert real.records(patched)[0].to_json() == real.records(patched)[1].to_json()


@pytest.mark.fault("Conditions and samplers", "A prompt begins in the middle of the run (ConditioningSetTimestepRange)",
                   "AdaSpa searches for it when it begins: one dense step of its own")
def test_a_prompt_that_begins_late_is_searched_for_then(real, seen):
    late = core("ConditioningSetTimestepRange")(real.text("wan", 3), 0.5, 1.0)[0]
    conditions = core("ConditioningCombine")(real.text("wan", 1), late)[0], real.text("wan", 2)
    run = functools.partial(ksampler, real, conditions=conditions)
    record, _ = real.compare("adaspa", plain(real.load("wan")), run, tokens=TOKENS, counted=False, cache_refresh=0)
    assert (record.sparse_calls, record.dense_calls, dict(record.searches)) == (8, 4, {0: 2, 2: 2})
    assert "dense: search step (4)" in real.shown[-1].text
    seen("dense: search step (4)")


@pytest.mark.fault("Conditions and samplers", "A prompt begins in the last step of the run", "that step is dense for it, without a search")
def test_a_prompt_that_begins_in_the_last_step_is_not_searched_for(real, seen):
    late = core("ConditioningSetTimestepRange")(real.text("wan", 3), 0.75, 1.0)[0]
    conditions = core("ConditioningCombine")(real.text("wan", 1), late)[0], real.text("wan", 2)
    patched = real.patch("adaspa", real.load("wan"), sparsity=0.3, cache_refresh=0)
    ksampler(real, patched, conditions=conditions)
    record = real.record(patched)
    assert (record.sparse_calls, record.dense_calls, dict(record.searches)) == (6, 4, {0: 2})
    reason = "AdaSpa's search step would be the last"
    assert dict(record.reasons) == {"search step": 2, reason: 2}
    assert f"{reason} (2)" in real.shown[-1].text
    seen(f"dense: search step (2); {reason} (2)")


@every_method
def test_videos_of_a_batch_are_as_alone(host, method):
    """Four videos at once, with guidance: each comes out as from a run of its own, since each has plans of its own."""
    patched = host.patch(method, host.load("wan"), sparsity=0.3)
    noise = torch.randn(4, 16, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0))
    for batch in (2, 3, 4):
        together = host.sample(patched, "wan", steps=2, cfg=4.0, frames=FRAMES, noise=noise[:batch])
        record = host.record(patched)
        assert together.shape[0] == batch and (record.sparse_calls, record.dense_calls) == (4, 4)
        assert abs(record.achieved_sparsity - 0.3) <= 64 / TOKENS
    for number in range(4):
        alone = host.sample(patched, "wan", steps=2, cfg=4.0, frames=FRAMES, noise=noise[number : number + 1])
        assert relative_error(together[number], alone[0]) < 1e-5


# --- samplers --------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("sampler, cfg", [
    ("euler_cfg_pp", 1.0), ("heun", 4.0), ("dpmpp_2s_ancestral", 1.0), ("uni_pc", 1.0), ("dpmpp_2m_sde", 1.0),
])
def test_samplers_that_look_twice_or_guide_otherwise(real, method, sampler, cfg):
    """CFG++ needs the negative at any guidance; the others evaluate more than once a step, at sigmas of their own."""
    run = functools.partial(ksampler, real, steps=3, cfg=cfg, sampler=sampler)
    record, evaluations = real.compare(method, plain(real.load("wan")), run, tokens=TOKENS)
    both = cfg > 1 or "cfg_pp" in sampler
    assert {conditions for _, conditions in evaluations} == {2 if both else 1}
    assert len(evaluations) == (5 if sampler in ("heun", "dpmpp_2s_ancestral") else 3)
    assert [note for note in record.notes if "came here" in note] == []


@pytest.mark.fault("Conditions and samplers", "A sampler picks its own steps (dpm_adaptive)",
                   "each look counts to the step whose noise it has; steps without one are told")
def test_a_sampler_that_picks_its_own_steps(real, seen):
    run = functools.partial(ksampler, real, sampler="dpm_adaptive", steps=8)
    record, evaluations = real.compare("adaspa", plain(real.load("wan")), run, tokens=TOKENS)
    assert len(evaluations) > 8
    steps = importlib.import_module("comfy.samplers").calculate_sigmas(real.load("wan").get_model_object("model_sampling"), "simple", 8).tolist()
    held = [any(low * (1 + 1e-4) < sigma <= high * (1 + 1e-4) for sigma, _ in evaluations) for high, low in itertools.pairwise(steps)]
    missed = held.count(False)
    notes = [note for note in record.notes if "came here" in note]
    assert notes == ([f"in {missed} of 8 steps no attention came here, as with a step cache or a sampler that picks its own steps"] if missed else [])
    seen(notes[0] if notes else "")


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, sampling, scheduler, steps", [
    ("svg", "flow", "beta", 9), ("adaspa", "flow", "linear_quadratic", 9), ("svg", "eps", "karras", 9), ("adaspa", "eps", "karras", 9),
    ("svg", "eps", "normal", 4), ("adaspa", "v_prediction", "simple", 9),
])
def test_schedules_of_flow_eps_and_v(real, method, sampling, scheduler, steps):
    """The warm-up is the steps above the model's own sigma at a fifth of the way, whatever the sigmas are spaced like."""
    model = real.load("wan")
    if sampling != "flow":
        model = core("ModelSamplingDiscrete")(model, sampling, False)[0]
    of_model = model.get_model_object("model_sampling")
    sigmas = importlib.import_module("comfy.samplers").calculate_sigmas(of_model, scheduler, steps).tolist()
    above = sum(sigma > of_model.percent_to_sigma(0.2) * (1 + 1e-4) for sigma in sigmas[:-1])
    warmup = 1 if steps <= 8 else max(above, 1)
    run = functools.partial(ksampler, real, steps=steps, scheduler=scheduler)
    record, evaluations = real.compare(method, plain(model), run, warmup=warmup, tokens=TOKENS)
    assert len(evaluations) == steps and record.steps == steps
    reasons = {"svg": {"warm-up step"}, "adaspa": {"search step"} | ({"warm-up step"} if warmup > 1 else set())}
    assert set(record.reasons) == reasons[method]


@every_method
@pytest.mark.parametrize("denoise, steps, warmup", [(0.5, 4, {"svg": 0, "adaspa": 1, "auto": 1}), (0.9, 9, {"svg": 1, "adaspa": 1, "auto": 1})])
def test_a_video_from_a_video(real, method, denoise, steps, warmup):
    """Half of the noise starts below the warm-up; nine tenths above it, with one step of ten: the last 9 of 10 steps."""
    latent = torch.randn(1, 16, FRAMES, 16, 16, generator=torch.Generator().manual_seed(5))
    run = functools.partial(ksampler, real, steps=steps, denoise=denoise, latent=latent)
    _, evaluations = real.compare(method, plain(real.load("wan")), run, warmup=warmup[method], tokens=TOKENS)
    assert len(evaluations) == steps and evaluations[0][0] < 1


# --- two stages ------------------------------------------------------------------------------------------------------


def staged(host, high, low, steps, switch, **how):
    """Two KSamplerAdvanced, as for a model of high and one of low noise."""
    latent = ksampler(host, high, steps, last_step=switch, **how)
    return ksampler(host, low, steps, start_step=switch, disable_noise=True, force_full_denoise=True, latent=latent, node="7", **how)


@every_method
@pytest.mark.parametrize("steps, switch, warmup", [(4, 2, 1), (12, 9, 3)])
def test_two_stages_of_two_models(real, method, steps, switch, warmup):
    """The first warms up; the second starts below the warm-up, and AdaSpa searches in its first step."""
    models = [real.load("wan"), real.load("wan")]
    run = functools.partial(staged, real, steps=steps, switch=switch, scheduler="simple")
    dense = run(*models)
    exact = [real.patch(method, model, sparsity=0.0) for model in models]
    assert relative_error(run(*exact), dense) < 1e-5
    high, low = (real.patch(method, model, sparsity=0.3, cache_refresh=0) for model in models)  # Auto's next search would be a dense step
    run(high, low)
    assert torch.equal(run(*models), dense)
    (first,), (second,) = real.records(high), real.records(low)
    least = 0 if method == "svg" else 1
    assert (first.node, first.steps, first.warmup, first.dense_calls) == ("6", switch, warmup, 2 * warmup)
    assert (second.node, second.steps, second.warmup, second.dense_calls) == ("7", steps - switch, least, 2 * least)
    for record in (first, second):
        assert record.sparse_calls == 0 or abs(record.achieved_sparsity - 0.3) <= 64 / TOKENS
        assert record.sparse_calls + record.dense_calls == 2 * record.steps and set(record.reasons) <= {"warm-up step", "search step"}


@pytest.mark.fault("Conditions and samplers", "A stage ends before AdaSpa's second search could be of use", "it is not made")
def test_no_search_falls_into_the_last_step_of_a_stage(real, seen):
    """Twelve steps, of which the first stage takes seven: all above the second search's share, and its last step the last of them."""
    high, low = (real.patch("adaspa", real.load("wan"), sparsity=0.3) for _ in range(2))
    staged(real, high, low, steps=12, switch=7)
    assert real.record(high).searches == {0: 2} and real.record(low).searches == {0: 2}
    seen("")
    whole = real.patch("adaspa", real.load("wan"), sparsity=0.3)
    ksampler(real, whole, steps=12)
    assert whole is not high and sorted(real.record(whole).searches) == [2, 7], "in one stage it is"


@pytest.mark.fault("Conditions and samplers", "A run or a stage of a single step, with AdaSpa",
                   "it is dense, without a search, and the node says what to do")
def test_a_single_step_with_adaspa_says_what_it_needs(host, seen):
    patched = host.patch("adaspa", host.load("wan"), sparsity=0.3)
    assert torch.equal(host.sample(patched, "wan", steps=1), host.sample(host.load("wan"), "wan", steps=1))
    record = host.record(patched)
    assert (record.sparse_calls, record.dense_calls) == (0, 2) and not record.searches
    text = "⚠ AdaSpa: nothing ran sparse. Reason: AdaSpa's search step would be the last. AdaSpa needs a step after its search: use more steps."
    assert host.shown[-1].text.startswith(text)
    seen(text)
