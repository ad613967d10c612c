"""From a folder of images to a report: what the stages of `run_pipeline.py` read and make, and what cannot be."""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch as th

from . import checkpoint, run_record
from .assembly import SamplerConfig, create_process, create_sampler, try_settings
from .config import Run, UserError, read_yaml, refuse_below
from .data.image_folder import list_files, list_images
from .data.latent_shards import LatentShards, find_shards
from .dist_util import detect_launch
from .guidance import GuidanceConfig, guide
from .image_datasets import check_classes, labels_in, speaking_of
from .run_record import RECORD
from .train_config import ema_rates
from .trained import average_in
from .vae_wrapper import FILES, PIXEL, STATS, VAEConfig, load_vae


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
        refuse_below(self, 1, "processes", "num_samples_per_user", "sample_batch_size")


# ---- files -----------------------------------------------------------------------------------------------------------


def flags(run: Run, *sections) -> dict:
    """What was given (by flag or recipe) of these sections' settings."""
    names = dict.fromkeys(field.name for section in sections for field in fields(section))
    return {name: getattr(run, name) for name in names if name in run.given}


def latents_of(run: Run) -> tuple[Path, Path | str]:
    """Where the latents of the training images and of the held-out ones lie, the latter empty if there are none."""
    place = Path(run.out_dir, "latents")
    return (place / "train", place / "val") if run.val_dir else (place, "")


def latents_are_whole(run: Run) -> bool:
    """Whether every extracted latent is there; statistics alone are none."""
    try:
        return all(LatentShards(find_shards(place)) for place in latents_of(run) if place)
    except UserError:
        return False


def average(run: Run) -> Path:
    """The moving average to sample from, or what it will be called."""
    rate, folder, best = ema_rates(run.ema_rate)[0], Path(run.out_dir, "train"), run.keep_best and bool(run.val_dir)
    return average_in(folder, rate, best=best) or folder / f"ema_{rate}_{'best' if best else 'NUMBER'}.pt"


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
    shards = find_shards(place) if (place / STATS).is_file() else []
    if not shards:
        return _digest_of_files(place, list_files(place), times)
    shards = LatentShards(shards)
    return _sha([checkpoint.digest(place / STATS), shards.class_names, [int(label) for label in shards.labels]])


def digest_autoencoder(vae_path: str) -> str:
    """As `digest`; of a diffusers folder the names, sizes and times of its settings and weights."""
    place = Path(vae_path)
    if not place.is_dir():
        return digest(place)
    kinds = (".json", *FILES)
    return _digest_of_files(place, sorted(path for path in place.rglob("*") if path.suffix in kinds and path.is_file()))


def _digest_of_files(root: Path, files: list[Path], times: bool = True) -> str:
    about = [(str(path.relative_to(root)), path.stat()) for path in files]
    return _sha([[name, stat.st_size, stat.st_mtime_ns if times else 0] for name, stat in about])


def _sha(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def estimate(command: list[str], run: Run) -> None:
    """Print what training will need, before there are data."""
    command = [*command, "--dry_run", "True", "--data_dir", ""]
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
    for name in (name for name in ("autoguide_path", "classifier_path") if getattr(run, name)):
        raise UserError(
            f"--{name} {getattr(run, name)}: the pipeline knows one network; leave it out, and sample with it"
            " afterwards by scripts/image_sample_vae.py"
        )
    if run.cfg_scale != 1 and not run.class_cond:
        raise UserError(f"--cfg_scale {run.cfg_scale} needs users to guide to: give --class_cond True, or leave it out")


def try_folders(run: Run) -> int:
    """Look for the images that the stages will read; returns how many there will be to judge.

    Raises:
        UserError: see `list_images` and `check_classes`; a held-out user whom training will not know.
    """
    found = list_images(run.data_dir)
    users = check_classes(found, run.data_dir).class_names if run.class_cond else []
    for name in (name for name in ("val_dir", "heldout_dir") if getattr(run, name)):
        with speaking_of(f"--{name}"):
            found = list_images(getattr(run, name))
            if users and name == "val_dir":  # of --heldout_dir the judge asks that
                labels_in(users, found, getattr(run, name))
    return run.num_samples_per_user * (len(users) or 1)


def judged_by(run: Run) -> str:
    """The flag that names what samples are judged by; empty if there is none."""
    return next((name for name in ("heldout_dir", "val_dir") if getattr(run, name)), "")


@contextlib.contextmanager
def speaking_of_judging(run: Run):
    """Errors of the block, which are the judge's, name the pipeline's flags."""
    words = {"--real_dir": "--data_dir", "--heldout_dir": f"--{judged_by(run)}"}
    words |= {"--samples": f"--num_samples_per_user {run.num_samples_per_user}"}
    try:
        yield
    except UserError as error:
        line = functools.reduce(lambda text, word: text.replace(word, words[word]), words, str(error))
        raise UserError(f"{line}; without --{judged_by(run)} there is no report") from error


def try_sampling(run: Run) -> None:
    """Build what training and sampling will build, without memory.

    Raises:
        UserError: an autoencoder of unknown scale; see `try_settings`, `create_process`, `create_sampler` and `guide`.
    """
    raw = replace(run.section(VAEConfig), latent_norm=False)  # its statistics are not there yet
    vae = load_vae(raw, default_scale=1.0 if run.latent_norm else None)
    model, config = try_settings(run, vae), run.section(SamplerConfig)
    try:
        process = create_process(run, vae, config)
    except ValueError as error:  # what --timestep_respacing itself says was right a moment ago
        raise UserError(str(error).replace("--timestep_respacing", f"--num_steps {config.num_steps}")) from error
    sampler = create_sampler(config, process)
    guide(model, process, run.section(GuidanceConfig))
    if config.sampler == "dopri5":  # needs a package: a model that does nothing shows whether it is there
        sampler(lambda x, t, **kwargs: th.zeros_like(x), (1, 1, 1, 1))


def refuse_other_training(run: Run, sections) -> None:
    """Raise if the checkpoints in the folder are of a training with other settings, see `run_record`.

    Raises:
        UserError: names the flag, both values and the remedy.
    """
    folder = Path(run.out_dir, "train")
    run_record.refuse_other_training(run, folder, sections, flag="--out_dir", fixed=(PIXEL,))
