"""Patterns as files: a run that starts from one does what the run did that made it, and a file that does not fit is refused in words."""

import importlib
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from load_pack import ROOT
from oracle import relative_error

METHODS = ("svg", "adaspa", "auto")
SAVE, LOAD = "SparseAttentionSavePattern", "SparseAttentionLoadPattern"
PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan"}}, "5": {"class_type": "Patch", "inputs": {"model": ["1", 0]}},
    "6": {"class_type": "KSampler", "inputs": {"model": ["5", 0], "seed": 3}},
    "9": {"class_type": SAVE, "inputs": {"model": ["5", 0], "samples": ["6", 0]}},
}
LATENT = {"samples": torch.zeros(1, 16, 9, 16, 16)}

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def places(host, tmp_path, monkeypatch):
    """The host's output and input folders, empty."""
    if host.name == "real":
        paths = importlib.import_module("folder_paths")
    else:
        paths = types.ModuleType("folder_paths")
        paths.get_save_image_path = _get_save_image_path
        monkeypatch.setitem(sys.modules, "folder_paths", paths)
    folders = SimpleNamespace(output=tmp_path / "output", input=tmp_path / "input", base=tmp_path)
    for name in ("output", "input"):
        getattr(folders, name).mkdir()
        monkeypatch.setattr(paths, f"get_{name}_directory", lambda name=name: str(getattr(folders, name)), raising=False)
    return folders


def _get_save_image_path(prefix, folder):
    """As the host's: sub-folders are made, a number is counted up, and nothing leaves the folder."""
    from pathlib import Path

    target = (Path(folder) / prefix).resolve()
    if not target.is_relative_to(Path(folder).resolve()):
        raise Exception("Saving image outside the output folder is not allowed.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return str(target.parent), target.name, len(list(target.parent.glob(f"{target.name}_*"))) + 1, "", prefix


@pytest.fixture
def saving(host, places):
    """A prompt with a Save node is running."""
    _running(PROMPT)
    return places


def _running(prompt):
    queue = SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "prompt", prompt, {}, [])], []))
    importlib.import_module("server").PromptServer.instance.prompt_queue = queue


@pytest.fixture
def masks(monkeypatch):
    """The block maps of every sparse call, in order."""
    seen, kernels = [], importlib.import_module("pack.kernels")
    right = kernels.block_sparse_attention

    def watched(q, k, v, mask, **kwargs):
        heads = [order.head_order.tolist() for order in (kwargs.get("q_order"), kwargs.get("k_order")) if order is not None]
        seen.append((mask.to_blocks().expand(len(q), q.shape[1], -1, -1), heads))
        return right(q, k, v, mask, **kwargs)

    monkeypatch.setattr(kernels, "block_sparse_attention", watched)
    return seen


@pytest.fixture
def no_search(monkeypatch):
    """no_search(): from now on nothing can be searched for or classified. A few rows may be attended densely: Auto checks itself so."""
    kernels = importlib.import_module("pack.kernels")
    right = kernels.attention_with_lse

    def refuse(*args, **kwargs):
        raise AssertionError("a search")

    def a_few_rows(q, k, *args, **kwargs):
        return right(q, k, *args, **kwargs) if q.shape[2] < k.shape[2] else refuse()

    def begin():
        for name in ("sampled_errors", "block_mass", "block_errors", "attention_with_mass"):
            monkeypatch.setattr(kernels, name, refuse)
        monkeypatch.setattr(kernels, "attention_with_lse", a_few_rows)

    return begin


def save(host, model, prefix="pattern", prompt=PROMPT):
    samples, path = host.execute(SAVE, {"model": model, "samples": LATENT, "filename_prefix": prefix}, "9", prompt).result
    assert samples is LATENT
    return path


def load(host, model, path, **inputs):
    return host.execute(LOAD, {"model": model, "path": path, **inputs}, "7").result[0]


def made(host, method, family="wan", cfg=1.0, batch=1, **settings):
    """(video, path) of a run that was saved."""
    patched = host.patch(method, host.load(family), **{"sparsity": 0.4, **settings})
    video = host.sample(patched, family, cfg=cfg, batch=batch)
    path = save(host, patched)
    assert path
    return video, path


def same(first, second):
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(first, second, strict=True))


