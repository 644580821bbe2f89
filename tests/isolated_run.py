"""Everything that the pack does in a ComfyUI, in a process whose every event of Python's audit is watched: run by test_isolation.py.

    python isolated_run.py <folder>

Prints as JSON what went to the network, started a program, or wrote anywhere but in ComfyUI's folders, <folder>/output and
<folder>/temp; which files it left; and what the watch saw of one of each that was then done on purpose. The host is the double,
or with SVA_HOST=real the ComfyUI at COMFYUI_PATH. It, torch and matplotlib are loaded before the watch begins.
"""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools"), str(TESTS / "nodes")]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (ComfyUI has it loaded before any node pack)

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto", "urllib.Request")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn")
# Event -> which of its arguments are paths that are written to.
WRITES = {
    "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "os.truncate": (0,),
    "os.chmod": (0,), "shutil.copyfile": (1,), "shutil.move": (0, 1), "shutil.rmtree": (0,), "tempfile.mkstemp": (0,), "tempfile.mkdtemp": (0,),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what is not allowed; it stops nothing, so that one look shows all."""

    def __init__(self, *allowed):
        self.allowed, self.found, self.on = allowed, [], False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on:
            return
        if event in NETWORK or event in PROGRAMS:
            self.found.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self._write(event, arguments[0])
        elif event in WRITES:
            for place in WRITES[event]:
                self._write(event, arguments[place])

    def _write(self, event, path):
        if isinstance(path, int) or str(path) == os.devnull:
            return
        if not any(Path(os.fsdecode(path)).absolute().is_relative_to(folder) for folder in self.allowed):
            self.found.append(f"{event} {path}")


def play(host):
    """Runs with both methods, and every node once."""
    prompt = {"8": {"inputs": {"samples": ["6", 0]}}, "5": {"class_type": "SparseAttentionSavePattern"}}
    queue = SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "prompt", prompt, {}, [])], []))
    importlib.import_module("server").PromptServer.instance.prompt_queue = queue
    for method in ("svg", "adaspa", "auto"):
        patched = host.patch(method, host.load("wan"), sparsity=0.4)
        probed = host.execute("SparseAttentionProbe", {"model": patched}, "9").result[0]
        samples = {"samples": host.sample(probed, "wan", steps=3)}
        given = {"model": probed, "samples": samples}
        host.execute("SparseAttentionReport", given, "8", prompt)
        host.execute("SparseAttentionProbeResults", given, "8", prompt)
        path = host.execute("SparseAttentionSavePattern", {**given, "filename_prefix": method}, "8", prompt).result[1]
        assert Path(path).is_file(), path
        loaded = host.execute("SparseAttentionLoadPattern", {"model": patched, "path": path}, "7").result[0]
        host.sample(loaded, "wan", steps=2)
        record = host.record(patched)
        assert record.sparse_calls and any("started from" in note for note in record.notes), record.notes
        host.sample(host.patch(method, host.load("wan"), backend="triton"), "wan", steps=2)  # asks what Triton can do


def plant(folder):
    """One of each of what is not allowed."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    subprocess.run([sys.executable, "-c", ""])
    os.system("true")
    (folder / "elsewhere").mkdir()
    (folder / "file").write_text("")


def main():
    folder = Path(sys.argv[1])
    parts = importlib.import_module("host_real" if os.environ.get("SVA_HOST") == "real" else "host_double")
    conftest = importlib.util.spec_from_file_location("nodes_conftest", TESTS / "nodes" / "conftest.py")
    module = importlib.util.module_from_spec(conftest)
    conftest.loader.exec_module(module)
    load_pack = importlib.import_module("load_pack").load_pack
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):  # it looks for the machine's fonts when it is first loaded
        importlib.import_module("matplotlib.font_manager")
    with parts.installed(folder / "temp"):
        if parts.NAME == "double":
            sys.modules["folder_paths"] = paths = ModuleType("folder_paths")
            paths.get_save_image_path = lambda prefix, root: (root, prefix, 1, "", prefix)
        paths = importlib.import_module("folder_paths")
        paths.get_output_directory, paths.get_input_directory = (lambda name=name: str(folder / name) for name in ("output", "input"))
        show = SimpleNamespace(send_progress_text=lambda *_: None, client_id="client")
        importlib.import_module("server").PromptServer.instance = show
        parts.load("wan")
        watch = Watch(folder / "output", folder / "temp")
        watch.on = True
        load_pack()
        play(module.Host(parts))
        found, watch.found = watch.found, []
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        plant(folder)
        watch.on = False
    print(json.dumps({"found": found, "left": left, "planted": watch.found}))


main()
