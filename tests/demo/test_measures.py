"""Measures against their formulas, and the table's shape."""

import math

import pytest
import torch
from pack.demo import measures


def test_psnr_of_a_known_error():
    """An error of 0.1 everywhere is 20 dB; of two clips the mean is taken."""
    video = torch.full((2, 3, 16, 16), 0.5)
    other = video.clone()
    other[0] += 0.1
    other[1] += 0.01
    assert measures.psnr_db(video, other) == pytest.approx((20 + 40) / 2, abs=1e-3)


def test_equal_videos_have_no_psnr_and_full_ssim():
    video = torch.rand(1, 2, 16, 16)
    assert measures.psnr_db(video, video.clone()) is None
    assert measures.ssim(video, video.clone()) == pytest.approx(1)


def test_ssim_falls_with_noise():
    video = torch.rand(1, 2, 32, 32)
    near, far = ((video + strength * torch.randn_like(video)).clamp(0, 1) for strength in (0.02, 0.3))
    assert 1 > measures.ssim(video, near) > measures.ssim(video, far)
    assert not math.isnan(measures.ssim(video, far))


def test_a_table_lines_up():
    lines = measures.table(["run", "seconds"], [["dense", "1.0"], ["SVG", "12.5"]]).splitlines()
    assert lines == ["run    seconds", "-----  -------", "dense      1.0", "SVG       12.5"]
