"""The loss on held-out data: one number that falls while the network learns what the data have in common.

Row i of N is noised once, at a time and with a noise that (seed, i) states, the times spread evenly over the process:

    q_i = (p_i + u_i) / N,   p a permutation of 0..N-1, u_i ~ U[0, 1)

so two numbers differ by what the network learned, not by luck in the draw, whatever the batch size and the number of
processes. Held-out data have `len()` and `batch(indices) -> (z, cond)`: z (n, ...), cond a dict of tensors (n,).
"""

import math
from pathlib import Path

import numpy as np
import torch as th

from . import checkpoint, dist_util, logger
from .data.stream import mix
from .flow_matching import FlowMatching

VALIDATION = 5  # the use number of these draws, see image_datasets.slot_randn


@th.no_grad()
def validation_loss(model, diffusion, heldout, *, batch_size: int, seed: int) -> float:
    """Collective: call on every process. The mean loss over all rows, each weighted 1; the same on every process.

    Args:
        model: (x, t, **cond) -> prediction; asked in eval mode, so no label is dropped.
        diffusion: a GaussianDiffusion or a FlowMatching.
        batch_size: rows at a time on each process.
    Returns:
        the loss; NaN if it is not finite for any row.
    """
    device, count = dist_util.dev(), len(heldout)
    places = th.from_numpy(np.random.default_rng(mix(seed, VALIDATION)).permutation(count))
    mine = range(dist_util.rank(), count, dist_util.world_size())
    training, losses = model.training, []
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
        losses += diffusion.training_losses(model, z, t, model_kwargs=cond, noise=noise)["loss"].double().tolist()
    model.train(training)
    everyone = sum(dist_util.gather_objects(losses), [])
    return math.fsum(everyone) / count if np.isfinite(everyone).all() else math.nan  # fsum: in any order the same


def times_at(diffusion, quantiles: th.Tensor) -> th.Tensor:
    """The times at places in [0, 1) of a process: int64 in [0, T), or float32 where a flow may be trained."""
    if isinstance(diffusion, FlowMatching):
        eps = diffusion.train_eps
        return (eps + (1 - 2 * eps) * quantiles).float()
    return (quantiles * diffusion.num_timesteps).long()


class Validation:
    """Held-out data (or None), and the lowest loss that a run has had on them.

    Args:
        interval: steps between validations; the last step has one, too.
    """

    def __init__(self, heldout, *, interval: int, batch_size: int, seed: int):
        self.heldout, self.interval, self.batch_size, self.seed = heldout, interval, batch_size, seed
        self.best: tuple[float, int | None] = (math.inf, None)  # the loss, and the number of the checkpoint

    def due(self, step: int, last_step: int | None) -> int | None:
        """What a checkpoint after this step would be called if it is one to validate after, else None."""
        if self.heldout is None:
            return None
        return step if step % self.interval == 0 else step + 1 if step + 1 == last_step else None

    def judge(self, model, diffusion, weights: dict[str, th.Tensor], number: int, path: Path) -> None:
        """Collective: log the loss of a model; if it is the lowest so far, write its weights."""
        loss = validation_loss(model, diffusion, self.heldout, batch_size=self.batch_size, seed=self.seed)
        logger.logkv("val_loss", loss)
        logger.log(f"validation loss {loss:.6g} at step {number}")
        if math.isnan(loss):
            logger.warn(f"the validation loss is not finite: {path.name} stays as it is")
        elif loss < self.best[0]:
            self.best = loss, number
            dist_util.rank0_first(lambda: checkpoint.save(weights, path))

    def report(self, path: Path) -> None:
        """Say which step was best."""
        if self.heldout is not None and self.best[1] is not None:
            logger.log(f"lowest validation loss {self.best[0]:.6g} at step {self.best[1]}: {path}")
