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
    "SparseAttentionReport": [],
}
OWN = {"SparseAttentionPatchSVG": {"sparsity": 0.7, "dense_layers": "0"}, "SparseAttentionPatchAdaSpa": {"sparsity": 0.8, "dense_layers": ""}}
SLOTS = {
    "SparseAttentionPatchSVG": (["model"], ["MODEL"]),
    "SparseAttentionPatchAdaSpa": (["model"], ["MODEL"]),
    "SparseAttentionReport": (["model", "samples"], ["LATENT", "IMAGE", "STRING"]),
}
CORE = {
    "UNETLoader", "CLIPLoader", "VAELoader", "CLIPTextEncode", "EmptyHunyuanLatentVideo", "ModelSamplingSD3", "KSampler", "VAEDecode",
    "CreateVideo", "SaveVideo", "PreviewAny", "MarkdownNote",
}

every_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def of_type(graph: dict, *types: str) -> list[dict]:
    return [node for node in graph["nodes"] if node["type"] in types]


def overlap(one: dict, other: dict) -> bool:
    """Whether two nodes, each with its title above it, cover one another."""
    title = 30
    return all(
        one["pos"][axis] - edge < other["pos"][axis] + other["size"][axis] and other["pos"][axis] - edge < one["pos"][axis] + one["size"][axis]
        for axis, edge in ((0, 0), (1, title))
    )


def test_there_is_one_for_each_method():
    assert {path.stem for path in FILES} >= {"wan_t2v_svg", "wan_t2v_adaspa"}
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
    for node in of_type(read(path), *OURS):
        expected = [(name, OWN[node["type"]].get(name, value)) for name, value in OURS[node["type"]]]
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
def test_the_patch_is_sampled_and_the_report_stands_behind_the_sampler(path):
    graph = read(path)
    sources = {(link[3], link[4]): link[1] for link in graph["links"]}

    def source(node: dict, name: str) -> int:
        return sources[node["id"], next(number for number, slot in enumerate(node["inputs"]) if slot["name"] == name)]

    (patch,), (sampler,) = of_type(graph, *OWN), of_type(graph, "KSampler")
    (report,), (decoder,) = of_type(graph, "SparseAttentionReport"), of_type(graph, "VAEDecode")
    assert source(sampler, "model") == source(report, "model") == patch["id"]
    assert source(report, "samples") == sampler["id"]
    assert source(decoder, "samples") == report["id"]


@every_file
def test_every_model_file_says_where_it_is_found(path):
    """The frontend offers to download what is missing from these."""
    graph = read(path)
    notes = "\n".join(node["widgets_values"][0] for node in of_type(graph, "MarkdownNote"))
    folders = {"UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "VAELoader": "vae"}
    loaders = of_type(graph, *folders)
    assert {node["type"] for node in loaders} == set(folders)
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] and model["directory"] == folders[node["type"]]
        assert re.fullmatch(r"https://huggingface\.co/\S+/" + re.escape(model["name"]) + r"(\?download=true)?", model["url"])
        assert model["name"] in notes and f"models/{model['directory']}" in notes


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
