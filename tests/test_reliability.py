"""docs/RELIABILITY.md has a line for every fault that a test brings about, and for no other."""

from pathlib import Path

from faults import AREAS, PAGE, marked


def rows():
    """(area, fault, outcome) of each line of the page's table."""
    area, found = None, set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            area = line.removeprefix("### ")
        elif area in AREAS and line.startswith("| ") and not line.startswith("| what goes wrong"):
            fault, outcome, _ = line.strip("| ").replace("\\|", "\0").split(" | ", 2)
            found.add((area, *(part.replace("\0", "|").replace("&lt;", "<") for part in (fault, outcome))))
    return found


def test_the_page_has_the_faults_of_the_tests():
    assert rows() == marked(Path(__file__).parent), "make the page anew: python tools/reliability.py"
