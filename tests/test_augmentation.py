"""The augmentation study, in worlds whose answers are known."""

import csv
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch as th
from gait_pictures import patterned
from helpers import save_sets, script
from PIL import Image

from evaluations import augmentation, study
from evaluations.augmentation import AugmentationConfig, arms, augmentation_study, masked, rolled
from evaluations.image_sets import ImageSet
from evaluations.study import ALONE, ARMS, CONTROLS, DUPLICATES, GENERATED, MASKED, MORE, REAL, SHIFTED, Study
from evaluations.user_classifier import BATCH, Judgement, train_user_classifier
from guided_diffusion_vae.config import UserError

USERS = 4
NAMES = [f"user_{i:02d}" for i in range(USERS)]
walks = partial(patterned, users=USERS, size=8)
lessons = []  # (images, options) that the stand-in was given


class Nearest:
    """Names the user of the most similar picture that it knows: its answers follow from the world alone."""

    def __init__(self, pixels, users, num_users, **options):
        lessons.append((len(pixels), options))
        self.x, self.y = pixels.reshape(len(pixels), -1).astype(float), users

    def judge(self, pixels):
        x = pixels.reshape(len(pixels), 1, -1).astype(float)
        return Judgement(None, self.y[((x - self.x) ** 2).sum(axis=2).argmin(axis=1)])


@pytest.fixture(autouse=True)
def by_neighbours(monkeypatch):
    lessons.clear()
    monkeypatch.setattr(augmentation, "train_user_classifier", Nearest)


def noise(each):
    pixels = np.random.RandomState(9).randint(0, 256, (USERS * each, 8, 8, 3)).astype(np.uint8)
    return ImageSet(pixels, np.repeat(np.arange(USERS), each), NAMES)


def test_samples_of_other_ways_to_walk_help_where_real_ones_are_few():
    """One real image shows one way of four; eight samples show them all, and eight real images do, too."""
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1, 8), seeds=3)
    few, many = found.gains
    assert found.means(1, GENERATED).tolist() == [1, 1, 1] == found.means(1, ALONE).tolist()
    assert few.shown == 1 and list(few.over) == list(CONTROLS)
    for control, over in few.over.items():
        assert over.gain == pytest.approx(1 - found.means(1, control).mean()) and over.gain > 0.3
    assert many.shown == 0 and {(over.gain, over.more_real) for over in many.over.values()} == {(0, None)}
    assert found.verdict == "generated images help beyond every control at k = 1"
    assert any("has seen 8 images a user or more" in note for note in found.notes)


def test_more_real_images_are_what_samples_are_worth():
    found = augmentation_study(walks(0, each=16), walks(1), walks(2), ks=(2,), per_user=8, seeds=2)
    assert found.means(2, MORE).mean() > 0.95
    findings = found.section().findings
    assert [finding.name for finding in findings] == [f"k = 2, over {control}" for control in CONTROLS]
    for gain, control in zip(findings, CONTROLS, strict=True):
        assert gain.real == pytest.approx(found.means(2, MORE).mean() - found.means(2, control).mean())
        assert gain.worst == 0 and gain.place > 0.9


def test_noise_does_not_help_nor_do_samples_of_the_wrong_users():
    for samples in (noise(8), walks(2)._replace(labels=(walks(2).labels + 1) % USERS)):
        found = augmentation_study(walks(0), walks(1), samples, ks=(4,), seeds=3)
        assert found.gains[0].over[REAL].gain <= 0 and found.gains[0].shown <= 0
        assert found.means(4, ALONE).mean() < 0.45
        assert found.verdict.startswith("generated images are not shown to help")


def test_duplicates_teach_what_the_images_themselves_do():
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1, 3), seeds=2)
    for k in (1, 3):
        assert np.array_equal(found.accuracy[k][DUPLICATES], found.accuracy[k][REAL])


