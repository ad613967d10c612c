"""`run.yaml`: what a checkpoint needs to be known by, beside it in the same folder.

It holds the resolved settings, the class list, the autoencoder's fingerprint and the versions. Sampling starts from it,
so that only `--model_path` is needed, and a flag that contradicts it is an error instead of a bad picture.
"""

import platform
from importlib import metadata
from pathlib import Path

import yaml

from .checkpoint import atomic_write
from .config import Run, UserError, plain, read_yaml, typed

RECORD = "record"  # the key in run.yaml under which stands what is no flag
MAY_DIFFER = {"timestep_respacing", "timestep_shift", "use_fp16", "use_checkpoint", "dropout", "vae_path"}
MAY_DIFFER |= {"sample_posterior"}


def save_run(run: Run, folder, *, class_names: list[str], autoencoder: str, latent_stats: Path | None = None) -> None:
    """Write `run.yaml`: settings first, then the record of what they met.

    Args:
        latent_stats: a file of latent statistics that the run needs; its copy goes beside `run.yaml`.
    """
    if latent_stats:
        with atomic_write(Path(folder) / latent_stats.name) as handle:
            handle.write(latent_stats.read_bytes())
    packages = ("torch", "numpy", "diffusers", "guided_diffusion_vae")
    record = {
        "class_names": class_names,
        "autoencoder": autoencoder,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
    }
    with atomic_write(Path(folder) / "run.yaml") as handle:
        text = yaml.safe_dump({**plain(run.as_dict()), RECORD: record}, sort_keys=False, allow_unicode=True)
        handle.write(text.encode())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def read_run(model_path) -> tuple[dict, dict]:
    """The settings and the record of the run that a checkpoint belongs to; ({}, {}) if it has no `run.yaml`.

    Raises:
        UserError: no checkpoint is named, or it is not there.
    """
    if not model_path:
        raise UserError("--model_path is empty; give the ema_*.pt or model*.pt to sample from")
    if not Path(model_path).is_file():
        found = sorted(path.name for path in Path(model_path).glob("ema_*.pt")) if Path(model_path).is_dir() else []
        known = f"is a folder; give a file in it{f', such as {found[-1]}' if found else ''}"
        raise UserError(f"--model_path {model_path} {known if Path(model_path).is_dir() else 'does not exist'}")
    path = Path(model_path).with_name("run.yaml")
    if not path.is_file():
        return {}, {}
    settings = read_yaml(path)
    return settings, settings.pop(RECORD, {})


def refuse_contradictions(run: Run, settings: dict, names) -> None:
    """Raise if a flag contradicts the run that the checkpoint came from.

    Args:
        names: the flags that make a network what it is.
    Raises:
        UserError: names the flag and both values.
    """
    for name in names:
        if name not in run.given or name not in settings or name in MAY_DIFFER:
            continue
        given = getattr(run, name)
        trained = typed(name, settings[name], given, "run.yaml")
        if given != trained:
            raise UserError(
                f"--{name} is {given!r}, but the checkpoint was trained with {trained!r} (its run.yaml):"
                f" leave --{name} out"
            )
