"""The check of an autoencoder end to end, and the scripts around it, on a few pictures."""

import gzip
import json
import struct

import numpy as np
import pytest
from helpers import script
from PIL import Image

from evaluations.autoencoder_check import CheckConfig, check, collect
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.vae_wrapper import VAEInterface


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Three simulated persons: 4 training images and 3 of other sessions each."""
    root = tmp_path_factory.mktemp("people")
    flags = ["--num_users", 3, "--train_images", 4, "--val_images", 1, "--test_images", 2, "--workers", 1]
    script("simulate_microdoppler.py", "--out_dir", root, *flags)
    return root


def test_the_stored_scale_gives_unit_variance(people, tmp_path):
    data = VAEDataConfig(data_root=str(people))
    out = tmp_path / "mine.safetensors"
    said = []
    first = check(
        VAEInterface(scale_factor=0.3),
        data,
        CheckConfig(fit_scale=True, out=str(out), report_dir=str(tmp_path / "report")),
        say=said.append,
    )
    assert any("use --scale_factor" in line for line in said)
    again = check(VAEInterface(str(out)), data, CheckConfig(report_dir=str(tmp_path / "again")), say=said.append)
    assert again.std == pytest.approx(1.0, abs=0.01) and again.scale == pytest.approx(0.3 / first.std, rel=1e-3)
    np.testing.assert_allclose(first.psnr, again.psnr, atol=0.05)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["images"] == 21 and set(report["per_user"]) == {"user_00", "user_01", "user_02"}
    for name in ("recon_grid.png", "worst.png"):
        assert Image.open(tmp_path / "report" / name).width > 8 * 64


def test_a_folder_for_diffusers_gives_the_same_latents(people, tmp_path):
    data = VAEDataConfig(data_root=str(people), limit=6)
    ours = VAEInterface()
    config = CheckConfig(out=str(tmp_path / "folder"), report_dir=str(tmp_path / "report"))
    wanted = check(ours, data, config, say=lambda _: None)
    found = check(VAEInterface(str(tmp_path / "folder")), data, CheckConfig(report_dir=str(tmp_path / "b")), say=str)
    np.testing.assert_allclose([c.std for c in found.channels], [c.std for c in wanted.channels], rtol=1e-5)


def test_identity_is_asked_of_a_judge(people, tmp_path):
    data = VAEDataConfig(data_root=str(people))
    config = CheckConfig(split="test", judge_epochs=1, report_dir=str(tmp_path))
    report = check(VAEInterface(), data, config, say=lambda _: None)
    assert 0 <= report.extra["user_accuracy_reconstructions"] <= 1 and report.extra["rFD_user"] > 0


def test_parts_are_those_of_the_folders(people):
    data = VAEDataConfig(data_root=str(people))
    assert len(collect(data, "test", 0)[0]) == 6 and len(collect(data, "all", 0)[0]) == 21


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--fit_scale", True], "--fit_scale True needs --out"),
        (["--out", "a.ckpt"], "--out is 'a.ckpt'; give a .safetensors file, or a folder"),
        (["--image_size", 30], "--image_size"),
        (["--split", "half"], "--split is 'half'; choose train, val, test or all"),
        (["--data_root", "nowhere"], "--data_root nowhere does not exist"),
        (["--lpips_path", "nowhere"], "--lpips_path"),
    ],
)
def test_bad_input_is_one_line(people, tmp_path, flags, words):
    done = script("check_vae.py", "--data_root", people, "--report_dir", tmp_path, "--limit", 4, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_digits_from_idx_files_to_a_bound(tmp_path):
    """Ten blurred digits stand in for MNIST: train, test and draw by the recipe's own command."""
    root, run = tmp_path / "mnist", tmp_path / "run"
    root.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (60, 28, 28)).astype(np.uint8)
    for name, values, ndim in (("images-idx3", pixels, 3), ("labels-idx1", np.arange(60) % 10, 1)):
        header = struct.pack(f">BBBB{ndim}I", 0, 0, 8, ndim, *values.shape)
        with gzip.open(root / f"t10k-{name}-ubyte.gz", "wb") as handle:
            handle.write(header + values.astype(np.uint8).tobytes())
    small = ["--base_channels", 8, "--batch_size", 16, "--epochs", 1]
    script("vae_train.py", "--config", "configs/vae_mnist.yaml", "--data_root", root, "--out_dir", run, *small)
    script("vae_test.py", "--ckpt", run / "last.pt", "--data_root", root)
    report = json.loads((run / "test" / "report.json").read_text())
    assert report["loss"] == pytest.approx(report["recon"] + report["kl"], rel=1e-5) and report["images"] == 6
    script("vae_infer.py", "--ckpt", run / "last.pt", "--n", 3, "--out", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn" / "png").rglob("*.png"))) == 3
    through = ["--ckpt", run / "last.pt", "--n", 4, "--data_root", root, "--out", tmp_path / "through"]
    script("vae_infer.py", *through)
    assert len(list((tmp_path / "through" / "png").rglob("*.png"))) == 4


def test_a_training_state_is_not_an_autoencoder(people, tmp_path):
    flags = ["--data_root", people, "--ch", 8, "--ch_mult", "1,2", "--norm_groups", 4, "--max_steps", 1]
    script("vae_train.py", *flags, "--out_dir", tmp_path)
    done = script("vae_test.py", "--ckpt", tmp_path / "last.pt", "--data_root", people, check=False)
    assert done.returncode == 2 and "give the .safetensors beside it" in done.stderr
    script("vae_test.py", "--ckpt", tmp_path / "autoencoder.safetensors", "--data_root", people)
    assert json.loads((tmp_path / "test" / "report.json").read_text())["images"] == 6


def test_nothing_to_draw_from_is_said():
    done = script("vae_infer.py", "--ckpt", "microdoppler-f4", check=False)
    assert done.returncode == 2 and "--data_root is empty" in done.stderr


def test_a_reconstruction_without_images_is_an_error():
    with pytest.raises(UserError, match="--data_root"):
        collect(VAEDataConfig(data_root=""), "all", 0)
