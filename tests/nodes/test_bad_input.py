"""What comes through the API unchecked, numbers that are none, and calls of odd shapes: refused in words, or computed as dense attention would."""

import importlib
import math
import sys
import types

import pytest
import torch
from oracle import attention, relative_error
from torch.nn import functional as F

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)
KEY, HEADS, DIM, TOKENS = "sparse_video_attention", 2, 64, 576
LONG = "x" * 100_000


# --- widgets ---------------------------------------------------------------------------------------------------------

VALUES = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-2": -2, "-1": -1, "-1.0": -1.0, "0": 0, "0.5": 0.5, "2.0": 2.0, "1e9": 1e9,
    "10**30": 10**30, "-10**30": -(10**30), "true": True, "false": False, "none": None, "empty": "", "word": "abc", "number as text": "3",
    "unicode": "\uff12, \u00fcn\u00ef \u2603 \u202e\0", "a long text": LONG, "a long number": "9" * 5000, "a list": [1], "a dict": {"a": 1},
    "bytes": b"1",
}


# What the method takes through Python where its widget offers less; ComfyUI itself keeps prompts to the widget's.
OWN_LIMITS = {"fidelity": (0.0, 0.999)}


def fits(widget, value):
    """Whether a widget may take a value, from its schema alone; limits that the nodes do not keep to are the ones of counts."""
    kind = widget.io_type
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind == "COMBO":
        return isinstance(value, str) and value in widget.options
    if kind == "STRING":
        return isinstance(value, str)
    number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
    low, high = OWN_LIMITS.get(widget.id, (widget.min, widget.max))
    return number and not math.isnan(value) and low <= value <= high


def widgets(host, name):
    return [widget for widget in host.node(name).GET_SCHEMA().inputs if widget.io_type not in ("MODEL", "LATENT")]


NODES = (
    "SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto", "SparseAttentionProbe", "SparseAttentionReport",
    "SparseAttentionProbeResults", "SparseAttentionLoadPattern", "SparseAttentionSavePattern",
)
# Text that means something has a form of its own; a file's name and the limits of a picture are told without an error.
OWN_FORM = {"dense_layers", "layers", "sparsities"}
NEVER_FAILS = {"filename_prefix", "layer", "head"}


@pytest.fixture
def sampled(host, tmp_path, monkeypatch):
    """(a patched and probed model that was sampled, its latent); pattern files go to a folder of the test."""
    if host.name == "double":
        double = types.ModuleType("folder_paths")
        double.get_save_image_path = lambda prefix, folder: (folder, "pattern", 1)
        monkeypatch.setitem(sys.modules, "folder_paths", double)
    folders = importlib.import_module("folder_paths")
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path / "output"), raising=False)
    monkeypatch.setattr(folders, "get_input_directory", lambda: str(tmp_path / "input"), raising=False)
    patched = host.patch("svg", host.load("wan"), sparsity=0.4)
    probed = host.execute("SparseAttentionProbe", {"model": patched}, "9").result[0]
    return probed, {"samples": host.sample(probed, "wan", steps=2, frames=3)}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.fault("Bad input", "a setting of a wrong type or beyond its limits, through the API", "an error at the node, by the setting's name")
def test_every_widget_at_and_beyond_its_limits(host, name, sampled, seen):
    model, samples = sampled
    prompt = {"8": {"inputs": {"samples": ["6", 0]}}}
    taken, refused = 0, {}
    for widget in widgets(host, name):
        for label, value in {**VALUES, "least": getattr(widget, "min", 0), "most": getattr(widget, "max", 0)}.items():
            inputs = {"model": model, widget.id: value}
            if any(each.io_type == "LATENT" for each in host.node(name).GET_SCHEMA().inputs):
                inputs["samples"] = samples
            try:
                result = host.execute(name, inputs, "8", prompt).result
            except ValueError as error:
                text = str(error)
                named = text.startswith(f"{widget.id}: ") or (name == "SparseAttentionLoadPattern" and text.startswith("pattern file "))
                assert named and len(text) < 400, f"{widget.id} = {label}: {text[:500]}"
                free = widget.id in OWN_FORM or name == "SparseAttentionLoadPattern"
                assert free or not fits(widget, value), f"{widget.id} = {label} is in its limits: {text}"
                refused[widget.id] = text
            else:
                taken += 1
                assert result is not None
                beyond = widget.io_type in ("INT", "FLOAT") and isinstance(value, (int, float)) and not isinstance(value, bool) and value > widget.min
                whole = widget.io_type == "FLOAT" or isinstance(value, int)
                in_limits = fits(widget, value) or (beyond and whole and not math.isnan(value))
                assert in_limits or widget.id in NEVER_FAILS or name == "SparseAttentionLoadPattern", f"{widget.id} = {label} was taken"
    assert taken and (refused or name == "SparseAttentionSavePattern")
    for text in refused.values():
        if "(" not in text and len(text) < 120 and "pattern file" not in text:
            seen(text)
            break
    else:
        seen("")


