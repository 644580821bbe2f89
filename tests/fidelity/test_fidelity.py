"""The harness of docs/FIDELITY.md without its model: variants, keys, comparisons, tables; and that the page says what the JSON holds."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from load_pack import ROOT
from pack.attention.methods import adaspa, svg
from pack.benchmarks.fidelity import __main__ as command
from pack.benchmarks.fidelity import methods, papers, report, store, study
from pack.benchmarks.fidelity.hosts import AttentionFigures, Comfy
from pack.benchmarks.fidelity.variants import FEW_STEPS, GROUPS, VARIANTS, OfFifty, Variant, chosen
from pack.kernels import density
from video_oracle import LAYOUTS, is_text, make_call, make_session, random_qkv, token_mask

# ---- variants ----


def test_variants_are_chosen_by_name_and_by_group():
    assert [variant.name for variant in chosen("auto, svg")] == ["auto", "svg"]
    assert chosen("all") == list(VARIANTS.values()) and chosen("none") == [] == chosen("")
    for group in GROUPS:
        assert chosen(group) == [variant for variant in VARIANTS.values() if group in variant.groups] != []
    assert [variant.name for variant in chosen("svg,plot")].count("svg") == 1
    with pytest.raises(ValueError, match=r'^"svgg" is neither'):
        chosen("plot,svgg")


def test_every_variant_can_be_set_up_or_says_why_not():
    for name, variant in VARIANTS.items():
        assert name == variant.name and variant.title and variant.about and variant.groups and set(variant.groups) <= set(GROUPS)
        assert variant.base is None or variant.base in VARIANTS
        if variant.why_not():
            assert variant.why_not().startswith(variant.method.NAME)
            continue
        for budget in variant.budgets or (0.5, 0.9):
            config = variant.config(budget, variant.steps or 20)
            if variant.fidelities:
                assert config.fidelity == variant.fidelities[budget] and config.sparsity < 0
            else:
                assert variant.equal_work or config.sparsity == budget
            assert config is None or config.min_tokens == 0


def test_a_variant_whose_settings_do_not_exist_is_left_out_by_name():
    assert Variant("a", "A", "", svg, {"sampled_rows": 3}).why_not() is None
    assert Variant("a", "A", "", svg, {"no_such": 3, "sampled_rows": 3}).why_not() == "SVG has no setting no_such"
    reason = Variant("a", "A", "", adaspa, {"token_order": "spiral"}).why_not()
    assert reason.startswith("AdaSpa does not take token_order: 'spiral' is not one of ")


@pytest.mark.parametrize("steps, count, expected", [(50, 10, 10), (20, 10, 4), (20, 0, 0), (20, 5, 2), (10, 30, 6)])
def test_steps_of_fifty_are_scaled(steps, count, expected):
    assert Variant("a", "A", "", adaspa, {"warmup_steps": OfFifty(count)}).config(0.8, steps).warmup_steps == expected


def test_equal_work_skips_as_much_as_one_step_of_warmup_would():
    found = [variant for variant in VARIANTS.values() if variant.equal_work]
    assert {(variant.method.NAME, variant.settings["warmup_steps"]) for variant in found} >= {("SVG", 0), ("AdaSpa", 1), ("Auto", 3)}
    possible = 0
    for variant in found:
        for budget in variant.budgets:
            config, steps = variant.config(budget, variant.steps), variant.steps
            sparse = steps - variant.settings["warmup_steps"] - variant.settings["end_steps"]
            if config is None:
                assert sparse == 0 or budget * (steps - 1) / sparse > 0.95
                continue
            possible += 1
            assert config.sparsity * sparse == pytest.approx(budget * (steps - 1), abs=1e-4)
    assert possible >= 12 and {variant.steps for variant in found} == set(FEW_STEPS)


def test_the_papers_findings_are_about_variants_that_meet():
    for finding in papers.FINDINGS:
        better, worse = VARIANTS[finding.better], VARIANTS[finding.worse]
        assert set(better.budgets or (0.7, 0.8)) & set(worse.budgets or (0.7, 0.8)), finding.question


# ---- methods of its own ----


def played(method, steps, **knobs):
    """The run's record after a call in every step of 20, warm-up 4, and the masks in between."""
    layout = LAYOUTS["4x7x9"]
    run = make_session(method, steps=20, warmup=4, refresh_at=11, sparsity=0.6, **knobs)
    for step in steps:
        call = make_call(layout, random_qkv(layout, seed=step), step=step)
        method.plan(call, run.config, run.state(call))
    return run


