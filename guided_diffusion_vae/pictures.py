"""What the pictures of `plotting` show: of samples and the walks that made them, of an autoencoder, of the data's axes.

A walk is watched, not repeated: a sampler around the sampler listens to what the network is asked and answers, so the
strip shows the very images that were sampled, and not a random number is drawn for it.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th

from . import dist_util
from .checkpoint import atomic_write
from .config import UserError, read_yaml
from .data.image_folder import image_from_pixels, list_images
from .data.microdoppler import VELOCITY_MPS, SimulationConfig
from .data.spectrogram import detect_colormap
from .denoiser import denoiser_of
from .image_datasets import PARTS, ImageDataset
from .plotting import (
    PictureAxes,
    Walk,
    colours_in_words,
    draw_grid,
    draw_latents,
    draw_walks,
    or_said,
    save_figure,
)
from .run_record import read_run
from .sample_util import Batch, to_pixels

Say = Callable[[str], object]

GRID_ROWS, GRID_COLUMNS = 16, 8  # users, and images of each
WALKS, MOMENTS = 4, 8  # images whose walk is shown, and how often
REMEMBERED = 32  # calls of the network at most that a walk is chosen from
ENCODED = 256  # images whose latents are counted
LATENT_ROWS = 4
UNITS = {"velocity_mps": "m/s", "doppler_hz": "Hz"}  # what axes.yaml may have


# ---- axes ------------------------------------------------------------------------------------------------------------


def axes_of_run(model_path) -> PictureAxes | None:
    """The axes of the images that a checkpoint was trained on; None if its run, or their folder, does not tell."""
    return find_axes(read_run(model_path)[0].get("data_dir"))


def find_axes(data_dir) -> PictureAxes | None:
    """What the edges of a folder's images are, if `axes.yaml` there or above its part tells, or the simulator made it.

    `axes.yaml` has `velocity_mps` or `doppler_hz`, [bottom, top], and `duration_s`, as import_radar.py writes it.
    """
    if not data_dir:
        return None
    place = Path(data_dir)
    for folder in (place, place.parent) if place.name in PARTS else (place,):
        told = _read(folder / "axes.yaml")
        for name, unit in UNITS.items():
            if found := _axes(told.get(name), unit, told.get("duration_s")):
                return found
        made = _read(folder / "run.yaml")
        if {field.name for field in fields(SimulationConfig)} - {"out_dir", "workers"} <= made.keys():
            return _axes(VELOCITY_MPS, "m/s", made["duration_s"])
    return None


def hand_on_axes(data_dir, out_dir) -> None:
    """Write `axes.yaml` of a folder's images to where their latents lie, unless there is one: who trains on latents
    knows no images."""
    found, path = find_axes(data_dir), Path(out_dir) / "axes.yaml"
    if found and not path.exists():
        name = next(name for name, unit in UNITS.items() if unit == found.unit)
        with atomic_write(path) as handle:
            handle.write(f"{name}: [{found.low!r}, {found.high!r}]\nduration_s: {found.seconds!r}\n".encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except (UserError, OSError):  # not there, or not to be read: then nobody tells
        return {}


def _axes(edges, unit: str, seconds) -> PictureAxes | None:
    try:
        low, high = map(float, edges)
        found = PictureAxes(low, high, unit, float(seconds))
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found[:2]).all() and low < high and 0 < found.seconds < np.inf else None


# ---- walks -----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a network was asked and answered, of one image: t (1,) as it saw it; x (1, C, h, w); the answer."""

    t: th.Tensor
    x: th.Tensor
    answer: th.Tensor


class Seen(NamedTuple):
    """One image's way: its label, the condition (1,) it was made under, what was asked, where it ended."""

    label: int | None
    cond: dict
    calls: list[Asked]
    end: th.Tensor


