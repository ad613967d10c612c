"""Where a run is put together: a network, a process and a sampler from flags.

Two networks (ADM's U-Net, LightningDiT) and two processes (Gaussian diffusion, flow matching) combine freely; one
training loop and one sampling loop serve all four. `script_util` makes upstream's pair, for upstream's callers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch as th

from . import dist_util, samplers
from .config import Run, UserError
from .denoiser import denoiser_of
from .dit import DiTConfig, LightningDiT, create_dit
from .estimate import Estimate, estimate
from .flow_matching import FlowConfig, FlowMatching
from .guidance import GuidanceConfig
from .noised_classifier import LatentClassifierConfig
from .posthoc_ema import lengths_of
from .resample import create_named_schedule_sampler
from .respace import SpacedDiffusion
from .samplers import SPACINGS
from .script_util import (
    NUM_CLASSES,
    DiffusionConfig,
    LaterDiffusionConfig,
    ModelConfig,
    create_diffusion_vae,
    create_model_vae,
)
from .train_config import ema_rates, in_bfloat16
from .unet import UNetModel

PREVIEW_STEPS = 25  # enough to show where training stands
FEW_STEPS = 20  # what DPM-Solver++ and UniPC need
DEEP_NOISE = -6.0  # lambda = log(alpha / sigma): linear betas begin at -5, cosine betas and flows far below
FLOW_STEPS = 250  # points of the grid of times, as published for SiT and LightningDiT
LABEL_DROPOUT = {"unet": 0.0, "dit": 0.1}  # what was published for each
SHARED = {"image_size", "class_cond", "use_checkpoint", "use_fp16", "learn_sigma"}  # flags that every network reads
PROCESSES = "gaussian", "flow"
USERS = 31  # for an estimate, which reads no data: a user more or less is a row of a table


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """Which network, which process."""

    network: str = "unet"  # unet (guided-diffusion's) or dit (LightningDiT)
    process: str = "gaussian"  # gaussian (diffusion) or flow (matching)
    class_dropout_prob: float = -1.0  # how often training hides the user, for guidance; -1: 0.1 with dit, 0 with unet

    def __post_init__(self):
        for name, known in (("network", LABEL_DROPOUT), ("process", PROCESSES)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if self.class_dropout_prob != -1 and not 0 <= self.class_dropout_prob < 1:
            raise UserError(f"--class_dropout_prob is {self.class_dropout_prob}; a probability lies between 0 and 1")

    @property
    def label_dropout(self) -> float:
        """How often training hides the user."""
        return LABEL_DROPOUT[self.network] if self.class_dropout_prob == -1 else self.class_dropout_prob


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are walked back from noise."""

    clip_denoised: bool = True  # clamp each predicted x_0 to [-1, 1]; by default only in pixels, never on latents
    use_ddim: bool = False  # DDIM steps (deterministic) instead of ancestral ones: --sampler ddim
    # p_sample, ddim or heun; of a flow euler, heun, dopri5, sde_euler or sde_heun; of both dpmpp_2m, dpmpp_2m_sde or
    # unipc, which need few steps. Empty: the first
    sampler: str = ""
    # steps; of a flow's own samplers the points of their grid. 0: all, or what --timestep_respacing says; a flow's 250;
    # dpmpp_2m, dpmpp_2m_sde, unipc and a Gaussian heun 20
    num_steps: int = 0
    spacing: str = ""  # of the samplers of few steps: karras, uniform or logsnr; empty: by the process

    def __post_init__(self):
        if self.sampler and self.sampler not in {**GAUSSIAN_SAMPLERS, **FLOW_SAMPLERS}:
            known = ", ".join((*GAUSSIAN_SAMPLERS, *FLOW_SAMPLERS))
            raise UserError(f"--sampler is {self.sampler!r}; choose one of {known}")
        if self.spacing and self.spacing not in SPACINGS:
            raise UserError(f"--spacing is {self.spacing!r}; choose {', '.join(SPACINGS)}")
        if self.num_steps < 0 or self.num_steps == 1:
            raise UserError(f"--num_steps is {self.num_steps}; give 2 or more, or 0 for the default")
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise UserError(f"--use_ddim True, but --sampler is {self.sampler}: give one of them")

    @property
    def on_a_subset(self) -> bool:
        """Whether a Gaussian process is walked on a subset of its times, as upstream does, or in continuous time."""
        return self.sampler in ("", "p_sample", "ddim")


