"""The Triton kernels compute what the reference computes: run through Triton's interpreter, on the CPU."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton.language")
from pack.kernels import (
    BlockMask,
    PooledBlocks,
    SparsePlan,
    TokenOrder,
    attention_with_lse,
    attention_with_mass,
    block_errors,
    block_mass,
    block_sparse_attention,
    pool_blocks,
    sampled_errors,
)  # fmt: skip
from pack.kernels.capability import interpreted

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
if not interpreted():
    pytest.skip("needs a process of its own, with TRITON_INTERPRET=1", allow_module_level=True)

from pack.kernels import triton_sampled_errors  # noqa: E402
from pack.kernels.reference import token_mask  # noqa: E402

# Largest difference over the largest value. bfloat16 is left to a GPU: the interpreter computes it wrongly.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]


@dataclass
class Shape:
    """A call in short. padding: positions that an order has too many. left_out: keys that a key order does not hold."""

    seq_q: int
    seq_k: int
    dim: int
    blocks: tuple[int, int]
    heads: int = 2
    batch: int = 1
    mask_shape: tuple[int, int] = (1, 2)
    q_order: int | None = None  # padding
    k_order: int | None = None  # padding
    left_out: int = 0
    bias: str = ""
    layout: str = "heads"
    density: float = 0.4
    empty: bool = False


def _order(generator, seq, padding, left_out, batch, heads):
    """Two different random orders, padding strewn in, and one of them for each head."""
    rows = torch.full((2, seq - left_out + padding), -1, dtype=torch.int32)
    for row in rows:
        row[torch.randperm(len(row), generator=generator)[: seq - left_out]] = torch.randperm(seq, generator=generator)[: seq - left_out].int()
    return TokenOrder(rows, torch.randint(0, 2, (batch, heads), generator=generator))


def _plan(shape, generator):
    q_order = None if shape.q_order is None else _order(generator, shape.seq_q, shape.q_order, 0, shape.batch, shape.heads)
    k_order = None if shape.k_order is None else _order(generator, shape.seq_k, shape.k_order, shape.left_out, shape.batch, shape.heads)
    positions = (shape.seq_q if q_order is None else q_order.length), (shape.seq_k if k_order is None else k_order.length)
    counts = [-(-length // block) for length, block in zip(positions, shape.blocks, strict=True)]
    kept = torch.rand(*shape.mask_shape, *counts, generator=generator) < shape.density
    kept[..., -1] |= torch.rand(*shape.mask_shape, counts[0], generator=generator) < 0.5  # the ragged block, often
    if shape.empty:
        kept[:, :, 0] = False
    return SparsePlan(BlockMask.from_blocks(kept, *shape.blocks, *positions), q_order, k_order)


def _tensors(shape, dtype, generator):
    batch, heads, dim = shape.batch, shape.heads, shape.dim
    if shape.layout == "packed":  # cut from one [B, S, 3, H, D] projection
        return torch.randn(batch, shape.seq_q, 3, heads, dim, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    if shape.layout == "odd":  # neither aligned nor contiguous in any dimension
        wide = [torch.randn(batch, heads, seq, 2 * dim + 3, generator=generator).to(dtype) for seq in (shape.seq_q, shape.seq_k, shape.seq_k)]
        return [tensor[..., 1 : 2 * dim : 2] for tensor in wide]
    return [torch.randn(batch, heads, seq, dim, generator=generator).to(dtype) for seq in (shape.seq_q, shape.seq_k, shape.seq_k)]


def _bias(shape, generator):
    if not shape.bias:
        return None
    bias = torch.randn(shape.batch, shape.seq_k, generator=generator)
    bias[:, torch.rand(shape.seq_k, generator=generator) < 0.3] = -torch.inf
    return torch.full_like(bias, -torch.inf) if shape.bias == "all" else bias


def make(shape, dtype):
    """q, k, v, plan and key bias of a shape; always the same ones."""
    generator = torch.Generator().manual_seed(shape.seq_q * 1000 + shape.dim + shape.blocks[0])
    return *_tensors(shape, dtype, generator), _plan(shape, generator), _bias(shape, generator)


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    largest = expected[finite].abs().max() if finite.any() else 1.0
    assert (actual - expected)[finite].abs().max() <= tolerance * max(float(largest), 1e-3) if finite.any() else True


SHAPES = {
    "one block": Shape(64, 64, 64, (64, 64), density=1.0),
    "ragged": Shape(100, 133, 64, (32, 32)),
    "ragged, odd blocks": Shape(81, 97, 64, (16, 64)),
    "large blocks in tiles": Shape(300, 200, 64, (128, 128), heads=1, mask_shape=(1, 1)),
    "narrow key blocks": Shape(130, 90, 128, (64, 16), heads=1, mask_shape=(1, 1)),
    "head_dim 128": Shape(150, 170, 128, (64, 32)),
    "head_dim 96": Shape(100, 100, 96, (32, 32)),
    "head_dim 48": Shape(90, 110, 48, (32, 64)),
    "head_dim 256": Shape(40, 70, 256, (32, 32), heads=1, mask_shape=(1, 1)),
    "one query": Shape(1, 130, 64, (16, 32)),
    "packed qkv": Shape(120, 120, 64, (32, 32), layout="packed", batch=2),
    "unaligned": Shape(80, 80, 64, (32, 32), layout="odd"),
    "mask of one head and batch": Shape(96, 96, 64, (32, 32), batch=2, mask_shape=(1, 1)),
    "mask a batch": Shape(96, 96, 64, (32, 32), batch=2, mask_shape=(2, 1)),
    "mask a head and batch": Shape(80, 80, 64, (32, 32), batch=2, mask_shape=(2, 2)),
    "empty rows": Shape(100, 100, 64, (32, 32), empty=True, density=0.2),
    "nothing kept": Shape(64, 64, 64, (32, 32), empty=True, density=0.0),
    "query order": Shape(100, 100, 64, (32, 32), q_order=21),
    "key order": Shape(100, 100, 64, (32, 32), k_order=17),
    "key order leaves out": Shape(100, 100, 64, (32, 32), k_order=9, left_out=11),
    "both orders": Shape(110, 130, 128, (64, 32), q_order=30, k_order=40, left_out=3),
    "orders, bias, packed": Shape(110, 110, 64, (32, 64), q_order=5, k_order=50, bias="some", layout="packed", batch=2),
    "bias": Shape(90, 120, 64, (32, 32), bias="some", batch=2),
    "bias, head_dim 128": Shape(64, 100, 128, (64, 64), bias="some"),
    "bias hides every key": Shape(48, 80, 64, (16, 32), bias="all"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, dtype):
    q, k, v, plan, bias = make(SHAPES[name], dtype)
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias, "return_lse": True}
    expected, expected_lse = block_sparse_attention(q, k, v, plan.mask, **options, backend="reference")
    out, lse = block_sparse_attention(q, k, v, plan.mask, **options, backend="triton")
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_close(out, expected, TOLERANCE[dtype])
    assert_close(lse, expected_lse, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_scale_of_any_sign(scale):
    q, k, v, plan, bias = make(SHAPES["bias"], torch.float32)
    out = block_sparse_attention(q, k, v, plan.mask, scale=scale, key_bias=bias, backend="triton")
    assert_close(out, block_sparse_attention(q, k, v, plan.mask, scale=scale, key_bias=bias, backend="reference"), 1e-5)


def test_large_scores_do_not_overflow():
    q, k, v, plan, _ = make(SHAPES["ragged"], torch.float32)
    out = block_sparse_attention(q * 100, k * 100, v, plan.mask, backend="triton")
    assert_close(out, block_sparse_attention(q * 100, k * 100, v, plan.mask, backend="reference"), 1e-3)


def test_index_list_in_any_order_and_unread_past_its_count():
    q, k, v, plan, _ = make(SHAPES["ragged"], torch.float32)
    mask = plan.mask
    slots = torch.arange(mask.kv_indices.shape[-1])
    turned = mask.kv_indices.gather(-1, (mask.kv_num_blocks[..., None] - 1 - slots) % len(slots))
    turned = torch.where(slots < mask.kv_num_blocks[..., None], turned, 1 << 30)
    reversed_mask = BlockMask(mask.kv_num_blocks, turned, 32, 32, mask.seq_q, mask.seq_k)
    out = block_sparse_attention(q, k, v, reversed_mask, backend="triton")
    assert_close(out, block_sparse_attention(q, k, v, mask, backend="reference"), 1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_inputs_reach_the_output(value):
    q, k, v, plan, _ = make(Shape(100, 100, 64, (32, 32), density=1.0), torch.float32)
    for tensor, rows in ((q, 5), (k, 99), (v, 40)):
        broken = tensor.clone()
        broken[0, 1, rows, 3] = value
        inputs = [broken if other is tensor else other for other in (q, k, v)]
        expected = block_sparse_attention(*inputs, plan.mask, backend="reference")
        out = block_sparse_attention(*inputs, plan.mask, backend="triton")
        assert not expected.isfinite().all()
        assert_close(out, expected, 1e-5)


def test_not_finite_keys_that_no_block_holds_stay_out():
    q, k, v, _, _ = make(Shape(64, 96, 64, (32, 32)), torch.float32)
    k[:, :, 64:] = torch.nan
    v[:, :, 64:] = torch.nan
    kept = torch.tensor([[True, True, False]] * 2)[None, None]
    out = block_sparse_attention(q, k, v, BlockMask.from_blocks(kept, 32, 32, 64, 96), backend="triton")
    assert_close(out, attention_with_lse(q, k[:, :, :64], v[:, :, :64], backend="reference")[0], 1e-5)


def test_addresses_past_31_bits():
    stride = 1 << 27  # elements from row to row: the last of 18 rows starts past 2^31
    memory = torch.from_numpy(np.zeros(17 * stride + 64, np.float16))  # 4.6 GB, of which only what is written exists
    far = memory.as_strided((1, 1, 18, 64), (0, 0, stride, 1))
    near = torch.randn(1, 1, 18, 64, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    mask = BlockMask.from_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 18, 18)
    order = TokenOrder.shared(torch.arange(17, -1, -1, dtype=torch.int32))
    expected, lse = attention_with_lse(near, near, near, backend="reference")
    assert_close(block_sparse_attention(far, far, far, mask, q_order=order, backend="triton"), expected, 2e-3)
    assert_close(block_mass(far, far, lse, 32, 32, backend="triton"), torch.full((1, 1, 1, 1), 18.0), 2e-3)
    pooled = pool_blocks(far, far, 16, backend="triton")
    assert_close(pooled.keys, pool_blocks(near, near, 16, backend="reference").keys, 2e-3)
    expected = block_errors(near, near, near, lse, 32, 16, pooled=pooled, backend="reference")
    assert_close(block_errors(far, far, far, lse, 32, 16, pooled=pooled, backend="triton"), expected, 5e-3)


DENSE = ["ragged", "head_dim 128", "head_dim 96", "head_dim 48", "packed qkv", "unaligned", "bias", "bias hides every key"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, dtype):
    q, k, v, _, bias = make(SHAPES[name], dtype)
    for actual, expected in zip(
        attention_with_lse(q, k, v, key_bias=bias, backend="triton"), attention_with_lse(q, k, v, key_bias=bias, backend="reference"), strict=True
    ):
        assert_close(actual, expected, TOLERANCE[dtype])


MASS = [
    "ragged", "ragged, odd blocks", "large blocks in tiles", "head_dim 128", "head_dim 96", "packed qkv",
    "both orders", "orders, bias, packed", "bias",
]  # fmt: skip


@pytest.mark.parametrize("stale", [False, True], ids=["current", "stale"])
@pytest.mark.parametrize("name", MASS)
def test_block_mass(name, stale):
    q, k, v, plan, bias = make(SHAPES[name], torch.float32)
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    if stale:
        lse = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
        lse[:, :, ::7] = -torch.inf
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    expected = block_mass(q, k, lse, *SHAPES[name].blocks, **options, backend="reference")
    assert_close(block_mass(q, k, lse, *SHAPES[name].blocks, **options, backend="triton"), expected, 1e-5)


@pytest.mark.parametrize("name", ["ragged", "both orders"])
def test_block_mass_fp16(name):
    q, k, v, plan, _ = make(SHAPES[name], torch.float16)
    lse = attention_with_lse(q, k, v, backend="reference")[1]
    options = {"q_order": plan.q_order, "k_order": plan.k_order}
    expected = block_mass(q, k, lse, 64, 32, **options, backend="reference")
    assert_close(block_mass(q, k, lse, 64, 32, **options, backend="triton"), expected, 2e-3)


def test_block_mass_of_blocks_larger_than_a_tile_and_of_none():
    q, k, v, _, _ = make(SHAPES["large blocks in tiles"], torch.float32)
    lse = attention_with_lse(q, k, v, backend="reference")[1]
    assert_close(block_mass(q, k, lse, 256, 192, backend="triton"), block_mass(q, k, lse, 256, 192, backend="reference"), 1e-5)
    with pytest.raises(ValueError, match="block_k is 24"):
        block_mass(q, k, lse, 64, 24, backend="triton")


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (32, 16), (16, 64), (256, 192)], ids=str)
def test_block_mass_of_any_blocks_from_one_tile(blocks):
    q, k, v, plan, bias = make(SHAPES["orders, bias, packed"], torch.float32)
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    assert_close(block_mass(q, k, lse, *blocks, **options, backend="triton"), block_mass(q, k, lse, *blocks, **options, backend="reference"), 1e-5)


# Keys that no order holds have no part in a dense search: shapes whose key orders hold them all.
ONE_PASS = [
    "ragged", "ragged, odd blocks", "large blocks in tiles", "head_dim 128", "head_dim 96", "head_dim 48", "packed qkv", "unaligned", "bias",
    "bias hides every key", "query order", "key order", "orders, bias, packed",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_PASS)
def test_attention_with_mass(name, dtype):
    q, k, v, plan, bias = make(SHAPES[name], dtype)
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    lse = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    lse[:, :, ::7] = -torch.inf
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    expected = attention_with_mass(q, k, v, lse, *SHAPES[name].blocks, **options, backend="reference")
    actual = attention_with_mass(q, k, v, lse, *SHAPES[name].blocks, **options, backend="triton")
    assert actual[0].dtype == dtype and actual[0].transpose(1, 2).is_contiguous()
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE[dtype])


def test_mass_of_scores_that_grew_since():
    """Far above the LSE given the mass is large, far below it nothing; neither makes a NaN of the rest."""
    q, k, v, _, _ = make(SHAPES["ragged"], torch.float32)
    lse = attention_with_lse(q, k, v, backend="reference")[1]
    lse[:, :, :10] -= 60
    lse[:, :, 10:20] += 200
    for actual, expected in zip(*(attention_with_mass(q, k, v, lse, 32, 32, backend=backend) for backend in ("triton", "reference")), strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "room"), [
    ("ragged", 1), ("ragged", 2), ("both orders", 2), ("orders, bias, packed", 1), ("large blocks in tiles", 1),
])
def test_rows_that_keep_every_block_need_no_list(name, room):
    """Room for the other rows' lists alone, and in it, for the full rows, numbers that nobody may follow."""
    q, k, v, plan, bias = make(SHAPES[name], torch.float32)
    blocks = torch.zeros(1, q.shape[1], plan.mask.num_q_blocks, plan.mask.num_k_blocks, dtype=torch.bool)
    blocks[..., -room:] = True
    blocks[:, :, ::2] = True
    whole = BlockMask.from_blocks(blocks, *SHAPES[name].blocks, plan.mask.seq_q, plan.mask.seq_k)
    assert whole.kv_indices.shape[-1] == room and torch.equal(whole.to_blocks(), blocks)
    wrong = torch.where(whole.full_rows[..., None], 1 << 30, whole.kv_indices)
    mask = BlockMask(whole.kv_num_blocks, wrong, whole.block_q, whole.block_k, whole.seq_q, whole.seq_k)
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    expected = block_sparse_attention(q, k, v, whole, **options, backend="reference")
    for backend in ("triton", "torch"):
        assert_close(block_sparse_attention(q, k, v, mask, **options, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_pool_blocks(name, dtype):
    _, k, v, plan, bias = make(SHAPES[name], dtype)
    options = {"k_order": plan.k_order, "key_bias": bias}
    actual, expected = (pool_blocks(k, v, plan.mask.block_k, **options, backend=backend) for backend in ("triton", "reference"))
    assert actual.keys.dtype == actual.values.dtype == dtype and actual.log_size.dtype == torch.float32
    for one, other in ((actual.keys, expected.keys), (actual.values, expected.values), (actual.log_size, expected.log_size)):
        assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("block_k", [16, 48, 128, 192])
def test_pool_blocks_of_any_size(block_k):
    _, k, v, plan, bias = make(SHAPES["orders, bias, packed"], torch.float32)
    options = {"k_order": plan.k_order, "key_bias": bias}
    actual, expected = (pool_blocks(k, v, block_k, **options, backend=backend) for backend in ("triton", "reference"))
    for one, other in ((actual.keys, expected.keys), (actual.values, expected.values), (actual.log_size, expected.log_size)):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_pooled_forward(name, dtype):
    q, k, v, plan, bias = make(SHAPES[name], dtype)
    pooled = pool_blocks(k, v, plan.mask.block_k, k_order=plan.k_order, key_bias=bias, backend="reference")
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias, "return_lse": True, "pooled": pooled}
    expected, expected_lse = block_sparse_attention(q, k, v, plan.mask, **options, backend="reference")
    out, lse = block_sparse_attention(q, k, v, plan.mask, **options, backend="triton")
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_close(out, expected, TOLERANCE[dtype])
    assert_close(lse, expected_lse, TOLERANCE[dtype])


def test_pooled_blocks_in_any_memory_and_rows_without_a_list():
    """Pooled tables that are views, and for the full rows, that start from nothing, numbers that nobody may follow."""
    q, k, v, plan, _ = make(SHAPES["large blocks in tiles"], torch.float32)
    mask = plan.mask
    blocks = torch.zeros(1, 1, mask.num_q_blocks, mask.num_k_blocks, dtype=torch.bool)
    blocks[:, :, 0], blocks[:, :, 1, 0] = True, True
    whole = BlockMask.from_blocks(blocks, 128, 128, 300, 200)
    given = BlockMask(whole.kv_num_blocks, torch.where(whole.full_rows[..., None], 1 << 30, whole.kv_indices), 128, 128, 300, 200)
    pooled = pool_blocks(k, v, 128, backend="reference")
    views = PooledBlocks(*(torch.stack([table, table], -1)[..., 0] for table in (pooled.keys, pooled.values, pooled.log_size)))
    out = block_sparse_attention(q, k, v, given, pooled=views, backend="triton")
    assert_close(out, block_sparse_attention(q, k, v, whole, pooled=pooled, backend="reference"), 1e-5)
    dense = attention_with_lse(q, k, v, backend="reference")[0]
    assert_close(out[:, :, :128], dense[:, :, :128], 1e-5)


@pytest.mark.parametrize("stale", [False, True], ids=["current", "stale"])
@pytest.mark.parametrize("name", MASS)
def test_block_errors(name, stale):
    q, k, v, plan, bias = make(SHAPES[name], torch.float32)
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    if stale:
        lse = lse + torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
        lse[:, :, ::7] = -torch.inf
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    expected = block_errors(q, k, v, lse, *SHAPES[name].blocks, **options, backend="reference")
    assert_close(block_errors(q, k, v, lse, *SHAPES[name].blocks, **options, backend="triton"), expected, 1e-5)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (32, 16), (16, 64), (256, 192), (64, 48)], ids=str)
