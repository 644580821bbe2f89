"""Compiles the Triton kernels for GPUs that are not here, exactly as a launch would: same configuration, same specialisation.

An op is called with CPU tensors while every kernel is replaced by a recorder; Triton's own launch code then says how those
arguments specialise the kernel for a target. Needs a process without TRITON_INTERPRET. A new kernel is one entry of KERNELS.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from load_pack import load_pack

load_pack()  # a process that only compiles comes here without the tests' conftest
from pack.kernels import (  # noqa: E402
    BlockMask,
    PooledBlocks,
    SparsePlan,
    TokenOrder,
    triton_block_mass,
    triton_forward,
    triton_forward_8bit,
    triton_pooled,
    triton_quantise,
    triton_sampled_errors,
)  # fmt: skip
from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. shared_kib: what one program may use of its shared memory."""

    gpu: GPUTarget
    shared_kib: int


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64),
    "gfx1201": Target(GPUTarget("hip", "gfx1201", 32), 64),
}
# The 16-bit matrix instruction of each target, as its assembly writes it.
MATRIX = {
    "sm_75": r"mma\.sync", "sm_80": r"mma\.sync", "sm_86": r"mma\.sync", "sm_89": r"mma\.sync", "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma", "sm_120": r"mma\.sync", "gfx942": r"v_mfma_", "gfx1100": r"v_wmma_", "gfx1201": r"v_wmma_",
}  # fmt: skip


@dataclass
class Call:
    """What the ops are called with. q, k, v: [B, H, S, D], cut from one [B, S, 3, H, D] projection."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask
    order: TokenOrder | None
    key_bias: torch.Tensor | None
    lse: bool
    candidates: int
    sampled: int

    @property
    def blocks(self) -> tuple[int, int]:
        return self.mask.block_q, self.mask.block_k

    def pooled(self) -> PooledBlocks:
        """Blocks of keys as one key each."""
        shape = (*self.k.shape[:2], self.mask.num_k_blocks, self.k.shape[3])
        return PooledBlocks(self.k.new_zeros(shape), self.v.new_zeros(shape), torch.zeros(shape[:3]))

    def plans(self) -> list[SparsePlan]:
        """One with the orders and one without, in turn."""
        return [SparsePlan(self.mask, self.order, self.order), SparsePlan(self.mask)] * self.candidates


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the op that launches it.

    matrix: the matrix instruction by target, empty for a kernel without one. targets: those that it is meant for. head_dims: those
    that make a difference to it. may_spill: the targets where it is taken as it comes.
    """

    module: ModuleType
    name: str
    op: Callable[[Call], object]
    matrix: Mapping[str, str]
    targets: tuple[str, ...] = tuple(TARGETS)
    head_dims: tuple[int, ...] = (64, 128)
    may_spill: tuple[str, ...] = ()


def _sampled(call: Call):
    rows = torch.arange(call.sampled) % call.q.shape[2]
    return triton_sampled_errors.sampled_errors(call.q, call.k, call.v, rows, call.plans()[: call.candidates], 0.1, call.key_bias)


