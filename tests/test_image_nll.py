"""Likelihoods against closed forms: where the network is exact, the bound is the entropy and the ODE the density."""

import csv
import math

import numpy as np
import pytest
import torch as th
from helpers import draw_users, script

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, create_network
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion_vae.likelihood import LikelihoodConfig, Part, Tally, parts_of_data, spread_rows
from guided_diffusion_vae.run_record import save_run
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae

MEAN, STD = 0.4, 0.7


class Rows:
    """Rows of data ~ N(MEAN, STD^2), and what the model is told of each."""

    def __init__(self, count, shape=(4, 8, 8)):
        self.z = MEAN + STD * th.from_numpy(np.random.RandomState(0).randn(count, *shape)).float()

    def __len__(self):
        return len(self.z)

    def batch(self, indices):
        return self.z[list(indices)], {}


class Kind:
    def __init__(self, is_pixel):
        self.is_pixel = is_pixel


def exact_gaussian(T=40):
    """A process, and the network that knows p(x_{t-1} | x_t) of data ~ N(MEAN, STD^2): noise, and the log-variance."""
    process = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", T),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED,
        loss_type=LossType.MSE,
        likelihood="gaussian",
    )

    def model(x, t):
        a, c1, v = (
            th.from_numpy(table)[t].float().view(-1, 1, 1, 1)
            for table in (process.alphas_cumprod, process.posterior_mean_coef1, process.posterior_variance)
        )
        spread = 1 / (1 / STD**2 + a / (1 - a))
        x_start = spread * (MEAN / STD**2 + a.sqrt() * x / (1 - a))
        noise = (x - a.sqrt() * x_start) / (1 - a).sqrt()
        return th.cat([noise, (v + c1**2 * spread).log().expand_as(x)], 1)

    return model, process


def exact_flow(x, t):
    """dx/dt of the straight flow from N(0, 1) to N(MEAN, STD^2)."""
    t = t.view(-1, 1, 1, 1)
    gap = (x - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)
    return MEAN + t * STD**2 * gap - (1 - t) * gap


def minus_log_density(z):
    """Of N(MEAN, STD^2), the mean over a row's dimensions."""
    nll = 0.5 * ((z - MEAN) / STD) ** 2 + math.log(STD) + 0.5 * math.log(2 * math.pi)
    return nll.flatten(1).mean(1).double().numpy()


def collect(model, process, data, **options):
    options = {"rows": range(len(data)), "batch_size": 3, "seed": 5, **options}
    return list(parts_of_data(model, process, data, **options))


def test_an_exact_network_makes_the_bound_tight():
    """Row by row the bound is -log p(x), up to the noise drawn in it, whose standard deviation is 0.07 here."""
    data, (model, process) = Rows(40), exact_gaussian()
    parts = collect(model, process, data, batch_size=16)
    nll = np.concatenate([part.nll for part in parts])
    np.testing.assert_allclose(nll, minus_log_density(data.z), atol=0.35)
    assert abs((nll - minus_log_density(data.z)).mean()) < 0.035
    worse = collect(lambda x, t: model(x + 0.2, t), process, data, batch_size=16)
    assert np.concatenate([part.nll for part in worse]).mean() > nll.mean() + 0.2


def test_the_terms_are_upstreams_and_add_up_to_the_bound():
    data, (model, process) = Rows(5), exact_gaussian()
    (part,) = collect(model, process, data, batch_size=8)
    prior = process._prior_bpd(data.z).double().numpy() * math.log(2)
    assert {name: values.shape for name, values in part.terms.items()} == dict.fromkeys(
        ("vb", "mse", "xstart_mse"), (5, 40)
    )
    np.testing.assert_allclose(part.terms["vb"].sum(1) + prior, part.nll, rtol=1e-5)
    spread = 1 / (1 / STD**2 + process.alphas_cumprod / (1 - process.alphas_cumprod))  # of x_0 where x_t is known
    np.testing.assert_allclose(part.terms["xstart_mse"].mean(0), spread[::-1], rtol=0.25)


def test_the_flow_has_the_density_of_a_gaussian():
    data = Rows(7)
    parts = collect(exact_flow, FlowMatching(), data, num_steps=60)
    assert [len(part.nll) for part in parts] == [3, 3, 1] and parts[0].terms == {}
    nll = np.concatenate([part.nll for part in parts])
    np.testing.assert_allclose(nll, minus_log_density(data.z), atol=2e-3)


def test_a_row_does_not_depend_on_its_batch():
    """Also where the answer hangs on the probe: a velocity whose channels are mixed."""
    data = Rows(5)
    mixed = FlowMatching(), lambda x, t: exact_flow(x, t) + 0.5 * x.flip(1) * x.roll(1, 2)
    for process, model in (exact_gaussian()[::-1], mixed):
        whole, single = (collect(model, process, data, batch_size=size, num_steps=10) for size in (5, 1))
        np.testing.assert_allclose(whole[0].nll, np.concatenate([part.nll for part in single]), rtol=1e-5)
        other = collect(model, process, data, batch_size=5, num_steps=10, seed=6)
        assert np.abs(other[0].nll - whole[0].nll).max() > 1e-4


