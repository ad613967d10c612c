"""The evaluator's arithmetic: Frechet distance against scipy.linalg.sqrtm, precision and recall against the formula.

Features are drawn with a spectrum like that of Inception's (standard deviation 1 / sqrt k), so that the numbers are of
the usual size. The distance is timed from features to number, and from covariances to number. The formula of precision
and recall is written down as it stands, in numpy, with whole matrices of distances in float32.
"""

import numpy as np
import scipy.linalg
from timing import Settings, Way, compare, peak_extra_bytes, row

from evaluations.manifold import fidelity
from evaluations.official import Stats, frechet_of_features, official_frechet, official_precision_recall

DIMENSIONS = 2048  # Inception's
NEIGHBOURS = 3


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `rows` of the results."""
    (many, few), dimensions = ((256, 128), 64) if settings.tiny else ((10_000, 4_000), DIMENSIONS)
    rng = np.random.default_rng(0)
    x, y = (features(many, dimensions, scale=scale, rng=rng) for scale in (4, 3.6))
    stats = [usual_stats(a) for a in (x, y)]
    fast, slow = official_frechet(*stats), by_sqrtm(*stats)
    about = {"deviation": {"distance": abs(fast / slow - 1)}, "images": many, "dimensions": dimensions}
    ours, rival = Way("ours", lambda: official_frechet(*stats)), Way("scipy.linalg.sqrtm", lambda: by_sqrtm(*stats))
    pairs = [compare(f"Frechet distance of covariances, {dimensions}", ours, rival, "s", settings, **about)]
    ours = Way("ours", lambda: frechet_of_features(x, y))
    rival = Way("numpy.cov, scipy.linalg.sqrtm", lambda: by_sqrtm(*(usual_stats(a) for a in (x, y))))
    pairs.append(compare(f"Frechet distance of {many} x {dimensions} features", ours, rival, "s", settings, **about))

    x, y = x[:few], y[:few]
    formula, rows = Way("the formula in numpy", lambda: precision_recall(x, y)), []
    expected = precision_recall(x, y)
    for name, ours in (("float16, as the official", official_precision_recall), ("float32, centred", fidelity)):
        off = {"share": max(abs(a - b) for a, b in zip(ours(x, y)[:2], expected, strict=True))}
        title, way = f"precision and recall of {few} x {dimensions} features", Way(name, lambda ours=ours: ours(x, y))
        pairs.append(compare(title, way, formula, "s", settings, deviation=off))
        peak = peak_extra_bytes(lambda ours=ours: ours(x, y)) / 2**30
        rows.append(row(f"memory beside the features, {title}: {name}", "GiB", [peak]))
    rows.append(row(f"the same: {formula.label}", "GiB", [peak_extra_bytes(formula.run) / 2**30]))
    return {"pairs": pairs, "rows": rows}


def features(count: int, dimensions: int, *, scale: float, rng) -> np.ndarray:
    """(count, dimensions) float32."""
    spectrum = (scale * np.arange(1, dimensions + 1) ** -0.5).astype(np.float32)
    return rng.standard_normal((count, dimensions), dtype=np.float32) * spectrum + np.float32(0.3)


def usual_stats(features) -> Stats:
    return Stats(np.mean(features, axis=0), np.cov(features, rowvar=False))


def by_sqrtm(a: Stats, b: Stats) -> float:
    """The same distance as it is usually computed."""
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root))


def precision_recall(real, generated, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated points within a real one's ball to its k-th other neighbour, and the other way round.

    Source: Kynkaanniemi et al. 2019, eq. 1.
    """
    between, (of_real, of_generated) = squared_distances(generated, real), (radii(a, k) for a in (real, generated))
    return float((between <= of_real).any(axis=1).mean()), float((between <= of_generated[:, None]).any(axis=0).mean())


def squared_distances(a, b) -> np.ndarray:
    return (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)


def radii(points, k: int) -> np.ndarray:
    """Squared distance to the k-th other neighbour; the nearest is the point itself."""
    return np.partition(squared_distances(points, points), k, axis=1)[:, k]
