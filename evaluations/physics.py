"""Physics of gait: what a radar engineer reads off a picture, and how far generated pictures are from real ones in it.

A picture is turned back into values in [0, 1] (decibels between the floor and the peak of its colours). Over time t and
Doppler v, with w the value above the noise and P = 10^(s value) the power,

    torso    v_P(t) = sum_v v P / sum_v P                  envelopes: 97 % and 3 % of sum_v w lie below
    centroid v_w(t) = sum_v v w / sum_v w                  bandwidth: sqrt(sum_v (v - v_w)^2 w / sum_v w)
    cadence  argmax_f sum_v |F_t w(v, t)|^2, steps         symmetry: power of v_w at f, 2 f over f/2, f, 3f/2, 2f

Doppler is in halves of the band and time in pictures, unless `Axes` say what the edges are. How far two sets differ in
a quantity is the Wasserstein-1 distance for each user, in standard deviations of real pictures.
"""

from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from scipy.stats import wasserstein_distance

from guided_diffusion_vae.data.spectrogram import detect_colormap, row_axis, unit_from_colours

from .findings import Finding, Section, Table
from .image_sets import ImageSet, shuffle_pixels
from .statistics import mean_interval

BLOCK = 2**19  # pixels at a time
SIDE = 32  # of the pictures whose distances are measured
LUMINANCE = "luminance"
CLIP_DB = 45.0  # what the colours are assumed to span, where nobody says
NOISE_PERCENTILE, PEAK_PERCENTILE = 25, 99.9  # of a picture's values
ABOVE_NOISE = 0.15  # of the span of the colours: 7 of 45 dB
FEWEST_CYCLES, MOST_CYCLES, CYCLE_STEP = 2.0, 24.0, 1 / 8  # steps a picture among which the cadence is looked for
ROUNDS = 8  # draws of equally many images that a distance is averaged over

QUANTITIES = {
    "upper_envelope": "Doppler below which 97 % of the energy above the noise lies, mean over time",
    "upper_swing": "standard deviation over time of the upper envelope",
    "lower_envelope": "Doppler below which 3 % of the energy above the noise lies, mean over time",
    "lower_swing": "standard deviation over time of the lower envelope",
    "torso": "bulk Doppler, positive towards the radar: the power-weighted centroid, mean over time",
    "torso_swing": "standard deviation over time of the torso line",
    "bandwidth": "spread over Doppler of the energy above the noise, mean over time",
    "cadence": "steps a second, or a picture where its duration is not known",
    "symmetry": "share of the rhythm that left and right steps have in common: 1 where they are equal",
    "skewness": "how suddenly the centroid rises against how it falls: reversed time changes its sign",
    "zero_doppler": "value at 0 Hz above the noise: what stands still, or the notch that removed it",
    "noise_floor": "value that a quarter of the picture is below",
    "dynamic_range": "contrast of the picture, not gait: its brightest value less its noise floor, of the whole span of"
    " the colours; values are read off the colour map",
    "colour_residual": "mean distance of the pixels from the colour map, in 8-bit levels",
}
LEAST = {"colour_residual": 4.0}  # the unit where real pictures spread less: a step between two colours of jet
WORST = {  # in this order: the first that is significantly farther than real pictures are
    "another user": "another user's pictures",
    "shuffled": "shuffled pixels where users do not differ",
    "+1 SD": "+1 SD, real pictures that are a standard deviation off, where neither differs",
}


class Axes(NamedTuple):
    """What the edges of a picture are: Doppler (or velocity) of the bottom and of the top, and the time it spans."""

    low: float = -1.0
    high: float = 1.0
    seconds: float = 1.0


def colormap_of(pixels: np.ndarray) -> str:
    """The known colour map that images (N, H, W, 3) are in; else "luminance"."""
    return detect_colormap(pixels) or LUMINANCE


