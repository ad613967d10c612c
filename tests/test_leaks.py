"""Twins that were planted are found, with their places and shifts; walks of other sessions are no twins."""

import io

import numpy as np
import pytest
from gait_pictures import NAMES, simulated
from PIL import Image
from scipy.ndimage import gaussian_filter

from evaluations import leaks
from evaluations.image_sets import ImageSet
from evaluations.leaks import leak_report, recording_of
from guided_diffusion_vae.data.spectrogram import colours_from_unit


def recordings(count, seed, length=128):
    """Values (count, 64, length) with grain: what a recording has, and no other."""
    fields = np.random.default_rng(seed).normal(size=(count, 64, length))
    return np.stack([gaussian_filter(field, (2, 1.2)) for field in fields]) * 4


def window(values, start=0, gain=0.0):
    return colours_from_unit(np.clip(values[:, :, start : start + 64] + gain, -1, 1), "jet")


def images(pixels, labels=True):
    who = np.arange(len(pixels)) % 4
    return ImageSet(pixels, who if labels else None, NAMES if labels else None)


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return np.asarray(Image.open(buffer))


def shares(section):
    return {finding.name.split()[0]: finding.value for finding in section.findings}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "kind, shift, make",
    [
        ("exact", 0, lambda known: window(known)),
        ("near", 0, lambda known: window(known) ^ np.uint8(2)),
        ("near", 0, lambda known: np.stack([jpeg(picture) for picture in window(known)])),
        ("near", 0, lambda known: window(known, gain=0.1)),
        ("shifted", 7, lambda known: window(known, 7)),
        ("shifted", 30, lambda known: window(known, 30, gain=-0.1)),
    ],
)
def test_planted_twins_are_found(kind, shift, make, labels):
    known, new = recordings(40, 0), recordings(40, 1)
    pixels = window(new)
    planted = np.arange(0, 40, 10)
    pixels[planted] = make(known[planted])
    section = leak_report({"train": images(window(known), labels), "test": images(pixels, labels)})
    assert shares(section) == {"exact": 0, "near": 0, "shifted": 0} | {kind: 0.1}
    twins = {twin["new_place"]: twin for twin in section.data["twins"]}
    assert sorted(twins) == planted.tolist()
    for place, twin in twins.items():
        assert (twin["kind"], twin["known_place"], twin["shift"]) == (kind, place, shift)
    assert [row[3] for row in section.tables[0].rows[:5]] == [kind] * 4 + ["none"]
    assert section.findings[0].real == 0 and section.pictures["twins.png"].size[0] > 2 * 64


def test_shifts_are_in_the_columns_of_the_picture():
    known = np.repeat(recordings(6, 0), 2, axis=2)  # 128 columns a picture
    wide = [colours_from_unit(np.clip(known[:, :, start : start + 128], -1, 1), "jet") for start in (0, 20)]
    section = leak_report({"train": images(wide[1]), "test": images(wide[0])})
    assert shares(section)["shifted"] == 1
    assert {twin["shift"] for twin in section.data["twins"]} == {-20}


def test_correlation_is_that_of_the_overlap():
    """Against the sums written out, at every shift that leaves enough."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 20)).astype(np.float32)
    best, shift = leaks.correlate(*map(leaks.th.from_numpy, (a, b)))
    for i in range(3):
        for j in range(3):
            scores = {}
            for s in range(-12, 13):
                x = a[i][:, max(s, 0) : 20 + min(s, 0)]
                y = b[j][:, max(-s, 0) : 20 + min(-s, 0)]
                scores[s] = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
            assert best[i, j] == pytest.approx(max(scores.values()), abs=1e-4)
            assert shift[i, j] == max(scores, key=scores.get)


def test_empty_corners_are_no_twins():
    """Two pictures with one speck each, far apart: only the specks overlap, and they are all there is."""
    blank = np.zeros((2, 6, 20), dtype=np.float32)
    blank[0, 2, 1], blank[0, 3, 10:] = 0.1, 1.0
    blank[1, 2, 1], blank[1, 4, 10:] = 0.1, 1.0
    pair = leaks.th.from_numpy(blank)
    assert leaks.correlate(pair[:1], pair[1:])[0].item() < 0.1


def test_blocks_do_not_change_twins(monkeypatch):
    sets = {"train": images(window(recordings(10, 0))), "test": images(window(recordings(7, 1), 3))}
    whole = leak_report(sets)
    monkeypatch.setattr(leaks, "BLOCK", 3)
    parts = leak_report(sets)
    assert [f.value for f in parts.findings] == [f.value for f in whole.findings]
    assert parts.tables == whole.tables
    monkeypatch.setattr(leaks, "MOST", 4)
    assert leak_report(sets).notes == ["4 of 7 pictures of test were looked at"]


def test_sessions_of_the_simulator_do_not_leak():
    sets = {"train": simulated(5, 8, session=0)[0], "test": simulated(5, 4, session=3)[0]}
    section = leak_report(sets)
    assert shares(section) == {"exact": 0, "near": 0, "shifted": 0}
    assert {finding.verdict for finding in section.findings} == {"as real images"}


def test_file_names_tell_of_recordings():
    assert recording_of("user_00_s02_0004.png", "user_00") == "user_00_s02"
    assert recording_of("folder/002_f00024.png", "user_00") == "002"
    assert recording_of("user_00_0004.png", "user_00") is None
    assert recording_of("img_7.png", "user_00") is None and recording_of("7.png", "user_00") is None
    known, new = (images(window(recordings(4, seed))) for seed in (0, 1))
    names = {"train": [f"rec{i}_f000.png" for i in range(4)], "test": [f"rec{i + 3}_f024.png" for i in range(4)]}
    section = leak_report({"train": known, "test": new}, names=names)
    assert section.notes == ["no recording is in both train and test by their file names"]  # rec3 of two users
    assert section.tables[0].rows[0][0].startswith("rec")
    names["test"][1] = "rec1_f024.png"
    assert "1 recordings are in both train and test" in leak_report({"train": known, "test": new}, names=names).notes[0]


def test_other_sizes_are_not_compared():
    known = images(window(recordings(4, 0)))
    section = leak_report({"train": known, "test": known._replace(pixels=known.pixels[:, ::2, ::2])})
    assert not section.findings and "other sizes" in section.notes[0]
