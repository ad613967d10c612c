"""The flow against upstream's numbers, and against Gaussian data, whose velocity, samples and density are known."""

import builtins
import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch as th
from helpers import golden

from guided_diffusion_vae import flow_matching as fm
from guided_diffusion_vae.flow_matching import FlowMatching

TRANSPORT = dict(golden("ldit_transport.npz"))
MU, STD = 1.5, 0.4


def close(actual, wanted, tol=1e-5, **kwargs):
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=tol, atol=tol, **kwargs)


def flow_of(**settings):
    """A FlowMatching that may have been given a setting without effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return FlowMatching(**settings)


# ---- upstream's numbers ----------------------------------------------------------------------------------------------


def toy(x, t):
    return th.einsum("oc,bchw->bohw", th.from_numpy(TRANSPORT["M"]), x) + 0.1 * t.view(-1, 1, 1, 1)


LOSSES = [key for key in TRANSPORT if key.startswith("loss.") and key.endswith(".loss")]


@pytest.mark.parametrize("key", LOSSES)
def test_training_losses_are_upstreams(key):
    """Upstream draws noise, then uniform times, from torch; logit-normal times from numpy."""
    _, path, prediction, weight, cosine, lognorm, _ = key.split(".")
    flow = flow_of(
        path_type=path.lower(),
        prediction=prediction,
        loss_weight=weight.lower(),
        use_cosine_loss=cosine == "cos1",
        use_lognorm=lognorm == "lognorm1",
    )
    seed, x_start = int(TRANSPORT["seed_loss"]), th.from_numpy(TRANSPORT["x1"])
    th.manual_seed(seed)
    t = flow.sample_times(len(x_start), "cpu", np.random.RandomState(seed)) if flow.use_lognorm else None
    terms = flow.training_losses(toy, x_start, t)
    close(terms.get("mse", terms["loss"]), TRANSPORT[key])
    cosine_key = key.replace(".loss", ".cos_loss")
    assert (cosine_key in TRANSPORT) == ("cos" in terms)
    if "cos" in terms:
        close(terms["cos"], TRANSPORT[cosine_key])
        close(terms["loss"], TRANSPORT[key] + TRANSPORT[cosine_key])


def test_all_of_upstreams_losses_were_compared():
    assert len(LOSSES) == 3 * 3 * 3 * 2


@pytest.mark.parametrize("num_steps, shift", [*itertools.product([5, 50], [0.0, 0.3])])
def test_euler_is_upstreams(num_steps, shift):
    sample = FlowMatching(timestep_shift=shift).sample_loop(toy, th.from_numpy(TRANSPORT["z"]), num_steps)
    close(sample, TRANSPORT[f"euler{num_steps}.shift{shift}"])


def test_dopri5_is_upstreams():
    pytest.importorskip("torchdiffeq")
    sample = FlowMatching().sample_loop(toy, th.from_numpy(TRANSPORT["z"]), method="dopri5", rtol=1e-6)
    close(sample, TRANSPORT["dopri5"])


# ---- paths and conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", fm.PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    t, h = th.linspace(0.02, 0.98, 49, dtype=th.float64), 1e-5
    ahead, mix, behind = fm.PATHS[path](t + h), fm.PATHS[path](t), fm.PATHS[path](t - h)
    close(mix.d_alpha, (ahead.alpha - behind.alpha) / (2 * h), 1e-6)
    close(mix.d_sigma, (ahead.sigma - behind.sigma) / (2 * h), 1e-6)


@pytest.mark.parametrize("path, alpha, sigma", [("linear", 0, 1), ("gvp", 0, 1), ("vp", math.exp(-5.025), 1)])
def test_paths_run_from_noise_to_data(path, alpha, sigma):
    ends = fm.PATHS[path](th.tensor([0.0, 1.0], dtype=th.float64))
    close(ends.alpha, [alpha, 1], 1e-12)
    close(ends.sigma, [sigma, 0], 1e-4)


class Gaussian:
    """Data ~ N(MU, STD^2) in every dimension: x_t is Gaussian, so every estimate has a closed form."""

    def __init__(self, path):
        self.path, self.calls = fm.PATHS[path], 0

    def marginal(self, t):
        mix = self.path(t)
        return mix.alpha * MU, (mix.alpha**2 * STD**2 + mix.sigma**2).sqrt()

    def estimate(self, x, t, kind):
        t = t.view(-1, *[1] * (x.ndim - 1))
        mix, (mean, std) = self.path(t), self.marginal(t)
        score = -(x - mean) / std**2
        noise, x_start = -mix.sigma * score, MU - mix.alpha * STD**2 * score
        velocity = mix.d_alpha * x_start + mix.d_sigma * noise
        return {"score": score, "noise": noise, "x_start": x_start, "velocity": velocity}[kind]

    def predicting(self, kind):
        def model(x, t):
            self.calls += 1
            return self.estimate(x, t, kind)

        return model


def standard_noise(n):
    """n numbers with mean 0 and variance 1 exactly, float64 (n, 1)."""
    z = th.randn(n, 1, dtype=th.float64, generator=th.Generator().manual_seed(0))
    return (z - z.mean()) / z.std(unbiased=False)


KINDS = "velocity", "score", "noise", "x_start"


@pytest.mark.parametrize("path, source, target", [*itertools.product(fm.PATHS, KINDS, KINDS)])
def test_each_estimate_gives_the_others(path, source, target):
    flow, world = FlowMatching(path_type=path), Gaussian(path)
    x, t = standard_noise(200).view(50, 4), th.linspace(0.02, 0.98, 50, dtype=th.float64)
    value, wanted = world.estimate(x, t, source), world.estimate(x, t, target)
    turned = flow.convert(value, x, t, source=source, target=target)
    close(turned, wanted, 1e-10)
    close(flow.convert(turned, x, t, source=target, target=source), value, 1e-10)


@pytest.mark.parametrize("path, prediction", [*itertools.product(fm.PATHS, fm.PREDICTIONS)])
def test_velocity_whatever_the_network_predicts(path, prediction):
    flow, world = FlowMatching(path_type=path, prediction=prediction), Gaussian(path)
    x, t = standard_noise(50), th.tensor(0.3, dtype=th.float64)
    velocity = flow.velocity(world.predicting(prediction), x, t)
    assert velocity.dtype == th.float64
    close(velocity, world.estimate(x, t, "velocity"), 1e-10)


@pytest.mark.parametrize("path, prediction", [*itertools.product(fm.PATHS, fm.PREDICTIONS)])
def test_the_truth_cannot_be_beaten(path, prediction):
    """The loss is least at the closed form: any scaled version of it does worse, on the same noise and times."""
    flow, world = FlowMatching(path_type=path, prediction=prediction), Gaussian(path)
    n = 20_000
    x_start, noise = (
        MU + STD * standard_noise(n),
        th.randn(n, 1, dtype=th.float64, generator=th.Generator().manual_seed(1)),
    )
    t = th.linspace(0.05, 0.95, n, dtype=th.float64)[th.randperm(n, generator=th.Generator().manual_seed(2))]

    def loss(scale):
        truth = world.predicting(prediction)
        return flow.training_losses(lambda x, t: scale * truth(x, t), x_start, t, noise=noise)["loss"].mean()

    assert loss(1.0) < min(loss(0.9), loss(1.1))


@pytest.mark.parametrize("cosine", [False, True])
def test_loss_and_gradient_are_the_formulas(cosine):
    """In numpy and float64, for a network v = w x: the sums, and the gradients of |w x - v|^2 and 1 - cos, by hand."""
    rng = np.random.RandomState(0)
    data, noise, t = rng.randn(3, 4, 2, 2), rng.randn(3, 4, 2, 2), np.array([0.1, 0.5, 0.8])
    s = t[:, None, None, None]
    x, v, w = s * data + (1 - s) * noise, data - noise, rng.randn(4)[:, None, None]
    out = w * x
    loss, grad = ((out - v) ** 2).mean(axis=(1, 2, 3)), (2 * (out - v) * x).sum(axis=(0, 2, 3)) / (3 * 16)
    if cosine:
        a, b = (np.sqrt((y**2).sum(1, keepdims=True)) for y in (out, v))
        ab = (out * v).sum(1, keepdims=True)
        loss = loss + (1 - ab / (a * b)).mean(axis=(1, 2, 3))
        slope = -(v / (a * b) - ab * out / (a**3 * b))  # of one position's 1 - cos, by out
        grad = grad + (slope * x).sum(axis=(0, 2, 3)) / (3 * 4)
    weight = th.from_numpy(w).requires_grad_()
    terms = FlowMatching(use_cosine_loss=cosine).training_losses(
        lambda x, t: weight * x, *map(th.from_numpy, (data, t)), noise=th.from_numpy(noise)
    )
    terms["loss"].mean().backward()
    close(terms["loss"].detach(), th.from_numpy(loss), 1e-12)
    close(weight.grad.flatten(), th.from_numpy(grad), 1e-12)


# ---- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", [None, th.Generator().manual_seed(3), np.random.default_rng(3)], ids=type)
@pytest.mark.parametrize("use_lognorm", [False, True])
def test_times_have_their_law(use_lognorm, rng):
    th.manual_seed(3)
    t = FlowMatching(use_lognorm=use_lognorm).sample_times(20_000, "cpu", rng)
    assert t.dtype == th.float32
    logit_normal = scipy.stats.norm(0, 1).cdf(scipy.special.logit(t.double().numpy()))
    assert scipy.stats.kstest(logit_normal if use_lognorm else t.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    "settings, start, end",
    [
        ({}, 0, 1),
        ({"path_type": "gvp"}, 0, 1),
        ({"path_type": "vp"}, 0, 1 - 1e-5),
        ({"prediction": "noise"}, 1e-3, 1 - 1e-3),
        ({"train_eps": 0.1}, 0.1, 0.9),
    ],
)
def test_times_keep_clear_of_singular_ends(settings, start, end):
    t = FlowMatching(**settings).sample_times(100_000, "cpu", np.random.default_rng(0))
    assert start <= t.min() < start + 1e-3 and end - 1e-3 < t.max() <= end


# ---- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, method", [*itertools.product(["linear", "gvp"], ["euler", "heun"])])
def test_solvers_have_their_order(path, method):
    """Halving the step halves Euler's error of mean and deviation, and quarters Heun's.

    On the linear path the mean moves on a straight line, which both follow without error.
    """

    def errors(steps):
        x = FlowMatching(path_type=path).sample_loop(
            Gaussian(path).predicting("velocity"), standard_noise(500), steps + 1, method=method
        )
        return np.array([abs(x.mean() - MU), abs(x.std(unbiased=False) - STD)])

    coarse, fine = errors(80), errors(160)
    assert (fine < {"euler": 0.02, "heun": 1e-3}[method]).all()
    if path == "linear":
        close(fine[0], 0, 1e-12)
        coarse, fine = coarse[1:], fine[1:]
    close(np.log2(coarse / fine), np.full(len(fine), {"euler": 1, "heun": 2}[method]), 0.1)


@pytest.mark.parametrize("path, prediction, shift", [*itertools.product(fm.PATHS, fm.PREDICTIONS, [0.0, 0.3])])
def test_ode_recovers_a_gaussian(path, prediction, shift):
    flow, world = FlowMatching(path_type=path, prediction=prediction, timestep_shift=shift), Gaussian(path)
    x = flow.sample_loop(world.predicting(prediction), standard_noise(500), 200, method="heun")
    close([x.mean(), x.std()], [MU, STD], 0.02)


@pytest.mark.parametrize("method, calls", [("euler", 49), ("heun", 98)])
def test_a_grid_of_50_points_has_49_steps(method, calls):
    world = Gaussian("linear")
    FlowMatching().sample_loop(world.predicting("velocity"), (2, 1), 50, method=method)
    assert world.calls == calls


class Draws:
    """A zero-mean orthonormal basis, vector by vector: Gaussian noise without luck.

    Where a walk is linear in its noises, the mean and variance of one made with these are those of infinitely many.
    """

    def __init__(self, n):
        self.rows = iter(th.from_numpy(scipy.fft.idct(np.eye(n), norm="ortho") * n**0.5)[1:, :, None])

    def __call__(self, x):
        return next(self.rows)


@pytest.mark.parametrize("path, form, method", [*itertools.product(fm.PATHS, fm.DIFFUSION_FORMS, ["euler", "heun"])])
def test_sde_has_the_paths_marginals(path, form, method):
    """Every diffusion form ends in the law of x_t at the end of its walk, here at t = 0.999."""
    world, draws = Gaussian(path), Draws(600)
    x = FlowMatching(path_type=path).sample_sde_loop(
        world.predicting("velocity"),
        draws(None),
        400,
        method=method,
        diffusion_form=form,
        last_step="none",
        noise_like=draws,
    )
    close([x.mean(), x.std(unbiased=False)], world.marginal(th.tensor(0.999, dtype=th.float64)), 0.004)


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_last_step_is_its_formula(last_step):
    """From the marginal at 0.96 each last step is affine: what it does to mean and deviation is known."""
    world, draws, t = Gaussian("linear"), Draws(600), th.tensor(0.96, dtype=th.float64)
    x = FlowMatching().sample_sde_loop(
        world.predicting("velocity"), draws(None), 400, method="heun", last_step=last_step, noise_like=draws
    )

    def crossed(x):
        v, score, x_start = (world.estimate(x, t, kind) for kind in ("velocity", "score", "x_start"))
        return {"mean": x + 0.04 * (v + (1 - t) * score), "tweedie": x_start, "euler": x + 0.04 * v}[last_step]

    wanted = crossed(th.cat([world.marginal(t)[0] + k * world.marginal(t)[1] * th.ones(1) for k in (-1, 1)])[:, None])
    close([x.mean(), x.std(unbiased=False)], [wanted.mean(), wanted.std(unbiased=False)], 1e-3)


def test_sde_recovers_a_gaussian_from_torchs_noise():
    """Within four standard errors of 20,000 samples, and the steps' bias of 0.003."""
    th.manual_seed(0)
    n, world = 20_000, Gaussian("linear")
    x = FlowMatching().sample_sde_loop(world.predicting("velocity"), (n, 1), 200, last_step="tweedie")
    assert abs(x.mean() - MU) < 4 * STD / n**0.5 + 0.003
    assert abs(x.std() - STD) < 4 * STD / (2 * n) ** 0.5 + 0.003


