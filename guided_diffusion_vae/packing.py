"""Convolutions on a CPU by weights that no longer change: laid out for oneDNN once, not at every call.

oneDNN computes with weights in blocks of 32 or 64 channels, and torch lays them out anew each time: 12 % of a sampling
step of the U-Net of 64 channels at 16 x 16, 4 % of that of 128 at 32 x 32 (two cores of a Zen 5). The results are those
of torch's own call, mostly bit by bit; the memory is that of the weights once more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn as nn


def keep_packed(network: nn.Module) -> None:
    """From now on its convolutions keep their weights packed, once used.

    Those that change are packed again; a change through `.data`, which torch does not count, goes unseen.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode == "zeros":
            module.__dict__["packed"] = _Packed()


@dataclass
class _Packed:
    """What was laid out last; nothing in copies and files."""

    state: tuple | None = None  # (C, H, W) of the image, and what the parameters were
    parts: tuple[th.Tensor, ...] = ()  # those parameters, so that their place in memory stays theirs
    weight: th.Tensor | None = None
    bias: th.Tensor | None = None

    def __reduce__(self):
        return _Packed, ()


def is_kept(conv: Any, x: th.Tensor) -> bool:
    """Whether `convolve` is there for x (N, C, H, W), channels innermost: in float32, where nobody wants gradients."""
    if th.compiler.is_compiling() or "packed" not in conv.__dict__ or not th.backends.mkldnn.is_available():
        return False
    plain = x.dtype == conv.weight.dtype == th.float32 and not conv.weight.is_inference()
    return plain and not (th.is_grad_enabled() or th.is_autocast_enabled("cpu"))


def convolve(
    conv: Any,
    x: th.Tensor,
    made: Callable[[], tuple[th.Tensor, th.Tensor | None]],
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups: int = 1,
) -> th.Tensor:
    """`F.conv2d` of x (N, C, H, W), channels innermost, by what `made` makes of the weight and bias of `conv`:
    (O, C / groups, h, w) and (O,) or None."""
    parts, packed = tuple(part for part in (conv.weight, conv.bias) if part is not None), conv.packed
    state = x.shape[1:], [(id(part), part._version, part.data_ptr()) for part in parts]
    if packed.state != state:
        weight, bias = made()
        weight = weight.detach().contiguous(memory_format=th.channels_last)
        weight = th.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, x.shape)
        packed.state, packed.parts, packed.weight, packed.bias = state, parts, weight, bias
    kernel = packed.weight, packed.bias, padding, stride, dilation, groups
    return th.ops.mkldnn._convolution_pointwise(x, *kernel, "none", [], "")
