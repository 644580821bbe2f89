"""Each block of keys as one key, and the error that this makes of the output, in Triton.

Pooling reads K and V once: one program averages a block of one head, by weights that are worked out beforehand, since they are a number a key.

The errors are a walk over all keys as in triton_block_mass.py, with the second product of attention: a key block's weights times its
values, less what the pooled key gives, squared and summed over the rows. The pooled keys' own weights are made for POOLED_N blocks
at a time by one product, and one of their columns is picked for each block. The grid is that of the forward.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import PooledBlocks, TokenOrder, block_rows, num_blocks
from .triton_block_mass import bias_by_position
from .triton_config import LOG2E, architecture, block_errors_config, heads_aligned, on_device, padded_head_dim
from .triton_forward import (
    base_2_lse,
    block_row_numbers,
    chosen_order,
    head_start,
    key_order_arguments,
    load_rows,
    mass_tile,
    order_arguments,
    ordered_keys,
    positive_scale,
    query_tile,
    store_mass,
    sum_tiles,
)  # fmt: skip

LOG2E_DEVICE = tl.constexpr(LOG2E)
# Rows that the pooling reads at a time, at most.
_POOL_TILE = 64
# Pooled keys whose weights are made by one product: the 16 of a matrix instruction.
_POOLED_N = 16


@triton.jit(
    do_not_specialize=[
        "heads", "length_k", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_weight_b", "stride_weight_order",
        "stride_k_order", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def pool_kernel(
    k, v, log_weights, k_order, k_choice, keys, values, heads, length_k,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_weight_b: tl.int64, stride_weight_order: tl.int64,
    stride_k_order: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, HAS_K_ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of one head. keys, values: [B, H, K, HEAD_DIM], contiguous. log_weights: by position, minus infinity where no key is visible."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    log_weights += batch * stride_weight_b
    if HAS_K_ORDER:
        chosen = chosen_order(k_choice, batch, head, stride_k_choice_b, stride_k_choice_h)
        k_order += chosen * stride_k_order
        log_weights += chosen * stride_weight_order
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    key = tl.zeros([BLOCK_D], tl.float32)
    value = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(TILES):
        positions = (block * TILES + tile) * TILE + tl.arange(0, TILE)
        rows, present = block_row_numbers(positions, length_k, k_order, HAS_K_ORDER)
        logs = tl.load(log_weights + positions, mask=present, other=float("-inf"))
        # What is not visible is not read: 0 times NaN would reach the mean.
        visible = logs != float("-inf")
        weights = tl.exp(logs)[:, None]
        key += tl.sum(load_rows(k, rows, visible, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D).to(tl.float32) * weights, 0)
        value += tl.sum(load_rows(v, rows, visible, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D).to(tl.float32) * weights, 0)
    offsets_d = tl.arange(0, BLOCK_D)
    start = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * HEAD_DIM
    tl.store(keys + start + offsets_d, key.to(keys.dtype.element_ty), mask=offsets_d < HEAD_DIM)
    tl.store(values + start + offsets_d, value.to(values.dtype.element_ty), mask=offsets_d < HEAD_DIM)


def pool_blocks(k: Tensor, v: Tensor, block_k: int, k_order: TokenOrder | None, key_bias: Tensor | None) -> PooledBlocks:
    """See `kernels.pool_blocks`, which refuses blocks that are no multiples of 16."""
    batch, heads, seq, head_dim = k.shape
    length = seq if k_order is None else k_order.length
    blocks = num_blocks(length, block_k)
    logs = _log_weights(k_order, key_bias, seq, blocks, block_k, k.device)
    log_size = logs.logsumexp(-1)
    logs = (logs - log_size.nan_to_num(neginf=0.0)[..., None]).flatten(2)  # [B or 1, O, positions]
    log_size = log_size.expand(batch, -1, -1)
    if k_order is None:
        log_size = log_size.expand(-1, heads, -1)
    else:
        log_size = log_size.gather(1, k_order.head_order.expand(batch, heads).long()[..., None].expand(-1, -1, blocks))
    keys, values = (torch.empty(batch, heads, blocks, head_dim, dtype=x.dtype, device=x.device) for x in (k, v))
    table, choice, order_strides = order_arguments(k_order, batch, heads)
    tile = min(mass_tile(block_k), _POOL_TILE)
    with on_device(k):
        pool_kernel[blocks, batch * heads](
            k, v, logs, table, choice, keys, values, heads, length,
            *k.stride(), *v.stride(), 0 if logs.shape[0] == 1 else logs.stride(0), logs.stride(1), *order_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), TILE=tile, TILES=block_k // tile,
            HAS_K_ORDER=k_order is not None, ALIGNED=heads_aligned(k, v), num_warps=4,
        )  # fmt: skip
    return PooledBlocks(keys, values, log_size.contiguous())


def _log_weights(
    order: TokenOrder | None, key_bias: Tensor | None, seq: int, blocks: int, block: int, device: torch.device,
) -> Tensor:
    """The natural logarithm of what the key at each position counts, [B or 1, O, blocks, block]; minus infinity where none is visible."""
    rows = block_rows(order, seq, block, device).long()
    bias = torch.zeros(1, seq, dtype=torch.float32, device=device) if key_bias is None else key_bias
    return torch.nn.functional.pad(bias, (0, 1), value=-torch.inf)[:, rows]  # row -1 is the last, the one that was added


@triton.jit
def store_errors(
    errors, outputs, pooled_weights, pooled_values, counted, tile_q, block, groups_q, blocks_k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes a column of one head's errors: what a block's keys add to each row, outputs [BLOCK_M, BLOCK_D], less what its pooled key does.

    pooled_weights: [BLOCK_M, POOLED_N], those of POOLED_N blocks, of which `block` is one. counted: [BLOCK_M].
    """
    POOLED_N: tl.constexpr = pooled_weights.shape[1]  # noqa: N806
    offsets_d = tl.arange(0, BLOCK_D)
    weight = tl.sum(tl.where((tl.arange(0, POOLED_N) == block % POOLED_N)[None, :], pooled_weights, 0.0), 1)
    value = tl.load(pooled_values + block * HEAD_DIM + offsets_d, mask=offsets_d < HEAD_DIM, other=0.0).to(tl.float32)
    lost = outputs - weight[:, None] * value[None, :]
    store_mass(errors, tl.where(counted, tl.sum(lost * lost, 1), 0.0), tile_q, block, groups_q, blocks_k, BLOCK_M, GROUP_M)


