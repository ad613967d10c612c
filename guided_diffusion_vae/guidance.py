"""A model around a model: what a process sees as one network can be two predictions, one pushed away from the other.

    out = weak + scale (strong - weak),      scale 1 is the strong one, above 1 exaggerates what makes it better

Strong is the network with its label. Weak is, in classifier-free guidance (Ho and Salimans 2022), the same network with
the null label; in autoguidance (Karras et al. 2024) a weaker network with the same label. Either may act on a part of
the path only (Kynkäänniemi et al. 2024) and, for published numbers' sake, on a part of the channels: DiT and
LightningDiT guide the first three, whatever the latent has.

A classifier of noisy data guides without a second prediction: its gradient g = grad log p(y | x_t) is what the label
adds to the score, and so sigma^2 / alpha g what it adds to the guess of x_start (Dhariwal and Nichol 2021).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from .config import UserError

Model = Callable[..., th.Tensor]  # (x, t, y, **model_kwargs) -> prediction
DEAF = -4.0  # lambda below which no classifier is asked: alpha is 0.018 there
CHANNELS = {"all": None, "first3": 3, "first4": 4}  # how many of the latent's channels are guided


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Guidance: classifier-free, by a weaker network, by a classifier."""

    cfg_scale: float = 1.0  # how much the label counts: 1 = no guidance
    cfg_interval: str = "0,1"  # guide on this part of the path only: 0 is noise, 1 is data; one number: from there on
    cfg_channels: str = "all"  # of the latent: all; first3 (what DiT and LightningDiT published with) or first4
    cfg_rescale: float = 0.0  # undo so much of what guidance does to the prediction's spread: 0 = none, 1 = all of it
    autoguide_path: str = ""  # a weaker checkpoint to push away from, instead of --cfg_scale: earlier, or smaller
    autoguide_scale: float = 2.0  # how far from it: 1 = no guidance
    classifier_path: str = ""  # a classifier of noisy latents, whose gradient leads to the label
    classifier_scale: float = 1.0  # times this

    def __post_init__(self):
        for name in ("cfg_scale", "autoguide_scale", "classifier_scale"):
            if not math.isfinite(getattr(self, name)):
                none = 0 if name == "classifier_scale" else 1
                raise UserError(f"--{name} is {getattr(self, name)}; it must be a number, {none} for no guidance")
        if not 0 <= self.cfg_rescale <= 1:
            raise UserError(f"--cfg_rescale is {self.cfg_rescale}; it must be between 0 (off) and 1")
        if self.cfg_channels not in CHANNELS:
            raise UserError(f"--cfg_channels is {self.cfg_channels!r}; choose {', '.join(CHANNELS)}")
        if self.autoguide_path and self.cfg_scale != 1:
            raise UserError(
                f"--cfg_scale {self.cfg_scale} and --autoguide_path {self.autoguide_path} both choose what to push away"
                " from: give one of them"
            )
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

    @property
    def autoguided(self) -> bool:
        """Whether a weaker network is asked."""
        return bool(self.autoguide_path) and self.autoguide_scale != 1

    def unread(self) -> dict[str, str]:
        """The flags that the others make idle, each with what does."""
        found = {} if self.classifier_path else {"classifier_scale": "no --classifier_path"}
        if not self.autoguided:
            idle = ("autoguide_path", "--autoguide_scale 1"), ("autoguide_scale", "no --autoguide_path")
            found |= dict(idle[:1] if self.autoguide_path else idle[1:])
            if self.cfg_scale == 1:
                found |= dict.fromkeys(("cfg_interval", "cfg_channels", "cfg_rescale"), "--cfg_scale 1")
        return found


