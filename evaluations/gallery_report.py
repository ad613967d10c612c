"""What a report.json says of generated images, as words for a page: of all of them, and user by user.

Two commands write one: evaluate_samples.py a row of scores for each set, validate.py sections of findings. Either is
read as data that somebody else may have made: what is not where it belongs is an error, never a guess.
"""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion_vae.config import UserError

from .findings import AS_REAL, Finding, Table
from .report import GENERATED, OTHER, Report, Scores
from .validation import TITLE, statistics_section

MOST_BYTES = 64 << 20  # of a report; validate.py's on 31 users has 0.1 MB
TRAINING, HELDOUT = "training", "held out"  # kinds of real images; the third kind is GENERATED
COUNTS = {TRAINING: "training_images", HELDOUT: "heldout_images", GENERATED: "generated_images"}


class Line(NamedTuple):
    """One number of all generated images, as it is shown; `place` is where it stands from 0, worst, to 1, real."""

    name: str
    about: str
    value: str
    real: str
    worst: str
    worst_is: str  # in a word: "chance"
    place: float | None  # None: no bar
    verdict: str


class Near(NamedTuple):
    """A generated image and the training image that a search for copies found nearest, by their places."""

    generated: int
    training: int
    words: str


class Told(NamedTuple):
    """All that a report tells of generated images."""

    path: Path
    lines: list[Line]
    notes: list[str]
    right: dict[str, float]  # user -> share of the generated images that are named right
    right_real: dict[str, float]  # user -> that of real images of other sessions
    tables: list[Table]  # of which each row begins with a user
    counts: dict[str, int]  # kind -> how many images it is about
    near: list[Near]
    of_rows: bool  # places of generated images are rows of an .npz, not places among sorted files


