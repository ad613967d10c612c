"""What autoencoders have in common: a diagonal Gaussian over latents, and the bound that a plain VAE maximises.

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I)),      q(z | x) = N(mu, e^logvar)

(Kingma and Welling 2014). `VAEBase` minimises the negative bound, with beta before the KL (Higgins et al. 2017).
"""

from typing import NamedTuple

import torch as th
import torch.nn as nn
import torch.nn.functional as F

LOGVAR_RANGE = (-30.0, 20.0)  # beyond this a variance is 0 or infinite in float32


class Posterior:
    """q(z | x) = N(mean, e^logvar), element by element.

    Args:
        moments: (N, 2C, ...): mean, then log-variance, which is clamped to [-30, 20].
    """

    def __init__(self, moments: th.Tensor):
        half = moments.dtype in (th.float16, th.bfloat16)  # under autocast; a sum over a latent needs more digits
        self.mean, logvar = (moments.float() if half else moments).chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> th.Tensor:
        return th.exp(0.5 * self.logvar)

    def sample(self, noise: th.Tensor | None = None) -> th.Tensor:
        """mean + std noise; the noise is drawn if not given."""
        return self.mean + self.std * (th.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> th.Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> th.Tensor:
        """KL(q || N(0, I)) in nats, summed over all but the first dimension: (N,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class VAELoss(NamedTuple):
    """loss = recon + beta kl: scalars, each the mean over a batch of a sum over pixels or latent dimensions."""

    loss: th.Tensor
    recon: th.Tensor
    kl: th.Tensor


class VAEBase(nn.Module):
    """A VAE whose latent is a vector. A subclass states the four settings below and builds `encoder` and `decoder`.

    Everywhere in this class x is in `image_range`: sigmoid(a) of the decoder's output a, spread over that range. So
    (0, 1) is a sigmoid output and (-1, 1) is a tanh, 2 sigmoid(a) - 1 = tanh(a / 2). The rest of the house holds
    images in [-1, 1]; `from_images` and `to_images` are the only bridge.

    Where something is drawn, the noise (N, latent_dim) or a generator may come from outside.
    """

    image_range = (-1.0, 1.0)
    # log p(x | z): "mse", a Gaussian of variance 1/2 (up to a constant), or "bce", a Bernoulli of x as a share of range
    recon = "mse"
    image_shape: tuple[int, int, int]  # (C, H, W)
    latent_dim: int
    encoder: nn.Module  # x (N, C, H, W) -> moments (N, 2 latent_dim)
    decoder: nn.Module  # z (N, latent_dim) -> logits (N, C, H, W)

    def encode(self, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """mu and logvar of q(z | x), (N, latent_dim) each; logvar clamped as `Posterior` does."""
        posterior = Posterior(self.encoder(x))
        return posterior.mean, posterior.logvar

    def reparameterize(self, mu: th.Tensor, logvar: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """z = mu + e^(logvar / 2) noise; the noise is drawn if not given."""
        return _posterior(mu, logvar).sample(noise)

    def decode_logits(self, z: th.Tensor) -> th.Tensor:
        """The pixels of z before the sigmoid, in float32: what a stable cross-entropy is computed from."""
        return self.decoder(z).float()

    def decode(self, z: th.Tensor) -> th.Tensor:
        """The image of z, in `image_range`."""
        return self._from_share(th.sigmoid(self.decode_logits(z)))

    def forward(self, x: th.Tensor, noise: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """(reconstruction of a draw of z, mu, logvar)."""
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar, noise)), mu, logvar

    def compute_loss(
        self, x: th.Tensor, recon: th.Tensor, mu: th.Tensor, logvar: th.Tensor, beta: float = 1.0
    ) -> VAELoss:
        """The loss of what `forward` returned.

        An image knows less than its logits: under "bce" a pixel within 1e-6 of black or white learns no more. Training
        goes through `loss`, which has the logits.
        """
        logits = th.logit(self._share(recon), eps=1e-6) if self.recon == "bce" else None
        return self._total(self._pixel_error(x, recon, logits), mu, logvar, beta)

    def loss(self, x: th.Tensor, *, beta: float = 1.0, noise: th.Tensor | None = None) -> VAELoss:
        """The loss of a batch from one draw of z; at beta = 1 the negative evidence lower bound, in nats for "bce"."""
        mu, logvar = self.encode(x)
        logits = self.decode_logits(self.reparameterize(mu, logvar, noise))
        return self._total(self._pixel_error(x, self._from_share(th.sigmoid(logits)), logits), mu, logvar, beta)

    @th.no_grad()
    def sample(self, n: int, *, generator: th.Generator | None = None) -> th.Tensor:
        """n new images: z ~ N(0, I), drawn where the generator lives (a CPU seed means the same anywhere), decoded."""
        weight = next(self.parameters())
        place = generator.device if generator else weight.device
        z = th.randn(n, self.latent_dim, generator=generator, device=place)
        return self.decode(z.to(weight))

    @th.no_grad()
    def reconstruct(self, x: th.Tensor) -> th.Tensor:
        """x through the mean of its posterior: no noise."""
        return self.decode(self.encode(x)[0])

    def from_images(self, images: th.Tensor) -> th.Tensor:
        """The house's images in [-1, 1] as x in `image_range`."""
        return self._from_share((images + 1) / 2)

    def to_images(self, x: th.Tensor) -> th.Tensor:
        """x in `image_range` as the house's images in [-1, 1]."""
        return 2 * self._share(x) - 1

    def _share(self, x):
        low, high = self.image_range
        return (x - low) / (high - low)

    def _from_share(self, share):
        low, high = self.image_range
        return low + (high - low) * share

    def _pixel_error(self, x, recon, logits):
        if self.recon == "bce":
            return F.binary_cross_entropy_with_logits(logits, self._share(x), reduction="none")
        return (recon - x) ** 2

    @staticmethod
    def _total(pixel_error, mu, logvar, beta) -> VAELoss:
        recon = pixel_error.flatten(1).sum(1).mean()
        kl = _posterior(mu, logvar).kl().mean()
        return VAELoss(recon + beta * kl, recon, kl)


def _posterior(mu: th.Tensor, logvar: th.Tensor) -> Posterior:
    return Posterior(th.cat([mu, logvar], dim=1))
