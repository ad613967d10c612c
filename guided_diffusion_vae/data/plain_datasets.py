"""The data sets of plain VAEs behind one face: images by number, their labels and names, and who is in which split.

    dataset = mnist(data_root, 28)
    dataset[7]                                        # float32 (C, H, W) in [-1, 1]
    train, val, test = dataset.split(seed=0)          # index arrays; a split that the data brings is kept

A new data set is one function (data_root, image_size, limit, say) and one line in `vae_data.DATASETS`; limit 0 is all
of it, `say` hears what the user should know. Nothing here mirrors an image: a flipped 2 is no digit, and mirrored time
is another gait.
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..config import UserError
from ..image_datasets import center_crop_arr
from .image_folder import class_of_each, image_from_pixels, list_images, read_rgb

FRACTIONS = (0.8, 0.1, 0.1)  # train, val, test of what brings no split


# ---- splits ----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Sorted indices of each part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def seeded_split(n: int, seed: int, fractions: Sequence[float] = FRACTIONS) -> Split:
    """0 ... n-1 in three parts, disjoint and complete; the same for the same seed.

    Args:
        fractions: of train, val and test; they are scaled to sum to 1, and train takes what rounding leaves.
    Raises:
        UserError: a negative fraction, or none for train.
    """
    if not (fractions[0] > 0 and min(fractions) >= 0 and sum(fractions) < math.inf):
        raise UserError(f"the split is {fractions}; give shares of train (some), val and test, such as 0.8, 0.1, 0.1")
    val, test = (round(n * share / sum(fractions)) for share in fractions[1:])
    order = np.random.default_rng(seed).permutation(n)
    return Split(np.sort(order[val + test :]), np.sort(order[:val]), np.sort(order[val : val + test]))


# ---- the face --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainDataset(Dataset):
    """Images by number, with everything that is known of each."""

    source: np.ndarray  # (N,) paths, or the pixels themselves: uint8 (N, H, W)
    to_pixels: Callable  # an item of source -> uint8 (H, W) or (H, W, 3)
    labels: np.ndarray  # (N,) int64: places in class_names
    class_names: list[str]
    names: np.ndarray  # (N,) of each image, relative to the data's root
    parts: np.ndarray  # (N,) "train", "val" or "test"; all "train" where the data brings no split

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index) -> np.ndarray:
        return image_from_pixels(np.atleast_3d(self.to_pixels(self.source[index])))

    def split(self, seed: int = 0, fractions: tuple[float, float, float] = FRACTIONS) -> Split:
        """The parts that the data brings; those it lacks are drawn from its train part, by `seeded_split`."""
        drawn = {part for part in Split._fields if part == "train" or part not in self.parts}
        shares = [share if part in drawn else 0 for part, share in zip(Split._fields, fractions, strict=True)]
        train = np.flatnonzero(self.parts == "train")
        pieces = zip(Split._fields, seeded_split(len(train), seed, shares), strict=True)
        return Split(*(train[at] if part in drawn else np.flatnonzero(self.parts == part) for part, at in pieces))

    def thinned(self, limit: int) -> "PlainDataset":
        """`limit` images, evenly spaced so that all classes and parts stay in; 0 keeps all."""
        if limit < 0:
            raise UserError(f"the limit is {limit}; give a number of images, or 0 for all")
        if not 0 < limit < len(self):
            return self
        keep = np.arange(limit) * len(self) // limit
        each = ("source", "labels", "names", "parts")
        return replace(self, **{name: getattr(self, name)[keep] for name in each})


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder_dataset(data_root: str | os.PathLike, to_pixels: Callable) -> PlainDataset:
    """All images below a folder; if its folders are train/, and val/ or test/ or both, those are the parts.

    Raises:
        UserError: see `list_images`.
    """
    root = Path(data_root)
    folders = {entry.name for entry in root.glob("[!.]*") if entry.is_dir()}
    parts = [part for part in Split._fields if part in folders] if "train" in folders <= set(Split._fields) else []
    try:
        found = {part: list_images(root / part).paths for part in parts} or {"train": list_images(data_root).paths}
    except UserError as error:
        raise UserError(str(error).replace("--data_dir", "--data_root")) from error
    paths = [path for inside in found.values() for path in inside]
    names = [os.path.relpath(path, root) for path in paths]
    inside_part = [Path(*Path(name).parts[1:]) if parts else Path(name) for name in names]
    owners = class_of_each(Path(), inside_part)  # of all parts at once: one of them may hold a single user
    class_names, labels = np.unique(owners, return_inverse=True)
    if len(class_names) == len(owners):  # 000001.jpg, 000002.jpg, ...: names that tell images apart, not classes
        class_names, labels = np.array(["all"]), np.zeros(len(owners))
    return PlainDataset(
        source=np.array(paths),
        to_pixels=to_pixels,
        labels=labels.astype(np.int64),
        class_names=class_names.tolist(),
        names=np.array(names),
        parts=np.repeat(list(found), [len(inside) for inside in found.values()]),
    )


def image_dir(data_root: str | os.PathLike, image_size: int, limit: int = 0, say: Callable = print) -> PlainDataset:
    """Any folder of images in the house's two layouts, cropped as upstream does: the middle square, scaled."""
    return folder_dataset(data_root, partial(_square, image_size=image_size)).thinned(limit)


