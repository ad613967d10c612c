"""A process and its network as solvers see them: a guess of x_start at any x and any time, and alpha and sigma there.

On either process x_t = alpha x_start + sigma noise. What a network predicts (noise, x_start, v or a velocity) and x_t
give x_start = a x_t + b output, with numbers a and b of the time alone; lambda = log(alpha / sigma) grows toward data.
A Gaussian process is defined at integer times: between them lambda is linear in t.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch as th

from .config import UserError
from .flow_matching import CLEARANCE, PATHS, FlowMatching
from .gaussian_diffusion import GaussianDiffusion, ModelVarType
from .respace import SpacedDiffusion

Model = Callable[..., th.Tensor]  # (x, t, **model_kwargs) -> prediction
Times = float | np.ndarray

LEARNED = ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE
PURE_NOISE = -60.0  # stands for lambda = -inf: e^-60 is beyond the precision of any number here
DEEPEST = -5.0  # where spacings by lambda begin if the process begins with pure noise: as linear betas do without


class Point(NamedTuple):
    """A time of the walk: all that a step needs of it, as numbers on the host."""

    seen: float  # the time that the network sees
    alpha: float
    sigma: float
    log_snr: float
    of_x: float  # x_start = of_x x + of_output output
    of_output: float


class Denoiser:
    """A process and its network as solvers see them: x_start at any x and continuous time; see `denoiser_of`.

    A cond_fn adds sigma^2 / alpha g to x_start, where g = cond_fn(x, t) is the gradient of a log-probability; this is
    what `GaussianDiffusion.condition_score` does, and as there it comes after the clamp.

    interval: (start, end), the times of the noise end and of the data end; sigma > 0 at both, and alpha > 0 but where
        a Gaussian process begins with pure noise.
    """

    interval: tuple[float, float]
    output_has_variance = False

    def __init__(
        self, process, model: Model | None, clip_denoised: bool, model_kwargs: dict | None, cond_fn: Model | None
    ):
        self.process, self.model, self.cond_fn = process, model, cond_fn
        self.clip_denoised, self.model_kwargs = clip_denoised, model_kwargs or {}

    def alpha_sigma(self, time: Times) -> tuple[np.ndarray, np.ndarray]:
        """x_t = alpha x_start + sigma noise at these times, float64."""
        raise NotImplementedError

    def uniform(self, num_steps: int) -> np.ndarray:
        """Even times from start to end, float64."""
        raise NotImplementedError

    def _seen(self, time):
        raise NotImplementedError

    def _affine(self, time):
        """What x_start takes of x, and of the network's output."""
        raise NotImplementedError

    def log_snr(self, time: Times) -> np.ndarray:
        """lambda = log(alpha / sigma), half the logarithm of the ratio of powers."""
        alpha, sigma = self.alpha_sigma(time)
        return np.log(alpha) - np.log(sigma)

    def _lambda(self, time):
        """What the solvers take for lambda."""
        return self.log_snr(time)

    def time_at(self, log_snr: Times) -> np.ndarray:
        """The inverse of `log_snr` on the interval, by bisection."""
        log_snr = np.asarray(log_snr, dtype=np.float64)
        noisier, cleaner = (np.full(log_snr.shape, end) for end in self.interval)
        for _ in range(64):  # halves as many times as a float64 has bits
            middle = (noisier + cleaner) / 2
            too_noisy = self.log_snr(middle) < log_snr
            noisier, cleaner = np.where(too_noisy, middle, noisier), np.where(too_noisy, cleaner, middle)
        return (noisier + cleaner) / 2

    def seen_from(self, log_snr: float) -> float:
        """The time that the network sees where lambda reaches a value; the walk's first if it begins above."""
        times = np.linspace(*self.interval, 1001)
        return float(self._seen(np.interp(log_snr, self._lambda(times), times)))

    def points(self, times: np.ndarray) -> list[Point]:
        """What a walk needs of its times, computed once, on the host, in float64."""
        times = np.asarray(times, dtype=np.float64)
        columns = self._seen(times), *self.alpha_sigma(times), self._lambda(times), *self._affine(times)
        return [Point(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def guess(self, x: th.Tensor, point: Point) -> th.Tensor:
        """x_start at x, (N, ...), and a point; one call of the network."""
        t = th.full((len(x),), point.seen, dtype=th.promote_types(x.dtype, th.float32), device=x.device)
        assert self.model is not None
        output = self.model(x, t, **self.model_kwargs)
        if self.output_has_variance:
            assert output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]), "a learned variance needs 2C channels"
            output = output.chunk(2, dim=1)[0]
        assert output.shape == x.shape, f"the model made {tuple(output.shape)} of {tuple(x.shape)}"
        x_start = point.of_x * x + point.of_output * output
        x_start = x_start.clamp(-1, 1) if self.clip_denoised else x_start
        if self.cond_fn is None or not point.alpha:  # pure noise tells a classifier nothing
            return x_start
        return x_start + point.sigma**2 / point.alpha * self.cond_fn(x, t, **self.model_kwargs).to(x)

    def x_start(self, x: th.Tensor, time: float) -> th.Tensor:
        """x_start at x, (N, ...), and one time for all; one call of the network."""
        return self.guess(x, self.points(np.array([time]))[0])


