"""The panel on the patch nodes, in a real browser on a real ComfyUI, in both designs of nodes."""

import itertools
import json

import pytest

pytestmark = pytest.mark.host

SVG, ADASPA, AUTO = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"
# The videos are short, and every layer is to take part.
ALL = {"dense_layers": ""}
ASKED = {SVG: {"sparsity": 0.4}, ADASPA: {"sparsity": 0.4}, AUTO: {"fidelity": 0.9}}
NODE = "app.graph.getNodeById({})"
BLUE, GREEN, AMBER, GREY = "rgb(74, 144, 217)", "rgb(63, 164, 91)", "rgb(224, 160, 48)", "rgb(138, 138, 138)"
SEND = """(data) => app.api.dispatchCustomEvent("sparse_video_attention.run", data)"""
ELEMENT = "{}.widgets.find((widget) => widget.type === 'sparse_video_attention_panel').element"
# How a panel's words lie: lines of text; pixels that need scrolling, and that reach below the node; pieces that a word is broken into.
ROOM = f"""([id, word]) => {{ const node = app.graph.getNodeById(id), root = {ELEMENT.format("node")}, line = root.querySelector(".sva-line");
const text = line.firstChild, place = text.data.indexOf(word), range = document.createRange();
range.setStart(text, place); range.setEnd(text, place + word.length);
const box = document.querySelector(`[data-node-id="${{id}}"]`)?.getBoundingClientRect();
const {{ canvas, ds }} = app.canvas, drawn = (node.pos[1] + node.size[1] + ds.offset[1]) * ds.scale + canvas.getBoundingClientRect().top;
const bottom = box?.bottom ?? drawn;
return {{ lines: line.offsetHeight / parseFloat(getComputedStyle(line).lineHeight), hidden: root.scrollHeight - root.clientHeight,
below: root.getBoundingClientRect().bottom - bottom, pieces: range.getClientRects().length }}; }}"""


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


_seeds = itertools.count(5)


def graph(steps=4, **patches):
    """Text to video with tiny models: for each patch (n5=(id, settings)) a sampler and a report of its own. With a seed and min_tokens
    of its own, or the host has the results of another test at hand.
    """
    seed = next(_seeds)
    made = {
        "1": node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default"),
        "2": node("TestConditioning", seed=1, width=4096, tokens=32, pooled=0, padded=False),
        "3": node("TestConditioning", seed=2, width=4096, tokens=32, pooled=0, padded=False),
        "4": node("EmptyHunyuanLatentVideo", width=256, height=128, length=33, batch_size=1),
    }
    for number, (kind, settings) in patches.items():
        number = number.removeprefix("n")
        made[number] = node(kind, model=["1", 0], **ALL | ASKED[kind] | {"min_tokens": seed} | settings)
        made[number + "1"] = node(
            "KSampler", model=[number, 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0],
            seed=seed, steps=steps, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )
        made[number + "2"] = node("SparseAttentionReport", model=[number, 0], samples=[number + "1", 0])
        made[number + "3"] = node("PreviewAny", source=[number + "2", 2])
    return made


def record(entry, number):
    """The run's record, from the report of patch node `number`."""
    assert entry["status"]["status_str"] == "success", entry["status"]
    return json.loads(entry["outputs"][f"{number}3"]["text"][0])


def test_both_nodes_show_their_runs_from_start_to_end(page):
    page.load(graph(24, n5=(SVG, {}), n7=(ADASPA, {"sparsity": 0.5})))
    assert page.panel(NODE.format(5)) is None
    page.queue()
    page.page.wait_for_function('() => document.querySelector(".sva-panel[data-state=running][data-figures]")', timeout=60_000)
    page.picture("running")
    entry = page.finished()
    page.picture("done")
    for number in (5, 7):
        page.assert_shows(NODE.format(number), record(entry, number))
    told = page.page.evaluate("told")
    for number in ("5", "7"):
        states = [data["state"] for data in told if data["node"] == number]
        assert states[0] == "note" and "running" in states and states[-1] == "done" and states.count("done") == 1
        steps = [data["step"] for data in told if data["node"] == number and data["state"] == "running"]
        assert steps == sorted(steps) and all(1 <= step <= 24 for step in steps)
    workflow = page.page.evaluate("app.graph.id")
    assert {data["workflow"] for data in told} == {workflow}
    saved, prompt = page.page.evaluate("async () => [app.graph.serialize(), (await app.graphToPrompt()).output]")
    assert "sparse_video_attention" not in json.dumps(saved).replace("sparse_video_attention_", "")
    assert set(prompt["5"]["inputs"]) == set(page.server.get(f"/object_info/{SVG}")[SVG]["input_order"]["required"]) | set(
        page.server.get(f"/object_info/{SVG}")[SVG]["input_order"]["optional"]
    )
    assert page.errors == []