class GuidedModel:
    """(x_t, t, y) -> the guided prediction; outside the interval the strong one, at half the cost.

    Args:
        model: predicts the C channels of x_t, and perhaps as many more, which are not guided.
        place_on_path: of the process: the times that the model sees -> places in [0, 1], 0 is noise.
        rescale: phi of `_respread`.
        weaker: predicts the same as the model, of the same x_t, t and y; None: the model itself with its `null_label`.
    Raises:
        UserError: there is no weaker model, and the model has no null label.
    """

    def __init__(
        self,
        model: Model,
        *,
        scale: float,
        place_on_path: Callable[[th.Tensor], th.Tensor],
        interval: tuple[float, float] = (0.0, 1.0),
        channels: str = "all",
        rescale: float = 0.0,
        weaker: Model | None = None,
    ):
        self.model, self.scale, self.place_on_path = model, scale, place_on_path
        self.interval, self.channels, self.rescale, self.weaker = interval, CHANNELS[channels], rescale, weaker
        self.null_label = model.null_label if weaker is None else None

    def __call__(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None, **kwargs) -> th.Tensor:
        label = () if y is None else (y,)
        inside = self._inside(t)
        if not inside.any():
            return self.model(x, t, *label, **kwargs)
        if self.weaker is not None:
            strong, weak = (model(x, t, *label, **kwargs) for model in (self.model, self.weaker))
        else:
            assert y is not None and self.null_label is not None
            labels = th.cat([y, th.full_like(y, self.null_label)])
            strong, weak = self.model(th.cat([x, x]), th.cat([t, t]), labels, **kwargs).chunk(2)
        C = x.shape[1]
        guided = min(self.channels or C, C)
        scale = th.where(inside, self.scale, 1.0).to(strong.dtype).view(-1, *[1] * (x.ndim - 1))
        pushed = weak[:, :guided] + scale * (strong[:, :guided] - weak[:, :guided])
        pushed = th.cat([pushed, strong[:, guided:C]], dim=1)
        if self.rescale:
            pushed = _respread(pushed, strong[:, :C], self.rescale)
        return th.cat([pushed, strong[:, C:]], dim=1)

    def _inside(self, t):
        low, high = self.interval
        place = self.place_on_path(t.float())
        return (low <= place) & (place <= high)


def _respread(pushed, strong, phi):
    """phi std(strong) / std(pushed) pushed + (1 - phi) pushed, std of all numbers of one sample.

    Both are what the network predicts: noise, v, a velocity or x_start, as in Lin et al. 2024, equations 15 and 16
    (section 3.4), who had v. Only there: of another of the four, made from it, the spread will differ.
    """
    wanted, found = (_spread(out) for out in (strong, pushed))
    factor = th.where(found > 0, wanted / found, 1.0)
    return pushed * (phi * factor + 1 - phi).to(pushed.dtype)


def _spread(out):
    return out.to(_at_least_float32(out)).std(tuple(range(1, out.ndim)), correction=0, keepdim=True)


def _at_least_float32(x):
    return th.promote_types(x.dtype, th.float32)


def guide(model: Model, process, config: GuidanceConfig, weaker: Model | None = None) -> Model:
    """The model as the flags want it guided; the model itself where they want none.

    Args:
        weaker: what `--autoguide_path` names, for this process.
    Raises:
        UserError: see `GuidedModel`.
    """
    if not config.autoguided and config.cfg_scale == 1:
        return model
    assert config.autoguided == (weaker is not None), "autoguidance needs a weaker model"
    return GuidedModel(
        model,
        scale=config.autoguide_scale if config.autoguided else config.cfg_scale,
        place_on_path=process.place_on_path,
        interval=config.interval,
        channels=config.cfg_channels,
        rescale=config.cfg_rescale,
        weaker=weaker,
    )


class ClassifierGradient:
    """A cond_fn: (x_t, t, y) -> scale grad_x log softmax(classifier(x_t, t))[y], in float32 at least.

    Args:
        classifier: (x_t, t) -> logits (N, K), each sample's from that sample alone; in eval mode.
        heard: (t) -> bool (N,): elsewhere the gradient is 0, and no classifier is asked where it is for all. Deep in
            noise the true gradient falls with alpha, a trained one not below its errors, and what x_start is guessed
            to be divides by alpha. None is everywhere.
    Source: Dhariwal and Nichol 2021, section 4.
    """

    def __init__(self, classifier: Model, scale: float = 1.0, *, heard: Callable[[th.Tensor], th.Tensor] | None = None):
        self.classifier, self.scale, self.heard = classifier, scale, heard

    def __call__(self, x: th.Tensor, t: th.Tensor, y: th.Tensor, **kwargs) -> th.Tensor:
        x = x.detach().to(_at_least_float32(x))
        heard = th.ones_like(t, dtype=th.bool) if self.heard is None else self.heard(t)
        if not heard.any():
            return th.zeros_like(x)
        with th.enable_grad():
            x.requires_grad_()
            logits = self.classifier(x, t)
            log_probability = logits.to(_at_least_float32(logits)).log_softmax(1).gather(1, y[:, None])
            (gradient,) = th.autograd.grad(log_probability.sum(), x)
        return self.scale * gradient * heard.view(-1, *[1] * (x.ndim - 1))


class Unlabelled:
    """(x_t, t, y) -> what an unconditional model says, for there the label is the classifier's alone."""

    def __init__(self, model: Model):
        self.model = model

    def __call__(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None, **kwargs) -> th.Tensor:
        return self.model(x, t, **kwargs)
