"""Makes the table of docs/RELIABILITY.md from the tests that bring faults about: python tools/reliability.py

Needs a ComfyUI checkout at COMFYUI_PATH, and its Python with pytest at COMFYUI_PYTHON (else this one). Tests of nodes run on the
real ComfyUI, the others in this Python. Without a run of theirs no line is written: the tool fails where a test fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from capability_matrix import version
from comfy_server import python_of_host
from load_pack import ROOT

TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))
from faults import AREAS, END, NOTHING, PAGE, START, cell  # noqa: E402


def results(comfyui: Path) -> list[dict]:
    """What the tests said, a line a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "faults"
        environment = {**os.environ, "SVA_FAULTS": str(file), "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        tiers = (
            ([python_of_host(), "-m", "pytest", str(TESTS / "nodes")], {"SVA_HOST": "real"}),
            ([sys.executable, "-m", "pytest", str(TESTS), f"--ignore={TESTS / 'nodes'}", f"--ignore={TESTS / 'triton_kernels'}"], {}),
        )
        for command, more in tiers:
            if subprocess.run([*command, "-q", "-m", "fault", "-p", "no:cacheprovider"], env=environment | more).returncode:
                sys.exit("A test failed: nothing was written.")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def markdown(found: list[dict], host: str) -> str:
    rows: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in found:
        sentences = rows[line["area"]][line["fault"], line["outcome"]]
        if line["seen"] not in sentences:
            sentences.append(line["seen"])
    parts = [f"Made on ComfyUI {host}, on a CPU. Sentences are word for word what the tests saw; figures in them are those of their tiny models."]
    for area in AREAS:
        if rows[area]:
            parts += ["", f"### {area}", "", "| what goes wrong | what comes out | what the person sees |", "|---|---|---|"]
            for (fault, outcome), sentences in sorted(rows[area].items()):
                parts.append(f"| {cell(fault)} | {cell(outcome)} | {'<br>'.join(cell(sentence) or NOTHING for sentence in sentences)} |")
    return "\n".join(parts)


def main() -> None:
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path).expanduser() / "main.py").is_file():
        sys.exit("COMFYUI_PATH names no ComfyUI checkout.")
    comfyui = Path(path).expanduser().resolve()
    made = markdown(results(comfyui), version(comfyui))
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
