"""How runs end: finished, stopped, broken off or out of memory, alone or beside others; and that nothing of them is left but their record."""

import contextlib
import importlib
import threading

import pytest
import torch
from allocations import OfOurs, no_large_pages
from oracle import relative_error

METHODS = ("svg", "adaspa", "auto")
FAMILIES = ("wan", "hunyuan", "ltxv", "cogvideox", "unlisted")
every_method = pytest.mark.parametrize("method", METHODS)
# Each phase of a run, early in it: AdaSpa keeps the LSE in step 0, searches in 1, runs sparse in 2 and searches again in 3. SVG profiles in 2 and 4.
STEPS, PHASES = 6, {"sparsity": 0.4, "warmup_steps": 2, "cache_refresh": 2}
RUN = {"steps": STEPS, "frames": 5}
# Of a run with all phases, in the order in which they first come.
OPS = {
    "svg": ("sampled_errors", "block_sparse_attention", "kept_pairs"),
    "adaspa": ("attention_with_lse", "attention_with_mass", "pool_blocks", "block_sparse_attention", "kept_pairs", "block_mass"),
    "auto": ("attention_with_lse", "pool_blocks", "block_errors", "block_sparse_attention", "kept_pairs"),
}
every_op = pytest.mark.parametrize("method, op", [(method, op) for method, ops in OPS.items() for op in ops])


@pytest.fixture
def ours():
    """Keeps an eye on all memory that the pack asks for, within `with ours:`."""
    with no_large_pages():
        yield OfOurs()


@pytest.fixture
def sessions(host):
    """A wrapper of another node, outside of ours, that keeps the session of every run, as a traceback may."""
    kept = []

    def keep(executor, *args, **kwargs):
        options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "sigmas" in value)
        session = options[host.module("host").KEY].session
        if not any(known is session for known in kept):
            kept.append(session)
        return executor(*args, **kwargs)

    keep.all = kept
    return keep


@pytest.fixture
def breaking(monkeypatch):
    """breaking(op, error, at): the kernels' op raises an error of that class in its call number `at`; None in each. Returns the list of its calls."""

    def plant(op, error, at):
        kernels, calls = importlib.import_module("pack.kernels"), []
        right = getattr(kernels, op)

        def broken(*args, **kwargs):
            calls.append(None)
            if at in (None, len(calls)):
                raise error("planted")
            return right(*args, **kwargs)

        monkeypatch.setattr(kernels, op, broken)
        return calls

    return plant


def ended(host, ours, error, model, **how):
    """Samples until `error` comes out of it, which is not kept: its traceback would keep the run's frames."""
    came = False
    with ours:
        try:
            host.sample(model, "wan", **{**RUN, **how})
        except error:
            came = True
    assert came, f"no {error.__name__} came out of the run"


def start(line):
    """The closing line without what was measured."""
    return " · ".join(line.split(" · ")[:2])


# --- what is left ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_starts_clean(host, family, method, ours, sessions):
    patched = host.patch(method, host.wrap(host.load(family), "APPLY_MODEL", sessions), sparsity=0.4)
    with ours:
        outputs = [host.sample(patched, family) for _ in range(2)]
    assert torch.equal(*outputs)
    first, second = host.records(patched)
    assert first.to_json() == second.to_json()
    assert len(sessions.all) == 2 and ours.count and ours.alive() == []


def test_what_is_kept_is_noticed(host, ours, monkeypatch):
    """The tests here themselves: one tensor that a log keeps is found."""
    patched = host.patch("svg", host.load("wan"), sparsity=0.4)
    monkeypatch.setattr(host.module("patch").RunRecord, "forget_pictures", lambda self: None)
    session = importlib.import_module("pack.attention.session").Session
    monkeypatch.setattr(session, "end", lambda self: patched.set_attachments("leak", next(iter(self._states.values())).found.what))
    with ours:
        host.sample(patched, "wan")
    assert {place.rpartition("/")[2].split(":")[0] for place in ours.alive()} == {"svg.py"}


def _reported(host, patched, samples):
    prompt = {"6": {"inputs": {}}, "8": {"inputs": {"samples": ["6", 0]}}}
    _, picture, data = host.report(patched, {"samples": samples}, prompt)
    assert picture.std() > 0 and data["sparse_calls"]


