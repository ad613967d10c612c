"""Two networks and two processes combine freely, and every sampler ends where the data are."""

import numpy as np
import pytest
import torch as th

from guided_diffusion_vae import assembly, logger, trained
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SamplerConfig, create_network, create_process
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.dit import SIZES, LightningDiT
from guided_diffusion_vae.guidance import GuidanceConfig, guide
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.sample_util import SamplingConfig
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


def test_the_estimate_knows_the_flags_of_training(monkeypatch):
    """Those that change memory or time reach it: bfloat16, shares, epochs; their effect is in test_estimate."""
    seen = []
    monkeypatch.setattr(assembly, "estimate", lambda *_, **settings: seen.append(settings))
    names = ["bf16", "sharded", "epochs", "half", "recompute", "steps"]
    assembly.estimate_run(resolved(), PIXEL)
    assert [seen[-1][name] for name in names] == [False, False, 0, False, False, 0]
    assembly.estimate_run(resolved("--amp", "bf16", "--sharding", "fsdp2", "--max_epochs", 3, "--max_steps", 9), PIXEL)
    assert [seen[-1][name] for name in names] == [True, True, 3, False, False, 9]


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


def sampling(*flags):
    words = [*SMALL.split(), *map(str, flags)]
    sections = (*NETWORK_SECTIONS, SamplerConfig, GuidanceConfig, SamplingConfig)
    return parse_run(create_argparser(*sections), words)


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--spacing karras", ["--spacing karras with --sampler p_sample"]),
        ("--spacing karras --use_ddim True", ["--spacing karras with --sampler ddim"]),
        ("--spacing karras --sampler heun", []),
        ("--spacing karras --sampler heun --process flow", ["--spacing karras with --sampler heun"]),
        ("--num_steps 9 --sampler dopri5 --process flow", ["--num_steps 9 with --sampler dopri5"]),
        ("--num_steps 9 --clip_denoised False --process flow", []),
        ("--clip_denoised True --process flow", ["--clip_denoised True with --sampler euler"]),
        ("--clip_denoised True --process flow --sampler unipc", []),
        (
            "--cfg_interval 0.2,1 --cfg_channels first3",
            [f"--cfg_{x} with --cfg_scale 1" for x in ("interval 0.2,1", "channels first3")],
        ),
        ("--cfg_interval 0.2,1 --cfg_channels first3 --cfg_scale 2", []),
        ("--cfg_rescale 0.7", ["--cfg_rescale 0.7 with --cfg_scale 1"]),
        ("--cfg_rescale 0.7 --autoguide_path w.pt --autoguide_scale 3", []),
        ("--autoguide_path w.pt --autoguide_scale 1", ["--autoguide_path w.pt with --autoguide_scale 1"]),
        ("--autoguide_scale 3", ["--autoguide_scale 3.0 with no --autoguide_path"]),
        ("--classifier_scale 3", ["--classifier_scale 3.0 with no --classifier_path"]),
        ("--classifier_scale 3 --classifier_path c.pt", []),
        ("--cfg_interval 0,1 --timestep_respacing 5", []),
        ("--use_rope False", ["--use_rope False with --network unet --process gaussian"]),
    ],
)
def test_what_the_sampler_does_not_read_is_told(flags, told):
    assert assembly.ignored_in_sampling(sampling(*flags.split())) == told


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--timestep_respacing 5 --sampler unipc", "--timestep_respacing 5: --sampler unipc .* --num_steps"),
        ("--timestep_respacing 5 --sampler heun", "--timestep_respacing 5: --sampler heun .* --num_steps"),
        ("--timestep_respacing 5 --process flow", "--timestep_respacing 5: --sampler euler .* --num_steps"),
        (
            "--use_ddim True --process flow",
            "--use_ddim True is not .*: leave it out and give --sampler euler, or choose",
        ),
    ],
)
def test_steps_that_another_solver_would_take_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        assembly.refuse_unfit(sampling(*flags.split()))


