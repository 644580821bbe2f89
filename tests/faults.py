"""Tests of what goes wrong: each says which fault it brings about and what a person then sees. docs/RELIABILITY.md is made from them.

    @pytest.mark.fault("Backends", "Triton is not installed", "the right video, computed by plain torch")
    def test_without_triton(host, seen):
        ...
        seen(host.shown[-1].text)

The mark's words are literals: area, fault, outcome. `seen` takes the sentence that the person gets, word for word; where nothing is to be
said, `seen("")`. A test with the mark that never calls it fails, and so does one whose sentence the page does not have, figures aside.
"""

import ast
import functools
import json
import os
import re
from pathlib import Path

import pytest

# The areas of the table, in its order.
AREAS = ("Other nodes", "Conditions and samplers", "Lifecycle", "Memory", "Backends", "Bad input", "More than one device", "The machine")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "RELIABILITY.md"
START, END = "<!-- faults: made by tools/reliability.py -->", "<!-- /faults -->"
NOTHING = "(nothing: it is as without the fault)"


def cell(text: str) -> str:
    """Text as it can stand in a table's cell."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def _without_figures(text: str) -> str:
    return re.sub(r"\d[\d,.]*", "#", text)


@functools.cache
def told_by_the_page() -> dict[tuple[str, str, str], set[str]]:
    """(area, fault, outcome) of each line of the page's table, and its sentences as cells have them, without figures."""
    area, found = None, {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            area = line.removeprefix("### ")
        elif area in AREAS and line.startswith("| ") and not line.startswith("| what goes wrong"):
            fault, outcome, sentences = line.removeprefix("| ").removesuffix(" |").split(" | ", 2)
            fault, outcome = (part.replace("\\|", "|").replace("&lt;", "<") for part in (fault, outcome))
            found[area, fault, outcome] = {_without_figures(sentence) for sentence in sentences.split("<br>")}
    return found


@pytest.fixture
def seen(request):
    """seen(sentence): notes what a person gets to read in this test. With SVA_FAULTS set, it is written to that file."""
    told = []
    yield told.append
    mark = request.node.get_closest_marker("fault")
    if mark is None:
        return
    area, fault, outcome = mark.args
    assert area in AREAS, f"{area} is not one of {AREAS}"
    if getattr(request.node, "fault_failed", False):
        return
    assert told, "this test never said what a person sees: seen(sentence)"
    if os.environ.get("SVA_FAULTS"):
        with Path(os.environ["SVA_FAULTS"]).open("a", encoding="utf-8") as file:
            for sentence in dict.fromkeys(told):
                line = {"area": area, "fault": fault, "outcome": outcome, "seen": sentence, "test": request.node.nodeid.split("[")[0]}
                file.write(json.dumps(line) + "\n")
        return
    known = told_by_the_page().get(mark.args, set())
    new = [sentence for sentence in told if _without_figures(cell(sentence) or NOTHING) not in known]
    assert not new, f"{PAGE.name} does not have these sentences; make it anew, python tools/reliability.py: {new}"


def marked(tests: Path) -> set[tuple[str, str, str]]:
    """(area, fault, outcome) of every mark in the tests' sources."""
    found = set()
    for file in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                found.add(tuple(ast.literal_eval(argument) for argument in node.args))
    return found
