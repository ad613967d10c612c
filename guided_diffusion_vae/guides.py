"""The networks that guide another, from flags: a weaker one to push away from, a classifier to be led by.

What they do with a prediction is in `guidance`; here they are found, checked against the model and loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch as th

from . import dist_util
from .assembly import NETWORK_SECTIONS, NUM_CLASSES, SamplerConfig, create_process
from .checkpoint import digest
from .config import Run, UserError, create_argparser, field_defaults, typed
from .denoiser import denoiser_of
from .guidance import DEAF, ClassifierGradient, GuidanceConfig, Unlabelled, guide
from .image_datasets import speaking_of
from .noised_classifier import PROCESS_FLAGS, classifier_times, load_classifier
from .run_record import read_run
from .sample_util import SamplingConfig
from .score_matching import GuidedNoise
from .trained import NETWORK, load_network, run_of_model

PREDICTS: dict[str, tuple[str, ...]] = {
    "gaussian": (
        *("diffusion_steps", "noise_schedule", "rescale_timesteps"),
        *("predict_xstart", "predict_v", "zero_terminal_snr"),
    ),
    "flow": ("path_type", "prediction"),
}
OF_THIS_RUN = {"use_fp16", "use_checkpoint", "timestep_respacing", "timestep_shift"}  # how it is walked, not what it is


class Guided(NamedTuple):
    """A model with its guides, as a sampler takes it.

    model: (x_t, t, y) -> prediction; cond_fn: (x_t, t, y) -> gradient, or None; class_names: what a label y means, the
    model's users or the classifier's classes; labelled: whether there are labels at all.
    """

    model: Callable[..., th.Tensor]
    cond_fn: ClassifierGradient | None
    class_names: list[str]
    labelled: bool


def with_guides(run: Run, model, process, vae, class_names: list[str]) -> Guided:
    """Collective: call on every process. The model as the flags of `GuidanceConfig` want it guided.

    Raises:
        UserError: see `guide`, `load_weaker` and `load_classifier`.
    """
    config = run.section(GuidanceConfig)
    weaker = load_weaker(run, vae, class_names) if config.autoguided else None
    guided = guide(model, process, config, weaker)
    if not config.classifier_path:
        return Guided(guided, None, class_names, run.class_cond)
    its_own = not run.class_cond and Path(config.classifier_path).with_name("run.yaml").is_file()
    known = None if its_own else class_names
    classifier, class_names = load_classifier(config.classifier_path, vae, run=run, class_names=known)

    def at_seen_times(x, t):
        return classifier(x, classifier_times(process, t))

    first = process.place_on_path(th.tensor(denoiser_of(process, model).seen_from(DEAF)))

    def heard(t):
        return process.place_on_path(t.float()) >= first

    gradient = ClassifierGradient(at_seen_times, config.classifier_scale, heard=heard)
    return Guided(guided if run.class_cond else Unlabelled(guided), gradient, class_names, True)


def load_weaker(run: Run, vae, class_names: list[str]) -> th.nn.Module:
    """Collective: call on every process. The network of `--autoguide_path`, as its `run.yaml` says it.

    Raises:
        UserError: no such file or no `run.yaml` beside it; it is the model itself, or predicts something else than the
            model does, for other users, or of another autoencoder's latents.
    """
    with speaking_of("--autoguide_path", "--model_path"):
        settings, record = dist_util.rank0_first(lambda: read_run(run.autoguide_path))
    _refuse_other(run, settings, record, vae, class_names)
    with speaking_of("--autoguide_path", "--model_path"):
        weaker = run.replace(model_path=run.autoguide_path, **(_network_of(settings) if settings else {}))
        return load_network(weaker, vae, num_classes=len(class_names))


def _network_of(settings) -> dict:
    """What of a run.yaml makes the network; what it does not name is as by default."""
    defaults = field_defaults(*NETWORK_SECTIONS)
    known = {name: typed(name, settings.get(name, value), value, "run.yaml") for name, value in defaults.items()}
    return {name: value for name, value in known.items() if name not in OF_THIS_RUN}


def _refuse_other(run, settings, record, vae, class_names):
    path = f"--autoguide_path {run.autoguide_path}"
    here, there = (Path(name).resolve() for name in (run.model_path, run.autoguide_path))
    if here == there:
        raise UserError(f"{path} is --model_path itself: give a weaker checkpoint, such as an earlier one of the run")
    if not settings and here.parent != there.parent:
        raise UserError(f"{path} has no run.yaml beside it, which says what network it is: give one that has")
    theirs = _network_of(settings) if settings else {}
    for name in ("network", "process", "image_size", "class_cond", *PREDICTS[run.process]):
        if name in theirs and theirs[name] != getattr(run, name):
            raise UserError(
                f"{path} was trained with --{name} {theirs[name]}, but the model with {getattr(run, name)}: give a"
                " weaker network that predicts the same"
            )
    if record.get("autoencoder", vae.fingerprint) != vae.fingerprint:
        raise UserError(
            f"{path} was trained on latents of autoencoder {record['autoencoder']}, but the model's is"
            f" {vae.fingerprint}: give a weaker network of the same latents"
        )
    if run.class_cond and record.get("class_names", class_names) != class_names:
        names = record["class_names"]
        pairs = zip([*names, "no class"], [*class_names, "no class"], strict=False)
        first, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"{path} knows {len(names)} classes and the model {len(class_names)}; where it has {first} the model has"
            f" {wanted}: give a weaker network of the same users"
        )


def load_guided(path: str, run: Run, vae) -> GuidedNoise:
    """Collective: call on every process. The model that a classifier in training shall guide.

    Args:
        path: what `--model_path` names.
        run: the classifier's settings; vae: the autoencoder of its latents.
    Raises:
        UserError: no such file; trained with labels, on another autoencoder's latents or for another process.
    """
    parser = create_argparser(SamplingConfig, SamplerConfig, *NETWORK)
    theirs, record = run_of_model(parser, ["--model_path", path])
    if theirs.class_cond:
        raise UserError(
            f"--model_path {path} learned with labels: guide it by --cfg_scale, or give a model of --class_cond False"
        )
    if record.get("autoencoder", vae.fingerprint) != vae.fingerprint:
        raise UserError(
            f"--model_path {path} was trained on latents of autoencoder {record['autoencoder']}, but --vae_path"
            f" {run.vae_path} is {vae.fingerprint}: give that model's --vae_path"
        )
    for name in ("process", "image_size", *PROCESS_FLAGS[theirs.process]):
        if getattr(theirs, name) != getattr(run, name):
            raise UserError(
                f"--model_path {path} was trained with --{name} {getattr(theirs, name)}: give that instead of"
                f" {getattr(run, name)}"
            )
    network = load_network(theirs, vae, num_classes=NUM_CLASSES).requires_grad_(False)
    return GuidedNoise(network, create_process(theirs, vae))


def digests(run: Run) -> dict[str, str]:
    """The SHA-256 of each guide's file, for the manifest; empty where there is none."""
    paths = {"autoguide_sha256": run.autoguide_path, "classifier_sha256": run.classifier_path}
    return {name: digest(path) if path else "" for name, path in paths.items()}
