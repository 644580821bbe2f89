"""The Triton kernels compile for every GPU they are meant for, within its shared memory and with its matrix instructions."""

import re

import pytest
import torch

pytest.importorskip("triton.language")
from pack.kernels.capability import interpreted
from triton.backends import backends

pytestmark = pytest.mark.compile
if interpreted():
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton_compile import KERNELS, TARGETS, assembly, compile_kernel, launch, resources  # noqa: E402

# head_dim 64 differs in its table rows alone: a GPU of each kind of matrix instruction, and the one shortest of registers.
CASES = [(target, 128) for target in TARGETS] + [(target, 64) for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1201")]


def _dtype(target):
    return torch.float16 if target == "sm_75" else torch.bfloat16


def _compile(kernel, target, head_dim, dtype=None, **options):
    if TARGETS[target].gpu.backend == "hip" and "amd" not in backends:
        pytest.skip("this Triton wheel has no AMD backend")
    return compile_kernel(kernel, target, dtype or _dtype(target), head_dim, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("target", "head_dim"), CASES)
def test_fits_and_spills_nothing(kernel, target, head_dim):
    used = resources(_compile(kernel, target, head_dim))
    assert used["shared"] <= TARGETS[target].shared_kib * 1024
    assert used["spill"] == 0


@pytest.mark.parametrize("kernel", ["forward", "dense", "block_mass"])
@pytest.mark.parametrize(("target", "head_dim"), CASES)
def test_uses_the_matrix_instruction(kernel, target, head_dim):
    if target == "sm_75":
        pytest.skip("Triton has no matrix instructions for sm_75 since 3.2 (triton-lang/triton#5066)")
    assert re.search(TARGETS[target].matrix, assembly(_compile(kernel, target, head_dim)))


@pytest.mark.parametrize("kernel", ["dense", "block_mass"])
@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
def test_head_dim_256_fits(kernel, target):
    assert resources(_compile(kernel, target, 256))["shared"] <= TARGETS[target].shared_kib * 1024


@pytest.mark.parametrize("blocks", [(64, 64), (16, 16), (128, 128)], ids=str)
def test_other_blocks(blocks):
    used = _compile("forward", "sm_90", 128, blocks=blocks)
    assert resources(used)["spill"] == 0
    assert (re.search(TARGETS["sm_90"].matrix, assembly(used)) is not None) == (blocks[0] >= 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_other_dtypes(dtype):
    assert resources(_compile("forward", "sm_86", 128, dtype))["shared"] <= 99 * 1024


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_another_resolution_compiles_nothing_new(kernel, target):
    keys = set()
    for seq, heads, batch in ((300, 2, 1), (1024, 2, 1), (1, 2, 1), (2177, 2, 2)):
        call = launch(kernel, target, torch.bfloat16, 128, seq=seq, heads=heads, batch=batch)
        keys.add((str(call.specialization(TARGETS[target].gpu)[1]), str(sorted(call.kwargs.items()))))
    assert len(keys) == 1


def test_keys_are_loaded_wide_and_ahead():
    """16 bytes at a time and asynchronously, with orders too: what strides that are not specialised could cost."""
    text = assembly(_compile("forward", "sm_90", 128, orders=True, bias=False))
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)) >= 16
