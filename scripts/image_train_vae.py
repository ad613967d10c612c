"""Train a network on the latents of a folder of images, or on latents that latent_extract.py made of it.

    mpiexec -n 2 python scripts/image_train_vae.py --config configs/microdoppler_small.yaml --data_dir DATA/train
    mpiexec -n 2 python scripts/image_train_vae.py --config configs/dit_demo.yaml --data_dir LATENTS/train

Also started by torchrun, srun, or plain python. Writes upstream's files (model*.pt, ema_*.pt, opt*.pt, log.txt,
progress.csv), run.yaml and previews/ into --log_dir. `--resume_checkpoint auto` goes on after any interruption;
`--dry_run True` looks at the data, tells memory and time, and stops.
"""

import os
from dataclasses import asdict, dataclass
from functools import partial

from guided_diffusion_vae import dist_util, logger, run_record
from guided_diffusion_vae.assembly import (
    NETWORK_SECTIONS,
    SAMPLING,
    create_network,
    create_preview_sampler,
    create_process,
    estimate_run,
    ignored_settings,
    try_settings,
)
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.curves import draw_progress
from guided_diffusion_vae.image_datasets import DataConfig, load_data_with_vae, load_heldout, rehearse_data
from guided_diffusion_vae.logger import LogConfig
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.run_state import refuse_used_folder, seed_weights
from guided_diffusion_vae.sample_util import Preview
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop
from guided_diffusion_vae.trained import how_to_sample
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae, stats_file

SECTIONS = (DataConfig, TrainConfig, *NETWORK_SECTIONS, VAEConfig, PlotConfig)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a training run goes."""

    log_dir: str = ""  # folder for checkpoints, logs and grids; empty: OPENAI_LOGDIR, else runs/train


def main(argv=None):
    run = parse_run(create_argparser(*SECTIONS, OutputConfig, LogConfig, description=__doc__, elsewhere=SAMPLING), argv)
    folder = run.log_dir or os.getenv("OPENAI_LOGDIR") or "runs/train"
    if dist_util.rank() == 0:
        print(run if run.dry_run else f"{run}\n# all of them will be in {folder}/run.yaml")
    if run.dry_run:
        vae = load_vae(run.section(VAEConfig), latent_stats=stats_file(run.data_dir))
        about = {name: getattr(run, name) for name in ("class_cond", "class_balance", "random_flip", "cache_latents")}
        rehearse_data(run.data_dir, run.val_dir, run.image_size, vae, **about)
        return dist_util.print_comment(str(estimate_run(run, vae)))
    dist_util.setup_dist()
    dist_util.rank0_first(lambda: refuse_used_folder(folder, run.resume_checkpoint))
    dist_util.rank0_first(lambda: run_record.refuse_other_training(run, folder, (*NETWORK_SECTIONS, VAEConfig)))
    vae = load_vae(run.section(VAEConfig), latent_stats=stats_file(run.data_dir)).to(dist_util.dev())
    dist_util.rank0_first(lambda: run_record.refuse_other_autoencoder(run, folder, vae.fingerprint))
    try_settings(run, vae)
    logger.configure(dir=folder, log_format=run.log_format)
    if ignored_settings(run):
        logger.warn(f"--network {run.network} --process {run.process} does not read {', '.join(ignored_settings(run))}")

    logger.log("creating data loader...")
    data_flags = asdict(run.section(DataConfig))
    about = {"image_size": run.image_size, "vae": vae, "class_cond": run.class_cond, "say": logger.log}
    data = load_data_with_vae(**data_flags, **about, batch_size=run.batch_size, seed=run.seed)
    dist_util.rank0_first(lambda: run_record.refuse_other_classes(run, folder, data.class_names))
    about |= {name: getattr(run, name) for name in ("cache_latents", "latent_cache", "skip_bad_images")}
    about |= {"data_dir": run.val_dir, "class_names": data.class_names}
    heldout = load_heldout(**about) if run.val_dir else None

    logger.log("creating model and diffusion...")
    seed_weights(run.seed)
    model, process = create_network(run, vae, num_classes=len(data.class_names)), create_process(run, vae)
    logger.log(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    about = {"folder": logger.get_dir(), "conditional": run.class_cond, "seed": run.seed}
    preview = Preview(model, create_preview_sampler(run, vae), vae, run.image_size, data.class_names, **about)

    logger.log("training...")
    train_flags = asdict(run.section(TrainConfig))
    loop = TrainLoop(
        model=model,
        diffusion=process,
        data=data,
        heldout=heldout,
        schedule_sampler=create_named_schedule_sampler(train_flags.pop("schedule_sampler"), process),
        use_fp16=run.use_fp16,
        sample_fn=preview,
        progress=True,
        on_save=partial(draw_progress, logger.get_dir(), logger.warn) if run.plot else None,
        **train_flags,
    )
    if dist_util.rank() == 0:  # only now: a command that cannot start must not describe the run that lies there
        stats = stats_file(run.data_dir) if run.latent_norm else None
        about = {"class_names": data.class_names, "autoencoder": vae.fingerprint, "latent_stats": stats}
        run_record.save_run(run, logger.get_dir(), **about, images_per_user=data.images_per_user)
    loop.run_loop()
    logger.log(how_to_sample(loop.newest_average()))


if __name__ == "__main__":
    dist_util.run_main(main)
