"""The door between pixels and latents: every layout loads, the scale is applied once, bad input is one line."""

import json
import time
import zlib

import numpy as np
import pytest
import torch as th
from helpers import golden
from safetensors.torch import save_file

from guided_diffusion_vae.autoencoders import layouts
from guided_diffusion_vae.autoencoders.kl import KLAutoencoder, KLConfig
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.vae_wrapper import (
    SD_SCALE,
    VAEConfig,
    VAEInterface,
    load_vae,
    stats_file,
    warn_unless_unit_variance,
)


@pytest.fixture(scope="module")
def library():
    """A small, random, Stable-Diffusion-shaped AutoencoderKL of diffusers: four levels, attention in the middle."""
    from diffusers import AutoencoderKL

    th.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=64,
    ).eval()


def ldm_layout(model):
    """The library's weights under LDM's names, by the published table, independent of the package's own map."""
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    found = {}
    for key, value in model.state_dict().items():
        new = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets", "block")
        new = new.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        new = new.replace("down_blocks", "down")
        for i in range(4):
            new = new.replace(f"up_blocks.{i}.", f"up.{3 - i}.")
        for old, short in names.items():
            new = new.replace(f"attn_1.{old}.", f"attn_1.{short}.")
        attention = "attn_1" in new and value.ndim == 2
        found[new] = value[:, :, None, None].clone() if attention else value
    return found


@pytest.fixture(scope="module")
def places(library, tmp_path_factory):
    """The same weights as a folder, under a `vae` subfolder, and as single files in both layouts."""
    root = tmp_path_factory.mktemp("vae")
    library.save_pretrained(root / "folder")
    library.save_pretrained(root / "pipeline" / "vae")
    diffusers = {key: value.contiguous() for key, value in library.state_dict().items()}
    save_file(diffusers, root / "diffusers.safetensors")
    th.save({"state_dict": diffusers, "global_step": 7}, root / "lightning.ckpt")
    ldm = ldm_layout(library)
    th.save(ldm, root / "ldm.pt")
    stage = {f"first_stage_model.{key}": value for key, value in ldm.items()}
    extra = {"first_stage_model.loss.logvar": th.zeros(()), "model.diffusion_model.out.weight": th.zeros(3)}
    th.save({"state_dict": {**stage, **extra}}, root / "sd.ckpt")
    return root


PLACES = ["folder", "pipeline", "diffusers.safetensors", "lightning.ckpt", "ldm.pt", "sd.ckpt"]


@pytest.mark.parametrize("place", PLACES)
def test_every_layout_gives_the_librarys_numbers(library, places, place):
    """In float64, so that the order of a sum does not matter: the two networks are the same function."""
    import copy

    vae, library = VAEInterface(str(places / place)).double(), copy.deepcopy(library).double()
    images = th.rand(3, 3, 64, 64, generator=th.Generator().manual_seed(1), dtype=th.float64) * 2 - 1
    with th.no_grad():
        posterior = library.encode(images).latent_dist
        decoded = library.decode(posterior.mean).sample
    mean, std = vae.encode_moments(images).chunk(2, dim=1)
    assert vae.scale_factor == SD_SCALE
    assert (mean / SD_SCALE - posterior.mean).abs().max() < 1e-9
    assert (std / SD_SCALE - posterior.std).abs().max() < 1e-9
    assert (vae.decode_batch(mean) - decoded).abs().max() < 1e-9
    assert vae.latent_shape(64) == (4, 8, 8)


def test_one_set_of_weights_has_one_fingerprint(places):
    prints = {VAEInterface(str(places / place)).fingerprint for place in PLACES}
    assert len(prints) == 1
    assert VAEInterface(str(places / "folder"), scale_factor=0.5).fingerprint not in prints


