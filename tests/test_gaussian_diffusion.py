"""The process against the official code's numbers, and against worlds whose answer is known."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae import gaussian_diffusion as gd
from guided_diffusion_vae.respace import SpacedDiffusion, space_timesteps
from guided_diffusion_vae.script_util import create_gaussian_diffusion

MEANS, VARIANCES, LOSSES = gd.ModelMeanType, gd.ModelVarType, gd.LossType
UPSTREAMS_MEANS = [mean for mean in MEANS if mean != MEANS.V]


def close(actual, wanted, tol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=tol, atol=tol)


@pytest.mark.parametrize("name, steps", [*itertools.product(["linear", "cosine"], [100, 1000])])
def test_tables_are_upstreams(name, steps):
    wanted = golden("adm_schedules.npz")
    diffusion = create_gaussian_diffusion(steps=steps, noise_schedule=name)
    tables = [key for key in wanted.files if key.startswith(f"{name}_{steps}_")]
    assert len(tables) == 7
    for key in tables:
        table = getattr(diffusion, key.removeprefix(f"{name}_{steps}_"))
        np.testing.assert_allclose(table, wanted[key], rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("key", golden("adm_golden.json")["schedules"])
def test_schedules_of_the_second_set(key):
    name, steps = key.rsplit("_", 1)
    betas = gd.get_named_beta_schedule(name, int(steps))
    abar = np.cumprod(1 - betas)
    got = {
        "first": betas[:3],
        "mid": betas[len(betas) // 2],
        "last": betas[-3:],
        "sum": betas.sum(),
        "ac_last": abar[-1],
        "ac_mid": abar[len(abar) // 2],
        "logprod": np.log(abar[-1]),
    }
    wanted = golden("adm_golden.json")["schedules"][key]
    assert got.keys() == wanted.keys()
    for field, value in wanted.items():
        np.testing.assert_allclose(got[field], value, rtol=1e-12, err_msg=field)


# ---- losses of one batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mean, variance, loss, schedule", [*itertools.product(UPSTREAMS_MEANS, VARIANCES, LOSSES, ["linear", "cosine"])]
)
def test_training_losses_are_upstreams(mean, variance, loss, schedule):
    data = golden("adm_losses.npz")
    name = f"{mean.name}.{variance.name}.{loss.name}.{schedule}"
    assert dict(golden("adm_losses.json"))[name] == "ok"
    terms = process(mean, variance, loss, schedule).training_losses(
        answer(data, variance),
        *(th.from_numpy(data[key]) for key in ("x_start", "t")),
        noise=th.from_numpy(data["noise"]),
    )
    wanted = {key.rsplit(".", 1)[1]: data[key] for key in data.files if key.startswith(f"loss.{name}.")}
    assert terms.keys() == wanted.keys() and wanted
    for key in wanted:
        close(terms[key], wanted[key])


@pytest.mark.parametrize(
    "mean, variance, schedule, clip",
    [*itertools.product(UPSTREAMS_MEANS, VARIANCES, ["linear", "cosine"], [False, True])],
)
def test_p_mean_variance_is_upstreams(mean, variance, schedule, clip):
    data = golden("adm_losses.npz")
    diffusion = process(mean, variance, LOSSES.MSE, schedule)
    t, x_start, noise = (th.from_numpy(data[key]) for key in ("t", "x_start", "noise"))
    x_t = diffusion.q_sample(x_start, t, noise)
    out = diffusion.p_mean_variance(answer(data, variance), x_t, t, clip_denoised=clip)
    prefix = f"pmv.{mean.name}.{variance.name}.{schedule}.clip{int(clip)}."
    wanted = [key for key in data.files if key.startswith(prefix)]
    assert len(wanted) == 3
    for key in wanted:
        close(out[key.removeprefix(prefix)], data[key])


def test_q_sample_is_upstreams():
    data = golden("adm_losses.npz")
    keys = [key for key in data.files if key.startswith("q_sample")]
    assert keys
    for key in keys:
        schedule = "cosine" if "cosine" in key else "linear"
        diffusion = process(MEANS.EPSILON, VARIANCES.FIXED_LARGE, LOSSES.MSE, schedule)
        close(diffusion.q_sample(*(th.from_numpy(data[k]) for k in ("x_start", "t", "noise"))), data[key])


def process(mean, variance, loss, schedule):
    return SpacedDiffusion(
        use_timesteps=space_timesteps(100, [100]),
        betas=gd.get_named_beta_schedule(schedule, 100),
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=loss,
    )


def answer(data, variance):
    """A model that always gives the stored output."""
    output = th.from_numpy(data["model_output"])
    learned = variance in (VARIANCES.LEARNED, VARIANCES.LEARNED_RANGE)
    return lambda x, t: output if learned else output[:, : x.shape[1]]


# ---- whole loops -----------------------------------------------------------------------------------------------------

LOOPS = golden("adm_sampling.npz")


def toy_model(matrix):
    matrix = th.from_numpy(matrix)
    return lambda x, t: th.einsum("oc,bchw->bohw", matrix, x) + 0.001 * t.view(-1, 1, 1, 1).float()


@pytest.mark.parametrize("key", [key for key in LOOPS.files if key.startswith("resp[")])
def test_loops_are_upstreams(key):
    """Same seed, same flags: same sample."""
    respacing, *parts = key.removeprefix("resp[").split("]", 1)[0], *key.split("].", 1)[1].split(".", 2)
    learn, rescale = parts[0] == "learn1", parts[1] == "rescale1"
    what = parts[2]
    diffusion = create_gaussian_diffusion(
        steps=100, learn_sigma=learn, rescale_timesteps=rescale, timestep_respacing=respacing
    )
    model = toy_model(LOOPS["V"] if learn else LOOPS["W"])
    x_start = th.from_numpy(golden("adm_losses.npz")["x_start"][:2])
    shape = (2, 4, 8, 8)
    if what.startswith("bpd."):
        th.manual_seed(int(LOOPS["seed_bpd"]))
        got = diffusion.calc_bpd_loop(model, x_start)[what.removeprefix("bpd.")]
    elif what == "ddim_reverse":
        got = diffusion.ddim_reverse_sample(model, x_start, th.tensor([1, 3]), clip_denoised=False)["sample"]
    else:
        clip, kind = what.split(".", 1)
        options = {"clip_denoised": clip == "clip1", "device": "cpu"}
        th.manual_seed(int(LOOPS["seed_sampling"]))
        if kind == "p_sample_loop":
            got = diffusion.p_sample_loop(model, shape, **options)
        else:
            got = diffusion.ddim_sample_loop(model, shape, eta=float(kind.removeprefix("ddim_eta")), **options)
    wanted = LOOPS[key]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("key", [key for key in LOOPS.files if "guided" in key and not key.startswith("seed")])
def test_guided_loops_are_upstreams(key):
    diffusion = create_gaussian_diffusion(steps=100, noise_schedule="cosine", learn_sigma=True, timestep_respacing="10")
    th.manual_seed(int(LOOPS["seed_guided"]))
    loop = diffusion.ddim_sample_loop if "ddim" in key else diffusion.p_sample_loop
    got = loop(toy_model(LOOPS["V"]), (2, 4, 8, 8), cond_fn=lambda x, t: -0.1 * x, clip_denoised=False, device="cpu")
    wanted = LOOPS[key]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


class TestFacts:
    """The second set of numbers (rules in its file): T = 1000 respaced to 20, formula-filled inputs."""

    facts = golden("adm_golden.json")

    @staticmethod
    def wave(shape, rate, function=np.cos):
        return th.from_numpy(function(rate * np.arange(np.prod(shape)))).float().view(*shape)

    @staticmethod
    def model(x, t):
        return th.cat([0.7 * x + 0.1 * t.view(-1, 1, 1, 1).float() / 1000, 0.3 * th.sin(x)], dim=1)

    def compare(self, got, wanted):
        flat = got.detach().double().flatten()
        assert len(flat) == wanted["n"]
        close(flat[:8], wanted["first8"])
        close(flat[-4:], wanted["last4"])
        close(flat.sum(), wanted["sum"])
        close(flat.abs().sum(), wanted["abssum"])

    def diffusion(self):
        return create_gaussian_diffusion(learn_sigma=True, rescale_timesteps=True, timestep_respacing="20")

    def test_all_48_losses(self):
        found = self.facts["training_losses_T1000_respaced20_t=[0,13]"]
        assert len(found) == 48
        shape = (2, 3, 4, 4)
        x_start, noise = self.wave(shape, 0.11).clamp(-1, 1), self.wave(shape, 0.23)
        for name, wanted in found.items():
            mean, variance, loss = name.split("|")
            learned = variance.startswith("LEARNED")
            diffusion = SpacedDiffusion(
                use_timesteps=space_timesteps(1000, "20"),
                betas=gd.get_named_beta_schedule("linear", 1000),
                model_mean_type=MEANS[mean],
                model_var_type=VARIANCES[variance],
                loss_type=LOSSES[loss],
                rescale_timesteps=True,
            )
            model = (lambda x, t: self.model(x, t)) if learned else (lambda x, t: self.model(x, t)[:, :3])
            terms = diffusion.training_losses(model, x_start, th.tensor([0, 13]), noise=noise)
            for key, value in wanted.items():
                np.testing.assert_allclose(terms[key].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")
            assert terms.keys() == wanted.keys()

    def test_one_step(self):
        """Both at x_0 itself, clipped; the times of the step toward noise were found from its numbers."""
        x_start = self.wave((2, 3, 4, 4), 0.11).clamp(-1, 1)
        out = self.diffusion().p_mean_variance(self.model, x_start, th.tensor([0, 13]))
        for name, wanted in self.facts["p_mean_variance"].items():
            self.compare(out[name], wanted)
        out = self.diffusion().ddim_reverse_sample(self.model, x_start, th.tensor([3, 19]))
        self.compare(out["sample"], self.facts["ddim_reverse"])

    def test_loops(self):
        diffusion, loops = self.diffusion(), self.facts["loops_seed0"]
        cond_fn = lambda x, t: -0.5 * x + t.view(-1, 1, 1, 1).float() / 1000  # noqa: E731
        runs = {
            "p": lambda: diffusion.p_sample_loop(self.model, (2, 3, 4, 4), device="cpu"),
            "p_noclip": lambda: diffusion.p_sample_loop(self.model, (2, 3, 4, 4), device="cpu", clip_denoised=False),
            "ddim": lambda: diffusion.ddim_sample_loop(self.model, (2, 3, 4, 4), device="cpu"),
            "ddim_eta1": lambda: diffusion.ddim_sample_loop(self.model, (2, 3, 4, 4), device="cpu", eta=1.0),
            "p_cond": lambda: diffusion.p_sample_loop(self.model, (2, 3, 4, 4), device="cpu", cond_fn=cond_fn),
            "ddim_cond": lambda: diffusion.ddim_sample_loop(self.model, (2, 3, 4, 4), device="cpu", cond_fn=cond_fn),
        }
        assert set(loops) == set(runs)
        for name, wanted in loops.items():
            th.manual_seed(0)
            self.compare(runs[name](), wanted)

    def test_bpd(self):
        x_start = self.wave((2, 3, 4, 4), 0.11).clamp(-1, 1)
        th.manual_seed(0)
        out = self.diffusion().calc_bpd_loop(self.model, x_start)
        for name, wanted in self.facts["bpd_seed0"].items():
            self.compare(out[name], wanted)


# ---- worlds whose answer is known ------------------------------------------------------------------------------------


def gaussian_world(diffusion, mu, s):
    """The exact noise prediction when data are N(mu, s^2): no network, no luck."""
    abar = th.from_numpy(diffusion.alphas_cumprod).float()

    def model(x, t):
        a = abar[t].view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s**2 + 1 - a)

    return model


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_recovers_a_gaussian(loop):
    diffusion = create_gaussian_diffusion(steps=200, noise_schedule="cosine", sigma_small=True)
    th.manual_seed(0)
    model = gaussian_world(diffusion, 0.7, 0.3)
    x = getattr(diffusion, loop)(model, (20_000, 1), clip_denoised=False, device="cpu")
    assert abs(x.mean() - 0.7) < 0.01 and abs(x.std() - 0.3) < 0.01


def test_ddim_walks_back_where_it_came_from():
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    model = gaussian_world(diffusion, 0.2, 0.5)
    start = x = th.linspace(-1, 1, 9).view(-1, 1)
    for i in range(900):
        x = diffusion.ddim_reverse_sample(model, x, th.full((9,), i), clip_denoised=False)["sample"]
    for i in reversed(range(901)):
        x = diffusion.ddim_sample(model, x, th.full((9,), i), clip_denoised=False)["sample"]
    close(x, start, 2e-2)


def test_ddim_walks_back_exactly_where_the_noise_is_constant():
    """If the network always sees the same noise, both directions are the same straight line."""
    diffusion = create_gaussian_diffusion(steps=100, noise_schedule="cosine")
    noise = th.linspace(2, -2, 9).view(-1, 1)
    start = x = diffusion.q_sample(th.linspace(-1, 1, 9).view(-1, 1), th.zeros(9, dtype=th.long), noise)
    for i in range(90):
        x = diffusion.ddim_reverse_sample(lambda x, t: noise, x, th.full((9,), i), clip_denoised=False)["sample"]
    close(x, diffusion.q_sample(th.linspace(-1, 1, 9).view(-1, 1), th.full((9,), 90), noise), 1e-4)
    for i in reversed(range(1, 91)):
        x = diffusion.ddim_sample(lambda x, t: noise, x, th.full((9,), i), clip_denoised=False)["sample"]
    close(x, start, 1e-4)


def test_the_bound_of_unit_gaussian_data_is_their_entropy():
    """For N(0, 1) data the reverse process is Gaussian with variance beta_t at any T, so the bound is tight.

    Only the last step is not: its variance is the second step's posterior variance, which costs KL(N(b) || N(b'))
    with b = beta_0 the true one.
    """
    diffusion = create_gaussian_diffusion(steps=30, noise_schedule="cosine", likelihood="gaussian")
    ratio = diffusion.betas[0] / diffusion.posterior_variance[1]
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    th.manual_seed(0)
    out = diffusion.calc_bpd_loop(gaussian_world(diffusion, 0.0, 1.0), th.randn(200_000, 1), clip_denoised=False)
    assert abs(out["total_bpd"].mean() - entropy) < 0.02
    assert abs(out["total_bpd"].mean() - entropy) < 5 * out["total_bpd"].std() / 200_000**0.5


@pytest.mark.parametrize("mean", MEANS)
def test_a_perfect_network_has_no_error(mean):
    """What each kind of network should say makes mse 0 and gives x_0 back."""
    diffusion = process(mean, VARIANCES.FIXED_SMALL, LOSSES.MSE, "cosine")
    th.manual_seed(0)
    x_start, noise, t = th.rand(5, 3) * 2 - 1, th.randn(5, 3), th.tensor([0, 1, 20, 50, 98])
    x_t = diffusion.q_sample(x_start, t, noise)
    answer = {
        MEANS.EPSILON: noise,
        MEANS.START_X: x_start,
        MEANS.PREVIOUS_X: diffusion.q_posterior_mean_variance(x_start, x_t, t)[0],
        MEANS.V: diffusion.q_sample(noise, t, -x_start),
    }[mean]
    terms = diffusion.training_losses(lambda x, t: answer, x_start, t, noise=noise)
    assert terms["mse"].abs().max() < 1e-9
    out = diffusion.p_mean_variance(lambda x, t: answer, x_t, t)
    close(out["pred_xstart"], x_start, 1e-3)
    close(out["mean"], diffusion.q_posterior_mean_variance(x_start, x_t, t)[0], 1e-4)


def test_the_bound_teaches_only_the_variance():
    """With a hybrid loss, vb sends no gradient to the mean (Nichol and Dhariwal 2021, section 3.1)."""
    diffusion = create_gaussian_diffusion(learn_sigma=True)
    output = th.randn(2, 6, 2, 2, requires_grad=True)
    vb = diffusion.training_losses(lambda x, t: output, th.zeros(2, 3, 2, 2), th.tensor([1, 500]))["vb"]
    vb.sum().backward()
    assert not output.grad[:, :3].any() and output.grad[:, 3:].all()


def test_the_posterior_mixes_back_to_the_forward_process():
    """q(x_{t-1} | x_t, x_0) averaged over q(x_t | x_0) is q(x_{t-1} | x_0): means and variances agree."""
    d = create_gaussian_diffusion(steps=50)
    t = np.arange(1, 50)
    mean = d.posterior_mean_coef1[t] + d.posterior_mean_coef2[t] * np.sqrt(d.alphas_cumprod[t])
    variance = d.posterior_variance[t] + d.posterior_mean_coef2[t] ** 2 * (1 - d.alphas_cumprod[t])
    np.testing.assert_allclose(mean, np.sqrt(d.alphas_cumprod[t - 1]), rtol=1e-10)
    np.testing.assert_allclose(variance, 1 - d.alphas_cumprod[t - 1], rtol=1e-9)


def test_the_gaussian_likelihood_has_no_edges():
    """On latents the t = 0 term is a density: moving data and prediction together does not change it."""
    d = create_gaussian_diffusion(steps=50, predict_xstart=True, sigma_small=True, likelihood="gaussian", use_kl=True)
    x, t = th.tensor([[0.0], [2.5]]), th.zeros(2, dtype=th.long)
    noise = th.zeros(2, 1)
    loss = d.training_losses(lambda x_t, t: x + 0.01, x, t, noise=noise)["loss"]
    close(loss[0], loss[1], 1e-4)
    d.likelihood = "discretized"
    loss = d.training_losses(lambda x_t, t: x + 0.01, x, t, noise=noise)["loss"]
    assert abs(loss[0] - loss[1]) > 1


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_noise_like_gives_every_image_its_own_seed(loop):
    """Image 1 is the same alone and in a batch, and torch's own generator is not touched."""
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine")
    eta = {"eta": 1.0} if loop == "ddim_sample_loop" else {}

    def run(images):
        generators = [th.Generator().manual_seed(image) for image in images]

        def noise_like(x):
            return th.stack([th.randn(x.shape[1:], generator=generator) for generator in generators])

        noise = noise_like(th.empty(len(images), 4, 8, 8))
        model = toy_model(LOOPS["W"])
        return getattr(diffusion, loop)(model, noise.shape, noise=noise, device="cpu", noise_like=noise_like, **eta)

    before = th.get_rng_state()
    close(run([0, 1, 2])[1], run([1])[0])
    assert th.equal(th.get_rng_state(), before)


