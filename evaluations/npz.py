"""Arrays of an .npz that somebody else may have made: what a header claims is checked before memory is taken.

Nothing is ever unpickled, and no member is unpacked to disk, whatever it is called.
"""

import io
import math
import zipfile
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from guided_diffusion_vae.config import UserError

HEAD_BYTES = 1 << 14  # of a member, that its header must lie in; NumPy's own limit is 10,000
WHOLE_BYTES = 1 << 32  # of an array that is loaded whole


class Header(NamedTuple):
    """What stands at the head of an array in an .npz."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    bytes: int


def read_header(archive: zipfile.ZipFile, name: str, at: str) -> Header:
    """The header of a member, if it tells the truth about the member's size.

    Args:
        at: what an error calls the file.
    Raises:
        UserError: Python objects; a lie. Anything else that zipfile and NumPy raise: it is no array.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(HEAD_BYTES))
    version = npy.read_magic(head)
    # 3.0 is 2.0 in UTF-8; the two differ for names of fields, which images have not
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(head)
    if dtype.hasobject:
        raise UserError(f"{at}: {name} holds Python objects, which are never loaded; save plain numbers")
    size, found = math.prod(shape) * dtype.itemsize, info.file_size - head.tell()
    if min(shape, default=0) < 0 or size != found:
        raise UserError(f"{at}: {name} claims {dtype} {shape}, {size:,} bytes, but {found:,} are there")
    return Header(shape, fortran, dtype, size)


def read_member(archive: zipfile.ZipFile, name: str, at: str, limit: int = WHOLE_BYTES) -> np.ndarray:
    """A member that is loaded whole.

    Raises:
        UserError: see `read_header`; more bytes than the limit.
    """
    header = read_header(archive, name, at)
    if header.bytes > limit:
        raise UserError(f"{at}: {name} has {header.bytes:,} bytes, more than the {limit:,} that are loaded")
    with archive.open(f"{name}.npy") as member:
        return npy.read_array(member, allow_pickle=False)
