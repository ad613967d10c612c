"""Classifier-free guidance on a world where the guided answer is known."""

import numpy as np
import pytest
import torch as th

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.guidance import GuidanceConfig, GuidedModel, guide
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


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"cfg_interval": "0.5,0.1"}, "must rise"),
        ({"cfg_interval": "early"}, "one number or two"),
        ({"cfg_interval": "0.1,1.1"}, "between 0 .noise. and 1"),
        ({"cfg_channels": "first5"}, "all, first3, first4"),
        ({"cfg_scale": float("nan")}, "--cfg_scale is nan"),
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