def test_every_arm_at_a_k_learns_for_as_many_steps_from_whole_batches():
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1, 5), seeds=2, epochs=200, augmented=False)
    steps = [options["steps"] for _, options in lessons]
    assert found.about["steps"] == {1: 200 * 36 // BATCH, 5: 200 * 52 // BATCH} and set(steps) == {225, 325}
    assert steps == 2 * ([225] * 6 + [325] * 6)
    assert all(count >= BATCH and options["augmented"] is False for count, options in lessons)
    assert [options["seed"] for _, options in lessons] == [0] * 12 + [1] * 12


def test_the_real_classifier_takes_so_many_steps_and_does_not_augment(monkeypatch):
    """Without augmentation a classifier's batches are the images themselves."""
    from evaluations import user_classifier

    seen = []
    monkeypatch.setattr(user_classifier, "augment", lambda x: seen.append(len(x)) or x)
    pixels, users = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1] * 3)
    same = [train_user_classifier(pixels, users, 2, steps=3, augmented=a).fingerprint() for a in (True, False)]
    assert seen == [6, 6, 6] and same[0] == same[1]


def test_what_the_arms_learn_from():
    train, samples = walks(0, each=8), walks(2, each=6)
    of = {k: arms(train, samples, k=k, per_user=5, seed=(0, 0)) for k in (1, 3)}
    for k, found in of.items():
        counts = {arm: np.bincount(images.labels).tolist() for arm, images in found.items()}
        assert counts == {arm: [{REAL: k, ALONE: 5}.get(arm, k + 5)] * USERS for arm in ARMS}
    known = {arm: {image.tobytes() for image in images.pixels} for arm, images in of[3].items()}
    assert {image.tobytes() for image in of[1][REAL].pixels} < known[REAL] < known[MORE]
    assert known[DUPLICATES] == known[REAL] and known[GENERATED] == known[REAL] | known[ALONE]
    assert known[REAL] < known[SHIFTED] and known[REAL] < known[MASKED]
    assert MORE not in arms(train, samples, k=4, per_user=5, seed=(0, 0))
    other = arms(train, samples, k=3, per_user=5, seed=(0, 1))[REAL]
    assert {image.tobytes() for image in other.pixels} != known[REAL]


def test_rolled_copies_are_the_same_picture_elsewhere_in_time():
    pixels = walks(0, each=1).pixels
    for before, after in zip(pixels, rolled(pixels, np.random.default_rng(0)), strict=True):
        assert sum(np.array_equal(np.roll(before, shift, axis=1), after) for shift in range(1, 8)) == 1


def test_masked_copies_lack_one_band_of_time_and_one_of_doppler():
    pixels = np.random.RandomState(0).randint(0, 100, (20, 64, 64, 3)).astype(np.uint8)
    pixels[:, ::2] += 150  # half of the values: no pixel has the median
    before, widths = pixels.copy(), set()
    for was, now in zip(pixels, masked(pixels, np.random.default_rng(0)), strict=True):
        hidden = (now == np.median(was, axis=(0, 1)).astype(np.uint8)).all(axis=2)
        rows, columns = (int(hidden.all(axis=axis).sum()) for axis in (1, 0))
        changed = (now != was).any(axis=2)
        band = hidden.all(axis=1)[:, None] | hidden.all(axis=0)[None]
        assert not (changed & ~band).any()
        widths |= {rows, columns}
    assert widths == {4, 5} and np.array_equal(pixels, before)


def test_the_interval_is_students():
    """Mean 2, standard deviation 1, three seeds: 2 +- 4.3027 / sqrt 3."""
    low, high = study.interval_over_seeds(np.array([1.0, 2.0, 3.0]))
    assert high - 2 == pytest.approx(4.302653 / 3**0.5) == 2 - low
    assert study.interval_over_seeds(np.array([1.0])) is None


