"""Build the moving average of any length from the snapshots of a run that was trained with --posthoc_ema.

    python scripts/posthoc_ema.py --run_dir runs/one --sigma_rel 0.15

Writes ema_posthoc0.150_NNNNNN.pt into the run's folder, which image_sample_vae.py takes as --model_path.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.posthoc_ema import PosthocConfig, rebuild
from guided_diffusion_vae.trained import how_to_sample


def main(argv=None):
    run = parse_run(create_argparser(PosthocConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    path = rebuild(run.run_dir, run.sigma_rel, run.step)
    print(how_to_sample(path))


if __name__ == "__main__":
    dist_util.run_main(main)
