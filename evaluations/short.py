"""A validation in short: a verdict on each question that matters, what each rests on, and where FD_user stands.

The order is that in which a reader asks: whose images are they, do they vary, are they possible, are they new, are they
of use; and last whether these answers can be trusted at all. The answer in the worst place is the verdict on its group.
"""

import math
from typing import NamedTuple

from .findings import (
    AS_REAL,
    AS_REAL_WORDS,
    BETWEEN,
    NEARER_REAL,
    NEARER_WORST_WORDS,
    NO_BETTER,
    NOT_TOLD_FROM_REAL,
    NOT_TOLD_FROM_WORST,
    Finding,
    Section,
    Table,
)

POSSIBLE, TRUST = "Are they possible?", "Can this be trusted?"
GROUPS = {  # what matters -> what is asked -> the findings that answer it; the one in the worst place is quoted
    "Are they the right person?": {
        "Do they show the right person?": ("TRTS",),
        "Do they pass for that person?": ("AUC, closed set",),
    },
    "Are they varied?": {
        "Do they vary as that person's walks do?": ("TSTR",),
        "Are they spread as real images are?": ("FD_user",),
    },
    POSSIBLE: {"Could a walking body have made them?": ("kept by the sifter",)},
    "Are they new?": {"Are they no copies?": ("near copies", "twins of training images")},
    "Are they of use?": {"Does it help to learn from them besides the real ones?": ("gain",)},
}
GAIT_ALONE = "by gait yes, by contrast or colours no"
PHYSICS, LEAKS = "Physics of gait", "Leaks between splits"
IN_A_WORD = {  # the verdict of a finding -> that on a group
    AS_REAL_WORDS: "yes",
    NOT_TOLD_FROM_REAL: "yes, as far as so few images tell",
    "nearer to real images than to the worst": "partly",
    BETWEEN: "partly",
    NEARER_WORST_WORDS: "hardly",
    NOT_TOLD_FROM_WORST: "not that it could be seen",
    NO_BETTER: "no",
}
HELPS, HARMS, NO_GAIN, NO_INTERVAL = "it helps", "it harms", "no difference is seen", "too few users for an interval"
IN_A_WORD |= {HELPS: "yes", HARMS: "no: they harm", NO_GAIN: "no gain is seen", NO_INTERVAL: "undecided"}


class Target(NamedTuple):
    """What users asked for: of which finding, in words, and what it must be above."""

    name: str
    words: str
    above: float


TARGETS = Target("TRTS", "above 80 %", 0.8), Target("IS_user", "above 2", 2.0)


def in_short(sections: list[Section], lacking=(), beware=()) -> Section:
    """The verdicts, what they rest on, targets, and what stands out, from the sections that are there.

    Args:
        lacking: names of parts that are asked for and not there yet.
        beware: sentences that come first.
    """
    found = {finding.name: finding for section in sections for finding in section.findings}
    answered = {
        group: {question: f for question, names in questions.items() if (f := _answer(found, names))}
        for group, questions in GROUPS.items()
    }
    verdicts = [row for group, by_question in answered.items() for row in _verdict(group, by_question, sections)]
    verdicts += _trust(sections)
    answers = [
        [question, f.name, *map(f.shown, (f.value, f.real, f.worst)), _said(f)]
        for by_question in answered.values()
        for question, f in by_question.items()
    ]
    tables = [
        Table(title="verdicts", header=["", "verdict", "because"], rows=verdicts),
        Table(title="answers", header=["question", "number", "value", "real", "worst", "verdict"], rows=answers),
        Table(title="where FD_user stands", header=["FD_user", "is of", ""], rows=_scale(found, sections)),
        Table(title="targets", header=["target", "value", "", ""], rows=_targets(found)),
    ]
    quoted = [f.name for by_question in answered.values() for f in by_question.values()]
    return Section(
        title="In short",
        tables=[table for table in tables if table.rows],
        tables_first=True,
        quoted=quoted + [target.name for target in TARGETS if _answer(found, [target.name])],
        notes=[
            *([f"unfinished: {', '.join(lacking)} not there yet"] if lacking else []),
            *beware,
            *_standing_out(sections),
        ],
    )


def _answer(found: dict[str, Finding], names) -> Finding | None:
    """The finding in the worst place of those that were measured."""
    measured = [found[name] for name in names if name in found and found[name].value is not None]
    return min(measured, key=_order, default=None)


def _order(f: Finding) -> float:
    return math.inf if f.place is None else f.place


def _said(f: Finding) -> str:
    return _gain(f) if f.name == "gain" else f.verdict


def _gain(finding: Finding) -> str:
    """A gain is seen where its interval leaves 0 out."""
    if finding.interval is None:
        return NO_INTERVAL
    low, high = finding.interval
    return HELPS if low > 0 else HARMS if high < 0 else NO_GAIN


