"""The report node: which run it finds, what it says where there is none, its picture and its JSON."""

import importlib
import json

import pytest
import torch

METHODS = ("svg", "adaspa")
every_method = pytest.mark.parametrize("method", METHODS)

# The form of a record, which tools read.
PROMISED = (
    "schema", "method", "asked_sparsity", "achieved_sparsity", "run_sparsity", "sparse_calls", "dense_calls", "reasons", "tokens", "steps",
    "layers", "seed",
)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


# Model 1, patch 5, sampler 6, a node after it 7, report 8.
PROMPT = {
    "1": node("UNETLoader", unet_name="wan"), "5": node("Patch", model=["1", 0]), "6": node("KSampler", model=["5", 0], seed=3),
    "7": node("LatentCut", samples=["6", 0]), "8": node("SparseAttentionReport", model=["5", 0], samples=["7", 0]),
}
LATENT = {"samples": torch.zeros(1, 16, 9, 16, 16)}


def shows_something(image):
    assert image.dtype == torch.float32 and image.dim() == 4 and image.shape[0] == 1 and image.shape[3] == 3
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02
    return True


@every_method
def test_the_report_tells_the_run_that_made_the_samples(host, method):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan", seed=3, node="6")
    samples, image, data = host.report(patched, LATENT, PROMPT)
    record = host.record(patched)
    assert samples is LATENT and shows_something(image)
    assert data == json.loads(json.dumps({**record.to_json(), "costs": record.costs()}))
    assert [name for name in PROMISED if name not in data] == []
    assert (data["schema"], data["method"], data["seed"]) == (1, {"svg": "SVG", "adaspa": "AdaSpa"}[method], 3)
    assert (data["asked_sparsity"], data["tokens"], data["steps"], data["layers"]) == (0.4, 576, 4, 2)
    assert (data["sparse_calls"], data["dense_calls"], data["outcome"], data["model"]) == (6, 2, "finished", "Wan 2.1 / 2.2")
    assert data["achieved_sparsity"] == pytest.approx(0.4, abs=64 / 576)
    assert data["run_sparsity"] == pytest.approx(data["achieved_sparsity"] * 3 / 4, abs=1e-6)
    table = data["sparsity_by_layer_and_step"]
    assert [row[0] for row in table] == [0, 0] and all(value > 0.2 for row in table for value in row[1:])
    found = data["temporal_share_by_layer_and_head" if method == "svg" else "recall_by_layer_and_head"]
    assert list(found) == ["0", "1"] and all(len(heads) == 2 and all(0 <= value <= 1 for value in heads) for heads in found.values())


def test_the_report_walks_up_to_the_sampler_nearest_to_the_samples(host):
    """Two stages of one model, the second in a loop of inputs with the first; the report is asked for each."""
    patched = host.patch("svg", host.load("wan"))
    for name, steps in (("6", 2), ("9", 3)):
        host.sample(patched, "wan", steps=steps, node=name)
    prompt = {
        **PROMPT, "9": node("KSampler", model=["5", 0], latent_image=["7", 0]),
        "10": node("LatentCut", samples=["9", 0], mask=["7", 0], other=["8", 0]),
        "8": node("SparseAttentionReport", model=["5", 0], samples=["10", 0]),
    }
    assert host.report(patched, LATENT, prompt)[2]["steps"] == 3
    prompt["8"]["inputs"]["samples"] = ["7", 0]
    assert host.report(patched, LATENT, prompt)[2]["steps"] == 2


def test_the_report_takes_the_newest_run_of_a_node(host):
    patched = host.patch("svg", host.load("wan"))
    for steps in (2, 3):
        host.sample(patched, "wan", steps=steps, node="6")
    assert host.report(patched, LATENT, PROMPT)[2]["steps"] == 3


def test_the_report_of_an_interrupted_run(host):
    def stop(step, *_):
        if step == 1:
            raise host.interrupt

    patched = host.patch("svg", host.load("wan"))
    with pytest.raises(host.interrupt):
        host.sample(patched, "wan", callback=stop)
    _, image, data = host.report(patched, LATENT, PROMPT)
    assert data["outcome"] == "interrupted" and (data["sparse_calls"], data["dense_calls"]) == (2, 2)
    assert shows_something(image)


@every_method
@pytest.mark.parametrize("family", ["hunyuan", "ltxv"])
def test_the_report_of_other_families(host, family, method):
    patched = host.patch(method, host.load(family), sparsity=0.4)
    host.sample(patched, family)
    _, image, data = host.report(patched, LATENT, PROMPT)
    assert shows_something(image)
    assert (data["tokens"], data["layers"]) == (host.tokens[family], host.layers[family])
    assert len(data["sparsity_by_layer_and_step"]) == host.layers[family]


@pytest.mark.parametrize("family, settings", [("packed", {}), ("wan", {"warmup_steps": 4})], ids=["unknown model", "all warm-up"])
def test_the_report_of_a_run_without_a_sparse_call(host, family, settings):
    patched = host.patch("svg", host.load(family), **settings)
    host.sample(patched, family)
    _, image, data = host.report(patched, LATENT, PROMPT)
    assert shows_something(image)
    assert (data["sparse_calls"], data["achieved_sparsity"], data["run_sparsity"], data["dense_calls"]) == (0, 0, 0, 8)
    assert sum(data["reasons"].values()) == 8


def test_the_tokens_of_a_run_without_a_sparse_call_are_known(host):
    patched = host.patch("svg", host.load("wan"), warmup_steps=4)
    host.sample(patched, "wan")
    assert host.report(patched, LATENT, PROMPT)[2]["tokens"] == 576


