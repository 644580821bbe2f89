"""The patch beside nodes that change attention, weights, steps or the model around it: before it and after it.

Most of these are ComfyUI's own nodes (SVA_HOST=real); the double has none of them, and skips them by name.
"""

import functools
import importlib

import pytest
import torch
from oracle import relative_error

METHODS = ("svg", "adaspa", "auto")
OVERRIDE = "optimized_attention_override"
FRAMES, STEPS = 5, 3
TOKENS = 64 * FRAMES  # of the tiny Wan's video

every_method = pytest.mark.parametrize("method", METHODS)
both_orders = pytest.mark.parametrize("order", ["before", "after"])


def beside(model, order, node):
    """build(patch) for Host.compare: node(model) before or after the patch."""
    return lambda patch: patch(node(model)) if order == "before" else node(patch(model))


def sampled(host, steps=STEPS, frames=FRAMES, **how):
    """run(model) for Host.compare: a short video of a tiny Wan."""
    return functools.partial(host.sample, family="wan", steps=steps, frames=frames, **how)


def compare(host, method, build, run, tokens=TOKENS, **expected):
    """Host.compare; without the patch, the other node's result is to be the same bits afterwards."""
    return host.compare(method, build, run, tokens=tokens, bypass=True, **expected)


def displaced(record):
    """What a record says of other nodes' attention."""
    return [note for note in record.notes if "another node" in note]


@pytest.fixture
def core(host):
    """core(file, name): a node of ComfyUI's own."""

    def find(file, name):
        if host.name != "real":
            pytest.skip(f"the double has no {name}")
        node = getattr(importlib.import_module(f"comfy_extras.{file}"), name, None)
        return node or pytest.skip(f"this ComfyUI has no {name}")

    return find


def at_every_step(model, key, install):
    """A clone of the model on which install(transformer_options) is called before every evaluation."""
    kind = importlib.import_module("comfy.patcher_extension").CallbacksMP.ON_PREPARE_STATE
    changed = model.clone()
    changed.add_callback_with_key(kind, key, lambda patcher, timestep, options: install(options["transformer_options"]))
    return changed


class Sage:
    """As the patch nodes for SageAttention and FlashAttention are: an override that forgets the one before, and computes all it gets.

    It rounds keys and values to bfloat16, so that what it computed shows. calls: (query tokens, key tokens) of each.
    """

    def __init__(self, host):
        self.calls, self._plain = [], host.attention().__wrapped__

    def __call__(self, func, q, k, v, *args, **kwargs):
        self.calls.append((q.shape[-2], k.shape[-2]))
        return self._plain(q, k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype), *args, **kwargs)

    def put(self, options):
        options[OVERRIDE] = lambda *args, **kwargs: self(*args, **kwargs)

    def on(self, model):
        changed = model.clone()
        self.put(changed.model_options["transformer_options"])
        return changed


# --- other attention -------------------------------------------------------------------------------------------------


@every_method
@both_orders
def test_an_attention_patch_computes_the_dense_calls_wherever_it_stands(host, method, order):
    sage = Sage(host)
    record, _ = compare(host, method, beside(host.load("wan"), order, sage.on), sampled(host), error=0.02)
    assert not displaced(record)
    sage.calls.clear()
    sampled(host)(beside(host.load("wan"), order, sage.on)(lambda model: host.patch(method, model, sparsity=0.3)))
    # AdaSpa's search computes its own dense output; cross-attention is always the other's.
    assert sage.calls.count((TOKENS, TOKENS)) == (2 if method == "svg" else 0)
    assert len(sage.calls) == 2 * STEPS + sage.calls.count((TOKENS, TOKENS))


@every_method
@both_orders
@pytest.mark.fault("Other nodes", "A SageAttention or Flash patch puts its attention on again at every step", "its attention is used, and it is said")
def test_an_attention_patch_that_comes_back_at_every_step_is_said(host, method, order, seen):
    model, sage = host.load("wan"), Sage(host)
    node = functools.partial(at_every_step, key="sage", install=sage.put)
    patched = beside(model, order, node)(lambda model: host.patch(method, model, sparsity=0.3))
    assert torch.equal(sampled(host)(patched), sampled(host)(sage.on(model)))
    record = host.record(patched)
    assert record.sparse_calls == record.dense_calls == 0
    note = "another node replaced the attention override during this run, so its attention is not this node's"
    assert record.notes == [note]
    assert host.shown[-1].text == (
        f"⚠ {record.method}: nothing ran sparse. No self-attention call of a video reached this node: another node may have replaced the attention, "
        f"or a cache skipped every step. · {note}"
    )
    seen(note)
    strict = beside(model, order, node)(lambda model: host.patch(method, model, sparsity=0.3, strict=True))
    with pytest.raises(RuntimeError, match="strict: no self-attention call of a video reached this node"):
        sampled(host)(strict)