def values_of(pixels: np.ndarray, colormap: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (...) in [0, 1] of colours (..., 3) uint8, and their distances (...) from the map, 0 for luminance."""
    if colormap == LUMINANCE:
        values = pixels @ np.array([0.299, 0.587, 0.114]) / 255
        return values, np.zeros_like(values)
    unit, distance = unit_from_colours(pixels, colormap)
    return (unit + 1) / 2, distance


def find_axes(pixels: np.ndarray, colormap: str) -> tuple[Axes, bool]:
    """Axes in halves of the band about the row of 0 Hz, and whether that row was seen; else it is the middle.

    What stands still, and the filter against it, draw a line a row or two wide at 0 Hz through every picture.
    """
    rows = pixels.shape[1]
    some = pixels[:: max(1, len(pixels) // 256)]
    profile = values_of(some, colormap)[0].mean(axis=(0, 2))
    padded = np.pad(profile, 3, mode="edge")
    line = np.abs(profile - np.median(np.lib.stride_tricks.sliding_window_view(padded, 7), axis=1))
    row = int(line[2:-2].argmax()) + 2
    seen = rows >= 16 and line[row] > 0.1 and line[row] > 1.8 * np.delete(line, range(row - 2, row + 3)).max()
    above = 2 * (row + 0.5) / rows if seen else 1.0
    return Axes(above - 2, above), bool(seen)


def thumbnails(pixels: np.ndarray, colormap: str, size: tuple[int, int]) -> np.ndarray:
    """Values in [0, 1] of images (N, H, W, 3), averaged over area to at most `size`: float32 (N, rows, columns)."""
    rows, columns = (min(most, side) for most, side in zip(size, pixels.shape[1:3], strict=True))
    step = max(1, BLOCK // (pixels.shape[1] * pixels.shape[2]))
    parts = []
    for i in range(0, len(pixels), step):
        values = values_of(pixels[i : i + step], colormap)[0].astype(np.float32)
        parts.append(F.interpolate(th.from_numpy(values)[:, None], size=(rows, columns), mode="area")[:, 0].numpy())
    return np.concatenate(parts)


def as_points(pixels: np.ndarray, colormap: str) -> np.ndarray:
    """Images (N, H, W, 3) as points whose distances are those of the pictures: values of 32 x 32, (N, 1024) float32."""
    return thumbnails(pixels, colormap, (SIDE, SIDE)).reshape(len(pixels), -1)


def measure_physics(
    pixels: np.ndarray, *, axes: Axes | None = None, colormap: str | None = None, clip_db: float = CLIP_DB
) -> dict[str, np.ndarray]:
    """Every quantity of `QUANTITIES` for images uint8 (N, H, W, 3): name -> (N,).

    Args:
        axes: None: Doppler from -1 to 1, time in pictures.
        colormap: a known one, or "luminance"; None looks which fits.
        clip_db: what the colours span.
    """
    axes, colormap = axes or Axes(), colormap or colormap_of(pixels)
    step = max(1, BLOCK // (pixels.shape[1] * pixels.shape[2]))
    parts = [_measure(pixels[i : i + step], axes, colormap, clip_db) for i in range(0, len(pixels), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in QUANTITIES}


def _measure(pixels, axes: Axes, colormap: str, clip_db: float) -> dict[str, np.ndarray]:
    values, distance = values_of(pixels, colormap)  # (n, H, W)
    doppler = row_axis(values.shape[1], axes[:2])
    noise, peak = np.percentile(values, (NOISE_PERCENTILE, PEAK_PERCENTILE), axis=(1, 2))
    energy = np.maximum(values - noise[:, None, None] - ABOVE_NOISE, 0)
    energy += 1e-6 * energy.mean(axis=2, keepdims=True) + 1e-12  # a column of noise is as the picture is on average
    power = 10 ** (clip_db / 10 * (values - 1))
    share = energy / energy.sum(axis=1, keepdims=True)
    torso, centroid = (_mean(weight, doppler) for weight in (power, energy))  # (n, W)
    bandwidth = np.sqrt(np.maximum(_mean(share, doppler**2) - centroid**2, 0))
    upper, lower = (_quantile(share, q, axes) for q in (0.97, 0.03))
    cycles = cadence(energy)
    zero = np.clip(int(np.abs(doppler).argmin()), 0, len(doppler) - 1)
    return {
        "upper_envelope": upper.mean(axis=1),
        "upper_swing": upper.std(axis=1),
        "lower_envelope": lower.mean(axis=1),
        "lower_swing": lower.std(axis=1),
        "torso": torso.mean(axis=1),
        "torso_swing": torso.std(axis=1),
        "bandwidth": bandwidth.mean(axis=1),
        "cadence": cycles / axes.seconds,
        "symmetry": symmetry(centroid, cycles),
        "skewness": skewness(centroid),
        "zero_doppler": values[:, zero].mean(axis=1) - noise,
        "noise_floor": noise,
        "dynamic_range": peak - noise,
        "colour_residual": distance.mean(axis=(1, 2)),
    }


def _mean(weight, doppler) -> np.ndarray:
    """Mean Doppler (n, W) under weights (n, H, W)."""
    return np.einsum("nhw,h->nw", weight, doppler) / weight.sum(axis=1)


def _quantile(share, level: float, axes: Axes) -> np.ndarray:
    """Doppler (n, W) below which this much of the energy lies; between rows the energy is evenly spread."""
    upward = share[:, ::-1]
    total = np.cumsum(upward, axis=1)
    row = (total < level).sum(axis=1, keepdims=True).clip(max=share.shape[1] - 1)
    within = np.take_along_axis(upward, row, axis=1)
    before = np.take_along_axis(total, row, axis=1) - within
    place = (row + np.clip((level - before) / within, 0, 1))[:, 0]
    return axes.low + place * (axes.high - axes.low) / share.shape[1]


def cadence(energy: np.ndarray) -> np.ndarray:
    """Steps a picture (n,): the frequency along time at which most of the energy (n, H, W) recurs, over all rows.

    The peak of the cadence spectrum after a Hann window, between its samples by a parabola.
    """
    width = energy.shape[2]
    cycles = np.arange(FEWEST_CYCLES, max(min(MOST_CYCLES, width / 4), FEWEST_CYCLES + 1), CYCLE_STEP)
    time = (np.arange(width) + 0.5) / width
    window = np.sin(np.pi * time) ** 2
    moving = energy - energy.mean(axis=2, keepdims=True)
    slope = moving @ (time - 0.5) / ((time - 0.5) ** 2).sum()
    moving = (moving - slope[..., None] * (time - 0.5)) * window
    angle = 2 * np.pi * time[:, None] * cycles
    spectrum = ((moving @ np.cos(angle)) ** 2 + (moving @ np.sin(angle)) ** 2).sum(axis=1)  # (n, F)
    best = spectrum[:, 1:-1].argmax(axis=1) + 1
    left, top, right = (np.take_along_axis(spectrum, best[:, None] + k, axis=1)[:, 0] for k in (-1, 0, 1))
    bend = left - 2 * top + right
    shift = np.where(bend < 0, 0.5 * (left - right) / np.minimum(bend, -1e-30), 0)
    return cycles[best] + np.clip(shift, -0.5, 0.5) * CYCLE_STEP


def symmetry(line: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Share of the rhythm of lines (n, W) at whole multiples of the cadence (n,), against its halves: (n,).

    A stride is two steps. Equal steps put all power at even multiples of the stride's frequency.
    """
    time = (np.arange(line.shape[1]) + 0.5) / line.shape[1] - 0.5
    angle = np.pi * cycles[:, None, None] * time[:, None] * np.arange(1, 5)  # (n, W, 4)
    trend = np.broadcast_to(np.stack([time**0, time], axis=-1), (len(line), len(time), 2))
    parts = np.concatenate([trend, np.cos(angle), np.sin(angle)], axis=-1)
    fitted = np.einsum("nkw,nw->nk", np.linalg.pinv(parts), line)[:, 2:].reshape(-1, 2, 4)
    power = (fitted**2).sum(axis=1)
    return power[:, 1::2].sum(axis=1) / np.maximum(power.sum(axis=1), 1e-30)


def skewness(line: np.ndarray) -> np.ndarray:
    """Skewness (n,) of the steps of lines (n, W) from column to column."""
    steps = np.diff(line, axis=1)
    return (steps**3).mean(axis=1) / np.maximum((steps**2).mean(axis=1) ** 1.5, 1e-30)


# ---- sets against each other -----------------------------------------------------------------------------------------


def physics(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    *,
    seed: int,
    axes: Axes | None = None,
    colormap: str | None = None,
    clip_db: float | None = None,
) -> Section:
    """How far generated pictures of each user are from held-out real ones of that user, quantity by quantity.

    Beside every distance stands that of as many real training pictures of the user, and that of the worst: see `WORST`.

    Args:
        axes: None: halves of the band about 0 Hz, and pictures.
        clip_db: what the colours span; None assumes 45 dB, and a note says so.
    """
    rng = np.random.default_rng(seed)
    colormap = colormap or colormap_of(train.pixels)
    notes = [f"colours are read as {colormap}"]
    if colormap == LUMINANCE:
        notes = ["the pictures are in no known colour map: their luminance is measured"]
    if axes is None:
        axes, seen = find_axes(train.pixels, colormap)
        where = f"where a standing line is seen, {(axes.high / 2):.0%} below the top"
        where = where if seen else "assumed in the middle, as no standing line is seen"
        notes.append(f"Doppler is in halves of the band, 0 Hz {where}; time is in pictures")
    if clip_db is None:
        clip_db = CLIP_DB
        notes.append(f"the colours are assumed to span {clip_db:g} dB")
    shuffled = shuffle_pixels(heldout.pixels, rng)
    sets = {"train": train.pixels, "heldout": heldout.pixels, "samples": samples.pixels, "shuffled": shuffled}
    units = {"axes": axes, "colormap": colormap, "clip_db": clip_db}
    measured = {key: measure_physics(pixels, **units) for key, pixels in sets.items()}

    labels = {"train": train.labels, "heldout": heldout.labels, "samples": samples.labels}
    class_names, caveat = train.class_names, ""
    if any(label is None for label in labels.values()):
        labels = {key: np.zeros(len(sets[key]), dtype=int) for key in labels}
        class_names, caveat = ["everybody"], "as one user"
        notes.append(
            "not all sets are labelled: everybody is compared as one user, generated and real alike, so whose gait a"
            " picture shows is not asked"
        )
    users = sorted(set(labels["train"]) & set(labels["heldout"]) & set(labels["samples"]))
    if not users:
        return Section(title="Physics of gait", notes=[*notes, "no user is in all sets: nothing is compared"])
    places = {key: {user: np.flatnonzero(label == user) for user in users} for key, label in labels.items()}
    findings, ratios = [], []
    for name, about in QUANTITIES.items():
        column = {key: found[name] for key, found in measured.items()}
        distances = _distances(column, places, users, LEAST.get(name, 1e-6), rng)  # (users, 2 + kinds of worst)
        made, real, *ends = distances.mean(axis=0).tolist()
        kinds = range(0 if len(users) > 1 else 1, len(WORST))  # one user is nobody's other
        kind = next((k for k in kinds if _farther(distances[:, 2 + k], distances[:, 1], seed)), len(WORST) - 1)
        interval = mean_interval(distances[:, 0], seed)
        findings.append(
            Finding(
                name=name,
                value=made,
                real=real,
                worst=ends[kind],
                worst_is=list(WORST)[kind],
                interval=interval,
                form="{:.2f}",
                about=about,
                distance=True,
                caveat=caveat,
                medians=(float(np.median(column["samples"])), float(np.median(column["heldout"]))),
            )
        )
        ratios.append(distances[:, 0] / np.maximum(distances[:, 1], 0.05))
    named = {finding.worst_is for finding in findings}
    notes.append("the worst: " + "; ".join(words for kind, words in WORST.items() if kind in named))
    notes.append("generated, held out: medians of the quantity itself, in its own unit")
    rows = [[class_names[user], *(f"{ratio[i]:.1f}" for ratio in ratios)] for i, user in enumerate(users)]
    title = "Distance of generated pictures over that of real training pictures, by user"
    counts = [min(len(places["samples"][user]), len(places["train"][user])) for user in users]
    notes.append(
        f"distances are Wasserstein-1, of {min(counts)} to {max(counts)} generated and as many real pictures a user;"
        " they are not 0 for so few"
    )
    return Section(
        title="Physics of gait",
        value_is="distance to held-out real images, in standard deviations of real images",
        findings=findings,
        tables=[Table(title=title, header=["user", *QUANTITIES], rows=rows)],
        notes=notes,
        data={"means": {key: {name: float(x.mean()) for name, x in found.items()} for key, found in measured.items()}},
    )


def _farther(distances, real, seed: int) -> bool:
    """Whether distances (users,) are greater than those of real pictures; of two users, twice as great."""
    interval = mean_interval(distances - real, seed)
    return interval[0] > 0 if interval else bool((distances > 2 * real).all())


def _distances(column, places, users, least: float, rng) -> np.ndarray:
    """Distances to the held-out pictures of a user: (users, 5) of generated, training, and the three worst ones.

    Of one user alone the first of the worst has no meaning.
    """
    unit = max(np.concatenate([column["train"], column["heldout"]]).std(), least)
    found = np.zeros((len(users), 2 + len(WORST)))
    for row, user in enumerate(users):
        target = column["heldout"][places["heldout"][user]]
        count = min(len(places["samples"][user]), len(places["train"][user]))
        others = [other for other in users if other != user] or [user]
        for _ in range(ROUNDS):
            stranger = others[rng.integers(len(others))]
            made, own, other, mixed = (
                column[key][rng.permutation(places[where][whose])[:count]]
                for key, where, whose in (
                    ("samples", "samples", user),
                    ("train", "train", user),
                    ("train", "train", stranger),
                    ("shuffled", "heldout", user),
                )
            )
            found[row] += [wasserstein_distance(drawn, target) for drawn in (made, own, other, mixed, own + unit)]
    return found / unit / ROUNDS
