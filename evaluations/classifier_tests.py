"""What a classifier makes of generated images, and what it learns from them.

    TRTR   learns from real images,      names held-out real ones: the ceiling
    TRTS   learns from real images,      names generated ones
    TSTR   learns from generated images, names held-out real ones (classification accuracy score)
    gain   learns from both,             names held-out real ones; minus TRTR

TRTS rewards what is typical: one good picture of each user, repeated, scores 1. TSTR asks for the variety of real
walks as well, so a high TRTS beside a low TSTR is the mark of low diversity. Some identity is no gait at all but
brightness or noise: what a few such numbers tell stands beside as the shortcut. Every accuracy is the mean over users
of the share of right answers within a user (the "user accuracy" of `measure` is the share of all images, by a
classifier that learned from a sixth less); all classifiers learn from equally many batches.

Source: Ravuri and Vinyals 2019 (TSTR as "CAS"); Salimans et al. 2016 (inception score).
"""

from functools import reduce
from typing import NamedTuple

import numpy as np
import torch as th
from PIL import Image, ImageDraw

from .findings import ABOVE, Finding, Section, Table
from .image_sets import ImageSet
from .measure import refuse_too_few, share_interval, spread
from .progress import Progress
from .shortcut import STATISTICS, Shortcut
from .statistics import FEWEST_USERS, classifier_inception_score
from .user_classifier import CHUNK, UserClassifier, steps_of, to_input, train_user_classifier

REAL, FEWER, FAKE, BOTH = "real", "as many real", "generated", "real + generated"  # what a classifier learns from
ROUNDS = 1000  # of the bootstrap
LOW_DIVERSITY = 0.25  # TRTS above TSTR by this share of their ceilings
NEAR_CHANCE, OFTEN = 0.1, 0.5  # of the way from chance to 1
DARK = (8, 48, 107)  # the colour of 1 in a confusion matrix


class Answers(NamedTuple):
    """What the classifiers of all seeds said."""

    right: dict[str, np.ndarray]  # learned from -> (seeds, users) share of right answers on held-out real images
    right_generated: np.ndarray | None  # (seeds, users): of generated images, by the classifier of real ones
    heldout: list[np.ndarray]  # of each seed: (N, users) probabilities of held-out real images, by the same
    generated: list[np.ndarray]  # and of generated ones


