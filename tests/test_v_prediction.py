"""Prediction of v, zero terminal SNR and Min-SNR: on data ~ N(1.5, 0.4^2), of which all estimates are known, and by the
papers' formulas."""

import math
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch as th

from guided_diffusion_vae import assembly
from guided_diffusion_vae import gaussian_diffusion as gd
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SamplerConfig, create_process
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.run_record import refuse_contradictions
from guided_diffusion_vae.samplers import SPACINGS, sample, times_of
from guided_diffusion_vae.script_util import (
    LaterDiffusionConfig,
    ModelConfig,
    create_gaussian_diffusion,
    create_model_and_diffusion_vae,
)
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.vae_wrapper import VAEInterface

PIXEL = VAEInterface("pixel")
MEAN, STD = 1.5, 0.4
ZERO = {"predict_v": True, "zero_terminal_snr": True}
SCHEDULES = ["linear", "cosine"]

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's word for a NaN or Inf


def process(steps=200, **flags):
    return create_gaussian_diffusion(steps=steps, **flags)


def resolved(*flags):
    return parse_run(create_argparser(*NETWORK_SECTIONS, TrainConfig), [str(flag) for flag in flags])


def alpha_sigma(whole, t, like):
    """Of the whole process at any time; log(abar / (1 - abar)) is linear between integer times."""
    logit = th.from_numpy(whole.alphas_cumprod).logit().clamp(min=-120)
    low = t.long().clamp(max=len(logit) - 2)
    abar = th.lerp(logit[low], logit[low + 1], t.double() - low).sigmoid().view(-1, *[1] * (like.ndim - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def exact(whole, x, t):
    """E[x_0 | x_t] and E[noise | x_t] of the data, then v."""
    alpha, sigma = alpha_sigma(whole, t, x)
    gap = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x_start, noise = MEAN + alpha * STD**2 * gap, sigma * gap
    return x_start, noise, alpha * noise - sigma * x_start


def exact_v(whole):
    return lambda x, t, **cond: exact(whole, x, t)[2].to(x)


def noise_of(*shape, seed=0):
    return th.from_numpy(np.random.RandomState(seed).randn(*shape))


# ---- what v is -------------------------------------------------------------------------------------------------------


def test_upstreams_enum_keeps_its_numbers():
    assert [(kind.name, kind.value) for kind in gd.ModelMeanType] == [
        *(("PREVIOUS_X", 1), ("START_X", 2), ("EPSILON", 3), ("V", 4))
    ]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_perfect_network_has_no_error(zero, learn_sigma):
    """v = sqrt(abar) noise - sqrt(1 - abar) x_0 makes mse 0, and gives x_0 and the posterior back, at every time."""
    diffusion = process(predict_v=True, zero_terminal_snr=zero, learn_sigma=learn_sigma)
    t = th.arange(200)
    x_start, noise = noise_of(200, 3), noise_of(200, 3, seed=1)
    abar = th.from_numpy(diffusion.alphas_cumprod)[:, None]
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x_start
    out = th.cat([v, 0 * v], 1) if learn_sigma else v
    x_t = diffusion.q_sample(x_start, t, noise)
    terms = diffusion.training_losses(lambda x, t: out, x_start, t, noise=noise)
    assert terms["mse"].max() < 1e-12 and ("vb" in terms) == learn_sigma
    p = diffusion.p_mean_variance(lambda x, t: out, x_t, t, clip_denoised=False)
    th.testing.assert_close(p["pred_xstart"], x_start, rtol=0, atol=1e-6)
    th.testing.assert_close(p["mean"], diffusion.q_posterior_mean_variance(x_start, x_t, t)[0], rtol=0, atol=1e-6)
    guess = denoiser_of(diffusion, lambda x, t: out[t.long()])
    for time in (199, 198, 70, 0):
        one = slice(time, time + 1)
        th.testing.assert_close(guess.x_start(x_t[one], time), x_start[one], rtol=0, atol=1e-6)


def test_v_is_the_loss_that_salimans_and_ho_wrote():
    """|v error|^2 = (1 + SNR) |x_0 error|^2 (equation 12)."""
    diffusion, of_x = process(predict_v=True), process(predict_xstart=True)
    t, x_start, noise = th.arange(200), noise_of(200, 3), noise_of(200, 3, seed=1)
    x_t = diffusion.q_sample(x_start, t, noise)
    alpha, sigma = alpha_sigma(diffusion, t, x_t)
    guess = noise_of(200, 3, seed=2)
    v = diffusion.training_losses(lambda x, t: (alpha * x_t - guess) / sigma, x_start, t, noise=noise)["mse"]
    x = of_x.training_losses(lambda x, t: guess, x_start, t, noise=noise)["mse"]
    th.testing.assert_close(v, x / sigma[:, 0] ** 2, rtol=1e-4, atol=0)


def v_made_of(eps, whole):
    def v(x, t):
        alpha, sigma = alpha_sigma(whole, t, x)
        return (eps(x, t) - sigma * x) / alpha

    return v


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", assembly.GAUSSIAN_SAMPLERS)
def test_a_noise_model_and_the_v_model_made_of_it_draw_the_same(name, schedule):
    config = SamplerConfig(sampler=name, clip_denoised=False)
    flags = ["--diffusion_steps", 50, "--noise_schedule", schedule]
    of_eps, of_v = create_process(resolved(*flags), PIXEL), create_process(resolved(*flags, "--predict_v", True), PIXEL)

    def eps(x, t):
        return exact(of_eps, x, t)[1] + 0.02 * th.sin(3 * x)  # not quite the best one

    def draw(process, model):
        rng = th.Generator().manual_seed(0)
        normal = partial(_like, rng)
        run = assembly.create_sampler(config, process)
        return run(model, (4, 3), noise=noise_of(4, 3), noise_like=normal, model_kwargs={}, device="cpu")

    difference = draw(of_v, v_made_of(eps, of_v)) - draw(of_eps, eps)
    assert difference.abs().max() < 1e-6


def _like(generator, x):
    return th.randn(x.shape, generator=generator, dtype=x.dtype)


def test_the_reverse_of_ddim_agrees_too():
    of_eps, of_v, x = process(50), process(50, predict_v=True), noise_of(4, 3)
    for time in (0, 20, 48):
        t = th.full((4,), time)

        def eps(x, t):
            return exact(of_eps, x, t)[1]

        how = {"clip_denoised": False}
        wanted = of_eps.ddim_reverse_sample(eps, x, t, **how)["sample"]
        found = of_v.ddim_reverse_sample(v_made_of(eps, of_v), x, t, **how)["sample"]
        assert (found - wanted).abs().max() < 1e-6


# ---- sampling a world that is known ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", assembly.GAUSSIAN_SAMPLERS)
def test_every_sampler_recovers_a_gaussian(name, zero):
    """20,000 numbers: mean and spread are 1.5 and 0.4 within the solvers' and three standard errors."""
    run = resolved("--diffusion_steps", 400, "--predict_v", True, "--zero_terminal_snr", zero)
    config = SamplerConfig(sampler=name, clip_denoised=False)
    process = create_process(run, PIXEL, config)
    th.manual_seed(0)
    draw = assembly.create_sampler(config, process)
    x = draw(exact_v(process), (20, 1, 10, 100), noise=None, noise_like=None, model_kwargs={}, device="cpu")
    near = 0.02 if name == "heun" else 0.01
    assert abs(x.mean() - MEAN) < near and abs(x.std() - STD) < near, (x.mean(), x.std())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "unipc_3"])
