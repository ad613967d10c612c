"""C_T: are generated images nearer to the training images than real ones are, by rank?

Within each cell of the space, with d1 the distance to the nearest training image,

    z = (U - n m / 2) / sqrt(n m (n + m + 1) / 12),   U = number of pairs with d1(generated) > d1(real), ties a half

which is Mann and Whitney's test of n generated and m real images; C_T is the mean over cells, weighted by m. Distances
and cells are in 64 principal components, as in dgm-eval.
"""

import warnings
from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2, vq
from scipy.stats import rankdata

from .manifold import nearest
from .statistics import mean_and_root

COMPONENTS = 64
LEARNED = 2000  # training images, drawn at random, that the components are computed of
CELLS, FEWEST_GENERATED = 3, 20  # cells at most; images of a cell that is looked at
DEALS = 20  # of the real images into test images and others


class Copying(NamedTuple):
    """C_T, below 0 where copied and above where far; None with the reason."""

    value: float | None
    reason: str = ""


def c_t(generated, test, train, *, cells: int = CELLS, seed: int = 0) -> Copying:
    """Are generated features nearer to the training ones than test ones are? About 0 if as near, far below if copied.

    Honest images score about N(0, 1) in each cell; what is dishonest grows with the square root of the counts, so
    compare at the same counts. Cells without test images or with fewer than 20 generated ones do not count.

    Source:
        Meehan et al. 2020, section 4.
    """
    placed = _place({"generated": generated, "test": test}, train, {}, cells, seed)
    return _c_t(placed["generated"], placed["test"])


def compare(kinds: dict[str, np.ndarray], train, *, own: dict, seed: int) -> tuple[dict[str, Copying], int]:
    """C_T of several kinds of images, and of how many of each.

    It depends on the counts: a random half of kind "real" are the test images, and as many of each kind, of "real" of
    its other half, are compared with them. The mean over several such deals.

    Args:
        kinds: name -> features (N, d).
        own: kind -> places (N,) in the training set, of kinds that are training images; none counts as its own
            neighbour, and the components, which lie nearer to what they were computed of, are of the others.
    """
    count = min(len(kinds["real"]) - len(kinds["real"]) // 2, *map(len, kinds.values()))
    cells = int(np.clip(count // (2 * FEWEST_GENERATED), 1, CELLS))
    placed, rng = _place(kinds, train, own, cells, seed), np.random.default_rng(seed)
    real = placed["real"]
    results = {kind: [] for kind in kinds}
    for _ in range(DEALS):
        deal = rng.permutation(len(real.cell))
        half = len(deal) // 2
        for kind, images in {**placed, "real": real.take(deal[half:])}.items():
            chosen = images.take(rng.permutation(len(images.cell))[:count])
            results[kind].append(_c_t(chosen, real.take(deal[:half])))
    return {kind: _mean(deals) for kind, deals in results.items()}, count


class _Placed(NamedTuple):
    """The cell of each image, and its distance to the nearest training image: (N,) each."""

    cell: np.ndarray
    nearest: np.ndarray

    def take(self, index) -> "_Placed":
        return _Placed(self.cell[index], self.nearest[index])


def _place(kinds: dict[str, np.ndarray], train, own, cells: int, seed: int) -> dict[str, _Placed]:
    learned = np.setdiff1d(np.arange(len(train)), np.concatenate([[], *own.values()]).astype(int))
    learned = np.sort(np.random.default_rng(seed).permutation(learned)[:LEARNED])
    train, *sets = _principal(np.asarray(train)[learned], train, *kinds.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty cells, which do not count
        how = {"iter": 50, "minit": "++", "seed": np.random.default_rng(seed)}
        centres, _ = kmeans2(train, min(cells, len(train)), **how)
    return {
        kind: _Placed(vq(feats, centres)[0], nearest(feats, train, skip=int(kind in own))[:, 0])
        for kind, feats in zip(kinds, sets, strict=True)
    }


def _principal(learned, *sets) -> list[np.ndarray]:
    """Sets of features in the first principal components of some, float32."""
    mean, root = mean_and_root(learned)
    values, vectors = np.linalg.eigh(root @ root.T)
    first = np.flatnonzero(values > 1e-12 * values.max())[-COMPONENTS:]
    axes = (root.T @ vectors[:, first] / np.sqrt(values[first])).astype(np.float32)
    return [(np.asarray(a, dtype=np.float32) - mean.astype(np.float32)) @ axes for a in sets]


def _c_t(generated: _Placed, test: _Placed) -> Copying:
    scores, weights = [], []
    for cell in np.unique(test.cell):
        ours, theirs = generated.nearest[generated.cell == cell], test.nearest[test.cell == cell]
        if len(ours) >= FEWEST_GENERATED:
            scores.append(_mann_whitney(ours, theirs))
            weights.append(len(theirs))
    if not scores:
        return Copying(None, f"no cell has {FEWEST_GENERATED} generated images and a test image")
    return Copying(float(np.average(scores, weights=weights)))


def _mann_whitney(x, y) -> float:
    """z of the number of pairs with x > y, ties counted as half."""
    n, m = len(x), len(y)
    above = rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((above - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _mean(deals: list[Copying]) -> Copying:
    values = [deal.value for deal in deals if deal.value is not None]
    return Copying(float(np.mean(values))) if values else deals[0]
