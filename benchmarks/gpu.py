"""Large networks on one GPU, in at most nine minutes: ours in half precision against the rivals in theirs. One table.

    sh benchmarks/gpu.sh                 needs a CUDA GPU with about 60 GiB; what does not fit is left out with a line
    sh benchmarks/gpu.sh --tiny          the same code on a CPU with the smallest networks; its numbers mean nothing

The U-Net has ADM-256's width (256 channels) on latents of 4 x 32 x 32, its rival is the official code with its own
--use_fp16. LightningDiT-XL/1 on the same latents has no official twin; its rival is diffusers' DiTTransformer2DModel of
the same width and depth, trained by autocast and sampled in fp16. Memory is the most that a side allocates beyond what
was there before it was made; `share` is of the rate of a matrix product in half precision, measured here, counting
three forward passes for a training step; `off` is how far losses and gradients, or samples, of a few images are from
ours in float32 without any of it.
"""

import argparse
import gc
import json
import time
from dataclasses import fields
from pathlib import Path

import cases
import contenders
import machine
import rivals
import torch as th
from contenders import Case, OurTraining, deviation, our_sampler, scratch, unet
from rivals import DiffusersTraining, OfficialTraining
from timing import Settings, Way, compare

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.estimate import matmul_rate

STEPS = 5  # of a walk
MINUTES = 8.0  # begin nothing after so many
CHECKED = 4  # images of which losses, gradients and samples are compared
CHECK_LOG_SCALE = 8.0  # of the loss where gradients are compared: the usual first one, 20, may overflow
IF_THERE = "compile", "cuda_graphs"  # flags that are given where our scripts have them
HALVES = {"bf16": {"amp": "bf16"}, "fp16": {"use_fp16": True}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the smallest networks, also on a CPU")
    parser.add_argument("--out_dir", default="", help="a folder for gpu.json; none: only the table")
    args = parser.parse_args(argv)
    if not (th.cuda.is_available() or args.tiny):
        raise SystemExit("error: no CUDA GPU here; --tiny tries the code on a CPU")
    settings = Settings(tiny=args.tiny, rounds=1 if args.tiny else 7, budget_s=0.0 if args.tiny else 12.0)
    begin = time.monotonic()
    contenders.start()
    results = {"benchmark": "gpu", "machine": machine.describe(), "settings": vars(settings), "rows": []}
    results |= {"pairs": [], "notes": rivals.lacking()}
    half = th.float16 if th.cuda.is_available() else th.float32
    rate = matmul_rate(dist_util.dev(), half)
    for name, measured in jobs(settings):
        if time.monotonic() - begin > 60 * MINUTES:
            note(results, f"{name}: left out, {MINUTES:g} minutes are over")
            continue
        try:
            results["pairs"].append(measured(rate))
        except th.OutOfMemoryError:
            note(results, f"{name}: left out, the GPU's memory does not hold it")
        gc.collect()
        th.cuda.empty_cache()
    results["seconds"] = round(time.monotonic() - begin, 1)
    print(table(results["pairs"], rate))
    if args.out_dir:
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.out_dir) / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def note(results: dict, line: str) -> None:
    print(line, flush=True)
    results["notes"].append(line)


def networks(tiny: bool) -> tuple[Case, Case]:
    """The U-Net and the transformer."""
    if tiny:
        return cases.unets(True)[0], cases.transformer(True)
    flags = unet(image_size=128, channels=256, mult="1,2,4", attention="16,8") | {"num_head_channels": 64}
    dit = {"network": "dit", "model_type": "LightningDiT-XL/1", "class_cond": True, "image_size": 128}
    return (
        Case("U-Net, 256 channels, 4x32x32", 64, flags | {"resblock_updown": True, "class_cond": True}),
        Case("LightningDiT-XL/1, 4x32x32", 16, dit),
    )


def jobs(settings: Settings):
    """(name, function of the card's rate that measures a pair), the ones that matter most first."""
    wide, transformer = networks(settings.tiny)
    there = [(wide, "official")] * (rivals.official("unet") is not None)
    there += [(transformer, "diffusers")] * (rivals.diffusers() is not None)
    for extra in variants():
        for case, rival in there:
            for half, flags in HALVES.items():
                ways = flags | extra | ({"channels_last": True} if case is wide else {})
                name = " ".join([f"{case.name}, training, {half}", *extra])
                yield name, lambda rate, a=(case, rival, ways, name): training(*a, rate, settings)
            name = " ".join([f"{case.name}, sampling, fp16", *extra])
            yield name, lambda rate, a=(case, rival, {"use_fp16": True, **extra}, name): sampling(*a, rate, settings)


def variants() -> list[dict]:
    """Plain, and with every fast flag that our scripts have."""
    known = {field.name for section in (*contenders.TRAINING, *contenders.SAMPLING) for field in fields(section)}
    extra = {name: True for name in IF_THERE if name in known}
    return [{}, extra] if extra else [{}]


# ---- the two verbs


