"""The judge of autoencoders: numbers of a posterior that is known, and a verdict that names what is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th

from evaluations.autoencoder import examine
from guided_diffusion_vae.vae_wrapper import LatentScale


class Known(th.nn.Module):
    """Latents with channels of stated mean, standard deviation and noise; decodes to the image plus a stated error."""

    def __init__(self, channels, *, scale=1.0, error=0.0):
        super().__init__()
        self.anything = th.nn.Parameter(th.zeros(1))
        self.channels, self.latent_scale, self.scale_factor, self.error = channels, LatentScale(scale), scale, error

    def encode_moments(self, images):
        self.images = images
        shape = (len(images), 32, 32)
        generator = th.Generator().manual_seed(0)
        means = [c.mean + c.spread * th.randn(shape, generator=generator) for c in self.channels]
        return th.stack([*means, *(th.full(shape, c.noise) for c in self.channels)], dim=1)

    def decode_batch(self, z):
        return self.images + self.error * 2


def channel(mean=0.0, spread=1.0, noise=0.1):
    return SimpleNamespace(mean=mean, spread=spread, noise=noise)


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(50, 200, (20, 32, 32, 3)).astype(np.uint8)


def test_numbers_of_a_known_posterior(pixels):
    """std^2 = spread^2 + noise^2; KL in raw latents; PSNR of a constant error of 10 levels is 20 log10(25.5) dB."""
    vae = Known([channel(0.5, 2.0, 0.1), channel(0.0, 0.9, 0.3)], scale=0.5, error=10 / 255)
    labels = np.repeat([0, 1], 10)
    report, back = examine(vae, pixels, labels, ["user_03", "user_07"])
    assert np.abs(back.astype(int) - pixels - 10).max() == 0
    np.testing.assert_allclose(report.psnr, 20 * np.log10(25.5), rtol=1e-6)
    for found, mean, spread, noise in ((report.channels[0], 0.5, 2.0, 0.1), (report.channels[1], 0.0, 0.9, 0.3)):
        assert found.mean == pytest.approx(mean, abs=0.05) and found.noise == pytest.approx(noise, rel=1e-5)
        assert found.std == pytest.approx(np.hypot(spread, noise), rel=0.02)
        kl = 0.5 * ((mean**2 + spread**2 + noise**2) / 0.25 - 1 - np.log(noise**2 / 0.25))
        assert found.kl == pytest.approx(kl, rel=0.03)
    assert report.std == pytest.approx(np.sqrt((2**2 + 0.1**2 + 0.9**2 + 0.3**2) / 2), rel=0.02)
    assert report.fitting_scale == pytest.approx(0.5 / report.std)
    assert report.per_user()["user_07"][2] == 10
    assert "user_07" in report.table() and report.numbers()["channels"][0]["std"] == pytest.approx(2.0, abs=0.05)


def test_the_worst_come_first(pixels):
    vae = Known([channel()])
    vae.decode_batch = lambda z: vae.images + th.arange(len(z)).view(-1, 1, 1, 1) / 100
    report, _ = examine(vae, pixels)
    assert report.worst(3).tolist() == [19, 18, 17] and report.per_user() == {}


@pytest.mark.parametrize(
    "channels, error, words",
    [
        ([channel()] * 2, 0.01, ["can be trained on it; images come back"]),
        ([channel(spread=4.0)], 0.01, ["--scale_factor 0.2", "once this is seen to"]),
        ([channel(), channel(spread=0.0, noise=1.0)], 0.01, ["Channel 1 is dead", "--kl_weight"]),
        ([channel(noise=0.9)], 0.01, ["mostly noise"]),
        ([channel(spread=0.0, noise=1.0)], 0.01, ["Do not train a diffusion model on it"]),
        ([channel()], 0.15, ["PSNR is 16.5 dB"]),
        ([channel()], 0.3, ["Do not train"]),
    ],
)
def test_the_verdict_names_what_is_wrong(pixels, channels, error, words):
    report, _ = examine(Known(channels, error=error), np.full_like(pixels, 100))
    verdict = " ".join(report.verdict())
    assert all(word in verdict for word in words), verdict
