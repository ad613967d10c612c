"""Every user equally often, in an order that follows from the seed and the position alone."""

from collections import Counter

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion_vae import image_datasets as data
from guided_diffusion_vae import validation
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import stream
from guided_diffusion_vae.data.stream import BatchStream, Order
from guided_diffusion_vae.vae_wrapper import VAEInterface

COUNTS = 5, 2, 11, 1
LABELS = np.repeat([0, 1, 3, 4], COUNTS)  # nobody is user 2
ROWS = [(np.full(1, i), {}) for i in range(len(LABELS))]


def order(seed=0, shuffle=True):
    return Order(ROWS, seed=seed, shuffle=shuffle, labels=LABELS)


def test_every_turn_has_every_user_once_in_another_order():
    read = [order().index(i) for i in range(4 * 110)]
    turns = [tuple(LABELS[read[4 * k : 4 * k + 4]]) for k in range(110)]
    assert {tuple(sorted(turn)) for turn in turns} == {(0, 1, 3, 4)}
    assert len(set(turns)) == 24  # 4! orders: 110 draws miss one of them with probability 0.2
    first = Counter(turn[0] for turn in turns)
    assert all(abs(n - 27.5) < 4 * (110 * 3 / 16) ** 0.5 for n in first.values())


def test_every_user_gives_all_images_before_any_again():
    read = np.array([order().index(i) for i in range(4 * 110)])
    for user, n in zip((0, 1, 3, 4), COUNTS, strict=True):
        own = read[LABELS[read] == user]
        passes = [tuple(own[i : i + n]) for i in range(0, 110, n)]
        assert all(sorted(once) == np.flatnonzero(LABELS == user).tolist() for once in passes)
        assert n == 1 or len(set(passes)) > 1
    assert set(Counter(read.tolist()).values()) == {110 // n for n in COUNTS}


def test_a_position_says_all():
    """In any order of asking; and another seed is another order."""
    straight = [order().index(i) for i in range(200)]
    asked = np.random.RandomState(0).permutation(200)
    one = order()
    assert [one.index(int(i)) for i in asked] == [straight[i] for i in asked]
    assert straight != [order(seed=1).index(i) for i in range(200)]
    assert [order(shuffle=False).index(i) for i in range(8)] == [0, 5, 7, 18, 1, 6, 8, 18]


def test_without_balance_nothing_has_changed():
    """The order of the data is published: one permutation of all for every epoch."""
    plain = Order(ROWS, seed=3, shuffle=True)
    wanted = [np.random.default_rng([3, epoch]).permutation(len(ROWS)) for epoch in (0, 1)]
    assert [plain.index(i) for i in range(2 * len(ROWS))] == np.concatenate(wanted).tolist()


def test_seek_and_processes_see_the_same(monkeypatch):
    def batches(size, rank, step, count):
        monkeypatch.setattr(stream.dist_util, "world_size", lambda: size)
        monkeypatch.setattr(stream.dist_util, "rank", lambda: rank)
        read = BatchStream(ROWS, 6 // size, seed=5, labels=LABELS)
        read.seek(step)
        return [next(read)[0].flatten().tolist() for _ in range(count)]

    whole = batches(1, 0, 0, 8)
    assert batches(1, 0, 5, 3) == whole[5:]
    parts = [batches(3, rank, 2, 6) for rank in range(3)]
    assert [sum(found, []) for found in zip(*parts, strict=True)] == whole[2:]


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Users with 5, 1 and 2 images; image i of user u has a red level of 20 u + i."""
    for user, count in enumerate((5, 1, 2)):
        (tmp_path / f"user_{user:02d}").mkdir()
        for i in range(count):
            pixels = np.random.RandomState(10 * user + i).randint(0, 255, (32, 32, 3)).astype(np.uint8)
            pixels[..., 0] = 20 * user + i
            Image.fromarray(pixels).save(tmp_path / f"user_{user:02d}" / f"{i}.png")
    return tmp_path


def load(folder, **options):
    said = []
    options = {"batch_size": 6, "image_size": 32, "vae": VAEInterface("pixel"), "seed": 0, "num_workers": 0, **options}
    return data.load_data_with_vae(data_dir=folder, say=said.append, **options), said


def test_a_batch_has_every_user(folder):
    read, _ = load(folder, class_cond=True, class_balance=True)
    assert read.num_samples == 8
    for _ in range(5):
        images, cond = next(read)
        levels = ((images[:, 0, 0, 0] + 1) * 127.5).round().int()
        assert sorted(cond["y"].tolist()) == [0, 0, 1, 1, 2, 2] and th.equal(levels // 20, cond["y"].int())
        assert (levels == 20).sum() == 2  # the one image of user 1


def test_how_even_the_users_are_is_said_of_labelled_data(folder):
    read, said = load(folder, class_cond=True)
    line = "images per user: min 1, median 2, max 5; fewest: user_01 (1), user_02 (2), user_00 (5)"
    assert said.count(line) == 1 and read.images_per_user == {"user_00": 5, "user_01": 1, "user_02": 2}
    read, said = load(folder)
    assert not any("images per user" in line for line in said) and read.images_per_user == {}


def test_balance_needs_users(folder):
    with pytest.raises(UserError, match="^--class_balance True needs users to balance: give --class_cond True"):
        load(folder, class_balance=True)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_a_fixed_choice_of_the_images_with_their_labels(folder, cached):
    vae = VAEInterface() if cached else VAEInterface("pixel")
    read, _ = load(folder, vae=vae, class_cond=True, random_flip=not cached, class_balance=True)
    rows, again, others = (read.rows(6, seed=seed) for seed in (1, 1, 2))
    z, cond = rows.batch(range(6))
    assert len(rows) == 6 and len(read.rows(100, seed=1)) == 8
    assert th.equal(z, again.batch(range(6))[0]) and not th.equal(z, others.batch(range(6))[0])
    whole, labels = read.rows(100, seed=1).batch(range(8))  # a longer choice begins with the shorter one
    assert th.equal(whole[:6], z) and th.equal(labels["y"][:6], cond["y"])
    assert sorted(labels["y"].tolist()) == [0] * 5 + [1] + [2] * 2 and len({row.sum().item() for row in whole}) == 8
    if not cached:
        assert th.equal(((whole[:, 0, 0, 0] + 1) * 127.5).round().long() // 20, labels["y"])
        plain, _ = load(folder, vae=vae, deterministic=True, batch_size=8)
        assert {row.sum().item() for row in next(plain)[0]} == {row.sum().item() for row in whole}
        assert all(any(th.equal(row, wanted) for wanted in next(plain)[0]) for row in whole)  # none is mirrored


def test_rows_are_judged_as_heldout_data_are(folder):
    """The same set either way has the same loss, up to which row has which noise: here no noise matters."""
    read, _ = load(folder, class_cond=True)

    class Count(th.nn.Module):
        num_timesteps = 10

        def training_losses(self, model, z, t, model_kwargs, noise):
            return {"loss": z.flatten(1).mean(1) + 10 * model_kwargs["y"]}

    heldout = data.HeldOut(read.images.order.dataset, read.labels, read.vae)
    losses = [
        validation.validation_loss(th.nn.Identity(), Count(), some, batch_size=3, seed=0)
        for some in (heldout, read.rows(8, seed=3))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0]) > 1