def training(case: Case, rival: str, flags: dict, name: str, rate: float, settings: Settings) -> dict:
    """Our loop by these flags against the rival's."""
    found, reference = (gradient_of(case.smaller(CHECKED), ways) for ways in (flags, {}))
    off = {what: deviation(a, b) for what, a, b in zip(("loss", "gradient"), found, reference, strict=True)}
    del found, reference
    ours, ours_bytes = with_memory(lambda: OurTraining(case, **only_known(contenders.TRAINING, flags)))
    theirs, their_bytes = with_memory(lambda: rival_training(case, rival))
    sides = Way("ours", ours.step), Way(label_of(rival), theirs.step)
    about = {"deviation": off, "memory": [ours_bytes, their_bytes], "work": 3 * case.forward_flops(), **case.about()}
    return with_share(compare(name, *sides, "steps/s", settings, **about), rate)


def sampling(case: Case, rival: str, flags: dict, name: str, rate: float, settings: Settings) -> dict:
    """Our p_sample by these flags against the rival's."""
    with scratch() as folder:
        known = only_known(contenders.SAMPLING, flags)
        found, reference = (our_sampler(case.smaller(CHECKED), STEPS, folder, **ways)() for ways in (known, {}))
        ours, ours_bytes = with_memory(lambda: our_sampler(case, STEPS, folder, **known), call=True)
    off = {"samples": deviation(found, reference)}
    theirs, their_bytes = with_memory(lambda: rival_sampler(case, rival), call=True)
    sides = Way("ours", ours, STEPS), Way(label_of(rival), theirs, STEPS)
    about = {"deviation": off, "memory": [ours_bytes, their_bytes], "work": case.forward_flops(), **case.about()}
    return with_share(compare(name, *sides, "steps/s", settings, **about), rate)


def only_known(sections, flags: dict) -> dict:
    """The flags that these sections have."""
    known = {field.name for section in sections for field in fields(section)}
    return {name: value for name, value in flags.items() if name in known}


def gradient_of(case: Case, flags: dict):
    """Losses and gradients of our loop by these flags."""
    training = OurTraining(case, **only_known(contenders.TRAINING, flags))
    training.loop.mp_trainer.lg_loss_scale = CHECK_LOG_SCALE
    return training.gradient()


def label_of(rival: str) -> str:
    return "official, fp16" if rival == "official" else "diffusers, half"


def rival_training(case: Case, rival: str):
    """The official loop in its own half precision; that around diffusers' network by autocast."""
    if rival == "official":
        return OfficialTraining(case, use_fp16=True)
    return DiffusersTraining(case, cases.diffusers_twin(case), autocast=True)


def rival_sampler(case: Case, rival: str):
    if rival == "official":
        return rivals.official_sampler(case, STEPS, use_fp16=True)
    return rivals.diffusers_sampler(case, cases.diffusers_twin(case).half(), STEPS)


def with_memory(make, *, call: bool = False):
    """(what `make` makes, bytes that it allocates at most while it is made and takes two steps; None on a CPU)."""
    cuda = th.cuda.is_available()
    if cuda:
        gc.collect()
        th.cuda.reset_peak_memory_stats()
    before = th.cuda.memory_allocated() if cuda else 0
    made = make()
    for _ in range(2):
        (made if call else made.step)()
    return made, th.cuda.max_memory_allocated() - before if cuda else None


def with_share(pair: dict, rate: float) -> dict:
    """A pair with the share of the card's rate (FLOP/s) that each side reaches, also in words."""
    ours, theirs = share = [pair[side]["median"] * pair["work"] / rate for side in ("ours", "rival")]
    words = [f"{ours:.0%} and {theirs:.0%} of a matrix product's rate"]
    if pair["memory"][0] is not None:
        words.append("{:.1f} and {:.1f} GiB".format(*(count / 2**30 for count in pair["memory"])))
    return pair | {"share": share, "note": ", ".join(words)}


# ---- the table


def table(pairs: list[dict], rate: float) -> str:
    """One line a pair."""
    width = max((len(pair["name"]) for pair in pairs), default=0)
    head = f"{'':{width}} {'ours':>9} {'rival':>9}  times as fast        memory          share       off"
    lines = [f"{th.cuda.get_device_name() if th.cuda.is_available() else 'CPU'}: {rate / 1e12:.3g} TFLOP/s", head]
    return "\n".join(lines + [line_of(pair, width) for pair in pairs])


def line_of(pair: dict, width: int) -> str:
    ratio, (ours, theirs), (share, their_share) = pair["ratio"], pair["memory"], pair["share"]
    memory = f"{ours / 2**30:.1f} of {theirs / 2**30:.1f} GiB" if ours is not None else "unknown"
    spread = f"{ratio['median']:5.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]"
    return (
        f"{pair['name']:{width}} {pair['ours']['median']:9.4g} {pair['rival']['median']:9.4g}  {spread:19}  {memory:18}"
        f" {share:4.0%} {their_share:4.0%}  {max(pair['deviation'].values()):.0e}  ({pair['rival']['label']})"
    )


if __name__ == "__main__":
    main()
