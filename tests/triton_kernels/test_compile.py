"""The Triton kernels compile for every GPU they are meant for, within its shared memory and with its matrix instructions."""

import os
import re

import pytest
import torch

pytest.importorskip("triton.language")
from pack.kernels.capability import interpreted

pytestmark = pytest.mark.compile
if interpreted():
    pytest.skip("needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton_compile import CASES, KERNELS, MATRIX, TARGETS, assembly, compile_cases, compile_kernel, launches, missing_backend, report, resources  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """All cases of the tests that were chosen, compiled side by side."""
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    compile_cases(params["case"] for params in chosen if "case" in params)


def _skip_without_backend(target):
    reason = missing_backend(target)
    if reason:
        pytest.skip(reason)


# A night compiles everything; else head_dim 64 is left to one target of each family, since it needs less of everything than 128.
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
TRIED = [case for case in CASES if os.environ.get("SVA_NIGHTLY") or case[2] != 64 or case[1] in FAMILIES]
every_case = pytest.mark.parametrize("case", TRIED, ids=lambda case: "-".join(map(str, case)))


@every_case
def test_fits_and_spills_nothing(case):
    kernel, target, _ = case
    _skip_without_backend(target)
    used = report(*case)
    assert used.shared <= TARGETS[target].shared_kib * 1024
    assert used.tensor_memory <= 512
    assert 0 < used.registers <= 512
    if target not in KERNELS[kernel].may_spill:
        assert used.spill == 0


@pytest.mark.parametrize("case", [case for case in TRIED if case[1] in KERNELS[case[0]].matrix], ids=lambda case: "-".join(map(str, case)))
def test_uses_the_matrix_instruction(case):
    _skip_without_backend(case[1])
    if case[1] == "sm_75":
        pytest.skip("Triton has no matrix instructions for sm_75 since 3.2 (triton-lang/triton#5066)")
    assert report(*case).matrix is not None


def test_every_gpu_and_head_dim_is_covered():
    """What a kernel of 16 bits leaves out would be missed without a word."""
    for name, kernel in KERNELS.items():
        if kernel.matrix is MATRIX:
            assert {case[1:] for case in CASES if case[0] == name} == {(target, head_dim) for target in TARGETS for head_dim in (64, 128)}


@pytest.mark.parametrize("kernel", ["dense", "forward_pooled", "block_mass", "block_errors", "sampled_errors"])
@pytest.mark.parametrize("target", ["sm_86", "sm_90", "sm_100"])
def test_head_dim_256_fits(kernel, target):
    assert resources(compile_kernel(kernel, target, torch.bfloat16, 256))["shared"] <= TARGETS[target].shared_kib * 1024


@pytest.mark.parametrize("blocks", [(64, 64), (16, 16), (128, 128)], ids=str)
def test_other_blocks(blocks):
    used = compile_kernel("forward", "sm_90", torch.bfloat16, 128, blocks=blocks)
    assert resources(used)["spill"] == 0
    assert (re.search(MATRIX["sm_90"], assembly(used)) is not None) == (blocks[0] >= 64)


@pytest.mark.parametrize("sampled", [16, 32])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_few_sampled_rows(target, sampled):
    _skip_without_backend(target)
    assert resources(compile_kernel("sampled_errors", target, torch.bfloat16, 128, sampled=sampled))["spill"] == 0


@pytest.mark.parametrize("kernel", ["forward", "forward_pooled", "block_errors", "sampled_errors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_other_dtypes(kernel, dtype):
    assert resources(compile_kernel(kernel, "sm_86", dtype, 128))["shared"] <= 99 * 1024


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_another_resolution_compiles_nothing_new(kernel, target):
    """Neither do another batch, other heads, and lengths that are 1, even or odd, multiples of 16 or not."""
    if target not in KERNELS[kernel].targets:
        pytest.skip(f"{kernel} is not meant for {target}")
    _skip_without_backend(target)
    compiled = []
    for seq, heads, batch in ((300, 2, 1), (1024, 2, 1), (1, 2, 1), (2177, 3, 2), (4096, 1, 1), (513, 16, 1)):
        calls = launches(kernel, target, torch.bfloat16, 128, seq=seq, heads=heads, batch=batch)
        assert calls
        compiled.append({call.key(TARGETS[target].gpu) for call in calls})
    assert all(keys == compiled[0] for keys in compiled)


def test_where_a_plan_starts_in_memory_compiles_nothing_new():
    """SVG's candidates are cut from one table for both kinds of head, at offsets that the resolution decides."""
    compiled = [
        {call.key(TARGETS["sm_90"].gpu) for call in launches(kernel, "sm_90", torch.bfloat16, 128, plan_offset=offset)}
        for kernel in ("sampled_errors", "sampled_errors: words by block", "sampled_errors: words by row")
        for offset in (0, 1)
    ]
    assert compiled[0::2] == compiled[1::2]


def test_keys_are_loaded_wide_and_ahead():
    """16 bytes at a time and asynchronously, with orders too: what strides that are not specialised could cost."""
    text = assembly(compile_kernel("forward", "sm_90", torch.bfloat16, 128, orders=True, bias=False))
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)) >= 16


