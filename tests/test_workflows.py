"""The example workflows and the subgraph blueprints: the graph format that the frontend saves, core nodes and ours only, every widget value
where its node expects it."""

import json
import math
import re
import uuid
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
SNAPSHOT = json.loads((FOLDER.parent / "tests" / "snapshots" / "nodes.json").read_text(encoding="utf-8"))

# Our nodes as saved workflows know them: widgets in their order with what they start from. Values are saved by place, so the order never changes.
SHARED = [("warmup_steps", -1), ("cache_refresh", -1), ("dense_layers", None), ("end_steps", 0), ("min_tokens", -1)]
COMMON = [("sparsity", None), *SHARED]
LAST = [("backend", "auto"), ("strict", False), ("precision", "auto")]
OURS = {
    "SparseAttentionPatchSVG": [*COMMON, ("sampled_rows", 64), *LAST],
    "SparseAttentionPatchAdaSpa": [*COMMON, ("head_adaptive", True), ("token_order", "hilbert"), *LAST, ("skipped_blocks", "mean")],
    "SparseAttentionPatchAuto": [("fidelity", 0.9), *SHARED, *LAST],
    "SparseAttentionReport": [("layer", 0), ("head", 0)],
    "SparseAttentionProbe": [("layers", ""), ("most_layers", 0), ("steps", 3), ("sparsities", "auto"), ("continue_with", "sparse")],
    "SparseAttentionProbeResults": [("max_error", 0.3)],
    "SparseAttentionSavePattern": [("filename_prefix", "pattern")],
    "SparseAttentionLoadPattern": [("file", "none"), ("path", "")],
}
OWN = {
    "SparseAttentionPatchSVG": {"sparsity": 0.7, "dense_layers": "0"}, "SparseAttentionPatchAdaSpa": {"sparsity": 0.8, "dense_layers": ""},
    "SparseAttentionPatchAuto": {"dense_layers": ""},
}
# What a file sets otherwise, by the patch's title.
SET = {
    "wan_t2v_svg": {"": {"sparsity": -1}},
    "wan_t2v_adaspa": {"": {"sparsity": -1}},
    "wan_probe": {"": {"dense_layers": ""}},
    "wan_pattern": {"": {"sparsity": -1}},
    "wan22_t2v_4_steps": {
        "High noise: sparse attention": {"sparsity": 0.6, "warmup_steps": 1}, "Low noise: sparse attention": {"sparsity": 0.6, "warmup_steps": 0},
    },
    "wan_dense_and_sparse": {"": {"sparsity": -1, "dense_layers": "auto"}},
    "ltx2_t2v": {"": {"warmup_steps": 4}},
}
SLOTS = {
    "SparseAttentionPatchSVG": (["model"], ["MODEL"]),
    "SparseAttentionPatchAdaSpa": (["model"], ["MODEL"]),
    "SparseAttentionPatchAuto": (["model"], ["MODEL"]),
    "SparseAttentionReport": (["model", "samples"], ["LATENT", "IMAGE", "STRING"]),
    "SparseAttentionProbe": (["model"], ["MODEL"]),
    "SparseAttentionProbeResults": (["model", "samples"], ["LATENT", "STRING", "STRING", "STRING", "FLOAT"]),
    "SparseAttentionSavePattern": (["model", "samples"], ["LATENT", "STRING"]),
    "SparseAttentionLoadPattern": (["model"], ["MODEL"]),
}
# Each stands behind the sampler of the model that it is connected to, and tells of its run or keeps what it found.
TELLING = ("SparseAttentionReport", "SparseAttentionProbeResults", "SparseAttentionSavePattern")
CORE = {
    "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "CheckpointLoaderSimple", "LTXAVTextEncoderLoader", "LTXVAudioVAELoader",
    "LoraLoaderModelOnly", "CLIPTextEncode", "LoadImage", "EmptyHunyuanLatentVideo", "EmptyHunyuanVideo15Latent", "EmptyLTXVLatentVideo",
    "LTXVEmptyLatentAudio", "LTXVConcatAVLatent", "LTXVSeparateAVLatent", "LTXVConditioning", "WanImageToVideo", "WanVaceToVideo",
    "MiniMaxH3ImageToVideo", "TrimVideoLatent", "ModelSamplingSD3", "KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "RandomNoise",
    "KSamplerSelect", "BasicScheduler", "LTXVScheduler", "CFGGuider", "BasicGuider", "VAEDecode", "VAEDecodeTiled", "VAEDecodeAudio",
    "LTXVAudioVAEDecode", "ImageStitch", "CreateVideo", "SaveVideo", "PreviewAny", "MarkdownNote",
}
# Of core's, those that ComfyUI 0.23 lacks: the file's note says so.
NEWER = {"MiniMaxH3ImageToVideo": "0.33"}
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced")
# Where a loader keeps the names of its files, in the order of its widgets.
LOADERS = {
    "UNETLoader": ["diffusion_models"], "CLIPLoader": ["text_encoders"], "DualCLIPLoader": ["text_encoders", "text_encoders"], "VAELoader": ["vae"],
    "CheckpointLoaderSimple": ["checkpoints"], "LTXAVTextEncoderLoader": ["text_encoders", "checkpoints"], "LTXVAudioVAELoader": ["checkpoints"],
    "LoraLoaderModelOnly": ["loras"],
}
# Frames that a model takes: so many, and any multiple of the other number more. The place of the length among a node's widgets comes first.
FRAMES = {
    "EmptyHunyuanLatentVideo": (2, 1, 4), "EmptyHunyuanVideo15Latent": (2, 1, 4), "EmptyLTXVLatentVideo": (2, 1, 8), "WanImageToVideo": (2, 1, 4),
    "WanVaceToVideo": (2, 1, 4), "MiniMaxH3ImageToVideo": (3, 5, 17),
}

