"""The gradient that a classifier is taught is the one that guides: on a mixture of Gaussians, where it is known."""

import csv
import math

import pytest
import torch as th
from helpers import draw_users, script

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.noised_classifier import LABEL_WEIGHT, ClassifierLosses, ClassifierTrainConfig
from guided_diffusion_vae.score_matching import GuidedNoise
from guided_diffusion_vae.script_util import create_gaussian_diffusion

MEANS, SPREAD = th.tensor([[-1.5, 0.5, 0.0, 1.0], [1.0, -0.5, 2.0, 0.0]]).view(2, 4, 1, 1), 0.7  # of two classes
PROCESSES = {
    "flow": FlowMatching(),
    "flow of noise": FlowMatching(prediction="noise", time_scale=1000.0),
    "gaussian": create_gaussian_diffusion(steps=100, noise_schedule="cosine"),
    "of x_start": create_gaussian_diffusion(steps=100, predict_xstart=True, rescale_timesteps=True),
}


def mixture(process, x_t, t):
    """alpha, sigma, E[x_start | x_t, y] (N, 2, 4, 1, 1) and log p(x_t | y) (N, 2) but for a constant."""
    one = th.ones(len(x_t), 1, 1, 1)
    alpha, sigma = process.q_sample(one, t, noise=0 * one), process.q_sample(0 * one, t, noise=one)
    variance = (alpha**2 * SPREAD**2 + sigma**2)[:, None]
    away = x_t[:, None] - alpha[:, None] * MEANS
    x_start = MEANS + alpha[:, None] * SPREAD**2 / variance * away
    return alpha, sigma, x_start, (-(away**2) / variance / 2).flatten(2).sum(2)


class Exact:
    """The best prediction without labels, as the process wants it; `classifier` is the best of those."""

    def __init__(self, process):
        self.process = process

    def __call__(self, x, seen):
        process = self.process
        t = seen / process.time_scale if isinstance(process, FlowMatching) else process_times(process, seen)
        alpha, sigma, x_start, log_p = mixture(process, x, t)
        guess = (log_p.softmax(1)[:, :, None, None, None] * x_start).sum(1)
        noise = (x - alpha * guess) / sigma
        if isinstance(process, FlowMatching):
            return process.convert(noise, x, t, source="noise", target=process.prediction)
        return guess if process.model_mean_type.name == "START_X" else noise

    def classifier(self, x, seen):
        flow = isinstance(self.process, FlowMatching)
        return mixture(self.process, x, seen / 1000 if flow else process_times(self.process, seen))[3]


def process_times(process, seen):
    return (seen * process.num_timesteps / 1000 if process.rescale_timesteps else seen).long()


def case(name, n=64):
    process, generator = PROCESSES[name], th.Generator().manual_seed(0)
    y = th.arange(n) % 2
    x_start = MEANS[y] + SPREAD * th.randn(n, 4, 1, 1, generator=generator)
    noise = th.randn(n, 4, 1, 1, generator=generator)
    t = th.linspace(0.05, 0.95, n) if isinstance(process, FlowMatching) else th.arange(n) + 5
    return process, x_start, noise, t, y


@pytest.mark.parametrize("name", PROCESSES)
def test_the_true_gradient_makes_the_conditional_prediction(name):
    process, x_start, noise, t, y = case(name)
    exact = Exact(process)
    losses = ClassifierLosses(process, guided=GuidedNoise(exact, process))
    found = losses.training_losses(exact.classifier, x_start, t, {"y": y}, noise=noise)
    x_t = process.q_sample(x_start, t, noise=noise)
    alpha, sigma, guesses, log_p = mixture(process, x_t, t)
    conditional = (x_t - alpha * guesses[range(len(y)), y]) / sigma
    weight = (1 / alpha**2).clamp(max=100.0)
    wanted = (weight * (conditional - noise) ** 2).flatten(1).mean(1)
    assert th.allclose(found["mse"], wanted, rtol=1e-3, atol=1e-5)
    ce = -log_p.log_softmax(1)[range(len(y)), y]
    assert th.allclose(found["loss"], wanted + LABEL_WEIGHT * ce, rtol=1e-3, atol=1e-5)
    assert found["mse"].mean() < found["mse_unguided"].mean()


