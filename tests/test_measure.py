"""The report, on folders whose faults are planted."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluations import image_sets, measure, report, user_classifier
from evaluations.image_sets import ImageSet, read_folder, read_samples, renumber
from guided_diffusion_vae.config import UserError

NAMES = ["user_00", "user_03", "user_07"]


@pytest.fixture(autouse=True)
def a_judge_of_few_words(monkeypatch):
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 4)


def images(seed, each=12, labels=True):
    """Three users; what each image shows is noise about a user's own colour."""
    rng = np.random.RandomState(seed)
    users = np.repeat(np.arange(3), each)
    pixels = np.clip(rng.normal(60 + 60 * users[:, None, None, None], 25, (len(users), 16, 16, 3)), 0, 255)
    return ImageSet(pixels.astype(np.uint8), users if labels else None, NAMES if labels else None)


def few(*sets):
    return measure.evaluate(*sets, epochs=1)


def test_planted_copies_are_found():
    train, held, fresh = images(0, each=20), images(1), images(2)
    nearly = train.pixels[:12] ^ 1
    planted = fresh._replace(pixels=np.concatenate([nearly, train.pixels[50:56], fresh.pixels[18:]]))
    found = few(train, held, planted)
    assert found.rows["generated"].near_copies == pytest.approx(0.5)
    assert "6 of 36 generated images are also training images, pixel for pixel" in found.notes
    for honest in ("real, same sessions", "real, other sessions"):
        assert found.rows[honest].near_copies == 0
        assert 0.8 < found.rows[honest].nearest < 1.2


def test_a_leak_between_the_splits_is_said():
    train, held = images(0), images(1)
    leaking = held._replace(pixels=np.concatenate([train.pixels[:4], held.pixels[4:]]))
    assert "4 of 36 held-out images are also training images, pixel for pixel" in few(train, leaking, images(2)).notes


def test_samples_without_labels_have_no_accuracy_and_all_the_rest(tmp_path):
    found = few(images(0), images(1), images(2, labels=False))
    generated = found.rows["generated"]
    assert generated.user_accuracy is None and generated.fd_user > 0 and "unlabelled" in found.notes[-1]
    assert any("is biased, n=" in note for note in found.notes)
    found.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["rows"]["generated"]["user_accuracy"] is None
    assert set(saved["accuracy_per_user"]["real, other sessions"]) == set(NAMES)
    assert "user accuracy                -" in str(found)


def files(images, session):
    return images._replace(files=[f"{NAMES[user]}_{session}_{i:04d}.png" for i, user in enumerate(images.labels)])


@pytest.mark.parametrize("session, called", [("s03", "other sessions"), ("s00", "held-out images"), (None, None)])
def test_other_sessions_are_called_so_only_where_file_names_tell(session, called):
    """In print: the keys of report.json stay what they were."""
    train, held = files(images(0), "s00"), images(1)
    if session:
        held = files(held, session)
        train = train._replace(files=[*train.files[:-1], "user_07_s01_0035.png"])  # two sessions, or names tell nothing
    found = few(train, held, images(2))
    text = str(found)
    assert found.heldout_is == (called or "held-out images")
    assert f"{found.heldout_is:>16} split at random" in text.splitlines()[1]
    assert ("other sessions" in text) == (called == "other sessions") or "not other sessions" in text
    assert any("recordings are in both" in note for note in found.notes) == (session == "s00")
    assert "real, other sessions" in found.rows


def test_the_first_two_scores_have_intervals_and_verdicts():
    train, held, made = images(0, each=24), images(1), images(2)
    found = few(train, held, made)
    for key in ("user_accuracy", "fd_user"):
        finding = found.finding(key)
        low, high = finding.interval
        assert low <= getattr(found.rows["generated"], key) <= high
        words = f"{finding.name} {finding.shown(finding.value)} (95 %: {finding.shown(low)} to {finding.shown(high)}): "
        (line,) = [line for line in str(found).splitlines() if line.startswith(words)]
        assert line.removeprefix(words).startswith(finding.verdict)
    assert found.finding("user_accuracy").real == found.rows["real, other sessions"].user_accuracy
    assert found.finding("fd_user").worst == found.rows["real, pixels shuffled"].fd_user