every_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def of_type(graph: dict, *types: str) -> list[dict]:
    return [node for node in graph["nodes"] if node["type"] in types]


def sources(graph: dict) -> dict[tuple[int, str], tuple[dict, int]]:
    """The node and the output that each linked input has, by node and input."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    return {(link[3], nodes[link[3]]["inputs"][link[4]]["name"]): (nodes[link[1]], link[2]) for link in graph["links"]}


def above(graph: dict, node: dict, kind: str = "") -> set[int]:
    """The ids of all nodes that a node is made from; of a kind of link, if one is given."""
    found, waiting = set(), {node["id"]}
    while waiting:
        found |= waiting
        waiting = {link[1] for link in graph["links"] if link[3] in waiting and kind in link[5]} - found
    return found - {node["id"]}


def overlap(one: dict, other: dict) -> bool:
    """Whether two nodes, each with its title above it, cover one another."""
    title = 30
    return all(
        one["pos"][axis] - edge < other["pos"][axis] + other["size"][axis] and other["pos"][axis] - edge < one["pos"][axis] + one["size"][axis]
        for axis, edge in ((0, 0), (1, title))
    )


def test_there_is_one_for_each_method_and_for_each_large_family():
    assert {path.stem for path in FILES} >= {
        "wan_t2v_svg", "wan_t2v_adaspa", "wan_t2v_auto", "wan22_t2v", "wan22_i2v", "wan_dense_and_sparse", "hunyuan15_t2v", "wan_vace",
        "wan22_t2v_4_steps", "ltx2_t2v", "minimax_h3_t2v", "wan_probe", "wan_pattern",
    }
    ours = {node["type"] for path in FILES for node in of_type(read(path), *OURS)}
    assert ours == set(OURS) == set(SNAPSHOT), "each of our nodes is in one"


def test_each_has_an_id_of_its_own():
    """By it the frontend keeps what belongs to one workflow apart from others'."""
    ids = [uuid.UUID(read(path)["id"]) for path in FILES]
    assert len(set(ids)) == len(ids) and uuid.UUID(int=0) not in ids