def test_a_small_vavae_gives_upstreams_numbers():
    wanted, shapes = golden("vavae_autoencoder.npz"), golden("vavae_autoencoder.json")
    keys = shapes["state_dict"]
    state = {}
    seed, scale = int(wanted["seed_weights"]), float(wanted["scale"])
    for name, shape in keys.items():
        values = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).randn(*shape) * scale
        state[name] = th.from_numpy(values + (0.5 if len(shape) == 1 else 0.0)).float()
    model = layouts.from_state_dict(state)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: list(v) for k, v in keys.items()}
    with th.no_grad():
        posterior = model.encode(th.from_numpy(wanted["x"]))
        decoded = model.decode(posterior.mean)
    np.testing.assert_allclose(posterior.mean, wanted["mean"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, wanted["logvar"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoded, wanted["recon_of_mean"], rtol=1e-5, atol=1e-5)


def test_the_keys_of_the_released_vavae():
    wanted = golden("vavae_f16d32_state_dict.json")
    wanted = wanted.get("state_dict", wanted)
    config = KLConfig(ch=128, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), z_channels=32, embed_dim=32)
    with th.device("meta"):
        model = KLAutoencoder(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: list(v) for k, v in wanted.items()}
    assert sum(p.numel() for p in model.parameters()) == 69_836_067
    assert layouts.infer_config(model.state_dict()) == config


def test_the_full_vavae_is_diffusers_twin(tmp_path):
    """342 tensors of f16d32: strictly loaded, through diffusers' layout and back in the same bits, the same function.

    In float64; in float32 the sums' order alone moves decoded values of order one by 2e-5.
    """
    from diffusers import AutoencoderKL

    rng = th.Generator().manual_seed(0)
    shapes = golden("vavae_f16d32_state_dict.json")
    state = {name: 0.03 * th.randn(*shape, generator=rng) for name, shape in shapes.items()}
    model = layouts.from_state_dict(dict(state)).eval()
    assert len(state) == 342 and all(th.equal(model.state_dict()[name], value) for name, value in state.items())
    there = layouts.to_diffusers(model)
    again = layouts.from_state_dict(there)
    assert all(th.equal(value, state[name]) for name, value in again.state_dict().items())
    layouts.save_diffusers(model, tmp_path)
    twin = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True).double()
    x = th.rand(1, 3, 32, 32, generator=rng).double() * 2 - 1
    model = model.double()
    with th.no_grad():
        posterior = model.encode(x)
        np.testing.assert_allclose(posterior.mean, twin.encode(x).latent_dist.mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(model.decode(posterior.mean), twin.decode(posterior.mean).sample, rtol=0, atol=1e-9)


EXPORTED = {
    "shipped": {"ch": 16, "ch_mult": (1, 2), "mid_attn": False, "norm_groups": 8},
    "vavae": {"ch": 32, "ch_mult": (1, 2), "attn_resolutions": (128,), "z_channels": 16, "embed_dim": 16},
    "grey": {"ch": 32, "ch_mult": (1, 1), "in_channels": 1, "out_ch": 1, "quant_convs": False},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_diffusers_loads_our_export_and_computes_the_same(name, tmp_path):
    from diffusers import AutoencoderKL

    th.manual_seed(0)
    model = KLAutoencoder(KLConfig(num_res_blocks=1, **EXPORTED[name])).eval()
    layouts.save_diffusers(model, tmp_path, scale=0.5, shift=0.25)
    twin = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    x = th.rand(2, model.config.in_channels, 16, 16) * 2 - 1
    with th.no_grad():
        mine, theirs = model.encode(x), twin.encode(x).latent_dist
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(mine.std, theirs.std, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.decode(mine.mean), twin.decode(mine.mean).sample, rtol=1e-5, atol=1e-5)
    vae = VAEInterface(str(tmp_path))
    assert (vae.latent_scale.scale, vae.latent_scale.shift) == (0.5, 0.25)
    assert all(th.equal(v, vae.vae.state_dict()[k]) for k, v in model.state_dict().items())


def test_an_export_that_diffusers_cannot_express_is_one_line(tmp_path):
    model = KLAutoencoder(KLConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, embed_dim=4))
    with pytest.raises(UserError, match=r"embed_dim \(4\) beside z_channels \(8\)"):
        layouts.save_diffusers(model, tmp_path)


def test_both_layouts_come_back():
    th.manual_seed(0)
    config = KLConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,))
    model = KLAutoencoder(config)
    again = layouts.from_state_dict(layouts.to_diffusers(model))
    assert again.config == config
    assert all(th.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_posteriors_kl_is_the_closed_form():
    from guided_diffusion_vae.autoencoders.base import Posterior

    posterior = Posterior(th.cat([th.full((1, 1, 2), 2.0), th.full((1, 1, 2), 100.0)], dim=1))
    assert posterior.logvar.max() == 20
    posterior = Posterior(th.cat([th.full((1, 1, 2), 2.0), th.zeros(1, 1, 2)], dim=1))
    assert posterior.kl().item() == pytest.approx(4.0)
    noise = th.tensor([[[1.0, -1.0]]])
    assert posterior.sample(noise).tolist() == [[[3.0, 1.0]]]


# ---- scale, range, chunks --------------------------------------------------------------------------------------------


def test_the_scale_is_applied_once_and_undone_once():
    images = th.rand(2, 3, 32, 32) * 2 - 1
    one, two = (VAEInterface(scale_factor=scale, sample_posterior=False) for scale in (1.0, 0.25))
    assert th.allclose(two.encode_batch(images), 0.25 * one.encode_batch(images), atol=1e-6)
    assert th.allclose(
        two.decode_batch(two.encode_batch(images)), one.decode_batch(one.encode_batch(images)), atol=1e-5
    )


def test_zero_to_one_is_a_range_too():
    images = th.rand(2, 3, 32, 32)
    a = VAEInterface(sample_posterior=False).encode_batch(images * 2 - 1)
    b = VAEInterface(sample_posterior=False, image_range=(0, 1)).encode_batch(images)
    assert th.allclose(a, b, atol=1e-5)


def test_chunks_change_nothing():
    images = th.rand(5, 3, 32, 32) * 2 - 1
    whole, parts = VAEInterface(chunk_size=8), VAEInterface(chunk_size=2)
    moments = whole.encode_moments(images)
    assert th.allclose(moments, parts.encode_moments(images), atol=1e-5)
    z = moments[:, :4]
    assert th.allclose(whole.decode_batch(z), parts.decode_batch(z), atol=1e-5)


def test_samples_have_the_posteriors_mean_and_spread():
    images = (th.rand(1, 3, 32, 32) * 2 - 1).expand(400, 3, 32, 32)
    vae = VAEInterface()
    mean, std = vae.encode_moments(images[:1]).chunk(2, dim=1)
    z = vae.encode_batch(images, generator=th.Generator().manual_seed(0))
    assert ((z.mean(0) - mean[0]) / std[0]).abs().mean() < 0.1
    assert (z.std(0) / std[0]).mean().item() == pytest.approx(1, abs=0.02)
    again = vae.encode_batch(images, generator=th.Generator().manual_seed(0))
    assert th.equal(z, again)


def test_pixel_is_the_identity():
    vae, images = VAEInterface("pixel"), th.rand(2, 3, 16, 16)
    assert th.equal(vae.encode_batch(images), images) and th.equal(vae.decode_batch(images), images)
    assert (vae.latent_shape(16), vae.fingerprint, vae.scale_factor) == ((3, 16, 16), "pixel", 1.0)


def test_nothing_in_it_learns():
    vae = VAEInterface()
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training


# ---- every channel by its statistics ---------------------------------------------------------------------------------


def write_stats(folder, mean=(1.0, -2.0, 0.0, 4.0), std=(0.5, 2.0, 4.0, 1.0)):
    stats = {"mean": th.tensor(mean).view(1, -1, 1, 1), "std": th.tensor(std).view(1, -1, 1, 1)}
    folder.mkdir(exist_ok=True)
    th.save(stats, folder / "latents_stats.pt")
    return stats_file(folder)


def test_latent_norm_is_the_affine_map_of_each_channel(tmp_path):
    path = write_stats(tmp_path)
    for factor in (0.0, 3.0):
        vae = load_vae(VAEConfig(latent_norm=True, scale_factor=factor), latent_stats=path)
        times = factor or 1.0
        assert vae.latent_scale.shift == (1.0, -2.0, 0.0, 4.0)
        assert vae.scale_factor == (times / 0.5, times / 2, times / 4, times / 1)
    images = th.rand(2, 3, 32, 32) * 2 - 1
    mean, std = vae.encode_raw(images).chunk(2, dim=1)
    z, z_std = vae.encode_moments(images).chunk(2, dim=1)
    assert th.allclose(z[:, 1], 3 * (mean[:, 1] + 2) / 2) and th.allclose(z_std[:, 2], 3 * std[:, 2] / 4)
    plain = VAEInterface(scale_factor=1.0)
    assert th.allclose(vae.decode_batch(z), plain.decode_batch(mean), atol=1e-5)


def test_the_fingerprint_covers_the_statistics_and_the_weights_fingerprint_does_not(tmp_path):
    config = VAEConfig(latent_norm=True)
    one, copy = (load_vae(config, latent_stats=write_stats(tmp_path / name)) for name in ("a", "b"))
    other = load_vae(config, latent_stats=write_stats(tmp_path / "c", std=(0.5, 2.0, 4.0, 1.001)))
    plain = VAEInterface()
    assert (
        one.fingerprint
        == copy.fingerprint
        == load_vae(config, latent_stats=tmp_path / "a/latents_stats.pt").fingerprint
    )
    assert len({one.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert {v.weights_fingerprint for v in (one, other, plain, VAEInterface(scale_factor=9))} == {
        one.weights_fingerprint
    }
    changed = VAEInterface()
    with th.no_grad():
        next(changed.vae.parameters()).flatten()[0].add_(1e-3)
    assert changed.weights_fingerprint != plain.weights_fingerprint
    with pytest.raises(UserError, match=f"is autoencoder {other.fingerprint}, but the checkpoint"):
        load_vae(config, expected=one.fingerprint, latent_stats=tmp_path / "c/latents_stats.pt")


def test_statistics_lie_beside_what_is_named(tmp_path):
    (tmp_path / "train.safetensors").write_bytes(b"")
    assert stats_file(tmp_path) == stats_file(tmp_path / "train.safetensors") == tmp_path / "latents_stats.pt"


def test_statistics_that_do_not_fit_are_one_line(tmp_path):
    config = VAEConfig(latent_norm=True)
    for path in None, stats_file(tmp_path):
        with pytest.raises(UserError, match="latents_stats.pt, which does not exist: extract .*latent_extract.py"):
            load_vae(config, latent_stats=path)
    with pytest.raises(UserError, match="is of 2 channels, but --vae_path microdoppler-f4 makes 4"):
        load_vae(config, latent_stats=write_stats(tmp_path, mean=(0.0, 0.0), std=(1.0, 1.0)))
    with pytest.raises(UserError, match="channel 2 of .* never changes"):
        load_vae(config, latent_stats=write_stats(tmp_path, std=(1.0, 1.0, 0.0, 1.0)))
    with pytest.raises(UserError, match="does not hold a finite mean and std"):
        load_vae(config, latent_stats=write_stats(tmp_path, std=(1.0, 1.0, float("nan"), 1.0)))
    th.save([1, 2], tmp_path / "latents_stats.pt")
    with pytest.raises(UserError, match="does not hold a finite mean and std"):
        load_vae(config, latent_stats=stats_file(tmp_path))
    with pytest.raises(UserError, match="--vae_path is pixel: leave --latent_norm out"):
        load_vae(VAEConfig(vae_path="pixel", latent_norm=True), latent_stats=write_stats(tmp_path))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "nowhere.safetensors", "microdoppler_f4"])
def test_a_mistyped_path_is_one_line_at_once(name):
    VAEConfig()
    if "/" in name:
        import diffusers  # noqa: F401  its import takes seconds and is not what is timed

    start = time.perf_counter()
    with pytest.raises(UserError, match="--vae_path") as error:
        VAEInterface(name)
    assert time.perf_counter() - start < 5 and "\n" not in str(error.value)


def test_other_weights_are_named(tmp_path):
    save_file({"some.weight": th.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors: these are not the weights of a KL autoencoder"):
        VAEInterface(str(tmp_path / "other.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="bad.safetensors is damaged"):
        VAEInterface(str(tmp_path / "bad.safetensors"))


def test_a_size_it_cannot_halve_names_the_flag():
    with pytest.raises(UserError, match="--image_size is 30.*give 28|--image_size is 30.*give 32"):
        VAEInterface().latent_shape(30)


def test_another_autoencoder_than_the_checkpoints_is_refused():
    with pytest.raises(UserError, match="was trained on latents of 0123"):
        load_vae(VAEConfig(), expected="0123")


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_the_shipped_autoencoder_sees_persons_it_never_met():
    """Its card's claim, on a few pictures of persons from another seed; at most 4 MB."""
    from importlib import resources

    from guided_diffusion_vae.data.microdoppler import SimulationConfig, render

    asset = resources.files("guided_diffusion_vae") / "assets" / "microdoppler-f4.safetensors"
    assert len(asset.read_bytes()) <= 4_000_000
    config = SimulationConfig(seed=777)
    pixels = np.stack([render(config, user, 0, 0)[0] for user in range(6)])
    images = th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = VAEInterface(sample_posterior=False)
    z = vae.encode_batch(images)
    error = ((vae.decode_batch(z).clamp(-1, 1) - images) ** 2).mean(dim=(1, 2, 3))
    psnr = 10 * th.log10(4 / error)
    assert psnr.mean() > 20, psnr
    assert 0.6 < z.std() < 1.6 and z.shape == (6, 4, 16, 16)


def test_the_shipped_file_tells_what_it_is():
    from importlib import resources

    from safetensors import safe_open

    with resources.as_file(resources.files("guided_diffusion_vae") / "assets" / "microdoppler-f4.safetensors") as path:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
    assert json.loads(metadata["config"])["z_channels"] == 4 and float(metadata["scale_factor"]) > 0


def test_a_spread_that_is_not_one_is_said_with_what_would_make_it_one():
    said = []
    z = 4.0 * th.tensor([-1.0, 1.0]).repeat(500)
    for latents in (z / 4, z, th.full((8,), 3.0)):
        warn_unless_unit_variance(latents, said.append)
    assert len(said) == 2
    assert "standard deviation is 4" in said[0] and "try 0.2499 times" in said[0]
    assert "all the same number" in said[1]  # of black pictures, say: a division by their spread ended the training