@every_method
@pytest.mark.fault("Bad input", "counts far beyond any run", "as many steps, layers or tokens as there are")
def test_settings_beyond_any_run_are_a_run(host, method, seen):
    model = host.load("wan")
    patched = host.patch(method, model, sparsity=0.95, warmup_steps=1, cache_refresh=10**30, dense_layers="5-999999999", end_steps=0, min_tokens=0)
    assert host.sample(patched, "wan").isfinite().all() and host.record(patched).sparse_calls == 6
    for settings in ({"warmup_steps": 10**30}, {"end_steps": 10**30}, {"min_tokens": 10**30}, {"dense_layers": "0-999999999, -999999999--1"}):
        dense = host.patch(method, model, **settings)
        assert relative_error(host.sample(dense, "wan"), host.sample(model, "wan")) < 1e-6
        assert host.record(dense).sparse_calls == 0 and host.shown[-1].text.startswith("⚠")
    seen("")


@pytest.mark.parametrize("name", [name for name in NODES if "Patch" in name or name.endswith("Probe")])
@pytest.mark.fault("Bad input", "a workflow or API prompt of before any setting existed: only the model is given", "the defaults")
def test_a_node_with_nothing_but_its_model(host, name, seen):
    model = host.execute(name, {"model": host.load("wan")}, "5").result[0]
    assert host.sample(model, "wan", steps=1, frames=3).isfinite().all()
    seen("")


# --- numbers that are none -------------------------------------------------------------------------------------------


def qkv(tokens=TOKENS, keys=None, batch=1):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, size, HEADS * DIM, generator=generator) for size in (tokens, keys or tokens, keys or tokens)]


def split(tensor):
    return tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def through(attend, func, tensors, mask=None):
    """A call of a layer that the model has not, where the host's own backend is `func`."""
    attend._options[KEY].evaluation.numbers.clear()
    options = attend.options(layer=7)
    override = options["optimized_attention_override"]
    return override(func, *tensors, HEADS, mask=mask, _inside_attn_wrapper=True, transformer_options=options)


def exact(q, k, v, mask=None):
    return F.scaled_dot_product_attention(*(split(tensor).double() for tensor in (q, k, v)), attn_mask=mask).transpose(1, 2).flatten(2)


# phase -> (step, warm-up steps), of three steps.
PHASES = {"warm-up": (0, 2), "search or profiling": (1, 1), "sparse": (1, 1)}


@every_method
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("what", ["a NaN", "an infinity", "all NaN", "all infinite"])
@pytest.mark.fault("Bad input", "NaN or infinite queries, keys or values", "what dense attention makes of them: never hidden, and no crash")
def test_numbers_that_are_none_pass_through(host, method, phase, what, seen):
    """In one evaluation of a run; in q, k and v in turn, and two calls of each."""
    step, warmup = PHASES[phase]
    bad = torch.nan if "NaN" in what else torch.inf
    found = []

    def body(attend):
        for number in range(3):
            tensors = qkv()
            tensors[number][0, slice(None) if what.startswith("all") else 300] = bad
            expected = exact(*tensors).isfinite()
            if phase == "sparse":  # what is planned is planned on finite ones
                attend(*qkv(), HEADS, layer=7 + number)
            for _ in range(2):
                found.append((attend(*tensors, HEADS, layer=7 + number).isfinite(), expected))

    record = host.probe(method, body, at=step + 1, sparsity=0.0, warmup_steps=warmup)
    assert len(found) == 6
    for finite, expected in found:
        assert torch.equal(finite, expected)
    assert set(record.reasons) <= {"warm-up step", "search step"} and record.outcome == "finished", record.reasons
    record.to_json()
    seen("")


