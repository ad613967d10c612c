"""Training a KL autoencoder on a folder of images.

    loss = |x - x'| + (x - x')^2 + kl_weight KL(q(z|x) || N(0, I)) / dim(z),      each a mean over its elements

What is published is the moving average of the weights, with the scale that gives its latents unit variance.
"""

import json
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch as th
import torch.nn.functional as F
from torch.utils.data import Dataset

from . import checkpoint, dist_util, logger
from .autoencoders.kl import KLAutoencoder, KLConfig
from .config import UserError
from .data.image_folder import list_images, read_rgb
from .fp16_util import TrainingDiverged
from .image_datasets import BatchStream, slot_randn
from .nn import update_ema

WARMUP = 50  # steps until the peak learning rate
POSTERIOR = 1  # the use number of posterior noise, see image_datasets.slot_randn


@dataclass(frozen=True, kw_only=True)
class VAEModelConfig:
    """The autoencoder to train."""

    ch: int = 32  # base width
    ch_mult: str = "1,2,3"  # width of each level; one level more halves the latent once more
    num_res_blocks: int = 1  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 4  # channels of the latent
    mid_attn: bool = False  # attend in the middle; False keeps it fast and indifferent to size
    norm_groups: int = 8  # groups of the norms; 32 in large autoencoders

    def __post_init__(self):
        for name in ("ch", "num_res_blocks", "z_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.ch_mult.replace(" ", "")):
            raise UserError(f"--ch_mult is {self.ch_mult!r}; give whole numbers with commas, such as 1,2,4")
        if self.ch % self.norm_groups:
            raise UserError(f"--ch is {self.ch}, which --norm_groups {self.norm_groups} does not divide")

    def build(self) -> KLAutoencoder:
        """A new network of this configuration."""
        mult = tuple(int(word) for word in self.ch_mult.split(","))
        fields = {**asdict(self), "ch_mult": mult, "embed_dim": self.z_channels}
        return KLAutoencoder(KLConfig(**fields))


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
    """How it is trained."""

    data_root: str = ""  # folder of images; several with commas
    out_dir: str = "runs/vae"  # where checkpoints and the finished autoencoder go
    name: str = "vae"  # the finished file is OUT_DIR/NAME.safetensors
    image_size: int = 64  # side of the random crops it is trained on
    batch_size: int = 16  # crops per step
    steps: int = 4000  # updates
    lr: float = 1e-3  # peak learning rate; it rises for 50 steps and falls as a cosine
    kl_weight: float = 1e-3  # of the KL term, per latent dimension
    ema_rate: float = 0.998  # of the published weights
    log_interval: int = 100  # steps between rows of the log
    save_interval: int = 500  # steps between checkpoints
    seed: int = 0  # of weights, order, crops and noise
    half: bool = True  # publish in float16: half the file

    def __post_init__(self):
        for name in ("image_size", "batch_size", "steps", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")

    def paths(self) -> list[str]:
        """All training images.

        Raises:
            UserError: a folder that is not there, or holds no images.
        """
        try:
            return [path for root in self.data_root.split(",") for path in list_images(root.strip()).paths]
        except UserError as error:
            raise UserError(str(error).replace("--data_dir", "--data_root")) from error


class RandomCrops(Dataset):
    """Square crops of images, float32 (3, size, size) in [-1, 1]; held in memory as bytes.

    Raises:
        UserError: an image that cannot be read, or is smaller than a crop.
    """

    def __init__(self, paths: list[str], size: int):
        self.size = size
        self.images = [np.asarray(read_rgb(path)) for path in paths]
        for path, image in zip(paths, self.images, strict=True):
            if min(image.shape[:2]) < size:
                raise UserError(f"--image_size {size} is larger than {path} ({image.shape[1]} x {image.shape[0]})")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        top, left = (random.randrange(side - self.size + 1) for side in image.shape[:2])
        crop = image[top : top + self.size, left : left + self.size]
        return np.ascontiguousarray(crop.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


class VAETrainer:
    """One process's training of an autoencoder; a killed run goes on from its last checkpoint with the same bits."""

    def __init__(self, model: KLAutoencoder, config: VAETrainConfig):
        if dist_util.world_size() > 1:
            raise UserError("vae_train.py trains in one process: start it without mpiexec or torchrun")
        f = model.config.downsample
        if config.image_size % f:
            raise UserError(f"--image_size is {config.image_size}, which an f{f} autoencoder cannot divide by {f}")
        self.config, self.device = config, dist_util.dev()
        self.model = model.to(self.device)
        self.ema = [p.detach().clone() for p in model.parameters()]
        self.opt = th.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4, foreach=True)
        self.folder, self.step = Path(config.out_dir), 0
        self.state_path = self.folder / f"{config.name}_last.pt"
        paths = config.paths()
        self.data = BatchStream(RandomCrops(paths, config.image_size), config.batch_size, seed=config.seed)
        logger.log(f"training on {len(paths)} images")
        if self.state_path.exists():
            self._resume()

    def _resume(self):
        state = checkpoint.load(self.state_path, self.device)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(
                f"{self.state_path} is of another autoencoder: remove it, or choose another --name"
            ) from error
        self.opt.load_state_dict(state["optimizer"])
        self.ema, self.step = state["ema"], state["step"]
        logger.log(f"going on from step {self.step} of {self.state_path}")

    def learning_rate(self) -> float:
        done = self.step / self.config.steps
        return self.config.lr * min(1.0, (self.step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6

    def run(self) -> Path:
        """Train to the last step; returns the path of the finished autoencoder."""
        self.data.seek(self.step)
        start, first = time.monotonic(), self.step
        while self.step < self.config.steps:
            losses = self.update(next(self.data).to(self.device))
            self.step += 1
            for name, value in losses.items():
                logger.logkv_mean(name, value)
            if self.step % self.config.log_interval == 0:
                logger.logkv("step", self.step)
                logger.logkv(
                    "images_per_second", (self.step - first) * self.config.batch_size / (time.monotonic() - start)
                )
                logger.dumpkvs()
            if self.step % self.config.save_interval == 0 or self.step == self.config.steps:
                self.save()
        return self.publish()

    def update(self, x: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the optimizer; returns the terms of the loss."""
        for group in self.opt.param_groups:
            group["lr"] = self.learning_rate()
        posterior = self.model.encode(x)
        shape = posterior.mean.shape
        noise = slot_randn(shape, seed=self.config.seed, step=self.step, use=POSTERIOR, device=self.device)
        recon = self.model.decode(posterior.sample(noise))
        l1, mse, kl = F.l1_loss(recon, x), F.mse_loss(recon, x), posterior.kl().mean() / shape[1:].numel()
        self.opt.zero_grad(set_to_none=True)
        (l1 + mse + self.config.kl_weight * kl).backward()
        th.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        update_ema(
            self.ema, self.model.parameters(), rate=min(self.config.ema_rate, (1 + self.step) / (10 + self.step))
        )
        return {"l1": l1.detach(), "mse": mse.detach(), "kl": kl.detach()}

    def save(self):
        """Write the checkpoint to go on from.

        Raises:
            TrainingDiverged: the weights are not finite; the last good checkpoint stays.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingDiverged(
                f"the weights are not finite at step {self.step}: lower --lr (now {self.config.lr:g});"
                f" {self.state_path} is left as it was"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.opt.state_dict(),
            "ema": self.ema,
            "step": self.step,
        }
        checkpoint.save(state, self.state_path)

    @th.no_grad()
    def measure_scale(self, batches: int = 32) -> float:
        """1 / root mean square of the latents of training images: the factor that gives them unit variance."""
        self.data.seek(0)
        posteriors = [self.model.encode(next(self.data).to(self.device)) for _ in range(batches)]
        return float(th.stack([(p.mean**2 + p.std**2).mean() for p in posteriors]).mean().rsqrt())

    def publish(self) -> Path:
        """Write the averaged weights as one safetensors file, with configuration and measured scale."""
        from safetensors.torch import save

        for param, averaged in zip(self.model.parameters(), self.ema, strict=True):
            param.data.copy_(averaged.half().float() if self.config.half else averaged)
        metadata = {
            "config": json.dumps(self.model.config_dict()),
            "scale_factor": f"{self.measure_scale():.5f}",
            "trained": json.dumps({**asdict(self.config), "data_root": "", "out_dir": ""}),
        }
        weights = {k: v.half() if self.config.half else v for k, v in self.model.state_dict().items()}
        path = self.folder / f"{self.config.name}.safetensors"
        with checkpoint.atomic_write(path) as handle:
            handle.write(save({k: v.contiguous() for k, v in weights.items()}, metadata))
        logger.log(f"wrote {path} (scale factor {metadata['scale_factor']})")
        return path
