"""Copying, planted and found; and not found where there is none."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from gait_pictures import NAMES, recordings, simulated, window

from evaluations import leaks, manifold, measure
from evaluations import memorization as m
from evaluations.copying import c_t
from evaluations.image_sets import ImageSet


def copied(train, count, seed=0):
    usual = np.median(manifold.nearest(train, train, skip=1))
    return m.copies(train, count, np.random.default_rng(seed), usual)


@pytest.fixture
def world():
    """Training, test and fresh images of one distribution, and copies of the first."""
    rng = np.random.RandomState(0)
    train, test, fresh = (rng.randn(n, 12) for n in (600, 300, 400))
    return train, test, fresh, copied(train, 400)


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
    assert abs(c_t(fresh, test, train, seed=0).value) < 3
    assert c_t(copied, test, train, seed=0).value < -10
    assert c_t(3 * fresh, test, train, seed=0).value > 10
    assert c_t(fresh, test, train, seed=5) == c_t(fresh, test, train, seed=5)


def test_c_t_of_one_cell_is_the_z_of_mann_and_whitney():
    """All 20 below all 10: U = 0, z = -(200 / 2) / sqrt(200 * 31 / 12)."""
    train, test = np.arange(0, 100, 10.0)[:, None], np.arange(10)[:, None] * 10 + 4.0
    generated = np.linspace(0, 90, 20)[:, None].round(-1) + 0.5
    found = c_t(generated, test, train, cells=1)
    assert found.value == pytest.approx(-100 / np.sqrt(200 * 31 / 12))


def test_c_t_without_enough_images_says_why(world):
    train, test, fresh, _ = world
    found = c_t(fresh[:19], test, train)
    assert found.value is None and "20 generated" in found.reason


def test_closest_pairs_are_found_with_their_places_and_distances(world):
    train, _, fresh, _ = world
    planted = fresh.copy()
    planted[[7, 50]] = train[[33, 4]] + [[0.003] * 12, [0.001] * 12]
    found = m.closest_pairs(planted, train, m.near(planted, train), 2)
    assert found.generated.tolist() == [50, 7] and found.train.tolist() == [4, 33]
    assert found.distances == pytest.approx([0.001 * 12**0.5, 0.003 * 12**0.5], rel=1e-6)


def test_authpct_of_training_images_is_that_without_them():
    """Each of them against the training set from which it is taken out, one by one."""
    train = np.random.RandomState(2).randn(60, 3).astype(np.float32)
    own = np.arange(0, 60, 4)
    found = m.authentic(m.near(train[own], train, own=own), m.near_each_other(train))
    wanted = [m.auth_pct(train[i : i + 1], np.delete(train, i, axis=0)) == 100 for i in own]
    assert found.tolist() == wanted and 0 < sum(wanted) < len(wanted)


def test_the_chance_that_the_lowest_are_all_generated():
    """Of C(n + m, k) equally likely sets of the k lowest, C(n, k) are of generated images alone."""
    for k, n, m_real in ((0, 5, 3), (1, 5, 3), (4, 9, 2), (7, 7, 7)):
        assert m.by_chance(k, n, m_real) == pytest.approx(float(Fraction(comb(n, k), comb(n + m_real, k))))


def test_copies_lie_a_tenth_of_the_usual_distance_off(monkeypatch):
    monkeypatch.setattr(m, "BLOCK", 7)
    train = np.random.RandomState(3).randn(40, 900).astype(np.float32)
    made = m.copies(train, 50, np.random.default_rng(1), 2.0)
    assert made.dtype == np.float32
    assert manifold.nearest(made, train)[:, 0] == pytest.approx(0.2, rel=0.15)


# ---- the section -----------------------------------------------------------------------------------------------------


def images(pixels):
    return ImageSet(pixels, np.arange(len(pixels)) % 4, NAMES)


@pytest.fixture(scope="module")
def sets():
    """Training, held-out and fresh images, and the values of the first."""
    known = recordings(300, 0)
    return images(window(known)), images(window(recordings(60, 1))), images(window(recordings(120, 2))), known


def found(section):
    return {finding.name: finding for finding in section.findings}


def test_an_honest_generator_stands_where_real_images_do_and_a_copying_one_at_the_worst(sets):
    train, held, fresh, _ = sets
    honest = m.memorization(train, held, fresh, seed=3)
    for finding in honest.findings:
        assert finding.place > 0.75, finding
        low, high = finding.interval or (finding.value, finding.value)
        assert low <= finding.value <= high
    assert found(honest)["twins of training images"].value == 0 and "copied.png" not in honest.pictures
    assert len(honest.notes) == 2  # what real is, and what the worst
    noise = np.random.default_rng(0).integers(-6, 7, (120, 64, 64, 3))
    nearly = images(np.clip(train.pixels[:120] + noise, 0, 255).astype(np.uint8))
    copying = m.memorization(train, held, nearly, seed=3)
    for finding in copying.findings:
        assert finding.place < 0.1, finding
    assert copying.data["nearer"] == 120
    assert "120 of 120 generated images are nearer to a training image than any of 48 real ones" in copying.notes
    again = m.memorization(train, held, nearly, seed=3)
    assert again.findings == copying.findings and again.notes == copying.notes


@pytest.mark.parametrize("labels", [True, False])
def test_training_images_moved_along_time_are_twins(sets, labels):
    """Rolled round by 5 to 60 of 64 columns, every fourth said to be of another user: no distance sees them."""
    train, held, fresh, _ = sets
    places = np.arange(0, 120, 2)
    rolled = [np.roll(train.pixels[i], 5 + i % 56, axis=1) for i in places]
    who = np.where(places % 8 == 0, (train.labels[places] + 1) % 4, train.labels[places])
    samples = ImageSet(np.stack(rolled), who, NAMES) if labels else ImageSet(np.stack(rolled), None, None)
    section = m.memorization(train, held, samples, seed=0)
    twins = found(section)["twins of training images"]
    assert twins.value > 0.95 and twins.real == 0 and twins.worst == 1 and twins.verdict == "no better than the worst"
    named = {pair["new_place"]: pair["known_place"] for pair in section.data["twins"]}
    assert all(places[new] == known for new, known in named.items()) and len(named) > 57
    assert section.pictures["copied.png"].size[1] > 8 * 128
    assert found(section)["near copies"].value == 0


def test_a_few_twins_of_every_kind_are_counted(sets):
    train, held, fresh, known = sets
    pixels = fresh.pixels.copy()
    pixels[:3], pixels[3:5] = train.pixels[:3], window(known[3:5], 20)
    pixels[5] = train.pixels[5] ^ np.uint8(2)
    section = m.memorization(train, held, images(pixels), seed=0)
    assert section.notes[0] == "of 120 generated images these are twins of training images: 3 exact, 1 near, 2 shifted"
    assert found(section)["twins of training images"].value == 6 / 120
    kinds = {pair["new_place"]: (pair["known_place"], pair["kind"]) for pair in section.data["twins"]}
    assert kinds == {i: (i, kind) for i, kind in enumerate(["exact"] * 3 + ["shifted"] * 2 + ["near"])}
    assert 4 <= section.data["nearer"] <= 6  # and a fresh one by luck, but not those that were moved
    assert set(section.data["closest_pairs"]["generated"][:4]) == {0, 1, 2, 5}


def test_no_one_copy_of_what_is_set_aside_is_missed(sets):
    """Real images are taken from the training set, and copies of them are copies all the same."""
    train, held, _, _ = sets
    aside, _ = measure.set_aside(train.labels, np.random.default_rng(7))
    section = m.memorization(train, held, train.take(aside), seed=7)
    assert found(section)["twins of training images"].value == 1
    assert found(section)["near copies"].value == 1 and found(section)["AuthPct"].value == 0


def test_one_image_that_is_nearer_by_luck_is_no_note(sets):
    """Of 120 fresh images and 48 real ones the nearest is a fresh one with P = 0.7."""
    train, held, fresh, _ = sets
    section = m.memorization(train, held, fresh, seed=0)
    lucky = fresh.take([int(section.data["closest_pairs"]["generated"][0]), *range(119)])
    assert m.by_chance(1, 120, 48) == pytest.approx(120 / 168)
    assert not any("nearer to a training image than any" in n for n in m.memorization(train, held, lucky, seed=0).notes)


def test_real_images_are_those_of_the_same_sessions():
    """Other sessions of the simulator are farther; a generator that walks as the training sessions did is no copier."""
    held, made = simulated(4, 4, session=3)[0], simulated(4, 24, session=0)[0]
    train, fresh = made.take(np.arange(96) % 24 < 18), made.take(np.arange(96) % 24 >= 18)
    section = m.memorization(train, held, fresh, seed=0)
    near = found(section)["nearest training image"]
    assert near.real == 1 and near.value == pytest.approx(1, abs=0.15)
    assert section.data["other_sessions"]["nearest training image"] > near.value + 0.05
    assert found(section)["twins of training images"].place > 0.6  # only 12 real images tell how alike these walks are
    assert any("held-out images score" in note for note in section.notes)


def test_the_sheet_shows_the_pair(sets):
    """A white training image with its copy in grey stands first; beside them what was set aside."""
    train, held, fresh, _ = sets
    known, made = train.pixels.copy(), fresh.pixels.copy()
    known[9], made[5] = 255, 254
    section = m.memorization(train._replace(pixels=known), held, fresh._replace(pixels=made), seed=0)
    sheet = np.asarray(section.pictures["closest_pairs.png"])
    first = sheet[16 : 16 + 64]
    assert (first[:, 4:68] == 254).all() and (first[:, 72:136] == 255).all()


def test_too_little_is_said_not_measured(sets):
    train, held, fresh, _ = sets
    nothing = train.take([])
    for few in (
        (nothing, held, fresh),
        (train, nothing, fresh),
        (train, held, nothing),
        (train.take([0, 1]), held, fresh),
    ):
        section = m.memorization(*few, seed=0)
        assert "too few" in section.notes[0] and not section.findings


def test_twins_are_looked_for_among_some_where_there_are_many(sets, monkeypatch):
    train, held, fresh, _ = sets
    monkeypatch.setattr(leaks.find_twins, "__kwdefaults__", {"most": 40})
    section = m.memorization(train, held, fresh, seed=0)
    assert "40 of 120 generated images were looked at for twins" in section.notes


def test_windows_that_overlap_are_told():
    """Two windows of every recording, 16 columns apart: what is set aside has a twin, what is generated has none."""
    known = recordings(100, 0)
    pixels = np.stack([window(known), window(known, 16)], axis=1).reshape(200, 64, 64, 3)
    train = ImageSet(pixels, np.arange(200) // 2 % 4, NAMES)
    held, fresh = (images(window(recordings(40, seed))) for seed in (1, 2))
    section = m.memorization(train, held, fresh, seed=0)
    assert section.data["twins_same_sessions"] > 0.7  # those whose other window is set aside, too, have lost it
    assert any("of real images of the same sessions" in note for note in section.notes)
    twins = found(section)["twins of training images"]
    assert (twins.value, twins.real, twins.verdict) == (0, 0, "as real images")
