"""The noise-conditioned classifier: its loss by hand, its times by what guidance asks, its training cut and shared."""

import copy
import csv

import numpy as np
import pytest
import torch as th
from helpers import draw_users, script

from guided_diffusion_vae import checkpoint, logger
from guided_diffusion_vae.config import Run, UserError, create_argparser, parse_run
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.noised_classifier import (
    ClassifierLosses,
    ClassifierTrainConfig,
    CleanTimes,
    LatentClassifierConfig,
    classifier_times,
    create_latent_classifier,
    load_classifier,
)
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.script_util import DiffusionConfig, create_gaussian_diffusion
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.unet import EncoderUNetModel
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae
from guided_diffusion_vae.validation import validation_terms


class Asked:
    """Logits that are a stated function of x and t; remembers the times it was asked at."""

    def __init__(self, classes=7):
        self.weight, self.times = th.from_numpy(np.random.RandomState(1).randn(12, classes)).float(), []

    def __call__(self, x, t):
        self.times += t.tolist()
        return x.flatten(1) @ self.weight + 0.001 * t.float()[:, None] * self.weight[0]


def batch(n=6, classes=7):
    rng = np.random.RandomState(0)
    x, noise = (th.from_numpy(rng.randn(n, 3, 2, 2)).float() for _ in range(2))
    return x, noise, th.from_numpy(rng.randint(classes, size=n))


@pytest.mark.parametrize("name", ["gaussian", "flow"])
def test_the_loss_is_the_cross_entropy_of_noisy_data(name):
    x, noise, y = batch()
    if name == "flow":
        process, t = FlowMatching(), th.linspace(0.1, 0.9, 6)
        signal, sigma, seen = t, 1 - t, 1000 * t
    else:
        process, t = create_gaussian_diffusion(steps=100, noise_schedule="cosine"), th.arange(6) * 15
        abar = th.from_numpy(process.alphas_cumprod)[t].float()
        signal, sigma, seen = abar.sqrt(), (1 - abar).sqrt(), t
    x_t = signal.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1) * noise
    logits = Asked()(x_t, seen).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    found = ClassifierLosses(process).training_losses(Asked(), x, t, {"y": y}, noise=noise)
    np.testing.assert_allclose(found["loss"], -np.log(p[range(6), y]), rtol=1e-4)
    for k in (1, 5):
        assert found[f"acc@{k}"].tolist() == [float(y[i] in order[i, :k]) for i in range(6)]
    few = ClassifierLosses(process).training_losses(Asked(5), x, t, {"y": y % 5}, noise=noise)
    assert set(few) == {"loss", "acc@1"}  # the likeliest 5 of 5 are no news


@pytest.mark.parametrize("respacing", ["", "20", "ddim10", "5,10"])
@pytest.mark.parametrize("rescale", [False, True])
def test_it_is_trained_at_the_times_that_guidance_asks_at(rescale, respacing):
    """All kept times: in training, by `condition_mean` (ancestral steps) and by `condition_score` (DDIM)."""
    process = create_gaussian_diffusion(steps=200, rescale_timesteps=rescale, timestep_respacing=respacing)
    t = th.arange(process.num_timesteps)
    x = th.zeros(len(t), 3, 2, 2)
    trained, guided = Asked(), []
    ClassifierLosses(process).training_losses(trained, x, t, {"y": t * 0})

    def cond_fn(x, t, **_):
        guided.append(t.tolist())
        return th.zeros_like(x)

    out = {"mean": x, "variance": x, "pred_xstart": x}
    process.condition_mean(cond_fn, out, x, t)
    process.condition_score(cond_fn, out, x, t)
    assert guided == [trained.times] * 2
    kept = range(200) if not respacing else sorted(process.use_timesteps)
    assert trained.times == pytest.approx([i * (5 if rescale else 1) for i in kept])


