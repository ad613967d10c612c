"""Where rows and lines of the log go: the terminal, text, CSV, JSON lines, TensorBoard, Weights & Biases.

Files are appended to, never emptied, so a resumed run keeps its history.
"""

import csv
import json
import os
import sys
import uuid
from itertools import chain
from pathlib import Path

import yaml

from .checkpoint import atomic_write, save_csv


class KVWriter:
    """Writes rows of key -> number."""

    def writekvs(self, kvs):
        raise NotImplementedError

    def close(self):
        pass


class SeqWriter:
    """Writes lines of words."""

    def writeseq(self, seq):
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """A table of keys and values for people; to a path (appended) or an open text stream."""

    def __init__(self, filename_or_file):
        self.owns = isinstance(filename_or_file, (str, os.PathLike))
        self.file = open(filename_or_file, "a", encoding="utf-8") if self.owns else filename_or_file

    def writekvs(self, kvs):
        cells = {
            self._cut(key): self._cut(f"{value:<8.3g}" if hasattr(value, "__float__") else str(value))
            for key, value in sorted(kvs.items(), key=lambda pair: pair[0].lower())
        }
        if not cells:
            return
        key_width = max(map(len, cells))
        value_width = max(map(len, cells.values()))
        dashes = "-" * (key_width + value_width + 7)
        rows = [f"| {key:<{key_width}} | {value:<{value_width}} |" for key, value in cells.items()]
        self._write("\n".join([dashes, *rows, dashes]))

    def writeseq(self, seq):
        self._write(" ".join(map(str, seq)))

    def _write(self, text):
        self.file.write(text + "\n")
        self.file.flush()

    @staticmethod
    def _cut(text, width=30):
        return text if len(text) <= width else text[: width - 3] + "..."

    def close(self):
        if self.owns:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object a line."""

    def __init__(self, filename):
        self.file = open(filename, "a", encoding="utf-8")

    def writekvs(self, kvs):
        self.file.write(json.dumps(kvs) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A CSV file whose header grows when a new key appears; earlier rows are padded."""

    def __init__(self, filename):
        self.filename = Path(filename)
        self.keys, self.rows = [], 0
        if self.filename.exists() and self.filename.stat().st_size:
            with open(self.filename, newline="", encoding="utf-8") as handle:
                self.keys = next(csv.reader(handle), [])

    def writekvs(self, kvs):
        new = sorted(set(kvs) - set(self.keys))
        if new:
            old = self.filename.read_text(encoding="utf-8").splitlines() if self.keys else []
            self.keys += new
            padded = [line + "," * len(new) for line in old[1:]]
            with atomic_write(self.filename) as handle:
                handle.write(("\n".join([",".join(self.keys), *padded]) + "\n").encode())
        with open(self.filename, "a", encoding="utf-8") as handle:
            handle.write(",".join(str(kvs.get(key, "")) for key in self.keys) + "\n")

    def forget_after(self, step):
        """Drop the rows of later steps, which a resumed run writes again, and one that was cut off."""
        if "step" not in self.keys:
            return
        place = self.keys.index("step")

        def stays(row):
            return len(row) == len(self.keys) and row[place] and float(row[place]) <= step

        with open(self.filename, newline="", encoding="utf-8") as handle:  # row by row: of a long run they are many
            _, *gone = (row for number, row in enumerate(csv.reader(handle)) if number == 0 or not stays(row))
        if gone:
            with open(self.filename, newline="", encoding="utf-8") as handle:
                rows = csv.reader(handle)
                save_csv(chain([next(rows)], filter(stays, rows)), self.filename)


INSTALL = {
    "tensorboard": "pip install 'guided_diffusion_vae[tb]'",
    "wandb": "pip install 'guided_diffusion_vae[wandb]'",
}


class TensorBoardOutputFormat(KVWriter):
    """TensorBoard events through torch (needs the `tb` extra)."""

    def __init__(self, dir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"tensorboard, for the log, cannot be loaded: {INSTALL['tensorboard']}") from error
        self.writer, self.step = SummaryWriter(dir), 0

    def writekvs(self, kvs):
        self.step = int(kvs.get("step", self.step + 1))
        for key, value in _numbers(kvs).items():
            self.writer.add_scalar(key, value, self.step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandbOutputFormat(KVWriter):
    """Weights & Biases (needs the `wandb` extra): a run called as the folder, which a resumed training continues.

    WANDB_PROJECT, WANDB_MODE=offline and all its other variables are wandb's own.
    """

    def __init__(self, dir):
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # theirs to install who log there
        except ImportError as error:
            raise ValueError(f"wandb, for the log, cannot be loaded: {INSTALL['wandb']}") from error
        self.place, self.described, self.step = Path(dir), False, 0
        known = self.place / "wandb_id.txt"
        if not known.is_file():
            with atomic_write(known) as handle:
                handle.write(uuid.uuid4().hex[:8].encode())
        about = {"project": os.getenv("WANDB_PROJECT", "guided_diffusion_vae"), "name": self.place.resolve().name}
        try:
            self.run = wandb.init(**about, id=known.read_text("utf-8").strip(), dir=str(dir), resume="allow")
        except wandb.Error as error:  # no key, no network
            raise ValueError(f"wandb, for the log: {error}; WANDB_MODE=offline needs no account") from error

    def writekvs(self, kvs):
        record = self.place / "run.yaml"  # which is there when the first row is
        if not self.described and record.is_file():
            self.run.config.update(yaml.safe_load(record.read_text("utf-8")), allow_val_change=True)
            self.described = True
        self.step = int(kvs.get("step", self.step + 1))
        self.run.log(_numbers(kvs), step=self.step)

    def close(self):
        self.run.finish()


def _numbers(kvs) -> dict[str, float]:
    return {key: float(value) for key, value in kvs.items() if hasattr(value, "__float__")}


MAKERS = {  # name -> writer, of a folder and a suffix of file names
    "stdout": lambda dir, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda dir, suffix: HumanOutputFormat(os.path.join(dir, f"log{suffix}.txt")),
    "json": lambda dir, suffix: JSONOutputFormat(os.path.join(dir, f"progress{suffix}.json")),
    "csv": lambda dir, suffix: CSVOutputFormat(os.path.join(dir, f"progress{suffix}.csv")),
    "tensorboard": lambda dir, suffix: TensorBoardOutputFormat(os.path.join(dir, f"tb{suffix}")),
    "wandb": lambda dir, suffix: WandbOutputFormat(dir),
}


def make_output_format(format, ev_dir, log_suffix=""):
    """The writer for one of stdout, log, json, csv, tensorboard, wandb, in the folder `ev_dir`."""
    os.makedirs(ev_dir, exist_ok=True)
    if format not in MAKERS:
        raise ValueError(f"Unknown format specified: {format}; known are {', '.join(MAKERS)}")
    return MAKERS[format](ev_dir, log_suffix)
