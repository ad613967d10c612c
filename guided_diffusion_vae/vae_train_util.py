"""Training an autoencoder, of any task in `vae_tasks`: one loop, one process or many, one optimiser or two.

Order, crops and noise of a step derive from (seed, step, slot in the global batch), as in `train_util`: a run that was
killed goes on from `last.pt` with the same bits. What is published is the moving average of the weights, for a KL
autoencoder together with the scale that gives its latents unit variance.
"""

import contextlib
import functools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch as th
from tqdm import tqdm

from . import checkpoint, dist_util, logger
from .autoencoders.kl import KLAutoencoder
from .autoencoders.objectives import check_finite
from .config import UserError, refuse_below
from .data.stream import AMOUNT, DROPOUT, POSTERIOR, BatchStream, mix, slot_randn
from .fp16_util import TrainingDiverged
from .nn import update_ema
from .optimizer import AdamW
from .sample_util import save_grid, to_pixels
from .train_util import StopSignals, betas_of
from .vae_wrapper import save_autoencoder

PLACES = "out_dir", "ckpt", "generated_latents"  # settings that a published file keeps to itself
TRANSPORT_IMAGES = 1024  # images whose latents are compared with generated ones
GRID = 32  # images in recon_grid.png, and in a plain VAE's samples_grid.png
VALIDATION = 256  # images that an epoch is judged by


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
    """How it is trained."""

    out_dir: str = ""  # where it goes; empty: runs/vae/{dataset}_{model}_z{latent}_s{size}
    name: str = "autoencoder"  # a finished KL autoencoder is OUT_DIR/NAME.safetensors
    ckpt: str = ""  # start from these weights: what --vae_path takes, or a checkpoint of this script
    decoder_only: bool = False  # leave the encoder of --ckpt as it is: its latents and all models of them stay valid
    # with it: a latents_NxCxhxw.safetensors that image_sample_vae.py --save_latents True wrote; the decoder then also
    # learns from encoded latents that are moved, by random amounts, to the mean and covariance of these
    generated_latents: str = ""
    batch_size: int = 16  # images per step and process
    microbatch: int = -1  # images per forward pass; -1 = the whole batch
    epochs: int = 20  # passes over the data
    max_steps: int = 0  # stop after so many updates; 0 = when the epochs are done
    lr: float = 1e-3  # peak learning rate; it rises for warmup_steps
    lr_schedule: str = "cosine"  # cosine: falls to nothing at the end; constant
    warmup_steps: int = 50  # updates until the peak learning rate
    adam_betas: str = "0.9,0.999"  # of both optimisers; LDM and VA-VAE: 0.5,0.9
    weight_decay: float = 1e-4  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient of the loss per pixel; 0 = no limit
    ema_rate: float = 0.998  # of the moving average of the weights; 0 = none
    amp: str = "none"  # none, or bf16: the networks run in bfloat16; fp16 would overflow in sums over pixels
    use_checkpoint: bool = False  # recompute a KL autoencoder's activations in backward to save memory
    log_interval: int = 100  # updates between rows of the log
    save_interval: int = 0  # updates between writings of last.pt; 0 = every epoch
    save_epochs: int = 0  # epochs between epoch_XXXX.pt, which stay; 0 = the last only
    seed: int = 0  # of weights, order, crops and noise
    half: bool = True  # publish in float16: half the file

    def __post_init__(self):
        refuse_below(self, 1, "batch_size", "log_interval", "epochs")
        refuse_below(self, 0, "max_steps", "save_interval", "save_epochs", "warmup_steps", "grad_clip", "weight_decay")
        if self.decoder_only and not self.ckpt:
            raise UserError("--decoder_only True needs --ckpt, the autoencoder whose decoder is tuned")
        if self.generated_latents and not self.decoder_only:
            raise UserError(f"--generated_latents {self.generated_latents} needs --decoder_only True")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}; it must be above 0")
        if self.lr_schedule not in ("cosine", "constant"):
            raise UserError(f"--lr_schedule is {self.lr_schedule!r}; choose cosine or constant")
        if self.amp not in ("none", "bf16"):
            why = ": sums over pixels exceed float16's 65504" if self.amp == "fp16" else ""
            raise UserError(f"--amp is {self.amp!r}; choose none or bf16{why}")
        if not 0 <= self.ema_rate < 1:
            raise UserError(f"--ema_rate is {self.ema_rate}; a rate lies between 0 and 1")
        self.betas  # noqa: B018  (reads it, to complain now)

    @property
    def betas(self) -> tuple[float, float]:
        return betas_of(self.adam_betas)


