"""Do generated images help a classifier that has few real ones?

With k real images of each user, and n more images a user that come from

    generated images, or, as controls: the same k again, shifted along time, masked; or n more real images (the ceiling)

a classifier learns and names held-out real images. At the same k all arms learn from equally many batches, so that
nothing but the images differs. Several seeds draw which k images, the larger k around the smaller; an interval is
Student's t over seeds. What counts is not "better than k images alone" but better than every control.

A control shifted along time is rolled: what leaves at the end comes in at the beginning. In a longer recording a shift
is another part of the walk; within a picture it holds nothing new, and breaks the gait cycle at the seam. The
classifier's own `augment` rolls every batch anyway, and its features hardly see it: expect little of this control.
Masks are one of time and one of Doppler, 4 or 5 bins of 64 each, in the picture's median colour.

Source: Erol et al. 2020 (radar signatures by GANs); Park et al. 2019 (masks: SpecAugment).
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from guided_diffusion_vae.config import UserError, refuse_below

from .classifier_tests import pick, share_right
from .image_sets import LABELS, ImageSet
from .measure import shared
from .study import ALONE, DUPLICATES, GENERATED, MASKED, MORE, REAL, SHIFTED, Study
from .user_classifier import BATCH, steps_of, train_user_classifier


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What is studied, and where the results go."""

    real_dir: str = ""  # folder of real images, the source of the k of each user
    heldout_dir: str = ""  # folder of real images of the same users in other sessions, which are named
    samples: str = ""  # generated images with labels: the sampler's .npz, or its folder of PNGs
    ks: tuple = (1, 5, 10, 20)  # real images of each user that a classifier learns from, such as 1,5,10
    generated_per_user: int = 0  # generated images of each user beside them; 0 = as many as there are
    seeds: int = 3  # draws of the k images; the intervals are over these
    epochs: int = 20  # passes over real and generated images; all classifiers at a k learn for as many steps
    steps: int = 0  # batches that every classifier learns from, whatever k; 0 = as --epochs says
    augment: bool = True  # the classifier's own augmentation: shifts along time and gain in every batch
    out_dir: str = ""  # where study.json, .csv and .png go; empty: augmentation/ beside the samples
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing
    seed: int = 0  # of the draws and of the classifiers

    def __post_init__(self):
        refuse_below(self, 1, "seeds", "epochs")
        refuse_below(self, 0, "generated_per_user", "steps", "seed")
        if not self.counts:
            raise UserError("--ks is empty; give numbers of images, such as 1,5,10")

    @property
    def counts(self) -> tuple[int, ...]:
        """`ks` as numbers, each once, the smallest first.

        Raises:
            UserError: one is no number of at least 1.
        """
        for word in self.ks:
            if not str(word).isdecimal() or int(word) < 1:
                raise UserError(f"--ks has {word!r}; give numbers of at least 1, such as 1,5,10")
        return tuple(sorted({int(word) for word in self.ks}))