@every_file
def test_it_is_a_graph_as_the_frontend_saves_it(path):
    graph = read(path)
    assert {"nodes", "links", "groups", "version", "last_node_id", "last_link_id"} <= graph.keys()
    assert graph["version"] == 0.4
    ids = [node["id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids)) and max(ids) <= graph["last_node_id"]
    assert all({"id", "type", "pos", "size", "mode", "order"} <= node.keys() for node in graph["nodes"])
    assert all(node["mode"] == 0 for node in graph["nodes"]), "nothing is muted or bypassed"


@every_file
def test_it_has_core_nodes_and_ours_only(path):
    assert {node["type"] for node in read(path)["nodes"]} <= CORE | OURS.keys()


@every_file
def test_our_widgets_stand_in_their_order_at_their_defaults(path):
    own = SET.get(path.stem, {})
    for node in of_type(read(path), *OURS):
        here = {**OWN.get(node["type"], {}), **(own.get(node.get("title", ""), own.get("", {})) if node["type"] in OWN else {})}
        expected = [(name, here.get(name, value)) for name, value in OURS[node["type"]]]
        assert [slot["name"] for slot in node["inputs"] if "widget" in slot] == [name for name, _ in expected]
        assert node.get("widgets_values", []) == [value for _, value in expected]
        assert [type(value) for value in node.get("widgets_values", [])] == [type(value) for _, value in expected]


@every_file
def test_our_slots_are_those_of_our_nodes(path):
    for node in of_type(read(path), *OURS):
        inputs, outputs = SLOTS[node["type"]]
        assert [slot["name"] for slot in node["inputs"] if "widget" not in slot] == inputs
        assert [slot["type"] for slot in node["outputs"]] == outputs


@every_file
def test_every_link_has_both_ends(path):
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and max(links) <= graph["last_link_id"]
    for number, source, output, target, slot, kind in graph["links"]:
        left, right = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in left["links"] and right["link"] == number
        assert left["type"] == kind and right["type"] in (kind, "*")
    for node in graph["nodes"]:
        assert {slot["link"] for slot in node.get("inputs", [])} - {None} <= links.keys()
        assert {number for slot in node.get("outputs", []) for number in slot["links"] or ()} <= links.keys()


@every_file
def test_every_patch_is_sampled_and_what_tells_of_it_stands_behind_its_sampler(path):
    graph = read(path)
    linked, nodes = sources(graph), {node["id"]: node for node in graph["nodes"]}
    decoders = of_type(graph, "VAEDecode", "VAEDecodeTiled")
    patches = of_type(graph, *OWN)
    assert patches and len(patches) == len(of_type(graph, *TELLING))
    for patch in patches:
        (marked,) = [node for node in of_type(graph, "SparseAttentionProbe") if linked[node["id"], "model"][0] is patch] or [patch]
        takers = [nodes[number] for (number, name), (source, _) in linked.items() if name == "model" and source is marked]
        (telling,) = [node for node in takers if node["type"] in TELLING]
        (called,) = [node for node in takers if node["type"] in (*SAMPLERS, "CFGGuider", "BasicGuider")]
        assert {node["type"] for node in takers} <= {telling["type"], "BasicScheduler", called["type"]}
        sampler, output = linked[telling["id"], "samples"]
        assert sampler["type"] in SAMPLERS and output == 0
        assert sampler is called or linked[sampler["id"], "guider"][0] is called
        assert any(telling["id"] in above(graph, decoder) for decoder in decoders), "the latent goes on, or what the run found does"
        upstream = [nodes[number]["type"] for number in above(graph, patch, "MODEL")]
        assert set(upstream) & {"UNETLoader", "CheckpointLoaderSimple"} and not set(upstream) & {*SAMPLERS, *OWN}
    assert all(len(above(graph, node)) > 3 for node in of_type(graph, "SaveVideo"))


@every_file
def test_nothing_stands_unconnected(path):
    """But notes: every other node is part of what is saved or shown."""
    graph = read(path)
    ends = of_type(graph, "SaveVideo", "PreviewAny", "SparseAttentionReport", "SparseAttentionProbeResults")
    used = {node["id"] for node in ends}.union(*(above(graph, node) for node in ends))
    assert [node["type"] for node in graph["nodes"] if node["id"] not in used] == ["MarkdownNote"] * len(of_type(graph, "MarkdownNote"))


@pytest.mark.parametrize("name", ["wan22_t2v", "wan22_i2v", "wan22_t2v_4_steps"])
def test_two_stages_share_one_run(name):
    graph = read(FOLDER / f"{name}.json")
    linked = sources(graph)
    first, second = sorted(of_type(graph, "KSamplerAdvanced"), key=lambda node: node["widgets_values"][7])
    # add_noise, seed, after generation, steps, cfg, sampler, scheduler, start, end, leftover noise
    a, b = first["widgets_values"], second["widgets_values"]
    assert a[3:7] == b[3:7] and (a[7], a[8], b[8]) == (0, b[7], a[3])
    assert (a[0], a[9], b[0], b[9]) == ("enable", "enable", "disable", "disable")
    report, output = linked[second["id"], "latent_image"]
    assert report["type"] == "SparseAttentionReport" and output == 0 and linked[report["id"], "samples"][0] is first
    for sampler, noise in ((first, "high_noise"), (second, "low_noise")):
        made_from = above(graph, linked[sampler["id"], "model"][0])
        loaders = [node for node in of_type(graph, "UNETLoader", "LoraLoaderModelOnly") if node["id"] in made_from]
        assert loaders and all(noise in node["widgets_values"][0] for node in loaders)


def test_dense_and_sparse_differ_in_the_patch_alone():
    graph = read(FOLDER / "wan_dense_and_sparse.json")
    linked = sources(graph)
    dense, sparse = sorted(of_type(graph, "KSampler"), key=lambda node: linked[node["id"], "model"][0]["type"] in OWN)
    assert dense["widgets_values"] == sparse["widgets_values"] and dense["widgets_values"][1] == "fixed"
    assert all(linked[dense["id"], name] == linked[sparse["id"], name] for name in ("positive", "negative", "latent_image"))
    (patch,), (side,) = of_type(graph, *OWN), of_type(graph, "ImageStitch")
    assert linked[sparse["id"], "model"][0] is patch and linked[patch["id"], "model"] == linked[dense["id"], "model"]
    left, right = (above(graph, linked[side["id"], name][0]) for name in ("image1", "image2"))
    assert dense["id"] in left and sparse["id"] not in left
    assert sparse["id"] in right and dense["id"] not in right


def test_the_second_run_of_the_pattern_differs_in_the_pattern_and_the_seed_alone():
    graph = read(FOLDER / "wan_pattern.json")
    linked = sources(graph)
    (save,), (load,), (report,) = (of_type(graph, f"SparseAttention{name}") for name in ("SavePattern", "LoadPattern", "Report"))
    first, second = (linked[node["id"], "samples"][0] for node in (save, report))
    assert first["widgets_values"][2:] == second["widgets_values"][2:] and first["widgets_values"][0] != second["widgets_values"][0]
    assert first["widgets_values"][1] == second["widgets_values"][1] == "fixed"
    assert all(linked[first["id"], name] == linked[second["id"], name] for name in ("positive", "negative", "latent_image"))
    searching, loaded = (linked[node["id"], "model"][0] for node in (first, second))
    assert searching["widgets_values"] == loaded["widgets_values"] and searching["type"] == loaded["type"] == "SparseAttentionPatchAdaSpa"
    assert linked[loaded["id"], "model"][0] is load and linked[load["id"], "model"] == linked[searching["id"], "model"]
    source, output = linked[load["id"], "path"]
    assert source is save and save["outputs"][output]["name"] == "path"


def test_a_probe_shows_its_table_and_measures_every_layer():
    graph = read(FOLDER / "wan_probe.json")
    linked = sources(graph)
    (results,), (patch,), (shown,) = of_type(graph, "SparseAttentionProbeResults"), of_type(graph, *OWN), of_type(graph, "PreviewAny")
    source, output = linked[shown["id"], "source"]
    assert source is results and results["outputs"][output]["name"] == "table"
    assert dict(zip((name for name, _ in OURS[patch["type"]]), patch["widgets_values"], strict=True))["dense_layers"] == ""


@every_file
def test_no_wire_runs_backwards(path):
    """Each begins left of where it ends: from the right edge of a node to the left edge of the other."""
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    ends = {link[0]: (nodes[link[1]], nodes[link[3]]) for link in graph["links"]}
    assert [(a["type"], b["type"]) for a, b in ends.values() if a["pos"][0] + a["size"][0] > b["pos"][0]] == []


@every_file
def test_a_report_is_wide_enough_for_its_picture(path):
    assert all(node["size"][0] >= 560 and node["size"][1] >= 520 for node in of_type(read(path), "SparseAttentionReport"))


@every_file
def test_every_model_file_says_where_it_is_found(path):
    """The frontend offers to download what is missing from these."""
    graph = read(path)
    notes = "\n".join(node["widgets_values"][0] for node in of_type(graph, "MarkdownNote"))
    loaders = of_type(graph, *LOADERS)
    assert loaders and all(type in LOADERS for type in {node["type"] for node in graph["nodes"]} if "Loader" in type)
    for node in loaders:
        named = set(zip(node["widgets_values"], LOADERS[node["type"]], strict=False))
        assert {(model["name"], model["directory"]) for model in node["properties"]["models"]} == named
        for model in node["properties"]["models"]:
            assert re.fullmatch(r"https://huggingface\.co/\S+/" + re.escape(model["name"]) + r"(\?download=true)?", model["url"])
            assert f"models/{model['directory']}: [{model['name']}]({model['url'].removesuffix('?download=true')})" in notes


@every_file
def test_notes_say_what_it_is_and_what_to_expect(path):
    graph = read(path)
    notes = {node["title"]: node["widgets_values"][0] for node in of_type(graph, "MarkdownNote")}
    assert set(notes) == {"Read me", "What to expect, and the knobs"}
    assert all(any(line.startswith("## ") for line in words.splitlines()) for words in notes.values())
    knob = "fidelity**" if of_type(graph, "SparseAttentionPatchAuto") else "sparsity**"
    assert knob in notes["What to expect, and the knobs"]
    for type, version in NEWER.items():
        assert bool(of_type(graph, type)) == (f"Needs ComfyUI {version}" in notes["Read me"])


@every_file
def test_the_length_is_one_that_the_model_takes(path):
    (node,) = of_type(read(path), *FRAMES)
    place, least, step = FRAMES[node["type"]]
    assert node["widgets_values"][place] > least and (node["widgets_values"][place] - least) % step == 0


@every_file
def test_no_node_lies_on_another(path):
    nodes = read(path)["nodes"]
    assert all(math.isfinite(value) for node in nodes for value in (*node["pos"], *node["size"]))
    pairs = [(one, other) for number, one in enumerate(nodes) for other in nodes[number + 1:]]
    assert [(one["type"], other["type"]) for one, other in pairs if overlap(one, other)] == []


@every_file
def test_it_has_a_picture(path):
    """ComfyUI shows the picture of the same name among the templates."""
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture[:2] == b"\xff\xd8" and picture[-2:] == b"\xff\xd9"
    assert 20_000 < len(picture) < 300_000


# ---- the subgraph blueprints ----

BLUEPRINTS = sorted((FOLDER.parent / "subgraphs").glob("*.json"))
AUTOMATIC = {"sparsity": -1, "dense_layers": "auto"}
# What each sets otherwise than the nodes themselves, by the title of a patch.
BLUEPRINT_SET = {
    "Sparse Sampling with Report (SVG)": {"": AUTOMATIC},
    "Sparse Sampling with Report (AdaSpa)": {"": AUTOMATIC},
    "Sparse Two-Stage Sampling (Wan 2.2)": {"High noise: sparse attention": AUTOMATIC, "Low noise: sparse attention": AUTOMATIC},
    "Probe, then Sparse Sampling (SVG)": {
        "Sparse attention to be measured": {"sparsity": 0.8, "dense_layers": ""}, "Sparse attention as suggested": {},
    },
}
KSAMPLER = ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"]
every_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=[path.stem for path in BLUEPRINTS])


def subgraph(path: Path) -> tuple[dict, dict]:
    """The one node of a blueprint, and the definition of its subgraph."""
    graph = read(path)
    (node,), (definition,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert node["type"] == definition["id"] and graph["links"] == [] and graph["version"] == 0.4
    return node, definition


def inside(definition: dict) -> dict:
    """A subgraph in the form of a graph, with its inputs (-10) and outputs (-20) as nodes of their own."""
    ends = [
        {"id": -10, "type": "inputs", "inputs": [], "outputs": [{**slot, "links": slot["linkIds"]} for slot in definition["inputs"]]},
        {"id": -20, "type": "outputs", "outputs": [], "inputs": [{**slot, "link": slot["linkIds"][0]} for slot in definition["outputs"]]},
    ]
    links = [[link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")] for link in definition["links"]]
    return {"nodes": [*definition["nodes"], *ends], "links": links}


def test_there_is_a_blueprint_for_each_way_to_sample():
    assert {path.stem for path in BLUEPRINTS} == set(BLUEPRINT_SET)


@every_blueprint
def test_a_blueprint_is_one_subgraph_that_bears_its_files_name(path):
    """The frontend takes the first node for the blueprint, names it after the file, and files it under the category."""
    node, definition = subgraph(path)
    assert node["title"] == definition["name"] == path.stem
    assert definition["category"] and 40 < len(definition["description"]) < 400
    assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in definition["inputs"]]
    assert [slot["type"] for slot in node["outputs"]] == [slot["type"] for slot in definition["outputs"]]
    assert len({slot["name"] for slot in definition["inputs"]}) == len(definition["inputs"])
    assert all(slot["link"] is None for slot in node["inputs"])


@every_blueprint
def test_a_blueprint_has_core_nodes_and_ours_only_with_inputs_that_exist(path):
    _, definition = subgraph(path)
    for node in definition["nodes"]:
        if node["type"] not in SNAPSHOT:
            assert node["type"] in CORE
            continue
        known = SNAPSHOT[node["type"]]
        assert [slot["name"] for slot in node["inputs"]] == [slot["id"] for slot in known["inputs"]]
        assert [slot["type"] for slot in node["outputs"]] == known["outputs"]


@every_blueprint
def test_the_settings_in_a_blueprint_are_what_the_nodes_start_from_or_what_is_meant(path):
    _, definition = subgraph(path)
    patches = of_type(definition, *OWN)
    assert {node.get("title", "") for node in patches} == set(BLUEPRINT_SET[path.stem])
    for node in patches:
        here = {**OWN[node["type"]], **BLUEPRINT_SET[path.stem][node.get("title", "")]}
        assert node["widgets_values"] == [here.get(name, value) for name, value in OURS[node["type"]]]


@every_blueprint
def test_every_link_in_a_blueprint_has_both_ends_and_nothing_is_unconnected(path):
    _, definition = subgraph(path)
    graph = inside(definition)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, output, target, slot, kind in graph["links"]:
        left, right = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in left["links"] and right["link"] == number and left["type"] == right["type"] == kind
    assert all(slot["linkIds"] for slot in (*definition["inputs"], *definition["outputs"]))
    used = above(graph, nodes[-20]) | {-20}
    assert used == set(nodes), "all of it is on the way to an output"
    linked = sources(graph)
    for node in definition["nodes"]:
        needed = [slot["name"] for slot in node["inputs"] if "widget" not in slot]
        assert all((node["id"], name) in linked for name in needed), node["type"]


@every_blueprint
def test_in_a_blueprint_every_patch_is_sampled_and_reported(path):
    _, definition = subgraph(path)
    graph = inside(definition)
    linked = sources(graph)
    for patch in of_type(definition, *OWN):
        behind = [patch, *(node for node in of_type(definition, "SparseAttentionProbe") if linked[node["id"], "model"][0] is patch)][-1]
        takers = [node for node in definition["nodes"] if linked.get((node["id"], "model"), (None,))[0] is behind]
        (sampler,), (told,) = (of_type({"nodes": takers}, *kinds) for kinds in (SAMPLERS, ("SparseAttentionReport", "SparseAttentionProbeResults")))
        assert linked[told["id"], "samples"][0] is sampler
        assert linked[patch["id"], "model"][0]["type"] == "inputs", "the model comes from outside"


@pytest.mark.parametrize("method", ["SVG", "AdaSpa"])
def test_the_outside_of_a_sampling_blueprint_is_that_of_a_ksampler(method):
    """So that it takes the place of one, link for link."""
    _, definition = subgraph(FOLDER.parent / "subgraphs" / f"Sparse Sampling with Report ({method}).json")
    names = [slot["name"] for slot in definition["inputs"]]
    assert names == ["model", "positive", "negative", "latent_image", *KSAMPLER, "sparsity", "warmup_steps"]
    assert definition["outputs"][0]["type"] == "LATENT"


def test_the_two_stages_of_a_blueprint_share_one_run():
    _, definition = subgraph(FOLDER.parent / "subgraphs" / "Sparse Two-Stage Sampling (Wan 2.2).json")
    linked = sources(inside(definition))
    first, second = sorted(of_type(definition, "KSamplerAdvanced"), key=lambda node: node["widgets_values"][7])
    assert (first["widgets_values"][0], first["widgets_values"][9], second["widgets_values"][0], second["widgets_values"][9]) == (
        "enable", "enable", "disable", "disable")
    assert linked[first["id"], "end_at_step"] == linked[second["id"], "start_at_step"], "one knob for both"
    assert first["widgets_values"][8] == second["widgets_values"][7] and second["widgets_values"][8] >= 10_000
    for name in ("positive", "negative", "steps", "cfg", "sampler_name", "scheduler"):
        assert linked[first["id"], name] == linked[second["id"], name]
    report, output = linked[second["id"], "latent_image"]
    assert report["type"] == "SparseAttentionReport" and output == 0 and linked[report["id"], "samples"][0] is first


def test_the_probing_blueprint_runs_what_was_suggested_and_does_not_measure_again_for_another_seed():
    _, definition = subgraph(FOLDER.parent / "subgraphs" / "Probe, then Sparse Sampling (SVG).json")
    linked = sources(inside(definition))
    (results,), (report,) = of_type(definition, "SparseAttentionProbeResults"), of_type(definition, "SparseAttentionReport")
    suggested = linked[report["id"], "model"][0]
    for name in ("dense_layers", "sparsity"):
        source, output = linked[suggested["id"], name]
        assert source is results and results["outputs"][output]["name"] == name
    measured, sampled = linked[results["id"], "samples"][0], linked[report["id"], "samples"][0]
    assert (sampled["id"], "seed") in linked and (measured["id"], "seed") not in linked and measured["widgets_values"][1] == "fixed"
    for name in ("positive", "negative", "latent_image", "steps", "cfg", "sampler_name", "scheduler"):
        assert linked[measured["id"], name] == linked[sampled["id"], name]
