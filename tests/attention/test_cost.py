"""The cost model against the arithmetic that it stands for, and its measurement on this machine."""

import pytest
import torch
from pack.attention import cost
from pack.attention.cost import Rates, Step, expected_gain

EVEN = Rates(attention=1e12, matmul=1e12, sparse=1.0)


def test_the_work_of_a_step():
    step = Step(tokens=1000, layers=3, width=64, weights=5000)
    attention, rest = step.seconds(Rates(attention=2.0, matmul=4.0, sparse=1.0))
    assert attention == 3 * (2 * 1000 * 1000 * 64 + 2 * 1000 * 1000 * 64) / 2 and rest == 2 * 1000 * 5000 / 4
    assert step.attention_share(EVEN) == pytest.approx(3 * 4 * 1000**2 * 64 / (3 * 4 * 1000**2 * 64 + 2 * 1000 * 5000))


def test_with_nothing_beside_attention_the_gain_is_the_ideal():
    step = Step(tokens=10_000, layers=2, width=128, weights=0)
    assert expected_gain(step, EVEN, sparsity=0.75, steps=10, sparse_steps=10).high == pytest.approx(4.0)
    assert expected_gain(step, EVEN, sparsity=0.75, steps=10, sparse_steps=5).high == pytest.approx(10 / (5 + 5 / 4))
    assert expected_gain(step, EVEN, sparsity=0.75, steps=10, sparse_steps=10, dense_layers=1).high == pytest.approx(1 / (0.5 + 0.5 / 4))
    assert expected_gain(step, EVEN, sparsity=0.75, steps=10, sparse_steps=0).high == pytest.approx(1.0)


def test_half_a_step_gains_at_most_twice():
    step = Step(tokens=1000, layers=1, width=500, weights=1000 * 1000)  # 2e9 operations each
    gain = expected_gain(step, EVEN, sparsity=0.95, steps=4, sparse_steps=4)
    assert gain.attention_share == pytest.approx(0.5) and 1 < gain.low < gain.high < 2


def test_slow_sparse_calls_gain_less_and_never_lose():
    step = Step(tokens=10_000, layers=1, width=128, weights=0)
    gains = [expected_gain(step, Rates(1e12, 1e12, sparse), 0.5, 1, 1).high for sparse in (1.0, 0.8, 0.5, 0.2)]
    assert gains == [pytest.approx(2.0), pytest.approx(1.6), pytest.approx(1.0), pytest.approx(1.0)]


def test_rates_are_measured_once(monkeypatch):
    monkeypatch.setattr(cost, "_measured", {})
    monkeypatch.setitem(cost._TOKENS, "cpu", 512)
    calls = []

    def attention(q, k, v):
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    arguments = (torch.device("cpu"), torch.float32, 64, attention, "sdpa")
    rates = cost.rates_of(*arguments)
    assert rates.attention > 1e6 and rates.matmul > 1e6 and 0 < rates.sparse <= 1
    times = len(calls)
    assert cost.rates_of(*arguments) is rates and len(calls) == times
    cost.rates_of(*arguments[:4], "another")
    assert len(calls) == 2 * times
