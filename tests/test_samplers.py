"""The solvers on a mixture of two Gaussians, whose every estimate is known, against its ODE integrated very finely."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from scipy.integrate import solve_ivp

from guided_diffusion_vae import samplers
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.flow_matching import CLEARANCE, PATHS, FlowMatching
from guided_diffusion_vae.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion_vae.guidance import GuidedModel
from guided_diffusion_vae.respace import SpacedDiffusion, space_timesteps
from guided_diffusion_vae.samplers import SOLVERS, SPACINGS, sample, times_of

# ---- the world: x_0 ~ sum_k WEIGHT_k N(MEAN_k, STD_k^2 I) in three dimensions ----------------------------------------

WEIGHT = th.tensor([0.5, 0.5], dtype=th.float64)
MEAN = th.tensor([[-0.6, 0.7, 0.2], [0.5, -0.4, 0.3]], dtype=th.float64)
STD = th.tensor([0.4, 0.7], dtype=th.float64)


def expected_x_start(x, alpha, sigma):
    """E[x_0 | alpha x_0 + sigma noise = x] of the mixture."""
    variance = alpha**2 * STD**2 + sigma**2
    gap = x[:, None] - alpha * MEAN
    log_weight = WEIGHT.log() - gap.square().sum(2) / (2 * variance) - x.shape[1] / 2 * variance.log()
    each = MEAN + (alpha * STD**2 / variance)[:, None] * gap
    return (log_weight.softmax(1)[..., None] * each).sum(1)


def as_predicted(kind, x, x_start, alpha, sigma, d_alpha=0.0, d_sigma=0.0):
    """What a network that predicts `kind` says where this is its guess of x_start."""
    noise = (x - alpha * x_start) / sigma
    return {
        "START_X": x_start,
        "EPSILON": noise,
        "V": alpha * noise - sigma * x_start,
        "noise": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x_start + d_sigma * noise,
    }[kind]


V = getattr(ModelMeanType, "V", SimpleNamespace(name="V"))
MEAN_TYPES = {"EPSILON": ModelMeanType.EPSILON, "START_X": ModelMeanType.START_X, "V": V}


def gaussian(schedule="linear", *, kind="EPSILON", steps=1000, respacing=None, variance="FIXED_SMALL", rescale=False):
    return SpacedDiffusion(
        space_timesteps(steps, respacing or str(steps)),
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=MEAN_TYPES[kind],
        model_var_type=ModelVarType[variance],
        loss_type=LossType.MSE,
        rescale_timesteps=rescale,
    )


def network_of(process, kind="EPSILON", schedule="linear", guess=expected_x_start, steps=1000):
    """The exact network: (x, the time it sees) -> prediction; knows the schedule by itself."""
    abar = np.cumprod(1 - get_named_beta_schedule(schedule, steps))
    log_snr = np.log(abar / (1 - abar))

    def of_gaussian(x, t, **kwargs):
        assert (t == t[0]).all()
        place = float(t[0]) * (steps / 1000 if process.rescale_timesteps else 1)
        power = 1 / (1 + math.exp(-np.interp(place, np.arange(steps), log_snr)))
        alpha, sigma = math.sqrt(power), math.sqrt(1 - power)
        return as_predicted(kind, x, guess(x, alpha, sigma, **kwargs), alpha, sigma)

    def of_flow(x, t, **kwargs):
        mix = [float(part[0]) for part in PATHS[process.path_type](t / process.time_scale)]
        return as_predicted(process.prediction, x, guess(x, *mix[:2], **kwargs), *mix)

    return of_flow if isinstance(process, FlowMatching) else of_gaussian


PROCESSES = {
    "gaussian-linear": gaussian(),
    "gaussian-cosine": gaussian("cosine"),
    **{f"flow-{path}": FlowMatching(path_type=path) for path in PATHS},
}


def exact(name, **settings):
    process = PROCESSES[name]
    schedule = "cosine" if name.endswith("cosine") else "linear"
    return denoiser_of(process, network_of(process, schedule=schedule), **settings)


def noise_of(n, dims=3, seed=0):
    return th.from_numpy(np.random.RandomState(seed).randn(n, dims))


def true_end(denoiser, x):
    """Where the ODE takes x: dy/dlog k = y - D(y, k) in y = x / alpha, k = sigma / alpha, and D at the data end."""
    first, last = denoiser.points(np.array(denoiser.interval))
    y = x * math.hypot(first.alpha, first.sigma) / first.alpha

    def slope(log_k, flat):
        y = th.from_numpy(flat).view(x.shape)
        return (y - expected_x_start(y, 1.0, math.exp(log_k))).flatten().numpy()

    span = -first.log_snr, -last.log_snr
    done = solve_ivp(slope, span, y.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-12)
    return expected_x_start(th.from_numpy(done.y[:, -1]).view(x.shape), 1.0, math.exp(-last.log_snr))


def rms(x):
    return x.square().mean().sqrt().item()


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["1000", "50", "10,20,30"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_whole_times_have_the_tables_of_the_process(schedule, respacing):
    process = gaussian(schedule, respacing=respacing)
    denoiser = denoiser_of(process, None)
    whole = np.arange(process.num_timesteps)
    alpha, sigma = denoiser.alpha_sigma(whole)
    np.testing.assert_allclose(alpha**2, process.alphas_cumprod, rtol=1e-12)
    np.testing.assert_allclose(sigma**2, 1 - process.alphas_cumprod, rtol=1e-12)
    half = denoiser.log_snr(whole[:-1] + 0.5)
    np.testing.assert_allclose(half, (denoiser.log_snr(whole[:-1]) + denoiser.log_snr(whole[1:])) / 2, atol=1e-12)
    assert denoiser.interval == (process.num_timesteps - 1, 0)


@pytest.mark.parametrize("path, start", [("linear", CLEARANCE), ("gvp", CLEARANCE), ("vp", 0.0)])
def test_a_flow_keeps_off_its_singular_ends(path, start):
    denoiser = denoiser_of(FlowMatching(path_type=path), None)
    assert denoiser.interval == (start, 1 - CLEARANCE)
    t = np.array([0.2, 0.7])
    mix = PATHS[path](th.from_numpy(t))
    np.testing.assert_array_equal(denoiser.alpha_sigma(t), np.stack([mix.alpha, mix.sigma]))
    np.testing.assert_allclose(denoiser.log_snr(t), (mix.alpha / mix.sigma).log().numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_inverse_of_log_snr(name):
    denoiser = exact(name)
    times = np.linspace(*denoiser.interval, 77)
    np.testing.assert_allclose(denoiser.time_at(denoiser.log_snr(times)), times, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind, start", [("START_X", 99), ("V", 99), ("EPSILON", 98)])
def test_all_noise_at_the_last_time_is_left_out_if_x_start_does_not_follow(kind, start):
    """beta = 1 at the end (zero terminal SNR): alpha is 0 there, and x_start of the noise would divide by it."""
    betas = np.append(get_named_beta_schedule("linear", 100)[:-1], 1.0)
    settings = {"model_var_type": ModelVarType.FIXED_SMALL, "loss_type": LossType.MSE}
    process = SpacedDiffusion(range(100), betas=betas, model_mean_type=MEAN_TYPES[kind], **settings)
    denoiser = denoiser_of(process, None)
    assert denoiser.interval == (start, 0) and np.isfinite(denoiser.log_snr(np.arange(100))).all()


@pytest.mark.parametrize(
    "process, time, seen",
    [
        (gaussian(), 412.25, 412.25),
        (gaussian(steps=400, rescale=True), 100.5, 251.25),
        (gaussian(respacing="4"), 1.5, 499.5),  # keeps 0, 333, 666, 999
        (gaussian(steps=500, respacing="ddim100", rescale=True), 10.1, 101.0),  # keeps 0, 5, 10, ...
        (FlowMatching(), 0.3, 0.3),
        (FlowMatching(time_scale=1000.0), 0.3, 300.0),
    ],
)
def test_the_time_that_the_network_sees(process, time, seen):
    times = []

    def model(x, t):
        times.extend(t.tolist())
        return x

    denoiser_of(process, model).x_start(noise_of(2), time)
    assert times == pytest.approx([seen, seen], rel=1e-12)


@pytest.mark.parametrize("kind", MEAN_TYPES)
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_every_gaussian_prediction_becomes_x_start(kind, variance):
    process = gaussian(kind=kind, variance=variance)
    network = network_of(process, kind)
    learned = variance == "LEARNED_RANGE"
    denoiser = denoiser_of(process, lambda x, t: th.cat([network(x, t), 9 + x], 1) if learned else network(x, t))
    x = noise_of(5)
    for time in (999, 640.75, 3.5, 0):
        wanted = expected_x_start(x, *(part.item() for part in denoiser.alpha_sigma(time)))
        th.testing.assert_close(denoiser.x_start(x, time), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_every_flow_prediction_becomes_x_start(path, prediction):
    process = FlowMatching(path_type=path, prediction=prediction, time_scale=7.0)
    denoiser, x = denoiser_of(process, network_of(process)), noise_of(5)
    for time in (*denoiser.interval, 0.3):
        wanted = expected_x_start(x, *(part.item() for part in denoiser.alpha_sigma(time)))
        th.testing.assert_close(denoiser.x_start(x, time), wanted, rtol=1e-9, atol=1e-9)


def test_guesses_are_clipped_if_asked():
    process = gaussian(kind="START_X")
    x = th.tensor([[-3.0, 0.5, 2.0]])
    assert denoiser_of(process, lambda x, t: x, clip_denoised=True).x_start(x, 5.0).tolist() == [[-1.0, 0.5, 1.0]]
    assert denoiser_of(process, lambda x, t: x).x_start(x, 5.0).tolist() == [[-3.0, 0.5, 2.0]]


# ---- spacings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 3, 20, 1500])
def test_times_run_from_end_to_end(name, spacing, num_steps):
    denoiser = exact(name)
    times = times_of(denoiser, num_steps, spacing)
    assert times.dtype == np.float64 and times.shape == (num_steps,)
    assert (times[0], times[-1]) == denoiser.interval
    assert (np.diff(denoiser.log_snr(times)) > 0).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_the_spacings_are_what_they_are_called(name):
    denoiser, n = exact(name), 12
    start, end = denoiser.interval
    np.testing.assert_allclose(np.diff(times_of(denoiser, n, "uniform")), (end - start) / (n - 1), rtol=1e-12)
    steps = np.diff(denoiser.log_snr(times_of(denoiser, n, "logsnr")))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9)
    alpha, sigma = denoiser.alpha_sigma(times_of(denoiser, n, "karras"))
    high, low = (sigma / alpha)[[0, -1]]
    wanted = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]
    np.testing.assert_allclose(sigma / alpha, wanted, rtol=1e-9)


def test_uniform_times_of_a_flow_are_shifted_as_its_other_samplers_do():
    plain, shifted = (times_of(denoiser_of(FlowMatching(timestep_shift=s), None), 9, "uniform") for s in (0.0, 0.3))
    u = np.linspace(0, 1, 9)
    span = 1 - 2 * CLEARANCE
    np.testing.assert_allclose(plain, CLEARANCE + span * u)
    np.testing.assert_allclose(shifted, CLEARANCE + span * 0.3 * u / (1 - 0.7 * u))


# ---- convergence -----------------------------------------------------------------------------------------------------


def errors(denoiser, solver, spacing, counts, x):
    """Root mean square distance from the true end, for each number of steps."""
    wanted, found = true_end(denoiser, x), []
    for count in counts:
        points = denoiser.points(times_of(denoiser, count, spacing))
        start = x * math.hypot(points[0].alpha, points[0].sigma)
        found.append(rms(solver(denoiser.guess, start, points) - wanted))
    return np.array(found)


ORDERS = {  # solver, what theory says, the two numbers of steps between which the slope is taken
    "dpmpp_2m": (samplers.dpmpp_2m, 2, (80, 320)),
    "heun": (samplers.heun, 2, (40, 160)),
    "unipc 1": (partial(samplers.unipc, order=1), 2, (80, 320)),
    "unipc 2": (partial(samplers.unipc, order=2), 3, (80, 320)),
    "unipc 3": (partial(samplers.unipc, order=3), 4, (80, 320)),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
@pytest.mark.parametrize("solver", ORDERS)
def test_the_error_falls_with_the_order_of_the_solver(name, spacing, solver):
    """UniPC's corrector adds one to the order of its predictor (Zhao et al. 2023, theorem 3.1)."""
    solve, order, counts = ORDERS[solver]
    coarse, fine = errors(exact(name), solve, spacing, counts, noise_of(6))
    slope = math.log(coarse / fine) / math.log((counts[1] - 1) / (counts[0] - 1))
    assert abs(slope - order) < 0.25, slope


