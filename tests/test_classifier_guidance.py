"""Guidance by a classifier's gradient where the data, their classes and the exact classifier are known.

Data are Gaussians, one for each class and as wide as each other. Then grad log p(x | y) = grad log p(x) + grad log
p(y | x): the exact unconditional network led by the exact classifier is the exact conditional network.
"""

import csv
import importlib.util
import math

import numpy as np
import pytest
import torch as th
from helpers import ROOT, fill_by_name
from test_samplers import gaussian, network_of, noise_of

from guided_diffusion_vae import assembly, guides, logger
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.flow_matching import PATHS, PREDICTIONS, FlowConfig, FlowMatching
from guided_diffusion_vae.guidance import ClassifierGradient, GuidanceConfig, Unlabelled, guide
from guided_diffusion_vae.noised_classifier import (
    ClassifierTrainConfig,
    LatentClassifierConfig,
    create_latent_classifier,
)
from guided_diffusion_vae.run_record import save_run
from guided_diffusion_vae.samplers import SOLVERS, sample
from guided_diffusion_vae.script_util import DiffusionConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig, VAEInterface

CENTRES = th.tensor([[1.0, -1.2, 0.5], [-0.3, 0.4, 0.9], [0.0, 0.8, -1.0]], dtype=th.float64)
SPREAD, NONE = 0.5, 3


def log_weights(x, alpha, sigma):
    """log p(y | x_t) of each class, but for a constant."""
    return -(x[:, None] - alpha * CENTRES).square().sum(2) / (2 * (alpha**2 * SPREAD**2 + sigma**2))


def guess(x, alpha, sigma, y=None):
    """E[x_start | x_t, y], or of all classes where y is NONE or not given."""
    k = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    each = CENTRES + k * (x[:, None] - alpha * CENTRES)
    mean = (log_weights(x, alpha, sigma).softmax(1)[..., None] * each).sum(1)
    y = th.full((len(x),), NONE) if y is None else y
    return th.cat([each, mean[:, None]], 1)[th.arange(len(x)), y]


class World:
    """The exact networks and the exact classifier of a process."""

    null_label = NONE

    def __init__(self, process, kind="EPSILON", schedule="linear"):
        self.process, self.seen, what = process, [], (process, kind, schedule)
        self.network = network_of(*what, guess=guess)
        self._mix = network_of(process, "START_X", schedule, guess=self._note)

    def __call__(self, x, t, y=None):
        scale = getattr(self.process, "time_scale", math.inf)
        return self.network(x, t.clamp(max=scale * (1 - 1e-6)), y=y)  # at t = 1 of a flow there is no noise to tell

    def unconditional(self, x, t):
        return self(x, t)

    def classifier(self, x, t):
        self.seen.append(t[0].item())
        self._mix(x.detach(), t)
        return log_weights(x, *self.mix)

    def _note(self, x, alpha, sigma):
        self.mix = alpha, sigma
        return x

    def gradient(self, scale=1.0):
        return ClassifierGradient(self.classifier, scale)


WORLDS = {
    "noise": World(gaussian()),
    "noise-rescaled": World(gaussian(rescale=True)),
    "noise-spaced": World(gaussian(respacing="200")),
    "x_start-cosine": World(gaussian("cosine", kind="START_X"), "START_X", "cosine"),
    "v-cosine": World(gaussian("cosine", kind="V"), "V", "cosine"),
    **{
        f"{path}-{name}": World(FlowMatching(path_type=path, prediction=name)) for path in PATHS for name in PREDICTIONS
    },
    "velocity-1000": World(FlowMatching(time_scale=1000.0)),
}
GAUSSIAN = [name for name, world in WORLDS.items() if not isinstance(world.process, FlowMatching)]
FLOW = [name for name in WORLDS if name not in GAUSSIAN]
LABELS = th.tensor([0, 1, 2] * 4)
X = noise_of(len(LABELS))


def led(world, scale=1.0):
    return {"model": Unlabelled(world.unconditional), "cond_fn": world.gradient(scale), "model_kwargs": {"y": LABELS}}


def told(world):
    return {"model": world, "model_kwargs": {"y": LABELS}}


