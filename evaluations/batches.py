"""A set of images as the evaluator reads it: 64 at a time from an .npz or a folder, never the whole in memory.

What the official evaluator swallows (floats in [-1, 1]) or dies of (grey, NCHW, no image) is an error in one sentence
here, or a warning kept in `notes`. A header is checked against the size of what it heads before anything is allocated,
and nothing is ever unpickled.
"""

import hashlib
import math
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from guided_diffusion_vae.checkpoint import digest
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import MAX_PIXELS, list_images, read_rgb
from guided_diffusion_vae.data.latent_cache import drop_bad_images

from .image_sets import pngs_of, refuse_splits
from .npz import read_header, read_member
from .value_range import look_for_casts, refuse_unit_range, remedy_of

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
FEWEST = 4  # precision and recall look at the third other neighbour
BLOCK_BYTES = 1 << 28  # of images at a time, however large one is
SMALL_BYTES = 1 << 28  # of a member that is loaded whole: labels, statistics
ROUNDING = 1e-5  # of the largest entry: how far a stored covariance may be from symmetric
NAMED = 8  # arrays of an .npz that an error lists


class Batch:
    """Images of one size. `flag` is what errors call the set; `labels` (N,) or None; `notes` are warnings."""

    def __init__(self, path, flag: str, shape: tuple[int, int, int, int], labels: Any = None):
        self.path, self.flag, self.shape, self.labels = path, flag, shape, labels
        self.notes: list[str] = []
        if shape[0] == 0:
            raise UserError(f"{flag} {path} holds no images")
        if shape[0] < FEWEST:
            raise UserError(f"{flag} {path} holds {shape[0]} images; precision and recall need at least {FEWEST}")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def stats(self) -> dict[str, np.ndarray] | None:
        """Stored statistics under the official names, or None."""
        return None

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that change with any byte of the file, or of any image of the folder."""
        raise NotImplementedError

    def iterate(self, batch_size: int = 64) -> Iterator[np.ndarray]:
        """Yield images (n, H, W, 3) in 0..255, n at most `batch_size`: uint8, or float32 if they are stored so."""
        step = max(1, min(batch_size, BLOCK_BYTES // math.prod(self.shape[1:])))
        return self._blocks(step)

    def take(self, places) -> np.ndarray:
        """The images at some places, in the order of the set, as uint8 (n, H, W, 3)."""
        wanted, start, taken = np.isin(np.arange(len(self)), places), 0, []
        for images in self.iterate():
            chosen = images[wanted[start : start + len(images)]]
            taken.append(chosen if chosen.dtype == np.uint8 else np.round(chosen).astype(np.uint8))
            start += len(images)
        return np.concatenate(taken)

    def _blocks(self, step: int) -> Iterator[np.ndarray]:
        raise NotImplementedError


class ArrayBatch(Batch):
    """Images that are in memory already: uint8 (N, H, W, 3)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None, flag: str = "images"):
        super().__init__("in memory", flag, pixels.shape, labels)
        self.pixels = pixels

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.shape).encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()

    def _blocks(self, step: int) -> Iterator[np.ndarray]:
        return (self.pixels[i : i + step] for i in range(0, len(self), step))


