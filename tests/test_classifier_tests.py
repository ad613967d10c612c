"""What classifiers learn, in worlds whose answers are known."""

import json
from functools import partial

import numpy as np
import pytest
import torch as th
from gait_pictures import WAYS, patterned

from evaluations import classifier_tests as tests
from evaluations import user_classifier
from evaluations.classifier_tests import (
    classifier_tests,
    confusion,
    confusion_picture,
    interval_of,
    lessons,
    share_right,
)
from evaluations.image_sets import ImageSet
from evaluations.shortcut import Shortcut
from evaluations.user_classifier import to_input
from guided_diffusion_vae.config import UserError

USERS = 6
NAMES = [f"user_{i:02d}" for i in range(USERS)]
walks = partial(patterned, users=USERS, size=16)


class Nearest(th.nn.Module):
    """Names the user of the most similar picture that it knows: its answers follow from the world alone."""

    def __init__(self, pixels, users, num_users, **options):
        super().__init__()
        self.x, self.y, self.num_users = to_input(pixels).flatten(1), th.as_tensor(users), num_users

    def forward(self, x):
        nearest = th.cdist(x.flatten(1), self.x).argmin(dim=1)
        return 50 * th.nn.functional.one_hot(self.y[nearest], self.num_users).float()


@pytest.fixture
def by_neighbours(monkeypatch):
    monkeypatch.setattr(tests, "train_user_classifier", Nearest)


def found_in(train, heldout, samples, **options):
    section = classifier_tests(train, heldout, samples, **{"seeds": 2, **options})
    return {finding.name: finding for finding in section.findings}, section


def test_it_says_how_far_it_is_over_all_classifiers(monkeypatch, capsys):
    """Two seeds of three lessons, six classifiers of as many steps: one count, and no line of any alone."""
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 2)
    monkeypatch.setattr("evaluations.progress.EVERY_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    classifier_tests(walks(0), walks(1), walks(2), seeds=2, epochs=1, progress=True)
    said = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"6 classifiers learn: {step / 12:.0%}" for step in range(1, 12)]
    classifier_tests(walks(0), walks(1), walks(2), seeds=1, epochs=1)
    assert not capsys.readouterr().out


def test_samples_as_good_as_real_ones_score_like_them(by_neighbours):
    found, section = found_in(walks(0), walks(1), walks(2))
    assert [found[name].value for name in ("TRTR", "TRTS", "TSTR", "gain")] == [1, 1, 1, 0]
    assert found["TSTR"].verdict == "as real images" and found["TSTR"].worst == 1 / USERS
    assert found["TSTR"].interval == (pytest.approx(6 / (6 + 1.96**2)), 1)  # six of six users, by Wilson
    assert found["IS_user"].value == pytest.approx(USERS) == found["users named"].value
    assert np.array_equal(section.data["confusion_trts"], 2 * 8 * np.eye(USERS))
    assert not any("too little" in note for note in section.notes)
    json.dumps(section.data)


def test_one_way_to_walk_is_named_right_and_teaches_little(by_neighbours):
    """Who has seen one of four ways knows that one, and guesses the others."""
    found, section = found_in(walks(0), walks(1), walks(2, ways=1))
    assert found["TRTS"].value == 1 and found["TSTR"].real == 1
    assert 1 / WAYS <= found["TSTR"].value < 0.65
    assert any("too little of how real walks vary" in note for note in section.notes)


def test_swapped_users_are_named_wrong(by_neighbours):
    swapped = walks(2)._replace(labels=(walks(2).labels + 1) % USERS)
    found, section = found_in(walks(0), walks(1), swapped)
    assert found["TRTS"].value == 0 == found["TSTR"].value and found["TRTS"].verdict == "no better than the worst"
    rows = section.tables[0].rows
    assert rows[0][:4] == ["user_00", 8, 8, 8] and rows[0][4:7] == [1, 0, 0]


