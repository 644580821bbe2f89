"""Skipped blocks that count as one key, and the error that this makes: against the definition key by key in float64, and what must hold of it."""

import math

import pytest
import torch
from kernel_cases import fuzzed, shown_by
from oracle import attention, relative_error
from pack import kernels
from pack.kernels import BlockMask, PooledBlocks, SparsePlan, TokenOrder, torch_ops

BACKENDS = ("reference", "torch")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = torch.finfo(torch.float32).eps


def blocks_of(order, b, h, seq, block):
    """The tensor rows of each block of a head's positions, as lists, read off the order's fields."""
    table = range(seq) if order is None else order.rows[int(order.head_order[b % order.head_order.shape[0], h % order.head_order.shape[1]])].tolist()
    return [[row for row in table[start : start + block] if row >= 0] for start in range(0, len(table), block)]


def counts_of_keys(case):
    """What each key counts, float64 [B, S_k]: exp(bias), and 0 where the bias means minus infinity."""
    batch, _, _, seq_k = case.shape
    if case.key_bias is None:
        return torch.ones(batch, seq_k, dtype=torch.float64)
    return torch.where(case.unmasked[:, 0, 0], case.key_bias.double().exp(), 0.0).expand(batch, -1)


def pooled_by_hand(case):
    """keys, values and log_size in float64, one block after the other."""
    (batch, heads, _, seq_k), counts = case.shape, counts_of_keys(case)
    keys, values, sizes = [], [], []
    for b in range(batch):
        for h in range(heads):
            for rows in blocks_of(case.plan.k_order, b, h, seq_k, case.plan.mask.block_k):
                weights = counts[b, rows]
                total = weights.sum()
                sizes.append(math.log(total) if total > 0 else -math.inf)
                share = weights / total if total > 0 else weights
                keys.append(share @ case.k[b, h, rows].double())
                values.append(share @ case.v[b, h, rows].double())
    shape = (batch, heads, -1, case.k.shape[3])
    return torch.stack(keys).view(shape), torch.stack(values).view(shape), torch.tensor(sizes).double().view(shape[:3])


def attention_by_hand(case, pooled):
    """out and lse of kept keys and of the blocks that are not kept, as further keys."""
    (batch, heads, seq_q, seq_k), mask = case.shape, case.plan.mask
    unseen = (case.unmasked & torch.ones(batch, heads, seq_q, seq_k, dtype=torch.bool)) & shown_by(case.plan, *case.shape)
    bias = counts_of_keys(case).log()[:, None, None]
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    scores = (torch.einsum("bhqd,bhkd->bhqk", case.q.double(), case.k.double()) * scale + bias).masked_fill(~unseen, -torch.inf)
    pooled_scores = torch.einsum("bhqd,bhkd->bhqk", case.q.double(), pooled.keys.double()) * scale + pooled.log_size.double()[:, :, None]
    for b in range(batch):
        for h in range(heads):
            counts, lists = (table[b % table.shape[0], h % table.shape[1]].tolist() for table in (mask.kv_num_blocks, mask.kv_indices))
            for block, rows in enumerate(blocks_of(case.plan.q_order, b, h, seq_q, mask.block_q)):
                for column in range(mask.num_k_blocks) if counts[block] == mask.num_k_blocks else lists[block][: counts[block]]:
                    pooled_scores[b, h, rows, column] = -torch.inf
    scores, values = torch.cat([scores, pooled_scores], 3), torch.cat([case.v, pooled.values], 2).double()
    lse = scores.logsumexp(-1)
    weights = torch.where((lse == -torch.inf)[..., None], 0.0, (scores - lse[..., None]).exp())
    return torch.einsum("bhqk,bhkd->bhqd", weights, values), lse


