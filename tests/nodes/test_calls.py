"""Single attention calls inside a run: what the override takes, what it leaves alone, and what it says of both."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from oracle import relative_error
from torch.nn import functional as F

METHODS = ("svg", "adaspa", "auto")
FAMILIES = ("wan", "hunyuan", "ltxv", "cogvideox", "unlisted")
HEADS, DIM = 2, 64
FLOOR = torch.finfo(torch.float32).min

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def qkv(tokens=576, keys=None, batch=1, heads=HEADS):
    """q, k, v [B, S, H*D] of unit normals."""
    generator = torch.Generator().manual_seed(tokens + batch)
    return [torch.randn(batch, size, heads * DIM, generator=generator) for size in (tokens, keys or tokens, keys or tokens)]


def split(tensor, heads=HEADS):
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def exact(q, k, v, mask=None, scale=None):
    """The attention that was asked for, [B, S, H*D] in and out, by torch's own in float64; mask [B, H, S_q, S_k]."""
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(*(split(tensor).double() for tensor in (q, k, v)), attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def padding(batch=1, tokens=576):
    """bool [B, S_k]: the last tokens are no keys; of a second video, fewer."""
    return torch.arange(tokens)[None] < torch.tensor([[tokens - 100], [tokens - 40]])[:batch]


def additive(visible):
    return torch.zeros(visible.shape).masked_fill(~visible, FLOOR)


# --- masks -----------------------------------------------------------------------------------------------------------

KEY_MASKS = {
    "bool [1, S]": padding(), "bool [1, 1, S]": padding()[:, None], "bool [1, 1, 1, S]": padding()[:, None, None],
    "bool [B, 1, S]": padding(2)[:, None], "bool [B, 1, 1, S]": padding(2)[:, None, None],
    "float [1, S]": additive(padding()), "float [1, 1, S]": additive(padding()[:, None]), "float [1, 1, 1, S]": additive(padding()[:, None, None]),
    "float [B, 1, S]": additive(padding(2)[:, None]), "float [B, 1, 1, S]": additive(padding(2)[:, None, None]),
    "float [1, 1, S] of small biases": 0.5 * torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(0)),
}
OTHER_MASKS = {
    "bool [S, S]": torch.ones(576, 576).tril().bool(), "float [1, S, S]": additive(torch.ones(1, 576, 576).tril().bool()),
    "bool [1, H, 1, S]": torch.stack([padding()[0], padding(2)[1]])[None, :, None],
    "float [1, 1, S, S]": additive(torch.ones(1, 1, 576, 576).tril().bool()),
}


def as_the_host_reads_it(mask):
    """[B, H, S_q, S_k]."""
    mask = mask[None] if mask.dim() == 2 else mask
    return mask[:, None] if mask.dim() == 3 else mask


@every_method
@pytest.mark.parametrize("name", KEY_MASKS)
def test_a_mask_of_keys_stays_sparse(host, method, name):
    mask = KEY_MASKS[name]
    q, k, v = qkv(batch=2)

    def body(attend):
        # Layer 7 is new to AdaSpa here, so that it searches in this call: the second is sparse.
        outputs.extend(attend(q, k, v, HEADS, mask=mask, layer=7) for _ in range(2))

    outputs = []
    record = host.probe(method, body, sparsity=0.0)
    for out in outputs:
        assert relative_error(out, exact(q, k, v, as_the_host_reads_it(mask))) < 1e-5
    assert record.by_layer_and_step()[7][1] == 0 and set(record.reasons) <= {"warm-up step", "search step"}
    assert record.sparse_calls == (4 + 2 if method == "svg" else 4 + 1)


@every_method
@pytest.mark.parametrize("name", OTHER_MASKS)
def test_any_other_mask_runs_dense_and_its_shape_is_said(host, method, name):
    mask = OTHER_MASKS[name]
    q, k, v = qkv()
    outputs = []
    record = host.probe(method, lambda attend: outputs.extend(call(q, k, v, HEADS, mask=mask) for call in (attend, attend.unpatched)))
    assert torch.equal(*outputs)
    assert record.reasons[f"the attention mask {tuple(mask.shape)} is not one of keys"] == 1


