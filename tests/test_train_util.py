"""The training loop against upstream's numbers, against itself on two processes, and against kill -9."""

import copy
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
from helpers import ROOT, draw_users, fill_by_name, golden, script

from guided_diffusion_vae import checkpoint, logger, train_util
from guided_diffusion_vae.script_util import create_gaussian_diffusion
from guided_diffusion_vae.unet import UNetModel


def tiny_model():
    return UNetModel(
        image_size=16,
        in_channels=4,
        model_channels=32,
        out_channels=8,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_heads=2,
        use_scale_shift_norm=True,
    )


def summary(tensor):
    """Sum, 2-norm and the first four numbers: what the golden file holds of each tensor."""
    values = tensor.detach().double().flatten()
    return [values.sum().item(), values.norm().item(), *values[:4].tolist()]


# A norm takes the mean of each group away. With 32 channels in 32 groups that is the bias of the convolution before it,
# whose gradient is then rounding alone, which AdamW makes full steps of: other processors end elsewhere.
WITHOUT_GRADIENT = r"(in_layers\.2|output_blocks\.3\.0\.(out_layers\.3|skip_connection))\.bias"


def without_gradient(model):
    """The parameters that the network's output does not depend on."""
    found = [(name, param) for name, param in model.named_parameters() if re.search(WITHOUT_GRADIENT, name)]
    return {name: param for name, param in found if param.shape == (32,)}


def test_some_biases_have_no_gradient():
    """The claim above: the output stays when they change, and does not when any other bias does."""
    model = tiny_model().eval()
    fill_by_name(model, 0)
    x, t = th.randn(2, 4, 16, 16), th.tensor([3, 700])
    with th.no_grad():
        before = model(x, t)
        for param in without_gradient(model).values():
            param += th.randn(32)
        np.testing.assert_allclose(model(x, t), before, atol=2e-5)
        others = dict(model.named_parameters()).keys() - without_gradient(model).keys()
        for name in (name for name in others if re.search(r"(in_layers\.2|out_layers\.3)\.bias", name)):
            param = dict(model.named_parameters())[name]
            kept = param.clone()
            param += th.randn(param.shape)
            assert not th.allclose(model(x, t), before, atol=1e-3), name
            param.copy_(kept)


@pytest.mark.parametrize("case", ["micro-1_anneal0", "micro2_anneal10"])
def test_five_steps_are_upstreams(case, tmp_path):
    """Five steps of the official TrainLoop: weights and both EMAs to 1e-5, but for biases that nothing determines."""
    wanted, batches = golden(f"adm_train_{case}.json"), golden(f"adm_train_{case}.npz")["batches"]
    model = tiny_model()
    fill_by_name(model, wanted["seed_weights"])
    with logger.scoped_configure(str(tmp_path), format_strs=[]):
        loop = train_util.TrainLoop(
            model=model,
            diffusion=create_gaussian_diffusion(learn_sigma=True),
            data=iter([]),
            batch_size=wanted["batch_size"],
            microbatch=wanted["microbatch"],
            lr=wanted["lr"],
            ema_rate=wanted["ema_rate"],
            log_interval=1,
            save_interval=100,
            resume_checkpoint="",
            weight_decay=wanted["weight_decay"],
            lr_anneal_steps=wanted["lr_anneal_steps"],
        )
        th.manual_seed(wanted["seed_torch_and_numpy"])
        np.random.seed(wanted["seed_torch_and_numpy"])
        for batch in batches:
            loop.run_step(th.from_numpy(batch), {})
            loop.step += 1
    free, reach = without_gradient(model), 2 * len(batches) * wanted["lr"]  # AdamW's steps are at most the rate
    found = {"after": dict(model.named_parameters())}
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        found[str(rate)] = dict(zip(found["after"], params, strict=True))
    for which, params in found.items():
        numbers = wanted["after"] if which == "after" else wanted["ema"][which]
        for name, param in params.items():
            got, want, words = np.array(summary(param)), np.array(numbers[name]), f"{which} {name}"
            if name in free:
                np.testing.assert_allclose(got[2:], want[2:], rtol=0, atol=reach, err_msg=words)
                continue
            np.testing.assert_allclose(got[1:], want[1:], rtol=1e-5, atol=2e-6, err_msg=words)
            apart = 2e-6 * param.numel() ** 0.5  # errors of single weights, summed
            np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=apart, err_msg=words)


