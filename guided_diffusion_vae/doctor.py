"""Explain a broken environment: one line for each check, with the remedy.

    gdvae doctor
    mpiexec -n 2 gdvae doctor

A line begins with ok, warn (it works, but not as well as it could) or fail; exit code 3 if one fails, else 0. Under a
launcher, rank 0 reports.
"""

import io
import re
import sys
from functools import partial
from typing import NamedTuple

from .config import EXIT_ENVIRONMENT, EXIT_USER
from .machine_facts import ASSET, DISTRIBUTION, Facts, family

ASSET_SHA256 = "22c78564f6efa35dd40de4dc6868459807b489d395fd24997306ae5091396f5d"
LEAST_PYTHON = (3, 11)  # diffusers 0.42.1 asks for it
LEAST_TORCH, SAFE_TORCH = (2, 6), (2, 10)  # CVE-2025-32434 and CVE-2026-24747: a crafted checkpoint runs code
BFLOAT16 = (8, 0)  # the compute capability from which GPUs compute in it; below, PyTorch emulates it, slowly
LITTLE_SHM = 512 << 20  # Docker gives 64 MB, less than a few batches of images
FEW_FILES = 1024  # each worker, shard and connection takes some
DISKS = {  # GB below which it fails (0: it is not always needed), GB below which it gets tight, and what helps
    "working folder": (0.2, 5.0, "make room, or give --log_dir on another disk"),
    "temporary folder": (0.1, 1.0, "make room, or export TMPDIR to another disk"),
    "hub cache": (0, 2.0, "before --allow_download True, export HF_HUB_CACHE to another disk"),
}


class Line(NamedTuple):
    level: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5} {self.text}"


ok, warn, fail = (partial(Line, level) for level in ("ok", "warn", "fail"))


def release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def dotted(numbers) -> str:
    return ".".join(map(str, numbers))


def check_python(facts) -> Line:
    if facts.python < LEAST_PYTHON:
        return fail(f"Python {dotted(facts.python)} is too old: install {dotted(LEAST_PYTHON)} or newer")
    return ok(f"Python {dotted(facts.python)}")


def check_package(facts) -> Line:
    """The package itself and what it requires, but for what has a check of its own."""
    if not facts.version:
        return fail(f"{DISTRIBUTION} is not installed: sh setup.sh, or pip install -c constraints.txt -e .")
    wanted = {name: need for name, need in facts.needs.items() if name not in ("torch", "diffusers", "mpi4py")}
    wrong = {name: need for name, need in wanted.items() if not need[1] or release(need[1]) < release(need[0])}
    if wrong:
        have = ", ".join(f"{name} {here or 'is missing'}" for name, (_, here) in wrong.items())
        return fail(f"{have}: pip install " + " ".join(f"'{name}>={least}'" for name, (least, _) in wrong.items()))
    return ok(f"{DISTRIBUTION} {facts.version} and {len(wanted)} packages that it requires")


def check_torch(facts) -> Line:
    torch = facts.torch
    if torch.error:
        how = "reinstall" if torch.version else "install"
        return fail(f"torch does not import ({torch.error}): {how} it, pip install -c constraints.txt torch")
    about = f"torch {torch.version.split('+')[0]}, {torch.built_for or 'CPU only'}"
    if release(torch.version) < LEAST_TORCH:
        return fail(f"{about}: a checkpoint can run code (CVE-2025-32434); install {dotted(LEAST_TORCH)} or newer")
    if release(torch.version) < SAFE_TORCH:
        return warn(
            f"{about}: a crafted checkpoint can do harm (CVE-2026-24747); load none from strangers, or install"
            f" {dotted(SAFE_TORCH)} or newer"
        )
    return ok(about)


