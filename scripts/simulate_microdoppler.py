"""Simulate radar spectrograms of walking people, sessions apart.

    python scripts/simulate_microdoppler.py --out_dir data/simulated

Writes train|val|test/user_XX/*.png and manifest.csv with the ground truth of every picture.
"""

import time

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.data.microdoppler import SimulationConfig, plan, simulate_dataset


def main(argv=None):
    run = parse_run(create_argparser(SimulationConfig, description=__doc__), argv)
    config = run.section(SimulationConfig)
    if run.dry_run:
        print(run)
        return
    if not config.out_dir:
        raise UserError("--out_dir is empty; say where the data set goes")
    start = time.perf_counter()
    root = simulate_dataset(config)
    seconds = time.perf_counter() - start
    print(f"{len(plan(config))} spectrograms of {config.num_users} persons in {root} ({seconds:.1f} s)")


if __name__ == "__main__":
    dist_util.run_main(main)