@pytest.mark.parametrize("name", PROCESSES)
def test_heun_keeps_its_order_at_uniform_times(name):
    coarse, fine = errors(exact(name), samplers.heun, "uniform", (40, 160), noise_of(6))
    assert abs(math.log(coarse / fine) / math.log(159 / 39) - 2) < 0.1


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "unipc_3"])
def test_a_long_last_step_does_not_extrapolate(name, solver, monkeypatch):
    """Even times are far apart in log-SNR near data: there an extrapolation over the step before would overshoot."""
    (humble,) = errors(exact(name), SOLVERS[solver], "uniform", [20], noise_of(32))
    monkeypatch.setattr(samplers, "LONG", math.inf)
    (bold,) = errors(exact(name), SOLVERS[solver], "uniform", [20], noise_of(32))
    assert humble < 0.7 * bold, (humble, bold)


@pytest.mark.parametrize("schedule, spacing", [("linear", "logsnr"), ("cosine", "uniform")])
def test_twenty_steps_are_nearer_than_a_hundred_of_ddim(schedule, spacing):
    x = noise_of(64)
    process = gaussian(schedule, respacing="100")
    ddim = process.ddim_sample_loop(
        network_of(process, schedule=schedule), x.shape, noise=x, clip_denoised=False, device="cpu"
    )
    denoiser = exact(f"gaussian-{schedule}")
    of_ddim = rms(ddim - true_end(denoiser, x))
    found = {name: errors(denoiser, SOLVERS[name], spacing, [20], x).item() for name in ("dpmpp_2m", "unipc")}
    assert max(found.values()) < 0.8 * of_ddim, (found, of_ddim)


