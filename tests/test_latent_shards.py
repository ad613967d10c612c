"""Extracted latents: LightningDiT's files to the byte, the same rows however they were made, and errors in one line."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch as th
from helpers import ROOT, script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from guided_diffusion_vae import image_datasets as data
from guided_diffusion_vae.checkpoint import SaveError
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import latent_extract, latent_shards
from guided_diffusion_vae.data.latent_extract import ExtractConfig, extract_latents
from guided_diffusion_vae.data.latent_shards import LatentShards, find_shards
from guided_diffusion_vae.data.stream import EXTRACTED, EXTRACTED_FLIP, mix
from guided_diffusion_vae.vae_wrapper import VAEConfig, VAEInterface, load_vae

NAMES = ("user_03", "user_07", "user_11")
QUIET = {"say": lambda *_: None}


@pytest.fixture
def images(tmp_path):
    """Three users with five 32 x 32 images each."""
    return draw_images(tmp_path / "images", NAMES)


def draw_images(root, names, seed=0):
    rng = np.random.RandomState(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(5):
            low = rng.randint(0, 255, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(low).resize((32, 32)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def vae():
    return VAEInterface()


def extract(images, out, vae, say=lambda line: None, **options):
    settings = {"image_size": 32, "shard_size": 4, "batch_size": 3, **options}
    extract_latents(ExtractConfig(data_dir=str(images), out_dir=str(out), **settings), vae, say=say)
    return out


def read(folder, name="latents"):
    """All rows, by the safetensors library."""
    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as handle:
            parts.append(handle.get_tensor(name))
    return np.concatenate(parts)


def load(folder, vae, **options):
    settings = {"batch_size": 4, "image_size": 32, **QUIET, **options}
    return data.load_data_with_vae(data_dir=folder, vae=vae, **settings)


def lightning(path, latents, labels, flips=None, metadata=None):
    """A file as LightningDiT writes it, by the safetensors library alone."""
    flips = latents.flip(3) if flips is None else flips
    about = {"total_size": str(len(latents)), "dtype": "torch.float32", "device": "cpu"}
    tensors = {"latents": latents.contiguous(), "latents_flip": flips.contiguous(), "labels": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=about if metadata is None else metadata)


# ---- the format ------------------------------------------------------------------------------------------------------


def test_a_folder_is_as_lightningdit_expects_it(images, vae, tmp_path):
    said = []
    out = extract(images, tmp_path / "out", vae, said.append)
    paths = sorted(out.iterdir())
    shards = [f"latents_rank00_shard{k:03d}.safetensors" for k in range(4)]
    assert [path.name for path in paths] == [*shards, "latents_stats.pt"]
    for k, n in enumerate((4, 4, 4, 3)):
        with safe_open(out / shards[k], framework="pt") as handle:
            about, tensors = handle.metadata(), {name: handle.get_tensor(name) for name in handle.keys()}
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
            "latents": (th.float32, (n, 4, 8, 8)),
            "latents_flip": (th.float32, (n, 4, 8, 8)),
            "labels": (th.int64, (n,)),
        }
        assert tensors["labels"].tolist() == [i // 5 for i in range(4 * k, 4 * k + n)]
        assert th.equal(tensors["latents"], tensors["latents_flip"])  # no --with_flips: a copy
        assert (about["total_size"], about["dtype"], about["device"]) == (str(n), "torch.float32", "cpu")
        assert about["autoencoder"] == vae.weights_fingerprint and json.loads(about["class_names"]) == list(NAMES)
        assert json.loads(about["scale_factor"]) == vae.scale_factor
        assert (about["image_size"], about["flipped"], about["dataset_size"]) == ("32", "false", "15")
    assert f"train: 15 rows of 3 classes, each (4, 8, 8), standard deviation {read(out).std():.4g} (" in said[-1]
    assert "MB/s" in said[-1]


def test_statistics_are_of_all_rows_in_float64(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_extract, "CHUNK", 3)
    out = extract(images, tmp_path / "out", vae)
    rows = read(out).astype(np.float64)
    stats = th.load(out / "latents_stats.pt", weights_only=True)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stats.items()} == {
        "mean": (th.float32, (1, 4, 1, 1)),
        "std": (th.float32, (1, 4, 1, 1)),
    }
    np.testing.assert_allclose(stats["mean"].flatten(), rows.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats["std"].flatten(), rows.std(axis=(0, 2, 3), ddof=1), rtol=1e-6)


def test_statistics_keep_their_digits_far_from_zero(tmp_path):
    rows = th.randn(50, 2, 4, 4, generator=th.Generator().manual_seed(0)) + 10_000.0
    lightning(tmp_path / "a.safetensors", rows, th.zeros(50, dtype=th.int64))
    _, std = latent_extract.measure([tmp_path / "a.safetensors"])
    np.testing.assert_allclose(std.flatten(), rows.double().numpy().std(axis=(0, 2, 3), ddof=1), rtol=1e-6)


def test_names_sort_like_rows_beyond_a_thousand_shards():
    names = [latent_extract.shard_name(k) for k in (0, 999, 1000, 12_345)]
    assert names[2:] == ["latents_rank01_shard000.safetensors", "latents_rank12_shard345.safetensors"]
    assert names == sorted(names)


def test_a_row_is_the_posterior_with_the_noise_of_its_number(images, vae, tmp_path):
    """z_raw = mean + std n, with n from a generator seeded by (seed, i); with flips, of the mirrored image."""
    out = extract(images, tmp_path / "out", vae, with_flips=True, seed=5)
    folder = data.list_images(images)
    dataset = data.ImageDataset(32, folder.paths, random_flip=False)
    x = th.from_numpy(np.stack([dataset[i][0] for i in range(15)]))
    for name, batch, use in ("latents", x, EXTRACTED), ("latents_flip", x.flip(3), EXTRACTED_FLIP):
        noise = [th.randn(4, 8, 8, generator=th.Generator().manual_seed(mix(5, i, use))) for i in range(15)]
        scale = vae.latent_scale
        mean, std = vae.encode_moments(batch).chunk(2, dim=1)
        wanted = scale.to_raw(mean) + std / scale.scale * th.stack(noise)
        np.testing.assert_allclose(read(out, name), wanted, atol=2e-5)
    means = extract(images, tmp_path / "means", VAEInterface(sample_posterior=False))
    mean, _ = vae.encode_moments(x).chunk(2, dim=1)
    np.testing.assert_allclose(read(means), vae.latent_scale.to_raw(mean), atol=2e-5)


def test_rows_do_not_depend_on_the_size_of_shards(images, vae, tmp_path):
    rows = [read(extract(images, tmp_path / str(size), vae, shard_size=size)) for size in (3, 6, 100)]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


# ---- many processes, interruptions -----------------------------------------------------------------------------------


def flags(images, out, *more):
    return ["--data_dir", images, "--out_dir", out, "--image_size", 32, "--shard_size", 4, "--batch_size", 3, *more]


def test_two_processes_write_what_one_writes(images, vae, tmp_path):
    one = extract(images, tmp_path / "one", vae)
    script("latent_extract.py", *flags(images, tmp_path / "two"), ranks=2)
    found = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir() if path.suffix == ".safetensors"}
    assert found == {path.name: path.read_bytes() for path in one.iterdir() if path.suffix == ".safetensors"}
    ours, theirs = (th.load(folder / "latents_stats.pt") for folder in (one, tmp_path / "two"))
    assert th.equal(ours["mean"], theirs["mean"]) and th.equal(ours["std"], theirs["std"])


def test_a_killed_extraction_goes_on(images, vae, tmp_path):
    """kill -9 after the first shards: they stay as they are, the rest is made, and the rows are those of one run."""
    out, whole = tmp_path / "out", extract(images, tmp_path / "whole", vae, shard_size=1)
    command = [sys.executable, str(ROOT / "scripts" / "latent_extract.py")]
    command += [str(word) for word in [*flags(images, out), "--shard_size", 1]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / ".latents_rank00_shard014.safetensors.tmp-1").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 3 <= len(times) < 15 and not (out / "latents_stats.pt").exists()
    with pytest.raises(UserError, match=rf"holds {len(times)} of 15 latents: run scripts/latent_extract.py again"):
        load(out, vae)
    said = []
    extract(images, out, vae, said.append, shard_size=1)
    assert f"{len(times)} of 15 shards are there already" in said[1]
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    assert np.array_equal(read(out), read(whole)) and not list(out.glob(".*"))


def test_a_second_run_has_nothing_to_do(images, vae, tmp_path):
    said = []
    for scale in (0, 0.5):  # raw latents do not depend on the scale
        out = extract(images, tmp_path / "out", VAEInterface(scale_factor=scale), said.append)
        said.append({path.name: path.stat().st_mtime_ns for path in out.iterdir()})
    first, last = (line for line in said if isinstance(line, dict))
    assert first == last and "(nothing new)" in said[-2]


def test_changed_images_and_damaged_shards_are_done_again(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    shutil.copy(images / "user_11" / "1.png", images / "user_07" / "0.png")  # row 5, in shard 1
    shard = out / "latents_rank00_shard003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    extract(images, out, vae)
    kept = {name[-15:-12] for name, at in before.items() if (out / name).stat().st_mtime_ns == at}
    assert kept == {"000", "002"}
    assert np.array_equal(read(out), read(extract(images, tmp_path / "fresh", vae)))


def test_shards_beyond_the_last_row_go(images, vae, tmp_path):
    out, said = extract(images, tmp_path / "out", vae), []
    extract(images, out, vae, said.append, shard_size=10)
    assert len(list(out.glob("*.safetensors"))) == 2 and len(load(out, vae).images.order.dataset) == 15
    assert any("removed 4 shards" in line and "other images or with other settings" in line for line in said)


def test_a_full_disk_costs_only_the_last_shard(images, vae, tmp_path, monkeypatch):
    written, real = [], latent_extract.write_safetensors

    def fills_up(path, tensors, metadata):
        if len(written) == 2:
            raise SaveError(f"cannot write {path}: the disk is full")
        written.append(path)
        real(path, tensors, metadata)

    monkeypatch.setattr(latent_extract, "write_safetensors", fills_up)
    with pytest.raises(SaveError, match="the disk is full"):
        extract(images, tmp_path / "out", vae)
    monkeypatch.undo()
    extract(images, tmp_path / "out", vae)
    assert np.array_equal(read(tmp_path / "out"), read(extract(images, tmp_path / "whole", vae)))


def test_the_script_says_that_the_disk_is_full_in_one_line(images, tmp_path):
    (tmp_path / "out").mkdir()
    done = script(
        "latent_extract.py", *flags(images, tmp_path / "out"), check=False, PYTHONPATH=full_disk(tmp_path / "site")
    )
    assert done.returncode == 3 and "the disk is full" in done.stderr and "Traceback" not in done.stderr


def full_disk(folder):
    """A folder for PYTHONPATH that makes fsync fail as on a full disk."""
    folder.mkdir()
    text = "import errno, os\ndef fsync(fd):\n    raise OSError(errno.ENOSPC, 'No space left')\nos.fsync = fsync\n"
    (folder / "sitecustomize.py").write_text(text)
    return f"{folder}{os.pathsep}{ROOT}"


# ---- two files, and a part to validate on ----------------------------------------------------------------------------


def test_two_files_hold_the_same_rows(images, vae, tmp_path):
    held_out = draw_images(tmp_path / "held_out", NAMES[1:], seed=1)
    both = {"val_dir": str(held_out)}
    shards = extract(images, tmp_path / "shards", vae, **both)
    two = extract(images, tmp_path / "two", vae, layout="two_files", **both)
    assert sorted(path.name for path in two.iterdir()) == ["latents_stats.pt", "train.safetensors", "val.safetensors"]
    for part in ("train", "val"):
        for name in ("latents", "latents_flip", "labels"):
            with safe_open(two / f"{part}.safetensors", framework="np") as handle:
                assert np.array_equal(handle.get_tensor(name), read(shards / part, name))
    stats = [th.load(place / "latents_stats.pt") for place in (two, shards / "train")]
    assert th.equal(stats[0]["mean"], stats[1]["mean"]) and th.equal(stats[0]["std"], stats[1]["std"])
    assert load(two, vae).num_samples == 15
    heldout = data.load_heldout(data_dir=two, image_size=32, vae=vae, class_cond=True, class_names=list(NAMES), **QUIET)
    assert len(heldout) == 10 and heldout.batch([0, 9])[1]["y"].tolist() == [1, 2]
    at = (two / "train.safetensors").stat().st_mtime_ns
    extract(images, two, vae, layout="two_files", **both)
    assert (two / "train.safetensors").stat().st_mtime_ns == at
    with pytest.raises(UserError, match="holds latents in the subfolders train and val: give .*shards/train"):
        load(shards, vae)
    with pytest.raises(UserError, match="which is not of this --layout: choose another --out_dir"):
        extract(images, two, vae)
    (two / "val.safetensors").unlink()
    with pytest.raises(UserError, match="holds train.safetensors, but no val.safetensors"):
        data.load_heldout(data_dir=two, image_size=32, vae=vae, class_cond=False, class_names=[])


# ---- training on them ------------------------------------------------------------------------------------------------


def test_batches_from_shards_are_those_of_a_direct_encoding(images, tmp_path):
    """Means, so that there is no noise: the same order, labels and model latents as from the images themselves."""
    vae = VAEInterface(sample_posterior=False)
    out = extract(images, tmp_path / "out", vae)
    stored, fresh = (load(place, vae, seed=3, class_cond=True, **QUIET) for place in (out, images))
    assert stored.class_names == fresh.class_names == list(NAMES) and stored.num_samples == fresh.num_samples == 15
    for _ in range(5):
        (a, a_cond), (b, b_cond) = next(stored), next(fresh)
        assert a.dtype == th.float32 and th.allclose(a, b, atol=2e-5)
        assert th.equal(a_cond["y"], b_cond["y"])
    stored.seek(1), fresh.seek(1)
    assert th.allclose(next(stored)[0], next(fresh)[0], atol=2e-5)


def test_mirrored_rows_come_half_of_the_time(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae, with_flips=True)
    shards, rows, flips = LatentShards(find_shards(out), random_flip=True), read(out), read(out, "latents_flip")
    random.seed(0)
    wanted = [random.random() < 0.5 for _ in range(60)]
    random.seed(0)
    for i, mirrored in enumerate(wanted):
        z, label = shards[i % 15]
        assert np.array_equal(z, (flips if mirrored else rows)[i % 15]) and label["y"] == i % 15 // 5
    assert not np.array_equal(rows, flips)
    one, again = (load(out, vae, random_flip=True, deterministic=True, batch_size=15) for _ in range(2))
    z = next(one)[0] / vae.scale_factor
    came = [[np.allclose(z[i], kind[i], atol=1e-5) for kind in (rows, flips)] for i in range(15)]
    assert all(any(pair) for pair in came) and 2 <= sum(pair[1] for pair in came) <= 13
    assert th.equal(next(one)[0], (next(again), next(again))[1][0])
    plain = extract(images, tmp_path / "plain", vae)
    with pytest.raises(UserError, match="--random_flip True, but .* without mirrored images.*--with_flips True"):
        load(plain, vae, random_flip=True)


def test_a_flag_that_cannot_change_what_the_rows_are_is_answered(images, vae, tmp_path):
    """`--sample_posterior False` is in vain with draws, and with files that do not say; with means it is true."""
    means = VAEInterface(sample_posterior=False)
    lightning(tmp_path / "theirs" / "a.safetensors", X, Y)
    places = {"sample": extract(images, tmp_path / "draws", vae), "mean": extract(images, tmp_path / "means", means)}
    for kind, place in {**places, None: tmp_path / "theirs"}.items():
        assert LatentShards(find_shards(place)).posterior == kind
        for asked in vae, means:
            said = []
            load(place, asked, say=said.append)
            warnings = [line for line in said if "--sample_posterior False changes nothing" in line]
            assert len(warnings) == (asked is means and kind != "mean") and "\n" not in "".join(warnings)
            assert any("each is its posterior's mean" in line for line in said) == (kind == "mean")


def test_statistics_alone_are_no_latents(images, vae, tmp_path):
    """One line; but beside images they are those images' own."""
    out = extract(images, tmp_path / "out", vae)
    shutil.copy(out / "latents_stats.pt", images)
    assert find_shards(images) == []
    for path in out.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="--data_dir .*out holds latents_stats.pt, but none of its latents: run"):
        load(out, vae)
    with pytest.raises(UserError, match="--val_dir .*out holds latents_stats.pt, but none of its latents: run"):
        heldout(out, vae)
    with pytest.raises(UserError, match="^--data_dir names no files of latents; extract them with .*latent_extract.py"):
        LatentShards([])


