"""kill -9 at any moment costs nothing but time."""

import io
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from harness import VERBS, Job, assert_same_end, assert_tidy, here, run, undisturbed, write_checkpoint

from guided_diffusion_vae import checkpoint, run_state

MOMENTS = int(os.environ.get("FAULT_MOMENTS", 10))


CASES = [(verb, ranks) for verb in VERBS for ranks in (1, 2) if (verb, ranks) != ("the pipeline", 2)]


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of all processes at random moments of {verb}, ranks: {ranks}",
    promise="the newest checkpoint is whole; the same command goes on and ends in the same bits (two ranks: within"
    " 1e-6); no temporary file stays; nothing else is touched",
)
@pytest.mark.parametrize("verb, ranks", CASES)
def test_killed_at_random_moments(verb, ranks, data, straight, tmp_path, record_property):
    verb, atol = VERBS[verb], 1e-6 if ranks > 1 else 0.0
    source = verb.source(data, straight)
    unhurt, out = tmp_path / "unhurt", tmp_path / "out"
    begin, draw = time.monotonic(), random.Random(ranks)
    assert run(verb.script, *verb.words(source, unhurt), ranks=ranks).returncode == 0
    seconds, killed = time.monotonic() - begin, 0

    def goes_to_its_end():
        done = run(verb.script, *verb.words(source, out), ranks=ranks)
        assert done.returncode == 0, done.stderr
        try:
            assert_same_end(unhurt, out, *verb.makes, atol=atol)
        except AssertionError:
            keep_evidence(unhurt, out)
            raise
        assert_tidy(out)

    with undisturbed(data, straight):
        while killed < MOMENTS:
            with Job(verb.script, *verb.words(source, out), ranks=ranks) as job:
                time.sleep(draw.triangular(0, seconds, seconds))  # more often late: the start is the same for all
                ended = job.process.poll()
            killed += ended is None
            for state in sorted(out.rglob("state*.pt"))[-1:]:
                run_state.read_state(state.with_name(state.name.replace("state", "model")))
            if ended is not None:
                assert ended == 0
                goes_to_its_end()
                shutil.rmtree(out)
        goes_to_its_end()
    record_property("tried", killed)


def keep_evidence(unhurt, out):
    """Both folders where no later run of pytest clears them away; what happens once in a thousand kills is rare."""
    place = Path(tempfile.mkdtemp(prefix="killed_"))
    for folder in (unhurt, out):
        shutil.copytree(folder, place / folder.name)
    print(f"kept in {place}")
    for file in sorted(path.relative_to(unhurt) for path in unhurt.rglob("*") if path.is_file()):
        same = (out / file).is_file() and (out / file).read_bytes() == (unhurt / file).read_bytes()
        print("same   " if same else "differs", file)
    for log in out.rglob("log.txt"):
        print(log.read_text())


# ---- inside the write of a checkpoint --------------------------------------------------------------------------------


