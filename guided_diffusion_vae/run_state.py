"""Checkpoints on disk: upstream's three kinds of file, and the run state that makes them one.

`model000010.pt`, `ema_0.9999_000010.pt` and `opt000010.pt` are upstream's. `state000010.pt` is written last and is the
commit mark: it lists the others with length and SHA-256, and holds what the continuation needs beside them (step,
random states of every process, loss scale, sampler). A checkpoint without its state is upstream's, or was cut off: the
first of a run, which could be either, is marked by `begun000010.pt` for as long as it is being written.

A run with `--sharding fsdp2` has a folder `shards000010/` in the place of the optimizer's file; its files are listed,
too. A folder without a state tells that its checkpoint was cut off.
"""

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from . import checkpoint
from .config import UserError

FORMAT = 1
NUMBERED = re.compile(r"model(\d+)\.[^/]*$")  # a checkpoint of a run, at a step


class NewerVersion(UserError):
    """A checkpoint that this program is too old to read. It is whole, so that no earlier one must take its place."""


def write_checkpoint(folder: Path, number: int, files: dict[str, object], state: dict) -> None:
    """Write the files, then the state that commits them.

    Raises:
        SaveError: the disk is full; what was complete before is still complete.
    """
    written, mark = [], f"begun{number:06d}.pt"
    try:
        if not any(folder.glob("state*.pt")):  # where there is none, a model without one is taken for upstream's
            checkpoint.save({}, folder / mark)
            written.append(mark)
        for name, obj in files.items():
            checkpoint.save(obj, folder / name)
            written.append(name)
    except OSError:
        remove(folder, written)
        raise
    commit(folder, number, describe(folder, files), state)
    remove(folder, [path.name for path in folder.glob("begun*.pt")])


def describe(folder: Path, names) -> dict[str, list]:
    """Length and SHA-256 of files, by name (relative to the folder)."""
    return {name: [(folder / name).stat().st_size, checkpoint.digest(folder / name)] for name in names}


def commit(folder: Path, number: int, described: dict[str, list], state: dict) -> None:
    """Write the state that makes described files a checkpoint."""
    checkpoint.save({"format": FORMAT, "files": described, **state}, folder / f"state{number:06d}.pt")


def remove(folder: Path, names) -> None:
    """Delete files, and the folders inside `folder` that this empties; a name that leads out of it is passed over."""
    inside = folder.resolve()
    names = [name for name in names if (folder / name).resolve().is_relative_to(inside)]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names} - {folder}:
        with contextlib.suppress(OSError):  # gone already, or somebody else's file is in it
            parent.rmdir()


def shards_folder(folder: Path, number: int) -> Path:
    """Where the shards of a checkpoint lie."""
    return folder / f"shards{number:06d}"


def clear_shards(folder: Path, number: int) -> None:
    """Make room for a sharded checkpoint: what bore its number before is one no longer."""
    (folder / f"state{number:06d}.pt").unlink(missing_ok=True)
    shutil.rmtree(shards_folder(folder, number), ignore_errors=True)


def _cut_off(folder: Path) -> set[int]:
    """The numbers of sharded checkpoints, and of a run's first, that nobody committed."""
    numbers = {*_numbers((path.with_suffix(".pt") for path in folder.glob("shards*")), "shards")}
    numbers |= {*_numbers(folder.glob("begun*.pt"), "begun")}
    return {number for number in numbers if not (folder / f"state{number:06d}.pt").is_file()}


def read_state(model_path) -> dict:
    """The run state beside a model file, its files verified; {} if the model has none (upstream's).

    Raises:
        UserError: the checkpoint is damaged.
        NewerVersion: it was written by a newer program.
    """
    path = Path(model_path)
    number = _number(path, "model")
    state_path = path.with_name(f"state{number:06d}.pt") if number is not None else None
    if state_path is None or not state_path.is_file():
        return {}
    state = checkpoint.load(state_path)
    if state["format"] > FORMAT:
        raise NewerVersion(f"{state_path} was written by a newer version of this program; update it")
    for name, (size, sha256) in state["files"].items():
        file = path.parent / name
        if not file.is_file() or file.stat().st_size != size or checkpoint.digest(file) != sha256:
            raise UserError(f"{file} is missing or damaged; choose an earlier checkpoint, or --resume_checkpoint auto")
    return state


