"""A host that records a block's allocations and replays them: nothing that is to outlive the block, and no first compile, is among them."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from allocations import Recording, is_ours, no_large_pages

METHODS = ("svg", "adaspa", "auto")
FAMILIES = ("wan", "hunyuan", "ltxv", "cogvideox", "unlisted")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def recording(host, monkeypatch):
    """The host records from now on; and no op of the kernels, which may compile for the first time, is begun meanwhile."""
    import comfy.model_prefetch
    from pack import kernels

    recording, choose = Recording(), kernels._implementation
    recording.ops = set()

    def begun(backend):
        """In place of a backend's module: says which op is begun in it."""
        assert not recording.watching, "an op of the kernels while the host records"
        return _Noted(choose(backend), recording.ops)

    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", recording.pause_malloc_graph, raising=False)
    monkeypatch.setattr(kernels, "_implementation", begun)
    with no_large_pages():
        yield recording


class _Noted:
    def __init__(self, module, names):
        self._module, self._names = module, names

    def __getattr__(self, name):
        self._names.add(name)
        return getattr(self._module, name)


def recorded(host, recording, model):
    """(the model so that the host records its evaluations, what to put on it once it is patched).

    A scope is the whole evaluation, our own wrapper of it included; within it each attention call is one, as in a block.
    """

    def evaluation(executor, *args, **kwargs):
        return recording.scope(lambda: executor(*args, **kwargs))

    def calls(executor, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)
        override = options["optimized_attention_override"]
        options["optimized_attention_override"] = lambda *a, **k: recording.scope(lambda: override(*a, **k))
        return executor(*args, **kwargs)

    return host.wrap(model, "APPLY_MODEL", evaluation), lambda patched: host.wrap(patched, "APPLY_MODEL", calls, key="calls")


# As the nodes ask for it. Auto then tries out thresholds, and searches again where it has drifted.
ASKED = {"svg": {"sparsity": 0.4}, "adaspa": {"sparsity": 0.4}, "auto": {"fidelity": 0.8}}


def run(host, recording, method, family="wan", then=lambda model: model, model=None, **how):
    """One recorded run: (its output, its record). Settings of the patch are told from those of the run by name."""
    how.setdefault("frames", 5)
    settings = {name: how.pop(name) for name in list(how) if name not in ("cfg", "steps", "batch", "frames", "sampler", "padded", "callback")}
    outside, inside = recorded(host, recording, host.load(family) if model is None else model)
    patched = then(host.patch(method, outside, **{**ASKED[method], **settings}))
    with recording:
        out = host.sample(inside(patched), family, **how)
    assert recording.pauses and not recording.paused
    return out, host.record(patched)


def test_what_the_host_records_is_told_apart(host, recording):
    """The double itself: what it must see, and what it must let pass."""
    from pack.kernels import TokenOrder

    order, kept = TokenOrder.shared(torch.arange(256, dtype=torch.int32)), []
    q = torch.ones(4)

    def keeps():
        kept.append(q * 2)
        return q * 3

    def frees():
        made = [q * 2]
        with recording.pause_malloc_graph():
            made.clear()

    def ends_early():
        with recording.pause_malloc_graph():
            with recording.pause_malloc_graph():
                pass
            kept.append(torch.tensor([1.0]))

    def fine():
        temporary = q * 2
        with recording.pause_malloc_graph():
            kept.append(temporary.view(2, 2) + 1)
        return temporary.view(2, 2)

    with recording:
        for call, words in (
            (keeps, "still allocated"), (frees, "freed while paused"), (ends_early, "still allocated"), (fine, None),
            (lambda: order.full_blocks(64).any(), "still allocated"), (lambda: order.full_blocks(64).any(), None),
        ):
            recording.broken.clear()
            recording.scope(call)
            assert [word.split(":")[0] for word in recording.broken] == ([words] if words else [])
    assert recording.scope(fine) is not None


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_leaves_anything_in_the_recording(host, method, family, recording):
    out, record = run(host, recording, method, family, cfg=5.0)
    assert recording.broken == []
    assert record.sparse_calls == 3 * 2 * host.layers[family]
    found = {"svg": {"sampled_errors"}, "adaspa": {"attention_with_lse", "block_mass"}, "auto": {"attention_with_lse", "block_errors"}}[method]
    assert recording.ops == found | {"block_sparse_attention"} | (set() if method == "svg" else {"pool_blocks"})
    assert torch.equal(out, host.sample(host.patch(method, host.load(family), **ASKED[method]), family, cfg=5.0, frames=5))


EVERY_OPTION = [
    ("refresh at every step", {"cache_refresh": 1, "steps": 5}),
    ("refresh by the paper", {"steps": 8, "cache_refresh": -1}),
    ("two steps of warm-up", {"warmup_steps": 2, "steps": 5}),
    ("dense layers and last steps", {"dense_layers": "1", "end_steps": 1, "steps": 5}),
    ("sparsity 0", {"sparsity": 0.0}),
    ("a budget that cannot be met", {"sparsity": 0.95}),
    ("a batch", {"batch": 2}),
    ("a sampler that looks between the sigmas", {"sampler": "heun"}),
    ("the reference backend", {"backend": "reference", "steps": 2}), ("another length", {"frames": 7}),
]
ADASPA_ALONE = [
    ("raster order", {"token_order": "raster"}), ("heads alike", {"head_adaptive": False}),
    ("raster order and padded text", {"token_order": "raster", "family": "hunyuan", "padded": True}),
]
SVG_ALONE = [("few sampled rows", {"sampled_rows": 3}), ("padded text", {"family": "hunyuan", "padded": True})]


