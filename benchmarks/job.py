"""A whole sampling job, as a user runs it: 250 steps of the official p_sample against 20 of DPM-Solver++.

The official code runs inside `image_sample_vae.py` (`official_sampler.py`), so that labels, decoding and files are the
same. Timed are the whole command, with its start, and its sampling loop alone, which is what a job of many images comes
to; that both make images of one quality is for `bench_sampling.py` to show.
"""

import itertools
import re
from types import SimpleNamespace

import contenders
import rivals
from timing import Settings, Way, compare, line_of, spread

BATCH = 62  # images at a time in a process, at most: two of each user
OFFICIAL = "official --timestep_respacing 250"
OURS = "--sampler dpmpp_2m --num_steps 20"


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    if not settings.model_path:
        return {"notes": [say("no --model_path: no sampling job")]}
    notes = rivals.lacking()
    if not rivals.official("unet"):
        return {"notes": notes}
    from bench_sampling import sample  # only now: it needs the evaluator's packages

    count = 2 if settings.tiny else settings.num_samples
    processes = int((re.findall(r"\d+", settings.launcher) or [1])[-1])
    args = SimpleNamespace(model_path=settings.model_path, num_samples=count, launcher=settings.launcher)
    args.batch_size = min(BATCH, -(-count // processes))
    numbers, speeds = itertools.count(), {"ours": [], "official": []}
    ways = {"ours": OURS, "official": OFFICIAL.replace("250", "4") if settings.tiny else OFFICIAL}
    with contenders.scratch() as root:

        def job(side: str):
            number = next(numbers)
            _, speed = sample(args, ways[side], 0, root / str(number))
            speeds[side].append(speed)

        sides = (Way(ways[side], lambda side=side: job(side), count) for side in ways)
        limits = Settings(rounds=min(3, settings.rounds), budget_s=0)  # a job is long: no call is repeated
        pair = compare(f"whole command, {count} images", *sides, "images/s", limits)
    loop = loop_of(pair, speeds, count)
    print(line_of(loop), flush=True)
    return {"pairs": [pair, loop], "notes": notes}


def say(note: str) -> str:
    print(note, flush=True)
    return note


def loop_of(pair: dict, speeds: dict[str, list[float]], count: int) -> dict:
    """The pair of the sampling loops, by the speeds that they told; the first of each warmed up."""
    ours, official = (speeds[side][1:] for side in ("ours", "official"))
    return {
        **pair,
        "name": f"sampling loop, {count} images",
        "ratio": spread(a / b for a, b in zip(ours, official, strict=True)),
        "ours": {**pair["ours"], **spread(ours)},
        "rival": {**pair["rival"], **spread(official)},
    }
