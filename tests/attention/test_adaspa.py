"""AdaSpa: the search against block masses in float64, the budget by counting pairs, and the schedule of searches."""

import re

import pytest
import torch
from oracle import attention, relative_error
from pack import kernels
from pack.attention.blocks import VideoBlocks, pack, unpack
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.call import Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import adaspa
from pack.attention.methods.adaspa import adapted_sparsity
from pack.attention.pattern import Keeping
from video_oracle import LAYOUTS, as_one_key, chunks, is_text, local_qk, make_call, make_session, place, random_qkv, token_mask, video_rows

CPU = torch.device("cpu")
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_order = pytest.mark.parametrize("token_order", ["tile", "raster", "hilbert"])


def searched(layout, qkv, **knobs):
    """A run after its search in step 1: the session, its plan for step 2 and what it found."""
    run = make_session(adaspa, **knobs)
    answer = adaspa.plan(make_call(layout, qkv, step=1), run.config, run.state(make_call(layout, qkv)))
    assert isinstance(answer, Dense) and answer.planned
    call = make_call(layout, qkv, step=2)
    return run, adaspa.plan(call, run.config, run.state(call)), run.state(call).found


def video_blocks(layout, token_order, block_q=BLOCK_Q):
    """Tensor rows of the video's query blocks and key blocks, lists of lists."""
    rows = video_rows(layout, token_order)
    return chunks(rows, block_q), chunks(rows, BLOCK_K)


