"""Plain convolutional VAEs: an image becomes a short vector and comes back.

Strided convolutions halve the image until a small map is left, a linear layer reads the moments of z off it, and
transposed convolutions mirror the way. A new model is one class and one line in `vae_tasks.MODELS`.
"""

import math

import torch.nn as nn

from ..config import UserError
from .base import VAEBase

MAP = 4  # side of the map between convolutions and linear layers of CelebaVAE


class ConvBlock(nn.Sequential):
    """Half the size: strided 4x4 convolution, norm, SiLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), norm(c_out), nn.SiLU())


class DeconvBlock(nn.Sequential):
    """Twice the size: transposed 4x4 convolution (each output has four inputs: no checkerboard), norm, SiLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(double(c_in, c_out), norm(c_out), nn.SiLU())


def double(c_in: int, c_out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)


def norm(channels: int) -> nn.GroupNorm:
    """Group norm: an image's latent must not depend on the batch it is in."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class CelebaVAE(VAEBase):
    """Colour images (N, in_channels, S, S) in [-1, 1] <-> z (N, latent_dim); squared error.

    Raises:
        UserError: `image_size` is not a power of two from 16 up.
    """

    image_range, recon = (-1.0, 1.0), "mse"

    def __init__(self, image_size: int = 64, latent_dim: int = 128, base_channels: int = 32, in_channels: int = 3):
        super().__init__()
        if image_size < 16 or image_size.bit_count() != 1:
            raise UserError(f"--image_size is {image_size}; CelebaVAE halves it down to 4: give 16, 32, 64, 128, ...")
        self.image_shape, self.latent_dim = (in_channels, image_size, image_size), latent_dim
        levels = int(math.log2(image_size // MAP))
        widths = [base_channels * min(2**level, 8) for level in range(levels)]  # 8: beyond it the weights outgrow use
        features = widths[-1] * MAP * MAP
        self.encoder = nn.Sequential(
            *map(ConvBlock, [in_channels, *widths], widths),
            nn.AdaptiveAvgPool2d(MAP),  # at image_size it is 4x4 already; other sizes encode, too
            nn.Flatten(),
            nn.Linear(features, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, features),
            nn.Unflatten(1, (widths[-1], MAP, MAP)),
            norm(widths[-1]),
            nn.SiLU(),
            *map(DeconvBlock, widths[:0:-1], widths[-2::-1]),
            double(widths[0], in_channels),
        )


class MnistVAE(VAEBase):
    """Grey images (N, 1, 28, 28) in [0, 1] <-> z (N, latent_dim); cross-entropy.

    Its logits go straight into the loss, see `VAEBase.loss`; `base_channels` is the width at 7x7.
    """

    image_range, recon = (0.0, 1.0), "bce"
    image_shape = (1, 28, 28)

    def __init__(self, latent_dim: int = 8, base_channels: int = 32):
        super().__init__()
        self.latent_dim, thin, wide, hidden = latent_dim, (base_channels + 1) // 2, base_channels, 4 * base_channels
        self.encoder = nn.Sequential(
            ConvBlock(1, thin),
            ConvBlock(thin, wide),
            nn.Flatten(),
            nn.Linear(wide * 7 * 7, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, wide * 7 * 7),
            nn.Unflatten(1, (wide, 7, 7)),
            norm(wide),
            nn.SiLU(),
            DeconvBlock(wide, thin),
            double(thin, 1),
        )