# --- the same video --------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("family", ["wan", "hunyuan", "ltxv"])
@pytest.mark.parametrize("cfg", [1.0, 5.0], ids=["cfg 1", "cfg 5"])
def test_a_run_from_a_file_is_the_run_that_made_it_without_a_search(host, saving, masks, no_search, method, family, cfg):
    video, path = made(host, method, family, cfg)
    before = masks.copy()
    masks.clear()
    no_search()
    patched = load(host, host.patch(method, host.load(family), sparsity=0.4, strict=True), path)
    again = host.sample(patched, family, cfg=cfg)
    assert same(masks, before)
    assert relative_error(again, video) < 1e-5
    data = host.record(patched).to_json()
    assert data["search_steps"] == [] and "search step" not in data["reasons"]
    assert data["achieved_sparsity"] == pytest.approx(0.4, abs=64 / 576)
    assert [note for note in data["notes"] if note.startswith("started from pattern pattern_00001_.safetensors")]


@every_method
def test_later_finds_of_a_run_are_kept_too(host, saving, masks, no_search, method):
    """Every second step anew: a plan holds from the noise level that it was found at."""
    video, path = made(host, method, cache_refresh=1)
    before = masks.copy()
    masks.clear()
    no_search()
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4), path)
    again = host.sample(patched, "wan")
    if method == "auto":  # its searches are dense steps, which the run from the file has not: the last plan alone was used in both
        assert len(masks) == 3 * len(before) and same(masks[-len(before):], before)
    else:
        assert relative_error(again, video) < 1e-5 and same(masks, before)
    plans = next(iter(importlib.import_module("pack.nodes.pattern_files").read(_path(path)).plans.values()))
    # SVG finds in the three sparse steps; the others in the warm-up too, and not in the last step, which no other follows.
    assert len(plans.sigmas) == 3 and sorted(plans.sigmas, reverse=True) == list(plans.sigmas)


def _path(path):
    from pathlib import Path

    return Path(path)


@every_method
def test_warm_up_may_be_none(host, saving, no_search, method):
    _, path = made(host, method, cfg=5.0)
    no_search()
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4, warmup_steps=0, dense_layers="", strict=True), path)
    host.sample(patched, "wan", cfg=5.0)
    record = host.record(patched)
    assert (record.sparse_calls, record.dense_calls, record.warmup) == (16, 0, 0)


@every_method
def test_another_number_of_steps_finds_its_plans(host, saving, no_search, method):
    _, path = made(host, method)
    no_search()
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4, warmup_steps=1, strict=True), path)
    host.sample(patched, "wan", steps=7)
    assert host.record(patched).sparse_calls == 12


@every_method
def test_the_file_may_be_loaded_before_the_patch(host, saving, masks, no_search, method):
    _, path = made(host, method)
    before = masks.copy()
    masks.clear()
    no_search()
    loaded = load(host, host.load("wan"), path)
    assert "once the model has a sparse attention patch" in host.shown[-1].text
    host.sample(host.patch(method, loaded, sparsity=0.4), "wan")
    assert same(masks, before)


@every_method
def test_a_missing_role_takes_the_positive_one(host, saving, masks, no_search, method):
    _, path = made(host, method, cfg=1.0)
    no_search()
    masks.clear()
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4, strict=True), path)
    host.sample(patched, "wan", cfg=5.0)
    assert len(masks) == 12
    assert same(masks[0::2], masks[1::2])  # both conditions of each call, by the same plan


@every_method
def test_roles_are_told_apart_batched_or_not(host, saving, batched, masks, no_search, method):
    batched(True)
    video, path = made(host, method, cfg=5.0)
    no_search()
    batched(False)
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4), path)
    assert relative_error(host.sample(patched, "wan", cfg=5.0), video) < 1e-5
    pattern = importlib.import_module("pack.nodes.pattern_files").read(_path(path))
    assert {key.role.name for key in pattern.plans} == {"0", "1"} and len(pattern.plans) == 4


@every_method
def test_a_batch_and_another_batch(host, saving, masks, no_search, method):
    video, path = made(host, method, batch=2)
    before = masks.copy()
    no_search()
    masks.clear()
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4, strict=True), path)
    assert relative_error(host.sample(patched, "wan", batch=2), video) < 1e-5
    assert same(masks, before)
    masks.clear()
    host.sample(patched, "wan", batch=1)
    assert all(torch.equal(one[0], two[0]) for (one, _), (two, _) in zip(masks, before, strict=True))


