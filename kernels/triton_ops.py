"""The ops in Triton, each in a module of its own."""

from .triton_block_mass import block_mass
from .triton_forward import attention_with_lse, block_sparse_attention
from .triton_sampled_errors import sampled_errors

__all__ = ["attention_with_lse", "block_mass", "block_sparse_attention", "sampled_errors"]
