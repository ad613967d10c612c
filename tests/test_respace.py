"""Which steps a respacing keeps, and what the network sees of them."""

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae.respace import SpacedDiffusion, space_timesteps
from guided_diffusion_vae.script_util import create_gaussian_diffusion

FACTS = golden("adm_golden.json")


def test_kept_steps_are_upstreams():
    wanted = golden("adm_respacing.json")
    for text, kept in wanted["steps_of_1000"].items():
        assert space_timesteps(1000, text) == set(kept), text
    for text in wanted["refused"]:
        with pytest.raises(ValueError):
            space_timesteps(1000, text)


@pytest.mark.parametrize("key", FACTS["respacing"])
def test_kept_steps_of_the_second_set(key):
    wanted, (total, text) = FACTS["respacing"][key], key.split("|")
    counts = [int(text[1:-1])] if text.startswith("[") else text
    kept = sorted(space_timesteps(int(total), counts))
    assert (len(kept), sum(kept)) == (wanted["n"], wanted["sum"])
    assert kept[: len(wanted["first"])] == wanted["first"] and kept[-len(wanted["last"]) :] == wanted["last"]


@pytest.mark.parametrize("key", FACTS["respacing_errors"])
def test_refusals_of_the_second_set(key):
    """A number is how many steps the string keeps after all."""
    outcome, (total, text) = FACTS["respacing_errors"][key], key.split("|")
    if isinstance(outcome, int):
        assert len(space_timesteps(int(total), text)) == outcome
    else:
        with pytest.raises(ValueError):
            space_timesteps(int(total), text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ddim300", "exactly 300 steps .*ddim300 does not fit 1000 steps; give ddim250 or ddim334, or 300 without"),
        ("ddimx", "--timestep_respacing is 'ddimx'"),
        ("2000", "section of 1000 steps into 2000"),
        ("-5", "--timestep_respacing asks for -5 steps"),
        ("0", "no step is left.*--timestep_respacing"),
    ],
)
def test_a_refusal_names_the_flag(text, words):
    with pytest.raises(ValueError, match=words):
        create_gaussian_diffusion(timestep_respacing=text)


def test_spaced_tables_are_upstreams_and_keep_alpha_bar():
    spaced, whole = create_gaussian_diffusion(timestep_respacing="10"), create_gaussian_diffusion()
    facts = FACTS["spaced_linear1000_10"]
    assert spaced.timestep_map == facts["timestep_map"] and len(facts) == 7
    for name, wanted in facts.items():
        np.testing.assert_allclose(getattr(spaced, name), wanted, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("steps, rescale, wanted", [(1000, False, [0, 444, 999]), (500, True, [0, 444, 998])])
def test_the_model_and_cond_fn_see_original_times(steps, rescale, wanted):
    """Rescaled times are of 1000, whatever the process has."""
    spaced = create_gaussian_diffusion(steps=steps, timestep_respacing="10", rescale_timesteps=rescale)
    assert isinstance(spaced, SpacedDiffusion)
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return 0 * x

    x, t = th.zeros(3, 1), th.tensor([0, 4, 9])
    out = spaced.p_mean_variance(model, x, t)
    spaced.condition_mean(model, out, x, t)
    spaced.condition_score(model, out, x, t)
    spaced.training_losses(model, x, t)
    assert seen == [wanted] * 4


def test_the_map_is_uploaded_once():
    spaced = create_gaussian_diffusion(timestep_respacing="10")
    x, t, model = th.zeros(1, 1), th.zeros(1, dtype=th.long), lambda x, t: x
    spaced.p_mean_variance(model, x, t)
    (first,) = spaced._map_on_device.values()
    spaced.p_mean_variance(model, x, t)
    assert next(iter(spaced._map_on_device.values())) is first


@pytest.mark.parametrize("flags", [{"timestep_respacing": "1"}, {"steps": 1, "noise_schedule": "cosine"}])
def test_one_step_is_enough(flags):
    """Upstream raises IndexError. With one step the sample is the mean: the guess of x_0 itself."""
    diffusion = create_gaussian_diffusion(predict_xstart=True, **flags)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        x = loop(lambda x, t: th.full_like(x, 0.3), (3, 1), device="cpu")
        np.testing.assert_allclose(x, 0.3, rtol=1e-6)
