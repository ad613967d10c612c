"""Tuning a decoder alone: the latents keep their bits, the map of statistics is exact, and no word is believed."""

import numpy as np
import pytest
import torch as th
from helpers import script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from guided_diffusion_vae import checkpoint
from guided_diffusion_vae.autoencoders.objectives import ObjectiveConfig
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.latent_transport import Moments, Transport, read_latents, save_latents
from guided_diffusion_vae.vae_tasks import VAEModelConfig, create_task
from guided_diffusion_vae.vae_train_util import VAETrainConfig, VAETrainer
from guided_diffusion_vae.vae_wrapper import LatentScale, VAEConfig, VAEInterface, load_vae, save_autoencoder

TINY = VAEModelConfig(ch=8, ch_mult="1,2", norm_groups=4)


def moments(z):
    found = Moments(z.shape[1])
    found.add(z)
    return found


def latents(n, seed, spread=1.0):
    """Correlated latents (n, 4, 8, 8) with a mean."""
    rng = th.Generator().manual_seed(seed)
    mix, shift = th.randn(4, 4, generator=rng), th.randn(4, generator=rng)
    return spread * th.einsum("ij,njhw->nihw", mix, th.randn(n, 4, 8, 8, generator=rng)) + shift[:, None, None]


# ---- the map ---------------------------------------------------------------------------------------------------------


def test_at_1_the_map_gives_mean_and_covariance_and_at_0_nothing():
    z, target = latents(40, 0), moments(latents(30, 1, spread=0.3))
    move = Transport(moments(z), target)
    there = moments(move(z, th.ones(40)))
    assert (there.mean - target.mean).abs().max() < 1e-5
    assert (there.covariance - target.covariance).abs().max() < 1e-5
    assert th.equal(move(z, th.zeros(40)), z)
    centred = z - z.mean((0, 2, 3), keepdim=True)
    way = (move(z, th.ones(40)) - z).pow(2).sum(1).mean() / centred.pow(2).sum(1).mean()
    assert move.reach == pytest.approx(way.sqrt().item(), rel=1e-4)
    same = Transport(moments(z), moments(z))
    assert (same(z, th.ones(40)) - z).abs().max() < 1e-5


def test_channels_that_do_not_mix_are_scaled_by_the_ratio_of_their_spreads():
    """The closed form: z' = mu' + (z - mu) s' / s, of which an amount a goes a part of the way; each image its own."""
    source, target = Moments(2), Moments(2)
    for found, spread, mean in ((source, (2.0, 1.0), (1.0, 0.0)), (target, (1.0, 3.0), (0.0, 5.0))):
        mean, spread = (th.tensor(value)[None, :, None, None] for value in (mean, spread))
        found.add(mean, spread)
    assert source.mean.tolist() == [1, 0] and source.covariance.tolist() == [[4, 0], [0, 1]]
    z = th.tensor([[3.0, 1.0], [3.0, 1.0]])[:, :, None, None]
    there = Transport(source, target)(z, th.tensor([1.0, 0.5])).flatten(1)
    assert th.allclose(there, th.tensor([[1.0, 8.0], [2.0, 4.5]]), atol=1e-5)


