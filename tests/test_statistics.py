"""Distances of two clouds, against their definitions written out."""

import numpy as np
import pytest
from helpers import golden

from evaluations import statistics


def test_the_distance_of_gaussians_is_symmetric_and_rises_with_the_square_of_a_shift():
    rng = np.random.RandomState(0)
    (a, b), shift = (m @ m.T for m in rng.randn(2, 6, 6)), rng.randn(6)
    near = statistics.gaussian_frechet_distance(np.zeros(6), a, np.zeros(6), b)
    far = statistics.gaussian_frechet_distance(shift, a, np.zeros(6), b)
    assert far - near == pytest.approx((shift**2).sum())
    assert far == pytest.approx(statistics.gaussian_frechet_distance(np.zeros(6), b, shift, a), rel=1e-12)


def test_a_distribution_that_is_scaled():
    """N(0, S) and N(0, c^2 S) are (c - 1)^2 tr S apart."""
    m = np.random.RandomState(1).randn(40, 4)
    features = m - m.mean(axis=0)
    wanted = 4 * np.trace(np.cov(features, rowvar=False))
    assert statistics.frechet_distance(features, 3 * features) == pytest.approx(wanted, rel=1e-12)


def test_the_estimate_falls_with_the_number_of_images():
    """Two draws of one distribution: the truth is 0, what is printed is bias."""
    rng = np.random.RandomState(2)
    few, many = (statistics.frechet_distance(rng.randn(n, 16), rng.randn(n, 16)) for n in (40, 4000))
    assert few > 1 and many < 0.05


def test_the_kernel_distance_is_its_definition(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 3)
    x, y = np.random.RandomState(3).randn(2, 7, 5)

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(7) for j in range(7) if i != j])

    wanted = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert statistics.kernel_distance(x, y) == pytest.approx(wanted, rel=1e-12)


def test_the_official_spatial_distance():
    data, wanted = golden("evaluator_features.npz"), golden("evaluator_features.json")
    found = statistics.frechet_distance(data["ref_spatial"], data["sample_spatial"])
    assert found == pytest.approx(wanted["sFID"], rel=1e-6)


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(5), np.full((4, 2), np.nan)])
def test_what_has_no_covariance_is_refused(features):
    with pytest.raises(ValueError, match="finite"):
        statistics.moments(features)
