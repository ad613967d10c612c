"""How likely a trained model finds images: bits per dimension of pixels, nats per dimension of latents.

    python scripts/image_nll_vae.py --model_path runs/train/ema_0.9999_010000.pt --data_dir DATA/test --batch_size 16

Only --model_path and --data_dir are needed: run.yaml beside the checkpoint supplies the rest. Writes nll.csv (each
user's mean) and, of a Gaussian process, upstream's vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz. Unlike
upstream's, images are not mirrored and none is left out at the end. Also started by mpiexec, torchrun, srun.
"""

from pathlib import Path

from guided_diffusion_vae import assembly, dist_util, logger
from guided_diffusion_vae.config import create_argparser
from guided_diffusion_vae.image_datasets import DataConfig, load_heldout, speaking_of
from guided_diffusion_vae.likelihood import LikelihoodConfig, Tally, parts_of_data, spread_rows
from guided_diffusion_vae.sample_util import SamplingConfig
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.trained import NETWORK, open_model, results_folder, run_of_model

ELSEWHERE = (DataConfig, TrainConfig, SamplingConfig, *assembly.SAMPLING)


def main(argv=None):
    parser = create_argparser(LikelihoodConfig, *NETWORK, description=__doc__, elsewhere=ELSEWHERE)
    run, record = run_of_model(parser, argv)
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return
    dist_util.setup_dist()
    logger.configure(dir=results_folder(run, "likelihood"))

    logger.log("creating model and diffusion...")
    model, vae, class_names = open_model(run, record)
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
