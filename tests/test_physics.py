"""Quantities of pictures that were drawn with them, and of simulated walks whose truth is known."""

import numpy as np
import pytest
from gait_pictures import bands, line, simulated, walks

from evaluations import physics as ph
from evaluations.image_sets import ImageSet, shuffle_pixels
from guided_diffusion_vae.data.spectrogram import ANCHORS, colours_from_unit

measure = ph.measure_physics


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(ph, "ROUNDS", 2)


@pytest.mark.parametrize("colormap", ANCHORS)
def test_a_band_has_its_closed_forms(colormap):
    """Even energy in c +- h: 97 % and 3 % lie at c +- .94 h, the spread is h / sqrt(3); nothing swings."""
    found = measure(bands(np.full((1, 64), 0.25), half_width=0.25, size=128, colormap=colormap), colormap=colormap)
    assert found["torso"][0] == pytest.approx(0.25, abs=2e-3)  # black is -45 dB, not nothing
    assert found["upper_envelope"][0] == pytest.approx(0.25 + 0.94 * 0.25, abs=4e-3)
    assert found["lower_envelope"][0] == pytest.approx(0.25 - 0.94 * 0.25, abs=4e-3)
    assert found["bandwidth"][0] == pytest.approx(0.25 / np.sqrt(3), abs=2e-3)
    for name in ("upper_swing", "lower_swing", "torso_swing", "noise_floor"):
        assert found[name][0] == pytest.approx(0, abs=1e-9), name
    assert found["dynamic_range"][0] == 1 and found["colour_residual"][0] == 0


@pytest.mark.parametrize("mean, swing, steps", [(0.3, 0.2, 5.0), (-0.2, 0.1, 7.3), (0.0, 0.3, 3.6)])
def test_a_line_that_swings(mean, swing, steps):
    time = (np.arange(128) + 0.5) / 128
    found = measure(bands((mean + swing * np.sin(2 * np.pi * steps * time))[None], size=256, half_width=0.1))
    assert found["torso"][0] == pytest.approx(mean, abs=0.03)  # black is -45 dB, not nothing
    for name in ("torso_swing", "upper_swing", "lower_swing"):
        assert found[name][0] == pytest.approx(swing / np.sqrt(2), rel=0.05), name
    assert found["cadence"][0] == pytest.approx(steps, abs=0.1)
    assert found["symmetry"][0] > 0.99
    assert abs(found["skewness"][0]) < 0.15


def test_axes_are_the_units():
    pixels = bands(np.stack([line(0.2, 0.1, 5), line(-0.4, 0.2, 6)]))
    plain, real = measure(pixels), measure(pixels, axes=ph.Axes(-3.0, 6.0, 3.0))
    assert real["torso"] == pytest.approx(1.5 + 4.5 * plain["torso"])
    assert real["upper_envelope"] == pytest.approx(1.5 + 4.5 * plain["upper_envelope"])
    assert real["bandwidth"] == pytest.approx(4.5 * plain["bandwidth"])
    assert real["cadence"] == pytest.approx(plain["cadence"] / 3)
    assert real["symmetry"] == pytest.approx(plain["symmetry"])


def test_a_limp_is_the_power_between_the_steps():
    """a at the cadence and b at half of it: a^2 / (a^2 + b^2)."""
    time = (np.arange(64) + 0.5) / 64
    a, b, steps = 0.3, 0.2, 5.4
    limping = 0.1 * time + a * np.sin(2 * np.pi * steps * time) + b * np.cos(np.pi * steps * time)
    assert ph.symmetry(limping[None], np.array([steps]))[0] == pytest.approx(a**2 / (a**2 + b**2), abs=1e-6)


def test_reversed_time_changes_the_sign_of_the_skewness():
    """A sawtooth of period p: p - 1 columns up by 1, one down by p - 1."""
    p = 8
    saw = (np.arange(8 * p + 1) % p)[None].astype(float)
    known = ((p - 1) - (p - 1) ** 3) / p / (p - 1) ** 1.5
    assert ph.skewness(saw)[0] == pytest.approx(known)
    assert ph.skewness(saw[:, ::-1])[0] == pytest.approx(-known)


@pytest.mark.parametrize("colormap", ANCHORS)
def test_a_colour_map_is_recognised_and_inverted(colormap):
    unit = np.random.default_rng(0).uniform(-1, 1, (3, 24, 24))
    pixels = colours_from_unit(unit, colormap)
    assert ph.colormap_of(pixels) == colormap
    values, distance = ph.values_of(pixels, colormap)
    assert np.abs(values - (unit + 1) / 2).max() < 2.1 / 255 and distance.max() == 0  # parula's colours lie close


def test_a_photograph_is_in_no_colour_map():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    assert ph.colormap_of(pixels) == ph.LUMINANCE
    white = np.full((1, 8, 8, 3), 255, dtype=np.uint8)
    assert ph.values_of(white, ph.LUMINANCE)[0] == pytest.approx(1)


def test_a_blank_picture_and_a_tiny_one_have_numbers():
    for shape in ((2, 16, 16, 3), (2, 8, 8, 3)):
        found = measure(np.zeros(shape, dtype=np.uint8))
        assert all(np.isfinite(values).all() for values in found.values())
        assert found["dynamic_range"].max() == 0


def test_blocks_do_not_change_numbers(monkeypatch):
    pixels = walks(3, 0).pixels
    whole = measure(pixels)
    monkeypatch.setattr(ph, "BLOCK", 1)
    for name, values in measure(pixels).items():
        assert values == pytest.approx(whole[name]), name


