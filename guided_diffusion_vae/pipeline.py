"""From a folder of images to a report: extract latents, train, sample, judge; each by its own script.

A stage that is done leaves `STAGE.done` with the command that did it and what went in. Run again, the pipeline skips
what is done and goes on where it was interrupted; a stage whose command or input has changed is done again. A file lock
that the running script inherits keeps two pipelines out of one folder, also after the first was killed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from . import checkpoint
from .config import Run, UserError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline."""

    out_dir: str = "runs/pipeline"  # where everything goes: latents/, train/, samples/, report/
    heldout_dir: str = ""  # real images of other sessions, to judge by; empty: --val_dir
    processes: int = 1  # how many share training and sampling; a step has --batch_size images of each
    num_samples_per_user: int = 8  # images to make of every user; without users, in all
    sample_batch_size: int = 32  # images at a time on each process, when sampling
    keep_best: bool = True  # sample from the average with the lowest validation loss; False: from the last one

    def __post_init__(self):
        for name in ("processes", "num_samples_per_user", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One script's turn.

    Args:
        command: builds its words, once the stages before it are done.
        source: a file that the stage depends on beside its command; the stage is done again when it changes.
    """

    name: str
    command: Callable[[], list[str]]
    source: Callable[[], Path | None] = lambda: None


def flags(run: Run, *sections) -> list[str]:
    """What was given (by flag or recipe) of these sections' settings, as words of a command."""
    names = [field.name for section in sections for field in fields(section) if field.name in run.given]
    return [word for name in dict.fromkeys(names) for word in (f"--{name}", _text(getattr(run, name)))]


def _text(value) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def python(script: str, *words, processes: int = 1) -> list[str]:
    """The command that runs a script, on several processes if asked."""
    base = [sys.executable, str(SCRIPTS / script)]
    if processes > 1 and shutil.which("mpiexec"):
        base = ["mpiexec", "-n", str(processes), *base]
    elif processes > 1:
        base = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", base[1]]
    return [*base, *map(str, words)]


def run_stages(stages: list[Stage], folder: Path, say=print) -> None:
    """Run what is not done, in order.

    Raises:
        UserError: another pipeline works in this folder.
        SystemExit: with a script's exit code, if it failed or was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as lock:
        for stage in stages:
            command = stage.command()
            done, wanted = folder / f"{stage.name}.done", _record(stage, command)
            if _read(done) == wanted:
                say(f"{stage.name}: done before")
                continue
            done.unlink(missing_ok=True)
            say(f"{stage.name}: {shown(command)}")
            code, stopped = _run(command, lock)
            if code or stopped:
                how = "stopped" if stopped else f"ended with code {code}"
                say(f"{stage.name}: {how}; the same command goes on from here")
                raise SystemExit(code or 75)
            with checkpoint.atomic_write(done) as handle:
                handle.write(json.dumps(_record(stage, command)).encode())


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    short = [os.path.relpath(word) if word.startswith(str(SCRIPTS)) else word for word in command]
    return " ".join("python" if word == sys.executable else word for word in short)


def _record(stage, command):
    source = stage.source()
    return {"command": command, "source": checkpoint.digest(source) if source and source.is_file() else None}


def _read(path: Path):
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


@contextlib.contextmanager
def _lock(folder: Path):
    """A lock on the folder, as a file descriptor that scripts inherit; without one where the system has none."""
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out_dir {folder}: another pipeline, or a script it started, still works there: wait or end it"
            ) from error
        yield handle.fileno()


def _run(command: list[str], lock: int | None) -> tuple[int, bool]:
    """Run to the end; hand a request to stop on to the script, once. Returns its code, and whether it was asked."""
    child = subprocess.Popen(command, start_new_session=True, pass_fds=() if lock is None else (lock,))
    asked = []

    def ask(number, frame):
        if not asked:
            os.killpg(child.pid, signal.SIGTERM)
        asked.append(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait(), bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def trained_average(folder: Path, *, best: bool) -> Path:
    """The moving average to sample from: the best by validation loss, or the last.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.glob("ema_*_best.pt")) if best else []
    found = found or sorted(folder.glob("ema_*.pt"), key=_step)
    if not found:
        raise UserError(f"{folder} holds no ema_*.pt: training has not saved yet")
    return found[-1]


def _step(path: Path) -> int:
    found = re.fullmatch(r"ema_.*_(\d+)\.pt", path.name)
    return int(found.group(1)) if found else -1
