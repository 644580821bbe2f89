"""What saved workflows rely on of the nodes, against the committed snapshot."""

import copy
import importlib

import pytest

snapshots = importlib.import_module("node_snapshot")
NODE = {
    "inputs": [
        {"id": "model", "type": "MODEL", "optional": False},
        {"id": "share", "type": "FLOAT", "optional": True, "default": 0.7, "min": 0.0, "max": 0.95},
        {"id": "way", "type": "COMBO", "optional": True, "default": "auto", "options": ["auto", "slow"]},
    ],
    "outputs": ["MODEL", "STRING"],
}


@pytest.fixture
def now(host):
    return snapshots.snapshot([node.GET_SCHEMA() for node in importlib.import_module("pack.nodes").NODES])


def test_no_saved_workflow_breaks(now):
    assert snapshots.breaks(snapshots.read(), now) == []


def test_the_snapshot_is_of_today(now):
    """What is added is promised as well, from now on."""
    assert snapshots.read() == now, "run: make schemas"


def test_the_file_is_as_the_command_writes_it():
    assert snapshots.FILE.read_text(encoding="utf-8") == snapshots.text(snapshots.read())


def test_files_of_the_person_are_no_promise(now):
    """A list of files differs from folder to folder: its default alone is an option that every workflow may rely on."""
    named = {f"{node}.{part['id']}": part for node, parts in now.items() for part in parts["inputs"]}
    assert named.keys() >= snapshots.FILES
    assert all(named[name]["options"] == [named[name]["default"]] for name in snapshots.FILES)


def changed(change):
    node = copy.deepcopy(NODE)
    change(node)
    return snapshots.breaks({"Node": NODE}, {"Node": node})


def extra(**more):
    return {"id": "extra", "type": "INT", "optional": True, "default": 0, **more}


@pytest.mark.parametrize("change", [
    lambda node: None,
    lambda node: node["inputs"].append(extra()),
    lambda node: node["outputs"].append("IMAGE"),
    lambda node: node["inputs"][2]["options"].insert(0, "new"),
    lambda node: node["inputs"][2]["options"].reverse(),
    lambda node: node["inputs"][1].update(min=-1.0, max=1.0),
    lambda node: node["inputs"][1].pop("max"),
    lambda node: node["inputs"][0].update(optional=True),
], ids=["nothing", "input at the end", "output at the end", "new option", "order of options", "wider limits", "no limit", "optional now"])
def test_what_saved_workflows_bear_passes(change):
    assert changed(change) == []


def gone(name):
    return f"Node.{name} is gone or renamed: its saved value is lost, and values stand by place, so all later ones move."


def moved(what):
    return f"{what}: values stand by place, so saved ones go to other inputs."


BREAKS = {
    "removed": (lambda node: node["inputs"].pop(1), [gone("share")]),
    "renamed": (lambda node: node["inputs"][1].update(id="part"), [gone("share")]),
    "reordered": (lambda node: node["inputs"].reverse(), [moved("Node: the order of its inputs has changed")]),
    "in between": (lambda node: node["inputs"].insert(2, extra()), [moved("Node.extra is new and not at the end")]),
    "required": (
        lambda node: node["inputs"].append(extra(optional=False)),
        ["Node.extra is new and not optional: saved workflows do not have it and are refused."],
    ),
    "type": (lambda node: node["inputs"][1].update(type="INT"), ["Node.share was FLOAT and is INT: saved values and links no longer fit."]),
    "not optional": (
        lambda node: node["inputs"][1].update(optional=False), ["Node.share is no longer optional: prompts without it are refused."],
    ),
    "default": (
        lambda node: node["inputs"][1].update(default=0.5),
        ["Node.share had the default 0.7 and has 0.5: prompts without it run with another value."],
    ),
    "min": (lambda node: node["inputs"][1].update(min=0.1), ["Node.share: min was 0.0 and is 0.1: saved values beyond it are refused."]),
    "max": (lambda node: node["inputs"][1].update(max=0.9), ["Node.share: max was 0.95 and is 0.9: saved values beyond it are refused."]),
    "new limit": (lambda node: node["inputs"][0].update(min=1), ["Node.model: min was open and is 1: saved values beyond it are refused."]),
    "option": (
        lambda node: node["inputs"][2]["options"].remove("slow"),
        ["Node.way no longer has the option 'slow': workflows that chose it are refused."],
    ),
    "output": (lambda node: node["outputs"].pop(), ["Node: output 1 (STRING) is gone: links from it are lost."]),
    "outputs": (lambda node: node["outputs"].reverse(), [
        "Node: output 0 was MODEL and is STRING: links from it no longer fit.",
        "Node: output 1 was STRING and is MODEL: links from it no longer fit.",
    ]),
}


@pytest.mark.parametrize("change, words", BREAKS.values(), ids=BREAKS)
def test_what_breaks_a_saved_workflow_is_said(change, words):
    assert changed(change) == words


def test_a_node_that_is_gone_is_said():
    assert snapshots.breaks({"Node": NODE}, {"Other": NODE}) == ["Node is gone or renamed: workflows that hold it open with a missing node."]


def test_the_command_adds_what_is_new_and_writes_nothing_that_breaks(now, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(snapshots, "FILE", tmp_path / "nodes.json")
    monkeypatch.setattr(snapshots, "schemas", list)
    monkeypatch.setattr(snapshots, "snapshot", lambda of: now)
    shorter = copy.deepcopy(now)
    next(iter(shorter.values()))["inputs"].pop()
    snapshots.FILE.write_text(snapshots.text(shorter), encoding="utf-8")
    assert snapshots.main([]) == 0 and snapshots.read() == now
    with_another = {**now, "Gone": NODE}
    snapshots.FILE.write_text(snapshots.text(with_another), encoding="utf-8")
    assert snapshots.main([]) == 1 and "Gone is gone" in capsys.readouterr().out and snapshots.read() == with_another
    assert snapshots.main(["--anyway"]) == 0 and snapshots.read() == now
