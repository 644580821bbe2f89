"""The words on the node while sampling and when a run ends, and the same in the log."""

import importlib
import itertools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

METHODS = ("svg", "adaspa", "auto")
every_method = pytest.mark.parametrize("method", METHODS)


class Clock:
    """time.monotonic() that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(host, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(host.module("status"), "time", SimpleNamespace(monotonic=clock))
    return clock


def _skipped(record):
    """The share skipped, what it is off by where that is measured, and what was asked."""
    off = "" if record.measured_error is None else f", off by {record.measured_error:.0%}"
    return f"{record.achieved_sparsity:.0%} skipped{off} (asked {record.asked_sparsity:.0%})"


def _measured(record):
    """The parts of a line that are measured, or differ by head."""
    low, middle, high = (f"{share:.0%}" for share in record.head_percentiles())
    took = {kind: record.call_ms(kind) for kind in ("sparse", "dense", "search")}
    times = [f"{ms:,.0f} ms a {kind} call" if ms >= 100 else f"{ms:.3g} ms a {kind} call" for kind, ms in took.items() if ms is not None]
    memory = [f"{record.plan_bytes / 2**20:.3g} MiB of plans"] if record.plan_bytes else []
    return ([] if low == high else [f"heads {low} to {high}, median {middle}"]) + [", ".join(times + memory)]


@every_method
def test_the_live_line_comes_at_most_twice_a_second(host, method, clock):
    times = []

    def tick(*_):
        clock.now += 0.2

    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    right = host.module("host").show_text
    host.module("host").show_text = lambda text, *rest: (times.append(clock.now), right(text, *rest))
    try:
        host.sample(patched, "wan", steps=12, callback=tick)
    finally:
        host.module("host").show_text = right
    *live, closing = times
    assert len(live) == 4, "12 evaluations, 0.2 s apart: at 0, 0.6, 1.2 and 1.8 s"
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(live))
    assert closing == pytest.approx(102.4)


@every_method
def test_the_live_line_tells_step_share_counts_and_reasons(host, method, clock):
    def tick(*_):
        clock.now += 1

    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan", callback=tick)
    record = host.record(patched)
    *live, _ = [line.text for line in host.shown]
    assert len(live) == 4
    reason = "warm-up step" if method == "svg" else "search step"
    assert live[0] == f"{record.method} 1/4 · 0 sparse, 0 dense calls"
    assert live[1] == f"{record.method} 2/4 · 0 sparse, 2 dense calls · dense: {reason} (2)"
    assert re.match(rf"{record.method} 3/4 · \d+% skipped(, off by \d+%)? \(asked 40%\) · 2 sparse, 2 dense calls", live[2])
    assert ("off by" in live[2]) == (method == "auto")
    assert all(line.node == "5" and line.client == "client" for line in host.shown)


@every_method
def test_the_closing_line_has_the_figures_of_the_record(host, method, caplog):
    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    with caplog.at_level(logging.INFO, host.module("host").KEY):
        host.sample(patched, "wan")
    record = host.record(patched)
    text = host.shown[-1].text
    (reason,) = record.reasons
    assert text.split(" · ") == [
        record.method, "done", f"{record.run_sparsity:.0%} of the whole run's attention skipped",
        f"in sparse calls {_skipped(record)}",
        f"{record.sparse_calls} sparse, {record.dense_calls} dense calls", f"dense: {reason} (2)", *_measured(record),
        *record.notes,
    ]
    assert text in [entry.getMessage() for entry in caplog.records if entry.levelno == logging.INFO]


@every_method
@pytest.mark.parametrize(
    "settings, frames, advice",
    [
        ({"warmup_steps": 4}, 9, "use more steps."), ({"end_steps": 4, "warmup_steps": 0}, 9, "Lower end_steps."),
        ({"dense_layers": "0-1", "warmup_steps": 0}, 9, "Shorten dense_layers."), ({"dense_layers": "0-1"}, 9, "Shorten dense_layers."),
        ({"min_tokens": 5000}, 9, "set min_tokens (an advanced input) to 0 to try it anyway."),
        ({}, 1, "Reason: one latent frame: there are no other frames to skip."),
    ],
    ids=["warm-up", "last steps", "dense layers", "dense layers after a warm-up", "min_tokens", "one frame"],
)
def test_a_run_with_no_sparse_call_ends_with_a_warning_and_advice(host, method, settings, frames, advice, caplog):
    patched = host.patch(method, host.load("wan"), **settings)
    with caplog.at_level(logging.INFO, host.module("host").KEY):
        host.sample(patched, "wan", frames=frames)
    record = host.record(patched)
    assert record.sparse_calls == 0 and record.dense_calls == 8
    text = host.shown[-1].text
    assert text.startswith(f"⚠ {record.method}: nothing ran sparse. Reason: ") and advice in text
    assert text in [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


@every_method
def test_where_triton_cannot_run_but_is_asked_for_the_way_out_is_said(host, method):
    """The tests' tensors are on a CPU."""
    settings = {"backend": "triton", "sparsity": 0.4}
    host.sample(host.patch(method, host.load("wan"), **settings), "wan")
    text = host.shown[-1].text
    assert re.match(r"⚠ .*: nothing ran sparse\. Reason: .*Triton.*\. Set backend to auto: ", text)
    with pytest.raises(RuntimeError, match=r"strict: a call would run dense: .*Triton.*\. Set backend to auto: "):
        host.sample(host.patch(method, host.load("wan"), **settings, strict=True), "wan")
    host.sample(host.patch(method, host.load("wan"), backend="torch"), "wan", frames=1)
    assert "one latent frame" in host.shown[-1].text and "Set backend" not in host.shown[-1].text


