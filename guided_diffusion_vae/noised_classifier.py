"""A classifier of noisy latents, whose gradient leads sampling to a label (Dhariwal and Nichol 2021, section 4).

It is trained by the one training loop: `ClassifierLosses` stands where the loop expects a process, mixes data with
noise as the process does, and asks at the very times at which guidance will ask:

    loss = -log softmax(f(x_t, t'))[y],      x_t ~ q(x_t | x_start),   t' = t as the process shows it to a network

which for a Gaussian process is the original time of a respaced one, on a scale of 1000 with `--rescale_timesteps True`,
and for a flow 1000 t. Upstream trains on the places of the respaced times instead, and asks at the original ones.

Where the model to be guided is given, the gradient learns, too: see `score_matching`.
"""

from dataclasses import dataclass, fields

import torch as th
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checkpoint, dist_util, logger
from .config import Run, UserError, refuse_below, typed
from .flow_matching import FlowConfig, FlowMatching
from .image_datasets import speaking_of
from .model_flags import load_weights, network_weights
from .nn import shifted_in_time
from .run_record import MAY_DIFFER, read_run, refuse_contradictions
from .score_matching import GuidedNoise
from .script_util import (
    CHANNEL_MULT,
    ClassifierConfig,
    DiffusionConfig,
    LaterDiffusionConfig,
    create_classifier,
    create_diffusion_vae,
    downsample_factors,
    parse_channel_mult,
)
from .train_config import refuse_keeping
from .unet import EncoderUNetModel

LABEL_WEIGHT = 5e-4  # of the cross-entropy beside the loss of the gradient, whose gain is of hundredths
TIME_SCALE = 1000.0  # of a flow: the classifier embeds times as the U-Net does
HEAD_CHANNELS = 64  # upstream's classifiers attend with heads of so many channels
PROCESS_FLAGS = {"gaussian": ("noise_schedule", "diffusion_steps", "rescale_timesteps", "zero_terminal_snr")}
PROCESS_FLAGS |= {"flow": ("path_type",)}
LOOP_FLAGS = ("lr", "weight_decay", "batch_size", "microbatch", "log_interval", "save_interval", "resume_checkpoint")
LOOP_FLAGS += ("amp", "channels_last", "keep_last", "keep_every", "max_hours", "seed")


