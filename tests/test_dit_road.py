"""The second road through the scripts: extracted latents, LightningDiT, flow matching; killed, shared, guided."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
from helpers import ROOT, draw_users, script

from guided_diffusion_vae import checkpoint

NAMES = ["user_01", "user_07", "user_30"]
ROAD = "--network dit --model_type LightningDiT-S/2 --process flow --use_lognorm True --use_qknorm True".split()
ROAD += "--image_size 32 --class_cond True --lr 1e-3 --ema_rate 0.9 --ema_warmup True --grad_clip 1".split()
ROAD += "--adam_betas 0.9,0.95 --warmup_steps 2 --latent_norm True --log_interval 1".split()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Extracted latents of three users, to train on and to validate by."""
    root = tmp_path_factory.mktemp("dit_road")
    rng = np.random.RandomState(0)
    for part in ("train", "val"):
        draw_users(root / part, NAMES, 3, rng=rng)
    flags = ["--data_dir", root / "train", "--val_dir", root / "val", "--out_dir", root / "latents"]
    script("latent_extract.py", *flags, "--image_size", 32)
    return root / "latents"


def command(latents, folder, steps, *flags):
    data = ["--data_dir", latents / "train", "--val_dir", latents / "val", "--val_interval", 2]
    return [*ROAD, *data, "--log_dir", folder, "--max_steps", steps, *flags]


def train(latents, folder, steps, *flags, ranks=1, **options):
    return script("image_train_vae.py", *command(latents, folder, steps, *flags), ranks=ranks, **options)


def weights(folder, name):
    return checkpoint.load(folder / name)


def worst(a, b):
    """The largest difference of two state_dicts."""
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def straight(latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(latents, folder, 6, "--batch_size", 4, "--save_interval", 3)
    return folder


def test_validation_is_logged_and_the_best_average_kept(straight):
    rows = list(csv.DictReader((straight / "progress.csv").open()))
    losses = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    assert len(losses) >= 3 and all(np.isfinite(losses))
    assert (straight / "ema_0.9_best.pt").is_file() and (straight / "latents_stats.pt").is_file()


def test_a_killed_run_goes_on_with_the_same_bits(latents, straight, tmp_path):
    words = map(str, command(latents, tmp_path, 6, "--batch_size", 4, "--save_interval", 3))
    child = subprocess.Popen([sys.executable, str(ROOT / "scripts/image_train_vae.py"), *words], env=os.environ)
    deadline = time.monotonic() + 120
    while not (tmp_path / "state000003.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    shutil.rmtree(tmp_path / "samples", ignore_errors=True)
    train(latents, tmp_path, 6, "--batch_size", 4, "--save_interval", 3, "--resume_checkpoint", "auto")
    for name in ("model000006.pt", "ema_0.9_000006.pt", "ema_0.9_best.pt", "opt000006.pt"):
        a, b = weights(straight, name), weights(tmp_path, name)
        if name.startswith("opt"):
            a, b = ({i: state["exp_avg_sq"] for i, state in part["state"].items()} for part in (a, b))
        assert all(th.equal(a[key], b[key]) for key in a), name


def test_two_processes_train_as_one(latents, straight, tmp_path):
    """The same global batch, labels dropped alike: equal but for the order of sums."""
    train(latents, tmp_path, 6, "--batch_size", 2, "--save_interval", 3, ranks=2)
    assert worst(weights(straight, "model000006.pt"), weights(tmp_path, "model000006.pt")) < 1e-6
    assert worst(weights(straight, "ema_0.9_000006.pt"), weights(tmp_path, "ema_0.9_000006.pt")) < 1e-6


def test_shards_train_as_the_images_do_by_their_mean(latents, tmp_path):
    """Latents of the posterior's mean, from shards and from images: the same batches, so the same weights."""
    root = latents.parent
    flags = ["--data_dir", root / "train", "--out_dir", tmp_path / "mean", "--sample_posterior", False]
    script("latent_extract.py", *flags, "--image_size", 32)
    plain = [*ROAD[:-4], "--log_interval", 1, "--batch_size", 4, "--max_steps", 2, "--sample_posterior", False]
    script("image_train_vae.py", *plain, "--data_dir", tmp_path / "mean", "--log_dir", tmp_path / "a")
    script("image_train_vae.py", *plain, "--data_dir", root / "train", "--log_dir", tmp_path / "b")
    assert worst(weights(tmp_path / "a", "model000002.pt"), weights(tmp_path / "b", "model000002.pt")) < 1e-6


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--network", "unet", "--num_channels", 32, "--channel_mult", 1]])
def test_half_the_digits_and_the_other_network_train_too(latents, tmp_path, flags):
    done = train(latents, tmp_path, 3, "--batch_size", 4, *flags)
    assert "--class_dropout_prob" not in done.stderr
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert 0.5 < float(rows[0]["loss"]) < 4  # about 2 in expectation: noise and data of variance 1 each


def test_sampling_is_guided_and_leaves_a_manifest(straight, tmp_path):
    flags = ["--model_path", straight / "ema_0.9_000006.pt", "--user_ids", 1, 30, "--num_samples_per_user", 2]
    flags += ["--num_steps", 4, "--per_image_seed", True, "--batch_size", 3]
    images = {}
    late = ["--cfg_scale", 4, "--cfg_interval", 0.9]  # Euler's three steps start at 0, 1/3 and 2/3
    for name, more in (("plain", []), ("guided", ["--cfg_scale", 4.0]), ("late", late)):
        script("image_sample_vae.py", *flags, *more, "--log_dir", tmp_path / name)
        images[name] = np.load(tmp_path / name / "samples_4x32x32x3.npz")["arr_0"].astype(int)
    assert np.array_equal(images["plain"], images["late"])
    assert np.abs(images["plain"] - images["guided"]).max() > 0
    rows = list(csv.DictReader((tmp_path / "guided" / "manifest.csv").open()))
    assert [row["cfg_scale"] for row in rows] == ["4.0"] * 4 and rows[0]["network"] == "dit"
    assert [row["file"] for row in rows[:2]] == [
        "png/user_01/micro_doppler_user01_001.png",
        "png/user_30/micro_doppler_user30_001.png",
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--network", "unet"], ["--network is 'unet'", "trained with 'dit'"]),
        (["--sampler", "ddim"], ["--sampler ddim", "euler, heun, dopri5"]),
        (["--num_steps", 1], ["--num_steps is 1"]),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(straight, tmp_path, flags, words):
    model = ["--model_path", straight / "ema_0.9_000006.pt", "--log_dir", tmp_path]
    done = script("image_sample_vae.py", *model, "--num_samples", 1, *flags, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_statistics_that_are_gone_are_named(straight, tmp_path):
    for name in ("run.yaml", "ema_0.9_000006.pt"):
        shutil.copy(straight / name, tmp_path)
    done = script("image_sample_vae.py", "--model_path", tmp_path / "ema_0.9_000006.pt", check=False)
    assert done.returncode == 2 and "latents_stats.pt" in done.stderr, done.stderr
