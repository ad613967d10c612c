"""How likely a trained model finds images: bits per dimension of pixels, nats per dimension of latents.

    python scripts/image_nll_vae.py --model_path runs/train/ema_0.9999_010000.pt --data_dir DATA/test --batch_size 16

Only --model_path and --data_dir are needed: run.yaml beside the checkpoint supplies the rest. Writes nll.csv (each
user's mean) and, of a Gaussian process, upstream's vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz. Unlike
upstream's, images are not mirrored and none is left out at the end. Also started by mpiexec, torchrun, srun.
"""

import os
from dataclasses import fields
from pathlib import Path

from guided_diffusion_vae import assembly, dist_util, logger
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, NUM_CLASSES, SamplerConfig
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.guidance import GuidanceConfig
from guided_diffusion_vae.image_datasets import DataConfig, load_heldout, speaking_of
from guided_diffusion_vae.likelihood import LikelihoodConfig, Tally, parts_of_data, spread_rows
from guided_diffusion_vae.run_record import read_run, refuse_contradictions
from guided_diffusion_vae.sample_util import SamplingConfig
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.vae_wrapper import PIXEL, VAEConfig, load_vae

NETWORK = (*NETWORK_SECTIONS, VAEConfig)
ELSEWHERE = (DataConfig, TrainConfig, SamplingConfig, SamplerConfig, GuidanceConfig)


def main(argv=None):
    parser = create_argparser(LikelihoodConfig, *NETWORK, description=__doc__, elsewhere=ELSEWHERE)
    settings, record = read_run(parse_run(parser, argv).model_path)
    network_names = [field.name for section in NETWORK for field in fields(section)]
    run = parse_run(parser, argv, base={name: settings[name] for name in network_names if name in settings})
    refuse_contradictions(run, settings, network_names)
    if "clip_denoised" not in run.given:
        run = run.replace(clip_denoised=run.vae_path == PIXEL)
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return
    dist_util.setup_dist()
    beside_model = Path(run.model_path).parent / "likelihood"
    logger.configure(dir=run.log_dir or os.getenv("OPENAI_LOGDIR") or str(beside_model))

    logger.log("creating model and diffusion...")
    stats = Path(run.model_path).with_name("latents_stats.pt")
    expected = record.get("autoencoder")
    vae = load_vae(run.section(VAEConfig), expected=expected, latent_stats=stats).to(dist_util.dev())
    class_names = record.get("class_names") or [f"{i:04d}" for i in range(NUM_CLASSES)]
    model = assembly.load_network(run, vae, num_classes=len(class_names))
    process = assembly.create_process(run, vae)

    logger.log("creating data loader...")
    about = ("data_dir", "image_size", "class_cond", "cache_latents", "latent_cache", "skip_bad_images")
    with speaking_of("--data_dir", instead_of="--val_dir"):
        flags = {name: getattr(run, name) for name in about}
        data = load_heldout(**flags, vae=vae, class_names=class_names, say=logger.log)

    logger.log("evaluating...")
    tally = Tally(process, vae, data.labels, class_names)
    logger.log(tally.meaning)
    for part in parts_of_data(
        model,
        process,
        data,
        rows=spread_rows(len(data), run.num_samples),
        batch_size=run.batch_size,
        seed=run.seed,
        clip_denoised=run.clip_denoised,
        num_steps=run.num_steps,
    ):
        tally.add(part)
        logger.log(str(tally))
    if dist_util.rank() == 0:
        for name in tally.sums:
            logger.log(f"saving {name} terms to {Path(logger.get_dir()) / name}_terms.npz")
        tally.save(logger.get_dir())
    logger.log("evaluation complete")


if __name__ == "__main__":
    dist_util.run_main(main)
