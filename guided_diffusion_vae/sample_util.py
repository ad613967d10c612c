"""One sampling loop for every script that samples, and what becomes of the samples.

Two ways to draw. Upstream's: each process makes whole batches, drawing labels, x_T and each step's noise from its
global generator. Per image: image number i owns a generator seeded by (seed, i) that draws all its numbers, so it is
the same image whatever the batch size and the number of processes.
"""

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from PIL import Image, ImageDraw

from . import dist_util
from .checkpoint import atomic_write, save_csv
from .config import UserError, refuse_below
from .data.image_folder import class_number
from .data.stream import mix
from .latent_transport import save_latents

GRID_COLUMNS, GRID_IMAGES = 8, 64
PICTURES = "grid.png", "grid_axes.png", "denoising.png"  # of all samples of a folder
OF_SAMPLES = "png", "grids", *PICTURES, "manifest.csv"  # what tells of a folder's samples, beside the .npz
IN_MANIFEST = "file", "row", "user", "label"  # its first columns


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling: upstream's flags, then ours."""

    num_samples: int = 10000  # how many images
    batch_size: int = 16  # images at a time on each process
    # the ema_*.pt or model*.pt to sample from, or a training's folder: its best or newest average; run.yaml beside it
    # supplies all other flags
    model_path: str = ""
    users: tuple = ()  # which users, such as 3 7 or 3,7 or all: in turn; none: drawn at random, as upstream does
    num_samples_per_user: int = 0  # so many of each of --users, instead of --num_samples
    seed: int = 0  # of all random numbers
    per_image_seed: bool = False  # image i is the same whatever the batch size and the number of processes
    compile: bool = False  # torch.compile the network: half a minute or more on a CPU, then a third faster
    save_png: bool = True  # also write PNGs, in a folder for each user
    save_latents: bool = False  # also write latents_NxCxhxw.safetensors, for vae_train.py --generated_latents
    log_dir: str = ""  # where the samples go; empty: OPENAI_LOGDIR, else samples/ beside the model

    def __post_init__(self):
        refuse_below(self, 1, "num_samples", "batch_size")
        if self.num_samples_per_user < 0:
            raise UserError(f"--num_samples_per_user is {self.num_samples_per_user}; give 1 or more")
        if self.num_samples_per_user and not self.users:
            raise UserError(f"--num_samples_per_user {self.num_samples_per_user} needs --users, such as 3 7 or all")

    def count(self, class_names: list[str]) -> int:
        """How many images are wanted in all."""
        return self.num_samples_per_user * len(named_users(self.users, class_names)) or self.num_samples


class Batch(NamedTuple):
    """Finished images: pixels uint8 (N, H, W, 3), labels int64 (N,) or None; if kept, the model latents behind them."""

    pixels: np.ndarray
    labels: Any  # np.ndarray, or None
    latents: np.ndarray | None = None


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
    sampler,
    vae,
    *,
    image_size: int,
    num_samples: int,
    batch_size: int,
    classes: Callable[[np.ndarray], np.ndarray] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    per_image_seed: bool = False,
    progress: bool = False,
    keep_latents: bool = False,
) -> Iterator[Batch]:
    """Yield finished batches in the order of the image numbers. Collective: call on every process.

    Args:
        model: (x, t, **cond) -> prediction, in eval mode, on this process's device.
        sampler: see `assembly.create_sampler`.
        classes: image numbers -> labels; None draws them at random if there are `num_classes`.
        num_classes: how many users the model knows, or None if it is unconditional.
    """
    if not per_image_seed:
        th.manual_seed(seed if dist_util.rank() == 0 else mix(seed, dist_util.rank()))
    rank, size, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    shape = vae.latent_shape(image_size)
    for first in range(0, num_samples, batch_size * size):
        numbers = np.arange(batch_size) + first + rank * batch_size
        if per_image_seed:
            numbers = numbers[numbers < num_samples]
        noise = PerImageNoise(seed, numbers, device) if per_image_seed else None
        y = draw_labels(numbers, classes, num_classes, noise, device)
        done = Batch(np.zeros((0, image_size, image_size, 3), np.uint8), None if y is None else np.zeros(0, np.int64))
        done = done._replace(latents=np.zeros((0, *shape), np.float32) if keep_latents else None)
        if len(numbers):
            x = sampler(
                model,
                (len(numbers), *shape),
                noise=noise.randn(shape) if noise else None,
                noise_like=noise,
                model_kwargs={} if y is None else {"y": y},
                device=device,
                progress=progress and rank == 0,
            )
            z = x.float().cpu().numpy() if keep_latents else None
            done = Batch(to_pixels(vae.decode_batch(x)), None if y is None else y.cpu().numpy(), z)
        parts = dist_util.gather_objects(done)
        left = num_samples - first
        columns: list[Any] = [None if column is None else column[:left] for column in join(parts)]
        yield Batch(*columns)


