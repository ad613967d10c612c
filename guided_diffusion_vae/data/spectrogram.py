"""Pictures of power: from a baseband signal to decibels, to [-1, 1], to colours; and back.

A spectrogram is received power over velocity (rows, approach above) and time (columns, oldest first):

    P(f, t) = |sum_k s(t + k / prf) w(k) exp(-2 pi j f k / prf)|^2,      w Gaussian, of unit energy

Its decibels become a picture in two steps, both invertible: a linear map between a floor and a ceiling to [-1, 1], and
a colour map. A spectrogram is never mirrored: reversed time, and reversed Doppler, are other motions.

A radial velocity v is a Doppler frequency f = 2 v / lambda; approach is positive.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

OVERSAMPLING = 2  # spectra per pixel in both directions, averaged
SPEED_OF_LIGHT = 299_792_458.0  # m/s
OFF_THE_MAP = 25.0  # mean distance, in 8-bit levels, from which on a picture is in the colours of no known map
ANCHORS = {  # colours at equally spaced values; between them a colour map is linear
    "grey": [(0, 0, 0), (255, 255, 255)],
    "jet": [(0, 0, 128), (0, 0, 255), (0, 128, 255), (0, 255, 255), (128, 255, 128), (255, 255, 0), (255, 128, 0)]
    + [(255, 0, 0), (128, 0, 0)],
    "viridis": [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129)]
    + [(92, 200, 99), (170, 220, 50), (253, 231, 37)],
    "parula": [(53, 42, 135), (15, 92, 221), (20, 129, 214), (6, 163, 202), (46, 183, 164), (135, 191, 119)]
    + [(209, 187, 89), (255, 195, 55), (245, 227, 39), (249, 251, 14)],
}


def doppler_hz(velocity_mps, carrier_ghz: float):
    """f = 2 v / lambda."""
    return 2 * velocity_mps * carrier_ghz * 1e9 / SPEED_OF_LIGHT


def velocity_mps(doppler_hz, carrier_ghz: float):
    """v = f lambda / 2, the inverse of `doppler_hz`."""
    return doppler_hz * SPEED_OF_LIGHT / (2 * carrier_ghz * 1e9)


def row_axis(rows: int, edges: tuple[float, float]) -> np.ndarray:
    """Velocities (or Doppler frequencies) at the centres of the rows: (rows,), the fastest approach first.

    Args:
        edges: the lower edge of the bottom row and the upper edge of the top row.
    """
    low, high = edges
    return high - (np.arange(rows) + 0.5) * (high - low) / rows


def stft_power(baseband, *, size: int, edges_hz: tuple[float, float], prf_hz: float, window_s: float) -> np.ndarray:
    """Power (size, size) over Doppler and time, computed where the pixels are; each averages OVERSAMPLING^2 spectra.

    Args:
        baseband: (T,) complex; the first and the last window are the first and the last column.
        edges_hz: what the rows span, see `row_axis`.
        window_s: length of the window, 2.5 standard deviations; it is cut off at twice that.
    """
    waves = _waves(size * OVERSAMPLING, edges_hz, prf_hz, window_s)
    length = waves.shape[1]
    starts = np.linspace(0, len(baseband) - length, size * OVERSAMPLING).round().astype(int)
    power = np.abs(waves @ sliding_window_view(baseband, length)[starts].T) ** 2
    return power.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))


@lru_cache(maxsize=8)
def _waves(rows: int, edges_hz, prf_hz: float, window_s: float) -> np.ndarray:
    """The matrix (rows, window) that takes a stretch of baseband to its spectrum at the rows' frequencies."""
    length = round(2 * window_s * prf_hz)
    time_s = (np.arange(length) - (length - 1) / 2) / prf_hz
    window = np.exp(-0.5 * (time_s / (window_s / 2.5)) ** 2)
    waves = np.exp(-2j * np.pi * row_axis(rows, edges_hz)[:, None] * time_s)
    return (waves * (window / np.linalg.norm(window))).astype(np.complex64)


def unit_from_db(power_db, floor_db=-45.0, ceil_db=0.0):
    """Map decibels to [-1, 1], linearly; values outside the range are clipped.

    Args:
        power_db: array, dB; floor_db, ceil_db: what becomes -1 and +1.
    Raises:
        ValueError: the floor is not below the ceiling.
    """
    if not floor_db < ceil_db:
        raise ValueError(f"the floor of {floor_db} dB must be below the ceiling of {ceil_db} dB")
    return np.clip((power_db - floor_db) / (ceil_db - floor_db), 0, 1) * 2 - 1


def db_from_unit(unit, floor_db=-45.0, ceil_db=0.0):
    """Undo `unit_from_db`, up to its clipping."""
    return floor_db + (unit + 1) / 2 * (ceil_db - floor_db)


def db_re_peak(power, percentile=99.9):
    """Power (any unit) in decibels relative to its `percentile`, so that one bright pixel does not set the scale."""
    return 10 * np.log10(np.maximum(power, 1e-30) / np.percentile(power, percentile))


def colour_table(name: str) -> np.ndarray:
    """The 256 colours of a map: uint8 (256, 3).

    Raises:
        ValueError: the map is not known.
    """
    if name not in ANCHORS:
        raise ValueError(f"--colormap {name} is not known; choose {', '.join(ANCHORS)}")
    anchors = np.array(ANCHORS[name], dtype=float)
    places = np.linspace(0, 1, len(anchors))
    values = np.linspace(0, 1, 256)
    return np.stack([np.round(np.interp(values, places, channel)) for channel in anchors.T], axis=-1).astype(np.uint8)


def colours_from_unit(unit, colormap="jet") -> np.ndarray:
    """Values in [-1, 1], any shape, as uint8 colours (..., 3)."""
    index = np.clip(np.round((np.asarray(unit) + 1) * 127.5), 0, 255).astype(np.uint8)
    return colour_table(colormap)[index]


def unit_from_colours(pixels, colormap="jet") -> tuple[np.ndarray, np.ndarray]:
    """The value of the nearest colour of the map, and how far that colour is.

    Args:
        pixels: (..., 3) uint8.
    Returns:
        values (...) in [-1, 1]; distances (...) in 8-bit levels (Euclidean): large where a picture left the map.
    """
    from scipy.spatial import KDTree

    red, green, blue = np.moveaxis(np.asarray(pixels).astype(np.uint32), -1, 0)
    packed = red << 16 | green << 8 | blue
    colours, place = np.unique(packed, return_inverse=True)  # a picture has few colours, of many pixels
    split = np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], -1)
    nearest: Any = KDTree(colour_table(colormap).astype(float)).query(split.astype(float))
    distance, index = nearest
    return (index / 127.5 - 1)[place].reshape(packed.shape), distance[place].reshape(packed.shape)


def detect_colormap(pixels) -> str:
    """The known colour map that images (N, H, W, 3) uint8 are nearest to, by the mean distance of about 64 of them.

    Empty where none is near: a photograph, or two maps side by side.
    """
    some = pixels[:: max(1, len(pixels) // 64), ::2, ::2]
    apart = {name: float(unit_from_colours(some, name)[1].mean()) for name in ANCHORS}
    best = min(apart, key=apart.__getitem__)
    return best if apart[best] < OFF_THE_MAP else ""
