"""Auto: which blocks are chosen, by their definitions in float64; what a fidelity promises; when it searches, and what it measures."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import attention, one_key_each, relative_error
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.call import Dense
from pack.attention.dispatch import sparse_attention
from pack.attention.layout import VideoLayout
from pack.attention.methods import adaspa, auto
from pack.attention.methods.auto import all_but, largest_within
from pack.attention.pattern import Keeping
from pack.attention.sampling import sampled_rows
from pretend_device import pretended
from torch.overrides import TorchFunctionMode
from video_oracle import LAYOUTS, as_one_key, chunks, is_text, key_blocks, make_call, make_session, random_qkv, token_mask, video_rows

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
LAYOUT = LAYOUTS["5x10x13+prefix"]
SMALL = LAYOUTS["4x7x9"]


# Which values are the largest.

# Sums of these are exact in any order, and many are equal.
_VALUES = st.lists(st.one_of(st.integers(0, 4).map(float), st.integers(0, 4000).map(lambda eighths: eighths / 8), st.just(math.inf)), max_size=40)


def from_the_top(values):
    """Places of the values, the largest first, of equal ones the first."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(values=_VALUES.filter(len), costs=st.lists(st.integers(1, 5), min_size=40, max_size=40), share=st.floats(-0.1, 1.1), data=st.data())
@example([2.0, 2.0, 2.0, 0.0], [3, 1, 1, 1] * 10, 0.5, None)
@example([math.inf] * 3, [1] * 40, 1.0, None)
@example([0.0] * 5, [1] * 40, 0.0, None)
def test_the_largest_values_are_taken_as_long_as_they_fit(values, costs, share, data):
    """One after the other, until one does not fit; of equal ones at the edge those that still fit, counted from the first."""
    allowed = share * sum(costs[: len(values)])
    kept, spent, ordered = set(), 0, from_the_top(values)
    while ordered:
        same = [place for place in ordered if values[place] == values[ordered[0]]]
        ordered = ordered[len(same) :]
        if spent + sum(costs[place] for place in same) > allowed:
            for place in same:
                spent += costs[place]
                if spent <= allowed:
                    kept.add(place)
            break
        spent += sum(costs[place] for place in same)
        kept |= set(same)
    found = largest_within(torch.tensor([values]), torch.tensor([costs[: len(values)]]).float(), torch.tensor([allowed], dtype=torch.float64))
    assert set(found[0].nonzero()[:, 0].tolist()) == kept


@settings(max_examples=300, derandomize=True, deadline=None)
@given(values=_VALUES.filter(len), allowed=st.one_of(st.integers(-8, 8000).map(lambda eighths: eighths / 8), st.just(math.inf)))
@example([0.0, 0.0, 1.0], 0.0)
@example([0.0, 0.0], 0.0)
@example([3.0, 1.0, 1.0, 1.0], 2.0)
@example([1.0, math.inf], math.inf)
def test_all_but_the_smallest_that_come_to_no_more(values, allowed):
    """From the smallest up, equal ones together, as long as the sum stays within what is allowed."""
    left, total = set(), 0.0
    for value in sorted(set(values)):
        total += value * values.count(value) if value else 0.0
        if total > allowed:
            break
        left |= {place for place, other in enumerate(values) if other == value}
    found = all_but(torch.tensor([values]), torch.tensor([allowed], dtype=torch.float64))
    assert set((~found[0]).nonzero()[:, 0].tolist()) == left


def test_rows_are_found_apart():
    """Each group has an edge of its own; float32's whole range is told apart."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(3, 5, 500, generator=generator) * 60 - 30).exp()
    costs = torch.randint(1, 9, values.shape, generator=generator).float()
    allowed = torch.rand(3, 5, generator=generator, dtype=torch.float64) * costs.double().sum(-1)
    together = largest_within(values, costs, allowed)
    for at in ((0, 0), (1, 3), (2, 4)):
        alone = largest_within(values[at][None], costs[at][None], allowed[at][None])[0]
        assert torch.equal(together[at], alone)
        spent, order = costs[at].double()[values[at].argsort(descending=True)].cumsum(0), values[at].argsort(descending=True)
        assert set(alone.nonzero()[:, 0].tolist()) == set(order[spent <= allowed[at]].tolist())


# Which blocks are chosen.


def searched(layout, qkv, key_bias=None, scale=None, **knobs):
    """A run after its search in step 1: the session, its plan for step 2, and the token mask of that, [B, H, S, S]."""
    run = make_session(auto, **knobs)
    answer = sparse_attention(make_call(layout, qkv, step=1, key_bias=key_bias, scale=scale), run)
    assert isinstance(answer, Dense) and (answer.reason, answer.planned) == ("search step", True)
    call = make_call(layout, qkv, step=2, key_bias=key_bias, scale=scale)
    plan = auto.plan(call, run.config, run.state(call))
    return run, plan, token_mask(plan, layout, *call.q.shape[:2])


def video_blocks(layout, run):
    """Tensor rows of the video's query blocks and key blocks, lists of lists."""
    rows = video_rows(layout, run.config.token_order)
    return chunks(rows, run.config.block_q), chunks(rows, BLOCK_K)