def draw_labels(numbers, classes, num_classes, noise, device) -> th.Tensor | None:
    """The labels of these images: by rule, from each image's generator, or from the global one (upstream's draw)."""
    if num_classes is None:
        return None
    if classes is not None:
        return th.from_numpy(classes(numbers)).to(device)
    if noise is not None:
        return noise.integers(num_classes)
    return th.randint(low=0, high=num_classes, size=(len(numbers),), device=device)


def named_users(users: tuple[str, ...], class_names: list[str]) -> list[int]:
    """The labels of the users that `--users` names: as on disk, `user_07`, or 7 for the class that ends in 7; or all.

    Raises:
        UserError: a user that the model does not know, or a number that two classes end in.
    """
    return [_label_of(word, class_names) for word in (class_names if users == ("all",) else users)]


def _label_of(word: str, class_names: list[str]) -> int:
    if word in class_names:
        return class_names.index(word)
    owners = [name for name in class_names if word.isdecimal() and class_number(name) == int(word)]
    if len(owners) > 1:
        raise UserError(f"--users names {word!r}, but {' and '.join(owners[:2])} end in it: give the full name")
    if not owners:
        raise UserError(f"--users names {word!r}, but the model knows {class_names[0]} to {class_names[-1]}")
    return class_names.index(owners[0])


def classes_in_turn(users: tuple[str, ...], class_names: list[str]) -> Callable[[np.ndarray], np.ndarray] | None:
    """The rule that `--users` states: image numbers -> labels, the users in turn; None if it names none."""
    wanted = np.array(named_users(users, class_names), dtype=np.int64)
    return (lambda numbers: wanted[numbers % len(wanted)]) if users else None


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


def save_samples(folder: Path, batch: Batch, vae: Any = None) -> Path:
    """Write `samples_NxHxWx3.npz` (arr_0 pixels, arr_1 labels), the evaluator's format; returns its path.

    Args:
        vae: whose latents a batch holds that kept them; they are written beside it, see `save_latents`.
    """
    if batch.latents is not None:
        save_latents(folder, batch.latents, batch.labels, vae)
    arrays = [batch.pixels] if batch.labels is None else [batch.pixels, batch.labels]
    path = Path(folder) / f"samples_{'x'.join(map(str, batch.pixels.shape))}.npz"
    with atomic_write(path) as handle:
        np.savez(handle, *arrays)
    return path


class PngWriter:
    """Writes images as `user_07/micro_doppler_user07_001.png` or, without users, as `sample/sample_000000.png`.

    The number counts the images of one user, from 1; without users it is the image's place among all, from 0.

    Args:
        prefix: of the names of users' images.
    """

    def __init__(self, folder: Path, class_names: list[str], *, prefix: str = "micro_doppler_"):
        self.folder, self.class_names, self.prefix, self.counts = Path(folder), class_names, prefix, Counter()

    def write(self, batch: Batch) -> list[str]:
        """Write a batch; returns the files' names, relative to the folder."""
        names = [self._next_name(None if batch.labels is None else int(label)) for label in _labels(batch)]
        for name, pixels in zip(names, batch.pixels, strict=True):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / name) as handle:
                Image.fromarray(pixels).save(handle, format="PNG")
        return names

    def _next_name(self, label: int | None) -> str:
        number = self.counts[label]
        self.counts[label] += 1
        if label is None:
            return f"sample/sample_{number:06d}.png"
        user = safe_name(self.class_names, label)
        return f"{user}/{self.prefix}{user.replace('_', '')}_{number + 1:03d}.png"


def _labels(batch: Batch) -> Any:
    return [None] * len(batch.pixels) if batch.labels is None else batch.labels


def safe_name(class_names: list[str], label: int) -> str:
    """A class's name if it can be a file name on every system; else `class_` and its number."""
    name = class_names[label] if label < len(class_names) else ""
    return name if _is_plain(name) else f"class_{label:03d}"


def _is_plain(name: str) -> bool:
    plain = name.replace("_", "").replace("-", "").isalnum() and name.isascii() and len(name) < 100
    return plain and not name.startswith("-")


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


def save_grids(folder: Path, batch: Batch, class_names: list[str]) -> None:
    """Write `grid.png`, the first images in the order they were made, and `grids/USER.png` for each user."""
    captions = ["" if label is None else safe_name(class_names, label) for label in _labels(batch)]
    save_grid(folder / "grid.png", batch.pixels[:GRID_IMAGES], captions[:GRID_IMAGES], GRID_COLUMNS)
    for label in [] if batch.labels is None else np.unique(batch.labels):
        rows = np.flatnonzero(batch.labels == label)[:GRID_IMAGES]
        name = safe_name(class_names, label)
        save_grid(folder / "grids" / f"{name}.png", batch.pixels[rows], [name] * len(rows), GRID_COLUMNS)