@every_method
def test_the_report_of_a_run_gone_to_nan(host, method):
    def spoil(executor, x, *args, **kwargs):
        return executor(x + torch.nan, *args, **kwargs)

    patched = host.patch(method, host.wrap(host.load("wan"), "DIFFUSION_MODEL", spoil), sparsity=0.4)
    assert host.sample(patched, "wan").isnan().all()
    _, image, data = host.report(patched, LATENT, PROMPT)
    assert data["sparse_calls"] == 6 and data["achieved_sparsity"] == pytest.approx(0.4, abs=64 / 576)
    assert shows_something(image)


@every_method
def test_the_picture_counts_as_the_json_and_can_be_read_small(host, method, monkeypatch):
    """Steps and layers from 0; words of 11 pixels or more where it is shown 512 wide; nothing cut off, no empty strip below."""
    from matplotlib.text import Text

    module, figures = host.module("report_picture"), []
    right = module._rendered
    monkeypatch.setattr(module, "_rendered", lambda figure: (figures.append(figure), right(figure))[1])
    patched = host.patch(method, host.load("wan"), sparsity=0.95, cache_refresh=2)
    host.sample(patched, "wan", steps=6, frames=3)
    record = host.record(patched)
    record.note("a further note that is long enough to take more than a single line of the words that stand below the two plots")
    _, image, data = host.report(patched, LATENT, PROMPT)
    (figure,) = figures
    plot = figure.axes[0]
    (table,) = plot.get_images()
    assert table.get_extent() == [-0.5, 5.5, 1.5, -0.5] and "first is 0" in plot.get_xlabel() and "first is 0" in plot.get_ylabel()
    assert [line.get_xdata()[0] for line in plot.get_lines()] == data["search_steps"] and bool(data["search_steps"]) == (method == "adaspa")
    words = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in words) * 512 / (72 * figure.get_figwidth()) >= 11
    height, width = image.shape[1:3]
    for box in (*(axes.get_tightbbox() for axes in figure.axes), *(text.get_window_extent() for text in figure.texts)):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    ink = (image[0] < 0.9).any(-1).any(-1).nonzero().flatten()
    assert height - int(ink[-1]) < 0.06 * height


def why(host, model, samples=LATENT, prompt=PROMPT):
    passed, image, data = host.report(model, samples, prompt)
    assert passed is samples and shows_something(image)
    assert data["schema"] == 1 and data["method"] is None
    return data["why"]


def test_an_unpatched_model_is_said(host):
    assert why(host, host.load("wan")).startswith("This model carries no sparse attention patch")


def test_a_model_that_was_not_sampled_is_said(host):
    assert why(host, host.patch("svg", host.load("wan"))).startswith("This model has not been sampled yet")


def test_samples_of_another_model_object_are_said(host):
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan", steps=1, node="elsewhere")
    assert why(host, patched).startswith("These samples come from the cache of a run with another model object")


@pytest.mark.parametrize("prompt", [{}, None, {"8": node("Report")}, {"8": {}, "6": {}}], ids=["empty", "none", "unlinked", "no inputs"])
def test_a_prompt_that_leads_nowhere_is_no_error(host, prompt):
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan", steps=1)
    assert why(host, patched, prompt=prompt)


def test_without_matplotlib_the_json_is_whole_and_the_picture_blank(host, monkeypatch):
    monkeypatch.setattr(host.module("report_picture"), "_figure", lambda height: None)
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan")
    _, image, data = host.report(patched, LATENT, PROMPT)
    assert image.shape[0] == 1 and image.shape[3] == 3 and (image == 1).all()
    assert data["sparse_calls"] == 6


@every_method
def test_the_mask_drawn_is_the_heads_own(host, method, monkeypatch):
    """Whatever the order that the kernel took: pairs of tensor rows, as the plan that ran says."""
    plans = {}
    dispatch = importlib.import_module("pack.attention.dispatch")
    run = dispatch._run
    monkeypatch.setattr(dispatch, "_run", lambda call, plan, session: (plans.setdefault(call.layer, plan), run(call, plan, session))[1])
    patched = host.patch(method, host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan")
    record = host.record(patched)
    kernels = importlib.import_module("pack.kernels")
    rows = (torch.arange(128) * 576) // 128
    for layer, plan in plans.items():
        kept = kernels.kept_pairs(plan, torch.arange(576), torch.arange(576), (1, 2, 576, 576))
        assert torch.allclose(kept.double().mean((2, 3)), kernels.density(plan, 576, 576), atol=1e-9)
        for head in (0, 1, -1):
            assert torch.equal(record.mask_picture(layer, head), kept[0, head][rows][:, rows])
    assert record.mask_picture(2, 0) is None and record.mask_picture(0, 2) is None and record.mask_picture(-1, -2) is not None


def test_the_report_takes_a_layer_and_a_head(host):
    patched = host.patch("adaspa", host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan")
    pictures = []
    for layer, head in ((0, 0), (1, 1), (5, 0)):
        inputs = {"model": patched, "samples": LATENT, "layer": layer, "head": head}
        pictures.append(host.execute("SparseAttentionReport", inputs, "8", PROMPT).result[1])
    assert all(shows_something(picture) for picture in pictures)
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])


def test_only_the_newest_run_keeps_pictures(host):
    patched = host.patch("svg", host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan")
    host.sample(patched, "wan", seed=1)
    older, newer = host.records(patched)
    assert older.mask_picture(0, 0) is None and newer.mask_picture(0, 0) is not None
