"""The subgraph blueprints: each is found in the node library of a real browser, dropped into a graph, and run, in both designs of nodes."""

import itertools
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

FILES = sorted((Path(__file__).resolve().parent.parent.parent / "subgraphs").glob("*.json"))
every_blueprint = pytest.mark.parametrize("name", [path.stem for path in FILES])
# Its own for each run, or the host has the results of another test at hand.
_seeds = itertools.count(501)
_PUT = """async ([name, seed]) => {
  const [host] = app.graph.nodes;
  app.graph.id = crypto.randomUUID(); // as that of a workflow of its own
  const make = (type, values) => { const node = LiteGraph.createNode(type); app.graph.add(node);
    for (const [key, value] of Object.entries(values)) node.widgets.find((widget) => widget.name === key).value = value; return node; };
  host.pos = [600, 80];
  const model = make("UNETLoader", { unet_name: "wan.safetensors" }); model.pos = [20, 80];
  const words = make("TestConditioning", { seed: 1, width: 4096, tokens: 32 }); words.pos = [20, 260];
  words.widgets.find((widget) => widget.name === "control_after_generate").value = "fixed";
  const latent = make("EmptyHunyuanLatentVideo", { width: 256, height: 128, length: 33 }); latent.pos = [20, 560];
  for (const input of host.inputs.filter((input) => !input.widget)) {
    const source = { MODEL: model, CONDITIONING: words, LATENT: latent }[input.type];
    source.connect(0, host, host.inputs.indexOf(input));
  }
  const set = (node, key, value) => { const widget = node.widgets?.find((widget) => widget.name === key); if (widget) widget.value = value; };
  for (const [key, value] of Object.entries({ seed, steps: 6, switch_at_step: 3, cfg: 1, sparsity: 0.4 })) set(host, key, value);
  for (const node of host.subgraph.nodes) { set(node, "min_tokens", 0); set(node, "control_after_generate", "fixed");
    if (node.type === "SparseAttentionPatchSVG") set(node, "dense_layers", ""); }
  let y = 80;
  for (const [slot, output] of host.outputs.entries()) {
    const shown = make({ IMAGE: "PreviewImage", LATENT: "SaveLatent" }[output.type] ?? "PreviewAny", {});
    shown.title = output.name; shown.pos = [1150, y]; y += shown.size[1] + 60;
    host.connect(slot, shown, 0);
  }
  window.host = host;
  await new Promise((done) => setTimeout(done, 300));
  app.canvas.ds.reset(); app.canvas.setDirty(true, true);
}"""
_OUTSIDE = """() => host.widgets.filter((widget) => widget.type === "sparse_video_attention_panel").map((widget) => {
  const part = (name) => widget.element.querySelector(".sva-" + name);
  const box = widget.element.getBoundingClientRect();
  return { state: widget.element.dataset.state, title: part("title").textContent, head: part("head").innerText, line: part("line").textContent,
    visible: part("line").checkVisibility() && widget.element.isConnected, width: box.width, height: box.height }; })"""


def add(page, name):
    """Takes a blueprint as a person does: double click on the canvas, its name, a click on what is found, and one to put it down."""
    page.page.evaluate("() => { app.graph.clear(); app.canvas.ds.reset(); app.canvas.setDirty(true, true); }")
    page.page.wait_for_timeout(700)  # until nodes that are gone are no longer in the pointer's way
    page.page.mouse.dblclick(700, 450)
    page.page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'", timeout=10_000)
    page.page.keyboard.type(name.split(" (")[0])
    page.page.locator("#results-list [role=option]").filter(has_text=name).first.click(timeout=20_000)
    page.page.wait_for_timeout(700)
    page.page.mouse.click(400, 500)
    page.page.wait_for_function("() => app.graph.nodes.length === 1 && app.graph.nodes[0].subgraph", timeout=20_000)


def outputs(entry, page):
    """What each output of the subgraph was, by its name: texts, or files."""
    titles = page.page.evaluate("Object.fromEntries(app.graph.nodes.map((node) => [node.id, node.title]))")
    return {titles[node]: out for node, out in entry["outputs"].items() if node in titles}


