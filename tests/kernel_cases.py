"""Generated attention cases: tensors, a plan, and the plan's meaning token by token, worked out apart from the project's code."""

from dataclasses import dataclass, replace

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


def shown_by(plan: SparsePlan, batch: int, heads: int, seq_q: int, seq_k: int) -> torch.Tensor:
    """Which key row each query row sees under a plan, bool [B, H, S_q, S_k], read off the fields of its mask and orders one by one."""
    mask, visible = plan.mask, torch.zeros(batch, heads, seq_q, seq_k, dtype=torch.bool)
    columns = -(-mask.seq_k // mask.block_k)

    def of_head(table, b, h):
        return table[b % table.shape[0], h % table.shape[1]].tolist()

    def blocks(order, b, h, seq, block):
        """The block that holds each tensor row, [S]; -1 for none."""
        rows = range(seq) if order is None else order.rows[of_head(order.head_order, b, h)].tolist()
        held = {row: position // block for position, row in enumerate(rows) if row >= 0}
        return torch.tensor([held.get(row, -1) for row in range(seq)])

    for b in range(batch):
        for h in range(heads):
            kept = torch.zeros(-(-mask.seq_q // mask.block_q) + 1, columns + 1, dtype=torch.bool)  # the last of each is "in no block"
            for row, (count, listed) in enumerate(zip(of_head(mask.kv_num_blocks, b, h), of_head(mask.kv_indices, b, h), strict=True)):
                kept[row, slice(columns) if count == columns else listed[:count]] = True
            visible[b, h] = kept[blocks(plan.q_order, b, h, seq_q, mask.block_q)][:, blocks(plan.k_order, b, h, seq_k, mask.block_k)]
    return visible


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


# What is lost before anything is rounded to the tensors' dtype: score and exponent are float32, whose unit in the last place this is.
_EPS = torch.finfo(torch.float32).eps


@dataclass
class Fuzzed:
    """A case of anything that the ops promise to take. lost: the error of a score, of the LSE, and so the relative one of a weight, at most."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: SparsePlan
    key_bias: torch.Tensor | None
    scale: float | None
    lost: float

    @property
    def options(self):
        return {"q_order": self.plan.q_order, "k_order": self.plan.k_order, "scale": self.scale, "key_bias": self.key_bias}

    @property
    def bound(self):
        """The relative L2 error of an output: of the weights, and of rounding weights and result to the dtype, half a unit in the last place each."""
        return 4 * self.lost + (torch.finfo(self.q.dtype).eps if self.q.dtype in (torch.float16, torch.bfloat16) else 0.0)

    @property
    def shape(self):
        """B, H, S_q, S_k."""
        return *self.q.shape[:3], self.k.shape[2]

    @property
    def unmasked(self):
        """Keys that the bias leaves visible: bool, broadcast to [B, H, S_q, S_k]."""
        if self.key_bias is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return (self.key_bias > torch.finfo(self.key_bias.dtype).min / 2)[:, None, None]

    def exact(self):
        """q, k, v in float64: what the reference makes of them is the definition."""
        return self.q.double(), self.k.double(), self.v.double()

    def earlier_lse(self, lse):
        """An LSE of a step before: near this step's, float32, with rows that saw nothing then."""
        generator = torch.Generator().manual_seed(lse.numel())
        earlier = lse.float().masked_fill(lse == -torch.inf, 2.0) + torch.randn(lse.shape, generator=generator)
        earlier[:, :, ::5] = -torch.inf
        return earlier

    def other_plans(self, count):
        """Plans of other blocks and orders for the same tensors."""
        dice = _Dice(self.q.numel() + self.k.numel())
        batch, heads, seq_q, seq_k = self.shape
        return [_fuzzed_plan(dice, *dice.pick((128, 64), (64, 64), (32, 16)), batch, heads, seq_q, seq_k) for _ in range(count)]


class _Dice:
    """Draws by a seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *options):
        return options[int(torch.randint(0, len(options), (1,), generator=self.generator))]

    def chance(self, share):
        return bool(torch.rand((), generator=self.generator) < share)

    def below(self, *limits):
        """A whole number from 0 up to and without each limit."""
        numbers = [int(torch.randint(0, max(1, limit), (1,), generator=self.generator)) for limit in limits]
        return numbers[0] if len(numbers) == 1 else numbers

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def shuffled(self, count):
        return torch.randperm(count, generator=self.generator)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator)


def _tensor(dice, batch, heads, seq, dim, dtype, size=1.0):
    """[B, H, S, D] normal numbers of a size, in one of the layouts that views come in."""
    layout = dice.pick("heads", "tokens", "tokens", "every other", "one head", "backwards")

    def numbers(*shape):
        return (size * dice.normal(*shape)).to(dtype)

    if layout == "heads":
        return numbers(batch, heads, seq, dim)
    if layout == "every other":  # neither aligned nor contiguous anywhere
        return numbers(batch + 1, 2 * heads, seq + 3, 2 * dim + 3)[1:, ::2, 2 : 2 + seq, 1 : 2 * dim : 2]
    if layout == "one head":  # grouped heads, written out by strides of 0
        return numbers(batch, 1, seq, dim).expand(-1, heads, -1, -1)
    if layout == "backwards":  # the tokens' stride is the smallest
        return numbers(batch, heads, dim, seq).transpose(2, 3)
    return numbers(batch, seq, heads, dim).transpose(1, 2)


def _fuzzed_order(dice, seq, block, batch, heads, left_out):
    """Some orders of all rows but those left out, with padding anywhere, up to whole blocks of it; and which head uses which."""
    number, padding = dice.pick(1, 1, 2, 3), dice.pick(0, 0, 1, -seq % block, dice.below(3 * block))
    kept = seq - min(left_out, seq - 1)
    rows = torch.full((number, kept + padding), -1, dtype=torch.int32)
    for order in rows:
        where = dice.pick("strewn", "end", "front")
        places = dice.shuffled(len(order))[:kept].sort().values if where == "strewn" else torch.arange(kept) + (padding if where == "front" else 0)
        order[places] = (torch.arange(kept) if dice.chance(0.2) else dice.shuffled(seq)[:kept]).int()
    shape = dice.pick(1, batch), dice.pick(1, heads)
    return TokenOrder(rows, torch.randint(0, number, shape, generator=dice.generator).to(dice.pick(torch.int64, torch.int32)))


def _fuzzed_mask(dice, rows, columns, batch, heads):
    """bool [1 or B, 1 or H, Q, K]: of any density, often with rows that keep nothing, or everything."""
    shape = dice.pick(1, batch), dice.pick(1, heads), rows, columns
    blocks = dice.uniform(*shape) < dice.pick(0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 1.0)
    for value, share in ((False, dice.pick(0.0, 0.0, 0.3)), (True, dice.pick(0.0, 0.0, 0.3))):
        blocks[dice.uniform(*shape[:3]) < share] = value
    return blocks


def _listed(dice, mask):
    """The same mask told otherwise: lists in any order and with room to spare, and what nobody may read full of numbers that nobody may follow."""
    blocks, counts = mask.to_blocks(), mask.kv_num_blocks
    keys = torch.where(blocks, dice.uniform(*blocks.shape), 2.0)
    order = keys.argsort(-1)[..., : mask.kv_indices.shape[-1]]
    order = torch.nn.functional.pad(order, (0, dice.below(3)))
    read = (torch.arange(order.shape[-1]) < counts[..., None]) & ~mask.full_rows[..., None]
    return replace(mask, kv_indices=torch.where(read, order, dice.pick(1 << 30, -1)).int())


def _fuzzed_bias(dice, batch, seq):
    """[B or 1, S_k] of some dtype, or None; with keys masked in one of the ways that hosts have, up to all of an entry's."""
    kind = dice.pick("", "", "zero", "masked", "masked", "additive", "both")
    if not kind:
        return None
    dtype = dice.pick(torch.float32, torch.float32, torch.float16, torch.bfloat16)
    bias = (dice.normal(dice.pick(1, batch), seq) if kind in ("additive", "both") else torch.zeros(dice.pick(1, batch), seq)).to(dtype)
    if kind in ("masked", "both"):
        lowest = torch.finfo(dtype).min
        hidden = dice.uniform(*bias.shape) < dice.pick(0.1, 0.5, 0.9)
        hidden[:, : dice.below(seq)] |= dice.chance(0.5)  # a stretch of whole blocks
        if dice.chance(0.15):
            hidden[dice.below(len(bias))] = True
        bias[hidden] = dice.pick(-torch.inf, lowest, lowest * 0.75)
    return bias


def _fuzzed_plan(dice, block_q, block_k, batch, heads, seq_q, seq_k):
    """A plan for tensors of a shape, with orders or without."""
    q_order = _fuzzed_order(dice, seq_q, block_q, batch, heads, 0) if dice.chance(0.6) else None
    k_order = _fuzzed_order(dice, seq_k, block_k, batch, heads, dice.pick(0, 0, dice.below(seq_k))) if dice.chance(0.6) else None
    positions = [seq if order is None else order.length for seq, order in ((seq_q, q_order), (seq_k, k_order))]
    blocks = _fuzzed_mask(dice, -(-positions[0] // block_q), -(-positions[1] // block_k), batch, heads)
    mask = BlockMask.from_blocks(blocks, block_q, block_k, *positions)
    return SparsePlan(_listed(dice, mask) if dice.chance(0.5) else mask, q_order, k_order)


def fuzzed(seed: int, dtypes=(torch.float32, torch.float16, torch.bfloat16), small: bool = False) -> Fuzzed:
    """A random case. small: of about 100 tiles of a kernel at most, for the interpreter, and of more keys than queries, so that rows still choose."""
    dice = _Dice(seed)
    dtype, dim = dice.pick(*dtypes), dice.pick(32, 40, 48, 64, 64, 64, 80, 96, 128, 128, 160, 192, 256)
    block_q, block_k = dice.pick((128, 64), (128, 64), (64, 64), (64, 64), (64, 128), (32, 32), (16, 64), (32, 16), (128, 128))
    batch, heads = (1, dice.pick(1, 1, 2)) if small else (dice.pick(1, 1, 2), dice.pick(1, 2, 3))
    most_q, most_k = (150 // heads, 330) if small else (260, 260)
    seq_q = max(1, dice.pick(dice.below(most_q), dice.below(most_q), 1, min(block_q, most_q), min(block_q + 1, most_q), min(2 * block_q - 1, most_q)))
    seq_k = max(1, dice.pick(seq_q, dice.below(most_k), most_k - dice.below(100), most_k - dice.below(100), 1, block_k, block_k + 1))
    q = _tensor(dice, batch, heads, seq_q, dim, dtype, size=dice.pick(1.0, 1.0, 1.0, 6.0, 0.0))
    k, v = (_tensor(dice, batch, heads, seq_k, dim, dtype) for _ in range(2))

    plan = _fuzzed_plan(dice, block_q, block_k, batch, heads, seq_q, seq_k)
    bias = _fuzzed_bias(dice, batch, seq_k)
    scale = dice.pick(None, None, 0.05, 0.3, -0.1, 0.0)
    # A sum of D products, in whatever order, is off by a few units of the sum of their sizes, which is at most the product of the norms.
    norms = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * abs(dim**-0.5 if scale is None else scale)
    return Fuzzed(q, k, v, plan, bias, scale, 8 * _EPS * (8 + norms))  # 8: a bias, and a logarithm of a count
