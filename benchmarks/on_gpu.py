"""The kernels on a GPU against dense attention and other sparse ones; with --dry-run the same code, tiny, through Triton's interpreter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from . import goals, opponents, whole_step
from .gpu_case import NO_TIMES, Bench, Case
from .inputs import INPUTS, Shape, method_plan
from .measuring import MissingError, described, raiser

DENSITIES = (0.5, 0.3, 0.2, 0.1)


def calls(bench: Bench, shape: Shape, data: str) -> Case:
    """All masks and opponents on one shape's tensors."""
    case = Case(bench, shape, data)
    case.run_dense()
    no_sol = opponents.why_no_sol()
    for asked in DENSITIES:
        plan = case.random_plan(asked)
        density = case.density(plan)
        case.measure("calls", {"mask": "random", "by": "ours"}, case.sparse_call(plan), plan, density)
        make = lambda plan=plan: opponents.flex(case.q, case.k, case.v, plan.mask)  # noqa: E731
        case.measure("calls", {"mask": "random", "by": "FlexAttention"}, make, plan, density)
        if no_sol is None:
            make = lambda asked=asked: opponents.sol(case.q, case.k, case.v, asked)  # noqa: E731
            case.measure("calls", {"mask": "its own", "by": "sol_attn"}, make, None, asked)
        del plan, make
    if no_sol is not None:
        bench.report.attempt({"section": "calls", "shape": shape.name, "data": data, "by": "sol_attn"}, raiser(MissingError(no_sol)))
    if data == "structured":
        for method in ("SVG", "AdaSpa"):
            for asked in DENSITIES:
                _method_call(bench, case, method, asked)
    return case


def _method_call(bench: Bench, case: Case, method: str, asked: float) -> None:
    labels = {"mask": f"{method} {asked}", "by": "ours"}
    try:
        plan = method_plan(method, case.q, case.k, case.v, case.shape.layout, asked, bench.backend)
    except Exception as error:  # the kernels that plan may fail where the forward does not
        bench.report.attempt({"section": "calls", "shape": case.shape.name, "data": case.data, **labels}, raiser(error))
        return
    case.measure("calls", labels, case.sparse_call(plan), plan, case.density(plan))


def main(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here (CUDA or ROCm). --dry-run tries every path on a CPU, tiny and without meaning for speed.")
    bench = Bench(arguments)
    names = [shape.name for shape in bench.shapes]
    wanted = arguments.only.split(",") if arguments.only else ["goals", "steps", *names]
    unknown = set(wanted) - {"goals", "steps", *names}
    if unknown:
        sys.exit(f"--only: {', '.join(sorted(unknown))} is not one of goals, steps, {', '.join(names)}")
    print((NO_TIMES if bench.dry else "") + described(bench.facts) + "\n", flush=True)
    cases = whole_step.TINY_CASES if bench.dry else whole_step.CASES
    steps = lambda: whole_step.measure(bench.report, bench.time, bench.device, bench.dtype, cases)  # noqa: E731
    for name, run in (("goals", lambda: goals.measure(bench)), ("steps", steps)):
        if name in wanted:
            _section(bench, name, run)
    for data in INPUTS:
        for shape in bench.shapes:
            if shape.name in wanted:
                _section(bench, f"{shape.name}, {data}", lambda shape=shape, data=data: calls(bench, shape, data))
    bench.save()
    print("\n" + bench.text())
    if all("failed" in row for row in bench.report.rows):
        sys.exit("nothing could be measured")


def _section(bench: Bench, name: str, run: Callable[[], object]) -> None:
    """One part of the run; its failure is named and ends nothing else."""
    print(f"\n{name}", flush=True)
    try:
        if bench.report.over():
            raise MissingError("skipped: the time was up")
        run()
    except Exception as error:  # such as the tensors themselves not fitting
        bench.report.attempt({"section": "calls", "shape": name}, raiser(error))
    if bench.device == "cuda":
        torch.cuda.empty_cache()
