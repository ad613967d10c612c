"""The bound of a plain VAE: its two terms, its ends and its draws, against formulas written out in float64."""

import math

import numpy as np
import pytest
import torch as th
import torch.nn as nn
from torch.distributions import Independent, Normal, kl_divergence

from guided_diffusion_vae.autoencoders.base import VAEBase


class Linear(VAEBase):
    """A VAE that is linear at both ends, so that everything can be worked out by hand."""

    image_shape, latent_dim = (1, 2, 3), 2

    def __init__(self, image_range=(0.0, 1.0), recon="bce"):
        super().__init__()
        self.image_range, self.recon = image_range, recon
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Unflatten(1, (1, 2, 3)))


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def posterior(rng, n=5, d=2):
    return th.from_numpy(rng.normal(size=(n, d))), th.from_numpy(rng.normal(size=(n, d)))


def test_kl_is_that_of_two_gaussians(rng):
    mu, logvar = posterior(rng)
    x = th.zeros(5, 1, 2, 3)
    kl = Linear((-1.0, 1.0), "mse").compute_loss(x, x, mu, logvar).kl
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    p = Independent(Normal(th.zeros_like(mu), th.ones_like(mu)), 1)
    assert float(kl) == pytest.approx(float(kl_divergence(q, p).mean()), rel=1e-6)
    assert float(Linear().compute_loss(x, x + 0.5, 0 * mu, 0 * logvar).kl) == 0


