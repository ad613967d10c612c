"""How long until a command does something: `--help` of every script beside `import torch`, the first training step.

The first step is that of configs/demo.yaml on a small simulated folder, from the start of the command to the row of
the log that tells of the step: once with the images to encode, then with their latents cached.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from contenders import scratch
from pictures import draw_images
from timing import Settings, Way, compare, row

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
FIRST_ROW = "| step "  # of the log's table


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `rows` of the results."""
    names = sorted(path.name for path in SCRIPTS.glob("*.py"))
    import_torch = Way("import torch", lambda: python("-c", "import torch"))
    pairs, few = [], replace(settings, rounds=min(3, settings.rounds))
    for name in names[:1] if settings.tiny else names:
        ours = Way(f"{name} --help", lambda name=name: python(SCRIPTS / name, "--help"))
        pairs.append(compare(f"{name} --help", ours, import_torch, "s", few))
    return {"pairs": pairs, "rows": first_steps(settings)}


def python(*words) -> None:
    """Run Python to its end, which must be a good one."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def first_steps(settings: Settings) -> list[dict]:
    """Rows of the seconds to the first training step."""
    users, images = (2, 4) if settings.tiny else (31, 4)
    fresh, cached = [], []
    with scratch() as folder:
        data = draw_images(folder / "data", users * images, users=users)
        for number in range(1 if settings.tiny else 3):
            cache = folder / f"latents_{number}"
            for place, found in enumerate((fresh, cached)):
                log_dir = folder / f"run_{number}_{place}"
                found.append(first_step(data, f"--latent_cache={cache}", f"--log_dir={log_dir}", tiny=settings.tiny))
    title, found = "first training step of configs/demo.yaml", {"images to encode": fresh, "latents cached": cached}
    return [row(f"{title}, {what}", "s", took, images=users * images) for what, took in found.items()]


def first_step(data: Path, *flags: str, tiny: bool = False) -> float:
    """Seconds from the start of the training command to the log's row of its first step.

    Raises:
        RuntimeError: the command ended without one.
    """
    flags += ("--batch_size=2",) * tiny
    config = ROOT / "configs" / "demo.yaml"
    command = [sys.executable, str(SCRIPTS / "image_train_vae.py"), f"--config={config}", f"--data_dir={data}", *flags]
    environment = os.environ | {"OPENAI_LOG_FORMAT": "stdout", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment, "cwd": ROOT}
    begin, said = time.perf_counter(), []
    with subprocess.Popen([*command, "--log_interval=1", "--max_steps=1000"], **pipes) as child:
        try:
            for line in child.stdout:
                said.append(line)
                if line.startswith(FIRST_ROW):
                    return time.perf_counter() - begin
        finally:
            child.kill()
    raise RuntimeError("no training step came:\n" + "".join(said[-20:]))
