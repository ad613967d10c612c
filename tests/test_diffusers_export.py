"""A model that goes to diffusers and back is the same: numbers, samples, weights, names; and its card says what is."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from helpers import ROOT, draw_users, fill_by_name, script
from safetensors.torch import load_file, save_file

from guided_diffusion_vae import checkpoint, cli, diffusers_export
from guided_diffusion_vae.assembly import SamplerConfig, create_network, create_process, create_sampler
from guided_diffusion_vae.assets import diffusers_pipeline
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.diffusers_card import measured
from guided_diffusion_vae.diffusers_export import ExportConfig
from guided_diffusion_vae.diffusers_import import ImportConfig, import_pipeline
from guided_diffusion_vae.diffusers_process import flags_of_scheduler, scheduler_of
from guided_diffusion_vae.diffusers_unet import (
    _times,
    from_diffusers,
    refuse_other_unet,
    to_diffusers,
    unet_config,
    unet_flags,
)
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.guidance import GuidedModel
from guided_diffusion_vae.run_record import read_run, save_run
from guided_diffusion_vae.sample_util import to_pixels
from guided_diffusion_vae.script_util import create_gaussian_diffusion, create_model, parse_channel_mult
from guided_diffusion_vae.trained import NETWORK, open_model, run_of_model
from guided_diffusion_vae.unet import SuperResModel, UNetModel
from guided_diffusion_vae.vae_wrapper import STATS, VAEConfig, load_vae

USERS = ["user_01", "user_04", "walker_07"]
COUNTS = {"user_01": 5, "user_04": 7, "walker_07": 6}
SMALL = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
SMALL |= {"num_head_channels": 16, "image_size": 32, "class_cond": True}
PIXEL = {"vae_path": "pixel", "image_size": 8, "attention_resolutions": "8"}
DIT = {"network": "dit", "model_type": "LightningDiT-S/2", "image_size": 32, "class_cond": True}
FLOW = {"process": "flow"}


def words_of(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def made(folder, **flags):
    """A run without training: stated weights, and the `run.yaml` that a training writes; the weights' path."""
    folder.mkdir(parents=True)
    run = parse_run(create_argparser(*NETWORK), words_of(flags))
    if run.latent_norm:
        checkpoint.save({"mean": th.tensor([0.5, -1, 0, 2]), "std": th.tensor([1.0, 2, 3, 4])}, folder / STATS)
    vae = load_vae(run.section(VAEConfig), latent_stats=folder / STATS)
    model = create_network(run, vae, num_classes=len(USERS))
    fill_by_name(model, 0)
    path = folder / "ema_0.99_000012.pt"
    checkpoint.save(model.state_dict(), path)
    about = {"class_names": USERS, "autoencoder": vae.fingerprint, "images_per_user": COUNTS}
    save_run(run, folder, **about)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    training = {"batch_size": 8, "lr": 0.0003, "val_dir": str(folder), "data_dir": str(folder), "log_dir": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump({**training, **settings}))
    return path


def opened(path):
    """The run, its record and the trained model of a checkpoint."""
    run, record = run_of_model(create_argparser(ExportConfig, *NETWORK), ["--model_path", str(path)])
    return run, record, open_model(run, record)


def exported(path, out, **options):
    """Export a checkpoint; the folder."""
    run, record, trained = opened(path)
    config = ExportConfig(model_path=str(path), out_dir=str(out), **options)
    diffusers_export.export(trained, run, read_run(path)[0], record, config)
    return out


def pipeline_of(folder):
    """The folder as diffusers would open it, but in this process, where its remote code may be switched off."""
    import diffusers

    from guided_diffusion_vae.diffusers_dit import LightningDiTModel

    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: value for name, value in index.items() if isinstance(value, list) and name != "class_names"}
    found = {}
    for name, (_, kind) in parts.items():
        if kind and name != "_class_name":
            cls = LightningDiTModel if name == "transformer" else getattr(diffusers, kind)
            found[name] = cls.from_pretrained(folder / name)
    rest = {name: value for name, value in index.items() if name not in parts and not name.startswith("_")}
    pipe = diffusers_pipeline.SpectrogramPipeline(**found, **rest)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def both(tmp_path):
    """Make a run and its folder; (run, trained, pipeline)."""

    def make(**flags):
        path = made(tmp_path / "run", **flags)
        folder = exported(path, tmp_path / "exported")
        run, _, trained = opened(path)
        return run, trained, pipeline_of(folder)

    return make


