"""Every example workflow in a real browser on a real ComfyUI: opened from its file, run with tiny models, in both designs of nodes.

The graph on the canvas stays as it is in the file. Its loaders find tiny models under the names that they ask for (workflow_models.py); only
what the page sends to run it is changed on the way, in `with_tiny_models`: text encoders and two families' VAEs are swapped for nodes of
tests/host_nodes, the video is small, and min_tokens is 0, as it is short. Steps, samplers and everything else stay.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
from comfy_server import python_of_host
from workflow_models import LAYERS, PLACEHOLDERS, TEXT_WIDTH

pytestmark = pytest.mark.host

HERE = Path(__file__).resolve().parent
FILES = sorted((HERE.parent.parent / "workflows").glob("*.json"))
PATCHES = ("SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto")
# What stands behind a patch's sampler, and has its run's JSON as its third output, or has kept what it found.
TELLING = ("SparseAttentionReport", "SparseAttentionProbeResults", "SparseAttentionSavePattern")
NODE = "app.graph.getNodeById({})"
# Sizes that are small, by the node that sets them.
_SMALL = {"width": 256, "height": 128, "length": 33}
SIZES = {
    "EmptyHunyuanLatentVideo": _SMALL, "WanImageToVideo": _SMALL, "WanVaceToVideo": _SMALL, "EmptyHunyuanVideo15Latent": _SMALL,
    "EmptyLTXVLatentVideo": {"width": 512, "height": 256, "length": 65}, "LTXVEmptyLatentAudio": {"frames_number": 65},
    "MiniMaxH3ImageToVideo": {"width": 512, "height": 256, "length": 39},
}
GUIDED = ("KSampler", "KSamplerAdvanced", "CFGGuider", "BasicGuider")
MOST_STEPS = 8
USUAL, LARGE = {"width": 900, "height": 600}, {"width": 2400, "height": 1300}


@pytest.fixture(scope="module")
def models(server):
    """The files that the workflows name, in the running ComfyUI's folders."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    writing = [python_of_host(), str(HERE / "workflow_models.py"), str(server.comfyui), str(server.base / "models")]
    done = subprocess.run(writing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    picture = server.base / "input" / "example.png"
    picture.parent.mkdir(exist_ok=True)
    image.linear_gradient("L").convert("RGB").save(picture)


@pytest.fixture(scope="module")
def tab(models, shared_page):
    """One page for all workflows, as a person has them open side by side; what it sends is run with tiny models."""
    def swap(route):
        body = route.request.post_data_json
        if not body or "prompt" not in body:  # the page asks how long the queue is
            return route.continue_()
        with_tiny_models(body["prompt"])
        shared_page.sent = body["prompt"]
        return route.continue_(post_data=json.dumps(body))

    shared_page.page.route("**/api/prompt", swap)
    shared_page.page.set_viewport_size(USUAL)
    shared_page.server.post("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})  # pictures of a whole workflow keep their words
    shared_page.open()
    yield shared_page
    shared_page.server.post("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 8})  # as it starts out


def with_tiny_models(prompt):
    """Changes what is run in place; see the head of this file. The JSON of every report and probe is put out as by a wired PreviewAny."""
    for number, node in list(prompt.items()):
        kind, inputs = node["class_type"], node["inputs"]
        named = [value.removesuffix(".safetensors") for value in inputs.values() if isinstance(value, str)]
        if set(named) & set(PLACEHOLDERS["text_encoders"]):
            (width,) = {width for word, width in TEXT_WIDTH.items() if any(name.startswith(word) for name in named)}
            prompt[number] = {"class_type": "TestTextEncoder", "inputs": {"width": width, "tokens": 32}}
        elif set(named) & set(PLACEHOLDERS["vae"]):
            prompt[number] = {"class_type": "TestVAE", "inputs": {"sound": "audio" in named[0]}}
        elif kind in PATCHES:
            inputs["min_tokens"] = 0
        elif kind in TELLING[:2]:
            prompt[f"json {number}"] = {"class_type": "PreviewAny", "inputs": {"source": [number, 2]}}
        inputs.update(SIZES.get(kind, {}))
        if (fewer := inputs.get("steps", 0) / MOST_STEPS) > 1:
            inputs.update({name: round(inputs[name] / fewer) for name in ("steps", "start_at_step", "end_at_step") if name in inputs})


def calls(prompt, patch):
    """How many self-attention calls the video makes behind a patch node, from what was sent: evaluations, conditions and layers."""
    def giver(node, name):
        return prompt[node["inputs"][name][0]]

    (taker,) = [node for node in prompt.values() if node["class_type"] in GUIDED and giver(node, "model") is prompt[patch]]
    inputs = taker["inputs"]
    if taker["class_type"] == "KSampler":
        steps = inputs["steps"]
    elif taker["class_type"] == "KSamplerAdvanced":
        steps = inputs["end_at_step"] - inputs["start_at_step"]
    else:
        (sampler,) = [node for node in prompt.values() if node["class_type"] == "SamplerCustomAdvanced" and giver(node, "guider") is taker]
        steps = giver(sampler, "sigmas")["inputs"]["steps"]
    loader = giver(prompt[patch], "model")
    while "Loader" not in loader["class_type"] or "Lora" in loader["class_type"]:
        loader = giver(loader, "model")
    (name,) = [value.removesuffix(".safetensors") for key, value in loader["inputs"].items() if key.endswith("_name")]
    return steps * (1 if inputs.get("cfg", 1) == 1 else 2) * LAYERS.get(name, 2)


def assert_line_tells(line, data):
    """That a closing line has the figures of this run's record, and of no other's: its times as well."""
    assert f" · {data['run_sparsity']:.0%} of the whole run's attention skipped · " in line
    assert all(f"{reason} ({count})" in line for reason, count in data["reasons"].items())
    told = {kind: float(figure.replace(",", "")) for figure, kind in re.findall(r"([\d.,]+) ms a (\w+) call", line)}
    assert told == pytest.approx(data["costs"]["call_ms"], rel=0.01) and "sparse" in told


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_opens_runs_and_shows_its_figures(tab, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes, links = {node["id"]: node for node in graph["nodes"]}, {link[0]: link for link in graph["links"]}
    lacking = {node["type"] for node in nodes.values()} - set(tab.server.get("/object_info")) - {"MarkdownNote"}
    if lacking and "**Needs ComfyUI " in json.dumps(graph):
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}, as the file's note says")
    assert tab.open_file(path) == {number: node["type"] for number, node in nodes.items()}
    assert tab.troubles() == []
    tab.page.evaluate("() => { told.length = 0; texts.length = 0; }")
    tab.queue()
    entry = tab.finished(300)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1][1]["exception_message"]
    tab.page.set_viewport_size(LARGE)
    tab.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    tab.page.wait_for_timeout(1000)
    tab.picture(f"workflow-{path.stem}")
    assert tab.troubles() == []
    told, texts = tab.page.evaluate("[told, texts]")
    patches = [number for number, node in nodes.items() if node["type"] in PATCHES]
    assert patches and {data["node"] for data in told if data["state"] != "note"} == set(map(str, patches))
    for patch in patches:
        marked = {patch, *(link[3] for link in links.values() if link[1] == patch and nodes[link[3]]["type"] == "SparseAttentionProbe")}
        (telling,) = [link[3] for link in links.values() if link[1] in marked and nodes[link[3]]["type"] in TELLING]
        line = tab.panel(NODE.format(patch))["line"]
        if nodes[telling]["type"] == "SparseAttentionReport":
            data = json.loads(entry["outputs"][f"json {telling}"]["text"][0])
            assert data["sparse_calls"] > 0 and 0 < data["achieved_sparsity"] < 1
            assert data["sparse_calls"] + data["dense_calls"] == calls(tab.sent, str(patch))
            tab.assert_shows(NODE.format(patch), data)
            assert_line_tells(line, data)
            stacks = {name.partition(" ")[2] for name in data["layer_names"]}
            assert stacks == ({"", "vace"} if path.stem == "wan_vace" else {""})
        elif nodes[telling]["type"] == "SparseAttentionProbeResults":
            data = json.loads(entry["outputs"][f"json {telling}"]["text"][0])
            assert data["outcome"] == "finished" and data["calls"] > 0 and len(data["sparsities"]) == 3
            assert "a probe computed" in line
            table = next(number for number, node in nodes.items() if node["type"] == "PreviewAny")
            assert f'sparsity {data["suggestion"]["sparsity"]:g} ' in entry["outputs"][str(table)]["text"][0]
        else:
            kept = list((tab.server.base / "output" / "sparse_patterns").glob("pattern*.safetensors"))
            assert kept and all(file.stat().st_size > 1000 for file in kept)
        assert [text["text"] for text in texts if text["nodeId"] == str(patch)][-1] == line, "ComfyUI's own text is the same line"
        states = [data["state"] for data in told if data["node"] == str(patch)]
        assert states[0] == "note" and states[-1] == "done" and states.count("done") == 1
    if path.stem == "wan_pattern":
        assert data["search_steps"] == [], "the second run starts from the first one's file"
    for video in (number for number, node in nodes.items() if node["type"] == "SaveVideo"):
        (file,) = entry["outputs"][str(video)]["images"]
        assert (tab.server.base / "output" / file["subfolder"] / file["filename"]).stat().st_size > 1000
    tab.page.set_viewport_size(USUAL)


def test_a_node_that_is_missing_would_be_seen(tab, tmp_path):
    graph = json.loads(FILES[-1].read_text(encoding="utf-8"))
    graph["nodes"][0]["type"] = "NoSuchNode"
    file = tmp_path / "missing.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    tab.open_file(file)
    assert "NoSuchNode" in tab.troubles() and len(tab.troubles()) > 1, "in the graph, and in what the frontend says"