@pytest.mark.parametrize("of_50, searches", [((10,), [3]), ((10, 30), [3, 11]), ((10, 20, 30), [3, 7, 11]), ((10, 20, 30, 40), [3, 7, 11, 15])])
def test_adaspa_searches_where_it_is_told_to(of_50, searches):
    assert sorted(played(methods.searches_at(*of_50), range(2, 20), token_order="raster").record.searches) == searches


def test_searches_that_do_not_rise_are_refused():
    for wrong in ((30, 10), (10, 10), ()):
        with pytest.raises(ValueError, match="do not rise"):
            methods.searches_at(*wrong)


@pytest.mark.parametrize("temporal", [True, False])
def test_heads_of_one_kind_are_never_looked_at(temporal, monkeypatch):
    monkeypatch.setattr(svg.kernels, "sampled_errors", lambda *args, **kwargs: pytest.fail("looked at the heads"))
    layout, method = LAYOUTS["9x16x16"], methods.one_kind(temporal)
    run = make_session(method, sparsity=0.6)
    call = make_call(layout, random_qkv(layout, batch=2, heads=3), step=3)
    plan = method.plan(call, run.config, run.state(call))
    kind = svg.Bands.build(layout, 0.6, torch.device("cpu")).candidates()[svg.TEMPORAL if temporal else svg.SPATIAL]
    assert torch.equal(token_mask(plan, layout, 2, 3), token_mask(kind, layout).expand(2, 3, -1, -1))


@pytest.mark.parametrize("name, sparsity", [("9x16x16", 0.8), ("7x9x11+suffix", 0.5), ("9x16x16", 0.0)])
def test_random_blocks_keep_the_budget_and_every_text_token(name, sparsity):
    layout, masks = LAYOUTS[name], []
    for layer, seed in ((1, 7), (1, 7), (2, 7), (1, 8)):
        run = make_session(methods.RANDOM_BLOCKS, sparsity=sparsity, seed=seed, skipped_blocks="drop")
        call = make_call(layout, random_qkv(layout, heads=3), layer=layer)
        plan = methods.RANDOM_BLOCKS.plan(call, run.config, run.state(call))
        assert methods.RANDOM_BLOCKS.plan(replace(call, step=5), run.config, run.state(call)) is plan
        masks.append(token_mask(plan, layout, 1, 3))
        text, counted = is_text(layout), float(masks[-1].double().mean())
        assert masks[-1][..., text, :].all() and masks[-1][..., text].all() and abs(counted - (1 - sparsity)) < 0.06
        assert counted == pytest.approx(float(density(plan, layout.seq_len, layout.seq_len).mean()), abs=1e-6)
        assert torch.allclose(run.state(call).figures.density.double(), masks[-1].double().mean((2, 3)), atol=1e-6)
    assert torch.equal(masks[0], masks[1])
    if sparsity:
        assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3]) and not torch.equal(masks[0][:, 0], masks[0][:, 1])


# ---- figures of attention ----


@pytest.mark.parametrize("rows", [0, 40, 10_000])
def test_attentions_error_is_that_of_its_definition(rows):
    layout = LAYOUTS["4x7x9"]
    figures, qkv = AttentionFigures(rows), random_qkv(layout, batch=2, heads=3)
    exact = torch.nn.functional.scaled_dot_product_attention(*(part.double() for part in qkv))
    factors = torch.tensor([1.1, 0.7], dtype=torch.float64)  # off by 0.1 and by 0.3 of it, wherever it is looked at
    for step in (3, 4):
        figures.compare(make_call(layout, qkv, step=step, layer=2), (exact * factors[:, None, None, None]).float())
    assert figures.by_layer(4)[:2] == [None, None] and figures.by_layer(4)[3] is None
    assert figures.by_layer(4)[2] == pytest.approx([0.1, 0.3], abs=1e-5)