def by_blocks(values, query_blocks, key_blocks):
    """Sums of [S, S] values over pairs of blocks, [Q, K]."""
    columns = torch.stack([values[:, block].sum(1) for block in key_blocks], 1)
    return torch.stack([columns[block].sum(0) for block in query_blocks])


def worths(qkv, selection, blocks, key_bias=None):
    """What each pair of blocks of the video is worth by definition, float64 [B, H, Q, K]."""
    q, k, v = (tensor.double() for tensor in qkv)
    _, lse = attention(q, k, v, key_bias=key_bias)
    keys, values, sizes = one_key_each(*qkv[1:], blocks[1], key_bias)
    found = []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h].T * q.shape[-1] ** -0.5
            if key_bias is not None:
                scores = scores + key_bias[b % len(key_bias)].double()
            weights = (scores - lse[b, h][:, None]).exp()
            mass = by_blocks(weights, *blocks)
            if selection == "error":
                columns = []
                for number, block in enumerate(blocks[1]):
                    as_one = (q[b, h] @ keys[b, h, number] * q.shape[-1] ** -0.5 + sizes[b, h, number] - lse[b, h]).exp()
                    off = (weights[:, block] @ v[b, h][block] - as_one[:, None] * values[b, h, number]).square().sum(-1)
                    columns.append(torch.stack([off[rows].sum() for rows in blocks[0]]))
                found.append(torch.stack(columns, 1))
            elif selection == "mass":
                found.append(mass)
            else:  # what lies above the block in its row is not held by heavier ones
                share = mass / mass.sum(-1, keepdim=True)
                heavier = torch.stack([(row[None] * (row[None] > row[:, None])).sum(-1) for row in share])
                found.append(1 - heavier)
    return torch.stack(found).view(*q.shape[:2], len(blocks[0]), -1)


def kept_blocks(kept, blocks):
    """bool [B, H, Q, K] of a token mask, which has to be whole blocks."""
    pairs = pairs_of(blocks)
    found = []
    for of_head in kept.flatten(0, 1):
        count = by_blocks(of_head.double(), *blocks)
        assert ((count == 0) | (count == pairs)).all()
        found.append(count > 0)
    return torch.stack(found).view(*kept.shape[:2], *pairs.shape)


def pairs_of(blocks):
    """Query-key pairs of each pair of blocks, float64 [Q, K]."""
    sizes = [torch.tensor([len(block) for block in some], dtype=torch.float64) for some in blocks]
    return sizes[0][:, None] * sizes[1]


def groups_of(values, scope):
    """[B, H, Q, K] as [groups, blocks]: what shares a threshold."""
    return {"layer": values.flatten(1), "head": values.flatten(2).flatten(0, 1), "row": values.flatten(0, 2)}[scope]


def check_choice(run, layout, qkv, kept, key_bias=None):
    """No block left out is worth more than one that is kept, and each group spends its share of the budget to the block."""
    config, blocks = run.config, video_blocks(layout, run)
    text = is_text(layout)
    assert kept[:, :, text].all() and kept[:, :, :, text].all()
    worth, pairs, chosen = worths(qkv, config.selection, blocks, key_bias), pairs_of(blocks), kept_blocks(kept, blocks)
    sinks, video = int(text.sum()), int((~text).sum())
    budget = (1 - config.sparsity) * layout.seq_len**2 - sinks * (layout.seq_len + video)  # of a head, after the sinks
    costs = pairs.expand(worth.shape)
    for value, cost, keep in zip(*(groups_of(each, config.scope) for each in (worth, costs, chosen)), strict=True):
        if keep.any() and not keep.all():
            assert value[keep].min() >= value[~keep].max() * (1 - 1e-3) - 1e-4 * value.mean()
        allowed, spent = budget / video**2 * cost.sum(), cost[keep].sum()
        assert spent <= max(allowed, 0.0) * (1 + 1e-6)
        assert keep.all() or allowed - spent < config.block_q * BLOCK_K
    return chosen


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS.values() if layout.seq_len < 700], ids=str)
@pytest.mark.parametrize("selection", ["error", "mass", "share"])
@pytest.mark.parametrize("scope", ["layer", "head", "row"])
def test_blocks_of_the_largest_worth_are_kept(layout, selection, scope):
    qkv = random_qkv(layout, batch=2, heads=3)
    qkv[0] *= torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    run, _, kept = searched(layout, qkv, selection=selection, scope=scope, sparsity=0.55)
    check_choice(run, layout, qkv, kept)


