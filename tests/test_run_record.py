"""A folder's checkpoints and its run.yaml against a command that would go on with another training there."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from guided_diffusion_vae import run_record
from guided_diffusion_vae.config import UserError, create_argparser, parse_run, read_yaml
from guided_diffusion_vae.generation import read_flags


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What makes a network, with one setting that may differ."""

    width: int = 32
    rates: tuple = ()
    dropout: float = 0.0
    vae_path: str = "shipped"
    latent_norm: bool = False
    class_cond: bool = True
    allow_download: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """What may change while a training goes on, but the seed."""

    seed: int = 0
    lr: float = 1e-4
    data_dir: str = "images"


def resolved(*flags):
    return parse_run(create_argparser(Shape, Training), [str(flag) for flag in flags])


@pytest.fixture
def folder(tmp_path):
    run = resolved("--width", 64, "--rates", "1,2", "--dropout", 0.1)
    run_record.save_run(run, tmp_path, class_names=["ann", "bob"], autoencoder="0123")
    (tmp_path / "model000004.pt").touch()
    return tmp_path


def test_an_autoencoder_of_ones_own_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    for name in ("vae/mine.safetensors", "mine.safetensors", "shipped"):
        Path(name).touch()
        run_record.save_run(resolved("--vae_path", name), tmp_path, class_names=[], autoencoder="0123")
        found = read_yaml(tmp_path / "run.yaml")["vae_path"]
        assert found == (name if name == "shipped" else str(tmp_path / name))


def test_an_autoencoder_that_is_gone_is_named_with_its_run(tmp_path):
    (tmp_path / "model000004.pt").touch()
    (tmp_path / "run.yaml").write_text(f"vae_path: {tmp_path / 'gone.safetensors'}\n")
    words = ["--model_path", str(tmp_path / "model000004.pt")]
    with pytest.raises(UserError, match="gone.safetensors, which .*model000004.pt was trained with, is gone: "):
        read_flags(words, "")
    assert read_flags([*words, "--vae_path", "pixel"], "")[0].vae_path == "pixel"


SAME = ["--width", 64, "--rates", "1,2"]


@pytest.mark.parametrize("flags", [["--lr", 1], ["--dropout", 0.5], ["--vae_path", "moved"], ["--allow_download", 1]])
def test_what_may_change_may(folder, flags):
    run_record.refuse_other_training(resolved(*SAME, *flags), folder, [Shape])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--width", 32], "--width is 32, but {} holds a training with 64"),
        (["--rates", "1,3"], "--rates is ('1', '3'), but {} holds a training with ('1', '2')"),
        (["--seed", 5], "--seed is 5, but {} holds a training with 0"),
    ],
)
def test_another_training_is_refused_in_one_line(folder, flags, words):
    with pytest.raises(UserError) as error:
        run_record.refuse_other_training(resolved(*SAME, *flags), folder, [Shape])
    assert str(error.value) == words.format(folder) + ": give that, or another --log_dir for a new one"


def test_fixed_values_are_none_that_may_change(folder):
    settings = {"flag": "--out_dir", "fixed": ("pixel",)}
    run_record.refuse_other_training(resolved(*SAME, "--vae_path", "moved"), folder, [Shape], **settings)
    with pytest.raises(UserError, match="^--vae_path is 'pixel', .*with 'shipped': give that, or another --out_dir"):
        run_record.refuse_other_training(resolved(*SAME, "--vae_path", "pixel"), folder, [Shape], **settings)


def test_another_autoencoder_is_refused_in_one_line(folder):
    run_record.refuse_other_autoencoder(resolved(), folder, "0123")
    with pytest.raises(UserError, match="^--vae_path v is autoencoder 4567, but .*latents of 0123: .* --log_dir"):
        run_record.refuse_other_autoencoder(resolved("--vae_path", "v"), folder, "4567")
    with pytest.raises(UserError, match="^--vae_path v, scaled by the statistics of --data_dir images, is autoencoder"):
        run_record.refuse_other_autoencoder(resolved("--vae_path", "v", "--latent_norm", 1), folder, "4567")


@pytest.mark.parametrize(
    "names, words",
    [
        (["ann", "bob", "cid"], "3 classes, number 2 of them cid, but {} holds a training on 2, there no class"),
        (["ann"], "1 classes, number 1 of them no class, but {} holds a training on 2, there bob"),
        (["bob", "ann"], "2 classes, number 0 of them bob, but {} holds a training on 2, there ann"),
    ],
)
def test_other_users_are_refused_in_one_line(folder, names, words):
    with pytest.raises(UserError) as error:
        run_record.refuse_other_classes(resolved(), folder, names)
    assert str(error.value).startswith(f"--data_dir images has {words.format(folder)}: give data of the same classes")
    assert "\n" not in str(error.value)
    run_record.refuse_other_classes(resolved("--class_cond", False), folder, names)  # it knows none


def test_a_folder_without_checkpoints_or_record_refuses_nothing(folder):
    """Nor does a record that was made before there was one of the rest; a setting that it lacks had its default."""
    record = yaml.safe_load((folder / "run.yaml").read_text())
    del record["width"], record["record"]
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    ask_all(resolved("--rates", "1,2"), folder)
    with pytest.raises(UserError, match="--width is 7, but .* holds a training with 32"):
        ask_all(resolved("--width", 7, "--rates", "1,2"), folder)
    (folder / "model000004.pt").unlink()
    ask_all(resolved("--rates", "3"), folder)
    (folder / "model000004.pt").touch()
    (folder / "run.yaml").unlink()
    ask_all(resolved("--rates", "3"), folder)


def ask_all(run, folder):
    run_record.refuse_other_training(run, folder, [Shape])
    run_record.refuse_other_autoencoder(run, folder, "4567")
    run_record.refuse_other_classes(run, folder, ["cid"])
