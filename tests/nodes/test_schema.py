"""The nodes as people meet them: what is shown and said of each input; values that fit none are refused by name.

Ids, order, types, defaults, limits and options are held by test_snapshot.py.
"""

import importlib
import math
import re
from dataclasses import fields

import pytest
from load_pack import ROOT

SVG, ADASPA, AUTO, REPORT = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto", "SparseAttentionReport"
METHODS = {SVG: "svg", ADASPA: "adaspa", AUTO: "auto"}
# The inputs that are seen without asking for the advanced ones; the first says how much is skipped, and is not the same for all.
OPEN = {name: [knob, "warmup_steps", "cache_refresh"] for name, knob in ((SVG, "sparsity"), (ADASPA, "sparsity"), (AUTO, "fidelity"))}
NAMES = {SVG: "Sparse Attention Patch (SVG)", ADASPA: "AdaSpa Patch", AUTO: "Sparse Attention Patch (Auto)", REPORT: "Sparse Attention Report"}
# What comparisons turn and nobody else: no inputs.
NO_INPUTS = {
    SVG: {"first_frame_sink", "head_types"}, ADASPA: {"block_q", "lse_cache", "always_adapt"},
    AUTO: {"sparsity", "token_order", "block_q", "selection", "scope", "skipped_blocks", "sampled_rows"},
}
# What a node got after it was released, in that order.
NEWEST = {SVG: ["precision"], ADASPA: ["precision", "skipped_blocks"]}

every_patch = pytest.mark.parametrize("name", METHODS)


def config(name):
    return importlib.import_module(f"pack.attention.methods.{METHODS[name]}").CONFIG


def test_the_extension_lists_each_node_under_its_class_name(host):
    nodes = importlib.import_module("pack.nodes").NODES
    names = [node.GET_SCHEMA().node_id for node in nodes]
    assert names == [node.__name__ for node in nodes] and len(set(names)) == len(names) and {SVG, ADASPA, REPORT} <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_can_be_found_and_read(host, name):
    schema = host.node(name).GET_SCHEMA()
    assert (schema.display_name, schema.category) == (NAMES[name], "model/patch")
    assert schema.description and all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    wanted = {"sparse attention report"} if name == REPORT else {"sparse attention", "SVG", "Sparse VideoGen", "AdaSpa", "sparse video"}
    assert wanted <= set(schema.search_aliases)


@every_patch
def test_the_inputs_of_a_patch_are_a_model_and_optional_widgets(host, name):
    model, *widgets = host.node(name).GET_SCHEMA().inputs
    assert (model.id, model.io_type, bool(model.optional)) == ("model", "MODEL", False)
    assert [part.id for part in widgets if not part.advanced] == [part.id for part in widgets[: len(OPEN[name])]] == OPEN[name]
    assert all(part.optional for part in widgets)
    assert all(part.step for part in widgets if part.io_type in ("INT", "FLOAT"))
    assert [part.io_type for part in host.node(name).GET_SCHEMA().outputs] == ["MODEL"]


@every_patch
def test_tooltips_and_help_pages_name_options_and_automatic_values(host, name):
    widgets = {part.id: part for part in host.node(name).GET_SCHEMA().inputs[1:]}
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = {row.split("**")[1]: row for row in page.splitlines() if row.startswith("| **")}
    assert rows.keys() == widgets.keys()
    for part in widgets.values():
        said = [part.tooltip, rows[part.id]]
        if part.io_type == "COMBO":
            assert all(re.search(rf"\b{option}\b", text) for option in part.options for text in said), part.id
        words = {"FLOAT": lambda value: f"{value:.2f}", "BOOLEAN": lambda value: "on" if value else "off", "STRING": lambda value: f'"{value}"'}
        default = words.get(part.io_type, str)(part.default)
        assert rows[part.id].startswith(f"| **{part.id}** ({default}) "), rows[part.id]
    automatic = {f"{tokens:,}" for tokens in importlib.import_module("pack.attention.dispatch").MIN_TOKENS.values()}
    assert all(tokens in text for tokens in automatic for text in (widgets["min_tokens"].tooltip, rows["min_tokens"]))
    chosen = ("warm-up", "dense_layers", "end_steps", "min_tokens")
    assert all(word in text.lower() for word in chosen for text in (widgets["strict"].tooltip, rows["strict"]))


def test_the_report_takes_a_model_and_samples_and_gives_three(host):
    schema = host.node(REPORT).GET_SCHEMA()
    assert [(part.id, part.io_type) for part in schema.inputs] == [
        ("model", "MODEL"), ("samples", "LATENT"), ("layer", "INT"), ("head", "INT"),
    ]
    assert [part.io_type for part in schema.outputs] == ["LATENT", "IMAGE", "STRING"]


def test_the_report_needs_samples(host):
    """Every input but `model` and `samples` is optional; without samples there is no run to tell of, and no latent to pass on."""
    assert [bool(part.optional) for part in host.node(REPORT).GET_SCHEMA().inputs] == [False, False, True, True]


