"""The report node: which run it finds, what it says where there is none, its picture and its JSON."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)

NAMES = {"svg": "SVG", "adaspa": "AdaSpa", "auto": "Auto"}
FOUND = {"svg": "temporal_share_by_layer_and_head", "adaspa": "recall_by_layer_and_head", "auto": "error_by_layer_and_head"}
PANELS = {"svg": "Types of heads", "adaspa": "Attention weight kept", "auto": "Off from dense attention"}
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
    assert (data["schema"], data["method"], data["seed"]) == (1, NAMES[method], 3)
    assert (data["asked_sparsity"], data["tokens"], data["steps"], data["layers"]) == (0.4, 576, 4, 2)
    assert (data["sparse_calls"], data["dense_calls"], data["outcome"], data["model"]) == (6, 2, "finished", "Wan 2.1 / 2.2")
    assert data["achieved_sparsity"] == pytest.approx(0.4, abs=64 / 576)
    assert data["run_sparsity"] == pytest.approx(data["achieved_sparsity"] * 3 / 4, abs=1e-6)
    table = data["sparsity_by_layer_and_step"]
    assert [row[0] for row in table] == [0, 0] and all(value > 0.2 for row in table for value in row[1:])
    found = data[FOUND[method]]
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


@pytest.fixture
def drawn(host, monkeypatch):
    """drawn(): the figure of the newest picture, as matplotlib has it, with its panels by title."""
    module, figures = host.module("report_picture"), []
    right = module._rendered
    monkeypatch.setattr(module, "_rendered", lambda figure: (figures.append(figure), right(figure))[1])

    def newest():
        return figures[-1], {axes.get_title().split("\n")[0].split(",")[0].strip(":"): axes for axes in figures[-1].axes if axes.get_title()}

    return newest


def texts_of(figure):
    """All words in a figure that are drawn: those of ticks outside of the axes are not."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, *((axes.get_legend() or axes).get_texts() if axes.get_legend() else ())]
        if not axes.axison:
            found.append(axes.title)
            continue
        found += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [text for place, text in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True) if low <= place <= high]
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def can_be_read_small(image, figure):
    """Landscape; letters of 11 pixels or more where it is 512 wide; no words on others, or cut off; legends beside their plots; no empty strip."""
    height, width = image.shape[1:3]
    texts = texts_of(figure)
    assert width > 1.1 * height
    assert min(text.get_fontsize() for text in texts) * 512 / (72 * figure.get_figwidth()) >= 11
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for number, (words, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, words
        for others, other in boxes[number + 1 :]:
            across, down = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or down <= 1, f"{words!r} lies on {others!r}"
    for axes in figure.axes:
        if axes.get_legend():
            assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1 - 1
        for _, box in boxes:
            inside = axes.get_window_extent()
            assert not axes.axison or not (inside.x0 < (box.x0 + box.x1) / 2 < inside.x1 and inside.y0 < (box.y0 + box.y1) / 2 < inside.y1)
    ink = (image[0] < 0.9).any(-1).any(-1).nonzero().flatten()
    assert height - int(ink[-1]) < 0.06 * height
    return True


@every_method
def test_the_picture_counts_as_the_json_and_can_be_read_small(host, method, drawn):
    patched = host.patch(method, host.load("wan"), sparsity=0.95, cache_refresh=2)
    host.sample(patched, "wan", steps=6, frames=3)
    host.record(patched).note("a further note, long enough to take more than a single line of the words below the plots: it costs $5 or \\bad{$")
    _, image, data = host.report(patched, LATENT, PROMPT)
    figure, panels = drawn()
    assert can_be_read_small(image, figure)
    assert list(panels) == [
        "Attention skipped", PANELS[method], "Pairs computed",
        "Time of a call (ms)", "Calls by step",
    ]
    plot = panels["Attention skipped"]
    (table,) = plot.get_images()
    assert table.get_extent() == [-0.5, 5.5, 1.5, -0.5] and (plot.get_xlabel(), plot.get_ylabel()) == ("step (from 0)", "layer (from 0)")
    assert torch.allclose(torch.tensor(table.get_array()), torch.tensor(data["sparsity_by_layer_and_step"]))
    steps = panels["Calls by step"]
    for axes in (plot, steps):
        assert [line.get_xdata()[0] for line in axes.get_lines()] == data["search_steps"] and bool(data["search_steps"]) == (method != "svg")
        assert axes.get_xticks().tolist() == [0, 1, 2, 3, 4, 5] and axes.get_xlim() == (-0.5, 5.5)
    for kind, bars in zip(("sparse", "dense"), steps.containers, strict=True):
        assert [bar.get_height() for bar in bars] == data["calls_by_step"][kind] and bars.get_label() == kind
    words = figure.texts[0].get_text()
    assert "6 steps" in words and "it costs $5 or \\bad{$" in words.replace("\n   ", " ")


@every_method
def test_times_are_points_from_zero_up(host, method, drawn):
    """No lines from layer to layer, which would look like a curve."""
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    _, _, data = host.report(patched, LATENT, PROMPT)
    axes = drawn()[1]["Time of a call (ms)"]
    found = data["costs"]["call_ms_by_layer"]
    points = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()}
    assert points == {kind: {place: found[name][kind] for place, name in enumerate(found)} for kind in found["0"]} and len(points) == 2
    assert all(line.get_linestyle() == "None" and line.get_marker() not in ("", "None") for line in axes.get_lines())
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(max(kinds.values()) for kinds in found.values())
    kinds = [kind for kind in ("sparse", "dense", "search") if kind in points]
    assert axes.get_xlim() == (-0.5, 1.5) and [text.get_text() for text in axes.get_legend().get_texts()] == kinds