def test_block_errors_of_any_blocks(blocks):
    q, k, v, plan, bias = make(SHAPES["orders, bias, packed"], torch.float32)
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    options = {"q_order": plan.q_order, "k_order": plan.k_order, "key_bias": bias}
    actual, expected = (block_errors(q, k, v, lse, *blocks, **options, backend=backend) for backend in ("triton", "reference"))
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ["ragged", "both orders"])
def test_block_errors_fp16(name):
    q, k, v, plan, _ = make(SHAPES[name], torch.float16)
    lse = attention_with_lse(q, k, v, backend="reference")[1]
    options = {"q_order": plan.q_order, "k_order": plan.k_order}
    expected = block_errors(q, k, v, lse, 64, 32, **options, backend="reference")
    assert_close(block_errors(q, k, v, lse, 64, 32, **options, backend="triton"), expected, 5e-3)


def test_block_errors_of_more_blocks_than_one_product_pools():
    q, k, v = torch.randn(3, 1, 1, 600, 64, generator=torch.Generator().manual_seed(0))[:, :, :, :, :]
    lse = attention_with_lse(q[:, :, :40], k, v, backend="reference")[1]
    actual, expected = (block_errors(q[:, :, :40], k, v, lse, 16, 16, backend=backend) for backend in ("triton", "reference"))
    assert actual.shape[-1] == 38
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pooling_and_errors_leave_out_what_is_masked(value):
    q, k, v, plan, _ = make(SHAPES["key order"], torch.float32)
    bias = torch.zeros(1, 100)
    bias[:, 40:45] = -torch.inf
    options = {"k_order": plan.k_order, "key_bias": bias}
    lse = attention_with_lse(q, k, v, key_bias=bias, backend="reference")[1]
    expected = block_errors(q, k, v, lse, 32, 32, **options, backend="reference")
    k[:, :, 41], v[:, :, 44] = value, value
    pooled = pool_blocks(k, v, 32, **options, backend="triton")
    assert pooled.keys.isfinite().all() and pooled.values.isfinite().all()
    assert_close(block_errors(q, k, v, lse, 32, 32, pooled=pooled, **options, backend="triton"), expected, 1e-5)
    shown = pool_blocks(k, v, 32, k_order=plan.k_order, backend="triton")
    assert not shown.keys.isfinite().all() and not shown.values.isfinite().all()