def test_brightness_that_tells_generated_users_and_not_real_ones_is_an_alarm(by_neighbours):
    """Held-out real images have the brightness of another session, generated ones that of the training."""
    shift = 12 * np.arange(USERS)

    def lit(images, by):
        pixels = np.clip(images.pixels * 0.5 + 30 + by[images.labels][:, None, None, None], 0, 255)
        return images._replace(pixels=pixels.astype(np.uint8))

    found, section = found_in(lit(walks(0), shift), lit(walks(1), np.roll(shift, 1)), lit(walks(2), shift))
    assert found["shortcut"].value > 0.9 and found["shortcut"].real < 0.3
    assert found["shortcut"].verdict == "alarm: above real images"
    assert any(note.startswith("alarm: a few numbers") for note in section.notes)


def test_right_means_little_where_the_ceiling_is_chance(by_neighbours):
    """The last user walks in other ways when held out, and as in training when generated."""
    held = walks(1)
    swapped = held._replace(pixels=np.where((held.labels == 5)[:, None, None, None], walks(1).pixels[:1], held.pixels))
    _, section = found_in(walks(0), swapped, walks(2))
    said = [note for note in section.notes if note.startswith("'right' means little for")]
    assert len(said) == 1 and "for user_05:" in said[0]
    assert not any("means little" in note for note in found_in(walks(0), walks(1), walks(2))[1].notes)


def test_noise_teaches_nothing(by_neighbours):
    noise = np.random.RandomState(5).randint(0, 256, (USERS * 20, 16, 16, 3)).astype(np.uint8)
    many = walks(1, each=20)
    found, _ = found_in(walks(0, each=20), many, ImageSet(noise, many.labels, NAMES))
    assert abs(found["TSTR"].value - 1 / USERS) < 0.2 and abs(found["TRTS"].value - 1 / USERS) < 0.2


def test_what_real_images_lack_can_be_gained(by_neighbours):
    """Training images show one way, samples all four."""
    found, section = found_in(walks(0, ways=1), walks(1), walks(2))
    assert found["gain"].value == pytest.approx(1 - found["TRTR"].value) and found["gain"].value > 0.3
    assert found["gain"].interval[0] > 0
    assert any("besides all real ones helps" in note for note in section.notes)


@pytest.mark.slow
def test_the_classifier_itself_learns_from_few_samples_what_it_learns_from_as_many_real_ones(monkeypatch):
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 30)
    rows = np.random.RandomState(0).permutation(16)[:USERS]

    def bright_rows(seed, each):
        pixels = np.random.RandomState(seed).randint(0, 90, (USERS * each, 16, 16, 3)).astype(np.uint8)
        users = np.repeat(np.arange(USERS), each)
        pixels[np.arange(len(users)), rows[users]] = 250
        return ImageSet(pixels, users, NAMES)

    found, section = found_in(bright_rows(0, 5), bright_rows(1, 4), bright_rows(2, 4), seeds=1, epochs=1)
    assert min(found[name].value for name in ("TRTR", "TRTS", "TSTR")) > 0.9 < found["TSTR"].real
    assert section.data["learned_from"] == {"generated": [4] * USERS, "real": [4] * USERS}


def test_as_many_real_images_as_generated_ones_and_a_lost_user_shows():
    """The last user has no generated image: the ceiling learns him nevertheless."""
    train, samples = walks(0), walks(2, each=4).take(np.arange(20))
    found = lessons(train, samples, np.random.default_rng(0))
    counts = {name: np.bincount(images.labels, minlength=USERS).tolist() for name, images in found.items()}
    assert counts == {
        tests.REAL: [8] * 6,
        tests.FAKE: [4, 4, 4, 4, 4, 0],
        tests.FEWER: [4] * 6,
        tests.BOTH: [12, 12, 12, 12, 12, 8],
    }
    assert tests.FEWER not in lessons(train, walks(2, each=20), np.random.default_rng(0))


def test_a_lost_user_has_no_answers_in_trts_and_wrong_ones_in_tstr(by_neighbours):
    found, section = found_in(walks(0), walks(1), walks(2).take(np.arange(40)))
    assert found["TRTS"].value == 1 and found["TSTR"].value == pytest.approx(5 / 6) and found["TSTR"].real == 1
    assert section.tables[0].rows[5][5:7] == [None, 0]
    assert any(note.startswith("1 users have no generated image") for note in section.notes)


