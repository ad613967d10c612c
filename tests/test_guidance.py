"""Classifier-free guidance and autoguidance on worlds where the guided answer is known."""

import math

import numpy as np
import pytest
import torch as th
from test_samplers import gaussian, network_of, noise_of

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.denoiser import denoiser_of
from guided_diffusion_vae.flow_matching import PATHS, FlowMatching
from guided_diffusion_vae.guidance import GuidanceConfig, GuidedModel, guide
from guided_diffusion_vae.samplers import sample
from guided_diffusion_vae.script_util import create_gaussian_diffusion

NULL = 3


class Means:
    """Predicts the mean of the class, 0 for none; counts how many samples it was asked for."""

    null_label = NULL

    def __init__(self, channels=5):
        self.values = th.arange(4.0)[:, None].expand(4, channels) + th.arange(channels) / 10
        self.values = th.where(th.arange(4)[:, None] == NULL, 0.0, self.values + 1)
        self.asked = 0

    def __call__(self, x, t, y):
        self.asked += len(x)
        return self.values[y][:, :, None, None].expand(-1, -1, *x.shape[2:])


def place(t):
    return t


def asked(model, *, t=0.5, **settings):
    x, y = th.zeros(2, 5, 2, 2), th.tensor([0, 2])
    return GuidedModel(model, place_on_path=place, **settings)(x, th.full((2,), t), y)[:, :, 0, 0]


def test_the_label_is_exaggerated_from_none():
    """none + w (conditional - none) with none = 0 is w times the class's mean."""
    model = Means()
    assert th.allclose(asked(model, scale=4.0), 4 * model.values[[0, 2]])
    assert th.equal(asked(model, scale=1.0), model.values[[0, 2]])
    assert th.equal(asked(model, scale=0.0), th.zeros(2, 5))


@pytest.mark.parametrize("channels, guided", [("all", 5), ("first3", 3), ("first4", 4)])
def test_the_other_channels_keep_the_conditional_prediction(channels, guided):
    model = Means()
    config = GuidanceConfig(cfg_scale=3.0, cfg_channels=channels)
    out = guide(model, FlowMatching(), config)(th.zeros(2, 5, 2, 2), th.full((2,), 0.5), th.tensor([0, 2]))[:, :, 0, 0]
    factor = th.where(th.arange(5) < guided, 3.0, 1.0)
    assert th.allclose(out, factor * model.values[[0, 2]])


def test_what_is_predicted_beside_the_latent_is_not_guided():
    """A learnt variance stands behind the C channels of x."""
    model = Means(channels=6)
    x, y = th.zeros(2, 3, 2, 2), th.tensor([0, 2])
    out = GuidedModel(model, scale=2.0, place_on_path=place)(x, th.full((2,), 0.5), y)[:, :, 0, 0]
    assert th.allclose(out, th.tensor([2.0, 2, 2, 1, 1, 1]) * model.values[[0, 2]])


@pytest.mark.parametrize("t, inside", [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)])
def test_outside_the_interval_the_label_is_asked_alone(t, inside):
    model = Means()
    out = asked(model, t=t, scale=2.0, interval=(0.25, 0.75))
    assert th.allclose(out, (2 if inside else 1) * model.values[[0, 2]])
    assert model.asked == (4 if inside else 2)


@pytest.mark.parametrize(
    "process, seen, places",
    [
        (FlowMatching(), [0.0, 0.25, 1.0], [0.0, 0.25, 1.0]),
        (FlowMatching(time_scale=1000.0), [0.0, 250.0, 1000.0], [0.0, 0.25, 1.0]),
        (create_gaussian_diffusion(steps=200), [200.0, 150.0, 0.0], [0.0, 0.25, 1.0]),
        (create_gaussian_diffusion(steps=200, timestep_respacing="10"), [200.0, 150.0, 0.0], [0.0, 0.25, 1.0]),
        (create_gaussian_diffusion(steps=200, rescale_timesteps=True), [1000.0, 750.0, 0.0], [0.0, 0.25, 1.0]),
    ],
)
def test_every_process_knows_where_its_times_lie(process, seen, places):
    assert process.place_on_path(th.tensor(seen)).tolist() == places


