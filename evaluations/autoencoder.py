"""Whether an autoencoder is good enough, and whether a diffusion model can be trained on its latents.

A diffusion model can be no better than the images that its latents decode to: PSNR and SSIM are its ceiling. And it
starts from N(0, I): latents should have unit variance, carry something in every channel, and not hide it far out in the
tails. For each channel c of the posterior N(mu, sigma^2), over images and positions:

    std_c^2 = var(mu) + E sigma^2        KL_c = E (mu^2 + sigma^2 - 1 - log sigma^2) / 2
"""

from dataclasses import dataclass

import numpy as np
import torch as th

from .reconstruction import psnr, ssim

DEAD = 0.01  # nats a dimension: a channel below carries nothing
NOISY = 0.5  # share of a channel's standard deviation that is the posterior's noise
OUTLIER = 12.0  # standard deviations; a Gaussian never gets there
GOOD_PSNR, POOR_PSNR = 26.0, 20.0  # decibels
UNIT = (0.8, 1.25)  # standard deviations that are near enough to 1
CHUNK = 32


@dataclass(frozen=True)
class Channel:
    """One channel of the latent, as the diffusion model sees it (scaled)."""

    mean: float
    std: float
    noise: float  # root mean square of the posterior's sigma
    kl: float  # nats a dimension, of the raw latents
    largest: float  # |z| at most, in standard deviations


@dataclass(frozen=True)
class AutoencoderReport:
    """Everything measured of one autoencoder on one set of images."""

    psnr: np.ndarray  # (N,) decibels, of 8-bit images through the posterior's mean
    ssim: np.ndarray  # (N,)
    channels: tuple[Channel, ...]
    scale: float  # the factor that the latents were given
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    extra: dict | None = None  # further numbers: lpips, FD_user

    @property
    def std(self) -> float:
        """Root mean square over the channels' standard deviations."""
        return float(np.sqrt(np.mean([c.std**2 for c in self.channels])))

    @property
    def fitting_scale(self) -> float:
        """The scale factor that would give unit variance."""
        return self.scale / self.std

    def worst(self, n: int = 10) -> np.ndarray:
        """The places of the n images with the lowest PSNR."""
        return np.argsort(self.psnr)[:n]

    def per_user(self) -> dict[str, tuple[float, float, int]]:
        """Mean PSNR, mean SSIM and number of images of each user."""
        if self.labels is None or self.class_names is None:
            return {}
        mine = {name: self.labels == i for i, name in enumerate(self.class_names)}
        return {
            n: (float(self.psnr[m].mean()), float(self.ssim[m].mean()), int(m.sum()))
            for n, m in mine.items()
            if m.any()
        }

    def verdict(self) -> list[str]:
        """Sentences: what is wrong and what to do; the last one says whether to train on it."""
        words, fatal = [], False
        low, high = UNIT
        if not low < self.std < high:
            words.append(
                f"The latents' standard deviation is {self.std:.3g} instead of 1: use --scale_factor"
                f" {self.fitting_scale:.5g}, or store it with --fit_scale True."
            )
        for i, channel in enumerate(self.channels):
            if channel.kl < DEAD:
                words.append(
                    f"Channel {i} is dead ({channel.kl:.2g} nats a dimension): lower --kl_weight, or --z_channels."
                )
            elif channel.noise > NOISY * channel.std:
                words.append(f"Channel {i} is mostly noise ({channel.noise / channel.std:.0%}): lower --kl_weight.")
            if channel.largest > OUTLIER:
                words.append(
                    f"Channel {i} reaches {channel.largest:.0f} standard deviations, which a diffusion model does not"
                    " learn: raise --kl_weight."
                )
        fatal = all(channel.kl < DEAD for channel in self.channels)
        mean = float(self.psnr.mean())
        if mean < POOR_PSNR:
            words.append(
                f"PSNR is {mean:.1f} dB: fine structure is lost, and generated images cannot be better than that. Fit"
                " it to your images by scripts/vae_train.py --config configs/vae_finetune_f4.yaml, or take a finer one."
            )
        if fatal or mean < POOR_PSNR - 5:
            return [*words, "Do not train a diffusion model on it."]
        if words:
            return [*words, "A diffusion model can be trained on it once this is seen to."]
        quality = "well" if mean >= GOOD_PSNR else "though fine structure is softened"
        return [f"A diffusion model can be trained on it; images come back at {mean:.1f} dB, {quality}."]

    def numbers(self) -> dict:
        """All of it as plain values."""
        finite = self.psnr[np.isfinite(self.psnr)]
        return {
            "images": len(self.psnr),
            "psnr_db": round(float(finite.mean()), 3) if len(finite) else None,
            "psnr_db_std": round(float(finite.std()), 3) if len(finite) else None,
            "ssim": round(float(self.ssim.mean()), 4),
            **(self.extra or {}),
            "latent_std": round(self.std, 4),
            "scale_factor": self.scale,
            "fitting_scale_factor": round(self.fitting_scale, 5),
            "channels": [{name: round(value, 4) for name, value in vars(c).items()} for c in self.channels],
            "per_user": {
                n: {"psnr_db": round(p, 3), "ssim": round(s, 4), "images": k}
                for n, (p, s, k) in self.per_user().items()
            },
            "worst": self.worst().tolist(),
            "verdict": self.verdict(),
        }

    def table(self) -> str:
        """The report for a terminal."""
        lines = [f"{len(self.psnr)} images: PSNR {self.psnr.mean():.2f} dB, SSIM {self.ssim.mean():.4f}"]
        lines += [f"{name} {value:.4g}" for name, value in (self.extra or {}).items()]
        lines += ["", "channel   mean    std  noise  KL/dim  largest"]
        for i, c in enumerate(self.channels):
            lines.append(f"{i:7d} {c.mean:6.2f} {c.std:6.2f} {c.noise:6.2f} {c.kl:7.2f} {c.largest:7.1f} std")
        users = self.per_user()
        if len(users) > 1:
            lines += [
                "",
                *(f"{name:>12}  {p:6.2f} dB  SSIM {s:.4f}  ({k} images)" for name, (p, s, k) in users.items()),
            ]
        return "\n".join([*lines, "", *self.verdict()])


