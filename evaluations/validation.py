"""The whole validation of generated spectrograms, part by part; each part is a section of one report.

Five questions: does an image show the person it should (classifier, verification)? Do the images of all vary as real
ones do (statistics)? Could a walking body have made them (physics, sifting)? Are they copies (memorisation)? And are
the answers worth anything, or do the real sets share sessions (leaks)? `short` puts the answers first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from guided_diffusion_vae.config import UserError, refuse_below

from .classifier_tests import classifier_tests
from .findings import Section
from .html import write_report
from .image_sets import LABELS, ImageSet
from .leaks import leak_report
from .measure import EvaluationConfig, evaluate, refuse_too_few
from .memorization import memorization
from .metric_learning import DEFAULT_LOSS, LOSSES
from .physics import physics
from .plots import with_confusion
from .report import FORMATS, SPLIT, Report, comparison
from .short import in_short
from .sifting import METHODS, Sifted, Sifter, sifting, write_accept_list
from .verification import split_users, verify

TITLE = "Generated spectrograms, validated"
BESIDE = "real_beside_generated.png"
# what some parts make
MADE = ("accepted.csv", BESIDE, "closest_pairs.png", "confusion.png", "copied.png", "rejected.png", "twins.png")
UNLABELLED = (
    f"nobody says whom the samples show: give {LABELS} of --real_dir. Not answered without: whether they show the right"
    " person (TRTS, TSTR, the gain, the verification); physics and sifting ask only whether it is the gait of anybody"
)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(EvaluationConfig):
    """What is asked, and how often."""

    parts: tuple = ("all",)  # of classifier, verification, statistics, physics, sifting, memorisation, leaks; or all
    out_dir: str = ""  # where report.html, report.json, pictures and accepted.csv go; empty: validation/ by the samples
    judge_epochs: int = 20  # passes over the real training images, of every classifier and of the embedding
    seeds: int = 3  # classifiers a test
    embedding_loss: str = DEFAULT_LOSS  # of the verification: contrastive, triplet or arcface
    open_set_users: int = 5  # users that the verification's embedding never learns from
    sift_method: str = "ranges"  # of gait quantities; or hull: PCA and a convex hull a user, as published

    def __post_init__(self):
        super().__post_init__()
        refuse_below(self, 1, "seeds")
        refuse_below(self, 0, "open_set_users")
        if self.embedding_loss not in LOSSES:
            raise UserError(f"--embedding_loss is {self.embedding_loss!r}; choose {', '.join(LOSSES)}")
        if self.sift_method not in METHODS:
            raise UserError(f"--sift_method is {self.sift_method!r}; choose {', '.join(METHODS)}")
        unknown = [part for part in self.parts if part not in PARTS and part != "all"]
        if unknown or not self.parts:
            what = f"has {unknown[0]!r}" if unknown else "is empty"
            raise UserError(f"--parts {what}; choose of {', '.join(PARTS)}, or all")

    @property
    def chosen(self) -> list[str]:
        """The names of the parts that are asked for, each once, in the order of the report."""
        return [part for part in PARTS if part in self.parts or "all" in self.parts]


def validate(
    train: ImageSet,
    heldout: ImageSet,
    samples: ImageSet,
    config: ValidationConfig,
    *,
    progress=False,
    say=print,
    keep=lambda sections: None,
    plot: bool = False,
) -> dict[str, Section]:
    """Every chosen part under its name; before them all what they say in short, and real beside generated images.

    Args:
        train, heldout, samples: see `measure.evaluate`.
        say: told which part begins, how long it took, and every section as soon as it is there.
        keep: given all that is there, in short before it, after every part, so that a later fault loses nothing.
        plot: draw the confusion of the classifier's part with each user's accuracy, instead of the matrices alone.
    Raises:
        UserError: too few users or images, before anything is learned.
    """
    refuse_at_the_start(train, heldout, samples, config)
    beware = [UNLABELLED] if samples.labels is None else []
    for note in beware:
        say(f"note: {note}")
    picture = comparison(heldout, samples, most=SHOWN, title="real, held out")
    beside = Section(title="Real beside generated", pictures={BESIDE: picture})
    sections, found = {}, {}
    for number, part in enumerate(config.chosen, start=1):
        say(f"part {number} of {len(config.chosen)}, {part}: begins")
        start = perf_counter()
        sections[part] = PARTS[part](train, heldout, samples, config, progress)
        say(f"part {number} of {len(config.chosen)}, {part}: {perf_counter() - start:.0f} s")
        say(str(sections[part]))
        if plot and part == "classifier":
            with_confusion(sections[part], train.class_names, say)
        short = in_short(list(sections.values()), config.chosen[number:], beware)
        found = {"in short": short, "beside": beside, **sections}
        if not (short.notes or short.tables):
            del found["in short"]  # nothing that was asked has numbers
        keep(found)
    if "in short" in found:
        say(str(found["in short"]))
    return found


def write_validation(folder, sections: dict[str, Section], samples: ImageSet, about: dict[str, Any]) -> list[Path]:
    """Write the report, its pictures and the sifter's accepted.csv; of a former report no such file is left.

    Returns:
        all that was written.
    """
    folder, pictures = Path(folder), [name for section in sections.values() for name in section.pictures]
    page = write_report(folder, TITLE, list(sections.values()), about)
    written = [page, folder / "report.json", *(folder / name for name in pictures)]
    if "sifting" in sections:
        sifted = Sifted(*(sections["sifting"].data[key] for key in Sifted._fields))
        written.append(folder / "accepted.csv")
        write_accept_list(written[-1], samples.files or range(len(samples.pixels)), sifted)
    for path in (folder / name for name in MADE):
        if path not in written:
            path.unlink(missing_ok=True)
    return written


def refuse_at_the_start(train: ImageSet, heldout: ImageSet, samples: ImageSet, config: ValidationConfig) -> None:
    """What the chosen parts would find out only after others have learned for minutes.

    Raises:
        UserError: names the flag.
    """
    refuse_too_few(train, heldout, len(samples.pixels))
    if "verification" in config.chosen and samples.labels is not None:
        split_users(len(train.class_names), config.open_set_users, np.random.default_rng(config.seed))
    if "sifting" in config.chosen and config.sift_method == "hull":
        Sifter.fit(train, method="hull")


def statistics_section(report: Report) -> Section:
    """The distances of `measure.evaluate` as findings: real is what real images of the same sessions score."""
    rows = report.rows
    names = [name for name in FORMATS if name not in ("user_accuracy", "nearest", "near_copies")]
    findings = [report.finding(name) for name in names]
    floor = rows[SPLIT].fd_user
    notes = [
        "real: as many real images of the training sessions; worst: real images with shuffled pixels",
        f"real images dealt at random are {floor:.2f} apart in FD_user: the floor at this number of images",
        *report.notes,
    ]
    return Section(
        title="Statistics", findings=findings, notes=notes, data={"about": report.about, "FD_user_floor": floor}
    )


def _classifier(train, heldout, samples, config, progress) -> Section:
    options = {"seeds": config.seeds, "epochs": config.judge_epochs, "seed": config.seed, "progress": progress}
    return classifier_tests(train, heldout, samples, **options)


def _verification(train, heldout, samples, config, progress) -> Section:
    options = {"epochs": config.judge_epochs, "seed": config.seed, "progress": progress}
    chosen = {"loss": config.embedding_loss, "open_set_users": config.open_set_users}
    return verify(train, heldout, samples, **chosen, **options)


def _statistics(train, heldout, samples, config, progress) -> Section:
    options = {"epochs": config.judge_epochs, "seed": config.seed, "progress": progress}
    return statistics_section(evaluate(train, heldout, samples, **options))


def _physics(train, heldout, samples, config, progress) -> Section:
    return physics(train, heldout, samples, seed=config.seed)


def _sifting(train, heldout, samples, config, progress) -> Section:
    return sifting(train, heldout, samples, seed=config.seed, method=config.sift_method)


def _memorisation(train, heldout, samples, config, progress) -> Section:
    return memorization(train, heldout, samples, seed=config.seed)


def _leaks(train, heldout, samples, config, progress) -> Section:
    sets = {"training": train, "held out": heldout}
    return leak_report(sets, names={key: images.files for key, images in sets.items() if images.files})


PARTS: dict[str, Callable[..., Section]] = {
    "classifier": _classifier,
    "verification": _verification,
    "statistics": _statistics,
    "physics": _physics,
    "sifting": _sifting,
    "memorisation": _memorisation,
    "leaks": _leaks,
}
SHOWN = 8  # users in the picture
