"""What an autoencoder is trained to lower: reconstruction, KL, and where asked an adversarial and an alignment term.

With r = |x - x^| + w_p LPIPS(x, x^), where LPIPS counts at every pixel, sums over an image and means over the batch:

    nll = mean_n sum_chw (r / e^s + s)                     s = logvar = 0
    L   = nll + kl_weight KL + d_weight delta g + vf_weight L_vf
    g   = -mean D(x^);   delta = disc_factor from step disc_start on, 0 before
    L_vf = distmat_weight L_distance_matrix + cos_weight L_cosine

d_weight and vf_weight are found at each step, such that a term pulls at the last layer before it (the decoder's for g,
the encoder's for L_vf) as hard as nll does, times its own setting. Names are those of LDM's and VA-VAE's `lossconfig`
(Rombach et al. 2022, appendix G; Yao et al. 2025).
"""

from dataclasses import dataclass

import torch as th
import torch.nn as nn

from ..config import UserError, refuse_below
from ..fp16_util import TrainingDiverged
from .adversarial import D_LOSSES, PatchDiscriminator, adaptive_weight, generator_loss
from .base import Posterior
from .foundation import FoundationModel, load_foundation, load_timm, marginal_cosine, marginal_distance_matrix
from .perceptual import load_lpips

PIXEL_LOSSES = {
    "l1": lambda d: d.abs(),
    "l2": lambda d: d**2,
    "l1+l2": lambda d: d.abs() + d**2,
}
LARGEST_D_WEIGHT, LARGEST_VF_WEIGHT = 1e4, 1e8  # of the ratio of gradients; upstream's

