"""The pack in a real ComfyUI, through its own HTTP API, with tiny models of every family."""

import math
import re
import time
import urllib.request

import pytest
import torch
from oracle import relative_error

pytestmark = pytest.mark.host

SVG, ADASPA, REPORT = "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionReport"
FAMILIES = ("wan", "hunyuan", "ltxv", "cogvideox")
LAYERS = {"wan": 2, "wan_head64": 2, "wan_i2v": 2, "hunyuan": 3, "ltxv": 2, "cogvideox": 2}
TOKENS = {"wan": 1152, "wan_head64": 1152, "wan_i2v": 1152, "hunyuan": 1152 + 32, "ltxv": 1152, "cogvideox": 1152 + 32}
BLOCK_K = 64
# The videos are short, and every layer is to take part.
ALL = {"min_tokens": 0, "dense_layers": ""}

every_method = pytest.mark.parametrize("patch", [SVG, ADASPA], ids=["svg", "adaspa"])


def assert_sparse(data, model, sparsity, conditions=1, steps=3, dense_steps=1):
    """The record of a run in which all went as asked: the budget within a block, and every call counted."""
    assert data["asked_sparsity"] == sparsity and data["outcome"] == "finished" and data["tokens"] == TOKENS[model]
    limits = [note for note in data["notes"] if "can be skipped" in note]
    assert limits or abs(data["achieved_sparsity"] - sparsity) <= BLOCK_K / TOKENS[model]
    calls = LAYERS[model] * conditions
    assert (data["sparse_calls"], data["dense_calls"]) == (calls * (steps - dense_steps), calls * dense_steps)
    assert set(data["reasons"]) == {"warm-up step" if data["method"] == "SVG" else "search step"}
    assert (data["steps"], data["layers"], data["backend"]) == (steps, LAYERS[model], "torch")


def assert_picture(image):
    assert image.dim() == 4 and image.shape[0] == 1 and image.shape[3] == 3
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name, aliases",
    [
        (SVG, "Sparse Attention Patch (SVG)", {"sparse attention", "SVG", "Sparse VideoGen", "sparse video"}),
        (ADASPA, "AdaSpa Patch", {"sparse attention", "AdaSpa", "sparse video"}), (REPORT, "Sparse Attention Report", {"sparse attention report"}),
    ],
    ids=["svg", "adaspa", "report"],
)
def test_the_host_lists_the_node(server, folder, kind, name, aliases):
    info = server.get(f"/object_info/{kind}")[kind]
    assert (info["display_name"], info["category"], info["name"]) == (name, "model/patch", kind)
    assert info["python_module"] == f"custom_nodes.{folder}"
    assert aliases <= set(info["search_aliases"]) and info["description"]
    assert list(info["input"]["required"]) == (["model", "samples"] if kind == REPORT else ["model"])


def test_the_help_pages_are_served_and_name_every_widget(plain_folder):
    server, folder = plain_folder
    for kind in (SVG, ADASPA, REPORT):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/extensions/{folder}/docs/{kind}.md", timeout=30) as answer:
            text = answer.read().decode()
        assert answer.status == 200 and text.startswith("# ")
        widgets = server.get(f"/object_info/{kind}")[kind]["input"].get("optional", {})
        assert [name for name in widgets if f"**{name}**" not in text and f"`{name}`" not in text] == []


# --- what runs compute -----------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("model, cfg", [("wan", 1.0), ("wan", 5.0), ("hunyuan", 1.0), ("hunyuan", 5.0), ("ltxv", 1.0), ("ltxv", 5.0)])
def test_at_sparsity_0_the_video_is_the_unpatched_models(graphs, model, cfg, patch):
    latent, data, _ = graphs.run(graphs.graph(model, patch, {"sparsity": 0.0, **ALL}, cfg=cfg))
    assert relative_error(latent, graphs.dense(model, cfg=cfg)) < 1e-5
    assert_sparse(data, model, 0.0, conditions=1 if cfg == 1 else 2)
    assert data["achieved_sparsity"] == 0


