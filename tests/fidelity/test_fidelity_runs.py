"""The harness of docs/FIDELITY.md on the demo's model, with few steps of small clips: measured right, kept, made once, checked."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.benchmarks.fidelity import __main__ as command
from pack.benchmarks.fidelity import checks, report
from pack.benchmarks.fidelity import study as study_module
from pack.benchmarks.fidelity.hosts import Embedded
from pack.benchmarks.fidelity.store import Store
from pack.benchmarks.fidelity.study import Study, gather, run_all, tasks
from pack.benchmarks.fidelity.variants import VARIANTS
from pack.demo import measures
from pack.demo.clips import Clips, load_clips, to_pixels
from pack.demo.embedded import EmbeddedHost
from pack.demo.runs import LAYERS, Run


def small(clips: Clips) -> Clips:
    """A part of the picture, so that runs take a second."""
    return Clips(clips.latents[..., 4:20, 4:20], clips.text, clips.names, clips.numbers)


class Counting(Embedded):
    """Counts its runs; `stop_after` so many sparse ones it is stopped, as by a person."""

    def __init__(self, error_rows: int = 0):
        super().__init__("cpu", error_rows)
        self.runs, self.stop_after = [], None

    def dense(self, job):
        self.runs.append(("dense", job.seed, job.steps))
        return super().dense(job)

    def sparse(self, variant, budget, job):
        if self.stop_after is not None and sum(run[0] != "dense" for run in self.runs) >= self.stop_after:
            raise KeyboardInterrupt
        self.runs.append((variant.name, budget, job.seed))
        return super().sparse(variant, budget, job)


@pytest.fixture(scope="module")
def host():
    return Counting()


@pytest.fixture
def study(host, tmp_path):
    host.runs, host.stop_after = [], None
    return Study(host, Store(tmp_path), small(load_clips(2)), (0,), 3)


def quiet(line):
    pass


def test_measuring_does_not_change_the_video(study):
    """The demo's own host draws the same one; figures are those of the videos and of the record."""
    found, dense = study.measured(VARIANTS["svg"], 0.6, 0), study.dense(0, 3)
    run = Run("svg", "SVG", VARIANTS["svg"].method, settings={"min_tokens": 0, "sparsity": 0.6})
    plain = EmbeddedHost().run(run, study.job(0, 3), lambda *step: None)
    pixels, reference = to_pixels(plain.latents), to_pixels(dense)
    assert found["psnr_db"] == [measures.psnr_db(*pair) for pair in zip(reference.split(1), pixels.split(1), strict=True)]
    assert found["ssim"] == [measures.ssim(*pair) for pair in zip(reference.split(1), pixels.split(1), strict=True)]
    for name in ("achieved_sparsity", "run_sparsity", "sparse_calls", "search_steps"):
        assert found[name] == plain.record[name]
    errors = found["attention_error"]
    assert len(errors) == LAYERS and errors[0] is None and all(len(layer) == 2 and 0 < min(layer) <= max(layer) < 1 for layer in errors[1:])
    assert found["milliseconds"].keys() == {"dense", "sparse"}


def test_what_is_finished_is_not_made_again(study, host, tmp_path):
    """Stopped in the middle and continued, by another process of the same code: each run is made once."""
    variants = [VARIANTS["svg"], VARIANTS["svg-fixed"]]
    work, left_out = tasks(study, variants, (0.5,))
    assert left_out == {}
    assert [(task.variant.name, task.budget) for task in work] == [("svg", 0.5), ("svg-fixed", 0.7), ("svg-fixed", 0.8)]
    host.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run_all(study, work, quiet)
    assert host.runs == [("dense", 0, 3), ("svg", 0.5, 0), ("svg-fixed", 0.7, 0)]
    assert [(row["variant"], row["budget"]) for row in gather(study, variants, (0.5,))] == [("svg", 0.5), ("svg-fixed", 0.7)]
    host.runs, host.stop_after = [], None
    again, lines = Study(host, Store(tmp_path), study.clips, (0,), 3), []
    run_all(again, work, lines.append)
    assert host.runs == [("svg-fixed", 0.8, 0)] and len(lines) == 1 and lines[0].startswith("[1/1] SVG, types fixed at 0.8, seed 0: ")
    run_all(again, work, lambda line: pytest.fail(line))
    assert len(gather(again, variants, (0.5,))) == 3


def test_a_variant_of_own_sparsities_takes_those_asked_for_or_all(study):
    svg, fixed, impossible = VARIANTS["svg"], VARIANTS["svg-fixed"], VARIANTS["adaspa-4-steps-warmup-3-end-0-once"]
    assert study.budgets_of(svg, (0.5, 0.7)) == [0.5, 0.7] and study.budgets_of(impossible, (0.7,)) == []
    assert [study.budgets_of(fixed, asked) for asked in ((0.5, 0.7), (0.7, 0.8, 0.9), (0.5,))] == [[0.7], [0.7, 0.8], [0.7, 0.8]]


