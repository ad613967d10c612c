"""What training an autoencoder minimises: plain VAEs and KL autoencoders behind one contract.

A task owns the network that is published (`model`), what is learnt beside it (a projection, a discriminator), and the
losses of a batch of images (N, C, H, W) in [-1, 1]. Losses are sums over pixels, averaged over the batch, as published.
"""

import inspect
import re
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch as th
import torch.nn as nn

from . import checkpoint
from .autoencoders.base import VAEBase
from .autoencoders.conv import CelebaVAE, MnistVAE
from .autoencoders.kl import KLAutoencoder, KLConfig
from .autoencoders.objectives import Objective, ObjectiveConfig, restore_from_training_checkpoint
from .config import UserError, refuse_below
from .data.vae_data import VAEDataConfig
from .latent_transport import Moments, Transport, read_latents
from .vae_wrapper import LatentScale, open_autoencoder

KL = "kl"
MODELS = {"celeba": CelebaVAE, "mnist": MnistVAE}  # the plain VAEs
NOMINAL = 256  # attn_resolutions are those of an image of this side


@dataclass(frozen=True, kw_only=True)
class VAEModelConfig:
    """The autoencoder. latent_dim, base_channels and beta are of plain VAEs, what follows them of KL autoencoders."""

    model: str = KL  # kl (a map of latents, for diffusion), or a plain VAE: celeba, mnist
    latent_dim: int = 128  # length of a plain VAE's latent vector
    base_channels: int = 32  # base width of a plain VAE
    beta: float = 1.0  # weight of a plain VAE's KL term
    ch: int = 32  # base width
    ch_mult: str = "1,2,3"  # width of each level; one level more halves the latent once more
    num_res_blocks: int = 1  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 4  # channels of the latent
    in_channels: int = 3  # channels of the images: 3, or 1 for grey
    attn_resolutions: str = ""  # sizes at which it attends, of an image of 256 pixels, with commas; empty: none
    mid_attn: bool = False  # attend in the middle; False keeps it fast and indifferent to size
    norm_groups: int = 8  # groups of the norms; 32 in large autoencoders
    dropout: float = 0.0  # in the residual blocks

    def __post_init__(self):
        if self.model not in (KL, *MODELS):
            raise UserError(f"--model is {self.model!r}; choose {', '.join((KL, *MODELS))}")
        refuse_below(self, 1, "latent_dim", "base_channels", "ch", "num_res_blocks", "z_channels", "norm_groups")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.ch_mult.replace(" ", "")):
            raise UserError(f"--ch_mult is {self.ch_mult!r}; give whole numbers with commas, such as 1,2,4")
        if not re.fullmatch(r"(\d+(,\d+)*)?", self.attn_resolutions.replace(" ", "")):
            raise UserError(f"--attn_resolutions is {self.attn_resolutions!r}; give whole numbers with commas, or none")
        if self.ch % self.norm_groups:
            raise UserError(f"--ch is {self.ch}, which --norm_groups {self.norm_groups} does not divide")
        if self.in_channels not in (1, 3):
            raise UserError(f"--in_channels is {self.in_channels}; images have 3 channels, or 1 if grey")

    @property
    def latent_size(self) -> int:
        """What names the latent: its length, or its channels."""
        return self.z_channels if self.model == KL else self.latent_dim

    def build(self, image_size: int) -> Any:
        """A new network of this configuration."""
        if self.model != KL:
            known = {"image_size": image_size, "latent_dim": self.latent_dim, "base_channels": self.base_channels}
            wanted = inspect.signature(MODELS[self.model]).parameters
            return MODELS[self.model](**{name: value for name, value in known.items() if name in wanted})
        config = KLConfig(
            ch=self.ch,
            ch_mult=tuple(int(word) for word in self.ch_mult.split(",")),
            num_res_blocks=self.num_res_blocks,
            attn_resolutions=tuple(int(word) for word in self.attn_resolutions.split(",") if word.strip()),
            resolution=NOMINAL,
            in_channels=self.in_channels,
            out_ch=self.in_channels,
            z_channels=self.z_channels,
            embed_dim=self.z_channels,
            dropout=self.dropout,
            mid_attn=self.mid_attn,
            norm_groups=self.norm_groups,
        )
        if image_size % config.downsample:
            f = config.downsample
            raise UserError(f"--image_size is {image_size}, which an f{f} autoencoder cannot divide by {f}")
        return KLAutoencoder(config)


