"""Losses by hand, and embeddings that tell users apart."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from evaluations import user_classifier
from evaluations.metric_learning import (
    LOSSES,
    arcface_loss,
    balanced,
    contrastive_loss,
    semi_hard,
    squared_distances,
    train_embedding,
    triplet_loss,
)
from evaluations.roc import pairs, roc_auc


def at(*degrees):
    """Unit vectors in the plane."""
    angles = th.tensor(degrees, dtype=th.float64) * math.pi / 180
    return th.stack([angles.cos(), angles.sin()], dim=1)


def walkers(seed, each=8, users=6):
    """What each shows: a user's own row, that brightens at the user's own cadence from a random phase; and noise."""
    rng = np.random.RandomState(seed)
    labels = np.repeat(np.arange(users), each)
    time, rows = np.arange(64) / 64, np.arange(64)
    phase = rng.rand(len(labels), 1)
    beat = 1 + np.cos(2 * np.pi * (time * (2 + labels[:, None] % 3) + phase))  # (N, 64)
    row = np.exp(-(((rows - 16 - 6 * (labels[:, None] // 3)) / 3) ** 2))  # three users share one
    pixels = 90 + 35 * row[:, :, None] * beat[:, None] + 20 * rng.randn(len(labels), 64, 64)
    return np.repeat(np.clip(pixels, 0, 255).astype(np.uint8)[..., None], 3, axis=3), labels


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_squared_distances():
    assert th.allclose(squared_distances(at(0, 60, 180))[0], th.tensor([0, 1, 4], dtype=th.float64))


def test_contrastive_by_hand():
    """At 0 and 60 degrees one user, |d|^2 = 1; at 90 another, sqrt 2 from the first, 2 sin 15 from the second."""
    z, users = at(0, 60, 90), th.tensor([0, 0, 1])
    near = 2 * math.sin(math.radians(15))
    assert contrastive_loss(z, users, margin=1).item() == pytest.approx((1 + 0 + (1 - near) ** 2) / 3)
    assert contrastive_loss(z, users).item() == pytest.approx((1 + 0 + (math.sqrt(2) - near) ** 2) / 3)


def test_contrastive_has_a_slope_where_points_fall_together():
    z = at(0, 0, 0).requires_grad_()
    contrastive_loss(z, th.tensor([0, 0, 1])).backward()
    assert z.grad.isfinite().all()


def test_triplet_by_hand():
    """From 0 degrees the other user is farther than the partner, by more than the margin; from 60 he is nearer."""
    z, users = at(0, 60, 90), th.tensor([0, 0, 1])
    near = (2 * math.sin(math.radians(15))) ** 2
    assert triplet_loss(z, users, margin=0.2).item() == pytest.approx((0 + 1 - near + 0.2) / 2)


def test_a_semi_hard_negative_is_the_nearest_beyond_the_positive():
    users = th.tensor([0, 0, 1, 2, 3])
    squares = th.zeros(5, 5)
    squares[0] = th.tensor([0, 0.5, 0.3, 0.6, 0.9])  # hard, semi-hard, easy
    squares[1] = th.tensor([0.5, 0, 0.1, 0.4, 0.2])  # all nearer than the positive: the farthest
    found = th.stack(semi_hard(squares, users), dim=1)
    assert found.tolist() == [[0, 1, 3], [1, 0, 3]]


def test_one_user_alone_makes_no_triplet():
    z = at(0, 60).requires_grad_()
    loss = triplet_loss(z, th.tensor([4, 4]))
    loss.backward()
    assert loss.item() == 0 and not z.grad.any()


def test_arcface_by_hand():
    directions = th.tensor([[2.0, 0], [0, 3]], dtype=th.float64)  # their length does not matter
    loss = arcface_loss(at(30), th.tensor([0]), directions, scale=5, margin=0.3)
    right, wrong = 5 * math.cos(math.pi / 6 + 0.3), 5 * math.cos(math.pi / 3)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(wrong - right)))


def test_arcface_without_a_margin_is_a_scaled_softmax():
    g = th.Generator().manual_seed(0)
    z = F.normalize(th.randn(20, 8, generator=g, dtype=th.float64))
    directions, users = th.randn(5, 8, generator=g, dtype=th.float64), th.arange(20) % 5
    wanted = F.cross_entropy(7 * z @ F.normalize(directions).T, users)
    assert arcface_loss(z, users, directions, scale=7, margin=0).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_arcface_rises_with_the_angle_up_to_the_opposite_and_has_a_slope_there():
    """The other user's direction is at right angles to all of the way."""
    directions = th.eye(3, dtype=th.float64)[[0, 2]]
    way = F.pad(at(*range(181)), (0, 1))
    losses = [arcface_loss(z[None], th.tensor([0]), directions).item() for z in way]
    assert (np.diff(losses) > 0).all() and np.diff(losses).max() < 0.6  # by degrees: 30 sin(1 degree) at most
    for angle in (0, 180):
        z = way[angle, None].clone().requires_grad_()
        arcface_loss(z, th.tensor([0]), directions).backward()
        assert z.grad.isfinite().all()


def test_balanced_batches():
    users = th.tensor([0] * 3 + [1] * 9 + [2] * 9)
    for batch in balanced(users, 12, 5):
        assert users[batch].bincount().tolist() == [3, 4, 4] and len(batch.unique()) == len(batch)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_users_are_told_apart(loss, monkeypatch):
    """Images it has not seen, of three users a row who differ in cadence alone."""
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 25)
    embedding = train_embedding(*walkers(0), 6, loss=loss, epochs=1)
    pixels, users = walkers(1)
    z = embedding.embed(pixels)
    assert z.dtype == np.float32 and z.shape == (48, 64) and np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert roc_auc(*pairs(z, users, z, users, same_set=True)[:2]) > 0.95


def test_a_seed_and_a_loss_name_an_embedding(monkeypatch):
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 2)
    pixels, users = walkers(0, each=2)
    prints = [
        train_embedding(pixels, users, 6, loss=loss, seed=seed, epochs=1).fingerprint()
        for loss, seed in (("arcface", 0), ("arcface", 0), ("arcface", 1), ("triplet", 0))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_the_loop_that_is_shared_gives_the_judge_that_it_gave_before(monkeypatch):
    """Its first form, written out: the same order of random draws, and so the same bits."""
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 5)
    pixels, users = walkers(0)
    x, y = user_classifier.to_input(pixels).contiguous(memory_format=th.channels_last), th.as_tensor(users)
    with th.random.fork_rng(devices=[]):
        th.manual_seed(3)
        judge = user_classifier.UserClassifier(6).to(memory_format=th.channels_last).train()
        optimiser = th.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = th.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=5)
        order = th.empty(0, dtype=th.long)
        for _ in range(5):
            if len(order) < 32:
                order = th.cat([order, th.randperm(48)])
            chosen, order = order[:32], order[32:]
            loss = F.cross_entropy(judge(user_classifier.augment(x[chosen])), y[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    found = user_classifier.train_user_classifier(pixels, users, 6, seed=3, epochs=1)
    assert found.fingerprint() == judge.fingerprint()