@pytest.mark.parametrize("knobs", [{"token_order": "hilbert"}, {"token_order": "raster"}, {"block_q": 64}, {"skipped_blocks": "drop"}], ids=str)
@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_in_every_order_and_size_of_blocks(knobs, sparsity):
    qkv = random_qkv(LAYOUT, heads=3)
    run, _, kept = searched(LAYOUT, qkv, sparsity=sparsity, **knobs)
    check_choice(run, LAYOUT, qkv, kept)


def test_heads_get_what_they_need():
    """A layer's threshold gives to the head whose blocks count; a head's own gives to each alike."""
    layout = LAYOUTS["9x16x16"]
    qkv = random_qkv(layout, heads=2)
    qkv[0] *= torch.tensor([6.0, 0.1])[:, None, None]  # one looks closely, the other at the mean of all
    for scope, alike in (("layer", False), ("head", True), ("row", True)):
        _, _, kept = searched(layout, qkv, sparsity=0.6, scope=scope)
        density = kept.double().mean((2, 3))[0]
        assert density.mean() == pytest.approx(0.4, abs=BLOCK_Q * BLOCK_K / layout.seq_len**2 * 18)
        assert (abs(float(density[0] - density[1])) < 0.04) == alike, density
        if scope == "layer":
            assert density[0] > density[1]


