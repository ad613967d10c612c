"""Distances of two clouds, against their definitions written out."""

import warnings

import numpy as np
import pytest
import scipy.linalg
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


def test_moments_in_blocks_are_the_moments(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 7)
    features = (np.random.RandomState(5).randn(40, 6) + 100).astype(np.float32)
    mean, cov = statistics.moments(features)
    assert np.allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    assert np.allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def clouds(n, m, d, seed=6):
    """Features whose standard deviations fall as those of Inception do."""
    rng = np.random.RandomState(seed)
    scale = np.arange(1, d + 1) ** -0.5
    return rng.randn(n, d) * scale + 0.1, rng.randn(m, d) * scale * 1.2


@pytest.mark.parametrize("n, m", [(300, 400), (300, 20), (20, 400), (20, 30)])
def test_every_rank_gives_what_the_root_of_the_product_gives(n, m):
    """40 features: the eigenvalues of S1 S2 that can differ from 0 are the oracle, and sqrtm where it can be."""
    x, y = clouds(n, m, 40)
    (m1, s1), (m2, s2) = statistics.moments(x), statistics.moments(y)
    eigenvalues = np.sort(np.linalg.eigvals(s1 @ s2).real)[::-1][: min(n - 1, m - 1, 40)]
    wanted = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(eigenvalues).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert statistics.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-7)
    assert statistics.gaussian_frechet_distance(m1, s1, m2, s2) == pytest.approx(wanted, rel=1e-7)
    if min(n, m) > 40:
        root = np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
        assert wanted == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
def test_the_root_of_a_covariance_of_any_rank(rank):
    rows = np.random.RandomState(7).randn(rank, 9)
    root = statistics.covariance_root(rows.T @ rows)
    assert root.shape == (rank, 9) and np.allclose(root.T @ root, rows.T @ rows, atol=1e-12)


def test_the_nuclear_norm_of_planted_singular_values():
    """Over sixteen decades, where the Gram matrix's eigenvalues would be noise, too."""
    rng = np.random.RandomState(8)
    left, right = (np.linalg.qr(rng.randn(size, 60))[0] for size in (60, 80))
    for values in (np.linspace(1, 2, 60), np.logspace(0, -16, 60), np.r_[1, np.full(59, 1e-7)]):
        found = statistics.nuclear_norm(left * values @ right.T)
        assert found == pytest.approx(values.sum(), rel=1e-10)
    assert statistics.nuclear_norm(np.zeros((0, 4))) == 0


def test_the_floor_is_the_distance_of_real_from_real():
    real = np.random.RandomState(9).randn(600, 8)
    floor = statistics.frechet_floor(real, 100, 200, seed=1)
    fresh = [np.random.RandomState(seed).randn(300, 8) for seed in range(20)]
    wanted = np.mean([statistics.frechet_distance(a[:100], a[100:]) for a in fresh])
    assert (floor.n, floor.m) == (100, 200) and floor.mean == pytest.approx(wanted, rel=0.25)
    shrunk = statistics.frechet_floor(real, 800, 400, seed=1)
    assert (shrunk.n, shrunk.m) == (400, 200) and shrunk.mean < floor.mean


def test_the_kernel_distance_over_subsets():
    rng = np.random.RandomState(10)
    x, y, far = rng.randn(400, 6), rng.randn(400, 6), rng.randn(400, 6) + 0.5
    near, off = (statistics.kernel_distance_subsets(x, other, 50, seed=2) for other in (y, far))
    assert abs(near.mean - statistics.kernel_distance(x, y)) < 2 * near.std / np.sqrt(50) + 0.003
    assert off.mean == pytest.approx(statistics.kernel_distance(x, far), rel=0.1) and off.mean > 10 * near.std
    assert near == statistics.kernel_distance_subsets(x, y, 50, 200, seed=2)
    assert statistics.subset_size(400, 900) == 200 and statistics.subset_size(5000, 2500) == 1000
    with pytest.raises(ValueError, match="a subset of 500 rows"):
        statistics.kernel_distance_subsets(x, y, size=500)


def test_the_classifier_score_is_one_for_a_constant_and_the_number_of_classes_for_certainty():
    assert statistics.classifier_inception_score(np.tile([0.5, 0.3, 0.2], (9, 1))) == pytest.approx(1)
    assert statistics.classifier_inception_score(np.tile(np.eye(31), (4, 1))) == pytest.approx(31)
    assert statistics.classifier_inception_score([[0.9, 0.1], [0.1, 0.9]]) == pytest.approx(
        2 * 0.9**0.9 * 0.1**0.1, rel=1e-12
    )


def test_the_bootstrap_draws_groups_not_rows():
    """25 users of 16 equal rows: the mean has the error of 25 numbers, not of 400."""
    users = np.random.RandomState(11).randn(25)
    rows, groups = np.repeat(users, 16), np.repeat(np.arange(25), 16)
    low, high = statistics.bootstrap_interval(lambda i: rows[i].mean(), groups, seed=0, rounds=1000)
    assert low < users.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * users.std() / 5, rel=0.1)
    narrow = statistics.bootstrap_interval(lambda i: rows[i].mean(), np.arange(400), seed=0)
    assert np.ptp(narrow) < 0.4 * (high - low)


def test_two_users_have_no_interval():
    """Drawing two users anew gives four cases: both ends would be the users themselves."""
    assert statistics.mean_interval([0.2, 0.8], 0) is None and statistics.mean_interval([0.5], 0) is None
    low, high = statistics.mean_interval([0.2, 0.5, 0.8], 0)
    assert 0.19 < low < 0.5 < high < 0.81


def test_groups_in_any_order_are_drawn_whole():
    groups, drawn = np.array([3, 1, 3, 2, 1, 3]), []
    statistics.bootstrap_interval(lambda rows: drawn.append(np.bincount(rows, minlength=6)) or 0.0, groups, seed=0)
    for counts in drawn:
        assert counts[0] == counts[2] == counts[5] and counts[1] == counts[4]
        assert counts[0] + counts[1] + counts[3] == 3


def test_the_interval_of_a_frechet_distance_is_as_wide_as_its_draws():
    """1.96 standard deviations of the distance over fresh draws of both sides, on either side."""
    rng, values, halves, holds = np.random.RandomState(0), [], [], []
    for _ in range(400):
        x, y = rng.randn(120, 6) + 0.4, rng.randn(200, 6)
        values.append(statistics.frechet_distance(x, y))
        low, high = statistics.frechet_interval(x, y)
        assert low + high == pytest.approx(2 * values[-1])
        halves.append((high - low) / 2)
        holds.append((low, high))
    middle = np.mean(values)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(values), rel=0.12)
    assert 0.92 < np.mean([low < middle < high for low, high in holds]) < 0.98


def test_the_interval_of_a_frechet_distance_of_few_rows():
    x = np.random.RandomState(1).randn(5, 3)
    low, high = statistics.frechet_interval(x, x)
    assert low == 0 <= high
    assert statistics.frechet_interval(x[:2], x)[1] > 0
