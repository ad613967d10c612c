"""One training loop: U-Net or transformer, Gaussian or flow, pixels or latents, one process or many.

Every step draws noise and a time for each sample, takes the process's loss, averages gradients over the processes and
updates the weights and their moving averages. Two ways to draw: from the global generators in upstream's order
(`seed=None`), or from (seed, step, slot in the global batch), which makes a run independent of how many processes
share it. Either way a run that was killed goes on from its last checkpoint with the same bits.
"""

import contextlib
import functools
import math
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm

from . import dist_util, logger
from .config import UserError
from .fp16_util import MixedPrecisionTrainer
from .image_datasets import mix, slot_randn
from .nn import update_ema
from .resample import LossAwareSampler, create_named_schedule_sampler
from .run_state import get_random_state, newest_checkpoint, prune, read_state, set_random_state, write_checkpoint
from .validation import Validation

INITIAL_LOG_LOSS_SCALE = 20.0
NUMBERED = re.compile(r"model(\d+)\.[^/]*$")  # a checkpoint of a run, at a step
NOISE, DROP = 2, 4  # the use numbers of training noise and of label dropout, see image_datasets.slot_randn


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
    sample_interval: int = 0  # steps between sample grids; 0 = none
    keep_checkpoints: int = 0  # how many checkpoints to keep; 0 = all
    max_hours: float = 0.0  # save and stop in time to stay below so many hours; 0 = no limit
    seed: int = 0  # order of the data, times and noise follow it
    amp: str = "none"  # none, or bf16: the network runs in bfloat16, weights and losses stay float32
    grad_clip: float = 0.0  # largest norm of the gradient; 0 = no limit
    adam_betas: str = "0.9,0.999"  # of AdamW; LightningDiT: 0.9,0.95
    warmup_steps: int = 0  # updates over which the learning rate rises to lr
    ema_warmup: bool = False  # moving averages begin at a low rate, so that a short run forgets its initial weights
    val_dir: str = ""  # held-out data for a validation loss; the average with the lowest is kept as ema_RATE_best.pt
    val_interval: int = 0  # steps between validations; 0 = save_interval

    def __post_init__(self):
        for name in ("batch_size", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        steps = "lr_anneal_steps", "warmup_steps", "max_steps", "max_epochs", "sample_interval", "val_interval"
        for name in (*steps, "keep_checkpoints", "max_hours", "grad_clip"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 0 or more")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}; it must be above 0")
        if self.amp not in ("none", "bf16"):
            why = "; --use_fp16 True is the half precision with loss scaling" if self.amp == "fp16" else ""
            raise UserError(f"--amp is {self.amp!r}; choose none or bf16{why}")
        ema_rates(self.ema_rate)
        betas_of(self.adam_betas)


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


class TrainLoop:
    """Trains `model` on batches from `data` until it is told to stop; writes upstream's files and log lines.

    Args:
        diffusion: a GaussianDiffusion or a FlowMatching.
        data: an iterator of (batch, cond); if it has `seek(step)`, a resumed run goes on with the right batch. For
            `max_epochs` it has `num_samples`.
        batch_size: samples per step on this process; microbatch: samples per forward pass (<= 0: all).
        ema_rate: a number or a string of numbers with commas.
        resume_checkpoint: a model*.pt, or "auto".
        seed: None draws t and noise from the global generators, in upstream's order.
        max_steps: stop after so many steps in all; sample_fn(step): called every `sample_interval` steps on every
            process, with the first moving average in the model.
        heldout: what the validation loss is measured on, see `validation`; None is no validation.
    Raises:
        UserError: settings that contradict each other or the checkpoint.
    """

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,
        batch_size,
        microbatch,
        lr,
        ema_rate,
        log_interval,
        save_interval,
        resume_checkpoint,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,
        max_steps=0,
        sample_interval=0,
        sample_fn=None,
        keep_checkpoints=0,
        max_hours=0.0,
        seed=None,
        progress=False,
        amp="none",
        grad_clip=0.0,
        adam_betas="0.9,0.999",
        warmup_steps=0,
        ema_warmup=False,
        max_epochs=0,
        heldout=None,
        val_dir="",
        val_interval=0,
    ):
        assert heldout is not None or not val_dir, "whoever gives val_dir opens it and gives heldout"
        if use_fp16 and amp != "none":
            raise UserError(f"--amp {amp} and --use_fp16 True are two ways to the same end: choose one")
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.warmup_steps = lr, lr_anneal_steps, warmup_steps
        self.weight_decay, self.betas, self.amp = weight_decay, betas_of(adam_betas), amp
        self.ema_rate, self.ema_warmup = ema_rates(ema_rate), ema_warmup
        self.log_interval, self.save_interval, self.sample_interval = log_interval, save_interval, sample_interval
        self.sample_fn, self.keep_checkpoints = sample_fn, keep_checkpoints
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        if use_fp16 and not th.cuda.is_available():
            logger.warn("--use_fp16 True on a CPU is correct, but several times slower than False")
        self.schedule_sampler = schedule_sampler or create_named_schedule_sampler("uniform", diffusion)
        self.global_batch = batch_size * dist_util.world_size()
        epochs_end = math.ceil(max_epochs * data.num_samples / self.global_batch) if max_epochs else 0
        self.last_step = min(filter(None, (max_steps, lr_anneal_steps, epochs_end)), default=None)
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else None
        self.seed, self.progress = seed, progress
        self.validation = Validation(
            heldout, interval=val_interval or save_interval, batch_size=self.microbatch, seed=seed or 0
        )
        self.step = self.resume_step = 0
        self.sync_cuda = th.cuda.is_available()
        self.save_seconds = 0.0
        self.saved_average = None  # file of the first moving average that was saved last
        self.unlogged = []  # (times, losses) since the last log row
        self.logged = time.monotonic(), 0  # when, and after how many steps, the last row was written

        self.resume_checkpoint = self._find_resume_checkpoint(resume_checkpoint)
        self._load_and_sync_parameters()
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, grad_clip=grad_clip
        )
        first_lr = self.learning_rate(self.resume_step) if warmup_steps else lr
        self.opt = AdamW(
            self.mp_trainer.master_params, lr=first_lr, betas=self.betas, weight_decay=weight_decay, foreach=True
        )
        self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        self._load_optimizer_state()
        self._load_run_state()

        self.use_ddp = dist_util.world_size() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            self.ddp_model = DistributedDataParallel(
                self.model,
                device_ids=[dist_util.dev().index] if self.sync_cuda else None,
                bucket_cap_mb=128,
                find_unused_parameters=False,
            )

    # ---- going on from a checkpoint

    def _find_resume_checkpoint(self, wanted: str) -> str:
        if wanted == "auto":
            newest, notes = dist_util.rank0_first(lambda: newest_checkpoint(get_blob_logdir()))
            for note in notes:
                logger.warn(note)
            if not newest:
                logger.log(f"no checkpoint in {get_blob_logdir()}: starting at step 0")
            return newest
        wanted = find_resume_checkpoint() or wanted
        if wanted and not dist_util.rank0_first(Path(wanted).is_file):
            raise UserError(f"--resume_checkpoint {wanted} does not exist; give a model*.pt, or auto")
        if wanted and not NUMBERED.search(wanted):
            logger.warn(f"{wanted} is no model*.pt of a run: its weights start a new one at step 0")
        return wanted

    def _load_and_sync_parameters(self):
        self.state = {}
        if self.resume_checkpoint:
            self.state = dist_util.rank0_first(lambda: read_state(self.resume_checkpoint))
            self.resume_step = self.state.get("next_step", parse_resume_step_from_filename(self.resume_checkpoint))
            logger.log(f"loading model from checkpoint: {self.resume_checkpoint}...")
            weights = dist_util.load_state_dict(self.resume_checkpoint, map_location="cpu")
            if not all(th.is_tensor(value) for value in weights.values()):
                raise UserError(f"--resume_checkpoint {self.resume_checkpoint} holds no weights; give a model*.pt")
            try:
                self.model.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"--resume_checkpoint {self.resume_checkpoint} is a network of another shape:"
                    f" {str(error).splitlines()[1].strip()[:160]}"
                ) from error
        self.model.to(dist_util.dev())
        dist_util.sync_params(self.model.parameters())

    def _companion(self, name: str) -> str | None:
        """A file beside the checkpoint, if there is one. Collective."""
        if not NUMBERED.search(self.resume_checkpoint):
            return None
        path = Path(self.resume_checkpoint).with_name(name)
        return str(path) if dist_util.rank0_first(path.is_file) else None

    def _named_step(self) -> int:
        return parse_resume_step_from_filename(self.resume_checkpoint)

    def _load_ema_parameters(self, rate):
        path = self.resume_checkpoint and self._companion(f"ema_{rate}_{self._named_step():06d}.pt")
        if not path:
            return [param.detach().clone() for param in self.mp_trainer.master_params]
        logger.log(f"loading EMA from checkpoint: {path}...")
        state_dict = dist_util.load_state_dict(path, map_location=dist_util.dev())
        return [param.detach().clone() for param in self.mp_trainer.state_dict_to_master_params(state_dict)]

    def _load_optimizer_state(self):
        path = self.resume_checkpoint and self._companion(f"opt{self._named_step():06d}.pt")
        if not path:
            if self.resume_checkpoint:
                logger.warn("no optimizer state beside the checkpoint: the optimizer starts fresh")
            return
        logger.log(f"loading optimizer state from checkpoint: {path}")
        try:
            self.opt.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))
        except ValueError as error:
            raise UserError(f"{path} does not fit ({error}); was it saved with another --use_fp16?") from error
        flags = {"lr": self.learning_rate(self.resume_step), "weight_decay": self.weight_decay, "betas": self.betas}
        for group in self.opt.param_groups:  # the flags hold; upstream lets the file win without a word
            for name, flag in flags.items():
                if group[name] != flag and not (name == "lr" and self.lr_anneal_steps):
                    logger.warn(f"--{name.replace('betas', 'adam_betas')}: saved {group[name]} -> given {flag}")
                    group[name] = flag
            group["foreach"] = True

    def _load_run_state(self):
        if not self.state:
            return
        if self.state["seed"] != self.seed:
            raise UserError(
                f"--seed is {self.seed}, but {self.resume_checkpoint} was trained with {self.state['seed']}: "
                f"give --seed {self.state['seed']}, for the order of the data follows it"
            )
        if self.state["global_batch"] != self.global_batch and self.seed is not None:
            raise UserError(
                f"--batch_size {self.batch_size} on {dist_util.world_size()} processes is {self.global_batch} a step,"
                f" but the run had {self.state['global_batch']}: choose them so that the product stays"
            )
        self.mp_trainer.lg_loss_scale = self.state["lg_loss_scale"]
        if self.state.get("schedule_sampler") and hasattr(self.schedule_sampler, "load_state_dict"):
            self.schedule_sampler.load_state_dict(self.state["schedule_sampler"])
        if dist_util.rank0_first(self.best_average().is_file):  # or this run writes to another folder
            self.validation.best = self.state.get("best", self.validation.best)
        ranks = self.state["random"]
        if len(ranks) == dist_util.world_size():
            set_random_state(ranks[dist_util.rank()])

    # ---- the loop

    def run_loop(self):
        """Train until the last step, a stop request or for ever; save at the end.

        Raises:
            dist_util.StopRequested: after saving, if a signal, a STOP file or --max_hours ended the run.
        """
        if hasattr(self.data, "seek"):
            self.data.seek(self.resume_step)
        if self.last_step is not None and self.resume_step >= self.last_step:
            logger.log(f"nothing to do: step {self.resume_step} of {self.last_step} is reached")
            return
        saved = None
        with StopSignals() as stop, self._progress_bar() as bar:
            while self.last_step is None or self.step + self.resume_step < self.last_step:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                step = self.step + self.resume_step
                self._validate(step)
                if self.step % self.log_interval == 0:
                    self._dump_log(bar, self.step + 1)
                bar.update(1)
                self.step += 1
                if step % self.save_interval == 0:
                    self.save()
                    saved = step
                if self.sample_fn and self.sample_interval and (step + 1) % self.sample_interval == 0:
                    self._sample(step + 1)
                reason = self._reason_to_stop(stop)
                if reason:
                    if saved != step:
                        self.save(step + 1)
                    if dist_util.rank() == 0 and get_blob_logdir():
                        (Path(get_blob_logdir()) / "STOP").unlink(missing_ok=True)
                    raise dist_util.StopRequested(f"{reason}; saved step {step + 1}. Go on: --resume_checkpoint auto")
            if self.unlogged:
                self._dump_log(bar, self.step)
        if saved != self.step + self.resume_step - 1:
            self.save(self.step + self.resume_step)
        self.validation.report(self.best_average())

    def _progress_bar(self):
        steps = self.last_step - self.resume_step if self.last_step else None
        piped = dist_util.detect_launch().launcher == "mpi"  # mpiexec hides the terminal, but passes the bar on
        shown = self.progress and dist_util.rank() == 0 and (piped or sys.stderr.isatty())
        return tqdm(total=steps, disable=not shown, unit="step", mininterval=5 if piped else 0.2, dynamic_ncols=True)

    def _dump_log(self, bar, done: int):
        """Write the log row after `done` steps; the losses of the interval leave the device only here."""
        for t, losses in self.unlogged:
            log_loss_dict(self.diffusion, t, losses)
        self.unlogged.clear()
        now, steps = time.monotonic(), done - self.logged[1]
        speed = steps * self.global_batch / max(now - self.logged[0], 1e-9)
        self.logged = now, done
        logger.logkv("images_per_second", speed)
        row = logger.dumpkvs()
        bar.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{speed:.1f}", refresh=False)

    def _reason_to_stop(self, stop) -> str:
        """Collective: call on every process. Why the run should end here, or an empty string; looked at every step."""
        reason = stop.signal_name
        if self.deadline and time.monotonic() + 2 * self.save_seconds > self.deadline:
            reason = "--max_hours is reached"
        folder = get_blob_logdir()
        if not reason and folder and dist_util.rank() == 0 and self.step % self.log_interval == 0:
            reason = "the file STOP is in the log folder" if (Path(folder) / "STOP").exists() else ""
        if not dist_util.any_rank(bool(reason)):
            return ""
        return next(filter(None, dist_util.gather_objects(reason)))

    def run_step(self, batch, cond):
        """One update of the weights and their averages; returns the mean loss as a 0-d tensor."""
        if self.seed is not None:
            th.manual_seed(mix(self.seed, self.step + self.resume_step, dist_util.rank()))  # dropout
        loss = self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._anneal_lr()
        self.log_step()
        return loss

    def forward_backward(self, batch, cond):
        """Gradients of the loss of one batch, summed over microbatches as upstream does."""
        self.mp_trainer.zero_grad()
        drawn, cond = self._draw(batch), self._with_dropped_labels(cond, len(batch))
        model = self._in_bfloat16 if self.amp == "bf16" else self.ddp_model
        loss = th.zeros((), device=dist_util.dev())
        for i in range(0, batch.shape[0], self.microbatch):
            part = slice(i, i + self.microbatch)
            micro = batch[part].to(dist_util.dev())
            micro_cond = {name: value[part].to(dist_util.dev()) for name, value in cond.items()}
            if drawn:
                t, weights, noise = (values[part] for values in drawn)
            else:
                (t, weights), noise = self.schedule_sampler.sample(micro.shape[0], dist_util.dev()), None
            last = i + self.microbatch >= batch.shape[0]
            with contextlib.nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(model, micro, t, model_kwargs=micro_cond, noise=noise)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                micro_loss = (losses["loss"] * weights).mean()
                weighted = {name: (value * weights).detach() for name, value in losses.items()}
                self.unlogged.append((t, weighted))
                self.mp_trainer.backward(micro_loss)
            loss += micro_loss.detach()
        return loss

    def _draw(self, batch):
        """Times, weights and noise of this process's slots of the step, or None without a seed."""
        if self.seed is None:
            return None
        step, (n, rank, size) = self.step + self.resume_step, (len(batch), dist_util.rank(), dist_util.world_size())
        rng = np.random.RandomState(mix(self.seed, step) & 0xFFFFFFFF)
        t, weights = self.schedule_sampler.sample(n * size, dist_util.dev(), rng=rng)
        mine = slice(rank * n, (rank + 1) * n)
        noise = slot_randn(batch.shape, seed=self.seed, step=step, use=NOISE, device=dist_util.dev())
        return t[mine], weights[mine], noise

    def _with_dropped_labels(self, cond, n):
        """`cond` with the labels to drop of this process's slots, (n,) bool; without a seed the network draws them."""
        p = getattr(self.model, "class_dropout_prob", 0)
        if self.seed is None or p <= 0 or "y" not in cond:
            return cond
        (rank, size), device = (dist_util.rank(), dist_util.world_size()), dist_util.dev()
        generator = th.Generator(device=device).manual_seed(mix(self.seed, self.step + self.resume_step, DROP))
        drop = th.rand(n * size, generator=generator, device=device) < p
        return {**cond, "drop": drop[rank * n : (rank + 1) * n]}

    def _in_bfloat16(self, x, t, **cond):
        """The network's prediction, computed in bfloat16 and given in float32."""
        with th.autocast(dist_util.dev().type, th.bfloat16):
            return self.ddp_model(x, t, **cond).float()

    def _update_ema(self):
        done = self.step + self.resume_step
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            rate = min(rate, (1 + done) / (10 + done)) if self.ema_warmup else rate
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update (0 = first); the annealing comes one late, as upstream's."""
        rate = self.lr
        if self.lr_anneal_steps:
            rate *= 1 - max(update - 1, 0) / self.lr_anneal_steps
        return rate * min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else rate

    def _anneal_lr(self):
        if self.lr_anneal_steps or self.warmup_steps:
            for group in self.opt.param_groups:
                group["lr"] = self.learning_rate(self.step + self.resume_step + 1)

    def log_step(self):
        """Put the step and the number of samples seen into the log row."""
        logger.logkv("step", self.step + self.resume_step)
        logger.logkv("samples", (self.step + self.resume_step + 1) * self.global_batch)

    def _sample(self, step):
        with self._average_in_place():
            self.sample_fn(step)

    def _validate(self, step):
        number = self.validation.due(step, self.last_step)
        if number is not None:
            with self._average_in_place() as averaged:
                self.validation.judge(self.model, self.diffusion, averaged, number, self.best_average())

    def best_average(self) -> Path:
        """The file of the first moving average with the lowest validation loss."""
        return Path(get_blob_logdir() or "", f"ema_{self.ema_rate[0]}_best.pt")

    @contextlib.contextmanager
    def _average_in_place(self):
        """The model with its first moving average, in eval mode, for as long as the block lasts; draws leave no trace.

        Yields:
            its state_dict.
        """
        self.model.eval()
        kept = [param.detach().clone() for param in self.model.parameters()]
        random_state = get_random_state()
        averaged = self.mp_trainer.master_params_to_state_dict(self.ema_params[0])
        try:
            self.model.load_state_dict(averaged)
            yield averaged
        finally:
            with th.no_grad():
                for param, value in zip(self.model.parameters(), kept, strict=True):
                    param.copy_(value)
            set_random_state(random_state)
            self.model.train()

    def save(self, name_step: int | None = None):
        """Collective: call on every process. Write model, averages, optimizer and, last, the run state.

        Args:
            name_step: the number in the file names; None is the step just done (upstream's periodic names).
        Raises:
            SaveError: the disk is full; earlier checkpoints are intact.
        """
        begin = time.monotonic()
        done = self.step + self.resume_step
        files = {"model": self.mp_trainer.master_params}
        files |= {f"ema_{rate}_": params for rate, params in zip(self.ema_rate, self.ema_params, strict=True)}
        state = {
            "next_step": done,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lg_loss_scale": float(self.mp_trainer.lg_loss_scale),
            "random": dist_util.gather_objects(get_random_state()),
            "best": self.validation.best,
        }
        if hasattr(self.schedule_sampler, "state_dict"):
            state["schedule_sampler"] = self.schedule_sampler.state_dict()
        number = done - 1 if name_step is None else name_step

        def write():
            for prefix in files:
                logger.log(f"saving model {prefix.removeprefix('ema_').rstrip('_') if prefix != 'model' else 0}...")
            weights = {
                f"{prefix}{number:06d}.pt": self.mp_trainer.master_params_to_state_dict(params)
                for prefix, params in files.items()
            }
            opt = {f"opt{number:06d}.pt": self.opt.state_dict()}
            write_checkpoint(Path(get_blob_logdir()), number, {**weights, **opt}, state)
            if self.keep_checkpoints:
                prune(Path(get_blob_logdir()), self.keep_checkpoints)

        dist_util.rank0_first(write)
        self.saved_average = Path(get_blob_logdir() or "", f"ema_{self.ema_rate[0]}_{number:06d}.pt")
        self.save_seconds = time.monotonic() - begin

    def newest_average(self) -> Path:
        """The file of the first moving average that was saved last."""
        resumed = Path(self.resume_checkpoint)
        return self.saved_average or resumed.with_name(f"ema_{self.ema_rate[0]}_{self._named_step():06d}.pt")