def noise_for(trained, run, n=3):
    shape = trained.vae.latent_shape(run.image_size)
    return th.randn(n, *shape, generator=th.Generator().manual_seed(1))


# ---- the network -----------------------------------------------------------------------------------------------------

UNETS = {
    "plain": {},
    "resblock_updown": {"resblock_updown": True},
    "new attention order": {"use_new_attention_order": True},
    "no scale and shift": {"use_scale_shift_norm": False},
    "sigma": {"learn_sigma": True},
    "users": {"class_cond": True},
    "users and nobody": {"class_cond": True, "class_dropout_prob": 0.1},
    "three levels that attend": {"channel_mult": "1,2,3", "attention_resolutions": "16,8,4", "num_res_blocks": 2},
    "all at once": {
        **{"resblock_updown": True, "use_new_attention_order": True, "channel_mult": "1,1,2", "class_cond": True},
        **{"attention_resolutions": "16,4", "num_res_blocks": 2, "learn_sigma": True, "num_head_channels": 8},
    },
    "one head": {"num_heads": 1, "num_head_channels": -1, "attention_resolutions": "16,8"},
    "equal heads": {"num_heads": 4, "num_head_channels": -1, "channel_mult": "1,1"},
    "no attention but in the middle": {"attention_resolutions": "", "resblock_updown": True},
    "halves": {"channel_mult": "1,1.5,2", "num_channels": 64},
}


def unet(**flags):
    about = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8"}
    about |= {"num_head_channels": 16, "in_channels": 4, "num_classes": 5, "use_scale_shift_norm": True}
    model = create_model(16, **{**about, **flags}).eval()
    fill_by_name(model, 1)
    return model


def twin_of(model):
    from diffusers import UNet2DModel

    twin = UNet2DModel(**unet_config(model)).eval()
    twin.load_state_dict(to_diffusers(model))
    return twin


@pytest.mark.parametrize("flags", UNETS.values(), ids=UNETS)
def test_the_network_is_the_same(flags):
    """Outputs to rounding; weights back to the bit; the flags read off the configuration make the same network."""
    model = unet(**flags)
    twin = twin_of(model)
    x = th.randn(2, 4, 16, 16, generator=th.Generator().manual_seed(0))
    t, y = th.tensor([3, 700]), th.tensor([1, 4]) if model.num_classes else None
    with th.no_grad():
        ours, theirs = model(x, t, y), twin(x, t, class_labels=y).sample
    assert ours.std() > 0.1
    th.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)

    back = from_diffusers(model, twin.state_dict())
    assert back.keys() == model.state_dict().keys()
    assert all(th.equal(back[key], value) for key, value in model.state_dict().items())

    read = unet_flags(dict(twin.config))
    order = {"use_new_attention_order": flags.get("use_new_attention_order", False), "num_classes": 5}
    rows = 0.1 if "class_dropout_prob" in flags else 0.0
    del read["image_size"]
    again = create_model(16, **read, **order, in_channels=4, class_dropout_prob=rows)
    refuse_other_unet(again, dict(twin.config))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_the_order_of_attention_matters():
    """A legacy network's weights split as if they were the new order's are another network."""
    model = unet(num_head_channels=16)
    other = unet(num_head_channels=16, use_new_attention_order=True)
    assert not th.equal(*(to_diffusers(m)["mid_block.attentions.0.to_k.weight"] for m in (model, other)))


BAD_UNETS = {
    "--num_heads 4": lambda: unet(num_heads=4, num_head_channels=-1, attention_resolutions="16,8"),
    "--channel_mult 0.5,1": lambda: unet(channel_mult="0.5,1", num_channels=64),
    "conv_resample": lambda: UNetModel(16, 4, 32, 4, 1, (), channel_mult=(1, 2), conv_resample=False),
    "super-resolution": lambda: SuperResModel(16, 3, 32, 3, 1, (), channel_mult=(1, 2)),
    "two dimensions": lambda: UNetModel(16, 4, 32, 4, 1, (), channel_mult=(1, 2), dims=1),
}