@every_patch
def test_the_widgets_are_the_knobs_of_the_method_with_its_defaults(host, name):
    widgets = {part.id: part.default for part in host.node(name).GET_SCHEMA().inputs[1:]}
    knobs = {field.name: field.default for field in fields(config(name))}
    assert NO_INPUTS[name] <= knobs.keys() and widgets == {knob: default for knob, default in knobs.items() if knob not in NO_INPUTS[name]}


@pytest.mark.parametrize("name", NEWEST)
def test_a_workflow_of_before_the_newest_inputs_existed_runs_as_then(host, name):
    """Saved values stand by place: a file without the last ones gives all the others to their own inputs."""
    widgets = [part.id for part in host.node(name).GET_SCHEMA().inputs[1:]]
    saved = {SVG: [0.3, 1, 2, "1", 1, 0, 16, "torch", True], ADASPA: [0.3, 1, 2, "1", 1, 0, False, "raster", "torch", True]}[name]
    assert widgets[len(saved):] == NEWEST[name]
    patched = host.execute(name, {"model": host.load("wan"), **dict(zip(widgets, saved, strict=False))}, "5").result[0]
    host.sample(patched, "wan")
    record = host.record(patched)
    assert record.config == config(name)(
        sparsity=0.3, warmup_steps=1, cache_refresh=2, dense_layers="1", end_steps=1, min_tokens=0, backend="torch", strict=True,
        **({"sampled_rows": 16} if name == SVG else {"head_adaptive": False, "token_order": "raster"}),
    )
    assert record.config.precision == "auto" and record.sparse_calls > 0


@every_patch
def test_a_workflow_of_before_any_input_existed_still_runs(host, name):
    patched = host.execute(name, {"model": host.load("wan")}, "5").result[0]
    host.sample(patched, "wan", steps=2)
    assert host.record(patched).config == config(name)()


BAD_SPARSITY = [
    ("sparsity", 0.96), ("sparsity", -0.01), ("sparsity", math.nan), ("sparsity", math.inf), ("sparsity", "0.5"), ("sparsity", None),
]
BAD = [
    ("warmup_steps", -2), ("warmup_steps", 1.5), ("warmup_steps", math.nan), ("warmup_steps", "all"),
    ("cache_refresh", -2), ("cache_refresh", 0.5), ("cache_refresh", math.nan),
    ("end_steps", -1), ("end_steps", 2.5), ("end_steps", math.nan), ("min_tokens", -2), ("min_tokens", math.nan),
    ("dense_layers", "0-"), ("dense_layers", "one"), ("dense_layers", "5-2"), ("dense_layers", 3), ("dense_layers", None),
    ("backend", "cuda"), ("backend", ""), ("backend", None), ("strict", "yes"), ("strict", None),
    ("precision", "fp4"), ("precision", ""), ("precision", None),
]
OWN_BAD = {
    SVG: [*BAD_SPARSITY, ("sampled_rows", 0), ("sampled_rows", 4097), ("sampled_rows", 1.5), ("sampled_rows", math.nan)],
    ADASPA: [
        *BAD_SPARSITY, ("token_order", "rows"), ("token_order", None), ("head_adaptive", "yes"), ("head_adaptive", None),
        ("skipped_blocks", "median"), ("skipped_blocks", None), ("skipped_blocks", True),
    ],
    AUTO: [("fidelity", value) for value in (1.0, 0.9991, -0.01, -1, math.nan, math.inf, "0.9", None, True)],
}


@pytest.mark.parametrize("name, knob, value", [(name, *bad) for name in METHODS for bad in BAD + OWN_BAD[name]], ids=repr)
def test_a_bad_value_is_refused_by_name_before_sampling(host, name, knob, value):
    with pytest.raises(ValueError, match=f"^{knob}: "):
        host.execute(name, {"model": host.load("wan"), knob: value}, "5")


@pytest.mark.parametrize("text, part", [("0-2, x", '"x"'), ("1,,2-", '"2-"'), ("7-3", '"7-3"'), ("-1--3", '"-1--3"')])
def test_the_part_of_dense_layers_that_does_not_parse_is_named(host, text, part):
    with pytest.raises(ValueError) as caught:
        host.execute(SVG, {"model": host.load("wan"), "dense_layers": text}, "5")
    assert "dense_layers" in str(caught.value) and part in str(caught.value)


@every_patch
def test_an_unknown_setting_is_refused(host, name):
    with pytest.raises(TypeError, match="no_such_knob"):
        host.execute(name, {"model": host.load("wan"), "no_such_knob": 1}, "5")


def test_a_node_that_is_told_its_id_is_cached_by_it(host):
    """Else a copy of a patch is served the first one's output, and its line goes to the first one."""
    for node in importlib.import_module("pack.nodes").NODES:
        schema = node.GET_SCHEMA()
        assert schema.not_idempotent == ("unique_id" in {hidden.name for hidden in schema.hidden}), node.__name__
