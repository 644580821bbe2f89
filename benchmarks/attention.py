"""Sparse attention against dense: python -m benchmarks.attention --device cpu|cuda [--out FOLDER]; --dry-run tries the GPU's part without one."""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description="Sparse attention against dense, measured.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda is also ROCm")
    parser.add_argument("--out", type=Path, help="also write the results to this folder, as markdown and JSON")
    parser.add_argument("--repeats", type=int, help="timed calls of each kind; by default what the time allows")
    parser.add_argument("--quick", action="store_true", help="cpu: small shapes, a trial rather than a measurement")
    parser.add_argument("--only", help="cuda: parts with commas between: goals, steps, or shapes by name (wan-720p, hunyuan-720p, ...)")
    parser.add_argument("--budget-minutes", type=float, default=9, help="cuda: what has not begun by then is skipped by name")
    parser.add_argument("--dry-run", action="store_true", help="the part for a GPU, tiny and through Triton's interpreter; its times mean nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # has to stand before Triton is imported
    if arguments.dry_run or arguments.device == "cuda":
        from .on_gpu import main
    else:
        from .on_cpu import main
    main(arguments)


if __name__ == "__main__":
    main()
