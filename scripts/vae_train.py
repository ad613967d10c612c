"""Train an autoencoder: a KL autoencoder for latent diffusion, or a plain VAE.

    python scripts/vae_train.py --config configs/vae_microdoppler_f4.yaml --data_root DATA
    python scripts/vae_train.py --dataset mnist --model mnist --data_root MNIST --image_size 28 --latent_dim 8

Also started by mpiexec, torchrun, srun. Writes last.pt, epoch_XXXX.pt, the log and recon_grid.png (pairs of a real
image and what comes back); for a KL autoencoder NAME.safetensors, which every --vae_path takes; for a plain VAE
samples_grid.png, what it draws (a KL autoencoder would draw noise: its latents are for a diffusion model to draw). The
same command goes on where it was interrupted; `--dry_run True` looks at the data and stops.
"""

from functools import partial

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.autoencoders.ldm_config import is_ldm, settings_from_ldm
from guided_diffusion_vae.autoencoders.objectives import ObjectiveConfig
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.curves import draw_progress
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.logger import LogConfig
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.run_state import seed_weights
from guided_diffusion_vae.vae_tasks import VAEModelConfig, create_task, default_folder
from guided_diffusion_vae.vae_train_util import VAETrainConfig, VAETrainer

SECTIONS = (VAEDataConfig, VAEModelConfig, VAETrainConfig, ObjectiveConfig, PlotConfig)


def main(argv=None):
    parser = create_argparser(*SECTIONS, LogConfig, description=__doc__)
    run = parse_run(parser, argv, translate=lambda loaded: settings_from_ldm(loaded) if is_ldm(loaded) else loaded)
    if dist_util.rank() == 0:
        print(run)
    data, model = run.section(VAEDataConfig), run.section(VAEModelConfig)
    if run.dry_run:
        return data.rehearse(seed=run.seed)
    folder = run.out_dir or default_folder(data, model)
    dist_util.setup_dist()
    logger.configure(dir=folder, log_format=run.log_format)
    seed_weights(run.seed)
    task = create_task(
        model,
        run.section(ObjectiveConfig),
        image_size=run.image_size,
        ckpt=run.ckpt,
        decoder_only=run.decoder_only,
        generated_latents=run.generated_latents,
        say=logger.log,
    )
    parts = data.parts(task.channels, seed=run.seed, say=logger.log)
    trainer = VAETrainer(
        task,
        parts.train,
        parts.val,
        run.section(VAETrainConfig),
        image_size=run.image_size,
        folder=folder,
        arguments=run.as_dict(),
        on_save=partial(draw_progress, folder, logger.warn) if run.plot else None,
    )
    trainer.run()


if __name__ == "__main__":
    dist_util.run_main(main)
