"""How near a network comes to what this machine can do: its rates, and what the network's counted products reach.

The rates are torch's own, in float32: a 3x3 convolution at the shapes of the measured U-Nets, in both layouts, a
product of large matrices, also as the 1x1 convolution that `linear.py` makes of it, and a copy of memory. A network's
products are counted (two operations for each multiply-add, by `torch.utils.flop_counter`), three forward passes for a
training step. A share above 100 % is possible: where an upsampling or Winograd's filtering makes a convolution of fewer
products than are counted.
"""

import cases
import contenders
import torch as th
import torch.nn.functional as F
from contenders import OurTraining, our_sampler, scratch
from timing import Settings, Way, row, single

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.estimate import matmul_rate
from guided_diffusion_vae.linear import linear

FORMATS = {"usual layout": th.contiguous_format, "channels innermost": th.channels_last}
STEPS = 5  # of a walk
COPIED = 2**28  # bytes: no cache holds them


def measure(settings: Settings) -> dict:
    """Entry `rows` of the results."""
    contenders.start()
    dist_util.keep_freed_memory()  # as our scripts do
    rates = (matmul_rate(dist_util.dev()) / 1e9 for _ in range(1 if settings.tiny else 3))
    products = [row("product of matrices", "GFLOP/s", rates), product_as_linear_layer(settings)]
    rows = [*products, copy_rate(settings)]
    for case in cases.unets(settings.tiny):
        convolutions = [convolution(case, name, settings) for name in FORMATS]
        best = max(found["median"] for found in convolutions)
        rows += [*convolutions, *shares(case, best, "convolution", settings)]
    best = max(found["median"] for found in products)
    rows += shares(cases.transformer(settings.tiny), best, "product of matrices", settings)
    return {"rows": rows}


def product_as_linear_layer(settings: Settings) -> dict:
    """8,192 rows of 1,024 numbers by a square matrix, as our transformer makes it."""
    rows, channels = (64, 32) if settings.tiny else (8192, 1024)
    x, weight = (th.randn(n, channels, device=dist_util.dev()) for n in (rows, channels))

    @th.no_grad()
    def run():
        linear(x, weight)

    work = 2 * rows * channels**2 / 1e9
    return single("product of matrices, as a linear layer", Way("", run, work), "GFLOP/s", settings)


def copy_rate(settings: Settings) -> dict:
    """Bytes a second that are read, and as many written."""
    source = th.ones(COPIED // 64 if settings.tiny else COPIED, dtype=th.uint8, device=dist_util.dev())
    target = th.empty_like(source)
    return single("copy of memory", Way("", lambda: target.copy_(source), len(source) / 1e9), "GB/s", settings)


def convolution(case, layout: str, settings: Settings) -> dict:
    """3x3, as most of the U-Net's: as many channels in as out, at the size and batch that it sees."""
    (n, _, h, w), channels = case.shape, case.run.num_channels
    about = {"device": dist_util.dev()}
    x = th.randn(n, channels, h, w, **about).to(memory_format=FORMATS[layout])
    weight = th.randn(channels, channels, 3, 3, **about).to(memory_format=FORMATS[layout])
    work = 2 * 9 * channels**2 * n * h * w / 1e9

    @th.no_grad()
    def run():
        F.conv2d(x, weight, padding=1)

    name = f"convolution, {channels} channels, {h}x{w}, batch {n}, {layout}"
    return single(name, Way("", run, work), "GFLOP/s", settings)


def shares(case, best: float, of: str, settings: Settings) -> list[dict]:
    """What training and sampling reach of the rate `best` (GFLOP/s)."""
    forward = case.forward_flops() / 1e9
    training = {"training": OurTraining(case)}
    if case.run.network == "unet":
        training["training, channels_last"] = OurTraining(case, channels_last=True)
    ways = {name: Way("", loop.step, 3 * forward) for name, loop in training.items()}
    found = []
    with scratch() as folder:
        ways["sampling"] = Way("", our_sampler(case, STEPS, folder), STEPS * forward)
        for name, way in ways.items():
            entry = single(f"{name}, {case.name}", way, "GFLOP/s", settings, forward_gflop=forward)
            share = entry["median"] / best
            found.append(entry | {"share": share, "note": f"{share:.0%} of the {of}"})
    return found