@pytest.mark.parametrize("named", BAD_UNETS)
def test_what_a_unet2dmodel_cannot_be(named):
    with pytest.raises(UserError, match=named):
        unet_config(BAD_UNETS[named]())


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_schedule_is_the_same(schedule, zero, steps):
    flags = {"steps": steps, "noise_schedule": schedule, "zero_terminal_snr": zero, "predict_v": zero}
    process = create_gaussian_diffusion(**flags)
    scheduler = scheduler_of(process, clip_sample=False)
    assert (scheduler.config.trained_betas is None) == (not zero)  # a named schedule where there is one
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), process.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert scheduler.config.prediction_type == ("v_prediction" if zero else "epsilon")
    read = flags_of_scheduler({"_class_name": "DDIMScheduler", **scheduler.config})
    assert read == {
        **{"process": "gaussian", "diffusion_steps": steps, "noise_schedule": schedule, "zero_terminal_snr": zero},
        **{"predict_v": zero, "predict_xstart": False},
    }


BAD_SCHEDULERS = {
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "num_train_timesteps 100000000": {"beta_schedule": "linear", "num_train_timesteps": 10**8},
    "prediction_type x": {"beta_schedule": "linear", "prediction_type": "x"},
    "no betas": {"sigma_max": 3},
    "damaged": {"beta_schedule": "linear", "num_train_timesteps": [1]},
    "sigmoid": {"beta_schedule": "sigmoid"},
}


@pytest.mark.parametrize("said", BAD_SCHEDULERS)
def test_other_schedules_are_refused(said):
    with pytest.raises(UserError, match=said):
        flags_of_scheduler({"_class_name": "DDPMScheduler", **BAD_SCHEDULERS[said]})


@pytest.mark.parametrize("name, value", [("path_type", "gvp"), ("prediction", "noise")])
def test_other_flows_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} {value}"):
        scheduler_of(FlowMatching(**{name: value}), clip_sample=False)


# ---- samples ---------------------------------------------------------------------------------------------------------

GAUSSIANS = {
    "noise, linear": {},
    "x_0, cosine": {"predict_xstart": True, "noise_schedule": "cosine"},
    "v to pure noise": {"predict_v": True, "zero_terminal_snr": True},
    "learned variance": {"learn_sigma": True},
    "times on a scale of 1000": {"diffusion_steps": 200, "rescale_timesteps": True},
    "clipped pixels": PIXEL,
    "transformer": DIT,
}


@pytest.mark.parametrize("flags", GAUSSIANS.values(), ids=GAUSSIANS)
def test_ddim_is_ours(flags, both):
    """The same noise and times give the same latents, in ten steps."""
    run, trained, pipe = both(**{**(SMALL if flags is not DIT else {}), **flags})
    noise = noise_for(trained, run)
    theirs = pipe(users=[1, "walker_07", 4], num_steps=10, latents=noise, output_type="latent").images
    times = sorted(pipe.scheduler.timesteps.tolist())
    stride = run.diffusion_steps // 10
    first = stride - 1 if run.zero_terminal_snr else 0
    assert times == list(range(first, run.diffusion_steps, stride))
    process = create_process(run.replace(timestep_respacing="" if first else "ddim10"), trained.vae)
    if first:
        process = type(process)(use_timesteps=times, **_arguments(process))
    config = SamplerConfig(clip_denoised=run.clip_denoised, use_ddim=True)
    draw = create_sampler(config, process)
    ours = draw(trained.model, noise.shape, noise=noise, model_kwargs={"y": th.tensor([0, 2, 1])})
    assert ours.std() > 0.1
    th.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def _arguments(process):
    names = "betas", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "likelihood"
    return {name: getattr(process, name) for name in names}