@pytest.mark.parametrize(
    "method, how",
    [pytest.param(method, how, id=f"{method}, {name}") for method in METHODS for name, how in EVERY_OPTION]
    + [pytest.param("adaspa", how, id=f"adaspa, {name}") for name, how in ADASPA_ALONE]
    + [pytest.param("svg", how, id=f"svg, {name}") for name, how in SVG_ALONE],
)
def test_no_setting_leaves_anything_in_the_recording(host, method, how, recording):
    _, record = run(host, recording, method, **how)
    assert recording.broken == []
    assert record.sparse_calls and not [note for note in record.notes if "failed" in note]
    if method == "adaspa" and how.get("warmup_steps") == 2:
        assert "attention_with_mass" in recording.ops


@every_method
def test_conditions_that_come_together_and_apart(host, method, recording, batched):
    _, record = run(host, recording, method, cfg=5.0, callback=lambda step, *_: batched(step % 2 == 1))
    assert recording.broken == [] and record.sparse_calls == 12


def _probed(host, **settings):
    return lambda patched: host.execute("SparseAttentionProbe", {"model": patched, "steps": 0, **settings}, "4").result[0]


def pausing(before, func, *args, **kwargs):
    """An attention that ends a pause of its own, as the host's own kernels may; its output is made after that."""
    import comfy.model_prefetch

    with comfy.model_prefetch.pause_malloc_graph():
        pass
    return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)


@every_method
@pytest.mark.parametrize("goes_on", ["sparse", "dense"])
def test_a_probe_leaves_nothing_either(host, method, goes_on, recording):
    """It computes dense calls on its way, by an attention that pauses for itself."""
    probe = _probed(host, sparsities="0.2", continue_with=goes_on)
    model = host.override(host.load("wan"), pausing)
    _, record = run(host, recording, method, then=probe, model=model, cfg=5.0, cache_refresh=1)
    assert recording.broken == []
    assert record.probe.calls and record.probe.why is None


@every_method
def test_an_attention_before_ours_that_pauses_for_itself(host, method, recording):
    _, record = run(host, recording, method, model=host.override(host.load("wan"), pausing), dense_layers="1")
    assert recording.broken == [] and record.sparse_calls and record.dense_calls


@every_method
def test_what_is_kept_for_a_pattern_and_what_is_loaded_from_one(host, method, recording):
    """A run that keeps what it finds, and one that starts from that."""
    node = importlib.import_module("pack.nodes.patch")

    def wanted(patched):
        patched.get_attachment(host.module("host").KEY).pattern_wanted = True
        return patched

    found = []
    outside, inside = recorded(host, recording, host.load("wan"))
    patched = wanted(host.patch(method, outside, **ASKED[method], cache_refresh=2))
    with recording:
        host.sample(inside(patched), "wan", cfg=5.0, steps=5, frames=5)
    found = patched.get_attachment(host.module("host").KEY).patterns["6"]
    assert recording.broken == [] and found.plans

    def loaded(patched):
        patched.set_attachments(node.PATTERN, found)
        return patched

    _, record = run(host, recording, method, then=loaded, cfg=5.0, steps=5, warmup_steps=0)
    assert recording.broken == [] and record.dense_calls == 0


@every_method
@pytest.mark.parametrize("fails", ["block_sparse_attention", "kept_pairs"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ZeroDivisionError], ids=["out of memory", "an error"])
def test_a_sparse_path_that_fails_ends_its_pause(host, method, fails, error, recording, monkeypatch):
    from pack import kernels

    right, calls = getattr(kernels, fails), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise error("planted")
        return right(*args, **kwargs)

    monkeypatch.setattr(kernels, fails, failing)
    _, record = run(host, recording, method)
    assert recording.broken == []
    assert record.dense_calls and record.outcome == "finished"


def test_an_interrupt_ends_the_pause(host, recording, monkeypatch):
    from pack import kernels

    def stop(*args, **kwargs):
        raise host.interrupt

    monkeypatch.setattr(kernels, "block_sparse_attention", stop)
    with pytest.raises(host.interrupt):
        run(host, recording, "svg")
    assert recording.broken == [] and not recording.paused


@every_method
def test_nor_does_triton(host, method, recording, request):
    """The kernels of a GPU in Triton's interpreter, which takes a process of its own: what they work out from an order is kept with it."""
    if host.name == "real":
        pytest.skip("shown on the double")
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::{request.node.name}"]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:]
        return
    _, record = run(host, recording, method, backend="triton", steps=2, frames=3)
    assert record.backend == "triton" and record.sparse_calls == 2
    # The interpreter itself keeps arguments, until Python collects its cycles.
    assert [words for words in recording.broken if is_ours(words.partition(": ")[2])] == []
