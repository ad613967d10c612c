"""The picture on the README's first screen, from a finished `make demo`: a person measured, encoded, generated.

    python benchmarks/first_picture.py --run_dir runs/demo --out docs/first.png

Needs matplotlib.
"""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from matplotlib.figure import Figure
from PIL import Image

from guided_diffusion_vae.config import read_yaml
from guided_diffusion_vae.data.microdoppler import VELOCITY_MPS
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae

USERS = "user_05", "user_22", "user_25"
GENERATED = 3
LIMIT = 3.0  # standard deviations of a latent, at the ends of its colours


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def latent_of(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the four channels in units of model latents, two beside and two below one another."""
    image = th.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
    z = np.pad(load_vae(VAEConfig(sample_posterior=False)).encode_batch(image)[0].numpy(), [(0, 0), (0, 1), (0, 1)])
    return np.block([[z[0], z[1]], [z[2], z[3]]])[:-1, :-1]


def draw(run_dir: Path) -> Figure:
    """A row a person: real | its latent | generated."""
    seconds = float(read_yaml(run_dir / "data" / "run.yaml")["duration_s"])
    figure = Figure(figsize=(11.6, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(USERS), 2 + GENERATED, sharex="row", sharey="row")
    for row, user in zip(axes, USERS, strict=True):
        real = pixels_of(min((run_dir / "data" / "train" / user).glob("*.png")))
        made = sorted((run_dir / "samples" / "png" / user).glob("*.png"))[:GENERATED]
        how = {"extent": (0, seconds, *VELOCITY_MPS), "aspect": "auto", "interpolation": "nearest"}
        for axis, picture in zip([row[0], *row[2:]], [real, *map(pixels_of, made)], strict=True):
            axis.imshow(picture, **how)
        row[1].imshow(latent_of(real), cmap="RdBu_r", vmin=-LIMIT, vmax=LIMIT, **how)
        row[1].set_axis_off()
        row[0].set(xticks=[], ylabel=f"{user}\nm/s", yticks=[-3, 0, 3, 6])
    axes[-1][0].set_xticks([0, 1, 2, 3], ["0", "1", "2", "3 s"])
    axes[0][0].set_title("one walk, 64 x 64", fontsize=10, loc="left")
    axes[0][1].set_title("its latent, 4 of 16 x 16", fontsize=10, loc="left")
    axes[0][2].set_title("generated: the same person, other walks", fontsize=10, loc="left")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="of make demo")
    parser.add_argument("--out", default="docs/first.png")
    flags = parser.parse_args()
    draw(flags.run_dir).savefig(flags.out)
