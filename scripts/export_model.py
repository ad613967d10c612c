"""Write a trained model as a folder that diffusers loads, with a model card.

    python scripts/export_model.py --model_path runs/train/ema_0.9999_010000.pt --out_dir exported --report SAMPLES

    pipe = diffusers.DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    pipe(users=[3, 7]).images

Only --model_path is needed: run.yaml beside the checkpoint supplies the rest. --report takes what evaluate_samples.py
or validate.py wrote; its numbers go into the card.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.assembly import SAMPLING
from guided_diffusion_vae.config import create_argparser
from guided_diffusion_vae.diffusers_card import names_in_short
from guided_diffusion_vae.diffusers_export import ExportConfig, export, refuse_used
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.run_record import read_run
from guided_diffusion_vae.sample_util import SamplingConfig
from guided_diffusion_vae.train_util import TrainConfig
from guided_diffusion_vae.trained import NETWORK, open_model, run_of_model


def main(argv=None):
    elsewhere = (DataConfig, TrainConfig, SamplingConfig, *SAMPLING)
    parser = create_argparser(ExportConfig, *NETWORK, description=__doc__, elsewhere=elsewhere)
    run, record = run_of_model(parser, argv)
    print(run)
    if run.dry_run:
        return
    refuse_used(run.out_dir)  # before anything is read
    run = run.replace(use_fp16=False)
    trained = open_model(run, record)
    settings, _ = read_run(run.model_path)
    export(trained, run, settings, record, run.section(ExportConfig))
    if run.class_cond:
        print(f"the folder names its users ({names_in_short(trained.class_names)}): may others read these names?")
    print(f"done: DiffusionPipeline.from_pretrained({run.out_dir!r}, trust_remote_code=True) loads it")


if __name__ == "__main__":
    dist_util.run_main(main)