def test_the_times_that_a_respaced_process_shows_are_placed_right():
    """The network is asked for times of the original process: from noise (place near 0) to data (1)."""
    process = create_gaussian_diffusion(steps=100, noise_schedule="cosine", timestep_respacing="5")
    seen = []

    def model(x, t):
        seen.append(process.place_on_path(t)[0].item())
        return th.zeros_like(x)

    process.p_sample_loop(model, (1, 1, 2, 2), device="cpu")
    assert seen == sorted(seen) and seen[0] == pytest.approx(0.01) and seen[-1] == 1.0


def test_guided_flow_moves_the_mean_by_the_scale():
    """Every class is a point c_y, none is 0: the velocity is (c - x) / (1 - t), so guidance ends at w c_y exactly."""
    centres = th.tensor([1.0, -2.0, 0.5, 0.0])

    class Points:
        null_label = NULL

        def __call__(self, x, t, y):
            return (centres[y].view(-1, 1, 1, 1) - x) / (1 - t).clamp(min=1e-6).view(-1, 1, 1, 1)

    flow = FlowMatching()
    model = guide(Points(), flow, GuidanceConfig(cfg_scale=3.0))
    noise = th.from_numpy(np.random.RandomState(0).randn(3, 4, 2, 2)).float()
    out = flow.sample_loop(model, noise, 50, model_kwargs={"y": th.tensor([0, 1, 2])})
    assert out.mean((1, 2, 3)).tolist() == pytest.approx([3.0, -6.0, 1.5], abs=1e-4)


# ---- every class a Gaussian of the same spread, and none, too: then so is the guided one -----------------------------

CENTRES = th.tensor([[1.0, -2.0, 0.5], [-0.3, 0.4, 2.0], [0.0, 0.8, -1.0], [0.2, 0.1, 0.3]], dtype=th.float64)
SPREAD = 0.5
PROCESSES = {"gaussian": gaussian(), "gaussian-x_start": gaussian("cosine", kind="START_X")}
PROCESSES |= {f"flow-{path}": FlowMatching(path_type=path) for path in PATHS}
PROCESSES |= {"flow-score": FlowMatching(prediction="score", time_scale=1000.0)}


class Gaussians:
    """The exact network of N(centre_y, spread^2): x_start is centre + alpha spread^2 / variance (x - alpha centre).

    So it is the centre times a number of the time plus x times another: what is predicted is affine in the centre.
    """

    null_label = NULL

    def __init__(self, process, centres=CENTRES, spread=SPREAD):
        self.centres, self.spread, self.asked = centres, spread, 0
        kind = "START_X" if process is PROCESSES["gaussian-x_start"] else "EPSILON"
        schedule = "cosine" if kind == "START_X" else "linear"
        self.network = network_of(process, kind, schedule, guess=self.guess)

    def guess(self, x, alpha, sigma, y):
        centre = self.centres[y]
        return centre + alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2) * (x - alpha * centre)

    def __call__(self, x, t, y):
        self.asked += len(x)
        return self.network(x, t, y=y)


def walked(process, model, y, solver="unipc", **how):
    denoiser = denoiser_of(process, model, model_kwargs={"y": y})
    how = {"spacing": "logsnr", "num_steps": 30, "solver": solver, **how}
    return sample(denoiser, noise_of(len(y)), how.pop("num_steps"), **how), denoiser


