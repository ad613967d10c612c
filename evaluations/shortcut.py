"""How far a few numbers of a picture go in telling users apart: identity that is no gait.

A generator that copies brightness and noise keeps some "user accuracy" without a walking person in the picture. Linear
discriminant analysis of these numbers x, standardised, names the user u whose mean is nearest:

    (x - m_u)^T S^-1 (x - m_u),   S the covariance within users, shrunk towards 1
"""

from typing import NamedTuple

import numpy as np

from .image_sets import ImageSet
from .physics import Axes, colormap_of, find_axes, measure_physics, values_of

STATISTICS = "mean brightness", "contrast", "noise floor", "bulk Doppler without its sign", "bandwidth"
SHRINKAGE = 0.1  # for users of whom there are few images
BLOCK = 256  # images at a time


def picture_statistics(pixels: np.ndarray, axes: Axes, colormap: str) -> np.ndarray:
    """STATISTICS of images uint8 (N, H, W, 3): (N, 5)."""
    blocks = [values_of(pixels[i : i + BLOCK], colormap)[0] for i in range(0, len(pixels), BLOCK)]
    level = [np.concatenate([f(block, axis=(1, 2)) for block in blocks]) for f in (np.mean, np.std)]
    gait = measure_physics(pixels, axes=axes, colormap=colormap)
    return np.stack([*level, gait["noise_floor"], np.abs(gait["torso"]), gait["bandwidth"]], axis=1)


class Shortcut(NamedTuple):
    """What the discriminant analysis learned."""

    axes: Axes
    colormap: str
    centre: np.ndarray  # (5,)
    scale: np.ndarray  # (5,)
    root: np.ndarray  # (5, 5) with S^-1 = root root^T
    means: np.ndarray  # (users, 5), already times root

    @classmethod
    def learn(cls, train: ImageSet) -> "Shortcut":
        """From labelled images, some of every user."""
        colormap = colormap_of(train.pixels)
        axes, _ = find_axes(train.pixels, colormap)
        x = picture_statistics(train.pixels, axes, colormap)
        centre, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
        x = (x - centre) / scale
        means = np.stack([x[train.labels == user].mean(axis=0) for user in range(len(train.class_names))])
        within = np.cov(x - means[train.labels], rowvar=False)
        within = (1 - SHRINKAGE) * within + SHRINKAGE * np.eye(len(within))
        root = np.linalg.cholesky(np.linalg.inv(within))
        return cls(axes, colormap, centre, scale, root, means @ root)

    def name(self, pixels: np.ndarray) -> np.ndarray:
        """The user (N,) whom it takes each of uint8 images (N, H, W, 3) for."""
        x = (picture_statistics(pixels, self.axes, self.colormap) - self.centre) / self.scale @ self.root
        return ((x[:, None] - self.means) ** 2).sum(axis=2).argmin(axis=1)