def test_simulated_walks_are_measured_as_they_are():
    images, scenes = simulated(users=20, each=1, session=0)
    axes, seen = ph.find_axes(images.pixels, "jet")
    assert seen and axes.high == pytest.approx(6.5 / 9.75 * 2, abs=2 / 64)  # a row
    found = measure(images.pixels, axes=ph.Axes(-3.25, 6.5, 3.0))
    speed = np.array([s.walker.speed_mps * np.cos(np.radians(s.heading_deg)) for s in scenes])
    steps = np.array([2 / s.walker.cycle_s for s in scenes])
    assert np.corrcoef(found["torso"], speed)[0, 1] > 0.98
    assert np.abs(found["torso"] - speed).mean() < 0.05  # m/s
    assert np.corrcoef(found["cadence"], steps)[0, 1] > 0.96
    assert np.median(np.abs(found["cadence"] - steps)) < 0.04  # Hz
    assert (found["skewness"] < 0).mean() >= 0.9  # legs swing forward quickly and slow down slowly
    assert (measure(images.pixels[:, :, ::-1])["skewness"] > 0).mean() >= 0.9


def findings(*sets, **options):
    return {finding.name: finding for finding in ph.physics(*sets, seed=0, **options).findings}


def test_real_pictures_are_as_real_and_another_user_is_not():
    train, held = walks(12, 0), walks(10, 1)
    good = findings(train, held, walks(10, 2))
    swapped = walks(10, 2)
    bad = findings(train, held, swapped._replace(labels=(swapped.labels + 1) % 4))
    for name in ("torso", "cadence", "torso_swing"):
        assert good[name].place > 0.9, name
        assert bad[name].place < 0.5, name
        low, high = bad[name].interval
        assert low <= bad[name].value <= high and low > good[name].value


def test_shuffled_pixels_and_blurred_colours_are_seen():
    train, held, made = walks(12, 0), walks(10, 1), walks(10, 2)
    mixed = made._replace(pixels=shuffle_pixels(made.pixels, np.random.default_rng(0)))
    assert findings(train, held, mixed)["bandwidth"].place < 0.1
    assert findings(train, held, mixed)["colour_residual"].value == 0
    dull = made._replace(pixels=(made.pixels * 0.8 + 20).astype(np.uint8))
    assert findings(train, held, dull)["colour_residual"].verdict == "no better than the worst"


@pytest.mark.parametrize("labels", [True, False])
def test_one_user_has_no_other_and_no_interval(labels):
    train, held, made = (walks(8, seed, users=1, labels=labels) for seed in range(3))
    section = ph.physics(train, held, made, seed=0)
    assert not any("another user" in note for note in section.notes)
    assert "another user" not in {finding.worst_is for finding in section.findings}
    assert {finding.interval for finding in section.findings} == {None}
    found = {finding.name: finding for finding in section.findings}
    assert found["cadence"].place > 0.8  # the worst is a standard deviation off, or shuffled: never the user himself
    assert all(finding.worst > finding.real for finding in section.findings)


def test_of_two_users_the_other_is_the_worst_where_he_differs():
    section = ph.physics(walks(8, 0, users=2), walks(8, 1, users=2), walks(8, 2, users=2), seed=0)
    other = {finding.name for finding in section.findings if finding.worst_is == "another user"}
    assert {"torso", "cadence"} <= other and section.findings[0].interval is None
    assert any("another user's pictures" in note for note in section.notes)


def test_medians_are_in_the_unit_of_the_quantity():
    """Users of 4, 5, 6 and 7 steps a picture: the median lies between; without labels the verdict says so."""
    train, held, made = walks(6, 0), walks(6, 1), walks(6, 2)
    cadence = findings(train, held, made)["cadence"]
    assert cadence.medians == pytest.approx((5.5, 5.5), abs=0.3) and cadence.value < 0.5
    pooled = findings(train, held, made._replace(labels=None, class_names=None))["cadence"]
    assert pooled.verdict == "as real images (as one user)"


def test_what_is_assumed_is_said_and_what_is_given_is_not():
    sets = walks(6, 0), walks(6, 1), walks(6, 2)
    notes = ph.physics(*sets, seed=0).notes
    assert "the colours are assumed to span 45 dB" in notes
    assert any("0 Hz assumed in the middle" in note for note in notes)
    given = ph.physics(*sets, seed=0, axes=ph.Axes(-3.0, 6.0, 3.0), clip_db=30.0)
    assert not any("assumed" in note for note in given.notes)
    means = given.data["means"]["heldout"]
    wanted = ph.measure_physics(sets[1].pixels, axes=ph.Axes(-3.0, 6.0, 3.0), colormap="jet", clip_db=30.0)
    assert means["torso"] == pytest.approx(wanted["torso"].mean())


def test_the_same_seed_gives_the_same_section_and_labels_may_be_missing():
    train, held, made = walks(6, 0), walks(6, 1), walks(6, 2)
    first, again = (ph.physics(train, held, made, seed=3) for _ in range(2))
    assert first.findings == again.findings and first.tables == again.tables
    assert [row[0] for row in first.tables[0].rows] == train.class_names
    pooled = ph.physics(train, held, made._replace(labels=None, class_names=None), seed=3)
    assert any("everybody is compared as one user" in note for note in pooled.notes)
    assert [row[0] for row in pooled.tables[0].rows] == ["everybody"]
    stranger = ImageSet(made.pixels[:2], np.array([7, 7]), None)
    assert not ph.physics(train, held, stranger, seed=3).findings
