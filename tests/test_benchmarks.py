"""The measurements run and say what they promise; what they measure is no test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["seq", "heads", "head_dim", "dtype", "sparsity", "block_q", "block_k", "dense_ms", "sparse_ms", "share_of_ideal"]


def run(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_cpu_benchmark_ends_with_its_rows(tmp_path):
    rows = json.loads(run("benchmarks.attention", "--device", "cpu", "--quick", "--repeats", "1", "--out", str(tmp_path)).splitlines()[-1])
    cases = {(row["head_dim"], row["dtype"], row["sparsity"]) for row in rows}
    assert cases == {(dim, dtype, sparsity) for dim in (64, 128) for dtype in ("float32", "bfloat16") for sparsity in (0.5, 0.8, 0.9)}
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert (row["heads"], row["block_q"], row["block_k"]) == (4, 128, 64)
        # 16 key blocks: a density is a multiple of 1/16.
        assert abs(row["density"] - (1 - row["sparsity"])) <= 1 / 32 and row["density"] * 16 == round(row["density"] * 16)
        assert row["share_of_ideal"] == pytest.approx(row["dense_ms"] * row["density"] / row["sparse_ms"])
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
        if sys.platform == "linux":
            output = row["seq"] * row["heads"] * row["head_dim"] * (4 if row["dtype"] == "float32" else 2) / 2**20
            assert output / 2 < row["memory_mib"] < 256
    written = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert written["results"] == rows and {"cpu", "threads", "torch", "commit"} <= set(written["machine"])
    assert "| 1,024 | 128 | bfloat16 | 0.9 |" in (tmp_path / "attention_cpu.md").read_text()


@pytest.fixture
def triton():
    return pytest.importorskip("triton")


def test_the_gpu_benchmark_runs_dry(tmp_path, triton):
    """Every part but the opponents that need a GPU: each of our kernels is right and has a row."""
    output = run("benchmarks.attention", "--dry-run", "--only", "goals,steps,tiny-text", "--out", str(tmp_path))
    assert "Its times mean nothing" in output
    found = json.loads((tmp_path / "attention_dry_run.json").read_text())["results"]
    rows = [row for row in found["rows"] if "failed" not in row]
    failed = [row for row in found["rows"] if "failed" in row]
    outside = ("SDPA", "SageAttention", "sol_attn", "dense, SDPA")
    assert [row for row in failed if not row.get("by", "").startswith(outside)] == []
    for data in ("random", "structured"):
        by_ours = [row["mask"] for row in rows if row.get("by") == "ours" and row["data"] == data]
        assert by_ours.count("random") == 4 and len(by_ours) == (12 if data == "structured" else 4)
        assert sum(row.get("by") == "FlexAttention" and row["data"] == data for row in rows) == 4
    steps = {row["by"] for row in rows if row["section"] == "steps"}
    assert {"dense, default SDPA", "dense, best SDPA", "SVG, sparse", "SVG, run"} <= steps
    assert {f"AdaSpa, {kind}" for kind in ("before the search", "search", "sparse", "refresh", "run")} <= steps
    assert {f"Auto, {kind}" for kind in ("search", "sparse", "run")} <= steps
    assert len(found["goals"]) == 14 and all(goal["measured"] != "not measured" for goal in found["goals"])
    text = (tmp_path / "attention_dry_run.md").read_text()
    assert "Its times mean nothing" in text and "## To reach" in text


def test_tuning_runs_dry(tmp_path, triton):
    output = run("benchmarks.tune", "--dry-run", "--kernels", "forward,block_mass", "--out", str(tmp_path))
    assert '", 2): (Config(' in output and "times mean nothing" in output
    rows = json.loads((tmp_path / "tune_dry_run.json").read_text())["results"]
    assert [row["kernel"] for row in rows] == ["forward"] * 3 + ["block_mass"] * 3
    assert all(row["error"] < 5e-3 for row in rows)
