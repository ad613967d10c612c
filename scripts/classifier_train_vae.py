"""Train a classifier of noisy latents, whose gradient can guide sampling to a user (`--classifier_path`).

    mpiexec -n 2 python scripts/classifier_train_vae.py --config configs/classifier_demo.yaml \\
        --data_dir DATA/train --val_data_dir DATA/val

With `--model_path MODEL`, a model without labels, its gradient learns what guides that model (`score_matching`). Begin
from a classifier trained without: `--resume_checkpoint runs/classifier/model_best.pt`.

Upstream's flags. `--process`, `--noise_schedule` and so on are those of the model to be guided. Nothing is cropped or
mirrored, unlike upstream's training images. Writes model*.pt, opt*.pt, log.txt, progress.csv and run.yaml into
--log_dir, with --val_data_dir also model_best.pt; `--resume_checkpoint auto` goes on after any interruption.
"""

import os
from dataclasses import asdict
from functools import partial

from guided_diffusion_vae import dist_util, logger, run_record
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.curves import draw_progress
from guided_diffusion_vae.flow_matching import FlowConfig
from guided_diffusion_vae.guides import load_guided
from guided_diffusion_vae.image_datasets import DataConfig, load_data_with_vae, load_heldout, rehearse_data, speaking_of
from guided_diffusion_vae.logger import LogConfig
from guided_diffusion_vae.noised_classifier import (
    ClassifierLosses,
    ClassifierTrainConfig,
    CleanTimes,
    LatentClassifierConfig,
    create_classifier_process,
    create_latent_classifier,
    refuse_impossible,
)
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.run_state import refuse_used_folder, seed_weights
from guided_diffusion_vae.script_util import DiffusionConfig, LaterDiffusionConfig
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae, stats_file

KIND = (LatentClassifierConfig, DiffusionConfig, LaterDiffusionConfig, FlowConfig, VAEConfig)


def main(argv=None):
    sections = (DataConfig, ClassifierTrainConfig, LogConfig, *KIND, PlotConfig)
    run = parse_run(create_argparser(*sections, description=__doc__), argv)
    config, flags = run.section(LatentClassifierConfig), run.section(ClassifierTrainConfig)
    folder = run.log_dir or os.getenv("OPENAI_LOGDIR") or "runs/classifier"
    if dist_util.rank() == 0:
        print(run if run.dry_run else f"{run}\n# all of them will be in {folder}/run.yaml")
    if not run.dry_run:
        dist_util.setup_dist()
        dist_util.rank0_first(lambda: refuse_used_folder(folder, run.resume_checkpoint))
        dist_util.rank0_first(lambda: run_record.refuse_other_training(run, folder, KIND))
    vae = load_vae(run.section(VAEConfig), latent_stats=stats_file(run.data_dir)).to(dist_util.dev())
    process = create_classifier_process(run, vae)
    guided = load_guided(run.model_path, run, vae) if run.model_path else None
    sampler = create_named_schedule_sampler(run.schedule_sampler, process)
    refuse_impossible(config, vae)  # before any image is read
    if run.dry_run:
        about = {"random_flip": run.random_flip, "cache_latents": run.cache_latents, "flag": "--val_data_dir"}
        return rehearse_data(run.data_dir, run.val_data_dir, run.image_size, vae, class_cond=True, **about)
    dist_util.rank0_first(lambda: run_record.refuse_other_autoencoder(run, folder, vae.fingerprint))
    logger.configure(dir=folder, log_format=run.log_format)

    logger.log("creating data loader...")
    about = {"image_size": run.image_size, "vae": vae, "class_cond": True, "say": logger.log}
    data_flags = asdict(run.section(DataConfig))
    data = load_data_with_vae(**data_flags, **about, batch_size=run.batch_size, seed=run.seed)
    dist_util.rank0_first(lambda: run_record.refuse_other_classes(run, folder, data.class_names))
    about |= {name: getattr(run, name) for name in ("cache_latents", "latent_cache", "skip_bad_images")}
    heldout = None
    if run.val_data_dir:
        with speaking_of("--val_data_dir", instead_of="--val_dir"):
            heldout = load_heldout(data_dir=run.val_data_dir, class_names=data.class_names, **about)
        if run.eval_interval * run.batch_size * dist_util.world_size() < len(heldout):
            logger.warn(
                f"--eval_interval {run.eval_interval} judges {len(heldout)} held-out images after every"
                f" {run.eval_interval} steps, which takes longer than to train: give more"
            )

    logger.log("creating model and diffusion...")
    seed_weights(run.seed)
    model = create_latent_classifier(config, vae, num_classes=len(data.class_names))
    losses = ClassifierLosses(process, noised=run.noised, time_shift=run.time_shift, guided=guided)
    logger.log(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    logger.log("training classifier model...")
    loop = TrainLoop(
        model=model,
        diffusion=losses,
        data=data,
        heldout=heldout,
        val_dir=run.val_data_dir,
        schedule_sampler=sampler if run.noised else CleanTimes(losses, sampler),
        use_fp16=run.classifier_use_fp16,
        progress=True,
        on_save=partial(draw_progress, logger.get_dir(), logger.warn) if run.plot else None,
        **flags.for_the_loop(),
    )
    if dist_util.rank() == 0:  # only now: a command that cannot start must not describe the run that lies there
        stats = stats_file(run.data_dir) if run.latent_norm else None
        about_run = {"class_names": data.class_names, "autoencoder": vae.fingerprint, "latent_stats": stats}
        run_record.save_run(run, logger.get_dir(), **about_run)
    loop.run_loop()
    logger.log(f"done: --classifier_path {loop.best_average() if heldout else loop.newest_average()} guides by it")


if __name__ == "__main__":
    dist_util.run_main(main)