def test_two_steps_are_two_of_ddim():
    """DPM-Solver++ of first order is DDIM."""
    process, x = gaussian(respacing="2"), noise_of(4)
    network = network_of(process)
    ddim = process.ddim_sample_loop(network, x.shape, noise=x, clip_denoised=False, device="cpu")
    ours = sample(denoiser_of(process, network), x, 2, solver="dpmpp_2m", spacing="uniform")
    th.testing.assert_close(ours, ddim, rtol=1e-5, atol=1e-5)  # the tables of the process are float32


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_gaussian_predictions_give_the_same_samples(solver, spacing):
    x, found = noise_of(8), []
    for kind in MEAN_TYPES:
        process = gaussian(kind=kind)
        draw = th.Generator().manual_seed(0)
        denoiser = denoiser_of(process, network_of(process, kind))
        how = {"solver": solver, "spacing": spacing, "noise_like": partial(seeded, draw)}
        found.append(sample(denoiser, x, 12, **how))
    for other in found[1:]:
        th.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def seeded(generator, x):
    return th.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", PATHS)
def test_all_flow_predictions_give_the_same_samples(solver, path):
    x, found = noise_of(8), []
    for prediction in ("velocity", "score", "noise"):
        process = FlowMatching(path_type=path, prediction=prediction, sample_eps=CLEARANCE)
        draw = th.Generator().manual_seed(0)
        how = {"solver": solver, "spacing": "uniform", "noise_like": partial(seeded, draw)}
        found.append(sample(denoiser_of(process, network_of(process)), x, 12, **how))
    for other in found[1:]:
        th.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_float32_images_stay_so_and_end_where_float64_ones_do():
    process, x = PROCESSES["flow-linear"], noise_of(8)
    wanted = sample(exact("flow-linear"), x, 20, solver="unipc", spacing="logsnr")
    network = network_of(process)
    single = denoiser_of(process, lambda x, t: network(x.double(), t.double()).float())
    found = sample(single, x.float(), 20, solver="unipc", spacing="logsnr")
    assert found.dtype == th.float32
    th.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


