"""Pictures of gait whose truth is known: bands drawn by hand, and a few walkers of the simulator."""

import numpy as np
from scipy.ndimage import gaussian_filter

from evaluations.image_sets import ImageSet
from guided_diffusion_vae.data import microdoppler
from guided_diffusion_vae.data.spectrogram import colours_from_unit, row_axis

NAMES = [f"user_{user:02d}" for user in range(4)]
WAYS = 4  # to walk, of a user of `patterned`


def bands(centre, *, half_width=0.2, size=64, colormap="grey"):
    """White bands about a Doppler line (N, W), on black: uint8 (N, size, W, 3), Doppler from -1 to 1."""
    rows = row_axis(size, (-1, 1))[:, None]
    edge = (half_width - np.abs(rows - np.asarray(centre)[:, None])) * size / 2 + 0.5  # a row is covered in part
    return colours_from_unit(np.clip(edge, 0, 1) * 2 - 1, colormap)


def line(mean, swing, steps, width=64, phase=0.0):
    """A Doppler line (width,) that swings so many times, with a second harmonic that tells time from reversed time."""
    turns = 2 * np.pi * (steps * (np.arange(width) + 0.5) / width + phase)
    return mean + swing * (np.sin(turns) - 0.35 * np.sin(2 * turns))


def recordings(count, seed, length=128):
    """Values (count, 64, length) with grain: what a recording has, and no other."""
    fields = np.random.default_rng(seed).normal(size=(count, 64, length))
    return np.stack([gaussian_filter(field, (2, 1.2)) for field in fields]) * 4


def window(values, start=0, gain=0.0):
    """64 columns of recordings, from `start`: uint8 (count, 64, 64, 3)."""
    return colours_from_unit(np.clip(values[:, :, start : start + 64] + gain, -1, 1), "jet")


def walks(each, seed, users=4, labels=True):
    """An image set of bands: every user has a speed, a swing and a cadence of their own, every walk its own phase."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(users), each)
    lines = [
        line(0.1 + 0.1 * u + rng.normal(0, 0.01), 0.12 + 0.03 * u, 4 + u + rng.normal(0, 0.05), phase=rng.uniform())
        for u in who
    ]
    pixels = bands(np.stack(lines), colormap="jet")
    return ImageSet(pixels, who if labels else None, NAMES[:users] if labels else None)


def patterned(seed, each=8, ways=WAYS, *, users, size):
    """Every user has four ways to walk, each a pattern of its own, all equally alike; of these the first `ways`."""
    patterns = np.random.RandomState(7).randint(40, 215, (users, WAYS, size, size, 3))
    rng = np.random.RandomState(seed)
    who = np.repeat(np.arange(users), each)
    pixels = patterns[who, np.tile(np.arange(each) % ways, users)] + rng.randint(-20, 21, (len(who), size, size, 3))
    return ImageSet(pixels.astype(np.uint8), who, [f"user_{i:02d}" for i in range(users)])


def simulated(users, each, session, seed=0):
    """An image set of the simulator, and its scenes."""
    config = microdoppler.SimulationConfig(out_dir="unused", num_users=users, seed=seed)
    jobs = [(user, session, i) for user in range(users) for i in range(each)]
    made = [microdoppler.render(config, *job) for job in jobs]
    pixels, who = np.stack([pixels for pixels, _ in made]), np.array([user for user, *_ in jobs])
    return ImageSet(pixels, who, [f"user_{user:02d}" for user in range(users)]), [scene for _, scene in made]
