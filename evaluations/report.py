"""Every number between its floor and its ceiling: a table, report.json and a picture.

The judge learns from most of the real training images; the rest it never sees. So there are real images of the same
sessions, the best that a generator of those sessions can be, beside held-out ones of other sessions, the reference of
all distances. The worst are real images whose pixels are shuffled. Distances depend on the number of images, so every
set is compared at the same number.
"""

import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image, ImageDraw

from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.config import UserError

from .image_sets import ImageSet
from .manifold import fidelity, nearest
from .statistics import frechet_distance, kernel_distance
from .user_classifier import SIZE, to_input, train_user_classifier

ASIDE = 6  # every sixth training image of a user is kept from the judge
FEWEST = 4  # images a user, so that three remain to learn from
FEWEST_IN_SET = 6  # density and coverage look at the fifth neighbour
SPLITS = 10  # random splits that the floor is averaged over
NEIGHBOURS, NEAR_COPY = 50, 1 / 3  # a near copy's nearest is this much nearer than its 50 nearest on average
GENERATED, SAME, OTHER = "generated", "real, same sessions", "real, other sessions"
SPLIT, SHUFFLED = "real, split at random", "real, pixels shuffled"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared, and where the report goes."""

    real_dir: str = ""  # folder of the real images that the generator learned from
    heldout_dir: str = ""  # folder of real images of the same users in other sessions
    samples: str = ""  # generated images: the sampler's .npz, or its folder of PNGs
    out_dir: str = ""  # where report.json and comparison.png go; empty: report/ beside the samples
    judge_epochs: int = 20  # passes of the user classifier over the real training images
    seed: int = 0  # of the judge, and of what is set aside

    def __post_init__(self):
        if self.judge_epochs < 1:
            raise UserError(f"--judge_epochs is {self.judge_epochs}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One row of the table; None where a number has no meaning."""

    user_accuracy: float | None = None  # share that the judge names as their user
    fd_user: float | None = None  # Frechet distance to real images of other sessions
    kid_user: float | None = None  # kernel distance to them
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    nearest: float | None = None  # median distance to the nearest training image; held-out real images: 1
    near_copies: float | None = None  # share much nearer to one training image than to others