# ---- the SDE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [999, 500, 20, 1])
def test_a_step_of_the_sde_is_the_posterior_where_x_start_is_known(t):
    """With D = x_start the SDE from t to t - 1 is q(x_{t-1} | x_t, x_0), whose moments the process knows."""
    process, x, x_start = gaussian(), noise_of(3), noise_of(3, seed=1)
    points = denoiser_of(process, None).points(np.array([t, t - 1.0]))

    def step(noise):
        seen = []

        def guess(x, point):
            seen.append(x)
            return x_start

        samplers.dpmpp_2m_sde(guess, x, points, lambda x: noise)
        return seen[1]

    mean, std = step(th.zeros_like(x)), step(th.ones_like(x)) - step(th.zeros_like(x))
    wanted = process.posterior_mean_coef1[t] * x_start + process.posterior_mean_coef2[t] * x
    th.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-9)
    th.testing.assert_close(std.square(), th.full_like(x, process.posterior_variance[t]), rtol=1e-9, atol=0)


def gaussian_moments(denoiser, num_steps, spacing, mean, std):
    """Mean and variance of what the SDE makes where x_0 ~ N(mean, std^2), without a random number.

    D is affine in x, so a sample is affine in x_T and in every step's noise: probe each with 1.
    """
    denoiser.guess = lambda x, point: (
        mean + point.alpha * std**2 * (x - point.alpha * mean) / (point.alpha**2 * std**2 + point.sigma**2)
    )
    draws = iter(range(1, num_steps))

    def noise_like(x):
        return (th.arange(len(x)) == next(draws)).to(x)[:, None]

    x = (th.arange(num_steps + 1) == 0).double()[:, None]  # row 0: x_T = 1; row i: noise i = 1; the last: none
    out = sample(denoiser, x, num_steps, solver="dpmpp_2m_sde", spacing=spacing, noise_like=noise_like)
    return out[-1].item(), (out[:-1] - out[-1]).square().sum().item()


