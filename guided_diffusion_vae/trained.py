"""A trained model again: its settings from the `run.yaml` beside the checkpoint, its autoencoder, users and weights."""

import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch as th

from . import checkpoint, dist_util, logger
from .assembly import NETWORK_SECTIONS, NUM_CLASSES, create_network
from .config import Parser, Run, UserError, parse_run, read_yaml
from .model_flags import load_weights, network_weights, part_of
from .packing import keep_packed
from .run_record import read_run, refuse_contradictions
from .train_config import ema_rates
from .vae_wrapper import PIXEL, STATS, VAEConfig, VAEInterface, load_vae

NETWORK = (*NETWORK_SECTIONS, VAEConfig)  # what a model is; a script that opens one has these flags


class Trained(NamedTuple):
    """A network in eval mode on this process's device, the autoencoder of its latents, and what its labels mean."""

    model: th.nn.Module
    vae: VAEInterface
    class_names: list[str]


def run_of_model(parser: Parser, argv=None) -> tuple[Run, dict]:
    """The run that the flags make of the one that `--model_path` came from, and the record of that one.

    Args:
        parser: has the sections of `NETWORK`, `--model_path` and `--clip_denoised`, which is True on pixels alone
            unless it is given.
    Raises:
        UserError: see `model_in`, `read_run` and `refuse_contradictions`.
    """
    given = parse_run(parser, argv).model_path
    path = str(model_in(given)) if given and Path(given).is_dir() else given
    settings, record = read_run(path)
    names = [field.name for section in NETWORK for field in fields(section)]
    run = parse_run(parser, argv, base={name: settings[name] for name in names if name in settings})
    run = run.replace(model_path=path)
    refuse_contradictions(run, settings, names)
    place = Path(run.vae_path)
    if "vae_path" not in run.given and place.is_absolute() and not place.exists():
        raise UserError(f"--vae_path {place}, which {path} was trained with, is gone: give its new place")
    if "clip_denoised" not in run.given:
        run = run.replace(clip_denoised=run.vae_path == PIXEL)
    return run, record


def model_in(folder) -> Path:
    """What to sample from in a training's folder: its best average, else the newest, else the newest weights.

    Raises:
        UserError: there is none.
    """
    folder = Path(folder)
    record = folder / "run.yaml"
    known = read_yaml(record).get("ema_rate") if record.is_file() else None
    found = average_in(folder, ema_rates(known)[0] if known else "*", best=True) or newest(folder.glob("model*.pt"))
    if not found:
        raise UserError(f"--model_path {folder} is a folder without a checkpoint; give a model*.pt or ema_*.pt")
    return found


def average_in(folder: Path, rate: float | str, *, best: bool) -> Path | None:
    """The moving average of a rate (`*`: of any) in a training's folder: the best, if it may be that, or the newest."""
    found = newest(folder.glob(f"ema_{rate}_best.pt")) if best else None
    return found or newest(path for path in folder.glob(f"ema_{rate}_*.pt") if path.stem[-1].isdigit())


def newest(paths) -> Path | None:
    """Of checkpoints the one of the highest step."""
    return max(paths, key=lambda path: (len(path.name), path.name), default=None)


def how_to_sample(path) -> str:
    """A command for a first look at a model, as the last line of what made it."""
    quick = f"--num_samples 16 --sampler dpmpp_2m --num_steps 20 --log_dir {Path(path).parent / 'look'}"
    return f"done: python scripts/image_sample_vae.py --model_path {path} {quick} draws from it"


def results_folder(run: Run, name: str) -> str:
    """Where what is made with a model goes: `--log_dir`, OPENAI_LOGDIR, or the folder `name` beside the model."""
    return run.log_dir or os.getenv("OPENAI_LOGDIR") or str(Path(run.model_path).parent / name)


def open_model(run: Run, record: dict) -> Trained:
    """Collective: call on every process. The model of `--model_path`, as `run_of_model` found it.

    Raises:
        UserError: see `load_vae` and `load_network`.
    """
    stats = Path(run.model_path).with_name(STATS)
    vae = load_vae(run.section(VAEConfig), expected=record.get("autoencoder"), latent_stats=stats)
    _place(vae)
    class_names = class_names_of(record)
    return Trained(load_network(run, vae, num_classes=len(class_names)), vae, class_names)


def class_names_of(record: dict) -> list[str]:
    """What the labels of a model mean; of one of upstream's, which has no record, ImageNet's numbers."""
    return record.get("class_names") or [f"{i:04d}" for i in range(NUM_CLASSES)]


def load_network(run: Run, vae: VAEInterface, *, num_classes: int = NUM_CLASSES) -> th.nn.Module:
    """Collective: call on every process. The trained network of `--model_path` on this process's device, to sample.

    Raises:
        UserError: no weights in the file, or of another network.
    """
    model, path = create_network(run, vae, num_classes=num_classes), f"--model_path {run.model_path}"
    weights = dist_util.rank0_first(lambda: _weights_of(run.model_path, path))
    load_weights(model, weights, path=path, given=run.as_dict())
    _place(model)
    if run.use_fp16:
        model.convert_to_fp16()
    return model.eval()


def _place(network: th.nn.Module) -> None:
    """On this process's device, in the layout for sampling."""
    network.to(dist_util.dev(), memory_format=th.channels_last)  # pyright: ignore[reportCallIssue]  # torch declares no memory_format
    keep_packed(network)


def _weights_of(file, path: str) -> dict[str, th.Tensor]:
    loaded = checkpoint.load(file)
    if part_of(loaded):
        logger.log(f"{path} is a training checkpoint: taking its weights {part_of(loaded)!r}")
    return network_weights(loaded, path=path)
