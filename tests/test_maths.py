"""Losses, respacing, resampling and the small pieces, against the official code's numbers and known answers."""

import numpy as np
import pytest
import torch as th
from helpers import golden

from guided_diffusion_vae import losses, nn, resample
from guided_diffusion_vae.respace import SpacedDiffusion, space_timesteps
from guided_diffusion_vae.script_util import create_gaussian_diffusion


def close(actual, wanted, tol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=tol, atol=tol)


def test_helpers_are_upstreams():
    data = golden("adm_helpers.npz")
    m1, v1, m2, v2, x = (th.from_numpy(data[key]) for key in ("m1", "v1", "m2", "v2", "dgl_x"))
    close(losses.normal_kl(m1, v1, m2, v2), data["normal_kl"])
    close(losses.discretized_gaussian_log_likelihood(x, means=m2, log_scales=0.3 * v2), data["dgl"])
    for key, dim in (("emb_even", 16), ("emb_odd", 9)):
        close(nn.timestep_embedding(th.from_numpy(data["emb_t"]), dim), data[key])


def test_embedding_facts():
    facts = golden("adm_golden.json")
    for dim in (6, 7):
        wanted = np.array(facts[f"timestep_embedding_dim{dim}"])
        t = np.round(np.arccos(np.clip(wanted[:, 0], -1, 1)), 4)  # cos comes first: t itself, for t up to pi
        for row, value in zip(wanted, t, strict=True):
            if value in (0.0, 1.0, 3.0):
                close(nn.timestep_embedding(th.tensor([value]), dim)[0], row, 1e-6)


def test_kl_of_a_gaussian_with_itself_is_zero_and_is_known_otherwise():
    zero = th.zeros(3)
    assert th.equal(losses.normal_kl(zero, zero, zero, zero), zero)
    close(losses.normal_kl(th.tensor([1.0]), 0.0, 0.0, 0.0), [0.5])
    with pytest.raises(AssertionError):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_bins_hold_all_the_mass():
    """The probabilities of the 256 levels sum to one."""
    levels = th.linspace(-1, 1, 256, dtype=th.float64)
    scale = th.full((256,), -1.5, dtype=th.float64)
    log_p = losses.discretized_gaussian_log_likelihood(levels, means=th.full_like(levels, 0.3), log_scales=scale)
    close(log_p.exp().sum(), 1.0, 1e-6)


# ---- respacing -------------------------------------------------------------------------------------------------------


def test_kept_steps_are_upstreams():
    wanted = golden("adm_respacing.json")
    for text, kept in wanted["steps_of_1000"].items():
        assert sorted(space_timesteps(1000, text)) == kept, text
    for text in wanted["refused"]:
        with pytest.raises(ValueError):
            space_timesteps(1000, text)


def test_kept_steps_facts():
    facts = golden("adm_golden.json")
    for key, wanted in facts["respacing"].items():
        total, text = key.split("|")
        counts = [int(text[1:-1])] if text.startswith("[") else text
        kept = sorted(space_timesteps(int(total), counts))
        assert (len(kept), sum(kept)) == (wanted["n"], wanted["sum"]), key
        assert kept[: len(wanted["first"])] == wanted["first"] and kept[-len(wanted["last"]) :] == wanted["last"]
    for key, outcome in facts["respacing_errors"].items():  # a number is how many steps it keeps after all
        total, text = key.split("|")
        if isinstance(outcome, int):
            assert len(space_timesteps(int(total), text)) == outcome
        else:
            with pytest.raises(ValueError):
                space_timesteps(int(total), text)


def test_spaced_betas_are_upstreams_and_keep_alpha_bar():
    spaced = create_gaussian_diffusion(timestep_respacing="10")
    np.testing.assert_allclose(spaced.betas, golden("adm_golden.json")["spaced_linear1000_10"]["betas"], rtol=1e-12)
    whole = create_gaussian_diffusion()
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timestep_map], rtol=1e-10)