@every_method
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_where_a_precision_cannot_run_the_models_own_is_used_and_it_is_said(host, method, precision):
    """The tests' tensors are on a CPU."""
    model, settings = host.load("wan"), {"sparsity": 0.4}
    expected = host.sample(host.patch(method, model, **settings), "wan")
    patched = host.patch(method, model, precision=precision, **settings)
    assert torch.equal(host.sample(patched, "wan"), expected)
    assert f" · precision {precision}: " in host.shown[-1].text and host.shown[-1].text.count("computed in float32") == 1
    with pytest.raises(RuntimeError, match=f"strict: a call would run in float32: precision {precision}: ") as caught:
        host.sample(host.patch(method, model, precision=precision, strict=True, **settings), "wan")
    assert "Set backend" not in str(caught.value)


def _record(host, fidelity, shares=(0.7,), errors=()):
    """A finished run of Auto, by its figures alone."""
    of_record, auto = (importlib.import_module(f"pack.attention.{name}") for name in ("record", "methods.auto"))
    record = of_record.RunRecord("Auto", auto.CONFIG(fidelity=fidelity), 4, 1, 0, 1)
    record.outcome, layout = "finished", importlib.import_module("pack.attention.layout").VideoLayout(9, 8, 8)
    for step, share in enumerate(shares, 1):
        record.sparse(SimpleNamespace(step=step, layer=0, stack="", layout=layout), of_record.Figures(density=torch.full((1, 2), 1 - share)))
    for error in errors:
        record.measured(1, (0, ""), error)
    record.flush(wait=True)
    return record


@pytest.mark.parametrize("fidelity, errors, said", [
    (0.9, (), "72% skipped (at most 10% off asked)"), (0.9, (0.06, 0.08), "72% skipped, off by 7% (at most 10% asked)"),
    (0.99, (0.0075,), "72% skipped, off by 0.75% (at most 1% asked)"), (0.5, (1.2,), "72% skipped, off by 120% (at most 50% asked)"),
    (0.995, (0.0,), "72% skipped, off by 0% (at most 0.5% asked)"),
])
def test_what_a_fidelity_leaves_is_said_with_the_error_measured_and_asked(host, fidelity, errors, said):
    record = _record(host, fidelity, (0.7, 0.74), errors)
    status = host.module("status")
    assert status.line(record) == f"Auto 1/4 · {said} · 2 sparse, 0 dense calls"
    assert status.closing_line(record) == f"Auto · done · 72% of the whole run's attention skipped · in sparse calls {said} · 2 sparse, 0 dense calls"
    told = json.loads(json.dumps(status.figures(record), allow_nan=False))
    mean = pytest.approx(sum(errors) / len(errors)) if errors else None
    assert (told["asked"], told["achieved"], told["asked_error"], told["error"]) == (None, pytest.approx(0.72), pytest.approx(1 - fidelity), mean)