Terms = dict[str, th.Tensor]  # what is logged: scalars without gradient, by upstream's names


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms of the objective and their weights."""

    pixel_loss: str = "l1"  # distance of pixels: l1, l2 or l1+l2
    perceptual_weight: float = 0.0  # of LPIPS, at every pixel; above 0 it needs --lpips_path
    lpips_path: str = ""  # VGG16 and LPIPS heads (vgg16-397923af.pth,vgg.pth), a folder with both, or one file
    kl_weight: float = 1e-6  # of the KL, which is summed over the latent
    pp_style: bool = False  # take the KL as a mean over the latent, times 2, as one of upstream's settings does
    disc_start: int = 2501  # updates before the discriminator counts; upstream's 5001 counts both optimisers' steps
    disc_factor: float = 0.0  # of both adversarial losses; 0 = no discriminator, upstream's is 1
    disc_weight: float = 0.5  # pull of the discriminator relative to that of the reconstruction
    disc_loss: str = "hinge"  # hinge or vanilla
    disc_num_layers: int = 3  # how often the discriminator halves the size
    disc_ndf: int = 64  # width of its first layer
    use_vf: str = "none"  # align latents with a vision foundation model: none, dinov2 or mae
    vf_path: str = ""  # its weights: transformers' folder, timm's file, or a VA-VAE training checkpoint
    vf_weight: float = 0.1  # pull of the alignment relative to that of the reconstruction
    adaptive_vf: bool = True  # False: --vf_weight is the factor itself, which a summed reconstruction dwarfs
    cos_margin: float = 0.0  # dissimilarity of latent and feature that costs nothing
    distmat_margin: float = 0.0  # difference of their similarity matrices that costs nothing
    cos_weight: float = 1.0  # of the cosine loss within the alignment
    distmat_weight: float = 1.0  # of the distance matrix loss within the alignment
    reverse_proj: bool = True  # project latents to features; False: features to latents
    proj_fix: bool = False  # leave that projection as it was drawn or loaded
    vf_upstream_input: bool = False  # give the model images in [-1, 1], not normalised, as VA-VAE was published

    def __post_init__(self):
        choices = {"pixel_loss": PIXEL_LOSSES, "disc_loss": D_LOSSES, "use_vf": ("none", "dinov2", "mae")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        refuse_below(self, 0, *NOT_NEGATIVE)
        for name in ("disc_num_layers", "disc_ndf"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 1 or more")


NOT_NEGATIVE = (
    *("perceptual_weight", "kl_weight", "disc_start", "disc_factor", "disc_weight"),
    *("vf_weight", "cos_margin", "distmat_margin", "cos_weight", "distmat_weight"),
)


class Objective(nn.Module):
    """The terms of the objective for one autoencoder.

    Args:
        z_channels: of the latent that is aligned (the autoencoder's embed_dim).
        image_channels: 1 or 3.
        lpips, foundation: modules to use instead of loading those that the configuration names.
    Raises:
        UserError: a term that needs weights which are not there.
    """

    logvar: th.Tensor
    perceptual_loss: nn.Module | None
    discriminator: nn.Module | None
    foundation_model: nn.Module | None
    linear_proj: nn.Conv2d | None

    def __init__(
        self,
        config: ObjectiveConfig,
        z_channels: int,
        image_channels: int,
        *,
        lpips: nn.Module | None = None,
        foundation: FoundationModel | None = None,
    ):
        super().__init__()
        self.config = config
        # Upstream declares it as a parameter, but gives it to no optimiser: it is a constant of its checkpoints.
        self.register_buffer("logvar", th.zeros(()))
        self.perceptual_loss = self.discriminator = self.foundation_model = self.linear_proj = None
        if config.perceptual_weight:
            self.perceptual_loss = lpips or load_lpips(config.lpips_path)
        if config.disc_factor:
            self.discriminator = PatchDiscriminator(image_channels, config.disc_ndf, config.disc_num_layers)
        if config.use_vf != "none":
            self.foundation_model = foundation = foundation or load_foundation(
                config.use_vf, config.vf_path, upstream_input=config.vf_upstream_input
            )
            ends = (z_channels, foundation.channels)
            c_in, c_out = ends if config.reverse_proj else ends[::-1]
            self.linear_proj = nn.Conv2d(c_in, c_out, 1, bias=not config.reverse_proj)
            self.linear_proj.requires_grad_(not config.proj_fix)

    def trainable(self) -> list[nn.Parameter]:
        """What the autoencoder's optimiser trains with it; `discriminator.parameters()` are for the other one."""
        return [p for p in self.linear_proj.parameters() if p.requires_grad] if self.linear_proj else []

    def delta(self, step: int) -> float:
        """disc_factor once `step` updates were made, 0 before."""
        return self.config.disc_factor if step >= self.config.disc_start else 0.0

    def autoencoder_loss(
        self,
        x: th.Tensor,
        recon: th.Tensor,
        posterior: Posterior,
        z: th.Tensor,
        *,
        step: int,
        encoder_last: th.Tensor,
        decoder_last: th.Tensor,
    ) -> tuple[th.Tensor, Terms]:
        """L, and its terms under upstream's names.

        Under no_grad there are no gradients to compare, and both adaptive weights are 0, as upstream's.

        Args:
            x, recon: (N, C, H, W) in [-1, 1].
            z: (N, z_channels, h, w), the sample that recon was decoded from.
            step: updates made so far.
            encoder_last, decoder_last: the weights of both last layers, where pulls are compared.
        Raises:
            UserError: an adaptive weight in fp16.
        """
        config = self.config
        rec = PIXEL_LOSSES[config.pixel_loss](x - recon)
        perceptual = None if self.perceptual_loss is None else self.perceptual_loss(x, recon)
        if perceptual is not None:
            rec = rec + config.perceptual_weight * perceptual.view(-1, 1, 1, 1)
        nll = (rec / self.logvar.exp() + self.logvar).sum() / len(x)
        kl = posterior.kl().mean()
        if config.pp_style:
            kl = 2 * kl / posterior.mean[0].numel()
        loss = nll + config.kl_weight * kl
        terms = {"rec_loss": rec.mean(), "nll_loss": nll, "kl_loss": kl, "logvar": self.logvar}
        if perceptual is not None:
            terms["lpips"] = perceptual.mean()

        if delta := self.delta(step):
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)  # its own gradients are not wanted here, only those through it
            g = generator_loss(self.discriminator(recon))
            self.discriminator.requires_grad_(True)
            weight = config.disc_weight * self._pull(nll, g, decoder_last, LARGEST_D_WEIGHT)
            loss = loss + weight * delta * g
            terms |= {"g_loss": g, "d_weight": weight}
        if self.linear_proj is not None:
            vf = self.alignment(x, z)
            weight = th.full_like(vf, config.vf_weight)
            if config.adaptive_vf:
                weight = weight * self._pull(nll, vf, encoder_last, LARGEST_VF_WEIGHT)
            loss = loss + weight * vf
            terms |= {"vf_loss": vf, "vf_weight": weight}
        terms = {"total_loss": loss, **terms}
        return loss, {name: value.detach() for name, value in terms.items()}

    @staticmethod
    def _pull(nll, term, parameter, largest):
        return adaptive_weight(nll, term, parameter, largest) if th.is_grad_enabled() else th.zeros_like(nll)

    def alignment(self, x: th.Tensor, z: th.Tensor) -> th.Tensor:
        """L_vf of latents z with the features of images x; both losses see the projected side."""
        assert self.foundation_model is not None and self.linear_proj is not None
        config, f = self.config, self.foundation_model(x)
        z, f = (self.linear_proj(z), f) if config.reverse_proj else (z, self.linear_proj(f))
        distmat = marginal_distance_matrix(z, f, config.distmat_margin)
        return config.distmat_weight * distmat + config.cos_weight * marginal_cosine(z, f, config.cos_margin)

    def discriminator_loss(self, x: th.Tensor, recon: th.Tensor, *, step: int) -> tuple[th.Tensor, Terms]:
        """delta times the discriminator's loss, and its terms; no gradient reaches the autoencoder.

        While `delta(step)` is 0 it teaches nothing and may be left out.
        """
        assert self.discriminator is not None
        real, fake = self.discriminator(x.detach()), self.discriminator(recon.detach())
        loss = self.delta(step) * D_LOSSES[self.config.disc_loss](real, fake)
        terms = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in terms.items()}