class StopSignals:
    """Notes a request to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2); a second one leaves at once."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")

    def __enter__(self):
        self.signal_name, self.previous = "", {}
        for name in self.NAMES:
            with contextlib.suppress(ValueError, AttributeError):  # not in the main thread; not on this system
                self.previous[name] = signal.signal(getattr(signal, name), functools.partial(self._note, name))
        return self

    def _note(self, name, number, frame):
        if self.signal_name:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_name = name

    def __exit__(self, *error):
        for name, handler in self.previous.items():
            signal.signal(getattr(signal, name), handler)


def parse_resume_step_from_filename(filename) -> int:
    """The step in a name such as `dir/model000010.pt`: 10; 0 for any other name."""
    found = NUMBERED.search(str(filename))
    return int(found.group(1)) if found else 0


def get_blob_logdir():
    """The folder that checkpoints go to (forks override this)."""
    return logger.get_dir()


def find_resume_checkpoint():
    """A checkpoint that the infrastructure wants resumed (forks override this)."""
    return None


def find_ema_checkpoint(main_checkpoint, step, rate):
    """The average that was saved with a checkpoint, or None."""
    if not main_checkpoint:
        return None
    path = Path(main_checkpoint).with_name(f"ema_{rate}_{step:06d}.pt")
    return str(path) if path.is_file() else None


def log_loss_dict(diffusion, ts, losses):
    """Add per-sample losses to the log: their mean, and the mean in each quarter of the times."""
    quarters = [min(3, int(4 * t / diffusion.num_timesteps)) for t in ts.tolist()]
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quarter, value in zip(quarters, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quarter}", value)
