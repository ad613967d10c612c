"""The loss on held-out data: one number that falls while the network learns what the data have in common.

Row i of N is noised once, at a time and with a noise that (seed, i) states, the times spread evenly over the process:

    q_i = (p_i + u_i) / N,   p a permutation of 0..N-1, u_i ~ U[0, 1)

so two numbers differ by what the network learned, not by luck in the draw, whatever the batch size and the number of
processes. Held-out data have `len()` and `batch(indices) -> (z, cond)`: z (n, ...), cond a dict of tensors (n,).

The same number of as many training rows, with the same times and noise, tells how much of it is for those rows alone:

    memorisation = 1 - loss(training rows) / loss(held-out rows)

This is the gap of the denoising losses, no proof of copies: sessions that differ from each other open it, too. What it
says of one run is when it grows.
"""

import math
from pathlib import Path

import numpy as np
import torch as th

from . import checkpoint, dist_util, logger
from .data.stream import VALIDATION, mix
from .flow_matching import FlowMatching

TOO_OFTEN = 2  # validations in a row with more memorisation than is allowed


def validation_loss(model, diffusion, heldout, *, batch_size: int, seed: int) -> float:
    """Collective: call on every process. The `loss` of `validation_terms`."""
    return validation_terms(model, diffusion, heldout, batch_size=batch_size, seed=seed)["loss"]


@th.no_grad()
def validation_terms(model, diffusion, heldout, *, batch_size: int, seed: int) -> dict[str, float]:
    """Collective: call on every process. The mean of the loss and of each other term of it over all rows, each weighted
    1; the same on every process.

    Args:
        model: (x, t, **cond) -> prediction; asked in eval mode, so no label is dropped.
        diffusion: a GaussianDiffusion, a FlowMatching, or the losses of a classifier.
        batch_size: rows at a time on each process.
    Returns:
        `loss` and the other terms of `training_losses`; NaN for one that is not finite for some row.
    """
    device, count = dist_util.dev(), len(heldout)
    places = th.from_numpy(np.random.default_rng(mix(seed, VALIDATION)).permutation(count))
    mine = range(dist_util.rank(), count, dist_util.world_size())
    training, terms = model.training, {}
    model.eval()
    for first in range(0, len(mine), batch_size):
        rows = list(mine[first : first + batch_size])
        z, cond = heldout.batch(rows)
        generators = [th.Generator().manual_seed(mix(seed, row, VALIDATION)) for row in rows]
        u = th.stack([th.rand((), generator=g, dtype=th.float64) for g in generators])
        noise = th.stack([th.randn(z.shape[1:], generator=g) for g in generators])  # on the CPU: alike on every machine
        t = times_at(diffusion, (places[rows] + u) / count)
        z, t, noise = (values.to(device) for values in (z, t, noise))
        cond = {name: values.to(device) for name, values in cond.items()}
        for name, values in diffusion.training_losses(model, z, t, model_kwargs=cond, noise=noise).items():
            terms.setdefault(name, []).extend(values.double().tolist())
    model.train(training)
    parts = dist_util.gather_objects(terms)  # a process without rows has no terms
    everyone = {name: sum((part.get(name, []) for part in parts), []) for name in parts[0]}
    return {name: _mean(values) for name, values in everyone.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if np.isfinite(values).all() else math.nan  # fsum: in any order the same


def times_at(diffusion, quantiles: th.Tensor) -> th.Tensor:
    """The times at places in [0, 1) of a process: int64 in [0, T), or float32 where a flow may be trained."""
    diffusion = getattr(diffusion, "process", diffusion)  # that of a classifier's losses
    if isinstance(diffusion, FlowMatching):
        eps = diffusion.train_eps or 0.0
        return (eps + (1 - 2 * eps) * quantiles).float()
    return (quantiles * diffusion.num_timesteps).long()


class Validation:
    """Held-out data (or None), the lowest loss that a run has had on them, and whether that is reason to end it.

    Args:
        interval: steps between validations; the last step has one, too.
        patience: validations in a row without a lower loss that end the run; 0 = never.
        max_memorisation: more of it in two validations in a row ends the run; 0 = never.
        seen: rows of the training data in the form of held-out data, with `max_memorisation`.
    """

    def __init__(
        self, heldout, *, interval: int, batch_size: int, seed: int, patience=0, max_memorisation=0.0, seen=None
    ):
        assert heldout is not None or not (patience or max_memorisation), "TrainConfig asks for --val_dir"
        self.heldout, self.interval, self.batch_size, self.seed = heldout, interval, batch_size, seed
        self.patience, self.max_memorisation, self.seen = patience, max_memorisation, seen
        self.best: tuple[float, int | None] = (math.inf, None)  # the loss, and the number of the checkpoint
        self.no_lower = self.memorising = 0  # validations in a row

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"best": self.best, "no_lower": self.no_lower, "memorising": self.memorising}

    def load_state_dict(self, state: dict) -> None:
        """Take it from a run's state, also from one that knew less."""
        for name, default in self.state_dict().items():
            setattr(self, name, state.get(name, default))

    @property
    def ends(self) -> str:
        """Why the run should end, or an empty string; the same on every process."""
        if self.patience and self.no_lower >= self.patience:
            return f"{self.no_lower} validations in a row without a lower loss (--patience {self.patience})"
        if self.max_memorisation and self.memorising >= TOO_OFTEN:
            allowed = f"--max_memorisation {self.max_memorisation}"
            return f"{self.memorising} validations in a row with more memorisation than {allowed}"
        return ""

    def due(self, step: int, last_step: int | None) -> int | None:
        """What a checkpoint after this step would be called if it is one to validate after, else None."""
        if self.heldout is None:
            return None
        return step if step % self.interval == 0 else step + 1 if step + 1 == last_step else None

    def judge(self, model, diffusion, weights: dict[str, th.Tensor], number: int, path: Path) -> None:
        """Collective: log the loss of a model; if it is the lowest so far, write its weights."""
        terms = validation_terms(model, diffusion, self.heldout, batch_size=self.batch_size, seed=self.seed)
        for name, value in terms.items():
            logger.logkv(f"val_{name}", value)
        loss = terms.pop("loss")
        if self.seen is not None:
            terms["memorisation"] = self._memorisation(model, diffusion, loss)
        others = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        logger.log(f"validation loss {loss:.6g}{f' ({others})' if others else ''} at step {number}")
        if math.isnan(loss):
            logger.warn(f"the validation loss is not finite: {path.name} stays as it is")
        self.no_lower = 0 if loss < self.best[0] else self.no_lower + 1
        if loss < self.best[0]:
            self.best = loss, number
            dist_util.rank0_first(lambda: checkpoint.save(weights, path))
        if self.ends:
            logger.log(f"the run ends: {self.ends}")

    def _memorisation(self, model, diffusion, loss: float) -> float:
        """Collective: log, count and give 1 - loss(seen) / loss; NaN (no reason to end) where that says nothing."""
        seen = validation_loss(model, diffusion, self.seen, batch_size=self.batch_size, seed=self.seed)
        memorisation = 1 - seen / loss if loss > 0 else math.nan
        logger.logkv("seen_loss", seen)
        logger.logkv("memorisation", memorisation)
        self.memorising = self.memorising + 1 if memorisation > self.max_memorisation else 0
        return memorisation

    def report(self, path: Path) -> None:
        """Say which step was best."""
        if self.heldout is not None and self.best[1] is not None:
            logger.log(f"lowest validation loss {self.best[0]:.6g} at step {self.best[1]}: {path}")