def test_a_key_is_of_what_a_run_does(study, host, monkeypatch):
    svg, auto = VARIANTS["svg"], VARIANTS["auto"]
    key = study.key(svg, 0.7, 0)
    called_otherwise = replace(svg, name="other", title="Other", about="", groups=(), budgets=(0.7,))
    assert study.key(called_otherwise, 0.7, 0) == key == study.key(replace(svg, settings={"sampled_rows": 64}), 0.7, 0)
    # Of three steps one is warm-up, whether that is asked for or automatic.
    assert study.key(replace(svg, settings={"warmup_steps": 1}), 0.7, 0) == key
    others = {
        "budget": study.key(svg, 0.8, 0), "seed": study.key(svg, 0.7, 1), "steps": study.key(replace(svg, steps=4), 0.7, 0),
        "setting": study.key(replace(svg, settings={"first_frame_sink": False}), 0.7, 0), "method": study.key(auto, 0.7, 0),
        "wrapped": study.key(replace(svg, method=VARIANTS["svg-temporal"].method), 0.7, 0),
        "clips": Study(host, study.store, small(load_clips(1)), (0,), 3).key(svg, 0.7, 0),
        "part": Study(host, study.store, load_clips(2), (0,), 3).key(svg, 0.7, 0),
    }
    code_hash = study_module.code_hash
    monkeypatch.setattr(study_module, "code_hash", lambda paths: code_hash(paths) + ("changed" if any(path.stem == "svg" for path in paths) else ""))
    others["code"] = study.key(svg, 0.7, 0)
    monkeypatch.setattr(study_module, "file_hash", lambda path: "another model")
    others["model"] = Study(host, study.store, study.clips, (0,), 3).key(svg, 0.7, 0)
    assert len({key, *others.values()}) == len(others) + 1


def test_seeds_and_clips_are_kept_apart(host, tmp_path):
    host.stop_after = None
    study = Study(host, Store(tmp_path), small(load_clips(2)), (0, 3), 2)
    work, _ = tasks(study, [VARIANTS["svg"]], (0.6,))
    run_all(study, work[:1], quiet)
    assert gather(study, [VARIANTS["svg"]], (0.6,)) == []  # a seed is missing
    run_all(study, work, quiet)
    (row,) = gather(study, [VARIANTS["svg"]], (0.6,))
    assert [len(run) for run in row["psnr_db"]] == [2, 2] and len({value for run in row["psnr_db"] for value in run}) == 4
    of_seeds = [study.found(VARIANTS["svg"], 0.6, seed) for seed in (0, 3)]
    assert row["achieved_sparsity"] == pytest.approx(sum(run["achieved_sparsity"] for run in of_seeds) / 2, abs=1e-6)
    by_hand = [value for run in of_seeds for value in run["attention_error"][2]]
    assert row["attention_error"][0] is None and row["attention_error"][2] == pytest.approx(sum(by_hand) / 4, abs=1e-6)


def test_sampled_rows_stand_for_all(study, tmp_path):
    exact = study.measured(VARIANTS["svg"], 0.7, 0)
    sampled = Study(Counting(200), Store(tmp_path / "sampled"), study.clips, (0,), 3).measured(VARIANTS["svg"], 0.7, 0)
    assert exact["digest"] == sampled["digest"]
    for all_rows, some in zip(exact["attention_error"][1:], sampled["attention_error"][1:], strict=True):
        assert some == pytest.approx(all_rows, rel=0.15) and some != all_rows


def test_the_harness_checks_itself(study, host):
    found = list(checks.check(Study(host, study.store, small(load_clips(1)), (0,), 3)))
    assert [one["passed"] for one in found] == [True] * 7, found
    assert [one["check"] for one in found] == [
        *(f"{name} at sparsity 0 is dense attention" for name in ("SVG", "AdaSpa", "Auto")), "random blocks are clearly worst",
        *(f"two runs of {name} are identical" for name in ("SVG", "AdaSpa", "Auto")),
    ]


def test_checks_fail_where_something_is_wrong(study, host, monkeypatch):
    """Blocks that are not random; a video that is not the same twice; something skipped at sparsity 0."""
    svg, adaspa = VARIANTS["svg"], VARIANTS["adaspa"]
    assert not checks.random_is_worst(study, {"adaspa": adaspa, "random": replace(VARIANTS["random"], method=adaspa.method, settings={})})["passed"]
    sparse = host.sparse

    def restless(variant, budget, job):
        done = sparse(variant, budget, job)
        return replace(done, latents=done.latents + 1e-6)

    monkeypatch.setattr(host, "sparse", restless)
    study.store.save(study.key(svg, checks.BUDGET, 0), study.measured(replace(svg, settings={"first_frame_sink": False}), checks.BUDGET, 0))
    assert not checks.twice_is_identical(study, svg, again=True)["passed"]
    monkeypatch.setattr(host, "sparse", lambda variant, budget, job: sparse(variant, 0.5, job))
    assert not checks.nothing_skipped(study, svg)["passed"]