KERNELS = {
    "forward": Kernel(
        triton_forward, "forward_kernel",
        lambda c: triton_forward.block_sparse_attention(c.q, c.k, c.v, c.mask, c.order, c.order, 0.1, c.key_bias, return_lse=c.lse), MATRIX,
    ),
    "forward_pooled": Kernel(
        triton_forward, "forward_kernel",
        lambda c: triton_forward.block_sparse_attention(c.q, c.k, c.v, c.mask, c.order, c.order, 0.1, c.key_bias, c.lse, c.pooled()), MATRIX,
    ),
    "dense": Kernel(triton_forward, "forward_kernel", lambda c: triton_forward.attention_with_lse(c.q, c.k, c.v, 0.1, c.key_bias), MATRIX),
    "dense_with_mass": Kernel(
        triton_forward, "forward_kernel",
        lambda c: triton_forward.attention_with_mass(c.q, c.k, c.v, torch.zeros(c.q.shape[:3]), *c.blocks, c.order, c.order, 0.1, c.key_bias), MATRIX,
    ),
    "block_mass": Kernel(
        triton_block_mass, "block_mass_kernel",
        lambda c: triton_block_mass.block_mass(c.q, c.k, torch.zeros(c.q.shape[:3]), *c.blocks, c.order, c.order, 0.1, c.key_bias), MATRIX,
    ),
    "block_errors": Kernel(
        triton_pooled, "block_errors_kernel",
        lambda c: triton_pooled.block_errors(
            c.q, c.k, c.v, torch.zeros(c.q.shape[:3]), *c.blocks, c.pooled(), c.order, c.order, 0.1, c.key_bias
        ), MATRIX,
    ),
    "pool_blocks": Kernel(triton_pooled, "pool_kernel", lambda c: triton_pooled.pool_blocks(c.k, c.v, c.blocks[1], c.order, c.key_bias), {}),
    "sampled_errors": Kernel(triton_sampled_errors, "sampled_attention_kernel", _sampled, MATRIX),
    "sampled_errors: merge": Kernel(triton_sampled_errors, "merged_errors_kernel", _sampled, {}),
    "sampled_errors: words by block": Kernel(triton_sampled_errors, "words_by_block_kernel", _sampled, {}, head_dims=(128,)),
    "sampled_errors: words by row": Kernel(triton_sampled_errors, "words_by_row_kernel", _sampled, {}, head_dims=(128,)),
}  # fmt: skip
# The 8-bit matrix instructions. None for a target that has not got them; Triton has no tcgen05 in INT8, and takes mma.sync there.
MATRIX_INT8 = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), r"mma\.sync\S*s32\.s8\.s8"), "sm_90": r"wgmma\.mma_async\S*s32\.s8\.s8",
    "gfx942": r"v_mfma_i32_\S*i8", "gfx1100": r"v_wmma_i32_\S*iu8", "gfx1201": r"v_wmma_i32_\S*iu8",
}  # fmt: skip
MATRIX_FP8 = {
    **dict.fromkeys(("sm_89", "sm_120"), r"mma\.sync\S*e4m3\.e4m3"), "sm_90": r"wgmma\.mma_async\S*e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\S*f8f6f4", "gfx942": r"v_mfma_f32_\S*fp8_fp8", "gfx1201": r"v_wmma_f32_\S*fp8_fp8",
}  # fmt: skip


def _8bit(precision: str, pooled: bool = False) -> Callable[[Call], object]:
    def op(c: Call):
        more = c.pooled() if pooled else None
        return triton_forward_8bit.block_sparse_attention_8bit(c.q, c.k, c.v, c.mask, c.order, c.order, 0.1, c.key_bias, c.lse, precision, more)

    return op


for _precision, _matrix in (("int8", MATRIX_INT8), ("fp8", MATRIX_FP8)):
    KERNELS[_precision] = Kernel(triton_forward_8bit, "forward_8bit_kernel", _8bit(_precision), _matrix, tuple(_matrix))
    KERNELS[f"{_precision}: quantise"] = Kernel(triton_quantise, "quantise_kernel", _8bit(_precision), {}, tuple(_matrix))
KERNELS["int8: join"] = Kernel(triton_forward_8bit, "join_kernel", _8bit("int8", True), {}, tuple(MATRIX_INT8))
KERNELS["fp8: statistics"] = Kernel(triton_quantise, "gather_statistics_kernel", _8bit("fp8"), {}, tuple(MATRIX_FP8))
KERNELS["fp8: sums of statistics"] = Kernel(triton_quantise, "sum_statistics_kernel", _8bit("fp8"), {}, tuple(MATRIX_FP8))
# Every kernel, on every target that it is meant for: (kernel, target, head_dim).
CASES = [(name, target, head_dim) for name, kernel in KERNELS.items() for head_dim in kernel.head_dims for target in kernel.targets]


def dtype_of(target: str) -> torch.dtype:
    """What the cases are compiled for: Turing has no bfloat16."""
    return torch.float16 if target == "sm_75" else torch.bfloat16


def missing_backend(target: str) -> str | None:
    """Why this Triton cannot compile for a target; None where it can."""
    return None if TARGETS[target].gpu.backend != "hip" or "amd" in backends else "this Triton wheel has no AMD backend"


