"""Everything in one command: extract latents, train, sample every user, judge. Run again, it goes on where it was.

    python scripts/run_pipeline.py --config configs/dit_demo.yaml --data_dir DATA/train --val_dir DATA/val \\
        --heldout_dir DATA/test --out_dir runs/dit --processes 2

Prints each stage's command, to be repeated by hand. `--dry_run True` prints them and the estimate of training.
"""

from pathlib import Path

from evaluations.image_sets import read_real
from evaluations.measure import refuse_too_few
from guided_diffusion_vae import dist_util, pipeline
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SAMPLING
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.latent_extract import ExtractConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.pipeline import PipelineConfig, average, digest, flags, judged_by, samples_file
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.sample_util import OF_SAMPLES
from guided_diffusion_vae.stages import Stage, python, run_stages, shown
from guided_diffusion_vae.train_config import TrainConfig
from guided_diffusion_vae.vae_wrapper import PIXEL, STATS, VAEConfig

TRAINING = (TrainConfig, DataConfig, *NETWORK_SECTIONS, VAEConfig)


def main(argv=None):
    run = parse_run(create_argparser(PipelineConfig, PlotConfig, *SAMPLING, *TRAINING, description=__doc__), argv)
    pipeline.refuse_unfit(run)
    print(run)
    stages = [training(run), sampling(run)]
    if run.vae_path != PIXEL:
        stages.insert(0, extraction(run))
    if judged_by(run):
        stages.append(judging(run))
    else:
        print("no --heldout_dir and no --val_dir: nothing to judge by, so there will be no report")
    if run.dry_run:
        print("\n".join(f"\n== {stage.name}: {shown(stage.command())}" for stage in stages), flush=True)
        return pipeline.estimate(python("image_train_vae.py", *training_words(run)), run)
    look_ahead(run)
    run_stages(stages, Path(run.out_dir), say=lambda line: print(f"\n== {line}", flush=True))
    print("\nmade: " + ", ".join(str(stage.made()) for stage in stages))


def extraction(run) -> Stage:
    own = {"data_dir": run.data_dir, "val_dir": run.val_dir or None, "out_dir": Path(run.out_dir, "latents")}
    own |= {"with_flips": run.random_flip or None, "batch_size": None}  # --batch_size is training's
    given = flags(run, ExtractConfig, VAEConfig, PlotConfig)
    command = python("latent_extract.py", own, given, processes=run.processes)
    reads = lambda: [digest(run.data_dir), digest(run.val_dir), pipeline.digest_autoencoder(run.vae_path)]  # noqa: E731
    made = pipeline.latents_of(run)[0] / STATS
    about = {"made": lambda: made, "whole": lambda: pipeline.latents_are_whole(run)}
    return Stage(name="extract", command=lambda: command, inputs=reads, **about)


def training_words(run):
    train, val = (run.data_dir, run.val_dir) if run.vae_path == PIXEL else pipeline.latents_of(run)
    own = {"data_dir": train, "val_dir": val or None, "log_dir": Path(run.out_dir, "train")}
    return own | {"batch_size": run.batch_size, "resume_checkpoint": "auto"}, flags(run, *TRAINING, PlotConfig)


def training(run) -> Stage:
    own, given = training_words(run)
    command = python("image_train_vae.py", own, given, processes=run.processes)
    about = {"made": lambda: average(run), "goes_on": own["log_dir"]}
    return Stage(name="train", command=lambda: command, inputs=lambda: [digest(own["data_dir"], times=False)], **about)


def sampling(run) -> Stage:
    folder, how_many = Path(run.out_dir, "samples"), "num_samples_per_user" if run.class_cond else "num_samples"
    own = {"log_dir": folder, "batch_size": run.sample_batch_size, "users": "all" if run.class_cond else None}
    own |= {how_many: run.num_samples_per_user, "seed": run.seed, "per_image_seed": True}

    def command():
        words = {"model_path": average(run), **own}
        return python("image_sample_vae.py", words, flags(run, *SAMPLING, PlotConfig), processes=run.processes)

    about = {"made": lambda: samples_file(run), "clears": tuple(folder / name for name in OF_SAMPLES)}
    record = Path(run.out_dir, "train", "run.yaml")  # which may name another decoder now
    reads = lambda: [digest(average(run)), digest(record), pipeline.digest_autoencoder(run.vae_path)]  # noqa: E731
    return Stage(name="sample", command=command, inputs=reads, **about)


def judging(run) -> Stage:
    heldout, out = getattr(run, judged_by(run)), Path(run.out_dir, "report")
    own = {"real_dir": run.data_dir, "heldout_dir": heldout, "out_dir": out, "seed": run.seed}
    own |= {"skip_bad_images": run.skip_bad_images or None}

    def command():
        return python("evaluate_samples.py", {**own, "samples": samples_file(run)}, flags(run, PlotConfig))

    reads = lambda: [digest(place) for place in (samples_file(run), run.data_dir, heldout)]  # noqa: E731
    return Stage(name="judge", command=command, inputs=reads, made=lambda: out / "report.json")


def look_ahead(run) -> None:
    """Find out now what would stop a later stage; nothing is written yet."""
    samples, size = pipeline.try_folders(run), (run.image_size, run.image_size)
    pipeline.try_sampling(run)
    pipeline.refuse_other_training(run, (*NETWORK_SECTIONS, VAEConfig))
    if judged_by(run):
        with pipeline.speaking_of_judging(run):
            how = {"skip_bad_images": run.skip_bad_images, "say": lambda line: None}  # the stages will say it
            refuse_too_few(*read_real(run.data_dir, getattr(run, judged_by(run)), size, **how), samples)


if __name__ == "__main__":
    dist_util.run_main(main)