def test_a_run_of_the_auto_node_says_what_it_skipped_and_how_far_off_it_was(host, told, clock):
    """From a run: with nothing measured yet, under way, and at the end."""
    def tick(*_):
        clock.now += 1

    patched = host.patch("auto", host.load("wan"), fidelity=0.98)
    host.sample(patched, "wan", callback=tick)
    record = host.record(patched)
    error = rf"{100 * record.measured_error:.2g}%" if record.measured_error < 0.02 else f"{record.measured_error:.0%}"
    assert f" · in sparse calls {record.achieved_sparsity:.0%} skipped, off by {error} (at most 2% asked) · " in host.shown[-1].text
    events = [data for _, data, _ in told[::2]]
    assert [data["error"] is None for data in events] == [True, True, False, False, False] and {data["asked"] for data in events} == {None}
    assert (events[-1]["error"], events[-1]["asked_error"]) == (record.measured_error, 0.02) and 0 < record.measured_error < 0.1


@every_method
def test_a_run_that_this_node_never_saw_says_what_may_be_the_cause(host, method):
    """As when a cache answers every evaluation."""
    def skip(executor, x, *args, **kwargs):
        return 0 * x

    patched = host.patch(method, host.wrap(host.load("wan"), "DIFFUSION_MODEL", skip))
    host.sample(patched, "wan")
    assert "⚠" in host.shown[-1].text and "a cache skipped every step" in host.shown[-1].text


@pytest.mark.parametrize("method", ["svg", "adaspa"])
def test_a_short_budget_is_said_with_what_is_possible(host, method):
    patched = host.patch(method, host.load("wan"), sparsity=0.95)
    host.sample(patched, "wan", frames=3)
    record = host.record(patched)
    limits = [note for note in record.notes if re.match(r"(3 latent frames|192 video tokens).*: at most 0\.\d+ can be skipped", note)]
    assert limits and all(limit in host.shown[-1].text for limit in limits)
    assert 0 < record.achieved_sparsity < 0.95 and _skipped(record) in host.shown[-1].text


def test_without_a_server_or_a_node_nothing_is_shown_and_all_works(host, monkeypatch):
    import server

    monkeypatch.setattr(server.PromptServer, "instance", None)
    patched = host.patch("svg", host.load("wan"))
    host.sample(patched, "wan")
    monkeypatch.delattr(server.PromptServer, "instance")
    host.sample(patched, "wan")
    unnamed = host.patch("svg", host.load("wan"), node_id=None)
    host.sample(unnamed, "wan")
    assert host.shown == [] and [len(host.records(model)) for model in (patched, unnamed)] == [2, 1]


def test_the_text_fits_the_real_servers_function(host):
    if host.name != "real":
        pytest.skip("the double's server has no such function of its own")
    import inspect

    import server

    inspect.signature(server.PromptServer.send_progress_text).bind(None, "text", "5", "client")


@pytest.fixture
def told(host, monkeypatch):
    """The events for the panel as they are sent: (name, data, client), and each line of text between them."""
    import server

    sent, instance = [], server.PromptServer.instance
    monkeypatch.setattr(instance, "send_sync", lambda name, data, sid=None: sent.append((name, data, sid)), raising=False)
    text = instance.send_progress_text
    monkeypatch.setattr(instance, "send_progress_text", lambda line, *rest: (sent.append(line), text(line, *rest)))
    return sent