@pytest.mark.parametrize(("bias", "orders"), [(False, True), (True, True), (False, False)], ids=["orders", "orders, bias", "plain"])
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("kernel", ["forward", "dense_with_mass"])
def test_weights_stay_in_registers_and_tiles_are_loaded_ahead(kernel, target, bias, orders):
    """What a branch on the scores between the two products can cost: a row's softmax in two warps, and weights through shared memory."""
    text = compile_kernel(kernel, target, torch.bfloat16, 128, bias=bias, orders=orders).asm["ttgir"]
    assert set(re.findall(r"#ttg\.nvidia_mma<\{.*?warpsPerCTA = (\[\d, \d\])", text)) == {"[8, 1]"}
    assert not re.search(r"ttg\.local_alloc %\S+ : \(tensor<128x(64|32)xbf16,", text)
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(?:64|32)x128xbf16", text)
    assert len(buffers) == 2 and min(map(int, buffers)) >= 2


@pytest.mark.parametrize(("bias", "orders"), [(False, True), (True, True), (False, False)], ids=["orders", "orders, bias", "plain"])
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_pooled_blocks_cost_the_main_loop_nothing(target, bias, orders):
    """The loop before it is narrow enough to leave the main one as it is: one layout for all products, as many tiles ahead, no spill."""
    plain, pooled = (compile_kernel(kernel, target, torch.bfloat16, 128, bias=bias, orders=orders) for kernel in ("forward", "forward_pooled"))
    assert resources(pooled)["spill"] == 0 and resources(pooled)["shared"] <= resources(plain)["shared"]
    text = pooled.asm["ttgir"]
    assert set(re.findall(r"#ttg\.nvidia_mma<\{.*?warpsPerCTA = (\[\d, \d\])", text)) == {"[8, 1]"}
    assert not re.search(r"ttg\.local_alloc %\S+ : \(tensor<128x(64|32)xbf16,", text)
    buffers = [re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x64x128xbf16", each.asm["ttgir"]) for each in (plain, pooled)]
    assert buffers[0] == buffers[1] and len(buffers[0]) == 2


@pytest.mark.parametrize("kernel, target, weights, tiles", [
    ("int8", "sm_80", "128x32xbf16", ("32x128xi8", "32x128xbf16")),
    ("int8", "sm_90", "128x64xbf16", ("64x128xi8", "64x128xbf16")),
    ("fp8", "sm_89", "128x64xf8E4M3FN", ("64x128xf8E4M3FN", "128x64xf8E4M3FN")),
    ("fp8", "sm_90", "128x64xf8E4M3FN", ("64x128xf8E4M3FN", "128x64xf8E4M3FN")),
])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_8_bit_weights_stay_in_registers_and_tiles_are_loaded_ahead(kernel, target, weights, tiles, bias):
    compiled = compile_kernel(kernel, target, torch.bfloat16, 128, bias=bias, lse=False)
    text = compiled.asm["ttgir"]
    assert not re.search(rf"ttg\.local_alloc %\S+ : \(tensor<{weights},", text)  # no way through shared memory
    loop = text[text.index("scf.for"):]
    loop = loop[: loop.index("scf.yield %new_max")]
    moved = [line for line in re.findall(r"ttg\.convert_layout.*", loop) if f"tensor<{weights}," in line]
    assert len(moved) <= 1
    if kernel == "fp8":  # the renaming of keys leaves nothing to shuffle: what is shuffled belongs to Q's rotation
        plain = len(re.findall(r"shfl\.sync\.idx", assembly(compile_kernel("int8", target, torch.bfloat16, 128, bias=bias, lse=False))))
        assert len(re.findall(r"shfl\.sync\.idx", assembly(compiled))) <= plain
    for tile in tiles:
        assert min(map(int, re.findall(rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{tile},", text))) >= 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sampled_errors_read_k_and_v_once_for_all_candidates(target):
    """One pair of tiles a step whatever the number of candidates, and two buffers at least, so that they are loaded ahead."""
    text = compile_kernel("sampled_errors", target, torch.bfloat16, 128).asm["ttgir"]
    buffers = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x64x128xbf16", text)
    assert len(buffers) == 2 and min(map(int, buffers)) >= 2
