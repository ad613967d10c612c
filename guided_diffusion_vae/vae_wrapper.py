"""The one door between pixels and latents, and the sole owner of scale, shift and range.

Networks and processes see model latents z = (z_raw - shift) scale, of unit variance: the scale is applied in
`encode_batch` and `encode_moments`, undone in `decode_batch`, and nowhere else. Images inside are NCHW in [-1, 1].
Scale and shift are one number each, or one a channel: s / std and mean of the extracted latents (`--latent_norm True`).
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch as th
import torch.nn as nn

from . import checkpoint
from .autoencoders.kl import KLAutoencoder
from .autoencoders.layouts import from_state_dict
from .config import UserError

SD_SCALE = 0.18215  # 1 / standard deviation of Stable Diffusion's latents (Rombach et al. 2022, appendix G)
SHIPPED = ("microdoppler-f4",)
PIXEL = "pixel"
ORIGIN = "origin."  # before the names of the weights that a tuned decoder had before
FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
STATS = "latents_stats.pt"  # mean and standard deviation of each channel of raw latents, under LightningDiT's name
CHUNK_PIXELS = 256 * 256  # larger images go in smaller chunks


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder."""

    # microdoppler-f4 (shipped), a diffusers folder or hub name, a .safetensors, .pt or .ckpt file, or pixel for none
    vae_path: str = "microdoppler-f4"
    sample_posterior: bool = True  # train on samples of the posterior; False: on its mean
    scale_factor: float = 0.0  # raw latents times this are model latents; 0 = the autoencoder's own
    allow_download: bool = False  # let a hub name be fetched from the network
    latent_norm: bool = False  # every latent channel to mean 0 and variance 1 by latents_stats.pt, instead of one scale

    def __post_init__(self):
        if not 0 <= self.scale_factor < math.inf:
            raise UserError(f"--scale_factor is {self.scale_factor}; give a positive number, or 0 for the stored one")


@dataclass(frozen=True)
class LatentScale:
    """The affine map between raw latents and the unit-variance ones that we train on: numbers, or one a channel."""

    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0

    def to_model(self, z_raw):
        return (z_raw - along_channels(self.shift, z_raw)) * along_channels(self.scale, z_raw)

    def to_raw(self, z):
        return z / along_channels(self.scale, z) + along_channels(self.shift, z)

    def of_std(self, std_raw):
        """A standard deviation is scaled, not shifted."""
        return std_raw * along_channels(self.scale, std_raw)

    def words(self) -> dict[str, str]:
        """The map as metadata of a file, to the last digit."""
        shift = {"shift": json.dumps(self.shift)} if self.shift != 0 else {}
        return {"scale_factor": json.dumps(self.scale), **shift}

    @classmethod
    def of_words(cls, metadata: dict[str, str]) -> "LatentScale":
        """What `words` wrote."""
        found = [json.loads(metadata.get(name, "0.0")) for name in ("scale_factor", "shift")]
        return cls(*(tuple(map(float, value)) if isinstance(value, list) else float(value) for value in found))


def along_channels(value, like: th.Tensor):
    """A number as it is; one for each channel as (C, 1, 1)."""
    return like.new_tensor(value)[:, None, None] if isinstance(value, tuple) else value


