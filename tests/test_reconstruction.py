"""PSNR and SSIM by their definitions."""

import numpy as np
import pytest

from evaluations.reconstruction import psnr, ssim


def test_psnr_of_a_constant_error():
    images = np.full((2, 8, 8, 3), 100.0)
    shifted = images + np.array([1.0, 10.0])[:, None, None, None]
    assert psnr(images, shifted) == pytest.approx([48.1308, 28.1308], abs=1e-4)
    assert np.isinf(psnr(images, images)).all()


def test_ssim_is_one_for_equals_and_known_for_constants():
    """Two constants a, b have SSIM (2ab + c1) / (a^2 + b^2 + c1)."""
    images = np.random.RandomState(0).randint(0, 255, (2, 16, 16, 3))
    assert ssim(images, images) == pytest.approx([1, 1])
    a, b, c1 = 100.0, 120.0, 2.55**2
    wanted = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(np.full((1, 16, 16, 1), a), np.full((1, 16, 16, 1), b)) == pytest.approx([wanted])
    assert ssim(images, 255 - images).max() < 0
