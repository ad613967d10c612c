"""Images per second into training: encoded on the fly against read from extracted latents, side by side in one run.

    python benchmarks/bench_shards.py

Prints the ratio, the median over alternating rounds, so that a machine that speeds up or slows down favours neither.
Both sides go through `load_data_with_vae`, in the same shuffled order, and end as model latents on the device.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch as th
from PIL import Image

from guided_diffusion_vae.data.latent_extract import ExtractConfig, extract_latents
from guided_diffusion_vae.data.microdoppler import SimulationConfig, render
from guided_diffusion_vae.image_datasets import load_data_with_vae
from guided_diffusion_vae.vae_wrapper import VAEInterface


def seconds(stream, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    if th.cuda.is_available():
        th.cuda.synchronize()
    return time.perf_counter() - start


def draw_images(folder: Path, count: int, users: int = 8) -> None:
    """Spectrograms of a few walking persons, 64 x 64."""
    config = SimulationConfig(image_size=64)
    for i in range(count):
        path = folder / f"user_{i % users:02d}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(config, i % users, 0, i // users)[0]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    th.set_num_threads(1)
    vae = VAEInterface("microdoppler-f4").to("cuda" if th.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as root:
        images, latents = Path(root, "images"), Path(root, "latents")
        draw_images(images, args.images)
        extract_latents(ExtractConfig(data_dir=str(images), out_dir=str(latents), image_size=64), vae)
        options = {"batch_size": args.batch_size, "image_size": 64, "vae": vae, "class_cond": True, "num_workers": 0}
        encoded = load_data_with_vae(data_dir=images, cache_latents=False, **options)
        stored = load_data_with_vae(data_dir=latents, **options)
        seconds(encoded, 1), seconds(stored, 50)  # warm up
        few, many = 2, 200  # steps in a round: about as long for both
        rounds = [(seconds(encoded, few) / few, seconds(stored, many) / many) for _ in range(args.rounds)]
    ratio = statistics.median(a / b for a, b in rounds)
    speed = [args.batch_size / statistics.median(column) for column in zip(*rounds, strict=True)]
    print(f"{vae.vae_path}, one thread, torch {th.__version__}, batch {args.batch_size}, 64 px")
    print(f"extracted latents: {ratio:.0f} times the images per second ({speed[1]:.0f} against {speed[0]:.1f} encoded)")


if __name__ == "__main__":
    main()
