"""One run on a GPU (`Bench`) and one shape's tensors in it (`Case`): every row is made here, its error before its time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from pack import kernels
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.methods.svg import sampled_rows
from torch import Tensor

from . import opponents, whole_step
from .inputs import INPUTS, SHAPES, TINY_SHAPES, Shape
from .measuring import Report, Stopwatch, exact_rows, machine, markdown, random_mask, relative_error, table, write

Maker = Callable[[], Callable[[], Tensor]]
# A call whose relative error is larger computes something else: it gets no times.
ALLOWED_ERROR, ALLOWED_ERROR_8_BIT = 0.02, 0.12
# Rows and heads that are compared with float64.
CHECKED_ROWS, CHECKED_HEADS = 64, 4

_ABOUT = f"""Batch 1; q, k and v as views of [B, S, H, D]; blocks of 128 by 64. ms is the median of repeated calls by the device's events,
after a warm-up and with the L2 cache overwritten before each; p10 and p90 are percentiles. tflops counts the pairs of the kept
blocks. share_of_ideal = density x best_dense / ms, the best dense being the fastest that computes in 16 bits on the same
tensors; of_own the same against our own dense. error: norm of the difference from float64 under the same mask, over its norm, on
{CHECKED_ROWS} rows of {CHECKED_HEADS} heads; to_dense: from float64 without a mask. memory_mib: what a call takes beyond its inputs,
output included.
"random" masks keep equally many random blocks in each row; SVG and AdaSpa are what those methods plan for the tensors, orders of
tokens included, and their times are the kernel's alone: planning shows in the whole steps. "structured" tensors look like a video's
(benchmarks/inputs.py).
"""
_SHARED = ("density", "ms", "p10", "p90", "tflops", "share_of_ideal", "of_own", "of_dense", "error", "mass_error", "to_dense", "memory_mib")
_COLUMNS = {
    "calls": ("shape", "tokens", "heads", "head_dim", "data", "mask", "by", *_SHARED),
    "goals": ("what", *_SHARED),
    "steps": ("model", "video", "tokens", "layers", "run", "by", "sparsity", "step_ms", "p10", "p90", "step_gain", "run_ms", "run_gain", "peak_mib"),
}
NO_TIMES = "\n**A dry run: tiny shapes, through Triton's interpreter on a CPU. Its times mean nothing; that everything runs is what it shows.**\n\n"


class Bench:
    """One run: where it measures, on what, and what it has found."""

    def __init__(self, arguments: argparse.Namespace):
        self.dry = arguments.dry_run
        self.device = "cpu" if self.dry else "cuda"
        # bfloat16 goes wrong in the interpreter.
        self.dtype = torch.float16 if self.dry else torch.bfloat16
        self.backend = "triton"
        self.shapes = TINY_SHAPES if self.dry else SHAPES
        least = 1 if self.dry else 5
        self.time = Stopwatch(self.device, least=arguments.repeats or least, most=arguments.repeats or 50)
        self.facts = machine(self.device)
        self.report = Report(arguments.budget_minutes, self.save)
        self.goals: list[dict] = []
        self.out: Path | None = arguments.out
        # One file a GPU: results of one do not overwrite another's.
        self.name = "attention_dry_run" if self.dry else "attention_" + re.sub(r"\W+", "_", self.facts["gpu"].lower()).strip("_")

    def text(self) -> str:
        goals = f"## To reach\n\n{markdown(self.goals)}\nOn {self._goal_shape()}; the goals are set for an H200.\n\n" if self.goals else ""
        parts = []
        for title, section in (("Attention calls", "calls"), ("Searches, orders and precisions", "goals"), ("Whole steps", "steps")):
            rows = [{key: value for key, value in row.items() if key != "section"} for row in self.report.rows if row.get("section") == section]
            if rows:
                parts.append(f"## {title}\n\n{whole_step.ABOUT if section == 'steps' else ''}\n{table(rows, _COLUMNS[section])}")
        return (NO_TIMES if self.dry else "") + _ABOUT + "\n" + goals + "\n".join(parts)

    def _goal_shape(self) -> str:
        shape = self.shapes[0]
        return f"{shape.name}: {shape.about}, {shape.heads} heads of {shape.head_dim}, {shape.layout.seq_len:,} tokens"

    def save(self) -> None:
        if self.out:
            title = "Attention, a dry run" if self.dry else f"Attention on {self.facts['gpu']}"
            write(self.out, self.name, title, self.facts, self.text(), {"goals": self.goals, "rows": self.report.rows})

    def goal(self, what: str, figure: float | None, goal: float, at_least: bool) -> None:
        """One line of the list to reach; a figure that could not be measured is not reached."""
        reached = figure is not None and (figure >= goal if at_least else figure <= goal)
        value = "not measured" if figure is None else figure
        goal_text = f"{'at least' if at_least else 'at most'} {goal}"
        self.goals.append({"what": what, "measured": value, "goal": goal_text, "reached": "a dry run" if self.dry else reached})
        self.save()

    def compare(self, what: str, gain: float | None) -> None:
        """A line without a goal: a gain in speed."""
        self.goals.append({"what": what, "measured": "not measured" if gain is None else gain, "goal": "", "reached": ""})
        self.save()


class Case:
    """q, k, v of a shape, and the exact answers on a sample of their rows."""

    def __init__(self, bench: Bench, shape: Shape, data: str):
        self.bench, self.shape, self.data = bench, shape, data
        self.q, self.k, self.v = INPUTS[data](shape, bench.dtype, bench.device)
        self.seq = shape.layout.seq_len
        self.rows = sampled_rows(1, 0, 0, CHECKED_ROWS, self.seq).to(bench.device)
        self.heads = list(range(min(CHECKED_HEADS, shape.heads)))
        self.exact_dense = self.exact(None)
        self.dense_ms: dict[str, float] = {}

    def exact(self, plan: kernels.SparsePlan | None) -> Tensor:
        return exact_rows(self.q, self.k, self.v, self.rows, plan, self.heads)

    def sampled(self, out: Tensor) -> Tensor:
        return out[:, self.heads][:, :, self.rows]

    def best_dense(self) -> float | None:
        return min((ms for name, ms in self.dense_ms.items() if opponents.exact_16_bit(name)), default=None)

    def best_sdpa(self) -> float | None:
        return min((ms for name, ms in self.dense_ms.items() if name.startswith("SDPA")), default=None)

    def tflops(self, density: float, ms: float) -> float:
        return 4 * self.shape.heads * self.seq**2 * self.shape.head_dim * density / ms / 1e9

    def measure(
        self, section: str, labels: dict, make: Maker, plan: kernels.SparsePlan | None, density: float, allowed: float = ALLOWED_ERROR,
    ) -> dict | None:
        """One row: a call's errors, then its times, unless it is wrong. density: the share of pairs it computes, 1 for dense.

        plan: None where it has no mask of ours. allowed: the largest relative error from float64.
        """

        def row() -> dict:
            call = make()
            sample = self.sampled(call())
            errors = {} if plan is None else {"error": relative_error(sample, self.exact(plan))}
            errors["to_dense"] = relative_error(sample, self.exact_dense)
            wrong = errors.get("error", errors["to_dense"] if density == 1 else 0.0)
            if not wrong <= allowed:
                raise RuntimeError(f"wrong: its relative error is {wrong:.2g}, and {allowed:.2g} is allowed")
            times, memory = self.bench.time(call)
            shares = {}
            if density < 1 and self.best_dense():
                shares["share_of_ideal"] = density * self.best_dense() / times.median
            if density < 1 and "ours, dense" in self.dense_ms:
                shares["of_own"] = density * self.dense_ms["ours, dense"] / times.median
            return {
                "density": round(density, 4), "ms": times.median, "p10": times.low, "p90": times.high,
                "tflops": self.tflops(density, times.median), **shares, **errors, "memory_mib": memory,
            }

        shape = self.shape
        head = {"section": section, "shape": shape.name, "tokens": self.seq, "heads": shape.heads, "head_dim": shape.head_dim, "data": self.data}
        return self.bench.report.attempt({**head, **labels}, row)

    def run_dense(self) -> None:
        """Our own dense attention and every dense opponent."""
        for name, make in opponents.dense_opponents(self.q, self.k, self.v, self.bench.backend).items():
            allowed = ALLOWED_ERROR if opponents.exact_16_bit(name) else ALLOWED_ERROR_8_BIT
            row = self.measure("calls", {"mask": "none", "by": name}, make, None, 1.0, allowed)
            if row:
                self.dense_ms[name] = row["ms"]

    def sparse_call(self, plan: kernels.SparsePlan, **options) -> Maker:
        arguments = {"q_order": plan.q_order, "k_order": plan.k_order, "pooled": plan.pooled, "backend": self.bench.backend, **options}
        return lambda: lambda: kernels.block_sparse_attention(self.q, self.k, self.v, plan.mask, **arguments)

    def density(self, plan: kernels.SparsePlan) -> float:
        return kernels.density(plan, self.seq, self.seq).mean().item()

    def random_plan(self, density: float) -> kernels.SparsePlan:
        return kernels.SparsePlan(random_mask(1, self.shape.heads, self.seq, self.seq, density, BLOCK_Q, BLOCK_K, self.bench.device))