def test_a_run_with_no_sparse_call_looks_like_a_warning(page):
    page.load(graph(n5=(SVG, {"warmup_steps": 4}), n7=(ADASPA, {})))
    page.queue()
    entry = page.finished()
    page.picture("warning")
    data, panel, good = record(entry, 5), page.panel(NODE.format(5)), page.panel(NODE.format(7))
    assert data["sparse_calls"] == 0
    assert panel["state"] == "warning" and panel["line"].startswith("⚠ SVG: nothing ran sparse.") and panel["texts"] == 1
    assert panel["head"].startswith("0% skipped, 40% asked") and panel["colour"] != good["colour"]


def test_a_run_that_skips_clearly_less_than_asked_is_amber(page):
    page.load(graph(n5=(SVG, {"sparsity": 0.95}), n7=(ADASPA, {})))
    page.queue()
    entry = page.finished()
    page.picture("short")
    data, panel = record(entry, 5), page.panel(NODE.format(5))
    assert data["achieved_sparsity"] < 0.92, "what is always kept leaves no room for so much"
    page.assert_shows(NODE.format(5), data)
    assert record(entry, 7)["achieved_sparsity"] > 0.38 and page.panel(NODE.format(7))["edge"] == GREEN
    assert (panel["colour"], panel["edge"]) == (AMBER, AMBER)
    about = {"line": "a line", "workflow": page.page.evaluate("app.graph.id"), "node": "5", "step": 4, "steps": 4, "asked": 0.4}
    ended = [("done", 0.381, GREEN), ("done", 0.38, GREEN), ("done", 0.379, AMBER), ("done", 0.5, GREEN)]
    for state, achieved, colour in [*ended, ("running", 0.1, BLUE), ("stopped", 0.1, GREY)]:
        page.page.evaluate(SEND, about | {"state": state, "achieved": achieved})
        panel = page.panel(NODE.format(5))
        assert (panel["state"], panel["edge"], panel["colour"]) == (state, colour, colour), (state, achieved)
        assert page.page.evaluate(f"getComputedStyle({ELEMENT.format(NODE.format(5))}.querySelector('.sva-line')).fontWeight") == "400"


def test_the_error_is_shown_where_that_was_asked_for(page):
    page.load(graph(n5=(AUTO, {"fidelity": 0.9}), n7=(ADASPA, {})))
    page.queue()
    entry = page.finished()
    page.picture("error")
    data = record(entry, 5)
    page.assert_shows(NODE.format(5), data)
    assert page.panel(NODE.format(5))["edge"] == (AMBER if data["measured_error"] > 1.25 * data["asked_error"] else GREEN)
    mark = f"{ELEMENT.format(NODE.format(5))}.querySelector('.sva-asked').checkVisibility()"
    assert not page.page.evaluate(mark) and page.page.evaluate(mark.replace(NODE.format(5), NODE.format(7)))
    about = {"line": "a line", "workflow": page.page.evaluate("app.graph.id"), "node": "5", "step": 4, "steps": 4, "asked": None, "achieved": 0.72}
    cases = [
        ("done", 0.1, 0.07, GREEN, "72% skipped, off by 7%, 10% asked"), ("done", 0.1, 0.125, GREEN, "72% skipped, off by 13%, 10% asked"),
        ("done", 0.1, 0.126, AMBER, "72% skipped, off by 13%, 10% asked"), ("running", 0.1, 0.2, BLUE, "72% skipped, off by 20%, 10% asked"),
        ("stopped", 0.1, 0.2, GREY, "72% skipped, off by 20%, 10% asked"), ("done", 0.01, 0.0075, GREEN, "72% skipped, off by 0.75%, 1% asked"),
        ("done", 0.5, 1.5, AMBER, "72% skipped, off by 150%, 50% asked"), ("running", 0.1, None, BLUE, "72% skipped, 10% off asked"),
    ]
    for state, asked, error, colour, words in cases:
        page.page.evaluate(SEND, about | {"state": state, "asked_error": asked, "error": error})
        panel = page.panel(NODE.format(5))
        assert (panel["state"], panel["edge"], panel["fill"], panel["asked"]) == (state, colour, "72%", ""), (state, asked, error)
        assert panel["head"].split("\n")[0] == words and not page.page.evaluate(mark)
    page.page.evaluate(SEND, about | {"state": "done", "asked": 0.7, "asked_error": None, "error": 0.3})
    assert page.panel(NODE.format(5))["head"].startswith("72% skipped, off by 30%, 70% asked") and page.page.evaluate(mark)
    assert page.errors == []