def _square(path, image_size) -> np.ndarray:
    return center_crop_arr(read_rgb(path), image_size)


CELEBA_CROP = 178  # the width of an aligned CelebA image: the middle square is the face and little else
CELEBA_PARTS = dict(zip("012", Split._fields, strict=True))  # in list_eval_partition.txt


def celeba(data_root: str | os.PathLike, image_size: int, limit: int = 0, say: Callable = print) -> PlainDataset:
    """Faces: `img_align_celeba/` below the root, or any folder of images.

    Raises:
        UserError: no images; a `list_eval_partition.txt` beside `img_align_celeba/` that leaves an image out.
    """
    aligned = Path(data_root) / "img_align_celeba"
    to_pixels = partial(_face, image_size=image_size)
    if not aligned.is_dir():
        return folder_dataset(data_root, to_pixels).thinned(limit)
    dataset, partition = folder_dataset(aligned, to_pixels), Path(data_root) / "list_eval_partition.txt"
    if partition.is_file():
        words = map(str.split, partition.read_text(errors="replace").splitlines())
        part_of = {line[0]: CELEBA_PARTS.get(line[1]) for line in words if len(line) == 2}
        parts = [part_of.get(os.path.basename(name)) for name in dataset.names]
        if None in parts:
            image = os.path.basename(dataset.names[parts.index(None)])
            raise UserError(f"{partition} has no line '{image} 0' (or 1, 2); fetch it again")
        dataset = replace(dataset, parts=np.array(parts))
    return dataset.thinned(limit)


