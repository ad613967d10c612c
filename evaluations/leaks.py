"""Leaks between splits: is a held-out picture also, or nearly, a training picture?

Three kinds of twins. An exact one has the same pixels. A near one is the same picture after noise, compression or
another gain: the correlation of the two small pictures, without their means over time, is high. A shifted one is
another window of the same recording: the same picture moved along time, found by the largest correlation over all
shifts s that leave enough overlap,

    r(a, b) = max_s sum_vt a(v, t + s) b(v, t) / sqrt(sum a^2 sum b^2)       sums over the overlap

of pictures less their local means: gait resembles gait, but the fine grain is the same only in the same recording.
How alike pictures are by chance is seen at the nearest of other users, which cannot be the same recording (at the
nearest of all where nobody is named): a twin is farther above their median than three times what lies between their
median and their highest tenth.

Windows of one recording that do not overlap are no twins, and still of one day: what file names tell of recordings
stands beside.
"""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .findings import Finding, Section, Table
from .image_sets import ImageSet
from .measure import digests, share_interval
from .physics import colormap_of, thumbnails
from .sessions import Recordings, recordings_of

SIDE, COLUMNS = 32, 64  # of the small pictures; those that are shifted keep more columns, or shifts fall between them
AROUND = 5, 9  # rows and columns of the small pictures whose mean is taken off to see the grain
OVERLAP = 0.4  # of the columns, at least
LEAST_ENERGY = 0.1  # of a picture that the overlap must hold: two empty corners are no twins
IN_PLACE, SHIFTED = (0.93, 0.97), (0.82, 0.95)  # between which the border of a twin lies
TAILS = 3.0  # see above
BLOCK = 192  # images a side of a block of pairs
MOST = 2000  # held-out images that are looked at, spread evenly; a share needs no more
MUCH = 0.1  # share of twins at which numbers on a split say nothing any more
SHOWN = 8  # pairs in the table and the picture


class Twins(NamedTuple):
    """For every image of one set its nearest of another: how alike, which, how many columns it is shifted by."""

    alike: np.ndarray
    place: np.ndarray
    shift: np.ndarray
    border: float  # the correlation from which on the two are twins

    def above(self) -> np.ndarray:
        """How far each lies above the border: 0 at it, 1 for the same picture."""
        return (self.alike - self.border) / (1 - self.border)


class Small(NamedTuple):
    """The small pictures of a set, ready to be correlated in place and over shifts."""

    labels: Any  # np.ndarray, or None
    in_place: th.Tensor
    grain: th.Tensor
    digests: list[bytes]  # of the pictures themselves
    width: int  # of the pictures themselves

    def take(self, index) -> "Small":
        """The images at these places."""
        labels = None if self.labels is None else self.labels[index]
        return Small(labels, self.in_place[index], self.grain[index], [self.digests[i] for i in index], self.width)


