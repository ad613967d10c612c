"""What was found: every number between the worst and what real images reach, and a verdict in words.

    place = (value - worst) / (real - worst):   0 says nothing about a walking person, 1 is as real images are

Of distances the logarithms count: the worst is so far away that twice the floor would else be "as real images".

`worst` is what carries no information scores (chance, shuffled pixels, another user), `real` what held-out real images
score under the same protocol and at the same number. Whether high or low is good follows from the two.
"""

import math
from dataclasses import dataclass, field
from typing import Any

AS_REAL, NEARER_REAL, NEARER_WORST = 0.9, 0.5, 0.1  # places at which the words change


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number; None where it has no meaning, which is also what a number becomes that is not finite."""

    name: str
    value: float | None
    real: float | None = None  # the ceiling of a score, the floor of a distance: held-out real images
    worst: float | None = None  # the other end
    interval: tuple[float, float] | None = None  # 95 %, of the value
    form: str = "{:.3g}"  # how the number is printed: "{:.1%}"
    about: str = ""  # what is measured, in a sentence without a full stop
    distance: bool = False  # ratios count, not differences

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
        if None in (self.value, self.real, self.worst) or self.real == self.worst:
            return None
        value, real, worst = self.value, self.real, self.worst
        if self.distance and min(value, real, worst) > 0:
            value, real, worst = map(math.log, (value, real, worst))
        return (value - worst) / (real - worst)

    @property
    def verdict(self) -> str:
        """The place in words."""
        place = self.place
        if self.value is None:
            return "not measured"
        if place is None:
            return "-" if self.real is None or self.worst is None else "real images are no better than the worst"
        if place >= AS_REAL:
            return "as real images"
        if place >= NEARER_REAL:
            return "nearer to real images than to the worst"
        if place >= NEARER_WORST:
            return "nearer to the worst than to real images"
        return "no better than the worst"

    def shown(self, value: float | None) -> str:
        """A number in this finding's form."""
        return "-" if value is None else self.form.format(value)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{k: getattr(self, k) for k in ("name", "value", "real", "worst", "interval", "about")},
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

    def __str__(self) -> str:
        """Findings and notes for a terminal; the tables are in the page."""
        lines = ["", self.title, "-" * len(self.title)]
        if self.findings:
            lines.append(f"{'':<30}{'value':>9}  {'95 %':<17}{'real':>9}{'worst':>9}")
        for f in self.findings:
            span = " to ".join(map(f.shown, f.interval)) if f.interval else ""
            numbers = f"{f.shown(f.value):>9}  {span:<17}{f.shown(f.real):>9}{f.shown(f.worst):>9}"
            lines.append(f"{f.name:<30}{numbers}  {f.verdict}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