def test_a_node_left_out_of_a_prompt_shows_no_run(page):
    page.load(graph(n5=(SVG, {}), n7=(ADASPA, {})))
    page.queue()
    first = page.finished()
    page.page.evaluate(f"() => {{ {NODE.format(5)}.mode = 4; }}")
    page.queue()
    page.finished()
    page.picture("bypassed")

    def assert_left_out(node, how):
        panel = page.panel(node)
        assert panel["line"] == f"{how}: without this node every call is dense." and panel["line_visible"] and panel["texts"] == 1
        assert (panel["state"], panel["figures"], panel["edge"]) == ("left out", False, GREY)

    assert_left_out(NODE.format(5), "Bypassed")
    page.assert_shows(NODE.format(7), record(first, 7))  # its run is at hand, and still what its sampler gives
    page.page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()); }")
    page.page.wait_for_timeout(700)
    assert_left_out(NODE.format(5), "Bypassed")
    page.page.evaluate(f"() => {{ {NODE.format(5)}.mode = 0; {NODE.format(51)}.widgets.find((one) => one.name === 'seed').value += 1000; }}")
    page.queue()
    page.assert_shows(NODE.format(5), record(page.finished(), 5))
    page.page.evaluate("() => { for (const id of [5, 51, 52, 53]) app.graph.getNodeById(id).mode = 2; }")
    page.queue()
    page.finished()
    assert_left_out(NODE.format(5), "Muted")
    page.assert_shows(NODE.format(7), record(first, 7))
    assert page.errors == []


def test_a_subgraph_node_left_out_of_a_prompt_shows_no_run(page):
    page.load(graph(n5=(SVG, {})))
    page.page.evaluate("() => { window.made = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(5)])); }")
    page.queue()
    page.assert_shows("made.node", record(page.finished(), 5))
    page.page.evaluate("() => { made.node.mode = 4; }")
    page.queue()
    page.finished()
    page.picture("bypassed subgraph")
    for place in ("made.node", "made.subgraph.nodes[0]"):
        panel = page.panel(place)
        assert (panel["state"], panel["figures"]) == ("left out", False) and panel["line"].startswith("Bypassed: "), place
    page.page.evaluate("() => { made.node.mode = 0; }")
    page.queue()
    page.assert_shows("made.node", record(page.finished(), 5))


def test_the_words_of_the_other_nodes_are_not_cut(page):
    """ComfyUI's own text widget, which would show them otherwise, cuts what is longer than two lines on the classic canvas."""
    made = graph(n5=(SVG, {"sparsity": 0.9}))
    made["54"] = node("SparseAttentionProbe", model=["5", 0], steps=1)
    made["51"]["inputs"]["model"] = ["54", 0]
    made["55"] = node("SparseAttentionProbeResults", model=["54", 0], samples=["51", 0], max_error=0.001)
    made["56"] = node("SparseAttentionSavePattern", model=["54", 0], samples=["51", 0], filename_prefix="a_folder/and_a_name_of_some_length")
    page.load(made)
    page.page.evaluate("""() => { for (const [id, x] of [[55, 40], [56, 440]]) { const node = app.graph.getNodeById(id);
    node.pos = [x, 520]; node.setSize([300, node.size[1]]); } }""")
    page.queue()
    record(page.finished(), 5)
    page.picture("words")
    told = {data["node"]: data["line"] for data in page.page.evaluate("told")}
    for number, words in (("55", 'suggested: dense_layers "'), ("56", "press R to find it in Load Sparse Pattern")):
        panel = page.panel(NODE.format(number))
        assert words in panel["line"] == told[number] and panel["line_visible"]
        assert (panel["state"], panel["figures"], panel["texts"]) == ("note", False, 1)
        room = page.page.evaluate(ROOM, [int(number), words.split()[1]])
        assert room["lines"] > 2 and room["hidden"] <= 1 and room["below"] <= 1 and room["pieces"] == 1, room
    assert page.errors == []


