"""What candidate plans would cost on sampled rows, in Triton (SVG, algorithm 1; arXiv 2502.01776).

Dense attention and each candidate are variants of the same sampled rows: (1 + C) x R virtual rows, each with its own
running softmax. One program takes a tile of one variant's rows of one head and one chunk of the keys; programs that
differ in the variant alone are neighbours in the grid, so K and V come from memory once for all of them. Keys are
walked in tensor order whatever the plans' orders: which rows of a tile see a key is one word, a bit for each row, looked
up in a small table by the key's block. Chunks are there because so few rows do not fill a GPU; their results are merged
by LSE.
"""
# ruff: noqa: N803  (Triton writes what it knows at compile time in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import SparsePlan, TokenOrder, num_blocks
from .triton_config import architecture, forward_config, heads_aligned, on_device, padded_head_dim
from .triton_forward import LOG2E_DEVICE, head_start, load_rows, normalise, online_softmax_step, positive_scale

# Programs in all that the keys are split for: a few for each multiprocessor of the largest GPUs.
_PROGRAMS = 1024
# Key tiles that a chunk has at least, so that the merge stays small beside it.
_TILES_IN_CHUNK = 16


@triton.jit(
    do_not_specialize=[
        "heads", "sampled", "seq_k", "keys_in_chunk",
        "stride_q_b", "stride_q_h", "stride_k_b", "stride_k_h", "stride_v_b", "stride_v_h", "stride_bias_b",
        "stride_visible_c", "stride_visible_b", "stride_visible_h", "stride_visible_tile",
    ]
)
def sampled_attention_kernel(
    q, k, v, rows, visible, key_block_of_row, key_table, out, lse, key_bias,
    scale, heads, sampled, seq_k, keys_in_chunk,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_s, stride_q_d,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s, stride_k_d,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s, stride_v_d,
    stride_bias_b: tl.int64, stride_bias_s,
    stride_visible_c: tl.int64, stride_visible_b: tl.int64, stride_visible_h: tl.int64, stride_visible_tile: tl.int64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one variant over one chunk of keys. Variant 0 is dense; variant c + 1 is candidate c.

    visible: int64 [C, B|1, H|1, tiles, K], bit i for row i of the tile. key_block_of_row: int32 [tables, S_k], -1 for a key
    that an order leaves out. key_table: int32 [C, B, H], which of those tables a head uses. out: [chunks, 1 + C, B, H, R, D]
    and lse: [chunks, 1 + C, B, H, R], float32.
    """
    variants = tl.num_programs(0)
    variant = tl.program_id(0)
    chunk = tl.program_id(1) // tl.cdiv(sampled, BLOCK_M)
    tile = tl.program_id(1) % tl.cdiv(sampled, BLOCK_M)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    candidate = tl.maximum(variant - 1, 0).to(tl.int64)
    if HAS_BIAS:
        key_bias += batch * stride_bias_b
    q = head_start(q, batch, head, stride_q_b, stride_q_h, ALIGNED)
    k = head_start(k, batch, head, stride_k_b, stride_k_h, ALIGNED)
    v = head_start(v, batch, head, stride_v_b, stride_v_h, ALIGNED)
    table = tl.load(key_table + candidate * tl.num_programs(2) + tl.program_id(2), mask=variant > 0, other=0)
    key_block_of_row += table.to(tl.int64) * seq_k

    # [BLOCK_M]
    bits = tl.arange(0, BLOCK_M)
    offsets_m = tile * BLOCK_M + bits
    real = offsets_m < sampled
    query_rows = tl.load(rows + offsets_m, mask=real, other=0)
    visible += candidate * stride_visible_c + batch * stride_visible_b + head * stride_visible_h + tile * stride_visible_tile
    # [BLOCK_M, BLOCK_D]
    queries = load_rows(q, query_rows, real, stride_q_s, stride_q_d, HEAD_DIM, BLOCK_D)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    first_key = chunk * keys_in_chunk
    for start in tl.range(first_key, tl.minimum(first_key + keys_in_chunk, seq_k), BLOCK_N):
        # [BLOCK_N]
        key_rows = start + tl.arange(0, BLOCK_N)
        present = key_rows < seq_k
        key_blocks = tl.load(key_block_of_row + key_rows, mask=present & (variant > 0), other=-1)
        words = tl.load(visible + key_blocks, mask=key_blocks >= 0, other=0)
        words = tl.where(present & (variant == 0), -1, words)
        # [BLOCK_N, BLOCK_D]
        keys = load_rows(k, key_rows, present, stride_k_s, stride_k_d, HEAD_DIM, BLOCK_D)
        values = load_rows(v, key_rows, present, stride_v_s, stride_v_d, HEAD_DIM, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((words[None, :] >> bits[:, None]) & 1 != 0, scores, float("-inf"))
        if HAS_BIAS:
            scores += (tl.load(key_bias + key_rows.to(tl.int64) * stride_bias_s, mask=present, other=0.0) * LOG2E_DEVICE)[None, :]
        running_max, running_sum, accumulator = online_softmax_step(scores, 1.0, values, running_max, running_sum, accumulator)

    result, row_lse = normalise(running_max, running_sum, accumulator)
    offsets_d = tl.arange(0, BLOCK_D)
    virtual_rows = ((chunk.to(tl.int64) * variants + variant) * tl.num_programs(2) + tl.program_id(2)) * sampled + offsets_m
    tl.store(out + virtual_rows[:, None] * HEAD_DIM + offsets_d[None, :], result, mask=real[:, None] & (offsets_d < HEAD_DIM)[None, :])
    tl.store(lse + virtual_rows, row_lse, mask=real)


def _visible_blocks(plan: SparsePlan, rows: Tensor, seq_q: int) -> Tensor:
    """Which key blocks each sampled row sees: uint8 [B|1, H|1, R, K]."""
    mask = plan.mask
    if plan.q_order is None:
        positions = rows[None, None]
    else:
        positions = plan.q_order.positions(seq_q)[:, rows][plan.q_order.head_order.long()]
    batch = max(mask.kv_indices.shape[0], positions.shape[0])
    heads = max(mask.kv_indices.shape[1], positions.shape[1])
    block_rows = (positions.long() // mask.block_q).expand(batch, heads, -1)
    counts = mask.kv_num_blocks.expand(batch, heads, -1).gather(2, block_rows)
    indices = mask.kv_indices.expand(batch, heads, -1, -1)
    indices = indices.gather(2, block_rows[..., None].expand(-1, -1, -1, indices.shape[3]))
    used = torch.arange(indices.shape[3], device=rows.device) < counts[..., None]
    result = torch.zeros(batch, heads, len(rows), mask.num_k_blocks + 1, dtype=torch.uint8, device=rows.device)
    return result.scatter_(-1, torch.where(used, indices, mask.num_k_blocks).long(), 1)[..., :-1]


def _visible_table(candidates: list[SparsePlan], rows: Tensor, seq_q: int, tile: int) -> Tensor:
    """The candidates' `_visible_blocks` in one, a bit for each of a tile's rows: int64 [C, B|1, H|1, tiles, K], K the most that any has."""
    tables = [_visible_blocks(plan, rows, seq_q) for plan in candidates]
    batch, heads, _, blocks = (max(table.shape[dim] for table in tables) for dim in range(4))
    result = torch.zeros(len(tables), batch, heads, num_blocks(len(rows), tile), tile, blocks, dtype=torch.int64, device=rows.device)
    for slot, table in zip(result.flatten(3, 4), tables, strict=True):
        slot[:, :, : len(rows), : table.shape[3]] = table
    # Bit 63 is the sign: the sum of different bits is their union in two's complement too.
    return (result << torch.arange(tile, device=rows.device)[:, None]).sum(-2)


def _key_blocks(order: TokenOrder | None, seq_k: int, block_k: int, device: torch.device) -> Tensor:
    """The block of each key row, int32 [O, S_k]; -1 where the order leaves the key out. O is 1 without an order."""
    if order is None:
        return (torch.arange(seq_k, dtype=torch.int32, device=device) // block_k)[None]
    positions = order.positions(seq_k)
    return torch.where(positions < 0, -1, positions // block_k).int()


def _key_tables(candidates: list[SparsePlan], seq_k: int, batch: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All candidates' `_key_blocks`, [tables, S_k], and which of them each head uses, int32 [C, B, H]."""
    tables, choices, first = [], [], 0
    for plan in candidates:
        tables.append(_key_blocks(plan.k_order, seq_k, plan.mask.block_k, device))
        choice = torch.zeros(1, 1, dtype=torch.int32, device=device) if plan.k_order is None else plan.k_order.head_order.int()
        choices.append((choice + first).expand(batch, heads))
        first += len(tables[-1])
    return torch.cat(tables), torch.stack(choices)


def _merge(outputs: Tensor, lse: Tensor) -> Tensor:
    """Chunks' outputs [chunks, ..., D] and LSE [chunks, ...] in one softmax: [..., D]."""
    if len(outputs) == 1:
        return outputs[0]
    total = lse.logsumexp(0)
    weights = torch.where(total == -torch.inf, 0.0, (lse - total).exp())
    return (outputs * weights[..., None]).sum(0)


def sampled_errors(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, candidates: list[SparsePlan], scale: float, key_bias: Tensor | None,
) -> Tensor:
    """See `kernels.sampled_errors`."""
    batch, heads, seq_q, head_dim = q.shape
    seq_k, variants, rows = k.shape[2], 1 + len(candidates), rows.long().contiguous()
    q, scale = positive_scale(q, scale)
    # A tile's rows fit a word of visible bits. Its keys are half as many as the forward's: the look-up needs registers too.
    largest_tile = min(64, max(16, triton.next_power_of_2(len(rows)))), 32
    config = forward_config(q.element_size(), head_dim, architecture(q.device), *largest_tile)
    visible = _visible_table(candidates, rows, seq_q, config.block_m)
    key_blocks, key_table = _key_tables(candidates, seq_k, batch, heads, q.device)
    tiles = num_blocks(len(rows), config.block_m)
    wanted = num_blocks(_PROGRAMS, tiles * variants * batch * heads)
    keys_in_chunk = max(num_blocks(num_blocks(seq_k, config.block_n), wanted), _TILES_IN_CHUNK) * config.block_n
    chunks = num_blocks(seq_k, keys_in_chunk)
    outputs = torch.empty(chunks, variants, batch, heads, len(rows), head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(outputs.shape[:-1], dtype=torch.float32, device=q.device)
    strides = visible.expand(-1, batch, heads, -1, -1).stride()
    with on_device(q):
        sampled_attention_kernel[variants, chunks * tiles, batch * heads](
            q, k, v, rows, visible, key_blocks, key_table, outputs, lse, key_bias, scale, heads, len(rows), seq_k, keys_in_chunk,
            *q.stride(), *k.stride(), *v.stride(), *((0, 0) if key_bias is None else key_bias.stride()), *strides[:4],
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_BIAS=key_bias is not None, ALIGNED=heads_aligned(q, k, v), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    merged = _merge(outputs, lse)
    return (merged[1:] - merged[:1]).square().mean((3, 4))
