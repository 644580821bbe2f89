"""Block-sparse and dense attention in Triton.

One program takes a tile of BLOCK_M query positions of one head and walks the key tiles of its query block: those of
the mask's index list, or all of them with DENSE and for a block that keeps every key. The softmax is online and in base
2. Query tiles are the fastest dimension of the grid and heads the slowest, so that the programs in flight share one
head's K and V in the L2 cache. Orders are read inside: a tile's rows come from the order's table, and q, k and v are
never permuted or copied.

What says where a tile's keys lie is loaded an iteration ahead, by hand: Triton's pipeliner loads K and V ahead, but would
spend a stage on every load that their addresses wait for, and wait for the last one in full. Tiles whose keys are all
there take no mask: a flag a tile says which, from `TokenOrder.full_blocks` where there is an order.

HAS_MASS gathers the block masses of AdaSpa's search (arXiv 2502.21079, equation 13) on the way: with m the maximum so far,
a row's mass in a tile is the sum of its weights, exp2(score - m), times exp2(m - lse): one more exponential a row, none a score.

With HAS_POOLED the online softmax starts from the blocks that the row leaves out, each as one key (`start_from_pooled`): q is read
once, and nothing is rounded that the main loop would not round.

Nothing is specialised on a sequence length, a count or the stride of a batch or head: another resolution compiles nothing.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask, PooledBlocks, TokenOrder, num_blocks
from .triton_config import LOG2E, architecture, forward_config, heads_aligned, on_device, one_pass_config, padded_head_dim, pooled_config

LOG2E_DEVICE = tl.constexpr(LOG2E)


@triton.jit
def head_start(tensor, batch, head, stride_b, stride_h, ALIGNED: tl.constexpr):
    """A pointer to one head of a [B, H, S, D] tensor. batch, head: int64."""
    start = tensor + batch * stride_b + head * stride_h
    if ALIGNED:
        # The strides are not specialised, so the compiler must be told what the host has checked.
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def block_row_numbers(positions, length, table, HAS_ORDER: tl.constexpr):
    """The tensor row at each position and whether there is one. length: positions in all."""
    if HAS_ORDER:
        rows = tl.load(table + positions, mask=positions < length, other=-1)
        present = rows >= 0
    else:
        rows = positions
        present = positions < length
    return rows, present


@triton.jit
def load_rows(start, rows, present, stride_s, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zeros where none is present: [rows, BLOCK_D]."""
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = start + rows.to(tl.int64)[:, None] * stride_s + offsets_d.to(tl.int64)[None, :] * stride_d
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=present[:, None] & (offsets_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def chosen_order(choice, batch, head, stride_b, stride_h):
    """Which of the orders a head uses, int64."""
    return tl.load(choice + batch * stride_b + head * stride_h).to(tl.int64)


@triton.jit
def query_tile(
    q, q_order, tile_q, batch, head, length_q, stride_q_b, stride_q_h, stride_q_s, stride_q_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_Q_ORDER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A tile of queries [BLOCK_M, BLOCK_D], the tensor row of each [BLOCK_M] and whether there is one."""
    rows, present = block_row_numbers(tile_q * BLOCK_M + tl.arange(0, BLOCK_M), length_q, q_order, HAS_Q_ORDER)
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)
    return load_rows(q, rows, present, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D), rows, present


@triton.jit
def ordered_keys(tile_k, length_k, k_order, full_tiles, BLOCK_N: tl.constexpr):
    """The tensor rows of a tile's keys [BLOCK_N], -1 where there is none, and whether all are there. A tile past the end has none."""
    rows, _ = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, True)
    return rows, tl.load(full_tiles + tile_k, mask=tile_k * BLOCK_N < length_k, other=0).to(tl.int32)


@triton.jit
def tile_of_step(step, steps, listed, kv_indices, stride_index_m, TILES_K: tl.constexpr, DENSE: tl.constexpr):
    """The key tile of a step: where `listed` that of the index list, else the tiles one after the other. Past the end, any that may be asked for."""
    if DENSE:
        tile_k = step
    else:
        block = tl.load(kv_indices + (step // TILES_K) * stride_index_m, mask=listed & (step < steps), other=0)
        tile_k = tl.where(listed, block * TILES_K + step % TILES_K, step)
    return tile_k


@triton.jit
def base_2_lse(lse, rows, present):
    """Which rows have a mass, and their LSE in base 2. A row that saw no key has none, and neither has padding: their LSE is made finite."""
    row_lse = tl.load(lse + rows, mask=present, other=float("-inf"))
    counted = row_lse != float("-inf")
    return counted, tl.where(counted, row_lse, 0.0) * LOG2E_DEVICE


@triton.jit
def store_mass(mass, row_mass, tile_q, tile_k, groups_q, tiles_k, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Sums row_mass [BLOCK_M] over each group of GROUP_M rows and writes a column of one head's mass [groups_q, tiles_k]."""
    # As a matrix, even of one row: Triton 3.7 cannot reduce a vector to a number on sm_100 (TritonNvidiaGPUOptimizeTMemLayouts fails).
    sums = tl.sum(tl.reshape(row_mass, [BLOCK_M // GROUP_M, GROUP_M]), 1)
    groups = tile_q * (BLOCK_M // GROUP_M) + tl.arange(0, BLOCK_M // GROUP_M)
    tl.store(mass + groups.to(tl.int64) * tiles_k + tile_k, sums, mask=groups < groups_q)


@triton.jit
def softmax_weights(scores, scale, tile_max, running_max):
    """The weights exp2(scores * scale - maximum) [M, N], scale > 0, the new maximum [M] and what it makes of earlier weights."""
    new_max = tl.maximum(running_max, tile_max)
    # A row that has seen no key yet stays at minus infinity: 0 in its place keeps (-inf) - (-inf) out of the exponents.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, tl.math.exp2(scores * scale - finite_max[:, None]), tl.math.exp2(running_max - finite_max)


@triton.jit
def online_softmax_step(scores, scale, v, running_max, running_sum, accumulator):
    """Takes one tile of keys into the softmax. scores [M, N] are scaled here; scale > 0, and times log2(e)."""
    new_max, weights, correction = softmax_weights(scores, scale, tl.max(scores, 1) * scale, running_max)
    running_sum = running_sum * correction + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision="ieee")
    return new_max, running_sum, accumulator


@triton.jit
def start_from_pooled(
    queries, keys, values, log_size, kept, columns, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The maximum, sum and accumulator of the online softmax after the pooled keys that a row of blocks does not keep.

    keys, values: one head's [columns, HEAD_DIM]. log_size: [columns]. kept: [columns], 1 for a block that is kept. No column: an empty start.
    """
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, columns, BLOCK_N, num_stages=STAGES):
        numbers = first + tl.arange(0, BLOCK_N)
        inside = numbers < columns
        skipped = tl.load(kept + numbers, mask=inside, other=1) == 0
        sizes = tl.load(log_size + numbers, mask=skipped, other=float("-inf")) * LOG2E_DEVICE
        tile = load_rows(keys, numbers, inside, HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(tile), input_precision="ieee") * scale + sizes[None, :]
        tile = load_rows(values, numbers, inside, HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
        running_max, running_sum, accumulator = online_softmax_step(scores, 1.0, tile, running_max, running_sum, accumulator)
    return running_max, running_sum, accumulator


@triton.jit
def normalise(running_max, running_sum, accumulator):
    """Output [M, D] and natural LSE [M]. A row without a visible key has the sum 0: it gives 0 and minus infinity."""
    empty = running_sum == 0.0
    divisor = tl.where(empty, 1.0, running_sum)
    lse = tl.where(empty, float("-inf"), (running_max + tl.math.log2(divisor)) / LOG2E_DEVICE)
    return accumulator * (1.0 / divisor)[:, None], lse


@triton.jit(
    do_not_specialize=[
        "heads", "length_q", "length_k", "lse_length", "groups_q", "tiles_k",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_out_b", "stride_out_h",
        "stride_bias_b", "stride_count_b", "stride_count_h", "stride_count_q", "stride_index_b", "stride_index_h", "stride_index_q",
        "stride_q_order", "stride_q_choice_b", "stride_q_choice_h", "stride_k_order", "stride_full", "stride_k_choice_b", "stride_k_choice_h",
        "stride_kept_b", "stride_kept_h", "stride_kept_q",
    ]
)
def forward_kernel(
    q, k, v, out, lse, key_bias, kv_num_blocks, kv_indices, old_lse, mass, q_order, q_choice, k_order, full_tiles, k_choice,
    pooled_keys, pooled_values, log_size, kept,
    scale, heads, length_q, length_k, lse_length, groups_q, tiles_k,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_out_b: tl.int64, stride_out_h: tl.int64, stride_out_s, stride_out_d,
    stride_bias_b: tl.int64,
    stride_count_b: tl.int64, stride_count_h: tl.int64, stride_count_q: tl.int64,
    stride_index_b: tl.int64, stride_index_h: tl.int64, stride_index_q: tl.int64, stride_index_m,
    stride_q_order: tl.int64, stride_q_choice_b: tl.int64, stride_q_choice_h: tl.int64,
    stride_k_order: tl.int64, stride_full: tl.int64, stride_k_choice_b: tl.int64, stride_k_choice_h: tl.int64,
    stride_kept_b: tl.int64, stride_kept_h: tl.int64, stride_kept_q: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    TILES_Q: tl.constexpr, TILES_K: tl.constexpr, DENSE: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_POOLED: tl.constexpr, POOLED_N: tl.constexpr, POOLED_STAGES: tl.constexpr, V_EARLY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of queries. TILES_Q, TILES_K: tiles in a block of the mask. scale: > 0, times log2(e).

    With HAS_POOLED (and not DENSE): pooled_keys, pooled_values [B, H, K, HEAD_DIM] and log_size [B, H, K], contiguous; kept [B, H, Q, K], 0 or 1.

    lse, old_lse: [B, H, lse_length]. With HAS_MASS (and DENSE): mass [B, H, groups_q, tiles_k], a number for GROUP_M positions by a tile of keys.
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
        key_bias += batch * stride_bias_b + 1
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    # [BLOCK_M, BLOCK_D], [BLOCK_M], [BLOCK_M]
    queries, query_rows, query_present = query_tile(
        q, q_order, tile_q, batch, head, length_q, stride_q_b, stride_q_h, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_Q_ORDER, ALIGNED
    )
    if HAS_MASS:
        mass += tl.program_id(1).to(tl.int64) * groups_q * tiles_k
        counted, old_lse_2 = base_2_lse(old_lse + (batch * heads + head) * lse_length, query_rows, query_present)
    if DENSE:
        steps = tl.cdiv(length_k, BLOCK_N)
        listed = False
    else:
        block_q = (tile_q // TILES_Q).to(tl.int64)
        kv_indices += batch * stride_index_b + head * stride_index_h + block_q * stride_index_q
        steps = tl.load(kv_num_blocks + batch * stride_count_b + head * stride_count_h + block_q * stride_count_q) * TILES_K
        listed = steps != tl.cdiv(length_k, BLOCK_N * TILES_K) * TILES_K
    if HAS_POOLED:
        columns = tl.cdiv(length_k, BLOCK_N * TILES_K)
        number = tl.program_id(1).to(tl.int64) * columns
        kept += batch * stride_kept_b + head * stride_kept_h + block_q * stride_kept_q
        running_max, running_sum, accumulator = start_from_pooled(
            queries, pooled_keys + number * HEAD_DIM, pooled_values + number * HEAD_DIM, log_size + number, kept,
            tl.where(listed, columns, 0), scale, HEAD_DIM, BLOCK_D, BLOCK_M, POOLED_N, POOLED_STAGES,
        )  # fmt: skip
    else:
        running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        running_sum = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    next_tile = tile_of_step(0, steps, listed, kv_indices, stride_index_m, TILES_K, DENSE)
    if HAS_K_ORDER:
        next_rows, next_full = ordered_keys(next_tile, length_k, k_order, full_tiles, BLOCK_N)
        next_tile = tile_of_step(1, steps, listed, kv_indices, stride_index_m, TILES_K, DENSE)
    for step in tl.range(0, steps):
        if HAS_K_ORDER:
            # The rows of the next tile, whose number was loaded an iteration ago: two loads ahead of K and V, one of each.
            key_rows = next_rows
            key_present = key_rows >= 0
            full = next_full != 0
            next_rows, next_full = ordered_keys(next_tile, length_k, k_order, full_tiles, BLOCK_N)
            next_tile = tile_of_step(step + 2, steps, listed, kv_indices, stride_index_m, TILES_K, DENSE)
        else:
            tile_k = next_tile
            key_rows, key_present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, None, False)
            full = (tile_k + 1) * BLOCK_N <= length_k
            next_tile = tile_of_step(step + 1, steps, listed, kv_indices, stride_index_m, TILES_K, DENSE)
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, key_present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        if V_EARLY:  # where nothing is loaded ahead, K and V at least wait together
            values = load_rows(v, key_rows, key_present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if HAS_BIAS:
            # The bias keeps out what is no key: see `padded_bias`.
            scores = scores * scale + tl.load(key_bias + key_rows)[None, :]
            running_max, weights, correction = softmax_weights(scores, 1.0, tl.max(scores, 1), running_max)
        else:
            # Between the two products the scores may only pass through what takes them tile by tile: with the maximum of the
            # branch apart, QK and PV keep one layout, and on mma.sync the weights do not go through shared memory.
            tile_max = tl.max(scores, 1) * scale
            visible_max = tile_max
            if not full:
                if HAS_K_ORDER:
                    tile_k = tile_of_step(step, steps, listed, kv_indices, stride_index_m, TILES_K, DENSE)
                else:
                    tl.load(k, volatile=True)  # what cannot be moved keeps this a branch: as a select, every tile would pay for it
                _, present = block_row_numbers(tile_k * BLOCK_N + tl.arange(0, BLOCK_N), length_k, k_order, HAS_K_ORDER)
                scores = tl.where(present[None, :], scores, float("-inf"))
                visible_max = tl.max(scores, 1) * scale
            tile_max = tl.where(full, tile_max, visible_max)
            running_max, weights, correction = softmax_weights(scores, scale, tile_max, running_max)
        tile_sum = tl.sum(weights, 1)
        running_sum = running_sum * correction + tile_sum
        if HAS_MASS:
            # A sum of 0 stays 0, however far the maximum lies above the old LSE: 0 times infinity is kept out.
            row_mass = tl.where(counted & (tile_sum != 0.0), tile_sum * tl.math.exp2(running_max - old_lse_2), 0.0)
            store_mass(mass, row_mass, tile_q, step, groups_q, tiles_k, BLOCK_M, GROUP_M)
        if not V_EARLY:
            values = load_rows(v, key_rows, key_present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator * correction[:, None], input_precision="ieee")

    result, row_lse = normalise(running_max, running_sum, accumulator)
    if HAS_Q_ORDER:
        # Read anew: kept from above they would take registers through the loop.
        positions = tile_q * BLOCK_M + tl.arange(0, BLOCK_M)
        query_rows = tl.load(q_order + positions, mask=positions < length_q, other=-1, volatile=True)
        query_present = query_rows >= 0
    offsets_d = tl.arange(0, BLOCK_D)
    pointers = head_start(out, batch, head, stride_out_b, stride_out_h, ALIGNED) + query_rows.to(tl.int64)[:, None] * stride_out_s
    pointers += offsets_d[None, :] * stride_out_d
    tl.store(pointers, result.to(out.dtype.element_ty), mask=query_present[:, None] & (offsets_d < HEAD_DIM)[None, :])
    if HAS_LSE:
        tl.store(lse + (batch * heads + head) * lse_length + query_rows, row_lse, mask=query_present)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take a row's maximum before they scale it, which is right for a scale above 0 alone: its sign goes to q."""
    return (-q if scale < 0 else q), max(abs(scale), 1e-30) * LOG2E


def order_arguments(order: TokenOrder | None, batch: int, heads: int) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """The table of an order, each head's choice of a row of it, and the strides (order, choice over B, choice over H)."""
    if order is None:
        return None, None, (0, 0, 0)
    table = order.rows.contiguous()
    choice = order.head_order.expand(batch, heads)
    return table, choice, (table.stride(0), *choice.stride())


def key_order_arguments(order: TokenOrder | None, batch: int, heads: int, block_n: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """As `order_arguments` for a key order: the tables of rows and of full tiles and each head's choice, and their strides in that order."""
    table, choice, strides = order_arguments(order, batch, heads)
    if order is None:
        return (None, None, None), (0, 0, 0, 0)
    full_tiles = order.full_blocks(block_n).view(torch.uint8)
    return (table, full_tiles, choice), (strides[0], full_tiles.stride(0), *strides[1:])


def padded_bias(key_bias: Tensor, block_k: int) -> Tensor:
    """A key bias [B, S_k] for base 2, with minus infinity before the first key and for a block after the last: [B, 1 + S_k + block_k].

    So a place that holds no key, row -1 or past the end, reads the bias that keeps it out, and no tile needs a mask. All tiles of
    the last block are read, also those that begin past the end.
    """
    return torch.nn.functional.pad(key_bias * LOG2E, (1, block_k), value=-torch.inf)


@dataclass(frozen=True)
class _Pooled:
    """Blocks as one key each, and the mask that says which of them a row of blocks keeps and so does not see as one key."""

    blocks: PooledBlocks
    mask: BlockMask

    def arguments(self, batch: int, heads: int) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        """Pooled keys, values and log_size, the map of kept blocks as bytes [B, H, Q, K], and that map's strides but the last."""
        kept = self.mask.to_blocks().view(torch.uint8).expand(batch, heads, -1, -1)
        return (self.blocks.keys.contiguous(), self.blocks.values.contiguous(), self.blocks.log_size.contiguous(), kept), kept.stride()[:3]


def mass_tile(block: int) -> int:
    """The largest tile, at most 128, that `block` is a multiple of. The public ops refuse blocks below the 16 of a matrix instruction."""
    return min(block & -block, 128)


def sum_tiles(tiles: Tensor, split_q: int, split_k: int) -> Tensor:
    """Mass of tiles [B, H, Q tiles, K tiles] to that of blocks, split_q by split_k tiles each: [B, H, Q, K]."""
    if split_q == split_k == 1:
        return tiles
    spare_q, spare_k = -tiles.shape[2] % split_q, -tiles.shape[3] % split_k
    if spare_q or spare_k:
        tiles = torch.nn.functional.pad(tiles, (0, spare_k, 0, spare_q))
    return tiles.unflatten(3, (-1, split_k)).unflatten(2, (-1, split_q)).sum((3, 5))


@dataclass(frozen=True)
class _Mass:
    """What the block mass is gathered for: an LSE [B, H, S_q], and the wanted blocks."""

    lse: Tensor
    block_q: int
    block_k: int


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, has_lse: bool, wanted: _Mass | None = None, pooled: _Pooled | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs the kernel over a mask, or dense without one. Returns out, and lse and mass where they are asked for."""
    batch, heads, seq_q, head_dim = q.shape
    q, scale = positive_scale(q, scale)
    out = torch.empty(batch, seq_q, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device) if has_lse else None
    pooled_tables, kept_strides = ((None,) * 4, (0, 0, 0)) if pooled is None else pooled.arguments(batch, heads)
    if mask is None:
        blocks = 128, 64 if wanted is None else mass_tile(wanted.block_k)
        lengths = seq_q if q_order is None else q_order.length, k.shape[2] if k_order is None else k_order.length
        counts, indices, mask_strides = None, None, (0,) * 7
    else:
        mask = mask.expand(batch, heads)
        blocks, lengths = (mask.block_q, mask.block_k), (mask.seq_q, mask.seq_k)
        counts, indices = mask.kv_num_blocks, mask.kv_indices
        mask_strides = *counts.stride(), *indices.stride()
    choose = forward_config if wanted is None else one_pass_config
    config = choose(q.element_size(), head_dim, architecture(q.device), *blocks)
    old_lse, mass, group, mass_shape = None, None, config.block_m, (0, 0)
    if wanted is not None:
        group = min(mass_tile(wanted.block_q), config.block_m)
        mass_shape = num_blocks(lengths[0], group), num_blocks(lengths[1], config.block_n)
        old_lse, mass = wanted.lse.contiguous(), torch.empty(batch, heads, *mass_shape, dtype=torch.float32, device=q.device)
    q_table, q_choice, q_order_strides = order_arguments(q_order, batch, heads)
    k_tables, k_order_strides = key_order_arguments(k_order, batch, heads, config.block_n)
    bias = None if key_bias is None else padded_bias(key_bias, blocks[1])
    with on_device(q):
        forward_kernel[num_blocks(lengths[0], config.block_m), batch * heads](
            q, k, v, out, lse, bias, counts, indices, old_lse, mass, q_table, q_choice, *k_tables, *pooled_tables,
            scale, heads, *lengths, seq_q, *mass_shape,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), 0 if bias is None else bias.stride(0),
            *mask_strides, *q_order_strides, *k_order_strides, *kept_strides,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=group,
            TILES_Q=blocks[0] // config.block_m, TILES_K=blocks[1] // config.block_n, DENSE=mask is None,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, HAS_BIAS=key_bias is not None,
            HAS_LSE=has_lse, HAS_MASS=wanted is not None, HAS_POOLED=pooled is not None, **pooled_config(config),
            V_EARLY=config.num_stages == 1, ALIGNED=heads_aligned(q, k, v, out),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if wanted is not None:
        mass = sum_tiles(mass, wanted.block_q // group, wanted.block_k // config.block_n)
    return out, lse, mass


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None, return_lse: bool = False, pooled: PooledBlocks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.block_sparse_attention`. Returns out and, where asked for, lse."""
    more = None if pooled is None else _Pooled(pooled, mask)
    return _launch(q, k, v, mask, q_order, k_order, scale, key_bias, return_lse, pooled=more)[:2]


def pooled_alone(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, q_order: TokenOrder | None, scale: float, pooled: PooledBlocks,
) -> tuple[Tensor, Tensor]:
    """Attention to the blocks that each row does not keep, as one key each, and to nothing else: out and lse."""
    nothing = replace(mask, kv_num_blocks=torch.zeros_like(mask.kv_num_blocks))
    return _launch(q, k, v, nothing, q_order, None, scale, None, True, pooled=_Pooled(pooled, mask))[:2]


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `kernels.attention_with_lse`."""
    return _launch(q, k, v, None, None, None, scale, key_bias, True)[:2]


def attention_with_mass(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, block_q: int, block_k: int, q_order: TokenOrder | None, k_order: TokenOrder | None,
    scale: float, key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.attention_with_mass`, which refuses blocks that are no multiples of 16."""
    return _launch(q, k, v, None, q_order, k_order, scale, key_bias, True, _Mass(lse, block_q, block_k))
