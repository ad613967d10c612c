"""Training steps a second: our loop against the official one and against the usual loop around diffusers' networks.

Same weights, batch, draws and precision (float32). `deviation` says how far our losses and gradients are from the
official code's, as a share of the largest of them; diffusers' networks are others, of equal size. On a CPU our loop
also runs as two processes of one thread, as `mpiexec -n 2` starts them: the deviation is from one with the same seed.
"""

import cases
import contenders
import rivals
from contenders import OurTraining, deviation
from ranks import RanksTraining
from rivals import DiffusersTraining, OfficialTraining
from timing import Settings, Way, compare

from guided_diffusion_vae import dist_util

LAYOUTS = {"ours": {}, "ours, channels_last": {"channels_last": True}}


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    for case in cases.unets(settings.tiny):
        pairs += against_official(case, settings) if rivals.official("unet") else []
        if rivals.official("unet") and dist_util.dev().type == "cpu":
            pairs.append(two_processes(case, settings))
    if rivals.diffusers():
        case = cases.unets(settings.tiny)[0]
        pairs.append(against_diffusers(case, rivals.diffusers_unet(case), "UNet2DModel", settings))
        case = cases.transformer(settings.tiny)
        pairs.append(against_diffusers(case, cases.diffusers_twin(case), "DiTTransformer2DModel", settings))
    return {"pairs": pairs, "notes": notes}


def against_official(case, settings: Settings) -> list[dict]:
    """Our loop in both layouts against the official one."""
    rival, pairs = OfficialTraining(case), []
    reference = OfficialTraining(case).gradient()
    for label, flags in LAYOUTS.items():
        off = deviations(OurTraining(case, **flags).gradient(), reference)
        sides = Way(label, OurTraining(case, **flags).step), Way("official", rival.step)
        pairs.append(compare(case.name, *sides, "steps/s", settings, deviation=off, **case.about()))
    return pairs


def two_processes(case, settings: Settings) -> dict:
    """Our loop on two processes of one thread against the official one on as many threads in one process."""
    reference, ours = OurTraining(case, seed=0).gradient(), RanksTraining(case, seed=0)
    try:
        off = deviations(ours.gradient(), reference)
        sides = Way("ours, 2 processes", ours.step), Way("official", OfficialTraining(case).step)
        return compare(case.name, *sides, "steps/s", settings, deviation=off, **case.about())
    finally:
        ours.close()


def deviations(found, reference) -> dict[str, float]:
    """Of the losses and of the gradient."""
    return {name: deviation(a, b) for name, a, b in zip(("loss", "gradient"), found, reference, strict=True)}


def against_diffusers(case, model, name: str, settings: Settings) -> dict:
    """Our loop, in the faster layout for a U-Net, against a network of diffusers."""
    flags = LAYOUTS["ours, channels_last"] if case.run.network == "unet" else {}
    ours = OurTraining(case, **flags)
    about = case.about() | contenders.sizes(ours.loop.model, model)
    sides = Way("ours, channels_last" if flags else "ours", ours.step), Way(name, DiffusersTraining(case, model).step)
    return compare(case.name, *sides, "steps/s", settings, **about)
