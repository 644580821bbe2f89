"""The harness checks itself: what is the same must come out the same, and what is bad must come out bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from statistics import fmean

from .store import key_of
from .study import Study, decibels, figures, mean_db
from .variants import VARIANTS, Variant

# Nearer than this is rounding.
EQUAL_DB = 60.0
# How much further from dense random blocks are than every method's.
WORSE_DB = 1.0
BUDGET = 0.8
# What they are made on.
CLIPS, STEPS = 1, 4
_METHODS = ("svg", "adaspa", "auto")


def check(study: Study, again: bool = False) -> Iterator[dict]:
    """The checks, each {"check", "passed", "found"}; passed is None where the host cannot. Kept like runs; `again` makes the last kind anew."""
    variants = {name: VARIANTS[name] for name in (*_METHODS, "random") if study.host.why_not(VARIANTS[name]) is None}
    methods = [variant for name, variant in variants.items() if name != "random"]
    yield from (nothing_skipped(study, variant) for variant in methods)
    if "random" in variants:
        yield random_is_worst(study, variants)
    else:
        yield {"check": "random blocks are clearly worst", "passed": None, "found": "this host has no node for random blocks"}
    yield from (twice_is_identical(study, variant, again) for variant in methods)


def nothing_skipped(study: Study, variant: Variant) -> dict:
    """Sparsity 0, in every layer, is dense attention."""
    variant = replace(variant, settings={**variant.settings, "dense_layers": ""}, budgets=None)
    found = study.measured(variant, 0.0, study.seeds[0])
    value, calls = mean_db(found["psnr_db"]), found["sparse_calls"]
    near = "an equal video" if value == inf else f"{decibels(value)} dB"
    return {
        "check": f"{variant.title} at sparsity 0 is dense attention", "passed": bool(value >= EQUAL_DB and calls > 0),
        "found": f"{near} over {calls} sparse calls; at least {EQUAL_DB:g} dB is asked",
    }


def random_is_worst(study: Study, variants: dict[str, Variant]) -> dict:
    """At one sparsity, each in every layer."""
    runs = {
        name: study.measured(replace(variant, settings={**variant.settings, "dense_layers": ""}), BUDGET, study.seeds[0])
        for name, variant in variants.items()
    }
    near = {name: mean_db(run["psnr_db"]) for name, run in runs.items()}
    errors = {name: _error(run) for name, run in runs.items()}
    others = [name for name in runs if name != "random"]
    passed = all(near["random"] <= near[name] - WORSE_DB and errors["random"] > errors[name] for name in others)
    text = ", ".join(f"{variants[name].title} {decibels(near[name])} dB and {errors[name]:.3f}" for name in ("random", *others))
    return {
        "check": "random blocks are clearly worst", "passed": passed,
        "found": f"at sparsity {BUDGET:g} in every layer, with the relative L2 of attention: {text}; {WORSE_DB:g} dB less than every other is asked",
    }


def twice_is_identical(study: Study, variant: Variant, again: bool = False) -> dict:
    """Two runs of one setting, bit for bit."""
    seed, steps = study.seeds[0], study.steps_of(variant)
    run = study.key(variant, BUDGET, seed)
    key = key_of({"check": "twice", "run": run})
    known = None if again else study.store.load(key)
    if known is None:
        first = study.measured(variant, BUDGET, seed)
        second = figures(study.host.sparse(variant, BUDGET, study.job(seed, steps)), study.dense(seed, steps))
        timeless = [{name: value for name, value in one.items() if name not in ("milliseconds", "seconds")} for one in (first, second)]
        known = {
            "check": f"two runs of {variant.title} are identical", "passed": timeless[0] == timeless[1],
            "found": f"digests of the videos: {first['digest'][:12]} and {second['digest'][:12]}",
        }
        study.store.save(key, known)
    return known


def _error(run: dict) -> float:
    """Relative L2 over all layers and clips."""
    return fmean(value for layer in run["attention_error"] if layer for value in layer)