def test_calls_are_timed_by_kind():
    figures = AttentionFigures(0)
    for kind, seconds in (("sparse", 0.010), ("sparse", 0.030), ("dense", 0.050)):
        figures.timed(kind, 2.0, 2.0 + seconds)
    assert figures.milliseconds() == pytest.approx({"dense": 50, "sparse": 20})


# ---- keys ----


def test_code_counts_and_words_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    texts = {
        "plain": "def f(x):\n    return x + 1\n", "commented": '"""Words."""\n\n# More.\ndef f(x):\n    """Says."""\n\n    return (x + 1)  # there\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    hashes = {}
    for name, text in texts.items():
        (tmp_path / "code.py").write_text(text)
        store.code_hash.cache_clear()
        hashes[name] = store.code_hash((tmp_path / "code.py",))
    store.code_hash.cache_clear()
    assert hashes["plain"] == hashes["commented"] != hashes["other"]


def test_a_run_depends_on_its_own_method_and_on_the_kernels_that_run():
    def names(*arguments):
        return {path.relative_to(ROOT).as_posix() for path in store.code_of(*arguments)}

    of_svg, dense = names("svg", False, False), names(None, False, False)
    assert {"attention/methods/svg.py", "attention/dispatch.py", "kernels/torch_ops.py", "demo/sampler.py"} <= of_svg
    assert not {"attention/methods/adaspa.py", "attention/methods/__init__.py", "kernels/triton_forward.py", "nodes/patch.py"} & of_svg
    assert "kernels/triton_forward.py" in names("svg", True, False) and "nodes/patch.py" in names("adaspa", True, True)
    assert not any(name.startswith(("attention", "kernels")) for name in dense) and set(store.HARNESS) == dense


def test_what_a_method_imports_beside_itself_counts(tmp_path):
    for name, text in {"one": "from .two import x", "two": "from . import three\nfrom .. import outside", "three": "import os", "four": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert {path.stem for path in store._with_imports(tmp_path / "one.py")} == {"one", "two", "three"}


def test_a_store_keeps_whole_runs(tmp_path, monkeypatch):
    kept = store.Store(tmp_path / "new")
    latents = torch.randn(1, 16, 2, 4, 4)
    kept.save("a", {"value": 1.5}, latents)
    assert kept.load("a") == {"value": 1.5} and torch.equal(kept.latents("a"), latents) and kept.load("b") is None
    monkeypatch.setattr(store.os, "replace", lambda *names: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception):
        kept.save("b", {"value": 2})
    assert kept.load("b") is None and list(kept.keys()) == ["a"]


def test_a_key_tells_every_fact():
    facts = {"seed": 0, "config": {"sparsity": 0.8, "token_order": "tile"}}
    assert store.key_of(facts) == store.key_of({"config": {"token_order": "tile", "sparsity": 0.8}, "seed": 0})
    assert len({store.key_of(other) for other in (facts, {**facts, "seed": 1}, {**facts, "config": {"sparsity": 0.8}})}) == 3


# ---- comparisons and tables, on made-up rows ----


def row(variant, budget, *psnr, **others):
    """As study.row_of makes it; psnr: by seed, then clip."""
    of = VARIANTS[variant]
    return {
        "variant": variant, "title": of.title, "about": of.about, "method": of.method.NAME, "groups": list(of.groups), "base": of.base,
        "budget": budget, "steps": of.steps or 20, "equal_work": of.equal_work, "asked_sparsity": budget,
        "warmup_steps": of.settings.get("warmup_steps", 4), "end_steps": of.settings.get("end_steps", 0),
        "cache_refresh": of.settings.get("cache_refresh", -1), "achieved_sparsity": budget,
        "run_sparsity": budget * 0.8, "psnr_db": list(psnr), "ssim": [[0.9] * len(run) for run in psnr], "attention_error": [None, 0.1, 0.3],
        "searches": 2, "search_steps": [], "milliseconds": {"sparse": 12.3}, "seconds": 1.0, "notes": [], **others,
    }


def made_up(*rows):
    about = {
        "host": "a host", "facts": {"device": "cpu", "error_rows": 7}, "model_sha256": "0123456789abcdef", "layers": 3, "heads": 2, "head_dim": 64,
        "layout": {"frames": 3, "height": 4, "width": 5}, "tokens": 60, "steps": 20, "seeds": [0, 1], "clips": ["one", "two"],
    }
    return {"schema": 1, "about": about, "left_out": study.LEFT_OUT, "left_out_variants": {}, "checks": [], "rows": list(rows)}


def test_a_difference_is_taken_pair_by_pair():
    """+1 and +3 dB: mean 2; standard deviation sqrt(2), so two standard errors of two pairs are 2."""
    off = study.difference(row("svg", 0.8, [21.0], [33.0]), row("svg", 0.8, [20.0], [30.0]))
    assert (off.mean, off.noise) == pytest.approx((2, 2)) and not off.certain and str(off) == "+2.00 ± 2.00"
    sure = study.difference(row("svg", 0.8, [21.0, 31.1]), row("svg", 0.8, [20.0, 30.0]))
    assert sure.certain and sure.noise == pytest.approx(0.1)
    alone = study.difference(row("svg", 0.8, [21.0]), row("svg", 0.8, [20.0]))
    assert (alone.mean, alone.noise, alone.certain) == (1, None, False)
    equal = study.difference(row("svg", 0.8, [None, 30.0]), row("svg", 0.8, [None, 29.0]))
    assert (alone.verdict, equal.verdict, sure.verdict, off.verdict) == ("unknown: one pair", "within noise", "yes", "within noise")
    assert equal.mean == 0.5 and math.isinf(study.difference(row("svg", 0.8, [None, 30.0]), row("svg", 0.8, [25.0, 29.0])).mean)


def test_at_equal_work_the_other_is_read_between_its_rows():
    """24 dB at 0.40 of the run and 20 at 0.60: 21 at 0.55."""
    others = [row("svg", 0.7, [20.0, 20.0], run_sparsity=0.6), row("svg", 0.5, [24.0, 24.0], run_sparsity=0.4)]
    for run_sparsity, gain in ((0.55, 1.0), (0.4, -2.0), (0.6, 2.0)):
        off = study.difference_at_equal_work(row("svg", 0.6, [22.0, 22.0], run_sparsity=run_sparsity), others)
        assert (off.mean, off.noise) == pytest.approx((gain, 0))
    for beyond in (0.39, 0.61):
        assert study.difference_at_equal_work(row("svg", 0.6, [22.0, 22.0], run_sparsity=beyond), others) is None
    assert study.difference_at_equal_work(row("svg", 0.6, [22.0], run_sparsity=0.4), []) is None


@pytest.mark.parametrize("better, worse, reproduced", [
    ([[25.0, 26.0]], [[24.0, 25.1]], "yes"), ([[24.0, 25.1]], [[25.0, 26.0]], "no"), ([[25.0, 24.0]], [[24.0, 25.0]], "within noise"),
    ([[25.0]], [[24.0]], "unknown: one pair"), ([[25.0]], [[25.0]], "within noise"),
])
def test_what_is_reproduced_follows_from_the_figures(better, worse, reproduced):
    rows = [row("svg-online", 0.7, *better), row("svg-fixed", 0.7, *worse), row("svg-fixed", 0.8, *worse)]
    (answer,) = papers.answers(rows)
    assert (answer.budget, answer.finding.worse, answer.reproduced) == (0.7, "svg-fixed", reproduced)
    table = report.papers_table(made_up(*rows))
    assert table.splitlines()[-1].endswith(f"| {reproduced} |") and answer.finding.paper in table


def test_the_goals_are_told_against_the_papers_settings():
    rows = [
        row("adaspa-paper", 0.8, [20.0, 21.0]), row("adaspa", 0.8, [21.5, 22.0]), row("auto", 0.8, [21.0, 22.0], run_sparsity=0.6),
        row("adaspa", 0.7, [50.0, 50.0]), row("adaspa-paper", 0.7, [24.0, 25.0]),
    ]
    first, second = report.goals_table(made_up(*rows)).splitlines()[2:]
    assert first == "| AdaSpa's defaults | 20.50 ± 0.71 | 0.640 | 21.75 ± 0.35 | 0.640 | +1.25 ± 0.50 | +1.0 | yes | +1.25 ± 0.50 |"
    # 0.6 of the run is half of the way from 0.64 to 0.56, where the paper's has 24 and 25.
    assert second == "| Auto's defaults | 20.50 ± 0.71 | 0.640 | 21.50 ± 0.71 | 0.600 | +1.00 ± 0.00 | +2.0 | no | -1.00 ± 0.00 |"
    assert report.goals_table(made_up(*rows[1:])) == report.NOT_MEASURED


def test_switches_are_told_against_their_base():
    rows = [
        row("auto", 0.8, [24.0, 24.0]), row("auto-once", 0.8, [24.5, 24.6]), row("auto-drop", 0.8, [22.0, 22.1]), row("auto", 0.9, [20.0, 20.0]),
        row("auto-once", 0.9, [20.5, 19.5]),
    ]
    lines = {line.split(" | ")[0]: line for line in report.better_table(made_up(*rows)).splitlines()}
    assert lines["| Auto, one search"].endswith("| Auto | 24.55 (+0.55 ± 0.10) | 20.00 (+0.00 ± 1.00) | yes | yes |")
    assert lines["| Auto, skipped blocks dropped"].endswith("| 22.05 (-1.95 ± 0.10) | - | no | no |")


def test_the_best_schedule_is_sought_among_those_of_equal_work():
    def name(warmup, end=0):
        return f"auto-8-steps-warmup-{warmup}-end-{end}-again"

    rows = [
        row(name(1), 0.7, [30.0, 31.0], run_sparsity=0.61), row(name(2), 0.7, [31.0, 32.1], run_sparsity=0.6),
        row(name(1, 1), 0.7, [29.0, 29.0], run_sparsity=0.61),
        row(name(2, 1), 0.7, [50.0, 50.0], run_sparsity=0.4),  # fell short of the work that was asked of it
    ]
    (best,) = report.best_schedules(rows)
    assert best[:3] == ("Auto", 8, 0.7) and best[3]["variant"] == name(2) and best[4] == "+1.05 ± 0.10"
    text = report.few_steps_table(made_up(*rows))
    assert "| Auto | 8 | 0.7 | warm-up 2, 0 dense at the end, searches again | 31.55 ± 0.78 | +1.05 ± 0.10 |" in text
    assert "| Auto | 8 | 0.7 | again | 30.50 (0.61) | 29.00 (0.61) | 31.55 (0.60) | 50.00 (0.40) |" in text


@pytest.mark.parametrize("seeds, sure", [((0,), "Of 2 pairs"), ((0, 1, 2), "Of 6 pairs")])
def test_the_page_says_how_sure_verdicts_are(seeds, sure):
    """Student's t with one degree of freedom: 2 / pi arctan(2) = 0.70; with five, 0.90 by its table."""
    data = made_up(row("svg", 0.8, [25.0, 26.0]))
    data["about"]["seeds"] = list(seeds)
    assert f"{sure} such a range holds the true mean {'70%' if len(seeds) == 1 else '90%'} of the time" in report.setting(data)


def test_a_page_gets_new_tables_and_keeps_its_words():
    page = "# Words\n" + "".join(f"before {name}\n{report.marks(name)[0]}\npast table\n{report.marks(name)[1]}\nafter\n" for name in report.SECTIONS)
    data = made_up(row("svg", 0.8, [25.0, 26.0]), row("random", 0.8, [None, None]))
    new = report.written(page, data)
    assert "past table" not in new and [line for line in new.splitlines() if line.startswith(("# ", "before", "after"))] == [
        line for line in page.splitlines() if line.startswith(("# ", "before", "after"))
    ]
    assert "| SVG | 0.80 | 0.800 | 0.640 | 25.50 ± 0.71 | 0.9000 | 0.200 | 2 |\n" in new
    assert "| Random blocks | 0.80 | 0.800 | 0.640 | equal |" in new and "**Times** are left out" in new
    assert report.written(new, data) == new and report.written(new, None).count(report.NOT_MEASURED) == len(report.SECTIONS)
    with pytest.raises(ValueError, match="no place for layers"):
        report.written(page.replace(report.marks("layers")[0], ""), data)


def test_a_run_of_the_command_tells_its_times():
    data = made_up(row("svg", 0.8, [25.0, 26.0]), row("random", 0.8, [None, None]))
    texts = report.sections(data)
    assert "| SVG | 0.80 | 0.800 | 0.640 | 25.50 ± 0.71 | 0.9000 | 0.200 | 2 | 12 |" in texts["plot"]
    assert "**ms a call**" in texts["setting"] and "A dense call takes" not in texts["setting"]
    data["rows"][0]["milliseconds"]["dense"] = 45.6
    assert "A dense call takes 46 ms." in report.sections(data)["setting"]


def test_the_page_says_what_the_json_holds():
    page = command.PAGE.read_text(encoding="utf-8")
    data = json.loads(command.RESULTS.read_text(encoding="utf-8")) if command.RESULTS.is_file() else None
    assert report.written(page, data) == page
    pictures = set(re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page))
    assert pictures <= set(report.PICTURES.values()) and all((command.PAGE.parent / name).is_file() for name in pictures)
    if data:
        assert command.to_json(data) == command.RESULTS.read_text(encoding="utf-8")
        assert [one for one in data["checks"] if one["passed"] is False] == []


def test_the_shipped_defaults_reach_their_goals():
    goals = report.goals_table(json.loads(command.RESULTS.read_text(encoding="utf-8"))).splitlines()[2:]
    assert len(goals) == len(report.GOALS) and all(" | yes | " in line for line in goals), goals


def test_a_plot_is_the_same_every_time(tmp_path):
    data = made_up(*(row(name, budget, [30 - 10 * budget, 31.0]) for name in ("svg", "auto") for budget in (0.5, 0.8)))
    for name in ("a.png", "b.png"):
        assert report.plot(data, "plot", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not report.plot(made_up(row("svg-online", 0.8, [30.0, 31.0])), "plot", tmp_path / "c.png") and not (tmp_path / "c.png").exists()


def test_switches_are_drawn_beside_what_they_are_switches_of():
    rows = [row(name, 0.8, [30.0, 31.0]) for name in ("adaspa", "adaspa-drop", "auto", "auto-drop", "auto-once")]
    panels = [(title, {one["variant"] for one in shown}) for title, _, shown in report._by_base(rows)]
    assert panels == [("AdaSpa", {"adaspa", "adaspa-drop", "auto"}), ("Auto", {"auto", "auto-drop", "auto-once"})]
    assert [len(shown) for _, _, shown in report._by_base(rows[1:2])] == [1, 1], "without its base a line is drawn all the same"


@pytest.mark.parametrize("rows", [0, 2])
def test_the_json_is_json(rows):
    data = made_up(*(row("svg", budget, [25.0, None]) for budget in (0.5, 0.8)[:rows]))
    assert json.loads(command.to_json(data)) == data and len(data["rows"]) == rows


# ---- the command's options; ComfyUI ----


def test_options_are_read():
    options = command.parse(["--budgets", "0.9,0.5,0.9", "--seeds", "1,0,1", "--variants", "svg,few-steps"])
    assert (options.budgets, options.seeds) == ((0.5, 0.9), (1, 0)) and options.variants[0].name == "svg" and len(options.variants) > 50
    assert [variant.name for variant in command.parse([]).variants] == ["svg", "adaspa", "adaspa-paper", "auto", "random", "auto-fidelity"]


@pytest.mark.parametrize("wrong", [
    ["--clips", "0"], ["--clips", "99"], ["--steps", "1"], ["--budgets", "0.96"], ["--budgets", "x"], ["--seeds", "-1"], ["--variants", "nobody"],
    ["--error-rows", "-1"], ["--host", "other"],
])
def test_bad_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        command.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_on_comfyui_a_variant_needs_a_node_with_its_inputs():
    host = Comfy.__new__(Comfy)
    inputs = {"required": {"model": []}, "optional": {"sparsity": [], "min_tokens": [], "dense_layers": []}}
    host._nodes = {"SparseAttentionPatchSVG": {"input": inputs}}
    assert host.why_not(VARIANTS["svg-online"]) is None
    assert host.why_not(VARIANTS["svg-random"]) == "the node has no input head_types"
    assert host.why_not(VARIANTS["adaspa"]) == host.why_not(VARIANTS["random"]) == host.why_not(VARIANTS["svg-temporal"]) == "no node does this"
    assert VARIANTS["svg-online"].node_settings(0.7, 20) == {"sparsity": 0.7, "min_tokens": 0, "dense_layers": ""}
