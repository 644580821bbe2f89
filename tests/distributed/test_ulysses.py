"""Sequence-parallel engines on two processes (gloo): what a run computes when a call brings a share of the heads, or of the sequence."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from engine import RUNS, work
from oracle import relative_error

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
FOR_EACH_HEAD_ALONE = [run for run in RUNS if run != "adaspa, head_adaptive"]
TOKENS, BLOCK_K = 576, 64
A_PART = "the model attends for a part of the video at a time, as with guides that have a strength of their own or a sequence split over GPUs"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found, by (way, run)."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def by_head(data):
    """What the record says of heads: name -> layer -> one figure a head."""
    return {name: layers for name, layers in data.items() if name.endswith("_by_layer_and_head")}


@pytest.mark.parametrize("run", FOR_EACH_HEAD_ALONE)
@pytest.mark.fault("More than one device", "an engine splits the heads over two processes (Ulysses)", "the video of one process")
def test_a_share_of_the_heads_gives_the_video_of_one_process(found, run, seen):
    expected, data, _ = found[0]["alone", run]
    shares = [each["ulysses", run] for each in found]
    assert torch.equal(shares[0][0], shares[1][0])
    assert relative_error(shares[0][0], expected) < 1e-5
    dense = found[0]["alone", None][0]
    assert relative_error(expected, dense) > 1e-4, "the run is not sparse"
    for name, layers in by_head(data).items():
        for layer, heads in layers.items():
            parts = [value for share in shares for value in share[1][name][layer]]
            assert parts == pytest.approx(heads, abs=1e-5), f"{name} of layer {layer}"
    for _, share, lines in shares:
        assert (share["sparse_calls"], share["reasons"]) == (data["sparse_calls"], data["reasons"]) and share["sparse_calls"] > 0
        assert share["notes"] == data["notes"] and "done" in lines[-1]
    seen("")


@pytest.mark.fault(
    "More than one device", "an engine splits the heads, with AdaSpa's head_adaptive on",
    "each process evens out the heads that it has: the budget is met in each, the video is not exactly that of one process",
)
def test_head_adaptive_evens_out_the_heads_of_a_process(found, seen):
    run = "adaspa, head_adaptive"
    expected, data, _ = found[0]["alone", run]
    shares = [each["ulysses", run] for each in found]
    assert torch.equal(shares[0][0], shares[1][0])
    for _, share, _ in shares:
        assert abs(share["achieved_sparsity"] - 0.4) <= BLOCK_K / TOKENS / 2
        assert share["sparse_calls"] == data["sparse_calls"]
    parts = [heads for _, share, _ in shares for heads in share["sparsity_by_layer_and_head"]["0"]]
    assert parts != pytest.approx(data["sparsity_by_layer_and_head"]["0"], abs=1e-3), "what docs/COMPOSING.md says of it is not so any more"
    assert 1e-5 < relative_error(shares[0][0], expected) < 0.2
    seen("")


@pytest.mark.parametrize("run", ["svg", "adaspa"])
@pytest.mark.parametrize("way, reason", [
    ("gathered", A_PART),
    ("ring", "no attention call was as long as the video: 9 x 8 x 8 video tokens are 576 tokens, the longest call had 288"),
])
@pytest.mark.fault("More than one device", "an engine splits the sequence over two processes (ring)", "the dense video")
def test_a_share_of_the_sequence_is_dense_and_says_so(found, run, way, reason, seen):
    dense = found[0]["alone", None][0]
    for each in found:
        out, data, lines = each[way, run]
        assert relative_error(out, dense) < 1e-5
        assert data["sparse_calls"] == 0 and reason in data["reasons"]
        assert lines[-1].startswith(f"⚠ {data['method']}: nothing ran sparse. Reason: {reason}")
    seen(reason)
