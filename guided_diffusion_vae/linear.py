"""Linear layers on a CPU of AMD's: by oneDNN's 1x1 convolution, where torch would ask MKL for a matrix product.

MKL keeps its fastest kernels for Intel's processors. On two cores of a Zen 5 it made 200 GFLOP/s of 512, oneDNN's
convolution of the same numbers with the channels innermost 400 to 450: half the time, forward and backward. A matrix of
rows is such an image already: (R, C) as R / W images of one line of W pixels, without a copy.
"""

import contextlib
import platform
from pathlib import Path

import torch as th
import torch.nn as nn
import torch.nn.functional as F

LONGEST_LINE, SHORTEST_LINE = 64, 16  # pixels; shorter ones are slower than a matrix product
FEWEST_IMAGES = 16  # fewer of them torch keeps from oneDNN where it has one thread


def _is_amd() -> bool:
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in platform.processor()


PAYS = th.backends.mkl.is_available() and th.backends.mkldnn.is_available() and _is_amd()


class Linear(nn.Linear):
    """torch's linear layer, by `linear`."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """x (..., C) weight^T + bias with weight (O, C), bias (O,): (..., O); sums in another order where that pays."""
    line = line_of(x, weight)
    if not line:
        return F.linear(x, weight, bias)
    images = x.reshape(-1, 1, line, x.shape[-1]).permute(0, 3, 1, 2)
    found = F.conv2d(images, weight[:, :, None, None], bias)
    return found.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def line_of(x: th.Tensor, weight: th.Tensor) -> int:
    """How many rows of x make a line of an image; 0 where a matrix product is as good."""
    plain = PAYS and x.device.type == "cpu" and x.dtype == weight.dtype == th.float32 and x.is_contiguous()
    if not plain or th.is_autocast_enabled("cpu"):
        return 0
    rows, line = x.numel() // x.shape[-1], LONGEST_LINE
    while line >= SHORTEST_LINE and (rows % line or rows // line < FEWEST_IMAGES):
        line //= 2
    return line if line >= SHORTEST_LINE else 0