def dies(action):
    """Let a copy of this process do something; whether it was killed there."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def assert_one_is_whole(folder, *numbers):
    """Whichever is the newest, its files hold what was saved under its number, and nothing half written stays."""
    newest, _ = run_state.newest_checkpoint(folder)
    number = run_state.parse_resume_step_from_filename(newest)
    assert number in numbers
    assert checkpoint.load(newest)["w"].unique().tolist() == [number]
    assert_tidy(folder)


def no_fsync(handle):
    """A killed process loses nothing that it gave to the kernel: only a power cut would, and disks are slow."""


class DiesAt(io.FileIO):
    """A file whose process is killed when it has this many bytes."""

    def __init__(self, path, mode, limit):
        super().__init__(path, mode)
        self.limit = limit

    def write(self, chunk):
        chunk = memoryview(chunk).cast("B")
        written = super().write(chunk[: self.limit - self.tell()])
        return written if written == len(chunk) else die()


@pytest.mark.fault(
    "kill -9 inside the write of each file of a checkpoint, at each 1/16 of its bytes",
    promise="the checkpoint before is the newest; the temporary file is swept",
)
def test_killed_inside_a_write(tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(os, "fsync", no_fsync)
    write_checkpoint(tmp_path, 10)
    tried = 0
    for file in sorted(tmp_path.glob("*10.pt")):
        for sixteenth in range(16):
            name, limit = file.name.replace("10", "20"), file.stat().st_size * sixteenth // 16
            cut = lambda path, mode: DiesAt(path, mode, limit) if name in str(path) else open(path, mode)  # noqa: B023, E731
            monkeypatch.setattr(checkpoint, "open", cut, raising=False)
            assert dies(lambda: write_checkpoint(tmp_path, 20))
            assert_one_is_whole(tmp_path, 10)
            tried += 1
    record_property("tried", tried)


@pytest.mark.fault(
    "kill -9 before each fsync and each rename of the write of a checkpoint, also over one of the same number",
    promise="the checkpoint before or the new one is whole, never none",
)
@pytest.mark.parametrize("number", [10, 20])
def test_killed_between_the_calls_of_a_write(tmp_path, number, monkeypatch, record_property):
    """`fail` at the n-th call, for n = 1, 2, ... until a write ends without having met it."""
    write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 10)
    calls = {name: getattr(os, name) for name in ("fsync", "replace", "open", "close")}
    calls["fsync"] = no_fsync
    for nth in range(1, 100):
        left = [nth]

        def counted(name):
            def call(*words, **options):
                left[0] -= 1  # noqa: B023
                return calls[name](*words, **options) if left[0] else die()  # noqa: B023

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, counted(name))
            killed = dies(lambda: write_checkpoint(tmp_path, number))
        assert_one_is_whole(tmp_path, 5, 10, number)
        if not killed:
            break
    assert nth > 16
    record_property("tried", nth - 1)


@pytest.mark.fault(
    "kill -9 before each file of a run's first checkpoint",
    promise="the run begins again, or goes on from upstream's model if it came from one: never from half of its own",
)
@pytest.mark.parametrize("upstreams", [None, 3])
def test_killed_in_the_first_write(tmp_path, upstreams, monkeypatch, record_property):
    monkeypatch.setattr(os, "fsync", no_fsync)
    if upstreams:
        write_checkpoint(tmp_path, upstreams)
        (tmp_path / f"state{upstreams:06d}.pt").unlink()
    save = checkpoint.save
    for files in range(1, 10):
        left = [files]

        def counted(obj, path):
            left[0] -= 1  # noqa: B023
            return save(obj, path) if left[0] else die()  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", counted)
            killed = dies(lambda: write_checkpoint(tmp_path, 10))
        newest, notes = run_state.newest_checkpoint(tmp_path)
        if not killed:
            break
        assert Path(newest).name == (f"model{upstreams:06d}.pt" if upstreams else ""), (files, newest)
        assert files == 1 or any("passed over checkpoint 10" in note and "cut off" in note for note in notes), notes
    assert Path(newest).name == "model000010.pt" and files > 3
    record_property("tried", files - 1)


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 before each file of the last write of an autoencoder's training",
    promise="the same command ends with the same last.pt and the same published autoencoder",
)
def test_killed_in_the_last_write_of_an_autoencoder(data, tmp_path, monkeypatch, record_property):
    verb, real = VERBS["autoencoder training"], os.replace
    here("vae_train", *verb.words(data, tmp_path / "straight"), "--lr_schedule", "constant")
    for nth in range(1, 6):  # two grids, the published file, epoch_0003.pt, last.pt
        out, left = tmp_path / str(nth), [nth]
        words = verb.words(data, out)

        def replace(*paths):
            left[0] -= 1  # noqa: B023
            return real(*paths) if left[0] else die()  # noqa: B023

        here("vae_train", *words, "--max_steps", 9, "--lr_schedule", "constant")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            assert dies(lambda: here("vae_train", *words, "--lr_schedule", "constant"))  # noqa: B023
        here("vae_train", *words, "--lr_schedule", "constant")
        assert_same_end(tmp_path / "straight", out, *verb.makes)
    record_property("tried", 5)


@pytest.mark.fault(
    "the clock set back a year, and the times of all files shuffled", promise="the newest is that of the highest step"
)
def test_times_of_files_say_nothing(tmp_path, record_property):
    for number in (9, 10, 100000, 1000000):
        write_checkpoint(tmp_path, number)
    draw = random.Random(0)
    for _ in range(20):
        for path in Path(tmp_path).iterdir():
            os.utime(path, (t := draw.uniform(0, 2e9), t))
        assert_one_is_whole(tmp_path, 1000000)
    record_property("tried", 20)
