"""The 8-bit Triton kernels compute what quantise.py defines: run through Triton's interpreter, on the CPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton.language")
from pack.kernels import BlockMask, TokenOrder, block_sparse_attention, pool_blocks
from pack.kernels.capability import interpreted

pytestmark = [
    pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory", "right_casts"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of what is not finite
]
if not interpreted():
    pytest.skip("needs a process of its own, with TRITON_INTERPRET=1", allow_module_level=True)

from interpreter_casts import right_casts  # noqa: E402, F401
from kernel_cases import make  # noqa: E402
from pack.kernels import triton_forward_8bit  # noqa: E402

PRECISIONS = ("int8", "fp8")
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]
# Relative L2 error. A score that lies between two numbers of the 8 bits may go either way, so a few of them do.
TOLERANCE = {("int8", torch.float32): 2e-3, ("int8", torch.float16): 3e-3, ("fp8", torch.float32): 4e-3, ("fp8", torch.float16): 4e-3}


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def agrees(q, k, v, mask, precision, tolerance=None, **options):
    """Output and LSE of both implementations, compared; returns Triton's."""
    expected, expected_lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="reference", precision=precision, **options)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton", precision=precision, **options)
    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(lse.isfinite(), expected_lse.isfinite())
    seen = expected_lse.isfinite() & ~expected.isnan().any(-1)
    assert error(out[seen], expected[seen]) <= (tolerance or TOLERANCE[precision, q.dtype])
    assert (lse - expected_lse)[seen].abs().max() <= 2e-3 if seen.any() else True
    assert (out[expected_lse == -torch.inf] == 0).all()
    without_lse = block_sparse_attention(q, k, v, mask, backend="triton", precision=precision, **options)
    assert torch.equal(without_lse.nan_to_num(), out.nan_to_num())
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", [2, 12, 14, 15, 17, 20, 23, 34])
def test_forward_is_the_definition(seed, precision, dtype):
    """Orders, padding, keys left out, key bias, ragged ends, strided views, blocks of all sizes."""
    case = make(seed, dtype)
    options = {"q_order": case.plan.q_order, "k_order": case.plan.k_order, "scale": case.scale, "key_bias": case.key_bias}
    agrees(case.q, case.k, case.v, case.plan.mask, precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", [2, 14, 20])
def test_pooled_blocks_are_joined_in_their_own_precision(seed, precision):
    case = make(seed, torch.float16)
    pooled = pool_blocks(case.k, case.v, case.plan.mask.block_k, k_order=case.plan.k_order, key_bias=case.key_bias, backend="reference")
    options = {"q_order": case.plan.q_order, "k_order": case.plan.k_order, "scale": case.scale, "key_bias": case.key_bias, "pooled": pooled}
    agrees(case.q, case.k, case.v, case.plan.mask, precision, **options)


def simple(seq=150, dim=64, blocks=(64, 64), density=0.6, seed=0, dtype=torch.float16, heads=2):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, seq, dim, generator=generator).to(dtype)
    kept = torch.rand(1, heads, -(-seq // blocks[0]), -(-seq // blocks[1]), generator=generator) < density
    kept[..., -1] = True
    return q, k, v, BlockMask.from_blocks(kept, *blocks, seq, seq)


@pytest.mark.parametrize("precision, arch", [("int8", "sm_90"), ("fp8", "sm_90"), ("fp8", "sm_100")])
@pytest.mark.parametrize("ordered", [False, True], ids=["", "order"])
def test_what_other_chips_run(precision, arch, ordered, monkeypatch):
    """Padding masked in a branch instead of by a bias; on sm_100 V's keys are not interleaved."""
    monkeypatch.setattr(triton_forward_8bit, "architecture", lambda device: arch)
    q, k, v, mask = simple()
    k_order = None
    if ordered:
        rows = torch.full((200,), -1, dtype=torch.int32)
        rows[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150]] = torch.arange(150, dtype=torch.int32)
        k_order = TokenOrder.shared(rows)
        mask = BlockMask.from_blocks(torch.ones(1, 1, 3, 4, dtype=torch.bool), 64, 64, 150, 200)
    agrees(q, k, v, mask, precision, k_order=k_order)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim, blocks", [(96, (32, 32)), (128, (128, 128)), (256, (16, 32)), (40, (16, 16))], ids=str)
def test_head_dims_and_blocks(precision, dim, blocks):
    q, k, v, mask = simple(seq=140, dim=dim, blocks=blocks, heads=1)
    agrees(q, k, v, mask, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_scale_of_any_sign(precision, scale):
    q, k, v, mask = simple()
    agrees(q, k, v, mask, precision, scale=scale)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_heads_in_chunks(precision, monkeypatch):
    """As many heads at a time as the 8-bit copies have room for, and of each the right mask, order, bias and LSE."""
    q, k, v, _ = simple(seq=100, heads=5, blocks=(32, 32))
    generator = torch.Generator().manual_seed(2)
    mask = BlockMask.from_blocks(torch.rand(1, 5, 4, 4, generator=generator) < 0.5, 32, 32, 100, 100)
    orders = torch.stack([torch.randperm(100, generator=generator) for _ in range(2)]).int()
    options = {"k_order": TokenOrder(orders, torch.tensor([[0, 1, 1, 0, 1]])), "q_order": TokenOrder(orders, torch.tensor([[1, 0, 1, 0, 0]]))}
    options["key_bias"] = torch.randn(1, 100, generator=generator)
    whole, whole_lse = agrees(q, k, v, mask, precision, **options)
    monkeypatch.setattr(triton_forward_8bit, "WORKING_BYTES", 2 * 128 * 64 * (1 if precision == "int8" else 2))
    out, lse = agrees(q, k, v, mask, precision, **options)
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("full", [0, 1, 2])
def test_rows_of_all_blocks_need_no_list(precision, full):
    q, k, v, _ = simple(seq=192)
    kept = torch.eye(3, dtype=torch.bool)
    kept[full] = True
    mask = BlockMask.from_blocks(kept[None, None], 64, 64, 192, 192)
    unread = torch.where(mask.kv_num_blocks[..., None] == 3, 1 << 30, mask.kv_indices)
    agrees(q, k, v, dataclasses.replace(mask, kv_indices=unread), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("what", ["equal keys", "zero keys", "a zero block", "zero queries", "equal values", "zero values"])
def test_nothing_to_scale_by(precision, what):
    q, k, v, mask = simple(dtype=torch.float32)
    if what == "equal keys":
        k = k[:, :, :1].expand(k.shape)
    elif what == "a zero block":
        k = k.clone()
        k[:, :, :64] = k[:, :, 64:].mean(2, keepdim=True)  # the mean, so that smoothing leaves a block of zeros
    elif what == "equal values":
        v = v[:, :, :1].expand(v.shape)
    else:
        q, k, v = (tensor * (name not in what) for name, tensor in (("queries", q), ("keys", k), ("values", v)))
    out, _ = agrees(q, k, v, mask, precision)
    if what == "equal values":
        assert torch.allclose(out, v, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_inputs_stay_with_the_rows_that_see_them(precision, value):
    kept = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])[None, None]
    mask = BlockMask.from_blocks(kept, 64, 64, 192, 192)
    q, k, v, _ = simple(seq=192)
    for name, row in (("q", 70), ("k", 100), ("v", 100)):
        inputs = {"q": q, "k": k, "v": v}
        inputs[name] = inputs[name].clone()
        inputs[name][0, 1, row, 3] = value
        if precision == "int8" and name == "v":
            continue  # V is the 16-bit path's
        out, _ = agrees(*inputs.values(), mask, precision)
        broken = out.isnan().any(-1)[0, 1]
        sees = torch.arange(192) == 70 if name == "q" else torch.arange(192) >= 64
        assert torch.equal(broken, sees) and not out[0, 0].isnan().any()


def test_the_interpreters_int8_product_does_not_wrap():
    """127 x 127 x 256 needs 23 bits: what the INT8 tests here lean on."""
    q = torch.full((1, 1, 16, 256), 100.0, dtype=torch.float16)
    q[..., ::2] *= -1
    k = q.clone()
    k[:, :, ::2] *= -1  # a mean of zero, so that smoothing leaves it
    mask = BlockMask.from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16, 16, 16, 16)
    v = torch.randn(1, 1, 16, 256, generator=torch.Generator().manual_seed(0)).half()
    out = block_sparse_attention(q, k, v, mask, scale=1e-3, backend="triton", precision="int8")
    assert error(out, v[:, :, 1::2].double().mean(2, keepdim=True).expand(out.shape)) < 2e-3
