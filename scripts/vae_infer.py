"""Draw images from a trained autoencoder, or send images through it.

    python scripts/vae_infer.py --ckpt runs/vae/mnist_mnist_z8_s28/last.pt --n 100 --out runs/digits
    python scripts/vae_infer.py --ckpt microdoppler-f4 --data_root DATA --out runs/through

Without --data_root a plain VAE draws n images from N(0, I); with it, either kind writes n images' reconstructions.
"""

from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.dist_util import run_main
from guided_diffusion_vae.vae_infer_util import CheckpointConfig, InferConfig, infer
from guided_diffusion_vae.vae_tasks import open_plain
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae


def main(argv=None):
    parser = create_argparser(CheckpointConfig, InferConfig, VAEDataConfig, description=__doc__)
    ckpt = parse_run(parser, argv).ckpt  # its run supplies defaults for the others
    plain, trained = open_plain(ckpt)
    run = parse_run(parser, argv, base={name: trained[name] for name in ("dataset", "image_size") if name in trained})
    print(run)
    if run.dry_run:
        return
    model = plain or load_vae(VAEConfig(vae_path=ckpt), default_scale=1.0)
    infer(model, run.section(VAEDataConfig), run.section(InferConfig))


if __name__ == "__main__":
    run_main(main)
