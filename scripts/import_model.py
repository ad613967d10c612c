"""Make a run of a pipeline that diffusers, or export_model.py, wrote: to sample from, or to go on training.

    python scripts/import_model.py --pipeline exported --out_dir runs/imported
    python scripts/image_sample_vae.py --model_path runs/imported/model.pt --num_samples 16
    python scripts/image_train_vae.py --config runs/imported/finetune.yaml --resume_checkpoint runs/imported/model.pt \\
        --data_dir DATA/train --log_dir runs/finetuned

Reads safetensors only and runs no code of the folder. Of other people's pipelines it takes a UNet2DModel that computes
what ADM's U-Net does, in pixels or with an AutoencoderKL; any other is refused with what differs.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.diffusers_import import MODEL, ImportConfig, import_pipeline
from guided_diffusion_vae.trained import how_to_sample


def main(argv=None):
    run = parse_run(create_argparser(ImportConfig, description=__doc__), argv)
    print(run)
    if run.dry_run:
        return
    print(import_pipeline(run.section(ImportConfig)))
    print(how_to_sample(f"{run.out_dir}/{MODEL}"))


if __name__ == "__main__":
    dist_util.run_main(main)
