"""A server that runs 200 prompts, each with other settings, keeps nothing of them in the end."""

import json
import time

import pytest

pytestmark = pytest.mark.host

SVG, ADASPA, AUTO = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"
PROMPTS, EARLY = 200, 10
ALLOWED = 1 << 20
# What a run is made of; none of it may be alive when the host has let go of the prompts.
OF_RUNS = {
    "Session", "LayerState", "Found", "Bands", "VideoBlocks", "Choice", "TokenOrder", "BlockMask", "PooledBlocks", "SparsePlan", "Trial",
    "AttentionCall", "Figures", "RunRecord", "RunLog", "Probe", "ProbeRecord", "Pattern", "Plans", "Keeping", "Roles",
    "Schedule", "StatusLine", "Evaluation", "_Run", "_Active", "_Forward", "_Tables", "_Bits", "_Mean",
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def prompt(graphs, number):
    """The graph of a prompt: text to video in one to three steps, with a report, a saved pattern, a loaded one or a probe in some."""
    patch = (SVG, ADASPA, SVG, AUTO)[number % 4]
    asked = {"fidelity": 0.7 + 0.001 * number} if patch == AUTO else {"sparsity": 0.3 + 0.002 * number}
    settings = {**asked, "min_tokens": 0, "dense_layers": "", "cache_refresh": (-1, 0, 1)[number % 3]}
    model = "hunyuan" if number % 25 == 3 else "wan_head64"
    graph = graphs.graph(model, patch, settings, cfg=(1.0, 1.0, 5.0)[number % 3], steps=(1, 2, 3, 2, 3)[number % 5], seed=number)
    graph["4"]["inputs"].update(width=128, height=128, length=9)
    if number % 40 == 7:  # fails at the sampler
        graph["5"]["inputs"].update(strict=True, backend="triton")
    sampled = "6"
    if number % 10 == 4:
        graph["9"] = node("SparseAttentionSavePattern", model=["5", 0], samples=["6", 0], filename_prefix="many")
        sampled = "9"
        if number % 20 == 4:
            graph["7"] = node("SparseAttentionLoadPattern", model=["5", 0], path=["9", 1])
            graph["16"] = {**graph["6"], "inputs": {**graph["6"]["inputs"], "model": ["7", 0], "seed": number + 1}}
            sampled = "16"
    elif number % 9 == 1:
        graph["7"] = node("SparseAttentionProbe", model=["5", 0], steps=1, sparsities="0.2")
        graph["6"]["inputs"]["model"] = ["7", 0]
        graph["10"] = node("SparseAttentionProbeResults", model=["7", 0], samples=["6", 0])
    if number % 8:
        graph.pop("8")
    else:
        graph["8"]["inputs"].update(model=["7" if sampled == "16" else "5", 0], samples=[sampled, 0])
    graph["20"] = node("TestSaveLatent", samples=[sampled, 0], name="many")
    return graph


def finished(graphs, prompts):
    """Waits for prompts that were queued; says which of them failed at a node."""
    failed = []
    for number, identity in prompts.items():
        status = graphs.server.wait(identity, 600)["status"]
        if status["status_str"] != "success":
            failed.append((number, [message[1].get("exception_message", "") for message in status["messages"]][-1]))
    return failed


def memory(graphs, trace=True):
    """What of the pack is alive once the host has let go of all prompts, as its button for that does."""
    graphs.server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(0.5)
    shown = graphs.finished(graphs.server.start({"1": node("TestMemory", trace=trace)}))["outputs"]
    return json.loads(shown["1"]["text"][0])


def test_two_hundred_prompts_leave_nothing(graphs, record_property):
    started = time.monotonic()
    (graphs.server.base / "output").mkdir(exist_ok=True)
    before = memory(graphs)  # starts tracing
    graph = prompt(graphs, 224)  # one that is saved, loaded and reported
    graph["30"] = node("TestMemory", trace=True, after=["8", 0])
    within = json.loads(graphs.finished(graphs.server.start(graph))["outputs"]["30"]["text"][0])
    pictures = [name for name in within["tensors"] if name not in before["tensors"] and name.endswith(", 3)")]
    assert pictures and within["objects"]["RunLog"] and within["objects"]["_Run"], "what is alive is not seen"

    start = graphs.server.start
    failed = finished(graphs, {number: start(prompt(graphs, number)) for number in range(EARLY)})
    early = memory(graphs)
    failed += finished(graphs, {number: start(prompt(graphs, number)) for number in range(EARLY, PROMPTS)})
    late = memory(graphs, trace=False)

    assert [number for number, _ in failed] == [7, 47, 87, 127, 167] and all("strict" in words for _, words in failed)
    # The whole process's: those that the host itself keeps are the same after 10 prompts and after 200.
    assert late["tensors"] == early["tensors"]
    assert {name: count for name, count in late["objects"].items() if name in OF_RUNS} == {}
    assert late["objects"] == early["objects"]
    grown = late["bytes"] - early["bytes"]
    record_property("grown_bytes", grown)
    record_property("seconds", round(time.monotonic() - started))
    print(f"{PROMPTS} prompts in {time.monotonic() - started:.0f} s; the pack's files hold {late['bytes']} bytes, {grown} more than after {EARLY}")
    assert grown < ALLOWED
