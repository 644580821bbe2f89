"""The pack as the module `pack`, and the tests' own helpers (oracle, cases, doubles) on the path."""

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from load_pack import load_pack  # noqa: E402

load_pack()

import pytest  # noqa: E402
import torch  # noqa: E402
from faults import seen  # noqa: E402, F401

# The tests' tensors are small: on a shared machine a second thread waits more than it computes.
torch.set_num_threads(1)

# Folders whose tests share what is dear to set up, such as a server: one process takes them all.
_TOGETHER = ("host", "browser", "demo")
# Folders whose tests run methods on random tensors and on networks with random weights.
_RANDOM_TENSORS = ("attention", "nodes")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """How tests/run.py shares tests among processes: one by one, and those of a folder together. (xdist's own groups fail under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            folder = nodeid.split("/")[1]
            return folder if folder in _TOGETHER else nodeid

    return ByFolder(config, log)


@pytest.fixture(autouse=True)
def auto_runs_sparse_whatever_it_skips(request):
    """Random tensors have little to skip, and what Auto does with them is of interest all the same; marked with `leaves_dense`, it is as shipped."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        if request.path.relative_to(TESTS).parts[0] in _RANDOM_TENSORS and not request.node.get_closest_marker("leaves_dense"):
            patch.setattr(importlib.import_module("pack.attention.methods.auto"), "_LEAST_SKIPPED", 0.0)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills every torch.empty with NaN, so that what a kernel leaves unwritten fails."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that has failed need not have said what a person sees."""
    report = yield
    if call.when == "call":
        item.fault_failed = not report.passed
    return report