def test_what_belongs_to_the_blocks_comes_with_them(host, saving, masks, no_search):
    """AdaSpa's blocks are of an order of tokens and for a sparsity, whatever the patch is set to."""
    _, path = made(host, "adaspa", token_order="raster", sparsity=0.5)
    before = masks.copy()
    masks.clear()
    no_search()
    patched = load(host, host.patch("adaspa", host.load("wan"), sparsity=0.3, token_order="tile"), path)
    host.sample(patched, "wan")
    record = host.record(patched)
    assert same(masks, before)
    assert (record.asked_sparsity, record.config.token_order) == (0.5, "raster")
    assert "with its sparsity 0.5, token_order raster" in " ".join(record.notes)


def test_kinds_of_heads_hold_at_any_sparsity(host, saving, no_search):
    _, path = made(host, "svg", sparsity=0.5)
    no_search()
    patched = load(host, host.patch("svg", host.load("wan"), sparsity=0.2), path)
    host.sample(patched, "wan")
    assert host.record(patched).achieved_sparsity == pytest.approx(0.2, abs=64 / 576)


def test_layers_without_a_plan_stay_dense(host, saving, no_search):
    _, path = made(host, "svg", dense_layers="1")
    no_search()
    patched = load(host, host.patch("svg", host.load("wan"), sparsity=0.4, strict=True), path)
    host.sample(patched, "wan")
    record = host.record(patched)
    assert (record.sparse_calls, record.reasons["layer without a plan in the loaded pattern"]) == (3, 3)


# --- what is kept, and when ------------------------------------------------------------------------------------------


@every_method
def test_nothing_is_kept_unless_a_save_node_asks(host, places, method):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    log = patched.get_attachment(host.module("host").KEY)
    assert log.patterns == {}
    _running({name: node for name, node in PROMPT.items() if name != "9"})
    host.sample(patched, "wan")
    assert log.patterns == {}
    assert save(host, patched) == ""
    assert "did not keep what it found. The next one will" in host.shown[-1].text and host.shown[-1].node == "9"
    host.sample(patched, "wan")
    assert save(host, patched)


