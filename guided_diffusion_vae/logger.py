"""Upstream's logging facade: key-value tables to the terminal, text, CSV, JSON lines, TensorBoard, Weights & Biases.

`logkv`, `logkv_mean` and `dumpkvs` fill and write one row; `log` writes a line; `log_formats` has the writers. A value
may be a 0-d tensor: it is read from the device only when the row is written, so that a training loop needs no
synchronisation per step.
"""

import contextlib
import datetime
import functools
import importlib.util
import os
import sys
import tempfile
import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

from .checkpoint import sweep
from .config import UserError, did_you_mean
from .folder_lock import hold, make_folder, release
from .log_formats import INSTALL, MAKERS, CSVOutputFormat, HumanOutputFormat, KVWriter, SeqWriter, make_output_format
from .log_formats import JSONOutputFormat as JSONOutputFormat  # upstream has it here
from .log_formats import TensorBoardOutputFormat as TensorBoardOutputFormat

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The log."""

    # where progress goes, by commas: stdout, log, csv, json, tensorboard, wandb; empty: OPENAI_LOG_FORMAT, else the
    # first three
    log_format: str = ""

    def __post_init__(self):
        for name in filter(None, self.log_format.split(",")):
            given = f"--log_format {self.log_format}: {name}"
            if name not in MAKERS:
                raise UserError(f"{given} is unknown{did_you_mean(name, MAKERS)}; known are {', '.join(MAKERS)}")
            if name in INSTALL and importlib.util.find_spec(name) is None:
                raise UserError(f"{given} is not installed; {INSTALL[name]}")


class Logger:
    """Collects one row of values, writes rows and lines to its formats."""

    DEFAULT: Any = None  # loggers
    CURRENT: Any = None

    def __init__(self, dir, output_formats, comm=None):
        self.dir, self.output_formats, self.comm, self.level = dir, output_formats, comm, INFO
        self.name2val, self.name2cnt = OrderedDict(), defaultdict(int)

    def logkv(self, key, val):
        self.name2val[key] = val

    def logkv_mean(self, key, val):
        count = self.name2cnt[key]
        old: Any = self.name2val.get(key)
        self.name2val[key] = val if not count else old * (count / (count + 1)) + val * (1 / (count + 1))
        self.name2cnt[key] = count + 1

    def dumpkvs(self):
        row = OrderedDict((key, _plain(val)) for key, val in self.name2val.items())
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {k: (v, self.name2cnt.get(k, 1)) for k, v in row.items()})
        if self.level != DISABLED:
            self._write(KVWriter, lambda format: format.writekvs(row))
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args, level=INFO):
        if self.level <= level:
            self._write(SeqWriter, lambda format: format.writeseq(args))

    def _write(self, kind, write):
        """Write to every format of a kind; one that cannot be written to, say on a full disk, is said and left out."""
        for format in [format for format in self.output_formats if isinstance(format, kind)]:
            try:
                write(format)
            except BrokenPipeError:  # `... | head`: nobody reads any more
                raise
            except OSError as error:
                self.output_formats.remove(format)
                print(f"warning: the log is incomplete from here on ({error})", file=sys.stderr, flush=True)

    def forget_after(self, step):
        self._write(CSVOutputFormat, lambda format: format.forget_after(step))

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        for format in self.output_formats:
            with contextlib.suppress(OSError):  # a full disk: it has been said
                format.close()
        if self.dir:
            release(self.dir)


def _plain(value):
    """A Python number for a 0-d tensor or numpy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def mpi_weighted_mean(comm, local_name2valcount):
    """Mean over ranks of {name: (value, count)}, weighted by count. Collective: call on every rank of `comm`."""
    everyone = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    sums, counts = defaultdict(float), defaultdict(float)
    for row in everyone:
        for name, (value, count) in row.items():
            sums[name] += float(value) * count
            counts[name] += count
    return {name: sums[name] / counts[name] for name in sums}


def get_rank_without_mpi_import():
    """This process's rank as the launcher's environment tells it; 0 when alone."""
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ["SLURM_PROCID"]) if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ else 0


def configure(dir=None, format_strs=None, comm=None, log_suffix="", log_format=""):
    """Log into `dir`: the argument, else OPENAI_LOGDIR, else a dated folder below the temporary folder.

    Args:
        log_format: of `LogConfig`, for the first process; the others follow OPENAI_LOG_FORMAT_MPI.

    Raises:
        UserError: it is no folder, or another run works there.
        SaveError: it cannot be made or written to.
    """
    if dir is None:
        dir = os.getenv("OPENAI_LOGDIR")
    if not dir:
        dir = os.path.join(tempfile.gettempdir(), datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f"))
    dir = os.path.expanduser(dir)
    rank = get_rank_without_mpi_import()
    left = []
    if rank == 0:
        hold(dir, "--log_dir")
        left = sweep(dir)
    else:
        make_folder(dir, "--log_dir")
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT", "stdout,log,csv") if rank == 0 else ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = ((log_format if rank == 0 else "") or os.getenv(variable, default)).split(",")
    formats = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir=dir, output_formats=formats, comm=comm)
    if formats:
        log(f"Logging to {dir}")
    for name in left:
        log(f"removed the incomplete file {name}")


def reset():
    """Return to the default logger (stdout only)."""
    if Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """Configure for the length of a with-block."""
    previous = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = previous


def get_current() -> Logger:
    """The logger in use; standard output only until `configure` is called."""
    if Logger.CURRENT is None:
        Logger.DEFAULT = Logger.CURRENT = Logger(dir=None, output_formats=[HumanOutputFormat(sys.stdout)])
    return Logger.CURRENT


def logkv(key, val):
    """Set a value of the row that the next `dumpkvs` writes."""
    get_current().logkv(key, val)


def logkv_mean(key, val):
    """Add to the running mean of a value of the row; `val` may be a 0-d tensor."""
    get_current().logkv_mean(key, val)


def logkvs(d):
    """Set several values of the row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs():
    """Write the row and start a new one; returns it as plain numbers."""
    return get_current().dumpkvs()


def forget_after(step):
    """Drop the rows of later steps than this from the table: a run that goes on from there writes them again."""
    get_current().forget_after(step)


def getkvs():
    """The row so far."""
    return get_current().name2val


def log(*args, level=INFO):
    """Write a line of words to the terminal and log.txt."""
    get_current().log(*args, level=level)


def debug(*args):
    log(*args, level=DEBUG)


def info(*args):
    log(*args, level=INFO)


def warn(*args):
    log(*args, level=WARN)


def error(*args):
    log(*args, level=ERROR)


def set_level(level):
    get_current().set_level(level)


def set_comm(comm):
    get_current().set_comm(comm)


def get_dir():
    """The folder that this run writes to."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename):
    """Add the seconds spent in a with-block to the value `wait_<scopename>`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        row = getkvs()
        row[f"wait_{scopename}"] = row.get(f"wait_{scopename}", 0.0) + time.perf_counter() - start


def profile(n):
    """Decorator: `profile_kv` around every call."""

    def decorate(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
