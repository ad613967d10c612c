"""guided-diffusion on VAE latents: the map of the house.

A spectrogram x becomes a latent z through an autoencoder; a process mixes z with noise and asks a network to undo it;
walking back and decoding gives new spectrograms.

ground        config, logger on log_formats, dist_util, checkpoint, folder_lock, run_state, run_record, stop_signals;
              quick_help
maths         nn, losses, gaussian_diffusion, respace, resample; flow_matching; guidance (a model around a model)
networks      unet, fp16_util, model_flags; dit
autoencoders  autoencoders.base, .conv (plain VAEs), .kl (the LDM family), .layouts (their files), .objectives with
              .perceptual, .adversarial, .foundation (their losses), .ldm_config (upstream's YAML)
              vae_wrapper: pixels <-> latents, the owner of the scale; latent_transport: towards generated latents
data          data.microdoppler, data.gait, data.spectrogram, data.image_folder, data.plain_datasets, data.vae_data,
              data.radar_files, .radar_sessions, .radar_import: recordings of one's own radar
              data.stream (order and noise of a step), data.latent_cache, data.latent_shards and .latent_extract,
              image_datasets
loops         train_util with train_config, validation, posthoc_ema and sharding; sample_util; estimate
              vae_tasks, vae_train_util, vae_infer_util; plotting, curves, pictures: what --plot True draws
the hall      script_util: upstream's defaults and create_*; assembly: every network, process and sampler from flags;
              trained: a model again, compiling: faster; guides: a weaker network, a classifier; noised_classifier
              generation: all of them at work; api: the same from Python
              diffusers_export and _import, on diffusers_unet, _dit, _process, _card: folders of diffusers, and back
              pipeline, stages: the scripts one after the other
              cli: the command gdvae, each script under a short name; doctor, on machine_facts: what is broken here

Arrows point down only: a room may import from its own floor or a lower one (tests/test_architecture.py).
"""

import sys

from .quick_help import install, is_help

__version__ = "0.1.0"  # setup.py and the newest part of CHANGELOG.md follow it

if is_help(sys.argv):
    install()
