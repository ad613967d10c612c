"""The length of the moving average, chosen after the run: power-function averages, and any other rebuilt from a few.

After t updates the average weighs the weights of time tau in [0, t] with a profile that grows with the run,

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    theta_t = beta_t theta_(t-1) + (1 - beta_t) weights,
    beta_t = (1 - 1/t)^(gamma + 1),                    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)),

where sigma_rel is the standard deviation of the profile as a share of the run: its relative length. The first update
has beta = 0, so the initial weights are forgotten. Snapshots of two lengths, taken at a few times, span the profile of
a third: the weights of the nearest combination make its average. Source: Karras et al. 2024 ("Analyzing and improving
the training dynamics of diffusion models"), section 3 and appendix C. Ours is that the combination sums to 1.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th

from . import checkpoint, dist_util, logger
from .config import UserError, refuse_below
from .nn import update_ema

FOLDER = "posthoc"  # of the snapshots, in the log folder
NAME = re.compile(r"power([\d.e-]+)_(\d+)\.pt")
LONGEST = 0.288  # sigma_rel of the plain mean, gamma = 0, is 12^-1/2 = 0.2887
MAX_ERROR = 0.05  # a larger part of the profile that is not met is another average than was asked for
SNAPSHOTS = 16  # of each length in a run whose end is known


# ---- one average -----------------------------------------------------------------------------------------------------


def lengths_of(text) -> list[float]:
    """`0.05,0.10` (or a number) as a list of relative lengths; empty text as none.

    Raises:
        UserError: one is no number that a profile has, or is there twice.
    """
    try:
        lengths = [float(word) for word in str(text).split(",") if str(text)]
    except ValueError as error:
        raise UserError(f"--posthoc_ema is {text!r}; it must be relative lengths such as 0.05,0.10") from error
    for length in lengths:
        refuse_length(length, "--posthoc_ema")
    if len(set(lengths)) < len(lengths):
        raise UserError(f"--posthoc_ema is {text!r}; give every length once")
    return lengths


def refuse_length(sigma_rel: float, flag: str) -> None:
    """Raise for a relative length that no profile with gamma >= 0 has, or none worth the name.

    Raises:
        UserError: names the flag and the range.
    """
    if not 0.001 <= sigma_rel <= LONGEST:
        raise UserError(f"{flag} is {sigma_rel:g}; a relative length lies between 0.001 and {LONGEST} (a plain mean)")


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a relative length.

    With s = sigma_rel^-2 it is the largest root of (gamma + 2)^2 (gamma + 3) - s (gamma + 1).
    """
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def beta_of(t: int, gamma: float) -> float:
    """The rate of the moving average at its update t = 1, 2, ..."""
    return (1 - 1 / t) ** (gamma + 1)


class PowerAverages:
    """The averages that a run tracks, and their snapshots.

    Args:
        lengths: relative lengths.
        interval: updates between snapshots.
        folder: the log folder.
    """

    def __init__(self, lengths: list[float], *, interval: int, folder):
        self.lengths, self.interval, self.folder = lengths, interval, Path(folder or "", FOLDER)
        self.gammas, self.params = [gamma_of(length) for length in lengths], []

    def refuse_others(self, path: str, state: dict) -> None:
        """Raise for lengths that a checkpoint knows nothing of: an average that begins late has another profile.

        Raises:
            UserError: names the flag, the length and the remedy.
        """
        tracked = state.get("posthoc_ema", [])
        if dropped := [length for length in tracked if length not in self.lengths]:
            logger.warn(
                f"--posthoc_ema: {path} tracked {','.join(map(str, dropped))}, which is not given now:"
                " its snapshots end here and cannot be taken up again"
            )
        for length in self.lengths:
            if length not in tracked:
                known = ",".join(str(length) for length in tracked)
                raise UserError(
                    f"--posthoc_ema {length}: {path} did not track this length from its first step:"
                    f" {f'give {known}' if known else 'leave it out'}, or start a new run"
                )

    def begin(self, weights: Sequence[th.Tensor]) -> None:
        """Take room for the averages; what is in them is forgotten at the first update."""
        self.params = [[param.detach().clone() for param in weights] for _ in self.lengths]

    def named(self) -> list[tuple[str, list[th.Tensor]]]:
        """The averages as a checkpoint keeps them, in files ema_power0.05_000010.pt."""
        return [(f"power{length}", params) for length, params in zip(self.lengths, self.params, strict=True)]

    def update(self, weights: Iterable[th.Tensor], t: int) -> None:
        """Take in the weights after t updates, also if the last of them was passed over (float16)."""
        for gamma, params in zip(self.gammas, self.params, strict=True):
            update_ema(params, weights, rate=beta_of(t, gamma))

    def due(self, t: int, ends: bool) -> bool:
        """Whether there is a snapshot after t updates; the run's last one has one, too."""
        return bool(self.lengths) and (ends or t % self.interval == 0)

    def write(self, t: int, state_dict_of: Callable[[list[th.Tensor]], dict[str, th.Tensor]]) -> None:
        """Collective: call on every process. Write the snapshots after t updates.

        Raises:
            SaveError: the disk is full.
        """
        for name, params in self.named():
            weights = state_dict_of(params)

            def save(path=self.folder / f"{name}_{t:06d}.pt", weights=weights):
                path.parent.mkdir(exist_ok=True)
                checkpoint.save(weights, path)

            dist_util.rank0_first(save)

    def forget(self, after: int) -> None:
        """Collective: call on every process. Delete the snapshots of updates that a resumed run does again."""

        def delete():
            for leftover in self.folder.glob(".*.tmp-*"):
                leftover.unlink(missing_ok=True)
            for snapshot in snapshots_in(self.folder):
                if snapshot.t > after:
                    snapshot.path.unlink(missing_ok=True)

        if self.lengths:
            dist_util.rank0_first(delete)


