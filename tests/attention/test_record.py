"""The record of a run: its schema and its arithmetic."""

import json
import math
import threading

import pytest
import torch
from pack.attention.layout import VideoLayout
from pack.attention.methods import adaspa, svg
from pack.attention.record import Figures, RunRecord
from video_oracle import make_call

LAYOUT = VideoLayout(2, 3, 4, prefix=1)


def call(step=0, layer=0):
    qkv = torch.zeros(3, 1, 2, LAYOUT.seq_len, 4)
    return make_call(LAYOUT, qkv, step=step, layer=layer)


def reachable(thing, seen=None):
    """The objects that plain data, and this pack's own objects, lead to."""
    seen = {} if seen is None else seen
    if id(thing) not in seen:
        seen[id(thing)] = thing
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
        for part in [*parts, *(vars(thing).values() if type(thing).__module__.startswith("pack.") else ())]:
            reachable(part, seen)
    return seen.values()


def figures(density, temporal=None, recall=None):
    return Figures(*(None if values is None else torch.tensor(values) for values in (density, temporal, recall)))


def test_achieved_is_over_sparse_calls_and_run_over_all():
    record = RunRecord("SVG", svg.CONFIG(sparsity=0.6), steps=4)
    record.sparse(call(1, 0), figures([[0.5, 0.3], [0.4, 0.4]]))  # mean 0.4 kept
    record.sparse(call(1, 1), figures([[0.1, 0.3]]))  # 0.2 kept; a call is a call, whatever its batch
    record.dense(0, 0, "warm-up step")
    record.dense(0, 1, "warm-up step")
    record.dense(3, None, "image model", calls=4)
    record.flush()
    assert (record.sparse_calls, record.dense_calls, dict(record.reasons)) == (2, 6, {"warm-up step": 2, "image model": 4})
    assert record.asked_sparsity == 0.6
    assert record.achieved_sparsity == pytest.approx(0.7, abs=1e-6) and record.run_sparsity == pytest.approx(0.7 * 2 / 8, abs=1e-6)


def test_json_has_the_promised_fields_and_is_plain():
    record = RunRecord("AdaSpa", adaspa.CONFIG(), steps=10, layers=3, seed=5, warmup=2)
    record.backend = "torch"
    record.sparse(call(2, 1), figures([[0.25, 0.25]], recall=[[0.9, 0.5]]))
    record.dense(0, 1, "warm-up step", calls=3)
    record.searched(1)
    record.note("said")
    data = record.to_json()
    expected = {
        "schema": 1, "method": "AdaSpa", "asked_sparsity": 0.8, "achieved_sparsity": 0.75, "run_sparsity": 0.1875,
        "sparse_calls": 1, "dense_calls": 3,
        "reasons": {"warm-up step": 3}, "tokens": 25, "steps": 10, "layers": 3, "seed": 5, "backend": "torch", "search_steps": [1],
        "notes": ["said"],
    }
    assert {key: data[key] for key in expected} == expected
    assert data["layout"] == {"frames": 2, "height": 3, "width": 4, "prefix": 1, "suffix": 0} and data["config"]["token_order"] == "hilbert"
    assert data["recall_by_layer_and_head"] == {"1": [0.9, 0.5]} and "temporal_share_by_layer_and_head" not in data
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert record.to_json() == data  # reading it changes nothing


def test_a_run_without_calls_has_a_record_too():
    data = RunRecord("SVG").to_json()
    assert (data["achieved_sparsity"], data["run_sparsity"], data["tokens"], data["sparse_calls"], data["reasons"]) == (0, 0, None, 0, {})
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_cells_are_by_layer_then_step():
    record = RunRecord("SVG", steps=3)
    record.dense(0, 0, "warm-up step")
    record.sparse(call(1, 0), figures([[0.2]]))
    record.sparse(call(1, 0), figures([[0.4]]))  # the other condition
    record.sparse(call(1, 2), figures([[0.5]]))
    record.dense(1, 2, "out of memory in the sparse path", calls=3)
    record.dense(2, None, "of no known layer")
    record.flush()
    assert record.by_layer_and_step() == [[0, pytest.approx(0.7), None], [None, None, None], [None, 0.125, None]]


def test_heads_are_means_over_batch_and_calls():
    record = RunRecord("SVG")
    record.sparse(call(1, 4), figures([[0.2, 0.4], [0.4, 0.4]], temporal=[[True, False], [True, True]]))
    record.sparse(call(2, 4), figures([[0.3, 0.2], [0.3, 0.2]], temporal=[[False, False], [False, False]]))
    record.flush()
    assert record.by_layer_and_head("temporal") == {"4": [0.5, 0.25]}
    assert record.by_layer_and_head("sparsity") == {"4": [0.7, 0.7]} and record.by_layer_and_head("recall") == {}


def test_a_part_of_the_heads_keeps_the_newest():
    """After memory ran out, or on a device of its own, a call may have fewer heads."""
    record = RunRecord("SVG")
    record.sparse(call(1, 0), figures([[0.2, 0.4, 0.6, 0.8]]))
    record.sparse(call(2, 0), figures([[0.5, 0.25]]))
    record.flush()
    assert record.by_layer_and_head("sparsity") == {"0": [0.5, 0.75]}
    assert record.achieved_sparsity == pytest.approx((0.5 + 0.625) / 2)


def test_flushing_reads_back_once_and_keeps_no_tensor():
    record = RunRecord("SVG")
    record.sparse(call(), figures([[0.25]], temporal=[[True]], recall=[[0.5]]))
    for _ in range(2):
        record.flush()
        assert record.achieved_sparsity == 0.75
    assert not any(isinstance(thing, torch.Tensor) for thing in reachable(record))


def test_a_recall_that_is_no_number_leaves_the_json_readable():
    """NaN in q, k or v comes this far; a browser's JSON.parse refuses the word NaN, and with it the whole report."""
    record = RunRecord("AdaSpa")
    record.sparse(call(), figures([[0.5, 0.5]], recall=[[math.nan, 0.5]]))
    json.dumps(record.to_json(), allow_nan=False)


def test_a_sentence_is_noted_once_and_in_order():
    record = RunRecord("SVG")
    for sentence in ("b", "a", "b"):
        record.note(sentence)
    assert record.notes == ["b", "a"]


def test_threads_of_one_run_lose_nothing():
    record = RunRecord("SVG")

    def work():
        for step in range(200):
            record.sparse(call(step), figures([[0.5]]))
            record.dense(step, 1, "warm-up step")
            record.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record.flush()
    assert (record.sparse_calls, record.dense_calls) == (800, 800) and record.achieved_sparsity == 0.5
    assert record._sparsity.count == 800 and record.by_layer_and_step()[1] == [0.0] * 200