# (shape of the tensors and of the first candidate, shapes of the others, key tiles a chunk)
SAMPLED = {
    "one candidate": ("both orders", [], 16),
    "no orders": ("ragged", [Shape(100, 133, 64, (64, 64), mask_shape=(1, 1))], 16),
    "different orders": ("both orders", [Shape(110, 130, 128, (32, 64), q_order=0, k_order=20)], 16),
    "one with orders": ("head_dim 96", [Shape(100, 100, 96, (16, 16), k_order=20, left_out=9)], 16),
    "chunks of keys": ("both orders", [Shape(110, 130, 128, (32, 64), k_order=20)], 1),
    "chunks, bias, packed": ("orders, bias, packed", [Shape(110, 110, 64, (64, 32), batch=2, mask_shape=(2, 1))], 1),
    "a candidate sees nothing": ("nothing kept", [Shape(64, 64, 64, (32, 32))], 1),
    "bias hides every key": ("bias hides every key", [Shape(48, 80, 64, (16, 16))], 16),
    "head_dim 256, unaligned": ("head_dim 256", [Shape(40, 70, 256, (16, 32), heads=1, mask_shape=(1, 1), layout="odd")], 2),
    "three candidates": ("query order", [Shape(100, 100, 64, (32, 16)), Shape(100, 100, 64, (64, 32), k_order=5)], 1),
}


