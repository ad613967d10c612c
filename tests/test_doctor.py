"""Each thing that can be broken is one line with its remedy: of made-up machines, and of packages that really break."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from guided_diffusion_vae import doctor, machine_facts
from guided_diffusion_vae.doctor import CHECKS, Line, examine, release, serves
from guided_diffusion_vae.machine_facts import Disk, Facts, Gpu, Package, Torch, family

GB = 10**9
T4 = Gpu("Tesla T4", (7, 5))
H100 = Gpu("NVIDIA H100", (9, 0))
ON_CUDA = {"version": "2.13.0+cu130", "built_for": "CUDA 13.0", "arches": ("sm_75", "sm_80", "sm_90", "compute_120")}
MPICH, OPEN_MPI = "HYDRA build details:\n    Version: 5.0.2", "mpiexec (Open MPI) 5.0.11"
NEEDS = {
    "torch": ("2.6", "2.13.0"),
    "diffusers": ("0.42.1", "0.42.1"),
    "mpi4py": ("4.0", ""),
    "scipy": ("1.11", "1.17.1"),
}
HEALTHY = {
    "python": (3, 12, 1),
    "version": "0.1.0",
    "needs": NEEDS,
    "torch": Torch("2.13.0+cu130", "", "CUDA 13.0", (H100, H100), ON_CUDA["arches"]),
    "nvidia": (2, "580.65.06"),
    "gpus_are_hidden": False,
    "torchvision": Package("0.28.0"),
    "diffusers": Package("0.42.1"),
    "mpiexec": ("/usr/bin/mpiexec", MPICH),
    "mpiexec_aside": "",
    "mpi4py": Package("4.1.2", "", "MPICH Version:      5.0.2"),
    "cores": 16,
    "disk": lambda place: Disk("/place", 50 * GB),
    "shm": 8 * GB,
    "open_files": 4096,
    "encodings": {"UTF-8", "utf-8"},
    "asset": doctor.ASSET_SHA256,
}


def a_machine(**changes):
    return SimpleNamespace(**HEALTHY | changes)


def on_disk(**changes):
    return {"disk": lambda place: Disk(**{"path": "/place", "free": 50 * GB} | changes)}


def test_a_healthy_machine_is_all_right():
    assert list(map(str, examine(a_machine()))) == [
        "ok    Python 3.12.1",
        "ok    guided_diffusion_vae 0.1.0 and 1 packages that it requires",
        "ok    the working folder /place: 50 GB free",
        "ok    the temporary folder /place: 50 GB free",
        "ok    the hub cache /place: 50 GB free",
        "ok    torch 2.13.0, CUDA 13.0",
        "ok    2 GPUs: NVIDIA H100 (compute capability 9.0), NVIDIA H100 (compute capability 9.0)",
        "ok    bfloat16 (--amp bf16)",
        "ok    torchvision 0.28.0",
        "ok    diffusers 0.42.1",
        "ok    mpiexec and mpi4py 4.1.2, both MPICH",
        "ok    threads: one process of 1 on 16 cores",
        "ok    /dev/shm: 8.0 GB free",
        "ok    open files: 4096",
        "ok    the locale's encoding is UTF-8",
        "ok    the shipped autoencoder microdoppler-f4 is whole",
    ]


CASES = [
    ("Python", {"python": (3, 10, 4)}, "fail  Python 3.10.4 is too old: install 3.11 or newer"),
    (
        "packages",
        {"version": ""},
        "fail  guided_diffusion_vae is not installed: sh setup.sh, or pip install -c constraints.txt -e .",
    ),
    (
        "packages",
        {"needs": NEEDS | {"scipy": ("1.11", "1.9.3"), "pillow": ("10.0", "")}},
        "fail  scipy 1.9.3, pillow is missing: pip install 'scipy>=1.11' 'pillow>=10.0'",
    ),
    ("torch", {"torch": Torch("2.13.0+cpu")}, "ok    torch 2.13.0, CPU only"),
    (
        "torch",
        {"torch": Torch("2.9.1+cpu")},
        "warn  torch 2.9.1, CPU only: a crafted checkpoint can do harm (CVE-2026-24747); load none from strangers, or"
        " install 2.10 or newer",
    ),
    (
        "torch",
        {"torch": Torch("2.5.1+cpu")},
        "fail  torch 2.5.1, CPU only: a checkpoint can run code (CVE-2025-32434); install 2.6 or newer",
    ),
    (
        "torch",
        {"torch": Torch("", "No module named 'torch'")},
        "fail  torch does not import (No module named 'torch'): install it, pip install -c constraints.txt torch",
    ),
    (
        "torch",
        {"torch": Torch("2.13.0", "libcudart.so.13")},
        "fail  torch does not import (libcudart.so.13): reinstall it, pip install -c constraints.txt torch",
    ),
    ("GPUs", {"torch": Torch("", "no")}, "warn  GPUs were not looked at: mend torch first"),
    ("GPUs", {"torch": Torch("2.13.0+cpu"), "nvidia": (0, "")}, "ok    no GPU: everything runs on the CPU"),
    (
        "GPUs",
        {"torch": Torch("2.13.0+cpu")},
        "warn  there is an NVIDIA GPU, but torch is built for the CPU: install torch for CUDA to use it",
    ),
    (
        "GPUs",
        {"torch": Torch(**ON_CUDA), "nvidia": (0, "")},
        "warn  torch is built for CUDA 13.0, but there is no GPU: it runs on the CPU, slowly",
    ),
    (
        "GPUs",
        {"torch": Torch(**ON_CUDA), "nvidia": (1, "")},
        "fail  there is an NVIDIA GPU, but no driver is loaded: install NVIDIA's driver",
    ),
    (
        "GPUs",
        {"torch": Torch(**ON_CUDA, why_no_gpu="the driver is too old"), "nvidia": (1, "470.57.02")},
        "fail  the NVIDIA driver 470.57.02 gives torch for CUDA 13.0 no GPU (the driver is too old): update the driver,"
        " or give this job or container its GPU (docker run --gpus all)",
    ),
    (
        "GPUs",
        {"torch": Torch(**ON_CUDA), "gpus_are_hidden": True},
        "warn  the GPUs are hidden by CUDA_VISIBLE_DEVICES: unset it to use them",
    ),
    ("GPUs", {"torch": Torch(**ON_CUDA, gpus=(T4,))}, "ok    1 GPU: Tesla T4 (compute capability 7.5)"),
    (
        "GPUs",
        {"torch": Torch(**ON_CUDA, gpus=(Gpu("Tesla P100", (6, 0)),))},
        "fail  Tesla P100 (compute capability 6.0): torch is built for sm_75 sm_80 sm_90 compute_120 only: install a"
        " torch that has yours",
    ),
    (
        "bfloat16",
        {"torch": Torch(**ON_CUDA, gpus=(H100, T4))},
        "warn  Tesla T4 (compute capability 7.5) has no bfloat16: give --use_fp16 True, not --amp bf16",
    ),
    ("bfloat16", {"torch": Torch(**ON_CUDA)}, "ok    bfloat16: no GPU that lacks it"),
    ("torchvision", {"torchvision": Package()}, "ok    no torchvision, and none is needed"),
    (
        "torchvision",
        {
            "torch": Torch("2.13.0+cpu"),
            "torchvision": Package("0.28.0+cu130", "operator torchvision::nms does not exist"),
        },
        "fail  torchvision 0.28.0+cu130 does not fit torch 2.13.0+cpu and breaks diffusers and transformers (operator"
        " torchvision::nms does not exist): pip uninstall torchvision",
    ),
    ("diffusers", {"diffusers": Package()}, "fail  diffusers is not installed: pip install 'diffusers>=0.42.1'"),
    (
        "diffusers",
        {"diffusers": Package("0.42.0")},
        "fail  diffusers 0.42.0 is too old: pip install 'diffusers>=0.42.1'",
    ),
    (
        "diffusers",
        {"diffusers": Package("0.42.1", "no nms")},
        "fail  diffusers 0.42.1 does not import (no nms): mend what fails above, or reinstall it",
    ),
    ("MPI", {"mpiexec": ("", "")}, "warn  no mpiexec on the PATH: pip install mpich, or start by torchrun"),
    (
        "MPI",
        {"mpiexec": ("", ""), "mpiexec_aside": "/venv/bin/mpiexec"},
        "warn  /venv/bin/mpiexec is not on the PATH: activate its environment, or start by torchrun",
    ),
    (
        "MPI",
        {"mpi4py": Package("4.1.2", "cannot load MPI library")},
        "fail  /usr/bin/mpiexec without an mpi4py that imports (cannot load MPI library): pip install mpi4py mpich, or"
        " start by torchrun",
    ),
    (
        "MPI",
        {"mpi4py": Package()},
        "fail  /usr/bin/mpiexec without an mpi4py that imports (it is not installed): pip install mpi4py mpich, or"
        " start by torchrun",
    ),
    (
        "MPI",
        {"mpiexec": ("/usr/bin/mpiexec", OPEN_MPI)},
        "fail  /usr/bin/mpiexec is Open MPI's, but mpi4py loads MPICH, so each process would believe it is alone: have"
        " one MPI only (pip install mpich), or start by torchrun",
    ),
    (
        "MPI",
        {"mpiexec": ("/opt/mpiexec", "version 3")},
        "warn  /opt/mpiexec does not say whose MPI it is; mpi4py loads MPICH: try `mpiexec -n 2 gdvae doctor`",
    ),
    (
        "threads",
        {"torch": Torch("2.13.0", threads=16, processes=8)},
        "warn  8 processes of 16 threads on 16 cores are in each other's way: export OMP_NUM_THREADS=2",
    ),
    (
        "threads",
        {"torch": Torch("2.13.0", threads=2, processes=8)},
        "ok    threads: 8 processes of 2 on 16 cores",
    ),
    (
        "working folder",
        on_disk(free=4 * GB),
        "warn  the working folder /place has 4.0 GB free: make room, or give --log_dir on another disk",
    ),
    (
        "working folder",
        on_disk(free=GB // 10),
        "fail  the working folder /place has 0.1 GB free: make room, or give --log_dir on another disk",
    ),
    (
        "temporary folder",
        on_disk(writable=False),
        "fail  the temporary folder /place cannot be written: make room, or export TMPDIR to another disk",
    ),
    (
        "hub cache",
        on_disk(free=0),
        "warn  the hub cache /place has 0.0 GB free: before --allow_download True, export HF_HUB_CACHE to another disk",
    ),
    ("shared memory", {"shm": None}, "ok    no /dev/shm"),
    (
        "shared memory",
        {"shm": 64_000_000},
        "warn  /dev/shm has 64 MB free, of which readers of images may die: give the container more (docker run"
        " --shm-size 1g), or --num_workers 0",
    ),
    ("open files", {"open_files": 64}, "warn  a process may open 64 files only: ulimit -n 4096"),
    ("open files", {"open_files": -1}, "ok    open files: no limit"),
    (
        "encoding",
        {"encodings": {"ISO-8859-1", "utf-8"}},
        "warn  the locale's encoding is ISO-8859-1, in which not all names can be written: export PYTHONUTF8=1",
    ),
    (
        "autoencoder",
        {"asset": "0123456789"},
        f"fail  {doctor.ASSET} is damaged (its SHA-256 begins 01234567): reinstall guided_diffusion_vae",
    ),
]


@pytest.mark.parametrize("name, changes, line", CASES, ids=[line[:40] for _, _, line in CASES])
def test_a_check_says(name, changes, line):
    assert str(CHECKS[name](a_machine(**changes))) == line


def test_every_check_has_a_case_that_is_not_all_right():
    assert {name for name, _, line in CASES if not line.startswith("ok")} == set(CHECKS)


def test_a_check_that_cannot_be_made_is_a_failure_and_the_others_go_on():
    def broken(facts):
        raise KeyError("of all\nthings")

    lines = list(examine(a_machine(), {"first": broken, "second": CHECKS["Python"]}))
    assert str(lines[0]) == "fail  first: cannot be looked at: KeyError: 'of all\\nthings'"
    assert lines[1].level == "ok"
    assert [line.level for line in examine(object())] == ["fail"] * len(CHECKS)


def test_versions_and_makers_are_read():
    assert release("2.13.0+cpu") == (2, 13, 0) < release("2.13.1a0") and release("2.9") < release("2.10")
    assert family("Intel(R) MPI Library 2021.19") == family("MPICH Version: 5.0.2") == family(MPICH) == "MPICH"
    assert family(OPEN_MPI) == family("Open MPI v5.0.11, package: Open MPI") == "Open MPI"
    assert family("") == family("OpenPBS mpiexec") == ""


def test_which_gpus_a_build_serves():
    """Code for one generation runs on its later versions, PTX on all that came after, AMD's names say nothing."""
    assert serves(["sm_86"], (8, 9)) and not serves(["sm_86"], (8, 0)) and not serves(["sm_86"], (9, 0))
    assert serves(["sm_90a"], (9, 0)) and serves(["sm_100"], (10, 3)) and not serves(["sm_100"], (9, 0))
    assert serves(["compute_80"], (12, 0)) and not serves(["compute_90"], (8, 6))
    assert serves(["gfx90a"], (9, 4))


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_a_probe_never_raises(monkeypatch):
    assert machine_facts.probe("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert machine_facts.probe("raise RuntimeError('no\\nnms')") == {"error": "nms"}
    assert machine_facts.probe("import os; os.kill(os.getpid(), 11)") == {"error": "it ends with code -11"}
    assert (
        "IndexError" in machine_facts.probe("")["error"]
        and "JSONDecodeError" in machine_facts.probe("print('x')")["error"]
    )
    monkeypatch.setattr(machine_facts, "PATIENCE_S", 0.2)
    assert "TimeoutExpired" in machine_facts.probe("import time; time.sleep(60)")["error"]


NO_NMS = "raise RuntimeError('operator torchvision::nms does not exist')"


def test_what_lies_in_the_working_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise ImportError('not the one')")
    monkeypatch.chdir(tmp_path)
    assert machine_facts.probe("import json; print(json.dumps({}))") == {}


def add_package(folder, monkeypatch, name, version, code):
    """A package of this name before all others, for this process and those it starts."""
    about = folder / f"{name}-{version}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def test_a_torchvision_that_does_not_fit_is_seen(tmp_path, monkeypatch):
    add_package(tmp_path, monkeypatch, "torchvision", "0.28.0+cu130", NO_NMS)
    assert Facts().torchvision == Package("0.28.0+cu130", "RuntimeError: operator torchvision::nms does not exist")


FAKE_TORCH = """
from types import SimpleNamespace
__version__, version = "2.9.0+cu126", SimpleNamespace(cuda="12.6", hip=None)
def get_num_threads(): return 3
def init():
    if {broken}: raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have one")
cuda = SimpleNamespace(init=init, device_count=lambda: 2, get_device_name=lambda i: "Tesla T4",
    get_device_capability=lambda i: (7, 5), get_arch_list=lambda: ["sm_70", "sm_75"])
"""


def test_torch_tells_of_its_gpus(tmp_path, monkeypatch):
    add_package(tmp_path, monkeypatch, "torch", "2.9.0+cu126", FAKE_TORCH.format(broken=False))
    assert Facts().torch == Torch("2.9.0+cu126", "", "CUDA 12.6", (T4, T4), ("sm_70", "sm_75"), threads=3)
    (tmp_path / "torch.py").write_text(FAKE_TORCH.format(broken="'this one'"))
    why = "Found no NVIDIA driver on your system"
    assert Facts().torch == Torch("2.9.0+cu126", "", "CUDA 12.6", why_no_gpu=why, threads=3)
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13')")
    assert Facts().torch == Torch("2.9.0+cu126", "ImportError: libcudart.so.13")


def test_the_launcher_is_seen(monkeypatch):
    for name, value in {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = Facts().torch
    assert (found.rank, found.processes) == (3, 4)


def test_mpiexec_is_asked_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Facts().mpiexec == ("", "")
    program = tmp_path / "mpiexec"
    program.write_text(f"#!/bin/sh\necho '{OPEN_MPI}'\n")
    program.chmod(0o755)
    assert Facts().mpiexec == (str(program), f"{OPEN_MPI}\n")


def test_requirements_are_those_of_setup_py():
    wanted = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.S)[1]
    floors = {name: least or "0" for name, least in re.findall(r'"([\w.-]+)(?:>=([\d.]+))?"', wanted)}
    assert {name: least for name, (least, _) in Facts().needs.items()} == floors


def test_the_cache_is_where_the_hub_puts_it(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    constants = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"

    def places():
        done = subprocess.run([sys.executable, "-c", constants], capture_output=True, text=True, check=True)
        return Facts().disk("hub cache").path, done.stdout.strip()

    for name, value in (
        ("HOME", tmp_path),
        ("XDG_CACHE_HOME", tmp_path / "x"),
        ("HF_HOME", tmp_path / "hf"),
        ("HF_HUB_CACHE", tmp_path / "hub"),
    ):  # each goes before those above it
        monkeypatch.setenv(name, str(value))
        ours, theirs = places()
        assert ours == theirs and ours.startswith(str(value))
    assert Facts().disk("working folder").path == os.getcwd()


def test_a_flipped_bit_of_the_autoencoder_is_seen(tmp_path, monkeypatch):
    assert doctor.check_asset(Facts()).level == "ok"
    data = bytearray(doctor.ASSET.read_bytes())
    data[1_000_000] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    monkeypatch.setattr(machine_facts, "ASSET", tmp_path / "flipped")
    assert doctor.check_asset(Facts()).level == "fail"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_exit_code_tells_whether_something_fails(monkeypatch, capsys):
    for rank, lines, code in (
        (0, [Line("ok", "a"), Line("warn", "b")], 0),
        (0, [Line("fail", "a"), Line("ok", "b")], 3),
        (1, [Line("fail", "a")], 0),  # rank 0 speaks for all
    ):
        monkeypatch.setattr(doctor, "Facts", lambda rank=rank: a_machine(torch=Torch("2.13.0", rank=rank)))
        monkeypatch.setattr(doctor, "examine", lambda facts, lines=lines: lines)
        assert doctor.main([]) == code
        assert capsys.readouterr().out == ("" if rank else "".join(f"{line}\n" for line in lines))


def test_a_path_that_the_terminal_cannot_show_is_shown_somehow(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(doctor, "Facts", lambda: a_machine(**on_disk(path="/plätze")))
    assert doctor.main([]) == 0
    assert b"the working folder /pl\\xe4tze: 50 GB free" in screen.buffer.getvalue()


@pytest.mark.slow
def test_this_machine_is_looked_at(tmp_path, monkeypatch):
    """A real look, with a torchvision that breaks: one line a check, and only what is broken fails."""
    add_package(tmp_path, monkeypatch, "torchvision", "0.1", NO_NMS)
    command = [sys.executable, "-m", "guided_diffusion_vae.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 3 and done.stderr == "" and len(lines) == len(CHECKS)
    assert all(re.match(r"(ok   |warn |fail ) \S", line) for line in lines)
    failing = [line for line in lines if line.startswith("fail")]
    assert failing[0].startswith("fail  torchvision 0.1 does not fit torch") and "diffusers" in failing[-1]
    assert len(failing) <= 2
