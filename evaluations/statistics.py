"""Distances between two sets of feature vectors.

Frechet distance between the Gaussians that fit them (FID when the features are Inception's, and only then):

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

and precision, recall, density and coverage on nearest-neighbour balls.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """FD of two Gaussians, exact to rounding even if their covariances are singular.

    tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of R S_2 R with R = S_1^(1/2), which is symmetric: no
    square root of a general matrix is needed.

    Args:
        mu1, mu2: (D,); sigma1, sigma2: (D, D).
    Source: Heusel et al. 2017, equation 6.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ sigma2 @ root), 0, None)).sum()
    gap = np.asarray(mu1, dtype=np.float64) - mu2
    return float(gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def frechet_distance_of(a, b) -> float:
    """FD of two sets of features (N, D), (M, D); warns if a set is too small for its covariance."""
    for features in (a, b):
        if len(features) <= features.shape[1]:
            warnings.warn(f"biased: {len(features)} samples for {features.shape[1]} features", stacklevel=2)
    return frechet_distance(*gaussian_of(a), *gaussian_of(b))


def gaussian_of(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (unbiased) covariance of features (N, D), in float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def kernel_distance(a, b) -> float:
    """Squared mean discrepancy under the kernel (x y / D + 1)^3, unbiased; KID if the features are Inception's.

    Source: Binkowski et al. 2018, equation 4.
    """
    a, b = (np.asarray(features, dtype=np.float64) for features in (a, b))
    d, n, m = a.shape[1], len(a), len(b)
    within_a, within_b, between = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    same_a = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    same_b = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(same_a + same_b - 2 * between.mean())


class Manifold(NamedTuple):
    """Fractions in [0, 1], but density, which may pass 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real, fake, k: int = 3) -> Manifold:
    """How much of each set lies within reach of the other; reach is the distance to the k-th own neighbour.

    precision: generated images within reach of a real one; recall: the reverse. density: how many real balls hold a
    generated image, over k; coverage: real images whose ball holds one.

    Source: Kynkaanniemi et al. 2019; Naeem et al. 2020.
    """
    real_reach, fake_reach = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
    distance = cdist(real, fake)
    inside_real, inside_fake = distance <= real_reach[:, None], distance <= fake_reach[None, :]
    return Manifold(
        precision=float(inside_real.any(axis=0).mean()),
        recall=float(inside_fake.any(axis=1).mean()),
        density=float(inside_real.sum(axis=0).mean() / k),
        coverage=float(inside_real.any(axis=1).mean()),
    )


def nearest_distances(queries, references) -> np.ndarray:
    """Distance (N,) of each query to its nearest reference."""
    return cdist(queries, references).min(axis=1)
