"""A ComfyUI that is named but cannot be started is one failure with one sentence, not one for each test that wants it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOST_TESTS = Path(__file__).resolve().parent / "host"


@pytest.mark.parametrize("wrong", ["path", "python", "packages"])
def test_a_wrong_comfyui_is_said_once(tmp_path, wrong):
    comfyui, python = tmp_path / "ComfyUI", {"python": str(tmp_path / "none"), "packages": str(tmp_path / "bare")}.get(wrong, sys.executable)
    comfyui.mkdir()
    if wrong != "path":
        (comfyui / "main.py").touch()
    (tmp_path / "bare").write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'aiohttp'\" >&2\nexit 1\n")
    (tmp_path / "bare").chmod(0o755)
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": python}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rN", str(HOST_TESTS)]  # the summary would say it again
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    sentence = {
        "path": f"COMFYUI_PATH={comfyui} is no ComfyUI: there is no main.py in it",
        "python": f"COMFYUI_PYTHON={python} cannot be run: No such file or directory",
        "packages": f"{python} (COMFYUI_PYTHON, else the tests' own) lacks what ComfyUI needs: ModuleNotFoundError: No module named 'aiohttp'",
    }[wrong]
    assert done.returncode == 1 and done.stdout.count(sentence) == 1
    assert re.search(r"^\d{2,} skipped, 1 error in", done.stdout, re.M)
