"""Generated images beside real and broken ones, all against the same real images and at one number."""

from typing import Any

import numpy as np

from . import official
from .batches import ArrayBatch, Batch
from .features import FeatureSpace
from .findings import Finding, Section
from .image_sets import shuffle_pixels
from .manifold import Fidelity, fidelity
from .measure import FEWEST_IN_SET
from .statistics import frechet_floor, kernel_distance

MANY, MANY_SPLITS, FEW_SPLITS = 256, 3, 10  # above so many dimensions fewer splits of the floor
WORST_IMAGES = 1000  # whose pixels are shuffled


def at_the_same_number(space: FeatureSpace, x, y, worst, *, seed: int) -> tuple[Section, dict[str, str], dict]:
    """Generated images beside real ones against the same real ones, all at one number, as distances depend on it.

    Args:
        x, y: features of real and generated images; worst: of real images with shuffled pixels, or None.
    Returns:
        the section, the distances in words (of Inception in three lines, else in one), and as numbers (name -> number).
    """
    half, rng = min(len(x) // 2, len(y)), np.random.default_rng(seed)
    splits = MANY_SPLITS if x.shape[1] > MANY else FEW_SPLITS
    name, end = space.distance, space.ending
    official_space = space.class_weight is not None
    # the headline has the plain names, of all images
    each = "" if official_space else f" of {half} images each"
    if half < FEWEST_IN_SET:
        return Section(title="Against real images", notes=[f"{half} images a half are too few for a floor"]), {}, {}
    floor = frechet_floor(x, half, half, splits=splits, seed=seed)
    draws = [(rng.permutation(len(x)), rng.permutation(len(y))[:half]) for _ in range(splits)]
    distance = float(np.mean([official.frechet_of_features(x[i[:half]], y[j]) for i, j in draws]))
    order, chosen = draws[0]
    reference, others = x[order[:half]], {"real": x[order[half : 2 * half]], "value": y[chosen]}
    if worst is not None:
        others["worst"] = worst[:half]
    found = {role: fidelity(reference, features)._asdict() for role, features in others.items()}
    for role, features in others.items():
        found[role][f"KID{end}"] = kernel_distance(reference, features)
    findings = [
        Finding(
            name=name + each,
            value=distance,
            real=floor.mean,
            worst=None if worst is None else official.frechet_of_features(reference, worst[:half]),
            about=f"Frechet distance, {half} against {half} images, mean of {splits} random splits",
            distance=True,
        )
    ]
    found.setdefault("worst", dict.fromkeys(Fidelity._fields, 0.0))
    for score in (f"KID{end}", *Fidelity._fields):
        ends: dict[str, Any] = {role: values.get(score) for role, values in found.items()}
        label = score if score.startswith("KID") else f"{score.capitalize()}{end}"
        findings.append(Finding(name=label + each, about=f"{half} against {half} images", **ends))
    ratio = distance / floor.mean if floor.mean > 0 else None
    said = "-" if ratio is None else f"{ratio:.4g}"
    if official_space:
        lines = {
            f"{name} floor": f"{floor.mean} (real against real, {half} and {half} images, {splits} splits)",
            f"{name} at that number": f"{distance}",
            f"{name} / floor": said,
        }
    else:
        last = "" if worst is None else f", shuffled {findings[0].worst:.4g}"
        lines = {
            name + each: f"generated {distance:.4g}, real {floor.mean:.4g} (ratio {said}){last}; the {name}"
            f" above is of all images, {len(x)} and {len(y)}, and not comparable with these"
        }
    numbers = {name + each: distance, f"{name}{each}, real": floor.mean, f"{name}{each}, ratio": ratio}
    if worst is not None:
        numbers[f"{name}{each}, shuffled"] = findings[0].worst
    notes = ["Real images are a random half of the reference, judged by the other half, so of the same recordings."]
    if worst is not None:
        few = "" if len(worst) >= half else f", only {len(worst)} of them: as few look a little farther away"
        notes.append(f"The worst are reference images whose pixels are shuffled{few}.")
    return Section(title=f"Against real images, {half} of each", findings=findings, notes=notes), lines, numbers


def shuffled(space: FeatureSpace, ref: Batch, seed: int) -> np.ndarray | None:
    """Features of reference images whose pixels are shuffled; not where a forward pass is dear."""
    if space.name not in ("user", "vae"):
        return None
    places = np.arange(len(ref)) if space.learned is None else np.flatnonzero(~space.learned)
    count, rng = min(len(places), WORST_IMAGES), np.random.default_rng(seed)
    pixels = shuffle_pixels(ref.take(rng.choice(places, count, replace=False)), rng)
    return space.extract(ArrayBatch(pixels, flag="shuffled"))["pool"]
