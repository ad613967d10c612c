"""The whole check of an autoencoder on a data set: numbers, identity, pictures, verdict, and what to store of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch as th

from guided_diffusion_vae.autoencoders.layouts import save_diffusers
from guided_diffusion_vae.autoencoders.perceptual import load_lpips
from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.vae_data import Part, VAEDataConfig
from guided_diffusion_vae.pictures import draw_latents_of, find_axes
from guided_diffusion_vae.plotting import or_said
from guided_diffusion_vae.sample_util import save_grid
from guided_diffusion_vae.vae_wrapper import SHIPPED, save_autoencoder

from .autoencoder import CHUNK, AutoencoderReport, as_images, examine
from .statistics import frechet_distance
from .user_classifier import train_user_classifier

PAIRS = 32  # images in recon_grid.png, each beside its reconstruction
FEWEST = 4  # training images of a user, for a judge of identity


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is measured beyond pixels, and what is written."""

    split: str = "all"  # the part that is judged: train, val, test or all
    lpips_path: str = ""  # weights of LPIPS; empty: it is not measured
    judge_epochs: int = 0  # train a user classifier for so many epochs to see whether identity survives; 0: do not
    fit_scale: bool = False  # store the scale that gives these images' latents unit variance
    out: str = ""  # write the autoencoder here: a .safetensors file, or a folder that diffusers reads
    report_dir: str = "runs/check_vae"  # folder for report.json, recon_grid.png and worst.png
    seed: int = 0  # of the split and of the judge

    def __post_init__(self):
        if self.split not in ("train", "val", "test", "all"):
            raise UserError(f"--split is {self.split!r}; choose train, val, test or all")
        if self.fit_scale and not self.out:
            raise UserError("--fit_scale True needs --out: a .safetensors file, or a folder for diffusers' layout")


def check(vae, data: VAEDataConfig, config: CheckConfig, say=print, *, plot: bool = False) -> AutoencoderReport:
    """Judge an autoencoder; print and write what was found, and store it if asked.

    Args:
        vae: a `VAEInterface`.
        plot: draw latents.png, too.
    Raises:
        UserError: no such images, or a split without any.
    """
    pixels, labels, class_names = collect(data, config.split, config.seed, say)
    vae.latent_shape(data.image_size)  # complains about a size that cannot be halved, with the flag's name
    report, back = examine(vae, pixels, labels, class_names)
    report = replace(report, extra=further(pixels, back, labels, class_names, data, config, say))
    say(report.table())

    folder = Path(config.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "report.json") as handle:
        handle.write(json.dumps({"vae_path": vae.vae_path, **report.numbers()}, indent=1).encode())
    spread = np.linspace(0, len(pixels) - 1, min(PAIRS, len(pixels))).astype(int)
    for name, places in (("recon_grid.png", spread), ("worst.png", report.worst())):
        pairs = np.stack([pixels[places], back[places]], axis=1).reshape(-1, *pixels.shape[1:])
        captions = [text for i in places for text in (class_names[labels[i]], f"{report.psnr[i]:.1f} dB")]
        save_grid(folder / name, pairs, captions, 8)
    picture = folder / "latents.png"
    picture.unlink(missing_ok=True)  # an earlier check's
    about, edges = (pixels, labels, class_names, picture), find_axes(data.data_root)
    drawn = plot and or_said(picture.name, lambda: draw_latents_of(vae, *about, edges=edges, say=say), say)
    say(f"written: {folder}/report.json, recon_grid.png, worst.png{', latents.png' * drawn}")
    if config.out:
        store(vae, report.fitting_scale if config.fit_scale else vae.scale_factor, config.out, data.image_size, say)
    return report


def collect(data: VAEDataConfig, split: str, seed: int, say=print) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 images (N, H, W, 3), their labels, and the names of the classes, of one part or of all."""
    found = []
    for dataset in data.load(say):
        parts = dataset.split(seed)
        places = np.sort(np.concatenate(parts)) if split == "all" else getattr(parts, split)
        part = Part(dataset, places, 3)
        images = [((part[i] + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0) for i in range(len(part))]
        found.append((images, np.array(dataset.class_names, dtype=object)[dataset.labels[places]]))
    images = [image for part, _ in found for image in part]
    if not images:
        raise UserError(f"--data_root {data.data_root} has no images in its part {split!r}; choose another --split")
    class_names, labels = np.unique(np.concatenate([names for _, names in found]).astype(str), return_inverse=True)
    return np.stack(images), labels, class_names.tolist()


def further(pixels, back, labels, class_names, data, config: CheckConfig, say) -> dict[str, float]:
    """LPIPS and what a judge of identity says, as far as they were asked for."""
    numbers = {}
    if config.lpips_path:
        lpips = load_lpips(config.lpips_path)
        with th.no_grad():
            parts = zip(*(np.array_split(x, -(-len(x) // CHUNK)) for x in (pixels, back)), strict=True)
            numbers["lpips"] = float(th.cat([lpips(*map(as_images, pair)) for pair in parts]).mean())
    if config.judge_epochs:
        seen, users, names = collect(data, "train", config.seed, say)
        if names != class_names or np.bincount(users).min() < FEWEST:
            raise UserError(f"--judge_epochs needs {FEWEST} training images of every user of the judged part; give 0")
        judge = train_user_classifier(seen, users, len(names), seed=config.seed, epochs=config.judge_epochs)
        before, after = judge.judge(pixels), judge.judge(back)
        numbers["user_accuracy_images"] = float((before.users == labels).mean())
        numbers["user_accuracy_reconstructions"] = float((after.users == labels).mean())
        numbers["rFD_user"] = float(frechet_distance(before.features, after.features))
    return numbers


def store(vae, scale, out: str, image_size: int, say=print) -> None:
    """Write the autoencoder with a scale: one file in our form, or a folder in diffusers'."""
    if vae.is_pixel or out in SHIPPED:
        raise UserError(f"--out {out}: there is nothing to store of --vae_path {vae.vae_path} under this name")
    if out.endswith(".safetensors"):
        if isinstance(scale, tuple):
            raise UserError("--out: a scale of its own for each channel goes into a folder (diffusers' layout) only")
        save_autoencoder(vae.vae, out, scale)
    elif Path(out).suffix:
        raise UserError(f"--out is {out!r}; give a .safetensors file, or a folder for diffusers' layout")
    else:
        save_diffusers(vae.vae, out, scale=scale, shift=vae.latent_scale.shift, image_size=image_size)
    say(f"stored: {out} (scale factor {scale:.5g})" if isinstance(scale, float) else f"stored: {out}")
