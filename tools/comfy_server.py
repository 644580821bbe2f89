"""A real ComfyUI on the CPU, in a base directory of its own, spoken to through its own HTTP API."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def python_of_host() -> str:
    """The interpreter that has ComfyUI's requirements: COMFYUI_PYTHON, else this one."""
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


class ComfyServer:
    """Starts on entry, stops on exit. `base` is its base directory; the pack is linked there under `folder`.

    nodes: folders of further custom nodes. python: the interpreter, `python_of_host()` where None. arguments: further ones of ComfyUI's.
    """

    def __init__(
        self, comfyui: Path, base: Path, folder: str = "any folder-name", nodes: tuple[Path, ...] = (),
        python: str | None = None, arguments: tuple[str, ...] = (),
    ):
        self.comfyui, self.base = comfyui, base
        self.python, self.arguments = python or python_of_host(), arguments
        custom = base / "custom_nodes"
        custom.mkdir(parents=True, exist_ok=True)
        for name, target in ((folder, ROOT), *((path.name, path) for path in nodes)):
            if not (custom / name).exists():
                (custom / name).symlink_to(target)
        self.log = base / "server.log"

    def __enter__(self) -> "ComfyServer":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            self.python, str(HERE / "comfy_cpu.py"), str(self.comfyui), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(self.base), *self.arguments,
        ]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTEST_CURRENT_TEST", "TRITON_INTERPRET")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self._wait_until_it_answers(180)
        except BaseException:  # __exit__ is not called for what fails in here
            self.__exit__()
            raise
        return self

    def _wait_until_it_answers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not answer in time:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()[:2000]}") from None
        return json.loads(body) if body else None

    def start(self, graph: dict) -> str:
        """Queues a graph in API form; returns the prompt's id."""
        return self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})["prompt_id"]

    def wait(self, prompt: str, seconds: float = 300) -> dict:
        """The prompt's history entry, when it is over. Errors are in its status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt}")
            if prompt in history and history[prompt]["status"].get("status_str"):
                return history[prompt]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)
        raise TimeoutError(f"prompt not done after {seconds} s")

    def run(self, graph: dict) -> dict:
        """Runs a graph and returns its outputs by node; raises RuntimeError with the host's messages where it fails."""
        entry = self.wait(self.start(graph))
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(entry["status"]["messages"])[-3000:])
        return entry["outputs"]
