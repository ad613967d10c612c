"""Training an autoencoder: the same bits after a kill, the same numbers in parts, and errors that lose nothing."""

import shutil

import numpy as np
import pytest
import torch as th
from helpers import draw_users, script
from PIL import Image

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.autoencoders.objectives import ObjectiveConfig
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.fp16_util import TrainingDiverged
from guided_diffusion_vae.vae_tasks import VAEModelConfig, create_task
from guided_diffusion_vae.vae_train_util import VAETrainConfig, VAETrainer
from guided_diffusion_vae.vae_wrapper import VAEInterface

TINY = VAEModelConfig(ch=8, ch_mult="1,2", norm_groups=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two users with six 24 x 24 pictures each."""
    return draw_users(tmp_path_factory.mktemp("vae_images"), ["user_00", "user_01"], 6, 24, high=256)


def trainer(images, folder, model=TINY, objective=None, ckpt="", channels=None, **settings):
    th.manual_seed(0)
    data = VAEDataConfig(data_root=str(images), image_size=16, random_crop=model.model == "kl")
    objective = objective or ObjectiveConfig(kl_weight=0.01)
    task = create_task(model, objective, image_size=16, ckpt=ckpt, say=lambda _: None)
    parts = data.parts(task.channels, seed=0)
    config = VAETrainConfig(**{"batch_size": 4, "max_steps": 6, "save_interval": 3, "lr": 1e-3, **settings})
    arguments = {**vars(config), **vars(model), **vars(data)}
    return VAETrainer(task, parts.train, parts.val, config, image_size=16, folder=folder, arguments=arguments)


def differences(a, b):
    a, b = (checkpoint.load(folder / "last.pt") for folder in (a, b))
    assert a["step"] == b["step"]
    return {name: float((a["model"][name] - b["model"][name]).abs().max()) for name in a["model"]}


GAN = ObjectiveConfig(disc_factor=1.0, disc_start=1, disc_ndf=8, disc_num_layers=1, kl_weight=0.01)


@pytest.mark.parametrize("objective", [ObjectiveConfig(kl_weight=0.01), GAN], ids=["plain", "gan"])
def test_a_killed_training_ends_in_the_same_bits(images, tmp_path, objective):
    trainer(images, tmp_path / "whole", objective=objective).run()
    killed = trainer(images, tmp_path / "killed", objective=objective)
    update = killed.update

    def until_four(batch):
        if killed.step == 4:
            raise KeyboardInterrupt
        return update(batch)

    killed.update = until_four
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again = trainer(images, tmp_path / "killed", objective=objective)
    assert again.step == 3
    again.run()
    assert set(differences(tmp_path / "whole", tmp_path / "killed").values()) == {0.0}


def test_parts_of_a_batch_give_its_gradient(images, tmp_path):
    """lr 1e-4: Adam turns the rounding of gradients near zero into steps."""
    trainer(images, tmp_path / "whole", lr=1e-4).run()
    trainer(images, tmp_path / "parts", lr=1e-4, microbatch=2).run()
    assert max(differences(tmp_path / "whole", tmp_path / "parts").values()) < 1e-5


def test_bfloat16_is_near_float32(images, tmp_path):
    """The first losses of the same weights and noise agree to the 8 bits of a bfloat16."""
    full, half = (trainer(images, tmp_path / amp, amp=amp) for amp in ("none", "bf16"))
    a, b = (float(t.update(next(t.data))["nll_loss"]) for t in (full, half))
    assert a != b and b == pytest.approx(a, rel=0.01)


def test_recomputed_activations_change_nothing_but_memory(images, tmp_path):
    """With dropout, whose masks the recomputation must repeat, and with both adaptive weights' extra gradients."""
    model = VAEModelConfig(ch=8, ch_mult="1,2", norm_groups=4, dropout=0.3, mid_attn=True)
    trainer(images, tmp_path / "kept", model=model, objective=GAN).run()
    trainer(images, tmp_path / "again", model=model, objective=GAN, use_checkpoint=True).run()
    assert set(differences(tmp_path / "kept", tmp_path / "again").values()) == {0.0}


def test_two_processes_are_one_with_twice_the_batch(images, tmp_path):
    flags = ["--data_root", images, "--image_size", 16, "--ch", 8, "--ch_mult", "1,2", "--norm_groups", 4]
    flags += ["--max_steps", 4, "--lr", 1e-4, "--random_crop", True]
    script("vae_train.py", *flags, "--batch_size", 4, "--out_dir", tmp_path / "one")
    script("vae_train.py", *flags, "--batch_size", 2, "--out_dir", tmp_path / "two", ranks=2)
    assert max(differences(tmp_path / "one", tmp_path / "two").values()) < 1e-5


def test_what_is_published_is_the_average_and_fits_its_scale(images, tmp_path):
    done = trainer(images, tmp_path, name="mine", half=False)
    done.run()
    vae = VAEInterface(str(tmp_path / "mine.safetensors"))
    wanted = checkpoint.load(tmp_path / "last.pt")["model"]
    assert all(th.equal(value, wanted[name]) for name, value in vae.vae.state_dict().items())
    moved = [not th.equal(value, wanted[name]) for name, value in done.model.state_dict().items()]
    assert any(moved)
    assert not (tmp_path / "samples_grid.png").exists()  # noise: nobody draws its latents from N(0, I)
    x = th.stack([th.as_tensor(done.data.order[i]) for i in range(64)])
    assert vae.encode_batch(x).pow(2).mean().sqrt().item() == pytest.approx(1.0, abs=0.1)


def test_pairs_are_a_real_image_and_what_comes_back(images, tmp_path):
    done = trainer(images, tmp_path, max_steps=3)
    done.run()
    sheet = np.asarray(Image.open(tmp_path / "recon_grid.png"))
    side, first = 16, done.val[0]
    tiles = [sheet[16 : 16 + side, 4 + x : 4 + x + side] for x in (0, side + 4)]  # below their captions
    real = ((first + 1) * 127.5).round().transpose(1, 2, 0)
    assert np.abs(tiles[0] - real).max() <= 1 < np.abs(tiles[1] - real).mean()
    assert sheet[4:16, : 2 * (side + 4)].min() < 100  # words


def test_fine_tuning_starts_where_the_checkpoint_ends(images, tmp_path):
    trainer(images, tmp_path / "first", half=False).run()
    start = trainer(images, tmp_path / "second", ckpt=str(tmp_path / "first" / "autoencoder.safetensors"))
    wanted = checkpoint.load(tmp_path / "first" / "last.pt")["model"]
    assert all(th.equal(value, wanted[name]) for name, value in start.model.state_dict().items())


def test_a_loss_that_is_not_finite_keeps_the_good_checkpoint(images, tmp_path):
    trainer(images, tmp_path, max_steps=3).run()
    good = (tmp_path / "last.pt").read_bytes()
    broken = trainer(images, tmp_path, max_steps=9)
    with th.no_grad():
        broken.model.decoder.conv_out.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"_loss is nan at step \d"):
        broken.run()
    assert (tmp_path / "last.pt").read_bytes() == good


