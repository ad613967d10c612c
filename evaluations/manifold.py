"""Neighbourhoods in a feature space: is a point where the others are?

The ball of point x_i reaches to its k-th other neighbour, r_k(x_i); the balls of all points are their manifold.

    precision = share of generated points in a ball of a real one      recall = share of real points in a generated ball
    density   = 1/(k M) sum_ij [d(y_j, x_i) < r_k(x_i)]                coverage = share of real balls that hold a y_j

Distances are |u|^2 - 2 u.v + |v|^2 in float32, about the real points' mean, so that nothing cancels; a block of rows at
a time, so that memory is bounded.
"""

from typing import NamedTuple

import numpy as np
import torch as th

from guided_diffusion_vae.linear import linear

BLOCK = 1024
NEIGHBOURS, NEAR_COPY = 50, 1 / 3  # a near copy's nearest is this much nearer than its 50 nearest on average


class Fidelity(NamedTuple):
    """How real (precision, density) and how varied (recall, coverage) generated points are."""

    precision: float
    recall: float
    density: float
    coverage: float


def fidelity(real, generated, *, k_ball: int = 3, k_density: int = 5) -> Fidelity:
    """Precision and recall with balls of `k_ball` neighbours, density and coverage with `k_density`.

    Args:
        real, generated: features (N, d) and (M, d).
    Raises:
        ValueError: not more points than neighbours.
    Source:
        Kynkaanniemi et al. 2019, eq. 1 (closed balls); Naeem et al. 2020, eq. 4 and 5 (open balls).
    """
    x, y = _centred(real, generated)
    (ball_x, open_x), (ball_y,) = _radii(x, k_ball, k_density), _radii(y, k_ball)
    in_real, held = np.empty(len(y), dtype=bool), 0
    in_generated, nearest_generated = np.zeros(len(x), dtype=bool), np.full(len(x), np.inf, np.float32)
    for rows, d in _rows(y, x):  # (block of generated, N)
        in_real[rows] = (d <= ball_x).any(axis=1)
        in_generated |= (d <= ball_y[rows, None]).any(axis=0)
        held += int((d < open_x).sum())
        np.minimum(nearest_generated, d.min(axis=0), out=nearest_generated)
    precision, recall, coverage = (float(a.mean()) for a in (in_real, in_generated, nearest_generated < open_x))
    return Fidelity(precision, recall, held / (k_density * len(y)), coverage)


def _radii(points, *ks: int) -> np.ndarray:
    """Squared distance of every point (N, d) to its k-th other neighbour, for each k: (len(ks), N)."""
    lacking = [k for k in ks if len(points) <= k]
    if lacking:
        raise ValueError(f"{len(points)} points have no {lacking[0]}-th neighbour; give more than {lacking[0]}")
    near = [th.from_numpy(d).topk(max(ks) + 1, largest=False).values for _, d in _rows(points, points)]
    return th.cat(near)[:, list(ks)].T.numpy()  # 0 is the point itself


def nearest(points, references, *, count: int = 1, skip: int = 0) -> np.ndarray:
    """Distances of points (N, d) to their `count` nearest references (M, d), near to far: (N, count).

    Args:
        skip: leave out so many of the nearest; 1 where every point is among the references itself.
    """
    return neighbours(points, references, count=count, skip=skip)[0]


def neighbours(points, references, *, count: int = 1, skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distances as of `nearest`, and which references they are: (N, count) each."""
    references, points = _centred(references, points)
    last = skip + count
    if len(references) < last:
        raise ValueError(f"{len(references)} references have no {last}-th nearest; give more")
    near = [th.from_numpy(d).topk(last, largest=False) for _, d in _rows(points, references)]
    squares, places = (th.cat(column)[:, skip:].numpy() for column in zip(*near, strict=True))
    return np.sqrt(squares), places


def near_copy_rate(distances) -> float:
    """Share of points much nearer to one reference than to others.

    Args:
        distances: to the nearest 50 or so, near to far, (N, count).
    Source:
        in the manner of Yoon et al. 2023, with their third.
    """
    distances = np.asarray(distances)
    return float((distances[:, 0] < NEAR_COPY * distances.mean(axis=1)).mean())


def _centred(real, others) -> tuple[np.ndarray, np.ndarray]:
    """Both in float32, moved so that the real points' mean is 0."""
    mean = np.mean(real, axis=0, dtype=np.float64).astype(np.float32)
    return np.asarray(real, np.float32) - mean, np.asarray(others, np.float32) - mean


def _rows(x, y):
    """Yield (slice of x, squared distances (block, M) from those rows to all of y)."""
    squares, references = (y * y).sum(axis=1), th.from_numpy(y)
    for i in range(0, len(x), BLOCK):
        block = x[i : i + BLOCK]
        d = linear(th.from_numpy(-2 * block), references).numpy()
        d += (block * block).sum(axis=1)[:, None]
        d += squares
        yield slice(i, i + BLOCK), np.maximum(d, 0, out=d)
