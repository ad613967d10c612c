"""Upstream's YAML means what it means there, and what upstream would ignore is an error here."""

import copy

import pytest
import yaml

from guided_diffusion_vae.autoencoders.ldm_config import is_ldm, settings_from_ldm
from guided_diffusion_vae.autoencoders.objectives import ObjectiveConfig
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.vae_tasks import VAEModelConfig
from guided_diffusion_vae.vae_train_util import VAETrainConfig

STAGE_3 = {  # the last of the three stages of f16d32, in the shape of the facts
    "ckpt_path": "/stage2.ckpt",
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "monitor": "val/rec_loss",
            "embed_dim": 32,
            "use_vf": "dinov2",
            "reverse_proj": True,
            "ddconfig": {
                **{"double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128},
                **{"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0},
            },
            "lossconfig": {
                "target": "ldm.modules.losses.LPIPSWithDiscriminator",
                "params": {
                    **{"disc_start": 1, "kl_weight": 1e-6, "disc_weight": 0.5, "vf_weight": 0.1, "adaptive_vf": True},
                    **{"distmat_margin": 0.25, "cos_margin": 0.5},
                },
            },
        },
    },
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 8, "wrap": True, "train": {"target": "x.y", "params": {"data_root": "/images"}}},
    },
    "lightning": {"trainer": {"devices": 8, "num_nodes": 4, "max_epochs": 15, "precision": 32}},
}
SECTIONS = (VAEDataConfig, VAEModelConfig, VAETrainConfig, ObjectiveConfig)


def test_a_published_stage_becomes_our_flags(tmp_path):
    (tmp_path / "stage3.yaml").write_text(yaml.safe_dump(STAGE_3))
    flags = ["--config", str(tmp_path / "stage3.yaml"), "--image_size", "256"]
    run = parse_run(create_argparser(*SECTIONS), flags, translate=settings_from_ldm)
    model = run.section(VAEModelConfig).build(256)
    assert sum(p.numel() for p in model.parameters()) == 69_836_067
    assert (run.ckpt, run.data_root, run.batch_size, run.epochs) == ("/stage2.ckpt", "/images", 8, 15)
    assert (run.lr, run.lr_schedule, run.amp) == (1e-4, "constant", "none")
    objective = run.section(ObjectiveConfig)
    assert (objective.use_vf, objective.vf_weight, objective.adaptive_vf, objective.reverse_proj) == (
        *("dinov2", 0.1, True),
        True,
    )
    assert (objective.cos_margin, objective.distmat_margin, objective.disc_start) == (0.5, 0.25, 1)
    assert (objective.perceptual_weight, objective.disc_factor, objective.disc_loss) == (1.0, 1.0, "hinge")


def test_upstreams_defaults_hold_where_its_file_is_silent():
    stage = copy.deepcopy(STAGE_3)
    stage["model"]["params"]["lossconfig"]["params"] = {"disc_start": 5001}
    settings = settings_from_ldm(stage)
    wanted = {"kl_weight": 1.0, "vf_weight": 100.0, "adaptive_vf": False, "disc_factor": 1.0, "perceptual_weight": 1.0}
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["disc_start"] == 2501  # 5001 steps of two optimisers


@pytest.mark.parametrize("size, attends", [(256, "16"), (128, "32"), (64, "64")])
def test_attention_stays_at_its_level(size, attends):
    """With --resolution 128, 16 pixels are one level higher: nominal 32 of 256."""
    stage = copy.deepcopy(STAGE_3)
    stage["model"]["params"]["ddconfig"]["resolution"] = size
    assert settings_from_ldm(stage)["attn_resolutions"] == attends


@pytest.mark.parametrize(
    "where, name, value, words",
    [
        ((), "weight_init", "a.ckpt", "weight_init is ignored by upstream, which reads init_weight"),
        (("model",), "target", "os.system", "model.target is 'os.system'; known are ldm.models"),
        (("model", "params", "lossconfig"), "target", "builtins.eval", "never imported"),
        (("model", "params", "lossconfig", "params"), "vf_loss_type", "combined_v3", "vf_loss_type has no meaning"),
        (("model", "params", "lossconfig", "params"), "logvar_init", 1.0, "logvar_init can only be 0.0"),
        (("lightning", "trainer"), "gradient_clip_val", 1.0, "gradient_clip_val has no meaning here"),
        (("lightning", "trainer"), "precision", 16, "precision is 16; 32 and bf16-mixed"),
        (("model", "params"), "embed_dim", 16, "embed_dim 16 is not ddconfig.z_channels 32"),
        (("model",), "params", "x", "model.params must be a block"),
    ],
)
def test_what_upstream_would_ignore_is_an_error(where, name, value, words):
    stage = copy.deepcopy(STAGE_3)
    block = stage
    for key in where:
        block = block[key]
    block[name] = value
    with pytest.raises(UserError, match=words):
        settings_from_ldm(stage)


def test_our_own_recipes_are_not_taken_for_upstreams():
    assert is_ldm(STAGE_3) and not is_ldm({"model": "kl", "lr": 1e-4})
