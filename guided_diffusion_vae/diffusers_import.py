"""A folder of diffusers as a run of ours: weights, `run.yaml`, and the autoencoder as a single file.

What `export_model.py` wrote tells its flags. Of anybody else's pipeline they are read off the configurations of network
and scheduler; a network that computes something else than ours with these flags is refused. No code in the folder is
run, and no pickle is opened.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch as th
import yaml

from . import checkpoint
from .assembly import NETWORK_SECTIONS, ChoiceConfig, create_network
from .autoencoders.layouts import OLD_ATTENTION
from .config import Run, UserError, create_argparser, field_defaults, first_few, parse_run, plain
from .diffusers_card import read_json
from .diffusers_export import INDEX, refuse_used, whole_folder
from .diffusers_process import flags_of_scheduler
from .diffusers_unet import from_diffusers, refuse_other_unet, unet_flags
from .run_record import save_run
from .trained import NETWORK
from .unet import UNetModel
from .vae_wrapper import PIXEL, VAEInterface, save_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL, AUTOENCODER, RECIPE = "model.pt", "autoencoder.safetensors", "finetune.yaml"
OURS = {"unet": "UNet2DModel", "transformer": "LightningDiTModel"}  # the part of a pipeline -> the class that is read
NETWORKS = {"unet": "unet", "transformer": "dit"}  # and --network
TABLES = "class_embedding.weight", "network.y_embedder.embedding_table.weight"  # a row for each class, perhaps one more


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Importing a pipeline of diffusers."""

    pipeline: str = ""  # a folder with model_index.json, which export_model.py or diffusers wrote
    out_dir: str = "runs/imported"  # a new folder, for model.pt, run.yaml and finetune.yaml


class Found(NamedTuple):
    """A pipeline that was read: its network's part, configuration and weights, and all flags that were found."""

    part: str
    config: dict
    weights: dict[str, th.Tensor]
    flags: dict


def import_pipeline(config: ImportConfig) -> Run:
    """Write the run, whole or not at all; returns its settings.

    Raises:
        UserError: names what in the folder is missing, damaged, unsafe, or of another kind.
    """
    refuse_used(config.out_dir)
    folder, out = Path(config.pipeline), Path(config.out_dir)
    if not config.pipeline or not (folder / INDEX).is_file():
        raise UserError(f"--pipeline {config.pipeline or '(empty)'} holds no {INDEX}: give the folder of a pipeline")
    try:
        return _import(folder, out)
    except UserError as error:
        raise UserError(str(error) if "--pipeline" in str(error) else f"--pipeline {folder}: {error}") from error


def _import(folder: Path, out: Path) -> Run:
    index = read_json(folder / INDEX, "--pipeline")
    vae = _autoencoder(folder, index)
    found = _read(folder, index, vae.downsample)
    place = PIXEL if vae.is_pixel else str(out / AUTOENCODER)
    run = parse_run(create_argparser(*NETWORK), [], base={**found.flags, "vae_path": place})
    names = _class_names(index.get("class_names"), found.weights, run)
    weights = _our_weights(found, run, vae, names)
    counts = _told(index).get("images_per_user")
    with whole_folder(out) as made:
        if not vae.is_pixel:
            save_autoencoder(vae.vae, made / AUTOENCODER, vae.latent_scale)
        checkpoint.save(weights, made / MODEL)
        with checkpoint.atomic_write(made / RECIPE) as handle:
            handle.write(_recipe(run, out).encode())
        save_run(run, made, class_names=names, autoencoder=vae.fingerprint, images_per_user=_counts(counts, names))
    return run


# ---- what the folder holds


def _read(folder: Path, index: dict, downsample: int) -> Found:
    named = {name: index[name][1] for name in index if _is_component(index, name)}
    other = sorted(set(named) - {*OURS, "vae", "scheduler"})
    parts = [part for part in OURS if part in named]
    if other or len(parts) != 1 or named[parts[0]] != OURS[parts[0]]:
        what = first_few([f"{name} ({named[name]})" for name in [*other, *parts]], 3) or "no network"
        raise UserError(f"it has {what}; what is read is a unet (UNet2DModel) or what export_model.py wrote, and a vae")
    (part,) = parts
    config = read_json(folder / part / "config.json", "--pipeline")
    weights = _weights(folder / part)
    process = flags_of_scheduler(read_json(folder / "scheduler" / "scheduler_config.json", "--pipeline"))
    told = _told(index).get("settings", {})
    if not told and (part == "transformer" or process["process"] == "flow"):
        raise UserError(
            f"{INDEX} does not tell how it was trained; without that only a UNet2DModel of a Gaussian process is read,"
            " for others turn time and sign of a flow round"
        )
    flags = {"network": NETWORKS[part], "class_dropout_prob": 0.0, "use_fp16": False}
    if part == "unet":
        config = _with_defaults(config)
        flags |= unet_flags(config)
        flags["image_size"] *= downsample
    known = field_defaults(*NETWORK_SECTIONS)
    flags |= process | {name: value for name, value in told.items() if name in known}
    return Found(part, config, weights, flags)


