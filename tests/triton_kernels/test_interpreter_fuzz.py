"""Every op of the Triton kernels over random masks, orders, biases and views, against the reference in float64: in Triton's interpreter, on the CPU.

60 small cases, always the same ones; with SVA_NIGHTLY set (`make nightly`) 600 others each time. A case is made from a number, which a failure
tells; SVA_FUZZ=<number> tries that one alone. Each runs the block-sparse forward and one of the other ops.
"""

import os
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.language")
from pack import kernels
from pack.kernels.capability import interpreted

pytestmark = [
    pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory", "right_casts"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of minus infinity less itself
]
if not interpreted():
    pytest.skip("needs a process of its own, with TRITON_INTERPRET=1", allow_module_level=True)

from interpreter_casts import right_casts  # noqa: E402, F401
from kernel_cases import fuzzed, shown_by  # noqa: E402
from oracle import relative_error  # noqa: E402

NIGHTLY, ALONE = bool(os.environ.get("SVA_NIGHTLY")), os.environ.get("SVA_FUZZ")
TESTS, CASES = (1, 1) if ALONE else (12, 50 if NIGHTLY else 5)
# bfloat16 is left to a GPU: the interpreter computes it wrongly.
DTYPES = (torch.float32, torch.float16)


def lost(case):
    """What a score is off by. The interpreter multiplies float16 in float32, as a GPU does; the kernels' exponential has another base, though."""
    return 4 * case.lost


def same_lse(actual, expected, within):
    seen = expected > -torch.inf
    assert torch.equal(actual == -torch.inf, ~seen) and ((actual.double() - expected)[seen].abs() <= within).all()


def masses_agree(actual, expected, case):
    """Relative to the heaviest block: a light one is the sum of weights that round as the heavy ones do."""
    assert actual.shape == expected.shape
    weights = torch.finfo(torch.float16).eps if case.q.dtype == torch.float16 else 0.0
    assert ((actual.double() - expected.double()).abs() <= (4 * lost(case) + weights) * expected.double().max() + 1e-30).all()


def forward(case):
    options = case.options | {"return_lse": True}
    expected, expected_lse = kernels.block_sparse_attention(*case.exact(), case.plan.mask, **options, backend="reference")
    out, lse = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, **options, backend="triton")
    assert out.dtype == case.q.dtype and out.transpose(1, 2).is_contiguous() and (out[expected_lse == -torch.inf] == 0).all()
    assert relative_error(out, expected) <= case.bound + 4 * lost(case)
    same_lse(lse, expected_lse, lost(case))


def dense(case):
    options = {"scale": case.scale, "key_bias": case.key_bias}
    expected, expected_lse = kernels.attention_with_lse(*case.exact(), **options, backend="reference")
    out, lse = kernels.attention_with_lse(case.q, case.k, case.v, **options, backend="triton")
    assert relative_error(out, expected) <= case.bound + 4 * lost(case)
    same_lse(lse, expected_lse, lost(case))


def _earlier(case):
    """The LSE of a step before, and the size of blocks."""
    _, lse = kernels.attention_with_lse(*case.exact(), scale=case.scale, key_bias=case.key_bias, backend="reference")
    return case.earlier_lse(lse), case.plan.mask.block_q, case.plan.mask.block_k


def mass(case):
    given = _earlier(case)
    expected = kernels.block_mass(*case.exact()[:2], *given, **case.options, backend="reference")
    masses_agree(kernels.block_mass(case.q, case.k, *given, **case.options, backend="triton"), expected, case)


def mass_on_the_way(case):
    order, given = case.plan.k_order, _earlier(case)
    if order is not None and int((order.rows[0] >= 0).sum()) < case.k.shape[2]:
        return mass(case)  # a dense search has no use for keys that no block holds
    expected = kernels.attention_with_mass(*case.exact(), *given, **case.options, backend="reference")
    out, lse, masses = kernels.attention_with_mass(case.q, case.k, case.v, *given, **case.options, backend="triton")
    assert relative_error(out, expected[0]) <= case.bound + 4 * lost(case)
    same_lse(lse, expected[1], lost(case))
    masses_agree(masses, expected[2], case)


def _as_one_key(case, backend="triton"):
    """The case's blocks of keys as one key each, and the same in float64."""
    options = {"k_order": case.plan.k_order, "key_bias": case.key_bias, "backend": backend}
    pooled = kernels.pool_blocks(case.k, case.v, case.plan.mask.block_k, **options)
    return pooled, kernels.PooledBlocks(pooled.keys.double(), pooled.values.double(), pooled.log_size)


