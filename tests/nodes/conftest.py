"""The host that the node tests run on: the contract double, or with SVA_HOST=real the ComfyUI at COMFYUI_PATH."""

import importlib
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from oracle import relative_error

KEY = "sparse_video_attention"
# The tests' videos are short; what is asked here, everything else is the nodes' own.
SETTINGS = {"min_tokens": 0, "dense_layers": ""}
NODES = {"svg": "SparseAttentionPatchSVG", "adaspa": "SparseAttentionPatchAdaSpa", "auto": "SparseAttentionPatchAuto"}
PATCH_NODE, SAMPLER_NODE, REPORT_NODE = "5", "6", "8"

_FRAMES, _TEXT = 9, 32
# Family -> channels, height and width of its latents: 64 tokens a frame each.
_LATENT = {"ltxv": (128, 8, 8), "unlisted": (128, 8, 8), "image": (4, 16, 16)}
_OTHER_LATENT = (16, 16, 16)
_TEXT_WIDTH = {"wan": 4096}


class Host:
    """One way to do each thing that the tests do with a host. `parts` is host_double or host_real."""

    def __init__(self, parts):
        self.name, self.unknown, self.interrupt = parts.NAME, parts.UNKNOWN, parts.Interrupt
        self.load, self.sigmas, self.executing, self.weights, self._parts = parts.load, parts.sigmas, parts.executing, parts.weights, parts
        self.attention, self.replace_attention, self.honouring = parts.attention, parts.replace_attention, parts.honouring
        self.shown = []
        self.layers = {"wan": 2, "hunyuan": 3, "ltxv": 2, "cogvideox": 2, "unlisted": 2}
        self.tokens = {"wan": 576, "hunyuan": 576 + _TEXT, "ltxv": 576, "cogvideox": 576 + _TEXT, "unlisted": 576}

    def module(self, name):
        """A module of the pack's nodes, such as "patch"."""
        return importlib.import_module(f"pack.nodes.{name}")

    def node(self, name):
        """A node's class, by its id."""
        return next(node for node in importlib.import_module("pack.nodes").NODES if node.__name__ == name)

    def execute(self, name, inputs, node_id, prompt=None):
        """Runs a node as the host does: on a copy of its class that holds the hidden inputs."""
        hidden = importlib.import_module("comfy_api.latest").io.Hidden
        node = self.node(name).PREPARE_CLASS_CLONE({"hidden_inputs": {hidden.unique_id: node_id, hidden.prompt: prompt}})
        return node.EXECUTE_NORMALIZED(**inputs)

    def patch(self, method, model, node_id=PATCH_NODE, **settings):
        """The model out of a patch node."""
        return self.execute(NODES[method], {"model": model, **SETTINGS, **settings}, node_id).result[0]

    def report(self, model, samples, prompt, node_id=REPORT_NODE):
        """(samples, picture, data) out of a report node."""
        samples, image, text = self.execute("SparseAttentionReport", {"model": model, "samples": samples}, node_id, prompt).result
        return samples, image, json.loads(text)

    def records(self, model):
        return list(model.get_attachment(KEY).runs)

    def record(self, model):
        """The only or newest record of a patched model."""
        return self.records(model)[-1]

    def guider(self, model, family, cfg=1.0, padded=False):
        guider = self._parts.CFGGuider(model)
        guider.set_conds(self.text(family, 1, padded), self.text(family, 2, padded))
        guider.set_cfg(cfg)
        return guider

    def text(self, family, seed, padded=False):
        """CONDITIONING: random tokens, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, 768, generator=generator)} if family == "hunyuan" and self.name == "real" else {}
        if padded or family in ("ltxv", "unlisted"):
            extra["attention_mask"] = (torch.arange(_TEXT)[None] < (_TEXT // 2 if padded else _TEXT)).long()
        return [[torch.randn(1, _TEXT, _TEXT_WIDTH.get(family, 128), generator=generator), extra]]

    def sample(
        self, model, family, steps=4, cfg=1.0, sampler="euler", sigmas=None, batch=1, seed=0, padded=False, callback=None, frames=_FRAMES,
        node=SAMPLER_NODE, guider=None, noise=None,
    ):
        """One run, as a sampler node does it."""
        channels, *size = _LATENT.get(family, _OTHER_LATENT)
        shape = (batch, channels, *size) if family == "image" else (batch, channels, frames, *size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) if noise is None else noise
        guider = guider or self.guider(model, family, cfg, padded)
        sigmas = self.sigmas(model, steps) if sigmas is None else sigmas
        with self.executing(node), torch.no_grad():
            return guider.sample(noise, torch.zeros_like(noise), self._parts.sampler(sampler), sigmas, None, callback, True, seed)

    def wrap(self, model, kind, wrapper, key="test"):
        """A clone of the model with a wrapper of another node: kind is "APPLY_MODEL", "DIFFUSION_MODEL" or "OUTER_SAMPLE"."""
        wrapped = model.clone()
        wrapped.add_wrapper_with_key(getattr(importlib.import_module("comfy.patcher_extension").WrappersMP, kind), key, wrapper)
        return wrapped

    def override(self, model, override):
        """A clone of the model with another node's attention override; it gets the one that stood there before, or None."""
        changed = model.clone()
        options = changed.model_options["transformer_options"]
        before = options.get("optimized_attention_override")
        options["optimized_attention_override"] = lambda func, *args, **kwargs: override(before, func, *args, **kwargs)
        return changed

    def compare(self, method, build, run, warmup=1, tokens=576, error=1e-5, counted=True, layers=2, bypass=False, **settings):
        """Holds patched runs against the unpatched one: at sparsity 0 the same, at 0.3 the budget, and every call accounted for.

        build(patch): the model with patch(model) somewhere in it. run(model): its video. warmup: how many first steps are dense.
        counted: whether each evaluation's calls reach the patch. bypass: look at the model without the node afterwards.
        Returns (the record at 0.3, evaluations as (sigma, conditions)).
        """
        patched, evaluations = [], []
        if method == "auto":  # where its measured error grows it searches anew, in a dense step: no part of the counts here
            settings = {"cache_refresh": 0, **settings}

        def patch(sparsity):
            def place(model):
                patched.append(self.patch(method, self.wrap(model, "APPLY_MODEL", look), sparsity=sparsity, **settings))
                return patched[-1]

            return place

        def look(executor, x, t, *args, **kwargs):
            options = options_of(args, kwargs)
            evaluations.append((float(t.flatten()[0]), len(options["cond_or_uncond"]), options["sample_sigmas"].tolist()))
            return executor(x, t, *args, **kwargs)

        dense = run(build(lambda model: model))
        exact = run(build(patch(0.0)))
        assert relative_error(exact, dense) < error
        assert self.record(patched[-1]).sparse_calls > 0
        evaluations.clear()
        sparse = run(build(patch(0.3)))
        assert relative_error(sparse, dense) > 1e-6
        if bypass:
            assert torch.equal(run(build(lambda model: model)), dense), "the model without the node has changed"
        record = self.record(patched[-1])
        assert abs(record.achieved_sparsity - 0.3) <= 64 / tokens, record.achieved_sparsity
        assert set(record.reasons) <= {"warm-up step", "search step"} and sum(record.reasons.values()) == record.dense_calls
        assert record.outcome == "finished" and record.warmup == warmup
        if counted:
            in_warmup = [conditions for sigma, conditions, sigmas in evaluations if sigma > sigmas[warmup] * (1 + 1e-4)]
            assert record.dense_calls == layers * sum(in_warmup)
            assert record.sparse_calls + record.dense_calls == layers * sum(conditions for _, conditions, _ in evaluations)
        return record, [(sigma, conditions) for sigma, conditions, _ in evaluations]

    def probe(self, method, body, at=2, **settings):
        """Samples a patched Wan model for 3 steps; in evaluation number `at`, body(attend) may call attention as a block does.

        Returns the record.
        """
        seen = []

        def look_in(executor, *args, **kwargs):
            seen.append(None)
            if len(seen) == at:
                body(_Attend(self._parts.attention(), options_of(args, kwargs), (_FRAMES, 8, 8)))
            return executor(*args, **kwargs)

        patched = self.patch(method, self.wrap(self.load("wan"), "DIFFUSION_MODEL", look_in), **settings)
        self.sample(patched, "wan", steps=3)
        assert len(seen) == 3
        return self.record(patched)