def interval_of(given: int, last_step: int | None, save_interval: int) -> int:
    """Updates between snapshots: as given; a sixteenth of the run; or, where it has no end, as between checkpoints."""
    return given or (math.ceil(last_step / SNAPSHOTS) if last_step else save_interval)


# ---- another one out of them -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PosthocConfig:
    """The average to build."""

    run_dir: str = ""  # the --log_dir of a training with --posthoc_ema
    sigma_rel: float = 0.1  # its relative length: standard deviation of the times it averages over, as a share of them
    step: int = 0  # after so many updates; 0 = after those of the last snapshot

    def __post_init__(self):
        refuse_length(self.sigma_rel, "--sigma_rel")
        refuse_below(self, 0, "step")


class Snapshot(NamedTuple):
    """A file with the average of one length after t updates."""

    path: Path
    sigma_rel: float
    t: int


class Fit(NamedTuple):
    """A combination of profiles."""

    shares: np.ndarray  # one of each profile; their sum is 1
    error: float  # 2-norm of what is missing, relative to that of the profile that was asked for


def snapshots_in(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, earlier ones first."""
    found = [(path, NAME.fullmatch(path.name)) for path in folder.glob("power*.pt")]
    named = [Snapshot(path, float(match[1]), int(match[2])) for path, match in found if match]
    return sorted(named, key=lambda snapshot: (snapshot.t, snapshot.sigma_rel))


def inner_product(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """The integral of the product of two profiles; arrays broadcast.

    With m = min(t_a, t_b), where the shorter one ends, and a, b for the gammas:

        (a + 1) (b + 1) / (a + b + 1)  (m / t_a)^a (m / t_b)^b  m / (t_a t_b)
    """
    m = np.minimum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (m / t_a) ** gamma_a * (m / t_b) ** gamma_b * m / (t_a * t_b)


def fit(times, lengths, *, t: float, sigma_rel: float) -> Fit:
    """The combination sum_i x_i p_i, sum_i x_i = 1, of profiles that is nearest to another one in the 2-norm.

    Args:
        times, lengths: (K,) of the profiles p_i that there are; none is later than t.
        t, sigma_rel: of the profile that is wanted.
    """
    times, gammas = np.asarray(times, dtype=np.float64), np.array([gamma_of(length) for length in lengths])
    gamma = gamma_of(sigma_rel)
    square = inner_product(t, gamma, t, gamma)
    norms = np.sqrt(inner_product(times, gammas, times, gammas))  # early profiles are high: all are scaled to 1
    gram = inner_product(times[:, None], gammas[:, None], times, gammas) / np.outer(norms, norms)
    wanted = inner_product(times, gammas, t, gamma) / norms / np.sqrt(square)
    sums = np.sqrt(square) / norms  # Lagrange: gram y + sums mu = wanted, sums y = 1
    system = np.block([[gram, sums[:, None]], [sums, np.zeros(1)]])
    y = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=1e-13)[0][:-1]
    x = y * sums
    return Fit(x / x.sum(), math.sqrt(max(0.0, float(y @ gram @ y - 2 * y @ wanted + 1))))


def rebuild(run_dir, sigma_rel: float, step: int = 0, say=print) -> Path:
    """Write the average of any relative length as ema_posthoc0.150_NNNNNN.pt into the run's folder, N its updates.

    Raises:
        UserError: no snapshots, none until that step, or none that can represent the length.
    """
    found = snapshots_in(Path(run_dir) / FOLDER)
    if not found:
        raise UserError(f"--run_dir {run_dir} has no snapshots in {FOLDER}/: train with --posthoc_ema 0.05,0.10")
    t = step or found[-1].t
    used = [snapshot for snapshot in found if snapshot.t <= t]
    if t > found[-1].t or not used:
        raise UserError(f"--step is {step}, but the snapshots are of steps {found[0].t} to {found[-1].t}")
    times, lengths = [snapshot.t for snapshot in used], [snapshot.sigma_rel for snapshot in used]
    shares, error = fit(times, lengths, t=t, sigma_rel=sigma_rel)
    known = ", ".join(f"{length:g}" for length in sorted(set(lengths)))
    about = f"{len(used)} snapshots of lengths {known} until step {used[-1].t}"
    if error > MAX_ERROR:
        raise UserError(
            f"--sigma_rel {sigma_rel:g} at step {t} cannot be built from {about}: {error:.1%} of its profile would be"
            f" missing (at most {MAX_ERROR:.0%}); choose a length between theirs, or a step that has a snapshot"
        )
    say(f"relative error of the profile {error:.3g}, from {about}")
    weights = combine(((checkpoint.load_state_dict(snapshot.path) for snapshot in used)), shares)
    length = max(f"{sigma_rel:.3f}", f"{sigma_rel:g}", key=len)
    path = Path(run_dir) / f"ema_posthoc{length}_{t:06d}.pt"
    checkpoint.save(weights, path)
    return path


def combine(state_dicts: Iterable[dict[str, th.Tensor]], shares: Iterable[float]) -> dict[str, th.Tensor]:
    """The sum of weights times their shares, one file at a time, in float64; given as they were. Whole numbers are the
    last file's."""
    total: dict[str, th.Tensor] = {}
    for weights, share in zip(state_dicts, shares, strict=True):
        for name, value in weights.items():
            if value.is_floating_point():
                total[name] = total.get(name, 0) + share * value.double()
    return {name: total[name].to(value.dtype) if name in total else value for name, value in weights.items()}
