"""Flows from noise to data along a path: flow matching (Lipman et al. 2023), interpolants (SiT, Ma et al. 2024).

Noise eps ~ N(0, I) and data x_start are mixed, and a network learns the mean velocity of the mixture:

    x_t = alpha_t x_start + sigma_t eps,      v_t = alpha'_t x_start + sigma'_t eps

t is a float in [0, 1] that grows toward data: t = 0 is noise, t = 1 is data. GaussianDiffusion's grows toward noise.
Velocity, score, noise and x_start are four names of one estimate: any of them, with x_t, gives the others. The ODE
dx = v dt and, for every w(t) >= 0, the SDE dx = (v + w score) dt + sqrt(2 w) dW have the marginals of x_t.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from tqdm import tqdm

from .config import UserError
from .losses import gaussian_log_likelihood
from .nn import mean_flat

Model = Callable[..., th.Tensor]  # (x, t, **model_kwargs) -> prediction, shaped as x
Unary = Callable[[th.Tensor], th.Tensor]  # x -> something like x
Field = Callable[[th.Tensor, th.Tensor], th.Tensor]  # (x, one t for all) -> dx/dt
Terms = dict[str, th.Tensor]

CLEARANCE = 1e-3  # kept from an end of the path at which a division by alpha or sigma would blow up


# ---- paths


class Mix(NamedTuple):
    """x_t = alpha x_start + sigma noise at some t, with the derivatives by t."""

    alpha: th.Tensor
    sigma: th.Tensor
    d_alpha: th.Tensor
    d_sigma: th.Tensor

    @property
    def wronskian(self) -> th.Tensor:
        """alpha' sigma - alpha sigma': what one divides by to tell data from noise."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    @property
    def diffusion(self) -> th.Tensor:
        """V = (alpha'/alpha) sigma^2 - sigma sigma': half the squared noise of the SDE that runs from data to noise."""
        return self.sigma / self.alpha * self.wronskian


def linear(t: th.Tensor) -> Mix:
    """Straight lines: alpha = t, sigma = 1 - t."""
    return Mix(t, 1 - t, th.ones_like(t), -th.ones_like(t))