NETWORK_SECTIONS = (ChoiceConfig, ModelConfig, DiTConfig, DiffusionConfig, LaterDiffusionConfig, FlowConfig)
SAMPLING = (SamplerConfig, GuidanceConfig)


def settings_of(run: Run, section) -> dict:
    """The settings of one section by name."""
    return {field.name: getattr(run, field.name) for field in fields(section)}


def create_network(run: Run, vae, *, num_classes: int = NUM_CLASSES) -> UNetModel | LightningDiT:
    """The network that the flags name, for the latents of `vae`.

    Args:
        run: has the flags of `NETWORK_SECTIONS`.
        num_classes: how many users there are, if `class_cond`.
    Raises:
        UserError: a size that cannot be divided as asked.
    """
    choice = run.section(ChoiceConfig)
    if choice.network == "unet":
        settings = settings_of(run, ModelConfig)
        sigma = run.learn_sigma and choice.process == "gaussian"
        return create_model_vae(
            vae, **settings, learn_sigma=sigma, num_classes=num_classes, class_dropout_prob=choice.label_dropout
        )
    channels, height, _ = vae.latent_shape(run.image_size)
    options = settings_of(run, DiTConfig)
    return create_dit(
        options.pop("model_type"),
        input_size=height,
        in_channels=channels,
        num_classes=num_classes if run.class_cond else 0,
        class_dropout_prob=choice.label_dropout if run.class_cond else 1.0,  # only the null label is left
        learn_sigma=run.learn_sigma,
        keep_sigma=run.learn_sigma and choice.process == "gaussian",
        use_checkpoint=run.use_checkpoint,
        **options,
    )


def create_process(run: Run, vae, config: SamplerConfig | None = None) -> SpacedDiffusion | FlowMatching:
    """The process that the flags name.

    Args:
        config: how it will be sampled, which says what becomes of a Gaussian process's times; None is training.
    """
    if run.process == "flow":
        return FlowMatching(**settings_of(run, FlowConfig), time_scale=1000.0 if run.network == "unet" else 1.0)
    settings = settings_of(run, DiffusionConfig) | settings_of(run, LaterDiffusionConfig)
    if config and not config.on_a_subset:
        settings["timestep_respacing"] = ""
    elif config and config.num_steps:
        settings["timestep_respacing"] = str(config.num_steps)
    return create_diffusion_vae(vae, **settings)


def create_sampler(config: SamplerConfig, process, cond_fn=None) -> Callable[..., th.Tensor]:
    """(model, shape, noise, noise_like, model_kwargs, device, progress) -> samples, by the flags' solver.

    Args:
        cond_fn: (x, t, **model_kwargs) -> the gradient of a log-probability that leads the samples.
    Raises:
        UserError: a solver of the other process.
    """
    flow = isinstance(process, FlowMatching)
    solver = (FLOW_SAMPLERS if flow else GAUSSIAN_SAMPLERS)[solver_of(config, flow=flow)]
    return partial(solver, process, config, cond_fn=cond_fn)


def solver_of(config: SamplerConfig, *, flow: bool) -> str:
    """The name of the solver that the flags choose for a flow or a Gaussian process.

    Raises:
        UserError: it is of the other process.
    """
    table = FLOW_SAMPLERS if flow else GAUSSIAN_SAMPLERS
    name = config.sampler or ("ddim" if config.use_ddim else next(iter(table)))
    if name not in table:
        flag = f"--sampler {name}" if config.sampler else "--use_ddim True"
        leave = "" if config.sampler else f"leave it out and give --sampler {next(iter(table))}, or "
        raise UserError(f"{flag} is not of this model's process: {leave}choose {', '.join(table)}")
    return name


