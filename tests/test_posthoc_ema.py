"""Averages of any length after the run: profiles in closed form, weights whose average is known, and lost processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from helpers import draw_users, script
from test_train_features import killed_and_resumed, loop

from guided_diffusion_vae import checkpoint, dist_util, logger, run_state
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.posthoc_ema import (
    PowerAverages,
    fit,
    gamma_of,
    inner_product,
    interval_of,
    lengths_of,
    rebuild,
    snapshots_in,
)
from guided_diffusion_vae.train_util import TrainConfig

LENGTHS = [0.05, 0.1]
STEPS = 960


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with logger.scoped_configure(str(tmp_path), format_strs=["log"]):
        yield tmp_path


def same(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


# ---- profiles --------------------------------------------------------------------------------------------------------


def test_gammas_are_those_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3) and gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    by_hand = {0: 1 / 12, 1: 2 / 36, 2: 3 / 80, 3: 4 / 150}  # (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    for gamma, square in by_hand.items():
        assert gamma_of(square**0.5) == pytest.approx(gamma, abs=1e-9)


def test_the_inner_product_is_the_integral():
    tau = (np.arange(200_000) + 0.5) / 200_000

    def profile(t, gamma):
        return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)

    for a, b in (((0.6, 17.0), (0.9, 7.0)), ((1.0, 2.0), (0.25, 0.5)), ((0.7, 3.0), (0.7, 3.0))):
        by_sum = np.mean(profile(*a) * profile(*b))
        assert inner_product(*a, *b) == pytest.approx(by_sum, rel=1e-4)
        assert inner_product(*a, *b) == inner_product(*b, *a)


def tracked(folder, lengths, interval, steps=STEPS):
    """The weights of step i are the unit vector i, so that an average is its own profile; snapshots as a run's."""
    averages, weights = PowerAverages(lengths, interval=interval, folder=folder), [th.ones(steps)]
    averages.begin(weights)
    for t in range(1, steps + 1):
        weights[0].zero_()
        weights[0][t - 1] = 1
        averages.update(weights, t)
        if averages.due(t, ends=t == steps):
            averages.write(t, lambda params, t=t: {"w": params[0], "count": th.tensor(t)})
    return {length: params.double() for length, (params,) in zip(lengths, averages.params, strict=True)}


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_an_average_has_the_profile_of_its_length(tmp_path, sigma_rel):
    """Its weight of step i is the profile's integral from i - 1 to i; nothing is left of the initial weights."""
    response = tracked(tmp_path, [sigma_rel], interval=STEPS)[sigma_rel].numpy()
    i, power = np.arange(1, STEPS + 1), gamma_of(sigma_rel) + 1
    assert np.allclose(response, (i / STEPS) ** power - ((i - 1) / STEPS) ** power, atol=1e-7)
    assert response.sum() == pytest.approx(1, abs=1e-5)
    spread = np.sqrt(np.sum(response * (i / STEPS) ** 2) - np.sum(response * i / STEPS) ** 2)
    assert spread == pytest.approx(sigma_rel, rel=1e-3)


