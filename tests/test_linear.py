"""Linear layers by convolution: the same numbers and gradients as a product of matrices, on every shape."""

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion_vae import linear as linear_module
from guided_diffusion_vae.linear import Linear, line_of, linear


@pytest.fixture(autouse=True)
def paying(monkeypatch):
    """As on a processor where it pays."""
    monkeypatch.setattr(linear_module, "PAYS", th.backends.mkldnn.is_available())


@pytest.mark.parametrize(
    "shape, line", [((2, 512, 24), 64), ((16, 16, 7), 16), ((3, 4, 64, 24), 32), ((1, 100, 24), 0)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_numbers_and_gradients_are_those_of_the_product(shape, line, with_bias):
    rng = th.Generator().manual_seed(0)
    x, weight, bias = (th.randn(size, generator=rng) for size in (shape, (5, shape[-1]), (5,)))
    if th.backends.mkldnn.is_available():
        assert line_of(x, weight) == line
    ours = [value.clone().requires_grad_() for value in (x, weight, bias)]
    true = [value.double().requires_grad_() for value in (x, weight, bias)]
    found, wanted = (f(v[0], v[1], v[2] if with_bias else None) for f, v in ((linear, ours), (F.linear, true)))
    assert found.shape == (*shape[:-1], 5) and th.allclose(found.double(), wanted, atol=1e-5)
    direction = th.randn(found.shape, generator=rng)
    found.backward(direction)
    wanted.backward(direction.double())
    for a, b in list(zip(ours, true, strict=True))[: 2 + with_bias]:
        assert a.grad.shape == a.shape and th.allclose(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_what_stays_a_product():
    weight, rows = th.zeros(5, 8), th.zeros(1024, 8)
    assert not line_of(rows.double(), weight.double()) and not line_of(rows.to("meta"), weight.to("meta"))
    assert not line_of(rows.t().contiguous().t(), weight)
    assert not line_of(th.zeros(255, 8), weight) and not line_of(th.zeros(1023, 8), weight)
    with th.autocast("cpu", th.bfloat16):
        assert not line_of(rows, weight) and linear(rows, weight).dtype == th.bfloat16


def test_the_layer_is_torchs_own_to_whoever_asks():
    th.manual_seed(0)
    ours = Linear(24, 5)
    th.manual_seed(0)
    torchs = th.nn.Linear(24, 5)
    assert isinstance(ours, th.nn.Linear) and th.equal(ours.weight, torchs.weight)
    ours.load_state_dict(torchs.state_dict())
    x = th.randn(16, 64, 24)
    assert th.allclose(ours(x), torchs(x), atol=1e-5) and th.equal(ours(x[:1, :3]), torchs(x[:1, :3]))


def test_second_derivatives(monkeypatch):
    """Which a classifier's gradient that learns asks for."""
    th.manual_seed(0)
    x, weight = th.randn(256, 8, requires_grad=True), th.randn(5, 8, requires_grad=True)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(linear_module, "PAYS", pays)
        (slope,) = th.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
        found.append(th.autograd.grad(slope.pow(2).sum(), weight)[0])
    assert th.allclose(*found, rtol=1e-3)