def save_manifest(folder: Path, files: list[str], batch: Batch, class_names: list[str], about: dict) -> None:
    """Write `manifest.csv`: for each image its file, row in the .npz, user, label, and what it was made with.

    Args:
        files: of the images; fewer than images if none were written.
        about: what holds for all images: settings, the model and its fingerprint.
    """
    rows = [[*IN_MANIFEST, *about]]
    for row, label in enumerate(_labels(batch)):
        user = "" if label is None else class_names[label]
        number = "" if label is None else int(label)
        rows.append([files[row] if files else "", row, user, number, *about.values()])
    save_csv(rows, Path(folder) / "manifest.csv")


def read_manifest(folder: Path) -> list[dict]:
    """The rows of the `manifest.csv` that `save_manifest` wrote into a folder; none if there is no such file."""
    path = Path(folder) / "manifest.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as handle:
        reader = csv.DictReader(handle)
        with contextlib.suppress(csv.Error):  # of a binary file of that name
            ours = tuple(reader.fieldnames or ())[:3] == IN_MANIFEST[:3]  # earlier ones had no label
            return [row for row in reader if row["file"] is not None] if ours else []
    return []


def refuse_other_samples(folder: Path, command: str, model: str) -> None:
    """Raise if a folder holds the samples of another command or model; those of the same ones are replaced.

    Args:
        command, model: what the columns `command` and `model_sha256` of the manifest will say.
    Raises:
        UserError: names the folder, the other command and the remedy.
    """
    for row in read_manifest(folder)[:1]:
        if (row.get("command"), row.get("model_sha256")) != (command, model):
            whose = f"the command with {row['command']}" if row.get("command") else "an unknown command"
            whose += f" and model {Path(row.get('model_path') or '?').name}"
            raise UserError(
                f"--log_dir {folder} holds the samples of {whose}: give another --log_dir, or remove that folder"
            )


def remove_old_samples(folder: Path) -> None:
    """Remove the PNGs that the folder's manifest lists, and their grids, lest they pass for those of a new run.

    Nothing else but the manifest itself: no path in it leads out of `png/` and `grids/`, and a file it does not list
    stays.
    """
    root, rows = Path(folder).resolve(), read_manifest(folder)
    listed = {row["file"] for row in rows if row["file"].startswith("png/")}
    listed |= {f"grids/{name}.png" for name in map(_grid_name, rows) if name} | ({*PICTURES} if rows else set())
    for path in (root / name for name in listed):
        straight = os.path.isfile(path) and path.parent.resolve() == path.parent  # no .. and no link on the way
        if straight and path.suffix == ".png":
            path.unlink()
    if rows:
        (root / "manifest.csv").unlink()  # what comes now is not what it tells of


def _grid_name(row: dict) -> str:
    """What `safe_name` made of a row's user; empty without users."""
    user, label = row["user"] or "", row.get("label") or ""
    return user if _is_plain(user) else f"class_{label.zfill(3)}" if label.isdecimal() else ""


def join(batches: list[Batch]) -> Batch:
    """Several batches as one."""
    columns = zip(*batches, strict=True)
    joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Batch(*joined)


class Preview:
    """Called during training: writes `previews/step_N.png`, the same images of the first users each time.

    Collective: call on every process.
    """

    ROWS, COLUMNS = 4, 8

    def __init__(self, model, sampler, vae, image_size, class_names, *, folder, conditional, seed=0):
        self.model, self.sampler, self.vae, self.image_size = model, sampler, vae, image_size
        self.class_names, self.folder, self.conditional, self.seed = class_names, Path(folder), conditional, seed

    def __call__(self, step: int) -> None:
        count = self.ROWS * self.COLUMNS
        shown = tuple(self.class_names[: self.COLUMNS])
        batches = sample_batches(
            self.model,
            self.sampler,
            self.vae,
            image_size=self.image_size,
            num_samples=count,
            batch_size=-(-count // dist_util.world_size()),
            classes=classes_in_turn(shown, self.class_names) if self.conditional else None,
            num_classes=len(self.class_names) if self.conditional else None,
            seed=self.seed,
            per_image_seed=True,
        )
        batch = join(list(batches))
        if dist_util.rank() == 0:
            captions = ["" if label is None else safe_name(self.class_names, label) for label in _labels(batch)]
            columns = len(shown) if self.conditional else self.COLUMNS
            save_grid(self.folder / "previews" / f"step_{step:06d}.png", batch.pixels, captions, columns)
