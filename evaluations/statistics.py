"""Distances between two clouds of features, each a matrix (N, d).

Frechet distance of the Gaussians with the clouds' means and covariances:

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

Kernel distance (KID), which is unbiased, so that it may be below 0:

    KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),   k(a, b) = (a.b / d + 1)^3

All in float64. FD grows as N shrinks, by an amount that depends on the clouds: compare it only at the same N.
"""

import warnings

import numpy as np

BLOCK = 1024  # rows of a kernel matrix at a time


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), divisor N - 1, of features (N, d).

    Raises:
        ValueError: fewer than two rows, or not a matrix of finite numbers.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"features are {features.shape}; they must be finite, (N, d), and N at least 2")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def gaussian_frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """Frechet distance of two Gaussians, from means (d,) and covariances (d, d).

    tr (S1 S2)^(1/2) = sum_k sqrt(lambda_k(R S2 R)) with R = S1^(1/2): a symmetric matrix, so that no eigenvalue is
    complex, and what rounding makes of its zeros is told from the others by size.

    Source:
        Heusel et al. 2017, eq. 6.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mean1, cov1, mean2, cov2))
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    squares = np.linalg.eigvalsh(root @ cov2 @ root)
    rounding = len(squares) * np.finfo(np.float64).eps * squares.max()
    overlap = np.sqrt(squares[squares > rounding]).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap)


def frechet_distance(x, y) -> float:
    """Frechet distance of features x (N, d) and y (M, d); warns when a covariance cannot have full rank."""
    (n, d), m = np.shape(x), len(y)
    if min(n, m) <= d:
        warnings.warn(f"Frechet distance of {d} features is biased, n={min(n, m)}", stacklevel=2)
    return gaussian_frechet_distance(*moments(x), *moments(y))


def kernel_distance(x, y) -> float:
    """KID of features x (N, d) and y (M, d), over all pairs.

    Source:
        Binkowski et al. 2018, section 4.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 rows a side, got {n} and {m}")
    within_x = (_kernel_sum(x, x) - _kernel(x, x).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel(y, y).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def _kernel(x, y) -> np.ndarray:
    """k(x_i, y_i), row by row."""
    return ((x * y).mean(axis=1) + 1) ** 3


def _kernel_sum(x, y) -> float:
    """sum_ij k(x_i, y_j), a block of rows at a time."""
    blocks = (x[i : i + BLOCK] @ y.T / x.shape[1] for i in range(0, len(x), BLOCK))
    return sum(((block + 1) ** 3).sum() for block in blocks)