def padded(layout):
    """Half of the text is padding, and so is one key block of the Hilbert order."""
    bias = torch.zeros(1, layout.seq_len)
    text = is_text(layout).nonzero()[:, 0]
    bias[:, text[len(text) // 2 :]] = torch.finfo(torch.float32).min
    bias[:, chunks(video_rows(layout, "hilbert"), BLOCK_K)[2]] = -torch.inf
    return bias


@pytest.mark.parametrize("selection", ["error", "mass", "share"])
def test_masked_keys_are_worth_nothing(selection):
    qkv, bias = random_qkv(LAYOUT, batch=2), padded(LAYOUT)
    qkv[1:, :, :, (bias[0] < 0).nonzero()[:, 0]] = 1e4  # nobody looks at it
    run, _, kept = searched(LAYOUT, qkv, key_bias=bias, selection=selection, sparsity=0.5)
    chosen = check_choice(run, LAYOUT, qkv, kept, bias)
    assert not chosen[..., 2].any() and chosen.any()


def test_a_call_with_a_bias_is_attention_under_its_plan():
    for bias in (padded(LAYOUT), torch.randn(2, LAYOUT.seq_len, generator=torch.Generator().manual_seed(3))):
        qkv = random_qkv(LAYOUT, batch=2)
        for knobs in ({"sparsity": 0.6}, {"fidelity": 0.6}, {"sparsity": 0.4, "skipped_blocks": "drop"}):
            run, _, kept = searched(LAYOUT, qkv, key_bias=bias, scale=0.4, **knobs)
            assert not kept.all()
            out = sparse_attention(make_call(LAYOUT, qkv, step=2, key_bias=bias, scale=0.4), run)
            expected = attention(*qkv, kept, 0.4, bias, as_one_key(run.config, LAYOUT))[0]
            assert relative_error(out, expected) < 1e-5


@every_layout
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_the_budget_is_met_or_the_limit_told(layout, sparsity):
    """Sinks are paid first; nothing else is always kept, so they alone may be more than the budget."""
    qkv = random_qkv(layout, batch=2, heads=3)
    run, _, kept = searched(layout, qkv, sparsity=sparsity)
    density, notes = kept.double().mean((2, 3)), [note for note in run.record.notes if "backend" not in note]
    assert torch.allclose(run.state(make_call(layout, qkv)).figures.density.double(), density, atol=1e-6)
    text, video = int(is_text(layout).sum()), int((~is_text(layout)).sum())
    floor = (text * (layout.seq_len + video)) / layout.seq_len**2
    block = BLOCK_Q * BLOCK_K / layout.seq_len**2 / 3  # of one head
    if floor <= 1 - sparsity:
        assert not notes
        assert (density.mean(1) <= 1 - sparsity + 1e-9).all() and (density.mean(1) > 1 - sparsity - block).all()
    else:
        assert (density == floor).all()
        (most,) = re.fullmatch(rf"{video:,} video tokens and {text:,} others: at most (\d\.\d\d) can be skipped", *notes).groups()
        assert float(most) == pytest.approx(1 - floor, abs=0.0051)
    if sparsity == 0:
        assert kept.all()


# What a fidelity promises.


def shortfall(run, layout, qkv, kept, key_bias=None):
    """The relative L2 error over the video's rows and all heads, of each batch entry: what is left out counts as the run's method has it."""
    video = ~is_text(layout)
    exact = attention(*qkv, key_bias=key_bias)[0][:, :, video]
    out = attention(*qkv, kept, key_bias=key_bias, blocks=as_one_key(run.config, layout))[0][:, :, video]
    return ((out - exact).square().sum((1, 2, 3)) / exact.square().sum((1, 2, 3))).sqrt()


def structured(layout, batch=1, seed=0):
    """Three heads: one that looks at its neighbours in a smooth field, one that looks closely at a few keys, one at the mean of all."""
    q, k, v = random_qkv(layout, batch, 3, seed=seed)
    places = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, size) for size in (layout.frames, layout.height, layout.width)), indexing="ij"), -1)
    field = torch.zeros(layout.seq_len, 16)
    field[~is_text(layout)] = (places.flatten(0, 2) @ torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))).sin()
    q, k, v = q * torch.tensor([0.5, 2.5, 0.05])[:, None, None], k.clone(), 0.3 * v + field
    q[:, 0] += 3 * field
    k[:, 0] += field
    return q, k, v


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS.values() if 100 < layout.seq_len < 2000], ids=str)
@pytest.mark.parametrize("fidelity, knobs", [
    *[(fidelity, {}) for fidelity in (0.5, 0.8, 0.9, 0.97, 0.999)], (0.8, {"skipped_blocks": "drop"}), (0.9, {"scope": "head"}),
], ids=str)
def test_a_layer_errs_no_more_than_its_fidelity_allows(layout, fidelity, knobs):
    """In the step of the search, whose tensors it was found on; and it does not compute much more than it has to."""
    qkv = structured(layout, batch=2)
    run, _, kept = searched(layout, qkv, fidelity=fidelity, **knobs)
    assert kept[:, :, is_text(layout)].all() and kept[..., is_text(layout)].all()
    off = shortfall(run, layout, qkv, kept)
    assert (off <= (1 - fidelity) * 1.001).all()
    density = kept.double().mean((2, 3))
    assert torch.allclose(run.state(make_call(layout, qkv)).figures.density.double(), density, atol=1e-6)
    if layout.video_tokens > 600 and fidelity < 0.99 and not knobs:
        assert (density.mean(1) < 0.95).all() and (off > 0.5 * (1 - fidelity)).all()


def test_more_fidelity_keeps_more():
    layout = VideoLayout(8, 8, 12)
    densities = [float(searched(layout, structured(layout), fidelity=fidelity)[2].double().mean()) for fidelity in (0.5, 0.7, 0.9, 0.97, 0.999)]
    assert densities == sorted(densities) and densities[0] + 0.4 < densities[-1]


@pytest.mark.leaves_dense
def test_a_layer_that_can_skip_next_to_nothing_stays_dense_and_is_searched_once_more():
    """Where AdaSpa would search again, and not in between: a dense call costs less than a sparse one that keeps everything."""
    layout = LAYOUTS["9x16x16"]
    run = make_session(auto, fidelity=0.999)
    easy, hard = (structured(layout), random_qkv(layout, heads=3))
    reasons = []
    for step in range(1, 8):
        answer = sparse_attention(make_call(layout, easy if step >= 5 else hard, step=step), run)
        reasons.append(answer.reason if isinstance(answer, Dense) else "sparse")
        assert not isinstance(answer, Dense) or answer.planned
        if step == 5:
            run.config = dataclasses.replace(run.config, fidelity=0.8)
    dense = "too little to skip at this fidelity"
    assert reasons == ["search step", dense, dense, dense, "search step", "sparse", "sparse"], reasons
    assert sorted(run.record.searches) == [1, 5]
    # A share that was asked for is kept to.
    run = make_session(auto, sparsity=0.05)
    answers = [sparse_attention(make_call(layout, hard, step=step), run) for step in (1, 2)]
    assert [isinstance(answer, Dense) for answer in answers] == [True, False]