@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_steps_are_ours(learned, both):
    """DDPMScheduler made of the folder's scheduler has our variances, fixed or learned; each draws the same numbers."""
    from diffusers import DDPMScheduler

    run, trained, pipe = both(**SMALL, learn_sigma=learned)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.variance_type == ("learned_range" if learned else "fixed_large")
    noise = noise_for(trained, run, n=1)
    draws = (th.Generator().manual_seed(2) for _ in range(2))
    theirs = pipe(users=4, num_steps=10, latents=noise, generator=next(draws), output_type="latent").images
    generator = next(draws)
    process = create_process(run.replace(timestep_respacing="ddim10"), trained.vae)
    ours = process.p_sample_loop(
        trained.model,
        noise.shape,
        noise=noise,
        clip_denoised=False,
        model_kwargs={"y": th.tensor([1])},
        noise_like=lambda x: th.randn(x.shape, generator=generator),
    )
    th.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_another_scheduler_goes_the_same_way(both):
    """Euler's step in sigma, which scales what the network sees, is DDIM's step (Karras et al. 2022)."""
    from diffusers import EulerDiscreteScheduler

    run, trained, pipe = both(**SMALL, noise_schedule="cosine")
    about = {"users": [1, 4, 7], "latents": noise_for(trained, run), "num_steps": 10, "output_type": "latent"}
    ours = pipe(**about).images
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    th.testing.assert_close(pipe(**about).images, ours, rtol=1e-3, atol=1e-3)


FLOWS = {
    "transformer": DIT | FLOW,
    "transformer that knows nobody": DIT | FLOW | {"class_cond": False},
    "U-Net": SMALL | FLOW,
    "shifted": SMALL | FLOW | {"timestep_shift": 0.3},
}


@pytest.mark.parametrize("flags", FLOWS.values(), ids=FLOWS)
def test_a_flow_is_ours(flags, both):
    """Eight Euler steps are our grid of nine points."""
    run, trained, pipe = both(**flags)
    noise, known = noise_for(trained, run), run.class_cond
    theirs = pipe(users=[1, 4, 7] if known else None, num_steps=8, latents=noise, output_type="latent").images
    draw = create_sampler(SamplerConfig(sampler="euler", num_steps=9), create_process(run, trained.vae))
    ours = draw(trained.model, noise.shape, noise=noise, model_kwargs={"y": th.arange(3)} if known else {})
    assert (ours - noise).std() > 0.1
    th.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", [SMALL | {"class_dropout_prob": 0.1, "learn_sigma": True}, DIT | FLOW])
def test_guidance_is_ours(flags, both):
    run, trained, pipe = both(**flags)
    noise, y, flow = noise_for(trained, run), th.tensor([2, 0, 1]), run.process == "flow"
    process = create_process(run.replace(timestep_respacing="ddim10"), trained.vae)
    guided = GuidedModel(trained.model, scale=3.0, place_on_path=process.place_on_path)
    config = SamplerConfig(clip_denoised=False, use_ddim=not flow, num_steps=11 if flow else 0)
    ours = create_sampler(config, process)(guided, noise.shape, noise=noise, model_kwargs={"y": y}, device=noise.device)
    about = {"users": [7, 1, 4], "num_steps": 10, "latents": noise, "output_type": "latent"}
    theirs = pipe(**about, guidance_scale=3.0).images
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()  # a network never trained goes far beyond 1
    assert not th.allclose(pipe(**about).images, ours, atol=1e-2)


@th.no_grad()
@pytest.mark.parametrize("flags", [{}, {"latent_norm": True}, PIXEL], ids=["one scale", "one a channel", "pixel"])
def test_pictures_are_ours(flags, both):
    """Decoded, scaled and cut to bytes as image_sample_vae.py does it, but for rounding at the edge of a byte."""
    run, trained, pipe = both(**{**SMALL, **flags})
    z = noise_for(trained, run)
    pixels = to_pixels(trained.vae.decode_batch(z)).astype(int)
    theirs = np.stack([np.asarray(image) for image in pipe._finish(z, "pil")]).astype(int)
    assert theirs.shape == pixels.shape == (3, run.image_size, run.image_size, 3)
    assert np.abs(theirs - pixels).max() <= 1 and (theirs != pixels).mean() < 0.01
    assert np.abs(pipe._finish(z, "np") * 255 - pixels - 0.5).max() <= 0.5 + 1e-3


def test_users_by_number_and_by_name(both):
    _, _, pipe = both(**SMALL)
    assert pipe._labels([7, "4", "user_01"], 2) == [2, 2, 1, 1, 0, 0] and pipe._labels("walker_07", 1) == [2]
    for users, said in ((9, "knows user_01 to walker_07"), (None, "name one or more"), ("user_9", "user_9")):
        with pytest.raises(ValueError, match=said):
            pipe(users=users)
    with pytest.raises(ValueError, match="guidance_scale is 2"):
        pipe(users=1, guidance_scale=2)
    seeded = [
        pipe(users=1, num_steps=2, generator=th.Generator().manual_seed(s), output_type="np").images for s in (0, 0)
    ]
    assert np.array_equal(*seeded)
    with pytest.raises(ValueError, match="user_01 and walker_1"):
        pipe._label(1, ["user_01", "walker_1"])


