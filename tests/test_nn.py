"""The small pieces of networks, and a checkpointing that changes no gradient."""

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae import nn


def test_embeddings_are_upstreams():
    data, facts = golden("adm_helpers.npz"), golden("adm_golden.json")
    times = th.from_numpy(data["emb_t"])
    for t, wanted in [
        (times, data["emb_even"]),
        (times, data["emb_odd"]),
        (th.tensor([0.0, 1.0, 500.5]), facts["timestep_embedding_dim6"]),
        (th.tensor([3]), facts["timestep_embedding_dim7"]),
    ]:
        got = nn.timestep_embedding(t, np.shape(wanted)[1])
        assert got.dtype == th.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_ema_is_the_weighted_sum():
    target, source = [th.ones(2), th.zeros(3)], [th.zeros(2), th.ones(3)]
    nn.update_ema(target, source, rate=0.9)
    np.testing.assert_allclose(target[0], 0.9, rtol=1e-6)
    np.testing.assert_allclose(target[1], 0.1, rtol=1e-6)


def test_ema_forgets_geometrically():
    """After n updates toward a constant s, the average is s + rate^n (start - s); leaves stay leaves."""
    target, source = [th.nn.Parameter(th.full((3,), 5.0))], [th.nn.Parameter(th.full((3,), 2.0))]
    for _ in range(50):
        nn.update_ema(target, iter(source), rate=0.95)
    np.testing.assert_allclose(target[0].detach(), 2 + 0.95**50 * 3, rtol=1e-5)
    assert target[0].is_leaf and target[0].requires_grad and source[0].grad is None


def test_modules_are_scaled_and_zeroed_in_place():
    layer = th.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    assert nn.scale_module(layer, 2) is layer and th.equal(layer.weight, 2 * before)
    assert nn.zero_module(layer) is layer and not layer.weight.any() and not layer.bias.any()


def test_mean_flat():
    x = th.arange(12.0).view(2, 3, 2)
    assert nn.mean_flat(x).tolist() == [2.5, 8.5]


def test_silu():
    x = th.linspace(-4, 4, 9)
    np.testing.assert_allclose(nn.SiLU()(x), x * th.sigmoid(x), rtol=1e-6)


@pytest.mark.parametrize("make, kinds", [(nn.conv_nd, "Conv"), (nn.avg_pool_nd, "AvgPool")])
def test_dimensions(make, kinds):
    sizes = (2, 2, 1) if kinds == "Conv" else (2,)
    for dims in (1, 2, 3):
        assert type(make(dims, *sizes)).__name__ == f"{kinds}{dims}d"
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        make(4, *sizes)


def test_group_norm_is_computed_in_float32():
    """Half precision in and out, but sums that would overflow it do not."""
    norm, x = nn.normalization(32), (th.randn(2, 32, 4) * 6e4).clamp(-6e4, 6e4).half()
    out = norm(x)
    assert out.dtype == th.float16
    assert th.equal(out, th.nn.functional.group_norm(x.float(), 32).half())


def test_channels_must_be_a_multiple_of_32():
    with pytest.raises(ValueError, match="40 channels.*--num_channels"):
        nn.normalization(40)


# ---- checkpointing ---------------------------------------------------------------------------------------------------


def gradients(flag, *, freeze=False, autocast=False):
    th.manual_seed(0)
    block = th.nn.Sequential(th.nn.Linear(8, 8), th.nn.Dropout(0.5), th.nn.Linear(8, 8))
    block.requires_grad_(not freeze)
    x = th.randn(4, 8, requires_grad=True)
    with th.autocast("cpu", th.bfloat16, enabled=autocast):
        out = nn.checkpoint(block, (x,), block.parameters(), flag)
    th.rand(5)  # what is drawn between forward and backward must not matter
    out.float().square().sum().backward()
    return [x.grad] + [p.grad for p in block.parameters() if not freeze]


@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"autocast": True}], ids=["dropout", "frozen", "autocast"])
def test_checkpointing_changes_no_gradient(options):
    """Upstream's draws another dropout mask in backward, and fails on frozen weights and under autocast."""
    for plain, recomputed in zip(gradients(False, **options), gradients(True, **options), strict=True):
        assert th.equal(plain, recomputed)


def test_checkpointing_keeps_no_activations():
    """The function runs a second time in backward: that is the memory it saves."""
    calls = []

    def func(x):
        calls.append(1)
        return x.exp().sin()

    x = th.ones(3, requires_grad=True)
    nn.checkpoint(func, (x,), (), True).sum().backward()
    assert len(calls) == 2


def test_a_second_derivative_passes_through():
    """Gradient penalties and guidance differentiate twice; upstream's function cannot."""
    x = th.tensor([0.7], requires_grad=True)
    (slope,) = th.autograd.grad(nn.checkpoint(lambda x: x**3, (x,), (), True).sum(), x, create_graph=True)
    (curvature,) = th.autograd.grad(slope.sum(), x)
    assert curvature.item() == pytest.approx(6 * 0.7)
