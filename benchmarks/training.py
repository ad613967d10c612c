"""Training steps a second: our loop against the official one and against the usual loop around diffusers' networks.

Each in a process of its own, with the same weights, batch, draws and precision (float32). `deviation` says how far our
losses and gradients are from the official code's, as a share of the largest of them; diffusers' networks are others, of
equal size. On a CPU our loop also runs as two processes that share the threads, as `mpiexec -n 2` starts them: the
deviation is then from our loop in one process with the same seed.
"""

from contextlib import closing

import cases
import contenders
import rivals
from apart import ApartTraining
from contenders import OurTraining, deviation
from timing import Settings, Way, compare

from guided_diffusion_vae import dist_util

WAYS = {
    "ours": {},
    "ours, channels_last": {"channels_last": True},
    "ours, 2 processes": {"ranks": 2, "seed": 0},  # which then draw what one does
}


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    for case in cases.unets(settings.tiny) if rivals.official("unet") else []:
        with closing(ApartTraining(case, "official")) as rival:
            pairs += against_official(case, rival, settings)
    if rivals.diffusers():
        pairs.append(against_diffusers(cases.unets(settings.tiny)[0], "UNet2DModel", settings))
        pairs.append(against_diffusers(cases.transformer(settings.tiny), "DiTTransformer2DModel", settings))
    return {"pairs": pairs, "notes": notes}


def against_official(case, rival: ApartTraining, settings: Settings) -> list[dict]:
    """Our loop, each way, against the official one."""
    reference, seeded, pairs = rival.gradient(), OurTraining(case, seed=0).gradient(), []
    for label, flags in WAYS.items():
        if "ranks" in flags and dist_util.dev().type != "cpu":
            continue
        with closing(ApartTraining(case, **flags)) as ours:
            off = deviations(ours.gradient(), seeded if "seed" in flags else reference)
            sides = Way(label, ours.run), Way("official", rival.run, turn=rival.turn)
            pairs.append(compare(case.name, *sides, "steps/s", settings, deviation=off, **case.about()))
    return pairs


def deviations(found, reference) -> dict[str, float]:
    """Of the losses and of the gradient."""
    return {name: deviation(a, b) for name, a, b in zip(("loss", "gradient"), found, reference, strict=True)}


def against_diffusers(case, name: str, settings: Settings) -> dict:
    """Our loop against a network of diffusers."""
    about = case.about() | contenders.sizes(contenders.our_network(case, device="meta"), cases.DIFFUSERS[name](case))
    with closing(ApartTraining(case)) as ours, closing(ApartTraining(case, name)) as rival:
        sides = Way("ours", ours.run), Way(name, rival.run, turn=rival.turn)
        return compare(case.name, *sides, "steps/s", settings, **about)