class _Attend:
    """attend(q, k, v, heads, ...): the attention that models call, in the options of one evaluation."""

    def __init__(self, attention, options, grid):
        self._attention, self._options, self._grid = attention, options, grid

    def options(self, layer=0):
        """What block `layer` of a Wan model would pass on."""
        return {**self._options, "block_index": layer, "block_type": "double", "grid_sizes": torch.Size(self._grid)}

    def __call__(self, *args, layer=0, **kwargs):
        self._options[KEY].evaluation.numbers.clear()  # each as its block's first call
        return self._attention(*args, **kwargs, transformer_options=self.options(layer))

    def unpatched(self, *args, **kwargs):
        """The same call without any override."""
        return self._attention(*args, **kwargs)

    def through(self, func, *args, **kwargs):
        """The same call where the host's own backend is `func`."""
        options = self.options()
        return options["optimized_attention_override"](func, *args, **kwargs, _inside_attn_wrapper=True, transformer_options=options)


def options_of(args, kwargs):
    """The transformer_options among a wrapped call's arguments."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)


@pytest.fixture(scope="session")
def _host(tmp_path_factory):
    real = os.environ.get("SVA_HOST") == "real"
    parts = importlib.import_module("host_real" if real else "host_double")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for one another's threads
    with parts.installed(tmp_path_factory.mktemp("host")):
        yield Host(parts)
    torch.set_num_threads(threads)


@pytest.fixture
def host(_host, monkeypatch, request):
    """The host, and in `host.shown` what is shown on nodes: (text, node id, client, time).

    What is told before a run is measured on this machine: it is left out but in modules that say TELLS_BEFORE.
    """
    if not getattr(request.module, "TELLS_BEFORE", False):
        for name in ("at_the_node", "at_the_start"):
            monkeypatch.setattr(_host.module("outlook"), name, lambda *_, **__: None)
    shown = _host.shown = []
    server = importlib.import_module("server")

    def send_progress_text(text, node_id, sid=None):
        shown.append(SimpleNamespace(text=text, node=node_id, client=sid, at=time.monotonic()))

    instance = SimpleNamespace(send_progress_text=send_progress_text, client_id="client")
    monkeypatch.setattr(server.PromptServer, "instance", instance, raising=False)
    return _host


@pytest.fixture
def batched(host, monkeypatch):
    """batched(False): the host runs conditions apart from now on, as when memory is short; batched(True): together."""
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher

    def choose(together):
        monkeypatch.setattr(patcher, "get_free_memory", lambda self, device: 1e15 if together else 0)

    choose(True)
    return choose
