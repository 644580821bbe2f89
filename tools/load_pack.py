"""Imports the pack from its files, as ComfyUI does: by path, under a name of its own, whatever its folder is called."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_pack(name: str = "pack") -> ModuleType:
    """The pack as the module `name`; afterwards `from pack.kernels import ...` works. A second call changes nothing."""
    # `python -m` puts the working directory on the path, where our `nodes` would shadow ComfyUI's module of that name.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