def test_an_empty_respacing_takes_back_that_of_a_recipe():
    assembly.refuse_unfit(sampling("--timestep_respacing", "", "--sampler", "unipc"))
    assembly.refuse_unfit(sampling("--timestep_respacing", "", "--num_steps", 5))


@pytest.mark.parametrize(
    "flags, walk",
    [
        ("", ("p_sample", 60, "")),
        ("--use_ddim True --timestep_respacing ddim20", ("ddim", 20, "")),
        ("--num_steps 7", ("p_sample", 7, "")),
        ("--sampler unipc", ("unipc", 20, "logsnr")),
        ("--sampler heun --num_steps 5 --spacing karras", ("heun", 5, "karras")),
        ("--process flow", ("euler", 250, "")),
        ("--process flow --sampler dpmpp_2m", ("dpmpp_2m", 20, "uniform")),
        ("--process flow --sampler dopri5 --num_steps 9", ("dopri5", "adaptive", "")),
    ],
)
def test_the_walk_that_is_recorded_is_the_one_that_is_walked(flags, walk):
    run = sampling(*flags.split(), "--diffusion_steps", 60)
    config = run.section(SamplerConfig)
    process = create_process(run, PIXEL, config)
    assert tuple(assembly.walk_of(config, process).values()) == walk
    if walk[1] != "adaptive" and walk[0] != "heun":
        model = Silent()
        assembly.create_sampler(config, process)(model, (1, 1, 2, 2), noise=th.ones(1, 1, 2, 2), device="cpu")
        assert len(model.seen) == walk[1] - (walk[0] == "euler")  # whose grid's last point is the image


@pytest.mark.parametrize("own", [True, False])
def test_an_image_of_its_own_noise_does_not_depend_on_its_batch_by_adaptive_steps(own):
    """dopri5 weighs the error of all that it is given: beside a stiff image an easy one is walked in other steps."""
    pytest.importorskip("torchdiffeq")
    config = SamplerConfig(sampler="dopri5")
    sample = assembly.create_sampler(config, create_process(resolved("--process", "flow"), PIXEL, config))
    noise, stiffness = th.randn(3, 1, 4, 4, generator=th.Generator().manual_seed(0)), th.tensor([1, 30, 3])

    def model(x, t, y):
        return -stiffness[y].view(-1, 1, 1, 1) * (x - th.sin(9 * t.view(-1, 1, 1, 1) / 1000))

    def drawn(rows):
        how = {"noise_like": th.randn_like if own else None, "model_kwargs": {"y": th.tensor(rows)}, "device": "cpu"}
        return sample(model, (len(rows), 1, 4, 4), noise=noise[rows], **how)

    together, alone = drawn([0, 1, 2]), th.cat([drawn([i]) for i in range(3)])
    assert th.equal(together, alone) == own


FORMS = {
    "bare": lambda weights: weights,
    "training": lambda weights: {
        **{"model": {f"module.module.{key}": value + 1 for key, value in weights.items()}, "ema": weights},
        **{"opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "config": {"train": {"max_steps": 3}}},
    },
    "no average": lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}, "opt": {}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_lightningdit_is_sampled_from_as_it_is(form, tmp_path):
    """The average if there is one: told, for it is not what the file's `model` would draw."""
    path = tmp_path / "0000003.pt"
    run = sampling("--network", "dit", "--model_type", "tiny/4", "--process", "flow", "--model_path", path)
    weights = create_network(run, PIXEL, num_classes=3).state_dict()
    th.save(FORMS[form](weights), path)
    with logger.scoped_configure(dir=tmp_path, format_strs=["log"]):
        loaded = trained.load_network(run, PIXEL, num_classes=3)
    assert not loaded.training
    assert all(th.equal(value.cpu(), weights[key]) for key, value in loaded.state_dict().items())
    told = {"bare": [], "training": ["taking its weights 'ema'"], "no average": ["taking its weights 'model'"]}[form]
    lines = (tmp_path / "log.txt").read_text().splitlines()[1:]  # after "Logging to"
    assert [line.split(": ")[1] for line in lines] == told


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
