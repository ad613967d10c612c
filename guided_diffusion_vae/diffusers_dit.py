"""LightningDiT as a component of a diffusers pipeline, called as `UNet2DModel` is.

diffusers has no network of this kind, so its pipelines run where guided_diffusion_vae is installed.
"""

from typing import Any

import torch as th
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from .dit import LightningDiT


class LightningDiTModel(ModelMixin, ConfigMixin):
    """(sample, timestep, class_labels) -> prediction; the network is in `network`, under its own keys.

    Args:
        sample_size, in_channels: of the latents; options: the other arguments of `LightningDiT`.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, options: dict[str, Any]):
        super().__init__()
        self.network = LightningDiT(input_size=sample_size, in_channels=in_channels, **options)

    def forward(
        self, sample: th.Tensor, timestep: th.Tensor, class_labels: th.Tensor | None = None, return_dict: bool = True
    ):
        """Predict; `timestep` is one for all or (N,), in the network's own units."""
        times = th.as_tensor(timestep, device=sample.device).expand(len(sample))
        out = self.network(sample, times, class_labels)
        return UNet2DOutput(sample=out) if return_dict else (out,)