def study_of(**arm):
    """Three seeds that differ by more than the arms, but alike in all; the generated arm varies by 0.01 besides."""
    luck = np.array([[0.1], [0.3], [0.5]])
    names = {"real": REAL, "duplicates": DUPLICATES, "shifted": SHIFTED, "masked": MASKED, "generated": GENERATED}
    noisy = {names[name]: luck + value + np.zeros((3, 2)) for name, value in arm.items()}
    noisy[GENERATED] += np.array([[-0.01], [0.0], [0.01]])
    about = {"real_per_user": 9, "generated_per_user": 2, "steps": {1: 5}, "augmented": True, "seeds": 3}
    return Study(accuracy={1: noisy}, users=["a", "b"], about=about)


def test_seeds_are_paired_and_every_control_is_to_be_beaten():
    found = study_of(real=0.1, duplicates=0.0, shifted=0.15, masked=0.05, generated=0.2)
    (gain,) = found.gains
    assert gain.shown == 1
    assert {name: over.gain for name, over in gain.over.items()} == pytest.approx(
        {REAL: 0.1, DUPLICATES: 0.2, SHIFTED: 0.05, MASKED: 0.15}
    )
    half = 0.01 * 4.302653 / 3**0.5
    assert all(over.interval == pytest.approx((over.gain - half, over.gain + half)) for over in gain.over.values())
    assert "help; points gained: +10.0 (+7.5 to +12.5) over k real alone, +20.0" in str(gain)


def test_a_lucky_control_takes_no_help_away_and_makes_no_harm():
    """Below one control: no help, whatever the others; and no harm as long as k real images alone are not better."""
    (gain,) = study_of(real=0.1, duplicates=0.1, shifted=0.25, masked=0.1, generated=0.2).gains
    assert gain.over[SHIFTED].interval[1] < 0 < gain.over[REAL].interval[0] and gain.shown == 0
    (gain,) = study_of(real=0.1, duplicates=0.1, shifted=0.195, masked=0.1, generated=0.2).gains
    assert gain.over[SHIFTED].gain > 0 > gain.over[SHIFTED].interval[0] and gain.shown == 0


def test_below_real_images_alone_is_harm():
    found = study_of(real=0.3, duplicates=0.0, shifted=0.0, masked=0.0, generated=0.2)
    assert found.gains[0].shown == -1
    assert found.verdict.endswith("not shown to help at any k, and harm, below k real alone, at k = 1")
    assert "help: the whole interval above 0 over every control; harm: below 0 over k real images alone" in found.notes


def test_one_seed_has_no_verdict():
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1,), seeds=1)
    assert found.gains[0].over[REAL].interval is None and found.gains[0].shown == 0
    assert "one seed, no interval" in str(found.gains[0])
    assert found.verdict == "no verdict: one seed has no interval; give --seeds 3 or more"
    assert "no verdict" in str(found.gains[0]) and "not shown to help" not in str(found)
    assert not any("interval" in note for note in found.notes)


@pytest.mark.parametrize("share, said", [(0.62, True), (0.95, False)])
def test_who_does_not_know_his_own_images_is_undertrained(share, said):
    found = study_of(real=0.1, duplicates=0.0, shifted=0.15, masked=0.05, generated=0.2)
    found.about["right_of_own"] = {1: share}
    notes = [note for note in found.notes if note.startswith("undertrained")]
    assert bool(notes) == said and all("62% at k = 1; give more --epochs" in note for note in notes)


def test_how_well_a_classifier_knows_its_own_images(monkeypatch):
    """The nearest neighbour knows them all; who always says the first user knows a quarter."""
    study = partial(augmentation_study, walks(0), walks(1), walks(2), ks=(4,), seeds=2)
    assert study().about["right_of_own"] == {4: 1.0}
    monkeypatch.setattr(Nearest, "judge", lambda self, pixels: Judgement(None, np.zeros(len(pixels), int)))
    found = study()
    assert found.about["right_of_own"] == {4: 1 / USERS} and any("undertrained" in note for note in found.notes)


def test_users_who_are_not_held_out_do_not_count(tmp_path):
    found = augmentation_study(walks(0), walks(1).take(np.arange(24)), walks(2), ks=(1,), seeds=2)
    assert found.means(1, GENERATED).tolist() == [1, 1]
    found.save(tmp_path)
    saved = json.loads((tmp_path / "study.json").read_text())
    assert list(saved["gains"][0]["over"][REAL]) == ["gain", "interval", "more_real"]
    assert saved["accuracy_per_user"]["1"][GENERATED] == [1, 1, 1, None]


