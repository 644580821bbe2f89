"""Runs, made once and kept, and what is gathered from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev

from pack.attention.methods import adaspa, auto, svg
from pack.attention.warmup import make_schedule
from pack.demo import measures
from pack.demo.clips import CLIPS_FILE, MODEL_FILE, Clips, to_pixels
from pack.demo.runs import HEAD_DIM, HEADS, LAYERS, Job
from pack.demo.sampler import make_sigmas, percent_to_sigma
from torch import Tensor

from .hosts import Done, FidelityHost
from .methods import identity, module_of
from .store import Store, code_hash, code_of, file_hash, key_of
from .variants import Variant

SCHEMA = 1
_FILES = {svg.NAME: "svg", adaspa.NAME: "adaspa", auto.NAME: "auto"}
LEFT_OUT = {
    "LPIPS": "every library that has it downloads the weights of a network (lpips ships its linear heads alone), and nothing is downloaded",
}


class Study:
    """Clips on a host, continued from the noise of seeds: dense, and by variants."""

    def __init__(self, host: FidelityHost, store: Store, clips: Clips, seeds: Sequence[int], steps: int):
        self.host, self.store, self.clips, self.seeds, self.steps = host, store, clips, tuple(seeds), steps
        self._common = {
            "schema": SCHEMA, **host.facts, "model": file_hash(MODEL_FILE), "clips": file_hash(CLIPS_FILE), "numbers": clips.numbers,
            "given": hashlib.sha256(clips.latents.contiguous().numpy().tobytes()).hexdigest(),
        }

    def job(self, seed: int, steps: int) -> Job:
        return Job(self.clips, steps, seed)

    def steps_of(self, variant: Variant) -> int:
        return variant.steps or self.steps

    def budgets_of(self, variant: Variant, asked: Sequence[float]) -> list[float]:
        """The sparsities that a variant is run at: those asked for; of its own ones those asked for, or all. None that is impossible."""
        own = [budget for budget in variant.budgets or asked if budget in asked] or variant.budgets
        return [budget for budget in own if variant.config(budget, self.steps_of(variant)) is not None]

    def dense_key(self, seed: int, steps: int) -> str:
        code = code_hash(code_of(None, self.host.triton, self.host.nodes))
        return key_of({**self._common, "code": code, "run": "dense", "seed": seed, "steps": steps})

    def key(self, variant: Variant, budget: float, seed: int) -> str:
        """Of what a run does, not of what it is called: two variants of the same settings are one run."""
        steps = self.steps_of(variant)
        config, refresh_at = variant.config(budget, steps), None
        if not self.host.nodes:  # where nodes run, they know best what automatic is
            sigmas = make_sigmas(steps).tolist()
            schedule = make_schedule(sigmas, percent_to_sigma, 1.0, config.warmup_steps, config.end_steps, variant.method.LEAST_WARMUP)
            config, refresh_at = replace(config, warmup_steps=schedule.warmup), schedule.refresh_at
        files = code_of(_FILES[module_of(variant.method).NAME], self.host.triton, self.host.nodes)
        return key_of({
            **self._common, "code": code_hash(files), "run": identity(variant.method), "config": asdict(config), "refresh_at": refresh_at,
            "seed": seed, "steps": steps, "dense": self.dense_key(seed, steps),
        })

    def dense(self, seed: int, steps: int) -> Tensor:
        """The dense video, made where it is not there."""
        key = self.dense_key(seed, steps)
        if self.store.load(key) is None:
            done = self.host.dense(self.job(seed, steps))
            self.store.save(key, {"seconds": done.seconds, "digest": done.digest()}, done.latents)
        return self.store.latents(key)

    def found(self, variant: Variant, budget: float, seed: int) -> dict | None:
        """What was measured of a run; None where it has not been made."""
        return self.store.load(self.key(variant, budget, seed))

    def measured(self, variant: Variant, budget: float, seed: int) -> dict:
        """What is measured of a run, made where it is not there."""
        key = self.key(variant, budget, seed)
        known = self.store.load(key)
        if known is None:
            steps = self.steps_of(variant)
            dense = self.dense(seed, steps)
            known = figures(self.host.sparse(variant, budget, self.job(seed, steps)), dense)
            self.store.save(key, known)
        return known


def figures(done: Done, dense: Tensor) -> dict:
    """What is kept of a run: plain data, by clip where that makes a difference."""
    video, reference = to_pixels(done.latents), to_pixels(dense)
    pairs = list(zip(reference.split(1), video.split(1), strict=True))
    record = done.record
    return {
        "psnr_db": [measures.psnr_db(*pair) for pair in pairs], "ssim": [measures.ssim(*pair) for pair in pairs],
        "attention_error": done.errors, "achieved_sparsity": record["achieved_sparsity"], "run_sparsity": record["run_sparsity"],
        "sparse_calls": record["sparse_calls"], "dense_calls": record["dense_calls"], "warmup_steps": record["warmup_steps"],
        "search_steps": record["search_steps"], "backend": record["backend"], "notes": record["notes"],
        "milliseconds": done.milliseconds, "seconds": done.seconds, "digest": done.digest(),
    }


@dataclass(frozen=True)
class Task:
    """One run that is to be there."""

    variant: Variant
    budget: float
    seed: int


def tasks(study: Study, variants: Sequence[Variant], budgets: Sequence[float]) -> tuple[list[Task], dict[str, str]]:
    """The runs of these variants, seed by seed; and the variants that are left out, with the reason."""
    left_out = {variant.name: reason for variant in variants if (reason := study.host.why_not(variant))}
    able = [variant for variant in variants if variant.name not in left_out]
    found = [Task(variant, budget, seed) for seed in study.seeds for variant in able for budget in study.budgets_of(variant, budgets)]
    return found, left_out


def run_all(study: Study, work: Sequence[Task], tell: Callable[[str], None]) -> None:
    """Makes what is not there yet, a line each."""
    missing = {study.key(task.variant, task.budget, task.seed): task for task in work if study.found(task.variant, task.budget, task.seed) is None}
    for number, task in enumerate(missing.values(), 1):
        found = study.measured(task.variant, task.budget, task.seed)
        tell(
            f"[{number}/{len(missing)}] {task.variant.title} at {task.budget:g}, seed {task.seed}: {decibels(mean_db(found['psnr_db']))} dB, "
            f"{found['achieved_sparsity']:.3f} skipped, {found['run_sparsity']:.3f} of the run, {found['seconds']:.0f} s"
        )


def row_of(study: Study, variant: Variant, budget: float) -> dict | None:
    """What is known of a variant at a sparsity over all seeds; None where a run is missing."""
    runs = [study.found(variant, budget, seed) for seed in study.seeds]
    if None in runs:
        return None
    steps = study.steps_of(variant)
    config = variant.config(budget, steps)
    timed = [kind for kind in runs[0]["milliseconds"] if all(kind in run["milliseconds"] for run in runs)]
    times = {kind: fmean(run["milliseconds"][kind] for run in runs) for kind in timed}
    return {
        "variant": variant.name, "title": variant.title, "about": variant.about, "method": variant.method.NAME, "groups": list(variant.groups),
        "base": variant.base, "budget": budget, "steps": steps, "equal_work": variant.equal_work,
        "asked_sparsity": config.sparsity if config.sparsity >= 0 else None,
        "warmup_steps": runs[0]["warmup_steps"], "end_steps": config.end_steps, "cache_refresh": config.cache_refresh,
        "achieved_sparsity": round(fmean(run["achieved_sparsity"] for run in runs), 6),
        "run_sparsity": round(fmean(run["run_sparsity"] for run in runs), 6),
        "psnr_db": [rounded(run["psnr_db"], 4) for run in runs], "ssim": [rounded(run["ssim"], 6) for run in runs],
        "attention_error": _mean_errors([run["attention_error"] for run in runs]),
        "searches": round(fmean(len(run["search_steps"]) for run in runs), 3), "search_steps": [run["search_steps"] for run in runs],
        "milliseconds": {kind: round(value, 3) for kind, value in times.items()}, "seconds": round(fmean(run["seconds"] for run in runs), 2),
        "notes": list(dict.fromkeys(note for run in runs for note in run["notes"])),
    }


def gather(study: Study, variants: Sequence[Variant], budgets: Sequence[float]) -> list[dict]:
    """A row for each variant and sparsity whose runs are all there."""
    able = [variant for variant in variants if study.host.why_not(variant) is None]
    rows = (row_of(study, variant, budget) for variant in able for budget in study.budgets_of(variant, budgets))
    return [row for row in rows if row is not None]


def about(study: Study) -> dict:
    """What all rows have in common."""
    layout = study.job(0, study.steps).layout
    return {
        "host": study.host.name, "facts": study.host.facts, "model_sha256": study._common["model"], "layers": LAYERS, "heads": HEADS,
        "head_dim": HEAD_DIM, "layout": asdict(layout), "tokens": layout.seq_len, "steps": study.steps, "seeds": list(study.seeds),
        "clips": list(study.clips.names),
    }


def _mean_errors(runs: list[list[list[float] | None] | None]) -> list[float | None] | None:
    """Relative L2 by layer over runs and clips; None without any."""
    if any(run is None for run in runs):
        return None
    by_layer = zip(*runs, strict=True)
    return [None if any(clips is None for clips in layer) else round(fmean(value for clips in layer for value in clips), 6) for layer in by_layer]


def rounded(values: list[float | None], digits: int) -> list[float | None]:
    return [None if value is None else round(value, digits) for value in values]


# ---- figures over seeds and clips; a PSNR of None is that of equal videos ----


def flat(psnr: list[list[float | None]]) -> list[float]:
    """By seed, then clip, as one list."""
    return [math.inf if value is None else value for run in psnr for value in run]


def mean_db(psnr: list[float | None]) -> float:
    return fmean(math.inf if value is None else value for value in psnr)


def decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.2f}"


@dataclass(frozen=True)
class Difference:
    """One variant less another, in dB, over the same seeds and clips. noise: two standard errors of the mean; None of one pair alone."""

    mean: float
    noise: float | None

    @property
    def certain(self) -> bool:
        """Whether it is more than what seeds and clips alone bring about."""
        return self.noise is not None and abs(self.mean) > self.noise

    @property
    def verdict(self) -> str:
        """Whether the one is better: yes, no, or that this cannot be told."""
        if self.certain:
            return "yes" if self.mean > 0 else "no"
        return "unknown: one pair" if self.noise is None and self.mean else "within noise"

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.noise is None else f" ± {self.noise:.2f}")


def difference(row: dict, other: dict) -> Difference:
    """Of two rows' PSNR, pair by pair."""
    return _of_pairs(flat(row["psnr_db"]), flat(other["psnr_db"]))


def difference_at_equal_work(row: dict, others: Sequence[dict]) -> Difference | None:
    """Of a row and another variant where that skips as much of the run: on the straight lines between its rows, `others`; None beyond them."""
    curve = sorted(others, key=lambda other: other["run_sparsity"])
    for low, high in pairwise(curve):
        if low["run_sparsity"] <= row["run_sparsity"] <= high["run_sparsity"] and low["run_sparsity"] < high["run_sparsity"]:
            share = (row["run_sparsity"] - low["run_sparsity"]) / (high["run_sparsity"] - low["run_sparsity"])
            between = [(1 - share) * one + share * two for one, two in zip(flat(low["psnr_db"]), flat(high["psnr_db"]), strict=True)]
            return _of_pairs(flat(row["psnr_db"]), between)
    return None


def _of_pairs(values: Sequence[float], others: Sequence[float]) -> Difference:
    off = [0.0 if one == two else one - two for one, two in zip(values, others, strict=True)]
    if not all(math.isfinite(value) for value in off) or len(off) < 2:
        return Difference(fmean(off), None)
    return Difference(fmean(off), 2 * stdev(off) / math.sqrt(len(off)))
