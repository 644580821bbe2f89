"""Tables, the plot and the page, from the rows alone: what JSON holds is what they say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

from .checks import CLIPS, STEPS
from .papers import answers
from .study import decibels, difference, difference_at_equal_work, flat

NOT_MEASURED = "Not measured yet."
# The pictures of groups of variants, beside the page.
PICTURES = {"plot": "fidelity.png", "better": "fidelity_switches.png"}
# What the shipped settings are to gain over the paper's at this sparsity, in dB.
GOAL_BUDGET = 0.8
GOALS = (("adaspa", "AdaSpa's defaults", 1.0), ("auto", "Auto's defaults", 2.0))
# As much is skipped where two runs differ by no more than this.
_SAME_WORK = 0.015


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def psnr(row: dict) -> str:
    """The mean over seeds and clips, with its standard deviation where there are several."""
    values = flat(row["psnr_db"])
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return decibels(fmean(values))
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"


def _mean(row: dict | None) -> str:
    return decibels(fmean(flat(row["psnr_db"]))) if row else "-"


def ssim(row: dict) -> str:
    return f"{fmean(value for run in row['ssim'] for value in run):.4f}"


def attention_error(row: dict) -> str:
    """Relative L2, the mean over the layers that ran sparse."""
    by_layer = [value for value in row["attention_error"] or [] if value is not None]
    return f"{fmean(by_layer):.3f}" if by_layer else "-"


def _time(row: dict) -> str:
    times = row["milliseconds"]
    return f"{times['sparse']:.0f}" if "sparse" in times else "-"


def line(row: dict) -> list[str]:
    """A row as cells under HEADS."""
    return [
        row["title"], "-" if row["asked_sparsity"] is None else f"{row['asked_sparsity']:.2f}", f"{row['achieved_sparsity']:.3f}",
        f"{row['run_sparsity']:.3f}", psnr(row), ssim(row), attention_error(row), f"{row['searches']:g}", _time(row),
    ]


HEADS = ("method", "asked", "achieved", "of the run", "PSNR, dB", "SSIM", "relative L2", "searching steps", "ms a call")


def _of(rows: Sequence[dict], group: str) -> list[dict]:
    return [row for row in rows if group in row["groups"]]


def _of_variant(rows: Sequence[dict], name: str | None) -> list[dict]:
    return [row for row in rows if row["variant"] == name]


def drawn(data: dict, group: str) -> list[dict]:
    """The rows of a group that a plot shows: all but those of videos equal to the dense one."""
    return [row for row in _of(data["rows"], group) if all(map(math.isfinite, flat(row["psnr_db"])))]


def _with_picture(data: dict, group: str, words: str, table: str) -> str:
    return f"![{words}]({PICTURES[group]})\n\n{table}" if drawn(data, group) else table


def plot_table(data: dict, times: bool = True) -> str:
    """The plot's lines, by sparsity. times: with the milliseconds of a call, the last column."""
    rows = sorted(_of(data["rows"], "plot"), key=lambda row: row["budget"])
    if not rows:
        return NOT_MEASURED
    columns = slice(None if times else -1)
    table = _markdown(HEADS[columns], [line(row)[columns] for row in rows])
    return _with_picture(data, "plot", "PSNR against dense by what is skipped, one line a method", table)


def layers_table(data: dict) -> str:
    """Relative L2 by layer, at one sparsity."""
    rows = [row for row in _of(data["rows"], "plot") if row["budget"] == GOAL_BUDGET and row["attention_error"]]
    if not rows:
        return NOT_MEASURED
    cells = [[row["title"], *("dense" if value is None else f"{value:.3f}" for value in row["attention_error"])] for row in rows]
    return _markdown(["method", *(f"layer {number}" for number in range(len(rows[0]["attention_error"])))], cells)