def test_noise_like_replaces_every_draw():
    """Also of the bound; with no noise at all, the sample is the chain of means."""
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine")
    model, drawn = toy_model(LOOPS["W"]), []

    def noise_like(x):
        drawn.append(x.shape)
        return th.zeros_like(x)

    x = th.ones(2, 4, 8, 8)
    got = diffusion.p_sample_loop(model, x.shape, noise=x, device="cpu", noise_like=noise_like)
    assert len(drawn) == 20
    for i in reversed(range(20)):
        x = diffusion.p_mean_variance(model, x, th.full((2,), i))["mean"]
    close(got, x)
    bounds = [diffusion.calc_bpd_loop(model, x, noise_like=noise_like)["total_bpd"] for _ in range(2)]
    assert th.equal(*bounds) and len(drawn) == 60


def test_guidance_needs_no_model_kwargs():
    """Upstream raises TypeError here."""
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine")
    diffusion.p_sample_loop(toy_model(LOOPS["W"]), (1, 4, 8, 8), cond_fn=lambda x, t: 0 * x, device="cpu")


def test_tables_made_while_sampling_serve_training():
    """The tables are cached by their first use, which may be under inference mode; copies of a process work too."""
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine", learn_sigma=True)
    with th.inference_mode():
        diffusion.p_sample_loop(lambda x, t: th.cat([x, x], 1), (2, 3, 4, 4), device="cpu")
    weight = th.ones(6, 3, 1, 1, requires_grad=True)
    for process in (diffusion, copy.deepcopy(diffusion)):
        losses = process.training_losses(
            lambda x, t: th.nn.functional.conv2d(x, weight), th.ones(2, 3, 4, 4), th.tensor([0, 9])
        )
        losses["loss"].sum().backward()
    assert weight.grad.all()


