"""The flags of a training run, and what their words mean."""

import re
from dataclasses import dataclass

import torch as th

from .config import UserError, refuse_below
from .posthoc_ema import lengths_of


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training: upstream's flags, then ours."""

    schedule_sampler: str = "uniform"  # which t to train on: uniform or loss-second-moment
    lr: float = 1e-4  # learning rate of AdamW
    weight_decay: float = 0.0  # of AdamW
    lr_anneal_steps: int = 0  # let the learning rate fall linearly to 0 over so many steps, then stop; 0 = constant
    batch_size: int = 1  # images per step and process
    microbatch: int = -1  # images per forward pass; -1 = the whole batch
    ema_rate: str = "0.9999"  # rates of the moving averages, with commas
    log_interval: int = 10  # steps between rows of the log
    save_interval: int = 10000  # steps between checkpoints
    resume_checkpoint: str = ""  # a model*.pt to continue from; auto = the newest complete one in the log folder
    fp16_scale_growth: float = 1e-3  # growth of the loss scale's exponent a step
    max_steps: int = 0  # stop after so many steps; 0 = when lr_anneal_steps or max_epochs says so, or never
    max_epochs: int = 0  # stop after so many passes over the data; 0 = no limit
    sample_interval: int = 0  # steps between pictures of samples in previews/; 0 = none
    keep_last: int = 0  # how many checkpoints to keep; 0 = all
    keep_every: int = 0  # steps between checkpoints that stay beside those; 0 = none
    max_hours: float = 0.0  # save and stop in time to stay below so many hours; 0 = no limit
    seed: int = 0  # order of the data, times and noise follow it
    amp: str = "none"  # none; bf16: the network runs in bfloat16, the rest in float32; auto: bf16 on GPUs that have it
    grad_clip: float = 0.0  # largest norm of the gradient; 0 = no limit
    adam_betas: str = "0.9,0.999"  # of AdamW; LightningDiT: 0.9,0.95
    warmup_steps: int = 0  # updates over which the learning rate rises to lr
    ema_warmup: bool = False  # moving averages begin at a low rate, so that a short run forgets its initial weights
    val_dir: str = ""  # held-out data for a validation loss; the average with the lowest is kept as ema_RATE_best.pt
    val_interval: int = 0  # steps between validations; 0 = save_interval
    patience: int = 0  # end the run after so many validations in a row without a lower loss; 0 = never
    # end the run when 1 - (loss on as many training rows) / (validation loss) is above this in two validations in a
    # row; 0 = never. The gap of the denoising losses is not memorisation alone: it contains how sessions differ, too
    max_memorisation: float = 0.0
    posthoc_ema: str = ""  # relative lengths (0.05,0.10) to keep snapshots of for scripts/posthoc_ema.py; empty = none
    posthoc_interval: int = 0  # steps between these; 0 = a sixteenth of the run, or save_interval if it has no end
    channels_last: bool = False  # train with the channels innermost: on some CPUs faster, rounded otherwise; no fsdp2
    compile: bool = False  # torch.compile the network: for GPUs; minutes on a CPU, which gains nothing
    sharding: str = "none"  # none (every process holds the model) or fsdp2 (a share of weights, optimizer and averages)

    def __post_init__(self):
        refuse_below(self, 1, "batch_size", "log_interval", "save_interval")
        steps = "lr_anneal_steps", "warmup_steps", "max_steps", "max_epochs", "sample_interval", "val_interval"
        steps += "patience", "max_memorisation", "posthoc_interval"
        refuse_below(self, 0, *steps, "keep_last", "keep_every", "max_hours", "grad_clip")
        refuse_keeping(self)
        for name in (name for name in ("patience", "max_memorisation") if getattr(self, name) and not self.val_dir):
            raise UserError(f"--{name} {getattr(self, name)} needs --val_dir, the held-out data to judge by")
        if self.max_memorisation >= 1:
            raise UserError(f"--max_memorisation is {self.max_memorisation}; it is a share, below 1")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}; it must be above 0")
        if self.amp not in ("none", "bf16", "auto"):
            why = "; --use_fp16 True is the half precision with loss scaling" if self.amp == "fp16" else ""
            raise UserError(f"--amp is {self.amp!r}; choose none, bf16 or auto{why}")
        if self.sharding not in ("none", "fsdp2"):
            raise UserError(f"--sharding is {self.sharding!r}; choose none or fsdp2")
        if self.channels_last and self.sharding != "none":
            raise UserError(f"--sharding {self.sharding} keeps the usual layout: leave --channels_last out")
        ema_rates(self.ema_rate)
        betas_of(self.adam_betas)
        lengths_of(self.posthoc_ema)


def refuse_keeping(config) -> None:
    """Raise a UserError if `--keep_every` can keep nothing."""
    every, between = config.keep_every, config.save_interval
    if every and not config.keep_last:
        raise UserError(f"--keep_every {every} needs --keep_last N: without it all checkpoints are kept")
    if every % between:
        raise UserError(f"--keep_every {every} is no multiple of --save_interval {between}: give a multiple")


def in_bfloat16(amp: str) -> bool:
    """Whether `--amp` means bfloat16 here: `auto` is where a GPU computes in it, for elsewhere it is far slower."""
    return amp == "bf16" or amp == "auto" and th.cuda.is_available() and th.cuda.is_bf16_supported(False)


def ema_rates(text) -> list[float]:
    """`0.99,0.9999` (or a number) as a list of rates.

    Raises:
        UserError: a rate is no number between 0 and 1.
    """
    try:
        rates = [float(word) for word in str(text).split(",")]
    except ValueError as error:
        raise UserError(f"--ema_rate is {text!r}; it must be numbers such as 0.99,0.9999") from error
    if not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"--ema_rate is {text!r}; a rate lies between 0 and 1")
    return rates


def betas_of(text: str) -> tuple[float, float]:
    """`0.9,0.999` as two numbers.

    Raises:
        UserError: it is not two numbers from 0 to below 1.
    """
    words = text.split(",")
    if len(words) != 2 or not all(re.fullmatch(r"\s*0?\.?\d+\s*", word) and float(word) < 1 for word in words):
        raise UserError(f"--adam_betas is {text!r}; give two numbers below 1, such as 0.9,0.999")
    return float(words[0]), float(words[1])