class Found(NamedTuple):
    """What `find_twins` found of every image of a new set that it looked at."""

    shown: np.ndarray  # the places of these images
    exact: np.ndarray  # the place of an image with the same pixels, or -1
    near: Twins
    shifted: Twins

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Whether it is an exact, a near, a shifted twin: never two of them."""
        exact, near, moved = self.exact >= 0, self.near.above() >= 0, self.shifted.above() >= 0
        near = (near | (moved & (self.shifted.shift == 0))) & ~exact
        return {"exact": exact, "near": near, "shifted": moved & ~near & ~exact}

    @property
    def twin(self) -> np.ndarray:
        """Whether it is a twin of any kind."""
        return np.any(list(self.kinds.values()), axis=0)

    def pairs(self, new: str, known: str) -> list["Pair"]:
        """Each with its nearest, under the names of the two sets."""
        kinds, pairs = self.kinds, []
        above_near, above_moved = self.near.above(), self.shifted.above()
        for i, place in enumerate(self.shown):
            kind = next((kind for kind, is_such in kinds.items() if is_such[i]), "none")
            twins, above = (self.shifted, above_moved) if above_moved[i] > above_near[i] else (self.near, above_near)
            alike, at, shift = float(twins.alike[i]), int(twins.place[i]), int(twins.shift[i])
            if kind == "exact":
                pairs.append(Pair(2.0, 1.0, kind, 0, new, int(place), known, int(self.exact[i])))
            else:
                pairs.append(Pair(float(above[i]), alike, kind, shift, new, int(place), known, at))
        return pairs


def make_small(images: ImageSet, colormap: str) -> Small:
    """Small pictures (N, R, C): less their means over time; and of finer size less the mean around each point, too.

    A gain in decibels, and what stands still, are in neither.
    """
    small = th.from_numpy(thumbnails(images.pixels, colormap, (SIDE, COLUMNS)))
    coarse = F.interpolate(small[:, None], size=(small.shape[1], min(SIDE, small.shape[2])), mode="area")[:, 0]
    moving = small - small.mean(dim=2, keepdim=True)
    rows, columns = AROUND
    around = F.avg_pool2d(moving[:, None], AROUND, 1, (rows // 2, columns // 2), count_include_pad=False)
    grain = moving - around[:, 0]
    coarse -= coarse.mean(dim=2, keepdim=True)
    return Small(images.labels, coarse, grain, digests(images.pixels), images.pixels.shape[2])


def find_twins(images: Small, others: Small, *, most: int = MOST) -> Found:
    """The twins of at most so many images, spread evenly through the set, among the others."""
    count = min(most, len(images.in_place))
    shown = np.arange(count) * len(images.in_place) // max(count, 1)
    some = images.take(shown)
    return Found(shown, exact_twins(some, others), near_twins(some, others), shifted_twins(some, others))


def exact_twins(images: Small, others: Small) -> np.ndarray:
    """The place (N,) of an image with the same pixels among others, -1 where there is none."""
    known = {digest: place for place, digest in reversed(list(enumerate(others.digests)))}
    return np.array([known.get(digest, -1) for digest in images.digests])


def near_twins(images: Small, others: Small) -> Twins:
    """The nearest of `others` for every one of `images`, both as they are."""
    return _twins(images, images.in_place, others, others.in_place, correlate_in_place, IN_PLACE)


def shifted_twins(images: Small, others: Small) -> Twins:
    """The nearest of `others` for every one of `images`, over all shifts along time.

    Shifts are in columns of the pictures themselves; positive: the image begins later in the recording.
    """
    found = _twins(images, images.grain, others, others.grain, correlate, SHIFTED)
    columns = images.width / min(COLUMNS, images.width)
    return found._replace(shift=np.round(-found.shift * columns).astype(int))


def _twins(images: Small, a, others: Small, b, compare, limits) -> Twins:
    """The nearest, a block of pairs at a time, and the border from the nearest of other users."""
    labelled = all(labels is not None for labels in (images.labels, others.labels))
    named = labelled and len(set(others.labels)) > 1
    alike, chance = th.full((len(a),), -1.0), th.full((len(a),), -1.0)
    place, shift = th.zeros(len(a), dtype=th.long), th.zeros(len(a), dtype=th.long)
    for i in range(0, len(a), BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(0, len(b), BLOCK):
            score, moved = compare(a[rows], b[j : j + BLOCK])
            best, at = score.max(dim=1)
            nearer = best > alike[rows]
            alike[rows] = th.where(nearer, best, alike[rows])
            place[rows] = th.where(nearer, at + j, place[rows])
            shift[rows] = th.where(nearer, moved.gather(1, at[:, None])[:, 0], shift[rows])
            if named:
                same = th.as_tensor(images.labels[rows, None] == others.labels[None, j : j + BLOCK])
                score = score.masked_fill(same, -1.0)
            chance[rows] = th.maximum(chance[rows], score.max(dim=1).values)
    middle, high = np.quantile(chance.numpy(), (0.5, 0.9))
    border = float(np.clip(middle + TAILS * (high - middle), *limits))
    return Twins(alike.numpy(), place.numpy(), shift.numpy(), border)


def correlate_in_place(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The correlation of pictures a (N, R, C) and b (M, R, C), and shifts of 0: (N, M)."""
    a, b = (F.normalize(x.flatten(1), dim=1, eps=1e-6) for x in (a, b))
    return a @ b.T, th.zeros(len(a), len(b), dtype=th.long)


