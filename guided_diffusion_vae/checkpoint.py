"""Files that are whole or absent.

A file is written to a temporary name in the same folder, flushed to disk, and renamed: whoever looks sees the old file
or the new one, never half of either, and a full disk costs only the new one. Files are read as data, never as code:
`weights_only=True` for .pt and .ckpt, safetensors otherwise.
"""

import contextlib
import csv
import errno
import hashlib
import io
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch as th

from .config import UserError

warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what cannot be read is one line, see `load`


class SaveError(OSError):
    """A file could not be written; whatever was there before is intact. Scripts exit with code 3."""


@contextlib.contextmanager
def atomic_write(path):
    """Give a binary file handle whose contents appear under `path` only if the block ends without an error.

    Raises:
        SaveError: the disk is full or the folder cannot be written; the previous file is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise _save_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder) -> list[str]:
    """Remove what killed processes left half written in a folder, down to two below it; returns the files' names."""
    places = (path for below in ("", "*/", "*/*/") for path in Path(folder).glob(f"{below}.*.tmp-*"))
    left = [path for path in places if re.fullmatch(r"\..+\.tmp-\d+", path.name) and not path.is_dir()]
    for path in left:
        path.unlink(missing_ok=True)
    return [path.name for path in left]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _save_error(path: Path, error: Exception) -> Exception:
    if isinstance(error, RuntimeError) and "unexpected pos" not in str(error) and "write" not in str(error):
        return error  # not a disk's fault
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, RuntimeError)
    why = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
    return SaveError(f"cannot write {path}: {why}; earlier checkpoints are intact. Free space or choose another folder")


def save(obj, path) -> None:
    """`torch.save`, atomically."""
    with atomic_write(path) as handle:
        th.save(obj, handle)


def save_safetensors(tensors: dict[str, th.Tensor], path, metadata: dict[str, str]) -> None:
    """Tensors and words about them as one .safetensors file, atomically."""
    from safetensors.torch import save

    with atomic_write(path) as handle:
        handle.write(save(tensors, metadata))


def save_csv(rows, path) -> None:
    """Rows of values as a .csv file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic_write(path) as handle:
        handle.write(text.getvalue().encode())


def digest(path) -> str:
    """SHA-256 of a file, as hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load(path, map_location: th.device | str = "cpu") -> Any:
    """Read what `save` (or upstream) wrote: tensors and plain values, never code.

    Raises:
        UserError: the file is missing, damaged, or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder; give a file in it' if path.is_dir() else 'does not exist'}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        try:  # safetensors 0.8.0 keeps 8 KB of every file that its load_file opens
            return {name: tensor.to(map_location) for name, tensor in from_bytes(path.read_bytes()).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error
    refuse_flipped(path)
    try:
        return th.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "blocked" in line), "")
        raise UserError(f"{path} holds more than tensors and is not loaded. {reason}".strip()) from error
    except Exception as error:  # random bytes make an unpickler raise anything
        size = path.stat().st_size
        raise UserError(f"{path} is damaged or not a checkpoint ({size:,} bytes; was it copied whole?)") from error


def refuse_flipped(path: Path) -> None:
    """Raise if a part of a .pt file is not what was written: PyTorch stores checksums, but does not look at them.

    Raises:
        UserError: names the file.
    """
    wrong = None
    with contextlib.suppress(Exception):  # of zipfile, zlib and struct; PyTorch will say why
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    if wrong:
        raise UserError(f"{path} is damaged: its part {wrong} does not have the checksum it was written with")


def load_state_dict(path, map_location: th.device | str = "cpu") -> dict[str, th.Tensor]:
    """Read a state_dict, also from under a `state_dict` key (Lightning's layout).

    Raises:
        UserError: see `load`, or the file holds no tensors by name.
    """
    loaded = load(path, map_location)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    pairs = loaded.items() if isinstance(loaded, dict) else ()
    tensors = OrderedDict((k, v) for k, v in pairs if th.is_tensor(v) and isinstance(k, str))
    if not tensors:
        raise UserError(f"{path} holds no weights")
    return tensors
