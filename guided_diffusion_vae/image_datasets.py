"""What a training loop is fed: `(batch, cond)` for ever, in an order that needs no memory.

Sample number `i` of the stream is image `permutation(seed, i // N)[i % N]` of N; step `s` with `G` samples over all
processes takes the numbers `s G ... (s + 1) G - 1`, and process `r` its slice of them. So the order depends on (seed,
step) alone: a resumed run only calls `seek(step)`, two processes with batch b see what one with 2b sees, and a folder
smaller than the batch wraps around. Random numbers of a step are drawn for all its slots and sliced in the same way.
"""

import contextlib
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import dist_util
from .checkpoint import atomic_write
from .config import UserError
from .data.image_folder import ImageFolder, image_from_pixels, list_files, list_images, read_rgb, refuse
from .data.latent_shards import LatentShards, find_shards
from .vae_wrapper import warn_unless_unit_variance

ENCODE_BATCH = 32
PARTS = {"train", "val", "valid", "validation", "test"}  # names of folders that hold no person


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


# ---- the stream ------------------------------------------------------------------------------------------------------


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers (SeedSequence hashing: nearby inputs give unrelated seeds)."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def slot_randn(shape, *, seed: int, step: int, use: int, device="cpu") -> th.Tensor:
    """This process's slice of one step's normal numbers, the same however many processes share the step.

    Args:
        shape: (N, ...) of this process.
        use: what the numbers are for (a small integer), so that two uses in one step are independent.
    """
    n, (rank, size) = shape[0], (dist_util.rank(), dist_util.world_size())
    generator = th.Generator(device=device).manual_seed(mix(seed, step, use))
    return th.randn((n * size, *shape[1:]), generator=generator, device=device)[rank * n : (rank + 1) * n]


class Order(Dataset):
    """A dataset read by stream position instead of by index; augmentation is seeded by the position, too."""

    def __init__(self, dataset: Dataset, *, seed: int, shuffle: bool):
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self._epoch, self._order = -1, None

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch]).permutation(len(self.dataset))
        return int(self._order[place])

    def __getitem__(self, position: int):
        if not getattr(self.dataset, "draws", True):  # it asks for no random number, and seeding costs more than a row
            return self.dataset[self.index(position)]
        state = random.getstate()
        random.seed(mix(self.seed, position))
        try:
            return self.dataset[self.index(position)]
        finally:
            random.setstate(state)


class BatchStream(Iterator):
    """Endless batches of a dataset for this process; `seek(step)` goes to any step at once."""

    def __init__(self, dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_workers: int = 0):
        if batch_size < 1:
            raise UserError(f"--batch_size is {batch_size}; it must be at least 1")
        self.order = Order(dataset, seed=seed, shuffle=shuffle)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.num_samples = len(dataset)
        self.seek(0)

    def positions(self, step: int) -> Iterator[list[int]]:
        """The stream positions of this process's batches, from a step on."""
        while True:
            first = (step * dist_util.world_size() + dist_util.rank()) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1

    def seek(self, step: int) -> None:
        """Continue with the batch of this step (0 = first)."""
        self.step = step
        self._batches = None

    def __next__(self):
        if self._batches is None:
            loader = DataLoader(self.order, batch_sampler=self.positions(self.step), num_workers=self.num_workers)
            self._batches = iter(loader)
        self.step += 1
        try:
            return next(self._batches)
        except UserError as error:  # a worker's comes with its whole traceback in the text
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None


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
    if set(folder.class_names) <= PARTS:
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


