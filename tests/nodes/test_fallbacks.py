"""What a run does where Triton, a dtype, a head_dim or a device is not what the kernels take: the right video, and one sentence."""

import subprocess
import sys
import types

import pytest
import torch
import torch._dynamo  # it looks for Triton when it is loaded: the real one
from oracle import relative_error
from pretend_device import pretended
from torch.nn import functional as F

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def capability():
    """The module that asks what Triton can do: anew in each test, and after it."""
    from pack.kernels import capability

    asked = (capability._why_no_triton, capability._fitting_version)
    for function in asked:
        function.cache_clear()
    yield capability
    for function in asked:
        function.cache_clear()


@pytest.fixture
def missing(capability, monkeypatch):
    """missing(system, version): Triton is not there on that system, or is a release that is too old; torch asks for 3.7."""

    def take_away(system="Linux", version=None):
        package = None
        if version:
            package = types.ModuleType("triton")
            package.__version__, package.language = version, types.ModuleType("triton.language")
        monkeypatch.setitem(sys.modules, "triton", package)
        monkeypatch.setitem(sys.modules, "triton.language", getattr(package, "language", None))
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("importlib.metadata.requires", lambda name: ["triton==3.7.1"])

    return take_away


@pytest.fixture
def triton(capability, monkeypatch):
    """triton(fails): Triton takes the tests' tensors; fails(op, number) may raise in its n-th call, else torch's operations compute it.

    Returns the ops called so far.
    """
    from pack import kernels
    from pack.kernels import reference, torch_ops

    def install(fails):
        calls = []

        class Ops:
            def __getattr__(self, name):
                def op(*arguments):
                    calls.append(name)
                    fails(name, len(calls))
                    return getattr(reference if name.endswith("8bit") else torch_ops, name)(*arguments)

                return op

        monkeypatch.setattr(capability, "_why_no_triton", lambda: None)
        monkeypatch.setattr(capability, "interpreted", lambda: True)
        monkeypatch.setattr(kernels, "triton_ops", Ops(), raising=False)
        return calls

    return install


def failing(error, after=0):
    """What `triton` takes: this error, once so many calls have gone well."""

    def fails(name, number):
        if number > after:
            raise error

    return fails


def falls_back(host, method, sentence, sparse=6):
    """With `auto`: at sparsity 0 the unpatched model's video, computed sparsely, and one sentence at the end. Returns that."""
    model = host.load("wan")
    patched = host.patch(method, model, sparsity=0.0)
    assert relative_error(host.sample(patched, "wan"), host.sample(model, "wan")) < 1e-5
    record = host.record(patched)
    assert (record.sparse_calls, record.backend, record.outcome) == (sparse, "torch", "finished")
    (note,) = [note for note in record.notes if "Triton" in note]
    assert sentence in note and note in host.shown[-1].text
    return note


def stays_dense(host, method, sentence):
    """With `triton` by name: the unpatched model's video, and why. With `strict` too, an error before the first step is done."""
    model, steps = host.load("wan"), []
    patched = host.patch(method, model, sparsity=0.4, backend="triton")
    assert relative_error(host.sample(patched, "wan"), host.sample(model, "wan")) < 1e-6
    record, text = host.record(patched), host.shown[-1].text
    assert record.sparse_calls == 0 and any(sentence in reason for reason in record.reasons)
    assert text.startswith("⚠") and sentence in text and text.endswith("Set backend to auto: torch then computes what Triton cannot.")
    strict = host.patch(method, model, backend="triton", strict=True, warmup_steps=3)
    with pytest.raises(RuntimeError) as caught:
        host.sample(strict, "wan", steps=5, callback=lambda step, *_: steps.append(step))
    assert sentence in str(caught.value) and not steps


# --- Triton that is not there ----------------------------------------------------------------------------------------


@every_method
@pytest.mark.fault("Backends", "Triton is not installed, on Windows", "the right video: torch's own operations compute it")
def test_without_triton_on_windows(host, method, missing, seen):
    missing("Windows")
    seen(falls_back(host, method, '; for this torch install "triton-windows<3.8"'))
    stays_dense(host, method, 'Triton cannot be imported (ModuleNotFoundError: import of triton halted; None in sys.modules)')


