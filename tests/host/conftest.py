"""A running ComfyUI with the pack and tiny models, for the tests that go through its HTTP API."""

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from comfy_server import ComfyServer, python_of_host
from tiny_models import TEXT_WIDTH

TESTS = Path(__file__).resolve().parent.parent
FOLDER = "Sparse Video-Attention test"
# Whether a test has said what is wrong with the ComfyUI that the environment names.
_TOLD = pytest.StashKey[bool]()
# Model -> node of its empty latent, width, height, frames: 9 latent frames of 8 x 16 tokens each.
_LATENT = {"ltxv": ("EmptyLTXVLatentVideo", 512, 256, 65)}
_OTHER_LATENT = ("EmptyHunyuanLatentVideo", 256, 128, 33)


class Graphs:
    """Runs graphs on a server. A graph is a dict of nodes in API form: 1 model, 2 and 3 text, 4 latent, 5 patch, 6 sampler, 8 report."""

    def __init__(self, server):
        self.server, self._dense = server, {}

    def graph(self, model, patch=None, settings=None, cfg=1.0, steps=3, batch=1, padded=False, seed=5):
        """Text to video. `patch` is a node's id and `settings` its inputs; with it comes a report."""
        kind, width, height, length = _LATENT.get(model, _OTHER_LATENT)
        text = {"width": TEXT_WIDTH[model], "pooled": 768 if model == "hunyuan" else 0, "padded": padded or model == "ltxv"}
        graph = {
            "1": node("UNETLoader", unet_name=f"{model}.safetensors", weight_dtype="default"),
            "2": node("TestConditioning", seed=1, **text), "3": node("TestConditioning", seed=2, **text),
            "4": node(kind, width=width, height=height, length=length, batch_size=batch),
            "6": node(
                "KSampler", model=["5" if patch else "1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0],
                seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0,
            ),
        }
        if patch:
            graph["5"] = node(patch, model=["1", 0], **(settings or {}))
            graph["8"] = node("SparseAttentionReport", model=["5", 0], samples=["6", 0])
        return graph

    def run(self, graph):
        """(latent [B, C, T, H, W], the report's data or None, the report's picture or None) of a graph."""
        name, report = "latent", "8" in graph
        graph = {**graph, "20": node("TestSaveLatent", samples=["8" if report else "6", 0], name=name)}
        if report:
            graph.update({"21": node("PreviewAny", source=["8", 2]), "22": node("TestSaveImage", image=["8", 1], name="picture")})
        output = self.server.base / "output"
        output.mkdir(exist_ok=True)
        for file in output.glob("*.pt"):
            file.unlink()
        shown = self.finished(self.server.start(graph))["outputs"]
        latent = torch.load(output / f"{name}.pt")
        if not report:
            return latent, None, None
        return latent, json.loads(shown["21"]["text"][0]), torch.load(output / "picture.pt")

    def finished(self, prompt):
        """A prompt's history entry, when it has succeeded; raises RuntimeError naming the node where it failed."""
        entry = self.server.wait(prompt)
        for kind, what in entry["status"]["messages"]:
            if kind == "execution_error":
                raise RuntimeError(f"node {what['node_id']} ({what['node_type']}): {what['exception_type']}: {what['exception_message']}")
        assert entry["status"]["status_str"] == "success"
        return entry

    def dense(self, model, **how):
        """The unpatched model's latent; computed once."""
        key = (model, tuple(how.items()))
        if key not in self._dense:
            self._dense[key] = self.run(self.graph(model, **how))[0]
        return self._dense[key]

    def with_defaults(self, kind, **inputs):
        """A node of the host's with the host's own defaults for what is not given."""
        required = self.server.get(f"/object_info/{kind}")[kind]["input"]["required"]
        values = {}
        for name, (options, *more) in required.items():
            limits = more[0] if more else {}
            choices = options if isinstance(options, list) else limits.get("options")
            if "default" in limits or choices:
                values[name] = limits.get("default", choices[0] if choices else None)
        return node(kind, **{**values, **inputs})


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@functools.cache
def why_no_host() -> str | None:
    """What is wrong with the ComfyUI that the environment names, as a sentence; None where it can be started or none is named."""
    path, python = os.environ.get("COMFYUI_PATH"), python_of_host()
    if not path:
        return None
    if not (Path(path).expanduser() / "main.py").is_file():
        return f"COMFYUI_PATH={path} is no ComfyUI: there is no main.py in it"
    try:
        tried = subprocess.run([python, "-c", "import aiohttp, safetensors, torch"], capture_output=True, text=True)
    except OSError as error:
        return f"COMFYUI_PYTHON={python} cannot be run: {error.strerror}"
    words = tried.stderr.strip().splitlines()[-1:]
    return f"{python} (COMFYUI_PYTHON, else the tests' own) lacks what ComfyUI needs: {''.join(words)}" if tried.returncode else None


def pytest_runtest_setup(item):
    """A ComfyUI that cannot be started fails the first test that wants it, once and in a sentence; the others are skipped."""
    reason = why_no_host()
    if reason is None:
        return
    if item.config.stash.setdefault(_TOLD, False):
        pytest.skip("COMFYUI_PATH or COMFYUI_PYTHON is wrong, as the first of these tests said")
    item.config.stash[_TOLD] = True
    pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def comfyui():
    """The ComfyUI checkout that COMFYUI_PATH names."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    return Path(path).expanduser().resolve()


@pytest.fixture(scope="session")
def one_thread():
    """Tensors this small only wait for one another's threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def server(comfyui, one_thread, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    writing = [python_of_host(), str(TESTS / "tiny_models.py"), str(comfyui), str(base / "models" / "diffusion_models")]
    done = subprocess.run(writing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with ComfyServer(comfyui, base, FOLDER, nodes=(TESTS / "host_nodes",)) as running:
        yield running


@pytest.fixture(scope="session")
def graphs(server):
    return Graphs(server)


@pytest.fixture(scope="session")
def folder():
    """The pack's folder in custom_nodes."""
    return FOLDER


@pytest.fixture
def plain_folder(comfyui, one_thread, tmp_path):
    """(a server, the pack's folder on it) without a space: the host serves no files from under a name with one."""
    with ComfyServer(comfyui, tmp_path, "sparse-video-attention") as running:
        yield running, "sparse-video-attention"