@every_method
@pytest.mark.parametrize("model, cfg", [("wan", 1.0), ("wan", 5.0), ("hunyuan", 1.0), ("hunyuan", 5.0), ("ltxv", 1.0), ("ltxv", 5.0)])
def test_half_is_skipped_where_half_is_asked(graphs, model, cfg, patch):
    latent, data, image = graphs.run(graphs.graph(model, patch, {"sparsity": 0.5, **ALL}, cfg=cfg))
    assert 1e-5 < relative_error(latent, graphs.dense(model, cfg=cfg)) < 0.3
    assert_sparse(data, model, 0.5, conditions=1 if cfg == 1 else 2)
    assert data["run_sparsity"] == pytest.approx(data["achieved_sparsity"] * 2 / 3, abs=1e-5)
    assert_picture(image)


@every_method
@pytest.mark.parametrize("model", ["wan_head64", "wan_i2v"])
def test_the_other_wans(graphs, model, patch):
    latent, data, _ = graphs.run(graphs.graph(model, patch, {"sparsity": 0.0, **ALL}))
    assert relative_error(latent, graphs.dense(model)) < 1e-5
    assert_sparse(data, model, 0.0)
    latent, data, _ = graphs.run(graphs.graph(model, patch, {"sparsity": 0.5, **ALL}))
    assert_sparse(data, model, 0.5)


@every_method
def test_padded_text_stays_sparse(graphs, patch):
    dense = graphs.dense("hunyuan", padded=True)
    assert relative_error(dense, graphs.dense("hunyuan")) > 1e-4, "the padding mask does nothing here"
    latent, data, _ = graphs.run(graphs.graph("hunyuan", patch, {"sparsity": 0.0, **ALL}, padded=True))
    assert relative_error(latent, dense) < 1e-5
    assert_sparse(data, "hunyuan", 0.0)
    _, data, _ = graphs.run(graphs.graph("hunyuan", patch, {"sparsity": 0.5, **ALL}, padded=True))
    assert_sparse(data, "hunyuan", 0.5)


@every_method
@pytest.mark.parametrize("model", FAMILIES)
def test_a_batch_of_two(graphs, model, patch):
    latent, data, _ = graphs.run(graphs.graph(model, patch, {"sparsity": 0.0, **ALL}, batch=2, steps=2))
    assert latent.shape[0] == 2 and relative_error(latent, graphs.dense(model, batch=2, steps=2)) < 1e-5
    assert_sparse(data, model, 0.0, steps=2)


@every_method
def test_bfloat16(graphs, patch):
    graph = graphs.graph("wan", patch, {"sparsity": 0.5, **ALL}, steps=2)
    graph["12"] = {"class_type": "ModelComputeDtype", "inputs": {"model": ["1", 0], "dtype": "bf16"}}
    graph["5"]["inputs"]["model"] = ["12", 0]
    latent, data, _ = graphs.run(graph)
    assert 1e-4 < relative_error(latent, graphs.dense("wan", steps=2)) < 0.3
    assert_sparse(data, "wan", 0.5, steps=2)


@every_method
def test_automatic_settings_are_the_models_own(graphs, patch):
    _, data, _ = graphs.run(graphs.graph("wan", patch, {"min_tokens": 0, "sparsity": -1, "dense_layers": "auto"}))
    assert data["asked_sparsity"] == (0.7 if patch == SVG else 0.8) and data["reasons"].get("dense layer", 0) == (2 if patch == SVG else 0)
    assert data["automatic_settings"].startswith("SVG's scripts for Wan 2.1 14B")


@every_method
def test_strict_makes_an_error_of_it_at_the_sampler(graphs, patch):
    with pytest.raises(RuntimeError, match=r"^node 6 \(KSampler\): RuntimeError: .*strict: a call would run dense: .*Triton"):
        graphs.run(graphs.graph("cogvideox", patch, {"strict": True, "backend": "triton", **ALL}))