def check_gpus(facts) -> Line:
    torch, (cards, driver) = facts.torch, facts.nvidia
    if torch.error:
        return warn("GPUs were not looked at: mend torch first")
    if torch.gpus:
        names = ", ".join(f"{gpu.name} (compute capability {dotted(gpu.capability)})" for gpu in torch.gpus)
        if all(serves(torch.arches, gpu.capability) for gpu in torch.gpus):
            return ok(f"{len(torch.gpus)} GPU{'s' if len(torch.gpus) > 1 else ''}: {names}")
        return fail(f"{names}: torch is built for {' '.join(torch.arches)} only: install a torch that has yours")
    if (cards or driver) and facts.gpus_are_hidden:
        return warn("the GPUs are hidden by CUDA_VISIBLE_DEVICES: unset it to use them")
    if torch.built_for and driver:
        why = f" ({torch.why_no_gpu})" if torch.why_no_gpu else ""
        return fail(
            f"the NVIDIA driver {driver} gives torch for {torch.built_for} no GPU{why}: update the driver, or give this"
            " job or container its GPU (docker run --gpus all)"
        )
    if cards and torch.built_for:
        return fail("there is an NVIDIA GPU, but no driver is loaded: install NVIDIA's driver")
    if cards or driver:
        return warn("there is an NVIDIA GPU, but torch is built for the CPU: install torch for CUDA to use it")
    if torch.built_for:
        return warn(f"torch is built for {torch.built_for}, but there is no GPU: it runs on the CPU, slowly")
    return ok("no GPU: everything runs on the CPU")


def serves(arches, capability: tuple[int, int]) -> bool:
    """Whether a build has code for a GPU: of its own generation up to its version, or of any before to be compiled."""
    codes = [re.match(r"(sm|compute)_(\d+)(\d)", arch) for arch in arches]
    versions = [(code[1], (int(code[2]), int(code[3]))) for code in codes if code]
    same = (kind == "compute" or version[0] == capability[0] for kind, version in versions if version <= capability)
    return any(same) or not versions  # AMD's are named otherwise


def check_bfloat16(facts) -> Line:
    lacking = [gpu for gpu in facts.torch.gpus if gpu.capability < BFLOAT16 and "CUDA" in facts.torch.built_for]
    if lacking:
        gpu = lacking[0]
        about = f"{gpu.name} (compute capability {dotted(gpu.capability)}) has no bfloat16"
        return warn(f"{about}: give --use_fp16 True, not --amp bf16")
    return ok("bfloat16 (--amp bf16)" if facts.torch.gpus else "bfloat16: no GPU that lacks it")


def check_torchvision(facts) -> Line:
    here = facts.torchvision
    if not here.version:
        return ok("no torchvision, and none is needed")
    if here.error:
        return fail(
            f"torchvision {here.version} does not fit torch {facts.torch.version} and breaks diffusers and transformers"
            f" ({here.error}): pip uninstall torchvision"
        )
    return ok(f"torchvision {here.version}")


def check_diffusers(facts) -> Line:
    here, least = facts.diffusers, facts.needs.get("diffusers", ("0", ""))[0]
    if not here.version or release(here.version) < release(least):
        about = f"diffusers {here.version} is too old" if here.version else "diffusers is not installed"
        return fail(f"{about}: pip install 'diffusers>={least}'")
    if here.error:
        return fail(f"diffusers {here.version} does not import ({here.error}): mend what fails above, or reinstall it")
    return ok(f"diffusers {here.version}")


def check_mpi(facts) -> Line:
    (path, words), mpi4py = facts.mpiexec, facts.mpi4py
    if not path and facts.mpiexec_aside:
        return warn(f"{facts.mpiexec_aside} is not on the PATH: activate its environment, or start by torchrun")
    if not path:
        return warn("no mpiexec on the PATH: pip install mpich, or start by torchrun")
    if not mpi4py.version or mpi4py.error:
        why = mpi4py.error or "it is not installed"
        return fail(f"{path} without an mpi4py that imports ({why}): pip install mpi4py mpich, or start by torchrun")
    theirs, ours = family(words), family(mpi4py.mpi)
    if theirs and ours and theirs != ours:
        return fail(
            f"{path} is {theirs}'s, but mpi4py loads {ours}, so each process would believe it is alone: have one MPI"
            " only (pip install mpich), or start by torchrun"
        )
    if not theirs:
        return warn(f"{path} does not say whose MPI it is; mpi4py loads {ours}: try `mpiexec -n 2 gdvae doctor`")
    return ok(f"mpiexec and mpi4py {mpi4py.version}, both {theirs}")


