"""The node tests once more, on the real classes, in the host's own Python: this is what holds the double to the host."""

import os
import subprocess
from pathlib import Path

import pytest
from comfy_server import python_of_host

pytestmark = pytest.mark.host

NODE_TESTS = Path(__file__).resolve().parent.parent / "nodes"
MODELS = NODE_TESTS / "test_video_models.py"
# Side by side, since each computes on one thread only.
_PARTS = {"contract": [str(NODE_TESTS), f"--ignore={MODELS}"], "every model": [str(MODELS)]}


@pytest.fixture(scope="module")
def runs(comfyui):
    """Both parts of the node tests, started."""
    python = python_of_host()
    if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip("the host's Python (COMFYUI_PYTHON) has no pytest")
    environment = {**os.environ, "SVA_HOST": "real", "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short"]
    started = {}
    for name, selection in _PARTS.items():
        command = [python, "-m", "pytest", *selection, *options]
        started[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    yield started
    for run in started.values():
        run.kill()


@pytest.mark.parametrize("part", _PARTS)
def test_the_node_tests_pass_on_the_real_classes(runs, part):
    said = runs[part].communicate()[0]
    print(said.strip().splitlines()[-1])
    assert runs[part].returncode == 0, said[-8000:]