def who(folder: ImageFolder | LatentShards) -> str:
    """How many classes, the first few by name, and how many each has."""
    counts = np.bincount(folder.labels, minlength=len(folder.class_names))
    shown = ", ".join(f"{name} ({n})" for name, n in list(zip(folder.class_names, counts, strict=True))[:4])
    more = f", ... {folder.class_names[-1]} ({counts[-1]})" if len(counts) > 4 else ""
    return f"{len(counts)} classes: {shown}{more}"


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
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), resample=Image.Resampling.BOX)
    scale = shorter_side / min(pil_image.size)
    size = tuple(round(side * scale) for side in pil_image.size)
    return np.array(pil_image.resize(size, resample=Image.Resampling.BICUBIC))


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
    say=print,
):
    """Endless `(z, cond)`: model latents (N, C, h, w) of unit variance, and `{"y": labels}` if `class_cond`.

    Collective: call on every process. With `cache_latents` the images are encoded once (posterior mean and standard
    deviation, float32) into `.latents/` beside them and read memory-mapped; otherwise every batch is encoded anew.
    Both give the same numbers for the same seed. With `--vae_path pixel` there is nothing to encode or cache. Where
    `data_dir` holds extracted latents instead of images, they are read as they are stored: one draw of the posterior.

    Returns:
        a `LatentStream`; its `class_names` is the list that labels refer to, its `num_samples` the length of the data.
    Raises:
        UserError: see `list_images`; unreadable images; a cache, or latents, that another autoencoder made.
    """
    options = {"seed": seed, "shuffle": not deterministic}
    files = find_shards(data_dir)
    if files:
        shards = open_latents(files, data_dir, vae, image_size, say, random_flip=random_flip)
        if class_cond:
            check_classes(shards, data_dir)
        stream = BatchStream(shards, batch_size, **options)
        return LatentStream(stream, vae, class_cond=class_cond, class_names=shards.class_names, say=say)
    folder = list_images(data_dir)
    if class_cond:
        check_classes(folder, data_dir)
    elif set(folder.class_names) <= PARTS:
        say(f"warning: --data_dir {data_dir} holds the parts {', '.join(folder.class_names)}: held-out images are in")
    vae.latent_shape(image_size)  # complains here, in one line, about a size that the autoencoder cannot halve
    if skip_bad_images:
        folder = drop_bad_images(folder, say)
    say(dist_util.rank0_first(lambda: describe(folder, data_dir, image_size)))
    dataset = ImageDataset(image_size, folder.paths, classes=folder.labels, random_flip=random_flip)
    if cache_latents and not vae.is_pixel:
        if random_flip:
            raise UserError("--random_flip True needs --cache_latents False: cached latents cannot be mirrored")
        dataset = cached_moments(dataset, folder, vae, Path(data_dir), latent_cache, say)
    images = BatchStream(
        dataset,
        batch_size,
        num_workers=0 if isinstance(dataset, MomentsDataset) else num_workers,
        **options,
    )
    return LatentStream(images, vae, class_cond=class_cond, class_names=folder.class_names, say=say)


class LatentStream(Iterator):
    """Turns a stream of images, cached moments or extracted latents into model latents on this process's device."""

    POSTERIOR = 1  # the use number of posterior noise, see slot_randn

    def __init__(self, images: BatchStream, vae, *, class_cond: bool, class_names: list[str], say=print):
        self.images, self.vae, self.class_cond, self.class_names = images, vae, class_cond, class_names
        self.num_samples, self.say = images.num_samples, say

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
            z = z + std * slot_randn(
                z.shape, seed=self.images.order.seed, step=step, use=self.POSTERIOR, device=z.device
            )
        if self.say:
            warn_unless_unit_variance(z, self.say)
            self.say = None  # once is enough
        return z, cond


def posterior_of(batch: th.Tensor, dataset: Dataset, vae) -> tuple[th.Tensor, th.Tensor | None]:
    """Mean and standard deviation, as model latents, of a batch of a dataset; None for what is drawn or certain."""
    if vae.is_pixel:
        return batch, None
    if isinstance(dataset, LatentShards):
        return vae.latent_scale.to_model(batch), None
    moments = batch if isinstance(dataset, MomentsDataset) else vae.encode_moments(batch)
    mean, std = moments.chunk(2, dim=1)
    return mean, std


class MomentsDataset(Dataset):
    """Cached posterior moments, (N, 2C, h, w) float32, memory-mapped."""

    draws = False

    def __init__(self, path: Path, labels: list[int]):
        self.moments, self.labels = np.load(path, mmap_mode="r"), labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return np.array(self.moments[index]), {"y": np.array(self.labels[index], dtype=np.int64)}


def drop_bad_images(folder: ImageFolder, say) -> ImageFolder:
    """Collective: call on every process. Leave out the images that cannot be read, and say which."""
    mine = range(dist_util.rank(), len(folder.paths), dist_util.world_size())
    bad = {}
    for part in dist_util.gather_objects(_unreadable(folder.paths, mine)):
        bad.update(part)
    if not bad:
        return folder
    say(f"left out {len(bad)} of {len(folder.paths)} images: " + "; ".join(list(bad.values())[:5]))
    keep = [i for i in range(len(folder.paths)) if i not in bad]
    if not keep:
        refuse(list(bad.values()), len(folder.paths))
    return folder._replace(paths=[folder.paths[i] for i in keep], labels=[folder.labels[i] for i in keep])


def _unreadable(paths, indices) -> dict[int, str]:
    bad = {}
    for i in indices:
        try:
            read_rgb(paths[i])
        except UserError as error:
            bad[i] = str(error)
    return bad


def cached_moments(images: ImageDataset, folder: ImageFolder, vae, data_dir: Path, cache: str, say) -> MomentsDataset:
    """Collective: call on every process. The cached moments of these images; encoded now if not there or outdated."""
    place = Path(cache) if cache else data_dir / ".latents" / f"{vae.fingerprint}-{images.resolution}"
    wanted = cache_index(folder, vae, images.resolution, data_dir)
    if not dist_util.rank0_first(lambda: cache_is_current(place, wanted, named=bool(cache))):
        encode_folder(images, vae, place, wanted, say)
    say(f"reading cached latents from {place}")
    return MomentsDataset(place / "moments.npy", folder.labels)


