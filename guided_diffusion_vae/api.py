"""From images to samples in a few lines of Python.

    from guided_diffusion_vae.api import Model, run

    run("train", processes=2, config="demo.yaml", data_dir="DATA/train", log_dir="runs/one")
    model = Model("runs/one")
    samples = model.sample(users=["3", "7"], num_samples_per_user=8, sampler="dpmpp_2m")
    samples.save("runs/one/more")  # samples.images: uint8 (16, 64, 64, 3); samples.users: a name for each

Keyword arguments are the commands' flags: `run` starts any of them in a process of its own, `Model` is what
image_sample_vae.py opens, kept in memory.
"""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th

from . import dist_util
from .cli import scripts, with_recipes
from .config import UserError, did_you_mean
from .data.image_folder import image_from_pixels
from .generation import Generation, prepare, read_flags
from .sample_util import Batch, PngWriter, join, to_pixels
from .stages import python, words_of
from .trained import open_model


class Samples(NamedTuple):
    """Generated images: uint8 (N, H, W, 3), and the label of each, or None if the model knows no users."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: list[str]

    @property
    def users(self) -> list[str]:
        """The name of the user of each image."""
        return [] if self.labels is None else [self.class_names[label] for label in self.labels]

    def save(self, folder) -> Path:
        """Write them as PNGs, in a folder for each user, as `evaluate` and `train` read them; returns the folder."""
        PngWriter(Path(folder), self.class_names).write(Batch(self.images, self.labels))
        return Path(folder)


class CommandFailed(RuntimeError):
    """A command ended with an exit code other than 0, which is `code`; the message is its last line."""

    def __init__(self, name: str, code: int, last: str):
        super().__init__(f"{name} ended with code {code}: {last}")
        self.code = code


def run(name: str, *, processes: int = 1, **flags) -> None:
    """Run a command to its end, its output printed here as it comes.

    Args:
        name: as `gdvae --help` lists them: simulate, train, sample, evaluate, validate, ...
        processes: how many share the work, one a GPU or core.
        flags: its flags; `config` also takes the name of a shipped recipe.
    Raises:
        UserError: no such command.
        CommandFailed: it ended with an exit code other than 0.
    """
    known = scripts()
    if name not in known:
        raise UserError(f"unknown command {name}{did_you_mean(name, known)}; known are {', '.join(known)}")
    command = python(known[name].name, {}, processes=processes) + with_recipes(words_of(flags))
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    last = ""
    with subprocess.Popen(command, **how, text=True, encoding="utf-8", errors="replace", bufsize=1) as process:
        try:
            for line in process.stdout or ():
                sys.stdout.write(line)  # a notebook shows what Python writes, not what its children do
                last = line.strip() or last
        except KeyboardInterrupt:  # it has been asked to stop as well, and saves
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
            raise
    if process.returncode:
        raise CommandFailed(name, process.returncode, last)


class Model:
    """A trained model in memory, on this machine's GPU if it has one.

    Args:
        place: a checkpoint (model*.pt, ema_*.pt), or a training's folder, of which the best or newest average is taken.
    Raises:
        UserError: no checkpoint there, or one that cannot be read.
    """

    def __init__(self, place):
        run, record = self._run(place)
        self.path, self.opened = Path(run.model_path), open_model(run, record)

    def _run(self, path, **settings):
        return read_flags(words_of({"model_path": path, **settings}), __doc__)

    @property
    def class_names(self) -> list[str]:
        """The users that it learned, in the order of their labels."""
        return self.opened.class_names

    def sample(self, **flags) -> Samples:
        """Draw images: flags as of image_sample_vae.py, such as users, num_samples, seed, sampler, num_steps,
        cfg_scale, batch_size.

        Raises:
            UserError: a flag that does not fit the model.
        """
        settings, _ = self._run(self.path, **{"num_samples": 16, **flags})
        ready: Generation = prepare(settings, self.opened)
        drawn = join(list(ready.batches(settings)))
        return Samples(drawn.pixels, drawn.labels, ready.class_names)

    @th.inference_mode()
    def encode(self, images: np.ndarray) -> th.Tensor:
        """uint8 (N, H, W, 3) -> the posterior's mean as model latents (N, C, h, w)."""
        x = th.from_numpy(np.stack([image_from_pixels(pixels) for pixels in images])).to(dist_util.dev())
        moments = self.opened.vae.encode_moments(x)
        return moments if self.opened.vae.is_pixel else moments.chunk(2, dim=1)[0]

    @th.inference_mode()
    def decode(self, latents: th.Tensor) -> np.ndarray:
        """Model latents (N, C, h, w) -> uint8 (N, H, W, 3)."""
        return to_pixels(self.opened.vae.decode_batch(latents.to(dist_util.dev())))
