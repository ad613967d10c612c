"""Does a generator repeat its training images?

Each number looks at d1, the distance to the nearest training image, and stands between two others: the same number for
held-out real images, which nobody can have copied from the training images, and for copies of these with slight noise.

    near copies   share with d1 < mean(d1 ... d50) / 3
    AuthPct       % with d1 > distance of that training image to the nearest other one
    C_T           z of Mann and Whitney's test of d1(generated) against d1(test), within cells of the space, averaged

No single one is proof. C_T compares whole distributions and can miss a few blatant copies, which `nearer` counts; a
generator that is far from everything passes all of them.
"""

import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.cluster.vq import kmeans2, vq
from scipy.stats import binomtest, rankdata

from .findings import Finding, Section
from .manifold import nearest, neighbours
from .statistics import bootstrap_interval, mean_and_root

NEIGHBOURS, NEAR_COPY = 50, 1 / 3  # a near copy's nearest is this much nearer than its 50 nearest on average
COMPONENTS = 64  # principal components in which C_T's distances and cells are
FEWEST_GENERATED = 20  # of a cell that C_T looks at
NOISE = 0.1  # of a copy, in units of the usual distance between training images
FEW_REAL = 0.01  # share of held-out images that count as too near
DEALS = 20  # of the held-out images into test images and others
UNLIKELY = 0.01  # a p-value
PAIRS = 8  # on the sheet


class Copying(NamedTuple):
    """C_T, below 0 where copied and above where far; None with the reason."""

    value: float | None
    reason: str = ""


class Pairs(NamedTuple):
    """Places of images and of their nearest training images, and the distances (count,): nearest first."""

    generated: np.ndarray
    train: np.ndarray
    distances: np.ndarray


def near_copy_rate(distances) -> float:
    """Share of images much nearer to one training image than to others.

    Args:
        distances: to the nearest 50 or so, near to far, (N, count).
    Source:
        in the manner of Yoon et al. 2023, with their third.
    """
    distances = np.asarray(distances)
    return float((distances[:, 0] < NEAR_COPY * distances.mean(axis=1)).mean())


def auth_pct(generated, train) -> float:
    """Per cent of generated features (N, d) further from their nearest training image than that is from the next one.

    An independent sample of the same distribution scores 33 on a line and about 65 in twelve dimensions, not 50; images
    of other sessions score more. So the number means something only beside that of held-out images.

    Source:
        Alaa et al. 2022, section 4.3.
    """
    return float(100 * _authentic(generated, train).mean())


def _authentic(generated, train) -> np.ndarray:
    d, places = neighbours(generated, train)
    among = nearest(train, train, skip=1)[:, 0]
    return d[:, 0] > among[places[:, 0]]


def c_t(generated, test, train, *, cells: int = 3, seed: int = 0) -> Copying:
    """Are generated features nearer to the training ones than test ones are? About 0 if as near, far below if copied.

    Honest images score about N(0, 1) in each cell; what is dishonest grows with the square root of the counts, so
    compare at the same counts. Cells without test images or with fewer than 20 generated ones do not count.

    Source:
        Meehan et al. 2020, section 4; distances and cells in 64 principal components, as dgm-eval does.
    """
    return _c_t(*_placed(train, generated, test, cells=cells, seed=seed))


class _Placed(NamedTuple):
    """The cell of each image, and its distance to the nearest training image: (N,) each."""

    cell: np.ndarray
    nearest: np.ndarray

    def take(self, index) -> "_Placed":
        return _Placed(self.cell[index], self.nearest[index])