def test_a_mask_by_position_is_read(host):
    q, k, v = qkv()
    outputs = []
    host.probe("svg", lambda attend: outputs.append(attend(q, k, v, HEADS, padding()[:, None, None])), sparsity=0.0)
    assert relative_error(outputs[0], exact(q, k, v, padding()[:, None, None])) < 1e-5


# --- layouts ---------------------------------------------------------------------------------------------------------


@every_method
def test_every_layout_of_a_call_gives_the_same(host, method):
    q, k, v = qkv()
    outputs = {}

    def body(attend):
        attend(q, k, v, HEADS, layer=7)  # AdaSpa's search: this layer is new to it
        outputs["heads by position"] = attend(q, k, v, HEADS, layer=7)
        outputs["heads by name"] = attend(q, k, v, heads=HEADS, layer=7)
        outputs["split"] = attend(split(q), split(k), split(v), HEADS, skip_reshape=True, layer=7)
        outputs["split, contiguous"] = attend(*(split(tensor).contiguous() for tensor in (q, k, v)), HEADS, skip_reshape=True, layer=7)
        packed = torch.cat([q, k, v], -1)
        outputs["views of one buffer"] = attend(*packed.chunk(3, -1), HEADS, layer=7)
        both = attend(split(q), split(k), split(v), HEADS, skip_reshape=True, skip_output_reshape=True, layer=7)
        outputs["split both ways"] = both.transpose(1, 2).flatten(2)

    record = host.probe(method, body, sparsity=0.4)
    first = outputs.pop("heads by position")
    assert relative_error(first, exact(q, k, v)) > 1e-3, "these calls were not sparse"
    for name, out in outputs.items():
        assert out.shape == first.shape and relative_error(out, first) < 1e-6, name
    assert record.sparse_calls == 4 + (7 if method == "svg" else 6)


def test_flags_by_position_are_read(host):
    """The host's own signature is (q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape)."""
    q, k, v = qkv()
    outputs = []
    record = host.probe("svg", lambda attend: outputs.append(attend(split(q), split(k), split(v), HEADS, None, None, True, True)), sparsity=0.0)
    assert outputs[0].shape == (1, HEADS, 576, DIM)
    assert relative_error(outputs[0], split(exact(q, k, v))) < 1e-5
    assert record.sparse_calls == 4 + 1 and set(record.reasons) == {"warm-up step"}


@every_method
def test_the_scale_of_a_call_is_kept(host, method):
    q, k, v = qkv()
    outputs = []
    host.probe(method, lambda attend: outputs.extend(attend(q, k, v, HEADS, scale=0.3, layer=7) for _ in range(2)), sparsity=0.0)
    for out in outputs:
        assert relative_error(out, exact(q, k, v, scale=0.3)) < 1e-5


@every_method
def test_half_precision_stays_half(host, method):
    q, k, v = (tensor.bfloat16() for tensor in qkv())
    outputs = []
    host.probe(method, lambda attend: outputs.extend(attend(q, k, v, HEADS, layer=7) for _ in range(2)), sparsity=0.0)
    for out in outputs:
        assert out.dtype == torch.bfloat16 and relative_error(out, exact(q, k, v)) < 2e-2


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_nan_and_inf_come_out_as_dense_attention_gives_them(host, method, bad):
    q, k, v = qkv()
    v[0, 300] = bad
    outputs = []
    host.probe(method, lambda attend: outputs.extend(attend(q, k, v, HEADS, layer=7) for _ in range(2)), sparsity=0.0)
    for out in outputs:
        assert torch.equal(out.isfinite(), exact(q, k, v).isfinite())


# --- calls that are left alone ---------------------------------------------------------------------------------------


@every_method
@every_family
def test_cross_attention_and_refiners_are_untouched_and_uncounted(host, family, method):
    """Every call of another shape than the video's reaches the host, and the record has the video's alone."""
    others = []

    def watch(before, func, q, k, *args, **kwargs):
        if k.shape[1 if k.dim() == 3 else 2] < 64:
            others.append(tuple(k.shape))
        return func(q, k, *args, **kwargs)

    patched = host.patch(method, host.override(host.load(family), watch), sparsity=0.4)
    host.sample(patched, family)
    record = host.record(patched)
    assert len(others) == (0 if family == "cogvideox" else 4 * 2), "four steps of two layers' cross-attention, or of a refiner of two"
    assert record.sparse_calls + record.dense_calls == 4 * host.layers[family]
    assert len(record.by_layer_and_step()) == host.layers[family]


