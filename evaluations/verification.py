"""Verification: is the person in a generated spectrogram the one that it is said to show?

    score(a, b) = cos(z_a, z_b);   a pair of one user is genuine, a pair of two users is an impostor pair

The embedding z learns from real training images of most users (`metric_learning`). Each generated image, said to show
user u, meets held-out real images of u and of the others; real images of the training sessions, unknown to the
embedding, meet the same held-out ones: the ceiling. Some users are kept from the embedding altogether and meet each
other (the open set). The threshold is fixed before, on real images of the training sessions. Pairs that share a user
are not independent, so intervals draw whole users anew.
"""

import warnings
from functools import cache
from typing import NamedTuple

import numpy as np

from guided_diffusion_vae.config import UserError

from .findings import ABOVE, Finding, Section, Table
from .image_sets import ImageSet
from .measure import refuse_too_few, set_aside, spread
from .metric_learning import DEFAULT_LOSS, train_embedding
from .roc import FAR, FEWEST_ERRORS, EqualError, Pairs, d_prime, eer, pairs, roc, roc_auc, tar_at_far
from .statistics import FEWEST_USERS, bootstrap_interval

TITLE = "Verification: the same person?"
MOST = 600  # images a side: 360,000 pairs are ranked in every round of the bootstrap, and users vary more than images
FEW_USERS = 12  # with fewer nobody is kept from the embedding
WEAK = 0.7  # AUC of real images below which the embedding is no judge
WORST_IS = {"accepted": "another user", "falsely accepted": "the same user"}  # of the others chance
FEW_TO_DRAW = 10  # an interval from fewer users is too narrow


class Embedded(NamedTuple):
    """Unit vectors (N, d) and users (N,)."""

    vectors: np.ndarray
    users: np.ndarray

    def of(self, users) -> "Embedded":
        """The images of these users."""
        chosen = np.isin(self.users, users)
        return Embedded(self.vectors[chosen], self.users[chosen])

    def against(self, probe: "Embedded", same_set: bool = False) -> Pairs:
        return pairs(*self, *probe, same_set)


class Group(NamedTuple):
    """Users who meet each other: generated and real probes against one gallery of held-out real images."""

    name: str
    about: str
    generated: Pairs
    real: Pairs


def verify(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    *,
    loss: str = DEFAULT_LOSS,
    seed: int = 0,
    epochs: int = 20,
    open_set_users: int = 5,
    rounds: int = 200,
    progress: bool = False,
) -> Section:
    """Whether generated images pass for their users as well as real ones do.

    Args:
        train, heldout, samples: see `measure.evaluate`; unlabelled samples give a section with a note alone.
        loss: see `metric_learning`.
        open_set_users: kept from the embedding; none where there are fewer than 12 users.
        rounds: of the bootstrap over users.
    Raises:
        UserError: too few users or images.
    """
    if samples.labels is None:
        return Section(title=TITLE, notes=["the samples are unlabelled, so there is nobody to verify"])
    refuse_too_few(train, heldout, len(samples.pixels))
    rng = np.random.default_rng(seed)
    strangers, known = split_users(len(train.class_names), open_set_users, rng)
    aside, learned = _set_aside(train.labels, rng)
    learned = learned[np.isin(train.labels[learned], known)]
    embedding = train_embedding(
        train.pixels[learned],
        np.searchsorted(known, train.labels[learned]),
        len(known),
        loss=loss,
        seed=seed,
        epochs=epochs,
        progress=progress,
    )
    places = np.union1d(aside, np.flatnonzero(np.isin(train.labels, strangers)))  # what it never saw
    sessions, gallery, generated = (_embed(embedding, s) for s in (train.take(places), heldout, samples))
    validation = sessions.of(known)
    validation = validation.against(validation, same_set=True)
    assert len(validation.genuine), "two images of each user are set aside"
    fixed = eer(validation.genuine, validation.impostor)

    both = np.intersect1d(generated.users, gallery.users)
    groups = [
        Group(
            name,
            about,
            gallery.of(users).against(generated.of(np.intersect1d(users, both))),
            gallery.of(users).against(sessions.of(np.intersect1d(users, both))),
        )
        for name, about, users in (
            ("closed set", "users that the embedding knows", known),
            ("open set", "users that it has never seen, among themselves", strangers),
        )
        if len(users)
    ]
    findings, notes = [], _notes(train, both, validation, fixed, groups)
    for group in groups:
        findings += _findings(group, fixed.threshold, seed, rounds)
    about = {
        "loss": loss,
        "embedding": embedding.fingerprint(),
        "learned_from": len(learned),
        "open_set_users": [train.class_names[u] for u in strangers],
        "threshold": fixed.threshold,
        "validation_eer": fixed.rate,
        "groups": {group.name: _data(group) for group in groups},
    }
    return Section(
        title=TITLE, findings=findings, tables=[_table(groups, train.class_names, fixed)], notes=notes, data=about
    )