def test_the_interval_of_accuracy_draws_users():
    """Three users at 0, 1/2 and 1: all draws of the same user are there, so the ends are 0 and 1."""
    labels, right = np.repeat([0, 1, 2], 4), np.repeat([0, 0, 1, 0, 1, 1], [4, 1, 1, 1, 1, 4]).astype(bool)
    assert measure._accuracy_interval(right, labels, 0) == (0, 1)
    assert measure._accuracy_interval(right[:8], labels[:8], 0) is None
    assert measure._accuracy_interval(right | True, labels, 0) == measure.share_interval(12, 12)


def test_why_fewer_images_are_compared_is_said():
    few_set_aside = str(few(images(0, each=12), images(1), images(2)))  # a sixth of twelve, of three users
    assert "6 images against 36 held-out images; of 36 generated ones 6, evenly of all users" in few_set_aside
    assert "only so many real images that the judge never saw" in few_set_aside
    few_held = str(few(images(0, each=60), images(1, each=3), images(2)))
    assert "of 36 generated ones 9, evenly of all users, as there are only so many held-out images" in few_held
    assert "evenly of all users" not in str(few(images(0, each=30), images(1), images(2, each=2)))


def test_what_is_set_aside_and_what_is_compared():
    labels = np.repeat([0, 1, 2], [4, 6, 24])
    aside, learned = measure.set_aside(labels, np.random.default_rng(0))
    assert np.bincount(labels[aside]).tolist() == [1, 1, 4]
    assert sorted([*aside, *learned]) == list(range(34))
    mixed = np.tile([2, 0, 1], 8)
    assert np.bincount(mixed[measure.spread(mixed, 24, 12)]).tolist() == [4, 4, 4]


def test_shuffled_pixels_keep_their_colours():
    pixels = images(0).pixels
    shuffled = image_sets.shuffle_pixels(pixels, np.random.default_rng(0))
    assert not np.array_equal(pixels, shuffled)
    for a, b in zip(pixels, shuffled, strict=True):
        assert sorted(map(tuple, a.reshape(-1, 3))) == sorted(map(tuple, b.reshape(-1, 3)))


def test_the_picture_shows_each_user_beside_himself():
    train, samples = images(0), images(2)
    picture = np.asarray(report.comparison(train, samples, each=2))
    tile = 16 + 4
    assert np.array_equal(picture[16 + tile :][:16, 68:84], train.pixels[12])
    assert np.array_equal(picture[16 + tile :][:16, 68 + 2 * tile + 12 :][:, :16], samples.pixels[12])


# ---- what users give -------------------------------------------------------------------------------------------------


def test_folders_are_brought_to_the_samples_size_without_distortion(tmp_path):
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 200  # the centre, all that is left when the sides are cropped
    for user in ("user_00", "user_01"):
        (tmp_path / user).mkdir()
        Image.fromarray(wide).save(tmp_path / user / "a.png")
    found = read_folder(tmp_path, "--real_dir", (4, 4))
    assert found.pixels.shape == (2, 4, 4, 3) and (found.pixels == 200).all() and found.labels.tolist() == [0, 1]


def test_a_folder_of_splits_is_refused_and_images_of_another_size_are_said(tmp_path):
    for split in ("test", "train"):
        for user in ("user_00", "user_01"):
            (tmp_path / split / user).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / split / user / "a.png")
    for flag, split in (("--real_dir", "train"), ("--heldout_dir", "test")):
        words = f"{flag} {tmp_path} holds train, test, which are not one set: give one, such as {tmp_path / split}"
        with pytest.raises(UserError, match=f"^{words}$"):
            read_folder(tmp_path, flag)
    said = []
    read_folder(tmp_path / "train", "--real_dir", (4, 4), say=said.append)
    read_folder(tmp_path / "train", "--real_dir", say=said.append)
    assert said == ["--real_dir: 2 of 2 images have another size, such as 8 x 8: brought to 4 x 4"]


