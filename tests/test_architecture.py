"""Tier 0: which room may import what, read from the source; and the pack with neither Triton nor ComfyUI."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "attention", "nodes")  # each may import those before it
HOST = {
    "app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server",
}


def imports_in(source: str, package: tuple[str, ...]):
    """(target as a tuple of names, relative, at module level) of each import; a relative target starts below the pack."""
    tree = ast.parse(source)
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), False, id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package) + 1, f"{ast.unparse(node)} leaves the pack"
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield (*base, *(node.module.split(".") if node.module else ()), alias.name), node.level > 0, id(node) not in inside


def modules(room: str):
    return [path for path in sorted((ROOT / room).rglob("*.py")) if "__pycache__" not in path.parts]


def imports_of(path: Path):
    return list(imports_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts))


EVERY_MODULE = [path for room in ROOMS for path in modules(room)]
every_module = pytest.mark.parametrize("path", EVERY_MODULE, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_the_reader_of_imports_reads_every_form():
    source = "import a.b\nfrom .. import kernels as k\nfrom .x import y\ndef f():\n    from ...nodes.z import w\n    import triton\n"
    assert list(imports_in(source, ("attention", "methods"))) == [
        (("a", "b"), False, True), (("attention", "kernels"), True, True), (("attention", "methods", "x", "y"), True, True),
        (("nodes", "z", "w"), True, False), (("triton",), False, False),
    ]
    assert {path.name for path in EVERY_MODULE} >= {"block_mask.py", "dispatch.py", "adaspa.py"}
    assert ("kernels",) in [target for target, relative, _ in imports_of(ROOT / "attention" / "methods" / "svg.py") if relative]


@every_module
def test_rooms_import_downwards_only(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    assert [target for target, relative, _ in imports_of(path) if relative and target[0] not in allowed] == []


@every_module
def test_the_pack_is_imported_relatively(path):
    """Its folder may have any name; `import nodes` would be ComfyUI's."""
    ours = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - {"nodes"} | {"pack"}
    absolute = [target for target, relative, _ in imports_of(path) if not relative]
    assert [target for target in absolute if target[0] in ours or target[:2] == ("nodes", path.stem)] == []


@pytest.mark.parametrize("room, known", [("kernels", {"torch", "triton"}), ("attention", {"torch"})])
def test_inner_rooms_know_torch_alone(room, known):
    """So neither ComfyUI, and in attention/ not Triton either."""
    absolute = {(path.name, target[0]) for path in modules(room) for target, relative, _ in imports_of(path) if not relative}
    foreign = {(file, name) for file, name in absolute if name not in sys.stdlib_module_names}
    assert {name for _, name in foreign} <= known, foreign
    assert "torch" in {name for _, name in foreign}


def test_only_nodes_and_the_demo_know_comfyui():
    for path in sorted(ROOT.glob("*.py")) + [path for room in ("kernels", "attention", "benchmarks") for path in modules(room)]:
        assert not {target[0] for target, relative, _ in imports_of(path) if not relative} & HOST, path


def test_methods_do_not_import_one_another():
    methods = [path for path in modules("attention/methods") if path.name != "__init__.py"]
    assert len(methods) >= 2
    for path in methods:
        assert [target for target, relative, _ in imports_of(path) if relative and target[:2] == ("attention", "methods")] == [], path


def test_an_optimised_op_does_not_import_the_reference():
    ops = [path for path in modules("kernels") if path.name == "torch_ops.py" or path.name.startswith("triton_")]
    assert len(ops) >= 2
    for path in ops:
        assert [target for target, relative, _ in imports_of(path) if relative and target[:2] == ("kernels", "reference")] == [], path


def test_triton_is_imported_by_its_kernels_alone():
    """At module level; elsewhere in kernels/ only inside a function that copes without it."""
    for path in EVERY_MODULE:
        if path.parent.name == "kernels" and path.name.startswith("triton_"):
            continue
        found = [(target, at_module_level) for target, relative, at_module_level in imports_of(path) if not relative and target[0] == "triton"]
        assert not [target for target, at_module_level in found if at_module_level], path
        assert not found or path.parent.name == "kernels", path


def test_the_door_imports_nothing_until_asked():
    assert [target for target, _, at_module_level in imports_of(ROOT / "__init__.py") if at_module_level] == []


def test_requirements_list_neither_torch_nor_triton():
    """ComfyUI brings torch; installing another one breaks it."""
    path = ROOT / "requirements.txt"
    if not path.exists():
        pytest.skip("requirements.txt is not there yet")
    names = {re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0].lower() for line in path.read_text().splitlines() if line.strip()}
    assert not [name for name in names if name.startswith(("torch", "triton", "pytorch"))]


ALONE = """
import importlib, importlib.util, sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it fails
spec = importlib.util.spec_from_file_location("/a/pack of-any_name", {init!r}, submodule_search_locations=[{root!r}])
sys.modules[spec.name] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
import torch
kernels, dispatch, methods = (importlib.import_module(spec.name + part) for part in (".kernels", ".attention.dispatch", ".attention.methods"))
assert sorted(methods.METHODS) == ["AdaSpa", "Auto", "SVG"] and callable(dispatch.sparse_attention)
q, k, v = torch.randn(3, 1, 2, 100, 64)
mask = kernels.BlockMask.from_blocks(torch.ones(1, 1, 1, 2, dtype=torch.bool), 128, 64, 100, 100)
out = kernels.block_sparse_attention(q, k, v, mask, backend="auto")
assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
print(kernels.choose_backend("auto", q, k, v), "|", kernels.why_not("triton", q, k, v))
"""


def test_the_pack_works_with_neither_triton_nor_comfyui(tmp_path):
    script = ALONE.format(blocked=["triton", *sorted(HOST)], init=str(ROOT / "__init__.py"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    backend, reason = done.stdout.strip().split(" | ")
    assert backend == "torch" and "Triton cannot be imported" in reason and "triton" in reason.split("install", 1)[1]
