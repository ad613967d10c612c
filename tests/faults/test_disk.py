"""Disks that are full, taken away or wrong: what was whole stays whole, and one line says what happened."""

import errno
import os
import resource
import shutil
import time

import pytest
from harness import (
    SMALL,
    TRAIN,
    VERBS,
    Job,
    assert_same_end,
    assert_tidy,
    contents,
    run,
    said,
    train,
    undisturbed,
    write_checkpoint,
)

from guided_diffusion_vae import logger, run_state

# ---- full ------------------------------------------------------------------------------------------------------------


def at_most(bytes_a_file):
    """For a process: no file longer than this, refused in the middle of a write as by a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))


def fails_with(action):
    """The error of an action in a copy of this process, as text; empty if it had none."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            action()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as told:
        return told.read()


@pytest.mark.fault(
    "the disk full at each 1/32 of the bytes of a checkpoint",
    promise="one error that says so; the checkpoint before is the newest, and nothing of the new one stays",
)
def test_full_in_a_checkpoint(tmp_path, record_property):
    write_checkpoint(tmp_path, 10)
    before, longest = contents(tmp_path), max(path.stat().st_size for path in tmp_path.iterdir())
    for share in range(32):

        def action(limit=longest * share // 32):
            at_most(limit)()
            write_checkpoint(tmp_path, 20)

        told = fails_with(action)
        assert told.startswith("SaveError: cannot write") and "earlier checkpoints are intact" in told, told
        assert contents(tmp_path) == before
    record_property("tried", 32)


LIMITS = {  # bytes a file: below the longest that the script writes
    "training": (4_000_000, "opt00"),
    "latent extraction": (3_000, "latents_rank00_shard000"),
    "sampling": (30_000, ".npz"),
    "autoencoder training": (300_000, "last.pt"),
    "classifier training": (3_000_000, "opt00"),
}


@pytest.mark.slow
@pytest.mark.fault(
    "the disk full during {verb}, by its script",
    promise="code 3 and one line that names the file; with room again the same command ends in the same bits",
)
@pytest.mark.parametrize("verb", LIMITS)
def test_full_by_script(verb, data, straight, tmp_path):
    (limit, name), verb = LIMITS[verb], VERBS[verb]
    source = verb.source(data, straight)
    with undisturbed(data, straight):
        said(run(verb.script, *verb.words(source, tmp_path / "out"), limit=at_most(limit)), 3, "cannot write", name)
        assert_tidy(tmp_path / "out")
        for out in ("out", "straight"):
            assert run(verb.script, *verb.words(source, tmp_path / out)).returncode == 0
        assert_same_end(tmp_path / "out", tmp_path / "straight", *verb.makes)
    assert_tidy(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.fault(
    "a disk of {size} that training fills with checkpoints",
    promise="code 3, one line; every checkpoint before is whole; with more room it goes on to the same bits",
)
@pytest.mark.parametrize("size", ["30M"])
def test_a_small_disk(size, data, straight, tmp_path):
    if os.system(f"mount -t tmpfs -o size={size} none {tmp_path} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        flags = [*TRAIN, *SMALL.split(), "--data_dir", data, "--log_dir", tmp_path / "run"]
        said(run("image_train_vae.py", *flags, "--keep_last", 0), 3, "000006.pt: the disk is full")
        assert run_state.newest_checkpoint(tmp_path / "run") == (str(tmp_path / "run" / "model000003.pt"), [])
        assert not list((tmp_path / "run").glob("*000006.pt"))
        os.system(f"mount -o remount,size=100M {tmp_path}")
        assert run("image_train_vae.py", *flags).returncode == 0
        assert_same_end(straight, tmp_path / "run", *VERBS["training"].makes)
    finally:
        os.system(f"umount {tmp_path}")


@pytest.mark.fault(
    "the disk full for progress.csv alone", promise="one warning; training goes on and ends in the same bits"
)
def test_full_for_the_log(data, straight, tmp_path, monkeypatch, capfd):
    real, rows = logger.CSVOutputFormat.writekvs, iter(range(100))

    def full_after_two(table, kvs):
        if next(rows) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(table.filename))
        real(table, kvs)

    monkeypatch.setattr(logger.CSVOutputFormat, "writekvs", full_after_two)
    train(data, tmp_path)
    assert capfd.readouterr().err.count("warning: the log is incomplete from here on") == 1
    assert_same_end(straight, tmp_path, *VERBS["training"].makes)
    assert_tidy(tmp_path)


# ---- taken away ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(
    "a folder that may not be written to, given to {verb}", promise="code 3 or 2 and one line that names it, at once"
)
@pytest.mark.parametrize("verb", VERBS)
def test_read_only(verb, data, straight, tmp_path):
    verb, locked = VERBS[verb], tmp_path / "locked"
    source = verb.source(data, straight)
    locked.mkdir()
    if os.system(f"mount -t tmpfs -o ro none {locked} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        with undisturbed(data, straight):
            done = run(verb.script, *verb.words(source, locked / "out"))
        said(done, 2 if verb.writes == "--out_dir" and done.returncode == 2 else 3, str(locked))
    finally:
        os.system(f"umount {locked}")


@pytest.mark.slow
@pytest.mark.fault(
    "the output folder deleted during {verb}", promise="code 3 and one line that names it at the next checkpoint"
)
@pytest.mark.parametrize("verb", ["training", "classifier training"])
def test_deleted(verb, data, tmp_path):
    verb, out = VERBS[verb], tmp_path / "out"
    endless = ["--iterations" if "classifier" in verb.script else "--max_steps", 10**6]
    with Job(verb.script, *verb.words(data, out), *endless) as job:
        job.until(lambda: list(out.glob("state*.pt")))
        shutil.move(out, tmp_path / "gone")
        begin = time.monotonic()
        said(job.end(), 3, "cannot write", str(out))
    assert time.monotonic() - begin < 30


@pytest.mark.fault(
    "a disk with less room than the checkpoints to come need",
    promise="a warning before the first step, with the numbers and what to give",
)
def test_too_little_room(data, straight, tmp_path, monkeypatch, capfd):
    """Three checkpoints are to come; with --keep_last 1 two lie there at a time."""
    size = sum((straight / name).stat().st_size for name in VERBS["training"].makes)
    usage = shutil.disk_usage(tmp_path)
    for room, keep, warns in ((2.5, 0, True), (3.5, 0, False), (2.5, 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(room * size)))  # noqa: B023
        train(data, tmp_path / f"{room}_{keep}", "--max_steps", 8, "--save_interval", 4, "--keep_last", keep)
        said_so = "GB left, which 3 checkpoints of about" in capfd.readouterr().out
        assert said_so == warns, (room, keep)