class FolderBatch(Batch):
    """The images below a folder, or those of a folder that the sampler wrote; grey ones count as RGB.

    Args:
        image_size: side that all are brought to (centre cropped, then averaged over the area of a pixel, as
            `image_sets.read_folder` does); 0: they must have one size.
        skip_bad_images: leave out those that cannot be read, and say which, instead of refusing.
    """

    def __init__(self, path, flag: str, *, image_size: int = 0, skip_bad_images: bool = False, say=print):
        refuse_splits(path, flag)
        with _naming(flag):
            found = list_images(pngs_of(Path(path), flag))
            if skip_bad_images:
                found = drop_bad_images(found, say)
            width, height = (image_size, image_size) if image_size else read_rgb(found.paths[0]).size
        super().__init__(path, flag, (len(found.paths), height, width, 3), np.array(found.labels))
        self.paths, self.class_names, self.image_size = found.paths, found.class_names, image_size

    @cached_property
    def digest(self) -> str:
        state = hashlib.sha256(repr((self.shape, self.image_size)).encode())
        for path in self.paths:
            state.update(Path(path).relative_to(self.path).as_posix().encode() + bytes.fromhex(digest(path)))
        return state.hexdigest()

    def _blocks(self, step: int) -> Iterator[np.ndarray]:
        for i in range(0, len(self), step):
            with _naming(self.flag):
                yield np.stack([self._read(path) for path in self.paths[i : i + step]])

    def _read(self, path) -> np.ndarray:
        image, (height, width) = read_rgb(path), self.shape[1:3]
        if image.size == (width, height):
            return np.asarray(image)
        if not self.image_size:
            raise UserError(
                f"{path} is {image.height} x {image.width} pixels, the images before it {height} x {width}: bring them"
                " to one size with make_reference.py --image_size"
            )
        return np.asarray(ImageOps.fit(image, (width, height), method=Image.Resampling.BOX))