def augmentation_study(
    train: ImageSet,
    heldout: ImageSet,
    generated: ImageSet,
    *,
    ks: tuple[int, ...] = (1, 5, 10, 20),
    per_user: int = 0,
    seeds: int = 3,
    epochs: int = 20,
    steps: int = 0,
    augmented: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Study:
    """The whole study: up to seven trainings for each k and seed.

    Args:
        train: real images; heldout: the same users in other sessions; generated: with labels. All numbered by the
            class list of `train`.
        per_user: generated images of each user that are used; 0: as many as there are of the user with the fewest.
        epochs: passes over k + n images a user, which every arm at this k gets in batches; `steps` overrules it.
        augmented: whether the classifier shifts its batches along time and varies their gain.
    Raises:
        UserError: more images are asked for than there are, or nobody said whom they show.
    """
    per_user = refuse_impossible(train, heldout, generated, ks, per_user)
    num_users, available = len(train.class_names), int(np.bincount(train.labels).min())
    known: dict[int, list[float]] = {k: [] for k in ks}  # share of its own k images that REAL names right
    steps_at = {k: steps or steps_of(epochs, num_users * (k + per_user)) for k in ks}
    right: dict[int, dict[str, list[np.ndarray]]] = {k: {} for k in ks}
    jobs = [(number, k) for number in range(seeds) for k in ks]
    for number, k in tqdm(jobs, desc="classifiers learn", disable=None if progress else True):
        lessons = arms(train, generated, k=k, per_user=per_user, seed=(seed, number))
        for name, lesson in lessons.items():
            whole = np.tile(np.arange(len(lesson.labels)), -(-BATCH // len(lesson.labels)))  # whole batches, if few
            model = train_user_classifier(
                lesson.pixels[whole],
                lesson.labels[whole],
                num_users,
                seed=seed + number,
                steps=steps_at[k],
                augmented=augmented,
            )
            if name == REAL:
                known[k].append(float((model.judge(lesson.pixels).users == lesson.labels).mean()))
            named = model.judge(heldout.pixels).users
            right[k].setdefault(name, []).append(share_right(named, heldout.labels, num_users))
    return Study(
        accuracy={k: {name: np.stack(values) for name, values in found.items()} for k, found in right.items()},
        users=train.class_names,
        about={
            "generated_per_user": per_user,
            "real_per_user": available,
            "heldout_images": len(heldout.pixels),
            "heldout_in_training": shared(train, heldout),
            "seeds": seeds,
            "seed": seed,
            "steps": steps_at,
            "right_of_own": {k: float(np.mean(shares)) for k, shares in known.items()},
            "augmented": augmented,
        },
    )


def refuse_impossible(train: ImageSet, heldout: ImageSet, generated: ImageSet, ks, per_user: int) -> int:
    """How many generated images of each user are used; what can be known before anything is learned.

    Raises:
        UserError: names the flag, the user and the count.
    """
    names = train.class_names
    if len(names) < 2:
        raise UserError("--real_dir has one user only; telling users apart needs at least two")
    if generated.labels is None:
        raise UserError(f"--samples does not say who is shown; it needs {LABELS} of --real_dir")
    if heldout.labels is None:
        raise UserError("--heldout_dir shows none of the users of --real_dir; give other sessions of the same users")
    if shared(train, heldout) == len(heldout.pixels):
        raise UserError("--heldout_dir holds training images only, pixel for pixel; give images of other sessions")
    real, fake = (np.bincount(images.labels, minlength=len(names)) for images in (train, generated))
    if max(ks) > real.min():
        user = names[real.argmin()]
        raise UserError(f"--ks has {max(ks)}, but --real_dir has {real.min()} images of {user}; give smaller numbers")
    wanted = per_user or max(1, int(fake.min()))
    if wanted > fake.min():
        user, flag = names[fake.argmin()], f"--generated_per_user is {wanted}" if per_user else "every user is needed"
        raise UserError(f"{flag}, but --samples has {fake.min()} images of {user}; generate more")
    return wanted


# ---- what the arms learn from ----------------------------------------------------------------------------------------


def arms(train: ImageSet, generated: ImageSet, *, k: int, per_user: int, seed: tuple[int, ...]) -> dict[str, ImageSet]:
    """Arm -> what it learns from. All but REAL and ALONE have k + per_user images of each user.

    Args:
        seed: the same seed draws the same images first, whatever k. MORE is left out if real images are too few.
    """
    num_users = len(train.class_names)
    order = _shuffled_users(train.labels, num_users, np.random.default_rng([*seed, 0]))
    real = train.take(np.concatenate([places[:k] for places in order]))
    fake = generated.take(pick(generated.labels, [per_user] * num_users, np.random.default_rng([*seed, 1])))
    again = train.take(np.concatenate([np.resize(places[:k], per_user) for places in order]))
    rng = np.random.default_rng([*seed, 2, k])
    found = {
        REAL: real,
        GENERATED: real.joined(fake),
        DUPLICATES: real.joined(again),
        SHIFTED: real.joined(again._replace(pixels=rolled(again.pixels, rng))),
        MASKED: real.joined(again._replace(pixels=masked(again.pixels, rng))),
        ALONE: fake._replace(class_names=train.class_names),
    }
    if min(map(len, order)) >= k + per_user:
        found[MORE] = train.take(np.concatenate([places[: k + per_user] for places in order]))
    return found


def rolled(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (N, H, W, 3), each rolled along time by another number of columns."""
    width = pixels.shape[2]
    return np.stack([np.roll(image, rng.integers(1, max(width, 2)), axis=1) for image in pixels])


def masked(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images (N, H, W, 3), each without one band of Doppler rows and one of columns: median colour instead."""
    pixels = pixels.copy()
    for image in pixels:
        colour = np.median(image, axis=(0, 1))
        for axis in (0, 1):
            size = image.shape[axis]
            length = max(1, round(rng.integers(4, 6) * size / 64))
            first = rng.integers(size - length + 1)
            np.moveaxis(image, axis, 0)[first : first + length] = colour
    return pixels


def _shuffled_users(labels: np.ndarray, num_users: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The places of each user's images, in the order in which they are drawn."""
    return [rng.permutation(np.flatnonzero(labels == user)) for user in range(num_users)]
