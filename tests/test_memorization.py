"""Copying, planted and found; and not found where there is none."""

import numpy as np
import pytest

from evaluations import memorization as m


@pytest.fixture
def world():
    """Training, test and fresh images of one distribution, and copies of the first."""
    rng = np.random.RandomState(0)
    train, test, fresh = (rng.randn(n, 12) for n in (600, 300, 400))
    return train, test, fresh, m.copies(train, 400, np.random.default_rng(0))


def test_an_independent_sample_is_authentic_as_often_as_real_images(world):
    """On a line d(y, x*) ~ Exp(2) must pass the gap beyond x*, ~ Exp(1), both in units of the spacing: 1 / (1 + 2)."""
    rng = np.random.RandomState(1)
    line = [m.auth_pct(rng.rand(500, 1), rng.rand(500, 1)) for _ in range(20)]
    train, test, fresh, copied = world
    assert np.mean(line) == pytest.approx(100 / 3, abs=2)
    assert m.auth_pct(fresh, train) == pytest.approx(m.auth_pct(test, train), abs=8)
    assert m.auth_pct(copied, train) == 0 and m.auth_pct(fresh + 20, train) == 100


def test_authpct_is_its_definition(world):
    train, _, fresh, _ = world
    d = np.linalg.norm(fresh[:, None] - train, axis=2)
    among = np.linalg.norm(train[:, None] - train, axis=2) + np.diag(np.full(len(train), np.inf))
    wanted = [d[i].min() > among[d[i].argmin()].min() for i in range(len(fresh))]
    assert m.auth_pct(fresh, train) == pytest.approx(100 * np.mean(wanted), abs=0.3)


def test_c_t_is_far_below_zero_for_copies_about_zero_for_honest_and_far_above_for_distant_ones(world):
    train, test, fresh, copied = world
    assert abs(m.c_t(fresh, test, train, seed=0).value) < 3
    assert m.c_t(copied, test, train, seed=0).value < -10
    assert m.c_t(3 * fresh, test, train, seed=0).value > 10
    assert m.c_t(fresh, test, train, seed=5) == m.c_t(fresh, test, train, seed=5)


def test_c_t_of_one_cell_is_the_z_of_mann_and_whitney():
    """All 20 below all 10: U = 0, z = -(200 / 2) / sqrt(200 * 31 / 12)."""
    train, test = np.arange(0, 100, 10.0)[:, None], np.arange(10)[:, None] * 10 + 4.0
    generated = np.linspace(0, 90, 20)[:, None].round(-1) + 0.5
    found = m.c_t(generated, test, train, cells=1)
    assert found.value == pytest.approx(-100 / np.sqrt(200 * 31 / 12))


def test_c_t_without_enough_images_says_why(world):
    train, test, fresh, _ = world
    found = m.c_t(fresh[:19], test, train)
    assert found.value is None and "20 generated" in found.reason


def test_a_near_copy_is_three_times_nearer():
    assert m.near_copy_rate([[1, 5, 6, 6], [2, 5, 5, 5], [0, 1, 1, 1], [3, 3, 3, 3]]) == 0.5


def test_closest_pairs_are_found_with_their_places_and_distances(world):
    train, _, fresh, _ = world
    planted = fresh.copy()
    planted[[7, 50]] = train[[33, 4]] + [[0.003] * 12, [0.001] * 12]
    found = m.closest_pairs(planted, train, 2)
    assert found.generated.tolist() == [50, 7] and found.train.tolist() == [4, 33]
    assert found.distances == pytest.approx([0.001 * 12**0.5, 0.003 * 12**0.5], rel=1e-6)


def section(train, test, generated):
    pixels = [np.zeros((len(feats), 16, 16, 3), np.uint8) for feats in (train, test, generated)]
    return m.memorization(train, test, generated, *pixels, seed=3)


def test_an_honest_generator_stands_where_real_images_do_and_a_copying_one_at_the_worst(world):
    train, test, fresh, _ = world
    for found in section(train, test, fresh).findings:
        assert found.place > 0.75, found
        low, high = found.interval or (found.value, found.value)
        assert low <= found.value <= high
    for found in section(train, test, m.copies(train, 400, np.random.default_rng(9))).findings:
        assert found.place == pytest.approx(0, abs=0.1), found
    assert len(section(train, test, fresh).notes) <= 2


def test_few_copies_among_many_images_are_told_in_words(world):
    """12 of 400: no median and no rank test sees them."""
    train, test, fresh, copied = world
    found = section(train, test, np.concatenate([copied[:12], fresh[12:]]))
    assert any(note.startswith("12 of 400 generated images are near copies") for note in found.notes)
    assert found.data["nearer"] >= 12
    assert set(found.data["closest_pairs"]["generated"]) < set(range(12))


def test_the_sheet_shows_the_pair():
    """A red training image, copied as 200 of 255; what is held out is blue."""
    rng = np.random.RandomState(4)
    train, test, generated = rng.randn(30, 4), rng.randn(30, 4), rng.randn(30, 4)
    generated[5] = train[9]
    pixels = [np.zeros((30, 16, 16, 3), np.uint8) for _ in range(3)]
    pixels[0][9, ..., 0], pixels[1][..., 2], pixels[2][5, ..., 0] = 255, 255, 200
    sheet = np.asarray(m.memorization(train, test, generated, *pixels, seed=0).pictures["closest_pairs.png"])
    ours, theirs = (np.argwhere((sheet == colour).all(axis=2)) for colour in ([200, 0, 0], [255, 0, 0]))
    assert len(ours) == 16 * 16 and (theirs[: 16 * 16, 0].min() == ours[:, 0].min())
    assert ours[:, 0].min() < 20 and ours[:, 1].max() < theirs[:, 1].min()


def test_too_little_is_said_not_measured():
    assert "too few" in section(np.eye(2), np.eye(2), np.eye(2)).notes[0]
