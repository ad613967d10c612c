"""What a loop is fed: an order without memory, latents that are the same cached or not, and errors in one line."""

import json
import random
import shutil
import zlib

import numpy as np
import pytest
import torch as th
from helpers import golden
from PIL import Image

from guided_diffusion_vae import image_datasets as data
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import stream
from guided_diffusion_vae.data.stream import mix
from guided_diffusion_vae.vae_wrapper import VAEInterface


@pytest.fixture
def folder(tmp_path):
    """Three users with four 32 x 32 images each; image i of user u has a red level of 20 u + i."""
    rng = np.random.RandomState(0)
    for user in range(3):
        (tmp_path / f"user_{user:02d}").mkdir()
        for i in range(4):
            pixels = rng.randint(0, 255, (32, 32, 3)).astype(np.uint8)
            pixels[..., 0] = 20 * user + i
            Image.fromarray(pixels).save(tmp_path / f"user_{user:02d}" / f"{i}.png")
    return tmp_path


def red_levels(images):
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def load(folder, vae, **options):
    return data.load_data_with_vae(
        data_dir=folder, image_size=32, vae=vae, **{"batch_size": 4, "say": lambda *_: None, **options}
    )


def test_every_epoch_has_every_image_once_in_another_order(folder):
    stream = data.load_data(data_dir=folder, batch_size=4, image_size=32, class_cond=True, random_flip=False, seed=3)
    epochs = []
    for _ in range(2):
        levels, labels = [], []
        for _ in range(3):
            images, cond = next(stream)
            levels += red_levels(images)
            labels += cond["y"].tolist()
        assert sorted(levels) == sorted(20 * user + i for user in range(3) for i in range(4))
        assert [level // 20 for level in levels] == labels
        epochs.append(levels)
    assert epochs[0] != epochs[1]


def test_seek_goes_to_any_step_at_once(folder):
    options = {"data_dir": folder, "batch_size": 5, "image_size": 32, "random_flip": True, "seed": 1, "num_workers": 0}
    straight, sought = data.load_data(**options), data.load_data(**options)
    batches = [next(straight)[0] for _ in range(6)]
    sought.seek(4)
    assert th.equal(next(sought)[0], batches[4]) and th.equal(next(sought)[0], batches[5])


def test_a_folder_smaller_than_the_batch_wraps_around(folder):
    """Upstream loops for ever without a batch."""
    images, _ = next(data.load_data(data_dir=folder, batch_size=30, image_size=32, random_flip=False, seed=0))
    assert len(images) == 30 and len(set(red_levels(images)[:12])) == 12


def test_deterministic_is_the_order_of_the_files(folder):
    stream = data.load_data(data_dir=folder, batch_size=12, image_size=32, deterministic=True, random_flip=False)
    assert red_levels(next(stream)[0]) == [20 * user + i for user in range(3) for i in range(4)]


def test_a_seed_leaves_pythons_generator_alone(folder):
    random.seed(5)
    wanted = random.random()
    random.seed(5)
    next(data.load_data(data_dir=folder, batch_size=4, image_size=32, seed=0, num_workers=0))
    assert random.random() == wanted


def test_pixels_are_upstreams(folder):
    """float32, channels first, x / 127.5 - 1, in the order of the files."""
    images, cond = next(data.load_data(data_dir=folder, batch_size=12, image_size=32, deterministic=True, seed=0))
    stored = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))])
    same = [np.array_equal(x, p) or np.array_equal(x, p[:, ::-1]) for x, p in zip(back(images), stored, strict=True)]
    assert images.dtype == th.float32 and cond == {} and all(same)


