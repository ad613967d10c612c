"""The five numbers of openai/guided-diffusion's evaluator, in its own arithmetic.

    Inception Score   float32 throughout, over consecutive splits of 5000, the mean of the splits
    FID, sFID         float32 means, float64 covariances, not clamped at 0
    precision, recall squared distances in float16, of blocks of 10,000 x 10,000; a block that overflows in float32

The last is no detail: float16 moves precision and recall by about 0.002 on ordinary features, and makes nonsense of
tightly clustered ones. `evaluations.manifold.fidelity` gives the same two numbers without that flaw.
"""

from typing import NamedTuple

import numpy as np
import torch as th

from guided_diffusion_vae.linear import linear

from .statistics import covariance_root, frechet_of_roots, mean_and_root, moments

NEIGHBOURS = 3
BLOCK = 10_000  # rows and columns of a block of distances; which of them overflow depends on it
ROWS = 1024  # of a block at a time
SOFTMAX_BATCH, SPLIT = 512, 5000


class Stats(NamedTuple):
    """Mean (d,), float32 if computed here, and covariance (d, d) float64 of features."""

    mu: np.ndarray
    sigma: np.ndarray


class Batch(NamedTuple):
    """Features of a batch of images, float32: pool (N, d), spatial (N, d'); statistics if they came with the batch."""

    pool: np.ndarray
    spatial: np.ndarray
    stats: Stats | None = None
    spatial_stats: Stats | None = None


def five_numbers(ref: Batch, sample: Batch, class_weight) -> dict[str, float]:
    """The evaluator's five lines: name -> number, in the order in which it prints them.

    Args:
        class_weight: (d, classes), of the class head on the pool features; it has no bias.
    """
    precision, recall = official_precision_recall(ref.pool, sample.pool)
    return {
        "Inception Score": inception_score(class_probabilities(sample.pool, class_weight)),
        "FID": _frechet(ref.pool, ref.stats, sample.pool, sample.stats),
        "sFID": _frechet(ref.spatial, ref.spatial_stats, sample.spatial, sample.spatial_stats),
        "Precision": precision,
        "Recall": recall,
    }


def official_moments(acts) -> Stats:
    """Mean of float32 features (N, d), summed in float32, and covariance in float64, divisor N - 1.

    Raises:
        ValueError: see `statistics.moments`.
    """
    return Stats(np.mean(np.asarray(acts, dtype=np.float32), axis=0), moments(acts)[1])


def official_frechet(a: Stats, b: Stats) -> float:
    """FID from statistics, within 1e-6 of what scipy.linalg.sqrtm(S1 S2) gives; slightly below 0 for equal ones.

    The official code adds eps = 1e-6 to both diagonals when sqrtm fails on singular covariances, and stops with
    "Imaginary component" when its root is complex. Here the trace of the root is a sum of singular values: neither can
    happen, and what is returned is the limit of eps to 0.
    """
    return _shift(a.mu, b.mu) + frechet_of_roots(covariance_root(a.sigma), covariance_root(b.sigma))


def frechet_of_features(x, y) -> float:
    """`official_frechet` of the features' statistics; without any (d, d) matrix where rows are fewer than d."""
    x, y = (np.asarray(a, dtype=np.float32) for a in (x, y))
    shift = _shift(np.mean(x, axis=0), np.mean(y, axis=0))
    return shift + frechet_of_roots(mean_and_root(x)[1], mean_and_root(y)[1])


def _frechet(x, x_stats: Stats | None, y, y_stats: Stats | None) -> float:
    if x_stats is None and y_stats is None:
        return frechet_of_features(x, y)
    return official_frechet(x_stats or official_moments(x), y_stats or official_moments(y))


def _shift(mu1, mu2) -> float:
    """|mu1 - mu2|^2 in the precision of the means."""
    difference = np.asarray(mu1) - np.asarray(mu2)
    return float(difference @ difference)