def test_what_is_written(tmp_path, monkeypatch):
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1, 4), per_user=4, seeds=2)
    found.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert [(row["k"], row["arm"]) for row in rows] == [(k, arm) for k in "14" for arm in ARMS]
    assert float(rows[1]["accuracy"]) == pytest.approx((float(rows[1]["seed_0"]) + float(rows[1]["seed_1"])) / 2)
    assert [int(row["images_per_user"]) for row in rows[:2]] == [1, 5]
    shown = str(found)
    assert "+ generated" in shown and "chance: 25.0%" in shown and found.verdict in shown
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not found.plot(tmp_path / "study.png") and not (tmp_path / "study.png").exists()


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = augmentation_study(walks(0), walks(1), walks(2), ks=(1, 2), seeds=2)
    assert found.plot(tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as picture:
        assert picture.width > 500


# ---- what users give -------------------------------------------------------------------------------------------------


def test_more_than_there_is_is_refused():
    fewer = walks(0).take(np.delete(np.arange(32), [8, 9, 10]))
    for wanted, sets, options in (
        ("--ks has 8, but --real_dir has 5 images of user_01", (fewer, walks(1), walks(2)), {"ks": (1, 8)}),
        (
            "--generated_per_user is 9, but --samples has 8 images of user_00",
            (walks(0), walks(1), walks(2)),
            {"per_user": 9},
        ),
        ("--samples has 0 images of user_03", (walks(0), walks(1), walks(2).take(np.arange(24))), {}),
        (
            "--samples does not say who is shown; it needs an .npz with labels in arr_1, or a folder",
            (walks(0), walks(1), ImageSet(walks(2).pixels, None, None)),
            {},
        ),
        ("--heldout_dir shows none of the users", (walks(0), ImageSet(walks(1).pixels, None, None), walks(2)), {}),
    ):
        with pytest.raises(UserError, match=wanted):
            augmentation_study(*sets, **{"ks": (1,), **options})
    assert not lessons


def test_training_pictures_are_no_held_out_ones():
    """All: refused. Some: said."""
    with pytest.raises(UserError, match="--heldout_dir holds training images only, pixel for pixel"):
        augmentation_study(walks(0), walks(0).take(np.arange(6)), walks(2), ks=(1,))
    assert not lessons
    mixed = walks(1)._replace(pixels=np.concatenate([walks(1).pixels[:-3], walks(0).pixels[-3:]]))
    found = augmentation_study(walks(0), mixed, walks(2), ks=(1,), seeds=1)
    assert any(note.startswith("3 of 32 held-out images are also training images") for note in found.notes)
    apart = augmentation_study(walks(0), walks(1), walks(2), ks=(1,), seeds=1)
    assert not any("also training images" in note for note in apart.notes)


def test_the_numbers_of_images_are_read_as_words():
    assert AugmentationConfig(ks=("5", "1", "5")).counts == (1, 5)
    for ks in (("0",), ("a",), (), ("1.5",), (-1,)):
        with pytest.raises(UserError, match="--ks"):
            AugmentationConfig(ks=ks)


@pytest.mark.slow
def test_the_command(tmp_path):
    th.manual_seed(0)
    flags = save_sets(tmp_path, walks(0, each=4), walks(1, each=2), walks(2, each=2))
    done = script("augmentation_study.py", *flags, "--ks", "1,2", "--seeds", 1, "--steps", 2)
    assert "k = 2: no verdict" in done.stdout and "over seeds" not in done.stdout
    assert len(list(csv.DictReader((tmp_path / "augmentation" / "study.csv").open()))) == 14
    failed = script("augmentation_study.py", *flags, "--ks", "1,9", check=False)
    assert failed.returncode == 2 and failed.stderr.startswith(
        "error: --ks has 9, but --real_dir has 4 images of user_00"
    )