@every_method
def test_tokens_that_do_not_fit_the_layout_run_dense_with_both_numbers(host, method):
    q, k, v = qkv(tokens=600)
    outputs = []
    record = host.probe(method, lambda attend: outputs.append(attend(q, k, v, HEADS)), sparsity=0.5)
    assert relative_error(outputs[0], exact(q, k, v)) < 1e-5
    assert record.reasons["the sequence has 600 tokens, the layout 9 x 8 x 8 video tokens has 576"] == 1


@every_method
def test_grouped_heads_run_dense_with_the_shapes(host, method):
    q, k, v = qkv(heads=4)
    k, v = k[..., : 2 * DIM], v[..., : 2 * DIM]
    outputs = []
    # Not every backend of the host can do it, so the dense answer is one that shows.
    record = host.probe(method, lambda attend: outputs.append(attend.through(lambda *args, **kwargs: q + 1, q, k, v, 4, enable_gqa=True)))
    assert torch.equal(outputs[0], q + 1)
    (reason,) = [reason for reason in record.reasons if "grouped heads" in reason]
    assert "(1, 4, 576, 64)" in reason and "(1, 2, 576, 64)" in reason


@every_method
def test_keys_of_another_length_than_the_video_run_dense(host, method):
    """As a model that keeps the keys of earlier frames would call it."""
    q, k, v = qkv(tokens=64, keys=576)
    outputs = []
    host.probe(method, lambda attend: outputs.append(attend(q, k, v, HEADS)), sparsity=0.5)
    assert relative_error(outputs[0], exact(q, k, v)) < 1e-5


def test_one_latent_frame_is_dense(host):
    patched = host.patch("svg", host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan", frames=1)
    record = host.record(patched)
    assert record.sparse_calls == 0 and record.reasons["one latent frame: there are no other frames to skip"] == 6
    assert host.shown[-1].text.startswith("⚠ SVG: nothing ran sparse.")


@every_method
def test_a_known_model_with_an_image_latent_has_no_layout(host, method):
    models = host.module("video_models")
    network = SimpleNamespace(patch_size=(1, 2, 2))
    answer = models.ROWS[0].layout_of(models.Evaluation(network, (1, 16, 8, 8), {}), models.Call(16, 16, 64, {}))
    assert answer.reason == "the latent has 4 dimensions (1, 16, 8, 8), not the 5 of a video"


# --- models that are not known ---------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("family", ["packed", "image"])
def test_an_unknown_model_runs_dense_and_says_so(host, family, method):
    if family not in host.unknown:
        pytest.skip(f"no tiny {family} model on the {host.name} host")
    model = host.load(family)
    patched = host.patch(method, model, sparsity=0.5)
    assert torch.equal(host.sample(patched, family), host.sample(model, family))
    record = host.record(patched)
    kind = type(model.get_model_object("diffusion_model")).__name__
    (reason,) = record.reasons
    assert reason.startswith(f"{kind} is not one of the video models that are covered: Wan 2.1 / 2.2, Wan VACE, ")
    assert reason.endswith("; its calls of 608 tokens do not fit a latent of 9 x 16 x 16") == (family == "packed")
    assert (record.model, record.sparse_calls, record.dense_calls) == (kind, 0, 8)
    assert host.shown[-1].text.startswith(f"⚠ {record.method}: nothing ran sparse. Reason: {kind} is not one of the video models")


@every_method
def test_a_model_that_nobody_listed_is_tried_where_its_calls_are_its_video(host, method):
    patched = host.patch(method, host.load("unlisted"), sparsity=0.5)
    host.sample(patched, "unlisted")
    record = host.record(patched)
    assert (record.model, record.sparse_calls, record.layout.seq_len) == ("UnlistedVideo", 6, 576)
    assert record.notes[0] == "layout inferred: UnlistedVideo is not one of the models that were tried, but its calls are as long as its video"
    assert record.notes[0] in host.shown[-1].text


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "in torch.compile's wrapper"])
def test_a_variant_has_a_row_of_its_own(host, compiled):
    """As ComfyUI's VaceWanModel, which is a subclass of WanModel."""
    kinds = {name: type(name, (), {})() for name in ("WanModel", "VaceWanModel", "OtherWanModel")}
    find = host.module("video_models").find
    names = {kind: find(SimpleNamespace(_orig_mod=network) if compiled else network).name for kind, network in kinds.items()}
    assert names == {"WanModel": "Wan 2.1 / 2.2", "VaceWanModel": "Wan VACE", "OtherWanModel": "OtherWanModel"}


