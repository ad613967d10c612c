"""One sampling loop for every script that samples, and what becomes of the samples.

Two ways to draw. Upstream's: each process makes whole batches, drawing labels, x_T and each step's noise from its
global generator. Per image: image number i owns a generator seeded by (seed, i) that draws all its numbers, so it is
the same image whatever the batch size and the number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from PIL import Image, ImageDraw

from . import dist_util
from .checkpoint import atomic_write
from .config import UserError
from .data.image_folder import class_number
from .image_datasets import mix


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling: upstream's flags, then ours."""

    clip_denoised: bool = True  # clamp each predicted x_0 to [-1, 1]; by default only in pixels, never on latents
    num_samples: int = 10000  # how many images
    batch_size: int = 16  # images at a time on each process
    use_ddim: bool = False  # DDIM steps (deterministic) instead of ancestral ones
    model_path: str = ""  # the model*.pt or ema_*.pt to sample from; run.yaml beside it supplies all other flags
    users: str = ""  # which users, such as 3,7 or all: in turn; empty: drawn at random for each image, as upstream does
    seed: int = 0  # of all random numbers
    per_image_seed: bool = False  # image i is the same whatever the batch size and the number of processes
    save_png: bool = True  # also write PNGs, in a folder for each user
    log_dir: str = ""  # where the samples go; empty: OPENAI_LOGDIR, else samples/ beside the model

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")


class Batch(NamedTuple):
    """Finished images: pixels uint8 (N, H, W, 3), labels int64 (N,) or None."""

    pixels: np.ndarray
    labels: np.ndarray | None


class PerImageNoise:
    """Draws each image's numbers from its own generator; used in place of `randn_like`."""

    def __init__(self, seed: int, numbers, device):
        self.device = device
        self.generators = [th.Generator(device=device).manual_seed(mix(seed, number)) for number in numbers]

    def integers(self, high: int) -> th.Tensor:
        draws = [th.randint(high, (1,), generator=g, device=self.device) for g in self.generators]
        return th.cat([th.zeros(0, dtype=th.long, device=self.device), *draws])

    def randn(self, shape) -> th.Tensor:
        return th.stack([th.randn(shape, generator=g, device=self.device) for g in self.generators])

    def __call__(self, x: th.Tensor) -> th.Tensor:
        return self.randn(x.shape[1:]).to(x.dtype)


def sample_batches(
    model,
    diffusion,
    vae,
    *,
    image_size: int,
    num_samples: int,
    batch_size: int,
    classes: Callable[[np.ndarray], np.ndarray] | None = None,
    num_classes: int | None = None,
    use_ddim: bool = False,
    clip_denoised: bool = False,
    seed: int = 0,
    per_image_seed: bool = False,
    progress: bool = False,
) -> Iterator[Batch]:
    """Yield finished batches in the order of the image numbers. Collective: call on every process.

    Args:
        model: (x, t, **cond) -> prediction, in eval mode, on this process's device.
        classes: image numbers -> labels; None draws them at random if there are `num_classes`.
        num_classes: how many users the model knows, or None if it is unconditional.
    """
    if not per_image_seed:
        th.manual_seed(seed if dist_util.rank() == 0 else mix(seed, dist_util.rank()))
    rank, size, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    shape = vae.latent_shape(image_size)
    loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    for first in range(0, num_samples, batch_size * size):
        numbers = np.arange(batch_size) + first + rank * batch_size
        if per_image_seed:
            numbers = numbers[numbers < num_samples]
        noise = PerImageNoise(seed, numbers, device) if per_image_seed else None
        y = draw_labels(numbers, classes, num_classes, noise, device)
        done = Batch(np.zeros((0, image_size, image_size, 3), np.uint8), None if y is None else np.zeros(0, np.int64))
        if len(numbers):
            x = loop(
                model,
                (len(numbers), *shape),
                noise=noise.randn(shape) if noise else None,
                noise_like=noise,
                clip_denoised=clip_denoised,
                model_kwargs={} if y is None else {"y": y},
                device=device,
                progress=progress and rank == 0,
            )
            done = Batch(to_pixels(vae.decode_batch(x)), None if y is None else y.cpu().numpy())
        parts = dist_util.gather_objects(done)
        left = num_samples - first
        yield Batch(
            np.concatenate([part.pixels for part in parts])[:left],
            None if y is None else np.concatenate([part.labels for part in parts])[:left],
        )


def draw_labels(numbers, classes, num_classes, noise, device) -> th.Tensor | None:
    """The labels of these images: by rule, from each image's generator, or from the global one (upstream's draw)."""
    if num_classes is None:
        return None
    if classes is not None:
        return th.from_numpy(classes(numbers)).to(device)
    if noise is not None:
        return noise.integers(num_classes)
    return th.randint(low=0, high=num_classes, size=(len(numbers),), device=device)