class _Listener:
    """A model around a model that remembers what it was asked of some rows of the batch, every so often and last."""

    def __init__(self, model, size: int, rows: list[int]):
        self.model, self.size, self.rows = model, size, rows
        self.heard: list[list[Asked]] = []  # of every remembered call, for each row
        self.last: list[Asked] = []
        self.calls, self.stride = 0, 1

    def __call__(self, x, t, **cond):
        answer = self.model(x, t, **cond)
        if len(x) == self.size:  # a solver that walks images one by one does not say which
            self.last = [Asked(*(value[row : row + 1].clone() for value in (t, x, answer))) for row in self.rows]
            if self.calls % self.stride == 0:
                self.heard.append(self.last)
            if len(self.heard) > REMEMBERED:
                self.heard, self.stride = self.heard[::2], 2 * self.stride
            self.calls += 1
        return answer

    def of(self, place: int) -> list[Asked]:
        """All that is remembered of one of the rows."""
        calls = self.heard if not self.heard or self.heard[-1] is self.last else [*self.heard, self.last]
        return [call[place] for call in calls]


class WatchedSampler:
    """A sampler around a sampler: the same images, and how the first ones of up to four users came about.

    Args:
        sampler: see `assembly.create_sampler`; process, clip_denoised, cond_fn: what it was made with.
    """

    def __init__(self, sampler, process, *, clip_denoised: bool, cond_fn=None):
        self.sampler, self.process = sampler, process
        self.options = {"clip_denoised": clip_denoised, "cond_fn": cond_fn}
        self.seen: list[Seen] = []
        self.batches = 0

    def __call__(self, model, shape, *, model_kwargs=None, **how):
        rows = self._rows(shape[0], (model_kwargs or {}).get("y"))
        self.batches += 1
        listener = _Listener(model, shape[0], rows)
        x = self.sampler(listener if rows else model, shape, model_kwargs=model_kwargs, **how)
        for place, row in enumerate(rows):
            cond = {name: value[row : row + 1] for name, value in (model_kwargs or {}).items()}
            label = int(cond["y"]) if "y" in cond else None
            self.seen.append(Seen(label, cond, listener.of(place), x[row : row + 1].clone()))
        return x

    def _rows(self, size: int, y) -> list[int]:
        """The rows of a batch that show a user for the first time; others' batches may lie between two of a process."""
        if dist_util.world_size() > 1 and self.batches:
            return []
        labels = list(range(size)) if y is None else y.tolist()
        known = {label for label, *_ in self.seen}
        first = [labels.index(label) for label in dict.fromkeys(labels) if label not in known]
        return first[: WALKS - len(self.seen)]

    @th.no_grad()
    def walks(self, vae, class_names: list[str]) -> list[Walk]:
        """What was seen, decoded; the last moment is the finished image.

        Raises:
            UserError: nothing was seen; see `denoiser_of`.
        """
        found = [self._walk(vae, class_names, *seen) for seen in self.seen if seen.calls]
        if not found:
            raise UserError(
                "--sampler dopri5 with --per_image_seed True walks images one by one: leave one of them out"
            )
        return found

    def _walk(self, vae, class_names, label: int | None, cond: dict, calls: list[Asked], end: th.Tensor) -> Walk:
        answers = iter(())
        denoiser = denoiser_of(self.process, lambda x, t, **_: next(answers), model_kwargs=cond, **self.options)
        low, high = sorted(denoiser.interval)
        times = np.linspace(low, high, max(2, round(high - low) + 1))  # between them what the network sees is linear
        at = np.interp([float(call.t) for call in calls], denoiser._seen(times), times)
        alpha, sigma = denoiser.alpha_sigma(at)
        noise = sigma**2 / (alpha**2 + sigma**2)
        last = np.unique(noise[::-1], return_index=True)[1]  # of calls at one time, as Heun's; also where one goes back
        order = (len(noise) - 1 - last)[::-1]
        if len(order) >= MOMENTS:  # evenly, and the last moment is the end
            order = order[np.linspace(0, len(order) - 1, MOMENTS)[:-1].round().astype(int)]
        answers = iter([calls[i].answer for i in order])
        noisy = [calls[i].x for i in order]
        guesses = [denoiser.x_start(x, float(at[i])) for x, i in zip(noisy, order, strict=True)]
        z = th.cat([*noisy, end, *guesses, end]).to(end)
        pixels = to_pixels(vae.decode_batch(z))
        name = "" if label is None else class_names[label]
        return Walk(name, pixels.reshape(2, -1, *pixels.shape[1:]), np.append(noise[order], 0.0))


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw_samples(
    folder, batch: Batch, class_names: list[str], edges: PictureAxes | None, watched: WatchedSampler, vae, say: Say
) -> None:
    """Write `grid_axes.png` and `denoising.png` into the folder of the samples; what prevents one is said in one line.

    Args:
        batch: all images, see `sample_util.join`.
        edges: see `axes_of_run`.
    """
    folder, colours = Path(folder), detect_colormap(batch.pixels)
    say(colours_in_words(colours))
    figures = {
        "grid_axes.png": lambda: draw_grid(*rows_of(batch, class_names), edges, colours),
        "denoising.png": lambda: draw_walks(watched.walks(vae, class_names), colours),
    }
    for name, figure in figures.items():
        or_said(name, lambda name=name, figure=figure: save_figure(figure(), folder / name), say)


