"""What the node says before a run, on the real ComfyUI's models (SVA_HOST=real)."""

import re

import pytest
import zoo

TELLS_BEFORE = True
_CASES = {case.name: case for case in zoo.CASES}


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Frees the models while their host still stands."""
    yield
    zoo.forget()


@pytest.fixture
def load(host):
    """load(name): a model of the zoo."""
    if host.name != "real":
        pytest.skip("the double's models do not say how their attention is made")

    def load(name):
        if reason := zoo.why_missing(_CASES[name]):
            pytest.skip(reason)
        return zoo.load(_CASES[name])

    return load


@pytest.mark.parametrize("method, name", [("svg", "SVG"), ("adaspa", "AdaSpa"), ("auto", "Auto")])
def test_the_node_says_what_attention_takes_and_from_where_it_is_worth_it(host, load, method, name):
    host.patch(method, load("Wan T2V"), min_tokens=-1)
    (line,) = host.shown
    found = re.fullmatch(
        rf"{name} · Wan 2.1 / 2.2, 2 layers · attention is about (\d+)% at 16,384, (\d+)% at 65,536 tokens of a step here · "
        r"not worth it below 4,096 tokens, which stay dense", line.text,
    )
    assert found and 0 < int(found[1]) <= int(found[2]) <= 100 and line.node == "5"


def test_the_start_says_tokens_layers_steps_and_the_gain(host, load):
    case = _CASES["Wan T2V"]
    patched = host.patch("svg", load("Wan T2V"), dense_layers="0", sparsity=0.8)
    zoo.sample(patched, case, case.sizes[0], steps=6)
    text = host.shown[1].text
    assert text.startswith("SVG starts · 576 video tokens, 2 layers · 1 of them sparse in up to 5 of 6 steps · ")
    expected = host.record(patched).expected
    assert f"attention is about {expected.attention_share:.0%} of a step here" in text
    assert expected.high >= 1 and expected.low <= expected.high
    assert host.record(patched).costs()["expected"]["high"] == expected.high


def test_no_gain_is_promised_where_the_search_finds_what_is_skipped(host, load):
    case = _CASES["Wan T2V"]
    patched = host.patch("auto", load("Wan T2V"), dense_layers="0")
    zoo.sample(patched, case, case.sizes[0], steps=6)
    found = re.fullmatch(
        r"Auto starts · 576 video tokens, 2 layers · 1 of them sparse in up to 5 of 6 steps · attention is about \d+% of a step here · "
        r"how much is skipped is found in the search", host.shown[1].text,
    )
    assert found and host.record(patched).expected is None and host.record(patched).costs()["expected"] is None


def test_no_search_is_promised_where_a_pattern_is_loaded(host, load):
    case = _CASES["Wan T2V"]
    patched = host.patch("auto", load("Wan T2V"))
    log = patched.get_attachment(host.module("host").KEY)
    log.pattern_wanted = True
    zoo.sample(patched, case, case.sizes[0], steps=6)
    (pattern,) = log.patterns.values()
    patched.set_attachments(host.module("patch").PATTERN, pattern)
    host.shown.clear()
    zoo.sample(patched, case, case.sizes[0], steps=6)
    assert host.shown[0].text.startswith("Auto starts") and host.shown[0].text.endswith(" · how much is skipped is what the loaded pattern has")
    assert not host.record(patched).searches and host.record(patched).sparse_calls


def test_a_short_video_is_not_worth_it(host, load):
    case = _CASES["CogVideoX"]
    patched = host.patch("adaspa", load("CogVideoX"), min_tokens=-1)
    zoo.sample(patched, case, case.sizes[0])
    start = "AdaSpa starts · 576 video tokens, 2 layers"
    assert host.shown[1].text == f"{start} · not worth it: below 4,096 tokens (min_tokens), its text counted, calls stay dense"


def test_no_step_left_is_said(host, load):
    case = _CASES["Wan T2V"]
    zoo.sample(host.patch("adaspa", load("Wan T2V"), sparsity=0.5), case, case.sizes[0], steps=1)
    start = "AdaSpa starts · 576 video tokens, 2 layers"
    assert host.shown[1].text == f"{start} · no step is left for sparse attention: use more steps, or lower warmup_steps or end_steps"


@pytest.mark.parametrize("attention, steps, why", [
    (0.2, 0.1, ""), (0.8, 0.1, ", but few of the steps can be sparse"),
    (0.8, 0.9, ", but sparse calls were measured to be hardly faster than dense ones"),
])
def test_why_little_is_gained(host, attention, steps, why):
    assert host.module("outlook")._but(attention, steps) == why


def test_a_gain_too_small_is_called_one(host, load):
    case = _CASES["Mochi"]
    patched = host.patch("svg", load("Mochi"))  # a wide network on a short video
    zoo.sample(patched, case, case.sizes[1])
    assert "hardly worth it: attention is about " in host.shown[1].text


def test_a_gain_that_skipping_all_would_not_bring_is_called_too_small(host, load, monkeypatch):
    case = _CASES["Wan T2V"]
    outlook = host.module("outlook")
    right, asked = outlook.cost.expected_gain, []

    def expected_gain(step, rates, sparsity, *rest):
        asked.append(sparsity)
        return right(step, rates, sparsity, *rest)

    monkeypatch.setattr(outlook.cost, "expected_gain", expected_gain)
    monkeypatch.setattr(outlook.cost, "WORTH", 1000.0)
    zoo.sample(host.patch("auto", load("Wan T2V")), case, case.sizes[0])
    assert asked == [1.0] and "hardly worth it: attention is about " in host.shown[1].text and "found in the search" not in host.shown[1].text


@pytest.mark.parametrize("name", _CASES)
def test_every_model_says_how_its_attention_is_made(host, load, name):
    case = _CASES[name]
    model = load(name)
    network = model.get_model_object("diffusion_model")
    row = host.module("video_models").find(network)
    heads, head_dim = row.heads(network)
    seen = set()

    def watch(func, q, k, *args, **kwargs):
        if q.shape[-2] == k.shape[-2] == case.expected(case.sizes[1]).seq_len:
            seen.add(q.shape[1] * q.shape[3] if q.dim() == 4 else q.shape[2])
        return func(q, k, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = watch
    zoo.sample(model, case, case.sizes[1], steps=1)
    assert seen == {heads * head_dim} and host.module("outlook").prospect_of(model).weights > 0


def test_what_cannot_be_reckoned_is_left_out(host, load, monkeypatch):
    cost = host.module("outlook").cost
    monkeypatch.setattr(cost, "rates_of", lambda *_: 1 / 0)
    case = _CASES["Wan T2V"]
    patched = host.patch("svg", load("Wan T2V"), sparsity=0.5)
    assert host.shown == []
    zoo.sample(patched, case, case.sizes[0])
    assert host.record(patched).sparse_calls == 2 and not any("starts" in line.text for line in host.shown)