@pytest.mark.parametrize("name", PROCESSES)
def test_the_sde_makes_a_gaussian(name):
    """Its mean is exact but for the little data in x_T, its variance converges with order 2."""
    mean, std = 1.5, 0.4
    denoiser = exact(name)
    (end,) = denoiser.points(np.array([denoiser.interval[1]]))
    total = end.alpha**2 * std**2 + end.sigma**2
    wanted = (end.alpha * std**2) ** 2 / total  # of D at the data end
    found = [gaussian_moments(denoiser, count, "logsnr", mean, std) for count in (40, 160)]
    assert all(abs(center - mean) < 2e-5 for center, _ in found)
    coarse, fine = (abs(variance - wanted) for _, variance in found)
    assert abs(math.log(coarse / fine) / math.log(159 / 39) - 2) < 0.1


@pytest.mark.parametrize("name, spacing", [("gaussian-linear", "karras"), ("flow-linear", "uniform")])
def test_the_sde_makes_the_mixture(name, spacing):
    """Means and covariances within four standard errors of 20,000 samples."""
    n = 20_000
    draw = th.Generator().manual_seed(1)
    how = {"solver": "dpmpp_2m_sde", "spacing": spacing, "noise_like": partial(seeded, draw)}
    out = sample(exact(name), noise_of(n), 100, **how).numpy()
    weight, centers, std = WEIGHT.numpy(), MEAN.numpy(), STD.numpy()
    mean = weight @ centers
    cov = np.einsum("k,ki,kj->ij", weight, centers, centers) - np.outer(mean, mean) + weight @ std**2 * np.eye(3)
    assert (np.abs(out.mean(0) - mean) < 4 * np.sqrt(np.diag(cov) / n)).all()
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert (np.abs(np.cov(out.T) - cov) < 4 * error).all()


