"""Folders of images become folders of latents, once: the writing half of `latent_shards`.

Shard k holds the rows k S ... (k + 1) S - 1 of the sorted images whatever the number of processes, and the noise of row
i is seeded by (seed, i): two processes write what one writes. A shard is whole or absent and tells which images it was
made of, so what an interrupted extraction has finished is kept and what is outdated is encoded again.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import checkpoint, dist_util
from ..config import UserError, refuse_below
from ..folder_lock import hold, make_folder, release
from ..image_datasets import ImageDataset, describe, speaking_of, warn_of_parts
from ..vae_wrapper import stats_file
from .image_folder import ImageFolder, list_images, refuse
from .latent_cache import cache_index, drop_bad_images
from .latent_shards import SCRIPT, SHARD_NAME, TYPES, open_shard, read_header, write_safetensors
from .stream import EXTRACTED, EXTRACTED_FLIP, mix

CHUNK = 1024  # rows at a time where all are read
MAY_DIFFER = {"device", "scale_factor"}  # metadata that raw latents do not depend on
LAYOUTS = ("shards", "two_files")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What is extracted, and where it goes."""

    data_dir: str = ""  # folder of images: a subfolder for each user, or upstream's name_rest.png
    val_dir: str = ""  # folder of held-out images, extracted too; empty: none
    out_dir: str = ""  # folder for the latents; with --val_dir they go into its subfolders train and val
    image_size: int = 64  # side of the images in pixels
    # shards: as LightningDiT reads them; two_files: train.safetensors and val.safetensors in out_dir
    layout: str = "shards"
    shard_size: int = 10_000  # rows a shard; a process writes whole shards, so give rows / processes for small data
    # encode the mirrored images, too; False for spectrograms, because mirrored time or Doppler is another gait
    with_flips: bool = False
    batch_size: int = 32  # images encoded at a time
    seed: int = 0  # of the posterior's noise
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing
    num_workers: int = 0  # processes that read images for each process that encodes

    def __post_init__(self):
        refuse_below(self, 1, "image_size", "shard_size", "batch_size")
        refuse_below(self, 0, "num_workers")
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout is {self.layout!r}; choose {' or '.join(LAYOUTS)}")


# ---- images to rows --------------------------------------------------------------------------------------------------


def extract_latents(config: ExtractConfig, vae, *, say=print) -> None:
    """Collective: call on every process. Encode folders of images once, into the files of `data.latent_shards`.

    Row i is a sample of image i's posterior (with `--sample_posterior False` its mean), its noise seeded by (seed, i):
    the same rows for any number of processes and after any interruption. What is finished is kept.

    Raises:
        UserError: no images, or some that cannot be read; `--out_dir` holds latents of another autoencoder or size, or
            another extraction writes there.
        SaveError: the disk is full; the same command goes on.
    """
    if vae.is_pixel:
        raise UserError("--vae_path is pixel, which has no latents to extract; give an autoencoder")
    if not config.out_dir:
        raise UserError("--out_dir is empty; give a folder for the latents")
    vae.latent_shape(config.image_size)  # complains in one line about a size that the autoencoder cannot halve
    try:
        _extract_part("train", config.data_dir, config, vae, say)
        if config.val_dir:
            with speaking_of("--val_dir"):
                _extract_part("val", config.val_dir, config, vae, say)
    finally:
        release(config.out_dir)


def rehearse_extraction(config: ExtractConfig, say=dist_util.print_comment) -> None:
    """What a dry run says of its data, and refuses as the extraction would; not collective.

    Raises:
        UserError: no such folders, or no images in them.
    """
    for flag, place in (("--data_dir", config.data_dir), ("--val_dir", config.val_dir)):
        if place:
            with speaking_of(flag):
                say(describe(_find_part(place, say), place, config.image_size))


def _find_part(data_dir, say) -> ImageFolder:
    folder = list_images(data_dir)
    warn_of_parts(folder, data_dir, say)
    return folder


