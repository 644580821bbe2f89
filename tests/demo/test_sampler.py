"""The sampler and the clips: figures that follow from their definitions."""

import pytest
import torch
from pack.demo import clips, sampler


def test_sigmas_fall_from_one_to_zero_with_shift_3():
    sigmas = sampler.make_sigmas(20)
    assert len(sigmas) == 21 and sigmas[0] == 1 and sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    # Half of the time is left: 3 * 0.5 / (1 + 2 * 0.5).
    assert float(sigmas[10]) == pytest.approx(0.75)
    assert sampler.percent_to_sigma(0.2) == pytest.approx(2.4 / 2.6)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_a_model_that_knows_the_answer_arrives_there(steps):
    noise, answer = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    seen = []

    def predict(x, sigma, step):
        seen.append((step, sigma))
        torch.testing.assert_close(x, (1 - sigma) * answer + sigma * noise, rtol=1e-4, atol=1e-5)
        return noise - answer

    torch.testing.assert_close(sampler.sample(predict, noise, sampler.make_sigmas(steps)), answer, rtol=1e-4, atol=1e-5)
    assert seen == [(step, float(sigma)) for step, sigma in enumerate(sampler.make_sigmas(steps)[:-1])]


def test_noise_is_that_of_the_global_generator():
    """ComfyUI's prepare_noise seeds torch's own generator."""
    torch.manual_seed(7)
    assert torch.equal(torch.randn(2, 3), clips.start_noise((2, 3), 7))


def test_a_pixel_lies_where_depth_says():
    """channel = 4 dy + dx; white is 2 in a latent, black -2."""
    latents = torch.full((1, 16, 3, 2, 2), -2.0)
    latents[0, 4 * 3 + 1, 2, 1, 0] = 2.0
    pixels = clips.to_pixels(latents)
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.nonzero().tolist() == [[0, 2, 4 * 1 + 3, 4 * 0 + 1]]
    assert float(pixels.max()) == 1


def test_the_model_is_given_the_first_frame_and_nothing_else():
    latents = torch.randn(2, 16, 3, 4, 4)
    x = torch.randn_like(latents)
    whole = clips.model_input(x, clips.first_frames(latents))
    assert whole.shape == (2, 36, 3, 4, 4)
    assert torch.equal(whole[:, :16], x)
    assert not whole[:, 16:20].any() and not whole[:, 20:, 1:].any()
    assert torch.equal(whole[:, 20:, 0], latents[:, :, 0])


def test_few_clips_are_of_different_sources():
    some = clips.load_clips(3)
    assert len({name.split("@")[0] for name in some.names}) == 3
    assert some.latents.shape == (3, 16, 13, 32, 48) and some.text.shape == (3, 8, 64)
