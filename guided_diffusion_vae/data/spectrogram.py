"""Pictures of power: dB to [-1, 1] to colours, and back.

A spectrogram is received power over velocity (rows, approach above) and time (columns, oldest first). It becomes a
picture in two steps, both invertible: a linear map of decibels between a floor and a ceiling to [-1, 1], and a colour
map. A spectrogram is never mirrored: reversed time, and reversed Doppler, are other motions.
"""

import numpy as np

ANCHORS = {  # colours at equally spaced values; between them a colour map is linear
    "grey": [(0, 0, 0), (255, 255, 255)],
    "jet": [(0, 0, 128), (0, 0, 255), (0, 128, 255), (0, 255, 255), (128, 255, 128), (255, 255, 0), (255, 128, 0)]
    + [(255, 0, 0), (128, 0, 0)],
    "viridis": [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129)]
    + [(92, 200, 99), (170, 220, 50), (253, 231, 37)],
}


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
    from scipy.spatial import cKDTree

    distance, index = cKDTree(colour_table(colormap).astype(float)).query(np.asarray(pixels, dtype=float))
    return index / 127.5 - 1, distance
