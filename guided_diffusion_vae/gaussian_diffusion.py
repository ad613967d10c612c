"""The Gaussian process of DDPM (Ho et al. 2020) with learned variances (Nichol and Dhariwal 2021), and DDIM.

Data x_0 is mixed with noise over T steps and a network undoes it, one step at a time:

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),      abar_t = prod_{s <= t} (1 - beta_s)
    p(x_{t-1} | x_t) = N(mu_theta(x_t, t), Sigma_theta(x_t, t))

t is an integer in [0, T) that grows toward noise. Tables are float64; what is looked up is float32. Random numbers are
drawn in upstream's order: x_T first, then one tensor like x at every step, even where it is multiplied by zero.
"""

import collections
import enum
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, gaussian_log_likelihood, normal_kl
from .nn import mean_flat

Model = Callable[..., th.Tensor]  # (x, t, **model_kwargs) -> prediction; a cond_fn gives a gradient
Unary = Callable[[th.Tensor], th.Tensor]  # x -> something like x
Terms = dict[str, th.Tensor]


class UnknownName(NotImplementedError, ValueError):
    """A name that is not in the table: upstream's NotImplementedError, and the user's mistake."""


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a named schedule: float64 (T,).

    linear: from 0.0001 s to 0.02 s, s = 1000 / T (Ho et al. 2020, scaled to any T; T >= 20).
    cosine: from abar(u) = cos^2((u + 0.008) / 1.008 pi / 2) (Nichol and Dhariwal 2021, equation 17).

    Raises:
        UnknownName: another name. ValueError: linear with fewer than 20 steps, whose last beta would pass 1.
    """
    T = num_diffusion_timesteps
    if schedule_name == "linear":
        if T < 20:
            raise ValueError(
                f"--diffusion_steps is {T}; the linear schedule needs at least 20: use --noise_schedule cosine"
            )
        scale = 1000 / T
        return np.linspace(scale * 0.0001, scale * 0.02, T, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(T, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise UnknownName(f"unknown beta schedule: {schedule_name}; --noise_schedule is linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """beta_i = min(1 - abar((i + 1) / T) / abar(i / T), max_beta): float64 (T,)."""
    T = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)])


def end_in_pure_noise(betas: np.ndarray) -> np.ndarray:
    """These betas rescaled so that the last abar is 0 and the first one stays: float64 (T,), the last is 1.

    sqrt(abar_t)' = sqrt(abar_1) (sqrt(abar_t) - sqrt(abar_T)) / (sqrt(abar_1) - sqrt(abar_T))

    Raises:
        ValueError: a single beta, which is the first and the last.
    Source: Lin et al. 2024 (Common diffusion noise schedules and sample steps are flawed), algorithm 1.
    """
    if len(betas) < 2:
        raise ValueError(f"--diffusion_steps is {len(betas)}; --zero_terminal_snr True needs at least 2")
    abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    root = np.sqrt(abar)
    rescaled = abar[0] * ((root - root[-1]) / (root[0] - root[-1])) ** 2
    return 1 - rescaled / np.append(1.0, rescaled[:-1])


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise
    V = enum.auto()  # v = sqrt(abar) noise - sqrt(1 - abar) x_0 (Salimans and Ho 2022, appendix D)


class ModelVarType(enum.Enum):
    """Where the variance of p comes from; LEARNED_RANGE interpolates between the two fixed ones in the log."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What is minimised; RESCALED_* are as if all steps of the bound were summed."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """Training losses and samplers of the process with the given betas.

    Where the last abar is 0 (see `end_in_pure_noise`), x_T tells nothing of x_0: the network has to predict x_0, or v,
    which is -x_0 there.

    Args:
        betas: (T,) in (0, 1]; only the last may be 1.
        model_mean_type, model_var_type, loss_type: see the enums.
        rescale_timesteps: give the network t * 1000 / T.
        likelihood: of x_0 given x_1: "discretized" for 8-bit pixels, "gaussian" for latents, which have no bins.
        min_snr_gamma: 0, or the gamma of Min-SNR, which weights the MSE by time; see `mse_weights`.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        likelihood: str = "discretized",
        min_snr_gamma: float = 0.0,
    ):
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps, self.likelihood = rescale_timesteps, likelihood
        assert likelihood in ("discretized", "gaussian"), likelihood
        assert not (min_snr_gamma and loss_type.is_vb()), "Min-SNR weights an MSE"

        self.betas = betas = np.array(betas, dtype=np.float64)
        assert betas.ndim == 1, "betas must be 1-D"
        assert (betas > 0).all() and (betas <= 1).all(), "betas must lie in (0, 1]"
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = abar = np.cumprod(alphas)
        self.alphas_cumprod_prev = abar_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)

        # q(x_t | x_0), and x_0 from x_t and the noise
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - abar)
        self.ends_in_pure_noise = bool(abar[-1] == 0)
        with np.errstate(divide="ignore"):  # infinite there, and not read: x_0 does not follow from pure noise
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1)

        # q(x_{t-1} | x_t, x_0); its variance is 0 at t = 0, so the log takes the next one there
        self.posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else betas
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar)
        self._recip_mean_coef1 = 1.0 / self.posterior_mean_coef1
        self._mean_coef2_over_coef1 = self.posterior_mean_coef2 / self.posterior_mean_coef1

        # the fixed variances of p
        self._large_variance = np.append(first, betas[1:])
        self._log_large_variance = np.log(self._large_variance)
        self._log_betas = np.log(betas)
        self.min_snr_gamma = min_snr_gamma
        self._mse_weights = mse_weights(abar, min_snr_gamma, model_mean_type) if min_snr_gamma else np.ones_like(abar)
        self._on_device = {}

    def _at(self, name, t, shape):
        """Entry t of a table, float32, shaped to broadcast over `shape`; tables are uploaded once per device."""
        key = name, t.device
        if key not in self._on_device:
            self._on_device[key] = th.from_numpy(getattr(self, name)).float().to(t.device)
        return self._on_device[key][t].view(-1, *[1] * (len(shape) - 1))

    # ---- q: from data to noise

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0); equation 4 of Ho et al."""
        shape = x_start.shape
        mean = self._at("sqrt_alphas_cumprod", t, shape) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, shape)
        return mean, variance.expand(shape), self._at("log_one_minus_alphas_cumprod", t, shape).expand(shape)

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        noise = th.randn_like(x_start) if noise is None else noise
        assert noise.shape == x_start.shape
        alpha, sigma = self._alpha_sigma(t, x_start.shape)
        return alpha * x_start + sigma * noise

    def _alpha_sigma(self, t, shape):
        """sqrt(abar_t), sqrt(1 - abar_t)."""
        return self._at("sqrt_alphas_cumprod", t, shape), self._at("sqrt_one_minus_alphas_cumprod", t, shape)

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0); equation 7 of Ho et al."""
        assert x_start.shape == x_t.shape
        shape = x_t.shape
        mean = self._at("posterior_mean_coef1", t, shape) * x_start + self._at("posterior_mean_coef2", t, shape) * x_t
        variance = self._at("posterior_variance", t, shape).expand(shape)
        return mean, variance, self._at("posterior_log_variance_clipped", t, shape).expand(shape)

    # ---- p: from noise to data

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        model_kwargs: dict | None = None,
    ) -> Terms:
        """The network's p(x_{t-1} | x_t) and its guess of x_0.

        Args:
            model: (x, scaled t, **model_kwargs) -> (N, C, ...), or (N, 2C, ...) with a learned variance: mean first.
            x: (N, C, ...) at time t; t: (N,) int.
            clip_denoised: clamp the guess to [-1, 1], after `denoised_fn` has had it.
        Returns:
            dict of `mean`, `variance`, `log_variance`, `pred_xstart`, shaped as x.
        """
        assert t.shape == (x.shape[0],)
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        output, variance, log_variance = self._split_variance(output, x, t)
        pred_xstart = self._guess_xstart(output, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        assert mean.shape == log_variance.shape == pred_xstart.shape == x.shape
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _split_variance(self, output, x, t):
        """The prediction, the variance of p and its log."""
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            assert output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]), "a learned variance needs 2C channels"
            output, v = output.chunk(2, dim=1)
            log_variance = v
            if self.model_var_type == ModelVarType.LEARNED_RANGE:  # equation 15 of Nichol and Dhariwal
                frac = (v + 1) / 2
                smallest = self._at("posterior_log_variance_clipped", t, x.shape)
                log_variance = frac * self._at("_log_betas", t, x.shape) + (1 - frac) * smallest
            return output, log_variance.exp(), log_variance
        names = {
            ModelVarType.FIXED_LARGE: ("_large_variance", "_log_large_variance"),
            ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
        }[self.model_var_type]
        return output, *(self._at(name, t, x.shape).expand(x.shape) for name in names)

    def _guess_xstart(self, output, x, t):
        if self.model_mean_type == ModelMeanType.START_X:
            return output
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x, t, output)
        if self.model_mean_type == ModelMeanType.V:
            return self._predict_xstart_from_v(x, t, output)
        return self._predict_xstart_from_xprev(x, t, output)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        assert x_t.shape == eps.shape
        scale, sigma = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t.shape) for name in ("recip", "recipm1"))
        return scale * x_t - sigma * eps

    def _predict_xstart_from_v(self, x_t, t, v):
        assert x_t.shape == v.shape
        alpha, sigma = self._alpha_sigma(t, x_t.shape)
        return alpha * x_t - sigma * v

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        assert x_t.shape == xprev.shape
        scale, ratio = (self._at(name, t, x_t.shape) for name in ("_recip_mean_coef1", "_mean_coef2_over_coef1"))
        return scale * xprev - ratio * x_t

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        if self.ends_in_pure_noise:  # the same, without a division by alpha
            alpha, sigma = self._alpha_sigma(t, x_t.shape)
            return (x_t - alpha * pred_xstart) / sigma
        scale, sigma = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t.shape) for name in ("recip", "recipm1"))
        return (scale * x_t - pred_xstart) / sigma

    def place_on_path(self, times):
        """Where the times that a network sees lie: 0 is noise, 1 is data."""
        return 1 - times / (1000.0 if self.rescale_timesteps else self._times_of_network())

    def _times_of_network(self):
        return self.num_timesteps

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # ---- guidance by a gradient

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Terms, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> th.Tensor:
        """mu + Sigma g with g = cond_fn(x_t, t), the gradient of a log-probability (Sohl-Dickstein et al. 2015)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self, cond_fn: Model, p_mean_var: Terms, x: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None
    ) -> Terms:
        """eps - sqrt(1 - abar) g, and the x_0 and mean that follow from it (Song et al. 2020, for DDIM).

        Pure noise (abar = 0) tells nothing of x_0, and g nothing of a label: x_0 stays there.
        """
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x.shape) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        if self.ends_in_pure_noise:
            tells = self._at("alphas_cumprod", t, x.shape) > 0
            pred_xstart = th.where(tells, pred_xstart, p_mean_var["pred_xstart"])
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # ---- ancestral sampling

    def p_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        noise_like: Unary | None = None,
    ) -> Terms:
        """One step x_t -> x_{t-1}; dict of `sample` and `pred_xstart` (not guided).

        Args:
            noise_like: draws the step's noise for x; None is `torch.randn_like`.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (noise_like or th.randn_like)(x)
        mean = out["mean"] if cond_fn is None else self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = mean + _nonzero(t, x) * th.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_like: Unary | None = None,
    ) -> th.Tensor:
        """Sample x_0 by T ancestral steps from `noise`, or from fresh noise of this shape."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, noise_like
        )
        return _last(steps)["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_like: Unary | None = None,
    ) -> Iterator[Terms]:
        """Yield the dict of `p_sample` after every step, from noise to data."""

        def step(x, t):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_like)

        yield from self._walk(step, model, shape, noise, device, progress)

    def _walk(self, step, model, shape, noise, device, progress):
        """Take `step(x, t)` at t = T - 1 ... 0."""
        assert isinstance(shape, (tuple, list))
        device = next(model.parameters()).device if device is None else device
        x = th.randn(*shape, device=device) if noise is None else noise
        times = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            times = tqdm(times)
        for i in times:
            with th.no_grad():
                out = step(x, th.full((shape[0],), i, dtype=th.long, device=device))
            yield out
            x = out["sample"]

    # ---- DDIM (Song et al. 2021)

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        noise_like: Unary | None = None,
    ) -> Terms:
        """One step of equation 12; dict of `sample` and `pred_xstart` (guided). eta 0 is deterministic."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar, abar_prev = (self._at(name, t, x.shape) for name in ("alphas_cumprod", "alphas_cumprod_prev"))
        sigma = eta * th.sqrt((1 - abar_prev) / (1 - abar)) * th.sqrt(1 - abar / abar_prev)
        noise = (noise_like or th.randn_like)(x)
        mean = out["pred_xstart"] * th.sqrt(abar_prev) + th.sqrt(1 - abar_prev - sigma**2) * eps
        return {"sample": mean + _nonzero(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> Terms:
        """One deterministic step toward noise, x_t -> x_{t+1}; dict of `sample` and `pred_xstart`."""
        assert eta == 0.0, "only the deterministic path can be walked back"
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        abar_next = self._at("alphas_cumprod_next", t, x.shape)
        sample = out["pred_xstart"] * th.sqrt(abar_next) + th.sqrt(1 - abar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_like: Unary | None = None,
    ) -> th.Tensor:
        """Sample x_0 by T DDIM steps from `noise`, or from fresh noise of this shape."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, noise_like
        )
        return _last(steps)["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Unary | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_like: Unary | None = None,
    ) -> Iterator[Terms]:
        """Yield the dict of `ddim_sample` after every step, from noise to data."""

        def step(x, t):
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, noise_like)

        yield from self._walk(step, model, shape, noise, device, progress)

    # ---- losses

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """One term of the variational bound, in bits per dimension (N,): L_{t-1}, or L_0 where t = 0."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_likelihood = {
            "discretized": discretized_gaussian_log_likelihood,
            "gaussian": gaussian_log_likelihood,
        }[self.likelihood]
        nll = -log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        bits = th.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> Terms:
        """Losses of each sample at its time: dict of `loss` (N,) and, for MSE, `mse` and, if learned, `vb`.

        With `min_snr_gamma`, `mse` is the weighted one, and so its part of `loss`; `vb` has no weight.

        Args:
            x_start: (N, C, ...); t: (N,) int; noise: as x_start, drawn if None.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            # The bound teaches the variance only: the mean learns from the simple loss.
            prediction, v = output.chunk(2, dim=1)
            frozen = th.cat([prediction.detach(), v], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
            output = prediction
        target = {
            ModelMeanType.EPSILON: lambda: noise,
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.PREVIOUS_X: lambda: self.q_posterior_mean_variance(x_start, x_t, t)[0],
            ModelMeanType.V: lambda: self._v(x_start, t, noise),
        }[self.model_mean_type]()
        assert output.shape == target.shape == x_start.shape
        terms["mse"] = mean_flat((target - output) ** 2)
        if self.min_snr_gamma:
            terms["mse"] = self._at("_mse_weights", t, t.shape) * terms["mse"]
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _v(self, x_start, t, noise):
        alpha, sigma = self._alpha_sigma(t, x_start.shape)
        return alpha * noise - sigma * x_start

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension (N,): what no training can change."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, dtype=th.long, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        noise_like: Unary | None = None,
    ) -> Terms:
        """The whole bound: `total_bpd`, `prior_bpd` (N,); `vb`, `xstart_mse`, `mse` (N, T), columns from T - 1 to 0."""
        vb, xstart_mse, mse = [], [], []
        for i in range(self.num_timesteps)[::-1]:
            t = th.full((x_start.shape[0],), i, dtype=th.long, device=x_start.device)
            noise = (noise_like or th.randn_like)(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with th.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))
        terms = {"vb": th.stack(vb, 1), "xstart_mse": th.stack(xstart_mse, 1), "mse": th.stack(mse, 1)}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(1) + prior, "prior_bpd": prior, **terms}


