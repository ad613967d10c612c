"""One training loop: U-Net or transformer, Gaussian or flow, pixels or latents, one process or many.

Every step draws noise and a time for each sample, takes the process's loss, averages gradients over the processes and
updates the weights and their moving averages. Two ways to draw: from the global generators in upstream's order
(`seed=None`), or from (seed, step, slot in the global batch), which makes a run independent of how many processes
share it. Either way a run that was killed goes on from its last checkpoint with the same bits.
"""

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tqdm import tqdm

from . import dist_util, logger
from .compiling import compile_training
from .config import UserError
from .data.stream import DROPOUT, DROPPED_LABELS, NOISE, mix, slot_randn
from .fp16_util import MixedPrecisionTrainer, TrainingDiverged
from .nn import update_ema
from .optimizer import AdamW
from .posthoc_ema import PowerAverages, interval_of, lengths_of
from .resample import LossAwareSampler, create_named_schedule_sampler
from .run_state import (
    NUMBERED,
    get_random_state,
    lack_of_room,
    newest_checkpoint,
    parse_resume_step_from_filename,
    prune,
    read_state,
    set_random_state,
)
from .run_state import find_ema_checkpoint as find_ema_checkpoint
from .sharding import Kept, create_sharding
from .stop_signals import StopSignals
from .train_config import TrainConfig as TrainConfig
from .train_config import betas_of, ema_rates, in_bfloat16
from .validation import Validation

INITIAL_LOG_LOSS_SCALE = 20.0