def test_the_first_step_starts_from_pure_noise(solver, schedule, spacing):
    """x_T = 0 is the middle of all noise and ends at the mean exactly, however few the steps; x_T = 1 ends near one
    standard deviation above. Without a zero terminal SNR the middle is missed, for x_T should have been alpha 1.5."""
    whole, x = process(1000, noise_schedule=schedule, **ZERO), th.tensor([[0.0], [1.0]], dtype=th.float64)
    for steps in (2, 3, 5, 20):
        denoiser = denoiser_of(whole, exact_v(whole))
        middle, above = sample(denoiser, x, steps, solver=solver, spacing=spacing).flatten().tolist()
        assert middle == pytest.approx(MEAN, abs=1e-9), steps
    assert above - middle == pytest.approx(STD, abs=0.01 if spacing == "logsnr" else 0.04)
    plain = process(1000, predict_v=True)
    missed = sample(denoiser_of(plain, exact_v(plain)), x, 20, solver=solver, spacing=spacing)[0].item()
    assert abs(missed - MEAN) > 1e-3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heun_starts_from_pure_noise(schedule, spacing):
    """Its steps are not exact for a constant guess, but their error falls with order 2, to the true mean."""
    whole = process(1000, noise_schedule=schedule, **ZERO)
    denoiser = denoiser_of(whole, exact_v(whole))
    x = th.zeros(1, 1, dtype=th.float64)
    coarse, fine = (abs(sample(denoiser, x, n, solver="heun", spacing=spacing).item() - MEAN) for n in (40, 160))
    assert abs(math.log(coarse / fine) / math.log(159 / 39) - 2) < 0.1 and coarse < 4e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_starts_from_pure_noise(schedule):
    """As above, and with the tables' float32."""
    flags = {"noise_schedule": schedule, **ZERO}
    whole = process(1000, **flags)
    for steps in (2, 5, 20):
        spaced, x = process(1000, timestep_respacing=str(steps), **flags), th.zeros(1, 1, dtype=th.float64)
        how = {"noise": x, "clip_denoised": False, "device": "cpu"}
        end = spaced.ddim_sample_loop(exact_v(whole), (1, 1), **how).item()
        assert end == pytest.approx(MEAN, abs=1e-5), steps


