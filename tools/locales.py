"""Writes the English words of every node, as ComfyUI reads them, to locales/en/nodeDefs.json: python tools/locales.py

Other languages are written by hand in locales/<language>/nodeDefs.json; the command names what each of them lacks or has too much.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from load_pack import ROOT
from node_snapshot import schemas

FOLDER = ROOT / "locales"
ENGLISH = "en"


def words(of: list[Any]) -> dict[str, dict]:
    """The words of the schemas: by node, and in it by input and by the place of the output."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {part.id: {"name": part.display_name or part.id, "tooltip": part.tooltip} for part in schema.inputs},
            "outputs": {
                str(place): {"name": part.display_name or part.io_type, "tooltip": part.tooltip} for place, part in enumerate(schema.outputs)
            },
        }
        for schema in of
    }


def flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> dict[str, str]:
    """The texts by their path, such as "Node.inputs.sparsity.tooltip"."""
    found = {}
    for key, value in tree.items():
        path = (*above, key)
        found |= flat(value, path) if isinstance(value, dict) else {".".join(path): value}
    return found


def differences(english: dict[str, dict], other: dict[str, dict]) -> list[str]:
    """What the other language lacks, and what it has that no node has."""
    wanted, there = flat(english), flat(other)
    missing = [f"{path} is missing: {wanted[path]!r}" for path in wanted if path not in there]
    return missing + [f"{path} belongs to no node" for path in there if path not in wanted]


def path_of(language: str) -> Path:
    return FOLDER / language / "nodeDefs.json"


def read(language: str) -> dict[str, dict]:
    """A language's words as they are in its file."""
    return json.loads(path_of(language).read_text(encoding="utf-8"))


def text(tree: dict[str, dict]) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=2) + "\n"


def main() -> int:
    english = words(schemas())
    path_of(ENGLISH).parent.mkdir(parents=True, exist_ok=True)
    path_of(ENGLISH).write_text(text(english), encoding="utf-8")
    print(f"{path_of(ENGLISH).relative_to(ROOT)}: {len(english)} nodes")
    for folder in sorted(FOLDER.iterdir()):
        if folder.name != ENGLISH and path_of(folder.name).exists():
            for line in differences(english, read(folder.name)):
                print(f"{folder.name}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