def walk_of(config: SamplerConfig, process) -> dict:
    """What a run's record says of the walk: the `sampler`, `num_steps` and `spacing` that the flags come to."""
    flow = isinstance(process, FlowMatching)
    name, steps, spacing = solver_of(config, flow=flow), config.num_steps, ""
    if _is_spaced(name, flow=flow):
        steps, spacing = steps or FEW_STEPS, config.spacing or _spacing_for(denoiser_of(process, None))
    elif flow:
        steps = "adaptive" if name == "dopri5" else steps or FLOW_STEPS
    else:
        steps = process.num_timesteps
    return {"sampler": name, "num_steps": steps, "spacing": spacing}


def _is_spaced(solver: str, *, flow: bool) -> bool:
    """Whether it is a solver of few steps, whose times `--spacing` chooses."""
    return solver in FEW or (solver == "heun" and not flow)


def _gaussian(loop: str):
    def sample(process, config, model, shape, **how):
        return getattr(process, loop)(model, shape, clip_denoised=config.clip_denoised, **how)

    return sample


def _ode(method: str):
    def sample(process, config, model, shape, *, noise=None, noise_like=None, **how):
        del noise_like  # nothing is random after the first noise
        start, steps = shape if noise is None else noise, config.num_steps or FLOW_STEPS
        return process.sample_loop(model, start, steps, method=method, **how)

    return sample


def _adaptive(process, config, model, shape, *, noise=None, noise_like=None, model_kwargs=None, **how):
    """dopri5, whose steps suit the whole batch; images that may not depend on their batch are walked one by one."""
    walk = partial(_ode("dopri5"), process, config, model)
    if noise is None or noise_like is None:
        return walk(shape, noise=noise, model_kwargs=model_kwargs, **how)
    cond = [{name: value[i : i + 1] for name, value in (model_kwargs or {}).items()} for i in range(len(noise))]
    return th.cat([walk(None, noise=x[None], model_kwargs=y, **how) for x, y in zip(noise, cond, strict=True)])


def _sde(method: str):
    def sample(process, config, model, shape, *, noise=None, **how):
        start = shape if noise is None else noise
        steps = config.num_steps or FLOW_STEPS
        return process.sample_sde_loop(model, start, steps, method=method, last_step="tweedie", **how)

    return sample


def _few_steps(solver: str):
    def sample(process, config, model, shape, *, noise=None, model_kwargs=None, cond_fn=None, device=None, **how):
        settings = {"clip_denoised": config.clip_denoised, "model_kwargs": model_kwargs, "cond_fn": cond_fn}
        denoiser = denoiser_of(process, model, **settings)
        x = th.randn(*shape, device=device) if noise is None else noise
        spacing = config.spacing or _spacing_for(denoiser)
        steps = config.num_steps or FEW_STEPS
        return samplers.sample(denoiser, x, steps, solver=solver, spacing=spacing, **how)

    return sample


def _spacing_for(denoiser) -> str:
    """Even in log-SNR, unless the process begins so deep in noise that most steps would be lost there."""
    return "logsnr" if denoiser.log_snr(denoiser.interval[0]) > DEEP_NOISE else "uniform"


