"""Latents extracted once: LightningDiT's files, read row by row from a memory map.

A folder of `latents_rankRR_shardSSS.safetensors`, each with `latents` and `latents_flip` (n, C, h, w) float32, raw, and
`labels` (n,) int64; beside them `latents_stats.pt`, the mean and standard deviation of every channel. Or two files,
`train.safetensors` and `val.safetensors`. A safetensors file is 8 bytes of length, a JSON header, and the tensors'
bytes: row i of a tensor lies at `begin + i * row_bytes`, so that one row is read without its file being loaded.
"""

import json
import math
import random
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .. import checkpoint
from ..config import UserError
from ..vae_wrapper import STATS
from .image_folder import list_files

SCRIPT = "scripts/latent_extract.py"
SHARD_NAME = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
TYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_CLASSES = 1 << 20  # of labels that nobody named; a larger label is no label
OPEN_MAPS = 256  # memory maps at a time, each of which holds a file descriptor


# ---- one file --------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where a tensor lies in its file."""

    code: str
    shape: tuple[int, ...]
    begin: int

    def is_of(self, code: str, *shape: int) -> bool:
        return (self.code, self.shape) == (code, shape)

    def map(self, path) -> np.ndarray:
        """The tensor, memory-mapped."""
        return np.asarray(np.memmap(path, TYPES[self.code], "r", self.begin, self.shape))  # plain: quicker to index


class Shard(NamedTuple):
    """A checked file: its tensors by name, its labels, and what it says of itself."""

    path: Path
    tensors: dict[str, Tensor]
    labels: np.ndarray
    metadata: dict[str, str]


