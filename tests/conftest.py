"""The pack as the module `pack`, and the tests' own helpers (oracle, cases, doubles) on the path."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from load_pack import load_pack  # noqa: E402

load_pack()
