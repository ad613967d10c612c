"""Who am I, under every launcher; and how a job ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch as th
from helpers import ROOT, script

from guided_diffusion_vae import checkpoint, dist_util
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.fp16_util import TrainingDiverged


@pytest.mark.parametrize(
    "env, wanted",
    [
        ({}, ("alone", 0, 1, 0, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "PMI_RANK": "0"},
            ("torchrun", 5, 8, 1, 4),
        ),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, ("mpi", 3, 4, 1, 2)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "SLURM_PROCID": "0",
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "2",
            },
            ("mpi", 1, 2, 1, 2),
        ),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "6",
                "SLURM_LOCALID": "2",
                "SLURM_TASKS_PER_NODE": "4(x2)",
            },
            ("slurm", 6, 8, 2, 4),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("alone", 0, 1, 0, 1)),  # a batch shell without srun
    ],
)
def test_launchers_are_told_apart(env, wanted):
    assert tuple(dist_util.detect_launch(env)) == wanted


@pytest.mark.parametrize("nodes, first", [("gpu[03-05,9],cpu1", "gpu03"), ("node7", "node7"), ("a1,a2", "a1")])
def test_the_first_host_of_a_node_list(nodes, first):
    assert dist_util.first_host(nodes) == first


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("x"), 2),
        (FileNotFoundError("x"), 2),
        (checkpoint.SaveError("x"), 3),
        (dist_util.EnvironmentFault("x"), 3),
        (TrainingDiverged("x"), 4),
        (th.OutOfMemoryError("x"), 4),
        (RuntimeError("Connection closed by peer"), 5),
        (dist_util.StopRequested("x"), 75),
        (ZeroDivisionError("x"), None),
    ],
)
def test_exit_codes(error, code):
    assert dist_util.exit_code(error) == code


LAUNCHERS = {
    "mpiexec": ["mpiexec", "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def launched(launcher, program):
    """The finished process of a program started on two ranks."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [*LAUNCHERS[launcher], str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": path}, cwd=ROOT)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("fails_on", ["all", "1"])
def test_a_rank_that_fails_ends_the_job(launcher, fails_on, tmp_path):
    """An error on every rank is one line; one on rank 1 alone does not leave rank 0 waiting for ever."""
    program = tmp_path / "program.py"
    program.write_text(
        "from guided_diffusion_vae import dist_util\n"
        "from guided_diffusion_vae.config import UserError\n"
        "def main():\n"
        "    dist_util.setup_dist()\n"
        f"    if {fails_on == 'all'} or dist_util.rank() == 1:\n"
        "        raise UserError('--data_dir is empty')\n"
        "    dist_util.any_rank(False)\n"
        "dist_util.run_main(main)\n"
    )
    done = launched(launcher, program)
    assert done.returncode != 0
    if launcher == "mpiexec":
        assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "--data_dir is empty" in line]
    assert len(lines) == 1 if fails_on == "all" else lines, done.stderr


ADVISED = """
import re
from pathlib import Path
from guided_diffusion_vae import dist_util

def memory():  # MiB: resident, and that may be of huge pages
    areas = re.findall(r"^Size: +(\\d+) kB$.*?^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.M | re.S)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024
    return resident, sum(int(size) for size, flags in areas if "hg" in flags.split()) // 1024

before = memory()
dist_util.keep_freed_memory()
print(*before, *memory())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this system has no huge pages")
def test_the_heap_may_be_of_huge_pages_and_is_not_used_before_it_is_asked_for():
    done = subprocess.run([sys.executable, "-c", ADVISED], capture_output=True, text=True, check=True, cwd=ROOT)
    resident, advised, resident_then, advised_then = map(int, done.stdout.split())
    assert advised == 0 and 1400 <= advised_then <= 1536
    assert resident_then - resident < 16


LEAVING = """
import atexit, ctypes, sys
from guided_diffusion_vae import dist_util

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # among the static destructors
atexit.register(print, "python was asked")

def main():
    dist_util.setup_dist()
    sys.stdout.write("written ")

dist_util.run_main(main)
"""


def test_a_job_that_is_done_leaves_without_the_destructors_of_libraries(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    done = launched("mpiexec", tmp_path / "leaving.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == done.stdout.count("python was asked") == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_dir", ""], ["--data_dir is empty"]),
        (["--data_dir", "no/such/folder"], ["--data_dir no/such/folder does not exist"]),
        (["--data_dir", "tests/golden/adm_keys"], ["holds no images"]),
        (["--vae_path", "nowhere.pt"], ["--vae_path nowhere.pt does not exist"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml does not exist"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(flags, words, tmp_path):
    done = script("image_train_vae.py", "--log_dir", tmp_path, *flags, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_log_folder_that_cannot_be_made_is_the_machines_fault_and_a_file_the_users(tmp_path):
    (tmp_path / "file").touch()
    for place, code in (("/proc/nowhere", 3), (tmp_path / "file", 2), (tmp_path / "file" / "below", 2)):
        done = script("image_train_vae.py", "--log_dir", place, "--data_dir", "tests", check=False)
        assert done.returncode == code and done.stderr.startswith("error: --log_dir"), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--attention_resolutions", "foo"], "attention_resolutions"),
        (["--num_channels", "40"], "num_channels"),
        (["--noise_schedule", "sine"], "noise_schedule"),
        (["--schedule_sampler", "best"], "schedule_sampler"),
        (["--timestep_respacing", "ddim999"], "give ddim500 or ddim1000, or 999 without ddim"),
        (["--dropout", "2"], "--dropout is 2.0"),
        (["--config", "tests/golden/adm_losses.npz"], "is not a text file"),
    ],
)
def test_settings_are_checked_before_any_image_is_read(flags, words, tmp_path):
    done = script("image_train_vae.py", "--log_dir", tmp_path, "--data_dir", "nowhere", *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and "--data_dir" not in done.stderr, done.stderr
