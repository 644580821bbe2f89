"""Demo-only nodes for ComfyUI: clips in, a raw latent out, and a look at a run under way. No part of the pack.

Link this folder into a server's custom_nodes beside the pack. Files go into the server's output directory, named by `name`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors import safe_open
from safetensors.torch import save_file

_CATEGORY = "sparse video attention demo"
_KEY = "sparse_video_attention_demo"
# Where the pack leaves a run's session in the options of that run.
_PACK = "sparse_video_attention"


class SparseDemoClips(io.ComfyNode):
    """Real clips' text and first frames as conditioning, and an empty latent of their size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseDemoClips", display_name="Demo Clips", category=_CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.String.Input("file", default="clips.safetensors", tooltip="In the input directory."),
                io.String.Input("clips", default="0", tooltip="Numbers of clips; they become one batch."),
            ],
            outputs=[io.Conditioning.Output(), io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model: Any, file: str, clips: str) -> io.NodeOutput:
        numbers = [int(number) for number in clips.split(",")]
        with safe_open(folder_paths.get_annotated_filepath(file), "pt") as tensors:
            prompts = json.loads(tensors.metadata()["prompt_of_clip"])
            latents = tensors.get_tensor("latents")[numbers].float()
            text = tensors.get_tensor("prompts")[[prompts[number] for number in numbers]].float()
        given = torch.zeros_like(latents)
        given[:, :, 0] = latents[:, :, 0]
        # ComfyUI takes latents in VAE space and brings this one back to the model's.
        given = model.get_model_object("latent_format").process_out(given)
        return io.NodeOutput([[text, {"concat_latent_image": given}]], {"samples": torch.zeros_like(latents)})


class SparseDemoWatch(io.ComfyNode):
    """Writes <name>.progress.json after each step, and times the sampling alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseDemoWatch", display_name="Demo Watch", category=_CATEGORY,
            inputs=[io.Model.Input("model"), io.String.Input("name", default="run")], outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, name: str) -> io.NodeOutput:
        path = Path(folder_paths.get_output_directory()) / f"{name}.progress.json"
        state = {"step": 0, "sparsity": 0.0, "seconds": None}

        def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
            state.update(step=0, sparsity=0.0, seconds=None)
            start = time.perf_counter()
            result = executor(*args, **kwargs)
            state["seconds"] = time.perf_counter() - start
            _write(path, state)
            return result

        def after_step(values: dict) -> Any:
            active = values["model_options"].get("transformer_options", {}).get(_PACK)
            if active is not None:
                record = active.session.record
                record.flush()
                state["sparsity"] = record.run_sparsity
            state["step"] += 1
            _write(path, state)
            return values["denoised"]

        watched = model.clone()
        watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, _KEY, timed)
        watched.set_model_sampler_post_cfg_function(after_step)
        return io.NodeOutput(watched)


class SparseDemoSave(io.ComfyNode):
    """Writes <name>.safetensors, the latent in model space, and <name>.json, a run's record."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SparseDemoSave", display_name="Demo Save", category=_CATEGORY, is_output_node=True,
            inputs=[
                io.Model.Input("model"), io.Latent.Input("samples"), io.String.Input("name", default="run"),
                io.String.Input("record", default="", optional=True, force_input=True),
            ],
        )

    @classmethod
    def execute(cls, model: Any, samples: dict, name: str, record: str = "") -> io.NodeOutput:
        folder = Path(folder_paths.get_output_directory())
        latents = model.get_model_object("latent_format").process_in(samples["samples"].float().cpu())
        save_file({"latents": latents.contiguous()}, folder / f"{name}.safetensors")
        if record:
            (folder / f"{name}.json").write_text(record)
        return io.NodeOutput()


def _write(path: Path, state: dict) -> None:
    """A reader sees the old state or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state))
    os.replace(part, path)


class SparseDemoExtension(ComfyExtension):
    """The demo's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SparseDemoClips, SparseDemoWatch, SparseDemoSave]


async def comfy_entrypoint() -> SparseDemoExtension:
    """ComfyUI's door."""
    return SparseDemoExtension()