def errors_by_hand(case, lse, pooled):
    """[B, H, Q, K], one pair of blocks after the other."""
    (batch, heads, seq_q, seq_k), mask, counts = case.shape, case.plan.mask, counts_of_keys(case)
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    errors = torch.zeros(batch, heads, mask.num_q_blocks, mask.num_k_blocks, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            q, k, v, row_lse = case.q[b, h].double(), case.k[b, h].double(), case.v[b, h].double(), lse[b, h].double()
            for column, keys in enumerate(blocks_of(case.plan.k_order, b, h, seq_k, mask.block_k)):
                for row, queries in enumerate(blocks_of(case.plan.q_order, b, h, seq_q, mask.block_q)):
                    queries = [query for query in queries if row_lse[query] > -torch.inf]
                    share = counts[b, keys] * (q[queries] @ k[keys].T * scale - row_lse[queries, None]).exp()
                    as_one = (q[queries] @ pooled.keys[b, h, column].double() * scale + pooled.log_size[b, h, column] - row_lse[queries]).exp()
                    lost = share @ v[keys] - as_one[:, None] * pooled.values[b, h, column].double()
                    errors[b, h, row, column] = lost.square().sum()
    return errors


def pool(case, backend):
    """The case's own pooled blocks, in its dtype."""
    return kernels.pool_blocks(case.k, case.v, case.plan.mask.block_k, k_order=case.plan.k_order, key_bias=case.key_bias, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(0, 200, 4))
def test_pooled_blocks_are_the_means_of_their_visible_keys(seed, backend):
    case = fuzzed(seed)
    pooled, (keys, values, log_size) = pool(case, backend), pooled_by_hand(case)
    assert pooled.keys.dtype == pooled.values.dtype == case.k.dtype and pooled.log_size.dtype == torch.float32
    rounding = torch.finfo(case.k.dtype).eps / 2 + 8 * EPS
    for actual, expected in ((pooled.keys, keys), (pooled.values, values)):
        assert actual.shape == expected.shape
        assert ((actual.double() - expected).abs() <= rounding * expected.abs() + 16 * EPS).all()  # what cancels leaves its own rounding
    empty = log_size == -torch.inf
    assert torch.equal(pooled.log_size == -torch.inf, empty) and torch.allclose(pooled.log_size[~empty].double(), log_size[~empty], atol=1e-5)
    assert (pooled.keys[empty] == 0).all() and (pooled.values[empty] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(1, 200, 4))
def test_a_block_that_is_not_kept_takes_part_as_one_key(seed, backend):
    case = fuzzed(seed)
    pooled = pool(case, "reference")
    expected, expected_lse = attention_by_hand(case, pooled)
    options = case.options | {"pooled": pooled, "backend": backend}
    out, lse = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, return_lse=True, **options)
    alone = kernels.block_sparse_attention(case.q, case.k, case.v, case.plan.mask, **options)
    blind = expected_lse == -torch.inf
    for result in (out, alone):
        assert relative_error(result, expected) <= case.bound and (result[blind] == 0).all()
        assert result.dtype == case.q.dtype and (backend == "reference" or result.transpose(1, 2).is_contiguous())
    assert lse.dtype == torch.float32 or backend == "reference"
    assert torch.equal(lse == -torch.inf, blind) and ((lse.double() - expected_lse)[~blind].abs() <= case.lost).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(2, 200, 4))
def test_block_errors_are_the_difference_of_both_sums(seed, backend):
    case = fuzzed(seed)
    mask, pooled = case.plan.mask, pool(case, "reference")
    _, lse = kernels.attention_with_lse(*case.exact(), scale=case.scale, key_bias=case.key_bias, backend="reference")
    for given in (lse.float(), case.earlier_lse(lse)):
        expected = errors_by_hand(case, given, pooled)
        errors = kernels.block_errors(case.q, case.k, case.v, given, mask.block_q, mask.block_k, pooled=pooled, **case.options, backend=backend)
        # Both sums are off by as much as their weights, so their difference d is, and d squared by 2 d times that.
        mass = kernels.block_mass(case.q.double(), case.k.double(), given, mask.block_q, mask.block_k, **case.options, backend="reference").double()
        off = 8 * case.lost * case.v.double().norm(dim=-1).max() * mass
        assert errors.dtype == torch.float32 and errors.shape == expected.shape
        assert ((errors.double() - expected).abs() <= 2 * expected.sqrt() * off + off**2 + 1e-30).all()
    made = kernels.block_errors(case.q, case.k, case.v, given, mask.block_q, mask.block_k, **case.options, backend=backend)
    assert ((made.double() - expected).abs() <= 4 * (expected.sqrt() + off) * (off + torch.finfo(case.k.dtype).eps * 300 * mass) + 1e-30).all()