def weights(q, k, lse=None):
    """exp(score - lse) of one head in float64, [S, S]; with the current LSE where none is given."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return (scores - (scores.logsumexp(-1) if lse is None else lse.double())[..., None]).exp()


def sums(values, query_blocks, key_blocks):
    """Sums of [S, S] values over pairs of blocks, [Q, K]."""
    columns = torch.stack([values[:, block].sum(1) for block in key_blocks], 1)
    return torch.stack([columns[block].sum(0) for block in query_blocks])


def kept_blocks(kept, query_blocks, key_blocks):
    """bool [Q, K] of a token mask [S, S], which has to be whole blocks."""
    pairs = torch.tensor([len(block) for block in query_blocks])[:, None] * torch.tensor([len(block) for block in key_blocks])
    count = sums(kept.float(), query_blocks, key_blocks)
    assert ((count == 0) | (count == pairs)).all()
    return count > 0


def assert_heaviest(mass, kept):
    """Equally many of each row, none kept that is lighter than one left out (near ties aside)."""
    assert len(set(kept.sum(1).tolist())) == 1
    for row, chosen in zip(mass, kept, strict=True):
        if not chosen.all():
            assert row[chosen].min() >= row[~chosen].max() - 1e-4


def heads_of_all_kinds(layout, batch=1, seed=0):
    """q, k, v [B, 6, S, 64]: from heads whose mass sits in few blocks to heads that spread it over all."""
    heads = (
        ("spatial", 4.0, 14.0), ("spatial", 9.0, 2.0), ("temporal", 3.0, 14.0), ("temporal", 8.0, 2.0), ("spatial", 9.0, 0.3), ("spatial", 30.0, 9.0),
    )
    q = torch.stack([
        torch.stack([local_qk(place(layout, kind), length, peak, seed=seed + 10 * b + h) for h, (kind, length, peak) in enumerate(heads)])
        for b in range(batch)
    ])
    return q, q, torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))


@every_order
@every_layout
@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "adaptive"])
def test_each_row_keeps_its_heaviest_blocks_and_all_text(layout, token_order, head_adaptive):
    qkv = random_qkv(layout, batch=2, heads=3)
    _, plan, _ = searched(layout, [3 * qkv[0], *qkv[1:]], token_order=token_order, sparsity=0.6, head_adaptive=head_adaptive)
    kept, text = token_mask(plan, layout, 2, 3), is_text(layout)
    assert kept[:, :, text].all() and kept[:, :, :, text].all()
    blocks = video_blocks(layout, token_order)
    for b, h in ((0, 0), (0, 1), (1, 2)):
        assert_heaviest(sums(weights(3 * qkv[0][b, h], qkv[1][b, h]), *blocks), kept_blocks(kept[b, h], *blocks))


@every_layout
@pytest.mark.parametrize("sparsity", [0.4, 0.8, 0.95])
def test_blocks_of_64_queries_choose_for_themselves(layout, sparsity):
    qkv = random_qkv(layout, batch=1, heads=2)
    run, plan, found = searched(layout, [3 * qkv[0], *qkv[1:]], block_q=64, sparsity=sparsity, head_adaptive=False)
    kept, text, blocks = token_mask(plan, layout, 1, 2), is_text(layout), video_blocks(layout, "hilbert", 64)
    assert kept[:, :, text].all() and kept[:, :, :, text].all()
    for h in range(2):
        assert_heaviest(sums(weights(3 * qkv[0][0, h], qkv[1][0, h]), *blocks), kept_blocks(kept[0, h], *blocks))
    density, video = kept.double().mean((2, 3)), layout.video_tokens
    assert torch.allclose(found.what.figures.density.double(), density, atol=1e-6)
    floor = (int(text.sum()) * (layout.seq_len + video) + video * min(64, video)) / layout.seq_len**2
    if floor <= 1 - sparsity:
        assert not run.record.notes and ((density - (1 - sparsity)).abs() <= BLOCK_K / layout.seq_len).all()
    else:
        assert run.record.notes and (density <= floor + 1e-9).all() and (density > floor - BLOCK_K / layout.seq_len).all()


def test_a_masked_key_has_no_mass():
    layout = LAYOUTS["5x10x13+prefix"]
    q, k, v = random_qkv(layout)
    hidden = torch.tensor(video_rows(layout, "hilbert")[128:256])  # two key blocks of the Hilbert order
    bias = torch.zeros(1, layout.seq_len)
    bias[:, hidden] = torch.finfo(torch.float32).min
    run = make_session(adaspa, sparsity=0.5)
    for step in (1, 2):
        call = make_call(layout, (q, k, v), step=step, key_bias=bias)
        plan = adaspa.plan(call, run.config, run.state(call))
    assert not token_mask(plan, layout, 1, 2)[:, :, ~is_text(layout)][..., hidden].any()


@every_layout
@pytest.mark.parametrize("token_order, head_adaptive", [("hilbert", True), ("raster", False)], ids=["hilbert-adaptive", "raster-uniform"])
@pytest.mark.parametrize("sparsity", [0.1, 0.4, 0.5, 0.8, 0.95])
def test_achieved_sparsity_is_the_asked_one_or_the_floor(layout, sparsity, token_order, head_adaptive):
    qkv = heads_of_all_kinds(layout)
    run, plan, found = searched(layout, qkv, token_order=token_order, sparsity=sparsity, head_adaptive=head_adaptive)
    kept = token_mask(plan, layout, 1, 6)
    counted = kept.double().mean((2, 3))
    assert torch.allclose(found.what.figures.density.double(), counted, atol=1e-6)
    assert torch.equal(run.state(make_call(layout, qkv)).figures.density, found.what.figures.density)

    text, video = int(is_text(layout).sum()), int((~is_text(layout)).sum())
    floor = (text * layout.seq_len + video * (text + min(BLOCK_Q, video))) / layout.seq_len**2
    if floor <= 1 - sparsity:
        assert not run.record.notes and abs(float(counted.mean()) - (1 - sparsity)) <= BLOCK_K / layout.seq_len
    else:
        blocks = video_blocks(layout, token_order)
        own = min(BLOCK_Q // BLOCK_K, len(blocks[1]))
        assert all((kept_blocks(kept[0, h], *blocks).sum(1) == own).all() for h in range(6))
        others = f" and {text:,} others" if text else ""
        (most,) = re.fullmatch(rf"{video:,} video tokens{others}: at most (\d\.\d\d) can be skipped", *run.record.notes).groups()
        assert float(most) == pytest.approx(1 - floor, abs=0.0051)


@every_order
@every_layout
def test_sparsity_zero_keeps_everything(layout, token_order):
    _, plan, found = searched(layout, random_qkv(layout), token_order=token_order, sparsity=0.0)
    assert token_mask(plan, layout, 1, 2).all()
    assert (found.what.figures.density == 1).all() and torch.allclose(found.what.figures.recall, torch.ones(1, 2))


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 2), (3, 2), (2, 5), (1, 24)])
def test_the_mean_of_few_and_many_heads_is_nearest(batch, heads):
    """All heads round alike: half a block each way would add up."""
    layout = VideoLayout(8, 12, 12)  # whole blocks
    for sparsity in (0.55, 0.565, 0.58, 0.61):
        _, _, found = searched(layout, random_qkv(layout, batch, heads, dim=8), sparsity=sparsity)
        # One head's row of blocks more or less is the finest step there is.
        assert abs(float(found.what.figures.density.double().mean()) - (1 - sparsity)) <= 0.51 * BLOCK_K / layout.seq_len / heads


def recalls(layout, qkv, plan, lse=None):
    """Kept mass over all mass, by definition: float64 [B, H]."""
    batch, heads = qkv[0].shape[:2]
    kept, result = token_mask(plan, layout, batch, heads), torch.empty(batch, heads, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            mass = weights(qkv[0][b, h], qkv[1][b, h], None if lse is None else lse[b, h])
            result[b, h] = mass[kept[b, h]].sum() / mass.sum()
    return result


@every_order
@pytest.mark.parametrize("name", ["7x9x11+suffix", "5x10x13+prefix", "4x7x9"])
def test_recall_is_the_kept_share_of_the_mass(name, token_order):
    layout = LAYOUTS[name]
    qkv = heads_of_all_kinds(layout, batch=2)
    run, plan, found = searched(layout, qkv, token_order=token_order, sparsity=0.5)
    assert torch.allclose(found.what.figures.recall.double(), recalls(layout, qkv, plan), atol=1e-4)
    assert torch.equal(run.state(make_call(layout, qkv)).figures.recall, found.what.figures.recall)


@pytest.mark.parametrize("name", ["7x9x11+suffix", "5x10x13+prefix"])
def test_a_later_search_uses_the_first_lse(name):
    """Rows no longer sum to one: blocks are weighed, and recall normalised, by what the stale LSE gives."""
    layout = LAYOUTS[name]
    before = random_qkv(layout, heads=3, seed=1)
    q, k, v = random_qkv(layout, heads=3, seed=2)
    drifted = (2.5 * q, k, v)
    run, _, found = searched(layout, before, sparsity=0.5)
    lse = found.lse
    assert lse.dtype == torch.float16 and torch.allclose(lse.double(), attention(*before)[1], atol=1e-2)
    call = make_call(layout, drifted, step=5)
    plan = adaspa.plan(call, run.config, run.state(call))
    found = run.state(call).found
    assert found.step == 5
    kept, blocks = token_mask(plan, layout, 1, 3), video_blocks(layout, "hilbert")
    for h in range(3):
        mass = weights(2.5 * q[0, h], k[0, h], lse[0, h])
        assert (mass.sum(-1) - 1).abs().max() > 0.5  # stale indeed
        assert_heaviest(sums(mass, *blocks), kept_blocks(kept[0, h], *blocks))
    assert torch.allclose(found.what.figures.recall.double(), recalls(layout, drifted, plan, lse=lse), atol=1e-4)


@pytest.mark.parametrize("sparsity, high, low", [(0.8, 0.9, 0.7), (0.7, 0.85, 0.55), (0.5, 0.75, 0.25)])
def test_easy_heads_give_to_hard_ones_as_the_paper_says(sparsity, high, low):
    """The paper's rule on heads of measured recall, read off the executed masks."""
    layout = VideoLayout(12, 12, 12)
    qkv = heads_of_all_kinds(layout)
    _, plan, _ = searched(layout, qkv, sparsity=sparsity, head_adaptive=False)
    recall = recalls(layout, qkv, plan)[0]
    easy = min(int((recall > 0.8).sum()), 3)
    assert easy > 0 and recall.min() < 0.8
    expected = torch.full((6,), sparsity)
    expected[recall.argsort()[6 - easy :]] = high
    expected[recall.argsort()[:easy]] = low
    _, plan, _ = searched(layout, qkv, sparsity=sparsity, always_adapt=True)
    achieved = 1 - token_mask(plan, layout, 1, 6).double().mean((2, 3))[0]
    assert torch.allclose(achieved, expected.double(), atol=1.5 * BLOCK_K / layout.seq_len)


