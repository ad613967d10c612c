"""How good a plain VAE is: the negative evidence lower bound on images that it never saw, and its reconstructions."""

import json
from pathlib import Path

import numpy as np
import torch as th

from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.sample_util import save_grid, to_pixels

from .reconstruction import psnr, ssim

CHUNK, GRID = 100, 32


@th.no_grad()
def measure_plain(task, images, folder, *, seed: int = 0, say=print) -> dict[str, float]:
    """Measure a plain VAE on a dataset of images; write report.json, recon_grid.png and samples_grid.png.

    Args:
        task: a `PlainTask`; images: float32 (C, S, S) in [-1, 1] by index.
        seed: of the one draw of z for each image that the bound is estimated from.
    Returns:
        means over the images: `loss` = recon + beta kl (nats if recon is cross-entropy); PSNR, SSIM of the mean.
    """
    folder, generator = Path(folder), th.Generator().manual_seed(seed)
    sums, found = {"loss": 0.0, "recon": 0.0, "kl": 0.0}, []
    for first in range(0, len(images), CHUNK):
        batch = th.stack([th.as_tensor(images[i]) for i in range(first, min(first + CHUNK, len(images)))])
        noise = th.randn((len(batch), task.model.latent_dim), generator=generator)
        _, terms, _ = task.loss(batch, noise, 0)
        sums = {name: value + len(batch) * float(terms[name]) for name, value in sums.items()}
        recon = task.reconstruct(batch)
        before, after = (to_pixels(x.expand(-1, 3, -1, -1)) for x in (batch, recon))
        found.append((before, after, psnr(before, after), ssim(before, after)))
    before, after, decibels, similar = (np.concatenate(column) for column in zip(*found, strict=True))
    numbers = {name: value / len(images) for name, value in sums.items()}
    numbers |= {"psnr_db": float(decibels.mean()), "ssim": float(similar.mean()), "images": len(images)}

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "report.json") as handle:
        handle.write(json.dumps(numbers, indent=1).encode())
    pairs = np.stack([before[:GRID], after[:GRID]], axis=1).reshape(-1, *before.shape[1:])
    save_grid(folder / "recon_grid.png", pairs, [""] * len(pairs), 8)
    drawn = to_pixels(task.sample(GRID, before.shape[1], th.Generator().manual_seed(seed)).expand(-1, 3, -1, -1))
    save_grid(folder / "samples_grid.png", drawn, [""] * len(drawn), 8)
    say("\n".join(f"{name:>8} {value:.4f}" for name, value in numbers.items()))
    say(f"written: {folder}/report.json, recon_grid.png, samples_grid.png")
    return numbers
