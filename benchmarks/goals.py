"""The list to reach, on one shape, and what stands behind each of its figures: orders, searches and 8 bits included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from pack import kernels
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.layout import hilbert, in_sections
from pack.attention.methods.svg import Bands, sampled_rows
from torch import Tensor

from .gpu_case import ALLOWED_ERROR, ALLOWED_ERROR_8_BIT, Bench, Case
from .measuring import MissingError, raiser, relative_error

# Density -> the share of ideal, against our own dense attention, that the forward is to reach.
FORWARD = {0.3: 0.85, 0.2: 0.85, 0.1: 0.75}


def measure(bench: Bench) -> None:
    """The whole list, on the run's first shape. What fails leaves its figures unmeasured."""
    case = Case(bench, bench.shapes[0], "structured")
    case.run_dense()
    bench.goal("our dense attention, share of the best SDPA's speed", ratio(case.best_sdpa(), case.dense_ms.get("ours, dense")), 0.80, True)
    for asked, goal in FORWARD.items():
        plan = case.random_plan(asked)
        row = case.measure("goals", {"what": f"forward, random {asked}"}, case.sparse_call(plan), plan, case.density(plan))
        bench.goal(f"sparse forward at density {asked}, share of ideal against our dense", row and row.get("of_own"), goal, True)
    for name, part in (("orders", _orders), ("pooled blocks", _pooled), ("searches", _searches), ("precisions", _precisions)):
        try:
            part(bench, case)
        except Exception as error:  # such as the part's tensors not fitting
            bench.report.attempt({"section": "goals", "what": name}, raiser(error))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def _default_orders(case: Case) -> tuple[Tensor, kernels.TokenOrder, kernels.TokenOrder]:
    """AdaSpa's default order of tokens, Hilbert's: its rows, and as orders of queries and of keys, padded at the end to whole blocks."""
    layout = case.shape.layout
    if layout.sink_tokens:
        raise MissingError("orders are compared on a video without text, whose order has no padding inside")
    rows = hilbert(layout.video_rows(case.q.device))
    return rows, *(kernels.TokenOrder.shared(in_sections([rows], block)) for block in (BLOCK_Q, BLOCK_K))


def _orders(bench: Bench, case: Case) -> None:
    """The same blocks in row order, in Hilbert order read by the kernel, and over copies that lie in that order."""
    rows, q_order, k_order = _default_orders(case)
    plain = case.random_plan(0.2)
    ordered = kernels.SparsePlan(dataclasses.replace(plain.mask, seq_q=q_order.length, seq_k=k_order.length), q_order, k_order)
    density, inverse = case.density(ordered), rows.argsort()
    copies = [tensor.index_select(2, rows) for tensor in (case.q, case.k, case.v)]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.block_sparse_attention(q, k, v, plain.mask, backend=bench.backend)

    def copied() -> Tensor:
        return forward(*(tensor.index_select(2, rows) for tensor in (case.q, case.k, case.v))).index_select(2, inverse)

    with_orders = case.measure("goals", {"what": "forward, Hilbert order"}, case.sparse_call(ordered), ordered, density)
    without = case.measure("goals", {"what": "forward, same blocks without orders"}, case.sparse_call(plain), plain, case.density(plain))
    counted = case.measure("goals", {"what": "forward, copied layout, copies counted"}, lambda: copied, ordered, density)
    free = _timed_row(bench, {"section": "goals", "what": "forward, copied layout, copies not counted"}, lambda: forward(*copies))
    cost = ratio(with_orders and with_orders["ms"], without and without["ms"])
    bench.goal("orders inside the kernel, cost over the same blocks without", None if cost is None else cost - 1, 0.03, False)
    for name, row in (("not counted", free), ("counted", counted)):
        gain = ratio(row and row["ms"], with_orders and with_orders["ms"])
        bench.compare(f"orders inside the kernel, speed over a copied layout, copies {name}", gain)