@pytest.mark.parametrize("recall, sparsity, most, expected", [
    ([0.9, 0.95, 0.3, 0.5, 0.85, 0.6], 0.8, 0.99, [0.9, 0.9, 0.7, 0.7, 0.9, 0.7]),
    ([0.9, 0.7, 0.3, 0.5], 0.8, 0.99, [0.9, 0.8, 0.7, 0.8]),
    ([0.8, 0.7, 0.3, 0.5], 0.8, 0.99, [0.8] * 4),  # above 0.8, not at it
    ([0.81, 0.82, 0.83, 0.84], 0.9, 0.99, [0.85, 0.85, 0.95, 0.95]),  # n is at most half of the heads
    ([0.81, 0.82, 0.83, 0.84, 0.85], 0.7, 0.99, [0.55, 0.55, 0.7, 0.85, 0.85]),
    ([0.9], 0.8, 0.99, [0.8]),
    ([0.9, 0.2], 0.2, 0.99, [0.4, 0.0]),  # (3s - 1)/2 would be below 0
    ([0.9, 0.2], 0.0, 0.99, [0.0, 0.0]),
    ([0.9, 0.2], 0.8, 0.85, [0.85, 0.75]),  # (1 + s)/2 would be more than is possible
    ([0.9, 0.2], 0.8, 0.6, [0.8, 0.8]),
], ids=str)
def test_adapted_sparsity_is_the_papers_rule_cut_to_what_is_possible(recall, sparsity, most, expected):
    adapted = adapted_sparsity(torch.tensor([recall], dtype=torch.float64), sparsity, most)
    assert torch.allclose(adapted, torch.tensor([expected], dtype=torch.float64))
    assert float(adapted.mean()) == pytest.approx(sparsity)