@every_method
@pytest.mark.parametrize("evaluation", [1, 2, 3], ids=["warm-up", "search or profiling", "sparse"])
def test_a_run_that_turns_nan_ends_as_the_unpatched_one_does(host, method, evaluation):
    """At a sparsity, with guidance: planning meets nothing but NaN, and its figures are told all the same."""
    count = []

    def poison(executor, x, *args, **kwargs):
        count.append(None)
        return executor(x * torch.nan if len(count) == evaluation else x, *args, **kwargs)

    model = host.wrap(host.load("wan"), "DIFFUSION_MODEL", poison)
    expected = host.sample(model, "wan", cfg=5.0)
    count.clear()
    patched = host.patch(method, model, sparsity=0.5)
    out = host.sample(patched, "wan", cfg=5.0)
    assert not expected.isfinite().any() and torch.equal(out.isfinite(), expected.isfinite())
    record = host.record(patched)
    assert record.outcome == "finished" and record.sparse_calls == 12 and set(record.reasons) <= {"warm-up step", "search step"}
    assert abs(record.achieved_sparsity - 0.5) <= 64 / TOKENS
    _, _, data = host.report(patched, {"samples": out}, {"8": {"inputs": {"samples": ["6", 0]}}})
    assert data["sparse_calls"] == 12


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_what_was_planned_on_nan_is_a_plan_for_what_follows(method, bad, which):
    """Planning on NaN alone; then finite tensors under that plan: attention under its own mask, each row with a key, or what stands for some."""
    from pack.attention.dispatch import sparse_attention
    from pack.attention.methods import METHODS as MODULES
    from video_oracle import LAYOUTS, as_one_key, make_call, make_session, random_qkv, token_mask

    module = next(each for each in MODULES.values() if each.NAME.lower() == method)
    layout = LAYOUTS["4x7x9"]
    good = random_qkv(layout, heads=3, dim=32)
    poisoned = [torch.full_like(part, bad) if number == which else part for number, part in enumerate(good)]
    run = make_session(module, sparsity=0.5, cache_refresh=0)
    for step in (1, 2):
        sparse_attention(make_call(layout, poisoned, step=step), run)
    call = make_call(layout, good, step=3)
    out = sparse_attention(call, run)
    mask = token_mask(module.plan(call, run.config, run.state(call)), layout, 1, 3)
    assert method == "auto" or mask.any(-1).all()
    assert relative_error(out, attention(*good, mask, blocks=as_one_key(run.config, layout))[0]) < 1e-5


# --- lengths ---------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("tokens, keys", [(0, 0), (1, 1), (0, 5), (1, 0), (3, 1), (TOKENS, 0), (0, TOKENS), (1, TOKENS), (TOKENS + 1, TOKENS + 1)])
@pytest.mark.fault("Bad input", "attention calls without a token, or with one", "the model's own attention computes them")
def test_calls_of_every_length_are_answered(host, method, tokens, keys, seen):
    """Beside the video's own, in a sparse step: the host's attention answers, whatever it makes of them."""
    tensors, answer, outputs = qkv(tokens or 2, keys or 2), object(), []
    tensors = [tensors[0][:, :tokens], tensors[1][:, :keys], tensors[2][:, :keys]]

    def body(attend):
        outputs.append(through(attend, lambda *args, **kwargs: answer, tensors))

    record = host.probe(method, body, at=3, sparsity=0.4)
    assert outputs[0] is answer
    assert record.outcome == "finished" and record.sparse_calls == 4 and not [reason for reason in record.reasons if "failed" in reason]
    seen("")


@every_method
@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 1, 2), (2, 1, 65), (65, 1, 1)], ids=str)
@pytest.mark.parametrize("sinks", [0, 1], ids=["alone", "with text"])
def test_the_smallest_videos(method, shape, sinks):
    """What is planned for a handful of tokens is their attention under the plan's own mask; or it is dense, with a reason."""
    from pack.attention.call import Dense
    from pack.attention.dispatch import sparse_attention
    from pack.attention.layout import VideoLayout
    from pack.attention.methods import METHODS as MODULES
    from video_oracle import as_one_key, make_call, make_session, random_qkv, token_mask

    module = next(each for each in MODULES.values() if each.NAME.lower() == method)
    layout = VideoLayout(*shape, prefix=sinks)
    tensors, run = random_qkv(layout), make_session(module, sparsity=0.5)
    for step in (1, 2, 5):
        answer = sparse_attention(make_call(layout, tensors, step=step), run)
        if shape[0] < 2:
            assert isinstance(answer, Dense) and (step == 1 or "latent frame" in answer.reason or "empty" in answer.reason), answer
        elif not isinstance(answer, Dense):
            call = make_call(layout, tensors, step=step)
            mask = token_mask(module.plan(call, run.config, run.state(call)), layout, 1, 2)
            assert relative_error(answer, attention(*tensors, mask, blocks=as_one_key(run.config, layout))[0]) < 1e-5
        elif answer.output is not None:
            assert relative_error(answer.output, attention(*tensors)[0]) < 1e-5


# --- masks -----------------------------------------------------------------------------------------------------------

VISIBLE = torch.arange(TOKENS) < 500


def of(dtype):
    return torch.zeros(TOKENS, dtype=dtype).masked_fill(~VISIBLE, torch.finfo(dtype).min)


