"""The official evaluator's arithmetic, against the numbers that its code printed."""

import numpy as np
import pytest
import torch as th
from helpers import golden

from evaluations import manifold, official, statistics
from evaluations.official import Batch, Stats


@pytest.fixture
def batches():
    data = golden("evaluator_features.npz")
    return [Batch(data[f"{side}_pool"], data[f"{side}_spatial"]) for side in ("ref", "sample")]


def test_the_five_numbers_in_the_order_of_their_lines(batches):
    found = official.five_numbers(*batches, golden("evaluator_features.npz")["softmax_weights"])
    wanted = golden("evaluator_features.json")
    assert list(found) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert found["Inception Score"] == pytest.approx(wanted["Inception Score"], rel=1e-9)
    for name in ("FID", "sFID"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9)
    for name in ("Precision", "Recall"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-3)


def test_stored_statistics_take_the_place_of_the_features_own(batches):
    ref, sample = batches
    weight = np.ones((64, 2), np.float32)
    plain = official.five_numbers(ref, sample, weight)
    stored = ref._replace(
        stats=official.official_moments(ref.pool), spatial_stats=official.official_moments(sample.spatial)
    )
    found = official.five_numbers(stored, sample, weight)
    assert found["FID"] == pytest.approx(plain["FID"], rel=1e-9)
    assert abs(found["sFID"]) < 1e-9 and plain["sFID"] > 1  # the sample's own were stored as the reference's


def test_the_mean_is_single_and_the_covariance_double(batches):
    acts = batches[0].pool
    mu, sigma = official.official_moments(acts)
    assert mu.dtype == np.float32 and (mu == np.mean(acts, axis=0)).all()
    assert sigma.dtype == np.float64 and np.allclose(sigma, np.cov(acts, rowvar=False), rtol=1e-12, atol=1e-14)


def test_fid_is_real_and_unclamped_where_covariances_are_singular():
    """Rank 1 beside rank 1: (a - b)^2 in one direction; in directions at right angles the traces add up."""
    e = np.eye(4)
    one, same, other = (
        Stats(np.zeros(4, np.float32), c * np.outer(v, v)) for c, v in ((4, e[0]), (9, e[0]), (9, e[1]))
    )
    assert official.official_frechet(one, same) == pytest.approx(1)
    assert official.official_frechet(one, other) == pytest.approx(13)
    rows = np.random.RandomState(0).randn(30, 200).astype(np.float32)
    assert abs(official.frechet_of_features(rows, rows)) < 1e-9
    moments = official.official_moments(rows)
    halves = official.frechet_of_features(rows[:15], rows[15:])
    by_stats = official.official_frechet(*(official.official_moments(part) for part in (rows[:15], rows[15:])))
    assert halves == pytest.approx(by_stats, rel=1e-6) and official.official_frechet(moments, moments) < 1e-6


def test_the_score_of_consecutive_splits():
    """Certain of one class in each split: 1 a split, though 2 over both; a short last split weighs as much."""
    tiny = 1e-30
    sure = np.array([[1 - tiny, tiny]] * 6 + [[tiny, 1 - tiny]] * 4, np.float32)
    assert official.inception_score(sure, split=6) == pytest.approx(1)
    assert official.inception_score(sure, split=9) == pytest.approx(
        (np.exp(np.log(9) - 2 / 3 * np.log(6) - np.log(3) / 3) + 1) / 2
    )


def test_an_underflow_makes_the_official_score_nan_and_can_be_counted():
    p = official.class_probabilities(np.array([[1.0], [0.0]]), np.array([[200.0, 0.0, 0.0]]))
    assert np.isnan(official.inception_score(p)) and official.underflows(p) == 1
    assert statistics.classifier_inception_score(p) > 1


def half_distances(x, y):
    """|x|^2 - 2 x.y + |y|^2, each step rounded to float16, by NumPy's own half arithmetic."""
    x, y = (a.astype(np.float16).astype(np.float32) for a in (x, y))
    square = [(a**2).astype(np.float16).astype(np.float32).sum(axis=1).astype(np.float16) for a in (x, y)]
    product = (x @ y.T).astype(np.float16)
    return np.maximum(square[0][:, None] - np.float16(2) * product + square[1], np.float16(0)).astype(np.float32)


def share_in_balls(x, y, d, d_x, d_y, k=3):
    x_radii, y_radii = (np.sort(within, axis=1)[:, k] for within in (d_x, d_y))
    return (d <= x_radii[:, None]).any(axis=0).mean(), (d <= y_radii).any(axis=1).mean()


@pytest.mark.parametrize("block, rows", [(10_000, 500), (40, 7)])
def test_precision_and_recall_are_their_definition_in_half_precision(monkeypatch, block, rows):
    monkeypatch.setattr(official, "BLOCK", block)
    monkeypatch.setattr(official, "ROWS", rows)
    rng = np.random.RandomState(1)
    x, y = rng.randn(90, 20).astype(np.float32) * 3, rng.randn(70, 20).astype(np.float32) * 2.5 + 1
    wanted = share_in_balls(x, y, half_distances(x, y), half_distances(x, x), half_distances(y, y))
    assert official.official_precision_recall(x, y) == pytest.approx(wanted, abs=1e-9)


def test_a_block_that_overflows_is_redone_in_single_and_its_neighbour_is_not(monkeypatch):
    """Steps of 1/16 beside 8192 are lost in float16; a far point in the same block brings them back."""
    monkeypatch.setattr(official, "BLOCK", 4)
    x = np.zeros((8, 2), np.float32)
    x[:, 0] = 90.5 + np.arange(8) / 64
    x[6, 1] = 400  # |x|^2 > 65504
    points = official._Points(x)
    first, second = slice(0, 4), slice(4, 8)
    exact = ((x[:, None].astype(np.float64) - x[None]) ** 2).sum(axis=2)
    plain, redone = (official.squared_distances(points, points, rows, rows) for rows in (first, second))
    assert plain.dtype == th.half and redone.dtype == th.float32
    assert not np.allclose(plain, exact[first, first], atol=1e-3)
    assert np.allclose(redone, exact[second, second], rtol=1e-6, atol=4e-3)


def test_tight_clusters_are_where_half_precision_misleads():
    """The facts' case: a small spread far from the origin. About the centre both arithmetics agree."""
    rng = np.random.RandomState(2)
    spread = np.float32(np.sqrt(0.073 / 64))
    x, y = (rng.randn(300, 64).astype(np.float32) * spread * scale for scale in (1, 0.8))
    far = np.float32(np.sqrt(183 / 64))
    true = manifold.fidelity(x + far, y + far)
    there, here = official.official_precision_recall(x + far, y + far), official.official_precision_recall(x, y)
    assert here == pytest.approx((true.precision, true.recall), abs=0.02)
    assert max(abs(there[0] - true.precision), abs(there[1] - true.recall)) > 0.3


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="3 images have no 3-th neighbour; give more than 3"):
        official.official_precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