def classes_in_turn(users: str, class_names: list[str]) -> Callable[[np.ndarray], np.ndarray] | None:
    """The rule that `--users` states: image numbers -> labels, the users in turn; None for an empty flag.

    A user is named as on disk: `user_07`, or 7 for the class whose name ends in that number.

    Raises:
        UserError: a user that the model does not know.
    """
    if not users:
        return None
    known = {str(class_number(name)): i for i, name in enumerate(class_names)}
    known |= {name: i for i, name in enumerate(class_names)}
    words = class_names if users.strip() == "all" else [word.strip() for word in users.split(",")]
    for word in words:
        if word.lstrip("0") not in known and word not in known:
            raise UserError(f"--users names {word!r}, but the model knows {class_names[0]} to {class_names[-1]}")
    wanted = np.array([known[word] if word in known else known[word.lstrip("0")] for word in words], dtype=np.int64)
    return lambda numbers: wanted[numbers % len(wanted)]


def to_pixels(images: th.Tensor) -> np.ndarray:
    """Float images (N, 3, H, W) in [-1, 1] as uint8 (N, H, W, 3), by upstream's rule: truncated, not rounded.

    Raises:
        UserError: not-a-number in the samples, which the evaluator would choke on.
    """
    if not th.isfinite(images).all():
        raise UserError(
            "the samples hold NaN or infinite values: the checkpoint is of a run that diverged, or --use_fp16 True"
            " overflowed (try --use_fp16 False)"
        )
    pixels = ((images + 1) * 127.5).clamp(0, 255).to(th.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_samples(folder: Path, batch: Batch) -> Path:
    """Write `samples_NxHxWx3.npz` (arr_0 pixels, arr_1 labels), the evaluator's format; returns its path."""
    arrays = [batch.pixels] if batch.labels is None else [batch.pixels, batch.labels]
    path = Path(folder) / f"samples_{'x'.join(map(str, batch.pixels.shape))}.npz"
    with atomic_write(path) as handle:
        np.savez(handle, *arrays)
    return path


def save_pngs(folder: Path, batch: Batch, class_names: list[str], first: int = 0) -> None:
    """Write each image as `NAME/NAME_NUMBER.png`: NAME is the user's, NUMBER the image's place among all samples."""
    for i, pixels in enumerate(batch.pixels):
        name = "sample" if batch.labels is None else safe_name(class_names, batch.labels[i])
        path = Path(folder) / name / f"{name}_{first + i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            Image.fromarray(pixels).save(handle, format="PNG")


def safe_name(class_names: list[str], label: int) -> str:
    """A class's name if it can be a file name on every system; else `class_` and its number."""
    name = class_names[label] if label < len(class_names) else ""
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii() and len(name) < 100
    return name if plain and not name.startswith("-") else f"class_{label:03d}"


def save_grid(path: Path, pixels: np.ndarray, captions: list[str], columns: int, *, scale: int = 1) -> None:
    """Write images (N, H, W, 3) uint8 as one PNG, row by row, each with its caption above."""
    n, height, width = pixels.shape[:3]
    cell_w, cell_h, head = width * scale + 4, height * scale + 16, 12
    sheet = Image.new("RGB", (columns * cell_w + 4, -(-n // columns) * cell_h + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        x, y = 4 + (i % columns) * cell_w, 4 + (i // columns) * cell_h
        draw.text((x, y - 2), captions[i], fill="black")
        tile = Image.fromarray(pixels[i]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y + head))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        sheet.save(handle, format="PNG")


def join(batches: list[Batch]) -> Batch:
    """Several batches as one."""
    labels = None if batches[0].labels is None else np.concatenate([batch.labels for batch in batches])
    return Batch(np.concatenate([batch.pixels for batch in batches]), labels)


class Preview:
    """Called during training: writes `samples/step_N.png`, the same images of the first users each time.

    Collective: call on every process.
    """

    ROWS, COLUMNS = 4, 8

    def __init__(self, model, diffusion, vae, image_size, class_names, *, folder, conditional, seed=0):
        self.model, self.diffusion, self.vae, self.image_size = model, diffusion, vae, image_size
        self.class_names, self.folder, self.conditional, self.seed = class_names, Path(folder), conditional, seed

    def __call__(self, step: int) -> None:
        count = self.ROWS * self.COLUMNS
        shown = self.class_names[: self.COLUMNS]
        batches = sample_batches(
            self.model,
            self.diffusion,
            self.vae,
            image_size=self.image_size,
            num_samples=count,
            batch_size=-(-count // dist_util.world_size()),
            classes=classes_in_turn(",".join(shown), self.class_names) if self.conditional else None,
            num_classes=len(self.class_names) if self.conditional else None,
            use_ddim=True,
            clip_denoised=self.vae.is_pixel,
            seed=self.seed,
            per_image_seed=True,
        )
        pixels, labels = join(list(batches))
        if dist_util.rank() == 0:
            captions = [""] * count if labels is None else [safe_name(self.class_names, label) for label in labels]
            columns = len(shown) if self.conditional else self.COLUMNS
            save_grid(self.folder / "samples" / f"step_{step:06d}.png", pixels, captions, columns)
