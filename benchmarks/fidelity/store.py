"""Finished runs on disk, under keys that hold all that they depend on: a run is made once, and anew where that has changed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..measuring import ROOT

# Besides the pack: what makes a run and measures it.
HARNESS = (
    "demo/clips.py", "demo/embedded.py", "demo/measures.py", "demo/runs.py", "demo/sampler.py", "demo/weights.py",
    "benchmarks/fidelity/methods.py", "benchmarks/fidelity/hosts.py",
)

# What they decide is in a run's key, as settings.
CHOOSES = ("warmup.py",)


@cache
def file_hash(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def code_hash(paths: tuple[Path, ...]) -> str:
    """Of what these Python files do: comments, docstrings and layout do not count."""
    parts = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):  # text that stands alone: docstrings
                node.body = [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
        parts.append(f"{path.relative_to(ROOT).as_posix()}\n{ast.dump(tree)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code_of(method: str | None, triton: bool, nodes: bool) -> tuple[Path, ...]:
    """The files that a run's outcome depends on. method: the file's name in attention/methods, None for dense; others' files do not count.

    triton: whether kernels of Triton may run. nodes: whether the pack's nodes do.
    """
    found = {ROOT / name for name in HARNESS}
    if method is not None:
        found |= {path for path in (ROOT / "attention").glob("*.py") if path.name not in ("__init__.py", *CHOOSES)}
        found |= _with_imports(ROOT / "attention" / "methods" / f"{method}.py")
        found |= {path for path in (ROOT / "kernels").glob("*.py") if triton or not path.name.startswith("triton_")}
    if nodes:
        found |= set((ROOT / "nodes").glob("*.py")) | {ROOT / "attention" / name for name in CHOOSES}
    return tuple(sorted(found))


def _with_imports(path: Path) -> set[Path]:
    """A method's file, and those that it imports beside itself."""
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                beside = {path.parent / f"{name}.py" for name in names}
                waiting += [other for other in beside if other.is_file() and other not in found]
    return found


def key_of(facts: dict[str, Any]) -> str:
    """A name for what a run depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """A folder of finished runs: KEY.json, and KEY.safetensors where the video is kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> dict | None:
        """What was measured; None where the run has not been made."""
        path = self.folder / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def latents(self, key: str) -> Tensor:
        """The video of a run that kept it, [B, 16, T, H, W]."""
        return load_file(self.folder / f"{key}.safetensors")["latents"]

    def save(self, key: str, measured: dict, latents: Tensor | None = None) -> None:
        """Keeps a run. Whoever stops the program here leaves the whole of it or nothing."""
        if latents is not None:
            part = self._part(key)
            save_file({"latents": latents.contiguous()}, part)
            os.replace(part, self.folder / f"{key}.safetensors")
        part = self._part(key)
        part.write_text(json.dumps(measured) + "\n", encoding="utf-8")
        os.replace(part, self.folder / f"{key}.json")

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}.{os.getpid()}.part"

    def keys(self) -> Iterable[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))
