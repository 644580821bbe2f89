"""Tiny random checkpoints in the layout that ComfyUI's model detection knows: python tiny_models.py COMFYUI FOLDER

Written by the host's own classes, so it runs with the host's Python. A few MB each, in seconds.
"""

import json
import math
import sys
from pathlib import Path

import torch

# Name -> tokens' width of its text encoder.
TEXT_WIDTH = {"wan": 4096, "wan_head64": 64, "wan_i2v": 4096, "hunyuan": 128, "ltxv": 128, "cogvideox": 128}


def host_on_cpu(comfyui: Path) -> None:
    """Makes `import comfy` find this checkout, on a CPU."""
    sys.path[:0] = [str(comfyui), str(Path(__file__).resolve().parent.parent / "tools")]
    from comfy_cpu import fill_gaps

    fill_gaps()
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def write(folder: Path) -> None:
    """FOLDER/<name>.safetensors for every name."""
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ldm.lightricks.model import LTXVModel
    from comfy.ldm.wan.model import WanModel

    where = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    wan = {"num_layers": 2, "out_dim": 16, "ffn_dim": 256, **where}
    folder.mkdir(parents=True, exist_ok=True)
    # The detection takes Wan's heads to be of 128 unless the file's metadata says otherwise.
    _save(WanModel(model_type="t2v", dim=256, num_heads=2, in_dim=16, text_dim=4096, **wan), folder / "wan")
    _save(WanModel(model_type="i2v", dim=256, num_heads=2, in_dim=36, text_dim=4096, **wan), folder / "wan_i2v")
    head64 = {"num_heads": 2, "text_dim": 64}
    _save(WanModel(model_type="t2v", dim=128, in_dim=16, **head64, **wan), folder / "wan_head64", head64)
    hunyuan = HunyuanVideo(
        image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=128, hidden_size=256, mlp_ratio=4.0,
        num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True,
        byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False, **where,
    )
    _save(hunyuan, folder / "hunyuan")
    ltxv = {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "caption_channels": 128}
    _save(LTXVModel(num_layers=2, **ltxv, **where), folder / "ltxv", ltxv)
    cogvideox = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, time_embed_dim=128, text_embed_dim=128, num_layers=2,
        use_rotary_positional_embeddings=True, **where,
    )
    _save(cogvideox, folder / "cogvideox")


@torch.no_grad()
def fill(network: torch.nn.Module, seed: int = 0) -> None:
    """Fills a network with seeded noise of the right size."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("inv_freq"):
            tensor.copy_(10000.0 ** -(torch.arange(tensor.numel()) / tensor.numel()))
        elif not tensor.is_floating_point():
            continue
        elif tensor.ndim <= 1 and "norm" in name and not name.endswith("bias"):
            tensor.fill_(1.0)
        elif tensor.ndim <= 1:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel()))


def _save(network: torch.nn.Module, path: Path, config: dict | None = None) -> None:
    """Fills the network and writes it."""
    import safetensors.torch

    fill(network)
    weights = {name: (tensor.half() if tensor.ndim > 1 else tensor.float()).contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"config": json.dumps({"transformer": config})} if config else None
    safetensors.torch.save_file(weights, path.with_suffix(".safetensors"), metadata=metadata)


if __name__ == "__main__":
    host_on_cpu(Path(sys.argv[1]).resolve())
    write(Path(sys.argv[2]))