@every_blueprint
def test_it_is_found_added_and_runs_and_tells_so_on_its_outside(page, name):
    entries = [entry for entry in page.server.get("/global_subgraphs").values() if entry["info"]["node_pack"] == "custom_nodes.any-folder-name"]
    assert name in {entry["name"] for entry in entries} and len(entries) == len(FILES)
    add(page, name)
    assert page.page.evaluate("app.graph.nodes[0].title") == name
    inside = page.page.evaluate(
        "app.graph.nodes[0].subgraph.nodes.map((node) => [node.type, !!node.has_errors, node.type in LiteGraph.registered_node_types])"
    )
    made = json.loads(next(path for path in FILES if path.stem == name).read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]["nodes"]
    assert sorted(inside) == sorted([node["type"], False, True] for node in made)
    page.page.evaluate(_PUT, [name, next(_seeds)])
    page.queue()
    entry = page.finished(180)
    page.picture("blueprint-" + name.split("(")[0].strip().replace(" ", "-").replace(",", ""))
    assert entry["status"]["status_str"] == "success", entry["status"]["status_str"]
    found = outputs(entry, page)
    assert set(found) == set(page.page.evaluate("host.outputs.map((output) => output.name)"))
    records = [json.loads(out["text"][0]) for title, out in found.items() if title.endswith("json")]
    assert records and all(record["sparse_calls"] > 0 for record in records)
    panels = page.page.evaluate(_OUTSIDE)
    assert [panel["state"] for panel in panels] == ["done"] * page.page.evaluate(
        'host.subgraph.nodes.filter((node) => node.type.startsWith("SparseAttentionPatch")).length'
    )
    assert all(panel["visible"] and panel["width"] > 100 and panel["height"] > 30 for panel in panels)
    for record in records:
        skipped = f"{record['achieved_sparsity']:.0%} skipped, {record['asked_sparsity']:.0%} asked"
        calls = f"{record['sparse_calls']} sparse, {record['dense_calls']} dense calls"
        assert any(panel["head"].startswith(skipped) and calls in panel["line"] for panel in panels)
    assert len({panel["title"] for panel in panels}) == len(panels), "several patches are told apart"
    assert page.errors == []


def test_what_the_probe_suggests_is_what_runs(page):
    name = "Probe, then Sparse Sampling (SVG)"
    add(page, name)
    page.page.evaluate(_PUT, [name, next(_seeds)])
    page.queue()
    found = outputs(page.finished(180), page)
    record = json.loads(found["json"]["text"][0])
    suggested = float(found["sparsity"]["text"][0])
    assert record["asked_sparsity"] == pytest.approx(suggested) and suggested in (0.8, 0.7, 0.6)
    assert record["config"]["dense_layers"] == found["dense_layers"]["text"][0]
    assert f"sparsity {suggested:g}" in found["table"]["text"][0]
    # Another seed samples again and does not measure again.
    page.page.evaluate("(seed) => { host.widgets.find((widget) => widget.name === 'seed').value = seed; }", next(_seeds))
    page.queue()
    entry = page.finished(180)
    (cached,) = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    inside = dict(page.page.evaluate("host.subgraph.nodes.map((node) => [host.id + ':' + node.id, node.title])"))
    assert "Sampler of the measured run" in {inside.get(node) for node in cached} and "KSampler" not in {inside.get(node) for node in cached}


def test_a_panel_outside_is_not_saved_and_goes_with_its_patch(page):
    name = "Sparse Sampling with Report (SVG)"
    add(page, name)
    page.page.evaluate(_PUT, [name, next(_seeds)])
    page.queue()
    page.finished(180)
    assert len(page.page.evaluate(_OUTSIDE)) == 1
    assert "sparse-video-attention " not in json.dumps(page.page.evaluate("app.graph.serialize()"))
    again = page.page.evaluate("app.graph.serialize()")
    page.page.evaluate("(graph) => app.loadGraphData(graph)", again)
    page.page.wait_for_timeout(700)
    page.page.evaluate("() => { window.host = app.graph.nodes.find((node) => node.subgraph); }")
    assert len(page.page.evaluate(_OUTSIDE)) == 1, "the newest of its own run"
    patch = "host.subgraph.nodes.find((node) => node.type === 'SparseAttentionPatchSVG')"
    told = page.page.evaluate("told.at(-1)")
    page.page.evaluate(f"() => host.subgraph.remove({patch})")
    page.page.evaluate("(data) => app.api.dispatchCustomEvent('sparse_video_attention.run', data)", told)
    page.page.wait_for_timeout(300)
    assert page.page.evaluate(_OUTSIDE) == []
    assert page.errors == []
