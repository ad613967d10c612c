"""Numbers that are none: a run that diverges stops with a sentence, and what it had saved is good."""

import pytest
import torch as th
from harness import AUTOENCODER, SMALL, TRAIN, Job, assert_tidy, contents, here, said
from helpers import draw_users

from guided_diffusion_vae import checkpoint, run_state, sample_util, train_util, vae_train_util
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.fp16_util import TrainingDiverged
from guided_diffusion_vae.train_util import TrainLoop

BAD = [float("nan"), float("inf")]
LAST_GOOD = 3  # of checkpoints 0, 3, 6, ...


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_users(tmp_path_factory.mktemp("data"), ["user_00", "user_01"], 5)


def train(data, out, *flags):
    here("image_train_vae", *TRAIN, *SMALL.split(), "--log_interval", 1, "--data_dir", data, "--log_dir", out, *flags)


def assert_good(folder, number=LAST_GOOD):
    """The newest checkpoint is this one, and every number in it is finite."""
    newest, notes = run_state.newest_checkpoint(folder)
    assert (newest, notes) == (str(folder / f"model{number:06d}.pt"), [])
    for path in folder.glob(f"*{number:06d}.pt"):
        loaded = checkpoint.load(path)
        assert all(value.isfinite().all() for value in loaded.values() if th.is_tensor(value)), path
    assert_tidy(folder)


def poisoned(monkeypatch, step, spoil):
    """`spoil(loop)` once that step's update is done, as a fault of the machine would."""
    real = TrainLoop.run_step

    def run_step(loop, *batch):
        loss = real(loop, *batch)
        if loop.step + loop.resume_step == step:
            spoil(loop)
        return loss

    monkeypatch.setattr(TrainLoop, "run_step", run_step)


@pytest.mark.fault(
    "NaN and infinity in the data, the loss or the gradient of a training in float32",
    promise="it stops at the next row of the log, code 4 and a sentence; the checkpoint before is the newest and good",
)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["data", "loss", "gradient"])
def test_not_a_number_in_a_step(where, bad, data, tmp_path, monkeypatch):
    def spoil(values):
        values.view(-1)[0] = bad
        return values

    real = TrainLoop.forward_backward

    def forward_backward(loop, batch, cond):
        now = loop.step + loop.resume_step == LAST_GOOD + 2
        real_losses = loop.diffusion.training_losses
        if now and where == "data":
            batch = spoil(batch.clone())
        if now and where == "loss":
            loop.diffusion.training_losses = lambda *a, **k: {n: v * bad for n, v in real_losses(*a, **k).items()}
        loss = real(loop, batch, cond)
        loop.diffusion.training_losses = real_losses
        if now and where == "gradient":
            spoil(loop.mp_trainer.master_params[0].grad)
        return loss

    monkeypatch.setattr(TrainLoop, "forward_backward", forward_backward)
    with pytest.raises(
        TrainingDiverged, match="is not finite at step 5: the run has diverged; earlier checkpoints are"
    ):
        train(data, tmp_path)
    assert_good(tmp_path)


@pytest.mark.fault(
    "NaN and infinity in a weight or in a moving average, just before it is saved",
    promise="nothing is written, code 4 and a sentence; the checkpoint before is the newest and good",
)
@pytest.mark.parametrize("where, bad", zip(["weight", "average"], BAD, strict=True))
def test_not_a_number_is_never_saved(where, bad, data, tmp_path, monkeypatch):
    def spoil(loop):
        params = loop.mp_trainer.master_params if where == "weight" else loop.ema_params[0]
        params[-1].detach().view(-1)[-1] = bad

    poisoned(monkeypatch, 6, spoil)
    with pytest.raises(TrainingDiverged, match="a weight, or its average, is not finite"):
        train(data, tmp_path)
    assert_good(tmp_path)


@pytest.mark.fault(
    "gradients that overflow float16, {times} times running",
    promise="the step is skipped and counted, the loss scale halved each time, and the run goes on",
)
@pytest.mark.parametrize("times", [3])
def test_an_overflow_skips_the_step(times, data, tmp_path, monkeypatch):
    scales = overflowing(monkeypatch, range(4, 4 + times))
    train(data, tmp_path, "--use_fp16", True, "--fp16_scale_growth", 0, "--max_steps", 9)
    assert scales == [20 - max(0, min(step - 4, times)) for step in range(9)]
    assert (tmp_path / "log.txt").read_text().count("Found NaN, decreased lg_loss_scale") == times
    assert_good(tmp_path, 9)


