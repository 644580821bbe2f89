"""What all tests of the methods share."""

import pytest
from pack.attention.methods import auto


@pytest.fixture(autouse=True)
def auto_runs_sparse_whatever_it_skips(request, monkeypatch):
    """Random tensors have little to skip, and what Auto does with them is of interest all the same; marked with `leaves_dense`, it is as shipped."""
    if not request.node.get_closest_marker("leaves_dense"):
        monkeypatch.setattr(auto, "_LEAST_SKIPPED", 0.0)
