"""Checkpoints on disk: upstream's three kinds of file, and the run state that makes them one.

`model000010.pt`, `ema_0.9999_000010.pt` and `opt000010.pt` are upstream's. `state000010.pt` is written last and is the
commit mark: it lists the others with length and SHA-256, and holds what the continuation needs beside them (step,
random states of every process, loss scale, sampler). A checkpoint without its state was cut off, or is upstream's.
"""

import re
from pathlib import Path

import numpy as np
import torch as th

from . import checkpoint
from .config import UserError

FORMAT = 1


def write_checkpoint(folder: Path, number: int, files: dict[str, object], state: dict) -> None:
    """Write the files, then the state that commits them.

    Raises:
        SaveError: the disk is full; what was complete before is still complete.
    """
    written = []
    try:
        for name, obj in files.items():
            checkpoint.save(obj, folder / name)
            written.append(name)
    except OSError:
        for name in written:
            (folder / name).unlink(missing_ok=True)
        raise
    listed = {name: [(folder / name).stat().st_size, checkpoint.digest(folder / name)] for name in files}
    checkpoint.save({"format": FORMAT, "files": listed, **state}, folder / f"state{number:06d}.pt")


def read_state(model_path) -> dict:
    """The run state beside a model file, its files verified; {} if the model has none (upstream's).

    Raises:
        UserError: the checkpoint is damaged or of a newer version.
    """
    path = Path(model_path)
    number = _number(path, "model")
    state_path = path.with_name(f"state{number:06d}.pt") if number is not None else None
    if state_path is None or not state_path.is_file():
        return {}
    state = checkpoint.load(state_path)
    if state["format"] > FORMAT:
        raise UserError(f"{state_path} was written by a newer version of this program; update it")
    for name, (size, sha256) in state["files"].items():
        file = path.with_name(name)
        if not file.is_file() or file.stat().st_size != size or checkpoint.digest(file) != sha256:
            raise UserError(f"{file} is missing or damaged; choose an earlier checkpoint, or --resume_checkpoint auto")
    return state


def refuse_used_folder(folder) -> None:
    """Refuse to start a new run where another's checkpoints lie: they would be mixed.

    Raises:
        UserError: names the last step that is there, and both ways out.
    """
    numbers = {_number(path, "model") for path in Path(folder).glob("model*.pt")} - {None}
    if numbers:
        raise UserError(
            f"--log_dir {folder} holds a run up to step {max(numbers)}: go on with it by --resume_checkpoint auto,"
            " or choose another --log_dir for a new one"
        )


def newest_checkpoint(folder) -> tuple[str, list[str]]:
    """The newest complete model file in a folder ("" if there is none), and notes on what was passed over."""
    folder, notes = Path(folder), []
    for leftover in folder.glob(".*.tmp-*"):
        notes.append(f"removed the incomplete file {leftover.name}")
        leftover.unlink(missing_ok=True)
    numbers = sorted({_number(path, "state") for path in folder.glob("state*.pt")} - {None}, reverse=True)
    for number in numbers:
        model = folder / f"model{number:06d}.pt"
        try:
            read_state(model)
            return str(model), notes
        except UserError as error:
            notes.append(f"passed over checkpoint {number}: {error}")
    bare = sorted({_number(path, "model") for path in folder.glob("model*.pt")} - {None} - set(numbers))
    if bare and not numbers:
        notes.append(f"model{bare[-1]:06d}.pt has no run state beside it: continuing as upstream does")
        return str(folder / f"model{bare[-1]:06d}.pt"), notes
    return "", notes


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, the state first."""
    numbers = sorted({_number(path, "state") for path in folder.glob("state*.pt")} - {None})
    for number in numbers[:-keep]:
        path = folder / f"state{number:06d}.pt"
        names = checkpoint.load(path)["files"]
        path.unlink()
        for name in names:
            (folder / name).unlink(missing_ok=True)


def get_random_state() -> dict:
    """The global generators' states, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": th.get_rng_state(),
        "numpy": [name, th.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if th.cuda.is_available():
        state["cuda"] = th.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Put the global generators into the states that `get_random_state` gave."""
    th.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and th.cuda.is_available():
        th.cuda.set_rng_state(state["cuda"])


def _number(path: Path, prefix: str) -> int | None:
    found = re.fullmatch(rf"{prefix}(\d+)\.pt", path.name)
    return int(found.group(1)) if found else None