def test_what_is_even_is_not_computed():
    """Keys that are all alike in a block are one key without loss, however heavy the block is."""
    layout = LAYOUTS["9x16x16"]
    q, k, v = random_qkv(layout)
    q += 0.3  # so that all look at what is like their mean
    for block in key_blocks(layout, "hilbert")[:20]:
        k[:, :, block], v[:, :, block] = k[:, :, block[:1]] * 0.1 + q.mean(2, keepdim=True), v[:, :, block[:1]]
    run, _, kept = searched(layout, (q, k, v), fidelity=0.9)
    chosen = kept_blocks(kept, video_blocks(layout, run))
    assert not chosen[..., :20].any() and chosen[..., 20:].any()
    run, _, kept = searched(layout, (q, k, v), fidelity=0.9, selection="mass")
    assert kept_blocks(kept, video_blocks(layout, run))[..., :20].any(), "they hold nothing: this shows nothing"


@pytest.mark.parametrize("knobs", [{"sparsity": 0.55}, {"fidelity": 0.8}, {"fidelity": 0.95}, {"sparsity": 0.7, "scope": "head"}], ids=str)
def test_a_batch_entry_gets_the_plan_that_it_gets_alone(knobs):
    for seed in (1, 2):
        qkv = [torch.cat(pair) for pair in zip(structured(LAYOUT, seed=seed), random_qkv(LAYOUT, heads=3, seed=seed), strict=True)]
        qkv[0][1] *= 2
        _, _, together = searched(LAYOUT, qkv, **knobs)
        for b in range(2):
            _, _, alone = searched(LAYOUT, [tensor[b : b + 1] for tensor in qkv], **knobs)
            assert torch.equal(together[b], alone[0])


@pytest.mark.parametrize("knobs", [{"sparsity": 0.55}, {"fidelity": 0.8}], ids=str)
@pytest.mark.parametrize("head_chunk", [1, 2])
def test_where_memory_is_short_groups_of_heads_keep_the_promise(knobs, head_chunk):
    qkv = structured(LAYOUT, batch=2)
    run = make_session(auto, **knobs)
    run.head_chunk = head_chunk
    sparse_attention(make_call(LAYOUT, qkv, step=1), run)
    call = make_call(LAYOUT, qkv, step=2)
    out = sparse_attention(call, run)
    kept = token_mask(auto.plan(call, run.config, run.state(call)), LAYOUT, 2, 3)
    assert relative_error(out, attention(*qkv, kept, blocks=key_blocks(LAYOUT, "hilbert"))[0]) < 1e-5
    assert kept[:, :, is_text(LAYOUT)].all() and kept[..., is_text(LAYOUT)].all() and not kept.all()
    density = kept.double().mean((2, 3))
    if "sparsity" in knobs:
        assert (density.mean(1) <= 0.45 + 1e-9).all() and (density.mean(1) > 0.45 - BLOCK_Q * BLOCK_K / LAYOUT.seq_len**2).all()
    else:
        assert (shortfall(run, LAYOUT, qkv, kept) <= 0.2 * 1.001).all()


class LargestResult(TorchFunctionMode):
    """The bytes of the largest tensor that any torch function gave."""

    bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() != args[0].data_ptr():
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_how_large_an_output_is_takes_no_copy_of_all_of_it():
    """Of 119k tokens in 16 bits, a copy in 64 is four times the output, which is large enough."""
    out = random_qkv(SMALL, batch=2, heads=16)[0].bfloat16()
    out[1, 3, 7] = math.nan
    expected = [sum(value**2 for value in entry.flatten().tolist() if math.isfinite(value)) for entry in out]
    with LargestResult() as largest:
        found = auto._size(out)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert largest.bytes < out.nbytes / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which, row", [(0, 300), (1, 4), (2, 4), (1, 300), (2, 300)], ids=["q", "text k", "text v", "k", "v"])
def test_one_number_that_is_none_spoils_what_dense_attention_would_and_no_more(which, row, bad):
    """Rows that dense attention gets right stay as close to it as was asked."""
    qkv = [tensor.clone() for tensor in structured(LAYOUT)]
    qkv[which][0, 1, row, 3] = bad
    exact = attention(*qkv)[0]
    shown = ~exact.isfinite().all(-1)
    assert shown.any() and not shown.all()
    run, _, kept = searched(LAYOUT, qkv, fidelity=0.9)
    assert not kept.all() and (which != 2 or kept[0, 1, :, row].all()), "what is no number is kept before all else"
    out = sparse_attention(make_call(LAYOUT, qkv, step=2), run)
    assert torch.equal(~out.isfinite().all(-1), shown)
    good = ~shown & ~is_text(LAYOUT)
    assert relative_error(out[good], exact[good]) < 0.13
    run.flush()
    assert run.record.to_json()["sparse_calls"] == 1