class VAETrainer:
    """Trains a task on images; writes `last.pt`, `epoch_XXXX.pt`, grids, log rows and, for a KL autoencoder, its file.

    Args:
        task: see `vae_tasks`.
        train, val: datasets of float32 images (C, S, S) in [-1, 1]; val may be empty.
        arguments: the resolved run, kept in every checkpoint.
        on_save: called on rank 0 when a checkpoint is written.
    """

    def __init__(
        self,
        task,
        train,
        val,
        config: VAETrainConfig,
        *,
        image_size: int,
        folder: Path | str,
        arguments: dict,
        on_save=None,
    ):
        self.on_save = on_save or (lambda: None)
        self.config, self.image_size, self.folder, self.arguments = config, image_size, Path(folder), arguments
        self.device = dist_util.dev()
        self.task, self.val = task.to(self.device), val
        if config.use_checkpoint and isinstance(task.model, KLAutoencoder):
            task.model.recompute()
        if config.amp == "bf16":
            self.task.precision = functools.partial(th.autocast, self.device.type, th.bfloat16)
        dist_util.sync_params(self.task.parameters())
        self.model = task.model
        self.params = task.trainable()
        judge = list(task.discriminator.parameters()) if task.discriminator else []
        settings = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        self.opt = AdamW(self.params, **settings)
        self.judge, self.judge_opt = judge, AdamW(judge, **settings) if judge else None
        self.ema = [p.detach().clone() for p in self._learning().values()]
        self.step = 0
        self.data, self.scale_data = (BatchStream(train, config.batch_size, seed=config.seed + i) for i in (0, 1))
        if task.generated is not None:
            self._measure_transport(min(len(train), TRANSPORT_IMAGES))
        self.epoch_steps = max(1, len(train) // (config.batch_size * dist_util.world_size()))
        self.last_step = config.max_steps or config.epochs * self.epoch_steps
        logger.log(f"training on {len(train)} images: {self.last_step} steps, {self.epoch_steps} an epoch")
        if dist_util.rank0_first((self.folder / "last.pt").is_file):
            self._resume()

    def _learning(self) -> dict[str, th.nn.Parameter]:
        """The parameters of the published network that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _measure_transport(self, count: int) -> None:
        """On the same images whatever the number of processes."""
        parts = th.arange(count).split(GRID)
        images = (th.stack([th.as_tensor(self.scale_data.order[int(i)]) for i in part]) for part in parts)
        transport = self.task.measure(part.to(self.device) for part in images)
        dist_util.sync_params(transport.buffers())
        logger.log(f"generated latents: encoded ones are moved by up to {transport.reach:.1%} of their spread (rms)")

    @property
    def epoch(self) -> int:
        """Passes over the data that are done."""
        return self.step // self.epoch_steps

    def _resume(self):
        path = self.folder / "last.pt"
        state = checkpoint.load(path, self.device)
        try:
            differ = self.task.load_state_dict(state["task"], strict=False)
            if differ.unexpected_keys or set(differ.missing_keys) & set(self.task.state_dict()):
                raise KeyError(path)
            self.opt.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is of another autoencoder: remove it, or choose another --out_dir") from error
        if self.judge_opt:
            self.judge_opt.load_state_dict(state["disc_optimizer"])
        self.ema, self.step = state["ema"], state["step"]
        logger.forget_after(self.step)
        logger.log(f"going on from step {self.step} of {path}")

    # ---- the loop

    def run(self) -> None:
        """Train to the last step, or until a stop is asked for.

        Raises:
            dist_util.StopRequested: after saving, if a signal ended the run.
            TrainingDiverged: a term of the loss is not finite; the last good checkpoint stays.
        """
        self.data.seek(self.step)
        begin, first, saved = time.monotonic(), self.step, self.step
        with StopSignals() as stop, self._progress_bar() as bar:
            while self.step < self.last_step:
                terms = self.update(next(self.data))
                self.step += 1
                bar.update(1)
                for name, value in terms.items():
                    logger.logkv_mean(name, value)
                if self.step % self.config.log_interval == 0:
                    check_finite(terms, self.step)
                    images = (self.step - first) * self.config.batch_size * dist_util.world_size()
                    logger.logkvs({"step": self.step, "epoch": self.epoch})
                    logger.logkv("images_per_second", images / (time.monotonic() - begin))
                    logger.dumpkvs()
                if self.step % (self.config.save_interval or self.epoch_steps) == 0 or self.step == self.last_step:
                    self.save(terms)
                    saved = self.step
                stopped = dist_util.any_rank(bool(stop.signal_name))
                if stopped and self.step < self.last_step:
                    if saved != self.step:
                        self.save(terms)
                    raise dist_util.StopRequested(f"saved step {self.step}; the same command goes on")

    def _progress_bar(self):
        return tqdm(total=self.last_step, initial=self.step, disable=dist_util.rank() > 0, unit="step", mininterval=2)

    def update(self, batch: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the optimiser, or of both; returns the terms of the losses."""
        images = batch.to(self.device)
        for group in [*self.opt.param_groups, *(self.judge_opt.param_groups if self.judge_opt else [])]:
            group["lr"] = self.learning_rate()
        th.manual_seed(mix(self.config.seed, self.step, dist_util.rank(), DROPOUT))
        shape = (len(images), *self.task.latent_shape(self.image_size))
        noise = slot_randn(shape, seed=self.config.seed, step=self.step, use=POSTERIOR, device=self.device)
        draws = [noise]
        if self.task.generated is not None:
            normal = slot_randn((len(images),), seed=self.config.seed, step=self.step, use=AMOUNT, device=self.device)
            draws.append(th.special.ndtr(normal))  # even in [0, 1]
        size = self.config.microbatch if self.config.microbatch > 0 else len(images)
        terms, recons = {}, []
        self.opt.zero_grad(set_to_none=True)
        for part, part_noise, *amount in zip(images.split(size), *(d.split(size) for d in draws), strict=True):
            loss, found, recon = self.task.loss(part, part_noise, self.step, *amount)
            share = len(part) / len(images)
            (loss * (share / part[0].numel())).backward()
            terms = {name: terms.get(name, 0) + share * value for name, value in found.items()}
            recons.append(recon)
        self._advance(self.opt, self.params)
        if self.judge_opt is not None and self.task.judges(self.step):
            self.judge_opt.zero_grad(set_to_none=True)
            for part, recon in zip(images.split(size), recons, strict=True):
                loss, found = self.task.discriminator_loss(part, recon, self.step)
                share = len(part) / len(images)
                (loss * share).backward()
                terms |= {name: terms.get(name, 0) + share * value for name, value in found.items()}
            self._advance(self.judge_opt, self.judge)
        rate = min(self.config.ema_rate, (1 + self.step) / (10 + self.step))
        update_ema(self.ema, self._learning().values(), rate=rate)
        return terms

    def _advance(self, opt, params):
        dist_util.average_gradients(params)
        if self.config.grad_clip:
            th.nn.utils.clip_grad_norm_(params, self.config.grad_clip, foreach=True)
        opt.step()

    def learning_rate(self) -> float:
        """The learning rate of the coming step."""
        rate = self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        if self.config.lr_schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * self.step / self.last_step)
        return rate

    # ---- what is written

    def save(self, terms) -> None:
        """Collective: call on every process. Judge the average, then write `last.pt`, `epoch_XXXX.pt` and the grids.

        Raises:
            TrainingDiverged: the loss or the weights are not finite; nothing is written.
        """
        check_finite(terms, self.step)
        if not all(bool(p.isfinite().all()) for p in self.params):
            raise TrainingDiverged(
                f"the weights are not finite at step {self.step}: lower --lr (now {self.config.lr:g});"
                f" {self.folder / 'last.pt'} is left as it was"
            )
        dist_util.rank0_first(self._write)

    def _write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.averaged(),
            "task": self.task.state_dict(),
            "optimizer": self.opt.state_dict(),
            "disc_optimizer": self.judge_opt.state_dict() if self.judge_opt else {},
            "ema": self.ema,
            "epoch": self.epoch,
            "step": self.step,
            "arguments": self.arguments,
        }
        with self.average_in_place():
            self._show()
            if isinstance(self.model, KLAutoencoder):
                self._publish()
        every = self.config.save_epochs * self.epoch_steps
        if self.step == self.last_step or (every and self.step % every == 0):
            checkpoint.save(state, self.folder / f"epoch_{self.epoch:04d}.pt")
        checkpoint.save(state, self.folder / "last.pt")  # last: who is killed before goes on from an earlier one
        self.on_save()

    def _show(self):
        if len(self.val):
            images = th.stack([th.as_tensor(self.val[i]) for i in range(min(VALIDATION, len(self.val)))])
            recon = th.cat([self.task.reconstruct(part.to(self.device)).cpu() for part in images.split(GRID)])
            mse = ((recon.clamp(-1, 1) - images) ** 2).flatten(1).mean(1)
            psnr = float((10 * th.log10(4 / mse)).mean())
            shown = "recon_grid.png: pairs of a real one and, right of it, what comes back"
            logger.log(f"epoch {self.epoch}: PSNR {psnr:.2f} dB on {len(images)} validation images ({shown})")
            pairs = th.stack([images[:GRID], recon[:GRID]], dim=1).flatten(0, 1)
            show_grid(self.folder / "recon_grid.png", pairs, ("real", "back"))
        if not isinstance(self.model, KLAutoencoder):  # whose z are far from N(0, I): noise would come out
            drawn = self.task.sample(GRID, self.image_size, th.Generator().manual_seed(self.config.seed))
            show_grid(self.folder / "samples_grid.png", drawn.cpu())

    def averaged(self) -> dict[str, th.Tensor]:
        """The model's state_dict with the moving average of the weights (the weights themselves without one)."""
        values = self.ema if self.config.ema_rate else [p.detach() for p in self._learning().values()]
        return {**self.model.state_dict(), **dict(zip(self._learning(), values, strict=True))}

    @contextlib.contextmanager
    def average_in_place(self):
        """The model with its averaged weights and in eval mode, for as long as the block lasts."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.averaged())
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(kept)
            self.model.train()

    @th.no_grad()
    def measure_scale(self, batches: int = 32) -> float:
        """1 / root mean square of the latents of training images: the factor that gives them unit variance."""
        self.scale_data.seek(0)
        posteriors = (self.model.encode(next(self.scale_data).to(self.device)) for _ in range(batches))
        return float(th.stack([(p.mean**2 + p.std**2).mean() for p in posteriors]).mean().rsqrt())

    def _publish(self) -> None:
        """Write the averaged KL autoencoder with the scale that fits what is written, rounded weights and all."""
        if self.config.half:
            rounded = {name: p.detach().half().float() for name, p in self._learning().items()}
            self.model.load_state_dict({**self.model.state_dict(), **rounded})
        scale = self.task.latent_scale or self.measure_scale()
        path = self.folder / f"{self.config.name}.safetensors"
        about = {k: v for k, v in asdict(self.config).items() if k not in PLACES}
        save_autoencoder(self.model, path, scale, half=self.config.half, about=about)
        shown = f"scale factor {scale:.5g}" if isinstance(scale, float) else "scale and latents as before"
        logger.log(f"wrote {path} (step {self.step}, {shown})")


def show_grid(path: Path, images: th.Tensor, captions: tuple[str, ...] = ("",), columns: int = 8) -> None:
    """Write images (N, 1 or 3, H, W) in [-1, 1] as one PNG, the captions above them in turn."""
    words = [captions[i % len(captions)] for i in range(len(images))]
    save_grid(path, to_pixels(images.expand(-1, 3, -1, -1)), words, columns)