def split_users(count: int, open_set_users: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the users kept from the embedding, and of those it learns; both in order."""
    strangers = 0 if count < FEW_USERS else open_set_users
    if strangers not in (0, *range(2, count - 1)):
        raise UserError(
            f"--open_set_users is {open_set_users} of {count} users; give 0, or at least 2 and leave 2 to learn from"
        )
    order = rng.permutation(count)
    return np.sort(order[count - strangers :]), np.sort(order[: count - strangers])


def _set_aside(labels: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """Twice what the judge sets aside, so that two images of a user can meet; and the rest."""
    once, rest = set_aside(labels, rng)
    again, learned = set_aside(labels[rest], rng)
    return np.union1d(once, rest[again]), rest[learned]


def _embed(embedding, images: ImageSet) -> Embedded:
    """At most MOST of the images, from all users alike; more only where that left a user fewer than two."""
    n, users = len(images.labels), len(np.unique(images.labels))
    chosen = images.take(spread(images.labels, n, min(n, max(MOST, 2 * users))))
    return Embedded(embedding.embed(chosen.pixels), chosen.labels)


def _findings(group: Group, threshold: float, seed: int, rounds: int) -> list[Finding]:
    generated, real = _numbers(group.generated, threshold), _numbers(group.real, threshold)
    intervals = _intervals(group.generated, threshold, seed, rounds)
    versus = f"generated against held-out real images of {group.about}"
    rows = (
        ("AUC", 0.5, "{:.3f}", f"chance that a genuine pair scores above an impostor pair, {versus}"),
        ("EER", 0.5, "{:.1%}", f"equal error rate, {versus}"),
        (f"TAR at FAR {FAR:.0%}", FAR, "{:.1%}", f"genuine pairs accepted where {FAR:.0%} of impostors are, {versus}"),
        (
            "accepted",
            real["falsely accepted"],
            "{:.1%}",
            f"genuine pairs above the threshold fixed on real images, {versus}; the worst is another real user",
        ),
        (
            "falsely accepted",
            real["accepted"],
            "{:.1%}",
            f"impostor pairs above that threshold, {versus}; low without the other numbers it says nothing",
        ),
    )
    return [
        Finding(
            name=f"{name}, {group.name}",
            value=generated[name],
            real=real[name],
            worst=worst,
            worst_is=WORST_IS.get(name, "chance"),
            interval=intervals.get(name),
            form=form,
            about=about,
            above=ABOVE if name == "AUC" else "",
        )
        for name, worst, form, about in rows
    ]


def _numbers(found: Pairs, threshold: float, times: np.ndarray | None = None) -> dict[str, float | None]:
    """All numbers of one set of pairs, by the names of the findings; None where there are too few.

    Args:
        times: how often each user counts.
    """
    names = ("AUC", "EER", f"TAR at FAR {FAR:.0%}", "accepted", "falsely accepted")
    weights = (None, None) if times is None else found.weights(times)
    try:
        curve = roc(found.genuine, found.impostor, *weights)
    except ValueError:
        return dict.fromkeys(names)
    far, tar = curve.at(threshold)
    tar_at = curve.tar_at(FAR) if len(found.impostor) >= FEWEST_ERRORS / FAR else None
    return dict(zip(names, (curve.auc, curve.eer.rate, tar_at, tar, far), strict=True))


def _intervals(found: Pairs, threshold: float, seed: int, rounds: int) -> dict[str, tuple[float, float]]:
    """95 % of every number, when users are drawn anew; none from fewer than three users."""
    users = np.unique(np.append(found.genuine_user, found.impostor_users))
    if len(users) < FEWEST_USERS or not len(found.genuine) or not rounds:
        return {}
    best, worst = np.argsort(-found.genuine), np.argsort(-found.impostor)  # so that every round has but to merge
    found = Pairs(found.genuine[best], found.impostor[worst], found.genuine_user[best], found.impostor_users[worst])

    @cache
    def numbers(drawn: tuple) -> dict:
        return _numbers(found, threshold, np.bincount(users[list(drawn)], minlength=users.max() + 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a number that no round has is left out below
        intervals = {
            name: bootstrap_interval(
                lambda drawn, name=name: np.nan if (value := numbers(tuple(drawn))[name]) is None else value,
                np.arange(len(users)),
                seed=seed,
                rounds=rounds,
            )
            for name in _numbers(found, threshold)
        }
    return {name: interval for name, interval in intervals.items() if np.isfinite(interval).all()}


def _data(group: Group) -> dict:
    """Counts, d' and the curve at 201 values of FAR, for JSON."""
    data = {}
    for name, found in (("generated", group.generated), ("real", group.real)):
        data[name] = {"genuine": len(found.genuine), "impostor": len(found.impostor)}
        if len(found.genuine) and len(found.impostor):
            curve = roc(found.genuine, found.impostor)
            at = np.linspace(0, 1, 201)
            data[name] |= {
                "d_prime": d_prime(found.genuine, found.impostor),
                "far": at.round(3).tolist(),
                "tar": [round(curve.tar_at(far), 5) for far in at],
            }
    return data


def _table(groups: list[Group], names: list[str], fixed: EqualError) -> Table:
    """One line a user: the AUC of his own pairs."""
    rows = []
    for group in groups:
        for user in np.unique(group.generated.genuine_user):
            scores = [_own(found, user, fixed.threshold) for found in (group.real, group.generated)]
            rows.append(
                [names[user], group.name, *(_shown(value) for pair in zip(*scores, strict=True) for value in pair)]
            )
    header = ["user", "set", "AUC real", "AUC generated", "accepted real", "accepted generated"]
    return Table(title="Verification, user by user", header=header, rows=sorted(rows))


def _own(found: Pairs, user: int, threshold: float) -> tuple[float | None, float | None]:
    """AUC and share of genuine pairs accepted, where the probe is said to show this user."""
    genuine = found.genuine[found.genuine_user == user]
    impostor = found.impostor[found.impostor_users[:, 1] == user]
    auc = roc_auc(genuine, impostor) if len(genuine) and len(impostor) else None
    return auc, float((genuine >= threshold).mean()) if len(genuine) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _notes(train: ImageSet, both: np.ndarray, validation: Pairs, fixed: EqualError, groups: list[Group]) -> list[str]:
    notes = [
        f"the threshold {fixed.threshold:.3f} was fixed where {len(validation.genuine)} genuine and"
        f" {len(validation.impostor)} impostor pairs of real images from the training sessions have equal errors"
        f" ({fixed.rate:.1%}); held-out images score lower, real ones too"
    ]
    if len(both) < len(train.class_names):
        missing = len(train.class_names) - len(both)
        notes.append(f"{missing} of {len(train.class_names)} users lack generated or held-out images and are left out")
    if len(groups) == 1:
        notes.append(f"no open set: that takes at least {FEW_USERS} users, and users to keep from the embedding")
    for group in groups:
        found = group.generated
        ceiling = _numbers(group.real, fixed.threshold)["AUC"]
        if ceiling is None or not len(found.genuine):
            notes.append(f"{group.name}: no pairs of {'real' if ceiling is None else 'generated'} images to compare")
            continue
        if ceiling < WEAK:
            notes.append(f"{group.name}: real users are hardly told apart (AUC {ceiling:.2f}): no judge")
        note = tar_at_far(found.genuine, found.impostor).note
        if note:
            notes.append(f"{group.name}: {note}")
        users = len(np.unique(found.genuine_user))
        if users < FEW_TO_DRAW:
            notes.append(f"{group.name}: {users} users only, so the intervals are too narrow")
    return notes
