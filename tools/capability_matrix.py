"""Fills the README's table of models from the table in nodes/video_models.py and a run of its tests: python tools/capability_matrix.py

Needs a ComfyUI checkout at COMFYUI_PATH, and its Python with pytest at COMFYUI_PYTHON (else this one).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

from comfy_server import python_of_host
from load_pack import ROOT, load_pack

README = ROOT / "README.md"
START, END = "<!-- models: made by tools/capability_matrix.py -->", "<!-- /models -->"
METHODS = ("svg", "adaspa", "auto")
# Widths of a small network and of a large one, where automatic settings depend on it: Wan 1.3B and 14B.
SMALL, LARGE = 1536, 5120


def tables() -> tuple[ModuleType, ModuleType]:
    """nodes/video_models.py, on the tests' double of the host, and the tests' models."""
    sys.path.insert(0, str(ROOT / "tests"))
    load_pack()
    import host_double
    import zoo

    with host_double.installed(None):
        from pack.nodes import video_models

        return video_models, zoo


def results(comfyui: Path) -> list[dict]:
    """What the tests of every model found: a line each, none for what failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results"
        environment = {**os.environ, "SVA_HOST": "real", "COMFYUI_PATH": str(comfyui), "SVA_MATRIX": str(file), "OMP_NUM_THREADS": "1"}
        command = [python_of_host(), "-m", "pytest", str(ROOT / "tests" / "nodes" / "test_video_models.py"), "-q", "-p", "no:cacheprovider"]
        subprocess.run(command, env=environment)
        if not file.exists():
            sys.exit("No model passed: nothing was written.")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def version(comfyui: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "of unknown version"


def settings(row, width: int) -> str:
    """A row's automatic settings for a network of a width."""
    automatic = row.automatic(SimpleNamespace(dim=width))
    first = next(iter(automatic.values()))
    return f"{automatic['SVG'].sparsity:.2f} / {automatic['AdaSpa'].sparsity:.2f}, {first.warmup:.0%}"


def markdown(models: ModuleType, zoo: ModuleType, found: list[dict], host: str) -> str:
    """The table, and below it where its automatic settings come from."""
    by_case: dict[tuple[str, str], dict] = defaultdict(dict)
    for line in found:
        by_case[line["case"], line["method"]].update(line)
    heads = "| model | tried as | SVG | AdaSpa | Auto | error at sparsity 0 | automatic: sparsity SVG / AdaSpa, warm-up |"
    lines = [heads, "|---|---|---|---|---|---|---|"]
    sources: dict[str, list[str]] = defaultdict(list)
    for row in models.ROWS:
        cases = [case.name for case in zoo.CASES if case.row == row.name]
        marks, errors = [], [0.0]
        for method in METHODS:
            passed = [by_case[name, method] for name in cases if {"error", "achieved"} <= by_case[name, method].keys()]
            marks.append("sparse" if len(passed) == len(cases) else f"{len(passed)} of {len(cases)}")
            errors += [case["error"] for case in passed]
        small, large = settings(row, SMALL), settings(row, LARGE)
        automatic = large if small == large else f"{large}; small: {small}"
        lines.append(f"| {row.name} | {', '.join(cases)} | {' | '.join(marks)} | {max(errors):.0e} | {automatic} |")
        for width in (LARGE, SMALL):
            source = row.source(SimpleNamespace(dim=width))
            if row.name not in sources[source]:
                sources[source].append(row.name)
    about = (
        f"Made from tiny random models of ComfyUI {host}'s own classes, sampled in float32 on a CPU: three sizes, one and two videos, guidance on "
        "and off, as far as the model takes them. sparse: at sparsity 0.5 that much was skipped, within a block, or as much as what is always "
        "kept allows, in every self-attention call of the video after the dense first step, and no other call was touched. error: the largest "
        "relative difference from the unpatched model, with Auto at a fidelity that keeps everything."
    )
    words = [f"- {source} ({', '.join(names)})" for source, names in sources.items()]
    return "\n".join([*lines, "", about, "", "Where the automatic settings come from:", "", *words])


def main() -> None:
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path).expanduser() / "main.py").is_file():
        sys.exit("COMFYUI_PATH names no ComfyUI checkout.")
    comfyui = Path(path).expanduser().resolve()
    found = results(comfyui)
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    README.write_text(f"{before}{START}\n\n{markdown(*tables(), found, version(comfyui))}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
