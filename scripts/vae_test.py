"""Test a trained autoencoder on images that it never saw.

    python scripts/vae_test.py --ckpt runs/vae/microdoppler_kl_z4_s64/autoencoder.safetensors --data_root DATA
    python scripts/vae_test.py --ckpt runs/vae/mnist_mnist_z8_s28/last.pt --data_root MNIST

A KL autoencoder is judged as check_vae.py does, on the part `test`; a plain VAE by its evidence lower bound.
"""

from pathlib import Path

from evaluations.autoencoder_check import CheckConfig, check
from evaluations.plain_vae import measure_plain
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.dist_util import run_main
from guided_diffusion_vae.vae_infer_util import CheckpointConfig
from guided_diffusion_vae.vae_tasks import open_plain
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae


def main(argv=None):
    parser = create_argparser(CheckpointConfig, CheckConfig, VAEDataConfig, description=__doc__)
    ckpt = parse_run(parser, argv).ckpt  # its run supplies defaults for the others
    plain, trained = open_plain(ckpt)
    known = {name: trained[name] for name in ("dataset", "image_size", "seed") if name in trained}
    run = parse_run(parser, argv, base={"split": "test", "report_dir": str(Path(ckpt).parent / "test"), **known})
    print(run)
    data = run.section(VAEDataConfig)
    if run.dry_run:
        return data.rehearse(seed=run.seed)
    if plain:
        images = getattr(data.parts(plain.channels, seed=run.seed), run.split)
        measure_plain(plain, images, run.report_dir, seed=run.seed)
    else:
        check(load_vae(VAEConfig(vae_path=ckpt), default_scale=1.0), data, run.section(CheckConfig))


if __name__ == "__main__":
    run_main(main)