def test_what_is_kept_is_small_and_on_the_cpu(host, saving):
    patched = host.patch("adaspa", host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan", cfg=5.0)
    (pattern,) = patched.get_attachment(host.module("host").KEY).patterns.values()
    tensors = [tensor for plans in pattern.plans.values() for tensor in plans.tensors.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    # 4 plans, found twice at most; 2 heads; 5 by 9 blocks in bits, two figures
    assert sum(tensor.nbytes for tensor in tensors) <= 4 * 2 * 2 * (5 * 2 + 8)


def test_a_failed_run_keeps_nothing(host, saving):
    def stop(step, *_):
        if step == 2:
            raise host.interrupt

    patched = host.patch("svg", host.load("wan"))
    with pytest.raises(host.interrupt):
        host.sample(patched, "wan", callback=stop)
    assert patched.get_attachment(host.module("host").KEY).patterns == {}


@pytest.mark.parametrize("settings, words", [
    (None, "No sparse attention patch in this run"), ({"warmup_steps": 4}, "no call ran sparse"),
])
def test_nothing_to_save_is_said(host, saving, settings, words):
    model = host.load("wan") if settings is None else host.patch("svg", host.load("wan"), **settings)
    host.sample(model, "wan")
    assert save(host, model) == "" and words in host.shown[-1].text
    assert not list(saving.output.rglob("*.*"))


def test_files_are_counted_up_and_may_have_a_folder(host, saving):
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan")
    paths = [_path(save(host, patched, prefix)) for prefix in ("pattern", "pattern", "wan/short.safetensors")]
    assert [path.relative_to(saving.output).as_posix() for path in paths] == [
        "sparse_patterns/pattern_00001_.safetensors", "sparse_patterns/pattern_00002_.safetensors", "sparse_patterns/wan/short_00001_.safetensors",
    ]
    assert not [path for path in saving.output.rglob("*") if path.suffix == ".part"]
    options = host.node(LOAD).GET_SCHEMA().inputs[1].options
    assert options[0] == "none" and set(options[1:]) == {f"{name} [output]" for name in (
        "pattern_00001_.safetensors", "pattern_00002_.safetensors", "wan/short_00001_.safetensors",
    )}
    for name in options[1:]:
        assert host.node(LOAD).validate_inputs(file=name, path="") is True
        load(host, patched, "", file=name)


@pytest.mark.parametrize("prefix", ["../outside", "/outside", "", "wan/"])
def test_a_name_that_leads_out_or_is_none_costs_no_video(host, saving, prefix):
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan")
    assert save(host, patched, prefix) == ""
    assert host.shown[-1].text.startswith("⚠ No file was written")
    assert not list(saving.base.rglob("*.safetensors"))


def test_a_loaded_pattern_can_be_saved_again(host, saving):
    _, path = made(host, "svg")
    patched = load(host, host.patch("svg", host.load("wan")), path)
    host.sample(patched, "wan")
    read = importlib.import_module("pack.nodes.pattern_files").read
    first, second = read(_path(path)), read(_path(save(host, patched)))
    assert replace(second, source="", plans={}) == replace(first, source="", plans={})
    assert first.plans.keys() == second.plans.keys()
    assert all(torch.equal(first.plans[key].tensors["temporal"], second.plans[key].tensors["temporal"]) for key in first.plans)


# --- what does not fit -----------------------------------------------------------------------------------------------


def rewritten(path, change):
    """The same pattern with something changed: change(about, tensors)."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["sparse_attention_pattern"])  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, {"sparse_attention_pattern": json.dumps(about)})
    return path


def test_another_method_is_refused_at_the_node(host, saving):
    _, path = made(host, "svg")
    with pytest.raises(ValueError, match=r"made with SVG, this model's patch is AdaSpa"):
        load(host, host.patch("adaspa", host.load("wan")), path)


def test_another_model_is_refused_at_the_node_patched_or_not(host, saving):
    _, path = made(host, "svg")
    for model in (host.load("hunyuan"), host.patch("svg", host.load("hunyuan"))):
        with pytest.raises(ValueError, match=r"made for Wan 2.1 / 2.2, this model is HunyuanVideo"):
            load(host, model, path)


def test_another_number_of_layers_is_refused_at_the_node(host, saving):
    _, path = made(host, "svg")
    rewritten(path, lambda about, tensors: about.update(layers=40))
    with pytest.raises(ValueError, match="a model with 40 layers, this one has 2"):
        load(host, host.load("wan"), path)


def wrong_method(host, path):
    return load(host, host.load("wan"), rewritten(path, lambda about, tensors: about.update(method="other")))


def wrong_heads(host, path):
    def change(about, tensors):
        about["heads"] = 3
        for name, tensor in tensors.items():
            tensors[name] = torch.cat([tensor, tensor[:, :, :1]], 2)

    return load(host, host.load("wan"), rewritten(path, change))


def wrong_layout(host, path):
    return load(host, host.load("wan"), rewritten(path, lambda about, tensors: about["layout"].update(frames=21)))


def wrong_settings(host, path):
    return load(host, host.load("wan"), rewritten(path, lambda about, tensors: about["settings"].update(sparsity="much", token_order="none")))


def wrong_tensors(host, path):
    def change(about, tensors):
        for name in [name for name in tensors if name.endswith(("temporal", "bits"))]:
            tensors[name] = tensors[name][..., :1].contiguous() if name.endswith("bits") else tensors[name].float()

    return load(host, host.load("wan"), rewritten(path, change))


REFUSED = [
    (wrong_method, "made with other, this model's patch is {}"), (wrong_heads, "made for 3 heads, a call has 2"),
    (wrong_layout, "another resolution or length (21 x 8 x 8 video tokens), this video is 9 x 8 x 8 video tokens"),
    (wrong_tensors, "its plans are damaged or incomplete"),
    (wrong_settings, "its settings are damaged"),
]


@every_method
@pytest.mark.parametrize("spoil, words", REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_shows_when_the_run_starts_is_said_and_the_run_goes_on_without(host, saving, masks, method, spoil, words):
    if (method, spoil) == ("svg", wrong_settings):
        pytest.skip("SVG takes no settings from a file")
    _, path = made(host, method)
    plain = host.patch(method, host.load("wan"), sparsity=0.4)
    expected = host.sample(plain, "wan")
    before = host.record(plain).to_json()
    model = spoil(host, path)
    patched = host.patch(method, model, sparsity=0.4)
    out = host.sample(patched, "wan")
    data = host.record(patched).to_json()
    name = {"svg": "SVG", "adaspa": "AdaSpa", "auto": "Auto"}[method]
    said = f"pattern pattern_00001_.safetensors was not used: it was {words.format(name)}" if words.startswith(("made", "another")) else words
    said = said.replace("it was another", "it was made for another")
    assert [note for note in data["notes"] if said in note], data["notes"]
    assert said in host.shown[-1].text
    assert data["outcome"] == "finished" and data["sparse_calls"] >= 3  # the call that showed it is dense, and AdaSpa has to search yet
    if spoil in (wrong_method, wrong_layout, wrong_settings):  # known before the first call
        assert relative_error(out, expected) < 1e-6
        assert (data["sparse_calls"], data["reasons"], data["search_steps"]) == (before["sparse_calls"], before["reasons"], before["search_steps"])
    strict = host.patch(method, model, sparsity=0.4, strict=True)
    with pytest.raises(RuntimeError, match=r"strict: .*was not used"):
        host.sample(strict, "wan")


@every_method
def test_another_length_is_refused_when_the_run_starts(host, saving, method):
    _, path = made(host, method)
    patched = load(host, host.patch(method, host.load("wan"), sparsity=0.4, warmup_steps=0), path)
    host.sample(patched, "wan", frames=5)
    record = host.record(patched)
    assert "made for another resolution or length (9 x 8 x 8 video tokens), this video is 5 x 8 x 8" in " ".join(record.notes)
    assert (record.sparse_calls, record.warmup) == ((8, 0) if method == "svg" else (6, 1))


# --- files that are none ---------------------------------------------------------------------------------------------


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def not_tensors(path):
    path.write_text("a letter")


def foreign(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, str(path), {"format": "pt"})


def about(**changed):
    return lambda path: rewritten(str(path), lambda data, tensors: data.update(changed))


BROKEN = {
    "cut short": (cut, "damaged, or no .safetensors file"), "no tensors": (not_tensors, "damaged, or no .safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged, or no .safetensors file"),
    "another pack's": (foreign, "not a file of sparse attention patterns"), "a later form": (about(schema=2), "it has form 2"),
    "no plan": (about(plans=[]), "it holds no plan"), "no layout": (about(layout=None), "its description is damaged"),
    "a strange layout": (about(layout={"frames": -1, "height": 8, "width": 8, "prefix": 0, "suffix": 0}), "its description is damaged"),
    "a text for heads": (about(heads="two"), "damaged"), "settings of no kind": (about(settings=5), "its description is damaged"),
    "a list of nothing": (about(plans=[3]), "its description is damaged"),
    "tensors missing": (lambda path: rewritten(str(path), lambda data, tensors: tensors.pop(next(iter(tensors)))), "damaged or incomplete"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_words(host, saving, kind):
    spoil, words = BROKEN[kind]
    _, path = made(host, "svg")
    spoil(_path(path))
    with pytest.raises(ValueError, match=words) as caught:
        load(host, host.patch("svg", host.load("wan")), path)
    assert "pattern_00001_.safetensors" in str(caught.value)


@pytest.mark.parametrize("fidelity", [0.6, 0.98])
def test_autos_blocks_bring_their_fidelity(host, saving, no_search, fidelity):
    """At 0.6 no block is left in the double's random model: rows may be without one, since the means stand for all of them."""
    patched = host.patch("auto", host.load("wan"), fidelity=fidelity, cache_refresh=0)  # further searches would be dense steps
    video = host.sample(patched, "wan")
    path = save(host, patched)
    no_search()
    patched = load(host, host.patch("auto", host.load("wan"), fidelity=0.9, warmup_steps=1, strict=True), path)
    assert relative_error(host.sample(patched, "wan"), video) < 1e-5
    record = host.record(patched)
    assert record.config.fidelity == fidelity and record.asked_error == round(1 - fidelity, 6) and record.measured_error > 0
    assert any(note.endswith(f"with its fidelity {fidelity:g}") for note in record.notes), record.notes


@pytest.mark.parametrize("damage", ["a row without a block", "blocks past the last", "another shape", "a density above 1"])
def test_blocks_that_are_none_never_reach_a_kernel(host, saving, damage):
    _, path = made(host, "adaspa", sparsity=0.4)

    def change(data, tensors):
        for name, tensor in tensors.items():
            if name.endswith("bits") and damage == "a row without a block":
                tensor[..., 0, :] = 0
            elif name.endswith("bits") and damage == "blocks past the last":
                tensor[..., -1] = 255
            elif name.endswith("bits") and damage == "another shape":
                tensors[name] = tensor[..., :1, :].clone()
            elif name.endswith("density") and damage == "a density above 1":
                tensor += 1

    patched = load(host, host.patch("adaspa", host.load("wan")), rewritten(path, change))
    host.sample(patched, "wan")
    assert "its plans are damaged or incomplete" in " ".join(host.record(patched).notes)


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "../../secret.safetensors [output]", "../secret.safetensors [input]", "{base}/secret.safetensors",
    "{base}/output/secret.safetensors", "link.safetensors [input]", "link.safetensors",
    "no/such/file.safetensors", "\0", "nowhere.safetensors [output]",
])
def test_no_path_leaves_the_folders(host, saving, name):
    _, path = made(host, "svg")
    data = _path(path).read_bytes()
    for secret in (saving.base / "secret.safetensors", saving.output / "secret.safetensors", saving.input / "secret.safetensors"):
        secret.write_bytes(data)
    (saving.input / "sparse_patterns").mkdir()
    (saving.input / "sparse_patterns" / "link.safetensors").symlink_to(saving.base / "secret.safetensors")
    name = name.format(base=saving.base)
    with pytest.raises(ValueError, match=r"only read from the sparse_patterns folders|no such file|not a path"):
        load(host, host.load("wan"), name)
    assert "pattern file" in host.node(LOAD).validate_inputs(file="none", path=name)


