"""Two networks and two processes combine freely, and every sampler ends where the data are."""

import numpy as np
import pytest
import torch as th

from guided_diffusion_vae import assembly
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SamplerConfig, create_network, create_process
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.dit import SIZES, LightningDiT
from guided_diffusion_vae.guidance import GuidanceConfig, guide
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.samplers import times_of
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.unet import UNetModel
from guided_diffusion_vae.vae_wrapper import VAEInterface

SMALL = "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --class_cond True"
PIXEL = VAEInterface("pixel")


def resolved(*flags):
    words = [*SMALL.split(), *map(str, flags)]
    return parse_run(create_argparser(*NETWORK_SECTIONS, TrainConfig), words)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny/4", dict(depth=2, hidden_size=16, num_heads=2, patch_size=4))


COMBINATIONS = [(n, p, s) for n in ("unet", "dit") for p in ("gaussian", "flow") for s in (False, True)]


@pytest.mark.parametrize("network, process, sigma", COMBINATIONS)
def test_networks_and_processes_combine(network, process, sigma):
    """Each pair trains on a batch, with a gradient for every weight but the fixed ones, and samples, guided."""
    flags = ["--network", network, "--process", process, "--learn_sigma", sigma, "--class_dropout_prob", 0.2]
    run = resolved(*flags, "--model_type", "tiny/4", "--diffusion_steps", 20, "--noise_schedule", "cosine")
    model, flow = create_network(run, PIXEL, num_classes=3), create_process(run, PIXEL)
    assert isinstance(model, UNetModel if network == "unet" else LightningDiT) and model.null_label == 3
    for param in model.parameters():
        if param.requires_grad:
            th.nn.init.normal_(param, std=0.1)
    times = create_named_schedule_sampler("uniform", flow)
    t, weights = times.sample(4, "cpu", rng=np.random.RandomState(0))
    x, y = th.randn(4, 3, 16, 16), th.tensor([0, 1, 2, 0])
    terms = flow.training_losses(model, x, t, model_kwargs={"y": y}, noise=th.randn_like(x))
    (terms["loss"] * weights).mean().backward()
    unused = {
        name
        for name, param in model.named_parameters()
        if param.requires_grad and (param.grad is None or not param.grad.abs().sum() > 0)
    }
    assert not unused
    model.eval()
    name = "ddim" if process == "gaussian" else "heun"
    config = SamplerConfig(sampler=name, num_steps=3)
    steps = assembly.create_process(run, PIXEL, config)
    sampler = assembly.create_sampler(config, steps)
    guided = guide(model, steps, GuidanceConfig(cfg_scale=2.0))
    out = sampler(guided, (2, 3, 16, 16), noise=x[:2], noise_like=None, model_kwargs={"y": y[:2]}, device="cpu")
    plain = sampler(model, (2, 3, 16, 16), noise=x[:2], noise_like=None, model_kwargs={"y": y[:2]}, device="cpu")
    assert out.shape == (2, 3, 16, 16) and out.isfinite().all() and (out - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "network, process, largest", [("unet", "flow", 1000), ("dit", "flow", 1), ("unet", "gaussian", 999)]
)
def test_every_network_sees_the_times_it_was_made_for(network, process, largest):
    run = resolved("--network", network, "--process", process)
    flow, seen = create_process(run, PIXEL), []

    def model(x, t, **cond):
        seen.append(t)
        return th.zeros_like(x)

    t = th.tensor([0.0, 1.0]) if process == "flow" else th.tensor([0, 999])
    flow.training_losses(model, th.randn(2, 3, 4, 4), t)
    assert seen[0].tolist() == [0, largest]


MEAN, STD = 1.5, 0.4


def exact(process):
    """What a perfect network says of data ~ N(1.5, 0.4^2)."""

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        gap = (x - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)
        return MEAN + t * STD**2 * gap - (1 - t) * gap

    def noise(x, t):
        low = t.long().clamp(max=len(abars) - 2)  # between integer times log(abar / (1 - abar)) is linear
        part = (t - low).double()
        abar = th.lerp(abars[low].logit(), abars[low + 1].logit(), part).sigmoid().view(-1, 1, 1, 1).float()
        return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)

    abars = None if process.num_timesteps == 1 else th.from_numpy(process.alphas_cumprod)
    return velocity if abars is None else noise


SAMPLERS = [("gaussian", name) for name in assembly.GAUSSIAN_SAMPLERS]
SAMPLERS += [("flow", name) for name in assembly.FLOW_SAMPLERS if name != "dopri5"]


@pytest.mark.parametrize("kind, name", SAMPLERS)
def test_every_sampler_recovers_a_gaussian(kind, name):
    """10,000 numbers: their mean and spread are 1.5 and 0.4 within the solvers' and three standard errors."""
    run = resolved("--network", "dit", "--process", kind, "--diffusion_steps", 400)
    config = SamplerConfig(sampler=name, num_steps=200 if kind == "flow" else 0, clip_denoised=False)
    process = create_process(run, PIXEL, config)
    th.manual_seed(0)
    sample = assembly.create_sampler(config, process)
    x = sample(exact(process), (10, 1, 10, 100), noise=None, noise_like=None, model_kwargs={}, device="cpu")
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() - STD) < 0.02, (x.mean(), x.std())


