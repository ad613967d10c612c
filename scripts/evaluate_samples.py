"""Judge generated images in a feature space that needs no download.

    python scripts/evaluate_samples.py --real_dir DATA/train --heldout_dir DATA/test --samples samples_248x64x64x3.npz

Prints user accuracy and Frechet distances between floor and ceiling; writes report.json and comparison.png.
"""

from dataclasses import dataclass

from evaluations import report
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared with what."""

    real_dir: str = ""  # folder of the real images that the model was trained on
    heldout_dir: str = ""  # folder of real images of other sessions
    samples: str = ""  # the sampler's .npz, with labels
    out_dir: str = "runs/report"  # where report.json and comparison.png go
    seed: int = 0  # of the classifier


def main(argv=None):
    run = parse_run(create_argparser(EvaluationConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    numbers, images = report.evaluate(run.real_dir, run.heldout_dir, run.samples, seed=run.seed)
    report.write_report(run.out_dir, numbers, images)
    print(report.as_table(numbers))


if __name__ == "__main__":
    dist_util.run_main(main)
