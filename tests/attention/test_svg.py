"""SVG: which keys each kind of head keeps, by frame and patch of each token; which kind a head is; when it is asked again."""

import re

import pytest
import torch
from pack import kernels
from pack.attention.budget import BLOCK_K, BLOCK_Q
from pack.attention.layout import VideoLayout
from pack.attention.methods import svg
from pack.attention.methods.svg import SPATIAL, TEMPORAL, Bands, sampled_rows
from video_oracle import LAYOUTS, chunks, frame_and_patch, is_text, local_qk, make_call, make_session, place, random_qkv, token_mask, video_rows

KINDS = {"spatial": SPATIAL, "temporal": TEMPORAL}
CASES = [(name, sparsity) for name in LAYOUTS for sparsity in (0.0, 0.3, 0.7, 0.95)] + [("9x16x16", 0.5), ("5x10x13+prefix", 0.1)]
CPU = torch.device("cpu")

every_case = pytest.mark.parametrize("name, sparsity", CASES, ids=[f"{name}-{sparsity}" for name, sparsity in CASES])
every_kind = pytest.mark.parametrize("kind", KINDS)


def kept_pairs(layout, bands, kind):
    """bool [S, S] of one kind of head."""
    return token_mask(bands.candidates()[KINDS[kind]], layout)[0, 0]


def is_first_frame(layout):
    return ~is_text(layout) & (frame_and_patch(layout)[0] == 0)


def gaps(layout, kind, first_frame_sink=True):
    """How far apart blocks lie, as {gap: pairs}: blocks of 128 queries, and of 64 keys of the frames after the first, in the kind's order.

    Without the sink, keys of the first frame too.
    """
    places = place(layout, kind)
    first = is_first_frame(layout) & first_frame_sink
    queries = chunks([int(places[row]) for row in video_rows(layout, kind)], BLOCK_Q)
    keys = chunks([int(places[row]) for row in video_rows(layout, kind) if not first[row]], BLOCK_K)
    pairs = {}
    for q in queries:
        for k in keys:
            gap = max(k[0] - q[-1], q[0] - k[-1], 0)
            pairs[gap] = pairs.get(gap, 0) + len(q) * len(k)
    return pairs


def sink_pairs(layout):
    text, first = int(is_text(layout).sum()), int(is_first_frame(layout).sum())
    return text * layout.seq_len + (layout.seq_len - text) * (text + first)


@every_kind
@every_case
def test_text_and_first_frame_are_always_kept(name, sparsity, kind):
    layout = LAYOUTS[name]
    kept = kept_pairs(layout, Bands.build(layout, sparsity, CPU), kind)
    text = is_text(layout)
    assert kept[text].all() and kept[:, text].all() and kept[:, is_first_frame(layout)].all()


@every_kind
@every_case
def test_the_band_is_kept_and_nothing_beyond_its_blocks(name, sparsity, kind):
    layout = LAYOUTS[name]
    bands = Bands.build(layout, sparsity, CPU)
    kept = kept_pairs(layout, bands, kind)
    width = bands.widths[KINDS[kind]]
    video, first, places = ~is_text(layout), is_first_frame(layout), place(layout, kind)
    of_video = video[:, None] & video
    distance = (places[:, None] - places).abs()
    assert kept[of_video & (distance <= width)].all()

    reach = torch.zeros(layout.seq_len, dtype=torch.int64)  # from a key to the far end of its block
    for block in chunks([row for row in video_rows(layout, kind) if not first[row]], BLOCK_K):
        reach[block] = places[block[-1]] - places[block[0]]
    beyond = distance > width + (BLOCK_Q - 1) + reach
    assert not kept[of_video & ~first & beyond].any()


def test_some_of_these_bands_do_leave_keys_out():
    """Or the test above would hold for anything."""
    left_out = {name: not kept_pairs(LAYOUTS[name], Bands.build(LAYOUTS[name], 0.7, CPU), "temporal").all() for name in LAYOUTS}
    assert left_out == {name: name != "2x3x5+prefix" for name in LAYOUTS}


