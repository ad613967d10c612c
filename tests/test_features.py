"""Feature spaces: whose numbers they are called, what they learn from, and a cache that cannot lie."""

import re

import numpy as np
import pytest
import torch as th
from helpers import draw_users

from evaluations import features
from evaluations.batches import ArrayBatch, open_batch
from evaluations.features import FeatureSpace, extracted, learn_user_space, saved_user_space, vae_space
from evaluations.user_classifier import UserClassifier
from guided_diffusion_vae.autoencoders.foundation import IMAGENET_MEAN, IMAGENET_STD
from guided_diffusion_vae.checkpoint import save
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.vae_wrapper import VAEInterface


def noise(n, size=64, seed=0, labels=None):
    return ArrayBatch(np.random.RandomState(seed).randint(0, 256, (n, size, size, 3)).astype(np.uint8), labels)


@pytest.mark.parametrize("name, called", [("inception", "FID"), ("dinov2", "FD_DINOv2"), ("user", "FD_user")])
def test_only_inceptions_distance_is_called_fid(name, called):
    assert FeatureSpace(name, "", dict).distance == called


def test_a_space_that_is_not_inceptions_own_marks_its_numbers():
    assert FeatureSpace("inception", "", dict).ending == ""
    unchecked = FeatureSpace("inception-unchecked", "", dict)
    assert (unchecked.distance, unchecked.ending) == ("FD_inception-unchecked", "_inception-unchecked")


@pytest.mark.parametrize(
    "file, check, name, about",
    [
        ("a.pth", True, "inception", ""),
        ("a.pb", True, "inception", ": checked by its size, as no hash of it is public"),
        ("a.pb", False, "inception-unchecked", ": unchecked weights, so compare within this report only"),
        ("a.pth", False, "inception-unchecked", ": unchecked weights, so compare within this report only"),
    ],
)
def test_what_is_known_of_inceptions_weights(tmp_path, monkeypatch, file, check, name, about):
    model = th.nn.Identity()
    model.class_weight = np.zeros((3, 2), np.float32)
    inception = pytest.importorskip("evaluations.inception")
    monkeypatch.setattr(inception, "load_inception", lambda path, check: model)
    (tmp_path / file).write_bytes(b"weights")
    space = features.inception_space(tmp_path / file, check=check)
    assert space.name == name and space.about == f"Inception of 2015, {tmp_path / file}{about}"


def test_every_second_image_of_every_class():
    chosen = features.every_second(np.array([5, 2, 5, 5, 2, 2, 5, 5]))
    assert chosen.tolist() == [False, False, True, False, True, False, True, False]


# ---- users -----------------------------------------------------------------------------------------------------------


def stripes(n, seed=0):
    """Two users, numbered 3 and 7, who differ in the height of a bright line."""
    rng, labels = np.random.RandomState(seed), np.where(np.arange(n) % 2, 7, 3)
    pixels = rng.randint(0, 60, (n, 32, 32, 3)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label] = 255
    return ArrayBatch(pixels, labels)


def test_the_user_space_learns_from_the_half_that_is_no_reference():
    reference, other = stripes(40), stripes(20, seed=1)
    space = learn_user_space(reference, steps=40)
    assert space.learned.sum() == 20
    found = space.extract(other)
    assert found["pool"].shape == (20, 64)
    assert np.allclose(found["probabilities"].sum(axis=1), 1)
    assert (found["probabilities"].argmax(axis=1) == (other.labels == 7)).mean() > 0.9


def test_nothing_of_what_is_compared_leaks_into_the_judge():
    reference = stripes(40)
    spoiled = ArrayBatch(reference.pixels.copy(), reference.labels)
    spoiled.pixels[~features.every_second(reference.labels)] = 0
    judges = [learn_user_space(batch, steps=2).fingerprint for batch in (reference, spoiled)]
    assert judges[0] == judges[1] != learn_user_space(reference, steps=2, seed=1).fingerprint


@pytest.mark.parametrize(
    "users, each, right, weak",
    [
        (2, 16, 1.0, ""),
        (2, 16, 0.75, ""),
        (2, 16, 0.5, "weak .50% of the others named right, 75% are wanted.: give the training folder"),
        (2, 14, 1.0, "weak .7 images a user to learn from, 8 are wanted.: give"),
        (10, 20, 0.3, ""),
        (10, 20, 0.2, "weak .20% of the others named right, 30% are wanted."),
    ],
)
def test_a_judge_that_learned_from_few_or_names_few_right_is_called_weak(users, each, right, weak):
    """Of every user's images every second is learned from; of the others this share is named right, the rest wrong."""
    labels = np.repeat(np.arange(users), each) * 3 + 5  # any numbers
    learned = features.every_second(labels)
    named = np.repeat(np.arange(users), each)
    for user in range(users):
        others = np.flatnonzero((labels == user * 3 + 5) & ~learned)
        named[others[round(len(others) * right) :]] = (user + 1) % users
    named[learned] = 0  # does not count
    space = FeatureSpace("user", "", dict, "a judge", learned=learned)
    space, warnings = features.tested(space, labels, np.eye(users)[named])
    assert f"a judge, of which it names {right:.0%} right (chance {1 / users:.0%}), IS_user" in space.about
    assert len(warnings) == bool(weak) and all(re.search(weak, line) for line in warnings)