# name -> (mask, whether it is one of keys)
MASKS = {
    "1-d bool": (VISIBLE, True), "1-d float": (of(torch.float32), True), "float16 [1, 1, S]": (of(torch.float16)[None, None], True),
    "bfloat16 [1, S]": (of(torch.bfloat16)[None], True), "float64 [1, 1, 1, S]": (of(torch.float64)[None, None, None], True),
    "0-d": (torch.tensor(True), False), "1-d, too short": (VISIBLE[:-1], False), "1-d, one": (VISIBLE[:1], False), "empty": (VISIBLE[:0], False),
    "[2, S] for one video": (VISIBLE.expand(2, -1), False), "[3, 1, S] for one video": (VISIBLE.expand(3, 1, -1), False),
    "5-d": (VISIBLE.view(1, 1, 1, 1, -1), False), "5-d, keys before the last": (VISIBLE.view(1, 1, 1, -1, 1), False),
    "by head": (VISIBLE.expand(1, HEADS, 1, -1), False), "by query": (VISIBLE.expand(1, 1, TOKENS, -1), False),
    "by query, as a column": (VISIBLE.view(1, 1, -1, 1), False),
    "whole numbers": (VISIBLE.long()[None], False), "bytes": (VISIBLE.to(torch.uint8)[None], False),
    "complex": (VISIBLE.to(torch.complex64)[None], False),
}


@every_method
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.fault(
    "Bad input", "attention masks of every shape and dtype", "one of keys stays sparse; for any other the model's own attention computes the call",
)
def test_masks_of_every_shape(host, method, name, seen):
    mask, of_keys = MASKS[name]
    tensors, outputs, answer = qkv(), [], object()

    def body(attend):
        outputs.extend(through(attend, lambda *args, **kwargs: answer, tensors, mask) for _ in range(2))

    record = host.probe(method, body, sparsity=0.0)
    reasons = set(record.reasons) - {"warm-up step", "search step"}
    if of_keys:
        assert not reasons
        for out in outputs:
            assert relative_error(out, exact(*tensors, mask=VISIBLE.expand(1, 1, 1, -1))) < 1e-5
        seen("")
        return
    assert all(out is answer for out in outputs)
    (reason,) = reasons
    assert reason.startswith(f"the attention mask {tuple(mask.shape)}") and reason.endswith("is not one of keys") and record.sparse_calls == 4
    seen(reason)


@every_method
@pytest.mark.fault("Bad input", "a mask that hides every key, or is NaN", "zeros for rows without a key; NaN stays NaN")
def test_a_mask_that_hides_all_or_is_nan(host, method, seen):
    tensors, outputs = qkv(), []

    def body(attend):
        for layer, mask in ((7, torch.zeros(1, TOKENS, dtype=torch.bool)), (8, torch.full((1, TOKENS), torch.nan))):
            outputs.append([attend(*tensors, HEADS, mask=mask, layer=layer) for _ in range(2)])

    record = host.probe(method, body, sparsity=0.5)
    hidden, nan = outputs
    assert all(not out.isinf().any() for out in hidden) and not hidden[1].any()
    assert all(out.isnan().all() for out in nan)
    assert set(record.reasons) <= {"warm-up step", "search step"}
    seen("")


# --- pattern files ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("Bad input", "a pattern file that is cut off or damaged anywhere", "an error at Load Sparse Pattern, in words")
def test_a_pattern_file_cut_off_or_damaged_anywhere(host, tmp_path, seen):
    """Cut at a hundred places, and a byte changed at three hundred: refused in a sentence, or a pattern still."""
    from pack.attention.layout import VideoLayout
    from pack.attention.pattern import Pattern, PlanKey, Plans, Role

    files = host.module("pattern_files")
    plans = {PlanKey(layer, "", Role("0")): Plans((0.9,), {"temporal": torch.zeros(1, 1, 2, dtype=torch.uint8)}) for layer in range(2)}
    pattern = Pattern("SVG", "Wan 2.1 / 2.2", 2, 2, VideoLayout(9, 8, 8), {"sparsity": 0.7}, plans)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    tensors, metadata = pattern.to_file()
    files._save(tensors, metadata, whole)
    content, generator = whole.read_bytes(), torch.Generator().manual_seed(0)
    damaged = [content[: len(content) * part // 100] for part in range(100)]
    for _ in range(300):
        place, value = (int(torch.randint(high, (1,), generator=generator)) for high in (len(content), 256))
        damaged.append(content[:place] + bytes([value]) + content[place + 1 :])
    refused = set()
    for text in damaged:
        broken.write_bytes(text)
        try:
            assert isinstance(files.read(broken), Pattern)
        except ValueError as error:
            assert str(error).startswith("broken.safetensors ") and len(str(error)) < 400
            refused.add(str(error))
    assert len(refused) > 3
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read: it is damaged, or no \.safetensors file") as caught:
        files.read(broken)
    seen(str(caught.value))
