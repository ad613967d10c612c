"""Judge an autoencoder on a folder of images: can a diffusion model be trained on its latents?

    python scripts/check_vae.py --vae_path microdoppler-f4 --data_root DATA

Prints quality, the latents channel by channel and a verdict in words; writes report.json, recon_grid.png and worst.png.
`--fit_scale True --out FILE.safetensors` stores it with the scale that gives these images unit variance; `--out FOLDER`
writes it as diffusers' AutoencoderKL.from_pretrained reads it.
"""

from evaluations.autoencoder_check import CheckConfig, check
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.vae_data import VAEDataConfig
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae


def main(argv=None):
    run = parse_run(create_argparser(CheckConfig, VAEConfig, VAEDataConfig, PlotConfig, description=__doc__), argv)
    print(run)
    if run.dry_run:
        return run.section(VAEDataConfig).rehearse(seed=run.seed)
    vae = load_vae(run.section(VAEConfig), default_scale=1.0).to(dist_util.dev())
    check(vae, run.section(VAEDataConfig), run.section(CheckConfig), plot=run.plot)


if __name__ == "__main__":
    dist_util.run_main(main)
