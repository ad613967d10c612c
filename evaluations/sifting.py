"""Kinematic sifting: which generated pictures could be of the user they are said to show?

Two ways to draw the border of what is possible, both from real training pictures of the user alone:

    ranges   every quantity of `physics` lies in [q_1% - m s, q_99% + m s], s its spread within a user, m the margin
    hull     the picture lies in the convex hull of the user's pictures, in their first three principal components

The hull is the published way (Erol et al. 2020, arXiv 2001.08582). On simulated gait of 64 x 64 pixels, 24 pictures a
user, other sessions held out, kept are (in %): the ranges with m = 2, and the hull,

             held out    shuffled    Doppler mirrored    time reversed    another user
    ranges      92           0              0                  6              43
    hull        56           0             79                 85              68

so the ranges are the default: three components of pictures whose steps start anywhere say little about motion, and
200 pictures a user do not help (77, 3, 94, 98, 80 against 95, 0, 0, 8, 49).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial import Delaunay, QhullError

from guided_diffusion_vae.checkpoint import save_csv
from guided_diffusion_vae.config import UserError

from .findings import Finding, Section, Table
from .image_sets import ImageSet, shuffle_pixels
from .measure import share_interval, spread
from .physics import (
    LEAST,
    LUMINANCE,
    QUANTITIES,
    Axes,
    colormap_of,
    find_axes,
    measure_physics,
    thumbnails,
)
from .statistics import mean_interval

METHODS = ("ranges", "hull")
MARGIN = 2.0  # see the table above: 1 keeps 73 % of held-out pictures and 17 % of another user's, 3 keeps 97 and 63 %
PICTURE = {  # quantities that are no gait but the picture's own, and what an autoencoder or a colour scale changes
    "noise_floor": "background",
    "dynamic_range": "contrast",
    "colour_residual": "colours",
}
OUTERMOST = 1.0  # percentiles beyond which training pictures do not widen a range
SIDE = 32  # of the pictures that the hull is drawn around
COMPONENTS = 3
NOT_GAIT = "not gait"  # what a reason says of the quantities of PICTURE
NAMES = list(QUANTITIES)
FEW = 0.25  # kept of a user's images: fewer, and the user is named
SHOWN, FAULTS = 8, 6  # rejected images in the picture, and reasons beside each


class Sifted(NamedTuple):
    """What is accepted (N,) bool, and why the others are not: a phrase an image, empty where it is accepted."""

    accepted: np.ndarray
    reasons: list[str]


class Hull(NamedTuple):
    """A convex body in principal components: standardise, project, look whether a simplex holds the point."""

    mean: np.ndarray
    spread: np.ndarray
    components: np.ndarray
    body: Delaunay

    def holds(self, pictures: np.ndarray) -> np.ndarray:
        """Whether pictures (N, d) lie inside: (N,) bool."""
        points = (pictures - self.mean) / self.spread @ self.components.T
        return self.body.find_simplex(points, tol=1e-4) >= 0  # its corners, too, after rounding in float32


@dataclass(frozen=True)
class Sifter:
    """The borders of every user, in the number of the training set; see `fit`."""

    method: str
    class_names: list[str]
    colormap: str
    axes: Axes
    ranges: dict[int, tuple[np.ndarray, np.ndarray]]  # user -> lowest and highest of every quantity
    hulls: dict[int, Hull]

    @classmethod
    def fit(
        cls,
        train: ImageSet,
        *,
        method: str = "ranges",
        margin: float = MARGIN,
        axes: Axes | None = None,
        colormap: str | None = None,
    ) -> "Sifter":
        """Learn the borders from real training pictures; without labels, of everybody together.

        Raises:
            UserError: a user has too few pictures for a hull.
        """
        assert method in METHODS, method
        colormap = colormap or colormap_of(train.pixels)
        axes = axes or find_axes(train.pixels, colormap)[0]
        labels = np.zeros(len(train.pixels), dtype=int) if train.labels is None else train.labels
        names = ["everybody"] if train.labels is None else list(train.class_names)
        if method == "hull":
            pictures = thumbnails(train.pixels, colormap, (SIDE, SIDE)).reshape(len(labels), -1)
            hulls = {int(user): _hull(pictures[labels == user], names[user]) for user in np.unique(labels)}
            return cls(method, names, colormap, axes, {}, hulls)
        table = _table(train.pixels, axes, colormap)
        centred = np.concatenate([table[labels == user] - table[labels == user].mean(axis=0) for user in set(labels)])
        freedom = max(1, len(labels) - len(set(labels)))
        spread = np.sqrt((centred**2).sum(axis=0) / freedom)
        slack = margin * np.maximum(spread, [LEAST.get(name, 0.0) for name in NAMES])
        ranges = {}
        for user in np.unique(labels):
            low, high = np.percentile(table[labels == user], (OUTERMOST, 100 - OUTERMOST), axis=0)
            ranges[int(user)] = low - slack, high + slack
        return cls(method, names, colormap, axes, ranges, {})

    def sift(self, images: ImageSet) -> Sifted:
        """Judge every image by the borders of its user; where one side is unlabelled, it must suit anybody's."""
        accepted, reasons = np.zeros(len(images.pixels), dtype=bool), [""] * len(images.pixels)
        borders = self.hulls or self.ranges
        if images.labels is None or self.class_names == ["everybody"]:
            owners = np.zeros((len(images.pixels), 1), dtype=int) + np.array(sorted(borders))
        else:
            owners = np.asarray(images.labels)[:, None]
        measured = (
            _table(images.pixels, self.axes, self.colormap)
            if self.ranges
            else thumbnails(images.pixels, self.colormap, (SIDE, SIDE)).reshape(len(images.pixels), -1)
        )
        for user in np.unique(owners):
            places = np.flatnonzero((owners == user).any(axis=1) & ~accepted)
            if user not in borders:
                found = ["no real picture of this user"] * len(places)
            elif self.ranges:
                found = [self._faults(measured[place], *self.ranges[user]) for place in places]
            else:
                found = ["" if ok else "outside the hull" for ok in self.hulls[user].holds(measured[places])]
            for place, fault in zip(places, found, strict=True):
                accepted[place], reasons[place] = not fault, fault
        if owners.shape[1] > 1:
            reasons = ["" if ok else "suits no user" for ok in accepted]
        return Sifted(accepted, reasons)

    def _faults(self, row, low, high) -> str:
        """Which quantities of one image are out of range, in words: "cadence above, contrast (not gait) below"."""
        sides = np.where(row < low, "below", np.where(row > high, "above", ""))
        return ", ".join(f"{called(name)} {side}" for name, side in zip(NAMES, sides, strict=True) if side)