def test_solvers_of_few_steps_walk_all_times_and_space_them_by_the_process():
    """Whatever --timestep_respacing keeps; linear betas even in log-SNR, cosine betas and flows in their own time."""
    run = resolved("--timestep_respacing", "10", "--diffusion_steps", 200)
    quick = SamplerConfig(sampler="dpmpp_2m", num_steps=5, clip_denoised=False)
    assert create_process(run, PIXEL, quick).num_timesteps == 200
    assert create_process(run, PIXEL, SamplerConfig(num_steps=5)).num_timesteps == 5
    assert create_process(run, PIXEL, SamplerConfig()).num_timesteps == 10
    for flags, spacing in (
        ([], "logsnr"),
        (["--noise_schedule", "cosine"], "uniform"),
        (["--process", "flow", "--network", "dit"], "uniform"),
    ):
        process = create_process(resolved(*flags), PIXEL, quick)
        model = Silent()
        noise = th.ones(1, 1, 2, 2)
        assembly.create_sampler(quick, process)(model, (1, 1, 2, 2), noise=noise, device="cpu")
        assert model.seen == pytest.approx([point.seen for point in points_of(process, spacing)], rel=1e-5), flags


class Silent:
    """Says zero, and notes when it was asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t):
        self.seen.append(t[0].item())
        return th.zeros_like(x)


def points_of(process, spacing):
    denoiser = denoiser_of(process, None)
    return denoiser.points(times_of(denoiser, 5, spacing))


def test_the_first_sampler_is_upstreams():
    run = resolved("--diffusion_steps", 20, "--noise_schedule", "cosine")
    process = create_process(run, PIXEL)

    def model(x, t):
        return 0.1 * x

    def drawn(**settings):
        th.manual_seed(1)
        sample = assembly.create_sampler(SamplerConfig(**settings), process)
        return sample(model, (2, 3, 4, 4), noise=None, noise_like=None, model_kwargs={}, device="cpu")

    first = drawn()
    th.manual_seed(1)
    assert th.equal(first, process.p_sample_loop(model, (2, 3, 4, 4), device="cpu"))
    assert th.equal(drawn(use_ddim=True), drawn(sampler="ddim")) and not th.equal(drawn(), drawn(use_ddim=True))


def test_a_network_without_users_needs_no_labels():
    run = resolved("--network", "dit", "--model_type", "tiny/4", "--class_cond", False)
    model = create_network(run, PIXEL, num_classes=3)
    assert model.y_embedder.embedding_table.weight.shape == (1, 16)
    assert model(th.randn(2, 3, 16, 16), th.rand(2)).shape == (2, 3, 16, 16)


def test_label_dropout_is_what_was_published_for_each():
    assert create_network(resolved(), PIXEL, num_classes=3).class_dropout_prob == 0
    assert create_network(resolved("--network", "dit", "--model_type", "tiny/4"), PIXEL).class_dropout_prob == 0.1


def test_settings_that_nobody_reads_are_told():
    run = resolved("--network", "dit", "--process", "flow", "--noise_schedule", "cosine", "--use_rope", False)
    small = ["channel_mult", "noise_schedule", "num_channels", "num_heads", "num_res_blocks"]
    assert assembly.ignored_settings(run) == small
    run = resolved("--use_rope", False, "--use_lognorm", True)
    assert assembly.ignored_settings(run) == ["use_lognorm", "use_rope"]
    assert assembly.ignored_settings(resolved("--use_rope", True)) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--network", "gan"], "--network is 'gan'; choose unet or dit"),
        (["--process", "gan"], "--process is 'gan'; choose gaussian or flow"),
        (["--class_dropout_prob", 1], "--class_dropout_prob is 1.0; a probability"),
        (["--model_type", "LightningDiT-XL"], "--model_type is 'LightningDiT-XL'; choose one of LightningDiT-S/1"),
        (["--path_type", "bent"], "--path_type is 'bent'; it must be one of linear, gvp, vp"),
        (["--timestep_shift", -1], "--timestep_shift is -1.0; it must be positive"),
    ],
)
def test_choices_that_are_not_there_are_one_line(flags, words):
    with pytest.raises(UserError, match=words):
        resolved(*flags)


def test_what_cannot_be_combined_is_one_line():
    flow = create_process(resolved("--process", "flow"), PIXEL)
    with pytest.raises(ValueError, match="--schedule_sampler is loss-second-moment; a flow has --use_lognorm"):
        create_named_schedule_sampler("loss-second-moment", flow)
    with pytest.raises(UserError, match="--sampler ddim is not of this model's process: choose euler"):
        assembly.create_sampler(SamplerConfig(sampler="ddim"), flow)
    with pytest.raises(UserError, match="--patch_size is 4, which does not divide latents of 6 x 6"):
        create_network(resolved("--network", "dit", "--model_type", "tiny/4", "--image_size", 6), PIXEL)
    for settings in (
        {"num_steps": 1},
        {"sampler": "plms"},
        {"sampler": "p_sample", "use_ddim": True},
        {"spacing": "x"},
    ):
        with pytest.raises(UserError):
            SamplerConfig(**settings)
