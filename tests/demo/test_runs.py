"""The embedded host through both methods, the graph for ComfyUI, and the command's options."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from load_pack import ROOT
from pack.attention.layout import VideoLayout
from pack.demo import attention_call, comfy_host, pictures
from pack.demo.clips import Clips, load_clips
from pack.demo.embedded import EmbeddedHost
from pack.demo.other_work import OtherWork
from pack.demo.runs import RUNS, Job


def _small(clips: Clips) -> Clips:
    """A part of the picture: 832 tokens."""
    return Clips(clips.latents[..., 8:24, 8:24], clips.text, clips.names, clips.numbers)


@pytest.fixture(scope="module")
def outcomes():
    host, job = EmbeddedHost(), Job(_small(load_clips(2)), 4, 0)
    steps: dict[str, list] = {run.name: [] for run in RUNS}
    host.warm_up(job)
    done = {run.name: host.run(run, job, lambda *step, name=run.name: steps[name].append(step)) for run in RUNS}
    return job, done, steps


def test_every_step_is_told(outcomes):
    job, done, steps = outcomes
    for run in RUNS:
        assert [step for step, _ in steps[run.name]] == list(range(1, job.steps + 1))
        assert steps[run.name][-1][1] == pytest.approx(done[run.name].record["run_sparsity"], abs=1e-5)


def test_records_count_every_call(outcomes):
    job, done, _ = outcomes
    for run in RUNS:
        record = done[run.name].record
        assert record["sparse_calls"] + record["dense_calls"] == job.steps * 6
        assert record["tokens"] == 13 * 8 * 8
        assert record["outcome"] == "finished"
        json.dumps(record)
    assert done["dense"].record["method"] == "dense" and done["dense"].record["achieved_sparsity"] == 0
    # Layer 0 is dense by SVG's default, and step 0 is the warm-up of so short a run.
    assert done["svg"].record["sparse_calls"] == 3 * 5
    assert done["adaspa"].record["sparse_calls"] == 3 * 6
    assert done["adaspa"].record["reasons"] == {"search step": 6}


def test_the_sparse_videos_are_near_the_dense_one_but_not_it(outcomes):
    _, done, _ = outcomes
    dense = done["dense"].latents
    for name in ("svg", "adaspa", "auto"):
        assert 0 < float((done[name].latents - dense).norm() / dense.norm()) < 0.8


def test_a_run_leaves_nothing_behind():
    """Dense again after a sparse run is dense to the bit."""
    host, job = EmbeddedHost(), Job(_small(load_clips(1)), 2, 0)
    before = host.run(RUNS[0], job, lambda *step: None)
    host.run(RUNS[2], job, lambda *step: None)
    after = host.run(RUNS[0], job, lambda *step: None)
    assert torch.equal(before.latents, after.latents)


def test_graphs_differ_in_the_patch_alone():
    job = Job(load_clips(2), 7, 5)
    dense, svg, adaspa, auto = (comfy_host.make_graph(run, job) for run in RUNS)
    assert "patch" not in dense and "report" not in dense and dense["watch"]["inputs"]["model"] == ["shift", 0]
    assert svg["patch"]["class_type"] == "SparseAttentionPatchSVG" and adaspa["patch"]["class_type"] == "SparseAttentionPatchAdaSpa"
    assert auto["patch"]["class_type"] == "SparseAttentionPatchAuto"
    for graph in (dense, svg, adaspa, auto):
        links = [value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert set(links) <= set(graph)
        assert graph["sampler"]["inputs"]["steps"] == 7 and graph["sampler"]["inputs"]["seed"] == 5
        assert graph["clips"]["inputs"]["clips"] == "0, 2"


def test_comfyui_is_found_where_it_is_named_or_around(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("sys.argv", ["nowhere/demo/run.py"])
    around = tmp_path / "ComfyUI" / "custom_nodes" / "pack" / "demo" / "run.py"
    around.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.argv", [str(around)])
    if ROOT.parent.name != "custom_nodes":
        assert comfy_host.find_comfyui() is None
    (tmp_path / "ComfyUI" / "main.py").touch()
    assert comfy_host.find_comfyui() == tmp_path / "ComfyUI"
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert comfy_host.find_comfyui() == tmp_path.resolve()


def test_why_comfyui_does_not_start_is_said(tmp_path, monkeypatch):
    with pytest.raises(comfy_host.NoComfyUIError, match=r"no main\.py"):
        comfy_host.ComfyHost(tmp_path)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    (tmp_path / "main.py").write_text("raise ImportError('no module named aiohttp')")
    with pytest.raises(comfy_host.NoComfyUIError, match="no module named aiohttp"), comfy_host.ComfyHost(tmp_path):
        pass


def test_the_call_is_measured_whole():
    ticks = []
    call = attention_call.measure(VideoLayout(6, 12, 12), 5, lambda: ticks.append(None))
    assert len(ticks) == attention_call.count_ticks()
    assert (call["tokens"], call["steps"]) == (864, 5)
    assert [entry["run_steps"] for entry in call["methods"].values()] == [5, 5, 5]
    for entry in call["methods"].values():
        assert 0 < entry["sparsity"] < 1 and entry["seconds"] > 0 and entry["run_seconds"] > 0
        assert 0 < entry["relative_error"] < 1
    # Of 5 steps one is warm-up, which AdaSpa's first search takes part in; SVG plans at each of the others, AdaSpa once more.
    svg, adaspa, auto = call["methods"].values()
    assert (svg["planning_steps"], adaspa["planning_steps"], auto["planning_steps"]) == (4, 1, 4)
    assert (svg["searching_steps"], adaspa["searching_steps"], auto["searching_steps"]) == (0, 1, 1)
    assert svg["run_seconds"] == pytest.approx(call["dense_seconds"] + 4 * (svg["planning_seconds"] + svg["seconds"]))
    assert adaspa["run_seconds"] == pytest.approx(adaspa["searching_seconds"] + adaspa["planning_seconds"] + 4 * adaspa["seconds"])
    assert svg["run_speed_up"] == pytest.approx(5 * call["dense_seconds"] / svg["run_seconds"])


def test_files_are_written(tmp_path):
    video = torch.rand(2, 9, 32, 32)
    pictures.write_video(tmp_path / "a.mp4", video)
    pictures.write_side_by_side(tmp_path / "a.png", [("clip", [("dense", video[0]), ("SVG", video[1])])])
    import imageio.v3 as imageio

    assert imageio.imread(tmp_path / "a.mp4").shape == (9, 96, 192, 3)
    assert imageio.imread(tmp_path / "a.png").ndim == 2


@pytest.fixture(scope="module")
def command():
    """demo/run.py as a module."""
    spec = importlib.util.spec_from_file_location("demo_command", Path(ROOT) / "demo" / "run.py")
    command = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(command)
    sys.path[:] = path
    return command


def test_bad_options_are_refused(command, capsys):
    assert command.parse(["--clips", "3"]).clips == 3
    for wrong in (["--clips", "7"], ["--clips", "0"], ["--steps", "1"], ["--seed", "-1"], ["--host", "other"]):
        with pytest.raises(SystemExit):
            command.parse(wrong)
        assert wrong[1] in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_ends_the_demo_before_it_begins(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(command, "open_host", lambda *_: pytest.fail("the runs began"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=rf"^--output {re.escape(str(folder))}: cannot write there \(.+\)$"):
            command.main(command.parse(["--output", str(folder)]))
    command.make_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    "seconds, words",
    [
        ((16.0, 16.0, 12.0, 8.0), "Against the dense run, SVG took as long, AdaSpa took 25% less time and Auto took 50% less time."),
        ((10.0, 13.0, 5.0, 9.0), "Against the dense run, SVG took 30% more time, AdaSpa took 50% less time and Auto took 10% less time."),
    ],
)
def test_the_gain_is_told_as_it_was_measured(command, seconds, words):
    assert command.gain([{"seconds": value} for value in seconds]) == words


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="this system does not tell how busy its processors are")
def test_other_programs_work_is_told_from_our_own():
    """A busy child counts as another program's work until its process is named as ours."""
    busy = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy]) as child:
        try:
            others, ours = OtherWork((os.getpid(),)), OtherWork((os.getpid(), child.pid))
            time.sleep(2)
            shares, took = (others.share(), ours.share()), Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        finally:
            child.kill()
    own = int(took[11]) / os.sysconf("SC_CLK_TCK") / 2 / os.cpu_count()  # of the 2 seconds, at most
    assert 0 <= shares[1] < shares[0] <= 1 and shares[0] - shares[1] == pytest.approx(own, rel=0.5)
    assert OtherWork((2**31 - 1,)).share() is None


@pytest.mark.host
@pytest.mark.skipif(not Path(os.environ.get("COMFYUI_PATH", "nowhere"), "main.py").is_file(), reason="COMFYUI_PATH is not set, or names no ComfyUI")
def test_both_hosts_make_the_same_video():
    """Dense to rounding, and the same record of a sparse run."""
    embedded, job = EmbeddedHost(), Job(load_clips(1), 3, 0)
    with comfy_host.ComfyHost(comfy_host.find_comfyui()) as comfyui:
        for run in RUNS:
            ours, theirs = (host.run(run, job, lambda *step: None) for host in (embedded, comfyui))
            assert float((ours.latents - theirs.latents).norm() / ours.latents.norm()) < 1e-3
            recalls = [outcome.record.pop("recall_by_layer_and_head", {}) for outcome in (ours, theirs)]
            theirs.record.pop("costs", None)  # what it took here is no part of what was done
            assert ours.record == theirs.record
            assert recalls[0].keys() == recalls[1].keys()
            for layer in recalls[0]:
                assert recalls[0][layer] == pytest.approx(recalls[1][layer], abs=1e-4)