def _extract_part(name: str, data_dir, config: ExtractConfig, vae, say) -> None:
    folder = _find_part(data_dir, say)
    if config.skip_bad_images:
        folder = drop_bad_images(folder, say)
    say(dist_util.rank0_first(lambda: describe(folder, data_dir, config.image_size)))
    files = dist_util.rank0_first(lambda: cache_index(folder, vae, config.image_size, Path(data_dir))["files"])
    about = {
        "autoencoder": vae.weights_fingerprint,
        "class_names": json.dumps(folder.class_names),
        "scale_factor": json.dumps(vae.scale_factor),
        "image_size": str(config.image_size),
        "flipped": json.dumps(config.with_flips),
        "posterior": "sample" if vae.sample_posterior else "mean",
        "seed": str(config.seed),
    }
    part = Part(np.array(folder.labels), [json.dumps(file) for file in files], about)
    images = ImageDataset(config.image_size, folder.paths, random_flip=False)
    begin = time.monotonic()
    dist_util.rank0_first(lambda: hold(config.out_dir, "--out_dir"))  # only now: a slip leaves no folder behind
    written, done = write_part(
        Path(config.out_dir), name, part, config, lambda rows, bar: encode_rows(images, rows, vae, config, bar), say
    )
    seconds = time.monotonic() - begin
    say(dist_util.rank0_first(lambda: _finish(name, written, done, seconds, folder, vae, config)))


def _finish(name, written, done, seconds, folder: ImageFolder, vae, config: ExtractConfig) -> str:
    """Write the statistics and say in one line what there is; of two files, the statistics are those of train."""
    own_stats = config.layout == "shards" or name == "train"
    mean, std = write_stats(written) if own_stats else measure(written)
    spread = math.sqrt(float((std.double() ** 2).mean() + mean.double().var(unbiased=False)))
    shape = vae.latent_shape(config.image_size)
    size = done * 4 * math.prod(shape) * 2 / 1e6  # latents and latents_flip
    speed = f"{size:.1f} MB in {seconds:.1f} s, {size / seconds:.2f} MB/s" if done else "nothing new"
    place = written[0] if len(written) == 1 else written[0].parent
    return (
        f"{name}: {len(folder.paths)} rows of {len(folder.class_names)} classes, each {shape},"
        f" standard deviation {spread:.4g} ({speed}) in {place}"
    )


class Rows(NamedTuple):
    """What becomes of some images: latents, those of the mirrored images, and why others could not be read."""

    latents: np.ndarray
    latents_flip: np.ndarray
    bad: list[str]


def encode_rows(images: ImageDataset, rows: range, vae, config: ExtractConfig, progress) -> Rows:
    """The raw latents of some images and of their mirror images, drawn with the noise of each image's number."""
    loader = DataLoader(Attempts(images, rows), config.batch_size, collate_fn=list, num_workers=config.num_workers)
    latents, flips, bad = [], [], []
    first = rows.start
    for batch in loader:
        bad += [item for item in batch if isinstance(item, str)]
        if not bad:
            numbers = range(first, first + len(batch))
            x = th.from_numpy(np.stack(batch)).to(dist_util.dev())
            latents.append(draw_raw(x, vae, [mix(config.seed, i, EXTRACTED) for i in numbers]))
            flips.append(latents[-1])
            if config.with_flips:
                flips[-1] = draw_raw(x.flip(3), vae, [mix(config.seed, i, EXTRACTED_FLIP) for i in numbers])
        first += len(batch)
        progress(len(batch))
    if bad:
        return Rows(np.empty(0), np.empty(0), bad)
    return Rows(np.concatenate(latents), np.concatenate(flips), bad)


def draw_raw(images: th.Tensor, vae, seeds: list[int]) -> np.ndarray:
    """Raw latents (N, C, h, w) float32 of images, each with the noise of its own seed; the mean without noise."""
    mean, std = vae.encode_raw(images).chunk(2, dim=1)
    if vae.sample_posterior:
        noise = [th.randn(mean.shape[1:], generator=th.Generator().manual_seed(seed)) for seed in seeds]
        mean = mean + std * th.stack(noise).to(mean.device)
    return mean.float().cpu().numpy()


class Attempts(Dataset):
    """Some images, or in the place of one that cannot be read the reason."""

    def __init__(self, images: ImageDataset, rows: range):
        self.images, self.rows = images, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        try:
            return self.images[self.rows[place]][0]
        except UserError as error:
            return str(error)


