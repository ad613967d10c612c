"""Pictures for people: spectrograms with axes, the walk from noise to images, latents.

Pure functions of arrays. Each returns matplotlib's `Figure`, which `save_figure` writes as a PNG; pyplot, which wants a
display and keeps a global state, is never loaded. Nothing here draws a random number, so `--plot` changes no result.
Colours that a picture has are shown as they are, values without colours in viridis, signed ones in blue and red.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .checkpoint import atomic_write
from .config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LACKING = '--plot True needs matplotlib: pip install "guided_diffusion_vae[plots]", or leave --plot out'
DPI = 100
GREY = "grey"
LATENT_COLUMNS = 8  # channels side by side
REACH = 4.0  # standard deviations that a histogram shows


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Pictures."""

    plot: bool = False  # also draw pictures for the eye (docs/pictures.md); needs the extra [plots]

    def __post_init__(self):
        if self.plot:
            new_figure(1, 1)  # complains before any work is done


class PictureAxes(NamedTuple):
    """What the edges of a spectrogram are: bottom and top, their unit, and the seconds from left to right."""

    low: float
    high: float
    unit: str  # m/s or Hz
    seconds: float


class Walk(NamedTuple):
    """An image on its way from noise: pixels uint8 (2, moments, H, W, 3), x_t above the guess of the clean image.

    noise: (moments,) the share of noise in the power of x_t; name: whose image it is.
    """

    name: str
    pixels: np.ndarray
    noise: np.ndarray


def new_figure(width: float, height: float, **how) -> "Figure":
    """An empty `Figure`, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(LACKING) from error
    return Figure(figsize=(width, height), **how)


def save_figure(figure: "Figure", path, *, dpi: int = DPI) -> None:
    """Write a figure as a PNG, whole or not at all, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        figure.savefig(handle, format="png", dpi=dpi)


def or_said(what: str, draw: Callable[[], object], say: Callable[[str], object]) -> bool:
    """Draw; whatever goes wrong is said in one line, for no picture is worth the work that it shows.

    Returns:
        whether it was drawn.
    """
    try:
        draw()
    except Exception as error:  # of matplotlib, of a full disk, of a damaged log: no list of theirs is whole
        say(f"warning: {what} could not be drawn: {' '.join(str(error).split())[:200] or type(error).__name__}")
        return False
    return True


# ---- spectrograms ----------------------------------------------------------------------------------------------------


def colours_in_words(colours: str) -> str:
    """What `detect_colormap` found, as a line for the terminal."""
    if not colours:
        return "colours: of no known map, shown as they are"
    return f"colours: {colours} (detected{', shown in viridis' if colours == GREY else ''})"


def _show(axes, image: np.ndarray, colours: str, edges: PictureAxes | None = None):
    """An image (H, W, 3) uint8 between its edges, in pixels if they are not known."""
    height, width = image.shape[:2]
    extent = (0, edges.seconds, edges.low, edges.high) if edges else (0, width, height, 0)
    how = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    if colours == GREY:
        return axes.imshow(image.mean(axis=2) / 255, cmap="viridis", vmin=0, vmax=1, **how)
    return axes.imshow(image, **how)


def place(figure, x: float, y: float, width: float, height: float):
    """Axes at a place in inches, from the left and from the top of the figure."""
    across, down = figure.get_size_inches()
    return figure.add_axes((x / across, 1 - (y + height) / down, width / across, height / down))


def _write(figure, x: float, y: float, words: str, **how) -> None:
    across, down = figure.get_size_inches()
    figure.text(x / across, 1 - y / down, words, parse_math=False, **{"va": "center", "fontsize": 9, **how})


def _name_edges(figure, edges: PictureAxes | None, x: float, bottom: float, left: float, y: float) -> None:
    """What the two axes are, written once for all pictures: below them at x, and on their left at y."""
    down = f"Doppler ({edges.unit})" if edges and edges.unit == "Hz" else f"velocity ({edges.unit})" if edges else "row"
    _write(figure, left, y, down, rotation=90, ha="center")
    _write(figure, x, bottom, "time (s)" if edges else "column", ha="center")


def draw_grid(
    rows: Sequence[np.ndarray], names: Sequence[str], edges: PictureAxes | None = None, colours: str = ""
) -> "Figure":
    """A row for each user, with axes.

    Args:
        rows: for each user images (n, H, W, 3) uint8, at least one; names: of the users.
        edges: None shows rows and columns of pixels.
        colours: see `detect_colormap`.
    """
    height, width = rows[0].shape[1:3]
    side, tall, gap, top, bottom = 1.0, height / width, 0.08, 0.12, 0.45
    left = 0.95 + 0.085 * max(map(len, names), default=0)
    columns = max(map(len, rows))
    figure = new_figure(left + columns * (side + gap) + 0.1, top + len(rows) * (tall + gap) + bottom)
    for down, (images, name) in enumerate(zip(rows, names, strict=True)):
        y = top + down * (tall + gap)
        _write(figure, 0.1, y + tall / 2, name)
        for across, image in enumerate(images):
            axes = place(figure, left + across * (side + gap), y, side, tall)
            _show(axes, image, colours, edges)
            axes.tick_params(labelsize=7, length=2, pad=2)
            axes.locator_params(nbins=4, prune="upper")  # it would meet the neighbour's first
            if across:
                axes.set_yticklabels([])
            if down < len(rows) - 1:
                axes.set_xticklabels([])
    middle = left + columns * (side + gap) / 2
    height = len(rows) * (tall + gap)
    _name_edges(figure, edges, middle, top + height + 0.3, left - 0.42, top + height / 2)
    return figure


