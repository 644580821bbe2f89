"""The engine of these tests, importable in the processes that they spawn too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
