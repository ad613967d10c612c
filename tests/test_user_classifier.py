"""The judge sees what it should, and not what it should not."""

import numpy as np
import pytest
import torch as th

from evaluations import user_classifier
from evaluations.user_classifier import UserClassifier, augment, to_input, train_user_classifier


@pytest.fixture
def two_steps(monkeypatch):
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 2)


def test_its_size_and_that_it_is_blind_to_the_phase_of_gait():
    """An event in the middle of the picture, moved along time, keeps its features; another event does not."""
    th.manual_seed(0)
    model = UserClassifier(31).eval()
    assert 80_000 < sum(p.numel() for p in model.parameters()) < 150_000
    event, another = np.random.RandomState(0).randint(0, 256, (2, 64, 16, 3))
    pictures = np.full((3, 64, 64, 3), 127, np.uint8)
    pictures[0, :, 16:32] = pictures[1, :, 30:46] = event
    pictures[2, :, 16:32] = another
    here, there, other = model.judge(pictures).features
    assert np.abs(here - there).max() < 0.1 * np.abs(here - other).max()


def test_large_images_are_averaged_over_area():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 128, 256, 3)).astype(np.uint8)
    wanted = pixels.reshape(2, 64, 2, 64, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.allclose(to_input(pixels).numpy(), wanted, atol=1e-5)


def test_augmentation_moves_time_and_gain_only():
    x = th.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    for before, after in zip(x, augment(x), strict=True):
        gain = (after.max() - after.min()) / (before.max() - before.min())
        level = after.mean() - gain * before.mean()
        undone = (after - level) / gain
        rolled = [th.allclose(before.roll(k, dims=2), undone, atol=1e-3) for k in range(8)]
        assert sum(rolled) == 1 and 0.5 < gain < 1.5


def test_it_leaves_the_callers_random_numbers_alone(two_steps):
    pixels, users = np.zeros((6, 8, 8, 3), np.uint8), np.array([0, 1] * 3)
    th.manual_seed(5)
    wanted = th.rand(1)
    th.manual_seed(5)
    train_user_classifier(pixels, users, 2, epochs=1)
    assert th.rand(1) == wanted


def test_other_seeds_are_other_feature_spaces(two_steps):
    pixels, users = np.random.RandomState(0).randint(0, 256, (6, 16, 16, 3)).astype(np.uint8), np.array([0, 1] * 3)
    prints = [train_user_classifier(pixels, users, 2, seed=s, epochs=1).fingerprint() for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
