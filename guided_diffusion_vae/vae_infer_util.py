"""Using a trained autoencoder from the command line: images out of noise, or images through it and back."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch as th

from . import dist_util
from .config import UserError, refuse_below
from .data.vae_data import Part, VAEDataConfig
from .sample_util import Batch, PngWriter, save_grid, to_pixels
from .vae_tasks import PlainTask

CHUNK, GRID = 50, 64


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The autoencoder."""

    ckpt: str = ""  # last.pt or epoch_XXXX.pt of a plain VAE; of a KL autoencoder, what --vae_path takes


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """How many images, and where they go."""

    n: int = 64  # images
    out: str = "runs/vae_infer"  # folder for png/ and grid.png
    seed: int = 0  # of what is drawn

    def __post_init__(self):
        refuse_below(self, 1, "n")


def infer(model, data: VAEDataConfig, config: InferConfig, say=print) -> None:
    """Write `n` images as PNGs and as a grid: drawn from the prior, or, with a data_root, real ones through the model.

    Args:
        model: a `PlainTask` or a `VAEInterface`.
    Raises:
        UserError: a KL autoencoder without images; its prior is what a diffusion model is for.
    """
    if data.data_root:
        dataset = data.load(say)[0]
        channels = model.channels if isinstance(model, PlainTask) else 3
        part = Part(dataset, np.arange(min(config.n, len(dataset))), channels)
        images = th.stack([th.as_tensor(part[i]) for i in range(len(part))]).to(dist_util.dev())
        reconstruct = model.reconstruct if isinstance(model, PlainTask) else partial(through, model)
        done = [reconstruct(x) for x in images.split(CHUNK)]
        labels, names = dataset.labels[: len(part)], dataset.class_names
    elif isinstance(model, PlainTask):
        generator = th.Generator().manual_seed(config.seed)
        sizes = [min(CHUNK, config.n - first) for first in range(0, config.n, CHUNK)]
        done = [model.sample(size, data.image_size, generator) for size in sizes]
        labels, names = None, []
    else:
        raise UserError(
            "--data_root is empty: a KL autoencoder sends images through; new ones come from image_sample_vae.py"
        )
    pixels = to_pixels(th.cat(done).expand(-1, 3, -1, -1))
    folder = Path(config.out)
    PngWriter(folder / "png", names, prefix="").write(Batch(pixels, labels))
    save_grid(folder / "grid.png", pixels[:GRID], [""] * min(GRID, len(pixels)), 8)
    say(f"written: {len(pixels)} images below {folder}/png, and {folder}/grid.png")


def through(vae, images: th.Tensor) -> th.Tensor:
    """Images through the mean of their posterior."""
    return vae.decode_batch(vae.encode_moments(images).chunk(2, dim=1)[0])