# When it searches.

WARM, THE_LAST, END = "warm-up step", "Auto's search step would be the last", "one of the last steps"


def drifting(layer, step, since=None):
    """A layer's tensors: the same in every step, or quite other ones from a step on."""
    drifted = since is not None and step >= since
    q, k, v = random_qkv(SMALL, seed=100 * layer + 50 * drifted)
    # Heads that look at the mean of many keys, which is no loss; then at a few, where it matters which.
    return (4 if drifted else 0.5) * q, k, v + 0.7


def kinds_of(run, steps, layers=(1,), since=None, condition="positive"):
    """What each step gives by layer: "search" (dense, computed on the way), "sparse", or the reason. Figures are read back between steps."""
    found = {layer: [] for layer in layers}
    for step in steps:
        for layer in layers:
            call = make_call(SMALL, drifting(layer, step, (since or {}).get(layer)), step=step, layer=layer, condition=condition)
            answer = sparse_attention(call, run)
            if isinstance(answer, Dense) and answer.output is not None:
                assert answer.reason == "search step" and relative_error(answer.output, attention(call.q, call.k, call.v)[0]) < 1e-5
                found[layer].append("search")
            else:
                found[layer].append(answer.reason if isinstance(answer, Dense) else "sparse")
        run.flush()
    return found if len(layers) > 1 else found[layers[0]]


@pytest.mark.parametrize("mode", [{"fidelity": 0.8}, {"sparsity": 0.4}], ids=["fidelity", "sparsity"])
@pytest.mark.parametrize("knobs, steps, expected", [
    pytest.param({}, range(10), [WARM, "search", *["sparse"] * 8], id="one search"),
    pytest.param({"warmup": 1}, range(3), ["search", "sparse", "sparse"], id="one warm-up step"),
    pytest.param({"warmup": 0}, range(3), ["search", "sparse", "sparse"], id="no warm-up"),
    pytest.param({"warmup": 5}, range(7), [WARM] * 4 + ["search", "sparse", "sparse"], id="a long warm-up"),
    pytest.param({}, (1, 1, 2, 2), ["search", WARM, "sparse", "sparse"], id="two evaluations a step"),
    pytest.param({}, (0, 3, 4), [WARM, "search", "sparse"], id="a cache skips the search"),
    pytest.param({"cache_refresh": 0}, range(10), [WARM, "search", *["sparse"] * 8], id="never again"),
    pytest.param({"cache_refresh": 3}, range(10), [WARM] + ["search", "sparse", "sparse"] * 3, id="every three steps"),
    pytest.param({"cache_refresh": 3}, (1, 5, 6, 7, 8), ["search", "search", "sparse", "sparse", "search"], id="every three steps, one skipped"),
    pytest.param({"cache_refresh": 4}, (1, 5, 8, 9), ["search", "search", "sparse", "sparse"], id="the last time would be in the last step"),
    pytest.param({"cache_refresh": 5, "end": 3}, range(10), [WARM, "search", *["sparse"] * 5, END, END, END], id="or in the last before dense ones"),
    pytest.param({"warmup": 10}, (7, 8, 9), [WARM, WARM, THE_LAST], id="all warm-up"),
    pytest.param({"warmup": 3, "end": 7}, (1, 2, 3), [WARM, THE_LAST, END], id="the last steps follow the warm-up"),
    pytest.param({}, (8, 9), ["search", "sparse"], id="a condition that begins late"),
    pytest.param({}, (9, 9), [THE_LAST, THE_LAST], id="a condition that begins in the last step"),
])
def test_schedule(knobs, steps, expected, mode):
    run = make_session(auto, **mode, **knobs)
    assert kinds_of(run, steps) == expected
    assert sum(run.record.searches.values()) == expected.count("search")


def test_a_search_without_a_later_step_is_made_where_it_is_saved():
    run = make_session(auto, warmup=10)
    run.keeping, run.record.layout = Keeping(), SMALL
    assert kinds_of(run, (7, 8, 9)) == [WARM, WARM, "search"]
    assert run.found_pattern(None) is not None


