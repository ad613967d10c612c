"""Twins that were planted are found, with their places and shifts; walks of other sessions are no twins."""

import io

import numpy as np
import pytest
from gait_pictures import NAMES, recordings, simulated, window
from PIL import Image

from evaluations import leaks
from evaluations.image_sets import ImageSet
from evaluations.leaks import leak_report
from evaluations.sessions import Recordings, recording_of, recordings_of
from guided_diffusion_vae.data.spectrogram import colours_from_unit


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
        ("shifted", 12, lambda known: np.stack([jpeg(picture) for picture in window(known, 12)])),
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


def test_what_a_decoder_blurs_is_still_a_twin():
    """Walks of training, rolled round and at three quarters of their resolution, as an autoencoder gives them back."""
    known = simulated(5, 8, session=0)[0]
    some = known.take(np.arange(0, 40, 2))
    rolled = np.stack([np.roll(picture, 10 + 2 * i, axis=1) for i, picture in enumerate(some.pixels)])
    small = [Image.fromarray(picture).resize((48, 48), Image.Resampling.BOX) for picture in rolled]
    blurred = np.stack([np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)) for picture in small])
    section = leak_report({"train": known, "made": some._replace(pixels=blurred)})
    assert shares(section)["shifted"] > 0.8


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
    assert {finding.verdict for finding in section.findings} == {"none found"}


def test_file_names_tell_of_recordings():
    assert recording_of("user_00_s02_0004.png", "user_00") == "s02"
    assert recording_of("folder/002_f00024.png", "user_00") == "002"
    assert recording_of("user_00_0004.png", "user_00") is None
    assert recording_of("img_7.png", "user_00") is None and recording_of("7.png", "user_00") is None
    assert recording_of("micro_doppler_user03_002.png", "user_03") is None
    for name in ("radar-USER-3-17.png", "User03_radar17.png", "x_user 3_17.jpg", "user_03/User_3.17.png"):
        assert recording_of(name, "user_03") is None, name
    assert recording_of("micro_doppler_user03_s2_002.png", "user_03") == "micro_doppler_s2"
    assert recording_of("user_31_007.png", "user_3") == "user_31"  # somebody else
    assert recording_of("user_03/morning/user03_002.png", "user_03") == "morning"
    assert recording_of("User3/day 1/002_f00024.png", "user_03") == "day 1/002"
    assert recording_of("morning/002_f00024.png", "") == "002"


def test_file_names_that_both_sets_share():
    known, new = (images(window(recordings(4, seed))) for seed in (0, 1))
    names = {"train": [f"rec{i}_f000.png" for i in range(4)], "test": [f"rec{i + 3}_f024.png" for i in range(4)]}
    section = leak_report({"train": known, "test": new}, names=names)
    assert section.notes == ["no recording is in both train and test by their file names"]  # rec3 of two users
    assert section.tables[0].rows[0][0].startswith("rec")
    names["test"][1] = "rec1_f024.png"
    assert "1 recordings are in both train and test" in leak_report({"train": known, "test": new}, names=names).notes[0]
    names = {key: [f"{user}/24GHz_{i}.png" for i, user in enumerate(NAMES)] for key in ("train", "test")}
    section = leak_report({"train": known, "test": new}, names=names)
    assert section.notes == ["the file names of train and test do not tell recordings apart"]  # 24GHz is everybody's


def test_no_twins_in_the_same_recordings_are_no_praise():
    known, new = (images(window(recordings(4, seed))) for seed in (0, 1))
    files = {"train": [f"rec{i}_f000.png" for i in range(4)], "test": [f"rec{i}_f024.png" for i in range(4)]}
    section = leak_report({"train": known, "test": new}, names=files)
    assert {f.verdict for f in section.findings} == {"none found; yet both sets are of the same recordings"}
    assert section.data["recordings"] == {"in_both": 4, "told": True}
    many = leak_report({"train": known, "test": known}, names=files).findings[0]
    assert many.value == 1 and many.verdict.startswith("too many: numbers on held-out images say nothing")


def test_sets_tell_of_their_own_recordings():
    """By the files that they were read from: apart, the same, or nothing is known."""
    known, new = (images(window(recordings(4, seed))) for seed in (0, 1))

    def told(first, second):
        files = [[f"{user}_{name}_0001.png" for user in NAMES] if name else None for name in (first, second)]
        return recordings_of(*(s._replace(files=f) for s, f in zip((known, new), files, strict=True)))

    assert told("s00", "s03").apart
    assert not told("s00", None).apart and told(None, None) == Recordings(False, [])
    both = recordings_of(*(s._replace(files=[f"{i}_f{n}.png" for i in range(4)]) for s, n in ((known, 0), (new, 24))))
    assert not both.apart and [recording for _, recording in both.both] == ["0", "1", "2", "3"]


def test_other_sizes_are_not_compared():
    known = images(window(recordings(4, 0)))
    section = leak_report({"train": known, "test": known._replace(pixels=known.pixels[:, ::2, ::2])})
    assert not section.findings and "other sizes" in section.notes[0]
