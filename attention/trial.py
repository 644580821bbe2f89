"""A choice of blocks tried out on a part of a call's queries, before it is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask, PooledBlocks
from ..kernels.block_mask import block_rows
from .blocks import VideoBlocks
from .budget import BLOCK_K
from .call import AttentionCall

# Blocks of queries that a choice is tried out on, evenly spread: at 119k tokens 2 percent of them.
_BLOCKS = 16


class Trial:
    """Some of the video's blocks of queries, with what dense attention gives for them."""

    def __init__(self, call: AttentionCall, blocks: VideoBlocks, pooled: PooledBlocks | None, backend: str, out: Tensor | None = None):
        """pooled: what stands for the blocks that are not kept. out: the call's dense output [B, H, S, D], where it is known."""
        self.call, self.blocks, self.pooled, self.backend = call, blocks, pooled, backend
        count = blocks.rows - blocks.sink_rows
        self.picked = torch.arange(min(count, _BLOCKS), device=call.q.device) * count // min(count, _BLOCKS)
        rows = block_rows(blocks.q_order, call.layout.seq_len, blocks.block_q, call.q.device)[0, blocks.sink_rows + self.picked].flatten()
        self.present = (rows >= 0).nonzero()[:, 0]
        self.rows = rows.clamp(min=0).long()
        self.q = call.q.index_select(2, self.rows)
        if out is None:
            dense, _ = kernels.attention_with_lse(self.q, call.k, call.v, scale=call.scale, key_bias=call.key_bias, backend=backend)
        else:
            dense = out.index_select(2, self.rows)
        self.dense = dense.index_select(2, self.present).float()

    def errors(self, keep: Tensor) -> Tensor:
        """The relative L2 error on these blocks, over all heads, of each batch entry: float32 [B]. What is no number counts as none.

        keep: which of the video's blocks are kept, bool [B, H, Qv, Kv].
        """
        blocks = torch.nn.functional.pad(keep.index_select(2, self.picked), (self.blocks.sink_columns, 0), value=True)
        mask = BlockMask.from_blocks(blocks, self.blocks.block_q, BLOCK_K, len(self.rows), self.blocks.positions_k)
        out = kernels.block_sparse_attention(
            self.q, self.call.k, self.call.v, mask, k_order=self.blocks.k_order, scale=self.call.scale, key_bias=self.call.key_bias,
            pooled=self.pooled, backend=self.backend,
        )
        off = out.index_select(2, self.present).float() - self.dense
        off, size = (part.square().nan_to_num(0.0, 0.0, 0.0).sum((1, 2, 3)) for part in (off, self.dense))
        return (off / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
