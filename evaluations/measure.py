"""Judge samples against real images: identity, distribution, nearness to the training images.

The judge learns from most of the real training images; the rest it never sees. So there are real images of the same
sessions, the best that a generator of those sessions can be, beside held-out ones of other sessions, the reference of
all distances. The worst are real images whose pixels are shuffled. Distances depend on the number of images, so every
set is compared at the same number.
"""

import hashlib
import warnings
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from guided_diffusion_vae.config import UserError, refuse_below

from .image_sets import ImageSet, shuffle_pixels
from .manifold import NEIGHBOURS, fidelity, near_copy_rate, nearest
from .physics import as_points, colormap_of
from .report import GENERATED, HELD_OUT, OTHER, ROWS, SAME, SHUFFLED, SPLIT, Report, Scores
from .sessions import recordings_of
from .statistics import FEWEST_USERS, bootstrap_interval, frechet_distance, frechet_interval, kernel_distance
from .user_classifier import SIZE, Judgement, train_user_classifier

ASIDE = 6  # every sixth training image of a user is kept from the judge
FEWEST = 4  # images a user, so that three remain to learn from
FEWEST_IN_SET = 6  # density and coverage look at the fifth neighbour
SPLITS = 10  # random splits that the floor is averaged over


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is compared, and where the report goes."""

    real_dir: str = ""  # folder of the real images that the generator learned from
    heldout_dir: str = ""  # folder of real images of the same users that nothing learned from; best of other sessions
    samples: str = ""  # generated images: the sampler's .npz, or its folder of PNGs
    out_dir: str = ""  # where report.json and comparison.png go; empty: report/ beside the samples
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing
    judge_epochs: int = 20  # passes of the user classifier over the real training images
    seed: int = 0  # of the judge, and of what is set aside

    def __post_init__(self):
        refuse_below(self, 1, "judge_epochs")
        refuse_below(self, 0, "seed")


def evaluate(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    *,
    epochs: int = 20,
    seed: int = 0,
    progress: bool = False,
    keep=lambda named: None,
) -> Report:
    """The whole report.

    Args:
        train: what the generator learned from; heldout: the same users in other sessions; samples: generated images,
            unlabelled if nobody said whom they show. All numbered by the class list of `train`.
        keep: given the users that the judge names, by the set of images (GENERATED, OTHER, ...).
    Raises:
        UserError: too few users or images to judge by.
    """
    refuse_too_few(train, heldout, len(samples.pixels))
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
    keep({name: judgement.users for name, judgement in judged.items()})
    compared = min(len(aside), len(samples.pixels), len(heldout.pixels))
    right = {name: judged[name].users == images.labels for name, images in sets.items() if images.labels is not None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distances = _distances(sets, judged, compared, rng)
    made = _evenly(samples, judged[GENERATED].features, compared)
    intervals: dict[str, tuple[float, float] | None] = {"fd_user": frechet_interval(made, judged[OTHER].features)}
    if GENERATED in right:
        intervals["user_accuracy"] = _accuracy_interval(right[GENERATED], samples.labels, seed)
    copying = _copying(train, sets)
    rows = {
        name: Scores(
            user_accuracy=float(right[name].mean()) if name in right else None,
            **distances.get(name, {}),
            **copying.get(name, {}),
        )
        for name in ROWS
    }
    about = {
        "feature_space": f"the {judged[OTHER].features.shape[1]} penultimate activations of the judge, a user"
        f" classifier trained here on {len(learned)} real images; compare within this report only",
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
        "heldout_is": OTHER.removeprefix("real, ") if recordings_of(train, heldout).apart else HELD_OUT,
    }
    per_user = {name: _per_user(sets[name], right[name]) for name in right if name != SHUFFLED}
    notes = sorted({str(warning.message) for warning in caught}) + _notes(train, heldout, samples)
    return Report(rows, about, per_user, notes, intervals)


def set_aside(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images that the judge never sees (a sixth of each user's, at least one), and of the others."""
    aside = []
    for user in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == user))
        aside.append(places[: max(1, len(places) // ASIDE)])
    aside = np.sort(np.concatenate(aside))
    return aside, np.setdiff1d(np.arange(len(labels)), aside)


def spread(labels: np.ndarray | None, n: int, count: int) -> np.ndarray:
    """`count` of n places, from all users alike: every so many in the order of the users."""
    order = np.arange(n) if labels is None else np.argsort(labels, kind="stable")
    return order[np.arange(count) * n // count]


def _per_user(images: ImageSet, right: np.ndarray) -> dict[str, float]:
    """User -> share of right judgements, of the users who are shown."""
    return {images.class_names[user]: float(right[images.labels == user].mean()) for user in np.unique(images.labels)}


def _accuracy_interval(right: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % of the share of right (N,), by drawing users anew; of images where that has no spread, as none is right.

    None of fewer than three users, who say too little of others.
    """
    if len(np.unique(labels)) < FEWEST_USERS:
        return None
    if right.all() or not right.any():
        return share_interval(int(right.sum()), len(right))
    return bootstrap_interval(lambda rows: right[rows].mean(), labels, seed=seed, rounds=1000)


def _evenly(images: ImageSet, features: np.ndarray, compared: int) -> np.ndarray:
    """The features of so many of the images, from all users alike."""
    return features[spread(images.labels, len(features), compared)]


def _distances(
    sets: dict[str, ImageSet], judged: dict[str, Judgement], compared: int, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """What `compared` images of each set score against the held-out real images.

    The split at random pools both kinds of real images and deals them anew: no difference is left but chance.
    """
    reference = judged[OTHER].features
    scores = {}
    for name in (GENERATED, SAME, SHUFFLED):
        scores[name] = _distance(_evenly(sets[name], judged[name].features, compared), reference)
    pool = np.concatenate([judged[SAME].features, reference])
    deals = [pool[rng.permutation(len(pool))] for _ in range(SPLITS)]
    splits = [_distance(deal[:compared], deal[compared : compared + len(reference)]) for deal in deals]
    scores[SPLIT] = {name: float(np.mean([split[name] for split in splits])) for name in splits[0]}
    return scores


def _distance(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    distances = {
        "fd_user": frechet_distance(features, reference),
        "kid_user": kernel_distance(features, reference),
    }
    return distances | fidelity(reference, features)._asdict()


def _copying(train: ImageSet, sets: dict[str, ImageSet]) -> dict[str, dict[str, float]]:
    """How near each set is to the training images as pictures; images set aside do not count themselves."""
    colormap = colormap_of(train.pixels)
    learned = as_points(train.pixels, colormap)
    count = min(NEIGHBOURS, len(learned) - 1)
    near = {
        name: nearest(as_points(images.pixels, colormap), learned, count=count, skip=int(name == SAME))
        for name, images in sets.items()
    }
    usual = np.median(near[OTHER][:, 0])
    return {
        name: {
            "nearest": float(np.median(d[:, 0]) / max(usual, 1e-6)),
            "near_copies": near_copy_rate(d),
        }
        for name, d in near.items()
    }


def refuse_too_few(train: ImageSet, heldout: ImageSet, samples: int) -> None:
    """Raise if there is too little to judge by: what can be known before anything is generated.

    Args:
        train, heldout: see `evaluate`.
        samples: how many images are, or will be, generated.
    Raises:
        UserError: names the flag and what is lacking.
    """
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if len(counts) < 2:
        raise UserError("--real_dir has one user only; telling users apart needs at least two")
    if counts.min() < FEWEST:
        name, few = train.class_names[counts.argmin()], counts.min()
        raise UserError(f"--real_dir has {few} images of {name}; the judge needs at least {FEWEST} of every user")
    if heldout.labels is None:
        raise UserError("--heldout_dir shows none of the users of --real_dir; give other sessions of the same users")
    if shared(train, heldout) == len(heldout.pixels):
        raise UserError("--heldout_dir holds training images only, pixel for pixel; give images of other sessions")
    kept = np.maximum(1, counts // ASIDE).sum()
    for flag, n in (("--samples", samples), ("--heldout_dir", len(heldout.pixels)), ("--real_dir", kept)):
        if n < FEWEST_IN_SET:
            what = f"{n} images that the judge does not learn from" if flag == "--real_dir" else f"{n} images"
            raise UserError(f"{flag} has {what}; the comparison needs at least {FEWEST_IN_SET}")


def shared(train: ImageSet, images: ImageSet) -> int:
    """How many images are also training images, pixel for pixel."""
    known = set(digests(train.pixels))
    return sum(digest in known for digest in digests(images.pixels))


def share_interval(count: int, n: int) -> tuple[float, float]:
    """95 % of a share of which `count` of n were seen, which is not 0 to 0 where none was.

    Source:
        Wilson 1927: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    z2, p = 1.96**2, count / n
    middle, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    low, high = ((middle + side * half) / (1 + z2 / n) for side in (-1, 1))
    return (0.0 if count == 0 else float(low)), (1.0 if count == n else float(high))


def digests(pixels: np.ndarray) -> list[bytes]:
    """16 bytes an image (N, H, W, 3) that tell whether two have the same pixels."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]


def _notes(train: ImageSet, heldout: ImageSet, samples: ImageSet) -> list[str]:
    notes = []
    if samples.labels is None:
        notes.append("the samples are unlabelled, so nobody can say whether they show the right user")
    else:
        missing = len(train.class_names) - len(np.unique(samples.labels))
        if missing:
            notes.append(f"{missing} of {len(train.class_names)} users have no generated image")
    for name, images in (("held-out", heldout), ("generated", samples)):
        same = shared(train, images)
        if same:
            notes.append(f"{same} of {len(images.pixels)} {name} images are also training images, pixel for pixel")
    shared_by_name = recordings_of(train, heldout)
    if shared_by_name.both:
        notes.append(
            f"{len(shared_by_name.both)} recordings are in both training and held out by their file names: held-out"
            " images are other moments of what was learned from, not other sessions, and easier than those"
        )
    if min(samples.pixels.shape[1:3]) > SIZE:
        height, width = samples.pixels.shape[1:3]
        notes.append(f"images of {height}x{width} are judged at {SIZE}x{SIZE}")
    return notes
