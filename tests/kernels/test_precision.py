"""8 bits against attention in float64: on the trained model's own q, k and v, on structured ones, and where there is little to scale by."""

import dataclasses

import pytest
import torch
from attention_inputs import STRUCTURES, structured_qkv, trained_qkv
from kernel_cases import make
from oracle import attention, relative_error
from pack import kernels
from pack.attention.layout import VideoLayout
from pack.kernels import BlockMask, quantise

PRECISIONS = ("int8", "fp8")
BOUND = {"int8": 0.03, "fp8": 0.06}
# Rows that are compared: float64 scores of all would take long.
ROWS = 384


def error(q, k, v, precision, seed=0):
    """Relative L2 error at a fixed mask that keeps three blocks in ten, of bfloat16 inputs."""
    q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
    generator = torch.Generator().manual_seed(seed)
    heads, seq = q.shape[1:3]
    q = q[:, :, torch.randperm(seq, generator=generator)[:ROWS]]
    kept = torch.rand(1, heads, ROWS // 128, -(-seq // 64), generator=generator) < 0.3
    kept[..., 0] = True
    mask = BlockMask.from_blocks(kept, 128, 64, ROWS, seq)
    visible = kept.repeat_interleave(128, 2).repeat_interleave(64, 3)[..., :seq]
    expected, expected_lse = attention(q, k, v, visible)
    out, lse = kernels.block_sparse_attention(q, k, v, mask, return_lse=True, backend="reference", precision=precision)
    assert relative_error(lse, expected_lse) < BOUND[precision]
    return relative_error(out, expected)


@pytest.fixture(scope="module")
def trained():
    return {sigma: trained_qkv(sigma)[1] for sigma in (0.97, 0.9, 0.4)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sigma", [0.97, 0.9, 0.4])
def test_on_the_trained_models_own(precision, sigma, trained, record_property):
    errors = [error(*qkv, precision) for qkv in trained[sigma]]
    record_property("errors", errors)
    print(f"{precision} at sigma {sigma}, by layer: {', '.join(f'{value:.4f}' for value in errors)}")
    assert len(errors) == 6 and max(errors) <= BOUND[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_on_structured_ones(precision, name):
    value = error(*structured_qkv(name, VideoLayout(6, 16, 16)), precision)
    print(f"{precision}, {name}: {value:.4f}")
    assert value <= BOUND[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_parts_are_for(precision, monkeypatch):
    """Without smoothing, a large mean of the keys is most of what 8 bits hold; without rotation, large channels are."""
    layout = VideoLayout(6, 16, 16)
    with_mean, outliers = (structured_qkv(name, layout) for name in ("key mean", "outlier channels"))
    smooth, turned = error(*with_mean, precision), error(*outliers, "int8")
    monkeypatch.setattr(quantise, "token_mean", lambda x: torch.zeros_like(x[:, :, :1]))
    assert error(*with_mean, precision) > 2 * smooth
    monkeypatch.undo()
    monkeypatch.setattr(quantise, "rotated", lambda x: x)
    assert error(*outliers, "int8") > 2 * turned


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", range(0, 120, 4))
def test_orders_bias_padding_and_empty_rows(seed, precision):
    case = make(seed)
    bias = None if case.key_bias is None else torch.where(case.key_bias < -1e30, 0.0, case.key_bias)
    expected, expected_lse = attention(case.q, case.k, case.v, case.visible, case.scale, bias)
    out, lse = kernels.block_sparse_attention(
        case.q, case.k, case.v, case.plan.mask, q_order=case.plan.q_order, k_order=case.plan.k_order,
        scale=case.scale, key_bias=case.key_bias, return_lse=True, backend="reference", precision=precision,
    )
    assert relative_error(out, expected) <= 2 * BOUND[precision]  # of few keys each: no averaging
    blind = ~case.visible.any(-1)
    assert (out[blind] == 0).all() and torch.equal(lse == -torch.inf, blind)
    assert torch.allclose(lse[~blind].double(), expected_lse[~blind], atol=0.25)


def small(seq=128, dim=64):
    q, k, v = torch.randn(3, 1, 2, seq, dim, generator=torch.Generator().manual_seed(0))
    return q, k, v, BlockMask.from_blocks(torch.ones(1, 1, seq // 64, seq // 64, dtype=torch.bool), 64, 64, seq, seq)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_lse_gets_the_mean_back(precision):
    q, k, v, mask = small()
    k = k + 5 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    _, lse = kernels.block_sparse_attention(q, k, v, mask, return_lse=True, backend="reference", precision=precision)
    assert torch.allclose(lse.double(), attention(q, k, v)[1], atol=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_keys_and_zeros(precision):
    q, k, v, mask = small()
    mean = v.mean(2, keepdim=True).expand(v.shape)
    bound = 1e-5 if precision == "int8" else BOUND["fp8"]
    for keys, queries in ((k[:, :, :1].expand(k.shape), q), (torch.zeros_like(k), q), (k, torch.zeros_like(q))):
        out = kernels.block_sparse_attention(queries, keys, v, mask, backend="reference", precision=precision)
        assert out.isfinite().all() and relative_error(out, mean) <= bound
    zero = kernels.block_sparse_attention(q, k, torch.zeros_like(v), mask, backend="reference", precision=precision)
    assert (zero == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_where_it_is_seen(precision, value):
    q, k, v, mask = small()
    mask = dataclasses.replace(BlockMask.from_blocks(torch.eye(2, dtype=torch.bool)[None, None], 64, 64, 128, 128))
    broken = k.clone()
    broken[0, 1, 100, 3] = value
    out, lse = kernels.block_sparse_attention(q, broken, v, mask, return_lse=True, backend="reference", precision=precision)
    assert out[0, 1, 64:].isnan().all() and lse[0, 1, 64:].isnan().all()
    assert out[0, 0].isfinite().all() and out[0, 1, :64].isfinite().all()
    exact, _ = attention(q, k, v, mask.to_dense())
    assert relative_error(out[0, 1, :64], exact[0, 1, :64]) <= 2 * BOUND[precision]


def test_the_other_e4m3():
    """gfx94x's: 240 is its largest number."""
    q, k, v, mask = small()
    blocks = (torch.arange(128) // 64).expand(1, 2, 128)
    out, _ = quantise.attention(q, k, v, mask.to_dense(), blocks, 0.125, None, "fp8", torch.float8_e4m3fnuz)
    assert relative_error(out, attention(q, k, v)[0]) <= BOUND["fp8"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_who_cannot_says_so(precision):
    q, k, v, mask = small()
    reason = kernels.why_not("torch", q, k, v, mask, precision)
    assert reason == "the torch backend computes in the tensors' own precision alone"
    with pytest.raises(ValueError, match=reason):
        kernels.block_sparse_attention(q, k, v, mask, backend="torch", precision=precision)
    assert kernels.why_not("reference", q, k, v, mask, precision) is None
    with pytest.raises(ValueError, match="precision 'fp16' is not one of auto, int8, fp8"):
        kernels.block_sparse_attention(q, k, v, mask, precision="fp16")
    if missing := kernels.why_not("triton", q, k, v, mask, precision):
        with pytest.raises(ValueError) as raised:
            kernels.block_sparse_attention(q, k, v, mask, precision=precision)
        assert str(raised.value) == missing
