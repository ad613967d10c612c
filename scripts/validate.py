"""Validate generated spectrograms: are they persons, the right ones, varied, possible, no copies, and of use?

    python scripts/validate.py --real_dir DATA/train --heldout_dir DATA/test --samples runs/one/samples

Asks everything that evaluate_samples.py asks in short, several times over and with intervals. No download: all judges
learn here from the real images. Prints which part begins, how far it is and what it found, and in the end a verdict on
each question; writes report.html, report.json, pictures and the sifter's accepted.csv, anew after every part.
"""

from functools import partial
from pathlib import Path

from evaluations.html import refuse_unwritable
from evaluations.image_sets import beside, read_sets
from evaluations.validation import ValidationConfig, validate, write_validation
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.plotting import PlotConfig


def main(argv=None):
    run = parse_run(create_argparser(ValidationConfig, PlotConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    out = Path(run.out_dir or beside(run.samples, "validation"))
    refuse_unwritable(out / "report.html", "--out_dir")
    train, heldout, samples = read_sets(run)
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def keep(sections):
        written[:] = write_validation(out, sections, samples, run.as_dict())

    say = partial(print, flush=True)  # also into a file, part by part
    about = {"progress": True, "keep": keep, "say": say, "plot": run.plot}
    validate(train, heldout, samples, run.section(ValidationConfig), **about)
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    dist_util.run_main(main)
