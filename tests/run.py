"""All tests, in the processes that they need, with one closing line: python tests/run.py [pytest's arguments].

Triton's interpreter has to be on before any kernel is defined, and the compiler wants it off, so each has processes of
its own, one a core. Tests against a real ComfyUI run where COMFYUI_PATH is set, and are skipped by name where it is not.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent

# name, pytest's selection, environment
TIERS = (
    ("torch and host", ["tests", "--ignore=tests/triton_kernels"], {}),
    ("Triton, interpreted", [f"tests/triton_kernels/test_interpreter{part}.py" for part in ("", "_8bit", "_fuzz")], {"TRITON_INTERPRET": "1"}),
    ("Triton, compiled", ["tests/triton_kernels/test_compile.py"], {}),
)

# Each worker imports torch, and its tests compute on one thread.
_MOST_WORKERS = 8


def workers() -> int:
    """How many processes share a tier: one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def run(name: str, selection: list[str], environment: dict[str, str], report: Path, arguments: list[str]) -> tuple[int, dict[str, int]]:
    """One tier in its own process: pytest's exit status, and how many tests passed, failed and were skipped."""
    print(f"\n=== {name} ===", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", f"--numprocesses={workers()}", f"--junitxml={report}", *selection, *arguments]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    status = subprocess.run(command, cwd=ROOT, env=kept | environment).returncode
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            failed = int(suite.get("failures")) + int(suite.get("errors"))
            skipped = int(suite.get("skipped"))
            counts["failed"] += failed
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests")) - failed - skipped
    print(f"{name}: {', '.join(f'{count} {kind}' for kind, count in counts.items())} in {time.monotonic() - start:.0f} s", flush=True)
    return status, counts


def main() -> int:
    total = {"passed": 0, "failed": 0, "skipped": 0}
    statuses = []
    with TemporaryDirectory() as folder:
        for number, (name, selection, environment) in enumerate(TIERS):
            status, counts = run(name, selection, environment, Path(folder) / f"{number}.xml", sys.argv[1:])
            statuses.append(status)
            for kind, count in counts.items():
                total[kind] += count
    bad = any(statuses) or total["failed"] or not total["passed"]
    if bad and not total["failed"]:
        print(f"\npytest ended with {statuses}")
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