def test_batch_entries_are_adapted_alone():
    both = torch.tensor([[0.9, 0.2, 0.85, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    assert torch.allclose(adapted_sparsity(both, 0.8, 0.99), torch.tensor([[0.9, 0.7, 0.9, 0.7], [0.8] * 4], dtype=torch.float64))


@pytest.mark.parametrize("sparsity", [0.35, 0.5, 0.65, 0.8])
@pytest.mark.parametrize("head_adaptive", [False, True], ids=["uniform", "adaptive"])
def test_a_batch_entry_gets_the_plan_that_it_gets_alone(sparsity, head_adaptive):
    """Same input, same output: batching changes nothing."""
    layout = LAYOUTS["5x10x13+prefix"]
    qkv = heads_of_all_kinds(layout, batch=2)
    _, together, _ = searched(layout, qkv, sparsity=sparsity, head_adaptive=head_adaptive)
    for b in range(2):
        _, alone, _ = searched(layout, [tensor[b : b + 1] for tensor in qkv], sparsity=sparsity, head_adaptive=head_adaptive)
        assert torch.equal(token_mask(together, layout, 2, 6)[b], token_mask(alone, layout, 1, 6)[0])


def test_searching_by_groups_of_heads_changes_nothing(monkeypatch):
    layout = LAYOUTS["5x10x13+prefix"]
    qkv = heads_of_all_kinds(layout)
    _, whole, found = searched(layout, qkv)
    groups = []
    for name in ("block_mass", "attention_with_mass"):
        measure = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda q, *args, measure=measure, **kwargs: groups.append(q.shape[1]) or measure(q, *args, **kwargs))
    blocks = VideoBlocks.build(layout, adaspa.CONFIG(), CPU)
    monkeypatch.setattr(adaspa, "_SEARCH_BYTES", 4 * blocks.rows * blocks.columns * 4)
    _, parts, found_in_parts = searched(layout, qkv)
    assert groups == [4, 2]
    assert torch.equal(token_mask(whole, layout, 1, 6), token_mask(parts, layout, 1, 6))
    assert torch.equal(found.what.figures.recall, found_in_parts.what.figures.recall)


def steps_of(run, layout, qkv, steps):
    """What each step gives, the step of what was found, and whether an LSE is kept.

    "search" and "before" are dense, with the output computed on the way; else "sparse" or the reason.
    """
    seen = []
    for step in steps:
        call = make_call(layout, qkv, step=step)
        answer = sparse_attention(call, run)
        found = run.state(call).found
        if not isinstance(answer, Dense):
            kind = "sparse"
        elif answer.output is None:
            kind = answer.reason
        else:
            kind = "before" if found.what is None else "search"
        seen.append((step, kind, found and found.step, bool(found) and found.lse is not None))
    return seen


LAYOUT = LAYOUTS["4x7x9"]
WARM, THE_LAST = "warm-up step", "AdaSpa's search step would be the last"
EVERY_STEP = tuple(range(10))


@pytest.mark.parametrize("knobs, steps, expected", [
    pytest.param({}, EVERY_STEP, [
        (0, "before", 0, True), (1, "search", 1, True), (2, "sparse", 1, True), (3, "sparse", 1, True), (4, "sparse", 1, True),
        (5, "sparse", 5, False), (6, "sparse", 5, False), (7, "sparse", 5, False), (8, "sparse", 5, False), (9, "sparse", 5, False),
    ], id="the paper's two searches"),
    pytest.param({}, (1, 1, 2, 5, 5, 6), [
        (1, "search", 1, True), (1, WARM, 1, True), (2, "sparse", 1, True), (5, "sparse", 5, False), (5, "sparse", 5, False), (6, "sparse", 5, False),
    ], id="two evaluations a step"),
    pytest.param({}, (0, 0, 1, 2), [(0, "before", 0, True), (0, "before", 0, True), (1, "search", 1, True), (2, "sparse", 1, True)],
        id="two evaluations of the step before the search"),
    pytest.param({"warmup": 7}, (4, 5, 5, 6), [(4, WARM, None, False), (5, "before", 5, True), (5, "before", 5, True), (6, "search", 6, False)],
        id="a long warm-up"),
    pytest.param({}, (1, 2, 4, 7, 8), [
        (1, "search", 1, True), (2, "sparse", 1, True), (4, "sparse", 1, True), (7, "sparse", 7, False), (8, "sparse", 7, False),
    ], id="a cache skips the refresh"),
    pytest.param({}, (0, 3, 4, 5), [
        (0, "before", 0, True), (3, "search", 3, True), (4, "sparse", 3, True), (5, "sparse", 5, False),
    ], id="a cache skips the first search"),
    pytest.param({}, (0, 6, 7), [(0, "before", 0, True), (6, "search", 6, False), (7, "sparse", 6, False)], id="a cache skips both"),
    pytest.param({"cache_refresh": 0}, (1, 2, 5, 9), [
        (1, "search", 1, False), (2, "sparse", 1, False), (5, "sparse", 1, False), (9, "sparse", 1, False),
    ], id="never again"),
    pytest.param({"cache_refresh": 3}, EVERY_STEP[1:], [
        (1, "search", 1, True), (2, "sparse", 1, True), (3, "sparse", 1, True), (4, "sparse", 4, True), (5, "sparse", 4, True),
        (6, "sparse", 4, True), (7, "sparse", 7, False), (8, "sparse", 7, False), (9, "sparse", 7, False),
    ], id="every three steps"),
    pytest.param({"cache_refresh": 3}, (1, 5, 6, 7, 8), [
        (1, "search", 1, True), (5, "sparse", 5, True), (6, "sparse", 5, True), (7, "sparse", 5, True), (8, "sparse", 8, False),
    ], id="every three steps, one skipped"),
    pytest.param({"warmup": 0}, (0, 1, 5), [(0, "search", 0, True), (1, "sparse", 0, True), (5, "sparse", 5, False)], id="no warm-up"),
    pytest.param({"warmup": 7}, (5, 6, 7, 8), [
        (5, "before", 5, True), (6, "search", 6, False), (7, "sparse", 6, False), (8, "sparse", 6, False),
    ], id="warm-up past the refresh"),
    pytest.param({"refresh_at": None}, (1, 2, 9), [
        (1, "search", 1, False), (2, "sparse", 1, False), (9, "sparse", 1, False),
    ], id="no refresh in this run"),
    pytest.param({"cache_refresh": 3, "end": 3}, (1, 4, 6, 7), [
        (1, "search", 1, True), (4, "sparse", 4, False), (6, "sparse", 4, False), (7, "one of the last steps", 4, False),
    ], id="no LSE for a search in the dense last steps"),
    pytest.param({"end": 5}, (1, 4, 5), [
        (1, "search", 1, False), (4, "sparse", 1, False), (5, "one of the last steps", 1, False),
    ], id="the refresh is in the dense last steps"),
    pytest.param({"refresh_at": 9}, (1, 2, 8, 9), [
        (1, "search", 1, False), (2, "sparse", 1, False), (8, "sparse", 1, False), (9, "sparse", 1, False),
    ], id="the refresh is the last step, as in a stage that ends above its share"),
    pytest.param({"refresh_at": 7, "end": 2}, (1, 2, 7, 8), [
        (1, "search", 1, False), (2, "sparse", 1, False), (7, "sparse", 1, False), (8, "one of the last steps", 1, False),
    ], id="the refresh is the last sparse step"),
    pytest.param({}, (1, 2, 9), [(1, "search", 1, True), (2, "sparse", 1, True), (9, "sparse", 1, True)], id="a cache skips the refresh to the end"),
    pytest.param({"cache_refresh": 4}, (1, 5, 9), [(1, "search", 1, True), (5, "sparse", 5, False), (9, "sparse", 5, False)],
        id="every four steps, the last time in the last step"),
    pytest.param({"warmup": 10}, (7, 8, 9), [(7, WARM, None, False), (8, WARM, None, False), (9, THE_LAST, None, False)], id="all warm-up"),
    pytest.param({"warmup": 3, "end": 7}, (1, 2, 3), [(1, WARM, None, False), (2, THE_LAST, None, False), (3, "one of the last steps", None, False)],
        id="the last steps follow the warm-up"),
    pytest.param({}, (8, 9), [(8, "search", 8, False), (9, "sparse", 8, False)], id="a condition that begins late"),
    pytest.param({}, (9, 9), [(9, THE_LAST, None, False), (9, THE_LAST, None, False)], id="a condition that begins in the last step"),
])
def test_schedule(knobs, steps, expected):
    run = make_session(adaspa, **knobs)
    assert steps_of(run, LAYOUT, random_qkv(LAYOUT), steps) == expected
    assert sorted(run.record.searches.elements()) == sorted({found for _, kind, found, _ in expected if kind in ("search", "sparse")})


def test_a_search_without_a_later_step_is_made_where_it_is_saved():
    """Another run may start from it."""
    run = make_session(adaspa, warmup=10)
    run.keeping, run.record.layout = Keeping(), LAYOUT
    assert steps_of(run, LAYOUT, random_qkv(LAYOUT), (7, 8, 9)) == [(7, WARM, None, False), (8, "before", 8, True), (9, "search", 9, False)]
    assert run.found_pattern(None) is not None


@pytest.mark.parametrize("skipped_blocks", ["mean", "drop"])
def test_the_search_step_gives_dense_attention_and_later_ones_need_no_softmax(skipped_blocks, monkeypatch):
    layout = LAYOUTS["5x10x13+prefix"]
    qkv, run = random_qkv(layout), make_session(adaspa, sparsity=0.5, skipped_blocks=skipped_blocks)
    answer = sparse_attention(make_call(layout, qkv, step=1, scale=0.3), run)
    assert relative_error(answer.output, attention(*qkv, scale=0.3)[0]) < 1e-5

    def refuse(*_, **__):
        raise AssertionError("a dense pass in a later search")

    monkeypatch.setattr(kernels, "attention_with_lse", refuse)
    changed = random_qkv(layout, seed=4)
    call = make_call(layout, changed, step=5, scale=0.3)
    out = sparse_attention(call, run)
    plan = adaspa.plan(call, run.config, run.state(call))
    assert run.state(call).found.step == 5
    expected = attention(*changed, token_mask(plan, layout, 1, 2), scale=0.3, blocks=as_one_key(run.config, layout))[0]
    assert relative_error(out, expected) < 1e-5
    assert (plan.pooled is None) == (skipped_blocks == "drop")


def test_without_the_cache_each_search_weighs_by_its_own_lse():
    layout = LAYOUTS["5x10x13+prefix"]
    before, now = random_qkv(layout, heads=3, seed=1), random_qkv(layout, heads=3, seed=2)
    now[0] *= 2.5
    run, _, found = searched(layout, before, sparsity=0.5, lse_cache=False)
    assert found.lse is None
    call = make_call(layout, now, step=5)
    plan = adaspa.plan(call, run.config, run.state(call))
    found = run.state(call).found
    assert found.step == 5 and torch.allclose(found.what.figures.recall.double(), recalls(layout, now, plan), atol=1e-4)
    kept, blocks = token_mask(plan, layout, 1, 3), video_blocks(layout, "hilbert")
    for h in range(3):
        assert_heaviest(sums(weights(now[0][0, h], now[1][0, h]), *blocks), kept_blocks(kept[0, h], *blocks))
    stale, _, _ = searched(layout, before, sparsity=0.5)
    other = adaspa.plan(call, stale.config, stale.state(call))
    assert not torch.equal(token_mask(other, layout, 1, 3), kept), "the first LSE finds the same: this shows nothing"


@pytest.mark.parametrize("skipped_blocks", ["mean", "drop"])
def test_heads_are_adapted_only_where_the_layer_comes_nearer_to_dense_attention_by_it(skipped_blocks):
    """The paper's rule may give blocks to heads that gain less than others lose; `always_adapt` follows it all the same."""
    layout, seen = VideoLayout(8, 8, 12), set()
    for seed, sparsity, loud in ((0, 0.8, "easy"), (0, 0.5, "easy"), (1, 0.6, "hard"), (0, 0.5, "hard")):
        q, k, v = heads_of_all_kinds(layout, seed=seed)
        easy = searched(layout, (q, k, v), sparsity=sparsity, head_adaptive=False)[2].what.figures.recall[0] > 0.8
        assert easy.any() and not easy.all()
        qkv = q, k, v * torch.where(easy == (loud == "easy"), 5.0, 0.2)[:, None, None]
        exact, errors, blocks, density = attention(*qkv)[0], {}, {}, {}
        for name, knobs in (("alike", {"head_adaptive": False}), ("chosen", {}), ("paper", {"always_adapt": True})):
            run, plan, found = searched(layout, qkv, sparsity=sparsity, skipped_blocks=skipped_blocks, **knobs)
            out = attention(*qkv, token_mask(plan, layout, 1, 6), blocks=as_one_key(run.config, layout))[0]
            errors[name], blocks[name], density[name] = relative_error(out, exact), plan.mask.to_blocks(), float(found.what.figures.density.mean())
        assert density["chosen"] == pytest.approx(1 - sparsity, abs=0.51 * BLOCK_K / layout.seq_len / 6)
        followed = torch.equal(blocks["chosen"], blocks["paper"])
        assert errors["chosen"] <= errors["paper"] * (1 + 1e-4)
        if errors["paper"] < 0.95 * errors["alike"]:
            assert followed
        seen.add(followed)
    # Where a skipped block counts as its mean, blocks matter less, and giving them to others wins less.
    assert False in seen and (True in seen or skipped_blocks == "mean")


@pytest.mark.parametrize("groups", [1, 2], ids=["all heads", "groups of heads"])
def test_a_search_after_a_kept_lse_takes_one_pass(groups, monkeypatch):
    """The step before keeps its LSE; the search step computes dense attention and the masses under that LSE together."""
    layout = LAYOUTS["5x10x13+prefix"]
    before, now = random_qkv(layout, seed=3), random_qkv(layout, seed=4)
    if groups == 2:
        blocks = VideoBlocks.build(layout, adaspa.CONFIG(), CPU)
        monkeypatch.setattr(adaspa, "_SEARCH_BYTES", 4 * blocks.rows * blocks.columns)
    run = make_session(adaspa, sparsity=0.5)
    answer = sparse_attention(make_call(layout, before, step=0, scale=0.3), run)
    expected, lse = attention(*before, scale=0.3)
    assert answer.planned and relative_error(answer.output, expected) < 1e-5
    assert torch.allclose(run.state(make_call(layout, before, step=0)).found.lse.double(), lse, atol=0.02)

    def refuse(*_, **__):
        raise AssertionError("a pass over q and k beside the dense one")

    monkeypatch.setattr(kernels, "block_mass", refuse)
    call = make_call(layout, now, step=1, scale=0.3)
    answer = sparse_attention(call, run)
    assert relative_error(answer.output, attention(*now, scale=0.3)[0]) < 1e-5
    found = run.state(call).found
    assert found.lse is not None and torch.allclose(found.lse.double(), attention(*now, scale=0.3)[1], atol=0.02)

    # The same blocks as a search in two passes under the earlier LSE finds.
    monkeypatch.undo()
    mass = kernels.block_mass(
        now[0], now[1], lse.half().float(), BLOCK_Q, BLOCK_K, q_order=(plan := blocks_of(run, call)).q_order, k_order=plan.k_order, scale=0.3,
    )
    kept = run.state(call).found.what.figures.recall
    share = (mass * plan.mask.to_blocks()).sum((2, 3)) / mass.sum((2, 3))
    assert torch.allclose(share, kept, atol=1e-4)


def blocks_of(run, call):
    """The plan of a call whose blocks have been found."""
    blocks = VideoBlocks.build(call.layout, run.config, CPU)
    return blocks.plan(run.state(call).found.what)


@every_layout
@pytest.mark.parametrize("token_order, block_q", [("tile", 128), ("hilbert", 64), ("hilbert", 128)])
def test_blocks_follow_their_order_and_hold_every_row_once(layout, token_order, block_q):
    _, plan, _ = searched(layout, random_qkv(layout, dim=8), token_order=token_order, block_q=block_q)
    text = is_text(layout)
    for order, block in ((plan.q_order, block_q), (plan.k_order, BLOCK_K)):
        rows = order.rows[0]
        assert sorted(rows[rows >= 0].tolist()) == list(range(layout.seq_len))
        held = [[row for row in chunk if row >= 0] for chunk in chunks(rows.tolist(), block)]
        assert all(len({bool(text[row]) for row in chunk}) == 1 for chunk in held)
        assert [chunk for chunk in held if not text[chunk[0]]] == chunks(video_rows(layout, token_order), block)


@pytest.mark.parametrize("layout", [VideoLayout(8, 8, 12), VideoLayout(4, 4, 8, prefix=70, suffix=3)], ids=str)
@pytest.mark.parametrize("token_order", ["tile", "hilbert"])
def test_each_full_box_fills_one_key_block(layout, token_order):
    _, plan, _ = searched(layout, random_qkv(layout, dim=8), token_order=token_order)
    numbers = plan.k_order.rows[0].view(-1, BLOCK_K).long() - layout.prefix
    video = [block for block in numbers if ((block >= 0) & (block < layout.video_tokens)).any()]
    boxes = set()
    for block in video[-(layout.video_tokens // BLOCK_K) :]:
        line = block // layout.width
        corner = {tuple(at) for at in (torch.stack([line // layout.height, line % layout.height, block % layout.width], 1) // 4).tolist()}
        assert len(corner) == 1 and len(set(block.tolist())) == BLOCK_K
        boxes |= corner
    assert len(boxes) == layout.video_tokens // BLOCK_K


def test_raster_without_text_reads_rows_as_they_lie():
    _, plan, _ = searched(LAYOUT, random_qkv(LAYOUT), token_order="raster")
    assert plan.q_order is None and plan.k_order is None
    layout = LAYOUTS["3x12x12+both"]
    _, plan, _ = searched(layout, random_qkv(layout), token_order="raster")
    rows = plan.k_order.rows[0]
    assert rows[rows >= 0].tolist() == [*range(5), *range(437, 448), *range(5, 437)]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
def test_packed_blocks_survive_the_round_trip(columns):
    blocks = torch.rand(2, 3, 5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    bits = pack(blocks)
    assert bits.dtype == torch.uint8 and bits.shape == (2, 3, 5, -(-columns // 8))
    assert torch.equal(unpack(bits, columns), blocks)


@every_order
def test_plans_of_hunyuan_video_stay_small(token_order):
    """720p, 129 frames: 60 layers of 24 heads at 119,056 tokens, plans and LSE half a GiB each."""
    layout = VideoLayout(33, 45, 80, suffix=256)
    assert layout.seq_len == 119_056
    blocks = VideoBlocks.build(layout, adaspa.CONFIG(token_order=token_order), CPU)
    plan_bytes = blocks.rows * -(-blocks.columns // 8)
    assert 60 * 24 * plan_bytes <= 2**29 and 60 * 24 * layout.seq_len * 2 <= 2**29

    small = LAYOUTS["5x10x13+prefix"]
    run, _, found = searched(small, random_qkv(small, heads=3), token_order=token_order)
    blocks = VideoBlocks.build(small, run.config, CPU)
    assert found.what.bits.nbytes == 3 * blocks.rows * -(-blocks.columns // 8) and found.lse.nbytes == 3 * small.seq_len * 2
