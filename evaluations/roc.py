"""How well scores tell genuine pairs from impostors: the ROC curve and the numbers on it.

    TAR(t) = P(score >= t | genuine),   FAR(t) = P(score >= t | impostor)

AUC is the area under TAR over FAR, that is P(genuine > impostor) with ties half; EER is where FAR = 1 - TAR; TAR is
also given at a FAR. Pairs may be weighted, so that a bootstrap draws users instead of pairs.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 512  # rows of scores at a time
FAR = 0.01  # at which TAR is given
FEWEST_ERRORS = 3  # expected at a FAR, for a TAR to be given


class Pairs(NamedTuple):
    """Scores of all pairs of a gallery and a probe, and who is in them."""

    genuine: np.ndarray  # (G,) float32
    impostor: np.ndarray  # (I,) float32
    genuine_user: np.ndarray  # (G,)
    impostor_users: np.ndarray  # (I, 2): the gallery's and the probe's

    def weights(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each pair counts, when user u counts times[u] times: of genuine and of impostor pairs."""
        gallery, probe = self.impostor_users.T
        return times[self.genuine_user], times[gallery] * times[probe]


class Curve(NamedTuple):
    """What is accepted from each threshold on, from nobody (threshold +inf) to everybody."""

    thresholds: np.ndarray
    far: np.ndarray
    tar: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve. Straight lines between its points count ties half: it is Mann-Whitney's statistic."""
        return float((np.diff(self.far) * (self.tar[1:] + self.tar[:-1])).sum() / 2)

    @property
    def eer(self) -> "EqualError":
        """Where FAR = 1 - TAR on the straight lines, and the score of the point next to it."""
        gap = self.far + self.tar - 1  # from -1 up to 1
        k = int(np.argmax(gap >= 0))
        part = -gap[k - 1] / (gap[k] - gap[k - 1])
        nearer = k if gap[k] <= -gap[k - 1] or k == 1 else k - 1  # the first point has no score
        rate = self.far[k - 1] + part * (self.far[k] - self.far[k - 1])
        return EqualError(float(rate), float(self.thresholds[nearer]))

    def tar_at(self, far: float) -> float:
        """Largest TAR of a threshold whose FAR is at most this."""
        return float(self.tar[np.searchsorted(self.far, far + 1e-12, side="right") - 1])

    def at(self, threshold: float) -> tuple[float, float]:
        """(FAR, TAR) of one threshold."""
        k = np.searchsorted(-self.thresholds, -threshold, side="right") - 1
        return float(self.far[k]), float(self.tar[k])


class EqualError(NamedTuple):
    """Equal error rate, and the threshold that comes nearest to it."""

    rate: float
    threshold: float


class Rate(NamedTuple):
    """A rate, or None where the pairs are too few for one; and what to beware of."""

    value: float | None
    note: str


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs(gallery, gallery_users, probe, probe_users, same_set: bool = False) -> Pairs:
    """Cosines of all pairs of unit vectors, gallery (N, d) and probe (M, d), of users (N,) and (M,).

    Args:
        same_set: gallery and probe are one set: each pair counts once, and no image meets itself.
    """
    genuine, impostor, genuine_user, impostor_users = [], [], [], []
    for i in range(0, max(1, len(gallery)), BLOCK):
        rows = np.arange(i, min(i + BLOCK, len(gallery)))
        scores = np.asarray(gallery[rows] @ np.asarray(probe).T, np.float32)
        same = gallery_users[rows, None] == probe_users
        wanted = rows[:, None] < np.arange(len(probe)) if same_set else np.ones_like(same)
        a, b = np.nonzero(same & wanted)
        genuine.append(scores[a, b])
        genuine_user.append(probe_users[b])
        a, b = np.nonzero(~same & wanted)
        impostor.append(scores[a, b])
        impostor_users.append(np.stack([gallery_users[rows[a]], probe_users[b]], axis=1))
    return Pairs(*(np.concatenate(part) for part in (genuine, impostor, genuine_user, impostor_users)))


# ---- numbers from scores ---------------------------------------------------------------------------------------------


def roc(genuine, impostor, genuine_weights=None, impostor_weights=None) -> Curve:
    """The curve of scores (G,) and (I,); a pair may count more than once, or not at all.

    Raises:
        ValueError: no pair of one kind counts, or a score is no number.
    """
    scores = np.concatenate([genuine, impostor])
    weights = np.zeros((2, len(scores)))  # genuine, impostor
    weights[0, : len(genuine)] = 1 if genuine_weights is None else genuine_weights
    weights[1, len(genuine) :] = 1 if impostor_weights is None else impostor_weights
    totals = weights.sum(axis=1)
    if not totals.all() or not np.isfinite(scores).all():
        raise ValueError(f"{totals[0]:g} genuine and {totals[1]:g} impostor pairs; both are needed, with finite scores")
    order = np.argsort(-scores, kind="stable")  # a mere merge where both are sorted
    scores = scores[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores are accepted together
    tar, far = weights[:, order].cumsum(axis=1)[:, ends] / totals[:, None]
    return Curve(np.append(np.inf, scores[ends]), np.append(0, far), np.append(0, tar))


def roc_auc(genuine, impostor) -> float:
    """P(genuine > impostor) + P(equal) / 2 of scores (G,) and (I,)."""
    return roc(genuine, impostor).auc


def eer(genuine, impostor) -> EqualError:
    """Equal error rate of scores (G,) and (I,), interpolated."""
    return roc(genuine, impostor).eer


def tar_at_far(genuine, impostor, far: float = FAR) -> Rate:
    """Share of genuine pairs accepted where at most `far` of the impostors are.

    Rule of 30: from 30 errors on a rate is known to 30 % (at 90 % confidence). None where fewer than 3 are expected.
    """
    note, wanted = "", 30 / far
    if len(impostor) < wanted:
        note = f"TAR at FAR {far:.1%} rests on {len(impostor)} impostor pairs; the rule of 30 asks for {wanted:.0f}"
    if len(impostor) < FEWEST_ERRORS / far or not len(genuine):
        return Rate(None, note or "there are no genuine pairs")
    return Rate(roc(genuine, impostor).tar_at(far), note)


def d_prime(genuine, impostor) -> float:
    """(mean genuine - mean impostor) / sqrt((var genuine + var impostor) / 2)."""
    spread = np.sqrt((np.var(genuine, dtype=np.float64) + np.var(impostor, dtype=np.float64)) / 2)
    return float((np.mean(genuine, dtype=np.float64) - np.mean(impostor, dtype=np.float64)) / max(spread, 1e-12))