def test_the_command_writes_what_it_says_and_the_same_again(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_clips", lambda count: small(load_clips(count)))
    monkeypatch.setattr(command, "open_host", lambda options, stack: host)
    monkeypatch.setattr(report, "SECTIONS", {name: make for name, make in report.SECTIONS.items() if name != "better"})
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"{name}\n{''.join(report.marks(name))}" for name in report.SECTIONS))
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    arguments = ["--clips", "1", "--steps", "3", "--budgets", "0.7", "--variants", "svg,random,svg-online,svg-fixed", "--no-check", "--docs"]
    texts = []
    for folder in ("one", "two"):
        host.runs, host.stop_after = [], None
        assert command.main(command.parse([*arguments, "--out", str(tmp_path / folder)])) == 0
        assert len(host.runs) == 1 + 4
        data = json.loads((tmp_path / folder / "fidelity.json").read_text())
        assert {row["variant"] for row in data["rows"]} == {"svg", "random", "svg-online", "svg-fixed"} and data["left_out"].keys() == {"LPIPS"}
        # Times are all that differs between two runs of the command.
        for row in data["rows"]:
            assert row.pop("milliseconds")["sparse"] > 0 and row.pop("seconds") > 0
        texts.append(json.dumps(data))
        assert (tmp_path / folder / "fidelity.png").stat().st_size > 10_000
        assert (tmp_path / "fidelity.png").read_bytes() == (tmp_path / folder / "fidelity.png").read_bytes()
        shown = json.loads((tmp_path / "results.json").read_text())
        assert report.written(page.read_text(), shown) == page.read_text() and "| Random blocks | 0.70 |" in page.read_text()
        output = capsys.readouterr().out
        assert f"{tmp_path / folder / 'fidelity.json'}" in output and "Random blocks" in output and "Left out" not in output
    assert texts[0] == texts[1]


def test_a_failed_check_ends_the_command(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_host", lambda options, stack: host)
    monkeypatch.setattr(command, "check", lambda study, again: iter([{"check": "a is b", "passed": False, "found": "it is not"}]))
    host.runs = []
    assert command.main(command.parse(["--out", str(tmp_path)])) == 1
    assert "FAILED: a is b: it is not." in capsys.readouterr().out and host.runs == []


def test_stopping_keeps_what_is_finished(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_clips", lambda count: small(load_clips(count)))
    monkeypatch.setattr(command, "open_host", lambda options, stack: host)
    host.runs, host.stop_after = [], 1
    arguments = ["--clips", "1", "--steps", "2", "--budgets", "0.5,0.7", "--variants", "svg", "--no-check", "--out", str(tmp_path)]
    assert command.main(command.parse(arguments)) == 1
    assert "goes on from there" in capsys.readouterr().out
    assert [row["budget"] for row in json.loads((tmp_path / "fidelity.json").read_text())["rows"]] == [0.5]


@pytest.mark.host
@pytest.mark.skipif(not Path(os.environ.get("COMFYUI_PATH", "nowhere"), "main.py").is_file(), reason="COMFYUI_PATH is not set, or names no ComfyUI")
def test_on_comfyui_the_same_video_is_measured(tmp_path):
    """Dense and SVG with a setting of its own; what no node does is left out by name."""
    variants = ["--variants", "svg,svg-warmup-10,random,svg-temporal"]
    arguments = ["--host", "comfyui", "--clips", "1", "--steps", "2", "--budgets", "0.7", "--no-check", *variants]
    options = command.parse([*arguments, "--out", str(tmp_path / "comfy")])
    assert command.main(options) == 0
    data = json.loads((tmp_path / "comfy" / "fidelity.json").read_text())
    assert data["left_out_variants"] == {"random": "no node does this", "svg-temporal": "no node does this"}
    by_name = {(row["variant"], row["budget"]): row for row in data["rows"]}
    ours = Study(Embedded(), Store(tmp_path / "embedded"), load_clips(1), (0,), 2).measured(VARIANTS["svg"], 0.7, 0)
    theirs = by_name["svg", 0.7]
    assert theirs["psnr_db"][0] == pytest.approx(ours["psnr_db"], abs=0.05) and theirs["attention_error"] is None
    assert theirs["achieved_sparsity"] == pytest.approx(ours["achieved_sparsity"], abs=1e-6) and theirs["milliseconds"]["sparse"] > 0
    assert "Not told by this host." in report.setting(data)
    assert torch.tensor(by_name["svg-warmup-10", 0.7]["psnr_db"]).isfinite().all()