def test_rows_are_spread_over_the_users():
    assert spread_rows(744, 31) == list(range(0, 744, 24))
    assert spread_rows(3, 1000) == [0, 1, 2]


def test_pixels_are_counted_in_bits_and_users_apart(tmp_path):
    """Two users, of 1 and 2 nats a dimension: in bits divided by ln 2, and the mean weighs each image alike."""
    _, process = exact_gaussian()
    nll, vb = np.array([1.0, 2.0, 2.0]), np.ones((3, 40))
    units = {}
    for is_pixel in (True, False):
        tally = Tally(process, Kind(is_pixel), np.array([1, 0, 0]), ["anna", "ben"])
        for i in range(3):
            tally.add(Part([i], nll[i : i + 1], {"vb": vb[i : i + 1], "mse": vb[i : i + 1]}))
        folder = tmp_path / str(is_pixel)
        folder.mkdir()
        tally.save(folder)
        units[is_pixel] = tally.unit
        factor = math.log(2) if is_pixel else 1.0
        rows = list(csv.DictReader((folder / "nll.csv").open()))
        assert [(row["user"], row["samples"]) for row in rows] == [("anna", "2"), ("ben", "1"), ("all", "3")]
        found = [float(row[tally.unit]) * factor for row in rows]
        assert found == pytest.approx([2, 1, 5 / 3], rel=1e-6)
        stored = {name: np.load(folder / f"{name}_terms.npz")["arr_0"] for name in ("vb", "mse")}
        np.testing.assert_allclose(stored["vb"] * factor, np.ones(40), rtol=1e-6)
        np.testing.assert_allclose(stored["mse"], np.ones(40), rtol=1e-6)
    assert units == {True: "bpd", False: "nats_per_dim"}
    assert Tally(FlowMatching(), Kind(True)).unit == "nats_per_dim"  # a flow has no bins


# ---- the script ------------------------------------------------------------------------------------------------------

TINY = "--num_channels 32 --num_res_blocks 1 --channel_mult 1 --num_heads 2 --attention_resolutions 1 --image_size 32"
TINY += " --diffusion_steps 40 --class_cond True"
NAMES = ["user_00", "user_01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder of two users, and a model of them as training begins with it."""
    root = tmp_path_factory.mktemp("nll")
    draw_users(root / "data", NAMES, 3)
    run = parse_run(create_argparser(*NETWORK_SECTIONS, VAEConfig), TINY.split())
    vae = load_vae(run.section(VAEConfig))
    (root / "run").mkdir()
    checkpoint.save(create_network(run, vae, num_classes=2).state_dict(), root / "run/model000000.pt")
    save_run(run, root / "run", class_names=NAMES, autoencoder=vae.fingerprint)
    return root


def evaluate(trained, folder, *flags, **options):
    model = ["--model_path", trained / "run/model000000.pt", "--data_dir", trained / "data", "--log_dir", folder]
    return script("image_nll_vae.py", *model, *flags, **options)


def numbers(folder):
    rows = list(csv.DictReader((folder / "nll.csv").open()))
    return {row["user"]: (int(row["samples"]), float(row["nats_per_dim"])) for row in rows}


def test_two_processes_find_what_one_finds(trained, tmp_path):
    done = evaluate(trained, tmp_path / "one", "--num_samples", 5, "--batch_size", 5)
    assert "nats per dimension" in done.stdout and "done 5 samples: nats_per_dim=" in done.stdout
    evaluate(trained, tmp_path / "two", "--num_samples", 5, ranks=2)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [one[name][0] for name in ("user_00", "user_01", "all")] == [3, 2, 5]
    assert {name: pytest.approx(value, rel=1e-5) for name, value in one.items()} == two
    for name in ("vb", "mse", "xstart_mse"):
        a, b = (np.load(tmp_path / part / f"{name}_terms.npz")["arr_0"] for part in ("one", "two"))
        assert a.dtype == np.float32 and a.shape == (40,)
        np.testing.assert_allclose(a, b, rtol=1e-4)
    # an untrained U-Net says 0 is the noise, so that the noise's mean square is left
    np.testing.assert_allclose(np.load(tmp_path / "one/mse_terms.npz")["arr_0"], 1, atol=0.35)


def test_a_flag_that_cannot_be_is_one_line(trained, tmp_path):
    done = evaluate(trained, tmp_path, "--data_dir", "", check=False)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[0].startswith("error: --data_dir is empty")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for name, value in (("num_samples", 0), ("batch_size", 0), ("num_steps", 1)):
        with pytest.raises(UserError, match=f"--{name} is {value}"):
            LikelihoodConfig(**{name: value})