@every_kind
@every_case
def test_achieved_sparsity_is_the_asked_one_or_the_floor(name, sparsity, kind):
    layout = LAYOUTS[name]
    bands = Bands.build(layout, sparsity, CPU)
    counted = float(kept_pairs(layout, bands, kind).double().mean())
    assert counted == pytest.approx(float(bands.densities[KINDS[kind]]), abs=1e-6)

    # A limit that both kinds share is said once, and names none.
    notes = [note for note in bands.limits if kind in note or "heads" not in note]
    floor = (sink_pairs(layout) + gaps(layout, kind).get(0, 0)) / layout.seq_len**2
    if floor <= 1 - sparsity:
        assert not notes and abs(counted - (1 - sparsity)) <= BLOCK_K / layout.seq_len
    else:
        assert counted == pytest.approx(floor, abs=1e-9) and bands.widths[KINDS[kind]] == 0
        frames, most = re.fullmatch(rf"(\d+) latent frames: at most (0\.\d\d) can be skipped(?: by {kind} heads)?", *notes).groups()
        assert int(frames) == layout.frames and float(most) == pytest.approx(1 - floor, abs=0.0051)


@every_kind
@every_case
def test_no_other_width_comes_nearer(name, sparsity, kind):
    layout = LAYOUTS[name]
    bands = Bands.build(layout, sparsity, CPU)
    by_gap = gaps(layout, kind)
    cost, costs = sink_pairs(layout), []
    for gap in sorted(by_gap):
        cost += by_gap[gap]
        costs.append(cost)
    asked = (1 - sparsity) * layout.seq_len**2
    achieved = float(kept_pairs(layout, bands, kind).sum())
    assert abs(achieved - asked) == pytest.approx(min(abs(cost - asked) for cost in costs), abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sparsity_zero_keeps_everything(layout):
    bands = Bands.build(layout, 0.0, CPU)
    assert all(kept_pairs(layout, bands, kind).all() for kind in KINDS) and bands.densities.tolist() == [1, 1] and bands.limits == ()


@every_kind
@every_case
def test_without_its_sink_the_first_frame_is_like_any_other(name, sparsity, kind):
    """Whole blocks by their distance alone, as many as the budget has room for; text stays."""
    layout = LAYOUTS[name]
    bands = Bands.build(layout, sparsity, CPU, first_frame_sink=False)
    kept, text, places = kept_pairs(layout, bands, kind), is_text(layout), place(layout, kind)
    assert kept[text].all() and kept[:, text].all()
    width, by_gap = bands.widths[KINDS[kind]], gaps(layout, kind, first_frame_sink=False)
    keys = chunks([int(places[row]) for row in video_rows(layout, kind)], BLOCK_K)
    reach = torch.zeros(layout.video_tokens, dtype=torch.int64)
    for block in keys:
        reach[block] = block[-1] - block[0]
    distance = (places[~text][:, None] - places[~text]).abs()
    of_video = kept[~text][:, ~text]
    assert of_video[distance <= width].all() and not of_video[distance > width + (BLOCK_Q - 1) + reach[places[~text].long()]].any()
    cost, costs = int(text.sum()) * (2 * layout.seq_len - int(text.sum())), []
    for gap in sorted(by_gap):
        cost += by_gap[gap]
        costs.append(cost)
    asked, achieved = (1 - sparsity) * layout.seq_len**2, float(kept.sum())
    assert abs(achieved - asked) == pytest.approx(min(abs(cost - asked) for cost in costs), abs=1e-3)


def test_some_bands_leave_the_first_frame_out_where_it_is_no_sink():
    left_out = dict.fromkeys(KINDS, False)
    for layout in LAYOUTS.values():
        for kind in KINDS:
            first, text = is_first_frame(layout), is_text(layout)
            left_out[kind] |= not kept_pairs(layout, Bands.build(layout, 0.7, CPU, first_frame_sink=False), kind)[~text][:, first].all()
    assert all(left_out.values())


def test_the_sink_is_asked_for_in_the_config():
    layout, plans = LAYOUTS["9x16x16"], {}
    for sink in (True, False):
        run = make_session(svg, sparsity=0.7, first_frame_sink=sink)
        call = make_call(layout, random_qkv(layout))
        plans[sink] = token_mask(svg.plan(call, run.config, run.state(call)), layout, *call.q.shape[:2])
    assert plans[True][..., is_first_frame(layout)].all() and not plans[False][..., is_first_frame(layout)].all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
def test_every_row_is_in_each_order_once(layout, sink):
    plan = Bands.build(layout, 0.7, CPU, sink).plan(torch.tensor([[False, True]]))
    for order in (plan.q_order, plan.k_order):
        for rows in order.rows.tolist():
            assert sorted(row for row in rows if row >= 0) == list(range(layout.seq_len))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_key_block_holds_two_kinds_of_token(layout):
    """So that a sink is a range of columns."""
    kind_of = torch.where(is_text(layout), 0, torch.where(is_first_frame(layout), 1, 2))
    for rows in Bands.build(layout, 0.7, CPU).k_order.rows:
        for block in rows.view(-1, BLOCK_K):
            assert len(kind_of[block[block >= 0].long()].unique()) == 1


@pytest.mark.parametrize("name", ["9x16x16", "3x12x12+both"])
def test_what_is_profiled_is_what_is_executed(name, monkeypatch):
    layout = LAYOUTS[name]
    profiled, rows, given = [], [], {}
    answer = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 0.0, 9.0]], [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]])  # [C, B, H]

    def errors(q, k, v, sampled, candidates, **others):
        given.update(others)
        rows.append(sampled)
        profiled.extend(candidates)
        return answer

    monkeypatch.setattr(kernels, "sampled_errors", errors)
    run = make_session(svg, sparsity=0.6, sampled_rows=32)
    call = make_call(layout, random_qkv(layout, batch=2, heads=3, dim=8), step=4, layer=2, scale=0.2, key_bias=torch.zeros(1, layout.seq_len))
    plan = svg.plan(call, run.config, run.state(call))
    executed = token_mask(plan, layout, 2, 3)
    for b in range(2):
        for h in range(3):
            kind = int(answer[1, b, h] < answer[0, b, h])  # heads 1 of the first, 0 and 2 of the second; 2 of the first is a tie
            assert torch.equal(executed[b, h], token_mask(profiled[kind], layout)[0, 0])
    assert torch.equal(rows[0], sampled_rows(run.seed, 4, 2, 32, layout.seq_len))
    assert given == {"scale": 0.2, "key_bias": call.key_bias, "backend": "auto"}
    figures = run.state(call).figures
    assert figures.temporal.tolist() == [[False, True, False], [True, False, True]]
    assert torch.allclose(figures.density.double(), executed.double().mean((2, 3)), atol=1e-6)


