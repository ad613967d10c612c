"""Everything in one command: extract latents, train, sample every user, judge. Run again, it goes on where it was.

    python scripts/run_pipeline.py --config configs/dit_demo.yaml --data_dir DATA/train --val_dir DATA/val \\
        --heldout_dir DATA/test --out_dir runs/dit --processes 2

Prints each stage's command, to be repeated by hand. `--dry_run True` prints them and the estimate of training.
"""

from pathlib import Path

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.assembly import NETWORK_SECTIONS, SamplerConfig
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.data.latent_extract import ExtractConfig
from guided_diffusion_vae.guidance import GuidanceConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.pipeline import PipelineConfig, Stage, flags, python, run_stages, shown, trained_average
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.vae_wrapper import PIXEL, STATS, VAEConfig

TRAINING = (TrainConfig, DataConfig, *NETWORK_SECTIONS, VAEConfig)
SAMPLING = (SamplerConfig, GuidanceConfig)
OWN = {"data_dir", "val_dir", "out_dir", "log_dir", "resume_checkpoint", "batch_size"}  # what a stage is told anew


def main(argv=None):
    run = parse_run(create_argparser(PipelineConfig, *SAMPLING, *TRAINING, description=__doc__), argv)
    print(run)
    if not run.data_dir:
        raise UserError("--data_dir is empty; give a folder of images, with a subfolder for each user")
    stages = plan(run)
    if run.dry_run:
        training = stages[-3].command()
        print(shown(training))
        return
    run_stages(stages, Path(run.out_dir), say=lambda line: print(f"\n== {line}", flush=True))
    print(f"\nspectrograms: {run.out_dir}/samples/grid.png\nreport:       {run.out_dir}/report")


def plan(run) -> list[Stage]:
    """The stages, in order."""
    out, many = Path(run.out_dir), run.processes
    latents = out / "latents"
    train, val = (run.data_dir, run.val_dir)
    stages = []
    if run.vae_path != PIXEL:
        words = ["--data_dir", run.data_dir, *(["--val_dir", run.val_dir] if run.val_dir else []), "--out_dir", latents]
        words += without(flags(run, ExtractConfig, VAEConfig))
        stages.append(Stage("extract", lambda: python("latent_extract.py", *words, processes=many)))
        train = latents / "train" if run.val_dir else latents
        val = latents / "val" if run.val_dir else ""

    def training():
        where = ["--data_dir", train, *(["--val_dir", val] if val else []), "--log_dir", out / "train"]
        size = ["--batch_size", run.batch_size, "--resume_checkpoint", "auto"]
        return python("image_train_vae.py", *where, *size, *without(flags(run, *TRAINING)), processes=many)

    def sampling():
        model = ["--model_path", trained_average(out / "train", best=run.keep_best), "--log_dir", out / "samples"]
        users = ["--users", "all", "--num_samples_per_user"] if run.class_cond else ["--num_samples"]
        size = [run.num_samples_per_user, "--batch_size", run.sample_batch_size, "--per_image_seed", True]
        return python("image_sample_vae.py", *model, *users, *size, *flags(run, *SAMPLING), processes=many)

    def judging():
        (samples,) = (out / "samples").glob("samples_*.npz")
        where = ["--real_dir", run.data_dir, "--heldout_dir", run.heldout_dir or run.val_dir]
        return python("evaluate_samples.py", *where, "--samples", samples, "--out_dir", out / "report")

    stages.append(Stage("train", training, lambda: Path(train) / STATS))
    stages.append(Stage("sample", sampling, lambda: trained_average(out / "train", best=run.keep_best)))
    if run.heldout_dir or run.val_dir:
        stages.append(Stage("judge", judging, lambda: next((out / "samples").glob("samples_*.npz"), None)))
    else:
        print("no --heldout_dir and no --val_dir: nothing to judge by, so there will be no report")
    return stages


def without(words: list[str]) -> list[str]:
    """A command's words without the flags that the pipeline sets itself."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for flag, value in pairs if flag.removeprefix("--") not in OWN for word in (flag, value)]


if __name__ == "__main__":
    dist_util.run_main(main)
