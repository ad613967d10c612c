"""What `gdvae doctor` asks about a machine, each fact found out when it is first asked for.

Packages are imported in processes of their own, so that a broken one ends nothing here.
"""

import hashlib
import json
import locale
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "guided_diffusion_vae"
ASSET = Path(__file__).parent / "assets" / "microdoppler-f4.safetensors"
PATIENCE_S = 180  # a cold network disk takes a minute to read PyTorch


class Package(NamedTuple):
    """One package: its version, empty if it is not installed, and why it does not import, empty if it does."""

    version: str = ""
    error: str = ""
    mpi: str = ""  # what the MPI that mpi4py loads says of itself


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]


class Torch(NamedTuple):
    """PyTorch as it is imported."""

    version: str = ""
    error: str = ""
    built_for: str = ""  # as CUDA 13.0; empty: the CPU
    gpus: tuple[Gpu, ...] = ()
    arches: tuple[str, ...] = ()  # as sm_75: what it is built for
    why_no_gpu: str = ""
    threads: int = 1
    rank: int = 0
    processes: int = 1  # of this job on this machine


class Disk(NamedTuple):
    path: str
    free: int  # bytes
    writable: bool = True


TORCH = """
import contextlib, json, warnings
import torch
built = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}" or ""
found = {"version": torch.__version__, "built_for": built, "threads": torch.get_num_threads()}
warnings.simplefilter("ignore")
try:
    if built:
        torch.cuda.init()
        cards = range(torch.cuda.device_count())
        found["gpus"] = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in cards]
        found["arches"] = torch.cuda.get_arch_list()
except Exception as error:
    found["why_no_gpu"] = " ".join(str(error).split()).split(". ")[0]
with contextlib.suppress(Exception):
    from guided_diffusion_vae.dist_util import detect_launch
    me = detect_launch()
    found |= {"rank": me.rank, "processes": me.local_size}
print(json.dumps(found))
"""
TORCHVISION = "import torchvision\nprint('{}')"
DIFFUSERS = "from diffusers import AutoencoderKL\nprint('{}')"
MPI4PY = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(json.dumps({"mpi": MPI.Get_library_version()}))
"""


def probe(code: str, **env: str) -> dict:
    """Run Python code that prints JSON in a process of its own; {"error": the last line it said} if it fails."""
    about = {**os.environ, "PYTHONSAFEPATH": "1", **env}  # a folder torch/ here is not PyTorch
    how = {"capture_output": True, "text": True, "errors": "replace", "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=about, timeout=PATIENCE_S, **how)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"[-200:]}
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1][:200] if said else f"it ends with code {done.returncode}"}


def installed(name: str) -> str:
    """A package's version, or nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def imported(name: str, code: str, **env: str) -> Package:
    """What becomes of a package if this code imports it."""
    return Package(installed(name), **probe(code, **env)) if installed(name) else Package()


class Facts:
    """What the checks ask about this machine, each found out when it is first asked for."""

    python = tuple(sys.version_info[:3])
    version = property(lambda self: installed(DISTRIBUTION))
    torchvision = property(lambda self: imported("torchvision", TORCHVISION))
    diffusers = property(lambda self: imported("diffusers", DIFFUSERS))
    encodings = property(lambda self: {locale.getpreferredencoding(False), sys.getfilesystemencoding()})
    asset = property(lambda self: hashlib.sha256(ASSET.read_bytes()).hexdigest())
    gpus_are_hidden = property(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"))

    @cached_property
    def needs(self) -> dict[str, tuple[str, str]]:
        """Each required package -> the version it must have at least, and the one that is here."""
        required = metadata.requires(DISTRIBUTION) if self.version else None
        words = [re.match(r"([\w.-]+)(?:>=([\d.]+))?$", word) for word in required or ()]
        return {found[1]: (found[2] or "0", installed(found[1])) for found in words if found}

    @cached_property
    def torch(self) -> Torch:
        found: dict = {"version": installed("torch")} | probe(TORCH)
        gpus = tuple(Gpu(name, tuple(capability)) for name, capability in found.get("gpus", ()))
        found |= {"gpus": gpus, "arches": tuple(found.get("arches", ()))}
        return Torch(**found)

    @cached_property
    def mpiexec(self) -> tuple[str, str]:
        """Where mpiexec is on the PATH and what it says of itself; empty if there is none."""
        path = shutil.which("mpiexec") or ""
        how = {"capture_output": True, "text": True, "errors": "replace", "timeout": PATIENCE_S}
        return path, subprocess.run([path, "--version"], **how).stdout if path else ""

    @property
    def mpiexec_aside(self) -> str:
        """The mpiexec of this Python's environment, on the PATH or not."""
        return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or ""

    @property
    def mpi4py(self) -> Package:
        if family(self.mpiexec[1]) == "Open MPI":
            found = imported("mpi4py", MPI4PY, MPI4PY_MPIABI="openmpi")  # as dist_util loads it
            if not found.error:
                return found
        return imported("mpi4py", MPI4PY)

    @property
    def nvidia(self) -> tuple[int, str]:
        """How many NVIDIA GPUs are plugged in, and the driver's version, empty if none is loaded."""
        cards = Path("/sys/bus/pci/devices").glob("*/class")
        seen = [p for p in cards if p.read_text()[:4] == "0x03" and "10de" in (p.parent / "vendor").read_text()]
        driver = Path("/proc/driver/nvidia/version")
        found = re.search(r"(\d+\.[\d.]+)", driver.read_text()) if driver.is_file() else None
        return len(seen), found[1] if found else ""

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def open_files(self) -> int:
        import resource  # not on Windows

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    @property
    def shm(self) -> int | None:
        """Free bytes of shared memory; None where it is no folder."""
        return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None

    def disk(self, place: str) -> Disk:
        """The disk of a folder, or, before it is made, of the first one above it."""
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path(caches, "huggingface"), "hub")
        path = {"working folder": Path.cwd, "temporary folder": tempfile.gettempdir, "hub cache": lambda: hub}[place]()
        path = Path(path).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        return Disk(str(path), shutil.disk_usage(there).free, os.access(there, os.W_OK))


def family(words: str) -> str:
    """Whose MPI it is, by what it says of itself; Intel's, Cray's and MVAPICH are MPICH inside."""
    if re.search(r"Open ?MPI|OpenRTE|PRRTE", words, re.I):
        return "Open MPI"
    return "MPICH" if re.search(r"MPICH|HYDRA|Intel", words, re.I) else ""