class PlainTask(nn.Module):
    """recon + beta KL of a plain VAE."""

    discriminator = generated = None

    def __init__(self, model: VAEBase, beta: float = 1.0):
        super().__init__()
        self.model, self.beta = model, beta
        self.channels = model.image_shape[0]
        self.precision = nullcontext

    def trainable(self) -> list[nn.Parameter]:
        """What its optimiser trains."""
        return list(self.model.parameters())

    def judges(self, step: int) -> bool:
        """Whether a discriminator learns at this step: there is none."""
        return False

    def latent_shape(self, image_size: int) -> tuple[int, ...]:
        """(latent_dim,)."""
        return (self.model.latent_dim,)

    def loss(self, images: th.Tensor, noise: th.Tensor, step: int):
        """(loss, its terms, reconstruction) of images with the given noise of z."""
        x = self.model.from_images(images)
        with self.precision():
            found = self.model.loss(x, beta=self.beta, noise=noise)
        return found.loss, {"loss": found.loss.detach(), "recon": found.recon.detach(), "kl": found.kl.detach()}, None

    def reconstruct(self, images: th.Tensor) -> th.Tensor:
        """Images through the mean of their posterior."""
        return self.model.to_images(self.model.reconstruct(self.model.from_images(images)))

    def sample(self, n: int, image_size: int, generator: th.Generator) -> th.Tensor:
        """n images of z from N(0, I)."""
        return self.model.to_images(self.model.sample(n, generator=generator))


