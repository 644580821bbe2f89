"""The pack as the module `pack`, and the tests' own helpers (oracle, cases, doubles) on the path."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from load_pack import load_pack  # noqa: E402

load_pack()

import pytest  # noqa: E402
import torch  # noqa: E402

# The tests' tensors are small: on a shared machine a second thread waits more than it computes.
torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills every torch.empty with NaN, so that what a kernel leaves unwritten fails."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
