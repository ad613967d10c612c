"""The same process on a subset of its times: train with T steps, sample with fewer.

Keeping times s_0 < s_1 < ... leaves abar at them as it is, so the new betas are 1 - abar(s_i) / abar(s_{i-1}). The
network still sees the original times.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Which of T times to keep: a set of ints.

    Args:
        num_timesteps: T.
        section_counts: "ddimN" for N times with an integer stride from 0 (the DDIM paper's); or counts, as a list or
            with commas: T is cut into that many nearly equal sections, and each keeps so many evenly spaced times.
    Raises:
        ValueError: no such stride, a count below zero or larger than its section, or no counts at all.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _by_stride(num_timesteps, _int(section_counts[4:], section_counts))
        section_counts = [_int(word, section_counts) for word in section_counts.split(",")]
    if min(section_counts) < 0:
        raise ValueError(f"--timestep_respacing asks for {min(section_counts)} steps; a section keeps 0 or more")
    base, longer = divmod(num_timesteps, len(section_counts))
    kept, start = set(), 0
    for i, count in enumerate(section_counts):
        size = base + (i < longer)
        if count > size:
            raise ValueError(f"cannot divide section of {size} steps into {count}: lower --timestep_respacing")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.add(start + round(place))
            place += stride  # a running sum, and Python's rounding to even: upstream's numbers hang on both
        start += size
    return kept


def _int(word, whole):
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(
            f"--timestep_respacing is {whole!r}; it must be counts such as 250 or 10,10,20, or ddim50"
        ) from error


def _by_stride(num_timesteps, count):
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    possible = {len(range(0, num_timesteps, stride)) for stride in range(1, num_timesteps)}
    near = sorted(sorted(possible, key=lambda n: abs(n - count))[:2])
    raise ValueError(
        f"cannot create exactly {count} steps with an integer stride: --timestep_respacing ddim{count} does not fit"
        f" {num_timesteps} steps; give {' or '.join(f'ddim{n}' for n in near)}, or {count} without ddim"
    )


class SpacedDiffusion(GaussianDiffusion):
    """A process on the kept times of another.

    Args:
        use_timesteps: the times to keep, of the original 0 ... T - 1.
        kwargs: of `GaussianDiffusion`; `betas` are the original ones.
    Raises:
        ValueError: no time is kept.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs):
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        abar = np.cumprod(1.0 - np.array(kwargs["betas"], dtype=np.float64))
        self.timestep_map = [i for i in range(self.original_num_steps) if i in self.use_timesteps]
        if not self.timestep_map:
            raise ValueError("no step is left: --diffusion_steps and --timestep_respacing must keep at least 1")
        self._map_on_device = {}
        betas, last = [], 1.0
        for i in self.timestep_map:
            betas.append(1 - abar[i] / last)
            last = abar[i]
        super().__init__(**{**kwargs, "betas": np.array(betas)})

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model):
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model, self.timestep_map, self.rescale_timesteps, self.original_num_steps, self._map_on_device
        )

    def _times_of_network(self):
        return self.original_num_steps

    def _scale_timesteps(self, t):
        return t  # the wrapped model does it


class _WrappedModel:
    """A model, or a cond_fn, that is asked at places among the kept times and sees the original ones.

    Args:
        map_on_device: the process's store of its map, one tensor per device: uploaded once, not at every step.
    """

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps, map_on_device=None):
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps
        self.map_on_device = {} if map_on_device is None else map_on_device

    def __call__(self, x, ts, **kwargs):
        if ts.device not in self.map_on_device:
            self.map_on_device[ts.device] = th.tensor(self.timestep_map, device=ts.device)
        times = self.map_on_device[ts.device][ts]
        if self.rescale_timesteps:
            times = times.float() * (1000.0 / self.original_num_steps)
        return self.model(x, times, **kwargs)
