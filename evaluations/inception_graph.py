"""The graph of Inception 2015: pixels to features, as the official TensorFlow graph computes them.

    pixels -> resize to 299 x 299 -> (x - 128) / 128 -> 94 x relu(norm(conv)) -> mean over 8 x 8 = pool (2048)

sFID looks at the output of one convolution on the way, `mixed_6/conv`: its first 7 channels at 17 x 17 places, channel
last, are the 2023 spatial features. What other copies of the network often change, and FID with it: the resize has no
half-pixel centres, averages do not count the padding, and the very last block pools by maximum.

Source:
    Szegedy et al. 2015 (arXiv 1512.00567); the graph itself, inception-2015-12-05, as openai/guided-diffusion uses it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn

SIZE = 299
SPATIAL_CHANNELS = 7
POOL, SPATIAL, CLASSES = 2048, 17 * 17 * SPATIAL_CHANNELS, 1008
AVERAGE, MAX, MAX_HALF = "average", "max", "max, every second"


class Conv(NamedTuple):
    """One convolution: its name in the .pth, channels it makes, kernel, stride. A stride of 2 goes without padding."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Fork(NamedTuple):
    """Two convolutions of the same input; their outputs are joined."""

    left: Conv
    right: Conv


def _chain(name: str, *convs) -> list[Conv]:
    """Convolutions one after another: name_1, name_2, ..."""
    return [Conv(f"{name}_{i}", *conv) for i, conv in enumerate(convs, 1)]


def _places_35(pool: int) -> list[list]:
    """35 x 35 places; branches in the order in which their outputs are joined."""
    return [
        [Conv("branch1x1", 64)],
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        [AVERAGE, Conv("branch_pool", pool)],
    ]


def _places_17(c: int) -> list[list]:
    """17 x 17 places; 7 x 7 kernels as a row and a column."""
    row, column = (1, 7), (7, 1)
    return [
        [Conv("branch1x1", 192)],
        _chain("branch7x7", (c,), (c, row), (192, column)),
        _chain("branch7x7dbl", (c,), (c, column), (c, row), (c, column), (192, row)),
        [AVERAGE, Conv("branch_pool", 192)],
    ]


def _places_8(pool: str) -> list[list]:
    """8 x 8 places; the two last 3 x 3 kernels as a row beside a column."""

    def fork(name: str) -> Fork:
        return Fork(Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))

    return [
        [Conv("branch1x1", 320)],
        [*_chain("branch3x3", (384,)), fork("branch3x3_2")],
        [*_chain("branch3x3dbl", (448,), (384, (3, 3))), fork("branch3x3dbl_3")],
        [pool, Conv("branch_pool", 192)],
    ]