# ---- rows to files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one set of files will hold.

    Attributes:
        sources: a line for each image with its name, size and time.
        about: the metadata that all files share.
    """

    labels: np.ndarray
    sources: list[str]
    about: dict[str, str]

    def metadata(self, rows: range) -> dict[str, str]:
        """What the file of these rows says: upstream's three words, ours, and a digest of the images."""
        lines = [f"{self.sources[i]} {self.labels[i]}" for i in rows]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        sizes = {"total_size": str(len(rows)), "dataset_size": str(len(self.labels))}
        return {**sizes, "dtype": "torch.float32", "device": str(dist_util.dev()), **self.about, "source": digest}


def shard_name(number: int) -> str:
    """LightningDiT's name of a file; its rank counts thousands of shards here, so that names sort like rows."""
    return f"latents_rank{number // 1000:02d}_shard{number % 1000:03d}.safetensors"


def write_part(out: Path, name: str, part: Part, config: ExtractConfig, encode, say) -> tuple[list[Path], int]:
    """Collective: call on every process. Write the files of one part in the layout that is asked for.

    Args:
        name: train or val.
        encode: see `write_shards`.
    Returns:
        the files, in the order of their rows, and how many rows were encoded now.
    Raises:
        UserError, SaveError: see `write_shards`.
    """
    if config.layout == "shards":
        return write_shards(out / name if config.val_dir else out, part, config.shard_size, encode, say)
    whole, parts, done = out / f"{name}.safetensors", out / f".{name}_parts", 0
    if not dist_util.rank0_first(lambda: _is_joined(whole, part)):
        shards, done = write_shards(parts, part, config.shard_size, encode, say)
        dist_util.rank0_first(lambda: _join(shards, whole, part.metadata(range(len(part.labels)))))
    dist_util.rank0_first(lambda: shutil.rmtree(parts, ignore_errors=True))
    return [whole], done


def write_shards(folder: Path, part: Part, size: int, encode, say) -> tuple[list[Path], int]:
    """Collective: call on every process. Write those shards of a folder that are not there, and remove outdated ones.

    Args:
        encode: `encode(rows, progress)` gives the `Rows` of a range, and calls `progress` with the images done.
    Raises:
        UserError: images that cannot be read; the folder holds other latents.
        SaveError: the disk is full; what is finished stays, and the same command goes on.
    """
    total = len(part.labels)
    starts = range(0, total, size)
    shards = {shard_name(i): range(a, min(a + size, total)) for i, a in enumerate(starts)}
    todo, outdated = dist_util.rank0_first(lambda: _prepare(folder, part, shards))
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo)} of {len(shards)} shards are there already")
    if outdated:
        say(f"removed {outdated} shards of {folder} that were made of other images or with other settings")
    if 0 < len(todo) < min(dist_util.world_size(), total):
        idle = f"only {len(todo)} of {dist_util.world_size()} processes have something to do"
        say(f"{idle}: --shard_size {math.ceil(total / dist_util.world_size())} would give each a shard")
    mine, bad = todo[dist_util.rank() :: dist_util.world_size()], []
    images = sum(len(shards[name]) for name in mine)
    with tqdm(total=images, desc="encoding", disable=dist_util.rank() > 0, leave=False, delay=2) as bar:
        for name in mine:
            rows = shards[name]
            found = encode(rows, bar.update)
            bad += found.bad
            if not found.bad:
                labels = np.asarray(part.labels[rows.start : rows.stop], dtype=TYPES["I64"])
                tensors = {"latents": [found.latents], "latents_flip": [found.latents_flip], "labels": [labels]}
                write_safetensors(folder / name, tensors, part.metadata(rows))
    refuse(sorted(sum(dist_util.gather_objects(bad), [])), total)
    return [folder / name for name in shards], sum(len(shards[name]) for name in todo)