def pooled_forward(case):
    pooled, exact = _as_one_key(case)
    expected, expected_lse = kernels.block_sparse_attention(
        *case.exact(), case.plan.mask, **case.options, return_lse=True, pooled=exact, backend="reference"
    )
    options = case.options | {"return_lse": True, "pooled": pooled, "backend": "triton"}
    out, lse = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, **options)
    assert out.dtype == case.q.dtype and (out[expected_lse == -torch.inf] == 0).all()
    assert relative_error(out, expected) <= case.bound + 4 * lost(case)
    same_lse(lse, expected_lse, lost(case))


def pooling_and_errors(case):
    pooled, exact = _as_one_key(case)
    expected, _ = _as_one_key(replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double()), "reference")
    eps = torch.finfo(case.k.dtype).eps
    for actual, wanted in ((pooled.keys, expected.keys), (pooled.values, expected.values)):
        assert ((actual.double() - wanted).abs() <= eps * wanted.abs() + 1e-5).all()
    same_lse(pooled.log_size, expected.log_size, 1e-5)
    given = _earlier(case)
    expected = kernels.block_errors(*case.exact(), *given, pooled=exact, **case.options, backend="reference").double()
    errors = kernels.block_errors(case.q, case.k, case.v, *given, pooled=pooled, **case.options, backend="triton")
    # Both sums are off by as much as their weights, so their difference d is, and d squared by 2 d times that.
    mass = kernels.block_mass(*case.exact()[:2], *given, **case.options, backend="reference").double()
    weights = eps if case.q.dtype == torch.float16 else 0.0
    off = (8 * lost(case) + weights) * case.v.double().norm(dim=-1).max() * mass
    off = off + 2**-25 * sum(case.shape) * (case.q.dtype == torch.float16)  # float16's smallest number, of weights that are smaller
    assert errors.shape == expected.shape and ((errors.double() - expected).abs() <= 2 * expected.sqrt() * off + off**2 + 1e-30).all()


def sampled(case):
    candidates = [case.plan, *case.other_plans(case.q.shape[2] % 2)]
    rows = torch.randint(0, case.q.shape[2], (1 + case.k.shape[2] % 40,), generator=torch.Generator().manual_seed(case.k.shape[2]))
    options = {"scale": case.scale, "key_bias": case.key_bias}
    expected = kernels.sampled_errors(*case.exact(), rows, candidates, **options, backend="reference").double()
    errors = kernels.sampled_errors(case.q, case.k, case.v, rows, candidates, **options, backend="triton")
    # Both outputs are off by as much as their weights, so their difference d is, and d squared by 2 d times that.
    off = 8 * lost(case) * float(case.v.double().abs().max()) + (torch.finfo(torch.float16).eps if case.q.dtype == torch.float16 else 0.0)
    assert errors.shape == expected.shape and ((errors.double() - expected).abs() <= 2 * expected.sqrt() * off + off**2).all()


# A score that lies between two numbers of the 8 bits may go either way, so some of them do, and where few keys are seen none make up for it.
EIGHT_BITS = {"int8": 1e-2, "fp8": 3e-2}


def eight_bits(case, precision, with_pooled=False):
    pooled = _as_one_key(case)[0] if with_pooled else None
    options = case.options | {"return_lse": True, "precision": precision, "pooled": pooled}
    expected, expected_lse = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, **options, backend="reference")
    out, lse = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, **options, backend="triton")
    assert (out[expected_lse == -torch.inf] == 0).all() and relative_error(out, expected) <= EIGHT_BITS[precision]
    same_lse(lse, expected_lse.double(), 1e-2)


OTHERS = {
    "dense": dense, "mass": mass, "mass on the way": mass_on_the_way, "sampled errors": sampled,
    "int8": lambda case: eight_bits(case, "int8"), "fp8": lambda case: eight_bits(case, "fp8"),
    "pooled": pooled_forward, "pooling and errors": pooling_and_errors,
    "int8, pooled": lambda case: eight_bits(case, "int8", True), "fp8, pooled": lambda case: eight_bits(case, "fp8", True),
}  # fmt: skip


@pytest.mark.parametrize("number", range(TESTS))
def test_every_op_is_the_reference(number):
    start = int(ALONE) if ALONE else random.SystemRandom().randrange(1 << 40) if NIGHTLY else number * CASES
    for seed in range(start, start + CASES):
        other = list(OTHERS)[seed % len(OTHERS)]
        try:
            case = fuzzed(seed, DTYPES, small=True)
            shown = shown_by(case.plan, *case.shape)
            assert torch.equal(shown, kernels.kept_pairs(case.plan, torch.arange(case.shape[2]), torch.arange(case.shape[3]), case.shape))
            forward(case)
            OTHERS[other](case)
        except Exception as error:  # of any kind: the number is what is needed
            raise AssertionError(f"case {seed} ({other}) fails; SVA_FUZZ={seed} tries it alone") from error
