"""Fine-tuning from a VA-VAE training checkpoint: one file gives the autoencoder and all that judges it."""

import pytest
import torch as th
import yaml
from helpers import script
from test_foundation import timm_weights
from test_vae_train_util import differences, images  # noqa: F401  (a fixture)

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.autoencoders.adversarial import PatchDiscriminator
from guided_diffusion_vae.autoencoders.kl import KLAutoencoder, KLConfig
from guided_diffusion_vae.autoencoders.perceptual import LPIPS

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory):
    """A tiny training checkpoint in Lightning's layout: autoencoder, LPIPS, discriminator, projection, DINOv2."""
    th.manual_seed(0)
    parts = {
        "": KLAutoencoder(KLConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4)).state_dict(),
        "loss.perceptual_loss.": LPIPS(4).state_dict(),
        "loss.discriminator.": PatchDiscriminator(3, ndf=4, n_layers=1).state_dict(),
        "linear_proj.": {"weight": th.randn(64, 4, 1, 1)},
        "foundation_model.model.": timm_weights("dinov2"),
    }
    state = {prefix + name: value for prefix, weights in parts.items() for name, value in weights.items()}
    state["loss.logvar"] = th.zeros(())
    path = tmp_path_factory.mktemp("vavae") / "stage2.ckpt"
    th.save({"epoch": 15, "global_step": 100, "state_dict": state, "optimizer_states": []}, path)
    return path


def fine_tune(images, stage_2, folder, *flags, **options):  # noqa: F811
    everything = ["--ckpt", stage_2, "--vf_path", stage_2, "--lpips_path", stage_2]
    small = "--image_size 32 --disc_num_layers 1 --disc_ndf 4 --batch_size 2 --max_steps 3 --log_interval 1".split()
    recipe = ["--config", "configs/vavae_finetune.yaml", "--data_root", images, "--out_dir", folder]
    return script("vae_train.py", *recipe, *everything, *small, *flags, **options)


def test_every_term_is_there_and_every_part_is_restored(images, stage_2, tmp_path):  # noqa: F811
    done = fine_tune(images, stage_2, tmp_path)
    assert "starting from" in done.stdout
    assert "from the same file: discriminator, perceptual_loss, linear_proj, foundation_model" in done.stdout
    log = (tmp_path / "log.txt").read_text()
    for term in ("nll_loss", "lpips", "kl_loss", "g_loss", "d_weight", "vf_loss", "vf_weight", "disc_loss"):
        assert f"| {term} " in log, log
    saved = checkpoint.load(tmp_path / "last.pt")["task"]
    kinds = {name.split(".")[1] for name in saved if name.startswith("objective.")}
    assert kinds == {"discriminator", "linear_proj", "logvar"}  # frozen networks stay in their own files


def test_it_goes_on_with_the_same_bits(images, stage_2, tmp_path):  # noqa: F811
    fine_tune(images, stage_2, tmp_path / "whole", "--save_interval", 2)
    fine_tune(images, stage_2, tmp_path / "parts", "--save_interval", 2, "--max_steps", 2)
    fine_tune(images, stage_2, tmp_path / "parts", "--save_interval", 2)
    assert set(differences(tmp_path / "whole", tmp_path / "parts").values()) == {0.0}


def test_upstreams_own_yaml_trains(images, stage_2, tmp_path):  # noqa: F811
    config = {
        "ckpt_path": str(stage_2),
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {"z_channels": 4, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []},
                "lossconfig": {
                    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
                    "params": {"disc_start": 5001, "kl_weight": 1e-6, "disc_weight": 0.5, "disc_num_layers": 1},
                },
            },
        },
        "data": {"params": {"batch_size": 2, "train": {"params": {"data_root": str(images), "size": 32}}}},
        "lightning": {"trainer": {"max_epochs": 1}},
    }
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config", tmp_path / "ldm.yaml", "--lpips_path", stage_2, "--disc_ndf", 4, "--out_dir", tmp_path]
    done = script("vae_train.py", *flags)
    assert "PSNR" in done.stdout and (tmp_path / "autoencoder.safetensors").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vf_path", "nowhere"], "--vf_path 'nowhere' does not exist"),
        (["--lpips_path", ""], "--perceptual_weight needs the weights of LPIPS"),
        (["--disc_ndf", 8], "the checkpoint's discriminator does not fit these settings"),
        (["--use_vf", "mae"], "--vf_path"),
    ],
)
def test_a_part_that_is_missing_is_one_line(images, stage_2, tmp_path, flags, words):  # noqa: F811
    done = fine_tune(images, stage_2, tmp_path, *flags, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