STRANGER = """
import sys
sys.modules["guided_diffusion_vae"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline
def draw(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    return pipe(users=[4, "walker_07"], num_steps=2, generator=torch.Generator().manual_seed(0)).images
images = draw("unet")
print(len(images), images[0].size)
try:
    draw("dit")
except ImportError as error:
    print(error)
del sys.modules["guided_diffusion_vae"]
print(len(draw("dit")))
"""


@pytest.mark.slow
def test_a_stranger_loads_it(tmp_path):
    """As its card says, in a process of its own: a U-Net without this package, a transformer with it."""
    exported(made(tmp_path / "one", **SMALL), tmp_path / "unet")
    exported(made(tmp_path / "two", **DIT, **FLOW), tmp_path / "dit")
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env.pop("DIFFUSERS_DISABLE_REMOTE_CODE", None)
    done = subprocess.run([sys.executable, "-c", STRANGER], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines[0] == "2 (32, 32)" and "guided_diffusion_vae" in " ".join(lines[1:-1]) and lines[-1] == "2"


# ---- there and back --------------------------------------------------------------------------------------------------

TRIPS = {
    "U-Net": SMALL | {"use_new_attention_order": True, "class_dropout_prob": 0.2, "learn_sigma": True},
    "equal heads": SMALL | {"num_heads": 2, "num_head_channels": -1, "channel_mult": "1,1"},
    "nobody": SMALL | {"class_cond": False, "predict_v": True, "zero_terminal_snr": True},
    "pixel": SMALL | PIXEL | {"noise_schedule": "cosine", "min_snr_gamma": 5.0},
    "transformer": DIT | FLOW | {"timestep_shift": 0.3, "use_lognorm": True},
}


@pytest.mark.parametrize("flags", TRIPS.values(), ids=TRIPS)
def test_there_and_back(flags, tmp_path):
    """Weights to the bit; settings, users and autoencoder as they were."""
    path = made(tmp_path / "run", **flags)
    folder = exported(path, tmp_path / "exported")
    import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "back")))
    before, after = th.load(path), th.load(tmp_path / "back" / "model.pt")
    assert before.keys() == after.keys() and all(th.equal(before[key], after[key]) for key in before)
    (old, record), (new, again) = (read_run(place) for place in (path, tmp_path / "back" / "model.pt"))
    names = [f.name for section in NETWORK for f in dataclasses.fields(section) if f.name != "vae_path"]
    assert {name: new[name] for name in names} == {name: old[name] for name in names}
    known = record if flags.get("class_cond", True) else {**record, "class_names": []}
    for name in ("class_names", "autoencoder"):
        assert again[name] == known[name], name
    assert again.get("images_per_user") == (COUNTS if known["class_names"] else None)
    opened(tmp_path / "back" / "model.pt")
    recipe = yaml.safe_load((tmp_path / "back" / "finetune.yaml").read_text())
    assert parse_run(create_argparser(*NETWORK), ["--config", str(tmp_path / "back" / "finetune.yaml")]).as_dict() == {
        name: new[name] for name in parse_run(create_argparser(*NETWORK), []).as_dict()
    }
    assert recipe["vae_path"] == (
        "pixel" if flags.get("vae_path") == "pixel" else f"{tmp_path}/back/autoencoder.safetensors"
    )