def test_ddim_walks_back_to_the_noise_it_came_from():
    """Data (x - 1.5) / 0.4 standard deviations from the mean are that noise at the end."""
    diffusion, x = process(1000, **ZERO), th.tensor([[0.7], [1.5], [2.1]], dtype=th.float64)
    wanted = (x - MEAN) / STD
    for time in range(1000):
        t = th.full((3,), time)
        x = diffusion.ddim_reverse_sample(exact_v(diffusion), x, t, clip_denoised=False)["sample"]
    th.testing.assert_close(x, wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 3, 20, 500])
def test_times_begin_with_pure_noise_and_go_on_where_data_begin(schedule, num_steps):
    denoiser = denoiser_of(process(1000, noise_schedule=schedule, **ZERO), None)
    for spacing in SPACINGS:
        times = times_of(denoiser, num_steps, spacing)
        first, *others = denoiser.points(times)
        assert (times[0], times[-1]) == (999, 0) and (np.diff(times) < 0).all()
        assert (first.seen, first.alpha, first.sigma, first.of_x, first.of_output) == (999, 0, 1, 0, -1)
        assert all(0 < point.alpha < 1 for point in others)
    even = denoiser.log_snr(times_of(denoiser, num_steps, "logsnr"))
    np.testing.assert_allclose(np.diff(even), (even[-1] - even[0]) / (num_steps - 1), rtol=1e-9)
    assert even[0] == -5


# ---- zero terminal SNR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [20, 1000])
def test_the_last_step_is_pure_noise_and_the_first_one_stays(schedule, steps):
    """Algorithm 1 of Lin et al.: sqrt(abar) is shifted and scaled; nothing else."""
    plain, zero = process(steps, noise_schedule=schedule), process(steps, noise_schedule=schedule, **ZERO)
    assert zero.alphas_cumprod[-1] == 0 and zero.betas[-1] == 1
    assert zero.alphas_cumprod[0] == plain.alphas_cumprod[0]
    before, after = np.sqrt(plain.alphas_cumprod), np.sqrt(zero.alphas_cumprod)
    slope = after[0] / (before[0] - before[-1])
    np.testing.assert_allclose(after, slope * (before - before[-1]), rtol=0, atol=1e-12)
    assert (np.diff(after) < 0).all()


def test_training_sees_pure_noise_at_the_last_time():
    diffusion, seen = process(**ZERO), []
    x_start, noise = noise_of(2, 3).float(), noise_of(2, 3, seed=1).float()
    t = th.tensor([199, 198])

    def model(x, t):
        seen.append(x)
        return th.zeros_like(x)

    mse = diffusion.training_losses(model, x_start, t, noise=noise)["mse"]
    assert th.equal(seen[0][0], noise[0]) and not th.equal(seen[0][1], noise[1])
    th.testing.assert_close(mse[0], x_start[0].square().mean())  # v = -x_0 there


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("target", ["predict_v", "predict_xstart"])
@pytest.mark.parametrize("respacing", ["", "7", "3,4"])
def test_all_is_finite(target, learn_sigma, respacing):
    flags = {target: True, "learn_sigma": learn_sigma, "timestep_respacing": respacing, "zero_terminal_snr": True}
    diffusion, x = process(30, **flags), noise_of(2, 3, 4, 4).float()

    def model(x, t):
        return th.cat([x.tanh(), x.sin()], 1) if learn_sigma else x.tanh()

    def cond_fn(x, t):
        return -x

    losses = [diffusion, process(30, **flags, min_snr_gamma=5.0), process(30, **flags, use_kl=True)]
    found = {}
    for time in range(diffusion.num_timesteps):
        t = th.full((2,), time)
        for clip in (False, True):
            for name, guided in (("p_sample", None), ("ddim_sample", None), ("p_sample", cond_fn)):
                found[name, time, clip] = getattr(diffusion, name)(model, x, t, clip, cond_fn=guided)
            found["eta", time, clip] = diffusion.ddim_sample(model, x, t, clip, cond_fn=cond_fn, eta=1.0)
            found["reverse", time, clip] = diffusion.ddim_reverse_sample(model, x, t, clip)
        for i, one in enumerate(losses):
            found["loss", time, i] = one.training_losses(model, x, t)
    found["bpd"] = diffusion.calc_bpd_loop(model, x)
    assert not [(key, name) for key, terms in found.items() for name, v in terms.items() if not v.isfinite().all()]
    assert (found["bpd"]["prior_bpd"] == 0).all()  # pure noise is the prior