COLUMNS = {
    "user_accuracy": ("user acc.", "{:.1%}"),
    "fd_user": ("FD_user", "{:.2f}"),
    "kid_user": ("KID_user", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "nearest": ("nearest", "{:.2f}"),
    "near_copies": ("near copies", "{:.1%}"),
}


@dataclass(frozen=True)
class Report:
    """The rows of the table, what they stand on, and what to beware of."""

    rows: dict[str, Scores]
    about: dict[str, int | float | str]
    accuracy_per_user: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [" " * 22 + "".join(f"{heading:>12}" for heading, _ in COLUMNS.values())]
        for name, scores in self.rows.items():
            values = asdict(scores)
            cells = ["-" if values[k] is None else form.format(values[k]) for k, (_, form) in COLUMNS.items()]
            lines.append(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))
        about = self.about
        lines += [
            f"feature space: {about['feature_space']}",
            f"user acc.: what the judge names right; chance is {about['chance']:.1%}",
            f"FD_user to coverage: {about['compared']} images against {about['reference']} real ones of other sessions",
            "nearest: median distance to the nearest training image; held-out real images are 1",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def save(self, path) -> None:
        """Write the whole report as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            handle.write(json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())


def evaluate(
    train: ImageSet, heldout: ImageSet, samples: ImageSet, *, epochs: int = 20, seed: int = 0, progress: bool = False
) -> Report:
    """Judge samples against real images: identity, distribution, nearness to the training images.

    Args:
        train: what the generator learned from; heldout: the same users in other sessions; samples: generated images,
            unlabelled if nobody said whom they show. All numbered by the class list of `train`.
    Raises:
        UserError: too few users or images to judge by.
    """
    _refuse_too_few(train, heldout, samples)
    rng = np.random.default_rng(seed)
    aside, learned = set_aside(train.labels, rng)
    start = perf_counter()
    judge = train_user_classifier(
        train.pixels[learned],
        train.labels[learned],
        len(train.class_names),
        seed=seed,
        epochs=epochs,
        progress=progress,
    )
    seconds = perf_counter() - start

    shuffled = heldout._replace(pixels=shuffle_pixels(heldout.pixels, rng))
    sets = {GENERATED: samples, SAME: train.take(aside), OTHER: heldout, SHUFFLED: shuffled}
    judged = {name: judge.judge(images.pixels) for name, images in sets.items()}
    reference = judged[OTHER].features
    compared = min(len(aside), len(samples.pixels), len(reference))
    everything_real = np.concatenate([judged[SAME].features, reference])
    identity = {name: _identity(images, judged[name].users) for name, images in sets.items()}
    copying = _copying(train, sets)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distribution = {
            name: _distribution(judged[name].features[spread(images.labels, len(images.pixels), compared)], reference)
            for name, images in sets.items()
            if name != OTHER
        }
        floor = _split_floor(everything_real, compared, len(reference), rng)
    rows = {
        name: Scores(**identity[name], **distribution.get(name, {}), **copying[name])
        for name in (GENERATED, SAME, OTHER)
    }
    rows[SPLIT] = Scores(**floor)
    rows[SHUFFLED] = Scores(**identity[SHUFFLED], **distribution[SHUFFLED], **copying[SHUFFLED])
    about = {
        "feature_space": f"{reference.shape[1]} penultimate activations of a user classifier trained here on"
        f" {len(learned)} real images (not Inception: comparable only within this report)",
        "judge": judge.fingerprint(),
        "judge_seconds": round(seconds, 1),
        "judge_parameters": sum(p.numel() for p in judge.parameters()),
        "seed": seed,
        "chance": 1 / len(train.class_names),
        "users": len(train.class_names),
        "training_images": len(train.pixels),
        "heldout_images": len(heldout.pixels),
        "generated_images": len(samples.pixels),
        "compared": compared,
        "reference": len(reference),
    }
    per_user = {
        name: _accuracy_per_user(images, judged[name].users)
        for name, images in sets.items()
        if name != SHUFFLED and images.labels is not None
    }
    notes = sorted({str(warning.message) for warning in caught}) + _notes(train, heldout, samples)
    return Report(rows, about, per_user, notes)


def set_aside(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images that the judge never sees (a sixth of each user's, at least one), and of the others."""
    aside = []
    for user in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == user))
        aside.append(places[: max(1, len(places) // ASIDE)])
    aside = np.sort(np.concatenate(aside))
    return aside, np.setdiff1d(np.arange(len(labels)), aside)


def spread(labels: np.ndarray | None, n: int, count: int) -> np.ndarray:
    """`count` of n places, from all users alike."""
    order = np.arange(n) if labels is None else np.argsort(labels, kind="stable")
    return order[np.arange(count) * n // count]


def shuffle_pixels(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same colours in another order, in every image (N, H, W, 3) another."""
    flat = pixels.reshape(len(pixels), -1, 3)
    return np.stack([rng.permutation(image) for image in flat]).reshape(pixels.shape)


def _identity(images: ImageSet, users: np.ndarray) -> dict[str, float]:
    return {} if images.labels is None else {"user_accuracy": float((users == images.labels).mean())}


def _accuracy_per_user(images: ImageSet, users: np.ndarray) -> dict[str, float]:
    right = users == images.labels
    return {images.class_names[user]: float(right[images.labels == user].mean()) for user in np.unique(images.labels)}


def _distribution(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    distances = {
        "fd_user": frechet_distance(features, reference),
        "kid_user": kernel_distance(features, reference),
    }
    return distances | fidelity(reference, features)._asdict()


def _split_floor(features: np.ndarray, n: int, m: int, rng: np.random.Generator) -> dict[str, float]:
    """What n of these features score against m others, on average over random splits: no difference but chance."""
    orders = [rng.permutation(len(features)) for _ in range(SPLITS)]
    scores = [_distribution(features[order[:n]], features[order[n : n + m]]) for order in orders]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _copying(train: ImageSet, sets: dict[str, ImageSet]) -> dict[str, dict[str, float]]:
    """How near each set is to the training images, pixel by pixel; images set aside do not count themselves."""
    learned = to_input(train.pixels).flatten(1).numpy()
    count = min(NEIGHBOURS, len(learned) - 1)
    near = {
        name: nearest(to_input(images.pixels).flatten(1).numpy(), learned, count=count, skip=int(name == SAME))
        for name, images in sets.items()
    }
    usual = np.median(near[OTHER][:, 0])
    return {
        name: {
            "nearest": float(np.median(d[:, 0]) / max(usual, 1e-6)),
            "near_copies": float((d[:, 0] < NEAR_COPY * d.mean(axis=1)).mean()),
        }
        for name, d in near.items()
    }


def _refuse_too_few(train: ImageSet, heldout: ImageSet, samples: ImageSet) -> None:
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if len(counts) < 2:
        raise UserError("--real_dir has one user only; telling users apart needs at least two")
    if counts.min() < FEWEST:
        name, few = train.class_names[counts.argmin()], counts.min()
        raise UserError(f"--real_dir has {few} images of {name}; the judge needs at least {FEWEST} of every user")
    if heldout.labels is None:
        raise UserError("--heldout_dir shows none of the users of --real_dir; give other sessions of the same users")
    kept = np.maximum(1, counts // ASIDE).sum()
    for flag, n in (("--samples", len(samples.pixels)), ("--heldout_dir", len(heldout.pixels)), ("--real_dir", kept)):
        if n < FEWEST_IN_SET:
            what = f"{n} images that the judge does not learn from" if flag == "--real_dir" else f"{n} images"
            raise UserError(f"{flag} has {what}; the comparison needs at least {FEWEST_IN_SET}")


def _notes(train: ImageSet, heldout: ImageSet, samples: ImageSet) -> list[str]:
    notes = []
    if samples.labels is None:
        notes.append("the samples are unlabelled, so nobody can say whether they show the right user")
    known = {image.tobytes() for image in train.pixels}
    for name, images in (("held-out", heldout), ("generated", samples)):
        same = sum(image.tobytes() in known for image in images.pixels)
        if same:
            notes.append(f"{same} of {len(images.pixels)} {name} images are also training images, pixel for pixel")
    if min(samples.pixels.shape[1:3]) > SIZE:
        height, width = samples.pixels.shape[1:3]
        notes.append(f"images of {height}x{width} are judged at {SIZE}x{SIZE}")
    return notes


def comparison(train: ImageSet, samples: ImageSet, *, columns: int = 4, most_users: int = 40) -> Image.Image:
    """Real beside generated: a row for each user, real training images on the left, generated ones on the right."""
    users = range(min(most_users, len(train.class_names)))
    height, width = samples.pixels.shape[1:3]
    gap, head, margin = 4, 16, 72
    half = columns * (width + gap)
    sheet = Image.new("RGB", (margin + 2 * half + 4 * gap, head + len(users) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for user in users:
        y = head + user * (height + gap)
        draw.text((gap, y + height // 2 - 6), train.class_names[user][:10], fill="black")
        if samples.labels is None:
            generated = np.arange(user * columns, min((user + 1) * columns, len(samples.pixels)))
        else:
            generated = np.flatnonzero(samples.labels == user)[:columns]
        real = np.flatnonzero(train.labels == user)
        real = real[spread(None, len(real), min(columns, len(real)))]
        for left, pixels in ((margin, train.pixels[real]), (margin + half + 4 * gap, samples.pixels[generated])):
            for column, image in enumerate(pixels):
                sheet.paste(Image.fromarray(image), (left + column * (width + gap), y))
    draw.text((margin, 2), "real, training", fill="black")
    draw.text(
        (margin + half + 4 * gap, 2), "generated" if samples.labels is not None else "generated, any user", fill="black"
    )
    return sheet


def save_picture(picture: Image.Image, path) -> None:
    """Write a PNG, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        picture.save(handle, format="PNG")
