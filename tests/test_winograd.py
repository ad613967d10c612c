"""Winograd's filtering gives the convolution and its gradients, with as many digits."""

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from guided_diffusion_vae import channels_last, winograd
from guided_diffusion_vae.channels_last import Conv2d


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """Whatever this machine is: tested is what it computes."""
    monkeypatch.setattr(winograd, "PAYS", True)


def innermost(*shape, seed=0):
    x = th.randn(*shape, generator=th.Generator().manual_seed(seed))
    return x.to(memory_format=th.channels_last)


def case(n, c, o, h, w):
    """x, weight, bias and the gradient of the result."""
    weight = innermost(o, c, 3, 3, seed=1) / (9 * c) ** 0.5
    return innermost(n, c, h, w), weight, th.randn(o), innermost(n, o, h, w, seed=2)


def both(x, weight, bias, grad, convolve):
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias)]
    y = convolve(*inputs)
    return [y.detach(), *th.autograd.grad(y, inputs, grad)]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.std()).item()


SHAPES = [(2, 32, 32, 4, 4), (3, 64, 96, 8, 12), (6, 128, 128, 16, 16), (11, 160, 128, 16, 20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_convolution_and_its_gradients_as_exactly_as_usual(shape):
    x, weight, bias, grad = case(*shape)
    usual = both(x, weight, bias, grad, lambda *a: F.conv2d(*a, padding=1))
    ours = both(x, weight, bias, grad, winograd.conv3x3)
    exact = both(*(v.double() for v in (x, weight, bias, grad)), lambda *a: F.conv2d(*a, padding=1))
    for mine, theirs, truth in zip(ours, usual, exact, strict=True):
        assert mine.shape == theirs.shape and error(mine, truth) <= 4 * error(theirs, truth) + 2e-6
    assert channels_last.innermost(ours[0]) and channels_last.innermost(ours[1])
    assert ours[2].stride() == weight.stride()


def test_the_largest_case_is_filtered_both_ways_and_in_blocks():
    """So that the comparison above is one with Winograd's way, and not of the direct one with itself."""
    x, weight, _, grad = case(*SHAPES[-1])
    assert winograd.fits(x, weight) and winograd.pays_forward(x, weight) and winograd.pays_backward(x, weight)
    assert winograd.pays_forward(grad, weight) and len(winograd.blocks(x)) > 1
    small, weight, *_ = case(*SHAPES[0])
    assert not winograd.pays_forward(small, weight)


def test_a_kernel_of_one_pixel_moves_the_image():
    """Each of the nine shifts, with zeros from outside."""
    for k in range(9):
        weight = th.zeros(128, 128, 3, 3)
        weight.view(128, 128, 9)[range(128), range(128), k] = 1
        x = innermost(6, 128, 16, 16)
        dy, dx = k // 3, k % 3
        moved = F.pad(x, (1, 1, 1, 1))[:, :, dy : dy + 16, dx : dx + 16]
        assert (winograd.conv3x3(x, weight, None) - moved).abs().max() < 2e-5


@pytest.mark.parametrize(
    "conv, shape",
    [
        (Conv2d(64, 64, 3, padding=1), (2, 64, 6, 8)),  # no whole tiles
        (Conv2d(4, 64, 3, padding=1), (2, 4, 8, 8)),  # few channels
        (Conv2d(64, 64, 3), (2, 64, 8, 8)),
        (Conv2d(64, 64, 3, stride=2, padding=1), (2, 64, 8, 8)),
        (Conv2d(64, 64, 3, padding=2, dilation=2), (2, 64, 8, 8)),
        (Conv2d(64, 64, 3, padding=1, groups=2), (2, 64, 8, 8)),
        (Conv2d(64, 64, 1), (2, 64, 8, 8)),
        (Conv2d(64, 64, 3, padding=1).double(), (2, 64, 8, 8)),
    ],
)
def test_other_convolutions_are_torchs_own(conv, shape, monkeypatch):
    monkeypatch.delattr(winograd, "conv3x3")
    x = innermost(*shape).to(conv.weight.dtype)
    assert th.equal(conv(x), nn.Conv2d.forward(conv, x))
    with pytest.raises(AttributeError):
        Conv2d(64, 64, 3, padding=1)(innermost(2, 64, 8, 8))


def test_autocast_is_left_to_torch():
    conv, x = Conv2d(64, 64, 3, padding=1), innermost(2, 64, 8, 8)
    assert winograd.fits(x, conv.weight)
    with th.autocast("cpu", th.bfloat16):
        assert not winograd.fits(x, conv.weight) and conv(x).dtype == th.bfloat16


def test_where_it_does_not_pay_convolutions_are_torchs_own(monkeypatch):
    conv, x = Conv2d(32, 32, 3, padding=1), innermost(2, 32, 8, 8)
    monkeypatch.setattr(winograd, "conv3x3", None)
    with pytest.raises(TypeError):
        conv(x)
    monkeypatch.setattr(winograd, "PAYS", False)
    assert th.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