FEW = {name: _few_steps(name) for name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")}
GAUSSIAN_SAMPLERS = {"p_sample": _gaussian("p_sample_loop"), "ddim": _gaussian("ddim_sample_loop")}
GAUSSIAN_SAMPLERS |= {"heun": _few_steps("heun"), **FEW}
FLOW_SAMPLERS = {"euler": _ode("euler"), "heun": _ode("heun"), "dopri5": _adaptive}
FLOW_SAMPLERS |= {"sde_euler": _sde("euler"), "sde_heun": _sde("heun"), **FEW}


def try_settings(run: Run, vae, *, num_classes: int = 2) -> th.nn.Module:
    """Build network and process without memory, so that a flag that cannot be is said before any image is read.

    Returns:
        the network, on the meta device.
    Raises:
        ValueError: see `create_network`, `create_process` and `create_named_schedule_sampler`.
    """
    with th.device("meta"):
        model, process = create_network(run, vae, num_classes=num_classes), create_process(run, vae)
    create_named_schedule_sampler(run.schedule_sampler, process)
    return model


def refuse_unfit(run: Run) -> None:
    """Raise if flags of users or guidance meet a model without users, or steps are asked for twice or in vain.

    Raises:
        UserError: names the flags.
    """
    for name, asked in (("users", bool(run.users)), ("cfg_scale", run.cfg_scale != 1)):
        if asked and not run.class_cond and not (name == "users" and run.classifier_path):
            given = " ".join(run.users) if name == "users" else run.cfg_scale
            raise UserError(
                f"--{name} {given}: this model was trained with --class_cond False; leave --{name} out, or give a"
                " --classifier_path"
            )
    flow, respacing = run.process == "flow", run.timestep_respacing if "timestep_respacing" in run.given else ""
    solver = solver_of(run.section(SamplerConfig), flow=flow)
    if respacing and (flow or _is_spaced(solver, flow=flow)):
        raise UserError(
            f"--timestep_respacing {respacing}: --sampler {solver} does not read it, give --num_steps instead"
        )
    if run.num_steps and respacing:
        raise UserError(f"--num_steps {run.num_steps} and --timestep_respacing {run.timestep_respacing}: give one")


def create_preview_sampler(run: Run, vae) -> Callable[..., th.Tensor]:
    """A quick, deterministic sampler of the same process, for pictures during training."""
    steps = PREVIEW_STEPS if run.process == "flow" else min(PREVIEW_STEPS, run.diffusion_steps)
    config = SamplerConfig(use_ddim=run.process == "gaussian", num_steps=steps, clip_denoised=vae.is_pixel)
    return create_sampler(config, create_process(run, vae, config))


def ignored_settings(run: Run) -> list[str]:
    """The given flags that the chosen network and process do not read."""
    unread = DiTConfig if run.network == "unet" else ModelConfig, FlowConfig if run.process == "gaussian" else None
    unread += (DiffusionConfig, LaterDiffusionConfig) if run.process == "flow" else ()
    names = {field.name for section in filter(None, unread) for field in fields(section)} - SHARED
    return sorted(name for name in names & run.given if not _is_default(run, name))


def ignored_in_sampling(run: Run) -> list[str]:
    """The given flags that this way of sampling does not read, each with the reason."""
    flow = run.process == "flow"
    solver = solver_of(run.section(SamplerConfig), flow=flow)
    spaced = _is_spaced(solver, flow=flow)
    by_solver = {"spacing": not spaced, "num_steps": solver == "dopri5", "clip_denoised": flow and not spaced}
    found = {name: f"--network {run.network} --process {run.process}" for name in ignored_settings(run)}
    found |= {name: f"--sampler {solver}" for name, unread in by_solver.items() if unread}
    found |= run.section(GuidanceConfig).unread()
    of_classifier = [field.name for field in fields(LatentClassifierConfig) if field.name != "image_size"]
    found |= dict.fromkeys(() if run.classifier_path else of_classifier, "no --classifier_path")
    told = (name for name in found if name in run.given and not _is_default(run, name))
    return [f"--{name} {getattr(run, name)} with {found[name]}" for name in told]


def _is_default(run, name):
    """Whether a flag says what holds without it; unclamped is what a solver that does not clamp does anyway."""
    return getattr(run, name) == {**run.defaults, "clip_denoised": False}[name]


def estimate_run(run: Run, vae) -> Estimate:
    """What memory and time a training run takes, without reading data."""
    return estimate(
        try_settings(run, vae, num_classes=USERS),
        vae.latent_shape(run.image_size),
        batch_size=run.batch_size,
        microbatch=run.microbatch,
        num_emas=len(ema_rates(run.ema_rate)) + len(lengths_of(run.posthoc_ema)),
        steps=min(filter(None, (run.max_steps, run.lr_anneal_steps)), default=0),
        epochs=run.max_epochs,
        classes=USERS if run.class_cond else None,
        half=run.use_fp16,
        bf16=in_bfloat16(run.amp),
        recompute=run.use_checkpoint,
        processes=dist_util.world_size(),
        sharded=run.sharding == "fsdp2",
        device=dist_util.dev(),
    )
