"""Sample images from a trained model: an .npz for the evaluator, PNGs and a grid for each user, and a manifest.

    python scripts/image_sample_vae.py --model_path runs/train --users all --num_samples_per_user 10
    python scripts/image_sample_vae.py --model_path runs/dit/ema_0.999_020000.pt --user_ids 1 2 3 \\
        --num_samples_per_user 4 --cfg_scale 4.0 --num_steps 250

Only --model_path is needed, a checkpoint or a training's folder: run.yaml beside the checkpoint supplies the rest.
`--dry_run True` tells the time. Also started by mpiexec, torchrun, srun.
"""

import shlex
import time
from dataclasses import fields
from pathlib import Path

from guided_diffusion_vae import assembly, dist_util, logger
from guided_diffusion_vae.assembly import SamplerConfig
from guided_diffusion_vae.checkpoint import digest
from guided_diffusion_vae.estimate import duration
from guided_diffusion_vae.generation import prepare, read_flags, rehearse
from guided_diffusion_vae.guidance import GuidanceConfig
from guided_diffusion_vae.guides import digests
from guided_diffusion_vae.pictures import WatchedSampler, axes_of_run, draw_samples
from guided_diffusion_vae.plotting import PlotConfig
from guided_diffusion_vae.sample_util import (
    PngWriter,
    SamplingConfig,
    join,
    refuse_other_samples,
    remove_old_samples,
    save_grids,
    save_manifest,
    save_samples,
)
from guided_diffusion_vae.stages import words_of
from guided_diffusion_vae.trained import open_model, results_folder

RECORDED = ("seed", "per_image_seed", "network", "process", "sampler", "use_ddim", "num_steps", "spacing", "compile")
RECORDED += ("timestep_respacing", *(field.name for field in fields(GuidanceConfig)), "model_path")
SAME_IMAGES = {"model_path", "log_dir", "save_png", "save_latents", "plot"}  # flags that change none


def main(argv=None):
    run, record = read_flags(argv, __doc__, PlotConfig)
    if dist_util.rank() == 0:
        print(run)
    dist_util.setup_dist()
    if run.dry_run:
        return dist_util.print_comment(rehearse(run, open_model(run, record)))
    folder, command = Path(results_folder(run, "samples")).expanduser(), shown_command(run)
    model = dist_util.rank0_first(lambda: digest(run.model_path))
    dist_util.rank0_first(lambda: refuse_other_samples(folder, command, model))
    logger.configure(dir=str(folder))
    if ignored := assembly.ignored_in_sampling(run):
        logger.warn(f"without effect: {', '.join(ignored)}")

    logger.log("creating model and diffusion...")
    ready = prepare(run, open_model(run, record))
    watched = None
    if run.plot and dist_util.rank() == 0:
        how = {"clip_denoised": run.clip_denoised, "cond_fn": ready.guided.cond_fn}
        watched = WatchedSampler(ready.sampler, ready.process, **how)
        ready = ready._replace(sampler=watched)

    logger.log("sampling...")
    batches, files, begin = [], [], time.monotonic()
    count, png = run.section(SamplingConfig).count(ready.class_names), PngWriter(folder / "png", ready.class_names)
    for batch in ready.batches(run, progress=True):
        if dist_util.rank() == 0 and not batches:  # only now: a command that cannot sample must not cost the old ones
            remove_old_samples(folder)
        if dist_util.rank() == 0 and run.save_png:
            files += [f"png/{name}" for name in png.write(batch)]
        batches.append(batch)
        done = sum(len(batch.pixels) for batch in batches)
        rate = done / (time.monotonic() - begin)
        left = f", {duration((count - done) / rate)} to go" if done < count else ""
        logger.log(f"created {done} samples of {count}, {rate:.3g} a second{left}")

    if dist_util.rank() == 0:
        everything = join(batches)
        logger.log(f"saving to {save_samples(folder, everything, ready.vae)}")
        save_grids(folder, everything, ready.class_names)
        about = {name: getattr(run, name) for name in RECORDED} | {"command": command}
        about |= assembly.walk_of(run.section(SamplerConfig), ready.process)
        about |= {"model_sha256": model, **digests(run), **ready.vae.fingerprints}
        save_manifest(folder, files, everything, ready.class_names, about)
        if watched:
            axes = axes_of_run(run.model_path)
            draw_samples(folder, everything, ready.class_names, axes, watched, ready.vae, logger.log)
    logger.log("sampling complete")


def shown_command(run) -> str:
    """The flags that decide what is drawn, for the manifest, which names the model besides."""
    return shlex.join(words_of({name: getattr(run, name) for name in sorted(run.given - SAME_IMAGES)})) or "defaults"


if __name__ == "__main__":
    dist_util.run_main(main)
