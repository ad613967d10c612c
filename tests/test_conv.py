"""The convolutional VAEs: their ranges, sizes and gradients, and that they learn."""

import math

import pytest
import torch as th

from guided_diffusion_vae.autoencoders.conv import CelebaVAE, ConvBlock, DeconvBlock, MnistVAE
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.vae_tasks import MODELS


def small(name):
    th.manual_seed(0)
    return {"celeba": lambda: CelebaVAE(32, latent_dim=6, base_channels=8), "mnist": lambda: MnistVAE(4, 8)}[name]()


def images(model, n=4):
    return model.from_images(2 * th.rand(n, *model.image_shape, generator=th.Generator().manual_seed(1)) - 1)


def test_blocks_halve_and_double():
    x = th.randn(2, 3, 14, 14)
    assert ConvBlock(3, 8)(x).shape == (2, 8, 7, 7)
    assert DeconvBlock(3, 8)(x).shape == (2, 8, 28, 28)


@pytest.mark.parametrize("name", MODELS)
def test_every_output_pixel_of_a_deconvolution_has_as_many_inputs(name):
    """No checkerboard: with all weights 1, a constant map stays constant away from the border."""
    deconv = [m for m in small(name).decoder.modules() if isinstance(m, th.nn.ConvTranspose2d)][-1]
    th.nn.init.ones_(deconv.weight)
    th.nn.init.zeros_(deconv.bias)
    out = deconv(th.ones(1, deconv.in_channels, 8, 8))[0, 0, 1:-1, 1:-1]
    assert th.allclose(out, th.full_like(out, 4.0 * deconv.in_channels))


@pytest.mark.parametrize("name", MODELS)
def test_images_stay_in_range(name):
    """Logits far out reach both ends of the range and never leave it; (-1, 1) is a tanh, (0, 1) a sigmoid."""
    model = small(name)
    low, high = model.image_range
    assert (low, high) == {"celeba": (-1, 1), "mnist": (0, 1)}[name]
    model.decoder[-1].weight.data *= 1000
    x = model.sample(8, generator=th.Generator().manual_seed(0))
    assert x.shape == (8, *model.image_shape)
    assert (float(x.min()), float(x.max())) == (low, high)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_reaches_every_parameter(name):
    model = small(name)
    model.loss(images(model), noise=th.randn(4, model.latent_dim)).loss.backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_see_its_batch(name):
    model = small(name)
    x = images(model)
    together, alone = model.encode(x)[0][:1], model.encode(x[:1])[0]
    assert th.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_celeba_at_any_power_of_two(size):
    model = CelebaVAE(size, latent_dim=5, base_channels=4, in_channels=1)
    recon, mu, logvar = model(th.zeros(2, 1, size, size))
    assert recon.shape == (2, 1, size, size) and mu.shape == logvar.shape == (2, 5)


def test_celeba_encodes_other_sizes_by_pooling():
    """An image whose features are constant has the same moments at any size that the pool can average."""
    model = small("celeba")
    for block in list(model.encoder)[:3]:
        block[0].padding_mode = "replicate"  # so that a constant image has constant features
    one, other = (model.encode(th.full((1, 3, size, size), 0.3))[0] for size in (32, 96))
    assert th.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("size", [0, 8, 24, 100])
def test_other_sizes_are_refused_in_one_line(size):
    with pytest.raises(UserError, match=f"--image_size is {size}") as error:
        CelebaVAE(size)
    assert "\n" not in str(error.value)


def strokes(n):
    """Digits in all but name: a bright bar across each image at an angle and a distance from the middle of its own."""
    g = th.Generator().manual_seed(2)
    angle, offset = math.pi * th.rand(n, 1, 1, 1, generator=g), 8 * th.rand(n, 1, 1, 1, generator=g) - 4
    y, x = th.meshgrid(th.arange(28.0) - 13.5, th.arange(28.0) - 13.5, indexing="ij")
    across, along = (x * angle.cos() + y * angle.sin() - offset), (y * angle.cos() - x * angle.sin())
    return ((across.abs() < 1.5) & (along.abs() < 9)).float()


def test_mnist_vae_learns_a_handful_of_digits():
    """From near 784 log 2 = 543 nats down tenfold, and below half of what the best constant image costs (119 nats)."""
    th.manual_seed(0)
    model, x = MnistVAE(latent_dim=8, base_channels=8), strokes(12)
    optimizer = th.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = model.loss(x, noise=th.randn(12, 8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mean = x.mean(0).clamp(1e-6, 1 - 1e-6)
    constant = -(x * mean.log() + (1 - x) * (1 - mean).log()).sum().item() / 12
    assert losses[0] == pytest.approx(784 * math.log(2), rel=0.1)
    assert losses[-1] < min(losses[0] / 10, constant / 2)
    assert ((model.reconstruct(x) > 0.5) == (x > 0.5)).float().mean() > 0.99
