"""Judge generated spectrograms against real ones: is it a walking person, is it the right one, is it a copy?

    python scripts/evaluate_samples.py --real_dir data/train --heldout_dir data/test --samples samples_248x64x64x3.npz

Needs no download: a small user classifier, trained here on the real images alone (under half a minute on a CPU), is
the judge of identity and the feature space. Prints a table, and a verdict with an interval on the share named right and
on FD_user; writes report.json and comparison.png. User accuracy is the share of all images that the judge names right;
validate.py's TRTS is the mean of that share over users, by three classifiers.
"""

from pathlib import Path

from evaluations.image_sets import beside, read_sets
from evaluations.measure import EvaluationConfig, evaluate
from evaluations.plots import PICTURE, draw_judgement
from evaluations.report import comparison, save_picture
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.plotting import PlotConfig


def main(argv=None):
    run = parse_run(create_argparser(EvaluationConfig, PlotConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    train, heldout, samples = read_sets(run)

    named = {}
    about = {"epochs": run.judge_epochs, "seed": run.seed, "progress": True, "keep": named.update}
    report = evaluate(train, heldout, samples, **about)
    print(report)
    out = Path(run.out_dir or beside(run.samples, "report"))
    report.save(out / "report.json")
    save_picture(comparison(train, samples), out / "comparison.png")
    print(f"written: {out / 'report.json'} and {out / 'comparison.png'}")
    (out / PICTURE).unlink(missing_ok=True)  # an earlier judge's
    if run.plot and draw_judgement(out / PICTURE, named, heldout, samples):
        print(f"written: {out / PICTURE}")


if __name__ == "__main__":
    dist_util.run_main(main)
