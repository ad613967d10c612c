"""What the abbreviations of the reports mean, a sentence each, without a full stop; whoever prints one quotes it."""

from collections.abc import Iterable

TERMS = {
    "TRTR": "train on real, test on real: share of held-out real images that a classifier of real ones names right",
    "TRTS": "train on real, test on synthetic: share of generated images that a classifier of real ones names right",
    "TSTR": "train on synthetic, test on real: share of held-out real images that a classifier of generated ones names"
    " right; it asks for variety, too",
    "gain": "how many more held-out real images are named right by a classifier that learned from generated ones, too",
    "shortcut": "share that brightness and noise alone name right, without any gait",
    "IS_user": "inception score by the user classifier: high where images are sure of their user and users are many",
    "users named": "how many users, in effect, the classifier names",
    "AUC": "area under the curve: chance that two images of one person look more alike than two of different ones",
    "EER": "equal error rate: share of wrong answers where as many persons are falsely accepted as falsely refused",
    "TAR at FAR 1%": "true acceptance rate where 1 % of strangers are falsely accepted",
    "closed set": "users that the embedding learned to tell apart",
    "open set": "users that the embedding never saw",
    "FD_user": "Frechet distance of two sets of images in features of the user classifier; compare within a report",
    "KID_user": "kernel distance of the same two sets; 0 is the same",
    "precision": "share of generated images that lie among real ones",
    "recall": "share of real images that lie among generated ones",
    "density": "precision, counting by how many real images each is surrounded",
    "coverage": "share of real images that have a generated one nearby",
    "AuthPct": "authenticity: per cent of images farther from their nearest training image than that is from the next",
    "C_T": "copying score: far below 0 where images are nearer to training images than other real ones are",
}


def terms_of(names: Iterable[str]) -> dict[str, str]:
    """The terms that occur in names ("AUC, closed set"), in the order in which they do."""
    parts = dict.fromkeys(part for name in names for part in (name, *name.split(", ")))
    return {part: TERMS[part] for part in parts if part in TERMS}