class KLTask(nn.Module):
    """The full objective of a KL autoencoder: pixels, LPIPS, KL, discriminator, alignment."""

    latent_scale: LatentScale | None = None  # of the published file; None: measured
    generated: th.Tensor | None = None  # latents of a generator, see `DecoderTask`

    def __init__(self, model: KLAutoencoder, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective
        self.discriminator = objective.discriminator
        self.channels = model.config.in_channels
        self.precision = nullcontext  # or an autocast, in which the networks run but no sum over pixels

    def latent_shape(self, image_size: int) -> tuple[int, ...]:
        """(C, h, w)."""
        return (self.model.config.embed_dim, *[image_size // self.model.config.downsample] * 2)

    def loss(self, images: th.Tensor, noise: th.Tensor, step: int):
        """(loss, its terms, reconstruction) of images with the given noise of z."""
        with self.precision():
            posterior = self.model.encode(images)
            z = posterior.sample(noise)
            recon = self.model.decode(z)
        recon = recon.to(images.dtype)
        loss, terms = self.objective.autoencoder_loss(
            images,
            recon,
            posterior,
            z,
            step=step,
            encoder_last=self.model.encoder.conv_out.weight,
            decoder_last=self.model.decoder.conv_out.weight,
        )
        return loss, terms, recon.detach()

    def discriminator_loss(self, images: th.Tensor, recon: th.Tensor, step: int):
        """(loss, its terms) of the discriminator."""
        return self.objective.discriminator_loss(images, recon, step=step)

    def trainable(self) -> list[nn.Parameter]:
        """What its first optimiser trains; the discriminator has one of its own."""
        return [*self.model.parameters(), *self.objective.trainable()]

    def judges(self, step: int) -> bool:
        """Whether the discriminator learns at this step."""
        return self.discriminator is not None and self.objective.delta(step) > 0

    @th.no_grad()
    def reconstruct(self, images: th.Tensor) -> th.Tensor:
        """Images through the mean of their posterior."""
        return self.model.decode(self.model.encode(images).mean)

    def state_dict(self, *args, **kwargs):
        """All that is learnt: not the weights of LPIPS and of the foundation model, which come from their files."""
        frozen = ("objective.perceptual_loss.", "objective.foundation_model.")
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(frozen)}


class DecoderTask(KLTask):
    """The same objective for the decoder alone, on encoded latents and on those moved to generated ones' statistics.

    The encoder keeps its bits, so that the latents, and every diffusion model that was trained on them, stay valid.

    Args:
        scale: that the published file keeps; None: measured, as of any autoencoder that tells none.
        generated: raw latents of a generator, (N, C, h, w); None: the decoder learns from encoded ones only.
    """

    def __init__(self, model: KLAutoencoder, objective: Objective, *, scale=None, generated: th.Tensor | None = None):
        super().__init__(model, objective)
        self.latent_scale, self.generated, self.transport = scale, generated, None
        model.origin = model.origin or {name: p.detach().clone() for name, p in model.decoding().items()}
        model.requires_grad_(False)
        for parameter in model.decoding().values():
            parameter.requires_grad_(True)

    @th.no_grad()
    def measure(self, images) -> Transport:
        """Fit the map from the latents of these images, given in parts, to the generated ones."""
        source, target = Moments(self.model.config.embed_dim), Moments(self.model.config.embed_dim)
        assert self.generated is not None
        target.add(self.generated)
        self.model.eval()
        for part in images:
            posterior = self.model.encode(part)
            source.add(posterior.mean, posterior.std)
        self.model.train()
        self.transport = Transport(source, target).to(next(self.model.parameters()).device)
        return self.transport

    def loss(self, images: th.Tensor, noise: th.Tensor, step: int, amount: th.Tensor | None = None):
        """(loss, its terms, reconstructions) of images with the given noise of z.

        Args:
            amount: (N,) in [0, 1], how far each latent is moved; its image is the target before and after.
        """
        self.model.encoder.eval()  # its dropout would make other latents
        with th.no_grad(), self.precision():
            posterior = self.model.encode(images)
        z, targets = posterior.sample(noise), images
        if self.transport is not None:
            z, targets = th.cat([z, self.transport(z, amount)]), th.cat([images, images])
        with self.precision():
            recon = self.model.decode(z)
        recon = recon.to(images.dtype)
        last = self.model.decoder.conv_out.weight
        loss, terms = self.objective.autoencoder_loss(
            targets, recon, posterior, z, step=step, encoder_last=last, decoder_last=last
        )
        if self.transport is not None:
            near, far = ((r - images).detach().abs().mean() for r in recon.chunk(2))
            terms |= {"encoded_l1": near, "moved_l1": far}
        return loss, terms, recon.detach()

    def trainable(self) -> list[nn.Parameter]:
        """What its first optimiser trains."""
        return list(self.model.decoding().values())

    def load_state_dict(self, state, *args, **kwargs):
        """Raises KeyError: of another encoder."""
        for name, value in super().state_dict().items():
            frozen = name.startswith(("model.encoder.", "model.quant_conv."))
            if frozen and not th.equal(state[name].to(value.device), value):
                raise KeyError(name)
        return super().load_state_dict(state, *args, **kwargs)


def create_task(
    config: VAEModelConfig,
    objective: ObjectiveConfig,
    *,
    image_size: int,
    ckpt: str = "",
    decoder_only: bool = False,
    generated_latents: str = "",
    say=print,
):
    """The task of a training run, on a new network or on that of a checkpoint.

    Args:
        ckpt: of a KL autoencoder, what `--vae_path` takes; its architecture is then the file's. A VA-VAE training
            checkpoint also gives its discriminator, LPIPS, projection and foundation model to the parts that want them.
            Of a plain VAE, a checkpoint of vae_train.py.
        decoder_only, generated_latents: see `VAETrainConfig`.
    """
    if decoder_only and config.model != KL:
        raise UserError(f"--decoder_only True is for --model kl, not {config.model}, which has no map of latents")
    if decoder_only and objective.use_vf != "none":
        raise UserError(f"--use_vf {objective.use_vf} aligns the encoder, which --decoder_only True leaves: give none")
    if config.model != KL:
        if not ckpt:
            return PlainTask(config.build(image_size), config.beta)
        task, settings = open_plain(ckpt)
        if task is None:
            raise UserError(f"--ckpt {ckpt} is no checkpoint of vae_train.py (last.pt, epoch_XXXX.pt)")
        if (settings["model"], task.model.latent_dim) != (config.model, config.latent_dim):
            raise UserError(
                f"--ckpt {ckpt} is of --model {settings['model']} --latent_dim {task.model.latent_dim}, not of"
                f" --model {config.model} --latent_dim {config.latent_dim}"
            )
        return PlainTask(task.model.train(), config.beta)
    if ckpt:
        model, scale = open_autoencoder(ckpt)
        say(f"starting from {ckpt}: f{model.config.downsample}, {model.config.embed_dim} channels of latents")
    else:
        model, scale = config.build(image_size), None
    parts = Objective(objective, model.config.embed_dim, model.config.in_channels)
    if decoder_only:
        generated = read_latents(generated_latents, model) if generated_latents else None
        task = DecoderTask(model, parts, scale=scale, generated=generated)
    else:
        model.origin = None  # its encoder will learn, too: another latent space
        task = KLTask(model, parts)
    if ckpt.endswith((".pt", ".ckpt")):
        found = restore_from_training_checkpoint(task.objective, checkpoint.load_state_dict(ckpt))
        say(f"from the same file: {', '.join(found) or 'nothing else'}")
    return task


def default_folder(data: VAEDataConfig, config: VAEModelConfig) -> str:
    """Where a run goes if nobody says."""
    return f"runs/vae/{data.dataset}_{config.model}_z{config.latent_size}_s{data.image_size}"


def open_plain(ckpt: str) -> tuple[PlainTask | None, dict]:
    """The plain VAE of a checkpoint of vae_train.py and the settings of its run; (None, {}) is for `VAEInterface`.

    Raises:
        UserError: nothing is named, or a KL autoencoder's training state.
    """
    if not ckpt:
        raise UserError("--ckpt is empty; give a plain VAE's last.pt, or what --vae_path takes")
    if not (ckpt.endswith(".pt") and Path(ckpt).is_file()):
        return None, {}
    state = checkpoint.load(ckpt)
    settings = state.get("arguments") if isinstance(state, dict) else None
    if not settings:
        return None, {}
    if settings["model"] == KL:
        raise UserError(f"--ckpt {ckpt} is a KL autoencoder's training state: give the .safetensors beside it")
    config = VAEModelConfig(**{f.name: settings[f.name] for f in fields(VAEModelConfig)})
    model = config.build(settings["image_size"])
    model.load_state_dict(state["model"])
    return PlainTask(model.eval(), config.beta), settings