def test_unlabelled_samples_have_a_spread_only(by_neighbours):
    unlabelled = ImageSet(walks(2, each=2).pixels, None, None)
    found, section = found_in(walks(0), walks(1), unlabelled)
    assert set(found) == {"IS_user", "users named"} and "unlabelled" in section.notes[0]
    assert [row[1] for row in section.tables[0].rows] == [2] * USERS


def test_one_user_alone_has_a_spread_of_one():
    p = np.tile([[0.7, 0.1, 0.1, 0.1]], (9, 1))
    assert tests.class_spread(p) == pytest.approx(1) and tests.class_spread(np.eye(4)) == pytest.approx(4)


def test_the_mean_over_users_counts_every_user_alike():
    right = share_right(np.array([0, 0, 0, 1, 2]), np.array([0, 0, 0, 1, 1]), 3)
    assert right[:2].tolist() == [1, 0.5] and np.isnan(right[2])


def test_the_interval_is_that_of_a_binomial():
    """One answer a user, right with 0.7: the mean of 400 has a standard deviation of 0.023."""
    right = (np.random.RandomState(0).rand(1, 400) < 0.7).astype(float)
    low, high = interval_of(right, np.random.default_rng(0))
    assert low < right.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.0229, rel=0.15)


def test_two_users_tell_nothing_of_others():
    """No interval from fewer than three users, also where a third has no answers."""
    rng = np.random.default_rng(0)
    assert interval_of(np.array([[0.2, 0.8]]), rng) is None
    assert interval_of(np.array([[0.2, 0.8, np.nan]]), rng) is None
    assert interval_of(np.array([[0.2, 0.8, 0.5]]), rng) == pytest.approx((0.2, 0.8))


def test_a_section_of_two_users_has_no_intervals_and_says_so(by_neighbours):
    three = [walks(seed, each=20) for seed in range(3)]
    two = [images.take(images.labels < 2)._replace(class_names=NAMES[:2]) for images in three]
    found, section = found_in(*two)
    assert not any(finding.interval for finding in found.values()) and found["TRTS"].value == 1
    assert any("neither helps nor harms beyond chance: +0.0%, too few users" in note for note in section.notes)


def test_the_shortcut_knows_the_brightness_of_a_user_but_no_pattern():
    """Brightness apart by ten deviations is always told; patterns of equal brightness never."""
    rng, users = np.random.RandomState(0), np.repeat(np.arange(3), 40)
    half = np.arange(120) % 2 == 0

    def right(pixels):
        images = ImageSet(np.clip(pixels, 0, 255).astype(np.uint8), users, NAMES[:3])
        return (Shortcut.learn(images.take(half)).name(images.take(~half).pixels) == users[~half]).mean()

    noise = rng.normal(100, 20, (120, 16, 16, 1))
    brighter = noise + 50 * users[:, None, None, None] + rng.normal(0, 5, (120, 1, 1, 1))
    assert right(np.repeat(brighter, 3, axis=3)) == 1
    turned = np.stack([np.roll(image, 5 * user, axis=1) for image, user in zip(noise, users, strict=True)])
    assert abs(right(np.repeat(turned, 3, axis=3)) - 1 / 3) < 0.2


def test_the_confusion_matrix_and_its_picture():
    p = np.eye(3)[[0, 1, 1, 2]]
    counts = confusion(p, np.array([0, 0, 1, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    picture = np.asarray(confusion_picture({"real": counts}, NAMES[:3]))
    middle = [[tuple(picture[92 + 18 * row + 9, 90 + 18 * column + 9]) for column in range(3)] for row in range(3)]
    dark, white, half = tests.DARK, (255, 255, 255), (132, 152, 181)
    assert middle == [[half, half, white], [white, dark, white], [white, white, dark]]


def test_too_few_images_are_refused_as_in_the_other_parts():
    with pytest.raises(UserError, match="--real_dir has 2 images of user_00"):
        classifier_tests(walks(0, each=2), walks(1), walks(2))