@pytest.mark.parametrize("loop", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_progressive_loops_yield_every_step(loop, capsys):
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine")
    run = getattr(diffusion, loop)(toy_model(LOOPS["W"]), (1, 4, 8, 8), device="cpu", progress=True)
    assert [sorted(out) for out in run] == [["pred_xstart", "sample"]] * 20
    assert "20/20" in capsys.readouterr().err


def test_sampling_finds_the_models_device():
    class Still(th.nn.Linear):
        def forward(self, x, t):
            assert t.dtype == th.int64
            return 0 * x

    out = create_gaussian_diffusion(timestep_respacing="3").p_sample_loop(Still(1, 1), [2, 1])
    assert out.device == th.device("cpu") and not out.requires_grad


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"steps": 10}, "--diffusion_steps is 10.*--noise_schedule cosine"),
        ({"noise_schedule": "cubic"}, "unknown beta schedule: cubic; --noise_schedule"),
        ({"steps": 0, "noise_schedule": "cosine"}, "--diffusion_steps"),
    ],
)
def test_a_process_that_cannot_be_is_one_line(flags, words):
    with pytest.raises(ValueError, match=words):
        create_gaussian_diffusion(**flags)


def test_an_unknown_schedule_is_upstreams_error_too():
    with pytest.raises(NotImplementedError, match="unknown beta schedule: cubic"):
        gd.get_named_beta_schedule("cubic", 100)