def _sampled(name):
    """q, k, v, candidates and bias of a row of SAMPLED, and its tiles a chunk."""
    first, others, tiles = SAMPLED[name]
    q, k, v, plan, bias = make(SHAPES[first], torch.float32)
    return q, k, v, [plan, *(_plan(shape, torch.Generator().manual_seed(3 + index)) for index, shape in enumerate(others))], bias, tiles


def _both_sampled_errors(q, k, v, rows, candidates, **options):
    """Triton's and the reference's."""
    return [sampled_errors(q, k, v, rows, candidates, **options, backend=backend) for backend in ("triton", "reference")]


@pytest.mark.parametrize(
    ("name", "sampled"), [*((name, 7) for name in SAMPLED), *((name, 70) for name in ("no orders", "one with orders", "chunks, bias, packed"))]
)
def test_sampled_errors(name, sampled, monkeypatch):
    q, k, v, candidates, bias, tiles = _sampled(name)
    monkeypatch.setattr(triton_sampled_errors, "_TILES_IN_CHUNK", tiles)
    rows = torch.randint(0, q.shape[2], (sampled,), generator=torch.Generator().manual_seed(4))
    assert_close(*_both_sampled_errors(q, k, v, rows, candidates, key_bias=bias), 1e-5)


@pytest.mark.parametrize("name", ["different orders", "three candidates"])
def test_sampled_errors_fp16(name):
    q, k, v, candidates, bias, _ = _sampled(name)
    rows = torch.arange(q.shape[2])
    assert_close(*_both_sampled_errors(q.half(), k.half(), v.half(), rows, candidates, key_bias=bias), 2e-3)