def parse_resume_step_from_filename(filename) -> int:
    """The step in a name such as `dir/model000010.pt`: 10; 0 for any other name."""
    found = NUMBERED.search(str(filename))
    return int(found.group(1)) if found else 0


def find_ema_checkpoint(main_checkpoint, step, rate):
    """The average that was saved with a checkpoint, or None."""
    if not main_checkpoint:
        return None
    path = Path(main_checkpoint).with_name(f"ema_{rate}_{step:06d}.pt")
    return str(path) if path.is_file() else None


def refuse_used_folder(folder, resume_checkpoint: str = "") -> None:
    """Refuse to start a new run where another's checkpoints lie: they would be mixed.

    Args:
        resume_checkpoint: "auto" and a model*.pt go on with a run; other weights start a new one.
    Raises:
        UserError: names the last step that is there, and both ways out.
    """
    if resume_checkpoint == "auto" or NUMBERED.search(resume_checkpoint):
        return
    numbers = _numbers(Path(folder).glob("model*.pt"), "model")
    if numbers:
        raise UserError(
            f"--log_dir {folder} holds a run up to step {max(numbers)}: go on with it by --resume_checkpoint auto,"
            " or choose another --log_dir for a new one"
        )


def newest_checkpoint(folder) -> tuple[str, list[str]]:
    """The newest complete model file in a folder ("" if there is none), and notes on what was passed over.

    Raises:
        NewerVersion: a newer program went on with this run.
    """
    folder, notes = Path(folder), []
    notes += [f"removed the incomplete file {name}" for name in checkpoint.sweep(folder)]
    cut_off = _cut_off(folder)
    notes += [f"passed over checkpoint {number}: it was cut off before it was complete" for number in sorted(cut_off)]
    numbers = sorted(_numbers(folder.glob("state*.pt"), "state"), reverse=True)
    for number in numbers:
        model = folder / f"model{number:06d}.pt"
        try:
            read_state(model)
            return str(model), notes
        except NewerVersion:
            raise
        except UserError as error:
            notes.append(f"passed over checkpoint {number}: {error}")
    bare = sorted(_numbers(folder.glob("model*.pt"), "model") - cut_off - set(numbers))
    if bare and not numbers:
        notes.append(f"model{bare[-1]:06d}.pt has no run state beside it: continuing as upstream does")
        return str(folder / f"model{bare[-1]:06d}.pt"), notes
    return "", notes


def prune(folder: Path, keep: int, newest: int | None = None, *, every: int = 0) -> None:
    """Delete all but the newest `keep` complete checkpoints, the state first; and the shards of those cut off.

    Args:
        newest: the number that was just written; higher ones, which were damaged or left behind, do not count.
        every: multiples of it stay, too; 0: none.
    """
    numbers = sorted(_numbers(folder.glob("state*.pt"), "state"))
    old = [number for number in numbers if newest is None or number <= newest][:-keep]
    for number in [number for number in old if not (every and number and number % every == 0)]:
        path = folder / f"state{number:06d}.pt"
        names = checkpoint.load(path)["files"]
        path.unlink()
        remove(folder, names)
    for number in _cut_off(folder):
        shutil.rmtree(shards_folder(folder, number), ignore_errors=True)


def lack_of_room(folder: Path, size: int, count: int) -> str:
    """What to say, and to do, if so many checkpoints of so many bytes do not fit on the disk; empty if they do."""
    free, need = shutil.disk_usage(folder).free, size * count
    if need <= free:
        return ""
    several = (
        f"{count} checkpoints of about {size / 1e9:.3g} GB do"
        if count > 1
        else f"a checkpoint of {size / 1e9:.3g} GB does"
    )
    remedy = "give --keep_last 2, or another --log_dir" if count > 3 else "free space, or give another --log_dir"
    return f"--log_dir {folder} has {free / 1e9:.3g} GB left, which {several} not fit: {remedy}"


def seed_weights(seed: int) -> None:
    """From here on weights are drawn from this seed."""
    th.manual_seed(seed)


def get_random_state() -> dict:
    """The global generators' states, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
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


def _numbers(paths: Iterable[Path], prefix: str) -> set[int]:
    return {number for path in paths if (number := _number(path, prefix)) is not None}


def _number(path: Path, prefix: str) -> int | None:
    found = re.fullmatch(rf"{prefix}(\d+)\.pt", path.name)
    return int(found.group(1)) if found else None