def test_the_way_never_collapses():
    """Whitening and colouring alone may turn latents; halfway a turn by 180 degrees is a point. The map is positive."""
    for seed in range(20):
        move = Transport(moments(latents(9, seed)), moments(latents(9, seed + 99)))
        matrix = move.step.double() + th.eye(4).double()
        assert (matrix - matrix.T).abs().max() < 1e-4 and th.linalg.eigvalsh((matrix + matrix.T) / 2).min() > 0


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two users with six 16 x 16 pictures each, smooth enough to be learnt."""
    root = tmp_path_factory.mktemp("tuning_images")
    rng = np.random.RandomState(0)
    for user in ("user_00", "user_01"):
        (root / user).mkdir()
        for i in range(6):
            small = Image.fromarray(rng.randint(0, 256, (4, 4, 3)).astype(np.uint8))
            small.resize((16, 16), Image.Resampling.BICUBIC).save(root / user / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def first(images, tmp_path_factory):
    """A small autoencoder in float32, the path of its file."""
    folder = tmp_path_factory.mktemp("first")
    trainer(images, folder, max_steps=60, save_interval=60, half=False, ckpt="").run()
    return str(folder / "autoencoder.safetensors")


def trainer(images, folder, *, ckpt, generated="", objective=None, **settings):
    th.manual_seed(0)
    settings = {"batch_size": 4, "max_steps": 6, "save_interval": 3, "lr": 3e-3, "warmup_steps": 5, **settings}
    config = VAETrainConfig(ckpt=ckpt, generated_latents=str(generated), **settings)
    task = create_task(
        TINY,
        objective or ObjectiveConfig(kl_weight=0.01),
        image_size=16,
        ckpt=ckpt,
        decoder_only=config.decoder_only,
        generated_latents=config.generated_latents,
        say=lambda _: None,
    )
    parts = VAEDataConfig(data_root=str(images), image_size=16).parts(3, seed=0)
    return VAETrainer(task, parts.train, parts.val, config, image_size=16, folder=folder, arguments=vars(config))


def tuner(images, folder, first, **settings):
    return trainer(images, folder, ckpt=first, decoder_only=True, **settings)


@pytest.fixture(scope="module")
def generated(images, first, tmp_path_factory):
    """Latents of the first autoencoder, a third of their spread and beside their mean."""
    vae = VAEInterface(first, sample_posterior=False)
    paths = sorted(images.rglob("*.png"))
    x = th.stack([th.from_numpy(np.asarray(Image.open(path)).copy()) for path in paths]).permute(0, 3, 1, 2) / 127.5 - 1
    return save_latents(tmp_path_factory.mktemp("z"), vae.encode_batch(x) / 3 + 0.7, np.arange(12) % 2, vae)


GAN = ObjectiveConfig(disc_factor=1.0, disc_start=1, disc_ndf=8, disc_num_layers=1, kl_weight=0.01)


@pytest.mark.parametrize("objective", [None, GAN], ids=["plain", "gan"])
@pytest.mark.parametrize("half", [True, False])
def test_the_latents_keep_their_bits_and_the_decoder_learns(images, first, generated, tmp_path, objective, half):
    tuner(images, tmp_path, first, generated=generated, objective=objective, half=half).run()
    old, new = VAEInterface(first), VAEInterface(str(tmp_path / "autoencoder.safetensors"))
    for name, value in old.vae.state_dict().items():
        decodes = name.startswith(("decoder.", "post_quant_conv."))
        assert th.equal(new.vae.state_dict()[name], value) != decodes, name
        assert not decodes or th.equal(new.vae.origin[name], value)
    x = th.rand(2, 3, 16, 16) * 2 - 1
    assert th.equal(old.encode_moments(x), new.encode_moments(x))
    assert (old.fingerprint, old.weights_fingerprint) == (new.fingerprint, new.weights_fingerprint)
    assert old.decoder_fingerprint != new.decoder_fingerprint and old.latent_scale == new.latent_scale


def test_the_loss_on_moved_latents_falls(images, first, generated, tmp_path):
    """By a seventh in 60 steps at the full amount, more than without them, while encoded latents keep theirs."""

    def far(run):
        x = th.stack([th.as_tensor(run.data.order[i]) for i in range(8)])
        with th.no_grad(), run.average_in_place():
            terms = run.task.loss(x, th.zeros(8, 4, 8, 8), 0, th.ones(8))[1]
        return float(terms["moved_l1"]), float(terms["encoded_l1"])

    run = tuner(images, tmp_path / "moved", first, generated=generated, max_steps=60, save_interval=60)
    (far_before, near_before), _ = far(run), run.run()
    far_after, near_after = far(run)
    assert far_after < 0.85 * far_before and near_after < 1.1 * near_before
    plain = tuner(images, tmp_path / "plain", first, max_steps=60, save_interval=60)
    plain.run()
    plain.task.transport = run.task.transport
    assert far(plain)[0] > 1.1 * far_after


def test_a_killed_tuning_ends_in_the_same_bits_and_parts_of_a_batch_give_its_gradient(
    images, first, generated, tmp_path
):
    tuner(images, tmp_path / "whole", first, generated=generated, lr=1e-4).run()
    half = tuner(images, tmp_path / "killed", first, generated=generated, lr=1e-4)
    update = half.update
    half.update = lambda batch: update(batch) if half.step < 4 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        half.run()
    tuner(images, tmp_path / "killed", first, generated=generated, lr=1e-4).run()
    tuner(images, tmp_path / "parts", first, generated=generated, lr=1e-4, microbatch=1).run()
    whole, killed, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "killed", "parts"))
    assert whole["step"] == killed["step"] == parts["step"] == 6
    for name, value in whole["model"].items():
        assert th.equal(value, killed["model"][name])
        assert (value - parts["model"][name]).abs().max() < 1e-5


def test_a_tuning_goes_on_with_its_own_encoder_only(images, first, tmp_path):
    tuner(images, tmp_path / "run", first).run()
    other = tmp_path / "other.safetensors"
    vae = VAEInterface(first)
    with th.no_grad():
        vae.vae.encoder.conv_in.bias[0] += 1e-3
    save_autoencoder(vae.vae, other, 1.0)
    for settings in ({"ckpt": str(other), "decoder_only": True}, {"ckpt": ""}):
        with pytest.raises(UserError, match="last.pt is of another autoencoder: remove it, or choose another"):
            trainer(images, tmp_path / "run", **settings)


# ---- whose latents it decodes ----------------------------------------------------------------------------------------


def test_a_tuned_decoder_is_taken_for_the_old_latents_also_when_tuned_twice_or_scaled_anew(images, first, tmp_path):
    tuner(images, tmp_path / "one", first).run()
    one = str(tmp_path / "one" / "autoencoder.safetensors")
    tuner(images, tmp_path / "two", one).run()
    two = str(tmp_path / "two" / "autoencoder.safetensors")
    for factor in (0.0, 0.37):
        old = load_vae(VAEConfig(vae_path=first, scale_factor=factor))
        for path in (one, two):
            new = load_vae(VAEConfig(vae_path=path, scale_factor=factor), expected=old.fingerprint)
            assert new.decoder_fingerprint != old.decoder_fingerprint
    with safe_open(two, "pt") as handle:
        assert handle.metadata()["latent_space"] == VAEInterface(first).fingerprint
    trainer(images, tmp_path / "all", ckpt=two).run()
    with pytest.raises(UserError, match="but the checkpoint was trained on latents of"):
        load_vae(VAEConfig(vae_path=str(tmp_path / "all" / "autoencoder.safetensors")), expected=old.fingerprint)


def test_a_foreign_autoencoder_is_refused_whatever_its_file_says(images, first, tmp_path):
    """With the word forged; with the true decoder's weights beside a foreign encoder; with an encoder's among them."""
    tuner(images, tmp_path / "true", first, half=False).run()
    trainer(images, tmp_path / "foreign", ckpt="", half=False, seed=5).run()
    true, foreign = (tmp_path / name / "autoencoder.safetensors" for name in ("true", "foreign"))
    expected = VAEInterface(first).fingerprint
    config = VAEConfig(vae_path=str(tmp_path / "forged.safetensors"))
    with safe_open(true, "pt") as handle:
        words = handle.metadata()
    assert words["latent_space"] == expected
    origin = {name: value for name, value in load_file(true).items() if name.startswith("origin.")}
    assert origin
    taken = {**load_file(foreign), **origin}
    whole = {f"origin.{name}": value for name, value in load_file(first).items()}
    silent = {name: value for name, value in words.items() if name != "latent_space"}
    for tensors, metadata, complaint in (
        (load_file(foreign), words, f"says that it decodes latents of {expected}, but its encoder's are of"),
        (taken, words, f"says that it decodes latents of {expected}, but its encoder's are of"),
        (taken, silent, f"but the checkpoint was trained on latents of {expected}"),
        ({**load_file(foreign), **whole}, words, "are not a decoder's: the file was altered"),
    ):
        save_file(tensors, config.vae_path, metadata)
        with pytest.raises(UserError, match=complaint):
            load_vae(config, expected=expected)


def test_a_scale_of_each_channel_is_kept_to_the_last_digit(first, tmp_path):
    scale = LatentScale((1 / 3, 0.7, 2.0, 1e-3), (0.1, -1 / 7, 0.0, 5.0))
    assert LatentScale.of_words(scale.words()) == scale
    task = create_task(TINY, ObjectiveConfig(), image_size=16, ckpt=first, decoder_only=True, say=lambda _: None)
    save_autoencoder(task.model, tmp_path / "a.safetensors", scale)
    old, new = VAEInterface(first), VAEInterface(str(tmp_path / "a.safetensors"))
    old.use_scale(scale)
    assert new.latent_scale == scale and new.fingerprint == old.fingerprint


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(images, tmp_path_factory):
    """An untrained diffusion model on the shipped autoencoder's latents, and nine of its samples."""
    root = tmp_path_factory.mktemp("sampled")
    flags = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 2".split()
    flags += "--image_size 16 --diffusion_steps 50 --class_cond True --max_steps 1 --batch_size 2".split()
    script("image_train_vae.py", *flags, "--data_dir", images, "--log_dir", root / "run")
    sample(root, root / "old", "--batch_size", 4, "--save_latents", True)
    return root


