"""Small pieces that every network here is made of."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from . import channels_last
from .config import UserError


class SiLU(nn.Module):
    """x sigmoid(x)."""

    def forward(self, x):
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32, whatever the dtype of its input."""

    def forward(self, x, scale=None, shift=None, silu=False):
        """norm(x), or norm(x) (1 + scale) + shift with both of (N, C, 1, ...); `silu`: of that, u sigmoid(u)."""
        innermost, plain = channels_last.innermost(x), x.dtype == th.float32
        weight, bias = self.weight, self.bias
        if scale is not None and shift is not None and (innermost or plain and channels_last.on_cpu(x)):
            scale, shift = scale.flatten(1) + 1, shift.flatten(1)
            weight, bias = weight * scale, th.addcmul(shift, bias, scale)  # (N, C)
        if innermost:
            h = channels_last.group_norm(x.float(), self.num_groups, weight, bias, self.eps, silu=silu and plain)
            silu = silu and not plain
        elif weight.ndim == 2:  # one image of all channels, each with a weight of its own
            groups, together = len(x) * self.num_groups, x.reshape(1, -1, *x.shape[2:])
            h = F.group_norm(together, groups, weight.flatten(), bias.flatten(), self.eps).view_as(x)
        else:
            h = super().forward(x.float())
            h = h.type(x.dtype) if scale is None else h.type(x.dtype) * (1 + scale) + shift
        h = h.type(x.dtype)
        return F.silu(h) if silu else h


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    return _of_dims(dims, nn.Conv1d, channels_last.Conv2d, nn.Conv3d)(*args, **kwargs)


def linear(*args, **kwargs) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A 1-, 2- or 3-dimensional average pool."""
    return _of_dims(dims, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(*args, **kwargs)


def _of_dims(dims, *kinds):
    if dims not in (1, 2, 3):
        raise ValueError(f"unsupported dimensions: {dims}")
    return kinds[dims - 1]


@th.no_grad()
def update_ema(target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99) -> None:
    """target <- rate target + (1 - rate) source, in place."""
    target, source = [p.detach() for p in target_params], [p.detach() for p in source_params]
    if all(t.is_cpu for t in target):  # one by one, so that the sum finds the product in the cache
        for t, s in zip(target, source, strict=True):
            t.mul_(rate).add_(s, alpha=1 - rate)
    else:  # all at once, for few launches
        th._foreach_mul_(target, rate)
        th._foreach_add_(target, source, alpha=1 - rate)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero; returns the module."""
    return scale_module(module, 0)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of a module; returns the module."""
    for param in module.parameters():
        param.detach().mul_(scale)
    return module


def mean_flat(tensor: th.Tensor) -> th.Tensor:
    """The mean over all dimensions but the first: (N, ...) -> (N,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def shifted_in_time(x: th.Tensor) -> th.Tensor:
    """Images (N, C, H, W), each moved along its columns, in a circle, by a random number of them."""
    n, width = len(x), x.shape[3]
    columns = (th.arange(width) + th.randint(width, (n, 1))) % width  # (N, W)
    return x.gather(3, columns[:, None, None].expand_as(x).to(x.device))


def normalization(channels: int) -> GroupNorm32:
    """Group norm with 32 groups.

    Raises:
        ValueError: `channels` is not a multiple of 32.
    """
    if channels % 32:
        raise ValueError(
            f"a level has {channels} channels, not a multiple of 32: change --num_channels or --channel_mult"
        )
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000) -> th.Tensor:
    """Sinusoidal embedding [cos(t f_k) | sin(t f_k)], f_k = max_period^(-k / half), zero-padded if `dim` is odd.

    Args:
        timesteps: (N,), may be fractional.
    Returns:
        (N, dim) float32.
    Source: Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    k = th.arange(half, dtype=th.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * th.exp(-math.log(max_period) * k / half)[None]
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def checkpoint(
    func: Callable[..., th.Tensor], inputs: Sequence[Any], params: Iterable[th.Tensor], flag: bool
) -> th.Tensor:
    """func(*inputs); with `flag`, its activations are recomputed in backward instead of kept.

    The recomputation sees the same dropout masks and the same autocast as the first pass, and frozen parameters and
    inputs are allowed. `params` is not needed (autograd finds them); upstream's callers pass it.
    """
    if not flag:
        return func(*inputs)
    return recompute(func, *inputs, use_reentrant=False, preserve_rng_state=True)


def drop_labels(y, drop, null_label: int | None, prob: float, training: bool):
    """Labels (N,) with some replaced by the null label, so that one network learns with and without them.

    Args:
        drop: (N,) bool, which to replace; None draws them with probability `prob` while training.
    Source: Ho and Salimans 2022, algorithm 1.
    """
    if drop is None and training and prob > 0:
        drop = th.rand(len(y), device=y.device) < prob
    return y if drop is None else y.masked_fill(drop, null_label)


def require_null_label(num_classes: int | None, class_dropout_prob: float) -> int:
    """The label after the last class, which stands for none.

    Raises:
        UserError: the network was made without one.
    """
    if num_classes is None or not class_dropout_prob > 0:
        raise UserError("this network has no null label to guide by: train it with --class_dropout_prob 0.1")
    return num_classes
