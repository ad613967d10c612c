"""One run a folder: the files of two that write there at once would be mixed.

The lock is the system's (POSIX record locks, which NFS keeps, too): it ends with the process that holds it, however
that ends, and readers of data that outlive a killed process do not keep it. The file `.lock` says whose it is.
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import TextIO

from .checkpoint import SaveError
from .config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is kept out
    fcntl = None

_held: dict[tuple[int, Path], TextIO] = {}  # by process, for a fork inherits this table, but not the locks


def hold(folder, flag: str) -> None:
    """Make a folder and keep it for this process, until `release` or its end; one that it holds already stays held.

    Args:
        flag: what the user calls it, such as --log_dir.
    Raises:
        UserError: it is a file; another process holds it, which is named with its machine.
        SaveError: it cannot be made, or nothing can be written there.
    """
    make_folder(folder, flag)
    key = os.getpid(), Path(folder).resolve()
    while fcntl and key not in _held:
        handle = _open(folder, flag)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with handle:
                handle.seek(0)
                holder = " ".join(handle.read(200).split()) or "another process"
            busy = f"{flag} {folder} is in use by {holder}"
            raise UserError(f"{busy}: wait for its end, or choose another folder") from error
        except OSError:  # a file system without locks
            return handle.close()
        if _is_there(key[1], handle):
            _held[key] = handle
            with contextlib.suppress(OSError):  # a full disk: the lock holds without words
                handle.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
        else:  # its holder took it away between our opening and our locking
            handle.close()


def release(folder) -> None:
    """Let others in; nothing for a folder that this process does not hold."""
    key = os.getpid(), Path(folder).resolve()
    if handle := _held.pop(key, None):
        if _is_there(key[1], handle):
            (key[1] / ".lock").unlink()
        with contextlib.suppress(OSError):
            handle.close()


@contextlib.contextmanager
def holding(folder, flag: str):
    """Hold a folder for as long as the block lasts, or for as long as it was to be held."""
    before = (os.getpid(), Path(folder).resolve()) in _held
    hold(folder, flag)
    try:
        yield
    finally:
        if not before:
            release(folder)


def make_folder(folder, flag: str) -> None:
    """Make a folder, and those above it; see `hold` for the errors."""
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{flag} {folder} is a file, or lies below one; give a folder") from error
    except OSError as error:
        raise SaveError(f"{flag} {folder} cannot be made ({error.strerror}); choose another folder") from error


def _open(folder, flag: str) -> TextIO:
    try:
        return open(Path(folder) / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write to {flag} {folder} ({error.strerror}): choose another folder") from error


def _is_there(folder: Path, handle) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(folder / ".lock"), os.fstat(handle.fileno()))
    return False