def test_an_image_does_not_depend_on_its_batch():
    def sample(seeds):
        numbers = [th.Generator().manual_seed(seed) for seed in seeds]

        def noise_like(x):
            return th.stack([th.randn(x.shape[1:], generator=number) for number in numbers])

        first = noise_like(th.empty(len(seeds), 4, 4, 4))
        return FlowMatching().sample_sde_loop(toy, first, 10, noise_like=noise_like)

    close(sample([7, 8, 9])[2:], sample([9]), 1e-6)


# ---- likelihood ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, prediction", [("linear", "velocity"), ("gvp", "velocity"), ("linear", "noise")])
def test_likelihood_of_a_gaussian(path, prediction):
    """The Jacobian is diagonal, so one probe is exact."""
    flow, world, x = (
        FlowMatching(path_type=path, prediction=prediction),
        Gaussian(path),
        MU + STD * standard_noise(60).view(20, 3),
    )
    if prediction == "noise":  # between its eps the path neither starts at pure noise nor ends at pure data
        flow.sample_eps = 1e-5
    got = flow.log_likelihood(world.predicting(prediction), x, 400, th.Generator().manual_seed(0))
    assert got.shape == (20,)
    close(got, scipy.stats.norm(MU, STD).logpdf(x.numpy()).sum(1), 1e-3)


