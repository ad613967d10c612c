"""What a training loop is fed: `(batch, cond)` for ever, of images or of latents, in the order that `data.stream` has.

Latents come from images that are encoded once and cached, or at every batch, or from extracted ones; whichever it is,
the loop sees model latents of unit variance and the labels of one class list.
"""

import contextlib
import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import Dataset

from . import dist_util
from .config import UserError
from .data.image_folder import ImageFolder, image_from_pixels, list_files, list_images, read_rgb
from .data.latent_cache import MomentsDataset, cached_moments, drop_bad_images
from .data.latent_shards import LatentShards, find_shards
from .data.stream import POSTERIOR, SEEN, BatchStream, Rows, mix, slot_randn
from .vae_wrapper import warn_unless_unit_variance

PARTS = "train", "training", "val", "valid", "validation", "test", "heldout"  # names of folders that hold no person


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they become batches."""

    # folder of images: a subfolder for each user, or upstream's name_rest.png; or what scripts/latent_extract.py wrote
    data_dir: str = ""
    cache_latents: bool = True  # encode once and read latents from disk; False encodes every batch anew
    latent_cache: str = ""  # folder for the cached latents; empty: .latents inside data_dir
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing to start
    # mirror half of the images; False for spectrograms, because mirrored time or Doppler is another gait
    random_flip: bool = False
    num_workers: int = 1  # processes that read images when latents are not cached
    class_balance: bool = False  # train on every user equally often, however many images there are (with class_cond)


# ---- images ----------------------------------------------------------------------------------------------------------


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    random_crop=False,
    random_flip=True,
    seed=None,
    num_workers=1,
):
    """Endless `(images, cond)`: images (N, 3, H, W) float32 in [-1, 1]; cond holds `y` (N,) int64 if `class_cond`.

    Args:
        data_dir: see `data.image_folder.list_images` for the two layouts.
        deterministic: in the order of the files, without shuffling.
        seed: order and augmentation follow it; None draws one from Python's generator, on rank 0.
    """
    if seed is None:
        seed = dist_util.rank0_first(lambda: random.getrandbits(31))
    folder = list_images(data_dir)
    dataset = ImageDataset(
        image_size,
        folder.paths,
        classes=check_classes(folder, data_dir).labels if class_cond else None,
        random_crop=random_crop,
        random_flip=random_flip,
    )
    return BatchStream(dataset, batch_size, seed=seed, shuffle=not deterministic, num_workers=num_workers)


def check_classes(folder: ImageFolder | LatentShards, data_dir):
    """Refuse to condition on a class when there is only one.

    Raises:
        UserError: fewer than two classes.
    """
    if len(folder.class_names) < 2:
        raise UserError(
            f"--class_cond True, but all images of --data_dir {data_dir} are of one class ({folder.class_names[0]}): a"
            " class is a subfolder, or what stands before the first _ of the names; give several, or --class_cond False"
        )
    if set(folder.class_names) <= set(PARTS):
        raise UserError(
            f"--data_dir {data_dir} holds the parts {', '.join(folder.class_names)}, not users:"
            f" give {Path(data_dir) / 'train'}"
        )
    return folder


def describe(folder: ImageFolder, data_dir, image_size: int) -> str:
    """One line on what was found: how many images of whom, and what becomes of their size."""
    line = f"{len(folder.paths)} images of {who(folder)}"
    with contextlib.suppress(UserError):  # unreadable images are named later, all at once
        width, height = read_rgb(folder.paths[0]).size
        line += "" if width == height == image_size else f"; {width} x {height} pixels, scaled to {image_size}"
    folders = {path.name for path in Path(data_dir).iterdir() if path.is_dir() and not path.name.startswith(".")}
    empty = sorted(folders - set(folder.class_names)) if folders & set(folder.class_names) else []
    return line + (f"; no images in {', '.join(empty)}" if empty else "")


def who(folder: Any) -> str:
    """Of what has `labels` and `class_names`: how many classes, the first few by name, and how many each has."""
    counts = count_users(folder)
    shown = [f"{name} ({n})" for name, n in counts.items()]
    more = f", ... {shown[-1]}" if len(counts) > 4 else ""
    return f"{len(counts)} class{'es' * (len(counts) > 1)}: {', '.join(shown[:4])}{more}"


def count_users(folder: Any) -> dict[str, int]:
    """How many images each class has."""
    counts = np.bincount(folder.labels, minlength=len(folder.class_names))
    return {name: int(n) for name, n in zip(folder.class_names, counts, strict=True)}


def describe_counts(images_per_user: dict[str, int]) -> str:
    """One line on how even the users are: min, median and max of their images, and who has fewest."""
    counts = sorted(images_per_user.values())
    fewest = [f"{name} ({n})" for name, n in sorted(images_per_user.items(), key=lambda pair: pair[1])][:4]
    shown = f"min {counts[0]}, median {np.median(counts):g}, max {counts[-1]}"
    return f"images per user: {shown}; fewest: {', '.join(fewest)}"


def _list_image_files_recursively(data_dir):
    return [str(path) for path in list_files(Path(data_dir))]


class ImageDataset(Dataset):
    """Images as float32 CHW arrays in [-1, 1] with `{"y": label}` if there are classes."""

    def __init__(
        self, resolution, image_paths, classes=None, shard=0, num_shards=1, random_crop=False, random_flip=True
    ):
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        image = read_rgb(self.local_images[idx])
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(image, self.resolution)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        label = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return image_from_pixels(pixels), label


def _scaled(pil_image: Image.Image, shorter_side: int) -> np.ndarray:
    """Scale so that the shorter side has this length: box filter by halves first, then bicubic."""
    while min(pil_image.size) >= 2 * shorter_side:
        width, height = pil_image.size
        pil_image = pil_image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = shorter_side / min(pil_image.size)
    width, height = (round(side * scale) for side in pil_image.size)
    return np.array(pil_image.resize((width, height), resample=Image.Resampling.BICUBIC))


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """Scale the shorter side to `image_size` and cut out the middle square: uint8 (H, W, 3)."""
    pixels = _scaled(pil_image, image_size)
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0) -> np.ndarray:
    """Scale the shorter side to a random length and cut out a random square: uint8 (H, W, 3)."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = _scaled(pil_image, random.randrange(smallest, largest + 1))
    top, left = (random.randrange(side - image_size + 1) for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


# ---- latents ---------------------------------------------------------------------------------------------------------


def load_data_with_vae(
    *,
    data_dir,
    batch_size,
    image_size,
    vae,
    class_cond=False,
    deterministic=False,
    random_flip=False,
    seed=0,
    cache_latents=True,
    latent_cache="",
    skip_bad_images=False,
    num_workers=1,
    class_balance=False,
    say=print,
):
    """Endless `(z, cond)`: model latents (N, C, h, w) of unit variance, and `{"y": labels}` if `class_cond`.

    Collective: call on every process. With `cache_latents` the images are encoded once (posterior mean and standard
    deviation, float32) into `.latents/` beside them and read memory-mapped; otherwise every batch is encoded anew.
    Both give the same numbers for the same seed. With `--vae_path pixel` there is nothing to encode or cache. Where
    `data_dir` holds extracted latents instead of images, they are read as they are stored: one draw of the posterior,
    or its mean, whatever `--sample_posterior` says.

    Returns:
        a `LatentStream`; its `class_names` is the list that labels refer to, its `num_samples` the length of the data.
    Raises:
        UserError: see `list_images`; unreadable images; a cache, or latents, that another autoencoder made.
    """
    options = {"seed": seed, "shuffle": not deterministic}
    how = {"class_cond": class_cond, "class_balance": class_balance, "cache_latents": cache_latents}
    folder = find_data(data_dir, image_size, vae, **how, random_flip=random_flip, say=say)
    if isinstance(folder, LatentShards):
        options |= {"labels": np.asarray(folder.labels) if class_balance else None}
        stream = BatchStream(folder, batch_size, **options)
        return LatentStream(stream, vae, class_cond=class_cond, found=folder, say=say)
    if skip_bad_images:
        folder = drop_bad_images(folder, say)
    say(dist_util.rank0_first(lambda: describe(folder, data_dir, image_size)))
    dataset = ImageDataset(image_size, folder.paths, classes=folder.labels, random_flip=random_flip)
    if cache_latents and not vae.is_pixel:
        dataset = cached_moments(dataset, folder, vae, Path(data_dir), latent_cache, say)
    images = BatchStream(
        dataset,
        batch_size,
        num_workers=0 if isinstance(dataset, MomentsDataset) else num_workers,
        labels=np.asarray(folder.labels) if class_balance else None,
        **options,
    )
    return LatentStream(images, vae, class_cond=class_cond, found=folder, say=say)


def find_data(
    data_dir,
    image_size,
    vae,
    *,
    class_cond: bool,
    class_balance=False,
    random_flip=False,
    cache_latents=False,
    say=print,
) -> ImageFolder | LatentShards:
    """The images, or the extracted latents, of a run, with all checks that need no image to be read.

    Raises:
        UserError: see `list_images`; latents of another autoencoder; users to condition on, but fewer than two; flags
            that exclude each other.
    """
    if class_balance and not class_cond:
        raise UserError("--class_balance True needs users to balance: give --class_cond True, or leave it out")
    files = find_shards(data_dir)
    if files:
        shards = open_latents(files, data_dir, vae, image_size, say, random_flip=random_flip)
        if class_cond:
            check_classes(shards, data_dir)
        if not vae.sample_posterior and shards.posterior != "mean":
            what = "the rows are draws" if shards.posterior else "it does not say whether the rows are draws"
            say(f"warning: --sample_posterior False changes nothing in {data_dir}: {what} of the posterior, as stored")
        return shards
    folder = list_images(data_dir)
    if class_cond:
        check_classes(folder, data_dir)
    else:
        warn_of_parts(folder, data_dir, say)
    vae.latent_shape(image_size)  # complains here, in one line, about a size that the autoencoder cannot halve
    if cache_latents and random_flip and not vae.is_pixel:
        raise UserError("--random_flip True needs --cache_latents False: cached latents cannot be mirrored")
    return folder


def warn_of_parts(folder: ImageFolder, data_dir, say) -> None:
    """Say so if the classes of a folder are train, val and test."""
    if set(folder.class_names) <= set(PARTS):
        say(f"warning: --data_dir {data_dir} holds the parts {', '.join(folder.class_names)}: held-out images are in")


class LatentStream(Iterator):
    """Turns a stream of images, cached moments or extracted latents into model latents on this process's device."""

    def __init__(self, images: BatchStream, vae, *, class_cond: bool, found: ImageFolder | LatentShards, say=print):
        self.images, self.vae, self.class_cond, self.class_names = images, vae, class_cond, found.class_names
        self.num_samples, self.say = images.num_samples, say
        self.labels = np.asarray(found.labels, dtype=np.int64) if class_cond else None
        self.images_per_user = count_users(found) if class_cond else {}
        if class_cond and say:
            say(describe_counts(self.images_per_user))

    def seek(self, step: int) -> None:
        """Continue with the batch of this step (0 = first)."""
        self.images.seek(step)

    def __next__(self):
        step = self.images.step
        batch, labels = next(self.images)
        batch = batch.to(dist_util.dev(), non_blocking=True)
        cond = {"y": labels["y"]} if self.class_cond else {}
        if self.vae.is_pixel:
            return batch, cond
        z, std = posterior_of(batch, self.images.order.dataset, self.vae)
        if self.vae.sample_posterior and std is not None:
            z = z + std * slot_randn(z.shape, seed=self.images.order.seed, step=step, use=POSTERIOR, device=z.device)
        if self.say:
            warn_unless_unit_variance(z, self.say)
            self.say = None  # once is enough
        return z, cond

    def rows(self, count: int, *, seed: int) -> "HeldOut":
        """At most so many rows, a seeded choice, none mirrored, in the form in which held-out data are judged."""
        dataset: Any = copy.copy(self.images.order.dataset)
        dataset.random_flip = False
        chosen = np.random.default_rng(mix(seed, SEEN)).permutation(len(dataset))[:count]
        return HeldOut(dataset, self.labels, self.vae, chosen)


def posterior_of(batch: th.Tensor, dataset: Rows, vae) -> tuple[th.Tensor, th.Tensor | None]:
    """Mean and standard deviation, as model latents, of a batch of a dataset; None for what is drawn or certain."""
    if vae.is_pixel:
        return batch, None
    if isinstance(dataset, LatentShards):
        return vae.latent_scale.to_model(batch), None
    moments = batch if isinstance(dataset, MomentsDataset) else vae.encode_moments(batch)
    mean, std = moments.chunk(2, dim=1)
    return mean, std


# ---- extracted latents -----------------------------------------------------------------------------------------------


def open_latents(files: list[Path], data_dir, vae, image_size: int, say, *, random_flip=False) -> LatentShards:
    """Extracted latents, checked against the autoencoder and the size of this run.

    Raises:
        UserError: see `LatentShards`; latents of another autoencoder or size.
    """
    shards = LatentShards(files, random_flip=random_flip)
    again = "or extract them again with scripts/latent_extract.py"
    if shards.autoencoder and shards.autoencoder != vae.weights_fingerprint:
        raise UserError(
            f"--data_dir {data_dir} holds latents of the autoencoder {shards.autoencoder}, but --vae_path"
            f" {vae.vae_path} is {vae.weights_fingerprint}: give the one they were extracted with, {again}"
        )
    if shards.image_size not in (None, image_size):
        raise UserError(
            f"--data_dir {data_dir} holds latents of images of {shards.image_size} pixels, but --image_size is"
            f" {image_size}: give {shards.image_size}, {again}"
        )
    if shards.latent_shape != vae.latent_shape(image_size):
        raise UserError(
            f"--data_dir {data_dir} holds latents {shards.latent_shape}, but --vae_path {vae.vae_path} at --image_size"
            f" {image_size} makes {vae.latent_shape(image_size)}: give what they were extracted with, {again}"
        )
    means = "; each is its posterior's mean" if shards.posterior == "mean" else ""
    say(f"{len(shards)} extracted latents of {who(shards)}{means}")
    if not shards.autoencoder:
        say(f"{data_dir} does not say which autoencoder made its latents: --vae_path cannot be checked against it")
    return shards


# ---- held-out data ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def speaking_of(flag: str, instead_of: str = "--data_dir"):
    """Errors of the block name this flag where they would name another."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(instead_of, flag)) from error


class HeldOut:
    """Data that a run is judged by: any rows of it, always the same.

    Args:
        labels: of all of the dataset.
        chosen: the indices of the rows that count; None is all.
    """

    def __init__(self, dataset: Rows, labels: np.ndarray | None, vae, chosen: np.ndarray | None = None):
        self.dataset, self.labels, self.vae = dataset, labels, vae
        self.chosen = np.arange(len(dataset)) if chosen is None else chosen

    def __len__(self):
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Model latents (n, C, h, w) float32 of some rows: the posterior's mean, or what was extracted."""
        chosen = self.chosen[[int(i) for i in indices]]
        rows = np.stack([self.dataset[int(i)][0] for i in chosen])
        z, _ = posterior_of(th.from_numpy(rows).to(dist_util.dev()), self.dataset, self.vae)
        return z, {} if self.labels is None else {"y": th.from_numpy(self.labels[chosen]).to(z.device)}


def load_heldout(
    *,
    data_dir,
    image_size,
    vae,
    class_cond,
    class_names,
    cache_latents=True,
    latent_cache="",
    skip_bad_images=False,
    say=print,
) -> HeldOut:
    """Collective: call on every process. Images or extracted latents (of two files val.safetensors) to judge a run by.

    Args:
        data_dir: what `--val_dir` names.
        class_names: of the training run; labels are numbers in this list.
    Raises:
        UserError: see `load_data_with_vae`; a class that the run does not know.
    """
    with speaking_of("--val_dir"):
        found = find_heldout(data_dir, image_size, vae, say)
        if isinstance(found, ImageFolder):
            found = drop_bad_images(found, say) if skip_bad_images else found
            say(f"held out: {dist_util.rank0_first(lambda: describe(found, data_dir, image_size))}")
        labels = labels_in(class_names, found, data_dir) if class_cond else None
        if isinstance(found, LatentShards):
            return HeldOut(found, labels, vae)
        dataset = ImageDataset(image_size, found.paths, classes=found.labels, random_flip=False)
        if cache_latents and not vae.is_pixel:
            cache = str(Path(latent_cache) / "heldout") if latent_cache else ""  # beside that of the training images
            dataset = cached_moments(dataset, found, vae, Path(data_dir), cache, say)
        return HeldOut(dataset, labels, vae)


def find_heldout(data_dir, image_size, vae, say=print) -> ImageFolder | LatentShards:
    """As `find_data`, of held-out data.

    Raises:
        UserError: see `list_images`; latents of another autoencoder.
    """
    files = find_shards(data_dir, "val")
    if files:
        return open_latents(files, data_dir, vae, image_size, lambda line: say(f"held out: {line}"))
    vae.latent_shape(image_size)
    return list_images(data_dir)


def rehearse_data(
    data_dir, val_dir, image_size, vae, *, class_cond: bool, flag="--val_dir", say=dist_util.print_comment, **how
) -> None:
    """What a dry run says of its data, and refuses as the run would. Not collective; without a data_dir, nothing.

    Args:
        flag: what names the held-out data.
        how: more of `find_data`'s.
    Raises:
        UserError: see `find_data` and `find_heldout`; held-out data of a class that the training does not know.
    """
    if not data_dir:
        return
    found = find_data(data_dir, image_size, vae, class_cond=class_cond, say=say, **how)
    if isinstance(found, ImageFolder):
        say(describe(found, data_dir, image_size))
    if not val_dir:
        return
    with speaking_of(flag):
        heldout = find_heldout(val_dir, image_size, vae, say)
        if isinstance(heldout, ImageFolder):
            say(f"held out: {describe(heldout, val_dir, image_size)}")
        if class_cond:
            labels_in(found.class_names, heldout, val_dir)


def labels_in(class_names: list[str], found: ImageFolder | LatentShards, data_dir) -> np.ndarray:
    """The labels of what was found as numbers in another list of classes.

    Raises:
        UserError: a class that the list does not have.
    """
    number = {name: place for place, name in enumerate(class_names)}
    labels = np.asarray(found.labels, dtype=np.int64)
    unknown = [found.class_names[i] for i in np.unique(labels) if found.class_names[i] not in number]
    if unknown:
        raise UserError(
            f"--data_dir {data_dir} holds the class {unknown[0]}, which the training run does not know"
            f" ({class_names[0]} ... {class_names[-1]}): leave it out, or give the data of the same classes"
        )
    return np.array([number.get(name, -1) for name in found.class_names], dtype=np.int64)[labels]