@every_method
def test_the_panel_is_told_the_figures_of_the_record_before_each_line(host, method, told, clock):
    def tick(*_):
        clock.now += 0.3

    patched = host.patch(method, host.load("wan"), sparsity=0.4)
    host.sample(patched, "wan", steps=6, callback=tick)
    record, events, lines = host.record(patched), told[::2], told[1::2]
    assert len(events) == len(lines) == 4, "6 evaluations, 0.3 s apart: at 0, 0.6 and 1.2 s, and the end"
    assert [data["line"] for _, data, _ in events] == lines == [line.text for line in host.shown]
    assert {(name, sid, data["node"]) for name, data, sid in events} == {("sparse_video_attention.run", "client", "5")}
    assert [(data["state"], data["step"], data["steps"]) for _, data, _ in events] == [("running", step, 6) for step in (1, 3, 5)] + [("done", 6, 6)]
    last = json.loads(json.dumps(events[-1][1], allow_nan=False))
    assert (last["asked"], last["achieved"]) == (record.asked_sparsity, record.achieved_sparsity) and last["achieved"] > 0
    assert (last["sparse_calls"], last["dense_calls"]) == (record.sparse_calls, record.dense_calls)


@every_method
def test_the_panel_is_told_how_a_run_ended(host, method, told):
    host.sample(host.patch(method, host.load("wan")), "wan", frames=1)
    assert told[-2][1]["state"] == "warning" and told[-1].startswith("⚠")

    def fail(*_):
        raise host.interrupt()

    with pytest.raises(host.interrupt):
        host.sample(host.patch(method, host.load("wan")), "wan", callback=fail)
    assert told[-2][1]["state"] == "stopped"


def test_the_panel_is_told_which_workflow_runs(host, told, monkeypatch):
    """From the prompt that runs; a prompt sent by a program has no workflow."""
    import server

    def running(prompt_id, workflow):
        of = {"another": {"id": "not this"}, prompt_id: workflow}
        prompts = [(number, prompt, {}, {"extra_pnginfo": {"workflow": of[prompt]}}) for number, prompt in enumerate(of)]
        queue = SimpleNamespace(get_current_queue_volatile=lambda: (prompts, []))
        monkeypatch.setattr(server.PromptServer.instance, "prompt_queue", queue, raising=False)
        host.sample(host.patch("svg", host.load("wan")), "wan")
        return {data["workflow"] for _, data, _ in told[::2]}

    from comfy_execution.utils import get_executing_context

    with host.executing("6"):
        prompt_id = get_executing_context().prompt_id
    assert running(prompt_id, {"id": "an id"}) == {"an id"}
    told.clear()
    assert running(prompt_id, {}) == {None}


def test_the_panels_script_knows_the_figures_by_their_names(host):
    """What it reads of an event is what is sent, and it finds an error too large where the method does."""
    script = (Path(__file__).resolve().parents[2] / "web" / "panel.js").read_text(encoding="utf-8")
    record = _record(host, 0.9)
    sent = {*host.module("status").figures(record), "node", "workflow", "line"}
    assert set(re.findall(r"\bdata\.(\w+)", script)) - {"leftOut"} == sent - {"method"}
    assert f"const MOST_OFF = {importlib.import_module('pack.attention.methods.auto')._DRIFT};" in script


def test_the_panels_script_listens_to_what_is_sent(host):
    script = (Path(__file__).resolve().parents[2] / "web" / "panel.js").read_text(encoding="utf-8")
    assert f'const EVENT = "{host.module("host").RUN_EVENT}";' in script
    names = {name: re.findall(r'"(\w+)"', listed) for name, listed in re.findall(r"const (\w+) = new Set\(\[(.*)\]\)", script)}
    told = {node.__name__ for node in importlib.import_module("pack.nodes").NODES} - {"SparseAttentionReport"}  # which shows a picture
    assert names["PATCHES"] == ["SparseAttentionPatchSVG", "SparseAttentionPatchAdaSpa", "SparseAttentionPatchAuto"]
    assert told == {*names["PATCHES"], *names["TELLERS"]}
