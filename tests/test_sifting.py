"""Sifters that keep what a user could have done, and throw out what nobody could."""

import csv

import numpy as np
import pytest
from gait_pictures import simulated, walks

from evaluations import sifting as si
from evaluations.image_sets import shuffle_pixels
from evaluations.sifting import Sifter, sifting, write_accept_list
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.spectrogram import colours_from_unit, unit_from_colours


def kept(sifter, images):
    return sifter.sift(images).accepted.mean()


def test_another_user_and_what_is_no_walk_are_rejected():
    train, held = walks(30, 0), walks(10, 1)
    sifter = Sifter.fit(train)
    assert kept(sifter, train) > 0.95 and kept(sifter, held) > 0.9
    assert kept(sifter, held._replace(labels=(held.labels + 1) % 4)) < 0.1
    assert kept(sifter, held._replace(pixels=shuffle_pixels(held.pixels, np.random.default_rng(0)))) == 0
    assert kept(sifter, held._replace(pixels=held.pixels[:, :, ::-1])) < 0.1


def test_simulated_walks_of_another_session():
    """As in the table of the module, on a fifth of its users: the hull takes reversed and mirrored walks for real."""
    train, held = simulated(6, 10, session=0)[0], simulated(6, 4, session=3)[0]
    section = sifting(train, held, held, seed=0)
    finding, controls = section.findings[0], section.data["controls"]
    assert finding.real > 0.7 and finding.value == finding.real and finding.worst == 0
    assert controls["Doppler mirrored"] == 0 and controls["time reversed"] < 0.25
    assert controls["said to be another user"] < finding.real - 0.2
    hull = sifting(train, held, train, seed=0, method="hull")
    assert hull.findings[0].value == 1 and hull.findings[0].worst < 0.1
    assert hull.data["controls"]["time reversed"] > controls["time reversed"] + 0.3


def test_reasons_name_the_quantity_and_its_side():
    train, held = walks(20, 0), walks(4, 1)
    sifter = Sifter.fit(train)
    faster = held._replace(pixels=np.repeat(held.pixels, 2, axis=2)[:, :, :64])  # half as many steps
    found = sifter.sift(faster)
    assert not found.accepted.any() and all("cadence below" in reason.split(", ") for reason in found.reasons)
    mirrored = sifter.sift(held._replace(pixels=held.pixels[:, ::-1]))
    assert all("torso below" in reason.split(", ") for reason in mirrored.reasons)
    fine = sifter.sift(held)
    assert [not reason for reason in fine.reasons] == fine.accepted.tolist()


def test_contrast_is_not_gait():
    """Walks whose brightest values are a little darker: rejected for that, by its name, and said to be walks still."""
    train, held = walks(20, 0), walks(6, 1)
    unit = unit_from_colours(held.pixels, "jet")[0]
    darker = held._replace(pixels=colours_from_unit(np.where(unit > 0.9, unit - 0.04, unit), "jet"))
    section = sifting(train, held, darker, seed=0)
    assert section.findings[0].value == 0 and section.findings[0].real > 0.9
    reasons = section.data["reasons"]
    assert all("contrast (not gait) below" in reason.split(", ") for reason in reasons)
    assert section.data["by_gait_alone"][0] > 0.9 and section.data["by_gait_alone"][1] == section.findings[0].real
    (note,) = [note for note in section.notes if "for the picture alone" in note]
    alone = sum(reason == "contrast (not gait) below" for reason in reasons)
    assert note.startswith(f"{alone} of 24 rejected images are so for the picture alone (contrast below), not for its")
    (row,) = [row for row in section.tables[1].rows if row[0] == "contrast (not gait) below"]
    assert row[1:3] == ["100.0%", "0.0%"] and row[3].startswith("contrast of the picture, not gait")
    assert not any("picture alone" in note for note in sifting(train, held, held, seed=0).notes)


def test_a_wider_margin_keeps_more():
    train, held = walks(8, 0), walks(8, 1)
    none, some, all_of = (kept(Sifter.fit(train, margin=margin), held) for margin in (0.0, 1.0, 20.0))
    assert none < some <= all_of == 1


def test_without_labels_a_picture_must_suit_somebody():
    train, held = walks(20, 0), walks(6, 1)
    nobody = held._replace(labels=None, class_names=None)
    sifter = Sifter.fit(train)
    assert kept(sifter, nobody) >= kept(sifter, held)
    shuffled = nobody._replace(pixels=shuffle_pixels(nobody.pixels, np.random.default_rng(0)))
    found = sifter.sift(shuffled)
    assert not found.accepted.any() and set(found.reasons) == {"suits no user"}
    everybody = Sifter.fit(train._replace(labels=None, class_names=None))
    assert kept(everybody, held) > 0.9 and kept(everybody, shuffled) == 0
    section = sifting(train, held, nobody, seed=0)
    assert any("not all sets are labelled" in note for note in section.notes)
    assert section.findings[0].verdict == "as real images (of anybody)"
    with_labels = sifter.sift(held).accepted.mean()
    assert any(f"with their labels {with_labels:.1%} of the held-out ones" in note for note in section.notes)