@pytest.mark.slow
def test_the_scripts(tmp_path, monkeypatch, capsys):
    """The commands of the documentation: the imported model draws the exported one's samples, and goes on training."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    export, back = (cli.load(cli.scripts()[name]) for name in ("export-model", "import-model"))
    run = made(tmp_path / "run", **SMALL)
    export(["--model_path", str(run), "--out_dir", str(tmp_path / "exported")])
    back(["--pipeline", str(tmp_path / "exported"), "--out_dir", str(tmp_path / "back")])
    said = capsys.readouterr().out
    assert "(user_01, user_04, walker_07): may others read" in said and "exported', trust_remote_code=True)" in said
    flags = "--num_samples 2 --batch_size 2 --num_steps 2 --users 4 --save_png False".split()
    for path in (run, tmp_path / "back" / "model.pt"):
        script("image_sample_vae.py", "--model_path", path, *flags)
    before, after = (np.load(tmp_path / place / "samples" / "samples_2x32x32x3.npz") for place in ("run", "back"))
    assert np.array_equal(before["arr_0"], after["arr_0"]) and before["arr_0"].std() > 1

    data = draw_users(tmp_path / "data", USERS, 2)
    flags = ["--config", tmp_path / "back" / "finetune.yaml", "--resume_checkpoint", tmp_path / "back" / "model.pt"]
    script(
        "image_train_vae.py",
        *flags,
        "--data_dir",
        data,
        "--log_dir",
        tmp_path / "tuned",
        "--max_steps",
        1,
        "--lr",
        1e-9,
    )
    (tuned,) = (th.load(path) for path in (tmp_path / "tuned").glob("model*.pt"))
    began = th.load(run)
    assert all((tuned[key] - began[key]).abs().max() < 1e-6 for key in began)


def test_nothing_tells_where_the_files_lay(tmp_path):
    folder = exported(made(tmp_path / "run", **SMALL), tmp_path / "exported")
    for path in folder.rglob("*.*"):
        if path.suffix in (".json", ".md", ".py"):
            assert str(tmp_path) not in path.read_text(), path.name


def test_whole_or_absent(tmp_path, monkeypatch):
    """A disk that is full leaves no folder; one that is there is left alone."""
    path = made(tmp_path / "run", **SMALL)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(checkpoint.SaveError, match="No space left"):
        patched.setattr(diffusers_export, "save_diffusers", full)
        exported(path, tmp_path / "exported")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("edited")
    with pytest.raises(UserError, match="--out_dir"):
        exported(path, tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "edited"


def test_the_scripts_refuse_in_a_line(tmp_path, monkeypatch):
    """What cannot be exported is said before anything is written."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    export, back = (cli.load(cli.scripts()[name]) for name in ("export-model", "import-model"))
    bad = made(tmp_path / "run", **SMALL | {"num_head_channels": -1, "attention_resolutions": "8,4"})
    out = ["--out_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--num_heads 4"):
        export(["--model_path", str(bad), *out])
    good = made(tmp_path / "good", **SMALL)
    with pytest.raises(UserError, match="--report .* does not exist"):
        export(["--model_path", str(good), *out, "--report", str(tmp_path / "nowhere")])
    for words in ([], ["--pipeline", str(tmp_path)]):
        with pytest.raises(UserError, match="--pipeline .*model_index.json"):
            back([*words, *out])
    with pytest.raises(UserError, match="--out_dir"):
        back(["--pipeline", "x", "--out_dir", str(tmp_path)])
    assert not (tmp_path / "out").exists()


# ---- other people's folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    return exported(made(root / "run", **SMALL), root / "exported")


def edited(path, change):
    """A JSON file with some of its entries changed."""
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