def correlate(a: th.Tensor, b: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The largest correlation of pictures a (N, R, C) and b (M, R, C) over shifts along time, and that shift: (N, M).

    A shift s lays column t + s of a over column t of b. By Fourier transforms, padded so that nothing wraps round.
    """
    width = a.shape[2]
    length = 2 * width
    reach = int(width * (1 - OVERLAP))
    shifts = th.arange(-reach, reach + 1)
    fa, fb = (th.fft.rfft(x, n=length).permute(2, 0, 1) for x in (a, b))  # (K, N, R)
    product = th.fft.irfft((fa @ fb.conj().transpose(1, 2)).permute(1, 2, 0), n=length)[:, :, shifts % length]
    first = shifts.clamp(min=0)  # column of a at which the overlap begins
    last = width + shifts.clamp(max=0)
    ea, eb = (_energy(a, first, last), _energy(b, first - shifts, last - shifts))
    score = product / (ea[:, None] * eb[None]).sqrt()
    best, at = score.max(dim=2)
    return best, shifts[at]


def _energy(x, first, last) -> th.Tensor:
    """Energy of pictures (N, R, C) from column first[s] to last[s]: (N, S), at least a tenth of the whole picture's."""
    total = F.pad((x.double() ** 2).sum(dim=1).cumsum(dim=1), (1, 0))
    floor = LEAST_ENERGY * total[:, -1:] + 1e-12
    return th.maximum(total[:, last] - total[:, first], floor).float()


class Pair(NamedTuple):
    """An image of a new set, and its nearest in a known one."""

    above: float  # the border, see `Twins.above`; 2 for the same pixels
    alike: float
    kind: str
    shift: int
    new: str
    new_place: int
    known: str
    known_place: int


def leak_report(sets: dict[str, ImageSet], *, names: dict[str, list[str]] | None = None) -> Section:
    """Twins of every set in the sets before it: `{"train": ..., "val": ..., "test": ...}`, users numbered alike.

    Args:
        names: file names of the images of each set, if known: they stand in the table, and may tell of sessions.
    """
    findings, notes, worst, in_both, told = [], [], [], 0, []
    colormap = colormap_of(next(iter(sets.values())).pixels)
    small = {key: make_small(images, colormap) for key, images in sets.items()}
    for known, new in combinations(sets, 2):
        if sets[new].pixels.shape[1:] != sets[known].pixels.shape[1:]:
            notes.append(f"{new} and {known} are pictures of other sizes: not compared")
            continue
        found = find_twins(small[new], small[known], most=MOST)
        shared = None
        if names and known in names and new in names:
            shared = recordings_of(sets[known], sets[new], {"known": names[known], "new": names[new]})
            in_both += len(shared.both)
            told.append(shared.told)
        if len(found.shown) < len(sets[new].pixels):
            notes.append(f"{len(found.shown)} of {len(sets[new].pixels)} pictures of {new} were looked at")
        how = {
            "exact": "the same pixels",
            "near": f"a correlation above {found.near.border:.2f} in place",
            "shifted": f"a correlation of the grain above {found.shifted.border:.2f} when moved along time",
        }
        for kind, is_such in found.kinds.items():
            what = f"share of {new} that has a twin in {known}: {how[kind]}"
            about = f"{what}; from the threshold on, numbers on it say nothing"
            ends = {"value": float(is_such.mean()), "real": 0.0, "worst": MUCH, "worst_is": "threshold"}
            interval = share_interval(int(is_such.sum()), len(is_such))
            name = f"{kind} twins of {new} in {known}"
            ends["said"] = _verdict(ends["value"], shared)
            findings.append(Finding(name=name, interval=interval, form="{:.1%}", about=about, **ends))
        worst += found.pairs(new, known)
        notes += [_sessions(shared, known, new)] if shared else []
    worst.sort(key=lambda pair: -pair.above)
    return Section(
        title="Leaks between splits",
        findings=findings,
        tables=[_table(worst[:SHOWN], names)],
        notes=notes,
        pictures={"twins.png": picture(worst[:SHOWN], sets)} if worst else {},
        data={
            "twins": [pair._asdict() for pair in worst if pair.kind != "none"],
            "recordings": {"in_both": in_both, "told": bool(told) and all(told)},
        },
    )


def _sessions(shared: Recordings, known: str, new: str) -> str:
    """A sentence about recordings that occur in both sets, by the names of their files."""
    if shared.both:
        user, recording = shared.both[0]
        of = f" of {user}" if user else ""
        some = f"{len(shared.both)} recordings are in both {known} and {new} by their file names"
        return f"{some}, such as {recording}{of}"
    if shared.told:
        return f"no recording is in both {known} and {new} by their file names"
    return f"the file names of {known} and {new} do not tell recordings apart"


def _verdict(share: float, shared: Recordings | None) -> str:
    """Of a share of twins, which says nothing of windows of one recording that do not overlap."""
    if share >= MUCH:
        return f"too many: numbers on held-out images say nothing from {MUCH:.0%} on"
    found = "some: look at the pairs below" if share > 0 else "none found"
    return f"{found}; yet both sets are of the same recordings" if shared and shared.both else found


def _name(names, key: str, place: int) -> str:
    return names[key][place] if names and key in names else f"{key}[{place}]"


def _table(worst: list[Pair], names) -> Table:
    rows = [
        [_name(names, p.new, p.new_place), _name(names, p.known, p.known_place), f"{p.alike:.3f}", p.kind, p.shift]
        for p in worst
    ]
    header = ["held out", "nearest", "correlation", "twin", "columns later"]
    return Table(title="The most alike pairs", header=header, rows=rows)


def picture(worst: list[Pair], sets: dict[str, ImageSet]) -> Image.Image:
    """Pairs, one a row: the new picture on the left, its nearest on the right."""
    side, gap, text = 128, 6, 16
    sheet = Image.new("RGB", (2 * (side + gap) + gap, len(worst) * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, pair in enumerate(worst):
        y = gap + row * (side + text + gap)
        title = f"{pair.new}[{pair.new_place}] {pair.known}[{pair.known_place}] {pair.alike:.3f} {pair.kind}"
        draw.text((gap, y), title, fill="black")
        both = sets[pair.new].pixels[pair.new_place], sets[pair.known].pixels[pair.known_place]
        for column, pixels in enumerate(both):
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (side + gap), y + text))
    return sheet
