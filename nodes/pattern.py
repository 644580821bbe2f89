"""The nodes "Save Sparse Pattern" and "Load Sparse Pattern": a run's plans as a file, and a file's plans for later runs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..attention.pattern import Pattern
from ..attention.words import shortened
from . import host, pattern_files, video_models
from .inputs import CATEGORY, told_its_id
from .patch import PATTERN, RunLog, method_of
from .report import find_record

_NO_FILE = "none"


class SparseAttentionSavePattern(io.ComfyNode):
    """What the run that made `samples` found, written to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=pattern_files.SAVE_NODE,
            display_name="Save Sparse Pattern",
            category=CATEGORY,
            description="Keeps what a run found out (SVG's kinds of head, AdaSpa's and Auto's blocks) in a small file, so that later runs of the "
            "same model, resolution and length need not look for it again. Put it between the sampler and the decoder.",
            search_aliases=["save sparse attention pattern", "sparse mask", "save head types", "save block indices"],
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled: the output of a sparse attention patch, or a later node's."),
                io.Latent.Input("samples", tooltip="The sampler's output; it passes through, so that the file is written after the run."),
                io.String.Input(
                    "filename_prefix", default="pattern", optional=True,
                    tooltip="How the file's name starts; a number is put behind it. It may name a folder, as in wan/480p: the file goes to "
                    "sparse_patterns in ComfyUI's output folder.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The same latent."),
                io.String.Output(display_name="path", tooltip="Where the file is; empty where none was written, and the node says why."),
            ],
            **told_its_id(io.Hidden.prompt),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: dict, filename_prefix: str = "pattern") -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        found = _pattern_of(model, cls.hidden.prompt or {}, node_id)
        path = ""
        if isinstance(found, Pattern):
            # A video is worth more than its pattern: whatever is wrong with the file is said, and the latent goes on.
            try:
                file = pattern_files.write(found, filename_prefix)
                path = str(file)
                text = f"Saved {pattern_files.shown(file)} · {_about(found)} · press R to find it in Load Sparse Pattern"
            except Exception as error:
                host.log.warning("could not save a pattern", exc_info=True)
                text = f"⚠ No file was written: {error}"
        else:
            text = f"⚠ No file was written. {found}"
            host.log.warning(text)
        host.show_text(text, node_id)
        return io.NodeOutput(samples, path)


def _pattern_of(model: Any, prompt: dict, node_id: str) -> Pattern | str:
    """What the run that made the samples found, or why there is nothing to save."""
    record = find_record(model, prompt, node_id)
    if isinstance(record, str):
        return record
    log: RunLog = model.get_attachment(host.KEY)
    pattern = log.patterns.get(record.node)
    if pattern is not None:
        return pattern
    if not record.sparse_calls and not record.searches:
        return "The run found nothing: no call ran sparse. The patch node says why."
    log.pattern_wanted = True
    return "The run did not keep what it found. The next one will: change the seed, or sample again."


def _about(pattern: Pattern) -> str:
    return f"{pattern.method} for {pattern.model or 'an unlisted model'} · {pattern.layout} · {len(pattern.plans)} plans of {pattern.heads} heads"


class SparseAttentionLoadPattern(io.ComfyNode):
    """Runs of the model start from a file's plans."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseAttentionLoadPattern",
            display_name="Load Sparse Pattern",
            category=CATEGORY,
            description="Lets a model's runs start from a saved pattern: SVG does not classify heads, AdaSpa and Auto do not search, so "
            "warmup_steps may be 0. A pattern fits the model, resolution and length that it was made with, and the same patch node.",
            search_aliases=["load sparse attention pattern", "sparse mask", "reuse head types", "reuse block indices"],
            inputs=[
                io.Model.Input("model", tooltip="A video model, before or after its sparse attention patch. After it, a wrong file is told sooner."),
                io.Combo.Input(
                    "file", options=[_NO_FILE, *pattern_files.names()], default=_NO_FILE, optional=True,
                    tooltip="A pattern from the sparse_patterns folder in ComfyUI's output or input. none: runs look for their own.",
                ),
                io.String.Input(
                    "path", default="", optional=True, advanced=True,
                    tooltip="A path within these folders, such as Save Sparse Pattern gives out. It goes before file. Empty: file is taken.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model; its runs start from the pattern.")],
            **told_its_id(),
        )

    @classmethod
    def validate_inputs(cls, file: str = _NO_FILE, path: str | None = "") -> bool | str:
        """Before anything runs. A file of a wrong kind is told when the node runs: reading it here would be for each prompt."""
        try:
            _chosen(file, path)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model: Any = None, file: str = _NO_FILE, path: str | None = "") -> Any:
        """The file's age and size: one written anew under its old name is read again."""
        try:
            chosen = _chosen(file, path)
            return None if chosen is None else (str(chosen), chosen.stat().st_mtime_ns, chosen.stat().st_size)
        except (OSError, ValueError) as error:
            return str(error)

    @classmethod
    def execute(cls, model: Any, file: str = _NO_FILE, path: str = "") -> io.NodeOutput:
        chosen = _chosen(file, path)
        loaded = model.clone()
        if chosen is None:
            loaded.set_attachments(PATTERN, None)
            return io.NodeOutput(loaded)
        pattern = pattern_files.read(chosen)
        method = method_of(model)
        reason = pattern.why_not_model(method, *_facts(model))
        if reason is not None:
            raise ValueError(f"{chosen.name} does not fit: {reason}.")
        loaded.set_attachments(PATTERN, pattern)
        patch = "" if method is not None else f" · works once the model has a sparse attention patch ({pattern.method})"
        host.show_text(f"{_about(pattern)}{patch}", str(cls.hidden.unique_id))
        return io.NodeOutput(loaded)


def _chosen(file: str, path: str | None) -> Any:
    """The file that the inputs name, or None. Raises ValueError for one that may not be read or is not there."""
    for given in (file, path):
        if given is not None and not isinstance(given, str):
            raise ValueError(f"pattern file {shortened(repr(given))}: this is not text")
    name = (path or "").strip() or (file or _NO_FILE)
    return None if name == _NO_FILE else pattern_files.locate(name)


def _facts(model: Any) -> tuple[str | None, int | None]:
    """(what the model is called, how many layers it has), None where it cannot be told."""
    try:
        network = video_models.network_of(model)
        row = video_models.find(network)
        return row.name, row.layers(network)
    except Exception:  # a network that has changed since its row was written
        host.log.warning("could not read the facts of a model", exc_info=True)
        return None, None
