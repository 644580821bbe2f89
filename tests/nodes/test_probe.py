"""The probe nodes: what a probed run measures, what it leaves alone, and suggestions that fit the patch nodes."""

import asyncio
import gc
import importlib
import json
import math

import pytest
import torch
from load_pack import ROOT
from oracle import attention, relative_error

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)
PROBE, RESULTS = "SparseAttentionProbe", "SparseAttentionProbeResults"
SLOWER = "slower than usual: a probe computed 12 calls both ways"
LATENT = {"samples": torch.zeros(1, 16, 9, 16, 16)}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


# Model 1, patch 5, probe 4, sampler 6, results 8; then a second patch, 9, with what was suggested.
PROMPT = {
    "1": node("UNETLoader", unet_name="wan"), "5": node("SparseAttentionPatchSVG", model=["1", 0]), "4": node(PROBE, model=["5", 0]),
    "6": node("KSampler", model=["4", 0], seed=3), "8": node(RESULTS, model=["4", 0], samples=["6", 0]),
    "9": node("SparseAttentionPatchSVG", model=["1", 0], dense_layers=["8", 3], sparsity=["8", 4]),
    "10": node("SparseAttentionPatchAdaSpa", model=["1", 0], dense_layers=["8", 3], sparsity=["8", 4]),
}


def probed(host, model, **settings):
    return host.execute(PROBE, {"model": model, **settings}, "4").result[0]


def results(host, model, max_error=0.2):
    """(table, data, dense_layers, sparsity)"""
    inputs = {"model": model, "samples": LATENT, "max_error": max_error}
    samples, table, text, dense_layers, sparsity = host.execute(RESULTS, inputs, "8", PROMPT).result
    assert samples is LATENT
    return table, json.loads(text), dense_layers, sparsity


def measured(host, method, family="wan", probe=None, max_error=0.2, cfg=1.0, padded=False, steps=4, **settings):
    """The results of a probed run."""
    model = probed(host, host.patch(method, host.load(family), **settings), **(probe or {}))
    host.sample(model, family, steps=steps, cfg=cfg, padded=padded)
    return results(host, model, max_error)


@pytest.fixture
def spied(monkeypatch):
    """What the probe computes sparsely: (call, session, output)."""
    module, seen = importlib.import_module("pack.attention.probe"), []
    right = module.sparse_attention

    def sparse_attention(call, session):
        output = right(call, session)
        seen.append((call, session, output))
        return output

    monkeypatch.setattr(module, "sparse_attention", sparse_attention)
    return seen


@every_method
def test_the_errors_are_those_of_the_definition(host, spied, method):
    """In float64, from the very tensors that the model called with."""
    table, data, _, _ = measured(host, method, probe={"steps": 0}, sparsity=0.6)
    errors = {}
    for call, session, output in spied:
        if isinstance(output, torch.Tensor):
            exact = attention(call.q, call.k, call.v)[0]
            rows = errors.setdefault((session.config.sparsity, call.layer), [])
            rows.append([relative_error(output[:, head], exact[:, head]) for head in range(2)])
    asked = [row["asked"] for row in data["sparsities"]]
    assert asked == [0.6, 0.4, 0.2] and set(errors) == {(sparsity, layer) for sparsity in asked for layer in (0, 1)}
    for row in data["sparsities"]:
        expected = {str(layer): torch.tensor(errors[row["asked"], layer]).mean().item() for layer in (0, 1)}
        assert row["error_by_layer"] == pytest.approx(expected, rel=1e-3, abs=2e-6)
        assert row["achieved"] == pytest.approx(row["asked"], abs=64 / 576)
    expected = {(layer, head): sum(row[head] for row in errors[0.6, layer]) / 3 for layer in (0, 1) for head in (0, 1)}
    worst = {(row["layer"], row["head"]): row["error"] for row in data["worst"]}
    assert worst == pytest.approx(expected, rel=1e-3, abs=2e-6) and list(worst.values()) == sorted(worst.values(), reverse=True)
    assert (data["schema"], data["calls"], data["steps"], data["outcome"]) == (1, 6, [1, 2, 3], "finished")
    assert [f"{row['error']:.3f}" in table for row in data["worst"]] == [True] * 4


