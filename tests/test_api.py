"""The Python API does what the commands do, to the bit."""

import json
import os

import numpy as np
import pytest
from helpers import ROOT, draw_users, script
from PIL import Image

from guided_diffusion_vae.api import CommandFailed, Model, run
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.microdoppler import SimulationConfig, render
from guided_diffusion_vae.trained import average_in, model_in

TINY = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2, "attention_resolutions": "8"}
TINY |= {"image_size": 32, "diffusion_steps": 50, "noise_schedule": "cosine", "class_cond": True, "max_steps": 3}
TINY |= {"batch_size": 2, "sample_interval": 0, "ema_rate": 0.9, "class_dropout_prob": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training's folder, made by `run`."""
    root = tmp_path_factory.mktemp("api")
    draw_users(root / "data", ["user_03", "user_07"], 2)
    run("train", data_dir=root / "data", log_dir=root / "run", **TINY)
    return root / "run"


def test_samples_are_the_scripts(folder, tmp_path):
    model = Model(folder)
    assert model.path == folder / "ema_0.9_000003.pt" and model.class_names == ["user_03", "user_07"]
    drawn = model.sample(users=["7"], num_samples_per_user=3, num_steps=2, sampler="dpmpp_2m", cfg_scale=2, seed=5)
    flags = "--users 7 --num_samples_per_user 3 --num_steps 2 --sampler dpmpp_2m --cfg_scale 2 --seed 5".split()
    script("image_sample_vae.py", "--model_path", folder, *flags, "--log_dir", tmp_path, OMP_NUM_THREADS="1")
    with np.load(tmp_path / "samples_3x32x32x3.npz") as theirs:
        np.testing.assert_array_equal(drawn.images, theirs["arr_0"])
    assert drawn.users == ["user_07"] * 3
    saved = sorted(drawn.save(tmp_path / "pngs").rglob("*.png"))
    assert [path.parent.name for path in saved] == drawn.users
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in saved]), drawn.images)
    assert not np.array_equal(model.sample(num_samples=3, num_steps=2).images, drawn.images)  # another call's flags are


def test_pictures_go_through_latents(folder):
    """The shipped autoencoder's card says 22.7 dB; latents are in the units that the network learned on."""
    model = Model(folder)
    images = np.stack([render(SimulationConfig(), user, 0, 0)[0] for user in range(4)])
    z = model.encode(images)
    assert z.shape == (4, 4, 16, 16) and 0.7 < z.std() < 1.4
    error = (model.decode(z).astype(float) - images) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 19


def test_a_command_that_fails_says_why(tmp_path, capsys):
    with pytest.raises(CommandFailed, match="train ended with code 2: error: .*--data_dir .*nowhere") as caught:
        run("train", data_dir=tmp_path / "nowhere", log_dir=tmp_path / "run")
    assert caught.value.code == 2 and "nowhere" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown command trian.*did you mean train"):
        run("trian")


def test_a_folder_names_its_best_or_newest_average(tmp_path):
    with pytest.raises(UserError, match="is a folder without a checkpoint"):
        model_in(tmp_path)
    for name in ("model000100.pt", "model1000000.pt"):
        (tmp_path / name).touch()
    assert model_in(tmp_path).name == "model1000000.pt"
    (tmp_path / "run.yaml").write_text("image_size: 64\n")  # of a model from elsewhere
    assert model_in(tmp_path).name == "model1000000.pt"
    (tmp_path / "run.yaml").write_text("ema_rate: 0.99,0.999\n")
    for name in ("ema_0.99_000900.pt", "ema_0.99_1000000.pt", "ema_0.999_2000000.pt"):
        (tmp_path / name).touch()
    assert model_in(tmp_path).name == "ema_0.99_1000000.pt"  # of the first rate, as everywhere
    (tmp_path / "ema_0.99_best.pt").touch()
    assert model_in(tmp_path).name == "ema_0.99_best.pt"
    assert average_in(tmp_path, "0.99", best=False).name == "ema_0.99_1000000.pt"


SMALLER = {"PEOPLE = {}": "PEOPLE = dict(num_users=6, train_images=9, val_images=1, test_images=6)"}
SMALLER |= {"TRAINING = {}": "TRAINING = dict(max_steps=2, lr_anneal_steps=0, batch_size=2, sample_interval=0)"}
SMALLER |= {"num_samples_per_user=8": "num_samples_per_user=3, num_steps=2"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells one after the other, with fewer people and steps, as a kernel runs them from the folder docs/."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    installs, *cells = code
    assert "setup.sh" in installs and os.access(ROOT / "setup.sh", os.R_OK)
    monkeypatch.chdir(tmp_path)
    cells, names = "\n".join(cells), {}
    for word, smaller in SMALLER.items():
        assert cells.count(word) == 1, word
        cells = cells.replace(word, smaller)
    exec(compile(cells, "notebook", "exec"), names)
    assert len(names["samples"].images) == 18 and (tmp_path / "runs/one/report/report.json").is_file()
