"""Judge generated spectrograms against real ones: is it a walking person, is it the right one, is it a copy?

    python scripts/evaluate_samples.py --real_dir data/train --heldout_dir data/test --samples samples_248x64x64x3.npz

Needs no download: a small user classifier, trained here on the real images alone (under half a minute on a CPU), is
the judge of identity and the feature space. Prints a table; writes report.json and comparison.png. User accuracy is
the share of all images that the judge names right; validate.py's TRTS is the mean of that share over users.
"""

from pathlib import Path

from evaluations.image_sets import beside, read_sets
from evaluations.measure import EvaluationConfig, evaluate
from evaluations.report import comparison, save_picture
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run


def main(argv=None):
    run = parse_run(create_argparser(EvaluationConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    train, heldout, samples = read_sets(run)

    report = evaluate(train, heldout, samples, epochs=run.judge_epochs, seed=run.seed, progress=True)
    print(report)
    out = Path(run.out_dir or beside(run.samples, "report"))
    report.save(out / "report.json")
    save_picture(comparison(train, samples), out / "comparison.png")
    print(f"written: {out / 'report.json'} and {out / 'comparison.png'}")


if __name__ == "__main__":
    dist_util.run_main(main)
