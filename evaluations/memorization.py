"""Does a generator repeat its training images?

Twins are the same pictures: with the same pixels, nearly so, or moved along time, as `leaks` finds them. The other
numbers look at d1, the distance to the nearest training image:

    near copies   share with d1 < mean(d1 ... d50) / 3
    AuthPct       % with d1 > distance of that training image to the nearest other one
    C_T           ranks of d1 against those of real images, see `copying`

Each stands between two others: the same number for real images of the same sessions, and for copies of training images
with slight noise. These real ones are a sixth of the training images, each of which is compared with all but itself: no
generator of these sessions can be as far from them as other sessions are. Distances are those of the values of
pictures, read off their colours and averaged to 32 x 32.

No single number is proof. C_T compares whole distributions and can miss a few blatant copies, which `nearer` counts; a
picture moved along time is far from where it was, so only its twin is seen; a generator that is far from everything
passes all of them.
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import binomtest

from .copying import Copying, compare
from .findings import ABOVE, Finding, Section
from .image_sets import ImageSet
from .leaks import IN_PLACE, SHIFTED, Found, find_twins, make_small, picture
from .manifold import NEIGHBOURS, near_copy_rate, neighbours
from .measure import set_aside, share_interval
from .physics import as_points, colormap_of
from .statistics import bootstrap_interval

NOISE = 0.1  # of a copy, in units of the usual distance between training images
MOST_COPIES = 2000  # that numbers are compared with
MOST_REAL = 500  # real images that twins are looked for of
BLOCK = 256  # copies at a time
FEW_REAL = 0.01  # share of real images that count as too near
UNLIKELY = 0.01  # a p-value
FEWEST = 4  # real images
PAIRS = 8  # on the sheet
COPIES = "noisy copies"


class Pairs(NamedTuple):
    """Places of images and of their nearest training images, and the distances (count,): nearest first."""

    generated: np.ndarray
    train: np.ndarray
    distances: np.ndarray


class Near(NamedTuple):
    """The training images nearest to some images: distances (N, count) near to far, and their places (N, count).

    `own`: the places (N,) of the images themselves among the training images, which then do not count; else None.
    """

    distances: np.ndarray
    places: np.ndarray
    own: np.ndarray | None = None


def near(feats, train, count: int = 1, own=None) -> Near:
    """The nearest of training features (M, d) to features (N, d); see `Near`."""
    return Near(*neighbours(feats, train, count=count, skip=0 if own is None else 1), own)


def auth_pct(generated, train) -> float:
    """Per cent of generated features (N, d) further from their nearest training image than that is from the next one.

    An independent sample of the same distribution scores 33 on a line and about 65 in twelve dimensions, not 50; images
    of other sessions score more. So the number means something only beside that of held-out images.

    Source:
        Alaa et al. 2022, section 4.3.
    """
    return float(100 * authentic(near(generated, train), near_each_other(train)).mean())


def near_each_other(train) -> Near:
    """The two nearest others of every training image."""
    return near(train, train, count=2, own=np.arange(len(train)))


def authentic(found: Near, among: Near) -> np.ndarray:
    """Whether each image (N,) is further from its nearest training image than that is from the next.

    Args:
        among: of `near_each_other`.
    """
    place = found.places[:, 0]
    gap = among.distances[place, 0]
    if found.own is not None:  # an image is not its neighbour's neighbour either
        gap = np.where(among.places[place, 0] == found.own, among.distances[place, 1], gap)
    return found.distances[:, 0] > gap


def closest_pairs(feats, train, found: Near, count: int) -> Pairs:
    """The images that are nearest to a training image, by features (N, d) and (M, d); distances in float64."""
    first = np.argsort(found.distances[:, 0], kind="stable")[:count]
    places = found.places[first, 0]
    exact = np.linalg.norm(feats[first].astype(np.float64) - train[places], axis=1)
    order = np.argsort(exact, kind="stable")
    return Pairs(first[order], places[order], exact[order])


def memorization(train: ImageSet, heldout: ImageSet, samples: ImageSet, *, seed: int = 0) -> Section:
    """The section of the report: each number beside that of real images of the same sessions and that of copies.

    Twins are compared with those of held-out images, as windows of one recording may overlap in the training set.

    Args:
        train, heldout, samples: images of one size; see `measure.evaluate`.
    """
    rng = np.random.default_rng(seed)
    total = len(train.pixels)
    labels = np.zeros(total, dtype=int) if train.labels is None else train.labels
    aside, others = set_aside(labels, rng) if total else (labels, labels)
    if len(aside) < FEWEST or not len(heldout.pixels) or not len(samples.pixels):
        few = f"{total} training, {len(heldout.pixels)} held-out and {len(samples.pixels)} generated images"
        return Section(title="Memorisation", notes=[f"{few} are too few to look for copies"])
    colormap = colormap_of(train.pixels)
    learned = as_points(train.pixels, colormap)
    among = near_each_other(learned)
    count = min(len(samples.pixels), MOST_COPIES)
    kinds = {
        "value": as_points(samples.pixels, colormap),
        "real": learned[aside],
        "worst": copies(learned, count, rng, float(np.median(among.distances[:, 0]))),
        "other": as_points(heldout.pixels, colormap),
    }
    own = {"real": aside}
    several = min(NEIGHBOURS, total - 1)
    found = {kind: near(feats, learned, several, own.get(kind)) for kind, feats in kinds.items()}
    findings, other = _by_distance(found, among, several, seed)

    ends = {kind: kinds[kind] for kind in ("value", "real", "worst")}
    copied, compared = compare(ends, learned, own=own, seed=seed)
    about = f"nearness to training images against that of real ones, {compared} of each: 0 if as near, below if copied"
    numbers: dict[str, Any] = {kind: c.value for kind, c in copied.items()}
    findings.append(Finding(name="C_T", **numbers, worst_is=COPIES, form="{:.1f}", about=about))

    small, made, real = (make_small(images, colormap) for images in (train, samples, heldout))
    all_twins = [find_twins(made, small), find_twins(real, small, most=MOST_REAL)]
    all_twins.append(find_twins(small.take(aside), small.take(others), most=MOST_REAL))
    twins, real_twins, aside_twins = (_beyond_sessions(each, all_twins[-1]) for each in all_twins)
    same_sessions = aside_twins.twin.mean()
    same = twins.pairs("generated", "training")
    same = sorted((pair for pair in same if pair.kind != "none"), key=lambda pair: -pair.above)
    findings.insert(0, _twin_finding(twins, real_twins))

    pairs, real_pairs = (closest_pairs(kinds[k], learned, found[k], PAIRS) for k in ("value", "real"))
    sides = {"generated": (samples.pixels, pairs), "real": (train.pixels[aside], real_pairs)}
    pictures = {"closest_pairs.png": _sheet(train.pixels, sides, _usual(found))}
    if same:
        pictures["copied.png"] = picture(same[:PAIRS], {"generated": samples, "training": train})
    shown = {f.name: f.shown(other[f.name]) for f in findings if f.name in other}
    return Section(
        title="Memorisation",
        findings=findings,
        notes=[
            *_twin_notes(twins, len(samples.pixels), same_sessions),
            *_notes(found, copied["value"]),
            f"real: {len(aside)} training images, each compared with all but itself; held-out images score"
            f" {', '.join(f'{number} ({name})' for name, number in shown.items())}",
        ],
        pictures=pictures,
        data={
            "closest_pairs": {name: column.tolist() for name, column in pairs._asdict().items()},
            "nearer": _nearer(found),
            "twins": [pair._asdict() for pair in same],
            "twins_same_sessions": float(same_sessions),
            "other_sessions": other,
        },
    )


def _by_distance(found: dict[str, Near], among: Near, several: int, seed: int) -> tuple[list[Finding], dict]:
    """The findings that look at the nearest training images, and what held-out images score in each."""
    d = {kind: each.distances for kind, each in found.items()}
    flags = {kind: authentic(each, among) for kind, each in found.items()}
    usual = _usual(found)
    limit = np.quantile(d["real"][:, 0], FEW_REAL)
    findings, other = [], {}

    def add(name, statistic, columns, form, about, above=""):
        numbers = {kind: float(statistic(column)) for kind, column in columns.items()}
        other[name] = numbers.pop("other")
        value, n = columns["value"], len(columns["value"])
        if form == "{:.1%}":
            interval = share_interval(round(numbers["value"] * n), n)
        else:
            interval = bootstrap_interval(lambda rows: statistic(value[rows]), np.arange(n), seed=seed)
        ends = {"interval": interval, "worst_is": COPIES, "above": above, **numbers}
        findings.append(Finding(name=name, form=form, about=about, **ends))

    about = "median distance to it, in units of that of real images of the same sessions"
    add("nearest training image", lambda d: np.median(d[:, 0]) / usual, d, "{:.3g}", about, ABOVE)
    about = f"share nearer to a training image than {1 - FEW_REAL:.0%} of the real images of the same sessions are"
    add("too near", lambda d: (d[:, 0] < limit).mean(), d, "{:.1%}", about)
    about = f"share three times nearer to one training image than to its {several} nearest on average"
    add("near copies", near_copy_rate, d, "{:.1%}", about)
    about = "per cent further from the nearest training image than that is from the next one"
    add("AuthPct", lambda flags: 100 * flags.mean(), flags, "{:.1f}", about, ABOVE)
    return findings, other


def _usual(found: dict[str, Near]) -> float:
    """The median distance of real images of the same sessions to their nearest training image; above 0."""
    return max(float(np.median(found["real"].distances[:, 0])), float(np.finfo(np.float32).tiny))


def _beyond_sessions(twins: Found, aside: Found) -> Found:
    """With borders above 99 % of real images of the same sessions, unless those are twins, as windows overlap."""

    def raised(own, real, limits):
        border = float(np.quantile(real.alike, 1 - FEW_REAL))
        return own._replace(border=max(own.border, border)) if border <= limits[1] else own

    return twins._replace(
        near=raised(twins.near, aside.near, IN_PLACE), shifted=raised(twins.shifted, aside.shifted, SHIFTED)
    )


def _twin_finding(twins: Found, real: Found) -> Finding:
    flags = twins.twin
    return Finding(
        name="twins of training images",
        value=float(flags.mean()),
        real=float(real.twin.mean()),
        worst=1.0,
        worst_is="all copies",
        interval=share_interval(int(flags.sum()), len(flags)),
        form="{:.1%}",
        about="share that is a training image: the same pixels, nearly so, or moved along time; real are held-out ones",
    )


def _twin_notes(twins: Found, total: int, same_sessions: float) -> list[str]:
    """How many of which kind; of how many, if not of all; and how alike the training images are among themselves."""
    counts = {kind: int(is_such.sum()) for kind, is_such in twins.kinds.items()}
    notes = []
    if any(counts.values()):
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        notes.append(f"of {len(twins.shown)} generated images these are twins of training images: {said}")
    if same_sessions:
        notes.append(f"of real images of the same sessions {same_sessions:.1%} have twins among the training images")
    if len(twins.shown) < total:
        notes.append(f"{len(twins.shown)} of {total} generated images were looked at for twins")
    return notes


def _notes(found: dict[str, Near], copied: Copying) -> list[str]:
    """What the numbers do not say: a few copies among many images pass a share or a median."""
    (ours, n), (real, m) = (
        (near_copy_rate(found[kind].distances), len(found[kind].distances)) for kind in ("value", "real")
    )
    notes = [f"the worst are training images moved in the feature space by {NOISE:.0%} of the way to the next one"]
    if ours > real and binomtest(round(ours * n), n, max(real, 1 / m)).pvalue < UNLIKELY:
        notes.append(
            f"{round(ours * n)} of {n} generated images are near copies, of real ones {round(real * m)} of {m}"
        )
    nearer = _nearer(found)
    if nearer and by_chance(nearer, n, m) < UNLIKELY:
        notes.append(f"{nearer} of {n} generated images are nearer to a training image than any of {m} real ones")
    if copied.value is None:
        notes.append(f"C_T is not measured: {copied.reason}")
    return notes


def _nearer(found: dict[str, Near]) -> int:
    """How many generated images are nearer to a training image than any real one."""
    ours, real = (found[kind].distances[:, 0] for kind in ("value", "real"))
    return int((ours < real.min()).sum())


def by_chance(k: int, n: int, m: int) -> float:
    """P that the k lowest of n + m numbers, in random order, are all of the n: prod_{i<k} (n - i) / (n + m - i)."""
    i = np.arange(k)
    return float(np.exp(np.log((n - i) / (n + m - i)).sum()))


def copies(train: np.ndarray, count: int, rng: np.random.Generator, usual: float) -> np.ndarray:
    """What copying looks like: `count` training features (M, d), moved by a tenth of their usual distance; float32."""
    made = train[rng.integers(len(train), size=count)].astype(np.float32)
    size = np.float32(NOISE * usual / np.sqrt(train.shape[1]))
    for i in range(0, count, BLOCK):
        made[i : i + BLOCK] += size * rng.standard_normal(made[i : i + BLOCK].shape, dtype=np.float32)
    return made


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
