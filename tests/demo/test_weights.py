"""The names of tensors, both ways, and that the model behind them is ComfyUI's."""

from pathlib import Path

import pytest
import torch
from pack.demo import weights
from pack.demo.clips import MODEL_FILE, load_clips
from pack.demo.embedded import EmbeddedHost, load_model
from pack.demo.runs import RUNS, Job
from safetensors.torch import load_file

STORED = Path(__file__).parent / "comfyui_dense.safetensors"


def test_names_are_a_bijection():
    tensors = load_file(MODEL_FILE)
    there = weights.to_diffusers(tensors)
    back = weights.to_comfyui(there)
    assert list(back) == list(tensors)
    assert all(back[key] is tensors[key] for key in tensors)
    assert len(there) == len(tensors)
    assert set(there) == set(load_model().state_dict())


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q_proj.weight", "img_emb.proj.0.weight", "blocks.x.ffn.0.weight"])
def test_a_tensor_that_is_not_known_is_named(name):
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        weights.to_diffusers({name: torch.zeros(1)})


def test_the_dense_video_is_comfyuis():
    """The stored values are every 97th of what ComfyUI 0.33.0 sampled: first clip, 2 steps, seed 0."""
    outcome = EmbeddedHost().run(RUNS[0], Job(load_clips(1), 2, 0), lambda step, sparsity: None)
    expected = load_file(STORED)["every_97th"]
    torch.testing.assert_close(outcome.latents.flatten()[::97], expected, rtol=0, atol=1e-4)
