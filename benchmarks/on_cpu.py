"""The torch backend's block-sparse op against scaled_dot_product_attention on a CPU."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from pack import kernels

from .measuring import MIB, ROOT, described, exact_rows, interleaved, machine, markdown, random_mask, relative_error, write

HEADS = 4
BLOCK_Q, BLOCK_K = 128, 64
SPARSITIES = (0.5, 0.8, 0.9)
DTYPES = (torch.float32, torch.bfloat16)
# At least this share of the ideal gain, which is 1 / density.
GOALS = {0.8: 0.70, 0.9: 0.60}
MEMORY_GOAL = 256
# Rows a head whose output is compared with float64.
CHECKED_ROWS = 64

_ABOUT = f"""The torch backend's `block_sparse_attention` against `scaled_dot_product_attention`: batch 1, {HEADS} heads, random q, k and v
as views of [B, S, H, D], blocks of {BLOCK_Q} by {BLOCK_K}. Each row of each head's mask keeps its own random blocks, equally
many. One process, dense and sparse calls interleaved, medians. share_of_ideal = dense_ms x density / sparse_ms. pooled_ms: the same call
where a skipped block counts as one key, its mean, as AdaSpa and Auto run it; the means are taken anew in each call.
memory_mib: how far the peak of resident memory rises over what was resident with the inputs in place, output included,
measured for each case in another process, where freed memory goes back to the system (Linux; empty elsewhere). error: norm of the difference from
float64 over its norm, on {CHECKED_ROWS} rows a head; the larger one of the two calls'.
"""


def _inputs(seq: int, head_dim: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seq + head_dim)
    return [torch.randn(1, seq, HEADS, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def _mask(seq: int, sparsity: float):
    return random_mask(1, HEADS, seq, seq, 1 - sparsity, BLOCK_Q, BLOCK_K, seed=round(100 * sparsity))


def _sparse(q, k, v, mask, pooled=None):
    return kernels.block_sparse_attention(q, k, v, mask, pooled=pooled, backend="torch")


def _pool(k, v):
    return kernels.pool_blocks(k, v, BLOCK_K, backend="torch")


def _shapes(quick: bool):
    seqs, head_dims = ((1024,), (64, 128)) if quick else ((8192, 16384), (64, 128))
    return itertools.product(seqs, head_dims, DTYPES)


def _measure(seq: int, head_dim: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    q, k, v = _inputs(seq, head_dim, dtype)
    masks = {sparsity: _mask(seq, sparsity) for sparsity in SPARSITIES}
    calls = {"dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)}
    for sparsity, mask in masks.items():
        calls[sparsity] = lambda mask=mask: _sparse(q, k, v, mask)
        calls[sparsity, "pooled"] = lambda mask=mask: _sparse(q, k, v, mask, _pool(k, v))
    times = interleaved(calls, repeats)
    sample = torch.randperm(seq, generator=torch.Generator().manual_seed(1))[:CHECKED_ROWS]
    pool, rows = _pool(k, v), []
    for sparsity, mask in masks.items():
        plans = [kernels.SparsePlan(mask, pooled=pooled) for pooled in (None, pool)]
        kept = kernels.density(plans[0], seq, seq).mean().item()
        dense, sparse, pooled = times["dense"], times[sparsity], times[sparsity, "pooled"]
        errors = [
            relative_error(_sparse(q, k, v, mask, plan.pooled)[:, :, sample], exact_rows(q, k, v, sample, plan)) for plan in plans
        ]
        rows.append({
            "seq": seq, "heads": HEADS, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch."), "sparsity": sparsity,
            "block_q": BLOCK_Q, "block_k": BLOCK_K, "dense_ms": dense.median, "sparse_ms": sparse.median,
            "share_of_ideal": dense.median * kept / sparse.median, "gain": dense.median / sparse.median, "density": kept,
            "sparse_ms_p10": sparse.low, "sparse_ms_p90": sparse.high, "dense_ms_p10": dense.low, "dense_ms_p90": dense.high,
            "pooled_ms": pooled.median, "pooled_gain": dense.median / pooled.median, "error": max(errors),
        })
    return rows


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_memory(quick: bool) -> None:
    """In a process of its own: one JSON line, bytes over the inputs of each case, in order."""
    found = []
    for seq, head_dim, dtype in _shapes(quick):
        q, k, v = _inputs(seq, head_dim, dtype)
        for sparsity in SPARSITIES:
            mask = _mask(seq, sparsity)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from here
            before = _resident("VmRSS")
            out = _sparse(q, k, v, mask)
            found.append(_resident("VmHWM") - before)
            del out
    print(json.dumps(found))


def _memory(quick: bool) -> list[int] | None:
    # A fixed threshold: whatever is larger goes back to the system when it is freed, so no case lives on another's leavings.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
    code = f"from benchmarks.on_cpu import measure_memory; measure_memory({quick})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"Working memory was not measured: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: argparse.Namespace) -> None:
    repeats = arguments.repeats or (3 if arguments.quick else 5)
    facts = machine("cpu")
    print(_ABOUT + "\n" + described(facts) + f"; {repeats} repeats\n", flush=True)
    rows = []
    for seq, head_dim, dtype in _shapes(arguments.quick):
        rows += _measure(seq, head_dim, dtype, repeats)
        shares = ", ".join(f"{row['share_of_ideal']:.2f} at {row['sparsity']}" for row in rows[-len(SPARSITIES):])
        print(f"{seq:,} tokens, head_dim {head_dim}, {dtype}: share of ideal {shares}", flush=True)
    memory = _memory(arguments.quick)
    for row, used in zip(rows, memory or [], strict=bool(memory)):
        row["memory_mib"] = used / MIB
    for row in rows:
        goal = GOALS.get(row["sparsity"])
        row["reached"] = None if goal is None else row["share_of_ideal"] >= goal and row.get("memory_mib", 0) <= MEMORY_GOAL
    shown = (
        "seq", "head_dim", "dtype", "sparsity", "density", "dense_ms", "sparse_ms", "gain", "share_of_ideal", "pooled_ms", "pooled_gain",
        "memory_mib", "error", "reached",
    )
    goals = ", ".join(f"{goal:.0%} at sparsity {sparsity}" for sparsity, goal in GOALS.items())
    text = markdown(rows, shown) + f"\nTo reach: share_of_ideal at least {goals}; memory_mib at most {MEMORY_GOAL}.\n"
    print("\n" + text)
    if arguments.out:
        title, command = "The torch backend on a CPU", "python -m benchmarks.attention --device cpu"
        write(arguments.out, "attention_cpu", title, facts, f"{_ABOUT}{repeats} repeats. Made by `{command} --out FOLDER`.\n\n{text}", rows)
    print(json.dumps(rows))