def read_report(path) -> Told:
    """Read a report.json, or that in a folder.

    Raises:
        UserError: none is there, or it is damaged or something else, in one line.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    at, mend = f"--report {path}", "evaluate the samples again, or give another report"
    if not path.is_file():
        raise UserError(f"{at} does not exist; evaluate_samples.py or validate.py writes it")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{at} has {path.stat().st_size:,} bytes, more than the {MOST_BYTES:,} that are read: {mend}")
    try:
        found = json.loads(path.read_bytes(), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at} is not JSON ({error}): {mend}") from error
    reader = _reader_of(found)
    if reader is None:
        title = found.get("title") if isinstance(found, dict) else None
        what = f"is about something else ({str(title)[:100]!r})" if title else "is no report of generated images"
        raise UserError(f"{at} {what}; give one that evaluate_samples.py or validate.py wrote")
    try:
        return reader(found, path)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{at} is damaged: something in it is not what it should be ({why}); {mend}") from error


def _reader_of(found) -> Callable[[dict, Path], Told] | None:
    if isinstance(found, dict) and "rows" in found and "accuracy_per_user" in found:
        return _of_evaluation
    return _of_validation if isinstance(found, dict) and found.get("title") == TITLE else None


# ---- evaluate_samples.py ---------------------------------------------------------------------------------------------


def _of_evaluation(found: dict, path: Path) -> Told:
    """Its rows of scores, with the verdicts that validate.py gives to the same scores."""
    rows = {
        name: Scores(**{field.name: _number(row.get(field.name)) for field in fields(Scores)})
        for name, row in found["rows"].items()
    }
    about = {**found["about"], "chance": _number(found["about"]["chance"])}
    right = {name: _shares(shares.items()) for name, shares in found["accuracy_per_user"].items()}
    intervals = {name: _interval(ends) for name, ends in found.get("intervals", {}).items() if ends is not None}
    report = Report(rows, about, right, [str(note) for note in _list(found["notes"])], intervals)
    section = statistics_section(report)
    shown = (report.finding("user_accuracy"), *section.findings, report.finding("near_copies"))
    lines = [_line(finding) for finding in shown]
    floor = f"real images dealt at random: {section.data['FD_user_floor']:.2f}, the floor"
    lines = [line._replace(about=f"{line.about}; {floor}") if line.name == "FD_user" else line for line in lines]
    names = list(right)
    users = list(dict.fromkeys(user for shares in right.values() for user in shares))
    table = Table(
        title="Share that is named right",
        header=["user", *names],
        rows=[[user, *(right[name].get(user) for name in names)] for user in users],
    )
    return Told(
        path=path,
        lines=lines,
        notes=section.notes,
        right=right.get(GENERATED, {}),
        right_real=right.get(OTHER, {}),
        tables=[table],
        counts={kind: int(about[key]) for kind, key in COUNTS.items()},
        near=[],
        of_rows=False,
    )


def _line(f: Finding) -> Line:
    place = None if f.beyond else f.place
    verdict = "" if f.worst is None else f.verdict
    return Line(f.name, f.about, f.shown(f.value), f.shown(f.real), f.shown(f.worst), f.worst_is, place, verdict)


# ---- validate.py -----------------------------------------------------------------------------------------------------


def _of_validation(found: dict, path: Path) -> Told:
    """The answers of "In short"; without it, every finding of every section."""
    sections = {str(section["title"]): section for section in _list(found["sections"])}
    findings = {str(f["name"]): f for section in sections.values() for f in _list(section["findings"])}
    titles = [_table(table) for section in sections.values() for table in _list(section["tables"])]
    by_user = [table for table in titles if table.header[:1] == ["user"]]
    answers = next((table for table in titles if table.title == "answers"), None)
    if answers:
        lines = [_answer(findings, *map(str, row)) for row in answers.rows]
    else:
        lines = [_of_finding(finding) for finding in findings.values()]
    notes = [str(note) for note in _list(sections.get("In short", {}).get("notes", []))]
    named = next((table for table in by_user if "TRTS" in table.header), None)
    about, copies = found["about"], sections.get("Memorisation", {}).get("data", {})
    judged = {kind: sum(map(int, _column(named, kind).values())) for kind in COUNTS} if named else {}
    counted = next((s["data"]["about"] for s in sections.values() if "about" in s["data"]), {})
    return Told(
        path=path,
        lines=lines,
        notes=[note for note in notes if not note.startswith(tuple(line.name for line in lines))],
        right=_shares(_column(named, "TRTS").items()),
        right_real=_shares(_column(named, "TRTR").items()),
        tables=by_user,
        counts=judged or {kind: int(counted[key]) for kind, key in COUNTS.items() if key in counted},
        near=[] if about.get("skip_bad_images") else _near(copies),  # with some left out, places are not those of files
        of_rows=str(about.get("samples", "")).endswith(".npz"),
    )


def _table(table: dict) -> Table:
    """Rows as long as the header, of words and numbers."""
    header = [str(word) for word in _list(table["header"])]
    rows = [list(_list(row)) for row in _list(table["rows"])]
    if not all(len(row) == len(header) for row in rows):
        raise ValueError(f"the table {str(table['title'])[:50]!r} has rows of another length than its header")
    if any(isinstance(value, dict | list) for row in rows for value in row):
        raise TypeError(f"the table {str(table['title'])[:50]!r} has tables in it")
    return Table(title=str(table["title"]), header=header, rows=rows)


def _answer(findings: dict[str, dict], question, name, value, real, worst, verdict) -> Line:
    """A row of the table "answers", with the place of the finding that it quotes."""
    finding = findings.get(name, {})
    return Line(question, name, value, real, worst, str(finding.get("worst_is", "")), _place(finding), verdict)


def _of_finding(finding: dict) -> Line:
    value, real, worst = (
        "-" if (number := _number(finding[key])) is None else f"{number:.3g}" for key in ("value", "real", "worst")
    )
    name, about, worst_is, verdict = (str(finding[key]) for key in ("name", "about", "worst_is", "verdict"))
    return Line(name, about, value, real, worst, worst_is, _place(finding), verdict)


def _place(finding: dict) -> float | None:
    """As the report's own page: no bar where a value is suspiciously far above real images."""
    place = _number(finding.get("place"))
    return None if place is None or place > 2 - AS_REAL else place


def _column(table: Table | None, name: str) -> dict[str, Any]:
    """User -> the value in the column of that name."""
    return {} if table is None else {str(row[0]): row[table.header.index(name)] for row in table.rows}


def _near(data: dict) -> list[Near]:
    """Twins and closest pairs; of an image that is in both, the twin."""
    pairs = data.get("closest_pairs", {"generated": [], "train": []})
    closest = zip(_list(pairs["generated"]), _list(pairs["train"]), strict=True)
    found = {int(image): Near(int(image), int(training), "nearest training image") for image, training in closest}
    for twin in _list(data.get("twins", [])):
        words = f"training image: {twin['kind']} twin"
        found[int(twin["new_place"])] = Near(int(twin["new_place"]), int(twin["known_place"]), words)
    return list(found.values())


# ---- plain values ----------------------------------------------------------------------------------------------------


def _number(value) -> float | None:
    """A number of a report; None where there is none, or one that is not finite."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:50]!r} is no number")
    return value if math.isfinite(value) else None


def _interval(ends) -> tuple[float, float] | None:
    """Two numbers of a report; None where one is not finite."""
    low, high = map(_number, ends)
    return None if low is None or high is None else (low, high)


def _shares(pairs) -> dict[str, float]:
    """User -> share, of those users who have one."""
    found = {str(user): share for user, value in pairs if (share := _number(value)) is not None}
    wrong = [user for user, share in found.items() if not 0 <= share <= 1]
    if wrong:
        raise ValueError(f"{wrong[0][:50]!r} has the share {found[wrong[0]]}")
    return found


def _list(value) -> list:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:50]!r} is no list")
    return value