@every_method
@pytest.mark.fault("Other nodes", "Another node's attention keeps some layers to itself", "the other layers run sparse, and it is said")
def test_an_attention_patch_that_keeps_a_layer_is_said(host, method, seen):
    def install(options):
        before = options[OVERRIDE]

        def keep_layer_0(func, *args, **kwargs):
            ours = func if kwargs["transformer_options"].get("block_index") == 0 else functools.partial(before, func)
            return ours(*args, **kwargs)

        if before not in kept:
            kept.append(keep_layer_0)
            options[OVERRIDE] = keep_layer_0

    kept = []
    patched = at_every_step(host.patch(method, host.load("wan"), sparsity=0.3), "keeper", install)
    sampled(host)(patched)
    record = host.record(patched)
    assert len(kept) == 1 and (record.sparse_calls, record.dense_calls) == (2, 1)
    note = "another node's attention override stood before this one during this run and kept some layers to itself"
    assert note in record.notes and note in host.shown[-1].text
    seen(note)


@every_method
@pytest.mark.fault("Other nodes", "Another node replaces ComfyUI's attention function itself", "its attention is used, and it is said")
def test_attention_that_asks_no_override_is_said(host, method, monkeypatch, seen):
    model, sage = host.load("wan"), Sage(host)
    host.replace_attention(monkeypatch, functools.partial(sage, None))
    patched = host.patch(method, model, sparsity=0.3)
    assert torch.equal(sampled(host)(patched), sampled(host)(model))
    assert host.record(patched).sparse_calls == 0
    text = host.shown[-1].text
    assert text == (
        f"⚠ {host.record(patched).method}: nothing ran sparse. No self-attention call of a video reached this node: "
        "another node may have replaced the attention, or a cache skipped every step."
    )
    seen(text)
    with pytest.raises(RuntimeError, match="strict: no self-attention call of a video reached this node"):
        sampled(host)(host.patch(method, model, sparsity=0.3, strict=True))


@every_method
def test_a_replaced_attention_function_that_asks_for_overrides_computes_the_dense_calls(host, method, monkeypatch):
    sage = Sage(host)
    host.replace_attention(monkeypatch, host.honouring(functools.partial(sage, None)))
    record, _ = compare(host, method, beside(host.load("wan"), "before", lambda model: model), sampled(host), error=0.02)
    assert not displaced(record)


@every_method
@both_orders
def test_the_hosts_attention_backend(host, method, order, core):
    """Model Attention Backend."""
    node = core("nodes_model_advanced", "ModelAttentionBackend")()
    record, _ = compare(host, method, beside(host.load("wan"), order, lambda model: node.patch(model, "pytorch attention")[0]), sampled(host))
    assert not displaced(record)


def model_sparse_attention(model):
    """What Model Sparse Attention of newer ComfyUIs does to a model: an override that takes calls past its warm-up, put on top at every step."""
    installed = []

    def install(options):
        before = options.get(OVERRIDE)
        if before in installed:
            return

        def override(func, q, k, v, *args, **kwargs):
            if q.shape == k.shape and float(kwargs["transformer_options"]["sigmas"][0]) < 0.9:
                return func(q, k, v.bfloat16().to(v.dtype), *args, **kwargs)
            return func(q, k, v, *args, **kwargs) if before is None else before(func, q, k, v, *args, **kwargs)

        installed.append(override)
        options[OVERRIDE] = override

    changed = at_every_step(model, "block_sparse_attention", install)
    install(changed.model_options["transformer_options"])
    return changed


