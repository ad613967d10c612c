"""The objective against numpy: values from the formulas, gradients by central differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from test_adversarial import patchgan_by_hand
from test_foundation import alignment_by_hand, timm_weights
from test_perceptual import conv_by_hand, lpips_by_hand, tiny_lpips

from guided_diffusion_vae.autoencoders.base import Posterior
from guided_diffusion_vae.autoencoders.foundation import load_foundation
from guided_diffusion_vae.autoencoders.objectives import (
    Objective,
    ObjectiveConfig,
    check_finite,
    restore_from_training_checkpoint,
)
from guided_diffusion_vae.config import UserError, field_help
from guided_diffusion_vae.fp16_util import TrainingDiverged

EVERYTHING = {
    "perceptual_weight": 0.7,
    "kl_weight": 0.01,
    "disc_start": 10,
    "disc_factor": 0.9,
    "disc_weight": 0.4,
    "disc_num_layers": 1,
    "disc_ndf": 4,
    "use_vf": "dinov2",
    "vf_weight": 0.3,
    "cos_margin": 0.2,
    "distmat_margin": 0.1,
    "cos_weight": 0.8,
    "distmat_weight": 1.5,
}
RNG = np.random.default_rng(0)
X, NOISE = RNG.uniform(-1, 1, (2, 3, 16, 16)), RNG.normal(size=(2, 2, 4, 4))
ENCODER, DECODER = RNG.normal(size=(4, 3, 1, 1)), RNG.normal(0, 0.3, (3, 2, 1, 1))  # all the layers there are
FEATURES = RNG.normal(0.2, 1, (2, 5, 4, 4))


class Features(th.nn.Module):
    """A foundation model that always sees the same."""

    channels = 5

    def forward(self, x):
        return th.from_numpy(FEATURES)


def objective(**settings):
    th.manual_seed(0)
    config = ObjectiveConfig(**EVERYTHING | settings)
    made = Objective(config, 2, 3, lpips=tiny_lpips(), foundation=Features()).double()
    for param in made.discriminator.parameters():
        param.data = th.randn_like(param)  # as drawn its pull is so weak that the weight meets its maximum
    return made


def autoencoder():
    """Pool to 4 x 4, one 1x1 convolution to the moments, a sample, enlarge, one 1x1 convolution to the image."""
    encoder, decoder = (th.tensor(weight, requires_grad=True) for weight in (ENCODER, DECODER))
    posterior = Posterior(F.conv2d(F.avg_pool2d(th.from_numpy(X), 4), encoder))
    z = posterior.sample(th.from_numpy(NOISE))
    recon = F.conv2d(F.interpolate(z, scale_factor=4.0), decoder)
    return encoder, decoder, posterior, z, recon


def losses_of(made, step=10):
    encoder, decoder, posterior, z, recon = autoencoder()
    x = th.from_numpy(X)
    return made.autoencoder_loss(x, recon, posterior, z, step=step, encoder_last=encoder, decoder_last=decoder)


def terms_by_hand(made, encoder, decoder):
    """nll, kl, g and L_vf in numpy."""
    config, weights = made.config, {key: value.detach().numpy() for key, value in made.state_dict().items()}

    def part(name):
        return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

    pooled = X.reshape(2, 3, 4, 4, 4, 4).mean(axis=(3, 5))
    mean, logvar = np.split(np.einsum("nchw,oc->nohw", pooled, encoder[:, :, 0, 0]), 2, axis=1)
    z = mean + np.exp(logvar / 2) * NOISE
    recon = np.einsum("nchw,oc->nohw", z, decoder[:, :, 0, 0]).repeat(4, axis=2).repeat(4, axis=3)

    pixel = sum({"l1": abs(d), "l2": d**2}[name] for name in config.pixel_loss.split("+") for d in [X - recon])
    lpips = lpips_by_hand(part("perceptual_loss"), X, recon)
    nll = (pixel.sum() + 3 * 16 * 16 * config.perceptual_weight * lpips.sum()) / 2
    kl_elements = mean**2 + np.exp(logvar) - 1 - logvar
    kl = kl_elements.mean() if config.pp_style else 0.5 * kl_elements.sum() / 2
    g = -patchgan_by_hand(part("discriminator"), recon, 1).mean()
    proj, bias = weights["linear_proj.weight"], weights.get("linear_proj.bias")
    projected = conv_by_hand(z if config.reverse_proj else FEATURES, proj, bias, padding=0)
    ends = (projected, FEATURES) if config.reverse_proj else (z, projected)
    cosine, distmat = alignment_by_hand(*ends, config.cos_margin, config.distmat_margin)
    return np.array([nll, kl, g, config.distmat_weight * distmat + config.cos_weight * cosine])


def gradient_norms(made, wrt, step=1e-6):
    """|d term / d wrt| of each term, by central differences."""
    total = 0
    for index in np.ndindex(wrt.shape):
        change = np.zeros_like(wrt)
        change[index] = step
        ends = [(ENCODER + s * change, DECODER) if wrt is ENCODER else (ENCODER, DECODER + s * change) for s in (1, -1)]
        plus, minus = (terms_by_hand(made, *end) for end in ends)
        total = total + ((plus - minus) / (2 * step)) ** 2
    return np.sqrt(total)


VARIANTS = [
    {},
    {"pixel_loss": "l1+l2", "reverse_proj": False, "pp_style": True, "cos_margin": 0.0, "distmat_margin": 0.0},
    {"pixel_loss": "l2", "adaptive_vf": False},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_total_with_everything_on(settings):
    made = objective(**settings)
    config = made.config
    loss, terms = losses_of(made)
    nll, kl, g, vf = terms_by_hand(made, ENCODER, DECODER)
    at_decoder, at_encoder = gradient_norms(made, DECODER), gradient_norms(made, ENCODER)
    d_weight = config.disc_weight * at_decoder[0] / (at_decoder[2] + 1e-4)
    vf_weight = config.vf_weight * (at_encoder[0] / (at_encoder[3] + 1e-4) if config.adaptive_vf else 1)
    total = nll + config.kl_weight * kl + d_weight * 0.9 * g + vf_weight * vf
    expected = {"nll_loss": nll, "kl_loss": kl, "g_loss": g, "vf_loss": vf, "total_loss": total, "logvar": 0}
    expected |= {"d_weight": d_weight, "vf_weight": vf_weight, "rec_loss": nll / (3 * 16 * 16)}
    assert terms.keys() == expected.keys() | {"lpips"}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-6), name
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert not any(value.requires_grad for value in terms.values())


def test_gradients_reach_the_projection_and_not_the_discriminator():
    made = objective()
    losses_of(made)[0].backward()
    assert made.linear_proj.weight.grad.abs().sum() > 0
    assert all(param.grad is None and param.requires_grad for param in made.discriminator.parameters())


def test_without_gradients_the_adaptive_weights_are_zero():
    with th.no_grad():
        loss, terms = losses_of(objective())
    assert terms["d_weight"] == 0 and terms["vf_weight"] == 0
    assert loss.item() == pytest.approx((terms["nll_loss"] + 0.01 * terms["kl_loss"]).item(), rel=1e-12)
    with th.no_grad():
        assert losses_of(objective(adaptive_vf=False))[1]["vf_weight"].item() == pytest.approx(0.3)


def test_the_discriminator_starts_with_its_update():
    made = objective(use_vf="none")
    assert [made.delta(step) for step in (0, 9, 10, 11)] == [0, 0, 0.9, 0.9]
    loss, terms = losses_of(made, step=9)
    assert "g_loss" not in terms and "g_loss" in losses_of(made, step=10)[1]
    assert loss.item() == pytest.approx((terms["nll_loss"] + 0.01 * terms["kl_loss"]).item(), rel=1e-12)
    x = th.from_numpy(X)
    assert made.discriminator_loss(x, -x, step=9)[0] == 0


def test_a_discriminator_without_pull_meets_the_maximum():
    made = objective()
    for param in made.discriminator.parameters():
        param.data *= 1e-3
    assert losses_of(made)[1]["d_weight"].item() == pytest.approx(0.4 * 1e4)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_the_discriminators_loss(kind):
    made = objective(disc_loss=kind)
    weights = {key: value.numpy() for key, value in made.discriminator.state_dict().items()}
    recon = th.from_numpy(0.5 * X[:, ::-1].copy()).requires_grad_()
    loss, terms = made.discriminator_loss(th.from_numpy(X), recon, step=10)
    real, fake = (patchgan_by_hand(weights, v, 1) for v in (X, recon.detach().numpy()))
    if kind == "hinge":
        value = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    else:
        value = 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    assert loss.item() == pytest.approx(0.9 * value, rel=1e-9)
    assert terms["logits_real"].item() == pytest.approx(real.mean(), rel=1e-9)
    assert terms["logits_fake"].item() == pytest.approx(fake.mean(), rel=1e-9)
    loss.backward()
    assert recon.grad is None and made.discriminator.main[0].weight.grad.abs().sum() > 0


def test_by_default_it_is_reconstruction_and_kl():
    """x = 0 and recon = 0.5 everywhere, a standard normal posterior with mean 1: known in the head."""
    made = Objective(ObjectiveConfig(), 4, 1)
    assert list(made.state_dict()) == ["logvar"] and made.trainable() == [] and not list(made.parameters())
    moments = th.cat([th.ones(2, 4, 3, 3), th.zeros(2, 4, 3, 3)], dim=1)
    x = th.zeros(2, 1, 12, 12)
    unused = th.nn.Parameter(th.zeros(1))
    settings = {"step": 10**6, "encoder_last": unused, "decoder_last": unused}
    loss, terms = made.autoencoder_loss(x, x + 0.5, Posterior(moments), moments[:, :4], **settings)
    assert terms["nll_loss"] == 72 and terms["kl_loss"] == 18 and terms["rec_loss"] == 0.5
    assert loss.item() == pytest.approx(72 + 18e-6)


def test_what_the_optimisers_get():
    reverse, forward = objective(), objective(reverse_proj=False)
    assert [tuple(p.shape) for p in reverse.trainable()] == [(5, 2, 1, 1)]
    assert [tuple(p.shape) for p in forward.trainable()] == [(2, 5, 1, 1), (2,)]
    assert objective(proj_fix=True).trainable() == []
    assert objective(use_vf="none").trainable() == []


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"pixel_loss": "l3"}, "--pixel_loss is 'l3'; it must be one of l1, l2, l1+l2"),
        ({"disc_loss": "wgan"}, "--disc_loss is 'wgan'"),
        ({"use_vf": "clip"}, "--use_vf is 'clip'"),
        ({"kl_weight": -1.0}, "--kl_weight is -1.0; it must be 0 or more"),
        ({"vf_weight": math.nan}, "--vf_weight is nan"),
        ({"disc_num_layers": 0}, "--disc_num_layers is 0"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(UserError) as error:
        ObjectiveConfig(**settings)
    assert words in str(error.value)


def test_every_setting_explains_itself():
    assert set(field_help(ObjectiveConfig)) == {field.name for field in dataclasses.fields(ObjectiveConfig)}


def test_weights_that_are_not_given_are_asked_for():
    with pytest.raises(UserError, match="--lpips_path"):
        Objective(ObjectiveConfig(perceptual_weight=1.0), 4, 3)
    with pytest.raises(UserError, match="--vf_path"):
        Objective(ObjectiveConfig(use_vf="mae"), 4, 3)


def test_a_term_that_is_not_finite_stops_the_run():
    terms = {"nll_loss": th.tensor(1e5), "kl_loss": th.tensor(0.0)}
    check_finite(terms, 7)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(TrainingDiverged, match=rf"kl_loss is {value} at step 7"):
            check_finite(terms | {"kl_loss": th.tensor(value)}, 7)


def training_checkpoint(made):
    """An objective's weights as VA-VAE's Lightning module names them."""
    names = {"discriminator": "loss.discriminator", "perceptual_loss": "loss.perceptual_loss"}
    state = {"encoder.conv_in.weight": th.zeros(1), "loss.logvar": th.zeros(())}
    for key, value in made.state_dict().items():
        part, _, rest = key.partition(".")
        state |= {f"{names.get(part, part)}.{rest}": value.clone()} if rest else {}
    return state


def test_a_training_checkpoint_restores_its_parts():
    old, new = objective(), objective()
    for tensor in new.state_dict().values():
        tensor.zero_()
    state = training_checkpoint(old)
    assert restore_from_training_checkpoint(new, state) == ["discriminator", "perceptual_loss", "linear_proj"]
    assert all(th.equal(value, new.state_dict()[key]) for key, value in old.state_dict().items())
    assert restore_from_training_checkpoint(objective(use_vf="none"), state) == ["discriminator", "perceptual_loss"]
    assert restore_from_training_checkpoint(new, {"encoder.conv_in.weight": th.zeros(1)}) == []


def test_parts_of_another_shape_are_named():
    state = training_checkpoint(objective())
    with pytest.raises(UserError, match="the checkpoint's discriminator does not fit.*main.0.weight") as error:
        restore_from_training_checkpoint(objective(disc_ndf=8), state)
    assert "\n" not in str(error.value)


def test_a_training_checkpoint_restores_the_foundation_model(tmp_path):
    pytest.importorskip("transformers")
    for seed in (0, 1):
        th.save(timm_weights("mae", seed=seed), tmp_path / f"{seed}.pth")
    first, second = (load_foundation("mae", tmp_path / f"{seed}.pth") for seed in (0, 1))
    made = Objective(ObjectiveConfig(use_vf="mae"), 4, 3, foundation=first)
    state = {f"foundation_model.model.{key}": value for key, value in timm_weights("mae", seed=1).items()}
    x = th.rand(1, 3, 32, 32)
    assert not th.equal(first(x), second(x))
    assert restore_from_training_checkpoint(made, state) == ["foundation_model"]
    assert th.equal(made.foundation_model(x), second(x))
