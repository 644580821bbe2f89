"""From how many tokens on a sparse call is faster than a dense one: python -m benchmarks.min_tokens [--out FILE].

The automatic `min_tokens` comes from here. Each length is one self-attention call of 4 heads of 64 in float32, through
the real dispatch, as a run would make it: SVG classifies at every step, a search of AdaSpa or Auto is spread over the steps
that share it. Auto is asked for AdaSpa's sparsity: what a fidelity leaves to skip depends on the tensors, and these are noise.
Dense is torch's scaled_dot_product_attention. Medians of interleaved repeats, one process.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from pack.attention.call import AttentionCall, Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import METHODS
from pack.attention.record import RunRecord
from pack.attention.session import Session
from pack.attention.warmup import make_schedule

from .measuring import described, machine

HEADS, HEAD_DIM = 4, 64
LAYOUTS = [VideoLayout(9, edge, edge) for edge in (8, 11, 16, 21, 26, 32, 43)]
STEPS = 20
SPARSITIES = {name: METHODS["AdaSpa" if name == "Auto" else name].CONFIG().sparsity for name in METHODS}


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    result = function(*arguments)
    if isinstance(result, Dense) and result.output is None:
        raise RuntimeError(f"a call ran dense: {result.reason}")
    return time.perf_counter() - start


def session_of(name: str) -> Session:
    method = METHODS[name]
    config = method.CONFIG(sparsity=SPARSITIES[name], min_tokens=0, dense_layers="")
    sigmas = [1 - step / STEPS for step in range(STEPS + 1)]
    schedule = make_schedule(sigmas, lambda percent: 1 - percent, 1.0, least_warmup=method.LEAST_WARMUP)
    return Session(method, config, schedule, 0, RunRecord(name, config, STEPS))


def measure(layout: VideoLayout, repeats: int) -> dict[str, float]:
    """Milliseconds of a call: dense, and each method's mean over the steps in which it may be sparse."""
    q, k, v = torch.randn(3, 1, layout.seq_len, HEADS, HEAD_DIM).transpose(2, 3)
    times: dict[str, list[float]] = {"dense": [], **{name: [] for name in METHODS}}
    for _ in range(repeats):
        times["dense"].append(seconds(torch.nn.functional.scaled_dot_product_attention, q, k, v))
        for name in METHODS:
            session = session_of(name)
            steps = range(session.schedule.warmup, STEPS)
            spent = 0.0
            for step in range(session.first_step, session.schedule.warmup):  # a search costs its time beyond the dense call that it replaces
                call = AttentionCall(q, k, v, layout, 0, step, "a")
                spent += max(0.0, seconds(sparse_attention, call, session) - times["dense"][-1])
            for step in (steps[0], session.schedule.refresh_at, steps[-1]):
                call = AttentionCall(q, k, v, layout, 0, step, "a")
                taken = seconds(sparse_attention, call, session)
                # The refresh stands for itself, the others for all steps without one.
                spent += taken if step == session.schedule.refresh_at else taken * (len(steps) - 1) / 2
            times[name].append(spent / len(steps))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def table(repeats: int) -> str:
    rows = ["| tokens | dense ms | " + " | ".join(f"{name} ms | {name} gain" for name in METHODS) + " |", "|---|---|" + "---|---|" * len(METHODS)]
    for layout in LAYOUTS:
        times = measure(layout, repeats)
        gains = " | ".join(f"{times[name]:.1f} | {times['dense'] / times[name]:.2f}x" for name in METHODS)
        rows.append(f"| {layout.seq_len} | {times['dense']:.1f} | {gains} |")
        print(rows[-1], flush=True)
    settings = ", ".join(f"{name} {sparsity}" for name, sparsity in SPARSITIES.items())
    head = (
        f"# A call on a CPU, dense and sparse\n\n{described(machine('cpu'))}.\n\n"
        f"{HEADS} heads of {HEAD_DIM}, float32, batch 1, noise; sparsity: {settings}; medians of {repeats}. Made by\n"
        "`python -m benchmarks.min_tokens --out FILE`. A sparse figure is the mean over the sparse steps of a run of 20 steps, with profiling and\n"
        "searches spread over them; a gain below 1 is a loss.\n\n"
    )
    return head + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    text = table(arguments.repeats)
    print("\n" + text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
