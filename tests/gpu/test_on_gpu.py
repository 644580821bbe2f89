"""The Triton kernels on a real GPU, in the precisions that the interpreter cannot do. Skipped by name where there is none.

The yardstick is what plain torch gets wrong in the same precision: a kernel may be at most twice as far from float64.
"""

import math

import pytest
import torch
from kernel_cases import make
from oracle import attention
from pack import kernels
from pack.attention.call import AttentionCall, Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS
from pack.attention.record import RunRecord
from pack.attention.session import Session
from pack.attention.warmup import make_schedule
from pack.kernels import SparsePlan, TokenOrder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16]
# Units in the last place that an output near 1 may be off, whatever torch gets right by luck.
SLACK = {torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}


@pytest.fixture(autouse=True)
def triton_runs():
    q = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=DEVICE)
    reason = kernels.why_not("triton", q, q, q)
    if reason:
        pytest.skip(reason)


def on_device(order: TokenOrder | None) -> TokenOrder | None:
    return None if order is None else TokenOrder(order.rows.to(DEVICE), order.head_order.to(DEVICE))


def moved(case):
    """The case's arguments on the GPU, views as they were."""
    mask = case.plan.mask
    mask = type(mask)(mask.kv_num_blocks.to(DEVICE), mask.kv_indices.to(DEVICE), mask.block_q, mask.block_k, mask.seq_q, mask.seq_k)
    plan = SparsePlan(mask, on_device(case.plan.q_order), on_device(case.plan.k_order))
    bias = None if case.key_bias is None else case.key_bias.to(DEVICE)
    return case.q.to(DEVICE), case.k.to(DEVICE), case.v.to(DEVICE), plan, bias


