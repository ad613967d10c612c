"""Sampling steps a second: our samplers against the official `p_sample` and against diffusers' schedulers.

A step is that of a whole walk of a few steps, by the model as `image_sample_vae.py` opens it. `deviation` says how far
our samples are from the official code's for the same noise, as a share of the largest number in them.
"""

from contextlib import closing

import cases
import contenders
import rivals
from apart import ApartSampler
from contenders import deviation
from rivals import diffusers_sampler
from timing import Settings, Way, compare

STEPS = 5  # of a walk
SCHEDULERS = {"p_sample": "DDPMScheduler", "ddim": "DDIMScheduler"}  # our name -> diffusers'


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    compiled = [] if settings.tiny else [{"compile": True}]  # which takes half a minute, before the rounds
    for case in cases.unets(settings.tiny) if rivals.official("unet") else []:
        pairs += [against_official(case, flags, settings) for flags in ({}, *compiled)]
    if rivals.diffusers():
        case = cases.unets(settings.tiny)[0]
        model = rivals.diffusers_unet(case)
        pairs += [against_diffusers(case, model, name, settings) for name in SCHEDULERS]
        case = cases.transformer(settings.tiny)
        pairs.append(against_diffusers(case, cases.diffusers_twin(case), "p_sample", settings))
    return {"pairs": pairs, "notes": notes}


def against_official(case, flags: dict, settings: Settings) -> dict:
    """p_sample against p_sample."""
    rival, label = rivals.official_sampler(case, STEPS), ", ".join(["ours", *(f"--{k} {v}" for k, v in flags.items())])
    with closing(ApartSampler(case, STEPS, **flags)) as ours:
        off = {"samples": deviation(ours.results()[0], rival())}
        sides = Way(label, ours.run, STEPS), Way("official", rival, STEPS)
        return compare(f"{case.name}, p_sample", *sides, "steps/s", settings, deviation=off, **case.about())


def against_diffusers(case, model, sampler: str, settings: Settings) -> dict:
    """A sampler of ours against the scheduler that does the same."""
    rival, scheduler = diffusers_sampler(case, model, STEPS, SCHEDULERS[sampler]), SCHEDULERS[sampler]
    about = case.about() | contenders.sizes(contenders.our_network(case, device="meta"), model)
    with closing(ApartSampler(case, STEPS, sampler=sampler)) as ours:
        sides = Way("ours", ours.run, STEPS), Way(f"{type(model).__name__}, {scheduler}", rival, STEPS)
        return compare(f"{case.name}, {sampler}", *sides, "steps/s", settings, **about)