def _probed(host, patched, samples):
    assert host.record(patched).probe.calls


@every_method
@pytest.mark.parametrize("after", [_reported, _probed], ids=["with a report", "with a probe"])
def test_nothing_of_ours_outlives_a_run_with(host, method, after, ours, sessions):
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), **PHASES)
    if after is _probed:
        patched = host.execute("SparseAttentionProbe", {"model": patched, "steps": 0}, "4").result[0]
    with ours:
        after(host, patched, host.sample(patched, "wan", cfg=5.0, **RUN))
    assert ours.count and ours.alive() == []


@every_method
def test_of_a_run_whose_pattern_is_kept_that_alone_is_left(host, method, ours, sessions):
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), **PHASES)
    log = patched.get_attachment(host.module("host").KEY)
    log.pattern_wanted = True
    with ours:
        host.sample(patched, "wan", cfg=5.0, **RUN)
    assert log.patterns["6"].plans
    assert {place.rpartition("/")[2].split(":")[0] for place in ours.alive()} == {"pattern.py"}
    found = log.patterns.pop("6")
    patched.set_attachments(host.module("patch").PATTERN, found)
    again = OfOurs()
    with again:
        host.sample(patched, "wan", cfg=5.0, **RUN)
    assert [note for note in host.record(patched).notes if note.startswith("started from")]
    assert again.count and again.alive() == []
    del found
    patched.set_attachments(host.module("patch").PATTERN, None)
    assert ours.alive() == []


@every_method
def test_the_log_keeps_the_newest_sixteen_runs(host, method):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    for number in range(17):
        host.sample(patched, "wan", steps=1, frames=3, node=str(number))
    assert [run.node for run in host.records(patched)] == [str(number) for number in range(1, 17)]


def test_of_many_models_that_a_host_caches_the_newest_keep_pictures(host):
    """Their runs alone: other records stay whole."""
    models = [host.patch("svg", host.load("wan"), sparsity=0.4, cache_refresh=number) for number in range(9)]
    for model in models:
        host.sample(model, "wan", steps=2, frames=3)
    kept = [host.record(model).mask_picture(0, 0) is not None for model in models]
    assert kept == [False] + 8 * [True]
    assert all(host.record(model).sparse_calls == 2 for model in models)


# --- stopped and broken off ------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "Lifecycle", "a run is stopped or breaks off, in any step", "the next run is as if it had not been; nothing of it is kept but its record",
)
@every_method
@pytest.mark.parametrize("breaks", ["interrupt", "error"])
def test_a_run_may_end_in_any_step(host, method, breaks, ours, sessions, seen):
    error = host.interrupt if breaks == "interrupt" else ZeroDivisionError
    outcome = "interrupted" if breaks == "interrupt" else "failed (ZeroDivisionError)"
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), **PHASES)
    guider = host.guider(patched, "wan")
    before = guider.model_options
    kept = {**before["transformer_options"]}
    complete = host.sample(patched, "wan", guider=guider, **RUN)
    for last in range(STEPS):

        def stop(step, *_, last=last):
            if step == last:
                raise error("stop")

        ended(host, ours, error, patched, guider=guider, callback=stop)
        record = host.record(patched)
        assert record.outcome == outcome and record.sparse_calls + record.dense_calls == 2 * (last + 1)
        assert guider.model_options is before and before["transformer_options"] == kept
        line = host.shown[-1].text
        assert line.startswith(f"{record.method} · {outcome}")
    assert len(sessions.all) == 1 + STEPS and ours.count and ours.alive() == []
    assert torch.equal(host.sample(patched, "wan", guider=guider, **RUN), complete)
    assert host.record(patched).to_json() == host.records(patched)[0].to_json()
    seen(start(line))


@every_op
@pytest.mark.parametrize("at", [1, 2], ids=["first", "second"])
def test_a_run_may_be_stopped_inside_of_each_op(host, method, op, at, breaking, ours, sessions):
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), **PHASES)
    complete = host.sample(patched, "wan", **RUN)
    with pytest.MonkeyPatch.context() as undo:
        kernels = importlib.import_module("pack.kernels")
        undo.setattr(kernels, op, getattr(kernels, op))  # put back at the end
        calls = breaking(op, host.interrupt, at)
        ended(host, ours, host.interrupt, patched)
    assert len(calls) == at
    assert host.record(patched).outcome == "interrupted" and ours.alive() == []
    assert torch.equal(host.sample(patched, "wan", **RUN), complete)
    assert host.record(patched).to_json() == host.records(patched)[0].to_json()