def end_of_the_ode(denoiser, noise, centre):
    """The ODE keeps (x - alpha centre) / sqrt(alpha^2 SPREAD^2 + sigma^2); then the guess at the data end."""
    first, last = denoiser.points(np.array(denoiser.interval))
    before, after = (math.hypot(point.alpha * SPREAD, point.sigma) for point in (first, last))
    kept = (noise * math.hypot(first.alpha, first.sigma) - first.alpha * centre) / before
    return centre + last.alpha * SPREAD**2 / after * kept


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_cfg_leads_to_the_gaussian_it_aims_at(name, scale):
    """Guidance moves the centre to none + w (centre_y - none) and leaves the spread, at every time: so at the end."""
    process, y = PROCESSES[name], th.tensor([0, 1, 2] * 4)
    model = Gaussians(process)
    aim = CENTRES[NULL] + scale * (CENTRES - CENTRES[NULL])
    guided, denoiser = walked(process, guide(model, process, GuidanceConfig(cfg_scale=scale)), y)
    there, _ = walked(process, Gaussians(process, aim), y)
    assert th.allclose(guided, there, atol=1e-6)
    assert th.allclose(guided, end_of_the_ode(denoiser, noise_of(len(y)), aim[y]), atol=0.02)


@pytest.mark.parametrize("name", PROCESSES)
def test_autoguidance_leads_away_from_the_weaker_network(name):
    """Where the weaker one puts the centres a little off, w = 2 mirrors them: weak + 2 (strong - weak)."""
    process, y = PROCESSES[name], th.tensor([0, 1, 2, 3] * 3)
    strong, weak = Gaussians(process), Gaussians(process, CENTRES + th.tensor([0.3, -0.2, 0.1]))
    config = GuidanceConfig(autoguide_path="weaker.pt")
    guided, denoiser = walked(process, guide(strong, process, config, weak), y)
    aim = CENTRES - th.tensor([0.3, -0.2, 0.1])
    assert th.allclose(guided, walked(process, Gaussians(process, aim), y)[0], atol=1e-6)
    assert th.allclose(guided, end_of_the_ode(denoiser, noise_of(len(y)), aim[y]), atol=0.02)
    assert strong.asked == weak.asked


def test_autoguidance_narrows_what_a_blurred_network_spreads():
    """With the centre at 0, x_start is k x: k_weak + w (k_strong - k_weak), as one calculates by hand."""
    process = FlowMatching()
    strong, weak = (Gaussians(process, 0 * CENTRES, spread) for spread in (0.5, 1.0))
    guided = guide(strong, process, GuidanceConfig(autoguide_path="w.pt", autoguide_scale=3.0), weak)
    x, half = th.ones(2, 3, dtype=th.float64), th.full((2,), 0.5)
    k_strong, k_weak = 0.5 * 0.25 / (0.25 * 0.25 + 0.25), 0.5 / (0.25 + 0.25)  # 0.4 and 1
    out = process.convert(guided(x, half, th.zeros(2, dtype=th.long)), x, half, source="velocity", target="x_start")
    assert (k_strong, k_weak) == (0.4, 1.0) and th.allclose(out, -0.8 * x)


def test_autoguidance_needs_no_label_and_holds_to_interval_and_channels():
    def strong(x, t):
        return x + 1

    def weak(x, t):
        return x - 1

    config = GuidanceConfig(autoguide_path="w.pt", autoguide_scale=3.0, cfg_interval="0.5", cfg_channels="first3")
    model = guide(strong, FlowMatching(), config, weak)
    out = model(th.zeros(3, 4), th.tensor([0.2, 0.5, 1.0]))
    assert out.tolist() == [[1, 1, 1, 1], [5, 5, 5, 1], [5, 5, 5, 1]]  # -1 + 3 (1 - (-1)) = 5
    config = GuidanceConfig(autoguide_path="w.pt", autoguide_scale=1.0)
    assert guide(strong, FlowMatching(), config) is strong


# ---- the spread of what is predicted ---------------------------------------------------------------------------------


def respread(phi, cond, none, *, scale=3.0, x=None, **settings):
    class Fixed:
        null_label = NULL

        def __call__(self, x, t, y):
            return th.cat([none if part[0] == NULL else cond for part in y.split(len(cond))])

    model = GuidedModel(Fixed(), scale=scale, place_on_path=place, rescale=phi, **settings)
    return model(cond if x is None else x, th.full((len(cond),), 0.5), th.zeros(len(cond), dtype=th.long))