def goals_table(data: dict) -> str:
    """The shipped settings against the paper's own."""
    at = {row["variant"]: row for row in data["rows"] if row["budget"] == GOAL_BUDGET and row["steps"] == data["about"]["steps"]}
    if "adaspa-paper" not in at:
        return NOT_MEASURED
    cells = []
    for name, what, asked in GOALS:
        if name in at:
            gain = difference(at[name], at["adaspa-paper"])
            met = "yes" if gain.mean >= asked else "no"
            equal_work = difference_at_equal_work(at[name], _of_variant(data["rows"], "adaspa-paper"))
            both = [cell for row in (at["adaspa-paper"], at[name]) for cell in (psnr(row), f"{row['run_sparsity']:.3f}")]
            cells.append([what, *both, str(gain), f"{asked:+.1f}", met, str(equal_work or "-")])
    of_run = "skipped of the run"
    heads = [f"at sparsity {GOAL_BUDGET:g}", "the paper's settings, dB", of_run, "dB", of_run, "difference", "asked", "reached", "at equal work"]
    return _markdown(heads, cells) if cells else NOT_MEASURED


def papers_table(data: dict) -> str:
    """The papers' findings beside ours."""
    found = answers(data["rows"])
    if not found:
        return NOT_MEASURED
    cells = [
        [
            answer.finding.question, answer.finding.paper, f"{answer.budget:g}",
            f"{decibels(fmean(flat(answer.better['psnr_db'])))} against {decibels(fmean(flat(answer.worse['psnr_db'])))}", str(answer.difference),
            f"{attention_error(answer.better)} against {attention_error(answer.worse)}", answer.reproduced,
        ]
        for answer in found
    ]
    return _markdown(["question", "papers, PSNR in dB", "sparsity here", "here, PSNR in dB", "difference", "relative L2", "reproduced?"], cells)


def better_table(data: dict) -> str:
    """Each switch against what it is a switch of."""
    rows = _of(data["rows"], "better")
    if not rows:
        return NOT_MEASURED
    at = {(row["variant"], row["budget"]): row for row in data["rows"]}
    budgets = sorted({row["budget"] for row in rows})
    cells = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [at.get((name, budget)) for budget in budgets]
        one = next(row for row in mine if row)
        compared = [(row, at.get((one["base"], row["budget"]))) if row else (None, None) for row in mine]
        differences = [difference(row, base) if row and base else None for row, base in compared]
        results = [_mean(row) + (f" ({off})" if off else "") for (row, _), off in zip(compared, differences, strict=True)]
        of_base = _of_variant(data["rows"], one["base"])
        equal_work = [difference_at_equal_work(row, of_base) for row in mine if row]
        base = of_base[0]["title"] if of_base else ""
        cells.append([
            one["title"], one["about"], base, *results, _verdict([off for off in differences if off]), _verdict([off for off in equal_work if off]),
        ])
    heads = ["line", "what is different", "against", *(f"at {budget:g}" for budget in budgets), "better?", "at equal work?"]
    table = _markdown(heads, cells)
    return _with_picture(data, "better", "PSNR against dense by what is skipped, one line a switch", table)


def _verdict(differences: Sequence) -> str:
    if not differences:
        return ""
    said = {off.verdict for off in differences}
    if {"yes", "no"} <= said:
        return "depends"
    return next(words for words in ("yes", "no", "within noise", "unknown: one pair") if words in said)


def few_steps_table(data: dict) -> str:
    """Schedules for few steps that skip as much of the run, and the best of them."""
    rows = _of(data["rows"], "few-steps")
    if not rows:
        return NOT_MEASURED
    schedules = sorted({(row["warmup_steps"], row["end_steps"]) for row in rows})
    names = [f"warm-up {warmup}" + (f", end {end}" if end else "") for warmup, end in schedules]
    cells = []
    for method, steps, budget, refresh in dict.fromkeys((row["method"], row["steps"], row["budget"], row["cache_refresh"]) for row in rows):
        same = [row for row in rows if (row["method"], row["steps"], row["budget"], row["cache_refresh"]) == (method, steps, budget, refresh)]
        by_schedule = {(row["warmup_steps"], row["end_steps"]): row for row in same}
        found = [by_schedule.get(one) for one in schedules]
        results = [f"{_mean(row)} ({row['run_sparsity']:.2f})" if row else "-" for row in found]
        cells.append([method, f"{steps}", f"{budget:g}", "again" if refresh else "once", *results])
    tables = [_markdown(["method", "steps", "sparsity", "searched", *names], cells)]
    best = best_schedules(rows)
    if best:
        lines = [[method, f"{steps}", f"{budget:g}", _schedule(row), psnr(row), runner_up] for method, steps, budget, row, runner_up in best]
        tables.append(_markdown(["method", "steps", "sparsity", "best schedule", "PSNR, dB", "over the next"], lines))
    return "\n\n".join(tables)