@pytest.mark.fault("Lifecycle", "the sparse path itself fails, in any phase", "the right video: the rest of the run is dense")
@every_op
def test_an_error_inside_of_each_op_leaves_nothing(host, method, op, breaking, ours, sessions, seen):
    model = host.wrap(host.load("wan"), "APPLY_MODEL", sessions)
    patched = host.patch(method, model, **{**PHASES, "sparsity": 0.0})
    breaking(op, ZeroDivisionError, 1)
    with ours:
        out = host.sample(patched, "wan", **RUN)
    record, sentence = host.record(patched), "the sparse path failed (ZeroDivisionError: planted)"
    assert relative_error(out, host.sample(host.load("wan"), "wan", **RUN)) < 1e-5
    assert record.outcome == "finished" and record.reasons[sentence] == 2 * STEPS - sum(
        count for reason, count in record.reasons.items() if reason != sentence
    ) - record.sparse_calls
    assert sentence in host.shown[-1].text and ours.alive() == []
    seen(f"dense: {sentence}")


PLACES = [(kind, place) for kind in ("OUTER_SAMPLE", "APPLY_MODEL", "DIFFUSION_MODEL") for place in ("outside", "inside")]


@pytest.mark.fault(
    "Lifecycle", "another node, or the model itself, fails during a run",
    "its own error, as without this node; the next run is as if it had not been",
)
@every_method
@pytest.mark.parametrize("kind, place", PLACES, ids=[f"{kind} {place}" for kind, place in PLACES])
def test_another_wrapper_may_fail(host, method, kind, place, ours, sessions, seen):
    """Before what it wraps or after it, in the third evaluation; or at the end, where it wraps the whole run."""
    planted, count = ZeroDivisionError("theirs"), []

    def fails(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        count.append(None)
        if len(count) == (1 if kind == "OUTER_SAMPLE" else 3):
            raise planted
        return out

    model = host.wrap(host.load("wan"), "APPLY_MODEL", sessions, key="sessions")
    if place == "outside":
        model = host.wrap(model, kind, fails)
    patched = host.patch(method, model, **PHASES)
    if place == "inside":
        patched = host.wrap(patched, kind, fails)
    with ours:
        try:
            host.sample(patched, "wan", **RUN)
            raise AssertionError("no error came out of the run")
        except ZeroDivisionError as error:
            assert error is planted
    planted.__traceback__ = None
    assert ours.count and ours.alive() == []
    record = host.record(patched)
    assert record.outcome == ("finished" if (kind, place) == ("OUTER_SAMPLE", "outside") else "failed (ZeroDivisionError)")
    assert torch.equal(host.sample(patched, "wan", **RUN), host.sample(host.patch(method, host.load("wan"), **PHASES), "wan", **RUN))
    if record.outcome != "finished":
        seen(start(next(line.text for line in host.shown if "failed" in line.text)))
    else:
        seen("")


@every_method
@pytest.mark.parametrize("at", range(STEPS))
def test_the_model_itself_may_fail(host, method, at, ours, sessions):
    """In the cross-attention after the first layer's self-attention, in each step."""
    count = []

    def fails(before, func, q, k, *args, **kwargs):
        if q.shape != k.shape:
            count.append(None)
            if len(count) == 2 * at + 1:
                raise ZeroDivisionError("theirs")
        return func(q, k, *args, **kwargs)

    model = host.override(host.wrap(host.load("wan"), "APPLY_MODEL", sessions), fails)
    patched = host.patch(method, model, **PHASES)
    ended(host, ours, ZeroDivisionError, patched)
    record = host.record(patched)
    assert record.outcome == "failed (ZeroDivisionError)" and record.sparse_calls + record.dense_calls == 2 * at + 1
    assert ours.count or at == 0 or method == "svg"
    assert ours.alive() == []
    assert torch.equal(host.sample(patched, "wan", **RUN), host.sample(host.patch(method, host.load("wan"), **PHASES), "wan", **RUN))


@every_method
@pytest.mark.parametrize("breaks", [False, True], ids=["finished", "broken off"])
def test_the_options_are_the_guiders_own_again_after_a_run(host, method, breaks):
    """Seen by a node whose wrapper of the whole run is outside of ours."""
    seen = []

    def outside(executor, *args, **kwargs):
        guider = executor.class_obj
        seen.append((guider.model_options, dict(guider.model_options["transformer_options"])))
        try:
            return executor(*args, **kwargs)
        finally:
            seen.append((guider.model_options, dict(guider.model_options["transformer_options"])))

    def stop(*_):
        if breaks:
            raise host.interrupt

    patched = host.patch(method, host.wrap(host.load("wan"), "OUTER_SAMPLE", outside), sparsity=0.4)
    guider = host.guider(patched, "wan")
    before = guider.model_options
    with pytest.raises(host.interrupt) if breaks else contextlib.nullcontext():
        host.sample(patched, "wan", guider=guider, callback=stop)
    (options, kept), (options_after, kept_after) = seen
    assert options_after is options and kept_after == kept
    assert host.module("host").OVERRIDE not in kept and host.module("host").KEY not in kept
    assert guider.model_options is before


# --- out of memory ---------------------------------------------------------------------------------------------------

SHORT = "out of memory in the sparse path"


@pytest.mark.fault(
    "Memory", "memory runs out in a sparse call, a search or a classification",
    "the right video: that call runs dense, later ones take fewer heads at a time",
)
@every_op
def test_memory_runs_out_once(host, method, op, breaking, ours, sessions, seen):
    model = host.wrap(host.load("wan"), "APPLY_MODEL", sessions)
    patched = host.patch(method, model, **{**PHASES, "sparsity": 0.0})
    calls = breaking(op, torch.OutOfMemoryError, 1)
    with ours:
        out = host.sample(patched, "wan", **RUN)
    record = host.record(patched)
    assert relative_error(out, host.sample(host.load("wan"), "wan", **RUN)) < 1e-5
    assert record.reasons[SHORT] == 1 and len(calls) > 1 and record.sparse_calls and ours.alive() == []
    (note,) = [note for note in record.notes if "out of memory" in note]
    assert note in host.shown[-1].text
    seen(note)


@pytest.mark.fault(
    "Memory", "memory goes on running out in the sparse path", "the right video: once single heads are too many, the rest of the run is dense",
)
@every_op
def test_memory_goes_on_running_out(host, method, op, breaking, ours, sessions, seen):
    model = host.wrap(host.load("wan"), "APPLY_MODEL", sessions)
    patched = host.patch(method, model, **{**PHASES, "sparsity": 0.0})
    calls = breaking(op, torch.OutOfMemoryError, None)
    with ours:
        out = host.sample(patched, "wan", **RUN)
    record, last = host.record(patched), f"{SHORT}, one head at a time"
    assert relative_error(out, host.sample(host.load("wan"), "wan", **RUN)) < 1e-5
    assert len(calls) == 2, "two heads, then one, and no third try"
    assert record.reasons[SHORT] == 1 and record.reasons[last] and record.outcome == "finished" and ours.alive() == []
    (note,) = [note for note in record.notes if last in note]
    assert note in host.shown[-1].text
    seen(note)


@pytest.mark.fault("Memory", "memory runs out in a dense call, or anywhere else in the model", "ComfyUI's own handling of it, as without this node")
@every_method
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_memory_that_the_host_runs_out_of_is_its_own_to_handle(host, method, strict, ours, sessions, seen):
    planted, count = torch.OutOfMemoryError("theirs"), []

    def short(before, func, q, *args, **kwargs):
        count.append(None)
        if len(count) == 7:
            raise planted
        return func(q, *args, **kwargs)

    model = host.override(host.wrap(host.load("wan"), "APPLY_MODEL", sessions), short)
    patched = host.patch(method, model, dense_layers="1", strict=strict, **PHASES)
    with ours:
        try:
            host.sample(patched, "wan", **RUN)
            raise AssertionError("the host saw no error")
        except torch.OutOfMemoryError as error:
            assert error is planted
            if host.name == "real":
                assert importlib.import_module("comfy.model_management").is_oom(error)
    planted.__traceback__ = None
    record = host.record(patched)
    assert record.outcome == "failed (OutOfMemoryError)" and not [note for note in record.notes if "out of memory" in note]
    assert ours.alive() == []
    seen(start(host.shown[-1].text))


@pytest.mark.fault("Memory", "memory runs out in a sparse call under strict", "ComfyUI's own handling of it")
@every_method
def test_under_strict_memory_that_runs_out_is_the_hosts_to_handle(host, method, breaking, ours, sessions, seen):
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), strict=True, **PHASES)
    breaking("block_sparse_attention", torch.OutOfMemoryError, 2)
    ended(host, ours, torch.OutOfMemoryError, patched)
    assert host.record(patched).outcome == "failed (OutOfMemoryError)" and ours.alive() == []
    seen(start(host.shown[-1].text))


