"""A pipeline for radar spectrograms of chosen people; it needs torch and diffusers.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipe(users=[3, 7], num_images=4).images

Written by guided_diffusion_vae's export_model.py.
"""

import inspect
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class SpectrogramPipeline(DiffusionPipeline):
    """Noise to images: a network undoes the noise step by step, an autoencoder decodes.

    Args:
        unet, transformer: the network; one of them.
        vae: an AutoencoderKL; None where the network makes pixels.
        class_names: the users, in the order of the labels; None if the network knows none.
        null_label: the label that stands for nobody; None if there is none, and so no guidance.
        flow: the network predicts data - noise, at a time that is 0 for noise and 1 for data.
        time_scale: the network sees time times this.
        training: how it was made, for whoever reads it; not used.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]

    def __init__(
        self,
        scheduler,
        unet=None,
        transformer=None,
        vae=None,
        class_names=None,
        null_label=None,
        flow=False,
        time_scale=1.0,
        training=None,
    ):
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        about = {"class_names": class_names, "null_label": null_label, "flow": flow, "time_scale": time_scale}
        self.register_to_config(**about, training=training)
        self.class_names, self.null_label, self.flow, self.time_scale = class_names, null_label, flow, time_scale

    @torch.no_grad()
    def __call__(
        self,
        users=None,
        num_images=1,
        num_steps=50,
        guidance_scale=1.0,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draw images.

        Args:
            users: one or more, by number (7 is the name that ends in 7) or by name; None if the network knows none.
            num_images: of each user.
            num_steps: how often the network is asked.
            guidance_scale: above 1 exaggerates what tells the users apart; 1 is none, and half the time.
            generator: a torch.Generator, for the same images again.
            latents: the noise to begin with, (N, C, h, w).
            output_type: "pil"; "np": (N, H, W, 3) in [0, 1]; "latent": as the network made them.
        Returns:
            An object with `images`, user by user.
        """
        network = self.unet if self.unet is not None else self.transformer
        labels = self._labels(users, num_images)
        if guidance_scale != 1 and (labels is None or self.null_label is None):
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but this network was not trained for it: leave it out"
            )
        device, size = self._execution_device, network.config.sample_size
        shape = (num_images if labels is None else len(labels), network.config.in_channels, size, size)
        y = None if labels is None else torch.tensor(labels, device=device)
        x = randn_tensor(shape, generator, device, network.dtype) if latents is None else latents
        times = self._times(num_steps, device)  # first: the size of the first noise may depend on it
        show: Any = self.progress_bar
        x = x.to(device, network.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in show(times):
            scaled = x if self.flow else self.scheduler.scale_model_input(x, t)
            prediction = self._predict(network, scaled, t, y, guidance_scale)
            x = self.scheduler.step(prediction, t, x, **self._step_options(generator)).prev_sample
        images: Any = x if output_type == "latent" else self._finish(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, num_steps, device):
        if self.flow:  # even steps all the way from noise to data
            self.scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)
        return self.scheduler.timesteps

    def _predict(self, network, x, t, y, guidance_scale):
        """What the scheduler wants to know: the network's prediction, guided."""
        if self.flow:
            t = 1 - t / self.scheduler.config.num_train_timesteps
        t = t * self.time_scale if self.time_scale != 1 else t
        channels = x.shape[1]
        if guidance_scale == 1:
            out = network(x, t, class_labels=y).sample
        else:
            both = torch.cat([y, y.new_tensor([self.null_label]).expand_as(y)])
            out, nobody = network(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
            guided = nobody[:, :channels] + guidance_scale * (out[:, :channels] - nobody[:, :channels])
            out = torch.cat([guided, out[:, channels:]], dim=1)
        out = out if self._reads_variance() else out[:, :channels]
        return -out if self.flow else out

    def _reads_variance(self):
        """Whether the scheduler reads a learned variance, as DDPMScheduler does; DDIM's steps have none."""
        known = inspect.signature(type(self.scheduler).__init__).parameters
        return "variance_type" in known and str(self.scheduler.config.variance_type).startswith("learned")

    def _step_options(self, generator):
        known = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in known else {}
        if "use_clipped_model_output" in known and self.scheduler.config.clip_sample:
            options["use_clipped_model_output"] = True  # the direction that the clipped guess of the data implies
        return options

    def _finish(self, x, output_type):
        if self.vae is not None:
            config = self.vae.config
            if config.latents_mean and config.latents_std:
                mean, std = (x.new_tensor(part)[:, None, None] for part in (config.latents_mean, config.latents_std))
                x = x * std / config.scaling_factor + mean
            else:
                x = x / config.scaling_factor + (config.shift_factor or 0.0)
            x = self.vae.decode(x).sample
        x = x.float().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return ((x + 1) / 2).clamp(0, 1).numpy()
        pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)  # cut off, not rounded, as image_sample_vae.py does
        return self.numpy_to_pil(pixels.numpy() / 255)

    def _labels(self, users, num_images):
        """The label of every image; None if the network knows no users."""
        names = self.class_names
        if names is None:
            if users is not None:
                raise ValueError(f"users is {users!r}, but this network was trained without users: leave it out")
            return None
        if users is None:
            raise ValueError(f"users is not given; name one or more of {names[0]} to {names[-1]}, such as users=[0, 1]")
        users = [users] if isinstance(users, (int, str)) else users
        return [label for user in users for label in [self._label(user, names)] * num_images]

    @staticmethod
    def _label(user, names):
        if user in names:
            return names.index(user)
        ends = [re.search(r"(\d+)$", name) for name in names]
        found = [i for i, end in enumerate(ends) if end and str(user).isdecimal() and int(end[1]) == int(user)]
        if len(found) != 1:
            many = f", in which {' and '.join(names[i] for i in found[:2])} end: give the full name" if found else ""
            raise ValueError(f"users names {user!r}{many or f'; it knows {names[0]} to {names[-1]}'}")
        return found[0]