def test_unlabelled_samples_and_real_pictures_are_judged_alike(monkeypatch):
    """The same pictures as samples and as held-out: the two rates are one, with labels or without."""
    train, held = walks(20, 0), walks(6, 1)
    nobody = held._replace(labels=None, class_names=None)
    mixed = held._replace(labels=(held.labels + 1) % 4)  # said to be others, so the sifter keeps few
    for samples, real in ((nobody, mixed), (mixed, nobody), (mixed, mixed)):
        finding = sifting(train, real, samples, seed=0).findings[0]
        assert finding.value == finding.real
        assert finding.value < 0.1 if samples is real else finding.value > 0.9


def test_every_user_counts_alike():
    """16 pictures of a user that are kept, and 4 of another that are not: half, not four fifths."""
    train, fine = walks(20, 0, users=2), walks(16, 0, users=2)
    wrong = shuffle_pixels(fine.pixels[16:20], np.random.default_rng(0))
    uneven = fine.take(np.arange(20))._replace(pixels=np.concatenate([fine.pixels[:16], wrong]))
    finding = sifting(train, uneven, uneven, seed=0).findings[0]
    assert finding.value == finding.real == 0.5 and finding.interval is None  # of two users


def test_users_who_are_left_with_few_are_named_and_rejected_images_shown():
    """Of three users all, one of eight, and none of the pictures stay whole."""
    train, made = walks(20, 0, users=3), walks(8, 0, users=3)
    broken = np.repeat([False, True, True, True], [9, 7, 0, 8])
    pixels = made.pixels.copy()
    pixels[broken] = shuffle_pixels(pixels[broken], np.random.default_rng(0))
    section = sifting(train, made, made._replace(pixels=pixels), seed=0)
    assert "no image is accepted of user_02" in section.notes
    assert "fewer than a quarter of the images are accepted of user_01 (12%)" in section.notes
    picture = np.asarray(section.pictures["rejected.png"])
    assert picture.shape[0] == 6 + 4 * 102  # eight of fifteen, two a row
    first = np.asarray(pixels[9]).repeat(2, axis=0).repeat(2, axis=1)[:2, :2]
    assert np.array_equal(picture[6, 6], first[0, 0])
    assert not sifting(train, made, made, seed=0).pictures


def test_a_share_without_spread_has_an_interval_all_the_same():
    train, held = walks(20, 0), walks(6, 0)
    (kept_all,) = sifting(train, held, held, seed=0).findings
    assert kept_all.value == 1 and kept_all.interval == (pytest.approx(24 / (24 + 1.96**2)), 1.0)


def test_a_user_without_real_pictures():
    train, made = walks(6, 0, users=3), walks(2, 1)
    found = Sifter.fit(train).sift(made)
    assert found.reasons[6:] == ["no real picture of this user"] * 2 and not found.accepted[6:].any()


def test_errors_are_one_line():
    with pytest.raises(UserError, match="4 images of user_00; --sift_method hull needs at least 5: give more, or"):
        Sifter.fit(walks(4, 0), method="hull")
    one = walks(6, 0, users=1)
    alike = one._replace(pixels=np.repeat(one.pixels[:1], 6, axis=0))
    with pytest.raises(UserError, match="too much alike for --sift_method hull"):
        Sifter.fit(alike, method="hull")


def test_the_hull_holds_its_corners_and_not_what_is_far():
    """Principal components of points with three large directions are these: a cube about 0 in them."""
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (200, 3)).astype(np.float32)
    hull = si._hull(pictures, "somebody")
    assert hull.holds(pictures * 0.99).all() and hull.holds(np.zeros((1, 3))).all()
    assert not hull.holds(2 * pictures[np.abs(pictures).max(axis=1) > 0.6]).any()


def test_the_accept_list(tmp_path):
    found = si.Sifted(np.array([True, False]), ["", "cadence above, torso below"])
    write_accept_list(tmp_path / "accepted.csv", ["a.png", "b.png"], found)
    with open(tmp_path / "accepted.csv", newline="") as handle:
        assert list(csv.reader(handle)) == [
            ["image", "accepted", "reason"],
            ["a.png", "1", ""],
            ["b.png", "0", "cadence above, torso below"],
        ]
    with pytest.raises(ValueError):
        write_accept_list(tmp_path / "accepted.csv", [0], found)