def class_probabilities(pool, class_weight) -> np.ndarray:
    """softmax(pool @ class_weight) in float32, 512 rows at a time: (N, classes)."""
    weight = th.from_numpy(np.ascontiguousarray(class_weight, dtype=np.float32))
    rows = th.from_numpy(np.ascontiguousarray(pool, dtype=np.float32)).split(SOFTMAX_BATCH)
    return th.cat([th.softmax(part @ weight, dim=1) for part in rows]).numpy()


def inception_score(probabilities, *, split: int = SPLIT) -> float:
    """Mean over consecutive splits of exp mean_i KL(p_i || mean p), from float32 probabilities (N, classes).

    A shorter last split weighs as much as the others. A probability of exactly 0 makes the score nan, officially:
    `underflows` counts them, `statistics.classifier_inception_score` is the score in which they add nothing.
    """
    probabilities, scores = np.asarray(probabilities), []
    for i in range(0, len(probabilities), split):
        part = probabilities[i : i + split]
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = part * (np.log(part) - np.log(np.mean(part, axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    return float(np.mean(scores))


def underflows(probabilities) -> int:
    """Number of images with a class probability of exactly 0."""
    return int((np.asarray(probabilities) == 0).any(axis=1).sum())


def official_precision_recall(reference, sample, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of samples in a reference image's ball to its k-th neighbour, and of reference images in a sample's.

    Ties count. Takes 0.75 GB beside features of 10,000 x 2048.

    Raises:
        ValueError: not more images than neighbours.
    """
    x, y = (_Points(points) for points in (reference, sample))
    x_radii, y_radii = _radii(x, k), _radii(y, k)
    x_in, y_in = np.zeros(len(x.full), dtype=bool), np.zeros(len(y.full), dtype=bool)
    for rows in _blocks(x):
        for columns in _blocks(y):
            for part, here in _parts(squared_distances(x, y, rows, columns), rows):
                d = part.float().numpy()
                x_in[here] |= (d <= y_radii[columns]).any(axis=1)
                y_in[columns] |= (d <= x_radii[here, None]).any(axis=0)
    return float(y_in.mean()), float(x_in.mean())


class _Points:
    """Features (N, d) in float32, and rounded to float16 though stored in float32, each with its squared norms."""

    def __init__(self, features):
        self.full = th.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
        self.rounded = self.full.half().float()
        self.full_norms = (self.full**2).sum(dim=1)
        self.half_norms = (self.rounded**2).half().sum(dim=1)


def _blocks(points: _Points) -> list[slice]:
    n = len(points.full)
    return [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def squared_distances(x: _Points, y: _Points, rows: slice, columns: slice) -> th.Tensor:
    """max(|x|^2 - 2 x.y + |y|^2, 0) of a block: each step rounded to float16, or float32 if any of that overflows."""
    block = th.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=th.half)
    for part, here in _parts(block, rows):
        th.mul(linear(x.rounded[here], y.rounded[columns]).half(), -2, out=part)
        part.add_(x.half_norms[here, None]).add_(y.half_norms[columns]).clamp_(min=0)
        if not th.isfinite(part).all():
            break
    else:
        return block
    block = th.empty(block.shape)
    for part, here in _parts(block, rows):
        th.mul(linear(x.full[here], y.full[columns]), -2, out=part)
        part.add_(x.full_norms[here, None]).add_(y.full_norms[columns])
    return block.clamp_(min=0)


def _parts(block: th.Tensor, rows: slice):
    """Yield (some rows of the block, where they are among all points)."""
    for i in range(0, len(block), ROWS):
        yield block[i : i + ROWS], slice(rows.start + i, min(rows.start + i + ROWS, rows.stop))


def _radii(points: _Points, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th other neighbour: the (k + 1)-th smallest, its own being 0."""
    n = len(points.full)
    if n <= k:
        raise ValueError(f"{n} images have no {k}-th neighbour; give more than {k}")
    near = th.full((n, k + 1), th.inf)
    for rows in _blocks(points):
        for columns in _blocks(points):
            for part, here in _parts(squared_distances(points, points, rows, columns), rows):
                near[here] = th.cat([near[here], part.float()], dim=1).topk(k + 1, largest=False).values
    return near.max(dim=1).values.numpy()