@every_method
def test_strict_raises_for_an_unknown_model(host, method):
    patched = host.patch(method, host.load("packed"), strict=True)
    with pytest.raises(RuntimeError, match="strict: a call would run dense: PackedVideo is not one of the video models"):
        host.sample(patched, "packed")
    assert host.record(patched).outcome == "failed (RuntimeError)"


@every_method
def test_strict_lets_pass_what_the_person_chose(host, method):
    """Warm-up, last steps, dense layers, a search, cross-attention; and min_tokens."""
    patched = host.patch(method, host.load("wan"), strict=True, sparsity=0.4, dense_layers="0", end_steps=1)
    host.sample(patched, "wan")
    record = host.record(patched)
    assert (record.sparse_calls, record.dense_calls) == (2, 6)
    short = host.patch(method, host.load("wan"), strict=True, min_tokens=577)
    host.sample(short, "wan")
    assert host.record(short).reasons["576 tokens are fewer than min_tokens (577)"] > 0


@every_method
def test_strict_raises_for_a_mask_that_is_not_one_of_keys(host, method):
    mask = OTHER_MASKS["bool [S, S]"]
    with pytest.raises(RuntimeError, match=r"strict: .*attention mask \(576, 576\) is not one of keys"):
        host.probe(method, lambda attend: attend(*qkv(), HEADS, mask=mask), strict=True)


@every_method
def test_a_backend_asked_for_by_name_that_cannot_is_said(host, method, monkeypatch):
    from pack import kernels

    monkeypatch.setattr(kernels, "why_not", lambda backend, *args: "no such chip" if backend == "triton" else None)
    model = host.load("wan")
    patched = host.patch(method, model, sparsity=0.4, backend="triton")
    assert relative_error(host.sample(patched, "wan"), host.sample(model, "wan")) < 1e-6
    record = host.record(patched)
    assert record.sparse_calls == 0 and "no such chip" in record.reasons
    with pytest.raises(RuntimeError, match="no such chip"):
        host.sample(host.patch(method, model, backend="triton", strict=True), "wan")


@every_method
def test_a_backend_chosen_for_want_of_triton_is_said_with_the_package(host, method, monkeypatch):
    from pack import kernels

    sentence = 'Triton cannot be imported; for this torch install "triton==3.7.*"'
    monkeypatch.setattr(kernels, "why_not", lambda backend, *args: sentence if backend == "triton" else None)
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    assert host.record(patched).backend == "torch" and sentence in host.shown[-1].text


# --- failures --------------------------------------------------------------------------------------------------------


