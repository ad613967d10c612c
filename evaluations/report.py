"""The short report: generated images against real ones of unseen sessions, with floor and ceiling."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import list_images, read_rgb
from guided_diffusion_vae.image_datasets import center_crop_arr
from guided_diffusion_vae.sample_util import save_grid

from . import statistics
from .user_classifier import judge, train_classifier


def read_folder(data_dir, size: int, class_names: list[str] | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels (N, size, size, 3), labels (N,) and class names of a folder.

    Raises:
        UserError: a class that `class_names` does not have.
    """
    folder = list_images(data_dir)
    unknown = set(folder.class_names) - set(class_names or folder.class_names)
    if unknown:
        raise UserError(f"{data_dir} holds {sorted(unknown)[0]}, whom the training folder does not know")
    names = class_names or folder.class_names
    number = [names.index(name) for name in folder.class_names]
    pixels = np.stack([center_crop_arr(read_rgb(path), size) for path in folder.paths])
    return pixels, np.array([number[label] for label in folder.labels]), names


def read_samples(path) -> tuple[np.ndarray, np.ndarray]:
    """arr_0 (N, H, W, 3) uint8 and arr_1 (N,) of an .npz that a sampler wrote.

    Raises:
        UserError: no such file, or arrays of another kind.
    """
    if not Path(path).is_file():
        raise UserError(f"--samples {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, labels = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays else None
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"--samples {path} is not an .npz of samples ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise UserError(f"--samples {path}: arr_0 is {pixels.dtype} {pixels.shape}, it must be uint8 (N, H, W, 3)")
    if labels is None:
        raise UserError(f"--samples {path} has no labels (arr_1): sample with --class_cond True")
    return pixels, labels


def evaluate(real_dir, heldout_dir, samples, *, seed: int = 0) -> tuple[dict, dict]:
    """The numbers of the report, and the images behind it ({name: (pixels, labels)} and the class names)."""
    fake, fake_y = read_samples(samples)
    real, real_y, names = read_folder(real_dir, fake.shape[1])
    held, held_y, _ = read_folder(heldout_dir, fake.shape[1], names)
    model = train_classifier(real, real_y, num_users=len(names), seed=seed)
    r, h, f = (judge(model, pixels) for pixels in (real, held, fake))
    rng = np.random.default_rng(seed)
    noise = judge(model, rng.integers(0, 256, held.shape, dtype=np.uint8))
    shuffled = rng.permutation(len(held))
    half_a, half_b = shuffled[: len(held) // 2], shuffled[len(held) // 2 :]
    numbers = {
        "features": f"last layer of a {len(names)}-user classifier trained on {len(real)} real images (no download)",
        "images": {"real": len(real), "held out": len(held), "generated": len(fake)},
        "user_accuracy": {
            "generated": float((f.predicted == fake_y).mean()),
            "held-out real (ceiling)": float((h.predicted == held_y).mean()),
            "chance (floor)": 1 / len(names),
        },
        "FD_user_to_held_out": {
            "generated": statistics.frechet_distance_of(f.features, h.features),
            "real training images": statistics.frechet_distance_of(r.features, h.features),
            "held out, half to half (floor)": statistics.frechet_distance_of(h.features[half_a], h.features[half_b]),
            "noise (ceiling)": statistics.frechet_distance_of(noise.features, h.features),
        },
        "manifold_against_training": statistics.manifold(r.features, f.features)._asdict(),
        "nearest_training_image": {
            "generated": float(np.median(statistics.nearest_distances(f.features, r.features))),
            "held out": float(np.median(statistics.nearest_distances(h.features, r.features))),
        },
    }
    return numbers, {"real": (real, real_y), "generated": (fake, fake_y), "class_names": names}


def as_table(numbers: dict) -> str:
    """The numbers as lines for a terminal."""
    lines = [f"feature space: {numbers['features']}"]
    for group, rows in numbers.items():
        if isinstance(rows, dict):
            lines.append(group.replace("_", " "))
            lines += [f"    {name:<34} {value:.4g}" for name, value in rows.items()]
    return "\n".join(lines)


def write_report(out_dir, numbers: dict, images: dict, *, users: int = 8, each: int = 3) -> None:
    """Write report.json and comparison.png: a row for each of the first users, real left, generated right."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(out_dir / "report.json") as handle:
        handle.write(json.dumps(numbers, indent=2).encode())
    tiles, captions = [], []
    for user, name in enumerate(images["class_names"][:users]):
        for kind in ("real", "generated"):
            pixels, labels = images[kind]
            chosen = pixels[labels == user][:each]
            blank = np.full((each - len(chosen), *pixels.shape[1:]), 255, np.uint8)
            tiles += [*chosen, *blank]
            captions += [f"{name} {kind}"] + [""] * (each - 1)
    size = max(tile.shape[0] for tile in tiles)
    tiles = [
        tile if tile.shape[0] == size else np.asarray(Image.fromarray(tile).resize((size, size))) for tile in tiles
    ]
    save_grid(out_dir / "comparison.png", np.stack(tiles), captions, columns=2 * each, scale=max(1, 128 // size))