def test_a_flow_is_asked_on_a_scale_of_1000_whatever_its_network_sees():
    t = th.linspace(0, 1, 5)
    x = th.zeros(5, 3, 2, 2)
    for time_scale in (1.0, 1000.0):
        process, trained = FlowMatching(time_scale=time_scale), Asked()
        ClassifierLosses(process).training_losses(trained, x, t, {"y": th.zeros(5, dtype=th.long)})
        assert trained.times == [0, 250, 500, 750, 1000]
        assert classifier_times(process, t * process.time_scale).tolist() == trained.times


@pytest.mark.parametrize("process, time", [(create_gaussian_diffusion(steps=100), 0), (FlowMatching(), 1000)])
def test_without_noise_it_sees_clean_data_at_their_time(process, time):
    x, noise, y = batch()
    losses, asked = ClassifierLosses(process, noised=False), Asked()
    t, weights = CleanTimes(losses, create_named_schedule_sampler("uniform", process)).sample(6, "cpu")
    found = losses.training_losses(asked, x, t, {"y": y}, noise=noise)
    assert asked.times == [time] * 6 and weights.tolist() == [1] * 6
    wanted = th.nn.functional.cross_entropy(Asked()(x, th.full((6,), time)), y, reduction="none")
    assert th.equal(found["loss"], wanted)


class Seen(th.nn.Module):
    """Keeps what it is shown."""

    def forward(self, x, t):
        self.x = x
        return x.new_zeros(len(x), 3)


def test_time_shift_moves_what_is_learnt_and_not_what_is_judged():
    x = th.arange(8.0).expand(64, 2, 3, 8)  # every row counts its columns
    losses, seen = ClassifierLosses(FlowMatching(), noised=False, time_shift=True), Seen()
    th.manual_seed(0)
    losses.training_losses(seen, x, th.ones(64), {"y": th.zeros(64, dtype=th.long)})
    assert th.equal((seen.x - seen.x[..., :1]) % 8, x)  # each counts on from another column
    assert set(seen.x[:, 0, 0, 0].tolist()) == set(range(8))
    losses.training_losses(seen.eval(), x, th.ones(64), {"y": th.zeros(64, dtype=th.long)})
    assert th.equal(seen.x, x)