@pytest.mark.parametrize("mode", [{"fidelity": 0.8}, {"sparsity": 0.6}], ids=["fidelity", "sparsity"])
def test_a_layer_that_has_drifted_is_searched_anew_and_no_other(mode):
    run = make_session(auto, **mode)
    found = kinds_of(run, range(10), layers=(1, 2, 3), since={2: 5, 3: 8})
    assert found[1] == [WARM, "search", *["sparse"] * 8]
    assert found[2] == [WARM, "search", *["sparse"] * 4, "search", *["sparse"] * 3], "seen in step 5, mended in step 6"
    assert found[3] == [WARM, "search", *["sparse"] * 8], "seen in step 8; after step 9 no step could use it"
    errors = run.record.by_layer_and_step("error")
    before, drifted, mended = errors[2][4], errors[2][5], errors[2][7]
    assert drifted > 1.2 * max(before, mended)
    assert run.record.searches == {1: 3, 6: 1}


@pytest.mark.parametrize("knobs, since, expected", [
    pytest.param({}, 6, ["search", *["sparse"] * 5, "search", "sparse", "sparse"], id="at the next step"),
    pytest.param({"cache_refresh": 0}, 6, ["search", *["sparse"] * 8], id="never"),
    pytest.param({"end": 1}, 6, ["search", *["sparse"] * 5, "search", "sparse", END], id="a sparse step follows"),
    pytest.param({"end": 2}, 6, ["search", *["sparse"] * 6, END, END], id="none follows"),
])
def test_drift_is_mended_where_that_is_of_use(knobs, since, expected):
    run = make_session(auto, fidelity=0.8, **knobs)
    assert kinds_of(run, range(1, 10), since={1: since}) == expected
    errors = run.record.by_layer_and_step("error")[1]
    assert errors[6] > 0.3 > 0.21 > errors[5] > 0.01


def test_what_has_drifted_before_the_first_sparse_step_is_searched_anew():
    run = make_session(auto, fidelity=0.8)
    assert kinds_of(run, range(1, 10), since={1: 2}) == ["search", "sparse", "search", *["sparse"] * 6]
    errors = run.record.by_layer_and_step("error")[1]
    assert errors[2] > 0.25 and max(errors[4:]) < 0.25


def test_where_no_search_helps_a_second_one_is_the_last_at_once():
    """Both searches see tensors that are easy, all else those that are not: what the second comes out at is the norm."""
    run, kinds = make_session(auto, fidelity=0.8), []
    for step in range(1, 10):
        answer = sparse_attention(make_call(SMALL, drifting(1, step, None if step in (1, 3) else 0), step=step), run)
        kinds.append(answer.reason.split()[0] if isinstance(answer, Dense) else "sparse")
        run.flush()
    assert kinds == ["search", "sparse", "search", *["sparse"] * 6]
    assert all(error is None or error > 0.25 for error in run.record.by_layer_and_step("error")[1])


def test_drift_shows_only_in_what_a_call_was_measured_as():
    """A layer that errs more than was asked from the start, as a budget makes it, is not searched again and again."""
    run = make_session(auto, sparsity=0.9)
    assert kinds_of(run, range(1, 10), since={1: 0}) == ["search", *["sparse"] * 8]
    assert run.record.measured_error > 0.3


# What it measures.