@pytest.mark.parametrize("name", ["one candidate", "one with orders", "chunks, bias, packed"])
def test_words_are_the_token_mask(name):
    q, k, _, candidates, _, _ = _sampled(name)
    batch, heads, seq_q, _ = q.shape
    rows = torch.randint(0, seq_q, (70,), generator=torch.Generator().manual_seed(4))
    words = triton_sampled_errors.visible_words(candidates, rows, seq_q, k.shape[2], 32)
    for plan, word in zip(candidates, words, strict=True):
        bits = (word[:, :, :, None] >> torch.arange(32)[:, None]) & 1  # [B, H, tiles, 32, S_k]
        expected = token_mask(plan.mask, plan.q_order, plan.k_order, batch, heads, seq_q, k.shape[2])[:, :, rows]
        assert torch.equal(bits.flatten(2, 3)[:, :, :70].bool().expand_as(expected), expected)
        assert not bits.flatten(2, 3)[:, :, 70:].any()


@pytest.mark.parametrize("tiles", [1, 16], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_errors_of_keys_far_below_the_maximum(dtype, tiles, monkeypatch):
    """The candidate's keys score 300 less than those that it leaves out: exp(-300) is 0 in float32."""
    monkeypatch.setattr(triton_sampled_errors, "_TILES_IN_CHUNK", tiles)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 192, 64, generator=generator)
    q[..., 0], k[:, :, :96, 0], k[:, :, 96:, 0] = 10.0, 15.0, -15.0
    q[..., 1:] /= 8  # scores among the candidate's keys differ by about 1
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    kept = torch.zeros(1, 1, 12, 6, dtype=torch.bool)
    kept[..., 3:] = True
    near = SparsePlan(BlockMask.from_blocks(torch.rand(1, 2, 12, 6, generator=generator) < 0.5, 16, 32, 192, 192))
    low = SparsePlan(BlockMask.from_blocks(kept, 16, 32, 192, 192))
    rows = torch.arange(0, 192, 3)
    actual, expected = _both_sampled_errors(q, k, v, rows, [low, near], scale=1.0)
    assert_close(actual, expected, TOLERANCE[dtype])
    nothing = SparsePlan(BlockMask.from_blocks(torch.zeros_like(kept), 16, 32, 192, 192))
    lost = sampled_errors(q, k, v, rows, [nothing], scale=1.0, backend="reference")
    assert ((lost[0] - expected[0]).abs() > 10 * TOLERANCE[dtype] * expected[0]).all()  # what an underflow would give