@every_method
def test_a_workflow_of_before_any_input_existed(graphs, patch):
    latent, data, _ = graphs.run(graphs.graph("wan", patch, steps=2))
    assert torch.equal(latent, graphs.dense("wan", steps=2))
    assert data["sparse_calls"] == 0 and "1,152 tokens are fewer than min_tokens (4,096)" in data["reasons"]
    assert data["asked_sparsity"] == {SVG: 0.7, ADASPA: 0.8}[patch]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch, inputs, words",
    [
        (SVG, {"dense_layers": "0-2, last"}, 'dense_layers: cannot read "last"'),
        (ADASPA, {"dense_layers": "4-2"}, 'dense_layers: "4-2" runs backwards'),
        (SVG, {"sparsity": math.nan}, "sparsity: nan is not a number from 0 to 0.95"),
        (ADASPA, {"sparsity": math.nan}, "sparsity: nan is not a number from 0 to 0.95"),
        (ADASPA, {"sparsity": -0.1}, "sparsity: -0.1 is not a number from 0 to 0.95, or -1 for automatic"),
    ],
    ids=["a word in dense_layers", "backwards dense_layers", "nan in svg", "nan in adaspa", "negative"],
)
def test_what_the_host_lets_through_fails_at_the_node(graphs, patch, inputs, words):
    with pytest.raises(RuntimeError, match=re.escape(f"node 5 ({patch}): ValueError: {words}")):
        graphs.run(graphs.graph("wan", patch, inputs))


@pytest.mark.parametrize(
    "patch, inputs",
    [
        (SVG, {"sparsity": 0.96}), (ADASPA, {"sparsity": -1.5}), (SVG, {"warmup_steps": -2}), (SVG, {"sampled_rows": 0}),
        (ADASPA, {"token_order": "rows"}), (ADASPA, {"backend": "cuda"}),
    ],
    ids=["too sparse", "negative", "warmup_steps", "sampled_rows", "token_order", "backend"],
)
def test_what_the_host_refuses_names_node_and_input(graphs, patch, inputs):
    (name,) = inputs
    with pytest.raises(RuntimeError, match=rf"/prompt: .*{name}"):
        graphs.run(graphs.graph("wan", patch, inputs))


# --- beside other nodes ----------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("place", ["before", "after"])
def test_beside_the_hosts_step_cache(graphs, patch, place):
    """EasyCache, made to skip all it may: the same steps are skipped, and what runs is the same."""
    cache = {"reuse_threshold": 3.0, "start_percent": 0.15, "end_percent": 0.95}
    plain = graphs.graph("wan", steps=6)
    plain["12"] = graphs.with_defaults("EasyCache", model=["1", 0], **cache)
    plain["6"]["inputs"]["model"] = ["12", 0]
    dense, _, _ = graphs.run(plain)
    assert relative_error(dense, graphs.dense("wan", steps=6)) > 1e-4, "the cache skips nothing here"
    graph = graphs.graph("wan", patch, {"sparsity": 0.0, **ALL}, steps=6)
    graph["12"] = graphs.with_defaults("EasyCache", model=["1" if place == "before" else "5", 0], **cache)
    graph["5" if place == "before" else "6"]["inputs"]["model"] = ["12", 0]
    latent, data, _ = graphs.run(graph)
    assert relative_error(latent, dense) < 1e-5
    assert None in data["sparsity_by_layer_and_step"][0] and data["sparse_calls"] > 0


@every_method
def test_in_the_hosts_context_windows(graphs, patch):
    windows = {"context_length": 5, "context_overlap": 1, "dim": 2}
    plain = graphs.graph("wan", steps=2)
    plain["12"] = graphs.with_defaults("ContextWindowsManual", model=["1", 0], **windows)
    plain["6"]["inputs"]["model"] = ["12", 0]
    dense, _, _ = graphs.run(plain)
    assert relative_error(dense, graphs.dense("wan", steps=2)) > 1e-4, "the windows do nothing here"
    graph = graphs.graph("wan", patch, {"sparsity": 0.0, **ALL}, steps=2)
    graph["12"] = graphs.with_defaults("ContextWindowsManual", model=["5", 0], **windows)
    graph["6"]["inputs"]["model"] = ["12", 0]
    latent, data, _ = graphs.run(graph)
    assert relative_error(latent, dense) < 1e-5
    # Two windows or more, each with its warm-up and its search.
    assert data["sparse_calls"] == data["dense_calls"] >= 4 and len(data["reasons"]) == 1


