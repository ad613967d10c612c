"""The whole validation of generated spectrograms, part by part; each part is a section of one report.

Five questions: does an image show the person it should (classifier, verification)? Do the images of all vary as real
ones do (statistics)? Could a walking body have made them (physics, sifting)? Are they copies (memorisation)? And are
the answers worth anything, or do the real sets share sessions (leaks)?
"""

from collections.abc import Callable
from dataclasses import dataclass

from guided_diffusion_vae.config import UserError, refuse_below

from .classifier_tests import classifier_tests
from .findings import Finding, Section, Table
from .image_sets import ImageSet
from .leaks import leak_report
from .measure import EvaluationConfig, evaluate, refuse_too_few
from .memorization import memorization
from .metric_learning import DEFAULT_LOSS, LOSSES
from .physics import physics
from .report import FORMATS, GENERATED, SAME, SHUFFLED, SPLIT, TITLES, Report
from .sifting import METHODS, sifting
from .user_classifier import to_input
from .verification import verify


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(EvaluationConfig):
    """What is asked, and how often."""

    parts: str = "all"  # some of classifier,verification,statistics,physics,sifting,memorisation,leaks
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
        unknown = [part for part in self.chosen if part not in PARTS]
        if unknown:
            raise UserError(f"--parts has {unknown[0]!r}; choose of {', '.join(PARTS)}, or all")

    @property
    def chosen(self) -> list[str]:
        """The names of the parts that are asked for."""
        return list(PARTS) if self.parts == "all" else [part.strip() for part in self.parts.split(",")]


def validate(
    train: ImageSet, heldout: ImageSet, samples: ImageSet, config: ValidationConfig, *, progress=False, say=print
) -> dict[str, Section]:
    """Every chosen part under its name, and before them all what they say in short.

    Args:
        train, heldout, samples: see `measure.evaluate`.
        say: told every section as soon as it is there.
    Raises:
        UserError: too few users or images.
    """
    refuse_too_few(train, heldout, len(samples.pixels))
    sections = {}
    for part in config.chosen:
        sections[part] = PARTS[part](train, heldout, samples, config, progress)
        say(str(sections[part]))
    short = in_short(list(sections.values()))
    say(str(short))
    return {"in short": short, **sections}


def statistics_section(report: Report) -> Section:
    """The distances of `measure.evaluate` as findings: real is what real images of the same sessions score."""
    rows = report.rows
    names = [name for name in FORMATS if name not in ("user_accuracy", "nearest", "near_copies")]
    findings = [
        Finding(
            name=TITLES.get(name, name),
            value=getattr(rows[GENERATED], name),
            real=getattr(rows[SAME], name),
            worst=getattr(rows[SHUFFLED], name),
            form=FORMATS[name],
            distance=name in ("fd_user", "kid_user"),
            about=f"{report.about['compared']} images against {report.about['heldout_images']} of other sessions",
        )
        for name in names
    ]
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
    pixels = [images.pixels for images in (train, heldout, samples)]
    return memorization(*(to_input(p).flatten(1).numpy() for p in pixels), *pixels, seed=config.seed)


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
QUESTIONS = {  # a finding's name -> what it answers
    "TRTS": "Do they show the right person?",
    "AUC, closed set": "Do they pass for that person?",
    "TSTR": "Do they vary as that person's walks do?",
    "gain": "Does it help to learn from them besides the real ones?",
    "FD_user": "Are they spread as real images are?",
    "kept by the sifter": "Could a walking body have made them?",
    "near copies": "Are they no copies?",
}
TARGETS = (  # what users asked for: name, what it says, whether it is met by (value, floor)
    ("TRTS", "above 80 %", lambda value, floor: value > 0.8),
    ("IS_user", "above 2", lambda value, floor: value > 2),
    ("FD_user", "below 50", lambda value, floor: value < 50),
    ("FD_user", "below twice its floor", lambda value, floor: floor is not None and value < 2 * floor),
)


def _gain(finding: Finding) -> str:
    """A gain is seen where its interval leaves 0 out."""
    low, high = finding.interval
    return "it helps" if low > 0 else "it harms" if high < 0 else "no difference is seen"


def in_short(sections: list[Section]) -> Section:
    """A line for each question, and whether the targets are met, from the sections that are there."""
    found = {finding.name: finding for section in sections for finding in section.findings}
    floor = next((s.data["FD_user_floor"] for s in sections if "FD_user_floor" in s.data), None)
    answers = [
        [question, name, f.shown(f.value), f.shown(f.real), f.shown(f.worst), _gain(f) if name == "gain" else f.verdict]
        for name, question in QUESTIONS.items()
        if (f := found.get(name)) and f.value is not None
    ]
    targets = [
        [f"{name} {what}", found[name].shown(found[name].value), "met" if met(found[name].value, floor) else "not met"]
        for name, what, met in TARGETS
        if name in found and found[name].value is not None
    ]
    tables = [
        Table(title="answers", header=["question", "number", "value", "real", "worst", "verdict"], rows=answers),
        Table(title="targets", header=["target", "value", ""], rows=targets),
    ]
    notes = [f"{row[0]} {row[5]} ({row[1]} {row[2]}; real images {row[3]}, the worst {row[4]})" for row in answers]
    notes += [f"target {row[0]}: {row[1]}, {row[2]}" for row in targets]
    return Section(title="In short", tables=[table for table in tables if table.rows], notes=notes)
