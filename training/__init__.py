"""A small Wan model, trained on real clips: `python -m training.train` from the repository's root; README.md says how. Loads the pack as `pack`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from load_pack import load_pack

load_pack()
