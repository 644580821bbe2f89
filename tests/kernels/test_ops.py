"""Every op's two torch implementations against brute force in float64, over generated cases."""

import math

import pytest
import torch
from kernel_cases import make
from oracle import attention, relative_error
from pack import kernels
from pack.kernels import BlockMask, SparsePlan, TokenOrder

BACKENDS = ("reference", "torch")
CASES = range(240)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _bias(case):
    return None if case.key_bias is None else torch.where(case.key_bias < -1e30, 0.0, case.key_bias)


def _order_holds_every_key(case):
    return case.plan.k_order is None or bool(((case.plan.k_order.rows >= 0).sum(1) == case.k.shape[2]).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", CASES)
def test_block_sparse_attention_is_attention_under_the_plan(seed, backend):
    case = make(seed)
    expected, expected_lse = attention(case.q, case.k, case.v, case.visible, case.scale, _bias(case))
    out, lse = kernels.block_sparse_attention(
        case.q, case.k, case.v, case.plan.mask, q_order=case.plan.q_order, k_order=case.plan.k_order,
        scale=case.scale, key_bias=case.key_bias, return_lse=True, backend=backend,
    )
    assert relative_error(out, expected) < 1e-5
    blind = ~case.visible.any(-1)
    assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all()
    assert torch.allclose(lse[~blind].double(), expected_lse[~blind], atol=1e-5)
    without_lse = kernels.block_sparse_attention(
        case.q, case.k, case.v, case.plan.mask, q_order=case.plan.q_order, k_order=case.plan.k_order,
        scale=case.scale, key_bias=case.key_bias, backend=backend,
    )
    assert relative_error(without_lse, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(0, 240, 6))
def test_dense_lse_block_mass_and_sampled_errors(seed, backend):
    case = make(seed)
    unmasked = None if case.key_bias is None else (case.key_bias > -1e30)[:, None, None]
    expected, expected_lse = attention(case.q, case.k, case.v, unmasked, case.scale, _bias(case))
    out, lse = kernels.attention_with_lse(case.q, case.k, case.v, scale=case.scale, key_bias=case.key_bias, backend=backend)
    seen = expected_lse > -torch.inf
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(lse == -torch.inf, ~seen) and torch.allclose(lse[seen].double(), expected_lse[seen], atol=1e-5)

    mask = case.plan.mask
    mass = kernels.block_mass(
        case.q, case.k, lse, mask.block_q, mask.block_k, q_order=case.plan.q_order, k_order=case.plan.k_order,
        scale=case.scale, key_bias=case.key_bias, backend=backend,
    )
    # Kept mass, summed over the plan's blocks, is the softmax mass of the pairs that the plan makes visible.
    scores = torch.einsum("bhqd,bhkd->bhqk", case.q.double(), case.k.double()) * (case.scale or case.q.shape[-1] ** -0.5)
    if case.key_bias is not None:
        scores = scores + _bias(case)[:, None, None]
    weights = torch.where(seen[..., None], (scores - expected_lse[..., None]).exp(), 0.0) * case.visible
    kept = (mass * mask.to_blocks()).sum((2, 3))
    assert torch.allclose(kept.double(), weights.sum((2, 3)), rtol=1e-4, atol=1e-4)

    rows = torch.randint(0, case.q.shape[2], (5,), generator=torch.Generator().manual_seed(seed))
    candidates = [case.plan]
    if case.plan.k_order is None:  # a plan that keeps every block costs nothing
        blocks = torch.ones(1, 1, *mask.to_blocks().shape[2:], dtype=torch.bool)
        everything = BlockMask.from_blocks(blocks, mask.block_q, mask.block_k, mask.seq_q, mask.seq_k)
        candidates.append(SparsePlan(everything, case.plan.q_order))
    errors = kernels.sampled_errors(case.q, case.k, case.v, rows, candidates, scale=case.scale, key_bias=case.key_bias, backend=backend)
    sparse, _ = attention(case.q, case.k, case.v, case.visible, case.scale, _bias(case))
    squared = (sparse - expected)[:, :, rows].square().mean((2, 3))
    assert torch.allclose(errors[0].double(), squared, rtol=1e-3, atol=1e-9)
    if len(errors) > 1:
        assert errors[1].max() < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [seed for seed in range(0, 240, 3) if _order_holds_every_key(make(seed))])
