"""Distances between two clouds of features, each a matrix (N, d), and intervals of what is measured.

Frechet distance of the Gaussians with the clouds' means and covariances:

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2),   tr (S1 S2)^(1/2) = |R1 R2^T|_*   if S = R^T R

The nuclear norm |.|_* is the sum of the singular values, so real and not negative whatever the ranks, where the square
root of S1 S2 turns complex by rounding. R is the centred rows over (N - 1)^(1/2) if few, else a Cholesky factor.

Kernel distance (KID), which is unbiased, so that it may be below 0:

    KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),   k(a, b) = (a.b / d + 1)^3

All in float64. FD grows as N shrinks, by an amount that depends on the clouds: compare it only at the same N, and with
its floor, the distance of real images from real ones.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dpstrf  # pyright: ignore[reportAttributeAccessIssue]  # compiled: not declared

BLOCK = 1024  # rows at a time
ROWS = 4096  # of which a covariance is summed at a time; fewer spend their time on adding up matrices
SUBSET = 1000  # most rows of a subset of the kernel distance
FEWEST_USERS = 3  # users that an interval can be drawn from
PARTS = 10  # of a set, each of which is left out once
DOUBT = 1e-8  # share of a nuclear norm that rounding may make up


class Spread(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


class Floor(NamedTuple):
    """FD of real images from real ones: mean and standard deviation over splits of n and m rows."""

    mean: float
    std: float
    n: int
    m: int


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), divisor N - 1, of features (N, d); in float64, a block of rows at a time.

    Raises:
        ValueError: fewer than two rows, or not a matrix of finite numbers.
    """
    features = np.asarray(features)
    refusal = f"features are {features.shape}; they must be finite, (N, d), and N at least 2"
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(refusal)
    mean = features.mean(axis=0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise ValueError(refusal)
    scatter = np.zeros((len(mean), len(mean)))
    for i in range(0, len(features), ROWS):
        centred = features[i : i + ROWS] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def gaussian_frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """Frechet distance of two Gaussians, from means (d,) and covariances (d, d).

    Source:
        Heusel et al. 2017, eq. 6.
    """
    shift = np.asarray(mean1, dtype=np.float64) - np.asarray(mean2, dtype=np.float64)
    return float(shift @ shift) + frechet_of_roots(covariance_root(cov1), covariance_root(cov2))


def frechet_distance(x, y) -> float:
    """Frechet distance of features x (N, d) and y (M, d); warns when a covariance cannot have full rank."""
    (n, d), m = np.shape(x), len(y)
    if min(n, m) <= d:
        warnings.warn(f"Frechet distance of {d} features is biased, n={min(n, m)}", stacklevel=2)
    (mean1, root1), (mean2, root2) = mean_and_root(x), mean_and_root(y)
    return float(((mean1 - mean2) ** 2).sum()) + frechet_of_roots(root1, root2)


def frechet_of_roots(root1: np.ndarray, root2: np.ndarray) -> float:
    """tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), from R1 and R2 with S = R^T R: the part of FD that is no shift."""
    return float(np.linalg.norm(root1) ** 2 + np.linalg.norm(root2) ** 2 - 2 * nuclear_norm(root1 @ root2.T))


def mean_and_root(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and a root R (r, d) of the covariance R^T R of features (N, d), in float64.

    Raises:
        ValueError: see `moments`.
    """
    n, d = np.shape(features) if np.ndim(features) == 2 else (0, 0)
    if not 2 <= n <= d:
        mean, cov = moments(features)
        return mean, covariance_root(cov)
    features = np.asarray(features, dtype=np.float64)
    if not np.isfinite(features).all():
        raise ValueError(f"features are {features.shape}; they must be finite")
    mean = features.mean(axis=0)
    return mean, (features - mean) / np.sqrt(n - 1)


def covariance_root(cov) -> np.ndarray:
    """R (rank, d) with R^T R = cov (d, d), by Cholesky's method; with pivots, at twice the cost, if rank is lacking."""
    cov = np.asarray(cov, dtype=np.float64)
    try:
        return np.linalg.cholesky(cov).T
    except np.linalg.LinAlgError:
        pass
    lower, pivots, rank, _ = dpstrf(cov, lower=1)
    root = np.empty((rank, len(cov)))
    root[:, pivots - 1] = np.tril(lower)[:, :rank].T
    return root


def nuclear_norm(matrix: np.ndarray) -> float:
    """Sum of the singular values: roots of the Gram matrix's eigenvalues unless rounding spoils too many of them."""
    small = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    if not len(small):
        return 0.0
    squares = np.maximum(np.linalg.eigvalsh(small @ small.T), 0)
    roots, rounding = np.sqrt(squares), 4 * np.finfo(np.float64).eps * squares.max()
    if (np.sqrt(squares + rounding) - roots).sum() > DOUBT * roots.sum():
        roots = np.linalg.svd(small, compute_uv=False)  # exact, at two to three times the cost
    return float(roots.sum())


def frechet_floor(real, n: int, m: int, *, splits: int = 10, seed: int = 0) -> Floor:
    """FD between disjoint random parts of n and m rows of the same features: what perfect samples would score.

    Where n + m rows are more than there are, both shrink in proportion: the result says to what. FD falls as the
    parts grow, so that such a floor is too high.
    """
    real, rng = np.asarray(real), np.random.default_rng(seed)
    if n + m > len(real):
        n, m = (max(2, size * len(real) // (n + m)) for size in (n, m))
    distances = []
    for _ in range(splits):
        deal = rng.permutation(len(real))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the floor is there to show the bias
            distances.append(frechet_distance(real[deal[:n]], real[deal[n : n + m]]))
    return Floor(float(np.mean(distances)), float(np.std(distances)), n, m)


def frechet_interval(x, y) -> tuple[float, float]:
    """95 % of the Frechet distance of features x (N, d) and y (M, d), by leaving out a tenth of a side at a time.

        s^2 = sum over sides (g - 1) / g sum_i (FD_i - mean FD)^2,   g parts a side;   FD -+ 1.96 s, never below 0

    Drawing anew with replacement would not do: fewer different rows are farther apart. Every tenth row is a part, so
    rows in the order of users lose each user alike.

    Source:
        Shao and Wu 1989: the jackknife that leaves out several rows.
    """
    x, y = np.asarray(x), np.asarray(y)
    variance = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the bias, which the distance itself has told
        value = frechet_distance(x, y)
        for rows, distance in (
            (x, lambda left: frechet_distance(left, y)),
            (y, lambda left: frechet_distance(x, left)),
        ):
            parts = min(PARTS, len(rows))
            if len(rows) - -(-len(rows) // parts) < 2:
                continue
            places = np.arange(len(rows)) % parts
            found = np.array([distance(rows[places != part]) for part in range(parts)])
            variance += (parts - 1) / parts * ((found - found.mean()) ** 2).sum()
    half = 1.96 * variance**0.5
    return max(0.0, value - half), value + half


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


def kernel_distance_subsets(x, y, subsets: int = 100, size: int | None = None, *, seed: int = 0) -> Spread:
    """KID over random subsets of `size` rows of each side, drawn without replacement: mean and standard deviation.

    Args:
        size: None takes `subset_size`.
    """
    x, y, rng = np.asarray(x), np.asarray(y), np.random.default_rng(seed)
    size = size or subset_size(len(x), len(y))
    if size > min(len(x), len(y)):
        raise ValueError(f"a subset of {size} rows is more than the {min(len(x), len(y))} there are")
    distances = [
        kernel_distance(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return Spread(float(np.mean(distances)), float(np.std(distances)))


def subset_size(n: int, m: int) -> int:
    """Rows of a subset: 1000, but at most half of the smaller side, as whole sides would not vary."""
    return min(SUBSET, max(2, min(n, m) // 2))


def classifier_inception_score(probabilities) -> float:
    """exp mean_i KL(p_i || mean p), from class probabilities (N, K): between 1 and K; a probability of 0 adds 0.

    Source:
        Salimans et al. 2016, section 4; of any classifier, so say which.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    return float(np.exp(_entropy(p.mean(axis=0)) - np.mean([_entropy(row) for row in p])))


def bootstrap_interval(
    fn: Callable[[np.ndarray], float], groups, *, seed: int, rounds: int = 200, level: float = 0.95
) -> tuple[float, float]:
    """Interval of a statistic when whole groups (users) are drawn anew with replacement.

    Args:
        fn: of row numbers, some several times; rounds in which it is not a number do not count.
        groups: the group of each row, (N,); `np.arange(N)` if every row is its own.
    """
    rng = np.random.default_rng(seed)
    _, first = np.unique(np.sort(groups), return_index=True)
    rows = np.split(np.argsort(groups, kind="stable"), first[1:])
    values = [fn(np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])) for _ in range(rounds)]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values, seed: int) -> tuple[float, float] | None:
    """95 % of the mean of values (users,), by drawing the users anew; None of fewer than three, who say too little."""
    values = np.asarray(values)
    if len(values) < FEWEST_USERS:
        return None
    return bootstrap_interval(lambda rows: values[rows].mean(), np.arange(len(values)), seed=seed, rounds=1000)


def _entropy(p: np.ndarray) -> float:
    """- sum p log p, with 0 log 0 = 0."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _kernel(x, y) -> np.ndarray:
    """k(x_i, y_i), row by row."""
    return ((x * y).mean(axis=1) + 1) ** 3


def _kernel_sum(x, y) -> float:
    """sum_ij k(x_i, y_j), a block of rows at a time."""
    blocks = (x[i : i + BLOCK] @ y.T / x.shape[1] for i in range(0, len(x), BLOCK))
    return sum(((block + 1) ** 3).sum() for block in blocks)