@th.no_grad()
def examine(vae, pixels: np.ndarray, labels=None, class_names=None) -> tuple[AutoencoderReport, np.ndarray]:
    """Measure an autoencoder; returns the report and the reconstructions, uint8 like the images.

    Args:
        vae: a `VAEInterface`.
        pixels: uint8 (N, H, W, 3).
    """
    device = next(vae.parameters()).device
    moments, back = [], []
    for first in range(0, len(pixels), CHUNK):
        images = as_images(pixels[first : first + CHUNK])
        moments.append(vae.encode_moments(images.to(device)).cpu().double())
        decoded = vae.decode_batch(moments[-1].chunk(2, dim=1)[0].float().to(device))
        back.append(((decoded + 1) * 127.5).round().clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).cpu().numpy())
    back = np.concatenate(back)
    mean, sigma = th.cat(moments).chunk(2, dim=1)
    report = AutoencoderReport(
        psnr=psnr(pixels, back),
        ssim=ssim(pixels, back),
        channels=tuple(
            _channel(m, s, vae.latent_scale, i)
            for i, (m, s) in enumerate(zip(mean.unbind(1), sigma.unbind(1), strict=True))
        ),
        scale=vae.scale_factor if isinstance(vae.scale_factor, float) else 1.0,
        labels=labels,
        class_names=class_names,
    )
    return report, back


def as_images(pixels: np.ndarray) -> th.Tensor:
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in [-1, 1]."""
    return th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _channel(mean: th.Tensor, sigma: th.Tensor, scale, i: int) -> Channel:
    """One channel's numbers from its posterior, mean and sigma (N, h, w) as model latents."""
    factor, shift = (value[i] if isinstance(value, tuple) else value for value in (scale.scale, scale.shift))
    mean_raw, var_raw = mean / factor + shift, (sigma / factor) ** 2
    std = float((mean.var() + (sigma**2).mean()).sqrt())
    return Channel(
        mean=float(mean.mean()),
        std=std,
        noise=float((sigma**2).mean().sqrt()),
        kl=float(0.5 * (mean_raw**2 + var_raw - 1 - var_raw.clamp(min=1e-30).log()).mean()),
        largest=float((mean - mean.mean()).abs().max() / std),
    )
