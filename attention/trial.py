"""A plan tried out on a part of a call's queries, before it is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask, SparsePlan
from ..kernels.block_mask import block_rows
from .blocks import VideoBlocks
from .call import AttentionCall

# Blocks of queries that a plan is tried out on, evenly spread: at 119k tokens 2 percent of them.
_BLOCKS = 16


class Trial:
    """Some of the video's blocks of queries, with what dense attention gives for them."""

    def __init__(self, call: AttentionCall, blocks: VideoBlocks, backend: str, out: Tensor | None = None):
        """out: the call's dense output [B, H, S, D], where it is known."""
        self.call, self.blocks, self.backend = call, blocks, backend
        count = blocks.rows - blocks.sink_rows
        self.picked = blocks.sink_rows + torch.arange(min(count, _BLOCKS), device=call.q.device) * count // min(count, _BLOCKS)
        rows = block_rows(blocks.q_order, call.layout.seq_len, blocks.block_q, call.q.device)[0, self.picked].flatten()
        self.present = (rows >= 0).nonzero()[:, 0]
        self.rows = rows.clamp(min=0).long()
        self.q = call.q.index_select(2, self.rows)
        if out is None:
            dense, _ = kernels.attention_with_lse(self.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=backend)
        else:
            dense = out.index_select(2, self.rows)
        self.dense = dense.index_select(2, self.present).float()

    def errors(self, plan: SparsePlan) -> Tensor:
        """The relative L2 error of a plan on these blocks, over all heads, of each batch entry: float32 [B]. What is no number counts as none."""
        counts, indices = (table.index_select(2, self.picked) for table in (plan.mask.kv_num_blocks, plan.mask.kv_indices))
        mask = BlockMask(counts, indices, plan.mask.block_q, plan.mask.block_k, len(self.rows), plan.mask.seq_k)
        out = kernels.block_sparse_attention(
            self.q, self.call.k, self.call.v, mask, k_order=plan.k_order, scale=self.call.scale, key_bias=self.call.key_bias,
            pooled=plan.pooled, backend=self.backend,
        )
        off = out.index_select(2, self.present).float() - self.dense
        off, size = (part.square().nan_to_num(0.0, 0.0, 0.0).sum((1, 2, 3)) for part in (off, self.dense))
        return (off / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
