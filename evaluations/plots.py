"""Whom the judge names: confusion matrices, and each user's accuracy beside that of real images."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from guided_diffusion_vae.plotting import DPI, new_figure, or_said, place, save_figure

from . import report
from .classifier_tests import confusion
from .findings import Section
from .image_sets import ImageSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GENERATED, REAL = "generated", "real, held out"  # the matrices' titles
PICTURE = "confusion.png"
WIDE = 8.4  # inches of the panel below
SMALLEST = 6.0  # points: names that would be smaller are left out, every so many


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (users, users) as shares of each row; NaN in the row of a user of whom there is no image."""
    counts = np.asarray(counts, dtype=float)
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def draw_confusion(counts: Mapping[str, np.ndarray], names: Sequence[str]) -> "Figure":
    """Confusion matrices side by side; below, each user's accuracy, if there are generated and real images.

    Args:
        counts: title (GENERATED, REAL or one of them) -> (users, users), how many images that were asked to show the
            user of the row are named as the user of the column.
        names: of the users.
    """
    both, side, top = GENERATED in counts and REAL in counts, 3.75, 0.4
    words = 0.062 * max(map(len, names))  # room for a name
    left, below = 0.55 + words, 0.45 + words
    figure = new_figure(len(counts) * (left + side) + 1.0, top + side + below + (2.35 + words if both else 0))
    for number, (title, matrix) in enumerate(counts.items()):
        x = left + number * (left + side)
        axes = place(figure, x, top, side, side)
        image = axes.imshow(shares(matrix), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        if number == 0:
            beside = place(figure, len(counts) * (left + side) + 0.12, top, 0.14, side)
            figure.colorbar(image, cax=beside, label="share of the user's images")
        axes.set_title(f"{title}: {np.trace(matrix) / max(1, matrix.sum()):.1%} right")
        axes.set(xlabel="named", ylabel="asked" if title == GENERATED else "shown")
        _name_ticks(axes.xaxis, names, side)
        _name_ticks(axes.yaxis, names, side)
        axes.tick_params(axis="x", rotation=90)
    if both:
        _accuracies(place(figure, left, top + side + below + 0.4, left + 2 * side, 1.6), counts, names)
    return figure


def _accuracies(axes: "Axes", counts: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    right = {title: np.diagonal(shares(counts[title])) for title in (REAL, GENERATED)}
    order = np.lexsort((right[GENERATED], np.nan_to_num(right[REAL], nan=-1)))
    places = np.arange(len(order))
    real, made, size = right[REAL][order], right[GENERATED][order], min(8.0, 60 * WIDE / len(order))
    axes.vlines(places, real, made, color="0.75", linewidth=1, zorder=1)
    axes.plot(places, real, "o", markersize=size, markerfacecolor="none", color="black", label=REAL)
    axes.plot(places, made, "o", markersize=0.6 * size, color="tab:orange", label=GENERATED)
    axes.axhline(1 / len(names), linestyle=":", color="0.5", label="chance")
    axes.set(ylim=(-0.05, 1.05), xlim=(-0.7, len(order) - 0.3))
    axes.set_title("accuracy of each user, in the order of real images", fontsize=10, loc="left")
    _name_ticks(axes.xaxis, [str(names[user]) for user in order], WIDE)
    axes.tick_params(axis="x", rotation=90)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


def _name_ticks(axis, names: Sequence[str], inches: float) -> None:
    """Users' names along an axis, in letters that fit; of very many users every so many."""
    room = 0.85 * 72 * inches / len(names)  # points for one name
    every = int(np.ceil(SMALLEST / room))
    axis.set_ticks(np.arange(0, len(names), every), list(names)[::every], fontsize=min(9.0, max(SMALLEST, room)))
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


def draw_judgement(path, named: Mapping[str, np.ndarray], heldout: ImageSet, samples: ImageSet, say=print) -> bool:
    """Write the picture of what one judge says; whether it could be drawn.

    Args:
        named: the users that the judge names, of the sets GENERATED and OTHER of `report`.
    """
    users, counts = len(heldout.class_names), {}
    for title, name, images in ((GENERATED, report.GENERATED, samples), (REAL, report.OTHER, heldout)):
        if images.labels is not None:
            counts[title] = confusion(np.eye(users)[named[name]], images.labels, users)
    return or_said(PICTURE, lambda: save_figure(draw_confusion(counts, heldout.class_names), path), say)


def with_confusion(section: Section, names: Sequence[str], say=print) -> None:
    """Put the picture into the section of the classifier tests, in the place of the one of the matrices alone."""
    kept = {GENERATED: "confusion_trts", REAL: "confusion_trtr"}
    counts = {title: np.array(section.data[key]) for title, key in kept.items() if key in section.data}

    def draw():
        section.pictures[PICTURE] = as_picture(draw_confusion(counts, names))

    or_said(PICTURE, draw, say)


def as_picture(figure: "Figure") -> Image.Image:
    """A figure as the picture that a report's page shows."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    with Image.open(data) as picture:
        return picture.convert("RGB")