class HeldOut:
    """Rows whose label can be read off them, so that `Reader` is right about a stated share."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices):
        y = th.tensor([i % 7 for i in indices])
        return 100.0 * (1 + y).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), {"y": y}


class Reader(th.nn.Module):
    """Right about clean rows of label 0 to 2 (3 of 7); calls all others 0, and gives label 6 the last rank."""

    def forward(self, x, t):
        label = (x.mean((1, 2, 3)) / 100).round().long() - 1
        guess = th.where(label < 3, label, 0)
        base = th.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
        return base + 5.0 * th.nn.functional.one_hot(guess, 7)


def test_held_out_accuracy_counts_every_row_once():
    losses = ClassifierLosses(FlowMatching(), noised=False)
    for batch_size in (1, 4, 21):
        terms = validation_terms(Reader(), losses, HeldOut(21), batch_size=batch_size, seed=0)
        assert terms["acc@1"] == pytest.approx(3 / 7) and terms["acc@5"] == pytest.approx(5 / 7)


# ---- the loop


class Stream:
    """Endless batches that follow from the step alone."""

    def __init__(self):
        self.step = 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        rng = np.random.RandomState(self.step)
        self.step += 1
        return th.from_numpy(rng.randn(4, 3, 8, 8)).float(), {"y": th.from_numpy(rng.randint(3, size=4))}


class FewRows(HeldOut):
    def batch(self, indices):
        rng = np.random.RandomState(99)
        z = th.from_numpy(rng.randn(len(self), 3, 8, 8)).float()
        return z[list(indices)], {"y": th.tensor([i % 3 for i in indices])}


def loop(folder, model, iterations, **flags):
    process = create_gaussian_diffusion(steps=50)
    config = ClassifierTrainConfig(iterations=iterations, log_interval=1, save_interval=4, eval_interval=2, **flags)
    with logger.scoped_configure(str(folder), format_strs=["csv"]):
        trained = TrainLoop(
            model=copy.deepcopy(model),
            diffusion=ClassifierLosses(process),
            data=Stream(),
            heldout=FewRows(5),
            schedule_sampler=create_named_schedule_sampler("uniform", process),
            **config.for_the_loop(),
        )
        trained.run_loop()
    return trained


def test_the_loop_stops_and_goes_on_with_the_same_bits(tmp_path):
    th.manual_seed(0)
    model = EncoderUNetModel(8, 3, 32, 3, 1, (), channel_mult=(1,), pool="adaptive")
    straight = loop(tmp_path / "a", model, 7)
    loop(tmp_path / "b", model, 4)
    resumed = loop(tmp_path / "b", model, 7, resume_checkpoint="auto")
    assert resumed.resume_step == 4
    for name in ("model000007.pt", "model_best.pt"):
        a, b = (checkpoint.load(tmp_path / part / name) for part in "ab")
        assert all(th.equal(a[key], b[key]) for key in a), name
    a, b = (checkpoint.load(tmp_path / part / "opt000007.pt")["state"] for part in "ab")
    assert all(th.equal(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"]) for i in a)
    assert {path.name[:5] for path in (tmp_path / "a").glob("*.pt")} == {"model", "opt00", "state"}  # no averages
    rows = list(csv.DictReader((tmp_path / "a" / "progress.csv").open()))
    assert {"train_loss", "train_acc@1", "train_loss_q0", "val_loss", "val_acc@1"} <= set(rows[0])
    assert not {"loss", "train_acc@5"} & set(rows[0])
    assert straight.newest_average().name == "model000007.pt"
    best = min(float(row["val_loss"]) for row in rows if row["val_loss"])
    assert straight.validation.best[0] == pytest.approx(best) and straight.best_average().name == "model_best.pt"


# ---- the script, and what it leaves

NAMES = ["user_01", "user_07", "user_30"]
TINY = "--image_size 32 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 --lr 1e-3"
TINY += " --diffusion_steps 100 --log_interval 1 --iterations 3 --eval_interval 2 --sample_posterior False"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three users with three images each, the last of whom is no user of the smaller folder."""
    root = tmp_path_factory.mktemp("classifier")
    rng = np.random.RandomState(0)
    for part, names in (("train", NAMES), ("fewer", NAMES[:2])):
        draw_users(root / part, names, 3, rng=rng)
    return root


def train(folder, log_dir, *flags, data="train", val="train", **options):
    data = ["--data_dir", folder / data, "--val_data_dir", folder / val, "--log_dir", log_dir]
    return script("classifier_train_vae.py", *TINY.split(), *data, *flags, **options)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("alone")
    train(folder, log_dir, "--batch_size", 4)
    return log_dir


def test_two_processes_train_as_one(folder, trained, tmp_path):
    """By their gradients: Adam makes steps of the rounding of weights whose gradient is zero, such as a key's bias."""
    train(folder, tmp_path, "--batch_size", 2, ranks=2)
    a, b = (checkpoint.load(log_dir / "opt000003.pt")["state"] for log_dir in (trained, tmp_path))
    assert max(a[i]["exp_avg"].abs().max().item() for i in a) > 1e-3
    assert max((a[i]["exp_avg"] - b[i]["exp_avg"]).abs().max().item() for i in a) < 2e-6
    a, b = (list(csv.DictReader((log_dir / "progress.csv").open())) for log_dir in (trained, tmp_path))
    for name in ("val_loss", "val_acc@1"):
        values = [[float(row[name]) for row in rows if row[name]] for rows in (a, b)]
        assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], rel=1e-5)


