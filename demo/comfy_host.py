"""The host of a machine with ComfyUI: that ComfyUI without a window, in a temporary base directory, through its HTTP API.

The graph is graph.json; the runs differ in its patch node. ComfyUI's own models, outputs and custom nodes are not touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

from comfy_server import ComfyServer  # tools/, put on the path by run.py
from safetensors.torch import load_file

from .clips import CLIPS_FILE, MODEL_FILE
from .runs import RUNS, Job, OnStep, Outcome, Run, dense_record

HERE = Path(__file__).resolve().parent
_GRAPH = json.loads((HERE / "graph.json").read_text())
_POLL_SECONDS = 0.2


class NoComfyUIError(Exception):
    """ComfyUI cannot be used here; the message says why."""


def find_comfyui() -> Path | None:
    """The ComfyUI at COMFYUI_PATH, or the one whose custom_nodes this project's folder lies in; None where there is neither."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return Path(named).expanduser().resolve()
    # The folder as it was called, since it may be linked into custom_nodes.
    for root in (Path(os.path.abspath(sys.argv[0])).parent.parent, HERE.parent):
        if root.parent.name == "custom_nodes" and (root.parent.parent / "main.py").is_file():
            return root.parent.parent
    return None


def python_of(comfyui: Path) -> str:
    """The interpreter with ComfyUI's requirements: COMFYUI_PYTHON, else one in its folder, else this one."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return os.path.expanduser(named)
    for folder in ("venv", ".venv"):
        for place in ("bin/python", "Scripts/python.exe"):
            if (comfyui / folder / place).is_file():
                return str(comfyui / folder / place)
    return sys.executable


class ComfyHost:
    """A server that runs from entry to exit. Raises NoComfyUIError on entry where it does not start."""

    def __init__(self, comfyui: Path):
        if not (comfyui / "main.py").is_file():
            raise NoComfyUIError(f"there is no ComfyUI at {comfyui} (no main.py)")
        self.comfyui = comfyui
        version = re.search(r'"([^"]+)"', _read(comfyui / "comfyui_version.py"))
        self.name = f"ComfyUI {version.group(1) if version else '(unknown version)'}"
        self._stack = ExitStack()

    def __enter__(self) -> ComfyHost:
        with ExitStack() as stack:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparse-video-demo-")))
            for source, folder in ((MODEL_FILE, base / "models" / "diffusion_models"), (CLIPS_FILE, base / "input")):
                folder.mkdir(parents=True)
                shutil.copy(source, folder)
            self.output = base / "output"
            self.output.mkdir()
            # torch's attention, as in the embedded host; the CPU's default there is a slower one, which would flatter us.
            server = ComfyServer(
                self.comfyui, base, nodes=(HERE / "nodes",), python=python_of(self.comfyui), arguments=("--use-pytorch-cross-attention",),
            )
            try:
                self.server = stack.enter_context(server)
                self._check_nodes()
            except (RuntimeError, OSError) as error:
                raise NoComfyUIError(f"{self.name} did not start with {python_of(self.comfyui)}: {_last_line(str(error))}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def warm_up(self, job: Job) -> None:
        self.run(Run("warm_up", "warm-up"), Job(job.clips, 1, job.seed), lambda step, sparsity: None)

    def run(self, run: Run, job: Job, on_step: OnStep) -> Outcome:
        """Queues the run's graph and watches the file that the watch node writes."""
        progress = self.output / f"{run.name}.progress.json"
        prompt = self.server.start(make_graph(run, job))
        seen = 0
        while (status := self._status(prompt)) is None:
            time.sleep(_POLL_SECONDS)
            state = json.loads(_read(progress) or "{}")
            if state.get("step", 0) > seen:
                seen = state["step"]
                on_step(seen, state["sparsity"])
        if status["status_str"] != "success":
            raise RuntimeError(f"{self.name} could not do the {run.title} run: {_error(status)}")
        state = json.loads(_read(progress))
        on_step(state["step"], state["sparsity"])
        latents = load_file(self.output / f"{run.name}.safetensors")["latents"]
        record = json.loads(_read(self.output / f"{run.name}.json")) if run.method else dense_record(job)
        return Outcome(latents, state["seconds"], record)

    def process_ids(self) -> tuple[int, ...]:
        return (os.getpid(), self.server.process.pid)

    def _status(self, prompt: str) -> dict | None:
        """How the prompt ended; None while it has not."""
        try:
            history = self.server.get(f"/history/{prompt}")
        except OSError as error:
            raise RuntimeError(f"{self.name} does not answer any more ({error}): {_last_line(_read(self.server.log))}") from None
        status = history.get(prompt, {}).get("status") or {}
        return status if status.get("status_str") else None

    def _check_nodes(self) -> None:
        known = self.server.get("/object_info")
        missing = {node["class_type"] for run in RUNS for node in make_graph(run).values()} - set(known)
        if missing:
            raise RuntimeError(f"it does not know the nodes {', '.join(sorted(missing))}")


def make_graph(run: Run, job: Job | None = None) -> dict:
    """graph.json for a run: its patch node, or none and no report; the job's clips, steps and seed."""
    graph = deepcopy(_GRAPH)
    for node in ("watch", "save"):
        graph[node]["inputs"]["name"] = run.name
    if run.node:
        graph["patch"] = {"class_type": run.node, "inputs": {"model": ["shift", 0], **run.settings}}
    else:
        graph["watch"]["inputs"]["model"] = graph["patch"]["inputs"]["model"]
        del graph["patch"], graph["report"], graph["save"]["inputs"]["record"]
    if job:
        graph["clips"]["inputs"]["clips"] = ", ".join(str(number) for number in job.clips.numbers)
        graph["sampler"]["inputs"].update(seed=job.seed, steps=job.steps)
    return graph


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _error(status: dict) -> str:
    """What the node that failed says."""
    for kind, content in status["messages"]:
        if kind == "execution_error":
            message = f"{content['node_type']}: {content['exception_type']}: {content['exception_message'].strip()}"
            return "\n".join([message, *content["traceback"][-2:]])
    return status["status_str"]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