def back(images):
    return ((images + 1) * 127.5).round().to(th.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("case", golden("adm_crops.json")["cases"], ids=lambda c: "{height}x{width}-{size}".format(**c))
def test_crops_are_upstreams(case):
    pixels = np.random.RandomState(case["seed"]).randint(0, 256, (case["height"], case["width"], 3)).astype(np.uint8)
    image, size = Image.fromarray(pixels), case["size"]
    random.seed(case["seed"])
    for crop, wanted in (data.center_crop_arr, "center_crc32"), (data.random_crop_arr, "random_crc32"):
        found = crop(image, size)
        assert found.shape == (size, size, 3)
        assert zlib.crc32(np.ascontiguousarray(found).tobytes()) == case[wanted]


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_posterior", [False, True])
def test_cached_and_fresh_latents_are_the_same(folder, sample_posterior):
    vae = VAEInterface(sample_posterior=sample_posterior)
    cached = load(folder, vae, class_cond=True, seed=7)
    fresh = load(folder, vae, class_cond=True, seed=7, cache_latents=False)
    for _ in range(4):
        (a, a_cond), (b, b_cond) = next(cached), next(fresh)
        assert a.shape == (4, 4, 8, 8) and th.allclose(a, b, atol=1e-4)
        assert th.equal(a_cond["y"], b_cond["y"])


def test_the_cache_is_read_from_disk_and_rebuilt_when_the_images_change(folder):
    vae, said = VAEInterface(), []
    for _ in range(2):
        load(folder, vae, say=said.append)
    assert sum("encoding" in line for line in said) == 1
    place = folder / ".latents" / f"{vae.fingerprint}-32"
    assert isinstance(data.MomentsDataset(place / "moments.npy", [0] * 12).moments, np.memmap)
    assert np.load(place / "moments.npy").shape == (12, 8, 8, 8)
    Image.new("RGB", (32, 32)).save(folder / "user_01" / "new.png")
    load(folder, vae, say=said.append)
    assert sum("encoding" in line for line in said) == 2


def test_an_interrupted_encoding_is_done_again(folder):
    vae, said = VAEInterface(), []
    load(folder, vae)
    place = folder / ".latents" / f"{vae.fingerprint}-32"
    (place / "index.json").unlink()
    load(folder, vae, say=said.append)
    assert "encoding" in said[1] and json.loads((place / "index.json").read_text())["image_size"] == 32


def test_a_cache_of_another_autoencoder_is_refused(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("cache")
    load(folder, VAEInterface(), latent_cache=str(place))
    other = VAEInterface(scale_factor=0.5)
    with pytest.raises(UserError, match=f"--latent_cache .* was encoded with autoencoder .* is {other.fingerprint}"):
        load(folder, other, latent_cache=str(place))


@pytest.mark.parametrize("cache_latents", [True, False])
def test_a_scale_that_does_not_fit_is_said_once(tmp_path, cache_latents):
    for user in ("a", "b"):
        (tmp_path / user).mkdir()
        noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / user / "0.png")
    said = {}
    for scale in (0, 100):
        said[scale] = []
        vae = VAEInterface(scale_factor=scale)
        stream = load(tmp_path, vae, say=said[scale].append, cache_latents=cache_latents)
        next(stream), next(stream)
    assert not any("standard deviation" in line for line in said[0])
    assert sum("--scale_factor does not fit" in line for line in said[100]) == 1


def test_noise_of_a_step_is_one_draw_for_all_slots():
    whole = data.slot_randn((4, 2), seed=1, step=2, use=3)
    assert th.equal(whole, data.slot_randn((4, 2), seed=1, step=2, use=3))
    for other in ({"seed": 9, "step": 2, "use": 3}, {"seed": 1, "step": 9, "use": 3}, {"seed": 1, "step": 2, "use": 9}):
        assert not th.equal(whole, data.slot_randn((4, 2), **other))


def test_every_use_of_random_numbers_has_its_own():
    """None of the seeds of step or row 1 ... 3, whatever the rank, is that of another use or of a sampled image."""
    uses = stream.POSTERIOR, stream.NOISE, stream.DROPPED_LABELS, stream.VALIDATION, stream.EXTRACTED
    uses += (stream.EXTRACTED_FLIP, stream.LIKELIHOOD, stream.AMOUNT, stream.SEEN, stream.DROPOUT)
    seeds = [mix(5, i, use) for i in (1, 2, 3) for use in uses[:-1]] + [mix(5, i) for i in (1, 2, 3)]
    seeds += [mix(5, i, rank, stream.DROPOUT) for i in (1, 2, 3) for rank in range(9)]
    assert len(set(seeds)) == len(seeds) and 0 not in uses and len(set(uses)) == 10
    assert mix(5, 1) == mix(5, 1, 0)  # why none is 0


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_parts_are_not_persons(folder):
    for part in ("train", "test"):
        shutil.copytree(folder / "user_00", folder / "all" / part / "user_00")
    with pytest.raises(UserError, match="holds the parts test, train, not users: give .*all/train"):
        load(folder / "all", VAEInterface(), class_cond=True)
    said = []
    load(folder / "all", VAEInterface(), say=said.append)
    assert "held-out images are in" in said[0]


def test_streams_know_how_many_samples_they_have(folder):
    images = data.load_data(data_dir=folder, batch_size=5, image_size=32, seed=0)
    assert images.num_samples == load(folder, VAEInterface()).num_samples == 12
    assert load(folder, VAEInterface("pixel")).num_samples == 12


def test_what_was_found_is_said(folder):
    (folder / "user_09").mkdir()
    said = []
    load(folder, VAEInterface(), say=said.append)
    assert said[0] == "12 images of 3 classes: user_00 (4), user_01 (4), user_02 (4); no images in user_09"


def test_a_dry_run_refuses_what_the_run_would_and_reads_no_image(folder, tmp_path_factory):
    """Its words are those of the run; damaged images are for the run to find."""
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    elsewhere, said = tmp_path_factory.mktemp("elsewhere"), []
    for user in ("user_01", "user_02"):
        shutil.copytree(folder / user, elsewhere / user)
    how = {"image_size": 32, "vae": VAEInterface(), "class_cond": True, "flag": "--judge", "say": said.append}
    data.rehearse_data(folder, elsewhere, **how)
    found = ["12 images of 3 classes: user_00 (4), user_01 (4), user_02 (4)"]
    assert said == [*found, "held out: 8 images of 2 classes: user_01 (4), user_02 (4)"]
    (elsewhere / "user_02").rename(elsewhere / "user_07")
    for places, change, words in [
        (("nowhere", ""), {}, "--data_dir nowhere does not exist"),
        ((folder, "nowhere"), {}, "--judge nowhere does not exist"),
        ((folder, elsewhere), {}, "--judge .* holds the class user_07, which the training run does not know"),
        ((folder, ""), {"image_size": 33}, "33"),
        ((folder, ""), {"class_cond": False, "class_balance": True}, "--class_balance True needs users"),
        ((folder, ""), {"cache_latents": True, "random_flip": True}, "--random_flip True needs --cache_latents False"),
    ]:
        with pytest.raises(UserError, match=words):
            data.rehearse_data(*places, **{**how, **change})
    said.clear()
    data.rehearse_data("", "nowhere", **how)
    assert not said


def test_an_image_that_breaks_in_a_worker_is_one_line(folder):
    bad = folder / "user_01" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    stream = data.load_data(data_dir=folder, batch_size=12, image_size=32, deterministic=True, num_workers=1)
    with pytest.raises(UserError, match=r"^\S*2\.png cannot be read as an image [^\n]*$"):
        next(stream)


def test_unreadable_images_are_refused_by_name_or_left_out(folder):
    bad = folder / "user_01" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200])
    vae, said = VAEInterface(), []
    with pytest.raises(UserError, match=r"1 of 12 images cannot be used: .*2\.png.*--skip_bad_images True"):
        load(folder, vae)
    stream = load(folder, vae, skip_bad_images=True, say=said.append)
    assert "left out 1 of 12" in said[0] and len(stream.images.order.dataset) == 11


def test_one_class_is_not_a_condition(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "user_1.png")
    with pytest.raises(UserError, match=r"--class_cond True, but .* are of one class \(user\): a class is"):
        load(tmp_path, VAEInterface("pixel"), class_cond=True)


def test_flips_and_the_cache_exclude_each_other(folder):
    with pytest.raises(UserError, match="--random_flip True needs --cache_latents False"):
        load(folder, VAEInterface(), random_flip=True)


def test_a_size_that_cannot_be_halved_is_said_before_anything_is_encoded(folder):
    with pytest.raises(UserError, match="--image_size is 33"):
        data.load_data_with_vae(data_dir=folder, batch_size=1, image_size=33, vae=VAEInterface())
