"""What a training run will need, before anything is read: `--dry_run True` prints it.

The network is built on the meta device, where a forward pass computes shapes and nothing else. Counted on it are

    memory = weights + gradients + Adam's two moments + averages + activations kept for backward, image by image
             (the former shared by the processes with --sharding fsdp2)
    time   = steps x images x 3 forward passes (4, if activations are computed again) / (rate x EFFICIENCY)

and the rate is that of a matrix product on this machine, in the precision of the run. The autoencoder, validation and
the pictures during training are left out, and with sharding the block that is put together to compute.
"""

import contextlib
import copy
import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch as th
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .channels_last import meta_as
from .dit import LightningDiTBlock
from .unet import AttentionBlock, ResBlock

RECOMPUTED = (ResBlock, AttentionBlock, LightningDiTBlock)  # what `use_checkpoint` computes again, one at a time
# What a training step reaches of a matrix product's rate. On one CPU core, float32, median of 11 steps of `TrainLoop`
# beside that of 3 products, twice: 0.49 and 0.39 for the U-Net of configs/demo.yaml with 16 latents, 0.60 and 0.64 for
# LightningDiT-S/1 with 32 latents 4 x 16 x 16. No GPU was measured: one that a small network does not fill does less.
EFFICIENCY = 0.5
TRIAL_S = 0.02  # a product that takes less is lost in the clock and in the overhead of its start
MEASURE_S = 0.3
LARGEST_SIDE = 8192
OPEN_END = 1000  # steps to speak of when the run has no last one


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs; `str()` of it are lines to print."""

    parameters: int
    macs: float  # multiply-adds of one image's forward pass
    num_emas: int
    state_bytes: int  # weights, gradients, Adam and averages, in one process
    activation_bytes: int  # of one microbatch
    microbatch: int
    memory_bytes: int | None  # that the device has; None: not known
    steps: int  # 0: without an end
    images: int  # a step, over all processes
    processes: int
    rate: float  # FLOP/s of a matrix product, in one process
    seconds: float  # of all steps, or of `OPEN_END`
    epochs: int = 0  # that end the run, too; 0: none do
    sharded: bool = False

    def __str__(self) -> str:
        averages = f"{self.num_emas} average" + "s" * (self.num_emas != 1)
        copied = self.processes > 1 and not self.sharded
        gradients = "gradients and their copy for the other processes" if copied else "gradients"
        if self.sharded:
            averages += f", of each 1 / {self.processes} by --sharding fsdp2"
        lines = [
            f"network: {_short(self.parameters, 5)} parameters, {_digits(self.macs / 1e9, 4)} GMAC an image",
            f"memory a process: {_short(self.state_bytes)}B weights, {gradients}, Adam and {averages}"
            f" + about {_short(self.activation_bytes, 2)}B activations at {_plural(self.microbatch, 'image')}",
            f"time: {self._steps()} of {_plural(self.images, 'image')} on {_plural(self.processes, 'process', 'es')}:"
            f" about {duration(self.seconds)} at {_short(self.rate)}FLOP/s, measured on this machine by a matrix"
            f" product, {EFFICIENCY:.0%} of which a network reaches".replace("%", " %"),
        ]
        total = self.state_bytes + self.activation_bytes
        if self.memory_bytes and total > self.memory_bytes:
            lines.append(
                f"that is more than the {_short(self.memory_bytes)}B of this device: give a smaller --microbatch,"
                " --use_checkpoint True or a smaller network"
            )
        return "\n".join(lines)

    def _steps(self) -> str:
        epochs = _plural(self.epochs, "epoch")
        if self.steps:
            return _plural(self.steps, "step") + (f" (or {epochs}, if that is less)" if self.epochs else "")
        end = f"{epochs} of data that are not read yet" if self.epochs else "no last step"
        return f"{end}, and {OPEN_END} steps"


def estimate(
    model: th.nn.Module,
    latent_shape: tuple[int, ...],
    *,
    batch_size: int,
    microbatch: int,
    num_emas: int,
    steps: int,
    classes: int | None,
    epochs: int = 0,
    half: bool = False,
    bf16: bool = False,
    recompute: bool = False,
    processes: int = 1,
    sharded: bool = False,
    device: th.device | str,
) -> Estimate:
    """Count and measure; takes a second or, for the largest networks, a few.

    Args:
        model: a `UNetModel` or `LightningDiT`, made under `torch.device("meta")` with float32 weights; left as it is.
        latent_shape: (C, h, w) of what the network sees.
        batch_size: images per step and process; microbatch: images per forward pass (<= 0: all).
        num_emas: how many moving averages of the weights are kept.
        steps: of the run; 0 is no end. epochs: as `--max_epochs`, whose steps nobody knows before the data are read.
        classes: how many the network knows; None or 0 if it takes no labels.
        half: as `--use_fp16`: half weights beside flat float32 masters.
        bf16: as `--amp bf16`: float32 weights, and autocast's bfloat16 where the device computes in it.
        recompute: as `--use_checkpoint`, whatever the model was made with.
        sharded: as `--sharding fsdp2`: each process has its rows of every tensor that stays.
        device: where the run will be, and where a matrix product is timed.
    """
    device, latent_shape = th.device(device), tuple(latent_shape)
    microbatch = min(microbatch, batch_size) if microbatch > 0 else batch_size
    model = _as_trained(model, half)
    flops = forward_flops(model, latent_shape, classes)
    rate = matmul_rate(device, th.float16 if half else th.bfloat16 if bf16 else th.float32)
    kept = activation_bytes(model, latent_shape, classes, microbatch, recompute=recompute, bf16=bf16, device=device)
    passes = 4 if recompute else 3
    return Estimate(
        parameters=sum(param.numel() for param in model.parameters()),
        macs=flops / 2,
        num_emas=num_emas,
        state_bytes=state_bytes(model, num_emas=num_emas, half=half, processes=processes, sharded=sharded),
        activation_bytes=kept,
        microbatch=microbatch,
        memory_bytes=_memory_of(device),
        steps=steps,
        images=batch_size * processes,
        processes=processes,
        rate=rate,
        seconds=(steps or OPEN_END) * batch_size * passes * flops / (rate * EFFICIENCY),
        epochs=epochs,
        sharded=sharded,
    )


def _as_trained(model, half):
    """A copy in training mode, with the weights that forward and backward see."""
    model = copy.deepcopy(model).to("meta").train()
    if half:
        model.convert_to_fp16()
        if hasattr(model, "dtype"):
            model.dtype = th.float16  # a U-Net's activations
    return model


def _inputs(n, latent_shape, classes, device: th.device | str = "meta"):
    like: dict[str, Any] = {"device": device}
    return th.empty(n, *latent_shape, **like), th.empty(n, **like), th.empty(n, **like).long() if classes else None


@th.no_grad()
def forward_flops(model: th.nn.Module, latent_shape: tuple[int, ...], classes: int | None) -> int:
    """Of one image: two for each multiply-add of a matrix product, a convolution or an attention."""
    with FlopCounterMode(display=False) as counter:
        model(*_inputs(1, latent_shape, classes))
    return counter.get_total_flops()


def state_bytes(
    model: th.nn.Module, *, num_emas: int, half: bool = False, processes: int = 1, sharded: bool = False
) -> int:
    """Of all that stays between the steps; `model` has the weights that forward and backward see.

    In float32 a weight has a gradient, two moments and its averages. In half precision the model has weights and
    gradients, and the float32 masters have all of these, too; a fixed parameter has no master and so no average.
    Several processes exchange a copy of the gradients, unless each has a share, of which the first is the largest.
    """
    params = list(model.parameters())
    learnt = [param for param in params if param.requires_grad]
    if sharded:
        return (1 + num_emas) * _bytes(params, processes) + 3 * _bytes(learnt, processes)
    copies = 2 if processes > 1 else 1
    total = _bytes(params) + copies * _bytes(learnt)
    if half:
        masters = 4 * sum(param.numel() for param in learnt)
        return total + (2 + 2 + num_emas) * masters  # masters and their gradients, Adam, averages
    return total + 2 * _bytes(learnt) + num_emas * _bytes(params)


def activation_bytes(
    model: th.nn.Module,
    latent_shape: tuple[int, ...],
    classes: int | None,
    images: int,
    *,
    recompute: bool,
    bf16: bool = False,
    device: th.device,
) -> int:
    """What autograd keeps of a forward pass with so many images; with `recompute`, also one block's while in backward.

    Measured with two images and with three, which tells what grows with the batch from what does not; not with one,
    whose views can be contiguous where a batch's are copied.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with contextlib.ExitStack() as stack:
        place = "meta"
        if bf16:  # autocast leaves meta tensors alone; fake ones are as empty, and on the device that it knows
            model, place = copy.deepcopy(model), device
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(th.autocast(device.type, th.bfloat16))
            model = model.to_empty(device=device)
        batches = [_inputs(n, latent_shape, classes, place) for n in (2, 3)]
        two, three = (_kept(model, inputs, device, recompute=recompute) for inputs in batches)
    return two + (images - 2) * (three - two)