def test_hutchinsons_probe_is_unbiased():
    """v = A x with a full A: log p(x) is a Gaussian's, and the mean over many probes finds its trace."""
    A = th.tensor([[0.3, 0.5], [-0.2, -0.1]], dtype=th.float64)
    back = th.linalg.matrix_exp(-A)
    x = th.tensor([[0.5, -1.0]], dtype=th.float64).repeat(4000, 1)
    got = FlowMatching().log_likelihood(lambda x, t: x @ A.T, x, 60, th.Generator().manual_seed(0))
    wanted = scipy.stats.norm.logpdf((x[0] @ back.T).numpy()).sum() - A.trace().item()
    assert got.std() > 0.1
    close(got.mean(), wanted, 0.02)


# ---- what a user can get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"path_type": "Linear"}, "--path_type is 'Linear'; it must be one of linear, gvp, vp"),
        ({"prediction": "x"}, "--prediction is 'x'; it must be one of velocity, score, noise"),
        ({"loss_weight": "snr"}, "--loss_weight is 'snr'; it must be one of none, velocity, likelihood"),
        ({"train_eps": 0.5}, "--train_eps is 0.5; it must be in"),
        ({"sample_eps": -1.0}, "--sample_eps is -1.0; it must be in"),
        ({"timestep_shift": -0.3}, "--timestep_shift is -0.3; it must be positive"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, sentence):
    with pytest.raises(ValueError) as error:
        FlowMatching(**settings)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loop, choice, sentence",
    [
        ("sample_loop", {"method": "rk4"}, "--method is 'rk4'; it must be one of euler, heun, dopri5"),
        ("sample_loop", {"num_steps": 1}, "--num_steps is 1; the grid"),
        ("sample_sde_loop", {"method": "dopri5"}, "--method is 'dopri5'; it must be one of euler, heun"),
        ("sample_sde_loop", {"diffusion_form": "SBDM"}, "--diffusion_form is 'SBDM'; it must be one of constant, sbdm"),
        ("sample_sde_loop", {"last_step": "Mean"}, "--last_step is 'Mean'; it must be one of none, mean"),
        ("sample_sde_loop", {"last_step_size": 0}, "--last_step_size is 0; it must be between 0 and 1"),
    ],
)
def test_a_wrong_choice_is_one_sentence(loop, choice, sentence):
    with pytest.raises(ValueError) as error:
        getattr(FlowMatching(), loop)(toy, (2, 4, 4, 4), **choice)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_dopri5_without_torchdiffeq_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"--sampler dopri5 needs torchdiffeq: pip install .*\[ode\]"):
        FlowMatching().sample_loop(toy, (2, 4, 4, 4), method="dopri5")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss_weight": "likelihood"}, "--loss_weight likelihood has no effect"),
        ({"prediction": "noise", "use_cosine_loss": True}, "--use_cosine_loss has no effect"),
    ],
)
def test_a_setting_without_effect_is_a_warning(settings, words):
    with pytest.warns(UserWarning, match=words):
        FlowMatching(**settings)