def test_attention_with_mass_is_dense_attention_and_the_mass_under_the_lse_given(seed, backend):
    case = make(seed)
    unmasked = None if case.key_bias is None else (case.key_bias > -1e30)[:, None, None]
    expected, current = attention(case.q, case.k, case.v, unmasked, case.scale, _bias(case))
    generator = torch.Generator().manual_seed(seed)
    earlier = current.float() + torch.randn(current.shape, generator=generator)
    earlier[:, :, ::5] = -torch.inf  # rows that saw nothing then
    mask = case.plan.mask
    options = {"q_order": case.plan.q_order, "k_order": case.plan.k_order, "scale": case.scale, "key_bias": case.key_bias, "backend": backend}
    out, lse, mass = kernels.attention_with_mass(case.q, case.k, case.v, earlier, mask.block_q, mask.block_k, **options)
    seen = current > -torch.inf
    assert relative_error(out, expected) < 1e-5 and (out[~seen] == 0).all()
    assert torch.equal(lse == -torch.inf, ~seen) and torch.allclose(lse[seen].double(), current[seen], atol=1e-5)
    two_passes = kernels.block_mass(case.q, case.k, earlier, mask.block_q, mask.block_k, **options)
    assert mass.shape == two_passes.shape and torch.allclose(mass, two_passes, rtol=1e-4, atol=1e-5)
    # Under the oracle: all mass of the rows that had an LSE.
    weight = torch.where(seen & (earlier > -torch.inf), (current - earlier.double()).exp(), 0.0).sum(-1)
    assert torch.allclose(mass.double().sum((2, 3)), weight, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_mass_of_current_lse_sums_to_the_rows(backend):
    q, k = torch.randn(2, 1, 2, 150, 64)
    _, lse = kernels.attention_with_lse(q, k, k, backend=backend)
    mass = kernels.block_mass(q, k, lse, 64, 32, backend=backend)
    assert torch.allclose(mass.sum(-1), torch.tensor([64.0, 64.0, 22.0]).expand(1, 2, 3), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_pass_through(backend, bad):
    q, k, v = torch.randn(3, 1, 1, 64, 64)
    k[0, 0, 20] = bad
    blocks = torch.tensor([[True, False], [True, True]])[None, None]
    mask = BlockMask.from_blocks(blocks, 32, 32, 64, 64)
    out = kernels.block_sparse_attention(q, k, v, mask, backend=backend)
    assert out.isnan().any()
    _, lse = kernels.attention_with_lse(q, k, v, backend=backend)
    kernels.block_mass(q, k, lse, 32, 32, backend=backend)


def test_half_precision_stays_near_the_oracle():
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for seed in range(12):
            case = make(seed, dtype)
            expected, _ = attention(case.q, case.k, case.v, case.visible, case.scale, _bias(case))
            out = kernels.block_sparse_attention(
                case.q, case.k, case.v, case.plan.mask, q_order=case.plan.q_order, k_order=case.plan.k_order,
                scale=case.scale, key_bias=case.key_bias, backend="torch",
            )
            assert out.dtype == dtype and relative_error(out, expected) < bound


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_loses_no_more_than_the_inputs_and_the_result(dtype, with_lse):
    """Scores are float32: what is lost is the rounding of weights and of the result, also with a scale that is no power of two."""
    q, k, v = torch.randn(3, 1, 2, 300, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    blocks[..., 0] = True
    mask = BlockMask.from_blocks(blocks, 128, 64, 300, 300)
    out = kernels.block_sparse_attention(q, k, v, mask, scale=0.3, backend="torch", return_lse=with_lse)
    expected, _ = attention(q, k, v, mask.to_dense(), 0.3)
    assert relative_error(out[0] if with_lse else out, expected) < 0.33 * torch.finfo(dtype).eps


def test_density_counts_pairs_of_real_tokens():
    for seed in CASES:
        case = make(seed)
        if case.key_bias is not None:
            continue  # masked text counts as computed
        expected = case.visible.double().mean((2, 3))
        actual = kernels.density(case.plan, case.q.shape[2], case.k.shape[2])
        assert torch.allclose(actual.expand_as(expected), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees():
    """A second executor, not ours, under the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = torch.randn(3, 2, 2, 256, 64)
    blocks = torch.rand(1, 2, 4, 4) < 0.5
    blocks[..., 0] = True
    mask = BlockMask.from_blocks(blocks, 64, 64, 256, 256)
    flex_mask = create_block_mask(lambda b, h, i, j: blocks[0, h, i // 64, j // 64], 2, 2, 256, 256, device="cpu", BLOCK_SIZE=64)
    flex = flex_attention(q, k, v, block_mask=flex_mask)
    assert relative_error(kernels.block_sparse_attention(q, k, v, mask, backend="torch"), flex) < 1e-5


def test_blocks_survive_the_round_trip():
    blocks = torch.rand(2, 3, 5, 7) < 0.4
    mask = BlockMask.from_blocks(blocks, 16, 16, 75, 100)
    assert torch.equal(mask.to_blocks(), blocks)
    assert mask.to_dense().shape == (2, 3, 75, 100)
    for row in range(5):
        kept = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]]
        assert kept.tolist() == blocks[0, 0, row].nonzero()[:, 0].tolist()


def test_bad_arguments_are_named():
    q, k, v = torch.randn(3, 1, 2, 64, 64)
    mask = BlockMask.from_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, 32, 64, 64)
    with pytest.raises(ValueError, match=r"seq_q is 64.*has 60"):
        kernels.block_sparse_attention(q[:, :, :60], k, v, mask)
    with pytest.raises(ValueError, match="equal B, H and D"):
        kernels.block_sparse_attention(q, k[:, :1], v[:, :1], mask)
    with pytest.raises(ValueError, match="one dtype"):
        kernels.block_sparse_attention(q, k.half(), v.half(), mask)
    with pytest.raises(ValueError, match="key_bias is"):
        kernels.block_sparse_attention(q, k, v, mask, key_bias=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="lse is"):
        kernels.block_mass(q, k, torch.zeros(1, 2, 3), 32, 32)
    with pytest.raises(ValueError, match="not one of"):
        kernels.why_not("cuda", q, k, v)
    with pytest.raises(ValueError, match=r"expected \[B, H, 2, 2\]"):
        BlockMask.from_blocks(torch.ones(1, 1, 3, 2, dtype=torch.bool), 32, 32, 64, 64)
    with pytest.raises(ValueError, match="int32"):
        TokenOrder(torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64))
    if reason := kernels.why_not("triton", q, k, v, mask):
        with pytest.raises(ValueError):
            kernels.block_sparse_attention(q, k, v, mask, backend="triton")
        assert reason.strip()