def _is_component(index: dict, name: str) -> bool:
    """Whether an entry of model_index.json names a component, by its library and its class."""
    value = index.get(name)
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    return pair and name != "class_names" and not name.startswith("_")


def _told(index: dict) -> dict:
    """What `export_model.py` wrote of the training; {} in anybody else's folder."""
    told = index.get("training")
    return told if isinstance(told, dict) and isinstance(told.get("settings"), dict) else {}


def _weights(folder: Path) -> dict[str, th.Tensor]:
    """The weights of a component, from safetensors only, under the names of attention that diffusers has since 2023."""
    _refuse_pickles(folder)
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
    loaded = checkpoint.load(folder / WEIGHTS)
    return {pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name): value for name, value in loaded.items()}


def _refuse_pickles(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
        there = f"{', '.join(others[:3])}, but " if others else ""
        raise UserError(
            f"{folder.name} has {there}no {WEIGHTS}, and no other file is read, for a .bin can hold code:"
            " let diffusers write it anew by save_pretrained(safe_serialization=True)"
        )


def _autoencoder(folder: Path, index: dict) -> VAEInterface:
    if not _is_component(index, "vae"):
        return VAEInterface(PIXEL)
    _refuse_pickles(folder / "vae")
    return VAEInterface(str(folder / "vae"))


def _with_defaults(config: dict) -> dict:
    """A UNet2DModel's configuration with the defaults of what it leaves out."""
    from diffusers import UNet2DModel

    arguments = inspect.signature(UNet2DModel.__init__).parameters
    return {name: config.get(name, argument.default) for name, argument in arguments.items() if name != "self"}


# ---- what becomes of it


def _class_names(told, weights: dict[str, th.Tensor], run: Run) -> list[str]:
    """The users: as the folder names them, else numbers; none if the network knows none."""
    rows = next((len(weights[name]) for name in TABLES if name in weights), 0)
    count = rows - (run.section(ChoiceConfig).label_dropout > 0) if run.class_cond else 0
    named = isinstance(told, list) and all(isinstance(name, str) and name for name in told)
    distinct = named and len(set(told)) == len(told) == count
    return list(told) if distinct else [f"{i:04d}" for i in range(count)]


def _our_weights(found: Found, run: Run, vae: VAEInterface, names: list[str]) -> dict[str, th.Tensor]:
    """The weights under our names, of the network that the flags make."""
    with th.device("meta"):
        model = create_network(run, vae, num_classes=len(names))
    if isinstance(model, UNetModel):
        refuse_other_unet(model, found.config)
        return from_diffusers(model, found.weights)
    weights = {name.removeprefix("network."): value.float() for name, value in found.weights.items()}
    ours, theirs = ({name: value.shape for name, value in w.items()} for w in (model.state_dict(), weights))
    differ = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if differ:
        raise UserError(f"its weights are not those of its settings: {first_few(differ, 3)} differ")
    return weights


def _counts(told, names: list[str]) -> dict[str, int] | None:
    """How many images of each user it was trained on, if that was told."""
    fits = isinstance(told, dict) and all(name in names and type(count) is int for name, count in told.items())
    return dict(told) if fits else None


def _recipe(run: Run, out: Path) -> str:
    """The flags that make this network and process, for a training that goes on from the weights."""
    changed = {name: value for name, value in run.as_dict().items() if value != run.defaults[name]}
    return (
        f"# To fine-tune what was imported, on {'images of the same users' if run.class_cond else 'more images'}:\n"
        f"# python scripts/image_train_vae.py --config {out / RECIPE} --resume_checkpoint {out / MODEL}"
        " --data_dir DATA --log_dir NEW\n" + yaml.safe_dump(plain(changed), sort_keys=False, allow_unicode=True)
    )