def _verdict(group: str, answers: dict[str, Finding], sections: list[Section]) -> list[list[str]]:
    """The row of the table, if there is one: the verdict in a word or two, and the number that it rests on."""
    counted = _physics(sections) if group == POSSIBLE else None
    if not answers:
        return [[group, _by_share(*counted), _in_words(*counted)]] if counted else []
    f = min(answers.values(), key=_order)
    said = _said(f)
    plain = said.removesuffix(f" ({f.caveat})") if f.caveat else said
    word = IN_A_WORD.get(plain, plain)
    because = f"{f.name} {f.shown(f.value)}"
    if f.interval:
        because += f", 95 %: {' to '.join(map(f.shown, f.interval))}"
    if f.real is not None and f.worst is not None:
        because += f" (real images {f.shown(f.real)}, {f.worst_is or 'the worst'} {f.shown(f.worst)})"
    if group == POSSIBLE:
        alone = next((s.data["by_gait_alone"] for s in sections if "by_gait_alone" in s.data), None)
        if alone and alone[0] > (f.value or 0):
            because += f"; by gait alone {f.shown(alone[0])} (real images {f.shown(alone[1])})"
            if alone[0] >= AS_REAL * alone[1] and not word.startswith("yes"):
                word = GAIT_ALONE
    if counted:
        because += f"; {_in_words(*counted)}"
    return [[group, word, because]]


def _physics(sections: list[Section]) -> tuple[int, int] | None:
    """How many quantities are as in real images, as far as is told, of how many; None where none is judged."""
    section = next((section for section in sections if section.title == PHYSICS), None)
    judged = [finding for finding in section.findings if finding.place is not None] if section else []
    as_real = sum(f.verdict.startswith((AS_REAL_WORDS, NOT_TOLD_FROM_REAL)) for f in judged)
    return (as_real, len(judged)) if judged else None


def _by_share(as_real: int, judged: int) -> str:
    share = as_real / judged
    return "yes" if share >= AS_REAL else "partly" if share >= NEARER_REAL else "hardly" if as_real else "no"


def _in_words(as_real: int, judged: int) -> str:
    return f"{as_real} of {judged} measured quantities are as in real images or not told from them"


def _trust(sections: list[Section]) -> list[list[str]]:
    """Whether held-out images are a test: no twins among the training images, and of other recordings."""
    leaks = next((section for section in sections if section.title == LEAKS and section.findings), None)
    if leaks is None:
        return []
    twins = [f for f in leaks.findings if f.value is not None]
    worst = max(twins, key=lambda f: f.value or 0)
    recordings = leaks.data.get("recordings", {})
    if worst.worst is not None and (worst.value or 0) >= worst.worst:
        return [[TRUST, "no", f"held-out images are training images: {worst.name}, {worst.shown(worst.value)}"]]
    alike = "no held-out image is a training image" if not worst.value else f"{worst.name}: {worst.shown(worst.value)}"
    if recordings.get("in_both"):
        count = recordings["in_both"]
        same = f"{count} recordings are in both training and held out by their file names"
        return [[TRUST, "for these recordings alone", f"{same}: nothing here tells of another day; {alike}"]]
    if recordings.get("told"):
        return [[TRUST, "yes" if not worst.value else "mostly", f"{alike}, and no recording is in both by file names"]]
    return [[TRUST, "probably", f"{alike}; whether recordings are in both, file names do not tell"]]


def _scale(found: dict[str, Finding], sections: list[Section]) -> list[list[str]]:
    """FD_user has no unit: the generated images' in the order of what else was measured, near to far."""
    fd = found.get("FD_user")
    if fd is None or fd.value is None:
        return []
    floor = next((s.data["FD_user_floor"] for s in sections if "FD_user_floor" in s.data), None)
    near = "" if floor is None else f"{fd.value / floor:.1f} times the floor" if floor > 0 else ""
    rows = [
        (floor, "real images against real ones, dealt at random: the floor", ""),
        (fd.real, "real images of the same sessions", ""),
        (fd.value, "the generated images", near),
        (fd.worst, "real images with shuffled pixels: the ceiling", ""),
    ]
    known = sorted((row for row in rows if row[0] is not None), key=lambda row: row[0])
    return [[fd.shown(number), words, beside] for number, words, beside in known]


def _targets(found: dict[str, Finding]) -> list[list[str]]:
    """Whether each is met, and what real images score, without which the target says little."""
    rows = []
    for target in TARGETS:
        if f := _answer(found, [target.name]):
            met = "met" if f.value is not None and f.value > target.above else "not met"
            rows.append([f"{target.name} {target.words}", f.shown(f.value), met, f"real images {f.shown(f.real)}"])
    return rows


def _standing_out(sections: list[Section]) -> list[str]:
    """The findings at either end, by name."""
    found = [finding for section in sections for finding in section.findings]
    beyond = [f"{f.name} ({f.shown(f.value)}, real images {f.shown(f.real)})" for f in found if f.beyond]
    worst = [
        f"{f.name} ({f.shown(f.value)}, the worst {f.shown(f.worst)})" for f in found if f.verdict.startswith(NO_BETTER)
    ]
    notes = [f"above real images, look why: {', '.join(beyond)}"] if beyond else []
    return notes + ([f"{NO_BETTER}: {', '.join(worst)}"] if worst else [])
