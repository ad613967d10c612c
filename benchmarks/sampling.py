"""Sampling steps a second: our samplers against the official `p_sample` and against diffusers' schedulers.

Each in a process of its own. A step is that of a whole walk of a few steps, by the model as `image_sample_vae.py` opens
it. `deviation` says how far our samples are from the official code's for the same noise, as a share of the largest
number in them.
"""

from contextlib import closing

import cases
import contenders
import rivals
from apart import ApartSampler
from contenders import deviation
from timing import Settings, Way, compare

STEPS = 5  # of a walk
SCHEDULERS = {"p_sample": "DDPMScheduler", "ddim": "DDIMScheduler"}  # our name -> diffusers'


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    compiled = [] if settings.tiny else [{"compile": True}]  # which takes half a minute, before the rounds
    for case in cases.unets(settings.tiny) if rivals.official("unet") else []:
        with closing(ApartSampler(case, STEPS, "official")) as rival:
            pairs += [against_official(case, rival, flags, settings) for flags in ({}, *compiled)]
    if rivals.diffusers():
        case = cases.unets(settings.tiny)[0]
        pairs += [against_diffusers(case, "UNet2DModel", name, settings) for name in SCHEDULERS]
        pairs.append(against_diffusers(cases.transformer(settings.tiny), "DiTTransformer2DModel", "p_sample", settings))
    return {"pairs": pairs, "notes": notes}


def against_official(case, rival: ApartSampler, flags: dict, settings: Settings) -> dict:
    """p_sample against p_sample."""
    label = ", ".join(["ours", *(f"--{k} {v}" for k, v in flags.items())])
    with closing(ApartSampler(case, STEPS, **flags)) as ours:
        off = {"samples": deviation(ours.results()[0], rival.results()[0])}
        sides = Way(label, ours.run, STEPS), Way("official", rival.run, STEPS, rival.turn)
        return compare(f"{case.name}, p_sample", *sides, "steps/s", settings, deviation=off, **case.about())


def against_diffusers(case, name: str, sampler: str, settings: Settings) -> dict:
    """A sampler of ours against the scheduler that does the same."""
    scheduler = SCHEDULERS[sampler]
    about = case.about() | contenders.sizes(contenders.our_network(case, device="meta"), cases.DIFFUSERS[name](case))
    ours, rival = ApartSampler(case, STEPS, sampler=sampler), ApartSampler(case, STEPS, name, scheduler=scheduler)
    with closing(ours), closing(rival):
        sides = Way("ours", ours.run, STEPS), Way(f"{name}, {scheduler}", rival.run, STEPS, rival.turn)
        return compare(f"{case.name}, {sampler}", *sides, "steps/s", settings, **about)