def _face(path, image_size) -> np.ndarray:
    """The middle 178 x 178 pixels, or the middle square of a smaller image, scaled bicubically with antialiasing."""
    image = read_rgb(path)
    side = min(CELEBA_CROP, *image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _scaled(image.crop((left, top, left + side, top + side)), image_size)


def _scaled(image: Image.Image, image_size: int) -> np.ndarray:
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


# ---- MNIST -----------------------------------------------------------------------------------------------------------

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_IDX_BYTES = 1 << 30  # the largest set of this family, EMNIST by class, has 0.55 GB
CHUNK = 1 << 20
PARTS_OF_MNIST = {"train": "train", "t10k": "test"}  # first word of its files -> part


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """An idx file, plain or gzipped (told by its first bytes, for some servers unpack without renaming), as an array.

    The format: two zero bytes, a type, the number of dimensions, each size as a big-endian 32-bit number, the values.
    What the header claims is checked before memory is taken, and memory grows only with the bytes that are there.

    Raises:
        UserError: missing; not idx; shorter or longer than its header says; larger than 1 GB.
    """
    path = Path(path)
    try:
        with open(path, "rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            with gzip.open(plain) if zipped else plain as stream:
                return _read_idx(stream, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or was not downloaded whole ({error}); fetch it again") from error


def _read_idx(stream, path: Path) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= 8:
        raise UserError(f"{path} is no idx file: it starts with {magic.hex() or 'nothing'}")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise UserError(f"{path} ends inside its header; fetch it again")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    dtype = np.dtype(IDX_TYPES[magic[2]])
    length = math.prod(shape) * dtype.itemsize
    claim = f"{path} claims {' x '.join(map(str, shape))} values, {length:,} bytes"
    if length > MAX_IDX_BYTES:
        raise UserError(f"{claim}, more than {MAX_IDX_BYTES:,}; that is no file of this family")
    values = bytearray()
    while chunk := stream.read(min(CHUNK, length + 1 - len(values))):
        values += chunk
    if len(values) != length:
        held = f"holds {len(values):,}" if len(values) < length else "goes on after them"
        raise UserError(f"{claim}, but {held}; fetch it again")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def mnist(data_root: str | os.PathLike, image_size: int = 28, limit: int = 0, say: Callable = print) -> PlainDataset:
    """MNIST, or a set in its files (Fashion-MNIST, KMNIST); the t10k files are the test part if the train files exist.

    Raises:
        UserError: none of the files, or images and labels that do not belong together.
    """
    root = Path(data_root)
    prefixes = [prefix for prefix in PARTS_OF_MNIST if _find(root, f"{prefix}-images", 3)]
    if not prefixes:
        raise UserError(
            f"--data_root {root} holds no MNIST: put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz,"
            " t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz there (or unpacked; the t10k pair alone will do),"
            " from yann.lecun.com/exdb/mnist or any mirror of it"
        )
    pairs = [_read_pair(root, prefix) for prefix in prefixes]
    parts = [PARTS_OF_MNIST[prefix] for prefix in prefixes]
    if len(pairs) == 1:
        say(f"--data_root {root} holds the {prefixes[0]} files only: train, val and test are drawn from them")
        parts = ["train"]
    counts, labels = [len(labels) for _, labels in pairs], np.concatenate([labels for _, labels in pairs])
    return PlainDataset(
        source=np.concatenate([images for images, _ in pairs]),
        to_pixels=partial(_digit, image_size=image_size),
        labels=labels.astype(np.int64),
        class_names=[str(number) for number in range(max(10, labels.max() + 1))],
        names=np.array([f"{prefix}/{i:05d}" for prefix, n in zip(prefixes, counts, strict=True) for i in range(n)]),
        parts=np.repeat(parts, counts),
    ).thinned(limit)


def _find(root: Path, stem: str, ndim: int) -> Path | None:
    """The file of this stem: in the root or where torchvision puts it, with a dash or a dot, gzipped or not."""
    folders = (root, root / "raw", root / "MNIST" / "raw")
    names = [f"{stem}{mark}idx{ndim}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def _read_pair(root: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) and labels (N,), uint8."""
    where = _find(root, f"{prefix}-images", 3), _find(root, f"{prefix}-labels", 1)
    assert where[0], prefix
    if not where[1]:
        raise UserError(f"{where[0]} is there, but not {prefix}-labels-idx1-ubyte(.gz); put it beside")
    images, labels = read_idx(where[0]), read_idx(where[1])
    if images.ndim != 3 or images.dtype != np.uint8 or not images.size:
        raise UserError(f"{where[0]} holds {images.dtype} {images.shape}, not grey images (N, H, W) in bytes")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise UserError(f"{where[1]} holds {labels.dtype} {labels.shape}, not a label for each of {len(images)} images")
    return images, labels


def _digit(pixels: np.ndarray, image_size) -> np.ndarray:
    return pixels if pixels.shape == (image_size, image_size) else _scaled(Image.fromarray(pixels), image_size)