@pytest.mark.parametrize(
    "name, step",
    [
        ("a/model000010.pt", 10),
        ("model_x/ema_0.9_000010.pt", 0),
        ("model000000.pt", 0),
        ("model1234567.tar.pt", 1234567),
    ],
)
def test_resume_step_is_read_from_the_name(name, step):
    assert train_util.parse_resume_step_from_filename(name) == step


# ---- the script ------------------------------------------------------------------------------------------------------

TINY = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8 "
TINY += "--image_size 32 --ema_rate 0.9,0.99 --lr 1e-3 --diffusion_steps 100 --log_interval 5 --class_cond True"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two users with five images each."""
    root = tmp_path_factory.mktemp("data")
    return draw_users(root, ["user_00", "user_01"], 5)


def train(folder, log_dir, *flags, ranks=1, **options):
    return script(
        "image_train_vae.py", *TINY.split(), "--data_dir", folder, "--log_dir", log_dir, *flags, ranks=ranks, **options
    )


def weights(log_dir, name):
    return checkpoint.load(log_dir / name)


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for key in a:
        if atol:
            assert (a[key] - b[key]).abs().max() <= atol, key
        else:
            assert th.equal(a[key], b[key]), key


def test_two_processes_or_another_layout_are_one_with_twice_the_batch(folder, tmp_path):
    # 64 channels: with 32, a group norm has one channel a group, and biases before it have no gradient but rounding
    flags = ["--max_steps", 10, "--save_interval", 100, "--lr", 1e-4, "--num_channels", 64]
    train(folder, tmp_path / "one", "--batch_size", 6, *flags)
    train(folder, tmp_path / "two", "--batch_size", 3, *flags, ranks=2)
    train(folder, tmp_path / "innermost", "--batch_size", 6, *flags, "--channels_last", True)
    for name in ("model000010.pt", "ema_0.9_000010.pt", "ema_0.99_000010.pt"):
        assert_same(weights(tmp_path / "one", name), weights(tmp_path / "two", name), atol=1e-6)
        assert_same(weights(tmp_path / "one", name), weights(tmp_path / "innermost", name), atol=1e-5)
    kernel = weights(tmp_path / "innermost", "model000010.pt")["input_blocks.1.0.in_layers.2.weight"]
    assert kernel.is_contiguous(memory_format=th.channels_last) and not kernel.is_contiguous()


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_the_same_bits(folder, tmp_path, ranks):
    """20 steps at once; and kill -9 at a random time past step 10, then the same command again."""
    flags = [
        "--batch_size",
        4,
        "--max_steps",
        20,
        "--save_interval",
        5,
        "--resume_checkpoint",
        "auto",
        "--dropout",
        0.1,
        "--channels_last",
        ranks == 2,
    ]
    train(folder, tmp_path / "straight", *flags, ranks=ranks)
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    words = [*TINY.split(), "--data_dir", folder, "--log_dir", tmp_path / "killed", *flags]
    command = [sys.executable, ROOT / "scripts/image_train_vae.py", *words]
    command = (["mpiexec", "-n", str(ranks)] if ranks > 1 else []) + list(map(str, command))
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "state000010.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model000020.pt").exists()
    train(folder, tmp_path / "killed", *flags, ranks=ranks)
    for name in ("model000020.pt", "ema_0.9_000020.pt", "ema_0.99_000020.pt"):
        assert_same(weights(tmp_path / "straight", name), weights(tmp_path / "killed", name))
    a, b = (weights(tmp_path / run, "opt000020.pt")["state"] for run in ("straight", "killed"))
    for index in a:
        assert_same(a[index], b[index])


def test_files_are_upstreams(folder, tmp_path):
    """Names, the off-by-one of periodic saves, and what the files hold."""
    train(folder, tmp_path, "--batch_size", 2, "--max_steps", 7, "--save_interval", 4)
    names = {path.name for path in tmp_path.iterdir()}
    for number in ("000000", "000004", "000007"):
        expected = {f"model{number}.pt", f"ema_0.9_{number}.pt", f"ema_0.99_{number}.pt", f"opt{number}.pt"}
        assert expected <= names
    assert {"log.txt", "progress.csv", "run.yaml"} <= names
    log = (tmp_path / "log.txt").read_text()
    for line in ("creating model and diffusion...", "creating data loader...", "training...", "saving model 0..."):
        assert line in log
    assert "saving model 0.9..." in log and "| loss_q" in log and "| grad_norm" in log
    assert weights(tmp_path, "opt000004.pt")["state"][0]["step"] == 5


def test_a_stop_file_saves_and_leaves_with_75(folder, tmp_path):
    (tmp_path / "STOP").touch()
    done = train(folder, tmp_path, "--batch_size", 2, "--max_steps", 50, check=False)
    assert done.returncode == 75 and "stopped: the file STOP" in done.stderr, done.stderr
    assert not (tmp_path / "STOP").exists()  # or the advised command would stop at once
    done = train(folder, tmp_path, "--batch_size", 2, "--max_steps", 7, "--resume_checkpoint", "auto")
    assert (tmp_path / "model000005.pt").exists() and (tmp_path / "model000007.pt").exists()


def test_sigterm_saves_and_leaves_with_75(folder, tmp_path):
    words = [*TINY.split(), "--data_dir", str(folder), "--log_dir", str(tmp_path), "--batch_size", "2"]
    command = [sys.executable, str(ROOT / "scripts/image_train_vae.py"), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "state000000.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    assert "stopped: SIGTERM; saved step" in process.stderr.read()
    assert len(list(tmp_path.glob("state*.pt"))) in (1, 2)  # 1: asked while the first was being saved


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--seed", 1], 2, ["--seed is 1", "trained with 0"]),
        (["--batch_size", 5], 2, ["--batch_size 5", "had 2"]),
        (["--num_channels", 64], 2, ["another shape"]),
        (["--learn_sigma", True], 2, ["another shape"]),
    ],
)
def test_a_resume_that_does_not_fit_is_one_line(folder, tmp_path, tmp_path_factory, flags, code, words):
    """Into another folder, where no run.yaml tells what the checkpoint was trained with."""
    log_dir = tmp_path_factory.getbasetemp() / "resume"
    if not log_dir.exists():
        train(folder, log_dir, "--batch_size", 2, "--max_steps", 1)
    resume = ["--resume_checkpoint", log_dir / "model000000.pt"]
    done = train(folder, tmp_path, "--batch_size", 2, "--max_steps", 3, *resume, *flags, check=False)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_a_command_that_cannot_start_leaves_the_run_as_it_is(folder, tmp_path):
    train(folder, tmp_path, "--batch_size", 2, "--max_steps", 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pt", ".yaml")}
    shutil.copytree(folder, tmp_path / "more")
    shutil.copytree(folder / "user_00", tmp_path / "more" / "user_02")
    auto, again = ["--resume_checkpoint", "auto"], "holds a training with {}: give that, or another --log_dir"
    for flags, words in (
        (["--resume_checkpoint", tmp_path / "model000009.pt"], "does not exist; give a model*.pt"),
        (["--resume_checkpoint", tmp_path / "ema_0.9999_000002.pt"], "holds a run up to step 2: go on with it by"),
        ([*auto, "--noise_schedule", "cosine"], again.format("'linear'")),
        (["--resume_checkpoint", tmp_path / "model000002.pt", "--seed", 1], again.format(0)),
        ([*auto, "--vae_path", "pixel"], "--vae_path pixel is autoencoder pixel, but"),
        ([*auto, "--data_dir", tmp_path / "more"], "has 3 classes, number 2 of them user_02, but"),
        ([], "holds a run up to step 2: go on with it by --resume_checkpoint auto, or choose another --log_dir"),
    ):
        done = train(folder, tmp_path, "--batch_size", 2, "--max_steps", 3, *flags, check=False)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pt", ".yaml")}
    optimizer = ["--resume_checkpoint", tmp_path / "opt000002.pt"]
    done = train(folder, tmp_path / "new", "--batch_size", 2, "--max_steps", 3, *optimizer, check=False)
    assert done.returncode == 2 and "holds no weights; give a model*.pt" in done.stderr


def test_latents_of_heldout_images_are_cached_where_it_is_asked(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val", ignore=shutil.ignore_patterns(".latents"))
    where = ["--val_dir", tmp_path / "val", "--latent_cache", tmp_path / "cache"]
    train(folder, tmp_path / "run", "--batch_size", 2, "--max_steps", 1, *where)
    assert (tmp_path / "cache" / "heldout" / "moments.npy").is_file() and not (tmp_path / "val" / ".latents").exists()


def test_the_average_of_another_run_is_only_a_start(folder, tmp_path):
    """An ema_*.pt has no optimizer and no average of its own: its weights start a new run at step 0."""
    train(folder, tmp_path / "a", "--batch_size", 2, "--max_steps", 2)
    flags = ["--resume_checkpoint", tmp_path / "a" / "ema_0.9_000002.pt", "--max_steps", 1, "--lr", 1e-9]
    done = train(folder, tmp_path / "b", "--batch_size", 2, *flags)
    assert "its weights start a new one at step 0" in done.stdout and "loading EMA" not in done.stdout
    assert_same(weights(tmp_path / "a", "ema_0.9_000002.pt"), weights(tmp_path / "b", "model000000.pt"), atol=1e-6)


def test_moments_of_another_layout_keep_their_places(folder, tmp_path):
    """A fused optimizer takes weights and moments by their places in memory, whatever their shapes say."""
    for name, again in (("a", []), ("b", ["--channels_last", True])):
        flags = ["--batch_size", 2, "--lr", 1e-2, "--log_dir", tmp_path / name]
        train(folder, tmp_path / name, *flags[:4], "--max_steps", 2)
        train(folder, tmp_path / name, *flags[:4], "--max_steps", 3, "--resume_checkpoint", "auto", *again)
    usual, other = (weights(tmp_path / name, "model000003.pt") for name in "ab")
    for key in [key for key, value in usual.items() if value.ndim == 4]:
        assert (usual[key] - other[key]).abs().mean() < 1e-4, key  # exchanged moments: 0.005


def test_a_short_run_ends_with_a_row_and_the_next_command(folder, tmp_path):
    done = train(folder, tmp_path, "--batch_size", 2, "--max_steps", 3, "--log_interval", 100)
    with open(tmp_path / "progress.csv", newline="") as handle:
        assert [row["step"] for row in csv.DictReader(handle)] == ["0", "2"]
    assert f"--model_path {tmp_path / 'ema_0.9_000003.pt'} --num_samples 16 " in done.stdout
    assert "10 images of 2 classes: user_00 (5), user_01 (5)" in done.stdout


def test_a_full_disk_leaves_the_earlier_checkpoint(folder, tmp_path, monkeypatch):
    """The save fails with one clear error, and what was complete is still found and verified."""
    from guided_diffusion_vae import run_state

    files = {"model000001.pt": {"w": th.zeros(3)}}
    run_state.write_checkpoint(tmp_path, 1, files, {"next_step": 2})
    real = copy.copy(checkpoint.save)

    def full(obj, path):
        if "opt" in str(path):
            raise checkpoint.SaveError("the disk is full")
        real(obj, path)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(checkpoint.SaveError):
        run_state.write_checkpoint(
            tmp_path, 2, {"model000002.pt": {"w": th.ones(3)}, "opt000002.pt": {}}, {"next_step": 3}
        )
    assert run_state.newest_checkpoint(tmp_path) == (str(tmp_path / "model000001.pt"), [])
    assert not (tmp_path / "model000002.pt").exists()


def test_training_that_cannot_be_compiled_is_as_before(folder, tmp_path):
    train(folder, tmp_path / "usual", "--batch_size", 2, "--max_steps", 2)
    flags = ["--batch_size", 2, "--max_steps", 2, "--compile", True]
    done = train(folder, tmp_path / "compiled", *flags, CXX="no-such-compiler")
    assert "--compile True needs a C++ compiler, and no-such-compiler is not on the PATH: training without" in (
        done.stdout + done.stderr
    )
    for name in ("model000002.pt", "ema_0.9_000002.pt"):
        assert_same(weights(tmp_path / "usual", name), weights(tmp_path / "compiled", name))