def _schedule(row: dict) -> str:
    return f"warm-up {row['warmup_steps']}, {row['end_steps']} dense at the end, {'searches again' if row['cache_refresh'] else 'one search'}"


def best_schedules(rows: Sequence[dict]) -> list[tuple[str, int, float, dict, str]]:
    """(method, steps, budget, row, by how much) of the schedule nearest to dense among those that skip as much of the run."""
    found = []
    for method, steps, budget in dict.fromkeys((row["method"], row["steps"], row["budget"]) for row in rows):
        same = [row for row in rows if (row["method"], row["steps"], row["budget"]) == (method, steps, budget)]
        same = [row for row in same if row["run_sparsity"] >= max(row["run_sparsity"] for row in same) - _SAME_WORK]
        if len(same) >= 2:
            first, second, *_ = sorted(same, key=lambda row: fmean(flat(row["psnr_db"])), reverse=True)
            off = difference(first, second)
            found.append((method, steps, budget, first, f"{off}" + ("" if off.certain else f", {off.verdict}")))
    return found


def setting(data: dict, times: bool = True) -> str:
    """On what it was measured. times: whether tables tell them."""
    about, layout = data["about"], data["about"]["layout"]
    seeds, clips, clips_of = about["seeds"], about["clips"], ", ".join(about["clips"])
    size = f"{layout['frames']} x {layout['height']} x {layout['width']}"
    rows = about["facts"].get("error_rows", 0)
    lines = [
        f"- **Host**: {about['host']}, {about['facts'].get('device', 'its own device')}.",
        f"- **Model**: the demo's, {about['layers']} layers of {about['heads']} heads of {about['head_dim']}; sha256 {about['model_sha256'][:12]}.",
        f"- **Video**: {size} = {about['tokens']:,} tokens; {len(clips)} clip{'s' if len(clips) != 1 else ''} ({clips_of}), "
        f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}; {about['steps']} steps where nothing else is said.",
        "- **PSNR, SSIM**: of the final video's luminance against the dense run's; mean over clips and seeds, ± the standard deviation over them.",
        "- **Differences**: mean over the same clips and seeds, ± two standard errors; what is smaller than that is within noise."
        + _surety(len(clips) * len(seeds)),
        "- **Relative L2**: of attention's output, sparse against dense for the same q, k and v, in every sparse call"
        + (f" on {rows:,} of its rows" if rows else "") + "; mean over steps and layers."
        + ("" if any(row["attention_error"] for row in data["rows"]) else " Not told by this host."),
        *(_times(data["rows"]) if times else [_NO_TIMES]),
        *(f"- **{name}** is left out: {reason}." for name, reason in data["left_out"].items()),
        *(f"- Variant `{name}` is left out: {reason}." for name, reason in data["left_out_variants"].items()),
    ]
    if data["checks"]:
        lines += ["", f"The harness's checks of itself, on {CLIPS} clip in {STEPS} steps:", ""]
        words = {True: "passed", False: "**failed**", None: "not possible here"}
        lines += [f"- {one['check']}: {words[one['passed']]}. {one['found'][0].upper()}{one['found'][1:]}." for one in data["checks"]]
    return "\n".join(lines)


def _surety(pairs: int) -> str:
    """How much a verdict is worth: the chance that a mean of so few pairs is off by less than two standard errors (Student's t)."""
    if pairs < 2:
        return " Of one pair alone nothing can be told."
    chance = 2 * stats.t.cdf(2, pairs - 1) - 1
    return f" Of {pairs} pairs such a range holds the true mean {chance:.0%} of the time: take *yes* and *no* for no surer than that."