# --- beside others ---------------------------------------------------------------------------------------------------


@every_method
def test_a_model_is_unloaded_between_prompts_and_loaded_again(host, method, ours, sessions):
    """As the host does after it has run out of memory, or before another model's turn."""
    if host.name != "real":
        pytest.skip("the double has no models to unload")
    management = importlib.import_module("comfy.model_management")
    patched = host.patch(method, host.wrap(host.load("wan"), "APPLY_MODEL", sessions), **PHASES)
    with ours:
        first = host.sample(patched, "wan", **RUN)
        assert management.current_loaded_models
        management.unload_all_models()
        assert ours.alive() == []
        again = host.sample(patched, "wan", **RUN)
        ended(host, ours, host.interrupt, patched, callback=_stop_at(host, 3))
        management.unload_all_models()
        assert torch.equal(host.sample(patched, "wan", **RUN), first) and torch.equal(again, first)
    assert ours.count and ours.alive() == []


def _stop_at(host, last):
    def stop(step, *_):
        if step == last:
            raise host.interrupt

    return stop


class Two:
    """Two samplers of one model, each in a thread and each with a seed, that go from step to step together."""

    def __init__(self, host, patched, **how):
        self.host, self.patched, self.how = host, patched, how
        self.outputs, self.failures = {}, {}
        self.in_step = threading.Barrier(2, timeout=60)

    def run(self, callbacks):
        """callbacks: by seed, what to call in each step."""
        threads = [threading.Thread(target=self._sample, args=(seed, callback)) for seed, callback in callbacks.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)

    def _sample(self, seed, callback):
        def together(step, *_):
            with contextlib.suppress(threading.BrokenBarrierError):  # the other one has ended
                self.in_step.wait()
            callback(step)

        try:
            self.outputs[seed] = self.host.sample(self.patched, "wan", seed=seed, node=str(seed), callback=together, **self.how)
        except BaseException as error:
            self.failures[seed] = type(error)
            self.in_step.abort()


