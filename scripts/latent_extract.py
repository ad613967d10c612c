"""Encode a folder of images once: training then reads latents from disk, and needs no encoder in its loop.

    mpiexec -n 2 python scripts/latent_extract.py --data_dir DATA/train --val_dir DATA/val --out_dir LATENTS
    python scripts/image_train_vae.py --data_dir LATENTS/train

Writes LightningDiT's files: shards of raw latents (safetensors) and latents_stats.pt. The same command goes on where it
was interrupted; changed images are encoded again. Without --val_dir the shards lie in --out_dir itself.
"""

from dataclasses import replace
from pathlib import Path

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.latent_extract import ExtractConfig, extract_latents, rehearse_extraction
from guided_diffusion_vae.pictures import draw_extracted, hand_on_axes
from guided_diffusion_vae.plotting import PlotConfig, or_said
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae


def main(argv=None):
    run = parse_run(create_argparser(ExtractConfig, VAEConfig, PlotConfig, description=__doc__), argv)
    if dist_util.rank() == 0:
        print(run)
    if run.dry_run:
        return rehearse_extraction(run.section(ExtractConfig))
    dist_util.setup_dist()
    raw = replace(run.section(VAEConfig), latent_norm=False)  # raw latents are what its numbers are measured on
    vae = load_vae(raw, default_scale=1.0).to(dist_util.dev())
    extract_latents(run.section(ExtractConfig), vae, say=print if dist_util.rank() == 0 else lambda line: None)
    if dist_util.rank() == 0:
        hand_on_axes(run.data_dir, run.out_dir)
    if dist_util.rank() == 0 and run.plot:
        path = Path(run.out_dir) / "latents.png"
        or_said(path.name, lambda: draw_extracted(run.data_dir, run.image_size, vae, path, print), print)


if __name__ == "__main__":
    dist_util.run_main(main)
