"""What a person sets: every knob's range, by the knob's name in the message."""

import math

import pytest
from pack.attention.methods import METHODS, adaspa, auto, svg

CONFIGS = {name: method.CONFIG for name, method in METHODS.items()}
BOTH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_defaults_are_the_released_ones():
    """Input ids and defaults never change once released."""
    shared = {"warmup_steps": -1, "cache_refresh": -1, "end_steps": 0, "min_tokens": -1, "backend": "auto", "strict": False, "precision": "auto"}
    of_svg = {"sparsity": 0.7, "dense_layers": "0", "sampled_rows": 64, "head_types": "online", "first_frame_sink": True}
    assert vars(svg.CONFIG()) == {**shared, **of_svg}
    of_adaspa = {"sparsity": 0.8, "dense_layers": "", "head_adaptive": True, "token_order": "hilbert"}
    assert vars(adaspa.CONFIG()) == {**shared, **of_adaspa, "block_q": 128, "lse_cache": True, "always_adapt": False, "skipped_blocks": "mean"}
    of_auto = {"sparsity": -1, "dense_layers": "", "fidelity": 0.9, "token_order": "hilbert", "block_q": 128, "skipped_blocks": "mean"}
    assert vars(auto.CONFIG()) == {**shared, **of_auto, "selection": "error", "scope": "layer", "sampled_rows": 64}


@BOTH
@pytest.mark.parametrize("knob, value", [
    ("sparsity", 0), ("sparsity", 0.0), ("sparsity", 0.95), ("warmup_steps", -1), ("warmup_steps", 0), ("warmup_steps", 1000),
    ("cache_refresh", -1), ("cache_refresh", 0), ("cache_refresh", 3), ("end_steps", 0), ("min_tokens", -1), ("min_tokens", 10**6),
    ("dense_layers", ""), ("dense_layers", " 0-2, -1 "), *[("backend", name) for name in ("auto", "triton", "torch", "reference")],
    *[("precision", name) for name in ("auto", "int8", "fp8")],
])
def test_the_ends_of_every_range_are_taken(config, knob, value):
    assert getattr(config(**{knob: value}), knob) == value


NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", None, True, [1]]


@BOTH
@pytest.mark.parametrize("knob, value", [
    *[("sparsity", value) for value in (-0.01, 0.96, 1.0, 70, *NOT_NUMBERS)],
    *[("warmup_steps", value) for value in (-2, 1.5, *NOT_NUMBERS)],
    *[("cache_refresh", value) for value in (-2, 0.5, *NOT_NUMBERS)],
    *[("end_steps", value) for value in (-1, 2.5, *NOT_NUMBERS)],
    *[("min_tokens", value) for value in (-2, 0.1, *NOT_NUMBERS)],
    *[("backend", value) for value in ("cuda", "", "Auto", None, 1)],
    *[("precision", value) for value in ("fp16", "", "INT8", None, 8)],
    *[("dense_layers", value) for value in ("x", "3-1", "1;2", None, 0)],
], ids=lambda value: repr(value) if not isinstance(value, str) else value or "empty")
def test_what_lies_outside_is_refused_by_name(config, knob, value):
    with pytest.raises(ValueError, match=f"^{knob}: "):
        config(**{knob: value})


@pytest.mark.parametrize("value", [0, -1, 4097, 1.5, *NOT_NUMBERS], ids=repr)
def test_sampled_rows_is_a_count(value):
    with pytest.raises(ValueError, match=r"^sampled_rows: "):
        svg.CONFIG(sampled_rows=value)
    assert svg.CONFIG(sampled_rows=1).sampled_rows == 1 and svg.CONFIG(sampled_rows=4096).sampled_rows == 4096


@pytest.mark.parametrize("value", ["", "Online", "temporal", None, 0], ids=repr)
def test_head_types_are_found_or_drawn(value):
    with pytest.raises(ValueError, match=r"^head_types: .*online, random"):
        svg.CONFIG(head_types=value)
    assert svg.CONFIG(head_types="random").head_types == "random"


@pytest.mark.parametrize("value", ["", "True", None, 0, 1], ids=repr)
def test_first_frame_sink_is_on_or_off(value):
    with pytest.raises(ValueError, match=r"^first_frame_sink: .*on or off"):
        svg.CONFIG(first_frame_sink=value)
    assert not svg.CONFIG(first_frame_sink=False).first_frame_sink


@pytest.mark.parametrize("config", [adaspa.CONFIG, auto.CONFIG])
@pytest.mark.parametrize("value", ["", "Tile", "random", None, 0], ids=repr)
def test_token_order_is_one_of_three(config, value):
    with pytest.raises(ValueError, match=r"^token_order: .*raster, tile, hilbert"):
        config(token_order=value)
    assert [config(token_order=order).token_order for order in ("raster", "tile", "hilbert")] == ["raster", "tile", "hilbert"]


@pytest.mark.parametrize("config, knob, right, wrong", [
    *[(config, "skipped_blocks", ("mean", "drop"), ("", "Mean", None, True)) for config in (adaspa.CONFIG, auto.CONFIG)],
    *[(config, "block_q", (64, 128), (0, 32, 96, 256, -128, "128", None, math.nan)) for config in (adaspa.CONFIG, auto.CONFIG)],
    (adaspa.CONFIG, "lse_cache", (True, False), (0, 1, "True", None)), (adaspa.CONFIG, "always_adapt", (True, False), (0, 1, "", None)),
    (auto.CONFIG, "selection", ("error", "mass", "share"), ("", "Error", None, 1)),
    (auto.CONFIG, "scope", ("layer", "head", "row"), ("", "run", None)),
    (auto.CONFIG, "fidelity", (0, 0.0, 0.5, 0.999), (-0.01, 1.0, 1, 90, *NOT_NUMBERS)),
    (auto.CONFIG, "sampled_rows", (1, 4096), (0, -1, 4097, 1.5, *NOT_NUMBERS)),
], ids=lambda value: value if isinstance(value, str) else None)
def test_the_other_knobs_of_methods_that_choose_blocks(config, knob, right, wrong):
    for value in right:
        settings = {"sparsity": 0.5} if knob == "selection" else {}
        assert getattr(config(**settings, **{knob: value}), knob) == value
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{knob}: "):
            config(**{knob: value})


@pytest.mark.parametrize("knob", ["warmup_steps", "cache_refresh", "end_steps", "min_tokens", "sampled_rows"])
def test_a_whole_number_written_as_a_float_counts_as_one_or_is_refused(knob):
    """JSON has 2.0; a count that is taken must be usable as one."""
    try:
        config = svg.CONFIG(**{knob: 2.0})
    except ValueError as error:
        assert str(error).startswith(knob)
    else:
        assert type(getattr(config, knob)) is int


def test_the_message_says_what_is_wrong_and_what_is_right():
    with pytest.raises(ValueError, match=r"^sparsity: nan is not a number from 0 to 0\.95, or -1 for automatic$"):
        svg.CONFIG(sparsity=math.nan)
    with pytest.raises(ValueError, match=r"^end_steps: -3 is not a whole number from 0 up$"):
        svg.CONFIG(end_steps=-3)
    with pytest.raises(ValueError, match=r'"2-x"'):
        svg.CONFIG(dense_layers="0, 2-x, 4")