def read_header(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, without reading more than the header.

    Raises:
        UserError: not such a file, or one that was cut off.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(handle.read(length))
            found = path.stat().st_size - 8 - length
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        spans = {name: _span(**entry) for name, entry in header.items()}
        wanted = max((end for *_, end in spans.values()), default=0)
    except (OSError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error
    if found != wanted:
        raise UserError(f"{path} is damaged: it holds {found:,} of {wanted:,} bytes of tensors; copy it again")
    tensors = {}
    for name, (code, shape, begin, end) in spans.items():
        if code in TYPES and end - begin != math.prod(shape) * TYPES[code].itemsize:
            raise UserError(f"{path} is damaged: {name} has {end - begin:,} bytes for the shape {shape}")
        tensors[name] = Tensor(code, shape, 8 + length + begin)
    return tensors, metadata


def _span(dtype, shape, data_offsets):
    begin, end = (int(offset) for offset in data_offsets)
    shape = tuple(int(side) for side in shape)
    if min([begin, *shape]) < 0:
        raise ValueError(f"a tensor of the shape {shape} at byte {begin}")
    return str(dtype), shape, begin, end


def open_shard(path) -> Shard:
    """Check a file of latents.

    Raises:
        UserError: see `read_header`; or tensors that are missing or do not fit each other.
    """
    tensors, metadata = read_header(path)
    lacking = [name for name in ("latents", "labels") if name not in tensors]
    if lacking:
        raise UserError(f"{path} holds no {' and no '.join(lacking)}; extract it again with {SCRIPT}")
    latents, flip, labels = tensors["latents"], tensors.get("latents_flip"), tensors["labels"]
    if not latents.is_of("F32", *latents.shape) or len(latents.shape) != 4 or 0 in latents.shape:
        raise UserError(f"{path}: latents are {latents.code} {latents.shape}; they must be F32 (n, C, h, w), n > 0")
    if flip and not flip.is_of("F32", *latents.shape):
        raise UserError(f"{path}: latents_flip are {flip.code} {flip.shape}, but latents are F32 {latents.shape}")
    if not labels.is_of("I64", latents.shape[0]):
        raise UserError(f"{path}: labels are {labels.code} {labels.shape}; they must be I64 ({latents.shape[0]},)")
    labels = np.array(labels.map(path))
    if labels.min() < 0:
        raise UserError(f"{path}: row {labels.argmin()} has the label {labels.min()}; labels count from 0")
    if labels.max() >= MAX_CLASSES:
        raise UserError(f"{path}: row {labels.argmax()} has the label {labels.max()}; there are no so many classes")
    return Shard(Path(path), tensors, labels, metadata)


def write_safetensors(path, tensors: dict[str, list[np.ndarray]], metadata: dict[str, str]) -> None:
    """Write tensors, each given in parts along its first axis, without holding them twice.

    Raises:
        SaveError: see `checkpoint.atomic_write`.
    """
    code = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, dict] = {"__metadata__": metadata}
    begin = 0
    for name, parts in tensors.items():
        end = begin + sum(part.nbytes for part in parts)
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        header[name] = {"dtype": code[parts[0].dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with checkpoint.atomic_write(path) as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for parts in tensors.values():
            for part in parts:
                handle.write(np.ascontiguousarray(part).data)


# ---- reading ---------------------------------------------------------------------------------------------------------


def find_shards(data_dir, part: str = "train") -> list[Path]:
    """The files of latents that `data_dir` names, in the order of their rows; none if it is no place of latents.

    Args:
        data_dir: a folder of shards; a folder with train.safetensors and val.safetensors; or one file.
        part: which of the two files is meant.
    Raises:
        UserError: a folder of two files lacks the one that is meant; a folder whose subfolders hold latents; one of
            which only the statistics are left.
    """
    place = Path(data_dir)
    if place.suffix == ".safetensors" and place.is_file():
        return [place]
    if not data_dir or not place.is_dir():
        return []
    files = [path for path in sorted(place.glob("*.safetensors")) if not path.name.startswith(".")]
    files = [path for path in files if _holds_latents(path)]
    two = {path.stem: path for path in files if path.stem in ("train", "val")}
    if two and part not in two:
        raise UserError(f"{place} holds {' and '.join(p.name for p in two.values())}, but no {part}.safetensors")
    if not files and _holds_parts(place):
        raise UserError(f"{place} holds latents in the subfolders train and val: give {place / part}")
    if not files and (place / STATS).is_file() and not list_files(place):
        raise UserError(
            f"--data_dir {place} holds {STATS}, but none of its latents: run {SCRIPT} again with this --out_dir, or"
            " copy all files"
        )
    return [two[part]] if two else files


def _holds_latents(path: Path) -> bool:
    if SHARD_NAME.fullmatch(path.name):
        return True  # damaged or not: that is said when it is opened
    try:
        return "latents" in read_header(path)[0]
    except UserError:
        return path.stem in ("train", "val")


def _holds_parts(place: Path) -> bool:
    return any(SHARD_NAME.fullmatch(path.name) for path in place.glob("train/*.safetensors"))


class LatentShards(Dataset):
    """Extracted latents as they are stored: `(z_raw, {"y": label})`, z_raw (C, h, w) float32.

    Attributes:
        class_names: as stored; of files that others made "0000", "0001", ... by label.
        labels: (N,) int64, of all rows.
        autoencoder, image_size: what they were made with; None if the files do not say.
        posterior: what a row is of its image's: a "sample" or the "mean"; None if the files do not say.
        latent_shape: (C, h, w).
    Args:
        files: see `find_shards`.
        random_flip: give the mirrored image's latent half of the time, by Python's generator.
    Raises:
        UserError: see `open_shard`; no files; some that do not belong together; some are missing; flips that were not
            extracted. When a row is read: NaN in it.
    """

    def __init__(self, files: list[Path], *, random_flip: bool = False):
        if not files:
            raise UserError(f"--data_dir names no files of latents; extract them with {SCRIPT}, or copy all files")
        shards = [open_shard(path) for path in files]
        self.paths = [shard.path for shard in shards]
        self.tensors = [shard.tensors for shard in shards]
        self.labels = np.concatenate([shard.labels for shard in shards])
        self.ends = np.cumsum([len(shard.labels) for shard in shards])
        self.random_flip = self.draws = random_flip
        self._maps = {}
        self.latent_shape = self.tensors[0]["latents"].shape[1:]
        about = [shard.metadata.get("autoencoder") and _what_must_agree(shard) for shard in shards]
        for path, tensors, words in zip(self.paths, self.tensors, about, strict=True):
            if tensors["latents"].shape[1:] != self.latent_shape or words != about[0]:
                raise UserError(
                    f"{path} does not belong with {self.paths[0]}: they are of other autoencoders, sizes or classes;"
                    f" move one of them, or extract again with {SCRIPT}"
                )
        self.autoencoder = self.image_size = self.posterior = None
        self.class_names = [f"{number:04d}" for number in range(int(self.labels.max()) + 1)]
        if about[0]:
            self._read_metadata(shards[0])
        if random_flip:
            self._refuse_copies(shards)

    def _read_metadata(self, shard: Shard):
        try:
            self.class_names = json.loads(shard.metadata["class_names"])
            if not (isinstance(self.class_names, list) and all(isinstance(name, str) for name in self.class_names)):
                raise ValueError("class_names is no list of names")
            self.autoencoder, self.image_size = shard.metadata["autoencoder"], int(shard.metadata["image_size"])
            self.posterior, whole = shard.metadata.get("posterior"), int(shard.metadata["dataset_size"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{shard.path} has damaged metadata ({error}); extract it again with {SCRIPT}") from error
        if self.labels.max() >= len(self.class_names):
            raise UserError(
                f"{shard.path} or one beside it has the label {self.labels.max()}, but there are"
                f" {len(self.class_names)} classes; extract it again with {SCRIPT}"
            )
        if len(self) != whole:
            raise UserError(
                f"--data_dir {shard.path.parent} holds {len(self)} of {whole} latents: run {SCRIPT} again with this"
                " --out_dir, and it goes on where it was interrupted; or copy all files"
            )

    def _refuse_copies(self, shards: list[Shard]):
        for shard in shards:
            if "latents_flip" not in shard.tensors or shard.metadata.get("flipped") == "false":
                raise UserError(
                    f"--random_flip True, but {shard.path} was extracted without mirrored images:"
                    f" leave it out, or extract with {SCRIPT} --with_flips True"
                )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        name = "latents_flip" if self.random_flip and random.random() < 0.5 else "latents"
        number = int(np.searchsorted(self.ends, index, side="right"))
        tensor = self.mapped(number, name)
        row = index - self.ends[number] + len(tensor)
        z = np.array(tensor[row])
        if not np.isfinite(z).all():
            raise UserError(f"{self.paths[number]}: row {row} of {name} holds NaN or infinite values; extract it again")
        return z, {"y": np.array(self.labels[index])}

    def mapped(self, number: int, name: str) -> np.ndarray:
        """A tensor of one file, memory-mapped."""
        key = (number, name)
        if key not in self._maps:
            if len(self._maps) >= OPEN_MAPS:
                self._maps.clear()
            self._maps[key] = self.tensors[number][name].map(self.paths[number])
        return self._maps[key]

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a worker opens its own


def _what_must_agree(shard: Shard) -> list:
    names = ("autoencoder", "image_size", "class_names", "dataset_size", "flipped", "posterior", "seed")
    return [shard.metadata.get(name) for name in names]