def rows_of(batch: Batch, class_names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """The first images of at most 16 users, spread evenly over those there are; without users, images in turn."""
    if batch.labels is None:
        places = range(0, min(len(batch.pixels), GRID_ROWS * GRID_COLUMNS), GRID_COLUMNS)
        return [batch.pixels[i : i + GRID_COLUMNS] for i in places], [f"from {i}" for i in places]
    users = spread(np.unique(batch.labels), GRID_ROWS)
    return [batch.pixels[batch.labels == user][:GRID_COLUMNS] for user in users], [class_names[user] for user in users]


def spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the values, evenly."""
    count = min(most, len(values))
    return values[np.arange(count) * len(values) // max(1, count)]


def draw_latents_of(
    vae, pixels: np.ndarray, labels: np.ndarray, class_names: list[str], path, *, edges=None, say: Say = print
) -> None:
    """Write `latents.png`: what an autoencoder makes of four users' images, and how its latents spread over all.

    The latents are those that a diffusion model is trained on: drawn from the posterior, by a generator of their own.

    Args:
        vae: a `VAEInterface`; pixels: uint8 (N, H, W, 3), of which 256 are encoded; labels: (N,), of `class_names`.
    """
    some = spread(np.arange(len(pixels)), ENCODED)
    shown = [int(some[labels[some] == user][0]) for user in spread(np.unique(labels[some]), LATENT_ROWS)]
    colours = detect_colormap(pixels[some])
    say(colours_in_words(colours))
    images = th.from_numpy(np.stack([image_from_pixels(pixels[i]) for i in (*shown, *some)]))
    z = vae.encode_batch(images.to(dist_util.dev()), generator=th.Generator().manual_seed(0))
    first, values = z[: len(shown)], z[len(shown) :].transpose(0, 1).flatten(1).cpu().numpy()
    decoded, names = to_pixels(vae.decode_batch(first)), [class_names[labels[i]] for i in shown]
    save_figure(draw_latents(pixels[shown], first.cpu().numpy(), decoded, names, values, edges, colours), path)


def draw_extracted(data_dir, image_size: int, vae, path, say: Say) -> None:
    """`draw_latents_of` a folder of images, those that cannot be read left out."""
    folder = list_images(data_dir)
    images = ImageDataset(image_size, folder.paths, random_flip=False)
    read, labels = [], []
    for place in spread(np.arange(len(folder.paths)), ENCODED):
        try:
            read.append(((images[place][0] + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0))
        except UserError:
            continue  # the extraction has said it
        labels.append(folder.labels[place])
    about = np.stack(read), np.array(labels), folder.class_names, path
    draw_latents_of(vae, *about, edges=find_axes(data_dir), say=say)