def sample(root, out, *flags):
    flags = ["--num_samples", 9, "--timestep_respacing", 5, "--per_image_seed", True, "--log_dir", out, *flags]
    return script("image_sample_vae.py", "--model_path", max((root / "run").glob("model*.pt")), *flags)


def test_sampled_latents_decode_to_the_sampled_pixels(sampled):
    found, (npz,) = load_file(sampled / "old" / "latents_9x4x4x4.safetensors"), (sampled / "old").glob("*.npz")
    z, vae = found["latents"], VAEInterface()
    pixels = th.cat([vae.decode_batch(part) for part in z.split(4)])
    with np.load(npz) as arrays:
        assert np.array_equal(arrays["arr_1"], found["labels"].numpy())
        found = ((pixels + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(found - 0.5 - arrays["arr_0"]).max() < 0.51
    raw = read_latents(str(sampled / "old" / "latents_9x4x4x4.safetensors"), vae.vae)
    assert th.allclose(raw * vae.scale_factor, z, atol=1e-6)


def test_the_whole_way(images, sampled, tmp_path):
    """Tuned on its samples, the same model gives the same latents and other pixels."""
    there = sampled / "old" / "latents_9x4x4x4.safetensors"
    flags = ["--data_root", images, "--image_size", 16, "--ckpt", "microdoppler-f4", "--max_steps", 3, "--lr", 1e-3]
    flags += ["--batch_size", 4, "--decoder_only", True, "--generated_latents", there]
    done = script("vae_train.py", *flags, "--out_dir", tmp_path / "tuned")
    assert "generated latents: encoded ones are moved by up to" in done.stdout
    new = tmp_path / "tuned" / "autoencoder.safetensors"
    sample(sampled, tmp_path / "new", "--batch_size", 4, "--save_latents", True, "--vae_path", new)
    a, b = (load_file(path) for path in (there, tmp_path / "new" / there.name))
    assert th.equal(a["latents"], b["latents"]) and th.equal(a["labels"], b["labels"])
    old, new = (np.load(next(folder.glob("*.npz")))["arr_0"] for folder in (sampled / "old", tmp_path / "new"))
    assert (old != new).any()


def altered(path, folder, change, name="latents.safetensors", **words):
    tensors = change(load_file(path))
    with safe_open(path, "pt") as handle:
        save_file(tensors, folder / name, handle.metadata() | words)
    return folder / name


def nan(tensors):
    tensors["latents"][3, 1, 2, 2] = float("nan")
    return tensors


BAD = {
    "foreign": ("is of autoencoder 0123abcd, but --ckpt with that scale is", {"autoencoder": "0123abcd"}),
    "other scale": ("but --ckpt with that scale is", {"scale_factor": "0.123"}),
    "no number": ("holds no generated latents", {"scale_factor": "much"}),
    "extracted": ("holds no generated latents", {"kind": ""}),
    "nan": ("holds NaN or infinite values", nan),
    "few": ("holds 7 latents; 4 channels need 8 or more", lambda t: {k: v[:7].clone() for k, v in t.items()}),
    "flat": ("holds no generated latents", lambda t: {"latents": t["latents"].flatten(1)}),
    "nothing": ("holds no generated latents", lambda t: {"other": t["labels"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_generated_latents_that_do_not_fit_are_one_line(first, generated, tmp_path, name):
    complaint, change = BAD[name]
    words = change if isinstance(change, dict) else {}
    path = altered(generated, tmp_path, (lambda tensors: tensors) if words else change, **words)
    with pytest.raises(UserError, match=complaint) as error:
        read_latents(str(path), VAEInterface(first).vae)
    assert "--generated_latents" in str(error.value) and "\n" not in str(error.value)


def test_files_that_hold_no_latents_are_one_line(first, tmp_path):
    vae = VAEInterface(first).vae
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for path, words in {
        first: "holds no generated latents",
        "samples_9x16x16x3.npz": "is not a latents_NxCxhxw.safetensors: sample with image_sample_vae.py",
        "none.safetensors": "none.safetensors does not exist",
        str(tmp_path / "half.safetensors"): "damaged|cannot be read",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            read_latents(path, vae)
        assert "--generated_latents" in str(error.value) and "\n" not in str(error.value)


def test_from_the_command_line_the_exit_code_is_2(images, generated, tmp_path):
    flags = ["--data_root", images, "--image_size", 16, "--out_dir", tmp_path, "--ckpt", "microdoppler-f4"]
    done = script("vae_train.py", *flags, "--decoder_only", True, "--generated_latents", generated, check=False)
    assert done.returncode == 2 and "sample from a model that was trained on --ckpt" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"decoder_only": True}, "--decoder_only True needs --ckpt"),
        ({"generated_latents": "a", "ckpt": "b"}, "--generated_latents a needs --decoder_only True"),
    ],
)
def test_a_setting_that_lacks_its_other_half_is_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        VAETrainConfig(**settings)


def test_what_has_no_decoder_of_maps_is_one_line(first):
    with pytest.raises(UserError, match="--decoder_only True is for --model kl, not celeba"):
        create_task(VAEModelConfig(model="celeba"), ObjectiveConfig(), image_size=16, ckpt=first, decoder_only=True)
    with pytest.raises(UserError, match="--use_vf mae aligns the encoder"):
        create_task(TINY, ObjectiveConfig(use_vf="mae"), image_size=16, ckpt=first, decoder_only=True)
