"""Train a KL autoencoder on a folder of images.

    python scripts/vae_train.py --config configs/vae_microdoppler_f4.yaml --data_root DATA/train

Writes OUT_DIR/NAME.safetensors, which every --vae_path takes. The same command again goes on where it was interrupted.
"""

import torch as th

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.vae_train_util import VAEModelConfig, VAETrainConfig, VAETrainer


def main(argv=None):
    run = parse_run(create_argparser(VAETrainConfig, VAEModelConfig, description=__doc__), argv)
    print(run)
    if run.dry_run:
        return
    logger.configure(dir=run.out_dir)
    th.manual_seed(run.seed)
    VAETrainer(run.section(VAEModelConfig).build(), run.section(VAETrainConfig)).run()


if __name__ == "__main__":
    dist_util.run_main(main)