_GAUSSIAN_AFFINE = {  # name of the ModelMeanType -> what x_start takes of x, and of the output
    "START_X": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),
    "EPSILON": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "V": lambda alpha, sigma: (alpha, -sigma),  # v = alpha eps - sigma x_start
}


class _GaussianDenoiser(Denoiser):
    """Time is the place among the T times of the process, here any number in [0, T - 1]; log-SNR is linear between.

    A process may begin with pure noise (zero terminal SNR), where alpha is 0 and lambda -inf. The first step then goes
    from there to the second time, with a guess that knows nothing but the noise: exactly sigma x + alpha D. Solvers
    see PURE_NOISE for -inf, and `log_snr`, by which the times are spaced, is cut at DEEPEST or the time before.
    A network that predicts noise knows no x_start there: its walk leaves that time out.
    """

    def __init__(self, process, *args):
        super().__init__(process, *args)
        if process.model_mean_type.name not in _GAUSSIAN_AFFINE:
            raise UserError("the model predicts x_{t-1}, which --sampler p_sample and ddim know: use one of them")
        abar, has_data = process.alphas_cumprod, process.alphas_cumprod > 0
        if sum(has_data) < 2:
            raise UserError("this process keeps 1 of its times, and a solver needs 2: leave --timestep_respacing out")
        self.output_has_variance = process.model_var_type in LEARNED
        log_snr, cut = (np.log(abar[has_data]) - np.log1p(-abar[has_data])) / 2, -np.inf
        if not has_data.all() and process.model_mean_type.name != "EPSILON":
            log_snr, cut = np.append(log_snr, PURE_NOISE), max(DEEPEST, log_snr[-1])
        self.interval = len(log_snr) - 1.0, 0.0
        self._whole, self._log_snr, self._cut = np.arange(len(log_snr)), log_snr, cut

    def log_snr(self, time):
        return np.maximum(self._lambda(time), self._cut)

    def _lambda(self, time):
        return np.interp(time, self._whole, self._log_snr)

    def alpha_sigma(self, time):
        log_snr = self._lambda(time)
        alpha = (1 + np.exp(-2 * log_snr)) ** -0.5
        return np.where(log_snr > PURE_NOISE, alpha, 0.0), (1 + np.exp(2 * log_snr)) ** -0.5

    def uniform(self, num_steps):
        return np.linspace(*self.interval, num_steps)

    def _seen(self, time):
        process, original = self.process, self.process.num_timesteps
        if isinstance(process, SpacedDiffusion):
            original = process.original_num_steps
            time = np.interp(time, np.arange(process.num_timesteps), process.timestep_map)
        return time * (1000.0 / original) if process.rescale_timesteps else time

    def _affine(self, time):
        return _GAUSSIAN_AFFINE[self.process.model_mean_type.name](*self.alpha_sigma(time))


class _FlowDenoiser(Denoiser):
    """Time is the flow's t in [0, 1]; the ends at which alpha or sigma is 0 are kept off by CLEARANCE."""

    def __init__(self, process, *args):
        super().__init__(process, *args)
        self.interval = process._interval(max(process.sample_eps, CLEARANCE))

    def alpha_sigma(self, time):
        mix = PATHS[self.process.path_type](th.as_tensor(time, dtype=th.float64))
        return mix.alpha.numpy(), mix.sigma.numpy()

    def uniform(self, num_steps):
        return self.process._grid(*self.interval, num_steps, th.zeros((), dtype=th.float64)).numpy()

    def _seen(self, time):
        return time * self.process.time_scale

    def _affine(self, time):
        t = th.from_numpy(time)
        none, one = th.zeros_like(t), th.ones_like(t)
        names = {"source": self.process.prediction, "target": "x_start"}
        return (self.process.convert(output, x, t, **names).numpy() for output, x in ((none, one), (one, none)))


def denoiser_of(
    process: GaussianDiffusion | FlowMatching,
    model: Model | None,
    *,
    clip_denoised: bool = False,
    model_kwargs: dict | None = None,
    cond_fn: Model | None = None,
) -> Denoiser:
    """The process and its network as the solvers see them.

    Args:
        process: a GaussianDiffusion whose network predicts x_start, noise or v; or a FlowMatching. Of a SpacedDiffusion
            only the kept times are known, so give the whole process where num_steps is to choose the times.
        model: (x, t, **model_kwargs) -> prediction; t is a float, scaled as the process does. A learned variance is
            dropped. None: only the times will be asked for.
        clip_denoised: clamp each guess of x_start to [-1, 1].
        cond_fn: (x, t, **model_kwargs) -> the gradient of a log-probability, at the t that the model sees; or None.
    Raises:
        UserError: the network predicts x_{t-1}, which has no meaning between the times; or only one time is kept.
    """
    kind = _FlowDenoiser if isinstance(process, FlowMatching) else _GaussianDenoiser
    return kind(process, model, clip_denoised, model_kwargs, cond_fn)