def mse_weights(alphas_cumprod: np.ndarray, gamma: float, model_mean_type: ModelMeanType) -> np.ndarray:
    """Min-SNR weights of the MSE by time, float64 (T,): of |x_0 error|^2 whatever is predicted, min(SNR, gamma).

    x_0: min(SNR, gamma);      noise: min(SNR, gamma) / SNR;      v: min(SNR, gamma) / (SNR + 1)

    At SNR = 0 they are 0, 1 and 0: the output at pure noise is then taught by the times beside it alone.

    Source: Hang et al. 2023 (Efficient diffusion training via Min-SNR weighting strategy), section 3.4.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return {
        ModelMeanType.START_X: np.minimum(snr, gamma),
        ModelMeanType.EPSILON: gamma / np.maximum(snr, gamma),
        ModelMeanType.V: np.minimum(snr, gamma) / (snr + 1),
    }[model_mean_type]


def _nonzero(t, x):
    """1 where t > 0 and 0 where it is the last step, shaped to broadcast over x."""
    return (t != 0).float().view(-1, *[1] * (x.ndim - 1))


def _last(steps):
    return collections.deque(steps, maxlen=1)[0]


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """Entry `timesteps` of a numpy table as float32, expanded to a shape (upstream's helper, kept for its callers)."""
    found = th.from_numpy(arr).float().to(timesteps.device)[timesteps]
    return found.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