def test_a_stored_length_is_rebuilt_exactly(tmp_path):
    known = tracked(tmp_path, LENGTHS, interval=60)
    for length in LENGTHS:
        path = rebuild(tmp_path, length, say=lambda line: None)
        assert path == tmp_path / f"ema_posthoc{length:.3f}_{STEPS:06d}.pt"
        assert (checkpoint.load(path)["w"] - known[length]).abs().max() < 1e-6
    early = checkpoint.load(rebuild(tmp_path, 0.1, step=300, say=lambda line: None))
    assert (early["w"] - checkpoint.load(tmp_path / "posthoc" / "power0.1_000300.pt")["w"]).abs().max() < 1e-6
    assert early["count"] == 300 and early["w"].dtype == th.float32


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.15, 0.2])
def test_another_length_is_near_the_tracked_one_and_nearer_with_more_snapshots(tmp_path, sigma_rel):
    """What is printed is what is missing, as a part of the average's profile that was tracked for comparison."""
    errors, said = [], []
    for interval in (120, 60, 20):
        place = tmp_path / str(interval)
        place.mkdir()
        tracked(place, LENGTHS, interval)
        wanted = direct(sigma_rel)
        times = [t for t in range(interval, STEPS + 1, interval) for _ in LENGTHS]
        shares, error = fit(times, LENGTHS * (STEPS // interval), t=STEPS, sigma_rel=sigma_rel)
        snapshots = [checkpoint.load(snapshot.path)["w"].double() for snapshot in snapshots_in(place / "posthoc")]
        built = sum(share * weights for share, weights in zip(shares, snapshots, strict=True))
        assert built.sum().item() == pytest.approx(1, abs=1e-5) and shares.sum() == pytest.approx(1, abs=1e-12)
        errors.append(((built - wanted).norm() / wanted.norm()).item())
        assert errors[-1] == pytest.approx(error, rel=0.1, abs=2e-5)
        if error < 0.05:
            assert (checkpoint.load(rebuild(place, sigma_rel, say=said.append))["w"] - built).abs().max() < 1e-6
            assert f"relative error of the profile {error:.3g}, from {len(times)} snapshots" in said[-1]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[1] < 0.025


def direct(sigma_rel):
    averages, weights = PowerAverages([sigma_rel], interval=1, folder=""), [th.zeros(STEPS)]
    averages.begin(weights)
    for t in range(1, STEPS + 1):
        weights[0].zero_()
        weights[0][t - 1] = 1
        averages.update(weights, t)
    return averages.params[0][0].double()


def test_what_cannot_be_built_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match="^--run_dir .* has no snapshots in posthoc/: train with --posthoc_ema 0.05,0.10"
    ):
        rebuild(tmp_path, 0.1)
    tracked(tmp_path, LENGTHS, interval=60)
    for sigma_rel, step, words in (
        (
            0.01,
            0,
            r"^--sigma_rel 0.01 at step 960 cannot be built from 32 snapshots of lengths 0.05, 0.1 until step 960",
        ),
        (0.28, 0, r"^--sigma_rel 0.28 at .* 21.\d% of its profile would be missing \(at most 5%\)"),
        (0.1, 350, r"^--sigma_rel 0.1 at step 350 cannot be built from 10 snapshots .* until step 300"),
        (0.1, 961, r"^--step is 961, but the snapshots are of steps 60 to 960"),
        (0.1, 59, r"^--step is 59, but"),
    ):
        with pytest.raises(UserError, match=words):
            rebuild(tmp_path, sigma_rel, step)
    assert not list(tmp_path.glob("ema_*"))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"posthoc_ema": "long"}, "--posthoc_ema is 'long'; it must be relative lengths such as 0.05,0.10"),
        ({"posthoc_ema": "0.05,0.3"}, "--posthoc_ema is 0.3; a relative length lies between 0.001 and 0.288"),
        ({"posthoc_ema": "0.1,0.10"}, "--posthoc_ema is '0.1,0.10'; give every length once"),
        ({"posthoc_interval": -1}, "--posthoc_interval is -1; it must be 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings, words):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_settings_are_read():
    assert lengths_of("") == [] and lengths_of("0.05,0.10") == LENGTHS
    assert (interval_of(7, 1000, 10), interval_of(0, 1000, 10), interval_of(0, None, 10)) == (7, 63, 10)


# ---- in the loop -----------------------------------------------------------------------------------------------------

RUN = {"posthoc_ema": "0.05,0.10", "posthoc_interval": 3, "max_steps": 11, "lr": 1e-2}


def files(folder):
    return sorted(path.name for path in (folder / "posthoc").iterdir())


def test_the_loop_averages_the_weights_after_every_update(folder):
    trained, weights = loop(**RUN), []
    update = trained.power.update
    trained.power.update = lambda masters, t: (weights.append(masters[0].detach().clone()), update(masters, t))
    trained.run_loop()
    assert len(weights) == 11
    for length in LENGTHS:
        for t in (3, 6, 9, 11):
            power = gamma_of(length) + 1
            wanted = sum(((i / t) ** power - ((i - 1) / t) ** power) * weights[i - 1] for i in range(1, t + 1))
            found = checkpoint.load(folder / "posthoc" / f"power{length}_{t:06d}.pt")
            assert th.allclose(found["map.weight"], wanted, atol=1e-6), (length, t)
    assert files(folder) == sorted(f"power{length}_{t:06d}.pt" for length in LENGTHS for t in (3, 6, 9, 11))
    assert (weights[0] - weights[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("fails_at", [6, 9, 10])
def test_killed_and_resumed_is_the_same_bits(folder, fails_at):
    """Also with a snapshot at the step of the checkpoint, and with one after it, which is of a lost time."""
    (folder / "straight").mkdir()
    with logger.scoped_configure(str(folder / "straight"), format_strs=[]):
        loop(**RUN).run_loop()
    resumed = killed_and_resumed(fails_at, **RUN)
    assert resumed.resume_step == {6: 5, 9: 9, 10: 9}[fails_at]
    later = folder / "posthoc" / "power0.05_000010.pt"
    later.write_bytes(b"of another future")
    resumed.run_loop()
    assert not later.exists() and files(folder) == files(folder / "straight")
    for name in files(folder):
        assert same(folder / "posthoc" / name, folder / "straight" / "posthoc" / name), name
    for name in ("ema_power0.05_000011.pt", "ema_power0.1_000011.pt", "ema_0.9_000011.pt", "model000011.pt"):
        assert same(folder / name, folder / "straight" / name), name
    assert not same(folder / "ema_power0.05_000011.pt", folder / "ema_power0.1_000011.pt")


def test_a_length_that_was_not_tracked_is_refused(folder):
    loop(max_steps=5).run_loop()
    words = r"^--posthoc_ema 0.1: .*model000004.pt did not track this length from its first step: leave it out"
    with pytest.raises(UserError, match=words):
        loop(max_steps=9, posthoc_ema="0.1", resume_checkpoint="auto")
    start = loop(posthoc_ema="0.1", resume_checkpoint=str(folder / "ema_0.9_000004.pt"))  # another run's first step
    assert start.resume_step == 0
    (folder / "two").mkdir()
    with logger.scoped_configure(str(folder / "two"), format_strs=[]):
        loop(max_steps=5, posthoc_ema="0.05,0.1").run_loop()
        with pytest.raises(UserError, match="give 0.05,0.1, or start a new run"):
            loop(max_steps=9, posthoc_ema="0.05,0.2", resume_checkpoint="auto")
        loop(max_steps=9, posthoc_ema="0.1", resume_checkpoint="auto").run_loop()
    assert "power0.1_000009.pt" in files(folder / "two") and "power0.05_000009.pt" not in files(folder / "two")


def test_old_ones_go_with_their_checkpoints_and_snapshots_stay(folder):
    loop(**RUN, keep_last=1).run_loop()
    assert [path.name for path in folder.glob("ema_power0.05_*")] == ["ema_power0.05_000011.pt"]
    assert len(files(folder)) == 8
    assert run_state.newest_checkpoint(folder) == (str(folder / "model000011.pt"), [])


def test_without_it_nothing_is_written(folder):
    loop(max_steps=3).run_loop()
    assert not (folder / "posthoc").exists() and not list(folder.glob("ema_power*"))


def test_an_update_that_was_passed_over_is_time_all_the_same(folder, monkeypatch):
    trained = loop(**RUN)
    monkeypatch.setattr(trained.mp_trainer, "optimize", lambda opt: False)
    trained.run_step(*next(trained.data))
    assert all(th.equal(a, b) for a, b in zip(trained.power.params[0], trained.mp_trainer.master_params, strict=True))


# ---- processes -------------------------------------------------------------------------------------------------------


def work(out):
    """Both ways of sharding; and a sharded run that is killed, or goes on."""
    from test_sharding import train

    dist_util.setup_dist()
    settings = {"posthoc_ema": "0.05,0.10", "posthoc_interval": 4, "sample_interval": 0}
    if (out / "killed" / "state000005.pt").exists():
        return train("dit", out / "killed", True, resume_checkpoint="auto", **settings)
    for sharded in (False, True):
        train("dit", out / f"{sharded}", sharded, **settings)
    train("dit", out / "killed", True, fails_at=9, **settings)


@pytest.mark.slow
def test_shares_make_the_same_averages_and_outlive_a_loss(tmp_path):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    code = f"import test_posthoc_ema as t; t.dist_util.run_main(lambda: t.work(t.Path({str(tmp_path)!r})))"
    command = ["mpiexec", "-n", "2", sys.executable, "-c", code]
    about = {"env": env, "cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 200}
    killed = subprocess.run(command, **about)
    assert killed.returncode != 0 and (tmp_path / "killed" / "state000005.pt").exists(), killed.stderr[-3000:]
    assert not (tmp_path / "killed" / "state000010.pt").exists()
    done = subprocess.run(command, **about)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [f"power{length}_{t:06d}.pt" for length in LENGTHS for t in (4, 8, 10)]
    assert files(tmp_path / "False") == files(tmp_path / "True") == files(tmp_path / "killed") == sorted(names)
    for name in [*(f"posthoc/{name}" for name in names), "ema_power0.05_000010.pt"]:
        assert same(tmp_path / "True" / name, tmp_path / "killed" / name), name
        a, b = (checkpoint.load(tmp_path / run / name) for run in ("False", "True"))
        assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max() for key in a) < 1e-5, name
    first, last = (checkpoint.load(tmp_path / "True" / f"posthoc/power0.1_{t:06d}.pt") for t in (4, 10))
    assert max((first[key] - last[key]).abs().max() for key in first) > 5e-4


@pytest.mark.slow
def test_the_script_builds_what_the_sampler_takes(tmp_path):
    draw_users(tmp_path / "data", ["user_00", "user_01"], 3)
    flags = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8"
    flags += " --image_size 32 --diffusion_steps 100 --batch_size 2 --max_steps 16 --class_cond True --lr 1e-3"
    flags += " --posthoc_ema 0.05,0.10 --class_balance True"
    run = tmp_path / "run"
    trained = script("image_train_vae.py", *flags.split(), "--data_dir", tmp_path / "data", "--log_dir", run)
    assert "images per user: min 3, median 3, max 3; fewest: user_00 (3), user_01 (3)" in trained.stdout
    assert "images_per_user:\n    user_00: 3\n    user_01: 3\n" in (run / "run.yaml").read_text()
    built = script("posthoc_ema.py", "--run_dir", run, "--sigma_rel", "0.15").stdout
    assert re.search(
        r"relative error of the profile 0\.00\d+, from 32 snapshots of lengths 0\.05, 0\.1 until step 16", built
    )
    path = run / "ema_posthoc0.150_000016.pt"
    assert f"image_sample_vae.py --model_path {path} --num_samples" in built
    script("image_sample_vae.py", "--model_path", path, "--num_samples", 2, "--timestep_respacing", 2)
    refused = script("posthoc_ema.py", "--run_dir", run, "--sigma_rel", "0.5", check=False)
    assert refused.returncode == 2 and "--sigma_rel is 0.5; a relative length lies" in refused.stderr