@every_method
def test_a_bad_layer_comes_first_and_what_is_suggested_fits_the_patches(host, monkeypatch, method):
    module = importlib.import_module("pack.attention.probe")
    right = module.sparse_attention

    def spoiled(call, session):
        output = right(call, session)
        return output + 3 * output.std() if isinstance(output, torch.Tensor) and call.layer == 1 else output

    monkeypatch.setattr(module, "sparse_attention", spoiled)
    table, data, dense_layers, sparsity = measured(host, method, max_error=2.0)
    monkeypatch.undo()
    assert [row["layer"] for row in data["worst"]] == [1, 1, 0, 0]
    assert isinstance(dense_layers, str) and isinstance(sparsity, float)
    kept = ["how much is skipped follows from the patch's fidelity, which is kept: it alone was measured"]
    assert (dense_layers, sparsity) == ("1", {"svg": 0.7, "adaspa": 0.8, "auto": -1}[method])
    assert data["suggestion"]["notes"] == (kept if method == "auto" else [])
    assert 'dense_layers "1"' in table and 'dense_layers "1"' in host.shown[-1].text and host.shown[-1].node == "8"
    for name in METHODS:
        patched = host.patch(name, host.load("wan"), dense_layers=dense_layers, sparsity=sparsity)
        host.sample(patched, "wan")
        record = host.record(patched)
        # All but the warm-up step; SVG has none in so short a run where no sparsity is asked for.
        expected = 4 if name == "svg" and sparsity == -1 else 3
        assert (record.sparse_calls, record.reasons["dense layer"] > 0) == (expected, True)


@pytest.mark.parametrize("method", ["svg", "adaspa"])
def test_the_suggestion_keeps_the_bound(host, method):
    model = probed(host, host.patch(method, host.load("wan")), sparsities="0.1, 0.3, 0.5", steps=0)
    host.sample(model, "wan")
    errors = sorted({value for row in results(host, model)[1]["sparsities"] for value in row["error_by_layer"].values()})
    for bound in (*(value * 1.0001 for value in errors), errors[0] / 2):
        _, data, dense_layers, sparsity = results(host, model, bound)
        row = next(row for row in data["sparsities"] if row["asked"] == sparsity)
        dense = {str(layer) for layer in (0, 1) if str(layer) in dense_layers.replace("0-1", "0, 1")}
        kept = [error for layer, error in row["error_by_layer"].items() if layer not in dense]
        assert all(error <= bound for error in kept) and len(kept) == 2 - len(dense)
        # No other measured pair skips more.
        shares = [one["achieved"] * sum(error <= bound for error in one["error_by_layer"].values()) / 2 for one in data["sparsities"]]
        assert data["suggestion"]["skipped"] == pytest.approx(max(shares), abs=1e-5) == pytest.approx(row["achieved"] * len(kept) / 2, abs=1e-5)
    assert (dense_layers, data["suggestion"]["skipped"]) == ("0-1", 0)


