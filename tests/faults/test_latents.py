"""Latents that were cut off, altered, made by another autoencoder, or taken away."""

import shutil
import struct

import pytest
import torch as th
from harness import here
from helpers import draw_users

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.latent_shards import find_shards, read_header
from guided_diffusion_vae.image_datasets import load_data_with_vae
from guided_diffusion_vae.vae_wrapper import VAEInterface

SHARD, STATS = "latents_rank00_shard001.safetensors", "latents_stats.pt"


@pytest.fixture(scope="module")
def vae():
    return VAEInterface("microdoppler-f4")


def load(folder, vae):
    return load_data_with_vae(data_dir=folder, batch_size=2, image_size=16, vae=vae, say=lambda line: None)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    draw_users(root / "data", ["user_00", "user_01"], 4, size=16)
    here("latent_extract", *f"--image_size 16 --shard_size 4 --data_dir {root}/data --out_dir {root}/z".split())
    return root / "z"


def without(folder, name, tmp_path, change):
    copy = tmp_path / "z"
    shutil.copytree(folder, copy)
    change(copy / name)
    return copy


DAMAGE = {
    "a shard cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a shard of zero bytes": lambda path: path.write_bytes(b""),
    "a shard that is not there": lambda path: path.unlink(),
    "a shard that is a text": lambda path: path.write_text("x" * 100),
}


@pytest.mark.fault("latents: {kind}", promise="code 2, one line that names the shard, or how many are missing")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_latents(kind, latents, tmp_path, vae):
    folder = without(latents, SHARD, tmp_path, DAMAGE[kind])
    with pytest.raises(UserError, match=f"{SHARD}|4 of 8"):
        load(folder, vae)


def spoil(path):
    """A NaN as the first number of the first row."""
    data, begin = bytearray(path.read_bytes()), read_header(path)[0]["latents"].begin
    data[begin : begin + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(data)


@pytest.mark.fault("latents: a NaN in one row", promise="code 2, one line that names the shard and the row")
def test_a_nan_in_the_latents(latents, tmp_path, vae):
    folder = without(latents, SHARD, tmp_path, spoil)
    with pytest.raises(UserError, match=f"{SHARD}: row 0 of latents holds NaN"):
        for _, _ in zip(range(8), load(folder, vae), strict=False):
            pass


@pytest.mark.fault("statistics of latents that hold NaN", promise="code 2, one line")
def test_a_nan_in_the_statistics(latents, tmp_path):
    nan = th.full((1, 4, 1, 1), float("nan"))
    stats = "latents_stats.pt"
    folder = without(latents, stats, tmp_path, lambda path: checkpoint.save({"mean": nan, "std": nan}, path))
    with pytest.raises(UserError, match="finite mean and std"):
        here("image_train_vae", "--latent_norm", True, "--data_dir", folder, "--log_dir", tmp_path / "t")


@pytest.mark.fault("latents of another autoencoder", promise="code 2, both fingerprints")
def test_latents_of_another_autoencoder(latents, tmp_path, vae):
    other = VAEInterface("microdoppler-f4")
    with th.no_grad():
        other.vae.encoder.conv_in.bias.add_(1)
    with pytest.raises(UserError, match=f"{vae.weights_fingerprint}.*{other.weights_fingerprint}"):
        load(latents, other)


@pytest.mark.fault("latents that are deleted while a batch is read", promise="no crash: what is mapped stays")
def test_latents_that_vanish(latents, tmp_path, vae):
    folder = without(latents, SHARD, tmp_path, lambda path: None)
    data = load(folder, vae)
    for _ in range(4):
        next(data)
    shutil.rmtree(folder)
    next(data)
    assert not find_shards(folder)