@dataclass(frozen=True, kw_only=True)
class LatentClassifierConfig(ClassifierConfig):
    """The noise-conditioned classifier."""

    classifier_channel_mult: str = ""  # relative widths of its levels, such as 1,2; empty: by the size of the latent


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainConfig:
    """Training of the classifier: upstream's flags, then ours."""

    val_data_dir: str = ""  # held-out data of the same users; the weights with the lowest loss stay as model_best.pt
    model_path: str = ""  # the model to be guided, one without labels: the gradient that guides it learns, too
    noised: bool = True  # train on noisy latents, which guidance asks about; False: on clean ones
    time_shift: bool = False  # start every image at a random column, circularly: less is learnt by heart
    iterations: int = 150000  # steps in all
    lr: float = 3e-4  # learning rate of AdamW
    weight_decay: float = 0.0  # of AdamW
    anneal_lr: bool = False  # let the learning rate fall linearly to 0 over the iterations
    batch_size: int = 4  # images per step and process
    microbatch: int = -1  # images per forward pass; -1 = the whole batch
    schedule_sampler: str = "uniform"  # which t to train on: uniform or loss-second-moment
    resume_checkpoint: str = ""  # a model*.pt to continue from; auto = the newest complete one in the log folder
    log_interval: int = 10  # steps between rows of the log
    eval_interval: int = 5  # steps between judgements of all held-out data; upstream's judge one batch
    save_interval: int = 10000  # steps between checkpoints
    process: str = "gaussian"  # gaussian (diffusion) or flow (matching): that of the model to be guided
    amp: str = "none"  # none; bf16: it runs in bfloat16, the rest in float32; auto: bf16 on GPUs that have it
    channels_last: bool = False  # train with the channels innermost: on some CPUs faster, rounded otherwise
    keep_last: int = 0  # how many checkpoints to keep; 0 = all
    keep_every: int = 0  # steps between checkpoints that stay beside those; 0 = none
    max_hours: float = 0.0  # save and stop in time to stay below so many hours; 0 = no limit
    seed: int = 0  # order of the data, times and noise follow it
    log_dir: str = ""  # where it goes; empty: OPENAI_LOGDIR, else runs/classifier

    def __post_init__(self):
        refuse_below(self, 1, "iterations", "batch_size", "log_interval", "eval_interval", "save_interval")
        refuse_below(self, 0, "weight_decay", "keep_last", "keep_every", "max_hours")
        refuse_keeping(self)
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}; it must be above 0")
        for name, known in (("process", tuple(PROCESS_FLAGS)), ("amp", ("none", "bf16", "auto"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        for name, bad in (("noised", False), ("channels_last", True)):
            if self.model_path and getattr(self, name) is bad:
                raise UserError(
                    f"--model_path teaches the gradient on noisy latents in the usual layout: leave --{name} {bad} out"
                )

    def for_the_loop(self) -> dict:
        """The arguments of TrainLoop that these flags say; there are no moving averages, as upstream."""
        end = {"lr_anneal_steps" if self.anneal_lr else "max_steps": self.iterations}
        return (
            {name: getattr(self, name) for name in LOOP_FLAGS}
            | end
            | {"val_interval": self.eval_interval, "ema_rate": ""}
        )


# ---- what the loop trains it on


class ClassifierLosses:
    """What TrainLoop takes for a process: noises data as the process does, and judges the logits.

    Args:
        noised: False: the classifier sees clean data, at the time of clean data.
        time_shift: while it trains, every image starts at a random column: where in the gait cycle a picture begins
            says nothing of who walks.
        guided: the network to be guided; the loss is then its own under guidance, and a little of the cross-entropy.
    """

    log_prefix = "train_"

    def __init__(self, process, *, noised: bool = True, time_shift: bool = False, guided: GuidedNoise | None = None):
        self.process, self.noised, self.time_shift, self.guided = process, noised, time_shift, guided
        self.num_timesteps = process.num_timesteps

    def training_losses(self, classifier, x_start, t, model_kwargs, noise=None) -> dict[str, th.Tensor]:
        """`loss`, and whether the label is among the likeliest 1 and 5: each float32 (N,).

        The loss is the cross-entropy in nats; with a guided network that is `ce`, and `mse` and `mse_unguided` are the
        network's errors with and without guidance.

        Args:
            x_start: (N, C, h, w); t: (N,) times of the process; model_kwargs: `y`, (N,) int64.
        """
        y = model_kwargs["y"]
        t = t if self.noised else self.clean_times(t)
        if self.time_shift and classifier.training:
            x_start = shifted_in_time(x_start)
        if self.guided and noise is None:
            noise = th.randn_like(x_start)
        x_t = self.process.q_sample(x_start, t, noise=noise) if self.noised else x_start
        if self.guided:
            logits, found = self._gradient_losses(classifier, x_t, t, y, noise)
        else:
            logits = as_guidance_asks(classifier, self.process, x_t, t)
            found = {"loss": F.cross_entropy(logits, y, reduction="none")}
        ranks = (logits > logits.gather(1, y[:, None])).sum(1)  # how many are likelier
        found["acc@1"] = (ranks < 1).float()
        return found | ({"acc@5": (ranks < 5).float()} if logits.shape[1] > 5 else {})

    def _gradient_losses(self, classifier, x_t, t, y, noise):
        assert self.guided is not None
        learns = th.is_grad_enabled()
        with th.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            x_t = x_t.detach().requires_grad_()
            logits = as_guidance_asks(classifier, self.process, x_t, t)
            ce = F.cross_entropy(logits, y, reduction="none")
            (gradient,) = th.autograd.grad(-ce.sum(), x_t, create_graph=learns)
        mse, unguided = self.guided.errors(gradient, x_t.detach(), t, noise)
        return logits, {"loss": mse + LABEL_WEIGHT * ce, "mse": mse, "mse_unguided": unguided, "ce": ce}

    def clean_times(self, t: th.Tensor) -> th.Tensor:
        """The time of clean data, as often as there are times."""
        return th.ones_like(t) if isinstance(self.process, FlowMatching) else th.zeros_like(t)


class CleanTimes:
    """Draws the time of clean data only; a schedule sampler for `--noised False`."""

    def __init__(self, losses: ClassifierLosses, sampler):
        self.losses, self.sampler = losses, sampler

    def sample(self, batch_size: int, device, **options) -> tuple[th.Tensor, th.Tensor]:
        t, weights = self.sampler.sample(batch_size, device, **options)
        return self.losses.clean_times(t), th.ones_like(weights)


def as_guidance_asks(classifier, process, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
    """Logits (N, K) of x_t at times t of the process, which the classifier sees as a cond_fn would be shown them."""
    if isinstance(process, FlowMatching):
        return classifier(x_t, t * TIME_SCALE)
    wrapped = process._wrap_model(classifier) if hasattr(process, "_wrap_model") else classifier
    return wrapped(x_t, process._scale_timesteps(t))


def classifier_times(process, seen: th.Tensor) -> th.Tensor:
    """The times that the classifier takes, from those that the process shows the network it guides."""
    return seen * (TIME_SCALE / process.time_scale) if isinstance(process, FlowMatching) else seen


# ---- how it is made and loaded


def create_classifier_process(run: Run, vae):
    """The process that the flags name, as the classifier sees it."""
    if run.process == "flow":
        return FlowMatching(**_settings(run, FlowConfig), time_scale=TIME_SCALE)
    return create_diffusion_vae(vae, **_settings(run, DiffusionConfig), **_settings(run, LaterDiffusionConfig))


def _settings(run, section):
    return {field.name: getattr(run, field.name) for field in fields(section)}


def refuse_impossible(config: LatentClassifierConfig, vae) -> None:
    """Raise the errors of `create_latent_classifier`, without the memory of a network."""
    with th.device("meta"):
        create_latent_classifier(config, vae, num_classes=2)


def create_latent_classifier(config: LatentClassifierConfig, vae, *, num_classes: int) -> EncoderUNetModel:
    """An `EncoderUNetModel` for the latents of `vae`.

    Raises:
        UserError: no standard widths for the latent's size; widths that heads of 64 channels do not divide.
    """
    channels, side, _ = vae.latent_shape(config.image_size)
    settings = _settings(config, LatentClassifierConfig)
    levels = parse_channel_mult(settings.pop("classifier_channel_mult")) or CHANNEL_MULT.get(side)
    halvings = (side & -side).bit_length()
    if not levels or len(levels) > halvings:
        raise UserError(
            f"--image_size {config.image_size} gives {side} x {side} latents: give --classifier_channel_mult, such as"
            f" 1,2 ({halvings} levels at most)"
        )
    factors = downsample_factors(config.classifier_attention_resolutions, side)
    widths = [int(level * config.classifier_width) for level in levels]
    attending = [width for i, width in enumerate(widths) if 2**i in factors] + widths[-1:]
    if any(width % HEAD_CHANNELS or not width for width in attending):
        raise UserError(
            f"--classifier_width {config.classifier_width} gives levels of {', '.join(map(str, widths))} channels, and"
            f" the last and those that attend must be multiples of {HEAD_CHANNELS}: give --classifier_width 64 or 128,"
            f" or leave the {side} out of --classifier_attention_resolutions {config.classifier_attention_resolutions}"
        )
    settings |= {"image_size": side, "channel_mult": ",".join(map(str, levels))}
    return create_classifier(**settings, in_channels=channels, num_classes=num_classes)


def load_classifier(path, vae, *, run, class_names: list[str] | None = None) -> tuple[th.nn.Module, list[str]]:
    """Collective: call on every process. A trained classifier on this process's device, to guide by, and its classes.

    What it is stands in `run.yaml` beside it; without one (upstream's) the `classifier_*` flags say it.

    Args:
        path: what `--classifier_path` names.
        vae: the autoencoder of the model to be guided.
        run: the settings of that model, with its `process`, `image_size` and so on.
        class_names: that model's.
    Raises:
        UserError: no such file; trained on another autoencoder's latents, on other classes or for another process.
    """
    with speaking_of("--classifier_path", "--model_path"):
        settings, record = dist_util.rank0_first(lambda: read_run(path))
    names = [field.name for field in fields(LatentClassifierConfig)]
    if settings:
        _refuse_other(path, settings, record, vae, run, class_names)
        refuse_contradictions(run, settings, [name for name in names if hasattr(run, name)])
    defaults = {field.name: field.default for field in fields(LatentClassifierConfig)}
    known = {name: typed(name, settings[name], defaults[name], "run.yaml") for name in names if name in settings}
    known = {name: value for name, value in known.items() if name not in MAY_DIFFER or name not in run.given}
    given = {name: getattr(run, name, defaults[name]) for name in names}
    config = LatentClassifierConfig(**{**given, **known})
    class_names = record.get("class_names") or class_names
    assert class_names is not None, path
    weights = dist_util.rank0_first(lambda: checkpoint.load(path))
    weights = network_weights(weights, path=f"--classifier_path {path}")
    model = create_latent_classifier(config, vae, num_classes=len(class_names))
    load_weights(model, weights, path=f"--classifier_path {path}", given={})
    model.to(dist_util.dev(), memory_format=th.channels_last)  # pyright: ignore[reportCallIssue]  # torch declares no memory_format
    model.requires_grad_(False)
    if config.classifier_use_fp16:
        model.convert_to_fp16()
    return model.eval(), class_names


def _refuse_other(path, settings, record, vae, run, class_names):
    """Raise if a classifier was trained for something else than the model that it shall guide."""
    if record.get("autoencoder", vae.fingerprint) != vae.fingerprint:
        raise UserError(
            f"--classifier_path {path} was trained on latents of autoencoder {record['autoencoder']}, but the model's"
            f" is {vae.fingerprint}: train a classifier with the model's --vae_path"
        )
    theirs = record.get("class_names", class_names)
    if class_names and theirs != class_names:
        pairs = zip([*theirs, "no class"], [*class_names, "no class"], strict=False)
        mine, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"--classifier_path {path} knows {len(theirs)} classes and the model {len(class_names)}; where the"
            f" classifier has {mine} the model has {wanted}: train a classifier on the model's classes"
        )
    process = typed("process", settings.get("process", "gaussian"), "", "run.yaml")
    for name in ("process", "image_size", *PROCESS_FLAGS[process]):
        mine = getattr(run, name, None)
        if name in settings and mine is not None and typed(name, settings[name], mine, "run.yaml") != mine:
            raise UserError(
                f"--classifier_path {path} was trained with --{name} {settings[name]}, but the model with {mine}:"
                f" train a classifier with --{name} {mine}"
            )
    if settings.get("noised") is False:
        logger.warn(f"--classifier_path {path} was trained with --noised False: it never saw a noisy latent")