@every_method
def test_an_unexpected_error_is_told_once_and_the_rest_runs_dense(host, method, monkeypatch, caplog):
    from pack import kernels

    model, calls = host.load("wan"), []
    right = kernels.block_sparse_attention

    def fails_the_third_time(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise ZeroDivisionError("planted")
        return right(*args, **kwargs)

    monkeypatch.setattr(kernels, "block_sparse_attention", fails_the_third_time)
    patched = host.patch(method, model, sparsity=0.0)
    with caplog.at_level(logging.INFO, host.module("host").KEY):
        out = host.sample(patched, "wan")
    assert relative_error(out, host.sample(model, "wan")) < 1e-5
    assert len(calls) == 3
    record = host.record(patched)
    assert (record.sparse_calls, record.dense_calls) == (2, 6) and record.outcome == "finished"
    assert record.reasons["the sparse path failed (ZeroDivisionError: planted)"] == 4
    (entry,) = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert entry.exc_info is None and "in fails_the_third_time" in entry.getMessage() and "ZeroDivisionError: planted" in entry.getMessage()
    assert "the sparse path failed (ZeroDivisionError: planted) (4)" in host.shown[-1].text
    # The next run starts afresh.
    host.sample(patched, "wan")
    assert host.record(patched).sparse_calls == 6


@every_method
def test_strict_passes_an_unexpected_error_on(host, method, monkeypatch):
    from pack import kernels

    def fails(*args, **kwargs):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(kernels, "block_sparse_attention", fails)
    with pytest.raises(ZeroDivisionError, match="planted"):
        host.sample(host.patch(method, host.load("wan"), strict=True), "wan")


@every_method
def test_out_of_memory_runs_that_call_dense_and_the_rest_in_parts(host, method, monkeypatch):
    from pack import kernels

    heads, right = [], kernels.block_sparse_attention

    def short_of_memory(q, *args, **kwargs):
        heads.append(q.shape[1])
        if q.shape[1] > 1:
            raise torch.OutOfMemoryError("planted")
        return right(q, *args, **kwargs)

    monkeypatch.setattr(kernels, "block_sparse_attention", short_of_memory)
    model = host.load("wan")
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, "wan"), host.sample(model, "wan")) < 1e-5
    record = host.record(patched)
    assert (record.sparse_calls, record.reasons["out of memory in the sparse path"]) == (5, 1)
    assert heads == [2] + 10 * [1]
    assert "such calls ran dense, and later ones compute fewer heads at a time" in host.shown[-1].text


def test_an_interrupt_inside_the_sparse_path_is_no_failure_of_it(host, monkeypatch):
    from pack import kernels

    def stop(*args, **kwargs):
        raise host.interrupt

    monkeypatch.setattr(kernels, "block_sparse_attention", stop)
    patched = host.patch("svg", host.load("wan"))
    with pytest.raises(host.interrupt):
        host.sample(patched, "wan")
    assert host.record(patched).outcome == "interrupted"


# --- what the host offers --------------------------------------------------------------------------------------------


@every_method
def test_sparse_calls_run_outside_the_hosts_recording_of_allocations(host, method, monkeypatch):
    import comfy.model_prefetch
    from pack import kernels

    depth, seen = [], []

    class Pause:
        def __enter__(self):
            depth.append(None)

        def __exit__(self, *_):
            depth.pop()

    right = kernels.block_sparse_attention
    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", lambda sync=False: Pause(), raising=False)
    monkeypatch.setattr(kernels, "block_sparse_attention", lambda *args, **kwargs: (seen.append(len(depth)), right(*args, **kwargs))[1])
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    assert seen == 6 * [1] and not depth


def test_the_node_that_samples_is_on_record(host):
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan", steps=1, node="42")
    assert host.record(patched).node == "42"


def test_a_call_that_stays_dense_costs_little(host, record_property):
    """The goal is 20 microseconds; the bound here only catches a slip of an order of magnitude."""
    q, k, v = qkv()
    seconds = {}

    def best(call):
        """The least mean of 200 calls."""
        means = []
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(200):
                call()
            means.append((time.perf_counter() - start) / 200)
        return min(means)

    def func(q, *args, **kwargs):
        return q

    def body(attend):
        options = attend.options()
        override = options["optimized_attention_override"]
        seconds["self"] = best(lambda: override(func, q, k, v, heads=HEADS, _inside_attn_wrapper=True, transformer_options=options))
        seconds["cross"] = best(lambda: override(func, q, k[:, :32], v[:, :32], heads=HEADS, _inside_attn_wrapper=True, transformer_options=options))

    record = host.probe("svg", body, at=1, warmup_steps=3)
    assert record.sparse_calls == 0
    for kind, spent in seconds.items():
        record_property(f"{kind}_microseconds", round(spent * 1e6, 1))
        print(f"a dense {kind}-attention call costs {spent * 1e6:.1f} microseconds")
    assert max(seconds.values()) < 5e-4