def cache_index(folder: ImageFolder, vae, image_size: int, data_dir: Path) -> dict:
    """What a cache was made from: the autoencoder, the size, and each file with its length and time."""
    files = [(os.path.relpath(path, data_dir), os.stat(path)) for path in folder.paths]
    return {
        "autoencoder": vae.fingerprint,
        "image_size": image_size,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }


def cache_is_current(place: Path, wanted: dict, *, named: bool) -> bool:
    """Whether `place` holds these images' latents; a named cache of another autoencoder is an error, not a rebuild."""
    try:
        found = json.loads((place / "index.json").read_text())
    except (OSError, ValueError):
        return False
    if named and (found["autoencoder"], found["image_size"]) != (wanted["autoencoder"], wanted["image_size"]):
        raise UserError(
            f"--latent_cache {place} was encoded with autoencoder {found['autoencoder']} at {found['image_size']} px;"
            f" this run's is {wanted['autoencoder']} at {wanted['image_size']} px:"
            " give the --vae_path and --image_size it was made with, or another folder"
        )
    return found == wanted and (place / "moments.npy").is_file()


def encode_folder(images: ImageDataset, vae, place: Path, index: dict, say) -> None:
    """Collective: call on every process. Encode every image once; each process writes its share of one array."""
    shape = (len(images), 2 * vae.latent_channels, *vae.latent_shape(images.resolution)[1:])
    say(f"encoding {shape[0]} images once into {place}")
    partial = place / "moments.partial.npy"
    dist_util.rank0_first(lambda: _create_array(partial, shape))
    moments = np.lib.format.open_memmap(partial, mode="r+")
    mine = list(range(dist_util.rank(), len(images), dist_util.world_size()))
    bad = []
    bar = tqdm(range(0, len(mine), ENCODE_BATCH), "encoding", disable=dist_util.rank() > 0, leave=False, delay=2)
    for first in bar:
        batch, kept = [], []
        for i in mine[first : first + ENCODE_BATCH]:
            try:
                batch.append(images[i][0])
                kept.append(i)
            except UserError as error:
                bad.append(str(error))
        if batch:
            moments[kept] = vae.encode_moments(th.from_numpy(np.stack(batch)).to(dist_util.dev())).cpu().numpy()
    moments.flush()
    refuse(sorted(sum(dist_util.gather_objects(bad), [])), len(images))
    dist_util.rank0_first(lambda: _commit(partial, place, index))


def _create_array(path: Path, shape) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "index.json").unlink(missing_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk must fail here: later it would be a bus error in the mapping
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        why = error.strerror or error
        raise UserError(f"cannot write the latents to {path.parent} ({why}): give --latent_cache DIR") from error


def _commit(partial: Path, place: Path, index: dict) -> None:
    os.replace(partial, place / "moments.npy")
    with atomic_write(place / "index.json") as handle:
        handle.write(json.dumps(index).encode())


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
    say(f"{len(shards)} extracted latents of {who(shards)}")
    if not shards.autoencoder:
        say(f"{data_dir} does not say which autoencoder made its latents: --vae_path cannot be checked against it")
    return shards


# ---- held-out data ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def speaking_of(flag: str):
    """Errors of the block name this flag where they would name `--data_dir`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--data_dir", flag)) from error


class HeldOut:
    """Data that a run is judged by: any rows of it, always the same."""

    def __init__(self, dataset: Dataset, labels: np.ndarray | None, vae):
        self.dataset, self.labels, self.vae = dataset, labels, vae

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Model latents (n, C, h, w) float32 of some rows: the posterior's mean, or what was extracted."""
        rows = np.stack([self.dataset[int(i)][0] for i in indices])
        z, _ = posterior_of(th.from_numpy(rows).to(dist_util.dev()), self.dataset, self.vae)
        if self.labels is None:
            return z, {}
        return z, {"y": th.from_numpy(self.labels[[int(i) for i in indices]]).to(z.device)}


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
        files = find_shards(data_dir, "val")
        if files:
            dataset = found = open_latents(files, data_dir, vae, image_size, lambda line: say(f"held out: {line}"))
        else:
            found = list_images(data_dir)
            vae.latent_shape(image_size)
            if skip_bad_images:
                found = drop_bad_images(found, say)
            say(f"held out: {dist_util.rank0_first(lambda: describe(found, data_dir, image_size))}")
            dataset = ImageDataset(image_size, found.paths, classes=found.labels, random_flip=False)
        labels = labels_in(class_names, found, data_dir) if class_cond else None
        if isinstance(dataset, ImageDataset) and cache_latents and not vae.is_pixel:
            cache = str(Path(latent_cache) / "heldout") if latent_cache else ""  # beside that of the training images
            dataset = cached_moments(dataset, found, vae, Path(data_dir), cache, say)
        return HeldOut(dataset, labels, vae)


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
