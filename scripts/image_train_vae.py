"""Train a diffusion U-Net on the latents of a folder of images.

    mpiexec -n 2 python scripts/image_train_vae.py --config configs/microdoppler_small.yaml --data_dir DATA/train

Also started by torchrun, srun, or plain python. Writes upstream's files (model*.pt, ema_*.pt, opt*.pt, log.txt,
progress.csv), a run.yaml, and sample grids into --log_dir. `--resume_checkpoint auto` goes on after any interruption.
"""

import os
from dataclasses import asdict, dataclass

import torch as th

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.image_datasets import DataConfig, load_data_with_vae
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.run_record import save_run
from guided_diffusion_vae.run_state import refuse_used_folder
from guided_diffusion_vae.sample_util import Preview
from guided_diffusion_vae.script_util import (
    DiffusionConfig,
    ModelConfig,
    args_to_dict,
    create_model_and_diffusion_vae,
    create_preview_diffusion,
    diffusion_defaults,
    model_and_diffusion_defaults,
    try_settings,
)
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae

SECTIONS = (DataConfig, TrainConfig, ModelConfig, DiffusionConfig, VAEConfig)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a training run goes."""

    log_dir: str = ""  # folder for checkpoints, logs and grids; empty: OPENAI_LOGDIR, else runs/train


def main(argv=None):
    run = parse_run(create_argparser(*SECTIONS, OutputConfig, description=__doc__), argv)
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return
    dist_util.setup_dist()
    folder = run.log_dir or os.getenv("OPENAI_LOGDIR") or "runs/train"
    if not run.resume_checkpoint:
        dist_util.rank0_first(lambda: refuse_used_folder(folder))
    vae = load_vae(run.section(VAEConfig)).to(dist_util.dev())
    model_flags = args_to_dict(run, model_and_diffusion_defaults())
    try_settings(vae, schedule_sampler=run.schedule_sampler, **model_flags)
    logger.configure(dir=folder)

    logger.log("creating data loader...")
    data_flags = asdict(run.section(DataConfig))
    data = load_data_with_vae(
        **data_flags,
        batch_size=run.batch_size,
        image_size=run.image_size,
        vae=vae,
        class_cond=run.class_cond,
        seed=run.seed,
        say=logger.log,
    )

    logger.log("creating model and diffusion...")
    th.manual_seed(run.seed)
    model, diffusion = create_model_and_diffusion_vae(vae, num_classes=len(data.class_names), **model_flags)
    logger.log(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    preview = Preview(
        model,
        create_preview_diffusion(**args_to_dict(run, diffusion_defaults())),
        vae,
        run.image_size,
        data.class_names,
        folder=logger.get_dir(),
        conditional=run.class_cond,
        seed=run.seed,
    )

    logger.log("training...")
    train_flags = asdict(run.section(TrainConfig))
    schedule_sampler = create_named_schedule_sampler(train_flags.pop("schedule_sampler"), diffusion)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=schedule_sampler,
        use_fp16=run.use_fp16,
        sample_fn=preview,
        progress=True,
        **train_flags,
    )
    if dist_util.rank() == 0:  # only now: a command that cannot start must not describe the run that lies there
        save_run(run, logger.get_dir(), class_names=data.class_names, autoencoder=vae.fingerprint)
    loop.run_loop()
    logger.log(f"done: python scripts/image_sample_vae.py --model_path {loop.newest_average()} draws from it")


if __name__ == "__main__":
    dist_util.run_main(main)