# ---- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_gradient_is_that_of_the_log_probability(scale):
    """Of Gaussians it is alpha / variance (centre_y - sum_k p_k centre_k)."""
    world = WORLDS["linear-velocity"]
    found = world.gradient(scale)(X, th.full((len(X),), 0.4), LABELS)
    p = log_weights(X, 0.4, 0.6).softmax(1)
    wanted = scale * 0.4 / (0.16 * SPREAD**2 + 0.36) * (CENTRES[LABELS] - p @ CENTRES)
    assert th.allclose(found, wanted, atol=1e-7) and not found.requires_grad


def test_the_gradient_of_halves_is_float32_and_taken_without_leave():
    weights = th.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])

    def classifier(x, t):
        assert x.dtype == th.float32
        return (x @ weights.T).half()

    x, y = th.randn(4, 2).half(), th.tensor([0, 1, 2, 0])
    with th.no_grad():
        found = ClassifierGradient(classifier)(x, th.zeros(4), y)
    p = (x.float() @ weights.T).softmax(1)
    assert found.dtype == th.float32 and th.allclose(found, weights[y] - p @ weights, atol=2e-3)


def some_times(denoiser):
    """Of a respaced process whole ones: between them the world, which knows all times, is another."""
    times = denoiser.uniform(9)
    return times if isinstance(denoiser.process, FlowMatching) else times.round()


# ---- one prediction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_unconditional_network_and_classifier_are_the_conditional_network_to_the_solvers(name):
    world = WORLDS[name]
    ours, theirs = denoiser_of(world.process, **led(world)), denoiser_of(world.process, **told(world))
    for time in some_times(ours):
        assert th.allclose(ours.x_start(X, time), theirs.x_start(X, time), atol=1e-5), time


@pytest.mark.parametrize("name", FLOW)
def test_unconditional_network_and_classifier_have_the_velocity_of_the_conditional_one(name):
    world = WORLDS[name]
    for t in (0.05, 0.3, 0.8, 0.99):
        t = th.tensor(t, dtype=th.float64)
        ours = world.process.velocity(Unlabelled(world.unconditional), X, t, world.gradient(), y=LABELS)
        assert th.allclose(ours, world.process.velocity(world, X, t, y=LABELS), atol=1e-5), t


