"""The same seed is the same bits, whoever reads the data and however the work is cut."""

import numpy as np
import pytest
from harness import AUTOENCODER, VERBS, assert_same_end, here, train


@pytest.mark.fault("training with the same seed, twice", promise="the same bits; with another seed others")
def test_training(data, straight, tmp_path):
    train(data, tmp_path / "again")
    assert_same_end(straight, tmp_path / "again", *VERBS["training"].makes)
    train(data, tmp_path / "other", "--seed", 1)
    with pytest.raises(AssertionError, match="model000012.pt"):
        assert_same_end(straight, tmp_path / "other", "model000012.pt")


@pytest.mark.fault("an autoencoder's training with the same seed, twice", promise="the same bits")
def test_autoencoder(data, tmp_path):
    for out in ("a", "b"):
        here("vae_train", *AUTOENCODER.split(), "--data_root", data, "--out_dir", tmp_path / out)
    assert_same_end(tmp_path / "a", tmp_path / "b", *VERBS["autoencoder training"].makes)


@pytest.mark.fault(
    "images read by 0, 1 and 3 processes, and from cached latents", promise="training ends in the same bits"
)
def test_who_reads(data, straight, tmp_path):
    for workers in (0, 3):
        train(data, tmp_path / str(workers), "--cache_latents", False, "--num_workers", workers, "--max_steps", 6)
    train(data, tmp_path / "cached", "--max_steps", 6)
    for workers in (3, "cached"):
        atol = 1e-6 if workers == "cached" else 0.0  # encoded in batches of another size
        assert_same_end(tmp_path / "0", tmp_path / str(workers), "model000006.pt", atol=atol)


def arrays(out):
    (path,) = out.glob("samples_*.npz")
    with np.load(path) as found:
        return [found[name] for name in found]


@pytest.mark.fault("sampling with the same seed, twice", promise="the same bits of every file")
def test_sampling(straight, tmp_path):
    for out in ("a", "b"):
        sample(straight, tmp_path / out, "--batch_size", 4)
    assert_same_end(tmp_path / "a", tmp_path / "b", "samples_6x32x32x3.npz", "grid.png", "manifest.csv")


def sample(straight, out, *flags):
    model = [
        "--model_path",
        straight / VERBS["training"].makes[1],
        "--num_steps",
        10,
        "--num_samples",
        6,
        "--users",
        "all",
    ]
    here("image_sample_vae", *model, "--log_dir", out, *flags)


@pytest.mark.fault(
    "sampling with --per_image_seed in batches of 1, 2, 4 and 6",
    promise="the same images, but for the last of 256 levels (sums in another order)",
)
def test_batches_of_samples(straight, tmp_path):
    for size in (1, 2, 4, 6):
        sample(straight, tmp_path / str(size), "--batch_size", size, "--per_image_seed", True)
    first, *rest = (arrays(tmp_path / str(size)) for size in (1, 2, 4, 6))
    for pixels, labels in rest:
        assert np.abs(pixels.astype(int) - first[0]).max() <= 1 and np.array_equal(labels, first[1])


@pytest.mark.fault(
    "latents extracted in batches of 1, 3 and 32 and shards of 2 and 10",
    promise="the same rows to 1e-5 of their spread",
)
def test_batches_of_latents(data, tmp_path):
    from guided_diffusion_vae.data.latent_shards import LatentShards, find_shards

    rows = []
    for batch, shard in ((1, 2), (3, 10), (32, 10)):
        out = tmp_path / f"{batch} {shard}"
        flags = ["--image_size", 32, "--batch_size", batch, "--shard_size", shard]
        here("latent_extract", "--data_dir", data, "--out_dir", out, *flags)
        shards = LatentShards(find_shards(out))
        rows.append(np.stack([shards[i][0] for i in range(len(shards))]))
    for other in rows[1:]:
        assert np.abs(other - rows[0]).max() <= 1e-5 * rows[0].std()
