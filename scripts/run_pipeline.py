"""Everything in one command: extract latents, train, sample every user, judge. Run again, it goes on where it was.

    python scripts/run_pipeline.py --config configs/dit_demo.yaml --data_dir DATA/train --val_dir DATA/val \\
        --heldout_dir DATA/test --out_dir runs/dit --processes 2

Prints each stage's command, to be repeated by hand. `--dry_run True` prints them and the estimate of training.
"""

from dataclasses import replace
from pathlib import Path

from guided_diffusion_vae import dist_util, pipeline
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SamplerConfig, create_process, create_sampler, try_settings
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.data.image_folder import list_images
from guided_diffusion_vae.data.latent_extract import ExtractConfig
from guided_diffusion_vae.guidance import GuidanceConfig, guide
from guided_diffusion_vae.image_datasets import DataConfig, check_classes, speaking_of
from guided_diffusion_vae.pipeline import PipelineConfig, average, digest, flags, samples_file
from guided_diffusion_vae.stages import Stage, python, run_stages, shown
from guided_diffusion_vae.train_config import TrainConfig
from guided_diffusion_vae.vae_wrapper import PIXEL, STATS, VAEConfig, load_vae

TRAINING = (TrainConfig, DataConfig, *NETWORK_SECTIONS, VAEConfig)
SAMPLING = (SamplerConfig, GuidanceConfig)


def main(argv=None):
    run = parse_run(create_argparser(PipelineConfig, *SAMPLING, *TRAINING, description=__doc__), argv)
    pipeline.refuse_unfit(run)
    print(run)
    stages = [training(run), sampling(run)]
    if run.vae_path != PIXEL:
        stages.insert(0, extraction(run))
    if run.heldout_dir or run.val_dir:
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
    command = python("latent_extract.py", own, flags(run, ExtractConfig, VAEConfig), processes=run.processes)
    reads = run.data_dir, run.val_dir, run.vae_path
    made = pipeline.latents_of(run)[0] / STATS
    return Stage(name="extract", command=lambda: command, inputs=lambda: [*map(digest, reads)], made=lambda: made)


def training_words(run):
    train, val = (run.data_dir, run.val_dir) if run.vae_path == PIXEL else pipeline.latents_of(run)
    own = {"data_dir": train, "val_dir": val or None, "log_dir": Path(run.out_dir, "train")}
    return own | {"batch_size": run.batch_size, "resume_checkpoint": "auto"}, flags(run, *TRAINING)


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
        return python("image_sample_vae.py", words, flags(run, *SAMPLING), processes=run.processes)

    about = {"made": lambda: samples_file(run), "clears": folder / "png"}
    return Stage(name="sample", command=command, inputs=lambda: [digest(average(run))], **about)


def judging(run) -> Stage:
    heldout, out = run.heldout_dir or run.val_dir, Path(run.out_dir, "report")
    own = {"real_dir": run.data_dir, "heldout_dir": heldout, "out_dir": out, "seed": run.seed}

    def command():
        return python("evaluate_samples.py", {**own, "samples": samples_file(run)})

    reads = lambda: [digest(place) for place in (samples_file(run), run.data_dir, heldout)]  # noqa: E731
    return Stage(name="judge", command=command, inputs=reads, made=lambda: out / "report.json")


def look_ahead(run) -> None:
    """Find out now what would stop a later stage; nothing is written yet."""
    for flag in ("data_dir", "val_dir", "heldout_dir"):
        if getattr(run, flag):
            with speaking_of(f"--{flag}"):
                images = list_images(getattr(run, flag))
                if flag == "data_dir" and run.class_cond:
                    check_classes(images, run.data_dir)
    vae = load_vae(replace(run.section(VAEConfig), latent_norm=False), default_scale=1.0)  # only its shape counts
    model, process = try_settings(run, vae), create_process(run, vae)
    create_sampler(run.section(SamplerConfig), process)
    guide(model, process, run.section(GuidanceConfig))
    pipeline.refuse_other_training(run, (*NETWORK_SECTIONS, VAEConfig))


if __name__ == "__main__":
    dist_util.run_main(main)
