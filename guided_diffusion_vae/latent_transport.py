"""Generated latents: their file, and the map that gives encoded latents their statistics.

A generator's latents have another mean and covariance over channels than the encoded ones that a decoder learnt from.
Of all affine maps from N(mu, S) to N(mu', S') this one moves the least (Gelbrich 1990):

    T(z) = mu' + A (z - mu),      A = S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2,      A S A = S'

A is symmetric and positive, so that z + amount (T(z) - z) goes the straight way and never collapses in between.
"""

from pathlib import Path

import torch as th
import torch.nn as nn

from . import checkpoint
from .autoencoders.kl import KLAutoencoder
from .config import UserError
from .vae_wrapper import LatentScale, VAEInterface, fingerprint, read_metadata

FLAG = "--generated_latents"
MAKE = "sample with image_sample_vae.py --save_latents True"
KIND = "generated latents"  # what the file says that it holds; extracted latents are raw ones
FLOOR = 1e-6  # of a variance over channels, relative to the largest: what is flat stays so, without dividing by zero


class Moments:
    """Mean (C,) and covariance (C, C) over images and places, in float64, of latents that come in parts."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum, self.square = th.zeros(channels).double(), th.zeros(channels, channels).double()

    def add(self, mean: th.Tensor, std: th.Tensor | None = None) -> None:
        """Latents (N, C, h, w), or posteriors of this mean and standard deviation."""
        rows = mean.double().cpu().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.sum += rows.sum(1)
        self.square += rows @ rows.T
        if std is not None:
            self.square += (std.double().cpu() ** 2).sum((0, 2, 3)).diag()

    @property
    def mean(self) -> th.Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> th.Tensor:
        return self.square / self.count - self.mean.outer(self.mean)


class Transport(nn.Module):
    """z -> z + amount (T(z) - z): the identity at 0, the statistics of the target at 1."""

    step: th.Tensor
    source_mean: th.Tensor
    shift: th.Tensor

    def __init__(self, source: Moments, target: Moments):
        super().__init__()
        root, inverse = powers(source.covariance, 0.5), powers(source.covariance, -0.5)
        step = inverse @ powers(root @ target.covariance @ root, 0.5) @ inverse - th.eye(len(root)).double()
        shift = target.mean - source.mean
        self.register_buffer("step", step.float())  # A - I
        self.register_buffer("source_mean", source.mean.float())
        self.register_buffer("shift", shift.float())
        moved = (step @ source.covariance @ step).trace() + shift @ shift
        self.reach = float((moved / source.covariance.trace()).sqrt())  # rms way at amount 1, in spreads of the source

    def forward(self, z: th.Tensor, amount: th.Tensor) -> th.Tensor:
        """Latents (N, C, h, w), each moved by its amount (N,) in [0, 1]."""
        centred = z - self.source_mean[:, None, None]
        move = th.einsum("ij,njhw->nihw", self.step, centred) + self.shift[:, None, None]
        return z + amount[:, None, None, None] * move


def powers(matrix: th.Tensor, exponent: float) -> th.Tensor:
    """A power of a symmetric matrix without negative eigenvalues, which are held above a floor."""
    values, vectors = th.linalg.eigh(matrix)
    values = values.clamp(min=max(float(values[-1]) * FLOOR, 1e-300))
    return (vectors * values**exponent) @ vectors.T


# ---- the file --------------------------------------------------------------------------------------------------------


def save_latents(folder: Path, latents, labels, vae: VAEInterface) -> Path:
    """Write `latents_NxCxhxw.safetensors`: model latents, labels if any, and whose they are; returns its path.

    Raises:
        SaveError: see `checkpoint.atomic_write`.
    """
    path = Path(folder) / f"latents_{'x'.join(map(str, latents.shape))}.safetensors"
    tensors = {"latents": th.as_tensor(latents).float().contiguous().cpu()}
    if labels is not None:
        tensors["labels"] = th.as_tensor(labels).long()
    metadata = {"autoencoder": vae.fingerprint, **vae.latent_scale.words(), "kind": KIND}
    checkpoint.save_safetensors(tensors, path, metadata)
    return path


def read_latents(path: str, model: KLAutoencoder) -> th.Tensor:
    """Raw latents (N, C, h, w) of a KL autoencoder from a file that `save_latents` wrote.

    Raises:
        UserError: not such a file; latents of another autoencoder; NaN; too few to tell a covariance.
    """
    if not path.endswith(".safetensors"):
        raise UserError(f"{FLAG} {path} is not a latents_NxCxhxw.safetensors: {MAKE}")
    try:
        tensors, metadata = checkpoint.load(path), read_metadata(Path(path))
    except UserError as error:
        raise UserError(f"{FLAG} {error}") from error
    try:
        z, whose, scale = tensors["latents"], metadata["autoencoder"], LatentScale.of_words(metadata)
    except (KeyError, ValueError, TypeError):
        z, whose = th.zeros(0), ""
    if metadata.get("kind") != KIND or z.ndim != 4 or not whose:
        raise UserError(f"{FLAG} {path} holds no generated latents (N, C, h, w): {MAKE}")
    channels = model.config.embed_dim
    if z.shape[1] != channels or fingerprint(model, scale) != whose:
        raise UserError(
            f"{FLAG} {path} is of autoencoder {whose}, but --ckpt with that scale is"
            f" {fingerprint(model, scale)}: sample from a model that was trained on --ckpt"
        )
    if len(z) < 2 * channels:
        raise UserError(f"{FLAG} {path} holds {len(z)} latents; {channels} channels need {2 * channels} or more")
    z = scale.to_raw(z.float())
    if not z.isfinite().all():
        raise UserError(f"{FLAG} {path} holds NaN or infinite values: the checkpoint it was sampled from diverged")
    return z
