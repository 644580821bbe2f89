"""Compiles the Triton kernels for GPUs that are not here, exactly as a launch would: same configuration, same specialisation.

An op is called with CPU tensors while its kernel is replaced by a recorder; Triton's own launch code then says how those
arguments specialise the kernel for a target. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from pack.kernels import BlockMask, SparsePlan, TokenOrder, triton_block_mass, triton_forward, triton_sampled_errors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. shared_kib: what one program may use of its shared memory. matrix: its matrix instruction in the assembly."""

    gpu: GPUTarget
    shared_kib: int
    matrix: str


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64, r"mma\.sync"),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163, r"mma\.sync"),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99, r"mma\.sync"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99, r"mma\.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227, r"wgmma\.mma_async"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227, r"tcgen05\.mma"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99, r"mma\.sync"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64, r"v_mfma_"),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64, r"v_wmma_"),
    "gfx1201": Target(GPUTarget("hip", "gfx1201", 32), 64, r"v_wmma_"),
}
# Name -> (module, kernel's name there).
KERNELS = {
    "forward": (triton_forward, "forward_kernel"),
    "dense": (triton_forward, "forward_kernel"),
    "block_mass": (triton_block_mass, "block_mass_kernel"),
    "sampled_errors": (triton_sampled_errors, "sampled_attention_kernel"),
}


class _Recorder:
    """Stands in for a kernel: `recorder[grid](...)` keeps the arguments."""

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.args, self.kwargs = args, kwargs

        return launch


@dataclass
class Launch:
    """A kernel and the arguments that an op launches it with."""

    function: triton.JITFunction
    args: tuple
    kwargs: dict

    def specialization(self, gpu: GPUTarget) -> tuple[dict, list]:
        """The bound arguments, and what Triton makes of each: the key under which it caches, beside the options."""
        binder = create_function_from_signature(self.function.signature, self.function.params, make_backend(gpu))
        bound, specialization, _ = binder(*self.args, **self.kwargs)
        return bound, specialization

    def compile(self, gpu: GPUTarget):
        """Triton's CompiledKernel for a target."""
        bound, specialization = self.specialization(gpu)
        backend = make_backend(gpu)
        options, signature, constants, attributes = self.function._pack_args(backend, self.kwargs, bound, specialization, None)
        return triton.compile(ASTSource(self.function, signature, constants, attributes), target=gpu, options=options.__dict__)


def launch(
    kernel: str, arch: str, dtype: torch.dtype, head_dim: int, *, seq: int = 300, heads: int = 2, batch: int = 1,
    blocks: tuple[int, int] = (128, 64), orders: bool = True, bias: bool = True, lse: bool = True,
) -> Launch:
    """What an op launches on an architecture for [B, S, 3, H, D] projections, by default with orders, key bias and LSE."""
    q, k, v = torch.zeros(batch, seq, 3, heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    mask = BlockMask.from_blocks(torch.ones(1, heads, -(-seq // blocks[0]), -(-seq // blocks[1]), dtype=torch.bool), *blocks, seq, seq)
    order = TokenOrder.shared(torch.arange(seq, dtype=torch.int32)) if orders else None
    key_bias = torch.zeros(batch, seq) if bias else None
    module, name = KERNELS[kernel]
    recorder = _Recorder()
    with mock.patch.object(module, name, recorder), mock.patch.object(module, "architecture", lambda device: arch):
        if kernel == "forward":
            module.block_sparse_attention(q, k, v, mask, order, order, 0.1, key_bias, return_lse=lse)
        elif kernel == "dense":
            module.attention_with_lse(q, k, v, 0.1, key_bias)
        elif kernel == "block_mass":
            module.block_mass(q, k, torch.zeros(q.shape[:3]), *blocks, order, order, 0.1, key_bias)
        else:
            module.sampled_errors(q, k, v, torch.arange(64) % seq, [SparsePlan(mask, order, order), SparsePlan(mask)], 0.1, key_bias)
    return Launch(getattr(module, name), recorder.args, recorder.kwargs)


def compile_kernel(kernel: str, target: str, dtype: torch.dtype, head_dim: int, **options):
    """A kernel in the table's configuration for a target. options: as for `launch`. Returns Triton's CompiledKernel."""
    return launch(kernel, target, dtype, head_dim, **options).compile(TARGETS[target].gpu)


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