def gvp(t: th.Tensor) -> Mix:
    """A quarter circle, alpha^2 + sigma^2 = 1: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    half_pi, angle = math.pi / 2, math.pi / 2 * t
    return Mix(angle.sin(), angle.cos(), half_pi * angle.cos(), -half_pi * angle.sin())


def vp(t: th.Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Mix:
    """DDPM's linear betas in continuous time (Song et al. 2021): alpha = e^m, sigma^2 = 1 - e^(2m), m' = beta / 2."""
    back = 1 - t
    m = -0.25 * back**2 * (beta_max - beta_min) - 0.5 * back * beta_min
    d_m = 0.5 * back * (beta_max - beta_min) + 0.5 * beta_min
    alpha, sigma = m.exp(), (-th.expm1(2 * m)).sqrt()
    return Mix(alpha, sigma, alpha * d_m, -(alpha**2) * d_m / sigma)


Path = Callable[[th.Tensor], Mix]
PATHS: dict[str, Path] = {"linear": linear, "gvp": gvp, "vp": vp}
PREDICTIONS = "velocity", "score", "noise"
LOSS_WEIGHTS: dict[str, Callable[[Mix], th.Tensor]] = {
    "none": lambda mix: th.ones_like(mix.sigma),
    "velocity": lambda mix: (mix.diffusion / mix.sigma) ** 2,
    "likelihood": lambda mix: mix.diffusion / mix.sigma**2,
}
METHODS = "euler", "heun", "dopri5"
DIFFUSION_FORMS: dict[str, Callable[[th.Tensor, Mix, float], th.Tensor]] = {  # w(t); the last argument is its size
    "constant": lambda t, mix, size: size * th.ones_like(t),
    "sbdm": lambda t, mix, size: size * mix.diffusion,
    "sigma": lambda t, mix, size: size * mix.sigma,
    "linear": lambda t, mix, size: size * (1 - t),
    "decreasing": lambda t, mix, size: 0.25 * (size * th.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, mix, size: size * th.sin(math.pi * t) ** 2,
}
LAST_STEPS = "none", "mean", "tweedie", "euler"


@dataclass(kw_only=True)
class FlowConfig:
    """The flow."""

    path_type: str = "linear"  # how noise and data are mixed: linear, gvp or vp
    prediction: str = "velocity"  # what the network gives: velocity, score or noise
    loss_weight: str = "none"  # of score and noise losses: none, velocity or likelihood
    use_lognorm: bool = False  # train on t = sigmoid(N(0, 1)) rather than on uniform t
    use_cosine_loss: bool = False  # add 1 - cos(v, target) over channels; for velocity only
    timestep_shift: float = 0.0  # s: samplers use s t / (1 + (s - 1) t); below 1, more steps near noise; 0 is off

    def __post_init__(self):
        _check("path_type", self.path_type, PATHS)
        _check("prediction", self.prediction, PREDICTIONS)
        _check("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        if not 0 <= self.timestep_shift < math.inf:
            raise UserError(f"--timestep_shift is {self.timestep_shift}; it must be positive, or 0 for no shift")
        if self.prediction == "velocity" and self.loss_weight != "none":
            warnings.warn(f"--loss_weight {self.loss_weight} has no effect with --prediction velocity", stacklevel=3)
        if self.prediction != "velocity" and self.use_cosine_loss:
            warnings.warn(f"--use_cosine_loss has no effect with --prediction {self.prediction}", stacklevel=3)


@dataclass(kw_only=True)
class FlowMatching(FlowConfig):
    """Training losses and samplers along a path.

    Args: see the fields, and `FlowConfig`'s.
    Raises:
        UserError: a name that is not in its table, or a number out of its range.
    Source: Ma et al. 2024 (SiT), sections 2 and 3; Yao et al. 2025 (LightningDiT) for the cosine loss and the shift.
    """

    train_eps: float | None = None  # t kept from the ends of the path; None is as much as the division needs
    sample_eps: float | None = None
    time_scale: float = 1.0  # the network sees t times this: 1 for a LightningDiT, 1000 for a U-Net, as in SiT and ADM

    num_timesteps = 1  # t lies in [0, num_timesteps], as a GaussianDiffusion's does

    def __post_init__(self):
        super().__post_init__()
        plain = self.prediction == "velocity" and self.path_type != "vp"
        if self.train_eps is None:
            self.train_eps = 0.0 if plain else 1e-5 if self.path_type == "vp" else CLEARANCE
        if self.sample_eps is None:
            self.sample_eps = 0.0 if plain else CLEARANCE
        for name in ("train_eps", "sample_eps"):
            if not 0 <= getattr(self, name) < 0.5:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be in [0, 0.5), or unset for the default")

    def mix(self, t: th.Tensor, x: th.Tensor) -> Mix:
        """The path at t, (N,) or one for all, in the precision of x and shaped to broadcast over it."""
        return PATHS[self.path_type](_times_like(t, x).view(-1, *[1] * (x.ndim - 1)))

    # ---- q: training

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """x_t = alpha_t x_start + sigma_t noise."""
        noise = th.randn_like(x_start) if noise is None else noise
        assert noise.shape == x_start.shape
        mix = self.mix(t, x_start)
        return mix.alpha * x_start + mix.sigma * noise

    def sample_times(
        self,
        n: int,
        device: th.device | str,
        rng: th.Generator | np.random.Generator | np.random.RandomState | None = None,
    ) -> th.Tensor:
        """Times to train on: uniform, or sigmoid(N(0, 1)), on the path's interval; (n,) float32.

        Args:
            rng: torch's (of this device) or numpy's; None is torch's global one. Upstream draws the logit-normal times
                from numpy's.
        """
        if isinstance(rng, np.random.Generator | np.random.RandomState):
            draw = rng.standard_normal(n) if self.use_lognorm else rng.uniform(size=n)
            draw = th.from_numpy(draw).float().to(device)
        else:
            draw = (th.randn if self.use_lognorm else th.rand)(n, device=device, generator=rng)
        start, end = self._interval(self.train_eps)
        return start + (end - start) * (draw.sigmoid() if self.use_lognorm else draw)

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor | None = None,
        model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> Terms:
        """Losses of one batch, each (N,): `loss`, and with the cosine loss its two terms `mse` and `cos`.

            velocity: |v - v_t|^2      noise: w |eps - noise|^2      score: w |sigma s + noise|^2

        Noise is drawn before times, as upstream does.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        t = self.sample_times(len(x_start), x_start.device) if t is None else t
        x_t, mix = self.q_sample(x_start, t, noise), self.mix(t, x_start)
        out = model(x_t, _times_like(t, x_start) * self.time_scale, **(model_kwargs or {}))
        assert out.shape == x_start.shape, f"the model made {tuple(out.shape)} of {tuple(x_start.shape)}"
        if self.prediction == "velocity":
            v = mix.d_alpha * x_start + mix.d_sigma * noise
            mse = mean_flat((out - v) ** 2)
            if not self.use_cosine_loss:
                return {"loss": mse}
            cos = mean_flat(1 - F.cosine_similarity(out, v, dim=1)[:, None])
            return {"loss": mse + cos, "mse": mse, "cos": cos}
        error = out - noise if self.prediction == "noise" else mix.sigma * out + noise
        return {"loss": mean_flat(LOSS_WEIGHTS[self.loss_weight](mix) * error**2)}

    # ---- four names of one estimate

    def convert(self, value: th.Tensor, x: th.Tensor, t: th.Tensor, *, source: str, target: str) -> th.Tensor:
        """Turn an estimate at x = x_t into another: velocity, score, noise or x_start.

        The source and x give the pair (x_start, noise), and the pair gives the target. What has to be divided by:
        sigma for x_start and the score, alpha where the source is score or noise.
        """
        if source == target:
            return value
        mix = self.mix(t, x)
        alpha, sigma, d_alpha, d_sigma = mix
        if source == "velocity":
            noise = (d_alpha * x - alpha * value) / mix.wronskian
            x_start = (sigma * value - d_sigma * x) / mix.wronskian
        elif source == "x_start":
            noise, x_start = (x - alpha * value) / sigma, value
        else:
            noise = -sigma * value if source == "score" else value
            x_start = (x - sigma * noise) / alpha
        if target == "velocity":
            return d_alpha * x_start + d_sigma * noise
        return {"x_start": x_start, "noise": noise, "score": -noise / sigma}[target]

    def velocity(
        self, model: Model, x: th.Tensor, t: th.Tensor, cond_fn: Model | None = None, **model_kwargs
    ) -> th.Tensor:
        """dx/dt of the ODE at x and t (one for all, or (N,)), whatever the network predicts.

        Args:
            cond_fn: like the model, but says g, the gradient of a log-probability. It adds g to the score, so
                sigma^2 / alpha g to x_start and V g to the velocity, V = (alpha'/alpha) sigma^2 - sigma sigma'; but
                nothing where alpha = 0.
        """
        t = _times_like(t, x).expand(len(x))
        out = model(x, t * self.time_scale, **model_kwargs)
        v = self.convert(out, x, t, source=self.prediction, target="velocity")
        if cond_fn is None:
            return v
        mix = self.mix(t, x)
        size = th.where(mix.alpha > 0, mix.diffusion, 0.0)
        return v + size.to(v) * cond_fn(x, t * self.time_scale, **model_kwargs).to(v)

    def place_on_path(self, times: th.Tensor) -> th.Tensor:
        """Where the times that a network sees lie: 0 is noise, 1 is data."""
        return times / self.time_scale

    # ---- p: from noise to data

    @th.no_grad()
    def sample_loop(
        self,
        model: Model,
        shape_or_noise: Sequence[int] | th.Tensor,
        num_steps: int = 250,
        *,
        method: str = "euler",
        atol: float = 1e-6,
        rtol: float = 1e-3,
        model_kwargs: dict | None = None,
        cond_fn: Model | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
    ) -> th.Tensor:
        """Sample by the ODE dx = v dt, from given noise or from fresh noise of this shape.

        Args:
            num_steps: points of the grid, with its ends: Euler calls the network num_steps - 1 times, Heun twice that.
            method: euler, heun, or dopri5 (adaptive; num_steps has no effect). Nothing is random after the first noise.
            atol, rtol: the error that dopri5 allows itself at each step.
            cond_fn: leads to a label; see `velocity`.
        """
        x = _first_noise(model, shape_or_noise, device)
        times = self._grid(*self._interval(self.sample_eps), num_steps, x)

        def field(x, t):
            return self.velocity(model, x, t, cond_fn, **(model_kwargs or {}))

        return _integrate(field, x, times, method, atol, rtol, progress)

    @th.no_grad()
    def sample_sde_loop(
        self,
        model: Model,
        shape_or_noise: Sequence[int] | th.Tensor,
        num_steps: int = 250,
        *,
        method: str = "euler",
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
        model_kwargs: dict | None = None,
        cond_fn: Model | None = None,
        device: th.device | str | None = None,
        noise_like: Unary | None = None,
        progress: bool = False,
    ) -> th.Tensor:
        """Sample by the SDE dx = (v + w score) dt + sqrt(2 w) dW.

        Args:
            method: euler (Euler-Maruyama), or heun: a Heun step of the drift after the noise of the step is added.
            diffusion_form, diffusion_norm: w(t), see DIFFUSION_FORMS.
            last_step: how to cross the last `last_step_size` of the path, where the score blows up: by the SDE's
                mean, Tweedie's guess of x_start, or Euler on the ODE; or none, then the walk goes almost to the end.
            noise_like: draws a step's noise for x; None is `torch.randn_like`.
            cond_fn: leads to a label; see `velocity`.
        """
        _check("method", method, METHODS[:2])
        _check("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        _check("last_step", last_step, LAST_STEPS)
        if not 0 < last_step_size < 1:
            raise UserError(f"--last_step_size is {last_step_size}; it must be between 0 and 1")
        start, _ = self._interval(self.sample_eps)
        if diffusion_form == "sbdm" and self.path_type != "vp":
            start = max(start, CLEARANCE)
        rest = max(self.sample_eps or 0.0, CLEARANCE) if last_step == "none" else last_step_size

        def w(t):
            return DIFFUSION_FORMS[diffusion_form](t, PATHS[self.path_type](t), diffusion_norm)

        def velocity(x, t):
            return self.velocity(model, x, t, cond_fn, **(model_kwargs or {}))

        def score(v, x, t):
            return self.convert(v, x, t, source="velocity", target="score")

        def drift(x, t):
            v = velocity(x, t)
            return v + w(t) * score(v, x, t)

        x = _first_noise(model, shape_or_noise, device)
        times = self._grid(start, 1 - rest, num_steps, x)
        for t, t_next in _steps(times, progress):
            dW = (t_next - t).sqrt() * (noise_like or th.randn_like)(x)
            kick = (2 * w(t)).sqrt() * dW
            if method == "euler":
                x = x + (t_next - t) * drift(x, t) + kick
            else:
                x = _step(drift, x + kick, t, t_next, method)
        t = times[-1]
        if last_step == "mean":
            return x + rest * drift(x, t)
        if last_step == "euler":
            return x + rest * velocity(x, t)
        return x if last_step == "none" else self.convert(velocity(x, t), x, t, source="velocity", target="x_start")

    @th.no_grad()
    def log_likelihood(
        self,
        model: Model,
        x: th.Tensor,
        num_steps: int = 250,
        generator: th.Generator | None = None,
        *,
        method: str = "heun",
        model_kwargs: dict | None = None,
        probe: th.Tensor | None = None,
    ) -> th.Tensor:
        """log p(x) in nats, (N,), by the ODE from data back to noise.

            log p(x) = log N(x(0); 0, I) - int_0^1 div v dt,      div v = E[z . (dv/dx) z]

        One probe z of signs serves all steps of a batch: unbiased, and exact where dv/dx is diagonal.

        Args:
            x: (N, ...) data.
            generator: draws the probe, on its own device.
            probe: (N, ...) of signs, instead.
        Source: Song et al. 2021, equation 39; Hutchinson 1990; Grathwohl et al. 2019.
        """
        if probe is None:
            where = x.device if generator is None else generator.device
            probe = th.randint(2, x.shape, generator=generator, device=where).to(x) * 2 - 1

        def field(state, t):
            with th.enable_grad():
                x_t = state[:, :-1].reshape(x.shape).requires_grad_()
                v = self.velocity(model, x_t, t, **(model_kwargs or {}))
                (pulled,) = th.autograd.grad(v, x_t, probe)
            div = (pulled * probe).flatten(1).sum(1, keepdim=True)
            return th.cat([v.detach().flatten(1), div], 1)

        state = th.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)  # x beside the integral of div v, which runs backward
        times = self._grid(*self._interval(self.sample_eps), num_steps, x).flip(0)
        state = _integrate(field, state, times, method)
        x_noise, minus_integral = state[:, :-1], state[:, -1]
        log_prior = gaussian_log_likelihood(x_noise, means=0.0, log_scales=th.zeros_like(x_noise)).sum(1)
        return log_prior + minus_integral

    # ---- times

    def _interval(self, eps) -> tuple[float, float]:
        """Where the path may be evaluated; vp has alpha > 0 at pure noise, so only its data end is singular."""
        return 0.0 if self.path_type == "vp" else eps, 1.0 - eps

    def _grid(self, start, end, num_steps, x):
        """num_steps points from start to end, shifted in between; in the precision of x."""
        if num_steps < 2:
            raise UserError(f"--num_steps is {num_steps}; the grid of times needs its two ends: give 2 or more")
        s, u = self.timestep_shift, _times_like(th.linspace(0, 1, num_steps, dtype=th.float64), x)
        return start + (end - start) * (s * u / (1 + (s - 1) * u) if s else u)