def test_the_interval_of_a_share():
    """Wilson's: 0 to z^2 / (n + z^2) of none, symmetric of a half."""
    z2 = 1.96**2
    assert measure.share_interval(0, 100) == (0, pytest.approx(z2 / (100 + z2)))
    assert measure.share_interval(100, 100) == (pytest.approx(100 / (100 + z2)), 1)
    low, high = measure.share_interval(50, 100)
    assert low + high == pytest.approx(1) and low == pytest.approx(0.4038, abs=1e-4)


def test_samples_are_numbered_by_the_training_folder():
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    folder = ImageSet(pixels, np.array([0, 0, 1]), ["user_03", "user_07"])
    assert renumber(folder, NAMES, "--samples").labels.tolist() == [1, 1, 2]
    assert renumber(ImageSet(pixels, np.array([2, 0, 1]), None), NAMES, "--samples").labels.tolist() == [2, 0, 1]
    assert renumber(ImageSet(pixels, np.zeros(3, int), ["sample"]), NAMES, "--samples").labels is None
    with pytest.raises(UserError, match="user_99"):
        renumber(folder._replace(class_names=["user_03", "user_99"]), NAMES, "--samples")
    with pytest.raises(UserError, match="labels 0 to 3, but --real_dir has 3 users"):
        renumber(ImageSet(pixels, np.array([0, 3, 1]), None), NAMES, "--samples")


@pytest.mark.parametrize(
    "arrays, wanted",
    [
        ([np.full((4, 8, 8, 3), 0.5, np.float32)], r"0 to 255: \(x \* 255\)"),
        ([np.linspace(-1, 1, 768, dtype=np.float32).reshape(4, 8, 8, 3)], r"0 to 255: \(\(x \+ 1\) \* 127.5\)"),
        ([np.full((4, 8, 8, 3), 200.0)], r"uint8: .* x.round\(\).clip\(0, 255\)"),
        ([np.zeros((4, 3, 8, 8), np.uint8)], r"channels first; .*x.transpose\(0, 2, 3, 1\)"),
        ([np.zeros((4, 8, 8, 4), np.uint8)], "drop alpha"),
        ([np.zeros((4, 8, 8), np.uint8)], "grey; repeat it"),
        ([np.zeros((0, 8, 8, 3), np.uint8)], "uint8"),
        ([np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int)], "arr_1"),
        ([np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4)], "arr_1"),
        ([np.array([{}], dtype=object)], "Python objects"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, arrays, wanted):
    np.savez(tmp_path / "s.npz", *arrays)
    with pytest.raises(UserError, match=f"--samples.*{wanted}"):
        read_samples(tmp_path / "s.npz")


@pytest.mark.parametrize("content", [b"", b"no zip", "truncated", "other"])
def test_a_damaged_npz_is_one_line(tmp_path, content):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **{"arr_0" if content == "truncated" else "images": np.zeros((4, 8, 8, 3), np.uint8)})
        if content == "truncated":
            path.write_bytes(path.read_bytes()[:300])
    wanted = "--samples.* has images, but no arr_0" if content == "other" else "--samples"
    with pytest.raises(UserError, match=wanted) as error:
        read_samples(path)
    assert "\n" not in str(error.value)


def test_too_little_to_judge_by():
    train, held, samples = images(0), images(1), images(2)
    for flag, sets in (
        ("--real_dir has 3 images of user_00", (images(0, each=3), held, samples)),
        ("--samples has 3 images", (train, held, images(2, each=1))),
        ("--heldout_dir has 3 images", (train, images(1, each=1), samples)),
        ("--real_dir has 3 images that the judge", (images(0, each=8), held, samples)),
    ):
        with pytest.raises(UserError, match=flag):
            few(*sets)
