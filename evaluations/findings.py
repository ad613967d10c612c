"""What was found: every number between the worst and what real images reach, and a verdict in words.

    place = (value - worst) / (real - worst):   0 says nothing about a walking person, 1 is as real images are

Of distances the logarithms count: the worst is so far away that twice the floor would else be "as real images".

`worst` is what carries no information scores (chance, shuffled pixels, another user), `real` what held-out real images
score under the same protocol and at the same number. Whether high or low is good follows from the two. Of some numbers
too much is suspicious, too: where the whole interval lies above real images they are `beyond`, and `above` says how.

A verdict claims no more than the interval does: where that reaches real images, the worst, both, or from one half into
the other, the words say so. Two judges of the same images then differ in their numbers, not in what they say.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from .glossary import terms_of

AS_REAL, NEARER_REAL, NEARER_WORST = 0.9, 0.5, 0.1  # places at which the words change
AS_REAL_WORDS = "as real images"
NO_BETTER = "no better than the worst"
NOT_TOLD_FROM_REAL = "not distinguishable from real images"
NOT_TOLD_FROM_WORST = "not distinguishable from the worst"
BETWEEN = "between the worst and real images"
UNDECIDED = "undecided: the interval holds real images and the worst"
NEARER_WORST_WORDS = "nearer to the worst than to real images"
ABOVE = "above real images: look why"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number; None where it has no meaning, which is also what a number becomes that is not finite."""

    name: str
    value: float | None
    real: float | None = None  # the ceiling of a score, the floor of a distance: held-out real images
    worst: float | None = None  # the other end
    worst_is: str = ""  # in a word or two: "chance"
    interval: tuple[float, float] | None = None  # 95 %, of the value
    form: str = "{:.3g}"  # how the number is printed: "{:.1%}"
    about: str = ""  # what is measured, in a sentence without a full stop
    distance: bool = False  # ratios count, not differences
    above: str = ""  # the verdict beyond real images, if that is suspicious
    caveat: str = ""  # stands beside the verdict
    said: str = ""  # the verdict itself, where the number is not one of generated images
    medians: tuple[float, float] | None = None  # of generated and of real images, if the value is a distance of them

    def __post_init__(self):
        for name in ("value", "real", "worst"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                object.__setattr__(self, name, None)
        if self.interval is not None and not all(map(math.isfinite, self.interval)):
            object.__setattr__(self, "interval", None)

    @property
    def place(self) -> float | None:
        """Where the value stands: 0 at the worst, 1 where real images are; None without both ends."""
        return self._place_of(self.value)

    def _place_of(self, value: float | None) -> float | None:
        real, worst = self.real, self.worst
        if value is None or real is None or worst is None or real == worst:
            return None
        if self.distance and min(value, real, worst) > 0:
            value, real, worst = math.log(value), math.log(real), math.log(worst)
        return (value - worst) / (real - worst)

    @property
    def beyond(self) -> bool:
        """Whether it is suspiciously far above real images: by its whole interval, and by as much as `AS_REAL` allows.

        Also where real images are no better than the worst.
        """
        if not self.above or self.value is None or self.real is None or self.interval is None:
            return False
        place = self.place
        return self.interval[0] > self.real and (place is None or abs(place - 1) > 1 - AS_REAL)

    @property
    def verdict(self) -> str:
        """The place in words."""
        words = self.said or (self.above if self.beyond else self._words())
        return f"{words} ({self.caveat})" if self.caveat else words

    def _words(self) -> str:
        place = self.place
        if self.value is None:
            return "not measured"
        if place is None:
            return "-" if self.real is None or self.worst is None else "real images are no better than the worst"
        low, high = self._reach(place)
        if low < NEARER_WORST and high >= AS_REAL:
            return UNDECIDED
        if place >= AS_REAL and low >= NEARER_REAL:
            return AS_REAL_WORDS
        if place < NEARER_WORST and high < NEARER_REAL:
            return NO_BETTER
        if high >= AS_REAL:
            return NOT_TOLD_FROM_REAL
        if low < NEARER_WORST:
            return NOT_TOLD_FROM_WORST
        if low < NEARER_REAL <= high:
            return BETWEEN
        return "nearer to real images than to the worst" if place >= NEARER_REAL else NEARER_WORST_WORDS

    def _reach(self, place: float) -> tuple[float, float]:
        """The places that the interval reaches, from the worst one to the best; the place itself without one."""
        ends = [self._place_of(end) for end in self.interval or ()]
        places = [place, *(end for end in ends if end is not None)]
        return min(places), max(places)

    def shown(self, value: float | None) -> str:
        """A number in this finding's form."""
        return "-" if value is None else self.form.format(value)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{k: getattr(self, k) for k in ("name", "value", "real", "worst", "worst_is", "interval", "about")},
            **({"medians": self.medians} if self.medians else {}),
            "place": self.place,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows beneath a header, for numbers that are many: one line a user, a confusion matrix."""

    title: str
    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences: what to beware of
    pictures: dict[str, Any] = field(default_factory=dict)  # file name -> PIL image
    data: dict[str, Any] = field(default_factory=dict)  # further numbers, for JSON alone
    value_is: str = ""  # what the values of the findings are, where their names alone mislead
    quoted: list[str] = field(default_factory=list)  # names of findings of other sections that are spoken of
    tables_first: bool = False  # the tables are what the section is about: above the notes, and on a terminal, too

    @property
    def terms(self) -> dict[str, str]:
        """What the abbreviations among the names of the findings mean, each in a sentence."""
        return terms_of([*(finding.name for finding in self.findings), *self.quoted])

    def __str__(self) -> str:
        """Findings and notes for a terminal; most tables are in the page alone."""
        lines = ["", self.title, "-" * len(self.title)]
        if self.value_is:
            lines.append(f"value: {self.value_is}")
        if self.findings:
            rows = [COLUMNS, *(_cells(finding) for finding in self.findings)]
            columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
            lines += aligned(columns, ["<" if column[0] in ("", "95 %") else ">" for column in columns])
        for table in self.tables if self.tables_first else ():
            columns = list(zip(table.header, *([str(cell) for cell in row] for row in table.rows), strict=True))
            lines += [*([""] if table is not self.tables[0] else []), f"{table.title}:"]
            lines += aligned(columns, ["<"] * len(columns))
        lines += [f"{term}: {words}" for term, words in self.terms.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def aligned(columns: list[tuple[str, ...]], sides: list[str]) -> list[str]:
    """The lines of columns of words, each as wide as its longest, set to the left (<) or to the right (>)."""
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


COLUMNS = ("", "value", "95 %", "real", "worst", "", "generated", "held out", "")  # before the verdict: medians


def _cells(f: Finding) -> tuple[str, ...]:
    span = " to ".join(map(f.shown, f.interval)) if f.interval else ""
    numbers = f.shown(f.value), span, f.shown(f.real), f.shown(f.worst)
    return f.name, *numbers, f.worst_is, *medians_of(f, ""), f.verdict


def medians_of(f: Finding, missing: str) -> tuple[str, str]:
    """The two medians as words."""
    made, real = (f"{median:.3g}" for median in f.medians) if f.medians else (missing, missing)
    return made, real
