"""The curves of a training, from the log that it keeps: losses, shares named right, gradients, over steps."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import UserError
from .plotting import new_figure, or_said, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, PROGRESS = "curves.png", "progress.csv"
TERMS = "terms"
PANELS = {  # words at the side -> what the three training loops call what is drawn there
    "loss": "loss|total_loss|train_loss|val_loss|seen_loss",
    "loss by quarter of the times": r"(train_)?loss_q\d",
    TERMS: "",  # whatever fits nowhere else
    "share named right": r"(train|val)_acc@\d",
    "discriminator's logits": r"logits_\w+",
    "weights": r"\w+_weight|logvar",
    "gradient": "grad_norm|lr",
    "": r"step|samples|epoch|images_per_second|param_norm|lg_loss_scale|memorisation|.*_q\d",  # not drawn
}
MANY_ROWS = 200  # of a log, from which on a curve is noise without a moving average
DECADE = 10.0  # a curve whose largest value is so many times its smallest has a logarithmic axis


def draw_progress(folder, say: Callable[[str], object]) -> bool:
    """Draw `curves.png` of a folder's progress.csv; what prevents it is said in one line."""
    folder = Path(folder)
    return or_said(CURVES, lambda: save_figure(draw_curves(read_progress(folder / PROGRESS)), folder / CURVES), say)


def read_progress(path) -> dict[str, np.ndarray]:
    """The columns of a progress.csv: name -> (rows,) float64, NaN where a row has no number.

    Raises:
        UserError: there is no such file, or no row in it.
    """
    rows = []
    if Path(path).is_file():
        with open(path, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    if not rows or "step" not in rows[0]:
        raise UserError(f"{path} has no rows yet, or --log_format names no csv")
    return {name: np.array([_number(row[name]) for row in rows]) for name in rows[0] if name}


def _number(word) -> float:
    try:
        return float(word)
    except (TypeError, ValueError):
        return np.nan


def panels_of(columns: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Which columns are drawn together: the words at a panel's side -> its columns; none where there is no number."""
    found: dict[str, list[str]] = {words: [] for words in PANELS}
    for name in (name for name, values in columns.items() if np.isfinite(values).any()):
        fits = (words for words, pattern in PANELS.items() if pattern and re.fullmatch(pattern, name))
        found[next(fits, TERMS)].append(name)
    losses = [columns[name] for name in found["loss"]]
    only = [name for name in found[TERMS] if any(np.array_equal(columns[name], x, equal_nan=True) for x in losses)]
    found[TERMS] = [name for name in found[TERMS] if name not in only]  # a loss of one term is that term
    return {words: names for words, names in found.items() if words and names}


def best_of(columns: dict[str, np.ndarray]) -> tuple[str, float, float] | None:
    """The lowest validation loss, or without one the lowest loss: the column's name, the step, the value."""
    for name in ("val_loss", *panels_of(columns).get("loss", [])):
        values = columns.get(name)
        if values is not None and np.isfinite(values).any():
            place = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
            return name, float(columns["step"][place]), float(values[place])
    return None


def draw_curves(columns: dict[str, np.ndarray]) -> "Figure":
    """A panel for each group of columns over the steps; the step with the lowest loss is marked in all of them.

    Args:
        columns: see `read_progress`; beside `step`, whatever is there of what the training loops log.
    """
    panels, steps, best = panels_of(columns), columns["step"], best_of(columns)
    across = 1 if len(panels) <= 3 else 2
    down = -(-len(panels) // across)
    figure = new_figure(9 if across == 1 else 14, 0.4 + 2.5 * down, layout="constrained")
    places = figure.subplots(down, across, sharex=True, squeeze=False).T.flat
    for place, (axes, (words, names)) in enumerate(zip(places, panels.items(), strict=False)):
        for name in names:
            _curve(axes, steps, columns[name], name)
        _scale(axes, [columns[name][np.isfinite(columns[name])] for name in names])
        axes.set_ylabel(words)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        if best:
            axes.axvline(best[1], color="0.35", linestyle=":", linewidth=1)
            if words == "loss":
                label = f"lowest {best[0]}:\n{best[2]:.4g} at step {best[1]:.0f}"
                axes.plot(*best[1:], "o", color="black", markersize=5, label=label)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.locator_params(axis="x", integer=True)
        if place % down == down - 1 or place == len(panels) - 1:
            axes.set_xlabel("step")
    for axes in places[len(panels) :]:
        axes.remove()
    return figure


def _scale(axes, curves: list[np.ndarray]) -> None:
    """A logarithmic axis for values that span decades; around 0 linear, for curves of other sizes that cross it."""
    least, most = min(values.min() for values in curves), max(values.max() for values in curves)
    sizes = [size for values in curves if (size := float(np.median(np.abs(values)))) > 0]
    if least > 0 and most / least >= DECADE:
        axes.set_yscale("log")
    elif least <= 0 and len(sizes) > 1 and max(sizes) / min(sizes) >= DECADE:
        axes.set_yscale("symlog", linthresh=min(sizes))


def _curve(axes, steps, values, name: str) -> None:
    there = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[there], values[there]
    how = {"marker": "o", "markersize": 3} if len(steps) <= 40 else {}
    if len(steps) <= MANY_ROWS:
        axes.plot(steps, values, label=name, linewidth=1.3, **how)
        return
    width = len(steps) // 50
    weights = np.convolve(np.ones(len(steps)), np.ones(width), "same")  # fewer at both ends
    (line,) = axes.plot(steps, np.convolve(values, np.ones(width), "same") / weights, label=name, linewidth=1.3)
    axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.6)
