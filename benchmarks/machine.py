"""What a number was measured on."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch as th

PACKAGES = "torch", "numpy", "scipy", "diffusers", "guided-diffusion-sdk"


def describe() -> dict:
    """Processor, cores, memory, GPU, versions and threads, as JSON knows them; None is what cannot be told."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory_gib(),
        "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "threads": th.get_num_threads(),
    }


def cpu_model() -> str:
    """The processor's name as Linux tells it, else the platform's."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """The machine's memory."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