class VAEInterface(nn.Module):
    """A frozen autoencoder behind one contract, whoever made it.

    Args:
        vae_path: `microdoppler-f4`; a diffusers folder (or one with a `vae` subfolder) or hub name; a single file in
            LDM's, VA-VAE's or diffusers' layout; `pixel` for the identity.
        scale_factor: overrides the autoencoder's own, which is stored with it; 0.18215 for files shaped like Stable
            Diffusion's that say nothing.
        sample_posterior: `encode_batch` draws from the posterior; False: takes its mean.
        image_range: of the images given to `encode_batch`, (-1, 1) or (0, 1); what is decoded is always in [-1, 1].
        chunk_size: images encoded or decoded at a time; fewer when they are larger than 256 x 256.
        default_scale: for a file that does not tell its scale; None: that is an error.
    A grey autoencoder takes the mean of the colours, and what it decodes is repeated to three channels.
    Raises:
        UserError: no such autoencoder, or a damaged file.
    """

    vae: Any  # a KLAutoencoder; None with --vae_path pixel

    def __init__(
        self,
        vae_path: str = "microdoppler-f4",
        *,
        scale_factor: float | None = None,
        sample_posterior: bool = True,
        image_range: tuple[float, float] = (-1.0, 1.0),
        chunk_size: int = 16,
        allow_download: bool = False,
        default_scale: float | None = None,
    ):
        super().__init__()
        self.vae_path, self.sample_posterior, self.chunk_size = vae_path, sample_posterior, chunk_size
        self.image_range = image_range
        self.is_pixel = vae_path == PIXEL
        self.vae, own = (None, LatentScale()) if self.is_pixel else open_autoencoder(vae_path, allow_download)
        if scale_factor:
            own = LatentScale(float(scale_factor), own.shift if own else 0.0)
        if own is None and default_scale:
            own = LatentScale(default_scale)
        if own is None:
            raise UserError(
                f"--vae_path {vae_path} does not say how its latents are scaled: give --scale_factor,"
                " which is 1 / their standard deviation"
            )
        self.requires_grad_(False).eval()
        self.use_scale(own)

    def use_scale(self, scale: LatentScale) -> None:
        """Put another affine map between raw and model latents; the fingerprint follows."""
        self.latent_scale = scale
        self.fingerprint = PIXEL if self.is_pixel else fingerprint(self.vae, scale)

    @cached_property
    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight: what raw latents depend on."""
        return PIXEL if self.is_pixel else fingerprint(self.vae)

    @cached_property
    def decoder_fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight of the decoder in use, tuned or not."""
        return PIXEL if self.is_pixel else fingerprint(self.vae.decoder)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Whose latents, and which decoder, for the record of what was decoded."""
        return {"autoencoder": self.fingerprint, "decoder": self.decoder_fingerprint}

    @property
    def scale_factor(self) -> float | tuple[float, ...]:
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
        device = generator.device if generator else mean.device
        return mean + std * th.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)

    def encode_moments(self, images: th.Tensor) -> th.Tensor:
        """Mean and standard deviation of the posterior, both as model latents: (N, 2C, h, w)."""
        moments = self.encode_raw(images)
        if self.is_pixel:
            return moments
        mean, std = moments.chunk(2, dim=1)
        return th.cat([self.latent_scale.to_model(mean), self.latent_scale.of_std(std)], dim=1)

    @th.no_grad()
    def encode_raw(self, images: th.Tensor) -> th.Tensor:
        """Mean and standard deviation of the posterior as the autoencoder has them, without scale: (N, 2C, h, w).

        Raises:
            UserError: not (N, 3, H, W), or H or W is not a multiple of `downsample`.
        """
        f = self.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise UserError(
                f"images are {tuple(images.shape)}; the autoencoder {self.vae_path} takes (N, 3, H, W) with H and W"
                f" multiples of {f}: give an --image_size that is one"
            )
        low, high = self.image_range
        images = (images - low) * (2 / (high - low)) - 1 if (low, high) != (-1.0, 1.0) else images
        if self.is_pixel:
            return th.cat([images, th.zeros_like(images)], dim=1)
        images = images.mean(dim=1, keepdim=True) if self.vae.config.in_channels == 1 else images
        posteriors = [self.vae.encode(part) for part in self._chunks(images, images[0, 0].numel())]
        return th.cat([th.cat([posterior.mean, posterior.std], dim=1) for posterior in posteriors])

    @th.no_grad()
    def decode_batch(self, z: th.Tensor) -> th.Tensor:
        """Model latents (N, C, h, w) to images (N, 3, H, W), in [-1, 1] but for overshoot.

        Raises:
            UserError: latents of another autoencoder.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise UserError(
                f"latents are {tuple(z.shape)}, but --vae_path {self.vae_path} makes (N, {self.latent_channels}, h, w):"
                " give the autoencoder that made them"
            )
        if self.is_pixel:
            return z
        parts = self._chunks(z, z[0, 0].numel() * self.downsample**2)
        images = th.cat([self.vae.decode(self.latent_scale.to_raw(part)) for part in parts])
        return images.expand(-1, 3, -1, -1)

    def _chunks(self, batch: th.Tensor, pixels: int) -> tuple[th.Tensor, ...]:
        """The batch in parts that fit memory; `pixels` is what one image has."""
        return batch.split(max(1, min(self.chunk_size, self.chunk_size * CHUNK_PIXELS // pixels)))


def load_vae(
    config: VAEConfig,
    *,
    expected: str | None = None,
    default_scale: float | None = None,
    latent_stats: Path | None = None,
) -> VAEInterface:
    """The autoencoder that the flags name.

    Args:
        expected: the fingerprint that a checkpoint was trained with.
        default_scale: see `VAEInterface`.
        latent_stats: the file that `--latent_norm True` takes its numbers from, see `stats_file`.
    Raises:
        UserError: see `VAEInterface`; another autoencoder than expected; no statistics, or not of its latents.
    """
    vae = VAEInterface(
        config.vae_path,
        scale_factor=config.scale_factor or None,
        sample_posterior=config.sample_posterior,
        allow_download=config.allow_download,
        default_scale=1.0 if config.latent_norm else default_scale,
    )
    if config.latent_norm:
        vae.use_scale(scale_from_stats(latent_stats, vae, config.scale_factor or 1.0))
    if expected and vae.fingerprint != expected:
        raise UserError(
            f"--vae_path {config.vae_path} is autoencoder {vae.fingerprint}, but the checkpoint was trained on latents"
            f" of {expected}: give the autoencoder it was trained with"
        )
    return vae


def stats_file(data_dir) -> Path:
    """Where the statistics of extracted latents lie: in their folder, beside them if a single file is named."""
    place = Path(data_dir)
    return (place.parent if place.is_file() else place) / STATS


def scale_from_stats(path: Path | None, vae: VAEInterface, factor: float) -> LatentScale:
    """The map (z_raw - mean) factor / std of every channel, from LightningDiT's `latents_stats.pt`.

    Raises:
        UserError: no file; not such a file; other channels than the autoencoder's; a channel that never changes.
    """
    if vae.is_pixel:
        raise UserError("--latent_norm True needs latents, but --vae_path is pixel: leave --latent_norm out")
    if path is None or not Path(path).is_file():
        raise UserError(
            f"--latent_norm True needs {path or STATS}, which does not exist: extract the latents with"
            " scripts/latent_extract.py and give that folder as --data_dir"
        )
    stats = checkpoint.load(path)
    found: list[Any] = [stats.get(name) if isinstance(stats, dict) else None for name in ("mean", "std")]
    if not all(th.is_tensor(value) and value.isfinite().all() for value in found):
        raise UserError(f"--latent_norm True: {path} does not hold a finite mean and std of each channel")
    mean, std = (value.flatten().double().tolist() for value in found)
    if len(mean) != vae.latent_channels or len(std) != vae.latent_channels:
        raise UserError(
            f"--latent_norm True: {path} is of {len(mean)} channels, but --vae_path {vae.vae_path} makes"
            f" {vae.latent_channels}: give the autoencoder that the latents were extracted with"
        )
    if min(std) <= 0:
        raise UserError(f"--latent_norm True: channel {std.index(min(std))} of {path} never changes; leave it out")
    return LatentScale(tuple(factor / value for value in std), tuple(mean))


# ---- where autoencoders come from ------------------------------------------------------------------------------------


def open_autoencoder(vae_path: str, allow_download: bool = False) -> tuple[KLAutoencoder, LatentScale | None]:
    """The autoencoder at a path or of a name, and the scale that is stored with it.

    Raises:
        UserError: there is none, it is damaged, or its scale is not for its channels.
    """
    model, scale = _open(vae_path, allow_download)
    for part in (scale.scale, scale.shift) if scale else ():
        if isinstance(part, tuple) and len(part) != model.config.embed_dim:
            raise UserError(
                f"--vae_path {vae_path} tells the scale of {len(part)} channels, but makes {model.config.embed_dim}:"
                " its metadata were altered; copy it again"
            )
    if scale and 0 in (scale.scale if isinstance(scale.scale, tuple) else (scale.scale,)):
        raise UserError(f"--vae_path {vae_path} tells a scale of 0: its metadata were altered; copy it again")
    return model, scale


def _open(vae_path: str, allow_download: bool) -> tuple[KLAutoencoder, LatentScale | None]:
    if vae_path in SHIPPED:
        with resources.as_file(resources.files("guided_diffusion_vae") / "assets" / f"{vae_path}.safetensors") as path:
            return from_file(path)
    path = Path(vae_path)
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        beside = path.name.startswith("diffusion_pytorch_model") and (path.parent / "config.json").is_file()
        return from_folder(path.parent) if beside else from_file(path)
    if vae_path.count("/") == 1 and not vae_path.startswith(".") and path.suffix not in FILES:
        return from_hub(vae_path, allow_download)
    raise UserError(
        f"--vae_path {vae_path} does not exist; give {', '.join(SHIPPED)}, a diffusers folder or hub name,"
        " a .safetensors, .pt or .ckpt file, or pixel"
    )


def from_file(path: Path) -> tuple[KLAutoencoder, LatentScale | None]:
    """Read a single file in any layout; our own also tells its scale and what shapes do not show."""
    try:
        state_dict = checkpoint.load_state_dict(path)
        metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
        ours = "scale_factor" in metadata and "config" in metadata
        groups, scale = _told(path, metadata) if ours else (32, None)
        model = from_state_dict(state_dict, norm_groups=groups)
        model.origin = tuned_from(state_dict, model) if ours else None
    except UserError as error:
        raise UserError(f"--vae_path {str(error) if str(path) in str(error) else f'{path}: {error}'}") from error
    if ours:
        said = metadata.get("latent_space")
        if said and said != fingerprint(model, scale):
            raise UserError(
                f"--vae_path {path} says that it decodes latents of {said}, but its encoder's are of"
                f" {fingerprint(model, scale)}: it was altered; tune the decoder again with scripts/vae_train.py"
            )
        return model, scale
    like_sd = (model.config.embed_dim, model.config.downsample) == (4, 8)
    return model, LatentScale(SD_SCALE) if like_sd else None


def _told(path: Path, metadata: dict[str, str]) -> tuple[int, LatentScale]:
    """The groups of the norms and the scale that a file of ours tells."""
    try:
        groups, scale = json.loads(metadata["config"])["norm_groups"], LatentScale.of_words(metadata)
        numbers = [n for part in (scale.scale, scale.shift) for n in (part if isinstance(part, tuple) else (part,))]
        if not (isinstance(groups, int) and groups > 0 and all(map(math.isfinite, numbers))):
            raise ValueError(f"norm_groups {groups}, {scale}")
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} has damaged metadata ({one_line(error)}); copy it again") from error
    return groups, scale


def tuned_from(state_dict: dict[str, th.Tensor], model: KLAutoencoder) -> dict[str, th.Tensor] | None:
    """The weights that a file's decoder was tuned from; None if it is as it was trained with its encoder.

    With them the fingerprint of the latent space is computed anew from the file: no word in it is believed.
    """
    origin = {key.removeprefix(ORIGIN): v.float() for key, v in state_dict.items() if key.startswith(ORIGIN)}
    if origin and {k: v.shape for k, v in origin.items()} != {k: v.shape for k, v in model.decoding().items()}:
        raise UserError("the weights that its decoder was tuned from are not a decoder's: the file was altered")
    return origin or None


def save_autoencoder(
    model: KLAutoencoder, path, scale_factor: float | LatentScale, *, half: bool = False, about=None
) -> None:
    """Write a KL autoencoder as the single file that `--vae_path` takes, with its configuration and its scale.

    Of a tuned decoder (`model.origin`), the file also holds the decoder it was tuned from, and which latent space both
    decode; then the half of the weights that fingerprints the latent space keeps its bits.

    Args:
        scale_factor: a number is rounded to five digits, a `LatentScale` is kept as it is.
        half: in float16, half the size.
        about: plain values to keep with it, such as how it was trained.
    Raises:
        SaveError: see `checkpoint.atomic_write`.
    """
    scale = scale_factor if isinstance(scale_factor, LatentScale) else LatentScale(float(f"{scale_factor:.5g}"))
    origin = model.origin or {}
    weights = {f"{ORIGIN}{key}": value for key, value in origin.items()}
    exact = {*weights, *(model.state_dict().keys() - origin.keys() if origin else ())}
    weights |= model.state_dict()
    for key, value in weights.items():
        whole = key in exact and not th.equal(value.half().float(), value)
        weights[key] = (value.half() if half and not whole else value).contiguous().cpu()
    metadata = {"config": json.dumps(model.config_dict()), **scale.words()}
    metadata |= {"latent_space": fingerprint(model, scale)} if origin else {}
    metadata |= {"trained": json.dumps(about)} if about else {}
    checkpoint.save_safetensors(weights, path, metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a safetensors file carries beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def from_folder(folder: Path) -> tuple[KLAutoencoder, LatentScale]:
    """Read what diffusers' `save_pretrained` wrote: an autoencoder, or a pipeline with one under `vae`."""
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        files = sorted(folder.glob("*.safetensors"))
        remedy = f": give {files[-1]}, which lies in it" if files else ""
        raise UserError(f"--vae_path {folder} is a folder without an autoencoder's config.json{remedy}") from error
    if kind != "AutoencoderKL":
        raise UserError(f"--vae_path {folder} holds a {kind}, not an AutoencoderKL")
    return from_diffusers(folder, local_files_only=True)


def from_hub(name: str, allow_download: bool) -> tuple[KLAutoencoder, LatentScale]:
    """Read an autoencoder that the hub calls by this name, from the local cache unless a download is allowed."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    try:
        known = {part: isinstance(try_to_load_from_cache(name, f"{part}config.json"), str) for part in ("vae/", "")}
        if not any(known.values()) and allow_download:
            known["vae/"] = file_exists(name, "vae/config.json")
    except Exception as error:  # a name that the hub forbids, or one of the many errors of a network
        raise UserError(f"--vae_path {name} cannot be had from the hub ({one_line(error)})") from error
    if not any(known.values()) and not allow_download:
        raise UserError(
            f"--vae_path {name} is neither a file or folder nor in the hub's local cache;"
            " --allow_download True fetches a hub name"
        )
    return from_diffusers(name, local_files_only=not allow_download, subfolder="vae" if known["vae/"] else "")


def from_diffusers(place, **options) -> tuple[KLAutoencoder, LatentScale]:
    """Read with diffusers' own AutoencoderKL, whatever version wrote it; the network is then ours, tensor by tensor."""
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        loaded: Any = AutoencoderKL.from_pretrained(place, output_loading_info=True, **options)
    except Exception as error:  # diffusers raises OSError, ValueError, RuntimeError, SafetensorError and the network's
        raise UserError(f"--vae_path {place} cannot be read by diffusers ({one_line(error)})") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"--vae_path {place} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    config = model.config
    factor, shift = float(config.scaling_factor or 1.0), float(config.shift_factor or 0.0)
    scale = LatentScale(factor, shift)
    if config.latents_mean and config.latents_std:
        scale = LatentScale(tuple(factor / std for std in config.latents_std), tuple(config.latents_mean))
    return from_state_dict(model.state_dict(), norm_groups=config.norm_num_groups), scale


def one_line(error: Exception) -> str:
    """The beginning of what an error says."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def fingerprint(model: nn.Module, scale: LatentScale | None = None) -> str:
    """16 hexadecimal digits that change with any weight and, if it is given, with the scale.

    A tuned decoder's weights do not count, but those it was tuned from: the latents are the same, and so is their name.
    """
    digest = hashlib.sha256(repr(scale).encode() if scale else b"")
    weights = {**model.state_dict(), **(getattr(model, "origin", None) or {})}
    for key, value in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def warn_unless_unit_variance(z: th.Tensor, say) -> None:
    """Say so if model latents are far from unit variance: the scale factor does not fit these data."""
    std = z.float().std().item()
    if std == 0:
        say("warning: the latents of these images are all the same number: there is nothing in them to learn")
    elif not 0.5 < std < 2.0:
        say(
            f"warning: the latents' standard deviation is {std:.3g}, not about 1: --scale_factor does not fit these"
            f" images (try {1 / std:.4g} times the present one)"
        )