@pytest.mark.parametrize("sparsities", ["auto", "", "0.5, 0.2"])
def test_what_a_fidelity_leaves_is_measured_alone_and_no_sparsity_is_made_up(host, spied, sparsities):
    model = probed(host, host.patch("auto", host.load("wan"), fidelity=0.9), steps=0, sparsities=sparsities)
    host.sample(model, "wan")
    (row,) = results(host, model)[1]["sparsities"]
    errors = [
        relative_error(output[:, head], attention(call.q, call.k, call.v)[0][:, head])
        for call, _, output in spied if isinstance(output, torch.Tensor) and call.layer == 0 for head in range(2)
    ]
    assert row["asked"] is None and row["error_by_layer"]["0"] == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=2e-6) and len(errors) == 6
    assert row["achieved"] == pytest.approx(host.record(model).achieved_sparsity, abs=1e-6)
    bound = (row["error_by_layer"]["0"] + row["error_by_layer"]["1"]) / 2
    bad = max(row["error_by_layer"], key=row["error_by_layer"].get)
    for most, layers in ((10.0, ""), (bound, bad), (1e-6, "0-1")):
        table, data, dense_layers, sparsity = results(host, model, most)
        line = host.shown[-1].text
        assert (dense_layers, sparsity, data["suggestion"]["sparsity"]) == (layers, -1, None)
        assert f'suggested: dense_layers "{layers}" · ' in line and ", sparsity" not in line and "sparsity -1" not in table
        assert ("no probed layer stays at or under 1e-06: allow a larger error, or raise the patch's fidelity" in line) == (layers == "0-1")
        (asked,) = [line for line in table.splitlines() if line.startswith("asked ")]
        assert asked.split() == ["asked", "-"] and "\nerror of each head\n" in table


def test_the_table_shows_what_was_skipped_at_each_asked_sparsity(host):
    """9 latent frames, the first of them always kept: 0.9 and 0.8 come to the same, and the suggestion stays with what the patch asks."""
    table, data, dense_layers, sparsity = measured(host, "svg", probe={"sparsities": "0.9, 0.3"}, max_error=5.0, sparsity=0.8)
    lines = table.splitlines()
    place = lines.index("mean error of each layer, by sparsity; skipped: what each came to in the measured calls")
    asked, skipped = (line.split() for line in lines[place + 1:place + 3])
    assert (asked, skipped[0], lines[place + 3]) == (["asked", "0.8", "0.9", "0.3"], "skipped", "layer")
    achieved = [row["achieved"] for row in data["sparsities"]]
    assert achieved[0] == achieved[1] < 0.75 and 0.2 < achieved[2] < 0.4
    assert skipped[1:] == [f"{share:.3f}" for share in achieved]
    errors = data["sparsities"][0]["error_by_layer"]
    assert errors == data["sparsities"][1]["error_by_layer"] != data["sparsities"][2]["error_by_layer"]
    assert {line.split()[0]: line.split()[1:3] for line in lines[place + 4:place + 6]} == {layer: [f"{errors[layer]:.3f}"] * 2 for layer in "01"}
    assert (dense_layers, sparsity) == ("", 0.8) and f"sparsity 0.8 ({achieved[0]:.0%} of the measured layers' attention skipped)" in lines[0]


def of_a_run():
    """All objects alive that a run makes for itself."""
    gc.collect()
    kinds = {"Session", "LayerState", "Probe"}
    return [one for one in gc.get_objects() if type(one).__name__ in kinds and type(one).__module__.startswith("pack.")]


@every_method
def test_the_video_is_that_of_a_run_without_a_probe(host, method):
    others = {id(one): one for one in of_a_run()}  # of tests before this one
    patched = host.patch(method, host.load("wan"))
    expected = host.sample(patched, "wan", cfg=2.0)
    model = probed(host, patched, steps=0)
    assert torch.equal(host.sample(model, "wan", cfg=2.0), expected)
    plain, seen = host.records(patched)
    assert plain.probe is None and seen.probe.calls == 12 and seen.notes == [*plain.notes, SLOWER]
    for figure in ("sparse_calls", "dense_calls", "reasons", "searches", "achieved_sparsity"):
        assert getattr(seen, figure) == getattr(plain, figure)
    # Nothing stays on the model that was patched, nor of the run.
    assert torch.equal(host.sample(patched, "wan", cfg=2.0), expected) and host.record(patched).probe is None
    assert [one for one in of_a_run() if id(one) not in others] == []