def check_finite(terms: Terms, step: int) -> None:
    """Stop at the first NaN or infinity; waits for the device once.

    Raises:
        TrainingDiverged: names the term and the step.
    """
    values = th.stack([value.float() for value in terms.values()]).tolist()
    for name, value in zip(terms, values, strict=True):
        if value - value != 0:  # infinite or NaN
            raise TrainingDiverged(
                f"{name} is {value} at step {step}: the run has diverged;"
                " go on from an earlier checkpoint with a lower --lr"
            )


def restore_from_training_checkpoint(objective: Objective, state_dict: dict[str, th.Tensor]) -> list[str]:
    """Load what a VA-VAE training checkpoint holds besides the autoencoder.

    Args:
        state_dict: of the Lightning module: `loss.discriminator.*`, `loss.perceptual_loss.*`, `linear_proj.*`,
            `foundation_model.model.*` (in timm's layout).
    Returns:
        the names of the parts that were found and that this objective has.
    Raises:
        UserError: a part of another shape.
    """
    parts = {
        "discriminator": "loss.discriminator.",
        "perceptual_loss": "loss.perceptual_loss.",
        "linear_proj": "linear_proj.",
        "foundation_model": "foundation_model.model.",
    }
    found = []
    for name, prefix in parts.items():
        module = getattr(objective, name)
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if module is None or not weights:
            continue
        try:
            if name == "foundation_model":
                load_timm(module.kind, module.model, weights)
            else:
                module.load_state_dict(weights)
        except (RuntimeError, UserError) as error:
            reason = str(error).splitlines()[:2][-1].strip()  # torch's first line is a title
            raise UserError(f"the checkpoint's {name} does not fit these settings ({reason})") from error
        found.append(name)
    return found