@every_method
@both_orders
@pytest.mark.fault("Other nodes", "ComfyUI's own Model Sparse Attention is on the same model", "that one acts, this one steps back, and it is said")
def test_of_two_ways_to_skip_attention_the_hosts_own_acts(host, method, order, seen):
    model = host.load("wan")
    theirs = sampled(host)(model_sparse_attention(model))
    assert relative_error(theirs, sampled(host)(model)) > 1e-5, "the other node does nothing here"

    def both(**settings):
        return beside(model, order, model_sparse_attention)(lambda model: host.patch(method, model, sparsity=0.3, **settings))

    patched = both()
    assert torch.equal(sampled(host)(patched), theirs)
    record = host.record(patched)
    assert record.sparse_calls == 0 and set(record.reasons) == {"left to Model Sparse Attention"}
    note = "Model Sparse Attention is on this model too: it acts and this node does nothing; bypass one of the two"
    assert record.notes == [note]
    assert host.shown[-1].text == f"⚠ {record.method}: nothing ran sparse. Reason: left to Model Sparse Attention. · {note}"
    seen(note)
    with pytest.raises(RuntimeError, match=f"strict: {note}"):
        sampled(host)(both(strict=True))


@pytest.mark.parametrize("first, second", [("svg", "adaspa"), ("adaspa", "svg")])
@pytest.mark.fault("Other nodes", "Two patch nodes of this pack on one model", "the later one acts, and says so")
def test_of_two_patch_nodes_the_later_acts_whatever_is_between_them(host, first, second, seen):
    sage, model = Sage(host), host.load("wan")
    between = sage.on(host.patch(first, model, node_id="4", sparsity=0.2))
    patched = host.patch(second, between, node_id="5", sparsity=0.3)
    (line,) = host.shown
    assert line.node == "5"
    seen(line.text)
    out = sampled(host)(patched)
    assert torch.equal(out, sampled(host)(host.patch(second, sage.on(model), sparsity=0.3)))
    assert line.text in host.record(patched).notes


# --- steps, windows, weights, compilers ------------------------------------------------------------------------------


@every_method
@both_orders
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
@pytest.mark.fault("Other nodes", "EasyCache or LazyCache skips steps", "the others run as asked, and the skipped ones are counted")
def test_beside_a_step_cache(host, method, order, name, core, seen):
    """Made to skip all it may: the same steps are skipped, and what runs is the same."""
    node = core("nodes_easycache", f"{name}Node")

    def cached(model):
        return node.execute(model, reuse_threshold=3.0, start_percent=0.15, end_percent=0.95, verbose=False).result[0]

    model, run = host.load("wan"), sampled(host, steps=6)
    record, _ = compare(host, method, beside(model, order, cached), run, counted=False)
    assert relative_error(run(cached(model)), run(model)) > 1e-4, "the cache skips nothing here"
    skipped = record.steps_without_calls
    assert 0 < skipped < 5 and record.sparse_calls == 2 * (5 - skipped)
    note = f"in {skipped} of 6 steps no attention came here, as with a step cache or a sampler that picks its own steps"
    assert note in record.notes
    seen(note)


@every_method
@both_orders
def test_in_the_hosts_context_windows(host, method, order, core):
    node = core("nodes_context_windows", "ContextWindowsManualNode")

    def windowed(model):
        return node.execute(
            model, context_length=5, context_overlap=1, context_schedule="standard_static", context_stride=1, closed_loop=False,
            fuse_method="pyramid", dim=2, freenoise=False,
        ).result[0]

    model, run = host.load("wan"), sampled(host, steps=2, frames=9)
    record, evaluations = compare(host, method, beside(model, order, windowed), run)
    assert relative_error(run(windowed(model)), run(model)) > 1e-3, "the windows do nothing here"
    windows = len(evaluations) // 2
    assert windows > 1 and sum(record.searches.values()) == (0 if method == "svg" else 2 * windows)


@every_method
@both_orders
def test_a_shift_on_either_side_sets_the_warmup(host, method, order, core):
    """Twelve even steps of sigma. A fifth of the run ends at 0.8 without a shift, at 0.9796 with 12."""
    node, model = core("nodes_model_advanced", "ModelSamplingSD3")(), host.load("wan")
    for shift, warmup in ((1.0, 3), (12.0, 1)):
        build = beside(model, order, lambda model, shift=shift: node.patch(model, shift)[0])
        patched = build(lambda model: host.patch(method, model, sparsity=0.3, cache_refresh=0))  # Auto's next search would be a dense step
        sampled(host, sigmas=torch.linspace(1, 0, 13), frames=3)(patched)
        assert host.record(patched).warmup == warmup
        assert host.record(patched).dense_calls == 2 * warmup
    compare(host, method, build, sampled(host, steps=3))