# ---- as the scripts use it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "unipc", "unipc_3"])
def test_a_guided_model_ends_at_the_guided_mean(name, solver):
    """Classes N(c_y, s^2) guided by w are N(c_w, s^2), c_w = c_0 + w (c_y - c_0), and a Gaussian's ODE is known:

    y = x / alpha goes to c_w + (y_T - c_w) sqrt((s^2 + k^2) / (s^2 + k_T^2)) with k = sigma / alpha, then D.
    """
    process, schedule = PROCESSES[name], "cosine" if name.endswith("cosine") else "linear"
    s, w, centers = 0.6, 3.0, th.tensor([[1.0, -0.5], [-2.0, 0.3], [0.25, 0.5]], dtype=th.float64)  # the last: no class

    def guess(x, alpha, sigma, y):
        return centers[y] + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * centers[y])

    network = network_of(process, schedule=schedule, guess=guess)

    def model(x, t, y):
        return network(x, t, y=y)

    model.null_label = 2
    guided = GuidedModel(model, scale=w, place_on_path=process.place_on_path)
    x, y = th.cat([noise_of(6, 2), -noise_of(6, 2)]), th.tensor([0, 0, 0, 1, 1, 1] * 2)
    denoiser = denoiser_of(process, guided, model_kwargs={"y": y})
    found = sample(denoiser, x, 200, solver=solver, spacing="logsnr")

    first, last = denoiser.points(np.array(denoiser.interval))
    center = centers[2] + w * (centers[y] - centers[2])
    k_T, k = first.sigma / first.alpha, last.sigma / last.alpha
    gap = (x * math.hypot(first.alpha, first.sigma) / first.alpha - center) * math.sqrt((s**2 + k**2) / (s**2 + k_T**2))
    wanted = center + s**2 / (s**2 + k**2) * gap
    th.testing.assert_close(found, wanted, rtol=0, atol=3e-3)
    for label in (0, 1):  # of x and -x together only the little data in x_T is left beside the mean
        th.testing.assert_close(found[y == label].mean(0), center[y == label][0], rtol=0, atol=0.03)


@pytest.mark.parametrize("num_steps", [2, 3, 20])
@pytest.mark.parametrize("solver", SOLVERS)
def test_how_often_the_network_is_called(solver, num_steps, capsys):
    calls, draws = [], []

    def model(x, t):
        calls.append(t[0].item())
        return th.zeros_like(x)

    def noise_like(x):
        draws.append(x)
        return th.zeros_like(x)

    how = {"solver": solver, "spacing": "karras", "noise_like": noise_like, "progress": True}
    sample(denoiser_of(gaussian(), model), th.zeros(2, 3), num_steps, **how)
    wanted = 2 * num_steps - 1 if solver == "heun" else num_steps
    assert len(calls) == wanted and calls[0] == 999 and calls[-1] == 0
    assert len(draws) == (num_steps - 1 if solver == "dpmpp_2m_sde" else 0)
    assert f"{wanted}/{wanted}" in capsys.readouterr().err


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", [gaussian(), FlowMatching()])
def test_no_number_is_read_from_the_device(process, solver):
    """A meta tensor has no numbers, so reading one is an error."""
    x = th.zeros(2, 4, 8, 8, device="meta")
    out = sample(denoiser_of(process, lambda x, t: x * t.view(-1, 1, 1, 1)), x, 5, solver=solver, spacing="karras")
    assert out.is_meta and out.shape == x.shape


def test_no_gradients_are_kept():
    x = th.ones(2, 3, requires_grad=True)
    assert not sample(denoiser_of(gaussian(), lambda x, t: x), x, 3, solver="unipc", spacing="uniform").requires_grad


@pytest.mark.parametrize(
    "num_steps, settings, words",
    [
        (1, {}, "--num_steps is 1"),
        (10, {"solver": "euler"}, "--sampler is 'euler'; it must be one of dpmpp_2m"),
        (10, {"spacing": "cosine"}, "--spacing is 'cosine'; it must be one of karras"),
    ],
)
def test_wrong_settings_are_said_in_a_line(num_steps, settings, words):
    with pytest.raises(UserError, match=words) as told:
        sample(exact("flow-linear"), noise_of(2), num_steps, **{"solver": "heun", "spacing": "karras", **settings})
    assert "\n" not in str(told.value)


def test_processes_that_cannot_be_walked_are_refused():
    settings = {"betas": get_named_beta_schedule("linear", 100), "loss_type": LossType.MSE}
    settings |= {"model_var_type": ModelVarType.FIXED_SMALL}
    with pytest.raises(UserError, match="--sampler p_sample"):
        denoiser_of(SpacedDiffusion(range(100), model_mean_type=ModelMeanType.PREVIOUS_X, **settings), None)
    with pytest.raises(UserError, match="--timestep_respacing"):
        denoiser_of(SpacedDiffusion([7], model_mean_type=ModelMeanType.EPSILON, **settings), None)
