"""Neighbourhoods, against their definitions written out pair by pair."""

import numpy as np
import pytest

from evaluations import manifold


@pytest.fixture(params=[4, 1024])
def clouds(request, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", request.param)
    rng = np.random.RandomState(0)
    return rng.randn(30, 3), rng.randn(20, 3) * 1.2 + 0.7


def distance(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))


def test_the_four_numbers_are_their_definitions(clouds):
    real, fake = clouds
    d = distance(fake, real)
    ball = {k: np.sort(distance(real, real), axis=1)[:, k] for k in (3, 5)}
    fake_ball = np.sort(distance(fake, fake), axis=1)[:, 3]
    found = manifold.fidelity(real, fake)
    assert found.precision == pytest.approx((d <= ball[3]).any(axis=1).mean())
    assert found.recall == pytest.approx((d.T <= fake_ball).any(axis=1).mean())
    assert found.density == pytest.approx((d < ball[5]).sum() / (5 * len(fake)))
    assert found.coverage == pytest.approx((d.min(axis=0) < ball[5]).mean())


def test_nearest_sorts_and_leaves_itself_out(clouds):
    real, fake = clouds
    wanted = np.sort(distance(fake, real), axis=1)
    assert np.allclose(manifold.nearest(fake, real, count=4), wanted[:, :4], atol=1e-5)
    among = np.sort(distance(real, real), axis=1)
    assert np.allclose(manifold.nearest(real, real, count=2, skip=1), among[:, 1:3], atol=1e-5)


def test_neighbours_names_the_references(clouds):
    real, fake = clouds
    d, places = manifold.neighbours(fake, real, count=4)
    assert (places == np.argsort(distance(fake, real), axis=1)[:, :4]).all()
    assert (d == manifold.nearest(fake, real, count=4)).all()
    assert (manifold.neighbours(real[5:9], real)[1][:, 0] == np.arange(5, 9)).all()


def test_a_cloud_far_from_the_origin_loses_nothing():
    """What 16-bit distances, and 32-bit ones about the origin, get wrong."""
    rng = np.random.RandomState(1)
    real, fake = rng.randn(60, 8), rng.randn(60, 8) + 1
    assert manifold.fidelity(real + 1000, fake + 1000) == manifold.fidelity(real, fake)


def test_a_generator_with_one_idea_is_precise_and_recalls_nothing():
    real = np.random.RandomState(2).randn(200, 2)
    one_idea = real[:1] + 1e-3 * np.random.RandomState(3).randn(50, 2)
    found = manifold.fidelity(real, one_idea)
    assert found.precision == 1 and found.recall < 0.05 and found.coverage < 0.15


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="3 points have no 3-th neighbour"):
        manifold.fidelity(np.zeros((3, 2)), np.zeros((9, 2)))


def test_a_near_copy_is_three_times_nearer():
    assert manifold.near_copy_rate([[1, 5, 6, 6], [2, 5, 5, 5], [0, 1, 1, 1], [3, 3, 3, 3]]) == 0.5
