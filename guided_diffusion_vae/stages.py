"""Scripts one after the other, in a folder that remembers which of them are done.

A stage leaves `STAGE.json`: its command, digests of what went in, and whether it is done. Run again, what is done is
skipped and what was interrupted goes on; what has another command or input is done again.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint
from .cli import shipped
from .config import EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_TRAINING, EXIT_USER, UserError
from .folder_lock import holding
from .stop_signals import ECHO_S

SCRIPTS = shipped("scripts")
HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # requests to stop; a script gets SIGTERM


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One script's turn. All but the names is asked for when the stages before it are done.

    Args:
        command: its words.
        inputs: digests of what it reads; the stage is done again when they change.
        made: a file without which it is not done.
        whole: whether all else that it made is there.
        goes_on: a folder of checkpoints that it goes on from, which is right with the same inputs only.
        clears: folders and files in the script's own, which tell of an earlier run more than the next overwrites.
    """

    name: str
    command: Callable[[], list[str]]
    inputs: Callable[[], list[str]]
    made: Callable[[], Path]
    whole: Callable[[], bool] = lambda: True
    goes_on: Path | None = None
    clears: tuple[Path, ...] = ()


def words_of(settings: dict) -> list[str]:
    """{"lr": 1e-3, "users": ["3", "7"], "seed": None} as the words of a command line: None leaves a flag out."""
    words = []
    for name, value in settings.items():
        several = isinstance(value, list | tuple)
        words += [] if value is None else [f"--{name}", *(map(str, value) if several else [str(value)])]
    return words


def python(script: str, own: dict, given: dict | None = None, *, processes: int = 1) -> list[str]:
    """The command that runs a script, on several processes if asked, with this Python's own mpiexec if it has one.

    Args:
        own: flags that win over those given; None leaves one out.
    """
    base, path = [sys.executable, str(SCRIPTS / script)], [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join(path))
    if processes > 1 and mpiexec:
        base = [mpiexec, "-n", str(processes), *base]
    elif processes > 1:
        base = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", base[1]]
    return base + words_of(own | {name: value for name, value in (given or {}).items() if name not in own})


def shown(command: list[str]) -> str:
    """The command as one would type it."""
    short = {sys.executable: "python", shutil.which("mpiexec"): "mpiexec"}
    return shlex.join(os.path.relpath(w) if w.startswith(f"{SCRIPTS}{os.sep}") else short.get(w, w) for w in command)


def run_stages(stages: list[Stage], folder: Path, say=print) -> None:
    """Run what is not done, in order.

    Raises:
        UserError: another pipeline works in this folder; it cannot be written; the data of a training have changed.
        SystemExit: with a script's exit code, if it failed or was stopped.
    """
    with holding(folder, "--out_dir"), _Requests() as requests:
        checkpoint.sweep(folder)
        for stage in stages:
            command, inputs = stage.command(), stage.inputs()
            note, wanted = folder / f"{stage.name}.json", {"command": command, "inputs": inputs, "done": True}
            before = _read(note)
            if before == wanted and stage.made().is_file() and stage.whole():
                say(f"{stage.name}: done before")
                continue
            used = stage.goes_on and any(stage.goes_on.glob("model*.pt"))
            if used and before.get("inputs", inputs) != inputs:
                raise UserError(
                    f"--data_dir has changed, but {stage.goes_on} holds a training on the old: give another --out_dir"
                )
            for place in stage.clears if before else ():
                if place.exists():
                    with holding(place.parent, "--out_dir"):  # a script whose pipeline was killed may work there
                        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink()
            _write(note, wanted | {"done": False})
            say(f"{stage.name}: {shown(command)}")
            code = requests.run(command)
            if code == 0:
                _write(note, wanted)
            if requests.asked and code not in (EXIT_USER, EXIT_ENVIRONMENT, EXIT_TRAINING):
                code = EXIT_STOPPED  # whatever became of the script: what it has finished is kept
            if code:
                how = "stopped" if code == EXIT_STOPPED else f"ended with code {code}"
                say(f"{stage.name}: {how}; the same command goes on from here")
                raise SystemExit(code if code > 0 else 128 - code)


def _read(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def _write(path: Path, note: dict) -> None:
    with checkpoint.atomic_write(path) as handle:
        handle.write(json.dumps(note).encode())


class _Requests:
    """Hands requests to stop on to the running script; it saves at the first and leaves at once at a later one."""

    def __enter__(self):
        self.child, self.asked, self.previous = None, 0.0, {}
        for number in (getattr(signal, name, None) for name in HANDED_ON):
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        now = time.monotonic()
        if self.asked and now - self.asked < ECHO_S:
            return
        self.asked = now
        if self.child:
            os.write(2, b"asked to stop: waiting for the script; asked again, it leaves without saving\n")
            self.child.terminate()  # the script alone: workers of its own must live until it has saved

    def run(self, command: list[str]) -> int:
        """Run a command to its end; returns its code, below 0 if a signal ended it."""
        if self.asked:
            return EXIT_STOPPED
        how = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
        self.child = subprocess.Popen(command, **how)
        if self.asked:  # meanwhile
            self.child.terminate()
        try:
            return self.child.wait()
        finally:
            self.child = None

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
