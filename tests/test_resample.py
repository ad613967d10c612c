"""Which times are drawn: the official weights, unbiased losses, several processes, and a checkpoint between."""

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler

LOSSES = [1.0, 5.0, 2.0, 0.1, 9.0, 3.0]


class SixTimes:
    num_timesteps = 6


def warm(history=2):
    sampler = LossSecondMomentResampler(SixTimes(), history_per_term=history)
    for _ in range(history):
        sampler.update_with_all_losses(list(range(6)), LOSSES)
    return sampler


def test_second_moment_weights_are_upstreams():
    data = golden("adm_resample.npz")
    sampler = LossSecondMomentResampler(SixTimes(), history_per_term=int(data["history_per_term"]))
    sampler.update_with_all_losses(data["ts"].tolist(), data["losses"].tolist())
    np.testing.assert_allclose(sampler.weights(), data["weights"], rtol=1e-12)


def test_weights_are_uniform_until_every_time_is_known():
    sampler = warm()
    sampler._loss_counts[3] -= 1
    assert np.array_equal(sampler.weights(), np.ones(6))
    sampler.update_with_all_losses([3], [0.1])
    wanted = np.array(LOSSES) / sum(LOSSES) * (1 - 0.001) + 0.001 / 6
    np.testing.assert_allclose(sampler.weights(), wanted, rtol=1e-12)


def test_old_losses_are_forgotten():
    sampler = warm()
    sampler.update_with_all_losses([0, 0, 1], [7.0, 8.0, 6.0])
    assert sampler._loss_history[:2].tolist() == [[7.0, 8.0], [5.0, 6.0]]


def test_weighted_losses_are_unbiased():
    """The mean of weight x loss is the plain mean of the losses, whatever is drawn how often."""
    sampler = warm()
    t, weights = sampler.sample(200_000, "cpu", rng=np.random.RandomState(0))
    assert (t.dtype, weights.dtype) == (th.int64, th.float32)
    drawn = (weights * th.tensor(LOSSES)[t]).mean()
    assert drawn.item() == pytest.approx(np.mean(LOSSES), rel=0.01)


def test_draws_follow_the_seed():
    """The global generator is upstream's; a generator of one's own leaves it alone."""
    sampler = UniformSampler(SixTimes())
    np.random.seed(3)
    theirs, _ = sampler.sample(9, "cpu")
    np.random.seed(3)
    ours, weights = sampler.sample(9, "cpu", rng=np.random.RandomState(3))
    assert th.equal(theirs, ours) and th.equal(weights, th.ones(9))
    assert np.random.choice(6, size=9, p=np.ones(6) / 6).tolist() == theirs.tolist()


def test_the_samplers_memory_survives_a_checkpoint(tmp_path):
    a, b = warm(), LossSecondMomentResampler(SixTimes(), history_per_term=2)
    state = a.state_dict()
    th.save(state, tmp_path / "s.pt")
    b.load_state_dict(th.load(tmp_path / "s.pt", weights_only=True))
    assert np.array_equal(a.weights(), b.weights()) and a.weights()[0] != a.weights()[4]
    a.update_with_all_losses([0], [100.0])
    assert state["history"].max() == 9.0  # what was saved does not move with the sampler


def test_a_memory_of_other_steps_is_refused():
    class Ten:
        num_timesteps = 10

    with pytest.raises(ValueError, match="losses of 6 steps, this process has 10.*--diffusion_steps"):
        LossSecondMomentResampler(Ten(), history_per_term=2).load_state_dict(warm().state_dict())


def test_an_unknown_sampler_is_named():
    for error in (NotImplementedError, ValueError):
        with pytest.raises(error, match="unknown schedule sampler: best; --schedule_sampler"):
            create_named_schedule_sampler("best", SixTimes())


def test_one_process_needs_no_group():
    sampler = LossSecondMomentResampler(SixTimes(), history_per_term=1)
    sampler.update_with_local_losses(th.arange(6), th.tensor(LOSSES))
    np.testing.assert_allclose(sampler._loss_history[:, 0], LOSSES, rtol=1e-6)


def share_unequal_batches(rank, folder):
    th.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sampler = LossSecondMomentResampler(SixTimes(), history_per_term=2)
    mine = slice(0, 5) if rank == 0 else slice(5, 6)
    sampler.update_with_local_losses(th.arange(6)[mine], th.tensor(LOSSES)[mine])
    np.save(f"{folder}/{rank}.npy", sampler._loss_history)
    th.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_batches_agree(tmp_path):
    """Upstream gathers tensors of different lengths, which no backend allows."""
    th.multiprocessing.spawn(share_unequal_batches, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        history = np.load(tmp_path / f"{rank}.npy")
        np.testing.assert_allclose(history, np.stack([LOSSES, np.zeros(6)], axis=1), rtol=1e-6)
