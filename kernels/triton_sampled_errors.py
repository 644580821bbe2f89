"""What candidate plans would cost on sampled rows, in Triton (SVG, algorithm 1; arXiv 2502.01776).

One program takes a tile of the sampled rows of one head and one chunk of the keys. It loads each tile of K and V once,
computes its scores once, and takes them into a running softmax of dense attention and of each candidate: one pass over K
and V for all of them, in tensor order whatever the plans' orders. Chunks are there because so few rows do not fill a GPU.

Each variant has a running maximum of its own. Dense attention's would bound them all and spare an exponential a score and
candidate, but weights under a foreign maximum lose their digits once a candidate's keys lie far below it: in float16 from
2^-14 on, in float32 to the last at 2^-126. Then a candidate that keeps only such keys would give 0 or noise.

Which rows of a tile see a key is one word, a bit for each row. Small kernels write those words at each call, by key block and
from there by key row: looked up by block in the main loop, they would be a load behind a load, and the compiler would give K
and V fewer buffers for it.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import SparsePlan, TokenOrder, num_blocks
from .triton_config import architecture, heads_aligned, on_device, padded_head_dim, sampled_config
from .triton_forward import LOG2E_DEVICE, head_start, load_rows, normalise, online_softmax_step, positive_scale

# Programs in all that the keys are split for: a few for each multiprocessor of the largest GPUs.
_PROGRAMS = 768
# Key tiles that a chunk has at least, so that the merge stays small beside it.
_TILES_IN_CHUNK = 16
# Rows of a tile at most: the bits of a word.
_WORD = 64
# Positions, or entries of an index list, that a program of the small kernels takes at a time.
_TABLE_STEP = 1024
# Sampled rows that a program (one warp) of the merge takes.
_MERGED_ROWS = 4


@triton.jit(
    do_not_specialize=[
        "rows", "positions", "choice", "kv_num_blocks", "kv_indices",  # views may start anywhere, and nothing is gained by knowing
        "heads", "blocks_k", "block_q", "stride_position", "stride_choice_b", "stride_choice_h",
        "stride_count_b", "stride_count_h", "stride_count_q", "stride_index_b", "stride_index_h", "stride_index_q",
    ]
)
def words_by_block_kernel(
    rows, positions, choice, kv_num_blocks, kv_indices, by_block, heads, blocks_k, block_q,
    stride_position: tl.int64, stride_choice_b: tl.int64, stride_choice_h: tl.int64,
    stride_count_b: tl.int64, stride_count_h: tl.int64, stride_count_q: tl.int64,
    stride_index_b: tl.int64, stride_index_h: tl.int64, stride_index_q: tl.int64, stride_index_m,
    TILE: tl.constexpr, HAS_ORDER: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sets one sampled row's bit in the words of the key blocks that it sees. by_block: int64 [B, H, tiles, K], zeros at first."""
    sample = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    place = tl.load(rows + sample)
    if HAS_ORDER:
        table = tl.load(choice + batch * stride_choice_b + head * stride_choice_h).to(tl.int64)
        place = tl.load(positions + table * stride_position + place).to(tl.int64)
    # A row that the order leaves out has no block and sees nothing.
    held = place >= 0
    row_block = place // block_q
    count = tl.load(kv_num_blocks + batch * stride_count_b + head * stride_count_h + row_block * stride_count_q, mask=held, other=0)
    kv_indices += batch * stride_index_b + head * stride_index_h + row_block * stride_index_q
    by_block += (tl.program_id(1).to(tl.int64) * tl.cdiv(tl.num_programs(0), TILE) + sample // TILE) * blocks_k
    bits = tl.zeros([STEP], tl.int64) + (tl.full([1], 1, tl.int64) << (sample % TILE).to(tl.int64))
    # A row that keeps every block has no index list.
    full = count == blocks_k
    for start in tl.range(0, count, STEP):
        slots = start + tl.arange(0, STEP)
        listed = tl.load(kv_indices + slots.to(tl.int64) * stride_index_m, mask=(slots < count) & (full == 0), other=0)
        tl.atomic_or(by_block + tl.where(full, slots, listed), bits, mask=slots < count)


@triton.jit(
    do_not_specialize=[
        "order_rows", "choice", "heads", "length", "seq", "block",
        "stride_choice_b", "stride_choice_h", "stride_by_block_b", "stride_by_block_h",
    ]
)
def words_by_row_kernel(
    order_rows, choice, by_block, by_row, heads, length, seq, block,
    stride_choice_b: tl.int64, stride_choice_h: tl.int64, stride_by_block_b: tl.int64, stride_by_block_h: tl.int64,
    HAS_ORDER: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Each key row gets its block's word: by_block [B, H, tiles, K] -> by_row [B, H, tiles, seq], left as it is for rows outside the order."""
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    positions = tl.program_id(0) * STEP + tl.arange(0, STEP)
    if HAS_ORDER:
        order_rows += tl.load(choice + batch * stride_choice_b + head * stride_choice_h).to(tl.int64) * length
        rows = tl.load(order_rows + positions, mask=positions < length, other=-1)
    else:
        rows = tl.where(positions < length, positions, -1)
    by_block += batch * stride_by_block_b + head * stride_by_block_h + tile * tl.cdiv(length, block)
    by_row += (tl.program_id(2) * tl.num_programs(1).to(tl.int64) + tile) * seq
    tl.store(by_row + rows, tl.load(by_block + positions // block, mask=rows >= 0, other=0), mask=rows >= 0)


@triton.jit
def hide(scores, visible, key_rows, present, row_bits):
    """Minus infinity for the keys that a row of a candidate does not see. scores: [M, N]; row_bits: [M], a row's bit of a word."""
    words = tl.load(visible + key_rows, mask=present, other=0)
    return tl.where((words[None, :] & row_bits[:, None]) != 0, scores, float("-inf"))


@triton.jit
def store_variant(out, lse, running_max, running_sum, accumulator, virtual_rows, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One variant's output and LSE of one chunk."""
    result, row_lse = normalise(running_max, running_sum, accumulator)
    offsets_d = tl.arange(0, BLOCK_D)
    tl.store(out + virtual_rows[:, None] * HEAD_DIM + offsets_d[None, :], result, mask=real[:, None] & (offsets_d < HEAD_DIM)[None, :])
    tl.store(lse + virtual_rows, row_lse, mask=real)


@triton.jit(
    do_not_specialize=[
        "heads", "sampled", "seq_k", "keys_in_chunk",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_bias_b",
        "stride_first_b", "stride_first_h", "stride_second_b", "stride_second_h",
    ]
)
def sampled_attention_kernel(
    q, k, v, rows, out, lse, key_bias, scale, heads, sampled, seq_k, keys_in_chunk,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_bias_b: tl.int64, stride_bias_s,
    first, stride_first_b: tl.int64, stride_first_h: tl.int64, second, stride_second_b: tl.int64, stride_second_h: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CANDIDATES: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one chunk of keys, dense and for one or two candidates. scale: > 0, times log2(e).

    first, second: what each candidate shows, int64 [B, H, tiles, S_k], bit i for row i of the tile. out: [chunks, 1 + CANDIDATES,
    B, H, R, D] and lse: the same without D, float32 and contiguous; dense is variant 0.
    """
    tiles = tl.cdiv(sampled, BLOCK_M)
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    if HAS_BIAS:
        key_bias += batch * stride_bias_b
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    first += batch * stride_first_b + head * stride_first_h + tile.to(tl.int64) * seq_k
    second += batch * stride_second_b + head * stride_second_h + tile.to(tl.int64) * seq_k

    # [BLOCK_M]
    offsets_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = offsets_m < sampled
    row_bits = tl.full([BLOCK_M], 1, tl.int64) << tl.arange(0, BLOCK_M).to(tl.int64)
    query_rows = tl.load(rows + offsets_m, mask=real, other=0)
    # [BLOCK_M, BLOCK_D]
    queries = load_rows(q, query_rows, real, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)
    dense_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    dense_sum = tl.zeros([BLOCK_M], tl.float32)
    dense_accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_max, first_sum, first_accumulator = dense_max, dense_sum, dense_accumulator
    second_max, second_sum, second_accumulator = dense_max, dense_sum, dense_accumulator

    first_key = chunk * keys_in_chunk
    for start in tl.range(first_key, tl.minimum(first_key + keys_in_chunk, seq_k), BLOCK_N):
        # [BLOCK_N]
        key_rows = start + tl.arange(0, BLOCK_N)
        present = key_rows < seq_k
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        values = load_rows(v, key_rows, present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(key_bias + key_rows.to(tl.int64) * stride_bias_s, mask=present, other=0.0) * LOG2E_DEVICE
            scores = scores * scale + bias[None, :]
            remaining_scale = 1.0
        else:
            remaining_scale = scale
        dense = tl.where(present[None, :], scores, float("-inf"))
        dense_max, dense_sum, dense_accumulator = online_softmax_step(dense, remaining_scale, values, dense_max, dense_sum, dense_accumulator)
        seen = hide(scores, first, key_rows, present, row_bits)
        first_max, first_sum, first_accumulator = online_softmax_step(seen, remaining_scale, values, first_max, first_sum, first_accumulator)
        if CANDIDATES == 2:
            seen = hide(scores, second, key_rows, present, row_bits)
            second_max, second_sum, second_accumulator = online_softmax_step(
                seen, remaining_scale, values, second_max, second_sum, second_accumulator
            )

    variant_rows = tl.num_programs(1).to(tl.int64) * sampled
    virtual_rows = chunk * (1 + CANDIDATES) * variant_rows + tl.program_id(1).to(tl.int64) * sampled + offsets_m
    store_variant(out, lse, dense_max, dense_sum, dense_accumulator, virtual_rows, real, HEAD_DIM, BLOCK_D)
    store_variant(out, lse, first_max, first_sum, first_accumulator, virtual_rows + variant_rows, real, HEAD_DIM, BLOCK_D)
    if CANDIDATES == 2:
        store_variant(out, lse, second_max, second_sum, second_accumulator, virtual_rows + 2 * variant_rows, real, HEAD_DIM, BLOCK_D)


@triton.jit
def merge_chunks(out, lse, rows, real, chunks, stride_chunk, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Chunks' outputs of one variant in one softmax, by their LSE: [BLOCK_R, BLOCK_D]. stride_chunk: virtual rows, int64."""
    offsets_d = tl.arange(0, BLOCK_D)
    running_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_R], tl.float32)
    accumulator = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for _ in tl.range(0, chunks):
        chunk_lse = tl.load(lse + rows, mask=real, other=float("-inf")) * LOG2E_DEVICE
        result = tl.load(out + rows[:, None] * HEAD_DIM + offsets_d[None, :], mask=real[:, None] & (offsets_d < HEAD_DIM)[None, :], other=0.0)
        new_max = tl.maximum(running_max, chunk_lse)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.math.exp2(chunk_lse - finite_max)
        correction = tl.math.exp2(running_max - finite_max)
        running_sum = running_sum * correction + weight
        accumulator = accumulator * correction[:, None] + result * weight[:, None]
        running_max = new_max
        rows += stride_chunk
    return accumulator / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]


@triton.jit(do_not_specialize=["sampled", "chunks"])
def merged_errors_kernel(
    out, lse, errors, sampled, chunks, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Each sampled row's mean squared error over D: errors [CANDIDATES, B, H, R], out and lse as the kernel above writes them."""
    offsets_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = offsets_r < sampled
    rows = tl.program_id(1).to(tl.int64) * sampled + offsets_r
    variant_rows = tl.num_programs(1).to(tl.int64) * sampled
    stride_chunk = (1 + CANDIDATES) * variant_rows
    dense = merge_chunks(out, lse, rows, real, chunks, stride_chunk, HEAD_DIM, BLOCK_R, BLOCK_D)
    for candidate in tl.static_range(CANDIDATES):
        difference = merge_chunks(out, lse, rows + (candidate + 1) * variant_rows, real, chunks, stride_chunk, HEAD_DIM, BLOCK_R, BLOCK_D) - dense
        tl.store(errors + rows + candidate * variant_rows, tl.sum(difference * difference, 1) / HEAD_DIM, mask=real)


def _zeros(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """int64 zeros of these shapes, filled with one launch. Each starts at a multiple of 16 bytes, which kernels are specialised on."""
    pairs = [num_blocks(math.prod(shape), 2) for shape in shapes]
    parts = torch.zeros(sum(pairs), 2, dtype=torch.int64, device=device).split(pairs)
    return [part.view(-1)[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _heads_of(plan: SparsePlan, *orders: TokenOrder | None) -> tuple[int, int]:
    """B and H of what depends on the mask and on these orders; 1 where one holds for all."""
    shapes = [plan.mask.kv_num_blocks.shape, *(order.head_order.shape for order in orders if order is not None)]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _choice(order: TokenOrder | None, batch: int, heads: int) -> tuple[Tensor | None, tuple[int, int]]:
    """Which of an order's rows of a table each head uses, and its strides."""
    if order is None:
        return None, (0, 0)
    choice = order.head_order.expand(batch, heads)
    return choice, choice.stride()


def visible_words(candidates: list[SparsePlan], rows: Tensor, seq_q: int, seq_k: int, tile: int) -> list[Tensor]:
    """What each candidate shows to the sampled rows: int64 [B|1, H|1, tiles, S_k], a key's bit i for row i of a tile of `tile` rows.

    rows: [R] int64. One fill and two small kernels a candidate, and once for each query order its inverse; nothing waits for
    the device. A candidate whose heads share mask and orders takes 8 bytes a key and tile: 1 MB for 119,056 keys and 64 rows.
    """
    tiles = num_blocks(len(rows), tile)
    by_block = [(*_heads_of(plan, plan.q_order), tiles, plan.mask.num_k_blocks) for plan in candidates]
    by_row = [(*_heads_of(plan, plan.q_order, plan.k_order), tiles, seq_k) for plan in candidates]
    words = _zeros(by_block + by_row, rows.device)
    by_block, by_row = words[: len(candidates)], words[len(candidates) :]
    for plan, of_block, of_row in zip(candidates, by_block, by_row, strict=True):
        mask = plan.mask.expand(*of_block.shape[:2])
        positions = None if plan.q_order is None else plan.q_order.positions(seq_q)
        choice, choice_strides = _choice(plan.q_order, *of_block.shape[:2])
        words_by_block_kernel[len(rows), of_block.shape[0] * of_block.shape[1]](
            rows, positions, choice, mask.kv_num_blocks, mask.kv_indices, of_block, of_block.shape[1], mask.num_k_blocks, mask.block_q,
            0 if positions is None else positions.stride(0), *choice_strides, *mask.kv_num_blocks.stride(), *mask.kv_indices.stride(),
            TILE=tile, HAS_ORDER=positions is not None, STEP=_TABLE_STEP,
        )  # fmt: skip
        order_rows = None if plan.k_order is None else plan.k_order.rows.contiguous()
        choice, choice_strides = _choice(plan.k_order, *of_row.shape[:2])
        words_by_row_kernel[num_blocks(mask.seq_k, _TABLE_STEP), tiles, of_row.shape[0] * of_row.shape[1]](
            order_rows, choice, of_block, of_row, of_row.shape[1], mask.seq_k, seq_k, mask.block_k,
            *choice_strides, *of_block.expand(*of_row.shape[:2], -1, -1).stride()[:2], HAS_ORDER=order_rows is not None, STEP=_TABLE_STEP,
        )  # fmt: skip
    return by_row


def sampled_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, candidates: list[SparsePlan], scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.sampled_errors`. Two candidates share a pass over K and V; more take one pass for every two."""
    batch, heads, seq_q, head_dim = q.shape
    seq_k, rows = k.shape[2], rows.long().contiguous()
    q, scale = positive_scale(q, scale)
    config = sampled_config(q.element_size(), head_dim, architecture(q.device), min(_WORD, max(16, triton.next_power_of_2(len(rows)))))
    tiles = num_blocks(len(rows), config.block_m)
    wanted = num_blocks(_PROGRAMS, tiles * batch * heads)
    keys_in_chunk = max(num_blocks(num_blocks(seq_k, config.block_n), wanted), _TILES_IN_CHUNK) * config.block_n
    chunks = num_blocks(seq_k, keys_in_chunk)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    errors = []
    with on_device(q):
        words = [each.expand(batch, heads, -1, -1) for each in visible_words(candidates, rows, seq_q, seq_k, config.block_m)]
        for first in range(0, len(candidates), 2):
            here = words[first : first + 2]
            outputs = torch.empty(chunks, 1 + len(here), batch, heads, len(rows), head_dim, dtype=torch.float32, device=q.device)
            lse = torch.empty(outputs.shape[:-1], dtype=torch.float32, device=q.device)
            errors.append(torch.empty(outputs.shape[1] - 1, *lse.shape[2:], dtype=torch.float32, device=q.device))
            sampled_attention_kernel[chunks * tiles, batch * heads](
                q, k, v, rows, outputs, lse, key_bias, scale, heads, len(rows), seq_k, keys_in_chunk,
                *q.stride(), *k.stride(), *v.stride(), *((0, 0) if key_bias is None else key_bias.stride()),
                here[0], *here[0].stride()[:2], here[-1], *here[-1].stride()[:2],
                **sizes, BLOCK_M=config.block_m, BLOCK_N=config.block_n, CANDIDATES=len(here), HAS_BIAS=key_bias is not None,
                ALIGNED=heads_aligned(q, k, v), num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            merged_errors_kernel[num_blocks(len(rows), _MERGED_ROWS), batch * heads](
                outputs, lse, errors[-1], len(rows), chunks, **sizes, BLOCK_R=_MERGED_ROWS, CANDIDATES=len(here), num_warps=1,
            )  # fmt: skip
    return (errors[0] if len(errors) == 1 else torch.cat(errors)).mean(-1)