def model_run(*flags) -> Run:
    """Settings of a model to be guided, as image_sample_vae.py would have them."""
    sections = (LatentClassifierConfig, DiffusionConfig, VAEConfig)
    run = parse_run(create_argparser(*sections), ["--image_size", "32", "--diffusion_steps", "100", *map(str, flags)])
    return run.replace(process="gaussian")


def test_the_classifier_is_loaded_with_its_own_settings(trained):
    run = model_run()
    vae = load_vae(run.section(VAEConfig))
    model, names = load_classifier(trained / "model_best.pt", vae, run=run, class_names=NAMES)
    assert names == NAMES and not model.training and not any(p.requires_grad for p in model.parameters())
    stored = checkpoint.load(trained / "model_best.pt")
    assert all(th.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert model(th.zeros(2, *vae.latent_shape(32)), th.tensor([0, 99])).shape == (2, 3)


@pytest.mark.parametrize(
    "flags, names, words",
    [
        (["--scale_factor", 0.5], NAMES, ["latents of autoencoder", "--vae_path"]),
        ([], ["user_01", "user_30"], ["3 classes and the model 2", "has user_07 the model has user_30"]),
        ([], NAMES[:2], ["has user_30 the model has no class"]),
        (["--noise_schedule", "cosine"], NAMES, ["--noise_schedule linear, but the model with cosine"]),
        (["--diffusion_steps", 1000], NAMES, ["--diffusion_steps 100, but the model with 1000"]),
        (["--classifier_width", 128], NAMES, ["--classifier_width is 128", "with 32"]),
    ],
)
def test_a_classifier_of_something_else_is_refused(trained, flags, names, words):
    run = model_run(*flags)
    vae = load_vae(run.section(VAEConfig))
    with pytest.raises(UserError) as raised:
        load_classifier(trained / "model000003.pt", vae, run=run, class_names=names)
    assert all(word in str(raised.value) for word in words), raised.value


def test_what_is_no_classifier_is_named():
    vae, run = load_vae(VAEConfig()), model_run()
    with pytest.raises(UserError, match="--classifier_path nowhere.pt does not exist"):
        load_classifier("nowhere.pt", vae, run=run, class_names=NAMES)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_size": 64, "classifier_width": 48}, ["48, 96, 96 channels", "--classifier_width 64"]),
        (
            {"image_size": 64, "classifier_width": 32},
            ["leave the 16 out of --classifier_attention_resolutions 32,16,8"],
        ),
        ({"image_size": 48}, ["12 x 12 latents", "--classifier_channel_mult", "3 levels at most"]),
        ({"image_size": 32, "classifier_channel_mult": "1,1,1,1,1"}, ["4 levels at most"]),
    ],
)
def test_widths_that_cannot_be_are_named(settings, words):
    config, vae = LatentClassifierConfig(**settings), load_vae(VAEConfig())
    with pytest.raises(UserError) as raised, th.device("meta"):
        create_latent_classifier(config, vae, num_classes=3)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_small_latent_takes_a_channel_mult():
    config = LatentClassifierConfig(image_size=16, classifier_width=64, classifier_channel_mult="1,2")
    model = create_latent_classifier(config, load_vae(VAEConfig()), num_classes=3)
    assert model(th.zeros(1, 4, 4, 4), th.zeros(1)).shape == (1, 3)
    assert model.channel_mult == (1, 2)


def test_data_that_do_not_fit_are_one_line(folder, tmp_path):
    done = train(folder, tmp_path, data="fewer", check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "--val_data_dir" in done.stderr and "holds the class user_30" in done.stderr


@pytest.mark.parametrize("name, value", [("process", "sde"), ("eval_interval", 0), ("lr", 0.0), ("amp", "fp16")])
def test_a_flag_that_cannot_be_is_named(name, value):
    with pytest.raises(UserError, match=f"--{name} is"):
        ClassifierTrainConfig(**{name: value})