TO_17 = [
    [Conv("branch3x3", 384, (3, 3), 2)],
    _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2)),
    [MAX_HALF],
]
TO_8 = [
    _chain("branch3x3", (192,), (320, (3, 3), 2)),
    _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)),
    [MAX_HALF],
]
STEM = [  # name, channels out, kernel, stride, padding; None: MAX_HALF
    ("Conv2d_1a_3x3", 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 64, 3, 1, 1),
    None,
    ("Conv2d_3b_1x1", 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
    None,
]
BLOCKS = {  # name in the .pth -> name in the .pb, branches
    "Mixed_5b": ("mixed", _places_35(32)),
    "Mixed_5c": ("mixed_1", _places_35(64)),
    "Mixed_5d": ("mixed_2", _places_35(64)),
    "Mixed_6a": ("mixed_3", TO_17),
    "Mixed_6b": ("mixed_4", _places_17(128)),
    "Mixed_6c": ("mixed_5", _places_17(160)),
    "Mixed_6d": ("mixed_6", _places_17(160)),
    "Mixed_6e": ("mixed_7", _places_17(192)),
    "Mixed_7a": ("mixed_8", TO_8),
    "Mixed_7b": ("mixed_9", _places_8(AVERAGE)),
    "Mixed_7c": ("mixed_10", _places_8(MAX)),
}
SPATIAL_BLOCK = "Mixed_6d"  # its first branch, branch1x1, comes first in what it joins


def scopes() -> Iterator[tuple[str, str]]:
    """Yield (name in the .pth, scope in the .pb) of every convolution.

    The stem has conv, conv_1, ... A branch that is one convolution and no pooling is `block/conv`; the others are
    `block/tower`, `block/tower_1`, ..., each with its own conv, conv_1, ...; a fork is `mixed/conv`, `mixed/conv_1`.
    """
    for i, (name, *_) in enumerate(filter(None, STEM)):
        yield name, _numbered("conv", i)
    for block, (scope, branches) in BLOCKS.items():
        towers = 0
        for branch in branches:
            place = scope
            if len(branch) > 1:
                place, towers = f"{scope}/{_numbered('tower', towers)}", towers + 1
            steps = [step for step in branch if not isinstance(step, str)]
            for i, step in enumerate(steps):
                if isinstance(step, Fork):
                    yield f"{block}.{step.left.name}", f"{place}/mixed/conv"
                    yield f"{block}.{step.right.name}", f"{place}/mixed/conv_1"
                else:
                    yield f"{block}.{step.name}", f"{place}/{_numbered('conv', i)}"


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


class Features(NamedTuple):
    """Of N images: pool (N, 2048) and spatial (N, 2023), whose index is (row * 17 + column) * 7 + channel."""

    pool: th.Tensor
    spatial: th.Tensor


class ConvNormReLU(nn.Module):
    """relu(norm(conv(x))), the norm with the statistics of training."""

    def __init__(self, channels: int, out: int, kernel, stride=1, padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches side by side; what they make is joined along the channels."""

    def __init__(self, channels: int, branches: list[list]):
        super().__init__()
        self.branches, self.out = branches, 0
        for branch in branches:
            width, ends = channels, [channels]
            for step in branch:
                if not isinstance(step, str):
                    ends = [self._add(conv, width) for conv in _convs_of(step)]
                    width = sum(ends)
            self.out += sum(ends)

    def _add(self, conv: Conv, channels: int) -> int:
        padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else 0
        self.add_module(conv.name, ConvNormReLU(channels, conv.out, conv.kernel, conv.stride, padding))
        return conv.out

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.cat([end for branch in self.branches for end in self._follow(branch, x)], dim=1)

    def _follow(self, branch: list, x: th.Tensor) -> list[th.Tensor]:
        for step in branch:
            if isinstance(step, Fork):  # always last
                return [self.get_submodule(conv.name)(x) for conv in step]
            x = _pool(x, step) if isinstance(step, str) else self.get_submodule(step.name)(x)
        return [x]


def _convs_of(step: Conv | Fork) -> list[Conv]:
    return [step] if isinstance(step, Conv) else list(step)


def _pool(x: th.Tensor, kind: str) -> th.Tensor:
    """3 x 3 pooling; padding has no part in an average."""
    if kind == AVERAGE:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=2) if kind == MAX_HALF else F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionV3(nn.Module):
    """Pixels to features; always in eval mode, without gradients. Its state_dict is that of the .pth, 566 entries."""

    def __init__(self):
        super().__init__()
        channels = 3
        for row in filter(None, STEM):
            name, out, kernel, stride, padding = row
            self.add_module(name, ConvNormReLU(channels, out, kernel, stride, padding))
            channels = out
        for name, (_, branches) in BLOCKS.items():
            block = Block(channels, branches)
            self.add_module(name, block)
            channels = block.out
        self.fc = nn.Linear(channels, CLASSES)  # its bias is in the file, and the Inception Score does not use it
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stay in eval: this is a measure, and a caller's `.train()` must not change it."""
        return super().train(False)

    @property
    def class_weight(self) -> np.ndarray:
        """(2048, 1008) float32: class probabilities are softmax(pool @ class_weight)."""
        return self.fc.weight.T.contiguous().cpu().numpy()

    def forward(self, pixels: th.Tensor) -> Features:
        """Features of pixels.

        Args:
            pixels: uint8 or float (N, 3, H, W) in 0..255, of any size.
        """
        x = (tf1_resize(pixels.float()) - 128) * 0.0078125
        for row in STEM:
            x = self.get_submodule(row[0])(x) if row else _pool(x, MAX_HALF)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(x.mean(dim=(2, 3)), spatial)


def tf1_resize(images: th.Tensor, size: tuple[int, int] = (SIZE, SIZE)) -> th.Tensor:
    """Bilinear as TensorFlow 1 does it: place i of the result looks at place i * in / out of the image.

    No half-pixel centres, and no smoothing when it shrinks. Arithmetic in float32, as there.

    Args:
        images: float (N, C, H, W).
    """
    y, x = (_places(old, new, images.device) for old, new in zip(images.shape[2:], size, strict=True))
    rows = images[:, :, y.low], images[:, :, y.high]
    top, bottom = (row[..., x.low] + (row[..., x.high] - row[..., x.low]) * x.part for row in rows)
    return top + (bottom - top) * y.part[:, None]


class _Places(NamedTuple):
    """Where each place of the result lies between two of the image: both, and the part of the way."""

    low: th.Tensor
    high: th.Tensor
    part: th.Tensor


def _places(old: int, new: int, device) -> _Places:
    source = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    low = source.astype(np.int64)
    found = low, np.minimum(low + 1, old - 1), source - low.astype(np.float32)
    return _Places(*(th.from_numpy(a).to(device) for a in found))
