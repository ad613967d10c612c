"""Files of strangers: nothing in them is run, none takes memory by a lie, and nothing is written where it leads."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from inputs import COMMANDS, World, defaults_of, ended, one_line, poisoned

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.autoencoders.ldm_config import settings_from_ldm
from guided_diffusion_vae.config import UserError, read_yaml
from guided_diffusion_vae.vae_wrapper import VAEInterface

SHIPPED = Path(checkpoint.__file__).parent / "assets" / "microdoppler-f4.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


# ---- code -----------------------------------------------------------------------------------------------------------

FLAGS = [  # every flag that a file with weights, arrays or latents may stand behind, in a command that reads it
    *(("image_train_vae.py", flag, "") for flag in ("vae_path", "resume_checkpoint", "data_dir", "val_dir")),
    ("classifier_train_vae.py", "vae_path", ""),
    ("classifier_train_vae.py", "resume_checkpoint", ""),
    ("classifier_train_vae.py", "model_path", ""),
    *(("image_sample_vae.py", flag, "") for flag in ("model_path", "vae_path", "classifier_path")),
    ("image_sample_vae.py", "autoguide_path", "--autoguide_scale 2"),
    ("image_nll_vae.py", "model_path", ""),
    ("image_nll_vae.py", "vae_path", ""),
    ("latent_extract.py", "vae_path", ""),
    ("check_vae.py", "vae_path", ""),
    ("check_vae.py", "lpips_path", ""),
    ("vae_train.py", "ckpt", ""),
    ("vae_train.py", "lpips_path", "--perceptual_weight 1"),
    ("vae_train.py", "vf_path", "--use_vf dinov2"),
    ("vae_train.py", "generated_latents", "--ckpt microdoppler-f4 --decoder_only True"),
    ("vae_test.py", "ckpt", ""),
    ("vae_test.py", "lpips_path", ""),
    ("vae_infer.py", "ckpt", ""),
    ("run_pipeline.py", "vae_path", ""),
    *((script, "samples", "") for script in ("evaluate_samples.py", "validate.py", "augmentation_study.py")),
    ("gallery.py", "samples", ""),
    ("evaluator.py", "inception_weights", "--check_weights False"),
    ("evaluator.py", "dinov2_path", "--features dinov2"),
    ("evaluator.py", "vae_path", "--features vae"),
    ("make_reference.py", "inception_weights", "--check_weights False"),
    ("make_reference.py", "data_dir", ""),
]
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".pb")


QUICK = FLAGS[0], ("image_sample_vae.py", "model_path", ""), ("validate.py", "samples", "")


@pytest.mark.fault("{script} --{flag}: a pickle with code under every ending", promise="code 2, one line, nothing run")
@pytest.mark.parametrize(
    "script, flag, more", [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in FLAGS]
)
def test_code_is_not_run(script, flag, more, world, tmp_path, record_property):
    for ending in ENDINGS:
        file = poisoned(tmp_path / f"x{ending}", tmp_path / "mark")
        done = ended(script, [*world.command(script, **{flag: file}), *more.split()], limit=30)
        assert not (tmp_path / "mark").exists(), "the code was run"
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning: ")]
        assert (done.returncode, len(lines)) == (2, 1), (ending, done.returncode, lines[-5:])
    record_property("tried", len(ENDINGS))


def test_no_flag_of_a_file_is_left_out():
    """The table above holds all flags that end in _path, and those that name checkpoints."""
    known = {(script, flag) for script, flag, _ in FLAGS} | {("run_pipeline.py", "classifier_path")}
    known |= {("run_pipeline.py", "autoguide_path"), ("run_pipeline.py", "resume_checkpoint")}  # refused unread
    found = {(s, f) for s in COMMANDS for f in defaults_of(s) if f.endswith("_path") or f in ("ckpt", "samples")}
    assert found <= known, found - known


@pytest.mark.slow
@pytest.mark.fault("a folder of diffusers whose .bin is a pickle with code", promise="code 2, nothing run")
def test_a_diffusers_folder_with_code(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    poisoned(folder / "diffusion_pytorch_model.bin", tmp_path / "mark")
    assert "vae" in one_line(lambda: VAEInterface(str(folder)), within=1000)
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
@pytest.mark.fault("pickles beside a model: opt*.pt, ema_*.pt, state*.pt, latents_stats.pt", promise="nothing run")
def test_code_beside_a_model(world, tmp_path, record_property):
    for name in ("opt000000.pt", "state000000.pt", "model000000.pt"):
        folder = tmp_path / name
        folder.mkdir()
        for path in (world.root / "train").glob("*.*"):
            (folder / path.name).write_bytes(path.read_bytes())
        poisoned(folder / name, tmp_path / "mark")
        words = world.command("image_train_vae.py", log_dir=folder, resume_checkpoint="auto", data_dir="/nowhere")
        assert ended("image_train_vae.py", words, limit=30).returncode == 2
        assert not (tmp_path / "mark").exists()
    record_property("tried", 3)


TRAPS = {
    "a tag that calls": "lr: !!python/object/apply:os.system ['touch {mark}']",
    "a tag that makes an object": "lr: !!python/object:subprocess.Popen {}",
    "a bomb of aliases": "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in pairwise("abcdefghi")),
    "a million brackets": "[" * 10**6,
    "a hundred thousand braces": "{a: " * 10**5,
    "a number of a million digits": "lr: " + "1" * 900_000,
    "a time of a million parts": "lr: " + "1:" * 300_000 + "1",
    "a date that is none": "lr: 2020-99-99",
    "a truth that is none": "lr: !!bool x",
    "a time that is none": "lr: !!timestamp x",
    "bytes that are no text": "\udcff",
    "20,000 keys": "".join(f"key_{i}: {i}\n" for i in range(20_000)),
}


@pytest.mark.fault("a recipe with {kind}", promise="refused in one line, within 10 s and 100 MB")
@pytest.mark.parametrize("kind", TRAPS)
def test_a_recipe_that_is_a_trap(kind, tmp_path):
    text = TRAPS[kind].replace("{mark}", str(tmp_path / "mark"))
    (tmp_path / "recipe.yaml").write_bytes(text.encode(errors="surrogateescape"))
    if kind == "20,000 keys":
        assert len(read_yaml(tmp_path / "recipe.yaml")) == 20_000
    else:
        assert "--config" in one_line(lambda: read_yaml(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.fault("target: {target} in a recipe of upstream's", promise="looked up in a table, never imported")
@pytest.mark.parametrize("target", ["os.system", "torch.load", "ldm.models.autoencoder.AutoencoderKL.__init__", ["x"]])
def test_a_target_outside_the_table(target, tmp_path):
    loaded = {"model": {"target": target, "params": {"command": f"touch {tmp_path}/mark"}}}
    with pytest.raises(UserError, match="looked up, never imported"):
        settings_from_ldm(loaded)
    assert not (tmp_path / "mark").exists()
