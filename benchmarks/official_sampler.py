"""`image_sample_vae.py` with the official code's U-Net and its p_sample in place of ours; for bench_sampling.py.

    pip install guided-diffusion-sdk      # the official code as packaged in 2022; here only run, never read

Labels, decoding, gathering and files stay ours, so that the two differ in what the official code does alone. Takes
flags of the same names, with --timestep_respacing for the number of steps.
"""

import runpy
from pathlib import Path

import guided_diffusion.script_util as official
import guided_diffusion.unet as official_unet

from guided_diffusion_vae import assembly, script_util

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "image_sample_vae.py"
PROCESS = ("learn_sigma", "noise_schedule", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas")


def network(*args, num_classes=None, class_dropout_prob=0.0, **kwargs):
    """The official U-Net; the null label is one more class to it."""
    rows = num_classes and num_classes + (class_dropout_prob > 0)
    return official_unet.UNetModel(*args, num_classes=rows, **kwargs)


def process(run, _vae, _config=None):
    settings = {name: getattr(run, name) for name in (*PROCESS, "timestep_respacing")}
    return official.create_gaussian_diffusion(steps=run.diffusion_steps, **settings)


def sampler(_config, diffusion, _cond_fn=None):
    def sample(model, shape, *, noise, noise_like, **options):
        return diffusion.p_sample_loop(model, shape, noise=noise, clip_denoised=False, **options)

    return sample


if __name__ == "__main__":
    script_util.UNetModel = network
    assembly.create_process, assembly.create_sampler, assembly.walk_of = process, sampler, lambda *_: {}
    runpy.run_path(str(SCRIPT), run_name="__main__")