def _prepare(folder: Path, part: Part, shards: dict[str, range]) -> tuple[list[str], int]:
    """Which shards are to be written; what is outdated goes first, so that no folder ever looks finished in error."""
    make_folder(folder, "--out_dir")
    refuse_others(folder, part, lambda path: SHARD_NAME.fullmatch(path.name))
    todo = [name for name, rows in shards.items() if not is_current(folder / name, part.metadata(rows))]
    outdated = [path for path in folder.glob("*.safetensors") if path.name in todo or path.name not in shards]
    checkpoint.sweep(folder)
    for path in [*outdated, *([stats_file(folder)] if todo or outdated else [])]:
        path.unlink(missing_ok=True)
    return todo, len(outdated)


def _is_joined(whole: Path, part: Part) -> bool:
    make_folder(whole.parent, "--out_dir")
    refuse_others(whole.parent, part, lambda path: path.stem in ("train", "val"))
    if is_current(whole, part.metadata(range(len(part.labels)))):
        return True
    for path in whole, *([stats_file(whole.parent)] if whole.stem == "train" else []):
        path.unlink(missing_ok=True)
    return False


def _join(shards: list[Path], whole: Path, metadata: dict[str, str]) -> None:
    opened = [open_shard(path) for path in shards]
    names = ("latents", "latents_flip", "labels")
    write_safetensors(whole, {name: [s.tensors[name].map(s.path) for s in opened] for name in names}, metadata)


def refuse_others(folder: Path, part: Part, ours: Callable) -> None:
    """Raise if a folder holds latents of another autoencoder or size, or files that this extraction would not write."""
    remedy = "choose another --out_dir, or remove it"
    for path in sorted(folder.glob("*.safetensors")):
        if not ours(path):
            raise UserError(f"--out_dir {folder} holds {path.name}, which is not of this --layout: {remedy}")
        try:
            about = read_header(path)[1]
        except UserError:
            continue  # damaged: it will be written again
        if "autoencoder" not in about:
            raise UserError(f"--out_dir {folder} holds {path.name}, which {SCRIPT} did not write: {remedy}")
        for name, what in ("autoencoder", "autoencoder"), ("image_size", "--image_size"):
            if about.get(name) != part.about[name]:
                raise UserError(
                    f"--out_dir {folder} holds latents of {what} {about.get(name)}, but this run's is"
                    f" {part.about[name]}: {remedy}"
                )


def is_current(path: Path, wanted: dict[str, str]) -> bool:
    """Whether a file is whole and was made from these images in this way."""
    if not path.is_file():
        return False
    try:
        shard = open_shard(path)
    except UserError:
        return False
    words = {name: value for name, value in shard.metadata.items() if name not in MAY_DIFFER}
    same = words == {name: value for name, value in wanted.items() if name not in MAY_DIFFER}
    return same and len(shard.labels) == int(wanted["total_size"])


def measure(files: list[Path]) -> tuple[th.Tensor, th.Tensor]:
    """Mean and unbiased standard deviation of each channel over all rows, heights and widths: (1, C, 1, 1) float32.

    In float64, about the first row's means: the difference of two large sums would lose digits. Without mirrored rows.
    """
    maps = [read_header(path)[0]["latents"].map(path) for path in files]
    centre = maps[0][0].astype(np.float64).mean(axis=(1, 2))
    count = sum(m.size for m in maps) // len(centre)
    first, second = np.zeros_like(centre), np.zeros_like(centre)
    for rows in (m[i : i + CHUNK] for m in maps for i in range(0, len(m), CHUNK)):
        apart = rows.astype(np.float64) - centre[:, None, None]
        first += apart.sum(axis=(0, 2, 3))
        second += (apart**2).sum(axis=(0, 2, 3))
    std = np.sqrt((second - first**2 / count) / max(1, count - 1))
    mean, std = (th.from_numpy(value).float()[None, :, None, None] for value in (centre + first / count, std))
    return mean, std


def write_stats(files: list[Path]) -> tuple[th.Tensor, th.Tensor]:
    """Measure and write `latents_stats.pt` beside the files, unless it is there and newer than all of them."""
    path = stats_file(files[0])
    if path.is_file() and path.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in files):
        stats = checkpoint.load(path)
        return stats["mean"], stats["std"]
    mean, std = measure(files)
    checkpoint.save({"mean": mean, "std": std}, path)
    return mean, std