class NpzBatch(Batch):
    """The arr_0 of an .npz; arr_1, if it fits, are labels; mu, sigma, mu_s and sigma_s are `stats`.

    Args:
        grey_to_rgb: repeat images with one channel to three.
    """

    def __init__(self, path, flag: str, *, grey_to_rgb: bool = False):
        self.path, self.flag = path, flag
        with self._open() as archive:
            self.members = {name.removesuffix(".npy") for name in archive.namelist()}
            self._refuse_missing()
            self.header = read_header(archive, "arr_0", self._at)
            shape = self._shape(grey_to_rgb)
            super().__init__(path, flag, shape)
            if "arr_1" in self.members:
                self._take_labels(read_member(archive, "arr_1", self._at, SMALL_BYTES))
        if self.header.dtype.kind == "f":
            refuse_unit_range(self._raw(64), self.header.dtype, self._at)
        else:
            self.notes += look_for_casts(self._raw(8), self.header.dtype, self._at)

    @cached_property
    def digest(self) -> str:
        return digest(self.path)

    @cached_property
    def stats(self) -> dict[str, np.ndarray] | None:
        """The stored statistics under the official names, or None.

        Raises:
            UserError: not a finite mean with a covariance of its size.
        """
        if "mu" not in self.members:
            return None
        with self._open() as archive:
            stats = {name: read_member(archive, name, self._at, SMALL_BYTES) for name in STATISTICS}
        for mean, covariance in (STATISTICS[:2], STATISTICS[2:]):
            mu, sigma = stats[mean], stats[covariance]
            numbers = all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (mu, sigma))
            if not numbers or mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape:
                raise UserError(
                    f"{self._at} stores {mean} {mu.dtype} {mu.shape} and {covariance} {sigma.dtype} {sigma.shape};"
                    " they must be finite, (d,) and (d, d): make the file with make_reference.py"
                )
            if np.abs(sigma - sigma.T).max() > ROUNDING * np.abs(sigma).max() or sigma.diagonal().min() < 0:
                raise UserError(
                    f"{self._at}: {covariance} is no covariance, which is symmetric with nothing below 0 on its"
                    " diagonal: make the file with make_reference.py"
                )
        return stats

    @property
    def _at(self) -> str:
        return f"{self.flag} {self.path}"

    @contextmanager
    def _open(self):
        """The zip archive; whatever is wrong with it becomes one sentence."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"{self._at} does not exist; give an .npz or a folder of images") from error
        except Exception as error:  # of zipfile, zlib, struct, tokenize, ast and NumPy: no list of theirs is whole
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{self._at} is not a readable .npz ({reason}); was it copied whole?") from error

    def _refuse_missing(self) -> None:
        lacking = [name for name in STATISTICS if name not in self.members]
        if "arr_0" not in self.members:
            what = "has statistics but" if len(lacking) < len(STATISTICS) else "has"
            found = sorted(" ".join(name.split()) for name in self.members)
            more = ", ..." if len(found) > NAMED else ""
            raise UserError(
                f"{self._at} {what} no images (arr_0): precision and recall, and every set that is judged, need the"
                f" images; it holds {', '.join(found[:NAMED]) or 'nothing'}{more}: make the file with make_reference.py"
                " or image_sample_vae.py"
            )
        if "mu" in self.members and lacking:
            raise UserError(
                f"{self._at} has mu but not {', '.join(lacking)}: give all four, or make it with make_reference.py"
            )

    def _shape(self, grey_to_rgb: bool) -> tuple[int, int, int, int]:
        """(N, H, W, 3), or a sentence that says what the array looks like instead."""
        shape, dtype = self.header.shape, self.header.dtype
        given = f"{self._at}: arr_0 is {dtype} {shape}"
        if dtype.kind not in "uif":
            raise UserError(f"{given}; images must be numbers from 0 to 255, best uint8 (N, height, width, 3)")
        grey = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        if not grey and shape[3:] != (3,):
            raise UserError(given + remedy_of(shape))
        if grey and not grey_to_rgb:
            raise UserError(f"{given}, grey; give --grey_to_rgb True to repeat it to three channels")
        if 0 in shape[1:3] or shape[1] * shape[2] > MAX_PIXELS:
            raise UserError(f"{given}; an image must have 1 to {MAX_PIXELS:,} pixels")
        return shape[0], shape[1], shape[2], 3

    def _take_labels(self, labels: np.ndarray) -> None:
        if labels.dtype.kind in "iu" and labels.shape == (len(self),):
            self.labels = labels
        else:
            self.notes.append(
                f"{self._at}: arr_1 is {labels.dtype} {labels.shape}, not one integer an image ({len(self)}); ignored"
            )

    def _blocks(self, step: int) -> Iterator[np.ndarray]:
        for block in self._raw(step):
            if self.header.dtype != np.uint8:
                if not (block.min() >= 0 and block.max() <= 255):  # also if it is not a number
                    raise UserError(
                        f"{self._at}: arr_0 has values from {block.min():.6g} to {block.max():.6g}; they must be 0 to"
                        " 255: convert to uint8"
                    )
                block = block.astype(np.float32 if self.header.dtype.kind == "f" else np.uint8)
            block = block.reshape(len(block), *self.shape[1:3], -1)
            yield block if block.shape[3] == 3 else np.repeat(block, 3, axis=3)

    def _raw(self, step: int) -> Iterator[np.ndarray]:
        """The array as it is stored, `step` images at a time."""
        shape, fortran, dtype, _ = self.header
        with self._open() as archive:
            if fortran:
                images = read_member(archive, "arr_0", self._at)  # its order does not let it be read a few at a time
                yield from (images[i : i + step] for i in range(0, len(self), step))
                return
            with archive.open("arr_0.npy") as member:
                member.read(archive.getinfo("arr_0.npy").file_size - self.header.bytes)
                for i in range(0, len(self), step):
                    count = min(step, len(self) - i)
                    data = member.read(count * math.prod(shape[1:]) * dtype.itemsize)
                    yield np.frombuffer(bytearray(data), dtype).reshape(count, *shape[1:])
                member.read(1)  # the end: now the checksum is compared


@contextmanager
def _naming(flag: str):
    """Errors of functions that know a folder as --data_dir name this flag instead."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("--data_dir", flag)
        raise UserError(said if said.startswith(flag) else f"{flag}: {said}") from error


def warn(line: str) -> None:
    """Say something that a reader of the numbers has to know, on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def open_batch(
    path, flag: str, *, grey_to_rgb: bool = False, image_size: int = 0, skip_bad_images: bool = False, say=print
) -> Batch:
    """The images of an .npz or a folder.

    Args:
        flag: what errors call it; grey_to_rgb: see `NpzBatch`; image_size, skip_bad_images: see `FolderBatch`.
    Raises:
        UserError: it cannot be read, or is not images; one sentence that names the remedy.
    """
    if Path(path).is_dir():
        return FolderBatch(path, flag, image_size=image_size, skip_bad_images=skip_bad_images, say=say)
    return NpzBatch(path, flag, grey_to_rgb=grey_to_rgb)