def test_a_node_in_a_subgraph_shows_its_run(page):
    page.load(graph(n5=(SVG, {})))
    page.page.evaluate("() => { window.made = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(5)])); }")
    page.queue()
    entry = page.finished()
    told = page.page.evaluate("told")
    assert all(":" in data["node"] for data in told) and told[-1]["state"] == "done"
    page.page.evaluate("() => app.canvas.openSubgraph(made.subgraph, made.node)")
    page.page.wait_for_timeout(1000)
    page.picture("subgraph")
    page.assert_shows("made.subgraph.nodes[0]", record(entry, 5))


def test_removed_collapsed_and_foreign_nodes_and_another_workflow(page):
    page.load(graph(n5=(SVG, {}), n7=(ADASPA, {})))
    page.queue()
    entry = page.finished()
    first = page.page.evaluate("app.graph.serialize()")
    page.page.evaluate(f"() => {{ {NODE.format(5)}.collapse(); app.graph.remove({NODE.format(7)}); }}")
    page.page.wait_for_timeout(500)
    page.picture("collapsed")
    about = {"state": "running", "line": "a line", "workflow": first["id"], "step": 1, "steps": 4, "asked": 0.4, "achieved": 0.1}
    for number in ("7", "99", "4", "5:7", "51:3", "", "no number"):  # removed, unknown, of another kind
        page.page.evaluate(SEND, about | {"node": number})
    for odd in (None, {}, {"node": "5"}, {"node": "5", "line": 3}):
        page.page.evaluate(SEND, odd)
    assert page.page.evaluate("app.graph.nodes.filter((node) => node.widgets?.some((w) => w.type.startsWith('sparse_video'))).length") == 1
    panel = page.panel(NODE.format(5))
    assert panel["state"] == "done" and f"{record(entry, 5)['sparse_calls']} sparse" in panel["line"]
    page.load(graph(n5=(SVG, {})))
    assert page.page.evaluate("app.graph.id") != first["id"]
    page.page.evaluate(SEND, about | {"node": "5"})
    assert page.panel(NODE.format(5)) is None, "another workflow's run"
    page.page.evaluate("(data) => app.loadGraphData(data)", first)
    page.page.wait_for_timeout(700)
    assert page.panel(NODE.format(5))["line"] == "a line", "the newest of its own run"
    assert page.errors == []


def test_after_a_reload_in_mid_run_the_next_event_brings_the_panel(page):
    page.load(graph(60, n5=(SVG, {})))
    page.page.wait_for_timeout(1500)  # the page keeps a draft of the workflow
    page.queue()
    page.page.wait_for_function("() => told.some((data) => data.state === 'running')", timeout=60_000)
    page.reload()
    entry = page.finished()
    page.picture("reloaded")
    page.assert_shows(NODE.format(5), record(entry, 5))


def test_without_the_script_the_text_is_there_and_nothing_breaks(page):
    page.page.route("**/panel.js*", lambda route: route.abort())
    page.reload()
    page.load(graph(n5=(SVG, {})))
    page.queue()
    record(page.finished(), 5)
    page.picture("without")
    assert page.panel(NODE.format(5)) is None
    texts = page.page.evaluate("texts")
    assert texts and texts[-1]["text"].startswith("SVG · done")
    assert page.page.evaluate(f"{NODE.format(5)}.widgets.some((widget) => widget.name === '$$node-text-preview')")
    assert page.errors == []
