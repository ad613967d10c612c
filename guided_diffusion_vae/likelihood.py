"""How likely a model finds data: bits per dimension of 8-bit pixels, nats per dimension of continuous latents.

A Gaussian process bounds the likelihood from below, by one term a step (Ho et al. 2020, equation 5):

    -log p(x_0) <= KL(q(x_T | x_0) || N(0, I)) - log p(x_0 | x_1)
                   + sum_{t >= 1} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))

and a flow has it by its ODE, see `FlowMatching.log_likelihood`. Row i draws its noise from (seed, i), so a number does
not depend on the batch size or the number of processes. No image is mirrored: upstream mirrors half of what it judges.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th

from . import dist_util
from .checkpoint import atomic_write, save_csv
from .config import UserError, refuse_below
from .data.stream import LIKELIHOOD, mix
from .flow_matching import FlowMatching
from .sample_util import PerImageNoise

BITS, NATS = "bpd", "nats_per_dim"
IN_NATS = "minus the log-density of continuous {what}, in nats per dimension: it may be negative"
MEANING = {
    "bound on pixels": "bpd: an upper bound on minus the log-probability of 8-bit pixels, in bits per dimension",
    "bound on latents": f"nats_per_dim: an upper bound on {IN_NATS.format(what='latents')}",
    "flow on pixels": f"nats_per_dim: {IN_NATS.format(what='pixels in [-1, 1]')}",
    "flow on latents": f"nats_per_dim: {IN_NATS.format(what='latents')}",
}


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Evaluating the likelihood: upstream's flags, then ours."""

    data_dir: str = ""  # images, or latents that latent_extract.py wrote, of the users that the model knows
    clip_denoised: bool = True  # clamp each predicted x_0 to [-1, 1]; by default only in pixels, never on latents
    num_samples: int = 1000  # how many, spread evenly over the data; all of them if there are fewer
    batch_size: int = 1  # images at a time on each process
    model_path: str = ""  # the model*.pt or ema_*.pt to ask; run.yaml beside it supplies all other flags
    num_steps: int = 250  # of a flow: points of the ODE's grid; a Gaussian process takes --timestep_respacing
    seed: int = 0  # of all random numbers
    cache_latents: bool = True  # encode once and read latents from disk; False encodes every batch anew
    latent_cache: str = ""  # folder for the cached latents; empty: .latents inside data_dir
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing to start
    log_dir: str = ""  # where the numbers go; empty: OPENAI_LOGDIR, else likelihood/ beside the model

    def __post_init__(self):
        refuse_below(self, 1, "num_samples", "batch_size")
        if self.num_steps < 2:
            raise UserError(f"--num_steps is {self.num_steps}; the ODE needs both ends of its grid: give 2 or more")


class Part(NamedTuple):
    """Some rows and what the model finds: -log p in nats per dimension (n,), and by step (n, T) from T - 1 to 0."""

    rows: list[int]
    nll: np.ndarray
    terms: dict[str, np.ndarray]  # vb (nats per dimension), mse of the noise, xstart_mse; none of a flow


def spread_rows(length: int, count: int) -> list[int]:
    """`count` of `length` rows, evenly spread, so that of data sorted by user each user has its share."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def parts_of_data(
    model, process, data, *, rows: Sequence[int], batch_size: int, seed: int, clip_denoised=False, num_steps=250
) -> Iterator[Part]:
    """Yield what the model finds of so many rows at a time. Collective: call on every process; the same on all.

    Args:
        model: (x, t, **cond) -> prediction, in eval mode, on this process's device.
        process: a GaussianDiffusion or a FlowMatching.
        data: has `batch(indices) -> (z, cond)`.
        batch_size: rows at a time on each process.
    """
    rank, together = dist_util.rank(), batch_size * dist_util.world_size()
    for first in range(0, len(rows), together):
        mine = list(rows[first : first + together][rank * batch_size : (rank + 1) * batch_size])
        found = None
        if mine:
            z, cond = data.batch(mine)
            noise = PerImageNoise(mix(seed, LIKELIHOOD), mine, z.device)
            found = _ask(model, process, z, cond, noise, mine, clip_denoised, num_steps)
        parts = [part for part in dist_util.gather_objects(found) if part]
        names = parts[0].terms
        yield Part(
            sum((part.rows for part in parts), []),
            np.concatenate([part.nll for part in parts]),
            {name: np.concatenate([part.terms[name] for part in parts]) for name in names},
        )


def _ask(model, process, z, cond, noise, rows, clip_denoised, num_steps):
    if isinstance(process, FlowMatching):
        probe = noise(z).sign()
        log_p = process.log_likelihood(model, z, num_steps, probe=probe, model_kwargs=cond)
        return Part(rows, -_numpy(log_p) / z[0].numel(), {})
    found = process.calc_bpd_loop(model, z, clip_denoised, model_kwargs=cond, noise_like=noise)
    terms = {name: _numpy(found[name]) for name in ("vb", "mse", "xstart_mse")}
    return Part(rows, _numpy(found["total_bpd"]) * math.log(2), terms | {"vb": terms["vb"] * math.log(2)})


def _numpy(values: th.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


class Tally:
    """Adds parts up: the mean so far, in bits of pixels or nats of what is continuous, and each user's.

    Args:
        vae: tells pixels from latents.
        labels: of all rows, or None.
    """

    def __init__(self, process, vae, labels: np.ndarray | None = None, class_names: Sequence[str] = ()):
        kind = "flow" if isinstance(process, FlowMatching) else "bound"
        self.meaning = MEANING[f"{kind} on {'pixels' if vae.is_pixel else 'latents'}"]
        self.unit = self.meaning.partition(":")[0]
        self.labels, self.class_names = labels, class_names
        self.rows, self.nll, self.sums = [], np.zeros(0), {}

    def add(self, part: Part) -> None:
        """Count a part in."""
        nats = math.log(2) if self.unit == BITS else 1.0
        self.rows += part.rows
        self.nll = np.concatenate([self.nll, part.nll / nats])
        for name, values in part.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + values.sum(0) / (nats if name == "vb" else 1.0)

    def __str__(self) -> str:
        return f"done {len(self.rows)} samples: {self.unit}={self.nll.mean():.6g}"

    def save(self, folder) -> None:
        """Write `nll.csv`, a line for each user and one for all, and of a Gaussian process upstream's three files.

        `vb_terms.npz` (in the unit of the mean), `mse_terms.npz` and `xstart_mse_terms.npz` hold the mean of every
        step, from T - 1 to 0, as arr_0: float32 (T,).
        """
        owners = np.full(len(self.rows), -1) if self.labels is None else self.labels[self.rows]
        users = sorted(set(owners[owners >= 0].tolist()))
        rows = [["user", "samples", self.unit, "standard_error"]]
        rows += [[self.class_names[label], *_summary(self.nll[owners == label])] for label in users]
        save_csv([*rows, ["all", *_summary(self.nll)]], Path(folder) / "nll.csv")
        for name, total in self.sums.items():
            with atomic_write(Path(folder) / f"{name}_terms.npz") as handle:
                np.savez(handle, (total / len(self.rows)).astype(np.float32))


def _summary(values: np.ndarray) -> list:
    """How many, their mean, and its standard error (empty for one value)."""
    error = f"{values.std(ddof=1) / math.sqrt(len(values)):.6g}" if len(values) > 1 else ""
    return [len(values), f"{values.mean():.8g}", error]
