"""What is drawn: the numbers in the pictures, walks whose guesses are known; and that drawing changes nothing else."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from helpers import ROOT, draw_users, save_sets, script
from PIL import Image
from test_readme import walk

from evaluations import measure, plots, report, user_classifier
from evaluations.findings import Section
from evaluations.html import render
from evaluations.image_sets import ImageSet
from guided_diffusion_vae import checkpoint, curves, logger, pictures, plotting
from guided_diffusion_vae.assembly import SamplerConfig, create_sampler
from guided_diffusion_vae.autoencoders.objectives import ObjectiveConfig
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import spectrogram
from guided_diffusion_vae.data.microdoppler import VELOCITY_MPS, SimulationConfig, claim_folder
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.pictures import WatchedSampler, find_axes, hand_on_axes
from guided_diffusion_vae.plotting import PictureAxes, PlotConfig
from guided_diffusion_vae.sample_util import Batch
from guided_diffusion_vae.script_util import create_gaussian_diffusion
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.vae_tasks import VAEModelConfig, create_task
from guided_diffusion_vae.vae_train_util import VAETrainConfig, VAETrainer
from guided_diffusion_vae.vae_wrapper import VAEInterface

drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
SCRIPTS = ["image_train_vae", "vae_train", "classifier_train_vae", "image_sample_vae", "check_vae", "latent_extract"]
SCRIPTS += ["evaluate_samples", "validate"]


# ---- without matplotlib ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_matplotlib_it_is_refused_before_any_work(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=r'--plot True needs matplotlib: pip install "guided_diffusion_vae\[plots\]"'):
        module.main(["--plot", "True"])
    assert not list(tmp_path.iterdir())


def test_in_one_line_with_exit_code_2(tmp_path):
    (tmp_path / "matplotlib.py").write_text('raise ImportError("No module named matplotlib")')
    done = script("evaluate_samples.py", "--plot", True, check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.strip().splitlines() == [f"error: {plotting.LACKING}"]
    PlotConfig(plot=False)


# ---- curves ----------------------------------------------------------------------------------------------------------


def write_log(folder, columns):
    """A progress.csv of these columns; None is an empty cell."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join("" if value is None else str(value) for value in row) for row in rows]
    (folder / "progress.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    return curves.read_progress(folder / "progress.csv")


def lines(axes):
    """The drawn curves by name: (x, y)."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}


TRAINING = {
    "grad_norm": [1.0, 0.5, 0.25, 0.2],
    "loss": [1.0, 0.5, 0.3, 0.25],
    "loss_q0": [1.0, 0.1, 0.02, 0.01],
    "loss_q3": [1.0, 0.9, 0.8, 0.7],
    "mse": [1.0, 0.5, 0.3, 0.25],
    "mse_q0": [1.0, 0.1, 0.02, 0.01],
    "param_norm": [9.0, 9.0, 9.0, 9.0],
    "samples": [32, 1632, 3232, 4832],
    "step": [0, 50, 100, 150],
    "val_loss": [None, 0.6, 0.4, 0.45],
}


@drawing
def test_the_curves_are_those_of_the_log(tmp_path):
    figure = curves.draw_curves(write_log(tmp_path, TRAINING))
    loss, quarters, gradient = figure.axes
    drawn = lines(loss)
    assert drawn["loss"] == [[0, 50, 100, 150], TRAINING["loss"]]
    assert drawn["val_loss"] == [[50, 100, 150], [0.6, 0.4, 0.45]]
    assert drawn["lowest val_loss:\n0.4 at step 100"] == [[100], [0.4]]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]
    assert lines(quarters)["loss_q3"][1] == TRAINING["loss_q3"] and "mse_q0" not in lines(quarters)
    assert lines(gradient)["grad_norm"][1] == TRAINING["grad_norm"]
    for axes in figure.axes:  # the best step is marked in every panel
        assert any(x == [100, 100] for x, _ in lines(axes).values())


def test_what_the_loops_log_finds_its_panel():
    """The columns of the three training loops, as their rows have them."""
    rows = {name: np.array([2.0, 1.0]) for name in "epoch images_per_second kl recon step".split()}
    rows["loss"] = np.array([3.0, 2.0])
    assert curves.panels_of(rows) == {"loss": ["loss"], "terms": ["kl", "recon"]}
    words = "step total_loss rec_loss nll_loss kl_loss logvar g_loss d_weight disc_loss logits_real logits_fake lpips"
    rows = {name: np.array([1.0, float(i)]) for i, name in enumerate(words.split(), start=1)}
    assert curves.panels_of(rows) == {
        "loss": ["total_loss"],
        "terms": ["rec_loss", "nll_loss", "kl_loss", "g_loss", "disc_loss", "lpips"],
        "discriminator's logits": ["logits_real", "logits_fake"],
        "weights": ["logvar", "d_weight"],
    }
    words = "step samples grad_norm train_loss train_loss_q0 train_acc@1 train_acc@1_q0 train_acc@5 val_acc@1 val_loss"
    rows = {name: np.array([1.0, float(i)]) for i, name in enumerate(words.split(), start=1)}
    assert curves.panels_of(rows | {"train_ce": np.array([np.nan, np.nan])}) == {
        "loss": ["train_loss", "val_loss"],
        "loss by quarter of the times": ["train_loss_q0"],
        "share named right": ["train_acc@1", "train_acc@5", "val_acc@1"],
        "gradient": ["grad_norm"],
    }


def test_the_best_step_without_validation_and_with_a_loss_that_is_no_number():
    rows = {"step": np.array([0.0, 1, 2]), "loss": np.array([3.0, np.nan, 2])}
    assert curves.best_of(rows) == ("loss", 2, 2.0)
    assert curves.best_of(rows | {"val_loss": np.array([np.nan, 5, np.inf])}) == ("val_loss", 1, 5.0)
    assert curves.best_of({"step": rows["step"], "grad_norm": rows["loss"]}) is None


@drawing
def test_of_many_rows_a_moving_average_over_the_raw_curve():
    steps = np.arange(1000.0)
    figure = curves.draw_curves({"step": steps, "loss": 5 + (-1) ** steps})
    smooth, raw = (line.get_ydata() for line in figure.axes[0].get_lines()[:2])
    assert set(raw) == {4.0, 6.0} and np.allclose(smooth[20:-20], 5.0) and len(smooth) == 1000


@pytest.mark.parametrize("text", ["", "loss\n1\n", "step,loss\n"])
def test_a_log_without_rows_is_said(tmp_path, text):
    (tmp_path / "progress.csv").write_text(text)
    said = []
    assert not curves.draw_progress(tmp_path, said.append)
    assert not curves.draw_progress(tmp_path / "nowhere", said.append)
    assert len(said) == 2 and all("has no rows yet, or --log_format names no csv" in line for line in said)


class Net(th.nn.Module):
    """A linear map that drops out: its weights depend on every global random number that is drawn."""

    def __init__(self):
        super().__init__()
        th.manual_seed(0)
        self.map, self.drop = th.nn.Linear(4, 4), th.nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(self.map(x))


def trained(folder, on_save=None, steps=5, **options):
    """The weights after a few steps, drawn from the global generators in upstream's order."""
    model = Net()
    options = {"batch_size": 4, "microbatch": -1, "lr": 1e-2, "ema_rate": "0.9", "log_interval": 2, **options}
    with logger.scoped_configure(str(folder), format_strs=["csv", "log"]):
        data = iter([(th.ones(4, 1, 4), {})] * steps)
        process = create_gaussian_diffusion(steps=20)
        loop = TrainLoop(
            model=model,
            diffusion=process,
            data=data,
            save_interval=2,
            resume_checkpoint="",
            max_steps=steps,
            on_save=on_save,
            **options,
        )
        th.manual_seed(1), np.random.seed(1)
        loop.run_loop()
    return model.state_dict()


@drawing
def test_drawing_changes_no_training_and_no_failure_ends_one(tmp_path):
    saved = []

    def draw(folder):
        saved.append(curves.draw_progress(folder, logger.warn))

    plain = trained(tmp_path / "plain")
    drawn = trained(tmp_path / "drawn", lambda: draw(tmp_path / "drawn"))
    assert saved == [True] * 4  # after steps 0, 2 and 4, and at the end
    (tmp_path / "bad" / "curves.png" / "x").mkdir(parents=True)  # no file can take its place
    failed = trained(tmp_path / "bad", lambda: draw(tmp_path / "bad"))
    assert saved[4:] == [False] * 4
    for name, value in plain.items():
        assert th.equal(value, drawn[name]) and th.equal(value, failed[name])
    assert Image.open(tmp_path / "drawn" / "curves.png").width > 500
    log = (tmp_path / "bad" / "log.txt").read_text()
    assert log.count("warning: curves.png could not be drawn: ") == 4 and "Traceback" not in log


def test_rows_after_the_last_checkpoint_are_drawn_too(tmp_path):
    """Five steps, of which the last has a checkpoint of its own: the log's last row comes after it."""
    seen = []
    folder = tmp_path / "run"
    trained(folder, lambda: seen.append((folder / "progress.csv").read_text().count("\n")), log_interval=3)
    assert seen == [2, 2, 3, 4]  # lines of header and rows after steps 0, 2, 4, and at the end


@drawing
def test_an_autoencoders_training_draws_its_terms(tmp_path):
    """At every writing of last.pt, and its weights have the same bits."""
    draw_users(tmp_path / "data", ["user_00", "user_01"], 6, 16)
    data = VAEDataConfig(data_root=str(tmp_path / "data"), image_size=16)
    drawn, weights = [], {}
    for plot in (False, True):
        folder = tmp_path / f"{plot}"
        with logger.scoped_configure(str(folder), format_strs=["csv"]):
            th.manual_seed(0)
            model = VAEModelConfig(ch=8, ch_mult="1,2", norm_groups=4)
            task = create_task(model, ObjectiveConfig(kl_weight=0.01), image_size=16, say=str)
            parts = data.parts(task.channels, seed=0, say=str)
            config = VAETrainConfig(batch_size=4, max_steps=4, save_interval=2, log_interval=1)
            about = {"image_size": 16, "folder": folder, "arguments": {}}
            if plot:
                about["on_save"] = lambda folder=folder: drawn.append(curves.draw_progress(folder, print))
            VAETrainer(task, parts.train, parts.val, config, **about).run()
        weights[plot] = checkpoint.load(folder / "last.pt")["model"]
    assert drawn == [True, True] and all(th.equal(weights[True][name], x) for name, x in weights[False].items())
    columns = curves.read_progress(tmp_path / "True" / "progress.csv")
    assert list(columns["step"]) == [1, 2, 3, 4] and {"rec_loss", "kl_loss"} <= {*curves.panels_of(columns)["terms"]}
    assert curves.panels_of(columns)["loss"] == ["total_loss"]


def test_whatever_goes_wrong_is_one_line():
    said = []

    def broken():
        raise RuntimeError("many\n  lines " + 300 * "x")

    assert plotting.or_said("a.png", int, said.append) and not said
    assert not plotting.or_said("a.png", broken, said.append)
    assert said[0].startswith("warning: a.png could not be drawn: many lines xxx") and len(said[0]) < 260
    with pytest.raises(KeyboardInterrupt):
        plotting.or_said("a.png", lambda: (_ for _ in ()).throw(KeyboardInterrupt()), said.append)


# ---- axes ------------------------------------------------------------------------------------------------------------


def test_axes_of_an_import_of_the_simulator_and_of_nobody(tmp_path):
    data = tmp_path / "DATA"
    (data / "train" / "user_00").mkdir(parents=True)
    assert find_axes(data) is None and find_axes("") is None and find_axes(None) is None
    assert find_axes(tmp_path / "gone" / "train") is None
    claim_folder(SimulationConfig(out_dir=str(data), duration_s=2.5))
    assert find_axes(data / "train") == find_axes(str(data)) == (*VELOCITY_MPS, "m/s", 2.5)
    (data / "axes.yaml").write_text(yaml.safe_dump({"velocity_mps": [-3.0, 6], "duration_s": 3.0, "carrier_ghz": 24}))
    assert find_axes(data / "train") == (-3.0, 6.0, "m/s", 3.0)
    (data / "others").mkdir()
    assert find_axes(data / "others") is None  # what lies above is told of parts of the data alone
    (data / "axes.yaml").write_text("doppler_hz: [-500, 500]\nduration_s: 4\n")
    assert find_axes(data) == (-500.0, 500.0, "Hz", 4.0)


@pytest.mark.parametrize(
    "text", ["velocity_mps: [1", "velocity_mps: [3, -3]\nduration_s: 1", "velocity_mps: up", "- 1", "duration_s: 3"]
)
def test_damaged_axes_are_none(tmp_path, text):
    (tmp_path / "axes.yaml").write_text(text)
    assert find_axes(tmp_path) is None


@pytest.mark.parametrize("told", ["velocity_mps: [-0.1, 6.3]\nduration_s: 3.3", "doppler_hz: [-9, 9]\nduration_s: 1"])
def test_latents_inherit_the_axes_of_their_images(tmp_path, told):
    images, latents = tmp_path / "images", tmp_path / "latents"
    images.mkdir(), (latents / "train").mkdir(parents=True)
    hand_on_axes(images, latents)
    assert not (latents / "axes.yaml").exists()
    (images / "axes.yaml").write_text(told)
    hand_on_axes(images, latents)
    assert find_axes(latents / "train") == find_axes(images) is not None
    hand_on_axes(images, images)
    assert (images / "axes.yaml").read_text() == told  # its own stay


# ---- grids -----------------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def texts(figure):
    return [text.get_text() for text in figure.texts]


@drawing
def test_a_grid_has_a_row_for_each_user_and_the_axes_of_the_data():
    rows, edges = [noise(3, 8, 8, 3), noise(2, 8, 8, 3, seed=1)], PictureAxes(-3.25, 6.5, "m/s", 3.0)
    figure = plotting.draw_grid(rows, ["user_00", "user_$7$"], edges)
    assert len(figure.axes) == 5 and {"user_00", "user_$7$", "velocity (m/s)", "time (s)"} == set(texts(figure))
    for axes, image in zip(figure.axes, [*rows[0], *rows[1]], strict=True):
        assert axes.get_ylim() == (-3.25, 6.5) and axes.get_xlim() == (0, 3.0)
        assert np.array_equal(axes.get_images()[0].get_array(), image)  # the first row is on top, at 6.5 m/s
        assert axes.get_images()[0].origin == "upper"
    assert "Doppler (Hz)" in texts(plotting.draw_grid(rows, ["a", "b"], edges._replace(unit="Hz")))
    figure = plotting.draw_grid(rows, ["a", "b"])
    assert figure.axes[0].get_ylim() == (8, 0) and figure.axes[0].get_xlim() == (0, 8)
    assert {"row", "column"} <= set(texts(figure))
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops[0] == tops[2] > tops[3] == tops[4]


def test_at_most_sixteen_users_spread_evenly():
    labels = np.repeat(np.arange(31), 9)
    names = [f"u{i}" for i in range(31)]
    rows, shown = pictures.rows_of(Batch(noise(len(labels), 2, 2, 3), labels), names)
    assert len(rows) == 16 and {len(images) for images in rows} == {8}
    assert shown[0] == "u0" and {int(b[1:]) - int(a[1:]) for a, b in zip(shown, shown[1:], strict=False)} == {1, 2}
    rows, shown = pictures.rows_of(Batch(noise(20, 2, 2, 3), None), [])
    assert [len(images) for images in rows] == [8, 8, 4] and shown == ["from 0", "from 8", "from 16"]


@pytest.mark.parametrize("name", list(spectrogram.ANCHORS))
def test_the_colours_are_found(name):
    """Also where a decoder has blurred them by 10 levels."""
    values = np.random.RandomState(0).uniform(-1, 1, (4, 16, 16))
    pixels = spectrogram.colours_from_unit(values, name)
    blurred = np.clip(pixels + np.random.RandomState(1).normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
    assert spectrogram.detect_colormap(pixels) == spectrogram.detect_colormap(blurred) == name
    assert plotting.colours_in_words(name).startswith(f"colours: {name} (detected")


def test_colours_that_are_in_no_map():
    assert spectrogram.detect_colormap(noise(4, 16, 16, 3)) == ""
    assert plotting.colours_in_words("") == "colours: of no known map, shown as they are"


@drawing
def test_grey_values_are_shown_in_viridis_and_colours_as_they_are():
    grey = noise(1, 4, 4, 1).repeat(3, axis=3)
    shown = plotting.draw_grid([grey], ["a"], None, spectrogram.detect_colormap(grey)).axes[0].get_images()[0]
    assert np.allclose(shown.get_array(), grey[0, ..., 0] / 255) and shown.get_cmap().name == "viridis"
    assert shown.get_clim() == (0, 1)
    jet = spectrogram.colours_from_unit(np.linspace(-1, 1, 16).reshape(1, 4, 4))
    shown = plotting.draw_grid([jet], ["a"], None, spectrogram.detect_colormap(jet)).axes[0].get_images()[0]
    assert np.array_equal(shown.get_array(), jet[0])


# ---- walks: the data are one image a user, so the right answer of a network is known ---------------------------------

CLEAN = th.tensor([-0.6, 0.1, 0.5, 0.75, 0.9])[:, None, None, None] * th.ones(5, 3, 4, 4)
LOG_SNR = {}  # of Gaussian processes, at their integer times


def gaussian(respacing="", **options):
    process = create_gaussian_diffusion(steps=100, noise_schedule="cosine", timestep_respacing=respacing, **options)
    whole = create_gaussian_diffusion(steps=100, noise_schedule="cosine")
    abar = np.asarray(whole.alphas_cumprod)

    def noise_predicted(x, t, y):
        scale = 10 if options.get("rescale_timesteps") else 1
        half = np.interp(t.numpy() / scale, np.arange(100), np.log(abar / (1 - abar)) / 2)  # linear between the times
        alpha, sigma = (th.from_numpy((1 + np.exp(s * 2 * half)) ** -0.5).float()[:, None, None, None] for s in (-1, 1))
        return (x - alpha * CLEAN[y]) / sigma

    return process, noise_predicted


def flow(time_scale):
    def velocity(x, t, y):
        t = (t / time_scale)[:, None, None, None].clamp(max=1 - 1e-4)
        return CLEAN[y] - (x - t * CLEAN[y]) / (1 - t)

    return FlowMatching(time_scale=time_scale), velocity


CASES = {
    "p_sample": (gaussian(), {}),
    "p_sample on a subset": (gaussian("10"), {}),
    "ddim on a subset": (gaussian("25", rescale_timesteps=True), {"use_ddim": True}),
    "dpmpp_2m": (gaussian(), {"sampler": "dpmpp_2m", "num_steps": 12}),
    "heun": (gaussian(rescale_timesteps=True), {"sampler": "heun", "num_steps": 9}),
    "flow, euler": (flow(1.0), {"num_steps": 20}),
    "flow, sde_euler": (flow(1000.0), {"sampler": "sde_euler", "num_steps": 20}),
    "flow, dpmpp_2m": (flow(1000.0), {"sampler": "dpmpp_2m", "num_steps": 10}),
}
LABELS = th.tensor([3, 3, 1, 4, 0, 2, 1])
LEVELS = 1.5  # of 8 bits: pixels are truncated, and a flow's ends are kept off by a thousandth


def watched(case):
    """A sampler, the same one watched, and the network of a case of CASES."""
    (process, model), settings = CASES[case]
    sampler = create_sampler(SamplerConfig(**settings, clip_denoised=False), process)
    return sampler, WatchedSampler(sampler, process, clip_denoised=False), model


@pytest.mark.parametrize("case", CASES)
def test_a_walk_is_that_of_the_sample_and_its_guesses_are_the_networks(case):
    """The same bits as without a watcher; x_t from the first noise to the sample; every guess is the clean image."""
    sampler, watcher, model = watched(case)
    ways = {"model_kwargs": {"y": LABELS}, "device": "cpu"}
    th.manual_seed(0)
    plain = sampler(model, (7, 3, 4, 4), **ways)
    state = th.get_rng_state()
    th.manual_seed(0)
    x = watcher(model, (7, 3, 4, 4), **ways)
    assert th.equal(x, plain) and th.equal(th.get_rng_state(), state)
    walks = watcher.walks(VAEInterface("pixel"), list("abcde"))
    assert [walk.name for walk in walks] == ["d", "b", "e", "a"]  # the first four users, in their order
    th.manual_seed(0)
    first = th.randn(7, 3, 4, 4)
    for walk_, row in zip(walks, (0, 2, 3, 4), strict=True):
        assert walk_.pixels.shape == (2, 8, 4, 4, 3) and len(walk_.noise) == 8
        begin, end = (((v[row] + 1) * 127.5).clamp(0, 255).numpy().transpose(1, 2, 0) for v in (first, x))
        assert np.abs(walk_.pixels[0, 0] - begin).max() <= LEVELS
        assert np.abs(walk_.pixels[:, -1] - end).max() <= LEVELS
        clean = (CLEAN[LABELS[row], 0, 0, 0] + 1) * 127.5
        assert np.abs(walk_.pixels[1].astype(float) - float(clean)).max() <= LEVELS
        assert walk_.noise[0] > 0.99 and walk_.noise[-1] == 0 and (np.diff(walk_.noise) < 0).all()


def test_what_is_remembered_of_a_long_walk_is_bounded():
    listener = pictures._Listener(lambda x, t: x, 2, [1])
    for i in range(1000):
        listener(th.full((2, 1), float(i)), th.full((2,), float(i)))
    calls = listener.of(0)
    seen = [float(call.t) for call in calls]
    assert len(calls) <= pictures.REMEMBERED + 2 and seen[0] == 0 and seen[-1] == 999
    assert len(set(np.diff(seen[:-1]))) == 1  # even


def test_walks_of_several_batches_and_without_users():
    _, watcher, model = watched("flow, euler")
    for y in ([0], [0], [1], [2, 0], [3], [4]):
        watcher(model, (len(y), 3, 4, 4), model_kwargs={"y": th.tensor(y)}, device="cpu")
    assert [walk.name for walk in watcher.walks(VAEInterface("pixel"), list("abcde"))] == list("abcd")
    sampler, watcher, _ = watched("flow, euler")
    watcher(lambda x, t: -x, (3, 3, 4, 4), model_kwargs={}, device="cpu")
    assert [walk.name for walk in watcher.walks(VAEInterface("pixel"), [])] == [""] * 3


def test_images_that_are_walked_one_by_one_have_no_strip():
    """As dopri5 does with a seed for each image: which one it is nobody tells."""
    watcher = WatchedSampler(
        lambda model, shape, **_: th.cat([model(th.zeros(1, *shape[1:]), th.zeros(1)) for _ in range(shape[0])]),
        FlowMatching(),
        clip_denoised=False,
    )
    assert len(watcher(lambda x, t: x, (2, 3, 4, 4))) == 2
    with pytest.raises(UserError, match="--sampler dopri5 with --per_image_seed True"):
        watcher.walks(VAEInterface("pixel"), [])


@drawing
def test_a_strip_has_two_rows_of_moments_for_each_walk():
    shown = [plotting.Walk(name, noise(2, 8, 4, 4, 3, seed=i), np.linspace(1, 0, 8)) for i, name in enumerate("ab")]
    figure = plotting.draw_walks(shown)
    assert len(figure.axes) == 2 * 2 * 8
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert np.array_equal(drawn, np.concatenate([walk.pixels.reshape(16, 4, 4, 3) for walk in shown]))
    assert texts(figure).count("100% noise") == 2 and texts(figure).count("finished") == 2


# ---- latents ---------------------------------------------------------------------------------------------------------


@drawing
@pytest.mark.parametrize("channels", [3, 19])
def test_latents_have_one_symmetric_scale_and_a_histogram_each(channels):
    rng = np.random.RandomState(0)
    latents, values = rng.randn(2, channels, 4, 4), rng.randn(channels, 5000)
    pixels, decoded = noise(2, 8, 8, 3), noise(2, 8, 8, 3, seed=1)
    edges = PictureAxes(-1, 1, "m/s", 2.0)
    figure = plotting.draw_latents(pixels, latents, decoded, ["a", "b"], values, edges)
    images = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    maps = [image for image in images if image.get_array().ndim == 2]
    assert len(maps) == 2 * channels and len(images) == 2 * channels + 4
    assert np.allclose([m.get_array() for m in maps], latents.reshape(-1, 4, 4))
    low, high = maps[0].get_clim()
    assert low == -high and {image.get_clim() for image in maps} == {(low, high)}
    histograms = [axes for axes in figure.axes if "mean" in axes.get_title()]
    assert len(histograms) == channels
    for axes, mine in zip(histograms, values, strict=True):
        heights, step = np.array([bar.get_height() for bar in axes.patches]), 0.2
        assert heights.sum() * step == pytest.approx(1)
        x, y = axes.get_lines()[0].get_data()
        assert y.max() == pytest.approx((2 * np.pi) ** -0.5) and x[y.argmax()] == 0
        assert f"std {mine.std():.2f}" in axes.get_title()


@drawing
def test_the_latents_of_an_autoencoder_are_drawn_by_a_generator_of_their_own(tmp_path, monkeypatch):
    """Four of six users: their pictures, the latents that a diffusion model is trained on, and what they decode to."""
    found = {}
    monkeypatch.setattr(pictures, "draw_latents", lambda *a: found.update(enumerate(a)) or plotting.new_figure(1, 1))
    vae, said = VAEInterface("microdoppler-f4"), []
    pixels, labels, names = noise(12, 32, 32, 3), np.repeat(np.arange(6), 2), [f"user_{i}" for i in range(6)]
    before = th.get_rng_state()
    pictures.draw_latents_of(vae, pixels, labels, names, tmp_path / "latents.png", say=said.append)
    assert th.equal(th.get_rng_state(), before) and (tmp_path / "latents.png").exists()
    shown, latents, decoded, users, values = (found[i] for i in range(5))
    assert users == ["user_0", "user_1", "user_3", "user_4"] and np.array_equal(shown, pixels[[0, 2, 6, 8]])
    images = th.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    mean, std = vae.encode_moments(images[[0, 2, 6, 8]]).chunk(2, dim=1)
    assert ((th.from_numpy(latents) - mean) / std).abs().max() < 5 and values.shape == (4, 12 * 8 * 8)
    again = ((vae.decode_batch(th.from_numpy(latents)) + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert np.abs(again.numpy() - decoded).max() <= 1.01 and said == [plotting.colours_in_words("")]


# ---- confusion -------------------------------------------------------------------------------------------------------

COUNTS = {
    plots.GENERATED: np.array([[6, 2, 0], [0, 8, 0], [0, 0, 0]]),
    plots.REAL: np.array([[1, 1, 2], [0, 4, 0], [3, 0, 1]]),
}


@drawing
def test_rows_of_the_confusion_are_shares_and_the_dots_their_diagonals():
    figure = plots.draw_confusion(COUNTS, ["ann", "bob", "cy"])
    made, _, real, dots = figure.axes
    shares = [axes.get_images()[0].get_array() for axes in (made, real)]
    assert np.allclose(shares[1].sum(axis=1), 1) and np.allclose(shares[0][:2].sum(axis=1), 1)
    assert np.isnan(np.asarray(shares[0].filled(np.nan))[2]).all()  # of cy nothing was generated
    assert np.allclose(shares[1], COUNTS[plots.REAL] / 4)
    assert made.get_title() == "generated: 87.5% right" and real.get_title() == "real, held out: 50.0% right"
    assert [label.get_text() for label in made.get_yticklabels()] == ["ann", "bob", "cy"]
    drawn = lines(dots)
    assert [label.get_text() for label in dots.get_xticklabels()] == ["ann", "cy", "bob"]  # as real images are named
    assert drawn[plots.REAL][1] == [0.25, 0.25, 1.0]
    assert np.allclose(drawn[plots.GENERATED][1], [0.75, np.nan, 1.0], equal_nan=True)
    assert drawn["chance"][1] == pytest.approx([1 / 3] * 2)


@drawing
def test_without_labels_there_is_the_judge_of_real_images_alone():
    figure = plots.draw_confusion({plots.REAL: COUNTS[plots.REAL]}, ["a", "b", "c"])
    assert len(figure.axes) == 2  # the matrix and its colour bar


@drawing
def test_of_very_many_users_names_are_left_out():
    figure = plots.draw_confusion({plots.REAL: np.eye(200)}, [f"user_{i:03d}" for i in range(200)])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 20 < len(names) < 60 and names[1] == f"user_{round(200 / len(names)):03d}"


@drawing
def test_the_report_of_a_judge_and_the_page_show_it(tmp_path, monkeypatch):
    """What the judge names agrees with the accuracy in the report; the page has the picture in the place of the old."""
    monkeypatch.setattr(user_classifier, "MIN_STEPS", 40)
    rng, users = np.random.RandomState(0), np.repeat(np.arange(3), 12)
    names = ["user_00", "user_03", "user_07"]
    sets = []
    for shown in (users, users, users[::-1]):  # generated images show another user than they should
        pixels = np.clip(rng.normal(60 + 60 * shown[:, None, None, None], 25, (len(users), 16, 16, 3)), 0, 255)
        sets.append(ImageSet(pixels.astype(np.uint8), users, names))
    named, seen, draw = {}, {}, plots.draw_confusion
    found = measure.evaluate(*sets, epochs=1, keep=named.update)
    monkeypatch.setattr(plots, "draw_confusion", lambda counts, names: seen.update(counts) or draw(counts, names))
    assert plots.draw_judgement(tmp_path / "confusion.png", named, sets[1], sets[2])
    assert np.trace(seen[plots.GENERATED]) / 36 == found.rows[report.GENERATED].user_accuracy
    assert np.trace(seen[plots.REAL]) / 36 == found.rows[report.OTHER].user_accuracy
    assert np.trace(seen[plots.REAL]) > np.trace(seen[plots.GENERATED])
    unlabelled = sets[2]._replace(labels=None)
    seen.clear()
    assert plots.draw_judgement(tmp_path / "confusion.png", named, sets[1], unlabelled) and list(seen) == [plots.REAL]

    data = {"confusion_trts": COUNTS[plots.GENERATED].tolist(), "confusion_trtr": COUNTS[plots.REAL].tolist()}
    section = Section(title="t", pictures={"confusion.png": Image.new("RGB", (3, 3))}, data=data)
    plots.with_confusion(section, names)
    picture = section.pictures["confusion.png"]
    assert list(section.pictures) == ["confusion.png"] and 800 < picture.width <= 1200
    assert render("t", [section], {}).count("data:image/png") == 1


# ---- the scripts -----------------------------------------------------------------------------------------------------

TINY = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8 --lr 1e-2"
TINY += " --image_size 32 --diffusion_steps 50 --noise_schedule cosine --class_cond True --max_steps 3 --batch_size 2"
TINY += " --ema_rate 0.9"


@drawing
@pytest.mark.slow
def test_the_same_bits_with_and_without_pictures(tmp_path):
    """Weights of a training on two processes, then samples in upstream's order of random draws and by image."""
    draw_users(tmp_path / "DATA" / "train", ["user_01", "user_07"], 3)
    (tmp_path / "DATA" / "axes.yaml").write_text("velocity_mps: [-2, 4]\nduration_s: 3\n")
    flags = [*TINY.split(), "--data_dir", tmp_path / "DATA" / "train", "--save_interval", 10]
    runs = {plot: tmp_path / f"run_{plot}" for plot in (False, True)}
    for plot, run in runs.items():
        done = script("image_train_vae.py", *flags, "--log_dir", run, "--plot", plot, ranks=2)
        assert "could not be drawn" not in done.stdout
        assert (run / "curves.png").exists() == plot
    plain, drawn = (checkpoint.load(run / "model000003.pt") for run in runs.values())
    assert all(th.equal(plain[name], drawn[name]) for name in plain)
    model = ["--model_path", runs[False] / "ema_0.9_000003.pt", "--users", "all", "--num_samples_per_user", 2]
    for options in (["--batch_size", 4], ["--per_image_seed", True, "--sampler", "dpmpp_2m_sde", "--num_steps", 4]):
        found = {}
        for plot in (False, True):
            out = tmp_path / options[0] / f"{plot}"
            done = script("image_sample_vae.py", *model, *options, "--log_dir", out, "--plot", plot)
            with np.load(out / "samples_4x32x32x3.npz") as saved:
                found[plot] = saved["arr_0"]
            assert {name: (out / name).exists() for name in ("grid_axes.png", "denoising.png")} == dict.fromkeys(
                ("grid_axes.png", "denoising.png"), plot
            )
        assert np.array_equal(found[False], found[True]) and "\ncolours: " in done.stdout
    assert pictures.axes_of_run(runs[False] / "ema_0.9_000003.pt") == (-2, 4, "m/s", 3)
    script("image_sample_vae.py", *model, *options, "--log_dir", out)  # without the pictures of before
    assert not (out / "denoising.png").exists()


@drawing
@pytest.mark.slow
def test_evaluate_removes_and_validate_replaces_the_confusion(tmp_path):
    users, names = np.repeat(np.arange(6), 6), [f"user_{i:02d}" for i in range(6)]
    sets = [ImageSet(noise(36, 16, 16, 3, seed=i), users, names) for i in range(3)]
    flags = [*save_sets(tmp_path, *sets), "--judge_epochs", 1]
    out = tmp_path / "report"
    out.mkdir()
    (out / "confusion.png").touch()
    script("evaluate_samples.py", *flags, "--out_dir", out)
    assert not (out / "confusion.png").exists()  # it was of another judge
    words = ["--parts", "classifier", "--seeds", 1, "--plot", True, "--out_dir", out]
    done = script("validate.py", *flags, *words)
    assert "could not be drawn" not in done.stdout and Image.open(out / "confusion.png").width > 800
    assert json.loads((out / "report.json").read_text())["about"]["plot"] is True


@drawing
@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    """docs/pictures.md: each command as it stands, and the pictures that it promises."""
    assert len(walk("docs/pictures.md", tmp_path)) == 9
    for promised in (
        "runs/one/curves.png",
        "runs/one/samples/grid_axes.png",
        "runs/one/samples/denoising.png",
        "runs/one/samples/report/confusion.png",
        "runs/one/samples/validation/confusion.png",
        "runs/classifier/curves.png",
        "runs/check_vae/latents.png",
        "data/latents/latents.png",
        "data/latents/axes.yaml",
    ):
        with Path(tmp_path / promised).open("rb") as handle:
            assert handle.read(4) == b"\x89PNG" or promised.endswith(".yaml"), promised