# --- the nodes -------------------------------------------------------------------------------------------------------


def test_the_nodes_as_workflows_know_them(host, places):
    schemas = [host.node(name).GET_SCHEMA() for name in (SAVE, LOAD)]
    known = [[(part.id, part.io_type, bool(part.optional), part.default if part.optional else None) for part in each.inputs] for each in schemas]
    assert known == [
        [("model", "MODEL", False, None), ("samples", "LATENT", False, None), ("filename_prefix", "STRING", True, "pattern")],
        [("model", "MODEL", False, None), ("file", "COMBO", True, "none"), ("path", "STRING", True, "")],
    ]
    assert [[part.io_type for part in schema.outputs] for schema in schemas] == [["LATENT", "STRING"], ["MODEL"]]
    assert [bool(schema.is_output_node) for schema in schemas] == [True, False]
    assert [(schema.display_name, schema.category) for schema in schemas] == [
        ("Save Sparse Pattern", "model/patch"), ("Load Sparse Pattern", "model/patch"),
    ]
    for schema in schemas:
        assert schema.description and schema.search_aliases and all(part.tooltip for part in (*schema.inputs, *schema.outputs))
        page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
        rows = {row.split("**")[1]: row for row in page.splitlines() if row.startswith("| **")}
        assert rows.keys() == {part.id for part in schema.inputs if part.optional}
        assert all(rows[part.id].startswith(f'| **{part.id}** ("{part.default}") ') for part in schema.inputs if part.optional)