@every_method
@both_orders
def test_a_lora_on_either_side(host, method, order):
    if host.name != "real":
        pytest.skip("the double has no LoRAs")
    sd = importlib.import_module("comfy.sd")
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for part in ("self_attn.q", "self_attn.k", "ffn.0"):
        down = 256
        up = host.weights("wan")[f"blocks.1.{part}.weight"].shape[0]
        lora[f"diffusion_model.blocks.1.{part}.lora_down.weight"] = torch.randn(4, down, generator=generator) / 16
        lora[f"diffusion_model.blocks.1.{part}.lora_up.weight"] = torch.randn(up, 4, generator=generator) / 2

    def with_lora(model):
        return sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    model, run = host.load("wan"), sampled(host)
    without = run(model)
    assert relative_error(run(with_lora(model)), without) > 1e-3, "the LoRA does nothing here"
    compare(host, method, beside(model, order, with_lora), run)
    assert torch.equal(run(model), without)


@every_method
def test_a_model_of_packed_weights_with_a_patcher_of_its_own(host, method):
    """As GGUF loaders make them: layers that unpack a weight while they compute, and a patcher whose clones are of its own class."""
    if host.name != "real":
        pytest.skip("the double has no weights to pack")
    model = packed_model(host)
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    assert linear.weight.dtype == torch.int8
    run = sampled(host)
    assert 1e-4 < relative_error(run(model), run(host.load("wan"))) < 0.1, "packing changes nothing here, or all"
    compare(host, method, lambda patch: patch(model), run)
    assert type(host.patch(method, model)) is type(model) and linear.weight.dtype == torch.int8


def packed_model(host):
    """The tiny Wan with the weights of its linear layers in 8 bits."""
    patching, ops, sd = (importlib.import_module(f"comfy.{name}") for name in ("model_patcher", "ops", "sd"))

    class Operations(ops.manual_cast):
        class Linear(ops.manual_cast.Linear):
            def _load_from_state_dict(self, tensors, prefix, *args):
                weight = tensors[prefix + "weight"].float()
                scale = weight.abs().amax(1, keepdim=True) / 127
                self.weight = torch.nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
                self.register_buffer("scale", scale, persistent=False)
                if prefix + "bias" in tensors:
                    self.bias = torch.nn.Parameter(tensors[prefix + "bias"], requires_grad=False)

            def forward_comfy_cast_weights(self, x):
                bias = None if self.bias is None else self.bias.to(x.dtype)
                return torch.nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), bias)

    class PackedPatcher(patching.ModelPatcher):
        unpacked_on_device = False

        def clone(self, *args, **kwargs):
            own, self.__class__ = self.__class__, PackedPatcher
            copy = super().clone(*args, **kwargs)
            copy.__class__, self.__class__ = PackedPatcher, own
            copy.unpacked_on_device = getattr(self, "unpacked_on_device", False)
            return copy

    loaded = sd.load_diffusion_model_state_dict(host.weights("wan"), model_options={"custom_operations": Operations})
    return PackedPatcher.clone(loaded)


def test_a_compiled_model(host, core):
    """TorchCompileModel, with a backend that compiles nothing: the tracing is what the patch has to survive."""
    node, model = core("nodes_torch_compile", "TorchCompileModel"), host.load("wan")
    run = sampled(host)
    dense = run(model)
    torch._dynamo.reset()
    try:
        for order, method, sparsity in (("before", "svg", 0.3), ("after", "adaspa", 0.0)):
            build = beside(model, order, lambda model: node.execute(model, "eager").result[0])
            patched = build(lambda model, method=method, sparsity=sparsity: host.patch(method, model, sparsity=sparsity))
            error = relative_error(run(patched), dense)
            assert 1e-5 < error < 0.3 if sparsity else error < 1e-5
            record = host.record(patched)
            assert (record.model, record.sparse_calls, record.dense_calls) == ("Wan 2.1 / 2.2", 4, 2)
            assert abs(record.achieved_sparsity - sparsity) <= 64 / TOKENS
    finally:
        torch._dynamo.reset()
    assert torch.equal(run(model), dense)
