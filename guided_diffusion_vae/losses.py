"""Likelihoods and divergences of Gaussians, in nats."""

import math

import numpy as np
import torch as th


def normal_kl(
    mean1: th.Tensor | float, logvar1: th.Tensor | float, mean2: th.Tensor | float, logvar2: th.Tensor | float
) -> th.Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), element by element, in nats.

        1/2 (-1 + l2 - l1 + e^(l1 - l2) + (m1 - m2)^2 e^(-l2))

    Arguments broadcast; any may be a number, but one must be a tensor.
    """
    tensor = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, th.Tensor)), None)
    assert tensor is not None, "at least one argument must be a tensor"
    logvar1, logvar2 = (v if isinstance(v, th.Tensor) else th.tensor(v).to(tensor) for v in (logvar1, logvar2))
    return 0.5 * (-1.0 + logvar2 - logvar1 + th.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """The tanh approximation of the normal distribution function (Page 1977)."""
    return 0.5 * (1.0 + th.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * th.pow(x, 3))))


def discretized_gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor) -> th.Tensor:
    """Log-probability of 8-bit data under a Gaussian: the mass of each value's bin, in nats.

    Args:
        x: data in [-1, 1] that came from 256 levels; the first and last bin reach to infinity.
        means, log_scales: of the Gaussian, shaped as x.
    Source: Ho et al. 2020, equation 13.
    """
    centered, inv_std = x - means, th.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_min = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    inside = th.where(x > 0.999, 1.0 - cdf_min, cdf_plus - cdf_min)
    return th.log(th.where(x < -0.999, cdf_plus, inside).clamp(min=1e-12))


def gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor | float, log_scales: th.Tensor) -> th.Tensor:
    """Log-density of continuous data, such as latents, under a Gaussian, in nats."""
    return -0.5 * ((x - means) * th.exp(-log_scales)) ** 2 - log_scales - 0.5 * math.log(2 * math.pi)
