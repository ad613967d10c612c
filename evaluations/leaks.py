"""Leaks between splits: is a held-out picture also, or nearly, a training picture?

Three kinds of twins. An exact one has the same pixels. A near one is the same picture after noise, compression or
another gain: the correlation of the two small pictures, without their means over time, is high. A shifted one is
another window of the same recording: the same picture moved along time, found by the largest correlation over all
shifts s that leave enough overlap,

    r(a, b) = max_s sum_vt a(v, t + s) b(v, t) / sqrt(sum a^2 sum b^2)       sums over the overlap

of pictures differenced along Doppler and time: gait resembles gait, but the fine grain is the same only in the same
recording. How alike pictures are by chance is seen at the nearest of other users, which cannot be the same recording
(at the nearest of all where nobody is named): a twin is farther above their median than three times what lies between
their median and their highest tenth.
"""

import re
from itertools import combinations
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .findings import Finding, Section, Table
from .image_sets import ImageSet
from .physics import detect_colormap, thumbnails

SIDE, COLUMNS = 32, 64  # of the small pictures; those that are shifted keep more columns, or shifts fall between them
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

    labels: np.ndarray | None
    in_place: th.Tensor
    grain: th.Tensor
    width: int  # of the pictures themselves

    def take(self, index) -> "Small":
        """The images at these places."""
        labels = None if self.labels is None else self.labels[index]
        return Small(labels, self.in_place[index], self.grain[index], self.width)


def make_small(images: ImageSet, colormap: str) -> Small:
    """Small pictures (N, R, C): less their means over time; and differenced along both axes.

    A gain in decibels, and what stands still, are in neither.
    """
    small = th.from_numpy(thumbnails(images.pixels, colormap, (SIDE, COLUMNS)))
    coarse = F.interpolate(small[:, None], size=(small.shape[1], min(SIDE, small.shape[2])), mode="area")[:, 0]
    grain = small.diff(dim=1).diff(dim=2)
    return Small(images.labels, coarse - coarse.mean(dim=2, keepdim=True), grain, images.pixels.shape[2])


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
    named = images.labels is not None and others.labels is not None and len(set(others.labels)) > 1
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


def exact_twins(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The place (N,) of an image with the same pixels among others, -1 where there is none."""
    known = {image.tobytes(): place for place, image in reversed(list(enumerate(others)))}
    return np.array([known.get(image.tobytes(), -1) for image in images])


def recording_of(name: str, user: str) -> str | None:
    """What recording a file name tells of: all before its last number; None where that is a word, or the user's name.

    user_00_s02_0004.png -> user_00_s02, 002_f00024.png -> 002, user_00_0004.png and img_7.png -> None
    """
    found = re.fullmatch(r"(.*?)[ _-]*[A-Za-z]*\d+", PurePath(name).stem)
    recording = found.group(1) if found else ""
    return recording if re.search(r"\d", recording) and recording != user else None


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
    findings, notes, worst = [], [], []
    colormap = detect_colormap(next(iter(sets.values())).pixels)
    small = {key: make_small(images, colormap) for key, images in sets.items()}
    for known, new in combinations(sets, 2):
        if sets[new].pixels.shape[1:] != sets[known].pixels.shape[1:]:
            notes.append(f"{new} and {known} are pictures of other sizes: not compared")
            continue
        shown = _spread(sets[new], MOST)
        if len(shown) < len(sets[new].pixels):
            notes.append(f"{len(shown)} of {len(sets[new].pixels)} pictures of {new} were looked at")
        exact = exact_twins(sets[new].pixels[shown], sets[known].pixels)
        near, moved = (find(small[new].take(shown), small[known]) for find in (near_twins, shifted_twins))
        is_exact, is_near, is_moved = exact >= 0, near.above() >= 0, moved.above() >= 0
        is_near = (is_near | (is_moved & (moved.shift == 0))) & ~is_exact
        is_moved &= ~is_near & ~is_exact
        kinds = {
            "exact": (is_exact, "the same pixels"),
            "near": (is_near, f"a correlation above {near.border:.2f} in place"),
            "shifted": (is_moved, f"a correlation of the grain above {moved.border:.2f} when moved along time"),
        }
        for kind, (found, how) in kinds.items():
            about = f"share of {new} that has a twin in {known}: {how}; from {MUCH:.0%} on, numbers on it say nothing"
            name, share = f"{kind} twins of {new} in {known}", float(found.mean())
            findings.append(Finding(name=name, value=share, real=0.0, worst=MUCH, form="{:.1%}", about=about))
        for i, place in enumerate(shown):
            kind = next((kind for kind, (found, _) in kinds.items() if found[i]), "none")
            twins = moved if moved.above()[i] > near.above()[i] else near
            above, at, shift = (2.0, exact[i], 0) if is_exact[i] else (twins.above()[i], twins.place[i], twins.shift[i])
            alike = 1.0 if is_exact[i] else float(twins.alike[i])
            worst.append(Pair(float(above), alike, kind, int(shift), new, int(place), known, int(at)))
        notes += _sessions(sets, names, known, new)
    worst.sort(key=lambda pair: -pair.above)
    return Section(
        title="Leaks between splits",
        findings=findings,
        tables=[_table(worst[:SHOWN], names)],
        notes=notes,
        pictures={"twins.png": _picture(worst[:SHOWN], sets)} if worst else {},
        data={"twins": [pair._asdict() for pair in worst if pair.kind != "none"]},
    )


def _spread(images: ImageSet, most: int) -> np.ndarray:
    """Places of at most so many images, evenly through the set."""
    count = min(most, len(images.pixels))
    return np.arange(count) * len(images.pixels) // max(count, 1)


def _sessions(sets, names, known: str, new: str) -> list[str]:
    """A sentence about recordings that occur in both sets, by the names of their files."""
    if not names or known not in names or new not in names:
        return []
    found = {}
    for key in (known, new):
        images = sets[key]
        users = [""] * len(images.pixels) if images.labels is None else [images.class_names[i] for i in images.labels]
        found[key] = {(u, recording_of(n, u)) for u, n in zip(users, names[key], strict=True) if recording_of(n, u)}
    both = sorted(found[known] & found[new])
    if both:
        user, recording = both[0]
        of = f" of {user}" if user else ""
        return [f"{len(both)} recordings are in both {known} and {new} by their file names, such as {recording}{of}"]
    if found[known] and found[new]:
        return [f"no recording is in both {known} and {new} by their file names"]
    return [f"the file names of {known} and {new} do not tell recordings apart"]


def _name(names, key: str, place: int) -> str:
    return names[key][place] if names and key in names else f"{key}[{place}]"


def _table(worst: list[Pair], names) -> Table:
    rows = [
        [_name(names, p.new, p.new_place), _name(names, p.known, p.known_place), f"{p.alike:.3f}", p.kind, p.shift]
        for p in worst
    ]
    header = ["held out", "nearest", "correlation", "twin", "columns later"]
    return Table(title="The most alike pairs", header=header, rows=rows)


def _picture(worst: list[Pair], sets) -> Image.Image:
    """The most alike pairs, one a row: the held-out picture on the left, its nearest on the right."""
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
