"""The ops in Triton, each in a module of its own."""

from .triton_block_mass import block_mass
from .triton_forward import attention_with_lse, attention_with_mass, block_sparse_attention
from .triton_forward_8bit import block_sparse_attention_8bit
from .triton_pooled import block_errors, pool_blocks
from .triton_sampled_errors import sampled_errors

__all__ = [
    "attention_with_lse", "attention_with_mass", "block_errors", "block_mass", "block_sparse_attention", "block_sparse_attention_8bit", "pool_blocks",
    "sampled_errors",
]