def called(name: str) -> str:
    """A quantity in a reason for rejection."""
    return f"{PICTURE[name]} ({NOT_GAIT})" if name in PICTURE else name


def _table(pixels, axes: Axes, colormap: str) -> np.ndarray:
    """All quantities (N, Q), in the order of `NAMES`; nothing for no images."""
    if not len(pixels):
        return np.zeros((0, len(NAMES)))
    measured = measure_physics(pixels, axes=axes, colormap=colormap)
    return np.stack([measured[name] for name in NAMES], axis=1)


def _hull(pictures: np.ndarray, user: str) -> Hull:
    """The hull of one user's pictures (N, d).

    Raises:
        UserError: too few, or too much alike.
    """
    fewest = COMPONENTS + 2
    if len(pictures) < fewest:
        raise UserError(
            f"--real_dir has {len(pictures)} images of {user}; --sift_method hull needs at least {fewest}:"
            " give more, or choose ranges"
        )
    mean, spread = pictures.mean(axis=0), pictures.std(axis=0) + 1e-6
    standard = (pictures - mean) / spread
    components = np.linalg.svd(standard, full_matrices=False)[2][:COMPONENTS]
    try:
        return Hull(mean, spread, components, Delaunay(standard @ components.T))
    except QhullError as error:
        raise UserError(
            f"--real_dir: the images of {user} are too much alike for --sift_method hull; choose ranges"
        ) from error


# ---- how good is the sifter, and how many does it keep ---------------------------------------------------------------


