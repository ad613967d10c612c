"""A model around a model: what a process sees as one network can be two predictions, one pushed away from the other.

Classifier-free guidance (Ho and Salimans 2022) asks the same network with the label and with none:

    out = none + scale (conditional - none),      scale 1 is no guidance, above 1 exaggerates what the label changes

It may act on a part of the path only (Kynkäänniemi et al. 2024) and, for published numbers' sake, on a part of the
channels: DiT and LightningDiT guide the first three, whatever the latent has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from .config import UserError

CHANNELS = {"all": None, "first3": 3, "first4": 4}  # how many of the latent's channels are guided


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance."""

    cfg_scale: float = 1.0  # how much the label counts: 1 = no guidance
    cfg_interval: str = "0,1"  # guide on this part of the path only: 0 is noise, 1 is data; one number: from there on
    cfg_channels: str = "all"  # of the latent: all; first3 (what DiT and LightningDiT published with) or first4

    def __post_init__(self):
        if not math.isfinite(self.cfg_scale):
            raise UserError(f"--cfg_scale is {self.cfg_scale}; it must be a number, 1 for no guidance")
        if self.cfg_channels not in CHANNELS:
            raise UserError(f"--cfg_channels is {self.cfg_channels!r}; choose {', '.join(CHANNELS)}")
        self.interval  # noqa: B018  (reads it, to complain now)

    @property
    def interval(self) -> tuple[float, float]:
        """The guided part of the path."""
        try:
            words = [float(word) for word in self.cfg_interval.split(",")]
            low, high = words if len(words) == 2 else (*words, 1.0)
        except ValueError as error:
            raise UserError(
                f"--cfg_interval is {self.cfg_interval!r}; give one number or two, such as 0.1 or 0.1,0.9"
            ) from error
        if not 0 <= low < high <= 1:
            raise UserError(f"--cfg_interval is {self.cfg_interval!r}; it must rise, between 0 (noise) and 1 (data)")
        return low, high


class GuidedModel:
    """(x_t, t, y) -> the guided prediction; outside the interval the conditional one, at half the cost.

    Args:
        model: has a `null_label`; predicts the C channels of x_t, and perhaps as many more, which are not guided.
        place_on_path: of the process: the times that the model sees -> places in [0, 1], 0 is noise.
    Raises:
        UserError: the model has no null label.
    """

    def __init__(
        self,
        model: Callable[..., th.Tensor],
        *,
        scale: float,
        place_on_path: Callable[[th.Tensor], th.Tensor],
        interval: tuple[float, float] = (0.0, 1.0),
        channels: str = "all",
    ):
        self.model, self.scale, self.place_on_path = model, scale, place_on_path
        self.interval, self.channels, self.null_label = interval, CHANNELS[channels], model.null_label

    def __call__(self, x: th.Tensor, t: th.Tensor, y: th.Tensor, **kwargs) -> th.Tensor:
        inside = self._inside(t)
        if not inside.any():
            return self.model(x, t, y, **kwargs)
        labels = th.cat([y, th.full_like(y, self.null_label)])
        out = self.model(th.cat([x, x]), th.cat([t, t]), labels, **kwargs)
        cond, none = out.chunk(2)
        guided = min(self.channels or x.shape[1], x.shape[1])
        scale = th.where(inside, self.scale, 1.0).to(out.dtype).view(-1, *[1] * (x.ndim - 1))
        pushed = none[:, :guided] + scale * (cond[:, :guided] - none[:, :guided])
        return th.cat([pushed, cond[:, guided:]], dim=1)

    def _inside(self, t):
        low, high = self.interval
        place = self.place_on_path(t.float())
        return (low <= place) & (place <= high)


def guide(model, process, config: GuidanceConfig):
    """The model as the flags want it guided; the model itself where `--cfg_scale` is 1.

    Raises:
        UserError: see `GuidedModel`.
    """
    if config.cfg_scale == 1:
        return model
    return GuidedModel(
        model,
        scale=config.cfg_scale,
        place_on_path=process.place_on_path,
        interval=config.interval,
        channels=config.cfg_channels,
    )
