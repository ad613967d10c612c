"""Solvers that need few steps: DPM-Solver++ 2M and its SDE form, Heun, UniPC; for Gaussian processes and for flows.

On either process x_t = alpha x_start + sigma noise. With lambda = log(alpha / sigma), which grows toward data, and the
network's guess D of x_start, the ODE's way from a time s to a cleaner t, h apart in lambda, is (Lu et al. 2022, eq. 8)

    x_t = sigma_t / sigma_s x_s + sigma_t int_s^t e^lambda D dlambda

so that only D has to be approximated. A walk goes from the noise end of the process to its data end, at times that a
spacing chooses, and then in one jump of first order to sigma = 0, where the formula with constant D says x = D.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch as th
from tqdm import tqdm

from .config import UserError
from .denoiser import Denoiser, Point

Guess = Callable[[th.Tensor, Point], th.Tensor]  # x_start at x and a point
Unary = Callable[[th.Tensor], th.Tensor]  # x -> something like x

RHO = 7.0  # Karras et al. 2022, table 1
FEW, LONG = 15, 2.0  # walks with fewer steps, or with a last one so much longer than the one before, end in order 1


# ---- spacings


def _karras(denoiser, num_steps):
    """sigma / alpha is even in its power 1 / rho: equation 5 of Karras et al. 2022."""
    noisiest, cleanest = np.exp(-denoiser.log_snr(np.array(denoiser.interval))) ** (1 / RHO)
    ratio = np.linspace(noisiest, cleanest, num_steps) ** RHO
    return denoiser.time_at(-np.log(ratio))


def _logsnr(denoiser, num_steps):
    first, last = denoiser.log_snr(np.array(denoiser.interval))
    return denoiser.time_at(np.linspace(first, last, num_steps))


SPACINGS: dict[str, Callable[[Denoiser, int], np.ndarray]] = {
    "karras": _karras,
    "uniform": lambda denoiser, num_steps: denoiser.uniform(num_steps),  # in the process's own time
    "logsnr": _logsnr,
}


def times_of(denoiser: Denoiser, num_steps: int, spacing: str) -> np.ndarray:
    """The times of a walk: num_steps numbers from the noise end to the data end, both exact; float64.

    On mixtures of Gaussians, with 20 steps, logsnr ends nearest to the truth with linear betas; uniform with cosine
    betas and with flows, whose noise ends reach so far in lambda that the other two spend many steps there.

    Raises:
        UserError: fewer than 2 steps, or an unknown spacing.
    """
    if num_steps < 2:
        raise UserError(f"--num_steps is {num_steps}; a walk needs its two ends: give 2 or more")
    _check("spacing", spacing, SPACINGS)
    times = SPACINGS[spacing](denoiser, num_steps)
    times[[0, -1]] = denoiser.interval
    return times


# ---- solvers: (guess, x at the first point, points, noise_like) -> x_0


def dpmpp_2m(guess: Guess, x: th.Tensor, points: list[Point], noise_like: Unary | None = None) -> th.Tensor:
    """DPM-Solver++ 2M: order 2, one guess a point; algorithm 2 of Lu et al. 2022.

    x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) D',      D' = D_s + h / (2 h_before) (D_s - D_before)
    """
    del noise_like  # nothing is random after the first noise

    def step(x, D, s, t, h):
        return t.sigma / s.sigma * x - t.alpha * math.expm1(-h) * D

    return _walk_2m(step, guess, x, points)


def dpmpp_2m_sde(guess: Guess, x: th.Tensor, points: list[Point], noise_like: Unary | None = None) -> th.Tensor:
    """SDE-DPM-Solver++ 2M: as `dpmpp_2m`, for the SDE; noise is drawn at every step but the last.

    x_t = sigma_t / sigma_s e^-h x_s + alpha_t (1 - e^-2h) D' + sigma_t sqrt(1 - e^-2h) noise
    """

    def step(x, D, s, t, h):
        fresh = -math.expm1(-2 * h)  # the share of the variance that is drawn anew
        mean = t.sigma / s.sigma * math.exp(-h) * x + t.alpha * fresh * D
        return mean + t.sigma * math.sqrt(fresh) * (noise_like or th.randn_like)(x)

    return _walk_2m(step, guess, x, points)


def _walk_2m(step, guess, x, points):
    """Steps with D' in place of D; the first knows no guess before, and the last may not extrapolate from it."""
    D_before, h_before = None, 0.0
    for s, t in pairwise(points):
        h, D = t.log_snr - s.log_snr, guess(x, s)
        first_order = D_before is None or (t is points[-1] and _ends_in_first_order(points))
        x = step(x, D if first_order else D + h / (2 * h_before) * (D - D_before), s, t, h)
        D_before, h_before = D, h
    return guess(x, points[-1])


def _ends_in_first_order(points):
    """Whether the step before the jump is not to extrapolate.

    In a walk of few steps (Lu et al. 2022), and where it is long: near data, even times are far apart in lambda.
    """
    before, last = np.diff([point.log_snr for point in points[-3:]])[[0, -1]]
    return len(points) < FEW or last > LONG * before


