"""A discriminator that judges patches, its losses, and how strongly it may pull (Isola et al. 2017, Esser et al. 2021).

The discriminator D gives one logit for each overlapping patch (70 x 70 pixels at three layers). It learns

    hinge:    1/2 (mean relu(1 - D(x)) + mean relu(1 + D(x^)))
    vanilla:  1/2 (mean softplus(-D(x)) + mean softplus(D(x^)))

and the autoencoder learns -mean D(x^), weighted such that at one layer both terms pull equally hard:

    w = clamp(|grad reference| / (|grad term| + eps), 0, maximum)                       (Esser et al. 2021, equation 7)
"""

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from ..config import UserError


class PatchDiscriminator(nn.Module):
    """Images (N, in_channels, H, W) -> logits (N, 1, h, w); 256 x 256 pixels give 30 x 30 logits at three layers.

    Args:
        ndf: width of the first layer; it doubles with each layer up to 8 times.
        n_layers: how many times the size is halved.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        for i in range(n_layers):
            stride = 2 if i < n_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),  # the norm has one
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(initialize)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.main(x)


def initialize(layer: nn.Module) -> None:
    """Convolutions from N(0, 0.02^2); batch norm's weights from N(1, 0.02^2), biases 0 (Radford et al. 2016)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def hinge_d_loss(real: th.Tensor, fake: th.Tensor) -> th.Tensor:
    """The discriminator's loss from its logits of real and of made images: 0 once they are beyond 1 and -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_d_loss(real: th.Tensor, fake: th.Tensor) -> th.Tensor:
    """Half the cross-entropy of telling real from made (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def generator_loss(fake: th.Tensor) -> th.Tensor:
    """What the autoencoder lowers: minus the mean logit of its images."""
    return -fake.mean()


def adaptive_weight(
    reference: th.Tensor, term: th.Tensor, parameter: th.Tensor, maximum: float, eps: float = 1e-4
) -> th.Tensor:
    """The weight with which `term` pulls at `parameter` as hard as `reference` does; carries no gradient.

    Args:
        reference, term: scalars whose graphs hold `parameter`; both graphs are kept.
        maximum: of the weight.
    Raises:
        UserError: in fp16, where the gradient of a loss that is a sum over the image is infinite.
    """
    device = parameter.device.type
    autocast = th.get_autocast_dtype(device) if th.is_autocast_enabled(device) else None
    if th.float16 in (reference.dtype, term.dtype, parameter.dtype, autocast):
        raise UserError(
            "the adaptive weights cannot be found in fp16: gradients of a loss summed over the image overflow 65504;"
            " train in bf16 or float32, or with --disc_factor 0 and --adaptive_vf False"
        )
    wanted, given = (th.autograd.grad(loss, parameter, retain_graph=True)[0].norm() for loss in (reference, term))
    return (wanted / (given + eps)).clamp(0, maximum).detach()