@pytest.mark.parametrize("room", [1, 2])
def test_sampled_errors_of_full_rows_without_an_index_list(room):
    """Full rows' entries are unread, so that the room is that of the others."""
    generator = torch.Generator().manual_seed(room)
    q, k, v = torch.randn(3, 1, 2, 150, 64, generator=generator)
    kept = torch.zeros(1, 2, 10, 5, dtype=torch.bool)
    kept.scatter_(-1, torch.rand(1, 2, 10, 5, generator=generator).argsort(-1)[..., :room], True)
    kept[:, 0, [0, 3]] = True
    kept[:, 1, 9] = True
    mask = BlockMask.from_blocks(kept, 16, 32, 150, 150)
    indices = torch.where(kept.all(-1, keepdim=True), 1 << 30, mask.kv_indices[..., :room]).int()
    rows = torch.arange(0, 150, 2)
    order = _order(generator, 150, 0, 0, 1, 2)
    ways = [(None, None), (order, order)]
    candidates = [SparsePlan(BlockMask(mask.kv_num_blocks, indices, 16, 32, 150, 150), *orders) for orders in ways]
    expected = [SparsePlan(mask, *orders) for orders in ways]
    assert_close(
        sampled_errors(q, k, v, rows, candidates, backend="triton"), sampled_errors(q, k, v, rows, expected, backend="reference"), 1e-5
    )


def test_sampled_errors_of_a_plan_that_keeps_everything_are_0():
    q, k, v, plan, bias = make(Shape(90, 100, 64, (16, 32), k_order=30, q_order=6, bias="some", density=1.0), torch.float16)
    assert plan.mask.full_rows.all()
    assert (sampled_errors(q, k, v, torch.arange(90), [plan], key_bias=bias, backend="triton") == 0).all()