def check_threads(facts) -> Line:
    torch, cores = facts.torch, facts.cores
    if torch.processes > 1 and torch.threads > 1 and torch.processes * torch.threads > cores:
        return warn(
            f"{torch.processes} processes of {torch.threads} threads on {cores} cores are in each other's way:"
            f" export OMP_NUM_THREADS={max(1, cores // torch.processes)}"
        )
    several = f"{torch.processes} processes" if torch.processes > 1 else "one process"
    return ok(f"threads: {several} of {torch.threads} on {cores} cores")


def check_disk(facts, place: str) -> Line:
    least, enough, remedy = DISKS[place]
    disk = facts.disk(place)
    free, about = disk.free / 1e9, f"the {place} {disk.path}"
    if disk.writable and free >= enough:
        return ok(f"{about}: {free:.0f} GB free")
    level = fail if least and (free < least or not disk.writable) else warn
    return level(f"{about} {f'has {free:.1f} GB free' if disk.writable else 'cannot be written'}: {remedy}")


def check_shm(facts) -> Line:
    if facts.shm is not None and facts.shm < LITTLE_SHM:
        return warn(
            f"/dev/shm has {facts.shm / 1e6:.0f} MB free, of which readers of images may die: give the container more"
            " (docker run --shm-size 1g), or --num_workers 0"
        )
    return ok("no /dev/shm" if facts.shm is None else f"/dev/shm: {facts.shm / 1e9:.1f} GB free")


def check_open_files(facts) -> Line:
    if 0 <= facts.open_files < FEW_FILES:  # -1 is no limit
        return warn(f"a process may open {facts.open_files} files only: ulimit -n 4096")
    return ok(f"open files: {facts.open_files if facts.open_files >= 0 else 'no limit'}")


def check_encoding(facts) -> Line:
    others = sorted(name for name in facts.encodings if re.sub(r"\W|_", "", name).lower() != "utf8")
    if others:
        return warn(f"the locale's encoding is {others[0]}, in which not all names can be written: export PYTHONUTF8=1")
    return ok("the locale's encoding is UTF-8")


def check_asset(facts) -> Line:
    if facts.asset != ASSET_SHA256:
        return fail(f"{ASSET} is damaged (its SHA-256 begins {facts.asset[:8]}): reinstall {DISTRIBUTION}")
    return ok("the shipped autoencoder microdoppler-f4 is whole")


CHECKS = {
    "Python": check_python,
    "packages": check_package,
    **{place: partial(check_disk, place=place) for place in DISKS},
    "torch": check_torch,
    "GPUs": check_gpus,
    "bfloat16": check_bfloat16,
    "torchvision": check_torchvision,
    "diffusers": check_diffusers,
    "MPI": check_mpi,
    "threads": check_threads,
    "shared memory": check_shm,
    "open files": check_open_files,
    "encoding": check_encoding,
    "autoencoder": check_asset,
}


def examine(facts, checks=None):
    """The line of each check, one after the other; a check that cannot be made is a failure, too."""
    for name, check in (checks or CHECKS).items():
        try:
            yield check(facts)
        except Exception as error:
            yield fail(f"{name}: cannot be looked at: {type(error).__name__}: {' '.join(str(error).split())}")


def main(words: list[str]) -> int:
    """Print what is right and what is not; returns the exit code."""
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if words:
        print(f"error: unknown word {words[0]}; gdvae doctor takes none", file=sys.stderr)
        return EXIT_USER
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show
    facts, failed = Facts(), False
    for line in examine(facts) if facts.torch.rank == 0 else ():
        print(line, flush=True)
        failed |= line.level == "fail"
    return EXIT_ENVIRONMENT if failed else 0
