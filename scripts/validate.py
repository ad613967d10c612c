"""Validate generated spectrograms: are they persons, the right ones, varied, possible, no copies, and of use?

    python scripts/validate.py --real_dir DATA/train --heldout_dir DATA/test --samples runs/one/samples

Asks everything that evaluate_samples.py asks in short, several times over and with intervals. No download: all judges
learn here from the real images. Prints the findings; writes report.html, report.json and pictures.
"""

from pathlib import Path

from evaluations.html import write_report
from evaluations.image_sets import beside, read_real, read_samples, renumber
from evaluations.sifting import Sifted, write_accept_list
from evaluations.validation import ValidationConfig, validate
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run


def main(argv=None):
    run = parse_run(create_argparser(ValidationConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    skip = {"skip_bad_images": run.skip_bad_images}
    samples = read_samples(run.samples, **skip)
    train, heldout = read_real(run.real_dir, run.heldout_dir, samples.pixels.shape[1:3], **skip)
    samples = renumber(samples, train.class_names, "--samples")

    sections = validate(train, heldout, samples, run.section(ValidationConfig), progress=True)
    out = Path(run.out_dir or beside(run.samples, "validation"))
    page = write_report(out, "Generated spectrograms, validated", list(sections.values()), run.as_dict())
    if "sifting" in sections:
        sifted = Sifted(*(sections["sifting"].data[key] for key in Sifted._fields))
        write_accept_list(out / "accepted.csv", samples.files or range(len(samples.pixels)), sifted)
    print(f"written: {page}, with report.json, pictures and the sifter's accepted.csv beside it")


if __name__ == "__main__":
    dist_util.run_main(main)
