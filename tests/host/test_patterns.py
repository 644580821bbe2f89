"""Patterns through a real ComfyUI's queue: a Save node in the prompt is seen, its file is listed, loaded and refused by the server."""

import urllib.error

import pytest
from oracle import relative_error

pytestmark = pytest.mark.host

SVG, ADASPA = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa"
ALL = {"sparsity": 0.5, "min_tokens": 0, "dense_layers": ""}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize("patch", [SVG, ADASPA], ids=["svg", "adaspa"])
def test_a_run_is_saved_and_run_again_from_its_file(graphs, server, patch):
    name = f"{patch[-4:].lower()}/run"
    graph = graphs.graph("wan", patch, ALL, cfg=5.0, seed=21)
    graph["9"] = node("SparseAttentionSavePattern", model=["5", 0], samples=["6", 0], filename_prefix=name)
    graph["8"]["inputs"]["samples"] = ["9", 0]
    video, made, _ = graphs.run(graph)
    file = server.base / "output" / "sparse_patterns" / f"{name}_00001_.safetensors"
    assert file.is_file() and not list(file.parent.glob("*.part"))

    listed = server.get("/object_info/SparseAttentionLoadPattern")["SparseAttentionLoadPattern"]["input"]["optional"]["file"]
    options = listed[1]["options"] if listed[0] == "COMBO" else listed[0]
    assert f"{name}_00001_.safetensors [output]" in options
    for inputs in ({"file": f"{name}_00001_.safetensors [output]"}, {"path": str(file)}):
        again = graphs.graph("wan", patch, {**ALL, "strict": True}, cfg=5.0, seed=21)
        again["7"] = node("SparseAttentionLoadPattern", model=["5", 0], **inputs)
        for user in ("6", "8"):
            again[user]["inputs"]["model"] = ["7", 0]
        latent, data, _ = graphs.run(again)
        assert relative_error(latent, video) < 1e-5
        assert data["search_steps"] == [] and [note for note in data["notes"] if note.startswith("started from pattern run_00001_")]
        assert data["sparse_calls"] == made["sparse_calls"] and data["achieved_sparsity"] == pytest.approx(made["achieved_sparsity"], abs=1e-6)

    again["5"]["inputs"]["warmup_steps"] = 0
    _, data, _ = graphs.run(again)
    assert (data["dense_calls"], data["sparse_calls"]) == (0, 12)

    other = SVG if patch == ADASPA else ADASPA
    again["5"] = node(other, model=["1", 0], **ALL)
    with pytest.raises(RuntimeError, match=r"^node 7 \(SparseAttentionLoadPattern\): ValueError: .*does not fit: it was made with"):
        graphs.run(again)


def test_the_path_of_a_save_node_may_be_wired_into_a_load_node(graphs):
    graph = graphs.graph("wan", SVG, ALL, seed=22)
    graph["9"] = node("SparseAttentionSavePattern", model=["5", 0], samples=["6", 0], filename_prefix="wired")
    graph["7"] = node("SparseAttentionLoadPattern", model=["5", 0], path=["9", 1])
    graph["16"] = {**graph["6"], "inputs": {**graph["6"]["inputs"], "model": ["7", 0], "seed": 23}}
    graph["8"]["inputs"].update(model=["7", 0], samples=["16", 0])
    _, data, _ = graphs.run(graph)
    assert data["seed"] == 23 and [note for note in data["notes"] if note.startswith("started from pattern wired_00001_")]


@pytest.mark.parametrize("inputs, words", [
    ({"path": "../../secret.safetensors"}, "only read from the sparse_patterns folders"), ({"file": "gone.safetensors [output]"}, "no such file"),
])
def test_a_file_that_is_none_is_refused_before_anything_runs(graphs, server, inputs, words):
    graph = graphs.graph("wan", SVG, ALL)
    graph["7"] = node("SparseAttentionLoadPattern", model=["5", 0], **inputs)
    graph["6"]["inputs"]["model"] = ["7", 0]
    with pytest.raises((RuntimeError, urllib.error.HTTPError)) as caught:
        graphs.run(graph)
    error = caught.value
    assert words in (error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error))
