"""The discriminator and its losses against numpy; adaptive weights against gradients found by hand."""

import math

import numpy as np
import pytest
import torch as th
from test_perceptual import conv_by_hand

from guided_diffusion_vae.autoencoders import adversarial
from guided_diffusion_vae.autoencoders.adversarial import PatchDiscriminator, adaptive_weight
from guided_diffusion_vae.config import UserError


def patchgan_by_hand(weights, x, n_layers):
    """Logits in training mode: batch norm by the batch's own mean and variance."""
    h = conv_by_hand(x, weights["main.0.weight"], weights["main.0.bias"], stride=2)
    h = np.where(h > 0, h, 0.2 * h)
    for i in range(n_layers):
        stride = 2 if i < n_layers - 1 else 1
        h = conv_by_hand(h, weights[f"main.{3 * i + 2}.weight"], stride=stride)
        mean, var = h.mean((0, 2, 3), keepdims=True), h.var((0, 2, 3), keepdims=True)
        scale, bias = (weights[f"main.{3 * i + 3}.{end}"][:, None, None] for end in ("weight", "bias"))
        h = (h - mean) / np.sqrt(var + 1e-5) * scale + bias
        h = np.where(h > 0, h, 0.2 * h)
    last = 3 * n_layers + 2
    return conv_by_hand(h, weights[f"main.{last}.weight"], weights[f"main.{last}.bias"])


def in_numpy(model):
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("n_layers, channels", [(1, 3), (3, 1)])
def test_logits_are_those_of_the_layers(n_layers, channels):
    th.manual_seed(0)
    model = PatchDiscriminator(channels, ndf=4, n_layers=n_layers).double()
    x = th.randn(2, channels, 32, 32, dtype=th.float64)
    np.testing.assert_allclose(
        model(x).detach(), patchgan_by_hand(in_numpy(model), x.numpy(), n_layers), rtol=1e-8, atol=1e-12
    )


def test_the_full_size():
    th.manual_seed(0)
    model = PatchDiscriminator().eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sum(param.numel() for param in model.parameters()) == 2_765_633
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_765_633 + 2 * (128 + 256 + 512) + 3  # batch norms
    assert {key.split(".")[1] for key in shapes} == {"0", "2", "3", "5", "6", "8", "9", "11"}
    biased = [key for key, shape in shapes.items() if key.endswith("bias") and f"{key[:-4]}running_var" not in shapes]
    assert biased == ["main.0.bias", "main.11.bias"]
    assert shapes["main.8.weight"] == (512, 256, 4, 4) and shapes["main.11.weight"] == (1, 512, 4, 4)
    with th.no_grad():
        assert model(th.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_initialisation():
    th.manual_seed(0)
    model = PatchDiscriminator()
    convs = th.cat([model.main[i].weight.flatten() for i in (2, 5, 8)])
    norms = th.cat([model.main[i].weight for i in (3, 6, 9)])
    assert convs.std().item() == pytest.approx(0.02, rel=0.01) and abs(convs.mean()) < 1e-4
    assert norms.std().item() == pytest.approx(0.02, rel=0.1) and norms.mean().item() == pytest.approx(1, abs=3e-3)
    assert all(model.main[i].bias.abs().max() == 0 for i in (3, 6, 9))


def test_losses():
    real, fake = (np.random.default_rng(seed).normal(0, 2, (3, 1, 4, 4)) for seed in (0, 1))
    given = th.from_numpy(real), th.from_numpy(fake)
    hinge = sum(max(0, 1 - r) for r in real.flat) / 96 + sum(max(0, 1 + f) for f in fake.flat) / 96
    vanilla = sum(math.log(1 + math.exp(-r)) for r in real.flat) / 96
    vanilla += sum(math.log(1 + math.exp(f)) for f in fake.flat) / 96
    assert adversarial.hinge_d_loss(*given).item() == pytest.approx(hinge, rel=1e-12)
    assert adversarial.vanilla_d_loss(*given).item() == pytest.approx(vanilla, rel=1e-12)
    assert adversarial.generator_loss(given[1]).item() == pytest.approx(-sum(fake.flat) / 48, rel=1e-12)


def test_chance_and_perfection():
    """A discriminator that knows nothing says 0: hinge 1, cross-entropy log 2; a sure one costs nothing."""
    zero, sure = th.zeros(2, 1, 3, 3), th.full((2, 1, 3, 3), 50.0)
    assert adversarial.hinge_d_loss(zero, zero) == 1
    assert adversarial.vanilla_d_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert adversarial.hinge_d_loss(sure, -sure) == 0 and adversarial.vanilla_d_loss(sure, -sure) < 1e-20


def test_the_adaptive_weight_is_a_ratio_of_known_gradients():
    """reference = a.p, term = |p|^2 / 2: gradients a and p, of length 5 and 0.5."""
    p = th.tensor([0.3, 0.4], dtype=th.float64, requires_grad=True)
    a = th.tensor([3.0, 4.0], dtype=th.float64)
    reference, term = (a * p).sum(), 0.5 * (p**2).sum()
    weight = adaptive_weight(reference, term, p, 1e4)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4), rel=1e-12) and not weight.requires_grad
    assert adaptive_weight(reference, term, p, 7.0) == 7
    assert adaptive_weight(reference, 0 * term, p, 1e8).item() == pytest.approx(5e4, rel=1e-12)
    (reference + weight * term).backward()  # the graphs are kept, and nothing was added to p.grad before
    assert p.grad.tolist() == pytest.approx([3 + weight.item() * 0.3, 4 + weight.item() * 0.4])


def test_fp16_is_refused():
    p = th.ones(2, requires_grad=True)
    with pytest.raises(UserError, match="65504.*bf16"):
        adaptive_weight(p.sum().half(), p.sum(), p, 1.0)
    with th.autocast("cpu", dtype=th.float16), pytest.raises(UserError, match="fp16"):
        adaptive_weight(p.sum(), p.sum(), p, 1.0)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert adaptive_weight(p.sum(), p.sum(), p, 2.0).item() == pytest.approx(1, rel=1e-3)
