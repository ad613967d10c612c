"""Which times to train on, and the weights that keep the loss unbiased.

Times are drawn with probability p(t) = w(t) / sum w, and their losses weighted by 1 / (T p(t)), so that the expected
loss is the uniform one whatever w is (Nichol and Dhariwal 2021, section 3.3).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from .flow_matching import FlowMatching
from .gaussian_diffusion import UnknownName


def create_named_schedule_sampler(name: str, diffusion) -> "ScheduleSampler":
    """A sampler by its name: uniform or loss-second-moment; a flow has only its own times, by the name of uniform.

    Raises:
        UnknownName: another name.
    """
    samplers: dict[str, Any] = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if isinstance(diffusion, FlowMatching):
        samplers = {"uniform": FlowTimes}
        if name != "uniform":
            raise UnknownName(f"--schedule_sampler is {name}; a flow has --use_lognorm True instead, or uniform times")
    if name not in samplers:
        raise UnknownName(f"unknown schedule sampler: {name}; --schedule_sampler is {' or '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over the times of a process."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights (T,), not normalised."""

    def sample(self, batch_size: int, device: th.device | str, rng: Any = np.random) -> tuple[th.Tensor, th.Tensor]:
        """Draw times and the weights of their losses: int64 (N,), float32 (N,).

        Args:
            rng: numpy's global generator, or a RandomState.
        """
        w = self.weights()
        p = w / np.sum(w)
        t = rng.choice(len(p), size=(batch_size,), p=p)
        times, weights = th.from_numpy(t).long(), th.from_numpy(1 / (len(p) * p[t])).float()
        return times.to(device, non_blocking=True), weights.to(device, non_blocking=True)  # training does not wait


class UniformSampler(ScheduleSampler):
    """Every time alike."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """Collective: call on every process. Share this process's times and losses (N,), then update alike on all.

        N may differ between processes. Without a process group there is nothing to share.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())
            return
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (local_ts.tolist(), local_losses.tolist()))
        self.update_with_all_losses(*(sum(part, []) for part in zip(*everyone, strict=True)))

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Update from lists of times and losses, identical on all processes."""


class LossSecondMomentResampler(LossAwareSampler):
    """w(t) = sqrt(E[L_t^2]) over the last losses of each time, once every time has a full history.

    Args:
        history_per_term: losses remembered of each time.
        uniform_prob: share of the uniform distribution mixed in.
    """

    def __init__(self, diffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.diffusion, self.history_per_term, self.uniform_prob = diffusion, history_per_term, uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self):
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        w = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        w /= np.sum(w)
        return w * (1 - self.uniform_prob) + self.uniform_prob / len(w)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self):
        return (self._loss_counts == self.history_per_term).all()

    def state_dict(self) -> dict[str, th.Tensor]:
        """What a checkpoint needs, as tensors of their own."""
        return {"history": th.tensor(self._loss_history), "counts": th.tensor(self._loss_counts)}

    def load_state_dict(self, state: dict[str, th.Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is of a process with another number of steps.
        """
        if state["history"].shape != self._loss_history.shape:
            raise ValueError(
                f"the checkpoint remembers the losses of {len(state['history'])} steps, this process has"
                f" {len(self._loss_history)}: give the run's --diffusion_steps and --timestep_respacing"
            )
        self._loss_history[:] = state["history"].cpu().numpy()
        self._loss_counts[:] = state["counts"].cpu().numpy()


class FlowTimes:
    """The times of a flow: as it wants them, all of weight 1."""

    def __init__(self, flow):
        self.flow = flow

    def sample(self, batch_size: int, device: th.device | str, rng: Any = np.random) -> tuple[th.Tensor, th.Tensor]:
        """Times and weights of their losses: float32 (N,) each; see `ScheduleSampler.sample`."""
        rng = np.random.mtrand._rand if rng is np.random else rng
        return self.flow.sample_times(batch_size, device, rng), th.ones(batch_size, device=device)
