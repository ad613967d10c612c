"""The validation loss against a computation row by row, and alike for any batch size."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn as nn

from guided_diffusion_vae import validation
from guided_diffusion_vae.data.stream import mix
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.script_util import create_gaussian_diffusion
from guided_diffusion_vae.validation import times_at, validation_loss

COUNT = 37
DIFFUSIONS = {
    "flow": FlowMatching(),
    "gaussian": create_gaussian_diffusion(steps=100),
    "respaced": create_gaussian_diffusion(steps=100, timestep_respacing="20"),
    "learned": create_gaussian_diffusion(steps=100, learn_sigma=True),
}


class HeldOut:
    def __init__(self, z):
        self.z, self.asked = z, []

    def __len__(self):
        return len(self.z)

    def batch(self, indices):
        self.asked += list(indices)
        return self.z[list(indices)], {"y": th.tensor([i % 3 for i in indices])}


class Net(nn.Module):
    """A stated function of x, t and y that gives `channels` times the channels; dropout shows the mode."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.dropout, self.seen = channels, nn.Dropout(0.5), []

    def forward(self, x, t, y):
        self.seen += t.tolist()
        assert not th.is_grad_enabled() and not self.training
        out = self.dropout(0.3 * x + 0.01 * t.view(-1, 1, 1).float() + 0.1 * y.view(-1, 1, 1))
        return th.cat([out] * self.channels, 1)


def rows(count=COUNT):
    return th.from_numpy(np.random.RandomState(0).randn(count, 4, 3)).float()


def net(name):
    return Net(2 if name == "learned" else 1)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_it_is_the_mean_over_rows_noised_one_by_one(name):
    diffusion, z, losses = DIFFUSIONS[name], rows(), []
    places = np.random.default_rng(mix(11, validation.VALIDATION)).permutation(COUNT)
    model = net(name).eval()
    for i in range(COUNT):
        g = th.Generator().manual_seed(mix(11, i, validation.VALIDATION))
        q = (int(places[i]) + th.rand((), generator=g, dtype=th.float64).item()) / COUNT
        noise = th.randn((4, 3), generator=g)[None]
        t = th.tensor([q]).float() if name == "flow" else th.tensor([math.floor(q * diffusion.num_timesteps)])
        with th.no_grad():
            found = diffusion.training_losses(model, z[i : i + 1], t, {"y": th.tensor([i % 3])}, noise=noise)
        losses.append(found["loss"].item())
    loss = validation_loss(net(name), diffusion, HeldOut(z), batch_size=5, seed=11)
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_batch_size_does_not_matter_and_the_seed_does(name):
    def loss(batch_size, seed=0):
        return validation_loss(net(name), DIFFUSIONS[name], HeldOut(rows()), batch_size=batch_size, seed=seed)

    whole = loss(COUNT)
    assert loss(COUNT) == whole
    assert loss(1) == pytest.approx(whole, rel=1e-6) and loss(7) == pytest.approx(whole, rel=1e-6)
    assert abs(loss(COUNT, seed=1) - whole) > 1e-4 * whole


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_the_rows(size, monkeypatch):
    """Every row is some process's, whatever their number; together they give the whole."""
    whole = validation_loss(Net(), FlowMatching(), HeldOut(rows()), batch_size=4, seed=0)
    monkeypatch.setattr(validation.dist_util, "world_size", lambda: size)
    parts, asked = [], []
    for rank in range(size):
        heldout = HeldOut(rows())
        monkeypatch.setattr(validation.dist_util, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(validation.dist_util, "gather_objects", lambda own: parts.append(own) or [own])
        validation_loss(Net(), FlowMatching(), heldout, batch_size=4, seed=0)
        asked.append(heldout.asked)
    assert sorted(sum(asked, [])) == list(range(COUNT))
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
    assert math.fsum(sum((part["loss"] for part in parts), [])) / COUNT == pytest.approx(whole, rel=1e-6)


def test_times_are_spread_evenly():
    """One time in each of N equal parts; and not in the order of the rows, which are sorted by user."""
    model = Net()
    validation_loss(model, FlowMatching(), HeldOut(rows()), batch_size=COUNT, seed=0)
    assert sorted(int(t * COUNT) for t in model.seen) == list(range(COUNT))
    assert abs(np.corrcoef(model.seen, range(COUNT))[0, 1]) < 4 / math.sqrt(COUNT)
    model = Net()
    validation_loss(model, create_gaussian_diffusion(steps=COUNT), HeldOut(rows()), batch_size=COUNT, seed=0)
    assert sorted(model.seen) == list(range(COUNT))


def test_times_lie_where_the_process_allows():
    ends = th.tensor([0.0, 0.5, 1 - 2**-40], dtype=th.float64)
    assert times_at(create_gaussian_diffusion(steps=1000), ends).tolist() == [0, 500, 999]
    flow = FlowMatching(prediction="noise")
    assert times_at(flow, ends).tolist() == pytest.approx([flow.train_eps, 0.5, 1 - flow.train_eps])
    assert times_at(FlowMatching(), ends).dtype == th.float32


def test_a_perfect_network_has_no_loss():
    """All rows the same point m: the velocity (m - x_t) / (1 - t) is exact, whatever the noise."""
    m = 0.7

    class Exact(nn.Module):
        def forward(self, x, t, y):
            return (m - x) / (1 - t).view(-1, 1, 1)

    point = th.full((COUNT, 4, 3), m)
    assert validation_loss(Exact(), FlowMatching(), HeldOut(point), batch_size=8, seed=0) < 1e-8
    off = validation_loss(Exact(), FlowMatching(train_eps=0.1), HeldOut(point + 0.01), batch_size=8, seed=0)
    assert off == pytest.approx(np.mean(sorted_errors()), rel=1e-3)


def sorted_errors():
    """v is off by (m - x_t) / (1 - t) - (m' - noise) = -0.01 / (1 - t) at each of the times used."""
    model = Net()
    validation_loss(model, FlowMatching(train_eps=0.1), HeldOut(rows()), batch_size=8, seed=0)
    return [(0.01 / (1 - t)) ** 2 for t in model.seen]


def test_the_model_is_left_as_it_was_and_no_global_number_is_drawn():
    model = Net()
    th.manual_seed(5)
    wanted = th.rand(3)
    for training in (True, False):
        model.train(training)
        th.manual_seed(5)
        validation_loss(model, FlowMatching(), HeldOut(rows()), batch_size=8, seed=0)
        assert th.equal(th.rand(3), wanted) and model.training is training


def test_one_row_that_is_not_finite_shows():
    for bad in (math.nan, math.inf):
        z = rows()
        z[3, 0, 0] = bad
        assert math.isnan(validation_loss(Net(), FlowMatching(), HeldOut(z), batch_size=8, seed=0))