@pytest.mark.slow
@pytest.mark.fault(
    "gradients that overflow float16 for ever",
    promise="the loss scale has a floor: the run stops there with code 4 and a sentence, the checkpoint before is good",
)
def test_a_storm_of_overflows_ends(data, tmp_path, monkeypatch):
    scales = overflowing(monkeypatch, range(4, 1000))
    with pytest.raises(
        TrainingDiverged,
        match="overflow even at a loss scale of 2\\^-1.*: the run has diverged; .* --lr",
    ):
        train(data, tmp_path, "--use_fp16", True, "--max_steps", 99, "--save_interval", 3, "--keep_last", 0)
    assert len(scales) < 40 and min(scales) >= -10
    assert_good(tmp_path, 36 - 36 % 3 if len(scales) > 36 else 33)


def overflowing(monkeypatch, steps):
    """Infinite gradients in these steps; returns the list of log2 of the loss scale that each step will have had."""
    real, scales = TrainLoop.forward_backward, []

    def forward_backward(loop, *batch):
        scales.append(round(loop.mp_trainer.lg_loss_scale))
        loss = real(loop, *batch)
        if loop.step + loop.resume_step in steps:
            loop.mp_trainer.model_params[0].grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(train_util.TrainLoop, "forward_backward", forward_backward)
    return scales


@pytest.mark.fault(
    "NaN and infinity in the loss of an autoencoder's training",
    promise="it stops with a sentence before anything is written; last.pt is the good one before",
)
@pytest.mark.parametrize("bad", BAD[:1])
def test_an_autoencoder_that_diverges(bad, data, tmp_path, monkeypatch):
    real, flags = vae_train_util.VAETrainer.update, [*AUTOENCODER.split(), "--data_root", data, "--out_dir", tmp_path]

    def update(trainer, batch):
        terms = real(trainer, batch)
        return {name: value * bad for name, value in terms.items()} if trainer.step == 5 else terms

    monkeypatch.setattr(vae_train_util.VAETrainer, "update", update)
    with pytest.raises(TrainingDiverged, match="at step 6: the run has diverged"):
        here("vae_train", *flags)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert_tidy(tmp_path)


@pytest.mark.fault(
    "NaN and infinity in sampled images", promise="one line and code 2; nothing of them reaches the .npz or the PNGs"
)
@pytest.mark.parametrize("bad", BAD)
def test_samples_are_numbers(bad):
    images = th.zeros(2, 3, 4, 4)
    images[1, 2, 3, 3] = bad
    with pytest.raises(UserError, match="the samples hold NaN or infinite values: the checkpoint is of a run that"):
        sample_util.to_pixels(images)


@pytest.mark.slow
@pytest.mark.fault(
    "a network whose weights are NaN, sampled by its script",
    promise="one line, code 2; the samples that were there stay as they are",
)
def test_a_diverged_network_is_not_sampled(data, tmp_path):
    train(data, tmp_path / "run", "--max_steps", 1, "--save_interval", 1)
    model = tmp_path / "run" / "ema_0.9_000000.pt"
    flags = ["--model_path", model, "--log_dir", tmp_path / "out", "--num_samples", 2, "--num_steps", 2]
    here("image_sample_vae", *flags)
    before = {name: what for name, what in contents(tmp_path / "out").items() if not name.startswith("log")}
    weights = checkpoint.load(model)
    weights["out.2.weight"][:] = float("nan")
    checkpoint.save(weights, model)
    with Job("image_sample_vae.py", *flags) as job:
        said(job.end(), 2, "the samples hold NaN or infinite values")
    after = {name: what for name, what in contents(tmp_path / "out").items() if not name.startswith("log")}
    assert after == before


@pytest.mark.slow
@pytest.mark.fault(
    "a learning rate at which training diverges, by its script, in float32 and in half precision",
    promise="code 4 and one line that names --lr; every checkpoint that is there is good",
)
@pytest.mark.parametrize("half", [False, True])
def test_a_run_that_diverges(half, data, tmp_path):
    flags = [*TRAIN, *SMALL.split(), "--data_dir", data, "--log_dir", tmp_path, "--max_steps", 500, "--use_fp16", half]
    flags += ["--latent_cache", tmp_path / "cache", "--lr", 1e30, "--log_interval", 1, "--weight_decay", 0]
    with Job("image_train_vae.py", *flags) as job:
        said(job.end(), 4, "--lr")
    for path in tmp_path.glob("model*.pt"):
        assert all(value.isfinite().all() for value in checkpoint.load(path).values())
    assert_tidy(tmp_path)