def eager(q, k, v, visible, scale, bias):
    """The same attention by plain torch in the tensors' own precision."""
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.float() if bias is None else scores.float() + bias[:, None, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights.to(q.dtype) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_forward_is_as_near_as_plain_torch(seed, dtype):
    case = make(seed, dtype)
    finite = None if case.key_bias is None else torch.where(case.key_bias < -1e30, 0.0, case.key_bias)
    expected, expected_lse = attention(case.q, case.k, case.v, case.visible, case.scale, finite)
    q, k, v, plan, bias = moved(case)
    out, lse = kernels.block_sparse_attention(
        q, k, v, plan.mask, q_order=plan.q_order, k_order=plan.k_order, scale=case.scale, key_bias=bias, return_lse=True, backend="triton",
    )
    plain = eager(q, k, v, case.visible.to(DEVICE), case.scale, None if finite is None else finite.to(DEVICE)).cpu().double()
    allowed = 2 * (plain - expected).abs().max() + SLACK[dtype]
    assert (out.cpu().double() - expected).abs().max() <= allowed
    seen = case.visible.any(-1)
    assert (out.cpu()[~seen] == 0).all() and torch.equal(lse.cpu() == -math.inf, ~seen)
    assert torch.allclose(lse.cpu()[seen].double(), expected_lse[seen], atol=2e-2)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_8_bits_are_what_their_definition_says(seed, dtype, precision):
    q, k, v, plan, bias = moved(make(seed, dtype))
    if reason := kernels.why_not("triton", q, k, v, plan.mask, precision):
        pytest.skip(reason)
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias, "return_lse": True, "precision": precision}
    out, lse = kernels.block_sparse_attention(q, k, v, plan.mask, backend="triton", **options)
    expected, expected_lse = kernels.block_sparse_attention(q, k, v, plan.mask, backend="reference", **options)
    seen = expected_lse > -math.inf
    assert (out[~seen] == 0).all() and torch.equal(lse == -math.inf, ~seen)
    # What lies between two numbers of the 8 bits may go either way, and the instructions add up in fewer bits than float32.
    # gfx94x's e4m3 is not the one that the reference rounds to.
    other = torch.version.hip and precision == "fp8" and torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx94")
    assert (out.double() - expected.double()).norm() <= (0.08 if other else 0.02) * expected.double().norm() + 1e-6
    assert torch.allclose(lse[seen], expected_lse[seen], atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_search_and_profiling_agree_with_the_definition(seed, dtype):
    q, k, v, plan, bias = moved(make(seed, dtype))
    arguments = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    out, lse = kernels.attention_with_lse(q, k, v, key_bias=bias, backend="triton")
    expected, expected_lse = kernels.attention_with_lse(q, k, v, key_bias=bias, backend="reference")
    seen = expected_lse > -math.inf
    assert torch.allclose(out.float(), expected.float(), atol=4 * SLACK[dtype]) and torch.allclose(lse[seen], expected_lse[seen], atol=2e-2)
    blocks = (plan.mask.block_q, plan.mask.block_k)
    mass, expected_mass = (kernels.block_mass(q, k, expected_lse, *blocks, backend=backend, **arguments) for backend in ("triton", "reference"))
    assert torch.allclose(mass, expected_mass, rtol=2e-2, atol=2e-2)
    rows = torch.randint(0, q.shape[2], (16,), device=DEVICE)
    errors, expected_errors = (kernels.sampled_errors(q, k, v, rows, [plan], key_bias=bias, backend=backend) for backend in ("triton", "reference"))
    assert torch.allclose(errors, expected_errors, rtol=5e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(1, 60, 3))
def test_blocks_that_count_as_one_key(seed, dtype):
    """Pooling, the forward that takes part in it, and the error that it makes."""
    case = make(seed, dtype)
    q, k, v, plan, bias = moved(case)
    mask, orders = plan.mask, {"k_order": plan.k_order, "key_bias": bias}
    pooled, expected = (kernels.pool_blocks(k, v, mask.block_k, **orders, backend=backend) for backend in ("triton", "reference"))
    for one, other in ((pooled.keys, expected.keys), (pooled.values, expected.values)):
        assert one.dtype == dtype and torch.allclose(one.float(), other.float(), rtol=torch.finfo(dtype).eps, atol=1e-5)
    empty = expected.log_size == -math.inf
    assert torch.equal(pooled.log_size == -math.inf, empty) and torch.allclose(pooled.log_size[~empty], expected.log_size[~empty], atol=1e-5)

    options = {"q_order": plan.q_order, "scale": case.scale, **orders}
    exact = kernels.PooledBlocks(pooled.keys.double(), pooled.values.double(), pooled.log_size)
    doubled = q.double(), k.double(), v.double()
    wanted, wanted_lse = kernels.block_sparse_attention(*doubled, mask, **options, pooled=exact, return_lse=True, backend="reference")
    plain = kernels.block_sparse_attention(q, k, v, mask, **options, pooled=pooled, backend="torch")  # weights in the dtype, or better
    out, lse = kernels.block_sparse_attention(q, k, v, mask, **options, pooled=pooled, return_lse=True, backend="triton")
    assert (out.double() - wanted).abs().max() <= 4 * (plain.double() - wanted).abs().max() + SLACK[dtype]
    seen = wanted_lse > -math.inf
    assert (out[~seen] == 0).all() and torch.equal(lse == -math.inf, ~seen) and torch.allclose(lse[seen].double(), wanted_lse[seen], atol=2e-2)

    _, dense_lse = kernels.attention_with_lse(*doubled, scale=case.scale, key_bias=bias, backend="reference")
    sizes = (dense_lse.float(), mask.block_q, mask.block_k)
    errors = kernels.block_errors(q, k, v, *sizes, pooled=pooled, **options, backend="triton").double()
    wanted = kernels.block_errors(*doubled, *sizes, pooled=exact, **options, backend="reference").double()
    # Weights are rounded to the dtype: both sums are off by so much of the mass, their difference d too, and d squared by 2 d times that.
    off = 2 * torch.finfo(dtype).eps * doubled[2].norm(dim=-1).max() * kernels.block_mass(*doubled[:2], *sizes, **options, backend="reference")
    assert ((errors - wanted).abs() <= 2 * wanted.sqrt() * off + off**2 + 1e-12).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_blocks_that_count_as_one_key_beside_8_bits(seed, precision):
    q, k, v, plan, bias = moved(make(seed, torch.bfloat16))
    if reason := kernels.why_not("triton", q, k, v, plan.mask, precision):
        pytest.skip(reason)
    pooled = kernels.pool_blocks(k, v, plan.mask.block_k, k_order=plan.k_order, key_bias=bias, backend="triton")
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias, "return_lse": True, "precision": precision, "pooled": pooled}
    out, lse = kernels.block_sparse_attention(q, k, v, plan.mask, backend="triton", **options)
    expected, expected_lse = kernels.block_sparse_attention(q, k, v, plan.mask, backend="reference", **options)
    seen = expected_lse > -math.inf
    assert (out[~seen] == 0).all() and torch.equal(lse == -math.inf, ~seen) and torch.allclose(lse[seen], expected_lse[seen], atol=3e-2)
    assert (out.double() - expected.double()).norm() <= 0.03 * expected.double().norm() + 1e-6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_a_run_at_sparsity_0_is_dense_attention(name, dtype):
    layout = VideoLayout(9, 30, 52, prefix=77)
    method = METHODS[name]
    config = method.CONFIG(sparsity=0.0, min_tokens=0, dense_layers="", backend="triton")
    schedule = make_schedule([1.0, 0.75, 0.5, 0.25, 0.0], lambda percent: 1 - percent, 1.0, least_warmup=method.LEAST_WARMUP)
    session = Session(method, config, schedule, 0, RunRecord(name, config, 4))
    q, k, v = torch.randn(3, 1, layout.seq_len, 4, 128, device=DEVICE, dtype=dtype).transpose(2, 3)
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    bound = 1e-5 if dtype == torch.float32 else SLACK[dtype]
    for step in range(4):
        result = sparse_attention(AttentionCall(q, k, v, layout, 0, step, "a"), session)
        if isinstance(result, Dense):
            assert result.planned
            continue
        assert (result.double() - dense).norm() / dense.norm() < bound
    assert session.end().sparse_calls == 3


def test_rows_beyond_32_bits_are_reached():
    """One buffer of more than 2^31 elements: the last head's rows lie behind what a 32-bit offset reaches."""
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    seq, heads, dim = 256, 4, 64
    buffer = torch.zeros(heads, 2**29 + 4096, dtype=torch.float16, device=DEVICE)
    q = buffer[:, -seq * dim :].view(heads, seq, dim)[None]
    q.normal_()
    assert q.stride(1) * (heads - 1) > 2**30 and buffer.numel() > 2**31
    blocks = torch.ones(1, 1, 2, 4, dtype=torch.bool, device=DEVICE)
    mask = kernels.BlockMask.from_blocks(blocks, 128, 64, seq, seq)
    out = kernels.block_sparse_attention(q, q, q, mask, backend="triton")
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), q.double(), q.double())
    assert (out.double() - expected).abs().max() < 4 * SLACK[torch.float16]