def test_lightningdits_files_are_read(vae, tmp_path):
    generator = th.Generator().manual_seed(0)
    latents, labels = th.randn(7, 4, 8, 8, generator=generator), th.tensor([5, 0, 0, 1, 5, 2, 2])
    lightning(tmp_path / "x" / "latents_rank00_shard000.safetensors", latents[:4], labels[:4])
    lightning(tmp_path / "x" / "latents_rank01_shard000.safetensors", latents[4:], labels[4:])
    said = []
    stream = load(tmp_path / "x", vae, deterministic=True, batch_size=7, class_cond=True, say=said.append)
    z, cond = next(stream)
    assert th.allclose(z, latents * vae.scale_factor) and th.equal(cond["y"], labels)
    assert stream.class_names == ["0000", "0001", "0002", "0003", "0004", "0005"]
    assert sum("does not say which autoencoder" in line for line in said) == 1
    assert np.array_equal(LatentShards(find_shards(tmp_path / "x"))[6][0], latents[6].numpy())
    shards = LatentShards(find_shards(tmp_path / "x"))
    shards[3]  # an open map must not travel to a worker
    loader = th.utils.data.DataLoader(shards, batch_size=7, num_workers=1, multiprocessing_context="spawn")
    assert th.equal(next(iter(loader))[0], latents)


