"""The host of a machine without ComfyUI: diffusers' Wan transformer, whose self-attention goes through the pack.

The adapter does for diffusers what nodes/patch.py does for ComfyUI: it begins a session for a run, makes an
AttentionCall of every self-attention call, falls back to dense attention where the answer is Dense, and puts that on record.
"""

from __future__ import annotations

import os
import time

import diffusers
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from safetensors.torch import load_file
from torch import Tensor

from ..attention.call import AttentionCall, Dense
from ..attention.dispatch import sparse_attention
from ..attention.layout import VideoLayout
from ..attention.record import RunRecord
from ..attention.session import Session
from ..attention.warmup import make_schedule
from .clips import MODEL_FILE, first_frames, model_input, start_noise
from .runs import HEAD_DIM, HEADS, LAYERS, Job, OnStep, Outcome, Run, dense_record
from .sampler import TIMESTEPS, make_sigmas, percent_to_sigma, sample
from .weights import to_diffusers

# All clips are one batch under one condition, as ComfyUI has it.
_CONDITION = "clips"


def load_model() -> WanTransformer3DModel:
    """The demo's model in float32. Its size is that of demo/model/README.md."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=36, out_channels=16, text_dim=64, freq_dim=256,
        ffn_dim=768, num_layers=LAYERS,
    )
    weights = {key: value.float() for key, value in load_file(MODEL_FILE).items()}
    model.load_state_dict(to_diffusers(weights))
    return model.eval().requires_grad_(False)


class SparseSelfAttention:
    """An attention processor of diffusers: one layer's self-attention through a session."""

    def __init__(self, session: Session, layout: VideoLayout, layer: int):
        self.session, self.layout, self.layer = session, layout, layer

    def __call__(
        self, attn: WanAttention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states: [B, S, C], in and out. rotary_emb: cosines and sines, each [1, S, 1, D]."""
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))  # [B, S, H, D]
        q, k = (_rotated(part, *rotary_emb) for part in (q, k))
        out = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the output: [B, H, S, D]."""
        record = self.session.record
        result = sparse_attention(AttentionCall(q, k, v, self.layout, self.layer, record.step, _CONDITION), self.session)
        if not isinstance(result, Dense):
            return result
        record.dense(record.step, self.layer, result.reason)
        return F.scaled_dot_product_attention(q, k, v) if result.output is None else result.output


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs of channels, [B, S, H, D]. diffusers writes every angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class EmbeddedHost:
    """The demo's own host."""

    name = f"embedded diffusers {diffusers.__version__}"

    def __init__(self):
        self.model = load_model()

    def warm_up(self, job: Job) -> None:
        self._predict(job, start_noise(tuple(job.clips.latents.shape), job.seed), 1.0)

    @torch.inference_mode()
    def run(self, run: Run, job: Job, on_step: OnStep) -> Outcome:
        """Samples the job; `on_step` hears of every step."""
        noise = start_noise(tuple(job.clips.latents.shape), job.seed)
        sigmas = make_sigmas(job.steps)
        session = _session(run, job, sigmas) if run.method else None
        self._install(session, job.layout)

        def predict(x: Tensor, sigma: float, step: int) -> Tensor:
            if session:
                session.record.step = session.schedule.step_of(sigma)
            out = self._predict(job, x, sigma)
            if session:
                session.flush()
            on_step(step + 1, session.record.run_sparsity if session else 0.0)
            return out

        try:
            start = time.perf_counter()
            latents = sample(predict, noise, sigmas)
            seconds = time.perf_counter() - start
        finally:
            self._install(None, job.layout)
            record = session.end() if session else None
        if record is None:
            return Outcome(latents, seconds, dense_record(job))
        record.outcome = "finished"
        return Outcome(latents, seconds, record.to_json())

    def process_ids(self) -> tuple[int, ...]:
        return (os.getpid(),)

    @torch.inference_mode()
    def _predict(self, job: Job, x: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((len(x),), sigma * TIMESTEPS)
        return self.model(model_input(x, first_frames(job.clips.latents)), timestep, job.clips.text, return_dict=False)[0]

    def _install(self, session: Session | None, layout: VideoLayout) -> None:
        """The pack's processors for a session; diffusers' own for none."""
        for layer, block in enumerate(self.model.blocks):
            block.attn1.set_processor(WanAttnProcessor() if session is None else SparseSelfAttention(session, layout, layer))


def _session(run: Run, job: Job, sigmas: Tensor) -> Session:
    config = run.config
    schedule = make_schedule(sigmas.tolist(), percent_to_sigma, 1.0, config.warmup_steps, config.end_steps, run.method.LEAST_WARMUP)
    record = RunRecord(run.method.NAME, config, schedule.steps, LAYERS, job.seed, schedule.warmup)
    record.model = "Wan 2.1 / 2.2"
    return Session(run.method, config, schedule, job.seed, record, LAYERS)
