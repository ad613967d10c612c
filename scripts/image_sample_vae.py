"""Sample images from a trained model: an .npz for the evaluator, PNGs for each user, and a grid.

    python scripts/image_sample_vae.py --model_path runs/train/ema_0.9999_010000.pt --num_samples 310 --users all

Only --model_path is needed: run.yaml beside the checkpoint supplies the rest. Also started by mpiexec, torchrun, srun.
"""

import os
from dataclasses import fields
from pathlib import Path

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.run_record import read_run, refuse_contradictions
from guided_diffusion_vae.sample_util import (
    SamplingConfig,
    classes_in_turn,
    join,
    safe_name,
    sample_batches,
    save_grid,
    save_pngs,
    save_samples,
)
from guided_diffusion_vae.script_util import (
    NUM_CLASSES,
    DiffusionConfig,
    ModelConfig,
    args_to_dict,
    create_model_and_diffusion_vae,
    load_weights,
    model_and_diffusion_defaults,
)
from guided_diffusion_vae.vae_wrapper import PIXEL, VAEConfig, load_vae

NETWORK = (ModelConfig, DiffusionConfig, VAEConfig)
GRID_COLUMNS, GRID_IMAGES = 8, 64


def main(argv=None):
    parser = create_argparser(SamplingConfig, *NETWORK, description=__doc__)
    settings, record = read_run(parse_run(parser, argv).model_path)
    network_names = [field.name for section in NETWORK for field in fields(section)]
    run = parse_run(parser, argv, base={name: settings[name] for name in network_names if name in settings})
    refuse_contradictions(run, settings, network_names)
    if "clip_denoised" not in run.given:
        run = run.replace(clip_denoised=run.vae_path == PIXEL)
    if run.users and not run.class_cond:
        raise UserError(f"--users {run.users}: this model was trained with --class_cond False; leave --users out")
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return
    dist_util.setup_dist()
    beside_model = Path(run.model_path).parent / "samples"
    logger.configure(dir=run.log_dir or os.getenv("OPENAI_LOGDIR") or str(beside_model))

    logger.log("creating model and diffusion...")
    vae = load_vae(run.section(VAEConfig), expected=record.get("autoencoder")).to(dist_util.dev())
    class_names = record.get("class_names") or [f"{i:04d}" for i in range(NUM_CLASSES)]
    flags = args_to_dict(run, model_and_diffusion_defaults())
    model, diffusion = create_model_and_diffusion_vae(vae, num_classes=len(class_names), **flags)
    weights = dist_util.load_state_dict(run.model_path, map_location="cpu")
    load_weights(model, weights, path=f"--model_path {run.model_path}", given=flags)
    model.to(dist_util.dev())
    if run.use_fp16:
        model.convert_to_fp16()
    model.eval()

    logger.log("sampling...")
    batches, count = [], 0
    for batch in sample_batches(
        model,
        diffusion,
        vae,
        image_size=run.image_size,
        num_samples=run.num_samples,
        batch_size=run.batch_size,
        classes=classes_in_turn(run.users, class_names) if run.class_cond else None,
        num_classes=len(class_names) if run.class_cond else None,
        use_ddim=run.use_ddim,
        clip_denoised=run.clip_denoised,
        seed=run.seed,
        per_image_seed=run.per_image_seed,
        progress=True,
    ):
        if dist_util.rank() == 0 and run.save_png:
            save_pngs(Path(logger.get_dir()) / "png", batch, class_names, first=count)
        batches.append(batch)
        count += len(batch.pixels)
        logger.log(f"created {count} samples")

    if dist_util.rank() == 0:
        everything = join(batches)
        logger.log(f"saving to {save_samples(logger.get_dir(), everything)}")
        shown, labels = everything.pixels[:GRID_IMAGES], everything.labels
        captions = [""] * len(shown) if labels is None else [safe_name(class_names, y) for y in labels[:GRID_IMAGES]]
        save_grid(Path(logger.get_dir()) / "grid.png", shown, captions, GRID_COLUMNS)
    logger.log("sampling complete")


if __name__ == "__main__":
    dist_util.run_main(main)
