"""3x3 convolutions on a CPU by Winograd's minimal filtering F(4x4, 3x3): 36 products where 144 stand in the formula.

Each 4x4 tile y of the result comes of a 6x6 tile x of the input (two of them overlap by two pixels):

    y = A^T [sum over channels of (G w G^T) * (B^T x B)] A

with * pixel by pixel, so that the channels meet in 36 products of matrices. A, G and B evaluate and interpolate
polynomials at six points. The gradient of the weights is the same turned around, for 4x4 tiles g of the gradient of y:

    grad w = G^T [sum over tiles of (B^T x B) * (A g A^T)] G

The points 0, +-1/sqrt(2), +-sqrt(2) and infinity keep as many digits as the formula does; the usual 0, +-1, +-2 lose
four fifths of them.

Source: Winograd 1980; Lavin and Gray 2016; for points other than whole numbers, Barabasz et al. 2020.
"""

import math

import numpy as np
import torch as th
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))  # and infinity
TILE = 4  # pixels of y a side
BLOCK = 2**20  # numbers in the transformed tiles of as many images as are done at once: they fit the cache


# Measured: 1.2 to 1.4 times as fast as oneDNN's own where it reached 54 to 87 GFLOP/s on two cores, 0.75 to 1.0 times
# where whole AVX-512 units (Zen 5) made that three times as much, and what is left is waiting for memory.
PAYS = th.backends.cpu.get_cpu_capability() != "AVX512"


def _at_points(n: int) -> np.ndarray:
    """Polynomials of n coefficients at the points: (6, n)."""
    return np.array([[p**k for k in range(n)] for p in POINTS] + [[0.0] * (n - 1) + [1.0]])


def _twice(matrix: np.ndarray) -> th.Tensor:
    """What acts on rows and columns of a flattened square as the matrix acts on a line."""
    return th.from_numpy(np.kron(matrix, matrix)).float()


A, G = _twice(_at_points(TILE)), _twice(_at_points(3))  # (36, 16), (36, 9)
B = _twice(np.linalg.inv(_at_points(TILE + 2)).T)  # (36, 36), its transpose in the formulas above


def fits(x: th.Tensor, weight: th.Tensor) -> bool:
    """Whether a 3x3 convolution of x (N, C, H, W) is done here: where it pays, in whole tiles of float32."""
    plain = PAYS and x.dtype == weight.dtype == th.float32 and not th.is_autocast_enabled(x.device.type)
    return plain and x.shape[2] % TILE == x.shape[3] % TILE == 0 and min(weight.shape[:2]) >= 32


def conv3x3(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """The 3x3 convolution of x (N, C, H, W), channels innermost, padded by 1: (N, O, H, W), channels innermost.

    Args:
        weight: (O, C, 3, 3); bias: (O,) or None.
    """
    return _Conv3x3.apply(x, weight, bias)


class _Conv3x3(th.autograd.Function):
    """Each of the three products the faster way."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        if not pays_forward(x, weight):
            return F.conv2d(x, weight, bias, padding=1)
        y = _filtered(x, _points_of(weight, G).transpose(1, 2))
        return y if bias is None else y.add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=th.channels_last)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            if pays_forward(grad, weight):
                by_x = _filtered(grad, _points_of(weight, G.flip(1)))
            else:
                by_x = direct_gradient(grad, x, weight, 0)
        if ctx.needs_input_grad[1]:
            by_weight = _by_weight(x, grad) if pays_backward(x, weight) else direct_gradient(grad, x, weight, 1)
            by_weight = th.empty_like(weight).copy_(by_weight)  # in its layout
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum((0, 2, 3))
        return by_x, by_weight, by_bias


def pays_forward(x: th.Tensor, weight: th.Tensor) -> bool:
    """Whether it is faster for the result and the gradient of x (docs/log.md); in batches of any size, so that the
    digits of an image do not depend on its neighbours."""
    return min(weight.shape[:2]) >= 128 and x.shape[2] * x.shape[3] >= 16 * TILE**2


def pays_backward(x: th.Tensor, weight: th.Tensor) -> bool:
    """Whether it is faster for the gradient of the weights, of which the usual way is slow."""
    return min(weight.shape[:2]) >= 64 and x.numel() >= 16 * TILE**2 * x.shape[1]


def direct_gradient(grad: th.Tensor, x: th.Tensor, weight: th.Tensor, by: int) -> th.Tensor:
    """The usual way from the gradient of `F.conv2d(x, weight, padding=1)` to that of x (`by` 0) or of the weight (1).

    Args:
        grad: (N, O, H, W); x: (N, C, h, w); weight: (O, C, k, k).
    """
    wanted = [by == 0, by == 1, False]
    around = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation; not transposed; groups
    return th.ops.aten.convolution_backward(grad, x, weight, None, *around, wanted)[by]


def _points_of(weight, g):
    """G w G^T: (36, O, C)."""
    o, c = weight.shape[:2]
    return (g @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, o, c)


def _filtered(x, u):
    """A^T [(B^T x B) u] A, with u (36, C, O): (N, O, H, W), channels innermost."""
    n, _, h, w = x.shape
    o = u.shape[2]
    y = x.new_empty(n, h, w, o)
    for images in blocks(x):
        v = th.bmm(_tiles_in(x[images]), u).view(36, -1)
        tiles = (A.T @ v).view(TILE, TILE, -1, h // TILE, w // TILE, o)
        y[images].view(-1, h // TILE, TILE, w // TILE, TILE, o).copy_(tiles.permute(2, 3, 0, 4, 1, 5))
    return y.permute(0, 3, 1, 2)


def _by_weight(x, grad):
    """G^T [sum of (B^T x B) * (A g A^T)] G: (O, C, 3, 3)."""
    total = None
    for images in blocks(x):
        pair = _tiles_out(grad[images]).transpose(1, 2), _tiles_in(x[images])
        total = th.bmm(*pair) if total is None else total.baddbmm_(*pair)
    assert total is not None
    return (G.T @ total.view(36, -1)).view(3, 3, *total.shape[1:]).permute(2, 3, 0, 1)


def blocks(x: th.Tensor) -> list[slice]:
    """The images of x (N, C, H, W), as many at once as `BLOCK` allows."""
    size = max(1, BLOCK * TILE * TILE // (36 * x[0].numel()))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _tiles_in(x):
    """B^T x B of the tiles of x: (36, tiles, C)."""
    n, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, line, pixel, _ = padded.stride()
    sizes = (TILE + 2, TILE + 2, n, h // TILE, w // TILE, c)
    tiles = padded.as_strided(sizes, (line, pixel, image, TILE * line, TILE * pixel, 1))
    return (B @ tiles.reshape(36, -1)).view(36, -1, c)


def _tiles_out(grad):
    """A g A^T of the tiles of grad: (36, tiles, O)."""
    n, o, h, w = grad.shape
    tiles = grad.permute(0, 2, 3, 1).view(n, h // TILE, TILE, w // TILE, TILE, o).permute(2, 4, 0, 1, 3, 5)
    return (A @ tiles.reshape(TILE * TILE, -1)).view(36, -1, o)