class _Recorder:
    """Stands in for a kernel: `recorder[grid](...)` keeps the arguments."""

    def __init__(self):
        self.calls: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


@dataclass
class Launch:
    """A kernel and the arguments that an op launches it with."""

    function: JITFunction
    args: tuple
    kwargs: dict

    def specialization(self, gpu: GPUTarget) -> tuple[dict, list]:
        """The bound arguments, and what Triton makes of each: the key under which it caches, beside the options."""
        binder = create_function_from_signature(self.function.signature, self.function.params, make_backend(gpu))
        bound, specialization, _ = binder(*self.args, **self.kwargs)
        return bound, specialization

    def key(self, gpu: GPUTarget) -> tuple[str, str]:
        """What a launch that compiles nothing new has in common with an earlier one."""
        return str(self.specialization(gpu)[1]), str(sorted(self.kwargs.items()))

    def compile(self, gpu: GPUTarget):
        """Triton's CompiledKernel for a target."""
        bound, specialization = self.specialization(gpu)
        backend = make_backend(gpu)
        options, signature, constants, attributes = self.function._pack_args(backend, self.kwargs, bound, specialization, None)
        return triton.compile(ASTSource(self.function, signature, constants, attributes), target=gpu, options=options.__dict__)


def _moved(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A contiguous copy that begins so many elements after the start of its memory."""
    return torch.cat([tensor.new_zeros(elements), tensor.flatten()])[elements:].view(tensor.shape)


def launches(
    kernel: str, arch: str, dtype: torch.dtype, head_dim: int, *, seq: int = 300, heads: int = 2, batch: int = 1,
    blocks: tuple[int, int] = (128, 64), orders: bool = True, bias: bool = True, lse: bool = True, candidates: int = 2, sampled: int = 64,
    plan_offset: int = 0,
) -> list[Launch]:
    """What an op launches of a kernel on an architecture for [B, S, 3, H, D] projections, by default with orders, key bias and LSE.

    plan_offset: elements that the plan's tables begin after the start of their memory.
    """
    q, k, v = torch.zeros(batch, seq, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    kept = (torch.arange(-(-seq // blocks[0]))[:, None] + torch.arange(-(-seq // blocks[1]))) % 2 == 0
    kept[0] = True  # as rows of text are
    mask = BlockMask.from_blocks(kept.expand(1, heads, -1, -1), *blocks, seq, seq)
    mask = replace(mask, kv_num_blocks=_moved(mask.kv_num_blocks, plan_offset), kv_indices=_moved(mask.kv_indices, plan_offset))
    order = TokenOrder.shared(_moved(torch.arange(seq, dtype=torch.int32), plan_offset)) if orders else None
    call = Call(q, k, v, mask, order, torch.zeros(batch, seq) if bias else None, lse, candidates, sampled)
    wanted = KERNELS[kernel]
    with contextlib.ExitStack() as stack:
        recorders = {}
        for module in {each.module for each in KERNELS.values()}:
            if hasattr(module, "architecture"):
                stack.enter_context(mock.patch.object(module, "architecture", lambda device: arch))
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    recorders[module, name] = stack.enter_context(mock.patch.object(module, name, _Recorder()))
        wanted.op(call)
    function = getattr(wanted.module, wanted.name)
    return [Launch(function, *arguments) for arguments in recorders[wanted.module, wanted.name].calls]


@functools.cache
def compile_kernel(kernel: str, target: str, dtype: torch.dtype, head_dim: int, **options):
    """A kernel in the table's configuration for a target, once a process. options: as for `launches`. Returns Triton's CompiledKernel."""
    return launches(kernel, target, dtype, head_dim, **options)[0].compile(TARGETS[target].gpu)


def assembly(compiled) -> str:
    """PTX, or AMD's assembly."""
    return compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]


