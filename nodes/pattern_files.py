"""Where pattern files lie, and what is asked of the host about them: its folders, and the prompt that runs now."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention.pattern import Pattern
from ..attention.words import shortened
from . import host

FOLDER = "sparse_patterns"
SUFFIX = ".safetensors"
SAVE_NODE = "SparseAttentionSavePattern"


def is_saved() -> bool:
    """Whether the prompt that runs now has a node that saves patterns. False where the host does not tell: that node then asks for the next run's."""
    prompt = host.running_prompt()
    try:
        return prompt is not None and any(node.get("class_type") == SAVE_NODE for node in prompt[2].values())
    except (AttributeError, LookupError):  # an entry of another form
        return False


def folders() -> dict[str, Path]:
    """The folders that pattern files may lie in, by the host's word for each; they need not exist."""
    try:
        import folder_paths
    except ImportError:
        return {}
    return {
        "output": Path(folder_paths.get_output_directory()) / FOLDER,
        "input": Path(folder_paths.get_input_directory()) / FOLDER,
    }


def names() -> list[str]:
    """Every pattern file, as "name [output]", newest first."""
    found = []
    for kind, folder in folders().items():
        for path in folder.rglob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):  # gone meanwhile
                if path.is_file():
                    found.append((-path.stat().st_mtime, f"{path.relative_to(folder).as_posix()} [{kind}]"))
    return [name for _, name in sorted(found)]


def locate(name: str) -> Path:
    """The file of a name as in `names`, or of a path within the folders. Raises ValueError for any other."""
    places = folders()
    text = name.strip()
    for kind, folder in places.items():
        if text.endswith(f" [{kind}]"):
            return _inside(folder / text.removesuffix(f" [{kind}]"), [folder], name)
    if os.path.isabs(text):
        return _inside(Path(text), list(places.values()), name)
    tried = [_inside(folder / text, [folder], name, must_exist=False) for folder in places.values()]
    return next((path for path in tried if path.is_file()), None) or _none(name)


def _inside(path: Path, roots: list[Path], name: str, must_exist: bool = True) -> Path:
    try:
        real = path.resolve()
        there = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long for the disk is found out by looking
        raise ValueError(f'pattern file "{shortened(name)}": this is not a path') from error
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f'pattern file "{shortened(name)}": patterns are only read from the {FOLDER} folders in ComfyUI\'s output and input')
    return real if there or not must_exist else _none(name)


def _none(name: str) -> Any:
    raise ValueError(f'pattern file "{shortened(name)}": there is no such file in the {FOLDER} folders of ComfyUI\'s output and input')


def read(path: Path) -> Pattern:
    """The pattern of a file. Raises ValueError, in words, where it holds none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: it is damaged, or no .safetensors file ({error})") from error
    try:
        return Pattern.from_file(tensors, metadata, f"pattern {path.name}")
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be used: {error}") from error


def write(pattern: Pattern, prefix: str) -> Path:
    """Writes a new file whose name starts with `prefix`, in the output folder. Raises where it may not or cannot."""
    import folder_paths

    tensors, metadata = pattern.to_file()
    root = folders()["output"]
    root.mkdir(parents=True, exist_ok=True)
    name = prefix.strip().removesuffix(SUFFIX)
    if not name or name.endswith(("/", "\\")):
        raise ValueError("filename_prefix is empty")
    folder, start, counter, *_ = folder_paths.get_save_image_path(name, str(root))
    target = Path(folder) / f"{start}_{counter:05}_{SUFFIX}"
    if not target.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"filename_prefix leads out of the folder {FOLDER}")
    _save(tensors, metadata, target)
    return target


def shown(file: Path) -> str:
    """A file of the output folder as a person finds it: sparse_patterns/wan/480p_00001_.safetensors."""
    return f"{FOLDER}/{file.relative_to(folders()['output']).as_posix()}"


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], target: Path) -> None:
    """Whole or not at all: a reader never meets half a file."""
    from safetensors.torch import save_file

    part = target.with_name(target.name + ".part")
    try:
        save_file(tensors, str(part), metadata)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