@pytest.mark.fault("Backends", "Triton is too old for the running torch", "the right video: torch's own operations compute it")
def test_with_an_old_triton(host, missing, monkeypatch, seen):
    missing(version="2.1.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    seen(falls_back(host, "svg", 'Triton 2.1.0 is too old for torch 2.13.0; install "triton==3.7.*"'))
    stays_dense(host, "svg", "Triton 2.1.0 is too old for torch 2.13.0")


# --- Triton that fails -----------------------------------------------------------------------------------------------

NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."


class CompilationError(Exception):
    """As Triton's own: the reason stands apart from pages of source."""

    def __init__(self, reason):
        super().__init__("at 12:4:\n" + "    acc += tl.dot(q, k)\n" * 40 + f"    ^\n{reason}")
        self.error_message = reason


@every_method
@pytest.mark.fault("Backends", "Triton finds no C compiler", "the right video: torch's own operations compute it")
def test_without_a_c_compiler(host, method, triton, seen):
    calls = triton(failing(RuntimeError(NO_COMPILER)))
    seen(falls_back(host, method, f"Triton failed (RuntimeError: {NO_COMPILER}); install a C compiler, such as gcc"))
    assert len(calls) == 1, "what has failed is not tried again in a run"
    stays_dense(host, method, "install a C compiler, such as gcc")


@pytest.mark.parametrize("system, lacks", [
    ("Linux", "Python's headers, as in python3-dev"), ("Windows", "the folders include and libs of the same Python"),
])
@pytest.mark.fault("Backends", "Triton's C compiler lacks Python's headers", "the right video: torch's own operations compute it")
def test_without_pythons_headers(host, system, lacks, triton, monkeypatch, seen):
    monkeypatch.setattr("platform.system", lambda: system)
    triton(failing(subprocess.CalledProcessError(1, ["gcc", "main.c"])))
    seen(falls_back(host, "svg", f"; its C compiler may lack {lacks}"))


@every_method
@pytest.mark.fault("Backends", "a Triton kernel does not compile", "the right video: torch's own operations compute it")
def test_a_kernel_that_does_not_compile(host, method, triton, capability, monkeypatch, seen, caplog):
    monkeypatch.setattr(capability, "_fitting_version", lambda: "3.7")
    monkeypatch.setattr(capability, "_triton_version", lambda: "3.7.1")
    triton(failing(CompilationError("expected a constexpr\n  argument")))
    note = falls_back(host, method, "on: Triton failed (CompilationError: expected a constexpr argument)")
    assert "tl.dot" not in note and "install" not in note
    seen(note)
    assert [entry for entry in caplog.records if "tl.dot" in entry.getMessage()], "the log has the whole of it"
    monkeypatch.setattr(capability, "_triton_version", lambda: "3.9.0")
    falls_back(host, method, 'expected a constexpr argument); for this torch install "triton==3.7.*"')
    stays_dense(host, method, "Triton failed (CompilationError: expected a constexpr argument)")


@every_method
@pytest.mark.fault("Backends", "a Triton kernel fails in the middle of a run", "the right video: torch's own operations compute the rest")
def test_a_kernel_that_fails_after_good_calls(host, method, triton, seen):
    error = RuntimeError("Triton Error [CUDA]: invalid argument")
    # How many run well, at least one sparse call among them. A layer of SVG: profiling, attention. Of AdaSpa: two in the search, then pooling
    # and attention. Of Auto: three in the search, then the same and a look at what came out.
    after, step = {"svg": (5, 3), "adaspa": (6, 2), "auto": (9, 2)}[method]
    calls = triton(failing(error, after=after))
    note = falls_back(host, method, "Triton failed (RuntimeError: Triton Error [CUDA]: invalid argument)")
    assert note.startswith(f"torch backend from step {step} on: ") and len(calls) == after + 1
    seen(note)
    # By name: what was sparse stays, the rest is dense. With strict it is an error.
    triton(failing(error, after=after))
    patched = host.patch(method, host.load("wan"), sparsity=0.0, backend="triton")
    assert relative_error(host.sample(patched, "wan"), host.sample(host.load("wan"), "wan")) < 1e-5
    record = host.record(patched)
    assert 0 < record.sparse_calls < 6 and record.outcome == "finished" and str(error) in host.shown[-1].text
    triton(failing(error, after=after))
    with pytest.raises(RuntimeError, match=r"Triton failed \(RuntimeError: Triton Error \[CUDA\]: invalid argument"):
        host.sample(host.patch(method, host.load("wan"), strict=True), "wan")


@every_method
@pytest.mark.fault("Backends", "a kernel in 8 bits fails", "the right video, in the model's own precision")
def test_8_bits_that_fail(host, method, triton, seen):
    def fails(name, number):
        if name.endswith("8bit"):
            raise RuntimeError("out of resource: shared memory")

    triton(fails)
    model = host.load("wan")
    patched = host.patch(method, model, sparsity=0.0, precision="int8")
    assert relative_error(host.sample(patched, "wan"), host.sample(model, "wan")) < 1e-5
    record = host.record(patched)
    (note,) = [note for note in record.notes if "Triton" in note]
    assert note.startswith("precision int8: Triton failed (RuntimeError: out of resource: shared memory)") and note.endswith("; computed in float32")
    assert (record.sparse_calls, record.backend) == (6, "triton") and note in host.shown[-1].text
    seen(note)
    strict = host.patch(method, model, precision="int8", strict=True, warmup_steps=3)
    with pytest.raises(RuntimeError, match="out of resource"):
        host.sample(strict, "wan", steps=5, callback=lambda *_: pytest.fail("a step was done"))


def test_memory_that_runs_out_in_a_launch_is_no_broken_triton(host, triton):
    """A launch says so in a plain RuntimeError."""
    calls = triton(lambda name, number: None)

    def fails(name, number):
        if name == "block_sparse_attention" and calls.count(name) == 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")

    calls = triton(fails)
    patched = host.patch("svg", host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan")
    record = host.record(patched)
    assert (record.sparse_calls, record.reasons["out of memory in the sparse path"], record.backend) == (5, 1, "triton")


# --- what the tensors are --------------------------------------------------------------------------------------------

TOKENS, HEADS = 576, 2


def qkv(dim=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(dim)
    return [torch.randn(1, TOKENS, HEADS * dim, generator=generator).to(dtype) for _ in range(3)]


def exact(q, k, v):
    parts = (tensor.cpu().double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def plain(q, k, v, heads, *args, **kwargs):
    """An attention of the host's that takes whatever torch's own does."""
    parts = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def attended(host, method, tensors, **settings):
    """(the outputs of two calls of a new layer, the second of which is sparse; the record)"""
    outputs = []

    def body(attend):
        record = attend._options[KEY].active.session.record
        record.backend, _ = None, record.notes.clear()  # as if the run began here
        for _ in range(2):
            attend._options[KEY].evaluation.numbers.clear()
            options = attend.options(layer=7)
            outputs.append(options["optimized_attention_override"](plain, *tensors, HEADS, _inside_attn_wrapper=True, transformer_options=options))

    return outputs, host.probe(method, body, sparsity=0.0, **settings)


KEY = "sparse_video_attention"


@every_method
@pytest.mark.parametrize("tensors, sentence", [
    pytest.param(qkv(dtype=torch.float64), "the Triton kernels take float16, bfloat16 and float32, not float64", id="float64"),
    pytest.param(qkv(dim=320), "the Triton kernels take a head_dim up to 256, not 320", id="head_dim 320"),
])
@pytest.mark.fault("Backends", "a dtype or head_dim that the Triton kernels do not take", "the right video: torch's own operations compute it")
def test_tensors_that_triton_does_not_take(host, method, tensors, sentence, triton, seen):
    triton(lambda name, number: None)
    outputs, record = attended(host, method, tensors)
    assert all(relative_error(out, exact(*tensors)) < 1e-5 and out.dtype == tensors[0].dtype for out in outputs)
    assert record.notes == [f"torch backend: {sentence}"]
    seen(record.notes[0])
    with pytest.raises(RuntimeError, match=f"strict: a call would run dense: {sentence}. Set backend to auto: "):
        attended(host, method, tensors, backend="triton", strict=True)


@every_method
@pytest.mark.fault("Backends", "tensors in 8-bit floats", "the right video: the model's own attention computes it")
def test_tensors_in_8_bit_floats_are_the_hosts(host, method, seen):
    answer, outputs = torch.arange(6.0), []
    tensors = [tensor.to(torch.float8_e4m3fn) for tensor in qkv()]

    def body(attend):
        outputs.append(attend.through(lambda *args, **kwargs: answer, *tensors, HEADS))

    record = host.probe(method, body, sparsity=0.4)  # a share: it is kept to, whatever it is
    assert outputs[0] is answer
    (reason,) = set(record.reasons) - {"warm-up step", "search step"}
    assert reason == "torch's operations take no attention in float8_e4m3fn"
    seen(reason)
    with pytest.raises(RuntimeError, match=f"strict: a call would run dense: {reason}"):
        host.probe(method, body, sparsity=0.4, strict=True)


@every_method
@pytest.mark.parametrize("device", ["mps", "xpu:1"])
@pytest.mark.fault("Backends", "a device that Triton does not run on here (MPS, XPU)", "the right video: torch's own operations compute it")
def test_devices_without_triton(host, method, device, seen):
    """The device is pretended: its tensors must not meet others, nor be float64 on MPS; its arithmetic is the CPU's."""
    tensors = qkv()
    with pretended():
        outputs, record = attended(host, method, [tensor.to(device) for tensor in tensors])
        assert all(out.device == torch.device(device) for out in outputs)
        assert all(relative_error(out.cpu(), exact(*tensors)) < 1e-5 for out in outputs)
        sentence = f"Triton needs a GPU (CUDA or ROCm), and these tensors are on {torch.device(device).type}"
        assert record.notes[0] == f"torch backend: {sentence}"
        seen(record.notes[0])
        with pytest.raises(RuntimeError, match="strict: a call would run dense: Triton needs a GPU"):
            attended(host, method, [tensor.to(device) for tensor in tensors], backend="triton", strict=True)


@pytest.mark.fault("Backends", "a CPU, and backend triton asked for by name", "the dense video")
def test_a_cpu(host, capability, seen):
    falls_back(host, "svg", "torch backend: Triton needs a GPU (CUDA or ROCm), and these tensors are on cpu")
    stays_dense(host, "svg", "Triton needs a GPU (CUDA or ROCm), and these tensors are on cpu")
    seen("Reason: Triton needs a GPU (CUDA or ROCm), and these tensors are on cpu. Set backend to auto: torch then computes what Triton cannot.")


@pytest.mark.fault("Backends", "a GPU without Triton, with strict on", "an error in the first step")
def test_strict_does_not_let_torch_stand_in_for_triton_on_a_gpu(host, missing, seen):
    missing()
    tensors = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in qkv()]
    from pack.attention.dispatch import sparse_attention
    from pack.attention.methods import svg
    from video_oracle import VideoLayout, make_call, make_session

    layout, run = VideoLayout(9, 8, 8), make_session(svg, strict=True)
    with pretended():
        refusal = sparse_attention(make_call(layout, [tensor.to("cuda") for tensor in tensors], step=0), run)
    advice = host.module("status").hint(refusal.reason, run.config)
    assert refusal.otherwise == "on the torch backend" and not refusal.planned and "install" in refusal.reason
    seen(f"SVG, strict: a call would run {refusal.otherwise}: {refusal.reason}.{advice}")
    assert advice == " Set backend to torch if torch is to compute it."
    # On a CPU torch is what `auto` means.
    assert getattr(sparse_attention(make_call(layout, tensors, step=0), run), "reason", None) == "warm-up step"


@pytest.mark.fault("Other nodes", "torch.compile is active", "the same video; the attention stays out of the compiled graph")
def test_a_compiled_model(host, seen):
    """Dynamo's graphs, run as they are: what inductor would make of them is not the attention's."""

    def compiled(executor, *args, **kwargs):
        return torch.compile(executor.original, backend="eager")(*args, **kwargs)

    torch._dynamo.reset()
    model = host.load("wan")
    expected = host.sample(host.patch("svg", model, sparsity=0.4), "wan", steps=2)
    patched = host.patch("svg", host.wrap(model, "DIFFUSION_MODEL", compiled), sparsity=0.4, strict=True)
    assert relative_error(host.sample(patched, "wan", steps=2), expected) < 1e-6
    record = host.record(patched)
    assert record.sparse_calls == 2 and record.reasons == {"warm-up step": 2}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    seen("")
    torch._dynamo.reset()
