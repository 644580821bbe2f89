"""The node tests once more, on the real classes, in the host's own Python: this is what holds the double to the host."""

import os
import subprocess
from pathlib import Path

import pytest
from comfy_server import python_of_host

pytestmark = pytest.mark.host

NODE_TESTS = Path(__file__).resolve().parent.parent / "nodes"


def test_the_node_tests_pass_on_the_real_classes(comfyui):
    python = python_of_host()
    if subprocess.run([python, "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip("the host's Python (COMFYUI_PYTHON) has no pytest")
    environment = {**os.environ, "SVA_HOST": "real", "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [python, "-m", "pytest", str(NODE_TESTS), "-q", "-p", "no:cacheprovider", "--tb=short"], capture_output=True, text=True, env=environment,
    )
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