@triton.jit(
    do_not_specialize=[
        "heads", "length_q", "length_k", "lse_length", "groups_q", "blocks_k",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_bias",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_full", "stride_k_choice_b", "stride_k_choice_h",
    ]
)
def block_errors_kernel(
    q, k, v, lse, pooled_keys, pooled_values, log_size, errors, key_bias, q_order, q_choice, k_order, full_tiles, k_choice,
    scale, heads, length_q, length_k, lse_length, groups_q, blocks_k,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_bias: tl.int64,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_full: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    TILES_K: tl.constexpr, POOLED_N: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row of tiles of errors [B, H, groups_q, blocks_k]. lse, pooled_keys, pooled_values, log_size: contiguous. scale: > 0, times log2(e).

    TILES_K: tiles of keys in a block. HAS_BIAS comes with HAS_K_ORDER: orders of visible keys alone, and a bias by position for each.
    """
    tile_q = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_Q_ORDER:
        q_order += chosen_order(q_choice, batch, head, stride_q_choice_b, stride_q_choice_h) * stride_q_order
    if HAS_K_ORDER:
        chosen = chosen_order(k_choice, batch, head, stride_k_choice_b, stride_k_choice_h)
        k_order += chosen * stride_k_order
        full_tiles += chosen * stride_full
        if HAS_BIAS:
            key_bias += chosen * stride_bias
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    number = tl.program_id(1).to(tl.int64)
    pooled_keys += number * blocks_k * HEAD_DIM
    pooled_values += number * blocks_k * HEAD_DIM
    log_size += number * blocks_k
    errors += number * groups_q * blocks_k
    # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]
    queries, query_rows, query_present = query_tile(
        q, q_order, tile_q, batch, head, length_q, stride_q_b, stride_q_h, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_Q_ORDER, ALIGNED
    )
    counted, row_lse = base_2_lse(lse + (batch * heads + head) * lse_length, query_rows, query_present)
    # [BLOCK_M, POOLED_N]
    pooled_weights = tl.zeros([BLOCK_M, POOLED_N], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_K_ORDER:
        next_rows, next_full = ordered_keys(0, length_k, k_order, full_tiles, BLOCK_N)
    for tile_k in tl.range(0, blocks_k * TILES_K):
        # [BLOCK_N]
        if HAS_K_ORDER:
            key_rows = next_rows
            key_present = key_rows >= 0
            full = next_full != 0
            next_rows, next_full = ordered_keys(tile_k + 1, length_k, k_order, full_tiles, BLOCK_N)
        else:
            key_rows, key_present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, None, False)
            full = (tile_k + 1) * BLOCK_N <= length_k
        block = tile_k // TILES_K
        if tile_k % (TILES_K * POOLED_N) == 0:
            numbers = block + tl.arange(0, POOLED_N)
            sizes = tl.load(log_size + numbers, mask=numbers < blocks_k, other=float("-inf")) * LOG2E_DEVICE
            tile = load_rows(pooled_keys, numbers, numbers < blocks_k, HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
            pooled_scores = tl.dot(queries, tl.trans(tile), input_precision="ieee") * scale + sizes[None, :]
            pooled_weights = tl.math.exp2(pooled_scores - row_lse[:, None])
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, key_present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale - row_lse[:, None]
        if HAS_BIAS:
            scores += tl.load(key_bias + tile_k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        elif not full:
            if not HAS_K_ORDER:
                tl.load(k, volatile=True)  # what cannot be moved keeps this a branch
            _, present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, HAS_K_ORDER)
            scores = tl.where(present[None, :], scores, float("-inf"))
        weights = tl.math.exp2(scores)
        # [BLOCK_N, BLOCK_D]
        values = load_rows(v, key_rows, key_present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
        if TILES_K == 1:  # noqa: SIM114  (known at compile time, and leaves no branch)
            store_errors(
                errors, accumulator, pooled_weights, pooled_values, counted, tile_q, block, groups_q, blocks_k, HEAD_DIM, BLOCK_D, BLOCK_M, GROUP_M
            )
            accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        elif tile_k % TILES_K == TILES_K - 1:
            store_errors(
                errors, accumulator, pooled_weights, pooled_values, counted, tile_q, block, groups_q, blocks_k, HEAD_DIM, BLOCK_D, BLOCK_M, GROUP_M
            )
            accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


def _visible_order(order: TokenOrder | None, key_bias: Tensor, length: int, heads: int) -> TokenOrder:
    """The orders of each batch entry's visible keys: those that the bias masks out are padding, so that what lies there is not read."""
    batch, seq = key_bias.shape
    rows = block_rows(order, seq, length, key_bias.device)[:, 0]  # [O, P]
    hidden = (torch.nn.functional.pad(key_bias, (0, 1)) == -torch.inf)[:, rows.long()]  # [B, O, P]
    choice = torch.zeros(1, 1, dtype=torch.int64, device=rows.device) if order is None else order.head_order.long()
    first = torch.arange(0, batch * len(rows), len(rows), device=rows.device)[:, None]
    return TokenOrder(torch.where(hidden, -1, rows).flatten(0, 1), choice.expand(batch, heads) + first)


def block_errors(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, pooled: PooledBlocks, q_order: TokenOrder | None,
    k_order: TokenOrder | None, scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.block_errors`, which refuses blocks that are no multiples of 16."""
    batch, heads, seq_q, head_dim = q.shape
    q, scale = positive_scale(q, scale)
    length_q, length_k = (seq_q if q_order is None else q_order.length), (k.shape[2] if k_order is None else k_order.length)
    config = block_errors_config(q.element_size(), head_dim, architecture(q.device), 128, mass_tile(block_k))
    group = min(mass_tile(block_q), config.block_m)
    shape = num_blocks(length_q, group), num_blocks(length_k, block_k)
    errors = torch.empty(batch, heads, *shape, dtype=torch.float32, device=q.device)
    bias = None
    if key_bias is not None:
        bias = bias_by_position(key_bias, k_order, shape[1] * block_k).flatten(0, 1)
        k_order = _visible_order(k_order, key_bias, length_k, heads)
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_tables, k_order_strides = key_order_arguments(k_order, batch, heads, config.block_n)
    with on_device(q):
        block_errors_kernel[num_blocks(length_q, config.block_m), batch * heads](
            q, k, v, lse.contiguous(), pooled.keys.contiguous(), pooled.values.contiguous(), pooled.log_size.contiguous(), errors,
            bias, q_table, q_choice, *k_tables,
            scale, heads, length_q, length_k, seq_q, *shape,
            *q.stride(), *k.stride(), *v.stride(), 0 if bias is None else bias.stride(0), *q_order_strides, *k_order_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=group,
            TILES_K=block_k // config.block_n, POOLED_N=_POOLED_N,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, HAS_BIAS=key_bias is not None,
            ALIGNED=heads_aligned(q, k, v), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return sum_tiles(errors, block_q // group, 1)