def test_the_video_may_go_on_dense(host):
    dense = host.sample(host.load("wan"), "wan")
    patched = host.patch("svg", host.load("wan"))
    assert torch.allclose(host.sample(probed(host, patched, steps=0, continue_with="dense"), "wan"), dense, atol=1e-5)
    assert not torch.allclose(host.sample(probed(host, patched, steps=1, continue_with="dense"), "wan"), dense, atol=1e-3)


@every_method
@pytest.mark.parametrize("family, padded", [("hunyuan", True), ("hunyuan", False), ("ltxv", False), ("cogvideox", False)])
def test_other_families(host, spied, family, padded, method):
    """Layouts with text, a mask, and other ways of calling."""
    _, data, _, _ = measured(host, method, family, {"steps": 0, "sparsities": ""}, padded=padded, sparsity=0.5)
    layers = host.layers[family]
    assert data["calls"] == 3 * layers and list(data["sparsities"][0]["error_by_layer"]) == [str(layer) for layer in range(layers)]
    expected = {}
    for call, _, output in spied:
        if isinstance(output, torch.Tensor):
            exact = attention(call.q, call.k, call.v, key_bias=call.key_bias, scale=call.scale)[0]
            for head in range(output.shape[1]):
                expected.setdefault((call.layer, head), []).append(relative_error(output[:, head], exact[:, head]))
    found = {(row["layer"], row["head"]): row["error"] for row in data["worst"]}
    assert found == pytest.approx({place: sum(values) / 3 for place, values in expected.items()}, rel=1e-2, abs=1e-5)


@every_method
def test_conditions_together_or_apart_measure_the_same(host, batched, method):
    found = []
    for together in (True, False):
        batched(together)
        found.append(measured(host, method, cfg=2.0)[1])
    assert found[0]["calls"] == found[1]["calls"] == 12
    assert [row["error"] for row in found[0]["worst"]] == pytest.approx([row["error"] for row in found[1]["worst"]], rel=1e-2)


def test_the_dense_side_is_the_hosts_own_attention(host):
    """Once a call for all conditions, through whatever other nodes have put there."""
    seen = []

    def other(before, func, *args, **kwargs):
        seen.append(args[0].shape)
        return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

    counts = []
    for probe in (False, True):
        model = host.patch("svg", host.override(host.load("wan"), other))
        model = probed(host, model, layers="1", steps=2) if probe else model
        seen.clear()
        host.sample(model, "wan", cfg=2.0)
        counts.append(len(seen))
    assert counts[1] - counts[0] == 2


def test_layers_and_steps_are_chosen(host):
    _, data, _, _ = measured(host, "svg", probe={"layers": "-1", "steps": 1, "sparsities": "0.2"})
    assert (data["calls"], data["steps"], list(data["sparsities"][0]["error_by_layer"])) == (1, [2], ["1"])
    assert data["suggestion"]["notes"][-1] == "1 of 2 layers were not measured and are left sparse"
    _, data, _, _ = measured(host, "svg", probe={"most_layers": 1, "steps": 2})
    assert (data["calls"], data["steps"], list(data["sparsities"][0]["error_by_layer"])) == (2, [1, 3], ["1"])


def test_the_patchs_dense_layers_stay_in_the_suggestion(host):
    _, data, dense_layers, _ = measured(host, "svg", dense_layers="0", max_error=5.0)
    assert dense_layers == "0" and list(data["sparsities"][0]["error_by_layer"]) == ["1"]


def test_a_probe_that_fails_leaves_the_video_alone(host, monkeypatch):
    module = importlib.import_module("pack.attention.probe")
    patched = host.patch("svg", host.load("wan"))
    expected = host.sample(patched, "wan")

    def broken(sparse, dense):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(module, "relative_errors", broken)
    model = probed(host, patched)
    assert torch.equal(host.sample(model, "wan"), expected)
    assert host.record(model).sparse_calls == 6 and "out of paper" in host.shown[-1].text
    table, data, dense_layers, sparsity = results(host, model)
    assert (dense_layers, sparsity) == ("", 0.7) and "out of paper" in table and "out of paper" in data["probe_ended_early"]


