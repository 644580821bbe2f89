"""Tiny random models under the names that the example workflows ask for: python workflow_models.py COMFYUI MODELS_FOLDER

So a workflow's own loaders load them, and ComfyUI detects them as it does the real ones. Text encoders and most VAEs have no tiny size:
their files are placeholders, and the test swaps their loaders for nodes of tests/host_nodes. Runs with the host's Python.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_models import fill, host_on_cpu

# Width of a text token, by a word in the name of the text encoder's file.
TEXT_WIDTH = {"umt5": 64, "qwen_2.5_vl": 64, "gemma": 128, "qwen3vl": 64}
# Self-attention layers of the tiny networks, all stacks together; two where nothing else stands here.
LAYERS = {"hunyuanvideo1.5_720p_t2v_fp16": 3, "wan2.1_vace_14B_fp16": 3}
# Loaders of these are swapped; the rest of what the workflows name is loaded as it is.
PLACEHOLDERS = {
    "text_encoders": (
        "umt5_xxl_fp8_e4m3fn_scaled", "qwen_2.5_vl_7b_fp8_scaled", "byt5_small_glyphxl_fp16", "gemma_3_12B_it_fp4_mixed",
        "qwen3vl_32b_minimax_h3_nvfp4_awq",
    ),
    "vae": ("wan_2.1_vae", "hunyuanvideo15_vae_fp16", "minimax_h3_video_vae_fp16", "minimax_h3_audio_vae_fp32"),
}
_CPU = {"device": "cpu", "dtype": torch.float32}


def write(models: Path) -> None:
    """Every file; those of models that this ComfyUI does not have are left out."""
    import comfy.ops

    where = {**_CPU, "operations": comfy.ops.disable_weight_init}
    _wan(models, where)
    _hunyuan(models, where)
    _ltx2(models, where)
    _minimax(models, where)
    for folder, names in PLACEHOLDERS.items():
        for name in names:
            _save({"placeholder": torch.zeros(1)}, models / folder / name)


def _wan(models: Path, where: dict) -> None:
    from comfy.ldm.wan.model import VaceWanModel, WanModel

    folder, text = models / "diffusion_models", {"text_dim": TEXT_WIDTH["umt5"]}
    sizes = {"dim": 256, "num_heads": 2, "num_layers": 2, "out_dim": 16, "ffn_dim": 256, **text, **where}
    names = (
        ("wan2.1_t2v_1.3B_fp16", 16), ("wan2.2_t2v_high_noise_14B_fp8_scaled", 16), ("wan2.2_t2v_low_noise_14B_fp8_scaled", 16),
        ("wan2.2_i2v_high_noise_14B_fp8_scaled", 36), ("wan2.2_i2v_low_noise_14B_fp8_scaled", 36),
    )
    for seed, (name, channels) in enumerate(names):
        network = WanModel(model_type="t2v", in_dim=channels, **sizes)  # 2.2's image to video has no picture tokens either
        _save(_weights(network, seed=seed), folder / name, {"transformer": text})
    vace = VaceWanModel(model_type="vace", in_dim=16, vace_layers=1, vace_in_dim=96, **sizes)
    _save(_weights(vace), folder / "wan2.1_vace_14B_fp16", {"transformer": text})
    generator = torch.Generator().manual_seed(0)
    for noise in ("high", "low"):
        lora = {
            f"diffusion_model.blocks.{block}.self_attn.{part}.lora_{side}.weight": 0.05 * torch.randn(shape, generator=generator)
            for block in (0, 1) for part in ("q", "k") for side, shape in (("down", (4, 256)), ("up", (256, 4)))
        }
        _save(lora, models / "loras" / f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise")


def _hunyuan(models: Path, where: dict) -> None:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    network = HunyuanVideo(
        image_model="hunyuan_video", in_channels=65, out_channels=32, vec_in_dim=None, context_in_dim=TEXT_WIDTH["qwen_2.5_vl"], hidden_size=256,
        mlp_ratio=4.0, num_heads=2, depth=3, depth_single_blocks=0, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 1, 1], qkv_bias=True,
        guidance_embed=False, byt5=True, meanflow=False, use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True, **where,
    )
    _save(_weights(network), models / "diffusion_models" / "hunyuanvideo1.5_720p_t2v_fp16")


def _ltx2(models: Path, where: dict) -> None:
    """One file, as LTX-2 comes: the network, the VAE of the video, the one of the sound, and what makes sound from a spectrogram."""
    from comfy.ldm.lightricks.av_model import LTXAVModel
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    transformer = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128, "cross_attention_dim": 256, "caption_channels": 64,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 128, "connector_num_attention_heads": 1,
        "connector_num_layers": 1,
    }
    blocks = [["res_x", {"num_layers": 1}], *(["compress_all", {}], ["res_x", {"num_layers": 1}]) * 3]
    video = {
        "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "encoder_blocks": blocks, "decoder_blocks": blocks,
        "encoder_base_channels": 8, "decoder_base_channels": 8, "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform",
    }
    spectrogram = {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256, "downsample_time": False, "in_channels": 2, "out_ch": 2, "ch": 8,
        "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": False,
        "norm_type": "pixel", "causality_axis": "height",
    }
    audio = {
        "model": {"params": {"ddconfig": spectrogram, "sampling_rate": 16000}},
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
    }
    vocoder = {"upsample_initial_channel": 32, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}
    config = {"transformer": transformer, "vae": video, "audio_vae": audio, "vocoder": vocoder}
    sound = _weights(AudioVAE({"config": json.dumps(config)}))
    weights = {
        **_weights(LTXAVModel(image_model="ltxav", **transformer, **where), "model.diffusion_model."), **_weights(VideoVAE(config=video), "vae."),
        **{name.replace("autoencoder.", "audio_vae."): tensor for name, tensor in sound.items() if name.startswith(("autoencoder.", "vocoder."))},
    }
    _save(weights, models / "checkpoints" / "ltx-2-19b-dev-fp8", config)


def _minimax(models: Path, where: dict) -> None:
    try:
        from comfy.ldm.minimax.model import MiniMaxH3Model
    except ImportError:
        return
    network = MiniMaxH3Model(
        hidden_size=256, num_layers=2, token_refiner_num_layers=1, num_attention_heads=2, attention_head_dim=128, ffn_hidden_size=128,
        text_dim=TEXT_WIDTH["qwen3vl"], timestep_input_dim=64, time_embed_hidden_size=64, time_embed_dim=64, **where,
    )
    _save(_weights(network), models / "diffusion_models" / "minimax_h3_fl2va_pruned_int8_convrot")


def _weights(network: torch.nn.Module, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.contiguous())  # some are one number seen many times
    fill(network, seed)
    return {prefix + name: tensor.float().contiguous() for name, tensor in network.state_dict().items()}


def _save(weights: dict[str, torch.Tensor], path: Path, config: dict | None = None) -> None:
    import safetensors.torch

    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, f"{path}.safetensors", metadata={"config": json.dumps(config)} if config else None)


if __name__ == "__main__":
    host_on_cpu(Path(sys.argv[1]).resolve())
    write(Path(sys.argv[2]))