@pytest.mark.parametrize("name", PROCESSES)
def test_no_other_gradient_is_better(name):
    process, x_start, noise, t, y = case(name, n=90)
    exact, n = Exact(process), 90
    many = [v.repeat_interleave(200, 0) for v in (x_start, t, y)]
    noise = th.randn(200 * n, 4, 1, 1, generator=th.Generator().manual_seed(1))
    losses = ClassifierLosses(process, guided=GuidedNoise(exact, process))

    def loss(scale):
        def classifier(x, seen):
            return scale * exact.classifier(x, seen)

        return losses.training_losses(classifier, many[0], many[1], {"y": many[2]}, noise=noise)["mse"].mean().item()

    flat, half, best, double = (loss(scale) for scale in (0.0, 0.5, 1.0, 2.0))
    assert best < half < flat and best < double


class Linear(th.nn.Module):
    """Logits W x."""

    def __init__(self):
        super().__init__()
        self.weight = th.nn.Parameter(th.tensor([[0.5, -0.2, 0.1, 0.3], [-0.4, 0.6, 0.2, -0.1]]))

    def forward(self, x, t):
        return x.flatten(1) @ self.weight.T


def test_the_classifier_learns_by_its_gradient():
    """Two classes: the gradient of log p(y | x) is (1 - p_y) (w_y - w_other), and the loss falls along its slope."""
    process, x_start, noise, t, y = case("flow")
    classifier, exact = Linear(), Exact(process)
    losses = ClassifierLosses(process, guided=GuidedNoise(exact, process))
    found = losses.training_losses(classifier, x_start, t, {"y": y}, noise=noise)
    (slope,) = th.autograd.grad(found["loss"].mean(), classifier.parameters())
    step, losses_at = 1e-2, []
    for sign in (1, -1):
        with th.no_grad():
            moved = Linear()
            moved.weight += sign * step * slope / slope.norm()
            losses_at.append(losses.training_losses(moved, x_start, t, {"y": y}, noise=noise)["loss"].mean().item())
    assert (losses_at[0] - losses_at[1]) / (2 * step) == pytest.approx(slope.norm().item(), rel=2e-2)
    assert math.isfinite(slope.norm()) and slope.norm() > 1e-3


TINY = "--image_size 32 --log_interval 1 --sample_posterior False --batch_size 4 --lr 1e-3"
NETWORK = (
    "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8 --max_steps 2"
)
CLASSIFIER = "--classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 --iterations 3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("guided")
    draw_users(root / "data", ["user_01", "user_07", "user_30"], 3)
    for labels in (True, False):
        flags = [*TINY.split(), *NETWORK.split(), "--class_cond", labels]
        script("image_train_vae.py", *flags, "--data_dir", root / "data", "--log_dir", root / f"labels_{labels}")
    return root


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_teaches_the_gradient(folder, tmp_path, ranks):
    data = ["--data_dir", folder / "data", "--val_data_dir", folder / "data", "--eval_interval", 3]
    model = ["--model_path", folder / "labels_False" / "model000002.pt", "--log_dir", tmp_path]
    script("classifier_train_vae.py", *TINY.split(), *CLASSIFIER.split(), *data, *model, ranks=ranks)
    (*_, row) = csv.DictReader((tmp_path / "progress.csv").open())
    assert {"train_mse", "train_mse_unguided", "train_ce", "val_mse", "val_mse_unguided"} <= row.keys()
    loss, mse, ce = (float(row[f"train_{name}"]) for name in ("loss", "mse", "ce"))
    assert loss == pytest.approx(mse + LABEL_WEIGHT * ce, rel=1e-5) and ce > 0
    led = ["--classifier_path", tmp_path / "model000003.pt", "--sampler", "dpmpp_2m", "--num_steps", 3]
    script("image_sample_vae.py", *model[:2], *led, "--num_samples", 2, "--log_dir", tmp_path / "led")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "learned with labels: guide it by --cfg_scale"),
        (["--process", "flow"], "was trained with --process gaussian: give that instead of flow"),
        (["--scale_factor", 0.5], "was trained on latents of autoencoder"),
    ],
)
def test_a_model_that_it_cannot_guide_is_one_line(folder, tmp_path, flags, words):
    model = folder / f"labels_{not flags}" / "model000002.pt"
    given = [*TINY.split(), *CLASSIFIER.split(), "--data_dir", folder / "data", "--model_path", model, *flags]
    done = script("classifier_train_vae.py", *given, "--log_dir", tmp_path / "run", check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [{"noised": False}, {"channels_last": True}])
def test_what_has_no_gradient_of_noisy_latents_is_refused(flag):
    with pytest.raises(UserError, match=f"leave --{next(iter(flag))}"):
        ClassifierTrainConfig(model_path="model.pt", **flag)