def _kept(model, inputs, device, *, recompute):
    """Bytes of all storages that a forward pass saves for backward, weights and buffers not counted."""
    _recompute(model, False)
    whole, largest = saved_bytes(model, inputs, device)
    if not recompute:
        return whole
    _recompute(model, True)
    return saved_bytes(model, inputs, device)[0] + largest


def _recompute(model, flag):
    for module in model.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = flag


def saved_bytes(model: th.nn.Module, inputs: tuple, device: th.device) -> tuple[int, int]:
    """(bytes that a forward pass saves for backward, those that the hungriest block of it saves).

    Also with real tensors, for comparison.
    """
    own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept, before, blocks = {}, {}, [0]

    def pack(tensor):
        if id_of(tensor) not in own:
            kept[id_of(tensor)] = tensor.untyped_storage()  # held, so that no other gets its id
        return tensor

    def total():
        return sum(storage.nbytes() for storage in kept.values())

    def enter(block, _):
        before[block] = total()

    def leave(block, *_):
        blocks.append(total() - before[block])

    hooks = [
        hook
        for block in model.modules()
        if isinstance(block, RECOMPUTED)
        for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    try:
        hooked = th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooked, _FusedAttention(device), meta_as(device):
            output = model(*inputs)  # noqa: F841 (its graph must live until all is counted)
            return total(), max(blocks)
    finally:
        for hook in hooks:
            hook.remove()


def id_of(tensor: th.Tensor) -> int:
    """Names a tensor's storage while it lives."""
    return tensor.untyped_storage()._cdata


class _FusedAttention(TorchFunctionMode):
    """On the meta device, attention as real devices compute it: without keeping the matrix of all pairs.

    A CPU cannot if the width of a head is not innermost.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            if self.device.type != "cpu" or args[0].stride(-1) == 1:
                return th.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def matmul_rate(device: th.device, dtype: th.dtype = th.float32) -> float:
    """FLOP/s of a product of square matrices that is large enough to be timed; takes about 0.3 s."""
    side, took = 256, 0.0
    while took < TRIAL_S and side < LARGEST_SIDE:
        side *= 2
        a = th.ones(side, side, device=device, dtype=dtype)
        _time(a)  # the first of a size is slower
        took = _time(a)
    times = [_time(a) for _ in range(max(3, round(MEASURE_S / took)))]
    return 2 * side**3 / median(times)


def _time(a):
    begin = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - begin


def _bytes(tensors, processes: int = 1) -> int:
    """Of tensors, or of the first of so many shares of their rows."""
    shares = (tensor.chunk(processes)[0] if tensor.ndim else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in shares)


def _memory_of(device) -> int | None:
    if device.type == "cuda":
        return th.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def _short(value: float, digits: int = 3) -> str:
    """13_505_134_720 -> "13.5 G": about so many digits, and the letter of the power of thousand."""
    value = float(f"{value:.{digits - 1}e}")  # 999 700 is 1 M
    power, letter = next(((p, c) for p, c in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= p), (1, ""))
    return f"{_digits(value / power, digits)} {letter}"


def _digits(value: float, digits: int) -> str:
    """Rounded to so many digits, never as 4.6e+03."""
    return f"{float(f'{value:.{digits - 1}e}'):.15g}"


def _plural(count: int, word: str, ending: str = "s") -> str:
    return f"{count} {word}" + ending * (count != 1)


def duration(seconds: float) -> str:
    """200.4 -> "3.3 min"."""
    units = {"days": 86400, "h": 3600, "min": 60}
    name, length = next(((u, n) for u, n in units.items() if seconds >= (3 if u == "days" else 2) * n), ("s", 1))
    return f"{_digits(seconds / length, 2)} {name}"
