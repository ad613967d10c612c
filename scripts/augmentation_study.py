"""Do generated images help a classifier that has few real ones? Beside duplicates, shifted and masked copies.

    python scripts/augmentation_study.py --real_dir data/train --heldout_dir data/test --samples samples_248x64x64x3.npz

Trains up to seven small user classifiers for each k of --ks and each seed, on the CPU (15 s and more each), and lets
them name held-out real images. Prints the table and the verdict; writes study.json, study.csv and, with matplotlib
(pip install "guided_diffusion_vae[plots]"), study.png.
"""

from pathlib import Path

from evaluations.augmentation import AugmentationConfig, augmentation_study
from evaluations.image_sets import beside, read_sets
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run


def main(argv=None):
    run = parse_run(create_argparser(AugmentationConfig, description=__doc__), argv)
    if run.dry_run:
        print(run)
        return
    train, heldout, samples = read_sets(run)
    study = augmentation_study(
        train,
        heldout,
        samples,
        ks=run.section(AugmentationConfig).counts,
        per_user=run.generated_per_user,
        seeds=run.seeds,
        epochs=run.epochs,
        steps=run.steps,
        augmented=run.augment,
        seed=run.seed,
        progress=True,
    )
    print(study)
    out = Path(run.out_dir or beside(run.samples, "augmentation"))
    written = study.save(out)
    if study.plot(out / "study.png"):
        written.append(out / "study.png")
    else:
        print('no study.png without matplotlib: pip install "guided_diffusion_vae[plots]"')
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    dist_util.run_main(main)