def draw_walks(walks: Sequence[Walk], colours: str = "") -> "Figure":
    """Two rows for each image: x_t, and the clean image as the network guesses it there; noise on the left."""
    height, width = walks[0].pixels.shape[2:4]
    side, tall, gap, top = 1.0, height / width, 0.05, 0.3
    between = 0.35  # of two images, with the shares of noise
    left, moments = 1.15, max(walk.pixels.shape[1] for walk in walks)
    block = 2 * (tall + gap) + between
    figure = new_figure(left + moments * (side + gap) + 0.1, top + len(walks) * block - between + 0.1)
    for number, walk in enumerate(walks):
        y = top + number * block
        _write(figure, 0.1, y - 0.12, walk.name, weight="bold")
        for row, words in enumerate(("noisy (x_t)", "guess of\nthe clean one")):
            _write(figure, 0.1, y + row * (tall + gap) + tall / 2, words)
            for column, image in enumerate(walk.pixels[row]):
                axes = place(figure, left + column * (side + gap), y + row * (tall + gap), side, tall)
                _show(axes, image, colours)
                axes.set_axis_off()
        for column, share in enumerate(walk.noise):
            words = f"{share:.0%} noise" if share else "finished"
            _write(figure, left + column * (side + gap) + side / 2, y - 0.12, words, ha="center")
    return figure


# ---- latents ---------------------------------------------------------------------------------------------------------


def draw_latents(
    pixels: np.ndarray,
    latents: np.ndarray,
    decoded: np.ndarray,
    names: Sequence[str],
    values: np.ndarray,
    edges: PictureAxes | None = None,
    colours: str = "",
) -> "Figure":
    """A row for each image: itself, its latent channel by channel, and what they decode to; below, how they spread.

    Args:
        pixels, decoded: uint8 (n, H, W, 3); latents: model latents (n, C, h, w); names: of the images.
        values: (C, count) model latents of many images, for the histograms.
    """
    count, channels = latents.shape[:2]
    columns, lines = min(channels, LATENT_COLUMNS), -(-channels // LATENT_COLUMNS)
    side, tall, gap, top, left = 1.2, 1.2 * pixels.shape[1] / pixels.shape[2], 0.1, 0.35, 1.75
    block = max(tall, lines * (side + gap)) + gap
    spread = 1.0  # height of a histogram
    width = left + (columns + 2) * (side + gap) + 1.0
    figure = new_figure(width, top + count * block + 0.45 + lines * (spread + 0.35))
    reach = max(1.0, float(np.percentile(np.abs(latents), 99.8)))
    at = [left + column * (side + gap) for column in range(columns + 2)]
    _write(figure, at[0] + side / 2, 0.18, "image", ha="center")
    _write(figure, at[-1] + side / 2, 0.18, "decoded", ha="center")
    for row in range(count):
        y = top + row * block
        _write(figure, 0.1, y + tall / 2, names[row])
        for x, image in ((at[0], pixels[row]), (at[-1], decoded[row])):
            axes = place(figure, x, y, side, tall)
            _show(axes, image, colours, edges)
            axes.tick_params(labelsize=7, length=2, pad=2)
            if x == at[-1] or not edges:
                axes.set(xticks=[], yticks=[])
            elif row < count - 1:
                axes.set_xticklabels([])
        for channel in range(channels):
            line, column = divmod(channel, LATENT_COLUMNS)
            axes = place(figure, at[column + 1], y + line * (side + gap), side, side)
            shown = axes.imshow(latents[row, channel], cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0 and lines == 1:
                _write(figure, at[column + 1] + side / 2, 0.18, f"channel {channel}", ha="center")
    bar = place(figure, width - 0.85, top, 0.15, min(count * block - gap, 6.0))
    figure.colorbar(shown, cax=bar, label="model latent", extend="both")
    for channel in range(channels):
        line, column = divmod(channel, LATENT_COLUMNS)
        y = top + count * block + 0.5 + line * (spread + 0.35)
        _spread(place(figure, at[column + 1], y, side, spread), values[channel], channel)
    _write(figure, 0.1, top + count * block + 0.5 + spread / 2, "all values,\nagainst N(0, 1)")
    if edges:
        _name_edges(figure, edges, at[0] + side / 2, top + count * block + 0.13, left - 0.42, top + count * block / 2)
    return figure


def _spread(axes, values: np.ndarray, channel: int) -> None:
    """A histogram of density, what lies outside is in the last bars; the line is the unit normal."""
    bins = np.linspace(-REACH, REACH, 41)
    axes.hist(np.clip(values, -REACH, REACH), bins=bins, density=True, color="tab:blue", alpha=0.6)
    x = np.linspace(-REACH, REACH, 161)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=1)
    axes.set(yticks=[], xlim=(-REACH, REACH), xticks=(-2, 0, 2))
    axes.tick_params(labelsize=7, length=2, pad=2)
    axes.set_title(f"{channel}: mean {values.mean():.2f}, std {values.std():.2f}", fontsize=7, pad=3)
