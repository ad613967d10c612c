"""What a CPU does faster with the channels innermost (`torch.channels_last`): norms, convolutions after upsampling.

oneDNN's convolutions take a third less time in this layout, but torch's own group norm, with few channels a group in
small images, several times more. There, with rows v = x as (N, H W, C), and per channel sums of v and v^2, the norm is
one product and one sum:

    y = v a + b,   a = weight / std,   b = bias - mean a

A nearest upsampling before a 3x3 convolution makes many of its products twice. Each of the four pixels that come of one
sees 2x2 pixels of the smaller image, with sums of the 3x3 weights: 16 products instead of 36.

The numbers are those of the usual formulas, with sums in another order. The variance of such a norm is the mean square
less the square of the mean: in float32 it loses digits where a mean is many times its standard deviation.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import packing, winograd
from .linear import linear

_meta_is_cpu = ContextVar("_meta_is_cpu", default=False)


@contextlib.contextmanager
def meta_as(device: th.device) -> Iterator[None]:
    """Within, networks treat tensors of the meta device as if they were of this one."""
    token = _meta_is_cpu.set(device.type == "cpu")
    try:
        yield
    finally:
        _meta_is_cpu.reset(token)


def on_cpu(x: th.Tensor) -> bool:
    """Whether x is on a CPU, or stands for a tensor that is."""
    return x.device.type == "cpu" or x.is_meta and _meta_is_cpu.get()


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


def group_norm(
    x: th.Tensor, groups: int, weight: th.Tensor, bias: th.Tensor, eps: float, *, silu: bool = False
) -> th.Tensor:
    """Group norm of x (N, C, H, W), channels innermost; weight and bias (C,), or (N, C) if each image has its own.

    Args:
        silu: its SiLU, u sigmoid(u), of which backward keeps no more than of the norm alone.
    Source: Wu and He 2018, section 3.
    """
    if th.is_grad_enabled():
        return _GroupNorm.apply(x, weight, bias, groups, eps, silu)
    return _normed(x, weight, bias, groups, eps, silu)[0]


class _GroupNorm(th.autograd.Function):
    """Of x (N, C, H, W), with weight and bias (C,) or (N, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        y, mean, inverse = _normed(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if ctx.silu:
            grad = th.ops.aten.silu_backward(grad, _line(x, weight, bias, mean, inverse))
        if weight.ndim == 1:
            grad = grad.contiguous(memory_format=th.channels_last)  # torch reads it in the layout of x
            of = grad, x, mean, inverse, weight, *_sizes(x), mean.shape[1], [True] * 3
            found = th.ops.aten.native_group_norm_backward(*of)
        else:
            found = _backward_of_own(rows(grad), x, weight, mean, inverse)
        return *found, None, None, None


def _normed(x, weight, bias, groups: int, eps: float, silu: bool) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """The norm and, of each group, mean and inverse standard deviation (N, groups). Few calls: images are small."""
    n, c, pixels = _sizes(x)
    if c >= 8 * groups or pixels >= 1024:  # torch's own is slow for few channels a group in small images
        affine = (weight, bias) if weight.ndim == 1 else (None, None)
        y, mean, inverse = th.native_group_norm(x, *affine, n, c, pixels, groups, eps)
        if weight.ndim == 2:
            th.addcmul(bias[:, :, None, None], y, weight[:, :, None, None], out=y)
    else:
        v = rows(x)
        sums = th.cat([v.sum(1), (v * v).sum(1)]).view(2 * n, groups, c // groups).sum(2)
        mean, square = sums.div_(pixels * (c // groups)).chunk(2)
        inverse = th.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()
        y = _line(x, weight, bias, mean, inverse)
    return F.silu(y, inplace=True) if silu else y, mean, inverse


def _sizes(x) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _line(x, weight, bias, mean, inverse) -> th.Tensor:
    """The norm of x as one product and one sum."""
    channels = x.shape[1] // mean.shape[1]
    mean, inverse = th.cat([mean, inverse]).repeat_interleave(channels, dim=1).chunk(2)  # (N, C)
    a = weight * inverse
    b = th.addcmul(bias, mean, a, value=-1)
    return as_image(th.addcmul(b.unsqueeze(1), rows(x), a.unsqueeze(1)), x)


def _backward_of_own(g, x, weight, mean, inverse) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Gradients by x, weight and bias, both (N, C), from rows g of that by the norm."""
    v, mean, inverse = rows(x), mean.unsqueeze(2), inverse.unsqueeze(2)  # (N, groups, 1)
    a = weight.unflatten(1, (mean.shape[1], -1)) * inverse
    sums = th.stack([g.sum(1), (g * v).sum(1)]).view(2, *a.shape)
    by_bias, dots = sums
    offset, slope = (sums * a).sum(3, keepdim=True).div_(-v[0].numel() // a.shape[1])
    slope = th.addcmul(slope, mean, offset, value=-1) * inverse * inverse
    offset = th.addcmul(offset, mean, slope, value=-1)
    slope, offset = th.stack([slope, offset]).expand_as(sums).reshape(2, len(a), 1, -1)
    by_x = th.addcmul(offset, v, slope).addcmul_(g, a.view(len(a), 1, -1))
    by_weight = th.addcmul(dots, mean, by_bias, value=-1).mul_(inverse)
    return as_image(by_x, x), by_weight.flatten(1), by_bias.flatten(1)


class Conv2d(nn.Conv2d):
    """A convolution; a 3x3 one of an image with its channels innermost by Winograd's filtering where that pays."""

    def forward(self, x):
        plain = self.kernel_size == (3, 3) and self.stride == self.padding == self.dilation == (1, 1)
        if plain and self.groups == 1 and innermost(x) and winograd.fits(x, self.weight):
            return winograd.conv3x3(x, self.weight, self.bias)
        if innermost(x) and packing.is_kept(self, x):
            how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
            return packing.convolve(self, x, lambda: (self.weight, self.bias), **how)
        return super().forward(x)


def pointwise(x: th.Tensor, conv: Any) -> th.Tensor:
    """A 1x1 convolution, of one or two dimensions, of x (N, C, H, W), channels innermost: a product of matrices."""
    if packing.is_kept(conv, x):
        return packing.convolve(conv, x, lambda: (conv.weight.flatten(1)[:, :, None, None], conv.bias))
    return as_image(linear(rows(x), conv.weight.flatten(1), conv.bias), x)


def upsampling_pays(x: th.Tensor) -> bool:
    """Whether `upsample_conv` of x is the faster way: not for few pixels, as it makes weights first."""
    return x.ndim == 4 and on_cpu(x) and x.shape[2] * x.shape[3] >= 64


def upsample_conv(x: th.Tensor, conv: Any) -> th.Tensor:
    """A 3x3 convolution of x (N, C, H, W) on a CPU, of either layout, made twice as large by repeating its pixels."""
    if not innermost(x):
        return _FromFours.apply(F.conv2d(x, *_of_fours(conv, th.contiguous_format), padding=1), th.contiguous_format)
    if packing.is_kept(conv, x):
        fours = packing.convolve(conv, x, lambda: _of_fours(conv, th.channels_last), padding=(1, 1))
    elif th.is_autocast_enabled("cpu"):
        fours = F.conv2d(x, *_of_fours(conv, th.channels_last), padding=1)
    else:
        fours = _Fours.apply(x, *_of_fours(conv, th.channels_last))
    return _FromFours.apply(fours, th.channels_last)


def _of_fours(conv, layout) -> tuple[th.Tensor, th.Tensor | None]:
    """Weight (4 O, C, 2, 2) and bias (4 O,) of the four pixels that come of one."""
    weight = _halves(_halves(conv.weight, 3), 2).contiguous(memory_format=layout)
    return weight, None if conv.bias is None else conv.bias.repeat(4)


class _Fours(th.autograd.Function):
    """`F.conv2d` of x (N, C, h, w), channels innermost, by a weight (4 O, C, 2, 2), with a padding of one pixel.

    The gradient of the weight is made a quarter at a time: of all channels at once oneDNN takes twice as long, where
    pixels are 4 KiB apart.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        found = [None, None, grad.sum((0, 2, 3)) if by_bias else None]
        if by_x:
            found[0] = winograd.direct_gradient(grad, x, weight, 0)
        if by_weight:
            quarters = zip(grad.chunk(4, dim=1), weight.chunk(4), strict=True)
            laid_out = ((g.contiguous(memory_format=th.channels_last), w) for g, w in quarters)
            found[1] = th.cat([winograd.direct_gradient(g, x, w, 1) for g, w in laid_out])
        return tuple(found)


class _FromFours(th.autograd.Function):
    """The image (N, C, 2h, 2w) out of (N, 4 C, h + 1, w + 1), with the four pixels of a place on its channels.

    Autograd's own way back through slices would fill and add the whole of it for each of them.
    """

    @staticmethod
    def forward(ctx, fours, layout):
        n, c, h, w = fours.shape
        ctx.layout, ctx.shape = layout, fours.shape
        sizes = (n, c // 4, 2 * (h - 1), 2 * (w - 1))
        found = th.empty(sizes, dtype=fours.dtype, device=fours.device, memory_format=layout)
        _pairs(found).copy_(_shifted(fours))
        return found

    @staticmethod
    def backward(ctx, grad):
        fours = th.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout).zero_()
        _shifted(fours).copy_(_pairs(grad))
        return fours, None


def _pairs(image) -> th.Tensor:
    """(N, C, 2h, 2w) as (N, C, h, 2, w, 2), without a copy."""
    return image.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))


def _shifted(fours) -> th.Tensor:
    """(N, 4 C, h + 1, w + 1) as (N, C, h, 2, w, 2), without a copy: the second of a pair of lines, or of columns, is of
    the next one."""
    n, c, h, w = fours.shape
    image, channel, line, pixel = fours.stride()
    pair = c // 4 * channel
    sizes, strides = (n, c // 4, h - 1, 2, w - 1, 2), (image, channel, line, line + 2 * pair, pixel, pixel + pair)
    return fours.as_strided(sizes, strides)


def _halves(weight, dim: int) -> th.Tensor:
    """Weights (O, ...) of three pixels along `dim` as those of two, for the first and then the second of a pair."""
    before, here, after = weight.split(1, dim=dim)
    return th.cat([th.cat([before, here + after], dim=dim), th.cat([before + here, after], dim=dim)])
