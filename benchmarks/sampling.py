"""Sampling steps a second: our samplers against the official `p_sample` and against diffusers' schedulers.

A step is that of a whole walk of a few steps, by the model as `image_sample_vae.py` opens it. `deviation` says how far
our samples are from the official code's for the same noise, as a share of the largest number in them.
"""

import cases
import contenders
import rivals
from contenders import deviation, our_sampler
from rivals import diffusers_sampler
from timing import Settings, Way, compare

STEPS = 5  # of a walk
SCHEDULERS = {"p_sample": "DDPMScheduler", "ddim": "DDIMScheduler"}  # our name -> diffusers'


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    compiled = [] if settings.tiny else [{"compile": True}]  # which takes minutes, the rounds not counted
    with contenders.scratch() as folder:
        for case in cases.unets(settings.tiny) if rivals.official("unet") else []:
            pairs += [against_official(case, flags, folder, settings) for flags in ({}, *compiled)]
        if rivals.diffusers():
            case = cases.unets(settings.tiny)[0]
            model = rivals.diffusers_unet(case)
            pairs += [against_diffusers(case, model, name, folder, settings) for name in SCHEDULERS]
            case = cases.transformer(settings.tiny)
            pairs.append(against_diffusers(case, cases.diffusers_twin(case), "p_sample", folder, settings))
    return {"pairs": pairs, "notes": notes}


def against_official(case, flags: dict, folder, settings: Settings) -> dict:
    """p_sample against p_sample."""
    ours, rival = our_sampler(case, STEPS, folder, **flags), rivals.official_sampler(case, STEPS)
    off = {"samples": deviation(ours(), rival())}
    label = ", ".join(["ours", *(f"--{name} {value}" for name, value in flags.items())])
    sides = Way(label, ours, STEPS), Way("official", rival, STEPS)
    return compare(f"{case.name}, p_sample", *sides, "steps/s", settings, deviation=off, **case.about())


def against_diffusers(case, model, sampler: str, folder, settings: Settings) -> dict:
    """A sampler of ours against the scheduler that does the same."""
    ours = our_sampler(case, STEPS, folder, sampler=sampler)
    rival = diffusers_sampler(case, model, STEPS, SCHEDULERS[sampler])
    about = case.about() | contenders.sizes(contenders.our_network(case, device="meta"), model)
    sides = Way("ours", ours, STEPS), Way(f"{type(model).__name__}, {SCHEDULERS[sampler]}", rival, STEPS)
    return compare(f"{case.name}, {sampler}", *sides, "steps/s", settings, **about)