def _pooled(bench: Bench, case: Case) -> None:
    """Each skipped block as one key, beside the same blocks with nothing in the place of the others; and making those keys."""
    _, q_order, k_order = _default_orders(case)
    random = case.random_plan(0.2)
    mask = dataclasses.replace(random.mask, seq_q=q_order.length, seq_k=k_order.length)
    pool = lambda: kernels.pool_blocks(case.k, case.v, BLOCK_K, k_order=k_order, backend=bench.backend)  # noqa: E731
    plans = {"dropped": kernels.SparsePlan(mask, q_order, k_order), "pooled": kernels.SparsePlan(mask, q_order, k_order, pool())}
    rows = {
        name: case.measure("goals", {"what": f"forward, skipped blocks {name}"}, case.sparse_call(plan), plan, case.density(plan))
        for name, plan in plans.items()
    }
    pooling = _timed_row(bench, {"section": "goals", "what": "pool_blocks"}, pool)
    dropped, with_pooled = (row and row["ms"] for row in rows.values())
    cost = ratio(with_pooled and pooling and with_pooled + pooling["ms"], dropped)
    bench.goal("skipped blocks as one key each, cost over leaving them out", None if cost is None else cost - 1, 0.15, False)


def _timed_row(bench: Bench, labels: dict, call: Callable[[], object], dense: float | None = None) -> dict | None:
    def row() -> dict:
        times, memory = bench.time(call)
        share = {} if dense is None else {"of_dense": times.median / dense}
        return {"ms": times.median, "p10": times.low, "p90": times.high, **share, "memory_mib": memory}

    return bench.report.attempt(labels, row)


def _searches(bench: Bench, case: Case) -> None:
    """SVG's profiling, AdaSpa's block mass, Auto's block errors and the one-pass search, as shares of our dense forward; all but the first in
    AdaSpa's order."""
    q, k, v, backend = case.q, case.k, case.v, bench.backend
    own = case.dense_ms.get("ours, dense")
    _, q_order, k_order = _default_orders(case)
    orders = {"q_order": q_order, "k_order": k_order, "backend": backend}
    candidates = Bands.build(case.shape.layout, 0.7, q.device).candidates()
    rows = sampled_rows(0, 1, 1, 64, case.seq).to(q.device)
    lse = kernels.attention_with_lse(q, k, v, backend=backend)[1]
    pooled = kernels.pool_blocks(k, v, BLOCK_K, k_order=k_order, backend=backend)
    # An earlier step's is a little off.
    earlier = lse + 0.1 * torch.randn_like(lse)
    searches = (
        ("sampled errors, 64 rows, two candidates", 0.01, lambda: kernels.sampled_errors(q, k, v, rows, candidates, backend=backend)),
        ("block mass", 0.55, lambda: kernels.block_mass(q, k, lse, BLOCK_Q, BLOCK_K, **orders)),
        ("block errors", 1.6, lambda: kernels.block_errors(q, k, v, lse, BLOCK_Q, BLOCK_K, pooled=pooled, **orders)),
        ("one-pass search", 1.15, lambda: kernels.attention_with_mass(q, k, v, earlier, BLOCK_Q, BLOCK_K, **orders)),
    )
    for name, goal, call in searches:
        row = _timed_row(bench, {"section": "goals", "what": name}, call, own)
        bench.goal(f"{name}, share of our dense forward", row and row.get("of_dense"), goal, False)
    bench.report.attempt({"section": "goals", "what": "one-pass search against two passes"}, lambda: _one_pass_error(case, earlier, orders))


def _one_pass_error(case: Case, lse: Tensor, orders: dict) -> dict:
    """How far the one-pass search's output is from float64, and its masses from those of a pass of their own."""
    some = [tensor[:, case.heads] for tensor in (case.q, case.k, case.v)]
    out, own_lse, mass = kernels.attention_with_mass(*some, lse[:, case.heads], BLOCK_Q, BLOCK_K, **orders)
    expected = kernels.block_mass(*some[:2], lse[:, case.heads], BLOCK_Q, BLOCK_K, **orders)
    error = relative_error(out[:, :, case.rows], case.exact_dense)
    return {"error": error, "mass_error": relative_error(mass, expected.double()), "finite": bool(own_lse.isfinite().all())}


def _precisions(bench: Bench, case: Case) -> None:
    """8 bits against our 16, at density 0.2."""
    plan = case.random_plan(0.2)
    density = case.density(plan)
    found = {}
    for precision in ("auto", "int8", "fp8"):
        options = {} if precision == "auto" else {"precision": precision}
        labels, allowed = {"what": f"forward, precision {precision}"}, ALLOWED_ERROR if precision == "auto" else ALLOWED_ERROR_8_BIT
        row = case.measure("goals", labels, case.sparse_call(plan, **options), plan, density, allowed)
        found[precision] = row and row["ms"]
    bench.goal("FP8, speed over our 16 bits at density 0.2", ratio(found["auto"], found["fp8"]), 1.4, True)
    bench.compare("INT8, speed over our 16 bits at density 0.2", ratio(found["auto"], found["int8"]))