def test_a_plain_vae_learns_and_comes_back(images, tmp_path):
    model = VAEModelConfig(model="celeba", latent_dim=8, base_channels=8)
    done = trainer(images, tmp_path, model=model, max_steps=60, lr=3e-3)
    before = float(done.update(next(done.data))["recon"])
    done.run()
    assert float(done.update(next(done.data))["recon"]) < 0.9 * before
    assert (tmp_path / "samples_grid.png").is_file()
    again = create_task(model, ObjectiveConfig(), image_size=16, ckpt=str(tmp_path / "last.pt"))
    wanted = checkpoint.load(tmp_path / "last.pt")["model"]
    assert all(th.equal(value, wanted[name]) for name, value in again.model.state_dict().items())


def test_one_image_is_enough_and_grey_becomes_colour(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("L", (16, 16), 200).save(tmp_path / "data" / "one_0.png")
    trainer(tmp_path / "data", tmp_path / "run", batch_size=2, max_steps=2).run()
    grey = VAEModelConfig(ch=8, ch_mult="1,2", norm_groups=4, in_channels=1)
    trainer(tmp_path / "data", tmp_path / "grey", model=grey, batch_size=2, max_steps=2, half=False).run()
    vae = VAEInterface(str(tmp_path / "grey" / "autoencoder.safetensors"))
    images = vae.decode_batch(vae.encode_batch(th.zeros(2, 3, 16, 16)))
    assert images.shape == (2, 3, 16, 16) and th.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"amp": "fp16"}, "--amp is 'fp16'; choose none or bf16: sums over pixels exceed"),
        ({"adam_betas": "0.9"}, "--adam_betas is '0.9'; give two numbers"),
        ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
        ({"lr_schedule": "step"}, "--lr_schedule is 'step'; choose cosine or constant"),
        ({"epochs": 0}, "--epochs is 0"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        VAETrainConfig(**settings)


def test_the_checkpoint_of_another_autoencoder_is_named(images, tmp_path):
    trainer(images, tmp_path / "run", max_steps=3).run()
    with pytest.raises(UserError, match="last.pt is of another autoencoder: remove it, or choose another --out_dir"):
        trainer(images, tmp_path / "run", model=VAEModelConfig(ch=8, ch_mult="1,1", norm_groups=4))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="--image_size is 16, which an f32 autoencoder cannot divide by 32"):
        trainer(images, tmp_path / "run", model=VAEModelConfig(ch=8, ch_mult="1,1,1,1,1,1", norm_groups=4))