def resources(compiled) -> dict[str, int]:
    """registers a thread, shared bytes, and spill: bytes of local memory a thread (a stack, in AMD's terms scratch)."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spill = (int(re.search(pattern, text)[1]) for pattern in (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"))
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
        registers, spill = int(usage["REG"]), int(usage["STACK"])
    return {"registers": registers, "shared": compiled.metadata.shared, "spill": spill}


@dataclass(frozen=True)
class Report:
    """What the compiler says of one case. shared, spill: bytes, as `resources`. tensor_memory: columns of sm_100's, of which there are 512.

    matrix: the matrix instruction as it stands in the assembly, None where there is none. options: tile, warps and stages.
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    options: dict[str, int]
    registers: int
    shared: int
    spill: int
    tensor_memory: int
    matrix: str | None


def _report(kernel: str, target: str, head_dim: int) -> Report:
    dtype = dtype_of(target)
    launch = launches(kernel, target, dtype, head_dim)[0]
    compiled = compile_kernel(kernel, target, dtype, head_dim)
    pattern = KERNELS[kernel].matrix.get(target)
    found = re.search(rf"(?:{pattern})[\w.:]*", assembly(compiled)) if pattern else None
    options = {name: launch.kwargs.get(name, default) for name, default in (("BLOCK_M", 0), ("BLOCK_N", 0), ("num_warps", 4), ("num_stages", 0))}
    return Report(
        kernel, target, head_dim, str(dtype).removeprefix("torch."), options, **resources(compiled),
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0, matrix=found and found[0],
    )  # fmt: skip


_REPORTS: dict[tuple[str, str, int], Report | str] = {}


def report(kernel: str, target: str, head_dim: int) -> Report:
    """The report of one case, compiled now where `compile_cases` has not. Raises RuntimeError with what its compilation raised."""
    compile_cases([(kernel, target, head_dim)])
    found = _REPORTS[kernel, target, head_dim]
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def reports() -> list[Report]:
    """All that have been compiled so far, in the order of CASES."""
    return [found for found in (_REPORTS.get(case) for case in CASES) if isinstance(found, Report)]


def _try(case: tuple[str, str, int]) -> Report | str:
    try:
        return _report(*case)
    except Exception as error:  # told by the test of this case
        return f"{type(error).__name__}: {error}"


def compile_cases(cases: Iterable[tuple[str, str, int]], processes: int = 2) -> None:
    """Compiles those of the cases that are not compiled yet: many in processes of their own, since a compiler uses one core."""
    left = [case for case in dict.fromkeys(cases) if case not in _REPORTS and missing_backend(case[1]) is None]
    if len(left) < 8 * processes:
        _REPORTS.update((case, _try(case)) for case in left)
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    shares = [left[first::processes] for first in range(processes)]
    command = [sys.executable, __file__]
    workers = [subprocess.Popen([*command, json.dumps(share)], stdout=subprocess.PIPE, text=True, env=environment) for share in shares]
    for share, worker in zip(shares, workers, strict=True):
        output = worker.communicate()[0]
        if worker.returncode:
            raise RuntimeError(f"a process that compiled ended with {worker.returncode}")
        found = json.loads(output.splitlines()[-1])
        _REPORTS.update((case, each if isinstance(each, str) else Report(**each)) for case, each in zip(share, found, strict=True))


def table(rows: list[Report]) -> list[list[str]]:
    """Reports as a table for people, its heading first."""
    heading = ["kernel", "GPU", "head_dim", "dtype", "tile", "warps", "stages", "registers", "shared KiB", "spill", "matrix instruction"]
    body = [
        [
            row.kernel, row.target, str(row.head_dim) if len(KERNELS[row.kernel].head_dims) > 1 else "any", row.dtype,
            f"{row.options['BLOCK_M']}x{row.options['BLOCK_N']}" if row.options["BLOCK_N"] else "", str(row.options["num_warps"]),
            str(row.options["num_stages"] or ""), str(row.registers), f"{row.shared / 1024:.1f}", str(row.spill),
            row.matrix or ("none" if row.target in KERNELS[row.kernel].matrix else ""),
        ]
        for row in rows
    ]  # fmt: skip
    return [heading, *body]


if __name__ == "__main__":  # one process's share of `compile_cases`
    results = [_try(tuple(case)) for case in json.loads(sys.argv[1])]
    print(json.dumps([each if isinstance(each, str) else asdict(each) for each in results]))
