"""Convolutions on a CPU by weights that no longer change: laid out for oneDNN once, not at every call.

oneDNN computes with weights in blocks of 32 or 64 channels, and torch lays them out anew each time: 12 % of a sampling
step of the U-Net of 64 channels at 16 x 16, 4 % of that of 128 at 32 x 32 (two cores of a Zen 5). The results are those
of torch's own call, mostly bit by bit; the memory is that of the weights once more.
"""

from collections.abc import Callable
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


class _Packed(dict):
    """(C, H, W) of the last image -> parameters, their state, and them packed; empty in copies and files."""

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
    parts = [part for part in (conv.weight, conv.bias) if part is not None]
    state = [(id(part), part._version, part.data_ptr()) for part in parts]
    _, of_state, weight, bias = conv.packed.get(x.shape[1:], (None, None, None, None))
    if of_state != state:
        weight, bias = made()
        weight = weight.detach().contiguous(memory_format=th.channels_last)
        weight = th.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, x.shape)
        conv.packed.clear()
        conv.packed[x.shape[1:]] = parts, state, weight, bias
    return th.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")