THEIRS = {
    **{"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 16},
    **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
}


def theirs(folder, scheduler=None, **changed):
    """A DDPMPipeline as diffusers writes it; (folder, its network)."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(**{**THEIRS, **changed}).eval()
    DDPMPipeline(network, scheduler or DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder, network


@pytest.mark.parametrize("changed", [{}, {"num_class_embeds": 2, "act_fn": "swish"}, {"attention_head_dim": None}])
def test_anothers_unet_is_read(changed, tmp_path):
    """A pipeline that this package did not write, without a word on its training, computes the same as ours."""
    folder, network = theirs(tmp_path / "theirs", **changed)
    import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "ours")))
    run, record, trained = opened(tmp_path / "ours" / "model.pt")
    assert (run.vae_path, run.noise_schedule, run.predict_xstart, run.image_size) == ("pixel", "cosine", False, 8)
    assert record["class_names"] == (["0000", "0001"] if "num_class_embeds" in changed else [])
    x, t = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(0)), th.tensor([5, 900])
    y = th.tensor([1, 0]) if run.class_cond else None
    with th.no_grad():
        th.testing.assert_close(trained.model(x, t, y), network(x, t, class_labels=y).sample, rtol=1e-5, atol=1e-5)


def test_anothers_latents_are_read(sound, tmp_path):
    """The same with an autoencoder, and with attention under the names that diffusers gave it until 2023."""
    folder = tmp_path / "theirs"
    shutil.copytree(sound, folder)
    edited(folder / "model_index.json", lambda i: [i.pop(name) for name in ("training", "class_names", "null_label")])
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {re.sub(r"to_(q|k|v|out\.0)\b", lambda m: old[m[0]], key): v for key, v in load_file(path).items()}
    assert any("proj_attn" in key for key in weights)
    save_file(weights, path)
    import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "ours")))
    run, record, trained = opened(tmp_path / "ours" / "model.pt")
    assert (run.image_size, trained.vae.downsample) == (32, 4) and record["class_names"] == ["0000", "0001", "0002"]
    _, _, before = opened(sound.parent / "run" / "ema_0.99_000012.pt")
    assert all(th.equal(trained.model.state_dict()[key], value) for key, value in before.model.state_dict().items())


def test_every_width_comes_out_whole():
    """A width relative to the base is a fraction that `--channel_mult` must not round to a smaller width."""
    for base in range(32, 1056, 32):
        for width in range(32, 2080, 32):
            (mult,) = parse_channel_mult(_times(width, base))
            assert int(mult * base) == width, (width, base)


OTHERS = {
    "freq_shift is 1, here 0": {"freq_shift": 1},
    "flip_sin_to_cos is False": {"flip_sin_to_cos": False},
    "downsample_padding is 0": {"downsample_padding": 0},
    "resize by conv, resnet": {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")},
    "up_block_types": {"up_block_types": ("UpBlock2D", "UpBlock2D")},
    "add_attention is False": {"add_attention": False},
    "norm_num_groups is 16": {"norm_num_groups": 16},
    "attn_norm_num_groups is None": {"resnet_time_scale_shift": "scale_shift"},
    "act_fn is gelu": {"act_fn": "gelu"},
    "in_channels is 1": {"in_channels": 1, "out_channels": 1},
    "norm_eps": {"norm_eps": 1e-6},
    "class_embed_type is timestep": {"class_embed_type": "timestep"},
}


@pytest.mark.parametrize("said", OTHERS)
def test_a_network_that_is_none_of_ours(said, tmp_path):
    folder, _ = theirs(tmp_path / "theirs", **OTHERS[said])
    with pytest.raises(UserError, match=said) as error:
        import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "ours")))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "ours").exists()


def pickled(folder, part):
    """The weights as a pickle only, with code in it."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {folder}/mark",)

    path = folder / part / "diffusion_pytorch_model.safetensors"
    path.unlink()
    th.save({"weight": Payload()}, path.with_suffix(".bin"))


def another_shape(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] = th.zeros(3)
    save_file({**weights, "more": th.zeros(1)}, path)


