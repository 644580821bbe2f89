"""What the compiler says of every Triton kernel, for GPUs that need not be there: python -m benchmarks.compile_report [--out FILE].

Registers, shared memory, spills and the matrix instruction of each kernel in its table's configuration
(kernels/triton_config.py). This is no measurement: it says that a kernel fits a GPU, not how fast it runs there.
"""

import argparse
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from triton_compile import CASES, compile_cases, missing_backend, report, reports, table  # noqa: E402

HEAD = """# What the compiler says of the Triton kernels

Made by `python -m benchmarks.compile_report` with Triton {version}, without a GPU. It is the compiler's report, not a measurement of speed.

Each kernel is compiled as an op launches it, for q, k and v that are views of one projection, with orders, key bias and LSE
where the kernel takes them, in the configuration of `kernels/triton_config.py`. The sampled errors have two candidates and 64 rows.

Registers are a thread's (AMD: vector registers, accumulation registers included); shared memory is a program's; spill is bytes of
local memory a thread. Triton has no matrix instructions for sm_75 since 3.2 (triton-lang/triton#5066). "any": head_dim makes no difference.

"""


def markdown(rows: list[list[str]]) -> str:
    heading, *body = rows
    lines = [heading, ["---"] * len(heading), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description="What the compiler says of every Triton kernel.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compile.md", help="the markdown file to write")
    out = parser.parse_args().out
    skipped = {target: reason for _, target, _ in CASES if (reason := missing_backend(target))}
    cases = [case for case in CASES if case[1] not in skipped]
    compile_cases(cases)
    for case in cases:
        report(*case)  # raises where one did not compile
    text = HEAD.format(version=triton.__version__) + markdown(table(reports()))
    text += "".join(f"\nLeft out: {target}, since {reason}.\n" for target, reason in skipped.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