def test_one_row_of_a_large_file_costs_one_row(tmp_path):
    """A sparse file of 2 GiB of latents: opening it and reading rows at both ends takes no memory and no time."""
    n, shape = 65_536, (32, 16, 16)
    size = n * 4 * 32 * 16 * 16
    header = {
        "latents": {"dtype": "F32", "shape": [n, *shape], "data_offsets": [0, size]},
        "labels": {"dtype": "I64", "shape": [n], "data_offsets": [size, size + 8 * n]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "latents_rank00_shard000.safetensors"
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.seek(8 + len(text) + size - 4)
        handle.write(np.float32(2.5).tobytes())
        handle.truncate(8 + len(text) + size + 8 * n)
    assert path.stat().st_size > 2**31
    tracemalloc.start()
    begin = time.perf_counter()
    shards = LatentShards([path])
    first, last = shards[0][0], shards[n - 1][0]
    assert time.perf_counter() - begin < 2 and tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert first.shape == shape and not first.any() and last.flat[-1] == 2.5 and np.count_nonzero(last) == 1
    twin = pickle.loads(pickle.dumps(shards))
    assert twin[n - 1][0].flat[-1] == 2.5 and len(pickle.dumps(shards)) < 1e6


def test_few_files_are_open_at_a_time(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_shards, "OPEN_MAPS", 2)
    for k in range(5):
        lightning(tmp_path / f"{k}.safetensors", th.full((2, 4, 8, 8), float(k)), th.zeros(2, dtype=th.int64))
    shards = LatentShards(find_shards(tmp_path))
    for i in (0, 9, 4, 1, 8, 5):
        assert (shards[i][0] == i // 2).all() and len(shards._maps) <= 2


# ---- every channel by its statistics ---------------------------------------------------------------------------------


def test_latent_norm_gives_every_channel_mean_0_and_variance_1(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae)
    config = VAEConfig(latent_norm=True)
    normed = load_vae(config, latent_stats=out / "latents_stats.pt")
    z, _ = next(load(out, normed, deterministic=True, batch_size=15))
    assert z.mean(dim=(0, 2, 3)).abs().max() < 1e-5 and (z.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-5
    rows = th.from_numpy(read(out))
    assert th.allclose(normed.latent_scale.to_raw(z), rows, atol=1e-5)


# ---- held-out data ---------------------------------------------------------------------------------------------------


def heldout(place, vae, names=NAMES, **options):
    settings = {"image_size": 32, "class_cond": True, **QUIET, **options}
    return data.load_heldout(data_dir=place, vae=vae, class_names=list(names), **settings)


@pytest.mark.parametrize("sample_posterior", [True, False])
def test_held_out_images_are_their_posteriors_mean_under_the_runs_numbers(images, tmp_path, sample_posterior):
    vae = VAEInterface(sample_posterior=sample_posterior)
    x = th.from_numpy(
        np.stack([data.ImageDataset(32, data.list_images(images).paths, random_flip=False)[i][0] for i in (14, 0, 6)])
    )
    mean, _ = vae.encode_moments(x).chunk(2, dim=1)
    names = ["user_00", "user_11", "user_03", "user_07"]
    for options in {"cache_latents": False}, {}, {}:
        found = heldout(images, vae, names, **options)
        z, cond = found.batch([14, 0, 6])
        assert th.allclose(z, mean, atol=2e-5) and cond["y"].tolist() == [1, 2, 3] and len(found) == 15
    assert heldout(images, vae, (), class_cond=False).batch([3])[1] == {}


def test_held_out_shards_are_rows_under_the_runs_numbers(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae)
    found = heldout(out, vae, ["user_11", "user_07", "user_03"])
    z, cond = found.batch([0, 14])
    assert th.allclose(z, th.from_numpy(read(out)[[0, 14]]) * vae.scale_factor) and cond["y"].tolist() == [2, 0]
    assert th.equal(z, found.batch([0, 14])[0])


def test_held_out_pixels_are_the_images(images):
    found = heldout(images, VAEInterface("pixel"))
    wanted = np.asarray(Image.open(images / "user_07" / "2.png")).transpose(2, 0, 1) / 127.5 - 1
    z, cond = found.batch([7])
    assert np.abs(z[0].numpy() - wanted).max() < 1e-6 and cond["y"].tolist() == [1]


def test_held_out_and_training_caches_do_not_meet(images, vae, tmp_path):
    other, said = draw_images(tmp_path / "other", NAMES, seed=4), []
    for _ in range(2):
        load(images, vae, latent_cache=str(tmp_path / "cache"), say=said.append)
        heldout(other, vae, latent_cache=str(tmp_path / "cache"), say=said.append)
    assert sum("encoding" in line for line in said) == 2


def test_held_out_errors_speak_of_val_dir(images, vae, tmp_path):
    with pytest.raises(UserError, match=r"--val_dir .*images holds the class user_07, which the training run does not"):
        heldout(images, vae, ["user_03", "user_11"])
    with pytest.raises(UserError, match="--val_dir .* does not exist"):
        heldout(tmp_path / "nowhere", vae)
    with pytest.raises(UserError, match="--val_dir .* but --image_size is 64"):
        heldout(extract(images, tmp_path / "out", vae), vae, image_size=64)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_latents_of_another_autoencoder_or_size_are_refused(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae)
    other = VAEInterface()
    with th.no_grad():
        next(other.vae.parameters()).mul_(1.5)
    other.__dict__.pop("weights_fingerprint", None)
    ours, theirs = vae.weights_fingerprint, other.weights_fingerprint
    with pytest.raises(UserError, match=f"the autoencoder {ours}, but --vae_path microdoppler-f4 is {theirs}"):
        load(out, other)
    with pytest.raises(UserError, match=f"--out_dir .* of autoencoder {ours}, but this run's is {theirs}: choose"):
        extract(images, out, other)
    with pytest.raises(UserError, match="images of 32 pixels, but --image_size is 64: give 32"):
        load(out, vae, image_size=64)
    with pytest.raises(UserError, match="of --image_size 32, but this run's is 64: choose another --out_dir"):
        extract(images, out, vae, image_size=64)
    load(out, VAEInterface(scale_factor=0.5))  # the scale is no part of raw latents
    lightning(tmp_path / "wide" / "x.safetensors", th.zeros(2, 32, 8, 8), th.tensor([0, 1]))
    with pytest.raises(UserError, match=r"holds latents \(32, 8, 8\), but .* at --image_size 32 makes \(4, 8, 8\)"):
        load(tmp_path / "wide", vae)
    lightning(tmp_path / "theirs" / "latents_rank00_shard000.safetensors", X, Y)
    with pytest.raises(UserError, match="shard000.safetensors, which scripts/latent_extract.py did not write"):
        extract(images, tmp_path / "theirs", vae)


def test_one_class_is_not_a_condition(vae, tmp_path):
    lightning(tmp_path / "x.safetensors", th.zeros(2, 4, 8, 8), th.tensor([0, 0]))
    with pytest.raises(UserError, match="--class_cond True, but .* are of one class"):
        load(tmp_path, vae, class_cond=True)


def test_unreadable_images_are_refused_by_name_or_left_out(images, vae, tmp_path):
    bad = images / "user_07" / "2.png"  # row 7, in shard 1
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"1 of 15 images cannot be used: .*2\.png.*--skip_bad_images True"):
        extract(images, tmp_path / "out", vae)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3 and not (tmp_path / "out/latents_stats.pt").exists()
    out = extract(images, tmp_path / "out", vae, skip_bad_images=True, num_workers=1)
    assert len(read(out)) == 14 and read(out, "labels").tolist() == [0] * 5 + [1] * 4 + [2] * 5


X, Y = th.zeros(3, 4, 8, 8), th.tensor([0, 1, 2])
DAMAGE = {
    "no labels": ({"latents": X}, "holds no labels"),
    "half precision": ({"latents": X.half(), "labels": Y}, r"latents are F16 \(3, 4, 8, 8\); they must be F32"),
    "vectors": ({"latents": X[0], "labels": Y}, r"latents are F32 \(4, 8, 8\); they must be"),
    "flips": ({"latents": X, "latents_flip": X[:2].clone(), "labels": Y}, r"latents_flip are F32 \(2, 4, 8, 8\), but"),
    "too few labels": ({"latents": X, "labels": Y[:2].clone()}, r"labels are I64 \(2,\); they must be I64 \(3,\)"),
    "int32 labels": ({"latents": X, "labels": Y.int()}, r"labels are I32"),
    "negative": ({"latents": X, "labels": Y - 1}, "row 0 has the label -1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_fit_are_named(vae, tmp_path, case):
    tensors, message = DAMAGE[case]
    save_file(tensors, tmp_path / "latents_rank00_shard000.safetensors")
    with pytest.raises(UserError, match=f"latents_rank00_shard000.safetensors.*{message}") as error:
        load(tmp_path, vae)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_file_that_was_cut_off_is_damaged(vae, tmp_path, cut):
    path = tmp_path / "latents_rank00_shard000.safetensors"
    lightning(path, X, Y)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="latents_rank00_shard000.safetensors is damaged") as error:
        load(tmp_path, vae)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        b"[1, 2]",
        b"[" * 100_000,
        b'{"latents": 3}',
        b'{"latents": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}',
        b'{"latents": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}',
        b'{"latents": {"dtype": "F32", "shape": "x", "data_offsets": [0]}}',
        b'{"latents": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-8, 8]}}',
    ],
)
def test_a_forged_header_is_one_line(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="x.safetensors is damaged") as error:
        latent_shards.read_header(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_files_that_do_not_belong_together_are_refused(images, vae, tmp_path):
    out = extract(images, tmp_path / "out", vae)
    lightning(out / "latents_rank07_shard000.safetensors", X, Y)
    with pytest.raises(UserError, match="latents_rank07_shard000.safetensors does not belong with .*shard000"):
        load(out, vae)
    lightning(tmp_path / "y" / "a.safetensors", X, Y)
    lightning(tmp_path / "y" / "b.safetensors", th.zeros(3, 4, 4, 4), Y)
    with pytest.raises(UserError, match="b.safetensors does not belong with .*a.safetensors"):
        load(tmp_path / "y", vae)


def test_labels_beyond_the_class_list_are_refused(vae, tmp_path):
    about = {"autoencoder": vae.weights_fingerprint, "class_names": '["a", "b"]', "image_size": "32"}
    lightning(tmp_path / "x.safetensors", X, Y, metadata={**about, "dataset_size": "3"})
    with pytest.raises(UserError, match="has the label 2, but there are 2 classes"):
        load(tmp_path, vae)
    lightning(tmp_path / "x.safetensors", X, Y, metadata=about)
    with pytest.raises(UserError, match="x.safetensors has damaged metadata"):
        load(tmp_path, vae)


def test_weights_beside_images_are_not_latents(images, vae):
    save_file({"decoder.bias": th.zeros(3).half()}, images / "autoencoder.safetensors")
    assert find_shards(images) == [] and load(images, vae).num_samples == 15


def test_flags_of_the_script_are_checked(images, vae, tmp_path):
    for flag, value in ("shard_size", 0), ("batch_size", 0), ("layout", "tar"), ("num_workers", -1):
        with pytest.raises(UserError, match=f"--{flag} is"):
            ExtractConfig(**{flag: value})
    with pytest.raises(UserError, match="--out_dir is empty"):
        extract(images, "", vae)
    with pytest.raises(UserError, match="--vae_path is pixel"):
        extract(images, tmp_path / "out", VAEInterface("pixel"))
    with pytest.raises(UserError, match="--image_size is 33"):
        extract(images, tmp_path / "out", vae, image_size=33)
    with pytest.raises(UserError, match="--val_dir .*nowhere does not exist"):
        extract(images, tmp_path / "out", vae, val_dir=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out_dir .*is a file"):
        extract(images, tmp_path / "file" / "out", vae)