HOSTILE = {
    "only pickles": (lambda f: pickled(f, "unet"), "diffusion_pytorch_model.bin, but no .*safetensors"),
    "a pickled autoencoder": (lambda f: pickled(f, "vae"), "vae has .*bin, but no"),
    "half a file": (lambda f: os.truncate(f / "unet" / "diffusion_pytorch_model.safetensors", 5000), "damaged"),
    "other weights": (another_shape, "conv_out.bias, more differ"),
    "a list for an index": (lambda f: (f / "model_index.json").write_text("[1]"), "holds a list"),
    "a million brackets": (lambda f: (f / "unet" / "config.json").write_text("[" * 10**6), "is not JSON"),
    "two megabytes": (lambda f: (f / "unet" / "config.json").write_text(" " * (2 << 20)), "larger than 1 MB"),
    "another network": (lambda f: edited(f / "model_index.json", lambda i: i.update(unet=["x", "Y"])), "unet \\(Y\\)"),
    "a text encoder": (
        lambda f: edited(f / "model_index.json", lambda i: i.update(te=["os", "system"])),
        "te \\(system",
    ),
    "no network": (lambda f: edited(f / "model_index.json", lambda i: i.pop("unet")), "no network"),
    "a billion blocks": (
        lambda f: edited(f / "unet" / "config.json", lambda c: c.update(layers_per_block=10**9)),
        "1000000000 blocks",
    ),
    "a width that is none": (
        lambda f: edited(f / "unet" / "config.json", lambda c: c.update(block_out_channels=["x"])),
        "not a UNet2DModel's",
    ),
    "settings that are none": (
        lambda f: edited(f / "model_index.json", lambda i: i["training"]["settings"].update(num_channels="x")),
        "num_channels",
    ),
    "settings of another network": (
        lambda f: edited(f / "model_index.json", lambda i: i["training"]["settings"].update(num_channels=64)),
        "block_out_channels",
    ),
    "no scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json does not"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_folder_that_lies(what, sound, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    (folder / "pipeline.py").write_text(f"open({str(folder / 'mark')!r}, 'w')")  # no code of the folder is run
    change, said = HOSTILE[what]
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and "--pipeline" in str(error.value)
    assert not (folder / "mark").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b"], [1, 2, 3], "abc", None])
def test_names_that_do_not_fit_become_numbers(names, sound, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    edited(folder / "model_index.json", lambda i: i.update(class_names=names))
    import_pipeline(ImportConfig(pipeline=str(folder), out_dir=str(tmp_path / "out")))
    assert read_run(tmp_path / "out" / "model.pt")[1]["class_names"] == ["0000", "0001", "0002"]


# ---- the card --------------------------------------------------------------------------------------------------------

ROWS = {"generated": {"user_accuracy": 0.68145, "fd_user": 13.3727}, "real, same sessions": {"user_accuracy": 0.99}}
REPORT = {"rows": ROWS, "about": {"chance": 1 / 3, "feature_space": "64 | numbers"}, "notes": ["few images"]}
ANSWERS = {"title": "answers", "header": ["question", "number", "value"], "rows": [["Who?", "TRTS", "81.2%"]]}
VALIDATION = {"sections": [{"tables": [ANSWERS], "findings": []}]}


def test_the_card(tmp_path):
    (tmp_path / "samples" / "report").mkdir(parents=True)
    (tmp_path / "samples" / "report" / "report.json").write_text(json.dumps(REPORT))
    path = made(tmp_path / "run", **SMALL, class_dropout_prob=0.1)
    folder = exported(path, tmp_path / "walkers", report=str(tmp_path / "samples"))
    text = (folder / "README.md").read_text()
    _, front, rest = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["library_name"], told["license"]) == ("diffusers", "unknown")
    assert told["pipeline_tag"] == "unconditional-image-generation" and "radar" in told["tags"]
    assert rest.startswith("\n# walkers\n")
    for said in (
        "32 x 32 pixels, of 3 users. ADM U-Net",
        "Gaussian diffusion on latents of 4 x 8 x 8",
        'from_pretrained("walkers", trust_remote_code=True)',
        "nothing else. `guidance_scale` above 1",
        "- Users: 3, user_01 to walker_07",
        "- Images: 18, 5 to 7 of each user",
        "- Steps: 12",
        "- Batch: 8 on each process",
        "| user accuracy | 0.681 | 0.99 |",
        "| FD_user | 13.4 | - |",
        "64 numbers",
        "Note: few images.",
        "Gait identifies.",
    ):
        assert said in rest, said
    recipe = yaml.safe_load(rest.split("```yaml\n")[1].split("```")[0])
    assert recipe == {**SMALL, "class_dropout_prob": 0.1, "batch_size": 8, "lr": 0.0003, "image_size": 32}
    unmeasured = (exported(path, tmp_path / "other") / "README.md").read_text()
    assert "\nNot measured.\n" in unmeasured and "| user accuracy" not in unmeasured


def test_a_validation_in_the_card(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(VALIDATION))
    assert "| Who? | TRTS | 81.2% |" in measured(str(tmp_path))
    finding = {"name": "TRTS", "value": 0.8125, "real": 0.9, "worst": None}
    (tmp_path / "report.json").write_text(json.dumps({"sections": [{"tables": [], "findings": [finding]}]}))
    assert "| TRTS | 0.812 | 0.9 | - |" in measured(str(tmp_path / "report.json"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": {"x": 1}}', '{"sections": []}', '{"sections": [{}]}'])
def test_a_report_of_something_else(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="--report"):
        measured(str(tmp_path))


def test_a_folder_without_a_report(tmp_path):
    with pytest.raises(UserError, match="--report .* holds no report.json"):
        measured(str(Path(tmp_path)))
