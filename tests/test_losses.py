"""Divergences and likelihoods against the official code's numbers and known answers."""

import math

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae import losses


def test_helpers_are_upstreams():
    data = golden("adm_helpers.npz")
    m1, v1, m2, v2, x = (th.from_numpy(data[key]) for key in ("m1", "v1", "m2", "v2", "dgl_x"))
    np.testing.assert_allclose(losses.normal_kl(m1, v1, m2, v2), data["normal_kl"], rtol=1e-6, atol=1e-6)
    got = losses.discretized_gaussian_log_likelihood(x, means=m2, log_scales=0.3 * v2)
    np.testing.assert_allclose(got, data["dgl"], rtol=1e-6, atol=1e-6)


def test_the_second_set_of_numbers():
    """The inputs were found from the outputs: the file does not state them."""
    facts = golden("adm_golden.json")
    gap, logvar1, logvar2 = th.tensor([0.2, 0.4]), th.tensor([-1.0, 0.5]), th.tensor([0.2, 0.1])
    np.testing.assert_allclose(losses.normal_kl(gap, logvar1, 0.0, logvar2), facts["normal_kl"], atol=2e-7)
    x = th.tensor([-1.0, -0.999, -0.5, 0.0, 0.5, 0.9991, 1.0])
    got = losses.discretized_gaussian_log_likelihood(x, means=0.9 * x, log_scales=th.full_like(x, -3.0))
    np.testing.assert_allclose(got, facts["disc_gauss_ll"], rtol=1e-6)


def test_kl_of_a_gaussian_with_itself_is_zero_and_is_known_otherwise():
    zero = th.zeros(3)
    assert th.equal(losses.normal_kl(zero, zero, zero, zero), zero)
    assert losses.normal_kl(th.tensor(1.0), 0.0, 0.0, 0.0) == 0.5
    assert losses.normal_kl(0.0, math.log(4.0), th.tensor(0.0), 0.0).item() == pytest.approx(1.5 - math.log(2))
    with pytest.raises(AssertionError):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_kl_is_torchs():
    th.manual_seed(0)
    p, q = (th.distributions.Normal(th.randn(50), th.rand(50) + 0.1) for _ in range(2))
    got = losses.normal_kl(p.mean, p.variance.log(), q.mean, q.variance.log())
    np.testing.assert_allclose(got, th.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_the_approximate_cdf_is_near_the_true_one():
    x = th.linspace(-5, 5, 101)
    assert (losses.approx_standard_normal_cdf(x) - th.special.ndtr(x)).abs().max() < 4e-4


def test_bins_hold_all_the_mass():
    """The probabilities of the 256 levels sum to one."""
    levels = th.linspace(-1, 1, 256, dtype=th.float64)
    scale = th.full((256,), -1.5, dtype=th.float64)
    log_p = losses.discretized_gaussian_log_likelihood(levels, means=th.full_like(levels, 0.3), log_scales=scale)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_density_is_torchs():
    th.manual_seed(0)
    x, mean, log_scale = th.randn(3, 40)
    wanted = th.distributions.Normal(mean, log_scale.exp()).log_prob(x)
    got = losses.gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