def two_kinds_of_heads(layout, kinds):
    """q, k, v [B, H, S, 64] whose heads attend to neighbours in frame-major or in token-major order."""
    q = torch.stack([torch.stack([local_qk(place(layout, kind), 6.0, 10.0, seed=h) for h, kind in enumerate(row)]) for row in kinds])
    return q, q, torch.randn(q.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", [VideoLayout(8, 10, 10), VideoLayout(7, 9, 11, prefix=20, suffix=3)], ids=str)
def test_heads_show_their_kind(layout, backend):
    kinds = [["temporal", "spatial", "spatial"], ["spatial", "temporal", "temporal"]]
    run = make_session(svg, sparsity=0.7, backend=backend)
    call = make_call(layout, two_kinds_of_heads(layout, kinds))
    svg.plan(call, run.config, run.state(call))
    assert run.state(call).found.what.tolist() == [[kind == "temporal" for kind in row] for row in kinds]


def drawn_types(seed=0, heads=64, batch=2, steps=(4,), layer=2, **settings):
    """found.what [B, H] after calls in these steps, with head types by lot; none of them may look at the heads."""
    layout = LAYOUTS["4x7x9"]
    run = make_session(svg, head_types="random", **settings)
    run.seed = seed
    for step in steps:
        call = make_call(layout, random_qkv(layout, batch=batch, heads=heads, dim=8), step=step, layer=layer)
        svg.plan(call, run.config, run.state(call))
    return run.state(call).found.what


def test_types_by_lot_come_from_seed_step_layer_and_head_alone(monkeypatch):
    monkeypatch.setattr(kernels, "sampled_errors", lambda *args, **kwargs: pytest.fail("looked at the heads"))
    torch.manual_seed(0)
    first = drawn_types()
    torch.manual_seed(1)
    assert first.shape == (2, 64) and torch.equal(first, drawn_types()) and torch.equal(first[0], first[1])
    assert torch.equal(first[:, :10], drawn_types(heads=10)) and torch.equal(first[:1], drawn_types(batch=1))
    assert 16 < int(first[0].sum()) < 48  # half of 64, give or take four standard deviations
    for other in ({"seed": 1}, {"steps": (5,)}, {"layer": 3}):
        assert not torch.equal(first, drawn_types(**other))


def test_types_by_lot_are_drawn_as_often_as_heads_would_be_looked_at():
    assert torch.equal(drawn_types(steps=(4, 5)), drawn_types(steps=(5,)))
    assert torch.equal(drawn_types(steps=(4, 5), cache_refresh=0), drawn_types(steps=(4,)))


def test_a_tie_is_spatial():
    layout = LAYOUTS["9x16x16"]
    q, k, v = random_qkv(layout)
    run = make_session(svg)
    call = make_call(layout, (q, k, torch.zeros_like(v)))
    svg.plan(call, run.config, run.state(call))
    assert not run.state(call).found.what.any()


@pytest.mark.parametrize("total", [100, 2304, 119056])
@pytest.mark.parametrize("count", [1, 32, 64, 77])
def test_rows_are_one_from_each_stratum_of_the_whole_sequence(count, total):
    for step in range(20):
        rows = sampled_rows(3, step, 1, count, total).tolist()
        assert len(rows) == count
        assert all(index * total / count - 1 < row < (index + 1) * total / count for index, row in enumerate(rows))


def test_rows_come_from_seed_step_and_layer_alone():
    torch.manual_seed(0)
    first = sampled_rows(5, 2, 9, 64, 5000)
    torch.manual_seed(1)
    assert torch.equal(first, sampled_rows(5, 2, 9, 64, 5000))
    for other in ((6, 2, 9), (5, 3, 9), (5, 2, 10), (5, 9, 2), (2, 5, 9)):
        assert not torch.equal(first, sampled_rows(*other, 64, 5000))
    assert len(sampled_rows(2**64 - 1, 0, 0, 64, 5000)) == 64  # the largest seed that ComfyUI gives


def test_a_sample_as_large_as_the_sequence_is_the_sequence():
    assert sampled_rows(0, 0, 0, 64, 30).tolist() == sampled_rows(0, 0, 0, 30, 30).tolist() == list(range(30))


@pytest.mark.parametrize("refresh, found_at, profiled", [
    (-1, [3, 3, 4, 5, 8, 9], 5), (0, [3] * 6, 1), (1, [3, 3, 4, 5, 8, 9], 5), (2, [3, 3, 3, 5, 8, 8], 3), (4, [3, 3, 3, 3, 8, 8], 2), (9, [3] * 6, 1),
])
def test_heads_are_classified_anew_when_that_is_due(refresh, found_at, profiled, monkeypatch):
    """A step of two evaluations (3), and steps that a cache skipped (6 and 7): a refresh due there comes at the next."""
    layout, run = LAYOUTS["4x7x9"], make_session(svg, cache_refresh=refresh)
    qkv, times = random_qkv(layout), []
    measure = kernels.sampled_errors
    monkeypatch.setattr(kernels, "sampled_errors", lambda *args, **kwargs: times.append(1) or measure(*args, **kwargs))
    seen = []
    for step in (3, 3, 4, 5, 8, 9):
        call = make_call(layout, qkv, step=step)
        svg.plan(call, run.config, run.state(call))
        seen.append(run.state(call).found.step)
    assert seen == found_at and len(times) == profiled


@pytest.mark.parametrize(
    "layout, ends", [((4, 7, 9), [""]), ((3, 8, 8), [" by spatial heads", " by temporal heads"])], ids=["alike", "different"],
)
def test_limits_are_said_once(layout, ends):
    """At every step again, and by each kind of head only where the kinds differ."""
    layout, run = VideoLayout(*layout), make_session(svg, sparsity=0.95)
    for step in (3, 4):
        call = make_call(layout, step=step)
        svg.plan(call, run.config, run.state(call))
    assert [re.sub(r"^\d latent frames: at most 0\.\d\d can be skipped", "", note) for note in run.record.notes] == ends