def test_pure_noise_is_not_guided_by_a_gradient():
    """It tells nothing of a label; at the time before, x_0 moves by (1 - abar) / sqrt(abar) g."""
    diffusion, x = process(30, **ZERO), noise_of(2, 3)
    for time in (29, 28):
        t = th.full((2,), time)
        plain, guided = (diffusion.ddim_sample(exact_v(diffusion), x, t, False, cond_fn=g) for g in (None, _ones))
        moved = guided["pred_xstart"] - plain["pred_xstart"]
        abar = diffusion.alphas_cumprod[time]
        wanted = (1 - abar) / math.sqrt(abar) if abar else 0.0
        th.testing.assert_close(moved, th.full_like(x, wanted), rtol=1e-4, atol=0)


def _ones(x, t):
    return th.ones_like(x)


@pytest.mark.parametrize("text", ["", "250", "2", "10,10,20", "1000"])
def test_a_respaced_walk_begins_at_pure_noise(text):
    diffusion = process(1000, timestep_respacing=text, **ZERO)
    assert diffusion.timestep_map[-1] == 999 and diffusion.alphas_cumprod[-1] == 0 and diffusion.betas[-1] == 1


@pytest.mark.parametrize(
    "text, last, instead", [("ddim50", 980, 50), ("ddim250", 996, 250), ("1", 0, 2), ("9,1", 500, 10)]
)
def test_a_respaced_walk_that_would_not_is_refused(text, last, instead):
    words = (
        f"--timestep_respacing {text} begins at step {last}, .*--zero_terminal_snr True is step 999: give {instead},"
    )
    with pytest.raises(UserError, match=words):
        process(1000, timestep_respacing=text, **ZERO)
    assert process(1000, timestep_respacing=str(instead), **ZERO).timestep_map[-1] == 999


# ---- Min-SNR ---------------------------------------------------------------------------------------------------------

WEIGHTS = {  # of Hang et al., by what is predicted
    "predict_xstart": lambda snr: min(snr, 5),
    "": lambda snr: min(snr, 5) / snr,
    "predict_v": lambda snr: min(snr, 5) / (snr + 1),
}


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("target", WEIGHTS)
def test_weights_are_the_papers(target, learn_sigma):
    """They multiply mse, and so its part of the loss; the variational part stays."""
    flags = {"learn_sigma": learn_sigma, **({target: True} if target else {})}
    plain, weighted = process(**flags), process(**flags, min_snr_gamma=5.0)
    t, x_start, noise = th.arange(200), noise_of(200, 3), noise_of(200, 3, seed=1)

    def model(x, t):
        return th.cat([x.cos(), x.sin()], 1) if learn_sigma else x.cos()

    before, after = (one.training_losses(model, x_start, t, noise=noise) for one in (plain, weighted))
    wanted = th.tensor([WEIGHTS[target](abar / (1 - abar)) for abar in plain.alphas_cumprod], dtype=th.float64)
    th.testing.assert_close(after["mse"] / before["mse"], wanted, rtol=1e-6, atol=0)
    assert set(after) == set(before)
    rest = before["vb"] if learn_sigma else 0 * wanted
    th.testing.assert_close(after["loss"], after["mse"] + rest, rtol=1e-12, atol=0)
    if learn_sigma:
        assert th.equal(after["vb"], before["vb"])