@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("knobs", [{"fidelity": 0.7}, {"sparsity": 0.6, "skipped_blocks": "drop"}], ids=str)
def test_the_measured_error_is_that_of_the_sampled_rows(rows, knobs):
    qkv, bias = [torch.cat(pair) for pair in zip(structured(LAYOUT, seed=1), random_qkv(LAYOUT, heads=3, seed=2), strict=True)], padded(LAYOUT)
    run, _, kept = searched(LAYOUT, qkv, key_bias=bias, sampled_rows=rows, **knobs)
    call = make_call(LAYOUT, qkv, step=2, key_bias=bias)
    sparse_attention(call, run)
    picked = LAYOUT.prefix + sampled_rows(run.seed, 2, 1, rows, LAYOUT.video_tokens)  # text comes out exact
    assert len(picked) == min(rows, LAYOUT.video_tokens)
    exact = attention(*qkv, key_bias=bias)[0][:, :, picked]
    out = attention(*qkv, kept, key_bias=bias, blocks=as_one_key(run.config, LAYOUT))[0][:, :, picked]
    off, size = (out - exact).square().sum((2, 3)), exact.square().sum((2, 3))
    state = run.state(call)
    assert torch.allclose(state.figures.error.double(), (off / size).sqrt(), rtol=1e-4, atol=1e-5)
    run.flush()
    expected = float((off.sum() / size.sum()).sqrt())
    assert rows == 1 or expected > 0.05
    assert state.measured == (pytest.approx(expected, rel=1e-4, abs=1e-5),) and state.unread is None
    data = run.record.to_json()
    assert data["measured_error"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert data["error_by_layer_and_step"][1][2] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert data["error_by_layer_and_head"]["1"] == pytest.approx((off / size).sqrt().mean(0).tolist(), rel=1e-4, abs=1e-5)
    assert data["asked_error"] == (pytest.approx(0.3) if "fidelity" in knobs else None)


class NothingWaits(TorchFunctionMode):
    """Fails where a number of a tensor is asked for, which waits for a device."""

    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose", "masked_select")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in self.names, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_measuring_waits_for_nothing():
    run, _, _ = searched(LAYOUT, random_qkv(LAYOUT), fidelity=0.7)
    call = make_call(LAYOUT, random_qkv(LAYOUT), step=2)
    out = sparse_attention(call, run)  # what is kept by layout is made once
    state = run.state(call)
    with NothingWaits():
        auto.observe(call, run.config, state, out)
    assert state.unread[0] == 2 and state.unread[1] is state.found and state.unread[2].shape == ()
    with pytest.raises(AssertionError, match="waits"), NothingWaits():
        run.flush()


def test_layers_stacks_conditions_and_devices_are_measured_apart():
    """Each as it would be alone; all of a device are read back together."""
    def play(which, run):
        for place, (layer, stack, condition, device, seed) in enumerate(CALLERS):
            if place in which:
                qkv = random_qkv(SMALL, heads=1, seed=seed + 50 * (run.record.step > 1)).to(device)
                call = dataclasses.replace(make_call(SMALL, qkv, step=run.record.step, layer=layer, condition=condition), stack=stack)
                sparse_attention(call, run)

    def measured(which):
        run = make_session(auto, fidelity=0.7, backend="torch")
        for run.record.step in (1, 2, 3):
            play(which, run)
            run.flush()
        return {key: state.measured for key, state in run._states.items()}, run.record.by_layer_and_step("error"), run.record.layer_names()

    with pretended():
        states, by_layer, names = measured(range(len(CALLERS)))
        assert len(states) == len(CALLERS) and len(set(states.values())) == len(CALLERS)
        for place in (2, 4):
            layer, stack, condition, device, _ = CALLERS[place]
            alone, _, _ = measured([place])
            key = (torch.device(device), condition, layer, stack)
            assert states[key] == pytest.approx(alone[key], rel=1e-5)
    assert names == ["0", "1", "2", "1 vace"]
    of_layer_1 = [errors[0] for (_, _, layer, stack), errors in states.items() if (layer, stack) == (1, "")]
    assert len(of_layer_1) == 3 and by_layer[1][2] == pytest.approx(sum(of_layer_1) / 3, rel=1e-5)


CALLERS = (
    (1, "", "positive", "xpu:0", 1), (2, "", "positive", "xpu:0", 2), (1, "vace", "positive", "xpu:0", 3),
    (1, "", "negative", "xpu:0", 4), (1, "", "positive", "xpu:1", 5),
)  # fmt: skip


def test_on_a_device_without_float64():
    expected = sparse_outputs("cpu")
    with pretended():
        for found, wanted in zip(sparse_outputs("mps"), expected, strict=True):
            assert relative_error(found, wanted) < 1e-5


def sparse_outputs(device):
    outputs = []
    for knobs in ({"fidelity": 0.8}, {"sparsity": 0.5}, {"sparsity": 0.5, "selection": "share", "scope": "row"}):
        run, qkv = make_session(auto, **knobs), random_qkv(LAYOUT).to(device)
        for step in (1, 2):
            out = sparse_attention(make_call(LAYOUT, qkv, step=step), run)
        outputs.append(out.cpu())
        run.flush()
    return outputs


# What it leaves for other runs.


def test_a_row_may_keep_no_block_of_its_own():
    """All its keys count by blocks; AdaSpa's rows have some of their own always."""
    layout = VideoLayout(4, 8, 16)
    qkv = random_qkv(layout)
    run, plan, kept = searched(layout, qkv, sparsity=0.95)
    assert not kept.any(-1).all()
    out = sparse_attention(make_call(layout, qkv, step=2), run)
    assert relative_error(out, attention(*qkv, kept, blocks=key_blocks(layout, "hilbert"))[0]) < 1e-5
    tensors = auto.to_pattern(run.state(make_call(layout, qkv)).found.what)
    again = auto.from_pattern(tensors, make_call(layout, qkv), run.config, run)
    blocks = auto._blocks(make_call(layout, qkv), run.config, run)
    assert torch.equal(blocks.plan(again).mask.to_blocks(), plan.mask.to_blocks())
    other = make_session(adaspa, sparsity=0.95)
    with pytest.raises(ValueError, match="a row without a block"):
        adaspa.from_pattern(tensors, make_call(layout, qkv), other.config, other)