def test_an_interrupted_run_tells_what_it_measured(host):
    def stop(step, *_):
        if step == 1:
            raise host.interrupt

    model = probed(host, host.patch("svg", host.load("wan")), steps=0)
    with pytest.raises(host.interrupt):
        host.sample(model, "wan", callback=stop)
    data = results(host, model)[1]
    assert (data["outcome"], data["steps"], data["calls"]) == ("interrupted", [1], 2)


def test_a_run_without_a_sparse_call_says_so(host):
    table, data, dense_layers, sparsity = measured(host, "svg", warmup_steps=4)
    assert (data["worst"], dense_layers, sparsity) == ([], "", 0.7) and "nothing was measured" in table


def test_a_run_that_was_not_probed(host):
    patched, unsampled = host.patch("svg", host.load("wan")), host.patch("svg", host.load("wan"))
    host.sample(patched, "wan")
    for model, words in ((patched, "not measured"), (host.load("wan"), "No sparse attention patch in this run"), (unsampled, "not been sampled")):
        table, data, dense_layers, sparsity = results(host, model)
        assert words in table and words in data["why"] and words in host.shown[-1].text
        assert (dense_layers, sparsity) == ("auto", -1.0)
        host.patch("adaspa", host.load("wan"), dense_layers=dense_layers, sparsity=sparsity)  # both are values that patches take


def test_a_model_without_a_patch_passes_through(host):
    model = host.load("wan")
    assert probed(host, model) is model
    assert "no sparse attention patch" in host.shown[-1].text and host.shown[-1].node == "4"


@every_method
def test_a_later_patch_is_probed_in_its_turn(host, method):
    """The order of nodes hardly matters: a patch after the probe takes over, with the probe."""
    model = host.patch(method, probed(host, host.patch("svg", host.load("wan")), steps=1))
    host.sample(model, "wan")
    assert results(host, model)[1]["method"] == {"svg": "SVG", "adaspa": "AdaSpa", "auto": "Auto"}[method]


def test_timing_leaves_probed_calls_out(host):
    model = probed(host, host.patch("svg", host.load("wan")), layers="0", steps=0)
    host.sample(model, "wan")
    record = host.record(model)
    record.flush(wait=True)
    kinds = record.ms_by_layer()
    assert "sparse" not in kinds["0"] and "sparse" in kinds["1"] and record.call_ms("sparse") == pytest.approx(kinds["1"]["sparse"], abs=1e-3)


@pytest.mark.parametrize("knob, value", [
    ("layers", "0-"), ("layers", None), ("most_layers", -1), ("steps", 1.5), ("sparsities", "0.99"), ("sparsities", None), ("continue_with", "both"),
])
def test_a_bad_value_is_refused_by_name_before_sampling(host, knob, value):
    with pytest.raises(ValueError, match=f"^{knob}: "):
        probed(host, host.patch("svg", host.load("wan")), **{knob: value})


@pytest.mark.parametrize("bound", [0, -0.5, math.nan, math.inf, "much", None])
def test_a_bound_that_is_none_is_refused(host, bound):
    model = probed(host, host.patch("svg", host.load("wan")))
    host.sample(model, "wan", steps=2)
    with pytest.raises(ValueError, match=r"^max_error: "):
        results(host, model, bound)


