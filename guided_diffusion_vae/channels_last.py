"""What a CPU does faster with the channels innermost (`torch.channels_last`): norms, convolutions after upsampling.

oneDNN's convolutions take a third less time in this layout, but torch's own group norm up to twenty times more. With
rows v = x as (N, H W, C), and per channel sums of v and v^2, the norm is one product and one sum:

    y = v a + b,   a = weight / std,   b = bias - mean a

A nearest upsampling before a 3x3 convolution makes many of its products twice. Each of the four pixels that come of one
sees 2x2 pixels of the smaller image, with sums of the 3x3 weights: 16 products instead of 36.

The numbers are those of the usual formulas, with sums in another order, and the variance is the mean square less the
square of the mean: in float32 it loses digits where a mean is many times its standard deviation.
"""

from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import winograd
from .linear import linear


def innermost(x: th.Tensor) -> bool:
    """Whether x is (N, C, H, W) on a CPU with its channels innermost in memory."""
    layout = x.ndim == 4 and x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()
    return layout and x.device.type == "cpu"


def rows(x: th.Tensor) -> th.Tensor:
    """x (N, C, H, W), channels innermost, as (N, H W, C) without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(v: th.Tensor, like: th.Tensor) -> th.Tensor:
    """Rows (N, H W, C) as (N, C, H, W) of the height and width of `like`, without a copy."""
    return v.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def group_norm(x: th.Tensor, groups: int, weight: th.Tensor, bias: th.Tensor, eps: float) -> th.Tensor:
    """Group norm of x (N, C, H, W), channels innermost; weight and bias (C,), or (N, C) if each image has its own.

    Source: Wu and He 2018, section 3.
    """
    n, c = x.shape[:2]
    return as_image(_GroupNorm.apply(rows(x), weight.expand(n, c), bias.expand(n, c), groups, eps), x)


class _GroupNorm(th.autograd.Function):
    """Of rows (N, T, C), with weight and bias (N, C)."""

    @staticmethod
    def forward(ctx, v, weight, bias, groups, eps):
        n, _, c = v.shape
        moments = th.stack([v.mean(1), (v * v).mean(1)])
        mean, square = moments.view(2, n, groups, -1).mean(3, keepdim=True)
        inverse = th.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()  # (N, groups, 1)
        a = weight.reshape(n, groups, -1) * inverse
        b = th.addcmul(bias.reshape(n, groups, -1), mean, a, value=-1)
        ctx.save_for_backward(v, a, mean, inverse)
        return th.addcmul(b.view(n, 1, c), v, a.view(n, 1, c))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        v, a, mean, inverse = ctx.saved_tensors
        n, groups, _ = a.shape
        by_bias = grad.sum(1)
        by_weight = ((grad * v).sum(1).view(n, groups, -1) - mean * by_bias.view(n, groups, -1)) * inverse
        slope = -inverse * _mean(a * by_weight, v, groups)
        offset = -_mean(a * by_bias.view(n, groups, -1), v, groups) - slope * mean
        by_x = th.addcmul(_over_channels(offset, a), v, _over_channels(slope, a)).addcmul_(grad, a.view(n, 1, -1))
        return by_x, by_weight.view(n, -1), by_bias, None, None


def _mean(sums, v, groups: int) -> th.Tensor:
    """Mean over each group, (N, groups, 1), from sums over the rows (N, C) or (N, groups, C / groups)."""
    return sums.view(len(v), groups, -1).sum(2, keepdim=True) / (v[0].numel() // groups)


def _over_channels(value, like) -> th.Tensor:
    """A value of each group (N, groups, 1) for every channel: (N, 1, C)."""
    return value.expand_as(like).reshape(len(like), 1, -1)


class Conv2d(nn.Conv2d):
    """A convolution; a 3x3 one of an image with its channels innermost by Winograd's filtering where that pays."""

    def forward(self, x):
        plain = self.kernel_size == (3, 3) and self.stride == self.padding == self.dilation == (1, 1)
        if plain and self.groups == 1 and innermost(x) and winograd.fits(x, self.weight):
            return winograd.conv3x3(x, self.weight, self.bias)
        return super().forward(x)


def pointwise(x: th.Tensor, conv: Any) -> th.Tensor:
    """A 1x1 convolution, of one or two dimensions, of x (N, C, H, W), channels innermost: a product of matrices."""
    return as_image(linear(rows(x), conv.weight.flatten(1), conv.bias), x)


def upsample_conv(x: th.Tensor, conv: Any) -> th.Tensor:
    """A 3x3 convolution of x (N, C, H, W), channels innermost, made twice as large by repeating its pixels."""
    n, _, h, w = x.shape
    weight = _halves(_halves(conv.weight, 3), 2).contiguous(memory_format=th.channels_last)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    fours = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # (N, h+1, w+1, 2, 2, C)
    lines = [th.stack([fours[:, i : i + h, j : j + w, i, j] for j in (0, 1)], dim=3) for i in (0, 1)]
    return th.stack(lines, dim=2).view(n, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)


def _halves(weight, dim: int) -> th.Tensor:
    """Weights (O, ...) of three pixels along `dim` as those of two, for the first and then the second of a pair."""
    before, here, after = weight.split(1, dim=dim)
    return th.cat([th.cat([before, here + after], dim=dim), th.cat([before + here, after], dim=dim)])