# ---- solvers


def _step(field: Field, x, t, t_next, method):
    """One step of Euler, or of Heun: the mean of the slopes at both ends."""
    slope = field(x, t)
    if method == "heun":
        slope = (slope + field(x + (t_next - t) * slope, t_next)) / 2
    return x + (t_next - t) * slope


def _steps(times, progress):
    """Each time with the next, under a progress bar if asked."""
    return tqdm(list(zip(times[:-1], times[1:], strict=True)), disable=not progress)


def _integrate(field: Field, x, times, method, atol=1e-6, rtol=1e-3, progress=False):
    """x at the last of the times, from x at the first; times may fall."""
    _check("method", method, METHODS)
    if method == "dopri5":
        return _odeint()(lambda t, x: field(x, t), x, times[[0, -1]], method=method, atol=atol, rtol=rtol)[-1]
    for t, t_next in _steps(times, progress):
        x = _step(field, x, t, t_next, method)
    return x


def _odeint() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError(
            "--sampler dopri5 needs torchdiffeq: pip install 'guided_diffusion_vae[ode]', or use --sampler heun"
        ) from error
    return odeint


def _first_noise(model, shape_or_noise, device):
    if isinstance(shape_or_noise, th.Tensor):
        return shape_or_noise
    parameters = model.parameters() if isinstance(model, th.nn.Module) else ()
    device = device or next((p.device for p in parameters), None)
    return th.randn(*shape_or_noise, device=device)


def _times_like(t, x):
    """t on the device of x and in its precision, at least float32: a half has too few times."""
    return t.to(device=x.device, dtype=th.promote_types(x.dtype, th.float32))


def _check(flag, name, known):
    if name not in known:
        raise UserError(f"--{flag} is {name!r}; it must be one of {', '.join(known)}")