def classifier_tests(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    *,
    seeds: int = 3,
    epochs: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Section:
    """All tests, as means over `seeds` classifiers each; four trainings a seed.

    Args:
        train: what the generator learned from; heldout: the same users in other sessions; samples: generated images,
            unlabelled if nobody said whom they show. All numbered by the class list of `train`.
        epochs: passes over `train` whose number of batches every classifier learns from.
        seed: of the first classifiers; the others count on from it.
    Raises:
        UserError: too few users or images, see `refuse_too_few`.
    """
    refuse_too_few(train, heldout, len(samples.pixels))
    answers = _ask(train, heldout, samples, seeds=seeds, epochs=epochs, seed=seed, progress=progress)
    names = train.class_names
    shown = [confusion(p, heldout.labels, len(names)) for p in answers.heldout]
    pictured = {"real, held out": reduce(np.add, shown)}
    data = {"learned_from": _used(train, samples), "confusion_trtr": pictured["real, held out"].tolist()}
    findings, notes = _variety_of_answers(heldout, samples, answers)
    tables = [_histogram(answers.generated, samples, names)]
    if samples.labels is None:
        notes.insert(0, "the samples are unlabelled: whether they show the right users cannot be tested")
    else:
        shown = [confusion(p, samples.labels, len(names)) for p in answers.generated]
        pictured["generated"] = reduce(np.add, shown)
        data["confusion_trts"] = pictured["generated"].tolist()
        shortcut = Shortcut.learn(train)
        by_shortcut = {
            name: share_right(shortcut.name(images.pixels), images.labels, len(names))[None]
            for name, images in (("real", heldout), ("generated", samples))
        }
        found = _accuracies(answers, by_shortcut, np.random.default_rng(seed))
        findings = list(found.values()) + findings
        notes = _words(found, train, samples, seeds) + _right_by_luck(answers, names) + notes
        tables.insert(0, _users(train, heldout, samples, answers, by_shortcut))
    return Section(
        title="What a classifier learns",
        findings=findings,
        tables=tables,
        notes=notes,
        pictures={"confusion.png": confusion_picture(pictured, names)},
        data=data,
    )


def _ask(train, heldout, samples, *, seeds: int, epochs: int, seed: int, progress: bool) -> Answers:
    """Train and ask the classifiers."""
    num_users, steps = len(train.class_names), steps_of(epochs, len(train.pixels))
    right: dict[str, list[np.ndarray]] = {}
    answers = Answers({}, None, [], [])
    count = None
    for number in range(seeds):
        taught = lessons(train, samples, np.random.default_rng([seed, number]))
        if progress and count is None:  # every seed has as many lessons
            count = Progress(f"{seeds * len(taught)} classifiers learn", seeds * len(taught) * steps)
        for name, lesson in taught.items():
            options = {"seed": seed + number, "steps": steps, "progress": count or False}
            model = train_user_classifier(lesson.pixels, lesson.labels, num_users, **options)
            said = probabilities(model, heldout.pixels)
            right.setdefault(name, []).append(share_right(said.argmax(axis=1), heldout.labels, num_users))
            if name == REAL:
                answers.heldout.append(said)
                answers.generated.append(probabilities(model, samples.pixels))
    answers = answers._replace(right={name: np.stack(shares) for name, shares in right.items()})
    if samples.labels is None:
        return answers
    named = [said.argmax(axis=1) for said in answers.generated]
    return answers._replace(
        right_generated=np.stack([share_right(users, samples.labels, num_users) for users in named])
    )


def lessons(train: ImageSet, samples: ImageSet, rng: np.random.Generator) -> dict[str, ImageSet]:
    """Name -> what a classifier learns from: of each user as many generated images as there are of both kinds.

    A user without generated images counts among the real ones like the others, so that the loss shows. Without FEWER,
    all real images are as many.
    """
    if samples.labels is None:
        return {REAL: train}
    used = _used(train, samples)
    fake = samples.take(pick(samples.labels, used["generated"], rng))
    found = {REAL: train, FAKE: fake, BOTH: train.joined(fake)}
    if used["real"] != np.bincount(train.labels, minlength=len(used["real"])).tolist():
        found[FEWER] = train.take(pick(train.labels, used["real"], rng))
    return found


def _used(train: ImageSet, samples: ImageSet) -> dict[str, list[int]]:
    """How many generated images of each user TSTR learns from, and how many real ones its ceiling does."""
    if samples.labels is None:
        return {}
    real, fake = (np.bincount(images.labels, minlength=len(train.class_names)) for images in (train, samples))
    both = np.minimum(real, fake)
    usual = round(both[both > 0].mean())
    return {"generated": both.tolist(), "real": np.where(both > 0, both, np.minimum(real, usual)).tolist()}


def pick(labels: np.ndarray, counts, rng: np.random.Generator) -> np.ndarray:
    """Places of counts[u] images of every user u, drawn at random."""
    places = [rng.permutation(np.flatnonzero(labels == user))[:count] for user, count in enumerate(counts)]
    return np.sort(np.concatenate(places))


@th.inference_mode()
def probabilities(model: UserClassifier, pixels: np.ndarray) -> np.ndarray:
    """p(user | image) for uint8 images (N, H, W, 3): (N, users) float32."""
    blocks = (pixels[i : i + CHUNK] for i in range(0, len(pixels), CHUNK))
    return th.cat([model(to_input(block)).softmax(dim=1) for block in blocks]).numpy()


def share_right(named: np.ndarray, labels: np.ndarray, num_users: int) -> np.ndarray:
    """Share of right answers within each user: (users,); NaN for a user who is not shown."""
    shown = np.bincount(labels, minlength=num_users)
    right = np.bincount(labels[named == labels], minlength=num_users)
    return np.where(shown > 0, right / np.maximum(shown, 1), np.nan)


def interval_of(right: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    """95 % of the mean of (seeds, users), by drawing seeds and users anew, both with replacement.

    None with fewer than three users, who tell too little of others.
    """
    right = right[:, ~np.isnan(right).any(axis=0)]
    seeds, users = right.shape
    if users < FEWEST_USERS:
        return None
    draws = [right[rng.integers(seeds, size=seeds)][:, rng.integers(users, size=users)].mean() for _ in range(ROUNDS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


# ---- what was found --------------------------------------------------------------------------------------------------


def _accuracies(answers: Answers, by_shortcut, rng: np.random.Generator) -> dict[str, Finding]:
    chance = 1 / answers.right[REAL].shape[1]

    def finding(name, right, ceiling, about, **options) -> Finding:
        real = None if ceiling is None else float(np.nanmean(ceiling))
        options = {"form": "{:.1%}", "worst": chance, "worst_is": "chance", **options}
        interval = interval_of(right, rng)
        if name != "gain" and interval in ((0, 0), (1, 1)):  # a share, the same in every draw
            users = int((~np.isnan(right[0])).sum())
            interval = share_interval(round(interval[0] * users), users)
        return Finding(name=name, value=float(np.nanmean(right)), real=real, interval=interval, about=about, **options)

    ceiling = answers.right[REAL]
    fewer = answers.right.get(FEWER, ceiling)
    gain = answers.right[BOTH] - ceiling
    about_gain = "what as many generated images add to all real ones, in accuracy on held-out real images"
    return {
        "TRTR": finding("TRTR", ceiling, ceiling, "learns from real, names held-out real images: the ceiling"),
        "TRTS": finding(
            "TRTS", answers.right_generated, ceiling, "learns from real, names generated; mean over users", above=ABOVE
        ),
        "TSTR": finding(
            "TSTR", answers.right[FAKE], fewer, "learns from generated, names held-out real; real: as many real images"
        ),
        "both": finding(BOTH, answers.right[BOTH], ceiling, "learns from both, names held-out real images"),
        "gain": finding("gain", gain, None, about_gain, form="{:+.1%}", worst=None, worst_is=""),
        "shortcut": finding(
            "shortcut",
            by_shortcut["generated"],
            by_shortcut["real"],
            f"learns a few numbers of real pictures ({', '.join(STATISTICS)}), names generated images",
            above="alarm: above real images",
        ),
    }


def _words(found: dict[str, Finding], train: ImageSet, samples: ImageSet, seeds: int) -> list[str]:
    """What the accuracies mean together."""
    trtr, trts, tstr, gain, shortcut = (found[key] for key in ("TRTR", "TRTS", "TSTR", "gain", "shortcut"))
    used = _used(train, samples)["generated"]
    each = f"{min(used)}" if min(used) == max(used) else f"{min(used)} to {max(used)}"
    notes = [f"TSTR and the gain use {each} generated images of each user, the ceiling of TSTR as many real ones"]
    if not used or min(used) == 0:
        notes.append(f"{used.count(0)} users have no generated image: TSTR never learns them, TRTS leaves them out")
    if (trts.place or 0) - (tstr.place or 0) > LOW_DIVERSITY:
        notes.append(
            f"TRTS is {trts.shown(trts.value)} beside a TSTR of {tstr.shown(tstr.value)} (as many real images:"
            f" {tstr.shown(tstr.real)}): the images show the right users, but too little of how real walks vary"
        )
    if trts.beyond:
        notes.append(
            "generated images are easier to name than held-out real ones: they show the training sessions, typical"
            " walks, or copies"
        )
    if shortcut.value is not None and trts.value is not None and shortcut.value >= trts.value:
        notes.append("a few numbers of a picture tell the generated users as well as TRTS: no proof of gait")
    if shortcut.beyond:
        notes.append(
            f"alarm: a few numbers of a picture name {shortcut.shown(shortcut.value)} of generated images, of held-out"
            f" real ones {shortcut.shown(shortcut.real)}: brightness and noise of the training sessions are copied"
        )
    low, high = gain.interval or (0.0, 0.0)
    words = "helps" if low > 0 else "harms" if high < 0 else "neither helps nor harms beyond chance"
    span = (
        f"95 % interval {gain.shown(low)} to {gain.shown(high)}" if gain.interval else "too few users for an interval"
    )
    notes.append(f"learning from generated images besides all real ones {words}: {gain.shown(gain.value)}, {span}")
    if seeds == 1:
        notes.append("one seed: the intervals say how users differ, not how classifiers do")
    return notes


def _right_by_luck(answers: Answers, names: list[str]) -> list[str]:
    """A note where generated images of users are named right whom the classifier does not know in real ones."""
    chance = 1 / len(names)
    low, high = (chance + share * (1 - chance) for share in (NEAR_CHANCE, OFTEN))
    assert answers.right_generated is not None
    shares = (right.mean(axis=0) for right in (answers.right[REAL], answers.right_generated))
    users = [name for name, real, made in zip(names, *shares, strict=True) if real < low and made > high]
    said = "the classifier hardly knows them in held-out real images (TRTR near chance), but names their generated ones"
    return [f"'right' means little for {', '.join(users)}: {said}"] if users else []


def _variety_of_answers(heldout: ImageSet, samples: ImageSet, answers: Answers) -> tuple[list[Finding], list[str]]:
    """Inception score and class spread at the same number of images, generated and held-out real ones."""
    count = min(len(heldout.pixels), len(samples.pixels))
    same = {
        "generated": [p[spread(samples.labels, len(p), count)] for p in answers.generated],
        "real": [p[spread(heldout.labels, len(p), count)] for p in answers.heldout],
    }
    findings = []
    for name, score, about in (
        (
            "IS_user",
            classifier_inception_score,
            "exp E KL(p(user | image) || p(user)), p by the classifier of real images",
        ),
        ("users named", class_spread, "exp of the entropy of the users that it names: how many there are in effect"),
    ):
        scores = {kind: float(np.mean([score(p) for p in said])) for kind, said in same.items()}
        ends = {"value": scores["generated"], "real": scores["real"], "worst": 1.0, "worst_is": "one user"}
        findings.append(Finding(name=name, form="{:.2f}", about=about, **ends))
    most = answers.generated[0].shape[1]
    return findings, [f"IS_user and users named lie between 1 and {most}, on {count} images of each kind"]


def class_spread(p: np.ndarray) -> float:
    """exp H of the shares in which users are named by probabilities (N, users): 1 if one alone, users if all alike."""
    shares = np.bincount(p.argmax(axis=1)) / len(p)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _histogram(generated: list[np.ndarray], samples: ImageSet, names: list[str]) -> Table:
    named = np.mean([np.bincount(p.argmax(axis=1), minlength=len(names)) for p in generated], axis=0)
    return Table(
        title="generated images by the user that the classifier of real images names (mean over seeds)",
        header=["user", "images"],
        rows=[[name, round(float(count), 1)] for name, count in zip(names, named, strict=True)],
    )


def _users(train, heldout, samples, answers: Answers, by_shortcut) -> Table:
    columns = {
        "TRTR": answers.right[REAL],
        "TRTS": answers.right_generated,
        "TSTR": answers.right[FAKE],
        "as many real": answers.right.get(FEWER, answers.right[REAL]),
        "both": answers.right[BOTH],
        "shortcut, real": by_shortcut["real"],
        "shortcut, generated": by_shortcut["generated"],
    }
    names = train.class_names
    counts = [np.bincount(images.labels, minlength=len(names)).tolist() for images in (train, heldout, samples)]
    means = [[None if np.isnan(x) else round(float(x), 3) for x in right.mean(axis=0)] for right in columns.values()]
    return Table(
        title="accuracy of each user",
        header=["user", "training", "held out", "generated", *columns],
        rows=[list(row) for row in zip(names, *counts, *means, strict=True)],
    )


# ---- the confusion matrix --------------------------------------------------------------------------------------------


def confusion(p: np.ndarray, labels: np.ndarray, num_users: int) -> np.ndarray:
    """How many images of each user (rows) are named as each user (columns): (users, users)."""
    return np.bincount(labels * num_users + p.argmax(axis=1), minlength=num_users**2).reshape(num_users, num_users)


def confusion_picture(matrices: dict[str, np.ndarray], names: list[str]) -> Image.Image:
    """Matrices side by side, rows in shares of the user who is shown: white 0, dark blue 1."""
    cell = int(np.clip(900 // len(names), 3, 18))
    every, side = -(-12 // cell), cell * len(names)  # names that would overlap are left out
    margin, top, gap = 74, 92, 16
    sheet = Image.new("RGB", (gap + len(matrices) * (margin + side + gap), top + side + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (title, counts) in enumerate(matrices.items()):
        left = gap + place * (margin + side + gap) + margin
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        colours = 255 - shares[..., None] * (255 - np.array(DARK))
        blocks = colours.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
        sheet.paste(Image.fromarray(blocks), (left, top))
        draw.rectangle((left - 1, top - 1, left + side, top + side), outline="grey")
        draw.text((left - margin, 2), f"{title}: shown (rows), named (columns)", fill="black")
        for user, name in enumerate(names):
            if user % every == 0:
                word = Image.new("RGB", (64, 12), "white")
                ImageDraw.Draw(word).text((0, 0), name[:10], fill="black")
                sheet.paste(word, (left - margin + 4, top + user * cell + cell // 2 - 6))
                sheet.paste(word.rotate(90, expand=True), (left + user * cell + cell // 2 - 6, top - 68))
    return sheet
