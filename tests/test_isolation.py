"""Importing and running the pack reaches no network, starts no program, and writes nowhere but in ComfyUI's output folder.

Two libraries do so on their own account, once a machine: Triton, on a GPU alone, calls a C compiler and keeps compiled kernels in its
cache; matplotlib, with which the report is drawn, asks for the machine's fonts and keeps the list.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import python_of_host

TESTS = Path(__file__).resolve().parent
_HOSTS = ["double", pytest.param("real", marks=pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH names no ComfyUI"))]


@pytest.mark.parametrize("host", _HOSTS)
@pytest.mark.fault("The machine", "no network, no other programs, no folder but ComfyUI's own to write to", "everything works: none is used")
def test_nothing_leaves_the_process_and_nothing_is_written_elsewhere(host, tmp_path, seen):
    for name in ("home", "work", "output", "input", "temp", "fonts"):
        (tmp_path / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "SVA_", "TRITON_"))}
    environment |= {
        "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home"), "MPLCONFIGDIR": str(tmp_path / "fonts"), "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "SVA_HOST": host,
    }
    command = [python_of_host() if host == "real" else sys.executable, str(TESTS / "isolated_run.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == []
    # What libraries in other languages write is in no audit.
    ours = sorted(file for file in told["left"] if not file.startswith(("temp/", "fonts/")))
    assert ours == [f"output/sparse_patterns/{method}_00001_.safetensors" for method in ("adaspa", "auto", "svg")]
    assert {line.split(" ")[0] for line in told["planted"]} >= {"socket.connect", "subprocess.Popen", "os.system", "os.mkdir", "open"}
    seen("")