def _placed(train, *sets, cells: int = 3, seed: int) -> list[_Placed]:
    train, *sets = _principal(train, *sets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty cells, which do not count
        centres, _ = kmeans2(train, min(cells, len(train)), iter=50, minit="++", seed=np.random.default_rng(seed))
    return [_Placed(vq(feats, centres)[0], nearest(feats, train)[:, 0]) for feats in sets]


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


def _dealt(kinds: dict[str, _Placed], rng: np.random.Generator) -> tuple[dict[str, Copying], int]:
    """C_T of each kind and of how many images: the mean over random halves of the real ones as test images."""
    real = kinds["real"]
    count = min(len(real.cell) - len(real.cell) // 2, len(kinds["value"].cell))
    results = {kind: [] for kind in kinds}
    for _ in range(DEALS):
        deal = rng.permutation(len(real.cell))
        half = len(deal) // 2
        for kind, images in {**kinds, "real": real.take(deal[half:])}.items():
            chosen = images.take(rng.permutation(len(images.cell))[:count])
            results[kind].append(_c_t(chosen, real.take(deal[:half])))
    return {kind: _mean(deals) for kind, deals in results.items()}, count


def _mean(deals: list[Copying]) -> Copying:
    values = [deal.value for deal in deals if deal.value is not None]
    return Copying(float(np.mean(values))) if values else deals[0]


def _mann_whitney(x, y) -> float:
    """z of the number of pairs with x > y, ties counted as half."""
    n, m = len(x), len(y)
    above = rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((above - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _principal(train, *others) -> list[np.ndarray]:
    """All in the first principal components of the training features, float32."""
    mean, root = mean_and_root(train)
    values, vectors = np.linalg.eigh(root @ root.T)
    first = np.flatnonzero(values > 1e-12 * values.max())[-COMPONENTS:]
    axes = (root.T @ vectors[:, first] / np.sqrt(values[first])).astype(np.float32)
    return [(np.asarray(a, dtype=np.float32) - mean.astype(np.float32)) @ axes for a in (train, *others)]


def closest_pairs(generated, train, count: int) -> Pairs:
    """The generated images that are nearest to a training image, by features (N, d) and (M, d)."""
    generated, train = np.asarray(generated), np.asarray(train)
    d, places = (column[:, 0] for column in neighbours(generated, train))
    first = np.argsort(d, kind="stable")[:count]
    exact = np.linalg.norm(generated[first].astype(np.float64) - train[places[first]], axis=1)
    order = np.argsort(exact, kind="stable")
    return Pairs(first[order], places[first[order]], exact[order])


def memorization(
    train_feats, heldout_feats, generated_feats, train_pixels, heldout_pixels, generated_pixels, *, seed: int = 0
) -> Section:
    """The section of the report: each number beside that of held-out real images and that of copies.

    C_T depends on the counts: there a random half of the held-out images are the test images, and as many generated
    images, copies and images of the other half are compared with them; the mean over several such deals.

    Args:
        *_feats: (N, d), all of one feature space; *_pixels: uint8 (N, H, W, 3) in the same order, for the sheet.
    """
    rng = np.random.default_rng(seed)
    train, heldout, generated = (np.asarray(a, dtype=np.float32) for a in (train_feats, heldout_feats, generated_feats))
    if len(train) < 3 or len(heldout) < 4 or not len(generated):
        few = f"{len(train)} training, {len(heldout)} held-out and {len(generated)} generated images are too few"
        return Section(title="Memorisation", notes=[f"{few} to look for copies"])
    kinds = {"value": generated, "real": heldout, "worst": copies(train, len(generated), rng)}
    among = min(NEIGHBOURS, len(train) - 1)
    near = {kind: nearest(feats, train, count=among) for kind, feats in kinds.items()}
    usual = max(float(np.median(near["real"][:, 0])), np.finfo(np.float32).tiny)
    limit = np.quantile(near["real"][:, 0], FEW_REAL)
    authentic = {kind: _authentic(feats, train) for kind, feats in kinds.items()}

    def finding(name, statistic, columns, **words):
        numbers = {kind: float(statistic(column)) for kind, column in columns.items()}
        value = columns["value"]
        interval = bootstrap_interval(lambda rows: statistic(value[rows]), np.arange(len(value)), seed=seed)
        return Finding(name=name, interval=interval, **numbers, **words)

    findings = [
        finding(
            "nearest training image",
            lambda d: np.median(d[:, 0]) / usual,
            near,
            about="median distance to it, in units of that of held-out real images",
        ),
        finding(
            "too near",
            lambda d: (d[:, 0] < limit).mean(),
            near,
            form="{:.1%}",
            about=f"share nearer to a training image than {1 - FEW_REAL:.0%} of the held-out real images are",
        ),
        finding(
            "near copies",
            near_copy_rate,
            near,
            form="{:.1%}",
            about=f"share three times nearer to one training image than to its {among} nearest on average",
        ),
        finding(
            "AuthPct",
            lambda flags: 100 * flags.mean(),
            authentic,
            form="{:.1f}",
            about="per cent further from the nearest training image than that is from the next one",
        ),
    ]
    placed = dict(zip(kinds, _placed(train, *kinds.values(), seed=seed), strict=True))
    copied, count = _dealt(placed, rng)
    about = f"nearness to training images against that of held-out ones, {count} of each: 0 if as near, below if copied"
    findings.append(Finding(name="C_T", **{k: c.value for k, c in copied.items()}, form="{:.1f}", about=about))

    pairs, real_pairs = closest_pairs(generated, train, PAIRS), closest_pairs(heldout, train, PAIRS)
    sides = {"generated": (generated_pixels, pairs), "held-out": (heldout_pixels, real_pairs)}
    nearer = int((near["value"][:, 0] < near["real"][:, 0].min()).sum())
    return Section(
        title="Memorisation",
        findings=findings,
        notes=_notes(near, nearer, copied["value"]),
        pictures={"closest_pairs.png": _sheet(train_pixels, sides, usual)},
        data={"closest_pairs": {name: column.tolist() for name, column in pairs._asdict().items()}, "nearer": nearer},
    )


def _notes(near: dict[str, np.ndarray], nearer: int, copied: Copying) -> list[str]:
    """What the numbers do not say: a few copies among many images pass a share or a median."""
    (ours, n), (real, m) = ((near_copy_rate(near[kind]), len(near[kind])) for kind in ("value", "real"))
    notes = [f"the worst are training images moved in the feature space by {NOISE:.0%} of the way to the next one"]
    if binomtest(round(ours * n), n, max(real, 1 / m)).pvalue < UNLIKELY and ours > real:
        notes.append(
            f"{round(ours * n)} of {n} generated images are near copies, of held-out ones {round(real * m)} of {m}"
        )
    if nearer:
        notes.append(f"{nearer} of {n} generated images are nearer to a training image than any held-out one")
    if copied.value is None:
        notes.append(f"C_T is not measured: {copied.reason}")
    return notes


def copies(train, count: int, rng: np.random.Generator) -> np.ndarray:
    """What copying looks like: `count` training features, moved by a tenth of the usual distance between neighbours."""
    train = np.asarray(train, dtype=np.float32)
    size = NOISE * np.median(nearest(train, train, skip=1))
    noise = rng.standard_normal((count, train.shape[1])) / np.sqrt(train.shape[1])
    return (train[rng.integers(len(train), size=count)] + size * noise).astype(np.float32)


def _sheet(train_pixels, sides: dict[str, tuple[np.ndarray, Pairs]], usual: float) -> Image.Image:
    """Closest pairs, a row each: image, nearest training image, distance; a block of columns for each side."""
    height, width = np.shape(train_pixels)[1:3]
    gap, head, text = 4, 16, 48
    block, row = 2 * (max(width, 64) + gap) + text, height + gap
    rows = max(len(pairs.distances) for _, pairs in sides.values())
    sheet = Image.new("RGB", (len(sides) * block + gap, head + rows * row), "white")
    draw = ImageDraw.Draw(sheet)
    for side, (name, (pixels, pairs)) in enumerate(sides.items()):
        left = gap + side * block
        middle = left + max(width, 64) + gap
        draw.text((left, 2), name, fill="black")
        draw.text((middle, 2), "training", fill="black")
        for i, (own, place, distance) in enumerate(zip(*pairs, strict=True)):
            sheet.paste(Image.fromarray(pixels[own]), (left, head + i * row))
            sheet.paste(Image.fromarray(train_pixels[place]), (middle, head + i * row))
            draw.text((middle + max(width, 64) + gap, head + i * row), f"{distance / usual:.2f}", fill="black")
    return sheet