def test_inputs_and_outputs_are_those_of_saved_workflows(host):
    schema = host.node(PROBE).GET_SCHEMA()
    assert [(part.id, part.io_type, getattr(part, "default", None)) for part in schema.inputs] == [
        ("model", "MODEL", None), ("layers", "STRING", ""), ("most_layers", "INT", 0), ("steps", "INT", 3), ("sparsities", "STRING", "auto"),
        ("continue_with", "COMBO", "sparse"),
    ]
    assert [bool(part.optional) for part in schema.inputs] == [False, *[True] * 5] and [part.io_type for part in schema.outputs] == ["MODEL"]
    schema = host.node(RESULTS).GET_SCHEMA()
    assert [(part.id, part.io_type, bool(part.optional)) for part in schema.inputs] == [
        ("model", "MODEL", False), ("samples", "LATENT", False), ("max_error", "FLOAT", True),
    ]
    assert [part.io_type for part in schema.outputs] == ["LATENT", "STRING", "STRING", "STRING", "FLOAT"]
    assert [part.display_name for part in schema.outputs] == ["samples", "table", "json", "dense_layers", "sparsity"]


@pytest.mark.parametrize("name", [PROBE, RESULTS])
def test_every_input_is_explained_on_the_node_and_on_its_page(host, name):
    schema = host.node(name).GET_SCHEMA()
    widgets = {part.id: part for part in schema.inputs if part.optional}
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = {row.split("**")[1]: row for row in page.splitlines() if row.startswith("| **") and "** (" in row}
    assert rows.keys() == widgets.keys() and all(f"**{part.display_name}**" in page for part in schema.outputs if part.display_name)
    for part in widgets.values():
        default = {"FLOAT": "{:.2f}", "STRING": '"{}"'}.get(part.io_type, "{}").format(part.default)
        assert rows[part.id].startswith(f"| **{part.id}** ({default}) "), rows[part.id]
        options = part.options if part.io_type == "COMBO" else []
        assert all(f"{option}: " in text for option in options for text in (part.tooltip, rows[part.id]))
    assert schema.description and schema.category == "model/patch" and all(part.tooltip for part in (*schema.inputs, *schema.outputs))


def test_what_the_page_says_of_the_json(host):
    page = (ROOT / "web" / "docs" / f"{RESULTS}.md").read_text(encoding="utf-8")
    data = measured(host, "svg")[1]
    assert [key for key in {**data, **data["suggestion"], **data["sparsities"][0], **data["worst"][0]} if f"`{key}`" not in page] == []


@pytest.mark.parametrize("method", ["svg", "adaspa"])
def test_suggestions_link_to_the_inputs_of_their_names(host, method):
    outputs = {part.display_name: part.io_type for part in host.node(RESULTS).GET_SCHEMA().outputs}
    name = {"svg": "SparseAttentionPatchSVG", "adaspa": "SparseAttentionPatchAdaSpa"}[method]
    inputs = {part.id: part for part in host.node(name).GET_SCHEMA().inputs}
    for part in ("dense_layers", "sparsity"):
        assert inputs[part].io_type == outputs[part] and not getattr(inputs[part], "socketless", None)


def test_the_host_takes_the_links(host, monkeypatch):
    """The host's own check of a prompt, for every node with a linked suggestion."""
    if host.name != "real":
        pytest.skip("the real host's check of a prompt")
    import execution

    import nodes

    classes = {cls.__name__: cls for cls in importlib.import_module("pack.nodes").NODES}
    stand_in = type("Any", (), {"RETURN_TYPES": ("MODEL", "LATENT"), "FUNCTION": "run", "INPUT_TYPES": classmethod(lambda cls: {"required": {}})})
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {**nodes.NODE_CLASS_MAPPINGS, **classes, "Any": stand_in})
    sampler = type("Sampler", (stand_in,), {"RETURN_TYPES": ("LATENT",)})
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "KSampler", sampler)
    prompt = {**PROMPT, "1": node("Any"), "6": node("KSampler")}
    for number in ("9", "10"):
        valid, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, number, {}))
        assert valid, errors
    crossed = {**prompt, "9": node("SparseAttentionPatchSVG", model=["1", 0], dense_layers=["8", 4])}
    assert not asyncio.run(execution.validate_inputs("prompt", crossed, "9", {}))[0]
