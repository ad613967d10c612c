"""What ours is measured against: the official code and diffusers, made as their own scripts make them.

What is not installed is `None` here.
"""

import importlib
import tempfile
import warnings

import torch as th
from contenders import LOG_INTERVAL, NEVER, USERS, Case, loss_and_gradient

from guided_diffusion_vae import assembly, dist_util, script_util

DDPM_BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def official(module: str):
    """A module of the official code, or None if `guided-diffusion-sdk` is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names in torch that it uses
        return _imported(f"guided_diffusion.{module}")


def diffusers():
    """The package, or None if it is not installed."""
    return _imported("diffusers")


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def lacking() -> list[str]:
    """A line for each rival that is left out."""
    rivals = {"guided-diffusion-sdk (the official code)": official("unet"), "diffusers": diffusers()}
    notes = [f"{name} is not installed: left out" for name, module in rivals.items() if module is None]
    for note in notes:
        print(note, flush=True)
    return notes


# ---- the official code


def official_network(case: Case, **flags) -> th.nn.Module:
    """The official U-Net by our flags, with our weights."""
    made, vae = official("unet").UNetModel, case.vae
    ours, script_util.UNetModel = script_util.UNetModel, lambda *a, class_dropout_prob=0, **k: made(*a, **k)
    try:
        with dist_util.dev():
            model = assembly.create_network(case.run.replace(**flags), vae, num_classes=USERS)
    finally:
        script_util.UNetModel = ours
    model.load_state_dict(case.weights)
    return model.to(dist_util.dev())


def official_process(case: Case, respacing: str = ""):
    """The official Gaussian process by our flags."""
    names = "learn_sigma", "noise_schedule", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"
    settings = {name: getattr(case.run, name) for name in names}
    make = official("script_util").create_gaussian_diffusion
    return make(steps=case.run.diffusion_steps, timestep_respacing=respacing, **settings)


class OfficialTraining:
    """The official training loop, step by step."""

    def __init__(self, case: Case, *, use_fp16: bool = False):
        official("logger").configure(dir=tempfile.mkdtemp(), format_strs=[])
        model = official_network(case, use_fp16=use_fp16)
        if use_fp16:
            model.convert_to_fp16()
        self.loop = official("train_util").TrainLoop(
            model=model,
            diffusion=official_process(case),
            data=None,
            batch_size=case.batch,
            microbatch=-1,
            lr=case.run.lr,
            ema_rate="0.999",
            log_interval=LOG_INTERVAL,
            save_interval=NEVER,
            resume_checkpoint="",
            use_fp16=use_fp16,
        )
        self.batch = case.data()

    def step(self) -> None:
        self.loop.run_step(*self.batch)

    def gradient(self):
        """See `loss_and_gradient`."""
        return loss_and_gradient(self.loop, self.batch)


def official_sampler(case: Case, steps: int, *, use_fp16: bool = False):
    """() -> samples, by `p_sample_loop` on so many of the times."""
    model = official_network(case, use_fp16=use_fp16).eval()
    if use_fp16:
        model.convert_to_fp16()
    process = official_process(case, str(steps))
    noise, cond = case.data(1)

    def sample():
        th.manual_seed(0)
        return process.p_sample_loop(model, tuple(noise.shape), noise=noise, clip_denoised=False, model_kwargs=cond)

    return sample


# ---- diffusers


class DiffusersTraining:
    """The usual training loop around a network of diffusers: its scheduler's noise, AdamW, its moving average.

    Args:
        autocast: run the network in bfloat16, the rest in float32.
    """

    def __init__(self, case: Case, model: th.nn.Module, *, autocast: bool = False):
        self.autocast = autocast
        self.model, self.scheduler = model.to(dist_util.dev()).train(), diffusers().DDPMScheduler(**DDPM_BETAS)
        self.opt = th.optim.AdamW(model.parameters(), lr=case.run.lr)
        training_utils = importlib.import_module("diffusers.training_utils")
        self.ema = training_utils.EMAModel(model.parameters(), decay=0.999)
        self.batch = case.data()

    def step(self) -> None:
        batch, cond = self.batch
        noise = th.randn_like(batch)
        t = th.randint(0, 1000, (len(batch),), device=batch.device)
        noisy = self.scheduler.add_noise(batch, noise, t)
        with th.autocast(batch.device.type, th.bfloat16, enabled=self.autocast):
            found = predicted(self.model, noisy, t, cond)
        th.nn.functional.mse_loss(found.float(), noise).backward()
        self.opt.step()
        self.opt.zero_grad()
        self.ema.step(self.model.parameters())


def predicted(model, x, t, cond):
    """What a network of diffusers makes of x."""
    return model(x, t, class_labels=cond["y"]).sample if cond else model(x, t).sample


def diffusers_sampler(case: Case, model: th.nn.Module, steps: int, scheduler: str = "DDPMScheduler"):
    """() -> samples, by a scheduler of diffusers on so many of the times."""
    model, walk = model.to(dist_util.dev()).eval(), getattr(diffusers(), scheduler)(**DDPM_BETAS, clip_sample=False)
    noise, cond = case.data(1)

    @th.no_grad()
    def sample():
        x = noise.to(next(model.parameters()).dtype)
        walk.set_timesteps(steps)
        for t in walk.timesteps:
            x = walk.step(predicted(model, x, t.expand(len(x)).to(x.device), cond), t, x).prev_sample
        return x

    return sample


def diffusers_unet(case: Case) -> th.nn.Module:
    """UNet2DModel as wide and deep as the case's U-Net, attending at the same sizes."""
    run, size = case.run, case.shape[-1]
    widths = [int(run.num_channels * m) for m in script_util.parse_channel_mult(run.channel_mult)]
    attending = script_util.downsample_factors(run.attention_resolutions, size)
    attends = [2**level in attending for level in range(len(widths))]
    with dist_util.dev():
        return diffusers().UNet2DModel(
            sample_size=size,
            in_channels=case.shape[1],
            out_channels=case.shape[1],
            block_out_channels=tuple(widths),
            layers_per_block=run.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in attends[::-1]),
            attention_head_dim=run.num_head_channels,
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
        )


def diffusers_dit(*, size: int, channels: int, patch: int, depth: int, width: int, heads: int) -> th.nn.Module:
    """DiTTransformer2DModel, which predicts noise alone; it embeds time and label in every block anew."""
    with dist_util.dev():
        return diffusers().DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            sample_size=size,
            patch_size=patch,
            num_embeds_ada_norm=USERS,
        )
