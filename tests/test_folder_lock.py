"""A folder is held by one process, for as long as it lives and no longer."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
from helpers import ROOT

from guided_diffusion_vae import folder_lock, logger
from guided_diffusion_vae.config import UserError

HOLDER = "import sys, time; from guided_diffusion_vae import folder_lock; folder_lock.hold(sys.argv[1], '--log_dir');"


def holder(folder, then="print('held', flush=True); time.sleep(60)"):
    command = [sys.executable, "-c", HOLDER + then, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is_and_a_kill_frees_the_folder(tmp_path):
    process = holder(tmp_path / "run")
    before = (tmp_path / "run" / ".lock").read_text()
    for _ in range(2):
        with pytest.raises(UserError, match=f"--log_dir .*run is in use by process {process.pid} on "):
            folder_lock.hold(tmp_path / "run", "--log_dir")
    assert (tmp_path / "run" / ".lock").read_text() == before
    process.kill()
    process.wait()
    with folder_lock.holding(tmp_path / "run", "--log_dir"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_a_reader_of_data_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    fork = "import os; child = os.fork(); print('held', flush=True) if child else None; time.sleep(60)"
    process = holder(tmp_path, fork)
    (orphan,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    process.kill()
    process.wait()
    try:
        with folder_lock.holding(tmp_path, "--log_dir"):
            assert os.path.exists(f"/proc/{orphan}")
    finally:
        os.kill(int(orphan), signal.SIGKILL)


def test_a_lock_that_is_taken_away_while_one_waits_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking, the holder ends and removes the file: who locks that file holds nothing."""
    real, opened = folder_lock._open, []

    def opens(folder, flag):
        opened.append(real(folder, flag))
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        return opened[-1]

    monkeypatch.setattr(folder_lock, "_open", opens)
    with folder_lock.holding(tmp_path, "--log_dir"):
        assert len(opened) == 2 and opened[0].closed
        with pytest.raises(AssertionError):
            holder(tmp_path)


def _take(folder, mine, count, wrong):
    """Hold a folder many times; a file in it tells if two ever do."""
    taken = 0
    while taken < count:
        try:
            with folder_lock.holding(folder, "--log_dir"):
                try:
                    os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
                    time.sleep(0.0005)
                    os.unlink(folder / "mine")
                except OSError:
                    wrong.value += 1
                taken += 1
        except UserError:
            time.sleep(0.0002)


def test_never_two_at_once(tmp_path):
    context = get_context("fork")
    wrong = context.Value("i", 0)
    several = [context.Process(target=_take, args=(tmp_path, i, 50, wrong)) for i in range(3)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0, 0, 0] and wrong.value == 0
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", none)
    folder_lock.hold(tmp_path, "--log_dir")
    folder_lock.release(tmp_path)


def test_a_logger_holds_its_folder_until_it_is_closed(tmp_path):
    logger.configure(dir=str(tmp_path / "run"), format_strs=[])
    try:
        with pytest.raises(AssertionError):
            holder(tmp_path / "run")
        with logger.scoped_configure(dir=str(tmp_path / "other"), format_strs=[]):
            assert (tmp_path / "other" / ".lock").exists()
        assert (tmp_path / "run" / ".lock").exists() and not (tmp_path / "other" / ".lock").exists()
    finally:
        logger.reset()
    holder(tmp_path / "run").kill()
