"""Keeps what saved workflows rely on of every node in tests/snapshots/nodes.json: python tools/node_snapshot.py

A workflow knows a node by its id, its values by their place or the input's id, its links by their place and type. The command
adds what is new; what would break a saved workflow it refuses, in words, unless it is told --anyway.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from load_pack import ROOT, load_pack

FILE = ROOT / "tests" / "snapshots" / "nodes.json"
# Their options are files in the person's folders: only the default is promised.
FILES = {"SparseAttentionLoadPattern.file"}
# The limits of a value, and whether another one is narrower.
_NARROWER = {"min": lambda old, new: new > old, "max": lambda old, new: new < old}


def schemas() -> list[Any]:
    """The schema of every node of the pack, on the tests' double of the host."""
    sys.path.insert(0, str(ROOT / "tests"))
    load_pack()
    import host_double

    with host_double.installed(None):
        from pack.nodes import NODES

        return [node.GET_SCHEMA() for node in NODES]


def snapshot(of: list[Any]) -> dict[str, dict]:
    """What saved workflows rely on, by node id; labels, tooltips and the place in menus are no part of it."""
    return {
        schema.node_id: {
            "inputs": [_input(schema.node_id, part) for part in schema.inputs], "outputs": [part.io_type for part in schema.outputs],
        }
        for schema in of
    }


def _input(node: str, part: Any) -> dict[str, Any]:
    known = {"id": part.id, "type": part.io_type, "optional": bool(part.optional)}
    for key in ("default", "min", "max", "options"):
        value = getattr(part, key, None)
        if value is not None:
            known[key] = value
    if "options" in known:
        known["options"] = [part.default] if f"{node}.{part.id}" in FILES else list(part.options)
    return known


def breaks(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """Every way in which workflows saved with `old` would fail or change with `new`, each as a sentence."""
    found = []
    for node, before in old.items():
        if node not in new:
            found.append(f"{node} is gone or renamed: workflows that hold it open with a missing node.")
            continue
        found += _breaks_of_inputs(node, before["inputs"], new[node]["inputs"])
        outputs = new[node]["outputs"]
        for place, kind in enumerate(before["outputs"]):
            if place >= len(outputs):
                found.append(f"{node}: output {place} ({kind}) is gone: links from it are lost.")
            elif outputs[place] != kind:
                found.append(f"{node}: output {place} was {kind} and is {outputs[place]}: links from it no longer fit.")
    return found


def _breaks_of_inputs(node: str, before: list[dict], after: list[dict]) -> list[str]:
    found, by_id = [], {part["id"]: part for part in after}
    gone = [part["id"] for part in before if part["id"] not in by_id]
    found += [f"{node}.{name} is gone or renamed: its saved value is lost, and values stand by place, so all later ones move." for name in gone]
    old_ids = {part["id"] for part in before}
    added = [part for part in after if part["id"] not in old_ids]
    kept = [part["id"] for part in after if part["id"] in old_ids]
    if kept != [part["id"] for part in before if part["id"] in by_id]:
        found.append(f"{node}: the order of its inputs has changed: values stand by place, so saved ones go to other inputs.")
    elif not gone:
        for part in after[: len(before)]:
            if part in added:
                found.append(f"{node}.{part['id']} is new and not at the end: values stand by place, so saved ones go to other inputs.")
    needed = [part["id"] for part in added if not part["optional"]]
    found += [f"{node}.{name} is new and not optional: saved workflows do not have it and are refused." for name in needed]
    for part in before:
        if part["id"] in by_id:
            found += _breaks_of_input(f"{node}.{part['id']}", part, by_id[part["id"]])
    return found


def _breaks_of_input(name: str, old: dict, new: dict) -> list[str]:
    found = []
    if new["type"] != old["type"]:
        found.append(f"{name} was {old['type']} and is {new['type']}: saved values and links no longer fit.")
    if old["optional"] and not new["optional"]:
        found.append(f"{name} is no longer optional: prompts without it are refused.")
    if new.get("default") != old.get("default"):
        found.append(f"{name} had the default {old.get('default')!r} and has {new.get('default')!r}: prompts without it run with another value.")
    for key, narrower in _NARROWER.items():
        if key in new and (key not in old or narrower(old[key], new[key])):
            found.append(f"{name}: {key} was {old.get(key, 'open')} and is {new[key]}: saved values beyond it are refused.")
    found += [
        f"{name} no longer has the option {option!r}: workflows that chose it are refused."
        for option in old.get("options", []) if option not in new.get("options", [])
    ]
    return found


def read() -> dict[str, dict]:
    """The committed snapshot; none yet is an empty one."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def text(nodes: dict[str, dict]) -> str:
    """The file's form: one line an input, so that a change shows as one line."""
    lines = []
    for node, parts in nodes.items():
        inputs = ",\n".join(f"      {json.dumps(part, ensure_ascii=False)}" for part in parts["inputs"])
        lines.append(f'  {json.dumps(node)}: {{\n    "inputs": [\n{inputs}\n    ],\n    "outputs": {json.dumps(parts["outputs"])}\n  }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> int:
    new = snapshot(schemas())
    found = breaks(read(), new)
    if found and "--anyway" not in arguments:
        print("Saved workflows would break, so nothing is written (--anyway writes it all the same):", *found, sep="\n- ")
        return 1
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(new), encoding="utf-8")
    print(f"{FILE}: {len(new)} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