def _times(rows: Sequence[dict]) -> list[str]:
    """What the milliseconds of the tables are, and what a dense call takes beside them."""
    dense = [row["milliseconds"]["dense"] for row in rows if "dense" in row["milliseconds"]]
    words = "- **ms a call**: of a sparse call over all clips, planning and later searches included; other work on the machine counts."
    return [words + (f" A dense call takes {fmean(dense):.0f} ms." if dense else "")] if rows else []


_NO_TIMES = "- **Times** are left out: such runs take hours, beside other work. The README's demo and benchmarks/results have them."

SECTIONS = {
    "setting": setting, "goals": goals_table, "plot": plot_table, "layers": layers_table, "papers": papers_table, "better": better_table,
    "few-steps": few_steps_table,
}


_WITH_TIMES = ("setting", "plot")


def sections(data: dict | None, times: bool = True) -> dict[str, str]:
    """Every section's text; without data, that nothing is measured. times: whether those that have times tell them."""
    if not data:
        return dict.fromkeys(SECTIONS, NOT_MEASURED)
    return {name: make(data, times) if name in _WITH_TIMES else make(data) for name, make in SECTIONS.items()}


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a section of the page."""
    return f"<!-- fidelity {name}: made by python -m benchmarks.fidelity -->", f"<!-- /fidelity {name} -->"


def written(page: str, data: dict | None) -> str:
    """The page with its sections made anew, without times; the words around them stay. Raises ValueError where a section's place is missing."""
    for name, text in sections(data, times=False).items():
        start, end = marks(name)
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page has no place for {name}: a line {start} and a line {end}")
        page = pattern.sub(lambda _, new=f"{start}\n\n{text}\n\n{end}": new, page)
    return page


def plot(data: dict, group: str, path: Path) -> bool:
    """PSNR against what is skipped, of sparse calls and of the whole run, one line a variant of a group; whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = drawn(data, group)
    if not rows:
        return False
    panels = _PANELS[group](rows)
    tall = max(len({row["variant"] for row in shown}) for _, _, shown in panels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5 + 0.22 * tall), sharey=True, layout="constrained", squeeze=False)
    for axis, (title, share, shown) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(dict.fromkeys(row["variant"] for row in shown)):
            points = sorted((row[share], fmean(flat(row["psnr_db"])), row["title"]) for row in shown if row["variant"] == name)
            x, y, titles = zip(*points, strict=True)
            style = {"color": "black", "linewidth": 2.5} if titles[0] == title else {"color": f"C{number % 10}", "linestyle": _STYLES[number // 10]}
            axis.plot(x, y, marker="o", markersize=4, label=titles[0], **style)
        axis.set_title(title)
        axis.set_xlabel(_SHARES[share])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0][0].set_ylabel("PSNR against dense, dB")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


_STYLES = ("-", "--", ":", "-.")
_SHARES = {"achieved_sparsity": "skipped share of sparse calls", "run_sparsity": "skipped share of the run"}


def _by_share(rows: Sequence[dict]) -> list[tuple[str, str, Sequence[dict]]]:
    """A panel of all rows by what sparse calls skip, and one by what the run skips."""
    return [("sparse calls", "achieved_sparsity", rows), ("the run", "run_sparsity", rows)]


def _by_base(rows: Sequence[dict]) -> list[tuple[str, str, Sequence[dict]]]:
    """A panel for each line that others are switches of: that line, and those, by what the run skips."""
    by_name = {row["variant"]: row["title"] for row in rows}
    bases = [base for base in dict.fromkeys(row["base"] for row in rows) if base in by_name]
    return [(by_name[base], "run_sparsity", [row for row in rows if base in (row["variant"], row["base"])]) for base in bases] or _by_share(rows)


# (title, what is skipped, rows) of each panel; a line of the panel's own title is drawn thick.
_PANELS = {"plot": _by_share, "better": _by_base}