@pytest.mark.parametrize("labels", [None, [0] * 10, [0] * 7 + [1] * 3], ids=["none", "one class", "three of a class"])
def test_without_enough_labels_there_are_no_user_features(labels):
    batch = noise(10, 8, labels=None if labels is None else np.array(labels))
    assert not features.can_learn_users(batch)
    with pytest.raises(UserError, match="--features user needs labels"):
        learn_user_space(batch)


def test_a_judge_from_a_file_sees_what_it_saw(tmp_path):
    th.manual_seed(0)
    judge, batch = UserClassifier(3).eval(), noise(10)
    save(judge.state_dict(), tmp_path / "judge.pt")
    space = saved_user_space(tmp_path / "judge.pt")
    assert space.fingerprint == judge.fingerprint()
    assert np.array_equal(space.extract(batch)["pool"], judge.judge(batch.pixels).features)


@pytest.mark.parametrize("weights", [{"w": th.zeros(3)}, {"head.weight": th.zeros(3, 64)}])
def test_other_weights_are_no_judge(tmp_path, weights):
    save(weights, tmp_path / "other.pt")
    with pytest.raises(UserError, match="--features .*other.pt holds other weights"):
        saved_user_space(tmp_path / "other.pt")


# ---- the autoencoder -------------------------------------------------------------------------------------------------


def test_vae_features_are_means_of_latents_over_cells():
    batch = noise(6)
    found = vae_space("microdoppler-f4", batch_size=4).extract(batch)["pool"]
    vae = VAEInterface("microdoppler-f4", sample_posterior=False)
    z = vae.encode_batch(th.from_numpy(batch.pixels).permute(0, 3, 1, 2) / 127.5 - 1).numpy()  # (6, 4, 16, 16)
    cells = z.reshape(6, 4, 4, 4, 4, 4).mean(axis=(3, 5)).reshape(6, 64)
    assert np.abs(found - cells).max() < 1e-5


def test_vae_features_are_the_same_from_a_folder(tmp_path):
    batch = open_batch(draw_users(tmp_path / "data", ["a", "b"], 3, size=40), "REF")
    space = vae_space("microdoppler-f4", batch_size=2)
    found, again = space.extract(batch), space.extract(ArrayBatch(batch.take(np.arange(6))))
    assert np.abs(found["pool"] - again["pool"]).max() < 1e-5


# ---- DINOv2 ----------------------------------------------------------------------------------------------------------


def test_dinov2_gives_its_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2, patch_size=14, image_size=224
    )
    th.manual_seed(0)
    theirs = transformers.Dinov2Model(config).eval()
    theirs.save_pretrained(tmp_path / "dino")
    batch = noise(4, size=224)  # needs no resizing
    found = features.dinov2_space(tmp_path / "dino", batch_size=3).extract(batch)["pool"]
    x = th.from_numpy(batch.pixels).permute(0, 3, 1, 2) / 255
    x = (x - th.tensor(IMAGENET_MEAN).view(3, 1, 1)) / th.tensor(IMAGENET_STD).view(3, 1, 1)
    with th.no_grad():
        wanted = theirs(x).pooler_output.numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_dinov2_without_weights_names_the_flag(path):
    with pytest.raises(UserError, match="--dinov2_path") as caught:
        features.dinov2_space(path)
    assert "vf" not in str(caught.value)


# ---- the cache -------------------------------------------------------------------------------------------------------


def counting(fingerprint="f", value=1.0):
    """A space that counts how often it is asked."""
    calls = []

    def extract(batch):
        calls.append(len(batch))
        return {"pool": np.full((len(batch), 2), value, np.float32)}

    return FeatureSpace("vae", fingerprint, extract), calls


def test_features_are_kept_under_images_and_extractor(tmp_path):
    space, calls = counting()
    batch = noise(5, 8)
    for _ in range(2):
        assert np.array_equal(extracted(space, batch, tmp_path / "cache")["pool"], np.ones((5, 2)))
    assert calls == [5]
    extracted(space, noise(5, 8, seed=1), tmp_path / "cache")  # other images
    assert calls == [5, 5]
    other, calls = counting("g", 2.0)  # another extractor
    assert extracted(other, batch, tmp_path / "cache")["pool"][0, 0] == 2
    assert calls == [5]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"no zip at all", None, np.zeros((4, 2)), np.full((5, 2), np.nan)])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    space, calls = counting()
    batch = noise(5, 8)
    extracted(space, batch, tmp_path)
    (kept,) = tmp_path.iterdir()
    if isinstance(damage, np.ndarray):
        np.savez(kept, pool=damage)
    else:
        kept.write_bytes(kept.read_bytes()[:-40] if damage is None else damage)
    assert np.array_equal(extracted(space, batch, tmp_path)["pool"], np.ones((5, 2)))
    assert calls == [5, 5]


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    space, calls = counting()
    for _ in range(2):
        extracted(space, noise(5, 8))
    assert calls == [5, 5] and not list(tmp_path.iterdir())