class TrainLoop:
    """Trains `model` on batches from `data` until it is told to stop; writes upstream's files and log lines.

    Args:
        diffusion: a GaussianDiffusion or a FlowMatching; for a classifier its losses, see `noised_classifier`.
        data: an iterator of (batch, cond); if it has `seek(step)`, a resumed run goes on with the right batch. For
            `max_epochs` it has `num_samples`.
        batch_size: samples per step on this process; microbatch: samples per forward pass (<= 0: all).
        ema_rate: a number or a string of numbers with commas; empty: no moving averages, the weights stand for them.
        resume_checkpoint: a model*.pt, or "auto".
        seed: None draws t and noise from the global generators, in upstream's order.
        max_steps: stop after so many steps in all; sample_fn(step): called every `sample_interval` steps on every
            process, with the first moving average in the model.
        heldout: what the validation loss is measured on, see `validation`; None is no validation.
        max_memorisation: see `validation`; with it `data` has `rows(count, seed)`.
        posthoc_ema: see `posthoc_ema`.
        compile: see `compiling`; sharding: none or fsdp2, see `sharding`.
        on_save: called on rank 0 when a checkpoint is written, and at the end.
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
        schedule_sampler: Any = None,
        weight_decay=0.0,
        lr_anneal_steps=0,
        max_steps=0,
        sample_interval=0,
        sample_fn: Any = None,
        keep_last=0,
        keep_every=0,
        max_hours=0.0,
        seed=None,
        progress=False,
        amp="none",
        channels_last=False,
        grad_clip=0.0,
        adam_betas="0.9,0.999",
        warmup_steps=0,
        ema_warmup=False,
        max_epochs=0,
        heldout: Any = None,
        val_dir="",
        val_interval=0,
        patience=0,
        max_memorisation=0.0,
        posthoc_ema="",
        posthoc_interval=0,
        compile=False,
        sharding="none",
        on_save=None,
    ):
        assert heldout is not None or not val_dir, "whoever gives val_dir opens it and gives heldout"
        if use_fp16 and amp != "none":
            raise UserError(f"--amp {amp} and --use_fp16 True are two ways to the same end: choose one")
        if use_fp16 and sharding != "none":
            raise UserError(
                f"--use_fp16 True keeps whole copies of the weights: --sharding {sharding} takes --amp bf16"
            )
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size, self.microbatch = batch_size, microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.warmup_steps = lr, lr_anneal_steps, warmup_steps
        self.weight_decay, self.betas, self.bf16 = weight_decay, betas_of(adam_betas), in_bfloat16(amp)
        self.ema_rate, self.ema_warmup = ema_rates(ema_rate) if ema_rate != "" else [], ema_warmup
        self.log_interval, self.save_interval, self.sample_interval = log_interval, save_interval, sample_interval
        self.sample_fn, self.keep_last, self.keep_every = sample_fn, keep_last, keep_every
        self.on_save = on_save if on_save and dist_util.rank() == 0 else lambda: None
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        if use_fp16 and not th.cuda.is_available():
            logger.warn("--use_fp16 True on a CPU is correct, but several times slower than False")
        self.schedule_sampler: Any = schedule_sampler or create_named_schedule_sampler("uniform", diffusion)
        self.global_batch = batch_size * dist_util.world_size()
        epochs_end = math.ceil(max_epochs * data.num_samples / self.global_batch) if max_epochs else 0
        self.val_dir = val_dir
        self.last_step = min(filter(None, (max_steps, lr_anneal_steps, epochs_end)), default=None)
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else None
        self.seed, self.progress = seed, progress
        ends = {"patience": patience, "max_memorisation": max_memorisation}
        ends |= {"seen": data.rows(len(heldout or ()), seed=seed or 0) if max_memorisation else None}
        self.validation = Validation(
            heldout, interval=val_interval or save_interval, batch_size=self.microbatch, seed=seed or 0, **ends
        )
        between = interval_of(posthoc_interval, self.last_step, save_interval)
        self.power = PowerAverages(lengths_of(posthoc_ema), interval=between, folder=get_blob_logdir())
        self.step = self.resume_step = 0
        self.save_seconds, self.saved_average = 0.0, None  # the file of the first moving average that was saved last
        self.unlogged = []  # (times, losses) since the last log row
        self.logged = time.monotonic(), 0  # when, and after how many steps, the last row was written

        self.sharding = create_sharding(sharding)
        model.to(memory_format=th.channels_last if channels_last else th.preserve_format)
        self.resume_checkpoint = self._find_resume_checkpoint(resume_checkpoint)
        self._load_and_sync_parameters()
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            grad_clip=grad_clip,
            norm=self.sharding.norm,
        )
        first_lr = self.learning_rate(self.resume_step) if warmup_steps else lr
        self.opt = AdamW(self.mp_trainer.master_params, lr=first_lr, betas=self.betas, weight_decay=weight_decay)
        self.ema_params = [[p.detach().clone() for p in self.mp_trainer.master_params] for _ in self.ema_rate]
        self.power.begin(self.mp_trainer.master_params)
        self._load_averages_and_optimizer()
        self._load_run_state()
        self.ddp_model = self.sharding.wrap(self.model)
        self.network = compile_training(self.ddp_model, logger.warn) if compile else self.ddp_model

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
            self.resume_step = self.state.get("next_step", self._named_step())
            logger.log(f"loading model from checkpoint: {self.resume_checkpoint}...")
        self.goes_on = bool(NUMBERED.search(self.resume_checkpoint))
        if self.goes_on:
            self.sharding.refuse_other(self.resume_checkpoint, self.state)
            self.power.refuse_others(self.resume_checkpoint, self.state)
        if self.resume_checkpoint and not (self.goes_on and self.sharding.loads_weights):
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
        self.sharding.place(self.model)

    def _named_step(self) -> int:
        return parse_resume_step_from_filename(self.resume_checkpoint)

    def _load_averages_and_optimizer(self):
        if not self.resume_checkpoint:
            return
        kept, number = self._kept(), self._named_step()
        if not self.goes_on or not self.sharding.load(self.resume_checkpoint, number, kept, self.state):
            logger.warn("no optimizer state beside the checkpoint: the optimizer starts fresh")
            return
        flags = {"lr": self.learning_rate(self.resume_step), "weight_decay": self.weight_decay, "betas": self.betas}
        for group in self.opt.param_groups:  # the flags hold; upstream lets the file win without a word
            for name, flag in flags.items():
                if group[name] != flag and not (name == "lr" and self.lr_anneal_steps):
                    logger.warn(f"--{name.replace('betas', 'adam_betas')}: saved {group[name]} -> given {flag}")
                    group[name] = flag

    def _kept(self) -> Kept:
        averages = [*zip(self.ema_rate, self.ema_params, strict=True), *self.power.named()]
        return Kept(self.mp_trainer, averages, self.opt)

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
            self._load_best()
        ranks = self.state["random"]
        if len(ranks) == dist_util.world_size():
            set_random_state(ranks[dist_util.rank()])

    def _load_best(self):
        """The lowest loss so far, unless it was of other held-out data; a run without any hands it on."""
        before = self.state.get("val_dir", "")
        if self.val_dir and before and Path(before).resolve() != Path(self.val_dir).resolve():
            logger.warn(
                f"--val_dir is {self.val_dir}, but the run was judged by {before}: losses of other data are no measure,"
                f" so {self.best_average().name} starts afresh"
            )
            return
        self.val_dir = self.val_dir or before
        self.validation.load_state_dict(self.state)

    # ---- the loop

    def run_loop(self):
        """Train until the last step, a stop request or for ever; save at the end.

        Raises:
            dist_util.StopRequested: after saving, if a signal, a STOP file or --max_hours ended the run.
        """
        if hasattr(self.data, "seek"):
            self.data.seek(self.resume_step)
        reached = self.last_step is not None and self.resume_step >= self.last_step
        over = f"step {self.resume_step} of {self.last_step} is reached" if reached else self.validation.ends
        if over:
            logger.log(f"nothing to do: {over}")
            self.on_save()
            return
        if dist_util.rank() == 0 and (lack := self._lack_of_room()):
            logger.warn(lack)
        self.power.forget(self.resume_step)
        logger.forget_after(self.resume_step - 1)
        saved = None
        with StopSignals() as stop, self._progress_bar() as bar:
            while not (self.validation.ends or self.step + self.resume_step == self.last_step):
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                step = self.step + self.resume_step
                self._validate(step)
                if self.step % self.log_interval == 0:
                    self._dump_log(bar, self.step + 1)
                bar.update(1)
                self.step += 1
                self._snapshot(step + 1)  # before the checkpoint, which would not write it again
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
        else:
            self.on_save()  # the last row of the log came later
        self.validation.report(self.best_average())

    def _lack_of_room(self) -> str:
        copies = 3 + len(self._kept().averages)  # the weights, AdamW's two moments, the averages
        size = copies * sum(4 * p.numel() for p in self.model.parameters())
        to_come = (self.last_step - self.resume_step) // self.save_interval + 1 if self.last_step else 1
        stay = self.keep_last and self.keep_last + (
            to_come * self.save_interval // self.keep_every if self.keep_every else 0
        )
        there = len(list(Path(get_blob_logdir()).glob("state*.pt")))
        count = max(1, min(to_come, stay + 1 - there)) if stay else to_come
        return lack_of_room(Path(get_blob_logdir()), size, count)

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
        if not math.isfinite(row.get("grad_norm", 0.0)):  # in float16 that of the steps that were taken
            self._diverged("the gradient")
        bar.set_postfix(loss=f"{row[log_prefix(self.diffusion) + 'loss']:.4f}", img_s=f"{speed:.1f}", refresh=False)

    def _diverged(self, what: str):
        raise TrainingDiverged(
            f"{what} is not finite at step {self.step + self.resume_step}: the run has diverged; earlier checkpoints"
            f" are kept: go on from one of them with a lower --lr (now {self.lr:g})"
        )

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
            th.manual_seed(mix(self.seed, self.step + self.resume_step, dist_util.rank(), DROPOUT))
        loss = self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self.power.update(self.mp_trainer.master_params, self.step + self.resume_step + 1)
        self._anneal_lr()
        self.log_step()
        return loss

    def forward_backward(self, batch, cond):
        """Gradients of the loss of one batch, summed over microbatches as upstream does."""
        self.mp_trainer.zero_grad()
        drawn, cond = self._draw(batch), self._with_dropped_labels(cond, len(batch))
        model = self._in_bfloat16 if self.bf16 else self.network
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
            with self.sharding.accumulating(self.ddp_model, last):
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
        seed = mix(self.seed, self.step + self.resume_step, DROPPED_LABELS)
        generator = th.Generator(device=device).manual_seed(seed)
        drop = th.rand(n * size, generator=generator, device=device) < p
        return {**cond, "drop": drop[rank * n : (rank + 1) * n]}

    def _in_bfloat16(self, x, t, **cond):
        """The network's prediction, computed in bfloat16 and given in float32."""
        with th.autocast(dist_util.dev().type, th.bfloat16):
            return self.network(x, t, **cond).float()

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
                weights = self.sharding.gather(averaged)
                self.validation.judge(self.model, self.diffusion, weights, number, self.best_average())

    def _snapshot(self, t: int):
        if self.power.due(t, ends=t == self.last_step or bool(self.validation.ends)):
            self.power.write(t, lambda p: self.sharding.gather(self.mp_trainer.master_params_to_state_dict(p)))

    def best_average(self) -> Path:
        """The file of the first moving average, or of the weights, with the lowest validation loss."""
        return Path(get_blob_logdir() or "", f"ema_{self.ema_rate[0]}_best.pt" if self.ema_rate else "model_best.pt")

    def _average_name(self, number: int) -> str:
        return f"ema_{self.ema_rate[0]}_{number:06d}.pt" if self.ema_rate else f"model{number:06d}.pt"

    @contextlib.contextmanager
    def _average_in_place(self):
        """The model with its first moving average, in eval mode, for as long as the block lasts; draws leave no trace.

        Yields:
            its state_dict, sharded as the model is.
        """
        self.model.eval()
        kept = [param.detach().clone() for param in self.model.parameters()]
        random_state = get_random_state()
        averaged = self.mp_trainer.master_params_to_state_dict((*self.ema_params, self.mp_trainer.master_params)[0])
        try:
            self.model.load_state_dict(averaged)
            with self.sharding.evaluating(self.model):
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
            TrainingDiverged: the weights or their averages are not finite; nothing is written.
        """
        for params in (self.mp_trainer.master_params, *(params for _, params in self._kept().averages)):
            if not self.mp_trainer.norm([param.detach() for param in params]).isfinite():
                self._diverged("a weight, or its average,")
        begin, done = time.monotonic(), self.step + self.resume_step
        state = {
            "next_step": done,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lg_loss_scale": float(self.mp_trainer.lg_loss_scale),
            "random": dist_util.gather_objects(get_random_state()),
            "val_dir": str(self.val_dir),
            "posthoc_ema": self.power.lengths,
            **self.validation.state_dict(),
        }
        if hasattr(self.schedule_sampler, "state_dict"):
            state["schedule_sampler"] = self.schedule_sampler.state_dict()
        number = done - 1 if name_step is None else name_step
        folder = Path(get_blob_logdir())
        for what in (0, *(name for name, _ in self._kept().averages)) if dist_util.rank() == 0 else ():
            logger.log(f"saving model {what}...")
        self.sharding.save(folder, number, self._kept(), state)
        if self.keep_last:
            dist_util.rank0_first(lambda: prune(folder, self.keep_last, number, every=self.keep_every))
        self.saved_average = folder / self._average_name(number)
        self.on_save()
        self.save_seconds = time.monotonic() - begin

    def newest_average(self) -> Path:
        """The file of the first moving average that was saved last."""
        resumed = Path(self.resume_checkpoint)
        return self.saved_average or resumed.with_name(self._average_name(self._named_step()))


def get_blob_logdir():
    """The folder that checkpoints go to (forks override this)."""
    return logger.get_dir()


def find_resume_checkpoint():
    """A checkpoint that the infrastructure wants resumed (forks override this)."""
    return None


def log_prefix(diffusion) -> str:
    """What stands before the names of a training's losses in the log: train_ for a classifier's, as upstream."""
    return getattr(diffusion, "log_prefix", "")


def log_loss_dict(diffusion, ts, losses):
    """Add per-sample losses to the log: their mean, and the mean in each quarter of the times."""
    quarters = [min(3, int(4 * t / diffusion.num_timesteps)) for t in ts.tolist()]
    for name, values in losses.items():
        name = log_prefix(diffusion) + name
        logger.logkv_mean(name, values.mean().item())
        for quarter, value in zip(quarters, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quarter}", value)
