"""Make pictures to train on of recorded radar data, sessions apart.

    python scripts/import_radar.py --data_dir recordings --out_dir data/mine --carrier_ghz 77 --prf_hz 3200

Reads .mat, .npy, .npz, .csv and raw I and Q: baseband, pulses x range bins, or spectrograms; one folder a user. Writes
train|val|test/USER/*.png, manifest.csv and axes.yaml (m/s and s). docs/own_data.md says what to choose for which radar.
"""

import time

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.radar_import import ImportConfig, import_recordings


def main(argv=None):
    run = parse_run(create_argparser(ImportConfig, description=__doc__), argv)
    print(run)
    if run.dry_run:
        return
    start = time.perf_counter()
    import_recordings(run.section(ImportConfig))
    print(f"({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    dist_util.run_main(main)