@pytest.mark.parametrize("name", GAUSSIAN)
def test_unconditional_network_and_classifier_take_the_ddim_step_of_the_conditional_one(name):
    world, last = WORLDS[name], WORLDS[name].process.num_timesteps - 1
    for t in (0, last // 3, last // 2):
        time, how = th.full((len(X),), t), {"x": X, "clip_denoised": False}
        ours = world.process.ddim_sample(t=time, **how, **led(world))
        theirs = world.process.ddim_sample(t=time, **how, **told(world))
        assert all(th.allclose(ours[key], theirs[key], atol=1e-5) for key in ("sample", "pred_xstart")), t


@pytest.mark.parametrize("name", WORLDS)
def test_a_scale_is_the_scale_of_classifier_free_guidance(name):
    """x_start + w (x_start of y - x_start): one formula, from a gradient or from two predictions."""
    world = WORLDS[name]
    free = guide(world, world.process, GuidanceConfig(cfg_scale=3.0))
    theirs = denoiser_of(world.process, free, model_kwargs={"y": LABELS})
    ours = denoiser_of(world.process, **led(world, 3.0))
    for time in some_times(ours):
        assert th.allclose(ours.x_start(X, time), theirs.x_start(X, time), atol=1e-5), time


def test_pure_noise_is_not_led():
    """There alpha is 0: no gradient can be divided by it, and x tells nothing of the label."""
    world = WORLDS["linear-velocity"]
    zero = th.tensor(0.0)
    ours = world.process.velocity(Unlabelled(world.unconditional), X, zero, lambda x, t, y: th.ones_like(x), y=LABELS)
    assert th.equal(ours, world.process.velocity(world.unconditional, X, zero))
    denoiser = denoiser_of(world.process, **led(world))
    (point,) = denoiser.points(denoiser.interval[:1])
    seen = th.full((len(X),), point.seen, dtype=th.float64)
    there = denoiser.guess(X, point._replace(alpha=0.0))
    assert th.allclose(there, point.of_x * X + point.of_output * world(X, seen))


def test_the_gradient_is_added_to_the_clamped_guess_as_ddim_does():
    world = WORLDS["noise"]
    ours = denoiser_of(world.process, clip_denoised=True, **led(world))
    assert (guess(2 * X, *map(float, ours.alpha_sigma(300))).abs() > 1).any()
    step = world.process.ddim_sample(x=2 * X, t=th.full((len(X),), 300), clip_denoised=True, **led(world))
    assert th.allclose(ours.x_start(2 * X, 300), step["pred_xstart"], atol=1e-5)


@pytest.mark.parametrize(
    "name, times",
    [("noise", [999, 0]), ("noise-rescaled", [999, 0]), ("noise-spaced", [999, 0]), ("velocity-1000", [1, 999])],
)
def test_the_classifier_sees_the_times_that_the_network_sees(name, times):
    world = WORLDS[name]
    denoiser = denoiser_of(world.process, **led(world))
    world.seen.clear()
    for time in denoiser.interval:
        denoiser.x_start(X, time)
    assert world.seen == pytest.approx(times)
    world.seen.clear()
    if name in GAUSSIAN:
        for t in (0, world.process.num_timesteps - 1):
            world.process.ddim_sample(x=X, t=th.full((len(X),), t), **led(world))
            world.process.p_sample(x=X, t=th.full((len(X),), t), **led(world))
        assert world.seen == pytest.approx([0, 0, 999, 999])
    else:
        world.process.velocity(x=X, t=th.tensor(0.25), cond_fn=world.gradient(), model=Unlabelled(world), y=LABELS)
        assert world.seen == pytest.approx([250])


# ---- whole walks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["noise", "v-cosine", "linear-velocity", "gvp-score", "vp-noise"])
def test_solvers_end_where_the_conditional_network_does(name, solver):
    world = WORLDS[name]

    def ended(how):
        th.manual_seed(0)
        return sample(denoiser_of(world.process, **how), X, 10, solver=solver, spacing="logsnr")

    ours, theirs = ended(led(world)), ended(told(world))
    assert th.allclose(ours, theirs, atol=1e-5) and (ours - ended({"model": world})).abs().max() > 0.3


SAMPLERS = [("noise", "p_sample"), ("noise-spaced", "ddim")]
SAMPLERS += [("noise", name) for name in assembly.GAUSSIAN_SAMPLERS if name not in ("p_sample", "ddim")]
SAMPLERS += [(f"flow-{path}", name) for path in PATHS for name in assembly.FLOW_SAMPLERS if name != "dopri5"]
SAMPLERS += [("flow-linear", "dopri5")]


@pytest.mark.parametrize("name, sampler", SAMPLERS)
def test_every_sampler_ends_where_the_conditional_network_does(name, sampler):
    """Flows start off pure noise, where no classifier is asked. p_sample's mu + Sigma g is the conditional mean but for
    a part of order beta; dopri5 chooses its steps.
    """
    flow, path = name.startswith("flow"), name.removeprefix("flow-")
    if sampler == "dopri5":
        pytest.importorskip("torchdiffeq")
    world = World(FlowMatching(path_type=path, sample_eps=1e-3)) if flow else WORLDS[name]
    config = assembly.SamplerConfig(sampler=sampler, num_steps=20 if flow else 0, clip_denoised=False)
    walk = assembly.create_sampler(config, world.process)

    def ended(how):
        th.manual_seed(0)
        return walk(shape=tuple(X.shape), noise=X, noise_like=None, device="cpu", **how)

    ours, theirs = ended(led(world)), ended(told(world))
    gap = (ours - theirs).square().mean().sqrt()
    assert gap < {"p_sample": 0.01, "dopri5": 5e-3}.get(sampler, 1e-4), gap
    assert (ours - ended({"model": world})).abs().max() > 0.3


@pytest.mark.parametrize("name, sampler", [("noise-spaced", "ddim"), ("noise", "unipc"), ("linear-velocity", "heun")])
def test_samples_are_of_the_class(name, sampler):
    """1,000 of each class from the networks as they are: mean and spread are the class's, within three standard errors
    and the solver's. The flow begins at pure noise."""
    world, y = WORLDS[name], th.tensor([0, 1, 2]).repeat(1000)
    config = assembly.SamplerConfig(sampler=sampler, num_steps=50 if name in FLOW else 0, clip_denoised=False)
    how = led(world) | {"model_kwargs": {"y": y}}
    x = assembly.create_sampler(config, world.process)(shape=(len(y), 3), noise=noise_of(len(y)), device="cpu", **how)
    for label, centre in enumerate(CENTRES):
        assert th.allclose(x[y == label].mean(0), centre, atol=0.06), (label, x[y == label].mean(0))
        assert abs(x[y == label].std(0).mean() - SPREAD) < 0.03, x[y == label].std(0)


# ---- from files ------------------------------------------------------------------------------------------------------

NAMES = ["user_02", "user_05", "user_11"]
SMALL = "--vae_path pixel --image_size 8 --num_res_blocks 1 --channel_mult 1 --num_heads 2 --attention_resolutions 4"
SMALL += " --diffusion_steps 20 --noise_schedule cosine"
SIZES = "--classifier_width 64 --classifier_channel_mult 1 --classifier_attention_resolutions 4 --classifier_depth 1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Networks with stated weights and the run.yaml of each: unconditional, conditional wide and narrow, classifier."""
    root, vae = tmp_path_factory.mktemp("guides"), VAEInterface("pixel")

    def saved(name, network, run, seed):
        fill_by_name(network, seed)
        (root / name).mkdir()
        th.save(network.state_dict(), root / name / "model000001.pt")
        save_run(run, root / name, class_names=NAMES, autoencoder=vae.fingerprint)

    parser = create_argparser(*assembly.NETWORK_SECTIONS, VAEConfig)
    for seed, (name, known, width) in enumerate((("none", False, 64), ("wide", True, 64), ("narrow", True, 32))):
        run = parse_run(parser, [*SMALL.split(), "--class_cond", str(known), "--num_channels", str(width)])
        saved(name, assembly.create_network(run, vae, num_classes=3), run, seed)
    sections = (ClassifierTrainConfig, LatentClassifierConfig, DiffusionConfig, FlowConfig, VAEConfig)
    words = "--vae_path pixel --image_size 8 --diffusion_steps 20 --noise_schedule cosine".split() + SIZES.split()
    run = parse_run(create_argparser(*sections), words)
    saved("classifier", create_latent_classifier(run.section(LatentClassifierConfig), vae, num_classes=3), run, 3)
    yield root
    logger.reset()
    if th.distributed.is_initialized():
        th.distributed.destroy_process_group()


def sampled(trained, name, out, *flags):
    """image_sample_vae.py in this process."""
    spec = importlib.util.spec_from_file_location("image_sample_vae", ROOT / "scripts" / "image_sample_vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    about = ["--model_path", newest(trained, name), "--log_dir", out, "--num_samples", 6, "--sampler", "ddim"]
    module.main([*map(str, [*about, "--batch_size", 6, *flags])])


def newest(trained, name):
    return max((trained / name).glob("model*.pt"))


def arrays(out):
    (path,) = out.glob("samples_*.npz")
    with np.load(path) as found:
        return [found[name] for name in found.files]


def test_a_classifier_gives_users_to_a_model_that_knows_none(trained, tmp_path):
    """The label does nothing but lead: with scale 0 the pictures are those without a classifier."""
    led, idle = ["--users", "11", 2, "--classifier_path", newest(trained, "classifier")], ["--per_image_seed", True]
    sampled(trained, "none", tmp_path / "plain", *idle)
    sampled(trained, "none", tmp_path / "still", *idle, *led, "--classifier_scale", 0)
    sampled(trained, "none", tmp_path / "led", *idle, *led, "--classifier_scale", 30)
    (plain,), (still, labels), (there, _) = (arrays(tmp_path / name) for name in ("plain", "still", "led"))
    assert labels.tolist() == [2, 0] * 3 and np.array_equal(plain, still)
    assert np.abs(there.astype(int) - still).max() > 10
    row = next(csv.DictReader((tmp_path / "led" / "manifest.csv").open()))
    assert (row["user"], row["classifier_scale"], row["autoguide_path"]) == ("user_11", "30.0", "")
    assert len(row["classifier_sha256"]) == 64 and row["autoguide_sha256"] == ""
    sampled(trained, "none", tmp_path / "drawn", "--classifier_path", newest(trained, "classifier"))
    assert set(arrays(tmp_path / "drawn")[1]) <= {0, 1, 2}


def test_a_weaker_network_guides_by_the_formula(trained, tmp_path, capsys):
    """weak + w (strong - weak) with w = 0 is the weaker network by itself; with 1 the stronger."""
    same = ["--per_image_seed", True, "--users", "all"]
    weaker = [*same, "--autoguide_path", newest(trained, "narrow")]
    sampled(trained, "wide", tmp_path / "strong", *same)
    sampled(trained, "narrow", tmp_path / "weak", *same)
    for scale in (0, 1, 3):
        sampled(trained, "wide", tmp_path / str(scale), *weaker, "--autoguide_scale", scale)
        assert ("without effect: --autoguide_path" in "".join(capsys.readouterr())) == (scale == 1)
    strong, weak, at_0, at_1, at_3 = (arrays(tmp_path / name)[0].astype(int) for name in ("strong", "weak", *"013"))
    assert np.abs(at_0 - weak).max() <= 1 and np.array_equal(at_1, strong)
    assert np.abs(strong - weak).max() > 10 and np.abs(at_3 - strong).max() > 10


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("wide", ["--autoguide_path", "none"], ["--autoguide_path", "--class_cond False, but the model with True"]),
        ("wide", ["--autoguide_path", "wide"], ["is --model_path itself"]),
        ("wide", ["--autoguide_path", "nowhere"], ["--autoguide_path", "does not exist"]),
        ("wide", ["--autoguide_path", "narrow", "--condition_scale", 2], ["--cfg_scale 2.0 and --autoguide_path"]),
        ("none", ["--classifier_path", "nowhere"], ["--classifier_path", "does not exist"]),
        ("none", ["--classifier_path", "none"], ["--classifier_path"]),
        ("none", ["--users", "5"], ["--class_cond False; leave --users out, or give a --classifier_path"]),
    ],
)
def test_guides_that_do_not_fit_are_one_line(trained, tmp_path, name, flags, words):
    known = ("none", "wide", "narrow", "classifier")
    flags = [newest(trained, word) if word in known else word for word in flags]
    with pytest.raises(UserError) as told:
        sampled(trained, name, tmp_path, *flags)
    assert all(word in str(told.value) for word in words) and "\n" not in str(told.value), told.value


def test_a_flows_classifier_sees_times_on_its_own_scale(monkeypatch):
    """A transformer sees t in [0, 1], the classifier 1000 t; a model without labels gets none."""
    seen = []

    def classifier(x, t):
        seen.append(t.tolist())
        return x.flatten(1)[:, :3]

    monkeypatch.setattr(guides, "load_classifier", lambda path, vae, *, run, class_names: (classifier, NAMES))
    parser = create_argparser(*assembly.NETWORK_SECTIONS, GuidanceConfig)
    run = parse_run(parser, "--process flow --network dit --classifier_path c.pt --classifier_scale 2".split())
    guided = guides.with_guides(run, lambda x, t: x + 1, FlowMatching(), None, ["?"])
    x, t, y = th.zeros(2, 4, 1, 1), th.tensor([0.25, 1.0]), th.tensor([0, 2])
    assert th.equal(guided.model(x, t, y=y), x + 1) and (guided.class_names, guided.labelled) == (NAMES, True)
    wanted = 2 * (th.eye(4)[y] - th.tensor([1, 1, 1, 0]) / 3)  # of a softmax of three equal logits
    assert th.allclose(guided.cond_fn(x, t, y).flatten(1), wanted) and seen == [[250.0, 1000.0]]
