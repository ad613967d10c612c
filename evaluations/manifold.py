"""Neighbourhoods in a feature space: is a point where the others are?

The ball of point x_i reaches to its k-th other neighbour, r_k(x_i); the balls of all points are their manifold.

    precision = share of generated points in a ball of a real one      recall = share of real points in a generated ball
    density   = 1/(k M) sum_ij [d(y_j, x_i) < r_k(x_i)]                coverage = share of real balls that hold a y_j

Distances are |u|^2 - 2 u.v + |v|^2 in float32, about the real points' mean, so that nothing cancels; a block of rows at
a time, so that memory is bounded.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 1024


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
    ball_x, ball_y, open_x = radii(x, k_ball), radii(y, k_ball), radii(x, k_density)
    in_real, held = [], 0
    for _, d in _rows(y, x):  # (block of generated, N)
        in_real.append((d <= ball_x).any(axis=1))
        held += int((d < open_x).sum())
    in_generated, covered = [], []
    for rows, d in _rows(x, y):  # (block of real, M)
        in_generated.append((d <= ball_y).any(axis=1))
        covered.append(d.min(axis=1) < open_x[rows])
    precision, recall, coverage = (float(np.concatenate(a).mean()) for a in (in_real, in_generated, covered))
    return Fidelity(precision, recall, held / (k_density * len(y)), coverage)


def radii(points, k: int) -> np.ndarray:
    """Squared distance of every point (N, d) to its k-th other neighbour: (N,)."""
    if len(points) <= k:
        raise ValueError(f"{len(points)} points have no {k}-th neighbour; give more than {k}")
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _rows(points, points)])  # 0 is the point itself


def nearest(points, references, *, count: int = 1, skip: int = 0) -> np.ndarray:
    """Distances of points (N, d) to their `count` nearest references (M, d), near to far: (N, count).

    Args:
        skip: leave out so many of the nearest; 1 where every point is among the references itself.
    """
    references, points = _centred(references, points)
    last = skip + count
    if len(references) < last:
        raise ValueError(f"{len(references)} references have no {last}-th nearest; give more")
    near = [
        np.sort(np.partition(d, last - 1, axis=1)[:, :last], axis=1)[:, skip:] for _, d in _rows(points, references)
    ]
    return np.sqrt(np.concatenate(near))


def _centred(real, others) -> tuple[np.ndarray, np.ndarray]:
    """Both in float32, moved so that the real points' mean is 0."""
    mean = np.mean(real, axis=0, dtype=np.float64).astype(np.float32)
    return np.asarray(real, np.float32) - mean, np.asarray(others, np.float32) - mean


def _rows(x, y):
    """Yield (slice of x, squared distances (block, M) from those rows to all of y)."""
    squares = (y * y).sum(axis=1)
    for i in range(0, len(x), BLOCK):
        block = x[i : i + BLOCK]
        d = (block * block).sum(axis=1)[:, None] - 2 * block @ y.T + squares
        yield slice(i, i + BLOCK), np.maximum(d, 0)
