"""The example workflows: the graph format that the frontend saves, core nodes and ours only, every widget value where its node expects it."""

import json
import math
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
FILES = sorted(FOLDER.glob("*.json"))

# Our nodes as saved workflows know them: widgets in their order with what they start from. Values are saved by place, so the order never changes.
COMMON = [("sparsity", None), ("warmup_steps", -1), ("cache_refresh", -1), ("dense_layers", None), ("end_steps", 0), ("min_tokens", -1)]
LAST = [("backend", "auto"), ("strict", False), ("precision", "auto")]
OURS = {
    "SparseAttentionPatchSVG": [*COMMON, ("sampled_rows", 64), *LAST],
    "SparseAttentionPatchAdaSpa": [*COMMON, ("head_adaptive", True), ("token_order", "tile"), *LAST],
    "SparseAttentionReport": [("layer", 0), ("head", 0)],
}
OWN = {"SparseAttentionPatchSVG": {"sparsity": 0.7, "dense_layers": "0"}, "SparseAttentionPatchAdaSpa": {"sparsity": 0.8, "dense_layers": ""}}
# What a file sets otherwise, by the patch's title.
SET = {
    "wan22_i2v": {"": {"cache_refresh": 0}},
    "wan22_t2v_4_steps": {"High noise: sparse attention": {"warmup_steps": 1}, "Low noise: sparse attention": {"warmup_steps": 0}},
    "wan_dense_and_sparse": {"": {"sparsity": -1, "dense_layers": "auto"}},
    "ltx2_t2v": {"": {"warmup_steps": 4}},
}
SLOTS = {
    "SparseAttentionPatchSVG": (["model"], ["MODEL"]),
    "SparseAttentionPatchAdaSpa": (["model"], ["MODEL"]),
    "SparseAttentionReport": (["model", "samples"], ["LATENT", "IMAGE", "STRING"]),
}
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


def above(graph: dict, node: dict) -> set[int]:
    """The ids of all nodes that a node is made from."""
    found, waiting = set(), {node["id"]}
    while waiting:
        found |= waiting
        waiting = {link[1] for link in graph["links"] if link[3] in waiting} - found
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
        "wan_t2v_svg", "wan_t2v_adaspa", "wan22_t2v", "wan22_i2v", "wan_dense_and_sparse", "hunyuan15_t2v", "wan_vace", "wan22_t2v_4_steps",
        "ltx2_t2v", "minimax_h3_t2v",
    }
    patches = {node["type"] for path in FILES for node in of_type(read(path), *OWN)}
    assert patches == set(OWN)


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
def test_every_patch_is_sampled_and_a_report_stands_behind_its_sampler(path):
    graph = read(path)
    linked, nodes = sources(graph), {node["id"]: node for node in graph["nodes"]}
    decoders = of_type(graph, "VAEDecode", "VAEDecodeTiled")
    patches = of_type(graph, *OWN)
    assert patches and len(patches) == len(of_type(graph, "SparseAttentionReport"))
    for patch in patches:
        takers = [nodes[number] for (number, name), (source, _) in linked.items() if name == "model" and source is patch]
        (report,) = [node for node in takers if node["type"] == "SparseAttentionReport"]
        (called,) = [node for node in takers if node["type"] in (*SAMPLERS, "CFGGuider", "BasicGuider")]
        assert {node["type"] for node in takers} <= {"SparseAttentionReport", "BasicScheduler", called["type"]}
        sampler, output = linked[report["id"], "samples"]
        assert sampler["type"] in SAMPLERS and output == 0
        assert sampler is called or linked[sampler["id"], "guider"][0] is called
        assert any(report["id"] in above(graph, decoder) for decoder in decoders), "the report's latent goes on"
        upstream = [nodes[number]["type"] for number in above(graph, patch)]
        assert set(upstream) & {"UNETLoader", "CheckpointLoaderSimple"} and not set(upstream) & {*SAMPLERS, *OWN}
    assert all(len(above(graph, node)) > 3 for node in of_type(graph, "SaveVideo"))


@every_file
def test_nothing_stands_unconnected(path):
    """But notes: every other node is part of what is saved or shown."""
    graph = read(path)
    ends = of_type(graph, "SaveVideo", "PreviewAny", "SparseAttentionReport")
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
    assert "**sparsity**" in notes["What to expect, and the knobs"]
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
