"""Sample images from a trained model: an .npz for the evaluator, PNGs and a grid for each user, and a manifest.

    python scripts/image_sample_vae.py --model_path runs/train/ema_0.9999_010000.pt --num_samples 310 --users all
    python scripts/image_sample_vae.py --model_path runs/dit/ema_0.999_020000.pt --user_ids 1 2 3 \\
        --num_samples_per_user 4 --cfg_scale 4.0 --num_steps 250

Only --model_path is needed: run.yaml beside the checkpoint supplies the rest. Also started by mpiexec, torchrun, srun.
"""

import time
from dataclasses import fields
from pathlib import Path

from guided_diffusion_vae import assembly, dist_util, logger
from guided_diffusion_vae.assembly import SamplerConfig
from guided_diffusion_vae.checkpoint import digest
from guided_diffusion_vae.compiling import compile_network
from guided_diffusion_vae.config import create_argparser
from guided_diffusion_vae.guidance import GuidanceConfig
from guided_diffusion_vae.guides import digests, with_guides
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.noised_classifier import LatentClassifierConfig
from guided_diffusion_vae.sample_util import (
    PngWriter,
    SamplingConfig,
    classes_in_turn,
    join,
    remove_old_samples,
    sample_batches,
    save_grids,
    save_manifest,
    save_samples,
)
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.trained import NETWORK, open_model, results_folder, run_of_model

OURS = (SamplingConfig, SamplerConfig, GuidanceConfig, LatentClassifierConfig)
TRAINING = (DataConfig, TrainConfig)
ALIASES = {"users": "user_ids", "cfg_scale": "condition_scale"}
RECORDED = ("seed", "per_image_seed", "network", "process", "sampler", "use_ddim", "num_steps", "spacing", "compile")
RECORDED += ("timestep_respacing", *(field.name for field in fields(GuidanceConfig)), "model_path")


def main(argv=None):
    parser = create_argparser(*OURS, *NETWORK, description=__doc__, aliases=ALIASES, elsewhere=TRAINING)
    run, record = run_of_model(parser, argv)
    assembly.refuse_unfit(run)
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return
    dist_util.setup_dist()
    logger.configure(dir=results_folder(run, "samples"))
    if ignored := assembly.ignored_in_sampling(run):
        logger.warn(f"without effect: {', '.join(ignored)}")

    logger.log("creating model and diffusion...")
    model, vae, class_names = open_model(run, record)
    if run.compile:
        compile_network(model, logger.warn)
    process = assembly.create_process(run, vae, run.section(SamplerConfig))
    model, cond_fn, class_names, labelled = with_guides(run, model, process, vae, class_names)

    logger.log("sampling...")
    batches, files, begin = [], [], time.monotonic()
    png = PngWriter(Path(logger.get_dir()) / "png", class_names)
    for batch in sample_batches(
        model,
        assembly.create_sampler(run.section(SamplerConfig), process, cond_fn),
        vae,
        image_size=run.image_size,
        num_samples=run.section(SamplingConfig).count(class_names),
        batch_size=run.batch_size,
        classes=classes_in_turn(run.users, class_names) if labelled else None,
        num_classes=len(class_names) if labelled else None,
        seed=run.seed,
        per_image_seed=run.per_image_seed,
        progress=True,
        keep_latents=run.save_latents,
    ):
        if dist_util.rank() == 0 and not batches:  # only now: a command that cannot sample must not cost the old ones
            remove_old_samples(Path(logger.get_dir()))
        if dist_util.rank() == 0 and run.save_png:
            files += [f"png/{name}" for name in png.write(batch)]
        batches.append(batch)
        done = sum(len(batch.pixels) for batch in batches)
        logger.log(f"created {done} samples, {done / (time.monotonic() - begin):.3g} a second")

    if dist_util.rank() == 0:
        everything, folder = join(batches), Path(logger.get_dir())
        logger.log(f"saving to {save_samples(folder, everything, vae)}")
        save_grids(folder, everything, class_names)
        about = {name: getattr(run, name) for name in RECORDED}
        about |= assembly.walk_of(run.section(SamplerConfig), process)
        about |= {"model_sha256": digest(run.model_path), **digests(run), **vae.fingerprints}
        save_manifest(folder, files, everything, class_names, about)
    logger.log("sampling complete")


if __name__ == "__main__":
    dist_util.run_main(main)