@every_method
def test_a_shift_after_the_patch_counts(graphs, patch):
    """The warm-up's threshold is read when the run starts, from the model that is sampled."""
    shifts = {}
    for shift in (1.0, 12.0):
        graph = graphs.graph("wan", patch, {"sparsity": 0.0, **ALL}, steps=12)
        graph["12"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["5", 0], "shift": shift}}
        graph["6"]["inputs"]["model"] = ["12", 0]
        _, data, _ = graphs.run(graph)
        shifts[shift] = data["warmup_steps"]
    # The schedule "simple" is even in the model's own percent, so a fifth of it is a fifth of the steps at any shift.
    assert shifts == {1.0: 3, 12.0: 3}


@every_method
def test_two_stages_of_one_model(graphs, patch):
    """Two KSamplerAdvanced; each has a record of its own, and the second starts below the warm-up."""
    def staged(model):
        graph = graphs.graph("wan", patch if model == "5" else None, {"sparsity": 0.0, **ALL})
        common = {**graph.pop("6")["inputs"], "model": [model, 0], "steps": 6, "noise_seed": 5}
        common = {name: value for name, value in common.items() if name not in ("seed", "denoise")}
        first = {**common, "add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
        second = {**common, "add_noise": "disable", "start_at_step": 3, "end_at_step": 10, "return_with_leftover_noise": "disable"}
        graph["9"] = {"class_type": "KSamplerAdvanced", "inputs": first}
        graph["6"] = {"class_type": "KSamplerAdvanced", "inputs": {**second, "latent_image": ["9", 0]}}
        return graph

    dense, _, _ = graphs.run(staged("1"))
    latent, data, _ = graphs.run(staged("5"))
    assert relative_error(latent, dense) < 1e-5
    assert data["steps"] == 3 and data["warmup_steps"] == (0 if patch == SVG else 1)


def test_the_later_of_two_patches_wins(graphs):
    graph = graphs.graph("wan", SVG, {"sparsity": 0.5, **ALL}, steps=2)
    graph["12"] = {"class_type": ADASPA, "inputs": {"model": ["1", 0], "sparsity": 0.2, **ALL}}
    graph["5"]["inputs"]["model"] = ["12", 0]
    _, data, _ = graphs.run(graph)
    assert data["method"] == "SVG" and [note for note in data["notes"] if "gave way" in note]


# --- how runs end ----------------------------------------------------------------------------------------------------


@every_method
def test_after_an_interrupt_the_same_model_object_runs_right(graphs, server, patch):
    settings = {"sparsity": 0.0, **ALL}
    long = graphs.graph("wan", patch, settings, steps=500)
    long["20"] = {"class_type": "TestSaveLatent", "inputs": {"samples": ["6", 0], "name": "never"}}
    long.pop("8")
    started = server.log.stat().st_size
    prompt = server.start(long)
    deadline = time.monotonic() + 60
    while b"500" not in server.log.read_bytes()[started:]:  # the progress bar of its 500 steps
        assert time.monotonic() < deadline, "sampling did not start"
        time.sleep(0.1)
    server.post("/interrupt", {})
    entry = server.wait(prompt, 60)
    assert "execution_interrupted" in [message[0] for message in entry["status"]["messages"]]
    latent, data, _ = graphs.run(graphs.graph("wan", patch, settings))
    assert relative_error(latent, graphs.dense("wan")) < 1e-5
    assert_sparse(data, "wan", 0.0)


def test_the_sparse_path_never_failed_in_all_of_this(graphs, server):
    """Runs last: what was planted nowhere must not be in the host's log."""
    graphs.run(graphs.graph("wan", SVG, {"sparsity": 0.5, **ALL}))
    assert "the sparse path failed" not in server.log.read_text(errors="replace")