@every_method
def test_one_model_in_two_samplers_at_once(host, method):
    patched = host.patch(method, host.load("wan"), **PHASES)
    expected = {seed: host.sample(patched, "wan", seed=seed, node=str(seed), **RUN) for seed in (1, 2)}
    alone = {run.node: run.to_json() for run in host.records(patched)}
    two = Two(host, patched, **RUN)
    two.run({1: lambda step: None, 2: lambda step: None})
    assert not two.failures
    for seed in (1, 2):
        assert relative_error(two.outputs[seed], expected[seed]) < 1e-6
    assert {run.node: run.to_json() for run in host.records(patched)[2:]} == alone


@pytest.mark.fault("Lifecycle", "of two samplers that share a model and run at once, one is stopped", "the other one's video is what it is alone")
@every_method
def test_one_of_two_samplers_at_once_is_stopped(host, method, seen):
    patched = host.patch(method, host.load("wan"), **PHASES)
    expected = host.sample(patched, "wan", seed=2, node="2", **RUN)
    alone = host.record(patched).to_json()
    two = Two(host, patched, **RUN)
    # When a run ends, the real host takes the patcher from the model that both share: its other sampler must not need it again.
    two.run({1: _stop_at(host, STEPS - 1 if host.name == "real" else 2), 2: lambda step: None})
    assert two.failures == {1: host.interrupt}
    assert relative_error(two.outputs[2], expected) < 1e-6
    by_node = {run.node: run for run in host.records(patched)[1:]}
    assert by_node["1"].outcome == "interrupted" and by_node["2"].to_json() == alone
    (line,) = [line.text for line in host.shown if "interrupted" in line.text]
    seen(start(line))
