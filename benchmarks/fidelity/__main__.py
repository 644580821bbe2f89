"""The command: python -m benchmarks.fidelity --help says what it does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pack.demo import measures
from pack.demo.clips import ORDER, load_clips
from pack.demo.comfy_host import NoComfyUIError

from ..measuring import ROOT
from . import report
from .checks import CLIPS, STEPS, check
from .hosts import Comfy, Embedded, FidelityHost
from .store import Store
from .study import LEFT_OUT, Study, about, gather, run_all, tasks
from .variants import VARIANTS, Variant, chosen

_DESCRIPTION = """Continues clips with the demo's video model, dense and with each variant of sparse attention over several sparsities, and says
how near each stays to dense: PSNR and SSIM of the video, relative L2 of attention by layer, what was skipped, searches and times.
What is finished is kept in --out and not made again while model, clips, settings and code are the same; so a run can be stopped."""
PAGE = ROOT / "docs" / "FIDELITY.md"
RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
_PASSED = {True: "passed", False: "FAILED", None: "left out"}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(sorted({float(part) for part in text.split(",")}))


_OPTIONS = {
    "--host": {
        "choices": ["embedded", "comfyui"], "default": "embedded", "help": "embedded: diffusers. comfyui: the ComfyUI at COMFYUI_PATH, with the "
        "variants that a node can be set to and without attention's own error",
    },
    "--device": {"default": "cpu", "help": "where the embedded host's model is, as torch names it (default cpu)"},
    "--clips": {"type": int, "default": 2, "help": f"how many real clips to continue, 1 to {len(ORDER)}, in one batch (default 2)"},
    "--seeds": {"type": _numbers, "default": (0,), "help": "of the starting noise, such as 0,1 (default 0)"},
    "--steps": {"type": int, "default": 20, "help": "sampling steps (default 20, what the model is judged at)"},
    "--budgets": {"type": _shares, "default": (0.5, 0.6, 0.7, 0.8, 0.9), "help": "sparsities (default 0.5,0.6,0.7,0.8,0.9)"},
    "--variants": {"default": "plot", "help": "names, or groups: plot, paper, better, few-steps, all; or none, as with --docs (default plot)"},
    "--error-rows": {"type": int, "default": 1024, "help": "rows of a call on which attention's error is measured; 0 is all (default 1024)"},
    "--out": {"type": Path, "default": ROOT / "output" / "fidelity", "help": "where runs, JSON, tables and plots go (default output/fidelity)"},
    "--docs": {
        "action": "store_true", "help": "also write the tables and plots of docs/FIDELITY.md, and benchmarks/results/fidelity.json: of every "
        "variant whose runs are there",
    },
    "--check": {"action": "store_true", "help": "only check the harness itself, anew"},
    "--no-check": {"action": "store_true", "help": "leave those checks out"},
    "--list": {"action": "store_true", "help": "name the variants"},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program with a message where they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=_DESCRIPTION)
    for flags, settings in _OPTIONS.items():
        parser.add_argument(flags, **settings)
    options = parser.parse_args(arguments)
    if not 1 <= options.clips <= len(ORDER):
        parser.error(f"--clips {options.clips}: there are {len(ORDER)} clips")
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: a search in one step is used in the next, so 2 is the least")
    if not all(0 <= budget <= 0.95 for budget in options.budgets):
        parser.error("--budgets: sparsities are from 0 to 0.95")
    if min(options.seeds) < 0:
        parser.error("--seeds: seeds are from 0 up")
    if options.error_rows < 0:
        parser.error(f"--error-rows {options.error_rows}: a count, or 0 for all")
    try:
        options.variants = chosen(options.variants)
    except ValueError as error:
        parser.error(f"--variants: {error}")
    return options


def open_host(options: argparse.Namespace, stack: ExitStack) -> FidelityHost:
    """The host asked for. Raises NoComfyUIError."""
    return Comfy(stack) if options.host == "comfyui" else Embedded(options.device, options.error_rows)


def self_checks(host: FidelityHost, options: argparse.Namespace) -> list[dict]:
    """The checks on one clip and few steps, each told when it is done."""
    study, found = Study(host, Store(options.out / "runs"), load_clips(CLIPS), options.seeds[:1], STEPS), []
    for one in check(study, again=options.check):
        found.append(one)
        print(f"{_PASSED[one['passed']]}: {one['check']}: {one['found']}.", flush=True)
    return found


def data_of(study: Study, variants: Sequence[Variant], budgets: Sequence[float], checks: list[dict]) -> dict:
    """All that tables and plots are made of."""
    left_out = {variant.name: reason for variant in variants if (reason := study.host.why_not(variant))}
    return {
        "schema": 1, "about": about(study), "left_out": LEFT_OUT, "left_out_variants": left_out, "checks": checks,
        "rows": gather(study, variants, budgets),
    }


def to_json(data: dict) -> str:
    """As text, a line a row."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in data["rows"])
    head = json.dumps({name: value for name, value in data.items() if name != "rows"}, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n' if data["rows"] else f'{head[:-2]},\n "rows": []\n}}\n'


def write_results(folder: Path, data: dict) -> list[Path]:
    """fidelity.json, fidelity.md and the plots."""
    files = [folder / "fidelity.json", folder / "fidelity.md"]
    files[0].write_text(to_json(data), encoding="utf-8")
    parts = [f"## {name}\n\n{text}" for name, text in report.sections(data).items() if text != report.NOT_MEASURED]
    files[1].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return files + [folder / name for group, name in report.PICTURES.items() if report.plot(data, group, folder / name)]


def write_docs(data: dict) -> list[Path]:
    """The page of the docs with its plots, and the results that a test compares it with."""
    PAGE.write_text(report.written(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
    RESULTS.write_text(to_json(data), encoding="utf-8")
    return [PAGE, RESULTS, *(PAGE.parent / name for group, name in report.PICTURES.items() if report.plot(data, group, PAGE.parent / name))]


def main(options: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    if options.list:
        print("\n".join(f"{variant.name:48} {'+'.join(variant.groups):20} {variant.title}: {variant.about}" for variant in VARIANTS.values()))
        return 0
    with ExitStack() as stack:
        host = open_host(options, stack)
        print(f"Host: {host.name}.", flush=True)
        checks = [] if options.no_check else self_checks(host, options)
        failed = any(one["passed"] is False for one in checks)
        if options.check or failed:
            return 1 if failed else 0
        study = Study(host, Store(options.out / "runs"), load_clips(options.clips), options.seeds, options.steps)
        work, left_out = tasks(study, options.variants, options.budgets)
        for name, reason in left_out.items():
            print(f"Left out: {name}: {reason}.")
        stopped = False
        try:
            run_all(study, work, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            stopped = True
            print("\nStopped. What was finished is kept; the same command goes on from there.")
        data = data_of(study, options.variants, options.budgets, checks)
        files = write_results(options.out, data)
        if options.docs:
            files += write_docs(data_of(study, list(VARIANTS.values()), options.budgets, checks))
    if data["rows"]:
        print("\n" + measures.table(report.HEADS, [report.line(row) for row in data["rows"]]))
    print("\nWritten:\n" + "\n".join(f"  {path}" for path in files))
    return 1 if stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse()))
    except NoComfyUIError as error:
        sys.exit(f"ComfyUI cannot be used: {error}")
