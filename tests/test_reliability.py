"""docs/RELIABILITY.md has a line for every fault that a test brings about, and for no other."""

from pathlib import Path

from faults import marked, told_by_the_page


def test_the_page_has_the_faults_of_the_tests():
    assert told_by_the_page().keys() == marked(Path(__file__).parent), "make the page anew: python tools/reliability.py"
