"""The log's writers: what was written is read back by the readers of others."""

import contextlib
import csv
import importlib.util
import json
import os

import pytest
import torch as th

from guided_diffusion_vae import logger
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.logger import LogConfig


@contextlib.contextmanager
def logging_to(folder, log_format):
    logger.configure(dir=str(folder), log_format=log_format)
    try:
        yield
    finally:
        logger.reset()


def write_rows(folder, log_format, steps):
    with logging_to(folder, log_format):
        for step in steps:
            logger.logkv("step", step)
            logger.logkv_mean("loss", th.tensor(1.0 / step))
            logger.logkv_mean("loss", th.tensor(3.0 / step))
            logger.dumpkvs()


def test_the_flag_wins_over_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log")
    write_rows(tmp_path / "flag", "json,csv", [1, 2])
    write_rows(tmp_path / "variable", "", [1, 2])
    assert {path.name for path in (tmp_path / "flag").iterdir()} >= {"progress.csv", "progress.json"}
    assert not (tmp_path / "flag" / "log.txt").exists() and (tmp_path / "variable" / "log.txt").exists()
    lines = [json.loads(line) for line in (tmp_path / "flag" / "progress.json").read_text().splitlines()]
    with open(tmp_path / "flag" / "progress.csv", newline="") as handle:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(handle)]
    assert lines == rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_other_processes_follow_their_own_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "json")
    write_rows(tmp_path, "csv", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["progress-rank001.json"]


def test_unknown_and_missing_formats_are_said_before_the_run(monkeypatch):
    with pytest.raises(UserError, match="--log_format stdout,tensorbord: tensorbord is unknown.*tensorboard"):
        LogConfig(log_format="stdout,tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'guided_diffusion_vae\[wandb\]'"):
        LogConfig(log_format="csv,wandb")


def test_tensorboard_reads_its_rows(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_rows(tmp_path, "tensorboard", [10, 20])
    found = events.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (10, pytest.approx(0.2)),
        (20, pytest.approx(0.1)),
    ]


def records_of(log: bytes):
    """The records of a log in LevelDB's format: blocks of 32 KiB, and pieces with checksum, length and kind."""
    place, whole = 7, b""  # after the magic word
    while place + 7 <= len(log):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        size, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        whole += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole one, or the last piece
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_reads_its_rows_and_a_resumed_run_goes_on_in_them(tmp_path, monkeypatch):
    """Offline: no account, no network."""
    pytest.importorskip("wandb")
    wandb_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "user_study"
    folder.mkdir()
    (folder / "run.yaml").write_text("lr: 0.001\n")
    write_rows(folder, "wandb", [10, 20])
    write_rows(folder, "wandb", [30])
    runs, rows, configs = set(), [], []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(wandb_pb2.Record.FromString, records_of(file.read_bytes())):
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.display_name, record.run.project))
                configs += [(item.key, item.value_json) for item in record.run.config.update]
            if record.HasField("config"):
                configs += [(item.key, item.value_json) for item in record.config.update]
            if record.HasField("history"):
                items = {"".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append((int(items["_step"]), float(items["loss"])))
    known = (folder / "wandb_id.txt").read_text()
    assert runs == {(known, "user_study", "guided_diffusion_vae")}
    assert rows == [(10, pytest.approx(0.2)), (20, pytest.approx(0.1)), (30, pytest.approx(2 / 30))]
    assert ("lr", "0.001") in configs
