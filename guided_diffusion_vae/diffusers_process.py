"""A process as a scheduler of diffusers, and back.

A Gaussian process becomes a `DDIMScheduler` with the same betas. It walks with `--timestep_respacing ddimN`'s times (a
stride from 0), or, where the last step is pure noise and has to be kept, with a stride from the other end.

A flow becomes a `FlowMatchEulerDiscreteScheduler`. There time is sigma, 1 for noise and 0 for data, and a network
predicts noise - data; here t = 1 - sigma, and v = data - noise. The pipeline turns both round.
"""

import json
import math
from typing import Any

import torch as th

from .config import UserError
from .flow_matching import FlowMatching
from .gaussian_diffusion import (
    GaussianDiffusion,
    ModelMeanType,
    ModelVarType,
    end_in_pure_noise,
    get_named_beta_schedule,
)

DDIM, EULER = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
MEANS = {ModelMeanType.EPSILON: "epsilon", ModelMeanType.START_X: "sample", ModelMeanType.V: "v_prediction"}
VARIANCES = {
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.FIXED_SMALL: "fixed_small",
    ModelVarType.LEARNED_RANGE: "learned_range",
}
OF_BETAS = "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
MOST_STEPS = 100_000
SIGMAS = 1000  # what diffusers multiplies sigma by, for the times that its networks see


# ---- there


def scheduler_of(process: GaussianDiffusion | FlowMatching, *, clip_sample: bool):
    """The scheduler that walks as this process does.

    Args:
        process: on all its times.
        clip_sample: clamp each predicted x_0 to [-1, 1], as pixels are; no flow does it.
    Raises:
        UserError: a flow that diffusers has no scheduler for; names the flag.
    """
    return _flow(process) if isinstance(process, FlowMatching) else _gaussian(process, clip_sample)


def _gaussian(process, clip_sample):
    from diffusers import DDIMScheduler

    T = process.num_timesteps
    about = {
        "num_train_timesteps": T,
        "prediction_type": MEANS[process.model_mean_type],
        "variance_type": VARIANCES[process.model_var_type],  # for schedulers that know it, such as DDPMScheduler
        "clip_sample": clip_sample,
        "timestep_spacing": "trailing" if process.ends_in_pure_noise else "leading",
        "set_alpha_to_one": True,
    }
    betas = th.from_numpy(process.betas).float()
    for named in (
        {"beta_schedule": "linear", "beta_start": 0.1 / T, "beta_end": 20 / T},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": process.betas.tolist()},
    ):
        scheduler: Any = DDIMScheduler.from_config({**about, **named})
        if th.allclose(scheduler.betas, betas, rtol=1e-6, atol=0):
            return scheduler
    raise AssertionError("the last has these betas")


def _flow(process):
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name, known in (("path_type", "linear"), ("prediction", "velocity")):
        if getattr(process, name) != known:
            raise UserError(
                f"--{name} {getattr(process, name)}: diffusers' {EULER} walks straight paths by their velocity, so only"
                f" --{name} {known} can be exported"
            )
    shift = 1 / process.timestep_shift if process.timestep_shift else 1.0
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=SIGMAS, shift=shift)


# ---- and back


def flags_of_scheduler(config: dict) -> dict:
    """The flags of the process that a scheduler's configuration describes.

    Raises:
        UserError: no process here is like it; names what differs.
    """
    name = str(config.get("_class_name"))
    try:
        if name == EULER:
            shift = float(config.get("shift", 1.0))
            return {"process": "flow", "timestep_shift": 0.0 if shift == 1 else 1 / shift}
        if "beta_schedule" not in config and "trained_betas" not in config:
            raise UserError(f"its scheduler is a {name}, which has no betas")
        found, wanted = _schedule(config), config.get("prediction_type", "epsilon")
        if wanted not in MEANS.values():
            raise UserError(f"its scheduler has prediction_type {wanted}, here {', '.join(MEANS.values())}")
        means = {"predict_xstart": wanted == "sample", "predict_v": wanted == "v_prediction"}
        return {"process": "gaussian", **found, **means}
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"its {name} has a damaged configuration ({' '.join(str(error).split())[:80]})") from error


def _schedule(config):
    """The flags of the named schedule that has these betas."""
    from diffusers import DDIMScheduler

    T = int(config.get("num_train_timesteps", 1000))
    if not 2 <= T <= MOST_STEPS:
        raise UserError(f"its scheduler has num_train_timesteps {T}; give 2 to {MOST_STEPS}")
    scheduler: Any = DDIMScheduler.from_config({name: config[name] for name in OF_BETAS if name in config})
    theirs = scheduler.betas.double()
    for schedule in ("linear", "cosine"):
        if schedule == "linear" and T < 20:
            continue
        betas = get_named_beta_schedule(schedule, T)
        for zero, ours in ((False, betas), (True, end_in_pure_noise(betas))):
            if len(theirs) == T and th.allclose(theirs, th.from_numpy(ours), rtol=1e-3, atol=1e-7):
                return {"diffusion_steps": T, "noise_schedule": schedule, "zero_terminal_snr": zero}
    told = {name: config[name] for name in ("beta_schedule", "beta_start", "beta_end") if name in config}
    raise UserError(f"its scheduler's betas are not those of --noise_schedule linear or cosine: {json.dumps(told)}")


def time_scale(process: GaussianDiffusion | FlowMatching) -> float:
    """The network sees the scheduler's time times this; of a flow 1 - sigma times this."""
    if isinstance(process, FlowMatching):
        return float(process.time_scale)
    scale = 1000.0 / process.num_timesteps if process.rescale_timesteps else 1.0
    return 1.0 if math.isclose(scale, 1.0) else scale
