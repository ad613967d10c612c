"""What several tests need: golden files, small models with stated weights, and launching scripts."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """A golden file: a dict for .json, an NpzFile for .npz."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def fill_by_name(model, seed):
    """The stated weights of the golden networks: normal numbers seeded by the parameter's name."""
    for name, param in model.named_parameters():
        values = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).randn(*param.shape) * 0.05
        param.data.copy_(th.from_numpy(values + (0.5 if param.ndim == 1 else 0.0)))


def draw_users(root, users, count, size=32, *, high=255, rng=None):
    """`count` square pictures of noise for each user: root/USER/0.png and so on. Returns the folder."""
    rng = rng or np.random.RandomState(0)
    for user in users:
        (root / user).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.randint(0, high, (size, size, 3)).astype(np.uint8)).save(root / user / f"{i}.png")
    return root


def record_walks(root, users, days, *, prf_hz=2500, seconds=5):
    """Baseband at 24 GHz of people who walk towards the radar, root/USER/DAY/walk.npy. Returns the folder.

    The torso at 1.2 m/s and two legs that swing between 0 and 3, each person with another cadence.
    """
    t = np.arange(seconds * prf_hz) / prf_hz
    for number, (user, day) in enumerate((user, day) for user in users for day in days):
        swing = np.sin(2 * np.pi * (0.8 + 0.1 * users.index(user)) * t + number)
        speeds = 1.2 + 0.1 * swing, 1.5 + 1.5 * swing, 1.5 - 1.5 * swing
        echo = sum(
            a * np.exp(2j * np.pi * 160.1 * np.cumsum(v) / prf_hz) for a, v in zip((1, 0.2, 0.2), speeds, strict=True)
        )
        rng = np.random.RandomState(number)
        (root / user / day).mkdir(parents=True)
        np.save(root / user / day / "walk.npy", echo + 0.01 * (rng.randn(len(t)) + 1j * rng.randn(len(t))))
    return root


def save_sets(root, train, heldout, samples):
    """Three `ImageSet`s as files: folders of users, an .npz. Returns the flags that name them."""
    for split, images in (("train", train), ("test", heldout)):
        for place, (image, user) in enumerate(zip(images.pixels, images.labels, strict=True)):
            path = root / split / images.class_names[user] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    np.savez(root / "samples.npz", samples.pixels, samples.labels)
    return ["--real_dir", root / "train", "--heldout_dir", root / "test", "--samples", root / "samples.npz"]


def script(name, *flags, ranks=1, check=True, timeout=300, **env):
    """Run a command of scripts/ or evaluations/ as a user would, alone or by mpiexec; returns the finished process."""
    launcher = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    (file,) = (path for folder in ("scripts", "evaluations") if (path := ROOT / folder / name).exists())
    command = [*launcher, sys.executable, str(file), *map(str, flags)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PATH": path, **env}, cwd=ROOT
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done