def test_rescaling_gives_back_the_spread_of_each_sample():
    cond, none = (th.from_numpy(np.random.RandomState(i).randn(5, 4, 3, 3)) for i in range(2))
    assert th.allclose(respread(1.0, cond, none).std((1, 2, 3)), cond.std((1, 2, 3)))
    plain = none + 3 * (cond - none)
    assert th.equal(respread(0.0, cond, none), plain)
    half = respread(0.5, cond, none)
    assert th.allclose(half, (respread(1.0, cond, none) + plain) / 2)
    assert (half.std((1, 2, 3)) > cond.std((1, 2, 3)) + 0.5).all()


def test_rescaling_by_hand():
    """[1, -1] guided by 3 away from 0 is [3, -3]: with phi = 0.7 times 0.7 / 3 + 0.3 = 8 / 15."""
    cond = th.tensor([[1.0, -1.0]])
    assert th.allclose(respread(0.7, cond, 0 * cond), cond * 1.6)
    flat = th.tensor([[2.0, 2.0]])
    assert th.equal(respread(1.0, flat, 0 * flat), 3 * flat)  # no spread to give back, and no division by it


def test_rescaling_leaves_the_interval_and_the_variance_alone():
    cond, none = (th.from_numpy(np.random.RandomState(i).randn(2, 6, 2, 2)) for i in range(2))
    out = respread(1.0, cond, none, x=cond[:, :3])
    assert th.equal(out[:, 3:], cond[:, 3:])  # a learnt variance behind the 3 channels of x
    assert th.allclose(out[:, :3].std((1, 2, 3)), cond[:, :3].std((1, 2, 3)))
    assert th.equal(respread(1.0, cond, none, interval=(0.6, 1.0)), cond)
    part = respread(1.0, cond, none, channels="first4")
    assert th.allclose(part.std((1, 2, 3)), cond.std((1, 2, 3))) and not th.allclose(part[:, 4:], cond[:, 4:])


def test_autoguidance_is_rescaled_to_the_stronger_one():
    values = th.from_numpy(np.random.RandomState(0).randn(2, 2, 3, 4, 4))
    config = GuidanceConfig(autoguide_path="w.pt", autoguide_scale=4.0, cfg_rescale=1.0)
    model = guide(lambda x, t: values[0], FlowMatching(), config, lambda x, t: values[1])
    out = model(values[0], th.full((2,), 0.5))
    assert th.allclose(out.std((1, 2, 3)), values[0].std((1, 2, 3)))
    aim = values[1] + 4 * (values[0] - values[1])
    assert th.allclose(out / out.std((1, 2, 3), keepdim=True), aim / aim.std((1, 2, 3), keepdim=True))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"cfg_interval": "0.5,0.1"}, "must rise"),
        ({"cfg_interval": "early"}, "one number or two"),
        ({"cfg_interval": "0.1,1.1"}, "between 0 .noise. and 1"),
        ({"cfg_channels": "first5"}, "all, first3, first4"),
        ({"cfg_scale": float("nan")}, "--cfg_scale is nan"),
        ({"autoguide_scale": float("inf")}, "--autoguide_scale is inf"),
        ({"classifier_scale": float("nan")}, "--classifier_scale is nan; it must be a number, 0 for no"),
        ({"cfg_rescale": 1.5}, "--cfg_rescale is 1.5; it must be between 0"),
        ({"cfg_scale": 2.0, "autoguide_path": "w.pt"}, "--cfg_scale 2.0 and --autoguide_path w.pt .* give one"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        GuidanceConfig(**settings)


def test_one_number_is_where_guidance_starts():
    assert GuidanceConfig(cfg_interval="0.125").interval == (0.125, 1.0)


def test_no_guidance_is_the_model_itself():
    model = Means()
    assert guide(model, FlowMatching(), GuidanceConfig()) is model
