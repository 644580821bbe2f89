"""Generated attention cases: tensors, a plan, and the plan's meaning token by token, worked out apart from the project's code."""

from dataclasses import dataclass

import torch
from pack.kernels import BlockMask, SparsePlan, TokenOrder


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: SparsePlan
    key_bias: torch.Tensor | None
    scale: float | None
    visible: torch.Tensor  # bool [B, H, S_q, S_k]


def _order(generator, seq, block, orders, batch, heads, drop):
    """Random orders with padding strewn in, and which token lies in which block: [O, seq], -1 for a token left out."""
    tables, block_of_token = [], []
    length = seq + int(torch.randint(0, 2 * block, (1,), generator=generator))
    for _ in range(orders):
        rows = torch.full((length,), -1, dtype=torch.int32)
        places = torch.randperm(length, generator=generator)[:seq]
        tokens = torch.randperm(seq, generator=generator)
        kept = tokens[: seq - drop]
        rows[places[: len(kept)]] = kept.int()
        tables.append(rows)
        blocks = torch.full((seq,), -1)
        for place, token in enumerate(rows.tolist()):
            if token >= 0:
                blocks[token] = place // block
        block_of_token.append(blocks)
    choice = torch.randint(0, orders, (batch, heads), generator=generator)
    return TokenOrder(torch.stack(tables), choice), torch.stack(block_of_token)[choice], length


def make(seed: int, dtype=torch.float32) -> Case:
    """One case of everything that the ops promise to take, chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(0, len(options), (1,), generator=generator))]

    batch, heads, dim = pick(1, 2, 3), pick(1, 2, 4), pick(64, 64, 128)
    block_q, block_k = pick((16, 16), (32, 16), (64, 64), (128, 64))
    seq_q = pick(1, 15, 63, 64, 100, 129, 200)
    seq_k = pick(seq_q, seq_q, 7, 65, 130)
    if pick(True, False) and seq_q == seq_k:  # views into one buffer, as a fused projection leaves them
        q, k, v = torch.randn(batch, seq_q, 3, heads, dim, generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    else:
        q = torch.randn(batch, heads, seq_q, dim, generator=generator).to(dtype)
        k, v = torch.randn(2, batch, seq_k, heads, dim, generator=generator).to(dtype).transpose(2, 3)

    q_order = k_order = None
    q_blocks = (torch.arange(seq_q) // block_q).expand(batch, heads, -1)
    k_blocks = (torch.arange(seq_k) // block_k).expand(batch, heads, -1)
    positions_q, positions_k = seq_q, seq_k
    if pick(True, False):
        q_order, q_blocks, positions_q = _order(generator, seq_q, block_q, pick(1, 2), batch, heads, drop=0)
    if pick(True, False):
        k_order, k_blocks, positions_k = _order(generator, seq_k, block_k, pick(1, 3), batch, heads, drop=pick(0, min(5, seq_k)))

    shape = (pick(1, batch), pick(1, heads), -(-positions_q // block_q), -(-positions_k // block_k))
    blocks = torch.rand(shape, generator=generator) < pick(0.0, 0.2, 0.5, 1.0)
    if pick(True, False):
        blocks[..., 0, :] = False  # a row of blocks that sees nothing
    plan = SparsePlan(BlockMask.from_blocks(blocks, block_q, block_k, positions_q, positions_k), q_order, k_order)

    visible = torch.zeros(batch, heads, seq_q, seq_k, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            kept = blocks[b % shape[0], h % shape[1]]
            padded = torch.cat([kept, torch.zeros(kept.shape[0], 1, dtype=torch.bool)], 1)  # the last column is "left out"
            visible[b, h] = padded[q_blocks[b, h]][:, k_blocks[b, h]]

    key_bias = None
    kind = pick(None, "padded", "additive")
    if kind:
        key_bias = torch.zeros(pick(1, batch), seq_k)
        if kind == "additive":
            key_bias = torch.randn(key_bias.shape, generator=generator)
        key_bias[:, : seq_k // 3] = pick(-torch.inf, torch.finfo(torch.float32).min)
        visible &= (key_bias > -1e30)[:, None, None]
    return Case(q, k, v, plan, key_bias, pick(None, 0.07), visible)
