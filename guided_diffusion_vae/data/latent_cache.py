"""Latents of a folder of images, encoded once and kept beside it: the moments of each image's posterior.

A cache knows the autoencoder, the size and every file with its length and time: whatever changes, it is made anew.
"""

import json
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch as th
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import dist_util
from ..checkpoint import atomic_write, sweep
from ..config import UserError
from .image_folder import ImageFolder, read_rgb, refuse

ENCODE_BATCH = 32


class Images(Protocol):
    """Rows (image, conditions) at one size."""

    resolution: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple: ...


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


def cached_moments(images: Images, folder: ImageFolder, vae, data_dir: Path, cache: str, say) -> MomentsDataset:
    """Collective: call on every process. The cached moments of these images; encoded now if not there or outdated."""
    place = Path(cache) if cache else data_dir / ".latents" / f"{vae.fingerprint}-{images.resolution}"
    wanted = cache_index(folder, vae, images.resolution, data_dir)
    if not dist_util.rank0_first(lambda: cache_is_current(place, wanted, named=bool(cache))):
        encode_folder(images, vae, place, wanted, say)
    say(f"reading cached latents from {place}")
    return MomentsDataset(place / "moments.npy", folder.labels)


def cache_index(folder: ImageFolder, vae, image_size: int, data_dir: Path) -> dict:
    """What a cache was made from: the autoencoder, the size, and each file with its length and time."""
    files, bad = [], []
    for path in folder.paths:
        try:
            files.append((os.path.relpath(path, data_dir), os.stat(path)))
        except OSError as error:  # a link to nowhere or to itself, or it is gone
            bad.append(f"{path} cannot be read ({error.strerror})")
    refuse(bad, len(folder.paths))
    return {
        "autoencoder": vae.fingerprint,
        "image_size": image_size,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }


def cache_is_current(place: Path, wanted: dict, *, named: bool) -> bool:
    """Whether `place` holds these images' latents; a named cache of another autoencoder is an error, not a rebuild."""
    try:
        found = json.loads((place / "index.json").read_text())
        of = found["autoencoder"], found["image_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    if named and of != (wanted["autoencoder"], wanted["image_size"]):
        raise UserError(
            f"--latent_cache {place} was encoded with autoencoder {found['autoencoder']} at {found['image_size']} px;"
            f" this run's is {wanted['autoencoder']} at {wanted['image_size']} px:"
            " give the --vae_path and --image_size it was made with, or another folder"
        )
    return found == wanted and (place / "moments.npy").is_file()


def encode_folder(images: Images, vae, place: Path, index: dict, say) -> None:
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
        sweep(path.parent)
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
