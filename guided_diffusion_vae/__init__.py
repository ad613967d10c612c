"""guided-diffusion on VAE latents: the map of the house.

A spectrogram x becomes a latent z through an autoencoder; a process mixes z with noise and asks a network to undo it;
walking back and decoding gives new spectrograms.

ground        config, logger, dist_util, checkpoint, run_state, run_record
maths         nn, losses, gaussian_diffusion, respace, resample; flow_matching
networks      unet, fp16_util, model_flags; dit
autoencoders  autoencoders.base, .conv (plain VAEs), .kl (the LDM family), .layouts (their files), .objectives with
              .perceptual, .adversarial, .foundation (their losses), .ldm_config (upstream's YAML)
              vae_wrapper: pixels <-> latents, the owner of the scale
data          data.microdoppler, data.gait, data.spectrogram, data.image_folder, data.plain_datasets, data.vae_data,
              image_datasets
loops         train_util, sample_util; vae_tasks, vae_train_util, vae_infer_util
the hall      script_util: defaults, create_*

Arrows point down only: a room may import from its own floor or a lower one (tests/test_architecture.py).
"""
