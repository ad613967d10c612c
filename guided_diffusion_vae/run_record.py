"""`run.yaml`: what a checkpoint needs to be known by, beside it in the same folder.

It holds the resolved settings, the class list, the autoencoder's fingerprint and the versions. Sampling starts from it,
so that only `--model_path` is needed, and a flag that contradicts it is an error instead of a bad picture.
"""

import platform
from importlib import metadata
from pathlib import Path

import yaml

from .checkpoint import atomic_write
from .config import Run, UserError, field_defaults, plain, read_yaml, typed

RECORD = "record"  # the key in run.yaml under which stands what is no flag
MAY_DIFFER = {"timestep_respacing", "timestep_shift", "use_fp16", "use_checkpoint", "dropout", "vae_path"}
MAY_DIFFER |= {"sample_posterior", "classifier_use_fp16"}
# Beside what a network is: which data a step of training sees, and what it asks of them.
KEPT = ("seed", "random_flip", "class_balance", "process", "noised")


def save_run(
    run: Run,
    folder,
    *,
    class_names: list[str],
    autoencoder: str,
    latent_stats: Path | None = None,
    images_per_user: dict[str, int] | None = None,
) -> None:
    """Write `run.yaml`: settings first, then the record of what they met. An autoencoder of one's own is named by its
    absolute path, so that the model can be sampled from any folder.

    Args:
        latent_stats: a file of latent statistics that the run needs; its copy goes beside `run.yaml`.
        images_per_user: what it was trained on.
    """
    if latent_stats:
        with atomic_write(Path(folder) / latent_stats.name) as handle:
            handle.write(latent_stats.read_bytes())
    place = Path(run.vae_path)
    if place.exists() and (place.suffix or len(place.parts) > 1):  # neither a shipped one's name nor a hub's
        run = run.replace(vae_path=str(place.absolute()))
    packages = ("torch", "numpy", "diffusers", "guided_diffusion_vae")
    record = {
        "class_names": class_names,
        "autoencoder": autoencoder,
        **({"images_per_user": images_per_user} if images_per_user else {}),
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
    return _settings_and_record(path)


def _settings_and_record(path: Path) -> tuple[dict, dict]:
    settings = read_yaml(path)
    record = settings.pop(RECORD, None) or {}
    names = record.get("class_names", []) if isinstance(record, dict) else None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path} is damaged: its {RECORD} does not list the names of classes; copy it again")
    return settings, record


def refuse_contradictions(run: Run, settings: dict, names) -> None:
    """Raise if a flag contradicts the run that the checkpoint came from.

    Args:
        names: the flags that make a network what it is.
    Raises:
        UserError: names the flag and both values.
    """
    for name in names:
        if name not in run.given or not settings or name in MAY_DIFFER:
            continue
        given = getattr(run, name)
        trained = typed(name, settings.get(name, run.defaults[name]), given, "run.yaml")
        if given != trained:
            raise UserError(
                f"--{name} is {given!r}, but the checkpoint was trained with {trained!r} (its run.yaml):"
                f" leave --{name} out"
            )


def training_in(folder) -> tuple[dict, dict]:
    """The settings and the record of the training whose checkpoints lie in a folder; ({}, {}) if there is none."""
    path = Path(folder) / "run.yaml"
    if not (any(Path(folder).glob("model*.pt")) and path.is_file()):
        return {}, {}
    return _settings_and_record(path)


def refuse_other_training(run: Run, folder, sections, *, flag: str = "--log_dir", fixed: tuple = ()) -> None:
    """Raise if the checkpoints in a folder are of a training with other settings; its length, say, may change.

    Args:
        sections: what makes a training what it is, beside `KEPT`; a run.yaml that lacks one had its default.
        flag: what names the folder.
        fixed: values that none replaces, also of settings that may differ.
    Raises:
        UserError: names the flag, both values and the remedy.
    """
    trained = training_in(folder)[0]
    if not trained:
        return
    names = [name for name in KEPT if name in trained and name in run.defaults] + [*field_defaults(*sections)]
    for name in (name for name in names if name != "allow_download"):
        wanted = getattr(run, name)
        before = typed(name, trained.get(name, run.defaults[name]), wanted, "run.yaml")
        if before != wanted and (name not in MAY_DIFFER or before in fixed or wanted in fixed):
            raise UserError(
                f"--{name} is {wanted!r}, but {folder} holds a training with {before!r}:"
                f" give that, or another {flag} for a new one"
            )


def refuse_other_autoencoder(run: Run, folder, fingerprint: str) -> None:
    """Raise if the checkpoints in a folder were trained on latents of another autoencoder, or scaled otherwise.

    Raises:
        UserError: names the flag, both fingerprints and the remedy.
    """
    before = training_in(folder)[1].get("autoencoder", fingerprint)
    if before != fingerprint:
        scaled = f", scaled by the statistics of --data_dir {run.data_dir}," if run.latent_norm else ""
        raise UserError(
            f"--vae_path {run.vae_path}{scaled} is autoencoder {fingerprint}, but {folder} holds a training on latents"
            f" of {before}: give what it was trained with, or another --log_dir for a new one"
        )


def refuse_other_classes(run: Run, folder, class_names: list[str]) -> None:
    """Raise if the checkpoints in a folder know other users; without `--class_cond` they know none.

    Raises:
        UserError: names the flag, the first class that differs in both and the remedy.
    """
    before = training_in(folder)[1].get("class_names", class_names)
    if not getattr(run, "class_cond", True) or before == class_names:
        return
    here, there = ([*names, "no class"] for names in (class_names, before))
    place = next(i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1])
    raise UserError(
        f"--data_dir {run.data_dir} has {len(class_names)} classes, number {place} of them {here[place]}, but {folder}"
        f" holds a training on {len(before)}, there {there[place]}: give data of the same classes, or another --log_dir"
        " for a new one"
    )
