"""The one door between pixels and latents, and the sole owner of scale, shift and range.

Networks and processes see model latents z = (z_raw - shift) scale, of unit variance: the scale is applied in
`encode_batch` and `encode_moments`, undone in `decode_batch`, and nowhere else. Images inside are NCHW in [-1, 1].
"""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch as th
import torch.nn as nn

from . import checkpoint
from .autoencoders.base import Posterior
from .autoencoders.kl import KLAutoencoder, from_state_dict
from .config import UserError

SD_SCALE = 0.18215  # 1 / standard deviation of Stable Diffusion's latents (Rombach et al. 2022, appendix G)
SHIPPED = ("microdoppler-f4",)
PIXEL = "pixel"


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder."""

    # microdoppler-f4 (shipped), a diffusers folder or hub name, a .safetensors, .pt or .ckpt file, or pixel for none
    vae_path: str = "microdoppler-f4"
    sample_posterior: bool = True  # train on samples of the posterior; False: on its mean
    scale_factor: float = 0.0  # raw latents times this are model latents; 0 = the autoencoder's own
    allow_download: bool = False  # let a hub name be fetched from the network


@dataclass(frozen=True)
class LatentScale:
    """The affine map between raw latents and the unit-variance ones that we train on."""

    scale: float = 1.0
    shift: float = 0.0

    def to_model(self, z_raw):
        return (z_raw - self.shift) * self.scale

    def to_raw(self, z):
        return z / self.scale + self.shift


class VAEInterface(nn.Module):
    """A frozen autoencoder behind one contract, whoever made it.

    Args:
        vae_path: `microdoppler-f4`; a diffusers folder (or one with a `vae` subfolder) or hub name; a single file in
            LDM's, VA-VAE's or diffusers' layout; `pixel` for the identity.
        scale_factor: overrides the autoencoder's own: its diffusers `scaling_factor`, the one measured and stored with
            it, or 0.18215.
        sample_posterior: `encode_batch` draws from the posterior; False: takes its mean.
        image_range: of the images given to `encode_batch`, (-1, 1) or (0, 1); what is decoded is always in [-1, 1].
        chunk_size: images encoded or decoded at a time.
    Raises:
        UserError: no such autoencoder, or a damaged file.
    """

    def __init__(
        self,
        vae_path: str = "microdoppler-f4",
        *,
        scale_factor: float | None = None,
        sample_posterior: bool = True,
        image_range: tuple[float, float] = (-1.0, 1.0),
        chunk_size: int = 16,
        allow_download: bool = False,
    ):
        super().__init__()
        self.vae_path, self.sample_posterior, self.chunk_size = vae_path, sample_posterior, chunk_size
        self.image_range = image_range
        self.is_pixel = vae_path == PIXEL
        self.vae, own_scale = (None, 1.0) if self.is_pixel else open_autoencoder(vae_path, allow_download)
        self.latent_scale = LatentScale(scale=float(scale_factor or own_scale))
        self.requires_grad_(False).eval()
        self.fingerprint = PIXEL if self.is_pixel else fingerprint(self.vae, self.latent_scale)

    @property
    def scale_factor(self) -> float:
        """Raw latents times this are model latents."""
        return self.latent_scale.scale

    @property
    def latent_channels(self) -> int:
        return 3 if self.is_pixel else self.vae.config.embed_dim

    @property
    def downsample(self) -> int:
        """Pixels a latent's side."""
        return 1 if self.is_pixel else self.vae.config.downsample

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a square image.

        Raises:
            UserError: the autoencoder cannot halve this size.
        """
        f = self.downsample
        if image_size < f or image_size % f:
            near = max(f, round(image_size / f) * f)
            raise UserError(
                f"--image_size is {image_size}, which the autoencoder {self.vae_path} cannot divide by {f}: give {near}"
            )
        return self.latent_channels, image_size // f, image_size // f

    def encode_batch(self, images: th.Tensor, generator: th.Generator | None = None) -> th.Tensor:
        """Images (N, 3, H, W) to model latents (N, C, h, w) of about unit variance.

        Args:
            generator: of the posterior's noise; None is the global one.
        """
        mean, std = self.encode_moments(images).chunk(2, dim=1)
        if self.is_pixel or not self.sample_posterior:
            return mean
        noise = th.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + std * noise

    @th.no_grad()
    def encode_moments(self, images: th.Tensor) -> th.Tensor:
        """Mean and standard deviation of the posterior, both as model latents: (N, 2C, h, w)."""
        low, high = self.image_range
        images = (images - low) * (2 / (high - low)) - 1 if (low, high) != (-1.0, 1.0) else images
        if self.is_pixel:
            return th.cat([images, th.zeros_like(images)], dim=1)
        parts = []
        for part in images.split(self.chunk_size):
            posterior = self._posterior(part)
            parts.append(th.cat([self.latent_scale.to_model(posterior.mean), posterior.std * self.scale_factor], dim=1))
        return th.cat(parts)

    @th.no_grad()
    def decode_batch(self, z: th.Tensor) -> th.Tensor:
        """Model latents (N, C, h, w) to images (N, 3, H, W), in [-1, 1] but for overshoot."""
        if self.is_pixel:
            return z
        return th.cat([self.vae.decode(self.latent_scale.to_raw(part)) for part in z.split(self.chunk_size)])

    def _posterior(self, images: th.Tensor) -> Posterior:
        return self.vae.encode(images)


def load_vae(config: VAEConfig, *, expected: str | None = None) -> VAEInterface:
    """The autoencoder that the flags name.

    Args:
        expected: the fingerprint that a checkpoint was trained with.
    Raises:
        UserError: see `VAEInterface`; or another autoencoder than expected.
    """
    vae = VAEInterface(
        config.vae_path,
        scale_factor=config.scale_factor or None,
        sample_posterior=config.sample_posterior,
        allow_download=config.allow_download,
    )
    if expected and vae.fingerprint != expected:
        raise UserError(
            f"--vae_path {config.vae_path} is autoencoder {vae.fingerprint}, but the checkpoint was trained on latents"
            f" of {expected}: give the autoencoder it was trained with"
        )
    return vae


def open_autoencoder(vae_path: str, allow_download: bool = False) -> tuple[KLAutoencoder, float]:
    """The autoencoder at a path or of a name, and its own scale factor."""
    if vae_path in SHIPPED:
        with resources.as_file(resources.files(__package__) / "assets" / f"{vae_path}.safetensors") as path:
            return from_file(path)
    path = Path(vae_path)
    if path.is_file():
        return from_file(path)
    if path.is_dir():
        return from_diffusers(path / "vae" if (path / "vae" / "config.json").is_file() else path)
    if vae_path.count("/") == 1 and not vae_path.startswith((".", "/")) and not path.suffix:
        return from_diffusers(vae_path, allow_download=allow_download)
    raise UserError(
        f"--vae_path {vae_path} does not exist; give {', '.join(SHIPPED)}, a diffusers folder or hub name,"
        " a .safetensors, .pt or .ckpt file, or pixel"
    )


def from_file(path: Path) -> tuple[KLAutoencoder, float]:
    """Read a single file in any layout; our own also tells its scale and what shapes do not show."""
    metadata = {}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:
                metadata = handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"--vae_path {path} is damaged or not a safetensors file ({error})") from error
    config = json.loads(metadata.get("config", "{}"))
    try:
        model = from_state_dict(checkpoint.load_state_dict(path), norm_groups=config.get("norm_groups", 32))
    except UserError as error:
        raise UserError(f"--vae_path {path}: {error}") from error
    return model, float(metadata.get("scale_factor", SD_SCALE))


def from_diffusers(path, allow_download: bool = False) -> tuple[KLAutoencoder, float]:
    """Read diffusers' AutoencoderKL from a folder or, if allowed, from the hub."""
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    logging.set_verbosity_error()
    offline = isinstance(path, Path) or not allow_download
    options = {"subfolder": "vae"} if not isinstance(path, Path) and "vae" not in str(path) else {}
    try:
        model = AutoencoderKL.from_pretrained(path, local_files_only=offline, **options)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "" if not offline or isinstance(path, Path) else "; --allow_download True fetches a hub name"
        raise UserError(f"--vae_path {path} is not a diffusers autoencoder at hand{remedy}") from error
    config = model.config
    converted = from_state_dict(model.state_dict(), norm_groups=config.norm_num_groups)
    return converted, float(config.scaling_factor)


def fingerprint(model: nn.Module, scale: LatentScale) -> str:
    """16 hexadecimal digits that change with any weight or with the scale."""
    digest = hashlib.sha256(repr(scale).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def warn_unless_unit_variance(z: th.Tensor, say) -> None:
    """Say so if model latents are far from unit variance: the scale factor does not fit these data."""
    std = z.float().std().item()
    if not 0.5 < std < 2.0:
        say(
            f"warning: the latents' standard deviation is {std:.3g}, not about 1: --scale_factor does not fit these"
            f" images (try {1 / std:.4g} times the present one)"
        )