def test_a_saved_workflow_of_before_any_input_existed_still_runs(host, saving):
    patched = host.patch("svg", host.load("wan"))
    loaded = host.execute(LOAD, {"model": patched}, "7").result[0]
    host.sample(loaded, "wan")
    samples, path = host.execute(SAVE, {"model": loaded, "samples": LATENT}, "9", PROMPT).result
    assert samples is LATENT and path.endswith("pattern_00001_.safetensors")


def test_two_samplers_keep_a_pattern_each_and_no_more_than_a_few(host, saving):
    patched = host.patch("svg", host.load("wan"), sparsity=0.4)
    for number in range(6):
        host.sample(patched, "wan", steps=3 + number % 2, node=str(20 + number))
    log = patched.get_attachment(host.module("host").KEY)
    assert list(log.patterns) == ["22", "23", "24", "25"]
    assert [len(next(iter(pattern.plans.values())).sigmas) for pattern in log.patterns.values()] == [2, 3, 2, 3]


def test_without_a_file_the_model_is_as_before(host, saving):
    _, path = made(host, "svg")
    model = host.execute(LOAD, {"model": load(host, host.patch("svg", host.load("wan")), path)}, "7").result[0]
    host.sample(model, "wan")
    assert not [note for note in host.record(model).notes if "pattern" in note]


def test_the_node_leaves_the_model_it_was_given_alone(host, saving):
    _, path = made(host, "svg")
    patched = host.patch("svg", host.load("wan"))
    load(host, patched, path)
    host.sample(patched, "wan")
    assert not [note for note in host.record(patched).notes if "pattern" in note]


def test_a_file_written_anew_is_read_again(host, saving):
    _, path = made(host, "svg")
    node = host.node(LOAD)
    before = node.fingerprint_inputs(file="none", path=path)
    assert node.fingerprint_inputs(file="none", path=path) == before
    rewritten(path, lambda about, tensors: about["settings"].update(note="a longer one"))
    assert node.fingerprint_inputs(file="none", path=path) != before
    assert node.fingerprint_inputs(file="none", path="") is None