def sifting(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    *,
    seed: int,
    method: str = "ranges",
    margin: float = MARGIN,
    axes: Axes | None = None,
) -> Section:
    """The share of generated pictures that a user could have made, beside that of held-out real and of broken ones."""
    rng = np.random.default_rng(seed)
    sifter = Sifter.fit(train, method=method, margin=margin, axes=axes)
    labelled, named = samples.labels is not None and heldout.labels is not None, heldout
    if not labelled:  # what must suit only somebody is judged so in every set
        heldout, samples = (images._replace(labels=None, class_names=None) for images in (heldout, samples))
    generated, real = sifter.sift(samples), sifter.sift(heldout)
    broken = {
        "pixels shuffled": heldout._replace(pixels=shuffle_pixels(heldout.pixels, rng)),
        "Doppler mirrored": heldout._replace(pixels=heldout.pixels[:, ::-1]),
        "time reversed": heldout._replace(pixels=heldout.pixels[:, :, ::-1]),
    }
    users = len(sifter.class_names)
    if heldout.labels is not None and users > 1:
        strangers = (heldout.labels + rng.integers(1, users, len(heldout.labels))) % users
        broken["said to be another user"] = heldout._replace(labels=strangers)
    controls = {name: float(_rates(images, sifter.sift(images)).mean()) for name, images in broken.items()}
    rates = _rates(samples, generated)
    how = "the mean over users" if labelled else "of all"
    kept = Finding(
        name="kept by the sifter",
        value=float(rates.mean()),
        real=float(_rates(heldout, real).mean()),
        worst=controls["pixels shuffled"],
        worst_is="shuffled",
        interval=_interval(rates, generated, labelled, seed),
        form="{:.1%}",
        about=f"share of pictures within the borders of {'their' if labelled else 'any'} user ({method}), {how}",
        caveat="" if labelled else "of anybody",
    )
    notes = [
        f"held-out pictures are kept at {kept.shown(kept.real)}: what is thrown away beyond that is the generator's"
    ]
    if sifter.colormap == LUMINANCE:
        notes.append("the pictures are in no known colour map: their luminance is sifted")
    if not labelled:
        blunt = "not all sets are labelled: kept, of generated and of held-out pictures alike, is what suits any user"
        if named.labels is not None:
            sharp = kept.shown(float(_rates(named, sifter.sift(named)).mean()))
            blunt += f", so the sifter is blunter: with their labels {sharp} of the held-out ones are kept"
        notes.append(blunt)
    faults = sorted({fault for reason in [*generated.reasons, *real.reasons] for fault in reason.split(", ") if fault})
    meaning = {called(name): about for name, about in QUANTITIES.items()}
    counted = [
        [fault, *(_share(found, fault) for found in (generated, real)), meaning.get(fault.rpartition(" ")[0], "")]
        for fault in faults
    ]
    alone = [_by_gait_alone(samples, generated), _by_gait_alone(heldout, real)]
    notes += _of_the_picture_alone(generated, alone, kept)
    tables = [
        Table(
            title="What the sifter keeps of real held-out pictures that were broken",
            header=["how", "kept"],
            rows=[["not", kept.shown(kept.real)], *([name, f"{rate:.1%}"] for name, rate in controls.items())],
        ),
        Table(
            title="Why pictures were rejected",
            header=["reason", "generated", "real, held out", "what it measures"],
            rows=counted,
        ),
    ]
    if labelled and samples.labels is not None:
        users = [train.class_names[user] if train.class_names else str(user) for user in np.unique(samples.labels)]
        notes += _left_with_few(dict(zip(users, rates.tolist(), strict=True)))
        rows = [[user, f"{rate:.0%}"] for user, rate in zip(users, rates, strict=True)]
        tables.append(Table(title="Kept of each user", header=["user", "generated"], rows=rows))
    data = {"controls": controls, "accepted": generated.accepted.tolist(), "reasons": generated.reasons}
    data |= {"by_gait_alone": alone} if sifter.ranges else {}
    found = {"findings": [kept], "tables": tables, "notes": notes, "data": data}
    if not generated.accepted.all():
        found["pictures"] = {"rejected.png": _rejected(samples, generated, train.class_names)}
    return Section(title="Kinematic sifting", **found)


