"""The machine is not as one thinks: launchers that do not fit, few open files, little shared memory, lost readers."""

import os
import re
import resource
import signal

import pytest
import torch as th
from harness import SMALL, TRAIN, VERBS, Job, assert_same_end, contents, run, said, undisturbed

from guided_diffusion_vae import dist_util

ONE_OF_ONE = """
class World:
    rank, size = 0, 1
COMM_WORLD, COMM_TYPE_SHARED = World(), 0
def Is_finalized(): return True
"""
FAKES = {
    "cannot be imported": (
        {"__init__.py": "raise ImportError('libmpi.so.12: cannot open shared object file')"},
        "mpi4py mpich",
    ),
    "belongs to another MPI": ({"__init__.py": "", "MPI.py": ONE_OF_ONE}, "mpiexec and mpi4py belong to different"),
}


@pytest.mark.slow
@pytest.mark.fault(
    "mpiexec starts two processes, but mpi4py {kind}",
    promise="code 3 and one line; never two jobs of one process; nothing is written",
)
@pytest.mark.parametrize("kind", FAKES)
def test_an_mpi_that_does_not_fit(kind, data, tmp_path):
    files, words = FAKES[kind]
    (tmp_path / "fake" / "mpi4py").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "fake" / "mpi4py" / name).write_text(text)
    verb = VERBS["training"]
    with undisturbed(data):
        done = run(verb.script, *verb.words(data, tmp_path / "out"), ranks=2, PYTHONPATH=str(tmp_path / "fake"))
    assert words in said(done, 3, "mpi4py")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("more processes on a machine than it has GPUs", promise="code 3 and one line with both numbers")
def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dist_util.EnvironmentFault, match="4 processes on this machine, but 2 GPUs") as error:
        dist_util._choose_backend(dist_util.detect_launch())
    assert dist_util.exit_code(error.value) == 3


# ---- readers of data -------------------------------------------------------------------------------------------------

READERS = ["--cache_latents", False, "--num_workers", 2]


def train(data, out, *flags, **options):
    words = [*TRAIN, *SMALL.split(), "--data_dir", data, "--log_dir", out, *READERS, *flags]
    return Job("image_train_vae.py", *words, **options)


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of a process that reads data, as when memory runs out",
    promise="code 4 and one line that names --num_workers; it goes on without to the same bits",
)
def test_a_reader_is_killed(data, straight, tmp_path):
    out = tmp_path / "out"
    with train(data, out, "--max_steps", 10**6, "--save_interval", 6) as job:
        job.until(lambda: list(out.glob("state*.pt")))
        (*_, reader) = [pid for pid in job.scripts() if pid != job.process.pid]
        os.kill(reader, signal.SIGKILL)
        said(job.end(), 4, "a process that reads data was ended", "signal: Killed", "--num_workers")
    for folder, readers in ((out, 0), (tmp_path / "unhurt", 0)):
        with train(data, folder, "--num_workers", readers, "--max_steps", 60, "--save_interval", 6) as job:
            assert job.end().returncode == 0
    newest = sorted(path.name for path in (tmp_path / "unhurt").glob("model*.pt"))[-1]
    assert_same_end(tmp_path / "unhurt", out, newest)


@pytest.mark.slow
@pytest.mark.fault(
    "/dev/shm of {size}, through which readers of data hand on what they read",
    promise="it works, or code 4 and one line that names --num_workers",
)
@pytest.mark.parametrize("size", ["64K", "1M"])
def test_little_shared_memory(size, data, tmp_path):
    if os.system("unshare -m true 2>/dev/null"):
        pytest.skip("a mount of one's own needs root")
    small = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    launcher = ["unshare", "-m", "sh", "-c", small, "sh"]
    batch = ["--batch_size", 64, "--microbatch", 4, "--max_steps", 4]  # 786 KB a batch
    with train(data, tmp_path / "out", *batch, launcher=launcher) as job:
        done = job.end()
    if done.returncode:
        said(done, 4, "/dev/shm", "--num_workers")
    assert size == "64K" or not done.returncode or "--num_workers" in done.stderr


@pytest.mark.slow
@pytest.mark.fault("`ulimit -n {files}` (files open at a time) in {verb}", promise="it works, or code 3 and one line")
@pytest.mark.parametrize("files", [20, 64])
@pytest.mark.parametrize("verb", ["training", "latent extraction"])
def test_few_open_files(verb, files, data, tmp_path):
    verb = VERBS[verb]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # noqa: E731
    with undisturbed(data):
        done = run(verb.script, *verb.words(data, tmp_path / "out"), limit=few)
    if done.returncode:
        assert re.search("open files|num_workers", said(done, 3)), done.stderr
    else:
        assert all((tmp_path / "out" / name).is_file() for name in verb.makes)


@pytest.mark.slow
@pytest.mark.fault("TMPDIR that is not there, that is full", promise="it works: nothing is written there")
def test_no_temporary_folder(data, tmp_path):
    verb = VERBS["training"]
    for number, place in enumerate((tmp_path / "nowhere", "/dev/full")):
        done = run(verb.script, *verb.words(data, tmp_path / str(number)), TMPDIR=str(place))
        assert done.returncode == 0, done.stderr
    assert len(contents(tmp_path / "0")) == len(contents(tmp_path / "1"))