def heun(guess: Guess, x: th.Tensor, points: list[Point], noise_like: Unary | None = None) -> th.Tensor:
    """Heun: order 2, two guesses a step and one for the jump; algorithm 1 of Karras et al. 2022.

    Of the paper's s and sigma it takes s = cos u, sigma = tan u, on whose arc y the slope stays finite at pure noise:

        y = x / sqrt(alpha^2 + sigma^2),      tan u = sigma / alpha,      dy/du = (cos u y - D) / sin u
    """
    del noise_like
    radii = [math.hypot(point.alpha, point.sigma) for point in points]
    angles = [math.atan2(point.sigma, point.alpha) for point in points]

    def slope(y, i):
        return (math.cos(angles[i]) * y - guess(radii[i] * y, points[i])) / math.sin(angles[i])

    y = x / radii[0]
    for i in range(len(points) - 1):
        h = angles[i + 1] - angles[i]
        here = slope(y, i)
        y = y + h / 2 * (here + slope(y + h * here, i + 1))
    return guess(radii[-1] * y, points[-1])


def unipc(
    guess: Guess, x: th.Tensor, points: list[Point], noise_like: Unary | None = None, *, order: int = 2
) -> th.Tensor:
    """UniPC: predict x_t from `order` guesses, guess there, and correct x_t with that guess; one guess a point.

    The corrector makes the walk converge with order + 1. The order in use rises from 1 at the first step and falls to
    1 at the jump. Zhao et al. 2023 with B(h) = e^h - 1, in terms of x_start.

    Args:
        order: 2, which Zhao et al. advise for guided models; 3 for others.
    """
    del noise_like
    known = [(points[0], guess(x, points[0]))]  # latest last
    for i, (s, t) in enumerate(pairwise(points), start=1):
        p = min(order, i, len(points) + 1 - i)
        if t is points[-1] and _ends_in_first_order(points):
            p = 1
        ahead = _unified(x, s, t, known[-p:])
        known.append((t, guess(ahead, t)))
        x = _unified(x, s, t, known[-p - 1 :])
        known = known[-order:]
    return known[-1][1]


def _unified(x, s, t, known):
    """x_t from x_s and the guesses at some points, s among them: UniP, or UniC where t is among them.

        x_t = sigma_t / sigma_s x_s + alpha_t B (D_s + sum_m a_m / r_m (D_m - D_s)),      B = 1 - e^-h

    r_m = (lambda_m - lambda_s) / h. The a_m make it exact for D a polynomial: sum_m a_m r_m^(k-1) = k! h psi_{k+1} / B
    with psi_1 = B / h and psi_{k+1} = (1 / k! - psi_k) / h. With one difference the paper takes a = 1/2.
    """
    h = t.log_snr - s.log_snr
    B = -math.expm1(-h)
    (D_s,) = (D for point, D in known if point is s)
    others = [((point.log_snr - s.log_snr) / h, D) for point, D in known if point is not s]
    psi, wanted = B / h, []
    for k in range(1, len(others) + 1):
        psi = (1 / math.factorial(k) - psi) / h
        wanted.append(math.factorial(k) * h * psi / B)
    r = np.array([r for r, _ in others])
    a = np.linalg.solve(np.vander(r, increasing=True).T, wanted) if len(r) > 1 else np.full(len(r), 0.5)
    mix = D_s
    for weight, (_, D) in zip((a / r).tolist(), others, strict=True):
        mix = mix + weight * (D - D_s)
    return t.sigma / s.sigma * x + t.alpha * B * mix


SOLVERS: dict[str, Callable[..., th.Tensor]] = {
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "heun": heun,
    "unipc": unipc,
    "unipc_3": partial(unipc, order=3),
}


@th.no_grad()
def sample(
    denoiser: Denoiser,
    x: th.Tensor,
    num_steps: int,
    *,
    solver: str,
    spacing: str,
    noise_like: Unary | None = None,
    progress: bool = False,
) -> th.Tensor:
    """Walk from noise to x_0.

    Args:
        x: (N, ...) ~ N(0, I). Where the walk starts, alpha^2 + sigma^2 may be below 1 (a flow's straight path): x is
            scaled to that variance, which data of unit variance have there.
        num_steps: times, and calls of the network; `heun` calls it 2 num_steps - 1 times.
        solver: a name of SOLVERS; only `dpmpp_2m_sde` draws noise after the first.
        spacing: a name of SPACINGS.
        noise_like: draws a step's noise for x; None is `torch.randn_like`.
    Returns:
        x_0, as x.
    Raises:
        UserError: fewer than 2 steps, or an unknown name.
    """
    _check("sampler", solver, SOLVERS)
    points = denoiser.points(times_of(denoiser, num_steps, spacing))
    calls = 2 * num_steps - 1 if solver == "heun" else num_steps
    with tqdm(total=calls, disable=not progress) as bar:

        def guess(x, point):
            bar.update()
            return denoiser.guess(x, point)

        return SOLVERS[solver](guess, x * math.hypot(points[0].alpha, points[0].sigma), points, noise_like)


def _check(flag, name, known):
    if name not in known:
        raise UserError(f"--{flag} is {name!r}; it must be one of {', '.join(known)}")
