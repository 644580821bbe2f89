"""What the rows of the table of video models say, on networks that have nothing but the attributes that a row reads."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pack.attention.call import Dense
from pack.attention.layout import VideoLayout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def models(host):
    return host.module("video_models")


@pytest.fixture
def row(models):
    return {row.name: row for row in models.ROWS}


@pytest.fixture
def evaluation(host):
    """evaluation(network, latent, text=..., **inputs): one evaluation, with text of so many tokens."""
    kind = host.module("model_row").Evaluation

    def make(network, latent=(1, 16, 9, 16, 16), text=32, **inputs):
        return kind(network, latent, {"context": torch.zeros(1, text, 4), **inputs})

    return make


@pytest.fixture
def call(host):
    """call(seq_q, seq_k, width=..., **options)"""
    kind = host.module("model_row").Call
    return lambda seq_q, seq_k=None, width=256, **options: kind(seq_q, seq_k or seq_q, width, options)


def layers(row, evaluation, calls):
    return [row.layer_of(evaluation, each) for each in calls]


def test_layers_are_counted_where_nothing_is_published(row, evaluation, call):
    network = SimpleNamespace(transformer_blocks=range(4))
    assert layers(row["LTX-Video"], evaluation(network), [call(576)] * 3) == [(0, ""), (1, ""), (2, "")]


def test_text_as_long_as_the_video_is_told_by_the_order(row, evaluation, call):
    network = SimpleNamespace(transformer_blocks=range(4), blocks=range(4))
    assert layers(row["LTX-Video"], evaluation(network, text=576), [call(576)] * 4) == [(0, ""), None, (1, ""), None]
    vace = [call(576, block_index=index) for index in (0, 0, 0, 0, 1, 1)]
    assert layers(row["Wan VACE"], evaluation(network, text=576), vace) == [(0, ""), None, (0, "vace"), None, (1, ""), None]
    joint = evaluation(SimpleNamespace(blocks=range(4)), text=576)
    assert layers(row["CogVideoX"], joint, [call(1152)] * 2) == [(0, ""), (1, "")]


def test_layers_left_out_by_guidance_keep_their_numbers(row, evaluation, call):
    network = SimpleNamespace(transformer_blocks=range(5))
    calls = [call(576, stg_self_attn_blocks=(1, 3))] * 3
    assert [layer.number for layer in layers(row["LTX-2"], evaluation(network), calls)] == [0, 2, 4]


def test_single_blocks_come_after_double_ones(row, evaluation, call):
    network = SimpleNamespace(double_blocks=range(2), single_blocks=range(3))
    calls = [call(608, block_index=index, block_type=kind) for kind, index in (("double", 0), ("double", 1), ("single", 0), ("single", 2))]
    assert [layer.number for layer in layers(row["HunyuanVideo"], evaluation(network), calls)] == [0, 1, 2, 4]
    assert row["HunyuanVideo"].layer_of(evaluation(network), call(32)) is None, "the text refiner publishes no number"


def test_further_calls_of_a_layer_are_stacks_of_their_own(row, evaluation, call):
    network = SimpleNamespace(blocks=range(2))
    calls = [call(576, block_index=0)] * 3
    assert layers(row["Wan VACE"], evaluation(network), calls) == [(0, ""), (0, "vace"), (0, "vace 2")]
    assert layers(row["Wan 2.1 / 2.2"], evaluation(network), calls) == [(0, ""), (0, "call 2"), (0, "call 3")]


def test_sound_is_told_by_its_width(row, evaluation, call):
    given = evaluation(SimpleNamespace(inner_dim=4096))
    assert row["LTX-2"].concerns(given, call(576, width=4096)) and not row["LTX-2"].concerns(given, call(576, width=2048))


def test_guides_that_lost_tokens_of_the_video_have_no_grid(row, evaluation, call):
    mask = torch.ones(1, 1, 9, 8, 8)
    guides = torch.zeros(1, 3, 64, 2)
    given = evaluation(SimpleNamespace(), (1, 128, 9, 8, 8), keyframe_idxs=guides, denoise_mask=mask)
    assert row["LTX-Video"].layout_of(given, call(576)) == VideoLayout(8, 8, 8, suffix=64)
    mask[..., 3, 2, :] = -1
    answer = row["LTX-Video"].layout_of(given, call(568))
    assert isinstance(answer, Dense) and answer.reason.startswith("8 tokens of the video itself are masked out")


def test_a_grid_that_the_model_publishes_is_taken(row, evaluation, call):
    network = SimpleNamespace(patch_size=(1, 2, 2))
    assert row["SCAIL"].layout_of(evaluation(network), call(700, grid_sizes=torch.Size((11, 8, 8)))) == VideoLayout(11, 8, 8)


@pytest.mark.parametrize(
    "attributes, latent, tokens, grid",
    [
        ({"patch_size": (1, 2, 2)}, (1, 16, 9, 16, 16), 576, (9, 8, 8)), ({"patch_size": 2}, (1, 16, 9, 16, 16), 576, (9, 8, 8)),
        ({"patch_size": 2, "patch_size_t": 2}, (1, 16, 9, 16, 16), 320, (5, 8, 8)),
        ({"patch_spatial": 4, "patch_temporal": 1}, (1, 16, 9, 16, 16), 144, (9, 4, 4)),
        ({}, (1, 16, 9, 16, 16), 576, (9, 8, 8)), ({}, (1, 16, 9, 16, 16), 2304, (9, 16, 16)), ({}, (1, 16, 9, 16, 16), 320, (5, 8, 8)),
        ({}, (1, 16, 9, 16, 16), 600, None), ({"patch_size": (1, 2, 2)}, (1, 16, 9, 16, 16), 2304, None), ({}, (1, 16, 16, 16), 256, None),
    ],
)
def test_an_unlisted_models_layout_is_inferred_where_the_length_is_the_videos(models, evaluation, call, attributes, latent, tokens, grid):
    network = type("SomeNewVideo", (), attributes)()
    row = models.find(network)
    layout = row.layout_of(evaluation(network, latent), call(tokens))
    assert row.name == "SomeNewVideo" and row.note.startswith("layout inferred: SomeNewVideo")
    if grid is None:
        assert isinstance(layout, Dense) and layout.reason.startswith("SomeNewVideo is not one of the video models that are covered: Wan 2.1 / 2.2, ")
    else:
        assert layout == VideoLayout(*grid)


def test_small_models_get_gentler_settings(row):
    small, large = (row["Wan 2.1 / 2.2"].automatic(SimpleNamespace(dim=width)) for width in (1536, 5120))
    for method in ("SVG", "AdaSpa"):
        assert small[method].sparsity < large[method].sparsity
    assert all(small[method].warmup > large[method].warmup for method in ("SVG", "AdaSpa", "Auto"))
    sources = {row["Wan 2.1 / 2.2"].source(SimpleNamespace(dim=width)) for width in (1536, 5120)}
    assert len(sources) == 2


def test_every_row_says_what_automatic_means_and_why(models):
    for row in models.ROWS:
        network = SimpleNamespace(dim=5120)
        automatic = row.automatic(network)
        assert set(automatic) == {"SVG", "AdaSpa", "Auto"} and row.source(network), row.name
        assert automatic["Auto"].sparsity == -1, "what its fidelity leaves"
        assert all(0 < automatic[method].sparsity <= 0.8 for method in ("SVG", "AdaSpa")), row.name
        assert len({each.warmup for each in automatic.values()}) == 1 and 0.2 <= automatic["Auto"].warmup <= 0.3, row.name


def test_no_class_has_two_rows(models):
    names = [name for row in models.ROWS for name in row.classes]
    assert len(names) == len(set(names)) and len({row.name for row in models.ROWS}) == len(models.ROWS)


def test_the_readmes_table_has_every_row(models):
    table = re.search(r"<!-- models:.*?-->(.*?)<!-- /models -->", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    assert re.findall(r"^\| (.+?) \|", table, re.M)[1:] == [row.name for row in models.ROWS]


def test_a_layout_that_cannot_be_read_ends_sparsity_in_words(host, monkeypatch, caplog):
    """As on a newer host that has renamed what a row reads."""
    model = host.load("wan")
    dense = host.sample(model, "wan")
    for method in ("svg", "adaspa", "auto"):
        patched = host.patch(method, model, sparsity=0.5)
        with monkeypatch.context() as changed:
            row = host.module("video_models").find(model.get_model_object("diffusion_model"))
            changed.setattr(type(row), "layout_of", lambda *_: 1 / 0)
            assert torch.equal(host.sample(patched, "wan"), dense)
        record = host.record(patched)
        assert record.sparse_calls == 0 and record.reasons == {"the sparse path failed (ZeroDivisionError: division by zero)": 8}
        with monkeypatch.context() as changed, pytest.raises(ZeroDivisionError):
            changed.setattr(type(row), "layout_of", lambda *_: 1 / 0)
            host.sample(host.patch(method, model, sparsity=0.5, strict=True), "wan")