def test_the_weighted_losses_of_one_guess_are_one_loss():
    """min(SNR, gamma) |x_0 error|^2, whether the guess is said as x_0, as noise or as v."""
    t, x_start, noise = th.arange(200), noise_of(200, 3), noise_of(200, 3, seed=1)
    guess = noise_of(200, 3, seed=2)
    found = []
    for target in WEIGHTS:
        one = process(min_snr_gamma=5.0, **({target: True} if target else {}))
        x_t = one.q_sample(x_start, t, noise)
        alpha, sigma = alpha_sigma(one, t, x_t)
        said = {"predict_xstart": guess, "": (x_t - alpha * guess) / sigma, "predict_v": (alpha * x_t - guess) / sigma}
        found.append(one.training_losses(lambda x, t, said=said[target]: said, x_start, t, noise=noise)["loss"])
    for other in found[1:]:
        th.testing.assert_close(other, found[0], rtol=1e-4, atol=0)


def test_weights_at_pure_noise():
    abar = np.array([0.9, 0.5, 0.0])  # SNR 9, 1, 0
    found = {kind.name: gd.mse_weights(abar, 5.0, kind).tolist() for kind in gd.ModelMeanType if kind.value > 1}
    assert found["START_X"] == pytest.approx([5, 1, 0])
    assert found["EPSILON"] == pytest.approx([5 / 9, 1, 1])
    assert found["V"] == pytest.approx([0.5, 0.5, 0])


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"predict_v": True, "predict_xstart": True}, "--predict_v True and --predict_xstart True: "),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr True: .* add --predict_v True or --predict_xstart True"),
        ({"min_snr_gamma": 5.0, "use_kl": True}, "--min_snr_gamma 5.0 .* --use_kl True"),
        ({"min_snr_gamma": -1.0}, "--min_snr_gamma is -1.0; "),
        ({"min_snr_gamma": math.nan}, "--min_snr_gamma is nan; "),
        ({"steps": 1, "noise_schedule": "cosine", **ZERO}, "--diffusion_steps is 1; --zero_terminal_snr True needs"),
    ],
)
def test_what_cannot_be_combined_is_one_line(flags, words):
    with pytest.raises(ValueError, match=words) as error:
        process(**flags)
    assert "\n" not in str(error.value)


def test_a_recipe_or_flags_choose_them(tmp_path):
    assert create_process(resolved(), PIXEL).model_mean_type == gd.ModelMeanType.EPSILON
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("predict_v: true\nmin_snr_gamma: 5\n")
    run = resolved("--config", recipe, "--zero_terminal_snr", True, "--learn_sigma", True)
    wanted = {"predict_v": True, "zero_terminal_snr": True, "min_snr_gamma": 5.0}
    assert wanted.items() <= run.as_dict().items()  # what run.yaml keeps
    for config in (None, SamplerConfig(num_steps=5), SamplerConfig(sampler="unipc")):
        made = create_process(run, PIXEL, config)
        assert (made.model_mean_type, made.ends_in_pure_noise, made.min_snr_gamma) == (gd.ModelMeanType.V, True, 5.0)
    assert assembly.ignored_settings(run) == []


@pytest.mark.parametrize("name, other", [("predict_v", False), ("zero_terminal_snr", False), ("min_snr_gamma", 3.0)])
def test_sampling_refuses_others_than_training_had(name, other):
    trained = {"predict_v": True, "zero_terminal_snr": True, "min_snr_gamma": 5.0}
    names = [field.name for section in NETWORK_SECTIONS for field in fields(section)]
    refuse_contradictions(resolved(f"--{name}", trained[name]), trained, names)
    with pytest.raises(UserError, match=f"--{name} is {other}, but the checkpoint was trained with {trained[name]}"):
        refuse_contradictions(resolved(f"--{name}", other), trained, names)


def test_a_flow_does_not_read_them():
    run = resolved("--process", "flow", "--predict_v", True, "--zero_terminal_snr", True, "--min_snr_gamma", 5)
    assert assembly.ignored_settings(run) == ["min_snr_gamma", "predict_v", "zero_terminal_snr"]


def test_the_pair_of_latent_guided_diffusion_takes_them():
    network = {field.name: field.default for field in fields(ModelConfig)} | {"image_size": 16, "num_channels": 32}
    network |= {"channel_mult": "1,2", "num_res_blocks": 1}
    gaussian = {"learn_sigma": False, "diffusion_steps": 20, "noise_schedule": "cosine", "timestep_respacing": ""}
    gaussian |= dict.fromkeys(("use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"), False)
    made = create_model_and_diffusion_vae(PIXEL, **network, **gaussian, **ZERO)[1]
    assert made.model_mean_type == gd.ModelMeanType.V and made.alphas_cumprod[-1] == 0
    assert {field.name for field in fields(LaterDiffusionConfig)} == {*ZERO, "min_snr_gamma"}
