"""From a folder of images to a report: what the stages of `run_pipeline.py` read and make, and what cannot be."""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

from . import checkpoint
from .config import Run, UserError, read_yaml, typed
from .data.image_folder import list_files
from .data.latent_shards import LatentShards, find_shards
from .dist_util import detect_launch
from .run_record import MAY_DIFFER, RECORD
from .train_config import ema_rates
from .vae_wrapper import PIXEL, STATS


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline."""

    out_dir: str = "runs/pipeline"  # where everything goes: latents/, train/, samples/, report/
    heldout_dir: str = ""  # real images of other sessions, to judge by; empty: --val_dir
    processes: int = 1  # how many share extraction, training and sampling; a step has --batch_size images of each
    num_samples_per_user: int = 8  # images to make of every user; without users, in all
    sample_batch_size: int = 32  # images at a time on each process, when sampling
    keep_best: bool = True  # sample from the average with the lowest validation loss; False: from the last one

    def __post_init__(self):
        for name in ("processes", "num_samples_per_user", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")


# ---- files -----------------------------------------------------------------------------------------------------------


def flags(run: Run, *sections) -> dict:
    """What was given (by flag or recipe) of these sections' settings."""
    names = dict.fromkeys(field.name for section in sections for field in fields(section))
    return {name: getattr(run, name) for name in names if name in run.given}


def latents_of(run: Run) -> tuple[Path, Path | str]:
    """Where the latents of the training images and of the held-out ones lie, the latter empty if there are none."""
    place = Path(run.out_dir, "latents")
    return (place / "train", place / "val") if run.val_dir else (place, "")


def average(run: Run) -> Path:
    """The moving average to sample from, or what it will be called."""
    name, folder = f"ema_{ema_rates(run.ema_rate)[0]}_", Path(run.out_dir, "train")
    best, saved = folder / f"{name}best.pt", [path for path in folder.glob(f"{name}*.pt") if path.stem[-1].isdigit()]
    if run.keep_best and run.val_dir and (best.is_file() or not saved):
        return best
    return max(saved, key=lambda path: (len(path.name), path.name), default=folder / f"{name}NUMBER.pt")


def samples_file(run: Run) -> Path:
    """The file of samples, or what it will be called."""
    record = Path(run.out_dir, "train", "run.yaml")
    users = len(read_yaml(record)[RECORD]["class_names"]) if record.is_file() else None
    count = run.num_samples_per_user * (users or 0) or "NUMBER" if run.class_cond else run.num_samples_per_user
    return Path(run.out_dir, "samples", f"samples_{count}x{run.image_size}x{run.image_size}x3.npz")


def digest(place, *, times: bool = True) -> str:
    """Of what a stage reads: a file's bytes; of latents their statistics, labels and classes, which stay if the same
    images are extracted again; of images their names, sizes and, if asked, times. Empty if it is not there."""
    if not place or not Path(place).is_dir():
        return checkpoint.digest(place) if Path(place).is_file() else ""
    place = Path(place)
    if (place / STATS).is_file():
        shards = LatentShards(find_shards(place))
        value = [checkpoint.digest(place / STATS), shards.class_names, [int(label) for label in shards.labels]]
    else:
        files = [(str(path.relative_to(place)), path.stat()) for path in list_files(place)]
        value = [[name, stat.st_size, stat.st_mtime_ns if times else 0] for name, stat in files]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def estimate(command: list[str], run: Run) -> None:
    """Print what training will need, before there are data."""
    command = [*command, "--dry_run", "True"]
    if run.latent_norm:  # by statistics that are not there yet, and do not matter here
        command += ["--latent_norm", "False", "--scale_factor", "1"]
    code = subprocess.run(command, env=os.environ | {"RANK": "0", "WORLD_SIZE": str(run.processes)}).returncode
    if code:
        raise SystemExit(code)


# ---- what cannot be --------------------------------------------------------------------------------------------------


def refuse_unfit(run: Run) -> None:
    """Raise for flags that would only be noticed when much of the work is done.

    Raises:
        UserError: names the flag.
    """
    out = Path(run.out_dir).resolve()
    if detect_launch().launcher != "alone":
        raise UserError("--processes says how many processes share the work: start run_pipeline.py with plain python")
    for name in ("data_dir", "val_dir", "heldout_dir"):
        place = getattr(run, name)
        if place and out.is_relative_to(Path(place).resolve()):
            raise UserError(f"--out_dir {run.out_dir} lies in --{name} {place}, whose images it would become: move it")
    if not run.data_dir:
        raise UserError("--data_dir is empty; give a folder of images, with a subfolder for each user")
    if run.resume_checkpoint not in ("", "auto"):
        raise UserError(f"--resume_checkpoint {run.resume_checkpoint}: the pipeline finds its own; leave it out")
    if not (run.max_steps or run.lr_anneal_steps or run.max_epochs):
        raise UserError("training has no end: give --max_steps, --lr_anneal_steps or --max_epochs")
    if run.cfg_scale != 1 and not run.class_cond:
        raise UserError(f"--cfg_scale {run.cfg_scale} needs users to guide to: give --class_cond True, or leave it out")


def refuse_other_training(run: Run, sections) -> None:
    """Raise if the checkpoints in the folder are of a training with other settings.

    Args:
        sections: what makes a training what it is.
    Raises:
        UserError: names the flag, both values and the remedy.
    """
    folder = Path(run.out_dir, "train")
    if not (any(folder.glob("model*.pt")) and (folder / "run.yaml").is_file()):
        return
    trained, names = read_yaml(folder / "run.yaml"), [field.name for section in sections for field in fields(section)]
    for name in (name for name in ("seed", *names) if name in trained and name != "allow_download"):
        wanted = getattr(run, name)
        before = typed(name, trained[name], wanted, "run.yaml")
        if before != wanted and (name not in MAY_DIFFER or PIXEL in (before, wanted)):
            raise UserError(
                f"--{name} is {wanted!r}, but {folder} holds a training with {before!r}:"
                " give that, or another --out_dir for a new one"
            )