def test_cross_entropy_is_summed_over_pixels_and_averaged_over_the_batch(rng):
    x, p = rng.uniform(size=(2, 5, 1, 2, 3))
    expected = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum() / 5
    got = Linear().compute_loss(th.from_numpy(x), th.from_numpy(p), *posterior(rng)).recon
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_squared_error_is_summed_over_pixels_and_averaged_over_the_batch(rng):
    x, y = rng.uniform(-1, 1, size=(2, 5, 1, 2, 3))
    model = Linear((-1.0, 1.0), "mse")
    got = model.compute_loss(th.from_numpy(x), th.from_numpy(y), *posterior(rng)).recon
    assert float(got) == pytest.approx(((x - y) ** 2).sum() / 5, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_beta_stands_before_the_kl_alone(rng, beta):
    x = th.from_numpy(rng.uniform(size=(5, 1, 2, 3)))
    plain, weighted = (Linear().compute_loss(x, x, *posterior(np.random.default_rng(1)), beta=b) for b in (1.0, beta))
    assert (weighted.recon, weighted.kl) == (plain.recon, plain.kl)
    assert float(weighted.loss) == pytest.approx(float(plain.recon + beta * plain.kl), rel=1e-12)


@pytest.mark.parametrize("settings", [((0.0, 1.0), "bce"), ((-1.0, 1.0), "bce"), ((-1.0, 1.0), "mse")])
def test_both_ways_to_the_loss_agree(rng, settings):
    """`loss` from logits, `compute_loss` from the image that `forward` gives."""
    model, noise = Linear(*settings), th.randn(5, 2)
    x = model.from_images(th.from_numpy(rng.uniform(-1, 1, size=(5, 1, 2, 3))).float())
    for one, other in zip(model.loss(x, beta=2, noise=noise), model.compute_loss(x, *model(x, noise), 2), strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_the_loss_is_the_likelihood_less_the_gap_to_the_true_posterior():
    """-loss = log p(x) - KL(q || p(z | x)), one latent and one Bernoulli pixel, all by quadrature over z."""
    mu, logvar = th.tensor([[-0.5]], dtype=th.float64), th.tensor([[-0.4]], dtype=th.float64)
    z, step = th.linspace(-10, 10, 4001, dtype=th.float64)[:, None], 20 / 4000
    p_x = th.sigmoid(1.5 * z - 0.5)  # p(x = 1 | z)
    log_joint = Normal(0.0, 1.0).log_prob(z) + p_x.log()
    log_evidence = float(log_joint.exp().sum().log() + math.log(step))
    q = Normal(mu, (logvar / 2).exp())
    gap = float((q.log_prob(z).exp() * (q.log_prob(z) - log_joint + log_evidence)).sum() * step)

    white = th.ones(1, 1, 1, 1, dtype=th.float64)
    loss = sum(
        float(weight * step * Linear().compute_loss(white, p.view(1, 1, 1, 1), mu, logvar).loss)
        for weight, p in zip(q.log_prob(z).exp(), p_x, strict=True)
        if weight > 1e-12
    )
    assert gap > 0.01
    assert -loss == pytest.approx(log_evidence - gap, abs=1e-6)


def test_black_and_white_pixels_stay_finite_and_go_on_learning():
    """Logits of 200 against the wrong colour: 200 nats a pixel and a gradient of one, where a sigmoid has none left."""
    model, x = Linear(), th.tensor([0.0, 1.0] * 3).view(1, 1, 2, 3)
    nn.init.zeros_(model.decoder[0].weight)
    model.decoder[0].bias.data = th.tensor([200.0, -200.0] * 3)
    loss = model.loss(x, noise=th.zeros(1, 2))
    loss.recon.backward()
    assert loss.recon.item() == pytest.approx(1200)
    assert th.allclose(model.decoder[0].bias.grad, th.tensor([1.0, -1.0] * 3))
    image = model.decode(th.zeros(1, 2)).detach().requires_grad_()
    from_image = model.compute_loss(x, image, th.zeros(1, 2), th.zeros(1, 2)).loss
    from_image.backward()
    assert from_image.isfinite() and image.grad.isfinite().all()


def test_variance_neither_vanishes_nor_overflows():
    model = Linear()
    nn.init.zeros_(model.encoder[1].weight)
    model.encoder[1].bias.data = th.tensor([0.0, 0.0, 1e4, -1e4])
    mu, logvar = model.encode(th.zeros(1, 1, 2, 3))
    assert logvar.tolist() == [[20.0, -30.0]]
    assert model.compute_loss(th.zeros(1, 1, 2, 3), th.full((1, 1, 2, 3), 0.5), mu, logvar).loss.isfinite()


def test_reparameterize_has_the_stated_mean_and_variance():
    mu, logvar = th.tensor([[1.5, -2.0]]), th.tensor([[math.log(0.25), math.log(4.0)]])
    noise = th.randn(200_000, 2, generator=th.Generator().manual_seed(0))
    z = Linear().reparameterize(mu.expand(200_000, 2), logvar.expand(200_000, 2), noise)
    assert th.allclose(z.mean(0), mu[0], atol=0.02)
    assert th.allclose(z.var(0), logvar[0].exp(), rtol=0.01)


@pytest.mark.parametrize("image_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_images_of_the_house_cross_the_bridge_and_come_back(image_range):
    model, images = Linear(image_range), th.linspace(-1, 1, 256)
    x = model.from_images(images)
    assert (float(x[0]), float(x[-1])) == image_range
    assert th.allclose(model.to_images(x), images, atol=1e-7)


def test_minus_one_to_one_is_a_tanh():
    model, z = Linear((-1.0, 1.0)), th.randn(9, 2)
    assert th.allclose(model.decode(z), th.tanh(model.decoder(z) / 2), atol=1e-6)


def test_samples_follow_the_generator_and_reconstructions_draw_nothing():
    model = Linear()
    one, same, other = (model.sample(4, generator=th.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert th.equal(one, same) and not th.equal(one, other)
    z = th.randn(4, 2, generator=th.Generator().manual_seed(1))
    assert th.equal(one, model.decode(z))
    x = th.rand(3, 1, 2, 3)
    assert th.equal(model.reconstruct(x), model.decode(model.encode(x)[0]))
    assert not model.reconstruct(x).requires_grad