@pytest.mark.parametrize("rescale, wanted", [(False, [0, 444, 999]), (True, [0, 444, 999])])
def test_the_model_and_cond_fn_see_original_times(rescale, wanted):
    spaced = create_gaussian_diffusion(timestep_respacing="10", rescale_timesteps=rescale)
    assert isinstance(spaced, SpacedDiffusion)
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return 0 * x

    x, t = th.zeros(3, 1), th.tensor([0, 4, 9])
    out = spaced.p_mean_variance(model, x, t)
    spaced.condition_mean(model, out, x, t)
    assert seen == [wanted, wanted]


# ---- resampling ------------------------------------------------------------------------------------------------------


class SixTimes:
    num_timesteps = 6


def test_second_moment_weights_are_upstreams():
    data = golden("adm_resample.npz")
    sampler = resample.LossSecondMomentResampler(SixTimes(), history_per_term=int(data["history_per_term"]))
    sampler.update_with_all_losses(data["ts"].tolist(), data["losses"].tolist())
    close(sampler.weights(), data["weights"], 1e-12)


def test_weighted_losses_are_unbiased():
    sampler = resample.LossSecondMomentResampler(SixTimes(), history_per_term=2)
    for _ in range(2):
        sampler.update_with_all_losses(list(range(6)), [1.0, 5.0, 2.0, 0.1, 9.0, 3.0])
    p = sampler.weights() / sampler.weights().sum()
    t, weights = sampler.sample(1000, "cpu", rng=np.random.RandomState(0))
    close(weights, 1 / (6 * p[t.numpy()]))
    assert p[4] == p.max() and p[3] == p.min()


def test_the_samplers_memory_survives_a_checkpoint(tmp_path):
    a, b = (resample.LossSecondMomentResampler(SixTimes(), history_per_term=2) for _ in range(2))
    for _ in range(3):
        a.update_with_local_losses(th.arange(6), th.arange(6).float() + 1)
    th.save(a.state_dict(), tmp_path / "s.pt")
    b.load_state_dict(th.load(tmp_path / "s.pt", weights_only=True))
    assert np.array_equal(a.weights(), b.weights()) and a.weights()[0] != a.weights()[5]


def test_an_unknown_sampler_is_named():
    with pytest.raises(NotImplementedError, match="unknown schedule sampler: best"):
        resample.create_named_schedule_sampler("best", SixTimes())


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_ema_is_the_weighted_sum():
    target, source = [th.ones(2), th.zeros(3)], [th.zeros(2), th.ones(3)]
    nn.update_ema(target, source, rate=0.9)
    close(target[0], [0.9, 0.9])
    close(target[1], [0.1, 0.1, 0.1])


def gradients(flag, *, freeze=False, autocast=False):
    th.manual_seed(0)
    block = th.nn.Sequential(th.nn.Linear(8, 8), th.nn.Dropout(0.5), th.nn.Linear(8, 8))
    block.requires_grad_(not freeze)
    x = th.randn(4, 8, requires_grad=True)
    with th.autocast("cpu", th.bfloat16, enabled=autocast):
        out = nn.checkpoint(block, (x,), block.parameters(), flag)
    out.float().square().sum().backward()
    return [x.grad] + [p.grad for p in block.parameters() if not freeze]


@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"autocast": True}])
def test_checkpointing_changes_no_gradient(options):
    """Upstream's draws another dropout mask in backward, and fails on frozen weights and under autocast."""
    for plain, recomputed in zip(gradients(False, **options), gradients(True, **options), strict=True):
        assert th.equal(plain, recomputed)


def test_group_norm_is_computed_in_float32():
    norm = nn.normalization(32)
    x = th.randn(2, 32, 4).half() * 100
    assert norm(x).dtype == th.float16
    close(norm(x).float().detach(), norm(x.float()).detach(), 2e-3)


def test_channels_must_be_a_multiple_of_32():
    with pytest.raises(ValueError, match="40 channels.*--num_channels"):
        nn.normalization(40)