def qkv(seq=200, heads=2, dim=64, dtype=torch.float32, batch=1):
    generator = torch.Generator().manual_seed(seq + dim)
    return [torch.randn(batch, seq, heads, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def mask_of(blocks, block_q, block_k, seq):
    return BlockMask.from_blocks(blocks, block_q, block_k, seq, seq)


def random_blocks(heads, rows, columns, density, seed=0):
    return torch.rand(1, heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [True, False])
def test_where_every_block_is_kept_nothing_is_pooled(backend, return_lse):
    q, k, v = qkv()
    mask, pooled = mask_of(torch.ones(1, 1, 2, 4, dtype=torch.bool), 128, 64, 200), kernels.pool_blocks(k, v, 64, backend=backend)
    plain, given = (
        kernels.block_sparse_attention(q, k, v, mask, return_lse=return_lse, pooled=each, backend=backend) for each in (None, pooled)
    )  # fmt: skip
    for one, other in zip(plain, given, strict=True):
        assert torch.equal(one, other) if backend == "torch" else torch.allclose(one, other, atol=1e-6)
    assert relative_error(given[0] if return_lse else given, attention(q, k, v)[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_blocks_of_one_key_lose_nothing(backend, density):
    q, k, v = qkv(90)
    bias = torch.randn(1, 90)
    bias[:, ::7] = -torch.inf
    pooled = kernels.pool_blocks(k, v, 1, key_bias=bias, backend=backend)
    mask = mask_of(random_blocks(2, 3, 90, density), 32, 1, 90)
    out, lse = kernels.block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True, pooled=pooled, backend=backend)
    expected, expected_lse = attention(q, k, v, key_bias=bias)
    assert relative_error(out, expected) < 1e-5 and torch.allclose(lse.double(), expected_lse, atol=1e-5)
    errors = kernels.block_errors(q, k, v, expected_lse, 32, 1, key_bias=bias, pooled=pooled, backend=backend)
    assert errors.max() < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_equal_keys_lose_nothing(backend, density):
    """A block's values may differ as they like: their mean is what equal weights make of them."""
    q, k, v = qkv(256)
    k = k.unflatten(2, (-1, 64))[..., :1, :].expand(-1, -1, -1, 64, -1).flatten(2, 3)
    pooled, mask = kernels.pool_blocks(k, v, 64, backend=backend), mask_of(random_blocks(2, 2, 4, density), 128, 64, 256)
    out, lse = kernels.block_sparse_attention(q, k, v, mask, return_lse=True, pooled=pooled, backend=backend)
    expected, expected_lse = attention(q, k, v)
    assert relative_error(out, expected) < 1e-5 and torch.allclose(lse.double(), expected_lse, atol=1e-5)
    assert kernels.block_errors(q, k, v, lse, 128, 64, pooled=pooled, backend=backend).max() < 1e-9
    # Without the correction it is not dense attention, so that the test can fail.
    assert relative_error(kernels.block_sparse_attention(q, k, v, mask, backend=backend), expected) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_q", [64, 128])
def test_full_empty_and_blind_rows(backend, dtype, block_q):
    """One head's rows of blocks: all kept, none, none of which has a visible key, some; the last key blocks hold masked keys alone."""
    seq, dim = 4 * block_q - 5, 64
    q, k, v = qkv(seq, 1, dim, dtype, batch=2)
    columns = -(-seq // 32)
    bias = torch.zeros(2, seq)
    bias[1, 32 * (columns - 2) :] = -torch.inf
    blocks = random_blocks(1, 4, columns, 0.3)
    blocks[:, :, 0], blocks[:, :, 1], blocks[:, :, 2] = True, False, False
    blocks[:, :, 2, -2:] = True
    pooled, mask = kernels.pool_blocks(k, v, 32, key_bias=bias, backend=backend), mask_of(blocks, block_q, 32, seq)
    order = TokenOrder.shared(torch.cat([torch.arange(seq - 1, -1, -1), torch.tensor([-1] * 5)]).int())
    ordered = BlockMask.from_blocks(blocks, block_q, 32, seq + 5, seq)
    for given, q_order in ((mask, None), (ordered, order)):
        out, lse = kernels.block_sparse_attention(
            q, k, v, given, q_order=q_order, key_bias=bias, return_lse=True, pooled=pooled, backend=backend,
        )  # fmt: skip
        exact = PooledBlocks(pooled.keys.double(), pooled.values.double(), pooled.log_size)
        expected, expected_lse = kernels.block_sparse_attention(
            q.double(), k.double(), v.double(), given, q_order=q_order, key_bias=bias, return_lse=True, pooled=exact, backend="reference",
        )  # fmt: skip
        assert relative_error(out, expected) < max(1e-6, torch.finfo(dtype).eps) and torch.allclose(lse.double(), expected_lse, atol=1e-5)
    everything = torch.full((2, seq), -torch.inf)
    nothing = kernels.pool_blocks(k, v, 32, key_bias=everything, backend=backend)
    assert (nothing.log_size == -torch.inf).all()
    for return_lse in (True, False):
        given = kernels.block_sparse_attention(q, k, v, mask, key_bias=everything, return_lse=return_lse, pooled=nothing, backend=backend)
        assert ((given[0] if return_lse else given) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_where_it_is_visible(backend, value):
    q, k, v = qkv(128, 1)
    bias = torch.zeros(1, 128)
    k[0, 0, 40], v[0, 0, 50] = value, value
    bias[0, [40, 50]] = -torch.inf
    _, lse = attention(q, k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0), key_bias=bias)
    hidden = kernels.pool_blocks(k, v, 32, key_bias=bias, backend=backend)
    assert hidden.keys.isfinite().all() and hidden.values.isfinite().all()
    assert kernels.block_errors(q, k, v, lse, 64, 32, key_bias=bias, pooled=hidden, backend=backend).isfinite().all()
    nothing = mask_of(torch.zeros(1, 1, 2, 4, dtype=torch.bool), 64, 32, 128)
    if backend == "torch":  # the reference multiplies every value, if by 0
        assert kernels.block_sparse_attention(q, k, v, nothing, key_bias=bias, pooled=hidden, backend=backend).isfinite().all()
    shown = kernels.pool_blocks(k, v, 32, backend=backend)
    for table in (shown.keys, shown.values):
        assert not table[0, 0, 1].isfinite().any() and table[0, 0, [0, 2, 3]].isfinite().all()
    assert kernels.block_sparse_attention(q, k, v, nothing, pooled=shown, backend=backend).isnan().any()
    assert not kernels.block_errors(q, k, v, lse, 64, 32, pooled=shown, backend=backend)[..., 1].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_does_not_count_adds_nothing_whatever_it_holds(backend):
    q, k, v = qkv(100, 1)
    _, lse = attention(q, k, v)
    expected = kernels.block_errors(q, k, v, lse, 64, 32, backend=backend)
    lse[0, 0, 5] = -torch.inf
    rest = kernels.block_errors(q, k, v, lse, 64, 32, backend=backend)
    assert (rest[0, 0, 0] < expected[0, 0, 0]).all() and torch.equal(rest[0, 0, 1], expected[0, 0, 1])
    q[0, 0, 5] = torch.nan
    assert torch.equal(kernels.block_errors(q, k, v, lse, 64, 32, backend=backend), rest)
    v[0, 0, 40] = torch.nan
    lse[:] = -torch.inf
    assert (kernels.block_errors(q, k, v, lse, 64, 32, backend=backend) == 0).all()


@pytest.mark.parametrize("seq, heads, dim", [(4096, 2, 64), (4096, 1, 128)])
def test_memory_is_bounded(seq, heads, dim, monkeypatch):
    """What torch's ops take to work with: a head's own tables, and beside them what the budgets say; scores of all pairs would be 64 MiB a head."""
    taken, fresh = {}, torch_ops._fresh

    def recorded(size, dtype, device):
        taken[len(taken)] = size * dtype.itemsize
        return fresh(size, dtype, device)

    monkeypatch.setattr(torch_ops, "_fresh", recorded)
    q, k, v = qkv(seq, heads, dim)
    mask = mask_of(random_blocks(heads, seq // 128, seq // 64, 0.2), 128, 64, seq)
    pooled = kernels.pool_blocks(k, v, 64, backend="torch")
    tables = 6 * seq * (dim + 8) * 4
    assert sum(taken.values()) <= tables
    taken.clear()
    kernels.block_sparse_attention(q, k, v, mask, pooled=pooled, return_lse=True, backend="torch")
    # A group for each number of kept blocks: one that is larger than the last takes new memory.
    assert sum(taken.values()) <= tables + q.numel() * 4 + 4 * torch_ops._GROUP_BYTES
    taken.clear()
    kernels.block_errors(q, k, v, torch.zeros(1, heads, seq), 128, 64, pooled=pooled, backend="torch")
    tile = torch_ops._TILE_ROWS * 4
    assert sum(taken.values()) <= tables + tile * (torch_ops._TILE_ROWS + 16 + torch_ops._TILE_ROWS // 64 * dim)


def test_density_and_pictures_count_kept_blocks_alone():
    q, k, v = qkv(256)
    mask = mask_of(random_blocks(2, 2, 4, 0.4), 128, 64, 256)
    plain, pooled = SparsePlan(mask), SparsePlan(mask, pooled=kernels.pool_blocks(k, v, 64))
    assert torch.equal(kernels.density(plain, 256, 256), kernels.density(pooled, 256, 256))
    rows = torch.arange(0, 256, 5)
    assert torch.equal(*(kernels.kept_pairs(plan, rows, rows, (1, 2, 256, 256)) for plan in (plain, pooled)))
    for backend in BACKENDS:
        assert torch.equal(*(kernels.sampled_errors(q, k, v, rows, [plan], backend=backend) for plan in (plain, pooled)))


@pytest.mark.parametrize("precision, bound", [("int8", 0.03), ("fp8", 0.06)])
@pytest.mark.parametrize("seed", range(3, 200, 12))
def test_beside_8_bits_pooled_blocks_keep_their_precision(seed, precision, bound):
    case = fuzzed(seed, (torch.float16, torch.bfloat16))
    pooled = pool(case, "reference")
    expected, expected_lse = attention_by_hand(case, pooled)
    out, lse = kernels.block_sparse_attention(
        case.q, case.k, case.v, case.plan.mask, **case.options, return_lse=True, pooled=pooled, backend="reference", precision=precision,
    )  # fmt: skip
    blind = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind) and (out[blind] == 0).all()
    if case.lost < 8 * EPS * 32:  # larger scores lose more
        assert relative_error(out, expected) <= 2 * bound
    nothing = mask_of(torch.zeros(1, 1, 2, 4, dtype=torch.bool), 64, 32, 128)
    q, k, v = qkv(128, dtype=torch.bfloat16)
    pooled = kernels.pool_blocks(k + 3, v + 2, 32)  # nothing kept: nothing is rounded to 8 bits
    exact, exact_lse = kernels.block_sparse_attention(q, k + 3, v + 2, nothing, return_lse=True, pooled=pooled, backend="reference")
    out, lse = kernels.block_sparse_attention(
        q, k + 3, v + 2, nothing, return_lse=True, pooled=pooled, backend="reference", precision=precision,
    )  # fmt: skip
    assert relative_error(out, exact) <= 2 * torch.finfo(torch.bfloat16).eps and torch.allclose(lse, exact_lse, atol=1e-4)


def test_bad_arguments_are_named():
    q, k, v = qkv(128)
    mask = mask_of(random_blocks(2, 2, 4, 0.4), 64, 32, 128)
    pooled, lse = kernels.pool_blocks(k, v, 32), torch.zeros(1, 2, 128)
    with pytest.raises(ValueError, match=r"pooled.keys is \(1, 2, 2, 64\): expected \(1, 2, 4, 64\)"):
        kernels.block_sparse_attention(q, k, v, mask, pooled=kernels.pool_blocks(k, v, 64))
    with pytest.raises(ValueError, match=r"pooled.values is torch.float64: expected torch.float32"):
        kernels.block_sparse_attention(q, k, v, mask, pooled=PooledBlocks(pooled.keys, pooled.values.double(), pooled.log_size))
    with pytest.raises(ValueError, match=r"pooled.log_size is \(1, 2, 4, 1\): expected \(1, 2, 4\)"):
        kernels.block_errors(q, k, v, lse, 64, 32, pooled=PooledBlocks(pooled.keys, pooled.values, pooled.log_size[..., None]))
    with pytest.raises(ValueError, match="expected k and v of one shape"):
        kernels.pool_blocks(k, v[:, :, :64], 32)
    with pytest.raises(ValueError, match="key_bias is"):
        kernels.pool_blocks(k, v, 32, key_bias=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="lse is"):
        kernels.block_errors(q, k, v, lse[..., :5], 64, 32)
    if kernels.why_not("triton", q, k, v) is None:
        with pytest.raises(ValueError, match="block_k is 24"):
            kernels.pool_blocks(k, v, 24, backend="triton")


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_fused_attention_takes_pooled_blocks(masked, monkeypatch):
    """What a device other than a CPU does: torch's own attention over kept and pooled keys together."""
    write = torch_ops._Head.__init__

    def fused(self, *arguments):
        write(self, *arguments)
        self.writes_scores = False

    monkeypatch.setattr(torch_ops._Head, "__init__", fused)
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 3, 500, 32, generator=generator)
    blocks = torch.rand(2, 3, 4, 8, generator=generator) < 0.3
    blocks[0, 0, 0], blocks[0, 1, 1] = True, False
    mask = BlockMask.from_blocks(blocks, 128, 64, 500, 500)
    bias = torch.zeros(2, 500)
    bias[:, 200:350], bias[:, 3] = -torch.inf, 0.7
    options = {"key_bias": bias if masked else None, "pooled": kernels.pool_blocks(k, v, 64, key_bias=bias if masked else None, backend="reference")}
    out, expected = (kernels.block_sparse_attention(q, k, v, mask, backend=backend, **options) for backend in ("torch", "reference"))
    assert relative_error(out, expected) < 1e-6