def test_the_weight_kept_is_drawn_by_head(host, drawn):
    patched = host.patch("adaspa", host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    recall = host.report(patched, LATENT, PROMPT)[2]["recall_by_layer_and_head"]
    axes = drawn()[1]["Attention weight kept"]
    *spans, means = axes.get_lines()
    assert [list(span.get_xdata()) for span in spans] == [pytest.approx([min(heads), max(heads)]) for heads in recall.values()]
    assert list(means.get_xdata()) == pytest.approx([sum(heads) / 2 for heads in recall.values()]) and means.get_linestyle() == "None"
    low, high = axes.get_xlim()
    assert low <= 0 and high >= 1 and axes.get_ylim() == (1.5, -0.5) and axes.get_legend() is None


@pytest.mark.parametrize("settings, asked", [({"fidelity": 0.98}, 0.02), ({"fidelity": 0.5}, 0.5), ({"sparsity": 0.4}, None)])
def test_the_error_is_drawn_by_head_beside_what_was_asked(host, drawn, settings, asked):
    patched = host.patch("auto", host.load("wan"), **settings)
    host.sample(patched, "wan")
    _, image, data = host.report(patched, LATENT, PROMPT)
    errors, (figure, panels) = data["error_by_layer_and_head"], drawn()
    axes = panels["Off from dense attention"]
    *spans, means = axes.get_lines()[:3]
    assert [list(span.get_xdata()) for span in spans] == [pytest.approx([min(heads), max(heads)]) for heads in errors.values()]
    assert list(means.get_xdata()) == pytest.approx([sum(heads) / 2 for heads in errors.values()]) and means.get_linestyle() == "None"
    assert [line.get_xdata()[0] for line in axes.get_lines()[3:]] == ([] if asked is None else [asked])
    low, high = axes.get_xlim()
    assert low <= 0 and high >= max(asked or 0, *(max(heads) for heads in errors.values())) and axes.get_ylim() == (1.5, -0.5)
    assert can_be_read_small(image, figure) and ("dashed" in axes.get_xlabel()) == (asked is not None)
    words, percent = " ".join(figure.texts[0].get_text().split()), host.module("status").percent
    what = f"asked {0.4:.1%}" if asked is None else f"at most {percent(asked)} asked"
    off = f"off by {percent(data['measured_error'])}"
    assert f"{data['achieved_sparsity']:.1%} skipped in sparse calls, {off} ({what}), {data['run_sparsity']:.1%} over the whole run" in words


def test_a_run_of_one_step_has_one_step_on_its_axes(host, drawn):
    patched = host.patch("svg", host.load("wan"), sparsity=0.5, warmup_steps=0)
    host.sample(patched, "wan", steps=1)
    _, image, data = host.report(patched, LATENT, PROMPT)
    figure, panels = drawn()
    assert can_be_read_small(image, figure) and data["sparse_calls"] == 2
    for name in ("Attention skipped", "Calls by step"):
        assert panels[name].get_xlim() == (-0.5, 0.5) and panels[name].get_xticks().tolist() == [0]
    assert "1 step," in figure.texts[0].get_text()


def long_record(host, method, layers=60, heads=24, steps=50, until=50, vace=0):
    """A record of a big model, without its run: warm-up to step 10, layer 0 dense."""
    of_record, of_config, of_layout = (importlib.import_module(f"pack.attention.{name}") for name in ("record", "config", "layout"))
    config = of_config.MethodConfig(0.8, dense_layers="0")
    record = of_record.RunRecord(method, config, steps, layers, seed=1, warmup=10)
    record.model, record.backend, record.outcome = "HunyuanVideo", "triton", "finished" if until == steps else "interrupted"
    layout = of_layout.VideoLayout(33, 45, 80, prefix=256)
    generator = torch.Generator().manual_seed(0)
    for step in range(until):
        for layer, stack in [(layer, "") for layer in range(layers)] + [(layer, "vace") for layer in range(vace)]:
            kind = "search" if method == "AdaSpa" and step in (9, 29) else "dense" if step < 10 or layer == 0 else "sparse"
            record.timed(kind, (layer, stack), 0.0, {"search": 0.3, "dense": 0.25, "sparse": 0.09}[kind] + layer / 1000)
            if kind == "search":
                record.searched(step)
            if kind != "sparse":
                record.dense(step, layer, "dense layer" if layer == 0 else "warm-up step", stack=stack)
                continue
            call = SimpleNamespace(step=step, layer=layer, stack=stack, layout=layout)
            values = torch.rand(2, 1, heads, generator=generator) / 4
            record.sparse(call, of_record.Figures(values[0], **({"temporal": values[1] > 0.1} if method == "SVG" else {"recall": 1 - values[1]})))
            if record.wants_picture(call):
                record.picture(call, torch.rand(1, heads, 128, 128, generator=generator) > 0.8)
    return record


def picture_of(host, record, layer=0, head=0):
    data = {**record.to_json(), "costs": record.costs()}
    return host.module("report_picture").draw(data, host.module("report").chosen_mask(record, data, layer, head))


@pytest.mark.parametrize("method", ["SVG", "AdaSpa"])
def test_the_picture_of_a_long_run_of_a_big_model_can_be_read_small(host, method, drawn):
    record = long_record(host, method)
    image = picture_of(host, record, 70, 40)
    figure, panels = drawn()
    assert can_be_read_small(image, figure)
    assert [text.get_text() for text in panels["Time of a call (ms)"].get_xticklabels()] == ["50", "40", "30", "20", "10", "0"]
    assert panels["Calls by step"].get_xticks().tolist() == [0, 10, 20, 30, 40]
    assert " ".join(panels["Pairs computed"].get_title().split()) == (
        "Pairs computed: this model has layers 0 to 59: layer 59 is shown this layer has heads 0 to 23: head 23 is shown"
    )


def test_the_picture_of_a_run_that_broke_off_with_two_stacks_and_many_notes_can_be_read_small(host, drawn):
    record = long_record(host, "AdaSpa", until=14, vace=8)
    for number in range(20):
        record.note(f"note {number} of twenty")
    image = picture_of(host, record, 62)
    figure, panels = drawn()
    assert can_be_read_small(image, figure)
    assert "0 vace" in [text.get_text() for text in panels["Time of a call (ms)"].get_xticklabels()]
    assert panels["Attention skipped"].get_xlim() == panels["Calls by step"].get_xlim() == (-0.5, 49.5)
    words = figure.texts[0].get_text()
    assert "interrupted" in words and "white in the first panel: no call" in words and "note 5" in words and "note 6" not in words
    assert "and 14 more lines, all of which are in the JSON" in words and "layer 2 vace, head 0" in panels["Pairs computed"].get_title()


def test_the_picture_of_an_empty_record_says_so(host, drawn):
    record = importlib.import_module("pack.attention.record").RunRecord("SVG", None, 20)
    record.outcome = "failed (RuntimeError)"
    image = picture_of(host, record)
    figure, panels = drawn()
    assert can_be_read_small(image, figure) and figure.axes[0].texts[0].get_text() == "no call on record"
    assert figure.texts[0].get_text() == "SVG, failed (RuntimeError)\nnothing ran sparse\n0 sparse, 0 dense calls, 20 steps"
    assert panels["Calls by step"].get_ylim() == (0, 1)


def test_probed_calls_are_among_the_times(host, drawn):
    patched = host.patch("svg", host.load("wan"), sparsity=0.5)
    probed = host.execute("SparseAttentionProbe", {"model": patched}, "12").result[0]
    host.sample(probed, "wan")
    _, image, data = host.report(probed, LATENT, PROMPT)
    figure, panels = drawn()
    took = [kinds["probed"] for kinds in data["costs"]["call_ms_by_layer"].values()]
    (points,) = (line for line in panels["Time of a call (ms)"].get_lines() if line.get_label() == "probed")
    assert list(points.get_ydata()) == took and len(took) == 2 and can_be_read_small(image, figure)


def test_the_picture_is_the_same_whatever_style_figures_have(host):
    """Another node may have set a dark one for all; and its own stays as it is."""
    import matplotlib

    module = host.module("report_picture")
    plain = module.draw_message("nothing to show")
    with matplotlib.rc_context({"text.color": "white", "font.size": 40.0, "figure.facecolor": "black", "savefig.facecolor": "black"}):
        assert torch.equal(module.draw_message("nothing to show"), plain)
        assert (matplotlib.rcParams["text.color"], matplotlib.rcParams["font.size"]) == ("white", 40)


def why(host, model, samples=LATENT, prompt=PROMPT):
    passed, image, data = host.report(model, samples, prompt)
    assert passed is samples and shows_something(image)
    assert data["schema"] == 1 and data["method"] is None
    return data["why"]


def test_an_unpatched_model_is_said(host, drawn):
    """As it is where the patch is bypassed: it is connected, and is not to be told to connect it."""
    sentence = "No sparse attention patch in this run: it is bypassed or muted, or this model does not come out of one."
    assert why(host, host.load("wan")) == sentence
    (words,) = drawn()[0].texts
    assert words.get_text().split() == sentence.split()


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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
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


@pytest.mark.parametrize("layer, head, place, column, title", [
    (0, 1, 0, 1, "Pairs computed: layer 0, head 1"),
    (-1, -2, 1, 0, "Pairs computed: layer 1, head 0"),
    (5, 0, 1, 0, "Pairs computed, head 0: this model has layers 0 to 1: layer 1 is shown"),
    (-1000, 1, 0, 1, "Pairs computed, head 1: this model has layers 0 to 1: layer 0 is shown"),
    (1, 2, 1, 1, "Pairs computed, layer 1: this layer has heads 0 to 1: head 1 is shown"),
    (1, -3, 1, 0, "Pairs computed, layer 1: this layer has heads 0 to 1: head 0 is shown"),
    (9, 9, 1, 1, "Pairs computed: this model has layers 0 to 1: layer 1 is shown this layer has heads 0 to 1: head 1 is shown"),
])
def test_the_report_takes_a_layer_and_a_head(host, drawn, layer, head, place, column, title):
    """The nearest there is, where there is no such one, and says so. The JSON is the whole run's."""
    patched = host.patch("adaspa", host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan")
    inputs = {"model": patched, "samples": LATENT, "layer": layer, "head": head}
    _, image, data = host.execute("SparseAttentionReport", inputs, "8", PROMPT).result
    record, (figure, panels) = host.record(patched), drawn()
    axes = panels["Pairs computed"]
    (picture,) = axes.get_images()
    assert torch.equal(torch.tensor(picture.get_array()).bool(), record.mask_picture(place, column))
    assert " ".join(axes.get_title().split()) == title and can_be_read_small(image, figure)
    assert json.loads(data) == json.loads(json.dumps({**record.to_json(), "costs": record.costs()}))


def test_the_nearest_layer_with_a_mask_stands_in_for_a_dense_one(host, drawn):
    """With SVG's own dense_layers, "0", and the report's own layer, 0, as a newcomer has them."""
    patched = host.patch("svg", host.load("wan"), sparsity=0.5, dense_layers="0")
    host.sample(patched, "wan")
    _, image, _ = host.report(patched, LATENT, PROMPT)
    figure, panels = drawn()
    axes = panels["Pairs computed"]
    assert " ".join(axes.get_title().split()) == "Pairs computed, head 0: layer 0 ran dense (dense layer): layer 1 is shown"
    assert torch.equal(torch.tensor(axes.get_images()[0].get_array()).bool(), host.record(patched).mask_picture(1, 0))
    assert can_be_read_small(image, figure)


@pytest.mark.parametrize("dense, words", [(True, "layer 2 ran dense: layer 3 is shown"), (False, "layer 2 was not called: layer 3 is shown")])
def test_what_kept_a_layer_from_a_mask_is_said(host, dense, words):
    record = long_record(host, "SVG", layers=0, until=0)
    layout = importlib.import_module("pack.attention.layout").VideoLayout(2, 8, 8)
    for layer in (0, 3):
        call = SimpleNamespace(step=0, layer=layer, stack="", layout=layout)
        record.sparse(call, importlib.import_module("pack.attention.record").Figures(torch.full((1, 2), 0.5)))
        record.picture(call, torch.ones(1, 2, 128, 128, dtype=torch.bool))
    if dense:
        record.dense(0, 2, "out of memory in the sparse path")
    mask = host.module("report").chosen_mask(record, record.to_json(), 2, 0)
    assert mask[:2] == (3, 0) and mask.pairs.all() and mask.remarks == (words,)


def test_an_older_run_says_that_its_masks_are_gone(host, drawn):
    record = long_record(host, "SVG", layers=2, steps=12, until=12)
    record.forget_pictures()
    picture_of(host, record)
    axes = drawn()[1]["Pairs computed"]
    assert axes.texts[0].get_text().replace("\n", " ") == "no mask is kept: only the newest run of a model has them" and not axes.get_images()


def test_only_the_newest_run_keeps_pictures(host):
    patched = host.patch("svg", host.load("wan"), sparsity=0.5)
    host.sample(patched, "wan")
    host.sample(patched, "wan", seed=1)
    older, newer = host.records(patched)
    assert older.mask_picture(0, 0) is None and newer.mask_picture(0, 0) is not None