def _interval(rates: np.ndarray, sifted: Sifted, labelled: bool, seed: int) -> tuple[float, float] | None:
    """95 % of what is kept: by drawing users anew; where that has no spread, or nobody is named, of images."""
    interval = mean_interval(rates, seed) if labelled else (0, 0)
    if interval in ((0, 0), (1, 1)):
        return share_interval(int(sifted.accepted.sum()), len(sifted.accepted))
    return interval


def _by_gait_alone(images: ImageSet, sifted: Sifted) -> float:
    """The share that is kept where contrast, background and colours reject nothing."""
    return float(_rates(images, sifted._replace(accepted=_gait_fits(sifted))).mean())


def _of_the_picture_alone(generated: Sifted, alone: list[float], kept: Finding) -> list[str]:
    """A note on pictures that are rejected for their contrast, background or colours and for nothing else."""
    reasons = [reason.split(", ") for reason in generated.reasons if reason]
    count = sum(all(NOT_GAIT in fault for fault in reason) for reason in reasons)
    if not count:
        return []
    faults = {fault.replace(f" ({NOT_GAIT})", "") for reason in reasons for fault in reason if NOT_GAIT in fault}
    return [
        f"{count} of {len(reasons)} rejected images are so for the picture alone ({', '.join(sorted(faults))}), not for"
        f" its gait: the autoencoder's or the colour scale's doing. By gait alone {kept.shown(alone[0])} would be kept,"
        f" of held-out pictures {kept.shown(alone[1])}"
    ]


def _gait_fits(sifted: Sifted) -> np.ndarray:
    """Whether each image is accepted, or rejected for nothing that is gait: (N,) bool."""
    return np.array([all(NOT_GAIT in fault for fault in reason.split(", ")) or not reason for reason in sifted.reasons])


def _left_with_few(rates: dict[str, float]) -> list[str]:
    """A note that names users of whom little or nothing is accepted."""
    none = [user for user, rate in rates.items() if rate == 0]
    few = [f"{user} ({rate:.0%})" for user, rate in rates.items() if 0 < rate < FEW]
    said = [f"no image is accepted of {', '.join(none)}"] if none else []
    return said + ([f"fewer than a quarter of the images are accepted of {', '.join(few)}"] if few else [])


def _rejected(images: ImageSet, sifted: Sifted, names: list[str] | None) -> Image.Image:
    """Rejected images, spread evenly over all of them: user and reasons beside each."""
    places = np.flatnonzero(~sifted.accepted)
    places = places[spread(None, len(places), min(SHOWN, len(places)))]
    side, gap, text, columns = 96, 6, 170, 2
    sheet = Image.new("RGB", (columns * (side + text) + gap, -(-len(places) // columns) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, place in enumerate(places):
        row, column = divmod(number, columns)
        x, y = gap + column * (side + text), gap + row * (side + gap)
        tile = Image.fromarray(images.pixels[place]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        user = "" if images.labels is None or not names else names[images.labels[place]]
        reasons = sifted.reasons[place].split(", ")
        more = [f"and {len(reasons) - FAULTS} more"] if len(reasons) > FAULTS else []
        for i, line in enumerate([f"{user or 'image'} [{place}]", *reasons[:FAULTS], *more]):
            draw.text((x + side + gap, y + 12 * i), line[:28], fill="black")
    return sheet


def _rates(images: ImageSet, sifted: Sifted) -> np.ndarray:
    """Keep rate of every user (users,); of every image where nobody is named."""
    if images.labels is None:
        return sifted.accepted.astype(float)
    return np.array([sifted.accepted[images.labels == user].mean() for user in np.unique(images.labels)])


def _share(sifted: Sifted, fault: str) -> str:
    return f"{np.mean([fault in reason.split(', ') for reason in sifted.reasons]):.1%}"


def write_accept_list(path, images, sifted: Sifted) -> None:
    """Write which images were accepted and why not, as CSV: image,accepted,reason.

    Args:
        images: file names, or places in the .npz, one for each that was sifted.
    """
    rows = zip(images, sifted.accepted, sifted.reasons, strict=True)
    save_csv([("image", "accepted", "reason"), *((name, int(ok), reason) for name, ok, reason in rows)], path)
