"""Folders of images: who is in them, and how a file becomes 8-bit RGB.

Two layouts carry labels. A folder for each class (`user_00/...png`), or upstream's `name_rest.png`. The class list is
the sorted list of names; a class's number is its place in that list.
"""

import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..config import UserError, first_few

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".pgm")
# what Pillow may try (its PPM reads PGM): a renamed file of another format is no reason to run its reader
FORMATS = ("PNG", "JPEG", "GIF", "PPM")
MAX_PIXELS = 64_000_000  # a spectrogram is below a megapixel; beyond this it is a decompression bomb
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
ADAM7 = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)  # first, step
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of what MAX_PIXELS refuses anyway


class ImageFolder(NamedTuple):
    """The images below a folder: paths, the class of each, and the names of the classes (number = place)."""

    paths: list[str]
    labels: list[int]
    class_names: list[str]


def list_images(data_dir: str | os.PathLike, extensions=EXTENSIONS, what="images") -> ImageFolder:
    """Find all images below a folder, in sorted order, with their classes.

    A class is a subfolder if all images lie in subfolders and there are at least two; else it is the file name up to
    the first `_`, as upstream has it.

    Args:
        extensions, what: of the files that count, and what the user calls them.
    Raises:
        UserError: no folder, or no images in it; a class whose name is no text.
    """
    if not data_dir:
        raise UserError(f"--data_dir is empty; give a folder of {what} ({', '.join(extensions)}), one subfolder a user")
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data_dir {root} {'is a file' if root.is_file() else 'does not exist'}; give a folder")
    paths = list_files(root, extensions)
    if not paths:
        raise UserError(f"--data_dir {root} holds no {what} ({', '.join(extensions)})")
    names = class_of_each(root, paths)
    class_names = sorted(set(names))
    odd = [name for name in class_names if not name.isascii() and name.encode(errors="replace").decode() != name]
    if odd:  # no record, table or report could hold it
        raise UserError(
            f"--data_dir {root} has the class {odd[0]!r}, whose name is not UTF-8: rename its folder or files"
        )
    number = {name: place for place, name in enumerate(class_names)}
    return ImageFolder([str(path) for path in paths], [number[name] for name in names], class_names)


def list_files(root: Path, extensions=EXTENSIONS) -> list[Path]:
    """All image files (or files of other extensions, in lower case) below a folder, sorted folder by folder; hidden
    folders and symbolic-link loops are left out."""
    found, seen, stack = [], set(), [root]
    while stack:
        folder = stack.pop()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
        except PermissionError as error:
            raise UserError(f"--data_dir: the folder {folder} cannot be read (permission denied)") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                stack.append(entry)
            elif entry.suffix.lower() in extensions:
                found.append(entry)
    return sorted(found)


def class_of_each(root: Path, paths: list[Path]) -> list[str]:
    """The class name of every path: its subfolder of `root`, or upstream's prefix of the file name."""
    folders = [path.relative_to(root).parts for path in paths]
    if all(len(parts) > 1 for parts in folders) and len({parts[0] for parts in folders}) > 1:
        return [parts[0] for parts in folders]
    return [path.name.split("_")[0] for path in paths]


def class_number(name: str) -> int | None:
    """The number that a class name ends in (`user_07` -> 7), or None."""
    found = re.search(r"(\d+)$", name)
    return int(found.group(1)) if found else None


def read_rgb(path: str | os.PathLike) -> Image.Image:
    """Read an image file as 8-bit RGB: first frame, palette applied, grey repeated, 16 bits scaled (never clipped).

    Raises:
        UserError: the file is missing, truncated, too large, or not a PNG, JPEG, GIF or PGM.
    """
    try:
        if Path(path).is_fifo():  # to open one would wait for ever
            raise UserError(f"{path} is a pipe, not an image")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            if image.format == "PNG":
                _refuse_missing_rows(path)
            return _eight_bit(image).convert("RGB")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for bad files
        raise UserError(f"{path} cannot be read as an image ({error})") from error


def _refuse_missing_rows(path) -> None:
    """Raise a ValueError if a PNG's data end before its last row, which Pillow would show as black.

    Source: the PNG specification, sections 8 (interlacing) and 11.2.
    """
    data = Path(path).read_bytes()
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits, need = depth * CHANNELS[colour], 0
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // across), -((y - height) // down)
        need += max(rows, 0) * (1 + (columns * bits + 7) // 8) if columns > 0 else 0  # a row begins with its filter
    inflate, have, place = zlib.decompressobj(), 0, 8
    while place < len(data) and have < need:
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        part = data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        while part and have < need:
            have += len(inflate.decompress(part, 1 << 20))
            part = inflate.unconsumed_tail
        place += 12 + length
    if have < need:
        raise ValueError("its last rows are missing")


def image_from_pixels(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) as float32 (C, H, W) in [-1, 1]: x / 127.5 - 1."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow before 11 calls it I, later I;16, and both clip in `convert`."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers")
    full_scale = 1.0 if image.mode == "F" and values.max(initial=0) <= 1.0 else 65535.0
    return Image.fromarray(np.round(np.clip(values / full_scale, 0, 1) * 255).astype(np.uint8))


def refuse(bad: list[str], total: int, what="images", flag="--skip_bad_images") -> None:
    """Raise one line for files that cannot be read: how many, the first few, and what to do.

    Args:
        bad: why, for each; what, flag: what such files are called, and the flag that leaves them out.
    """
    if bad:
        raise UserError(
            f"{len(bad)} of {total} {what} cannot be used: {first_few(bad, between='; ')}."
            f" Mend or remove them, or give {flag} True"
        )
