"""Takes a training run's moving average out: python -m training.export --checkpoint FILE --output FOLDER.

Writes the weights (ComfyUI's names; UNETLoader knows them as Wan 2.1), the clips to continue and a picture of how it does,
evaluation.json and README.md, the model card.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch
from pack.demo.clips import to_pixels
from pack.demo.pictures import write_side_by_side
from safetensors.torch import save_file
from torch import Tensor

from .card import model_card
from .clips import Clips, NoClipsError, load_clips
from .evaluate import attention_figures, video_figures, videos
from .model import Size, WanVideo

MODEL, CLIPS, PICTURE = "tiny_wan_clips.safetensors", "clips.safetensors", "clips.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint.pt of python -m training.train")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--windows", type=int, help="how many of the windows to evaluate on (default all)")
    parser.add_argument("--beginning", default="", metavar="TEXT", help="for the card: what the run began with, where it was not one run")
    arguments = parser.parse_args()
    state = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    size = Size(**state["settings"]["size"])
    try:
        clips = load_clips(size.text)
    except NoClipsError as error:
        parser.exit(1, f"{error}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    tensors = to_half(state["ema"])
    save_model(tensors, size, arguments.output / MODEL)
    save_clips(clips, arguments.output / CLIPS)
    model = WanVideo(size)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    model.to(arguments.device)
    clips = as_stored(clips, arguments.windows, arguments.device)
    made = videos(model, clips)
    write_side_by_side(arguments.output / PICTURE, pictures(made, clips), scale=1)
    evaluation = evaluate(model, clips, made, state, arguments.beginning)
    (arguments.output / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "README.md").write_text(model_card(evaluation), encoding="utf-8")
    print(model_card(evaluation))


def as_stored(clips: Clips, windows: int | None = None, device: str = "cpu") -> Clips:
    """The first windows as the file has them: in float16, and read back."""
    return Clips(clips.latents[:windows].half().float().to(device), clips.text[:windows].to(device), clips.names[:windows])


def pictures(made: Tensor, clips: Clips) -> list[tuple[str, list[tuple[str, Tensor]]]]:
    """For each window its name, the true clip and the model's."""
    pixels = zip(clips.names, to_pixels(clips.latents.cpu()), to_pixels(made.cpu()), strict=True)
    return [(name, [("the true clip", true), ("the model", ours)]) for name, true, ours in pixels]


def evaluate(model: WanVideo, clips: Clips, made: Tensor, state: dict, beginning: str = "") -> dict:
    """Everything that the model card says in figures. made: the model's videos of these clips, as `videos` makes them."""
    rows = video_figures(made.cpu(), Clips(clips.latents.cpu(), clips.text.cpu(), clips.names))
    return {
        "date": datetime.date.today().isoformat(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training": {
            "settings": state["settings"], "beginning": beginning, "steps_done": state["done"],
            "loss": state["losses"][-1][1] if state["losses"] else None,
        },
        "videos": rows,
        "attention": attention_figures(model, clips),
    }


def to_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in float16; biases, gains and modulations as they are, since they are small and matter more."""
    return {name: tensor.half() if name.endswith("weight") and tensor.dim() > 1 else tensor.float() for name, tensor in tensors.items()}


def save_model(tensors: dict[str, Tensor], size: Size, path: Path) -> None:
    """With the metadata that ComfyUI needs beyond the shapes: it takes heads of 128 for granted, and text of 4096."""
    config = json.dumps({"transformer": {"num_heads": size.heads, "text_dim": size.text}})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"config": config})


def save_clips(clips: Clips, path: Path) -> None:
    """latents [N, 16, T, H, W] and prompts [N, 8, text width], float16; metadata: names, and which prompt is whose."""
    metadata = {"clips": json.dumps(list(clips.names)), "prompt_of_clip": json.dumps(list(range(len(clips.names))))}
    save_file({"latents": clips.latents.half().contiguous(), "prompts": clips.text.half().contiguous()}, path, metadata=metadata)


if __name__ == "__main__":
    main()
