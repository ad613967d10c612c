"""A report as one page that needs nothing else: no script, no network, pictures inside; and the same as JSON.

Every finding is a row: the value, its interval, what real images and the worst score, a bar from the worst (left) to
real images (right) with a mark where the value stands, and the verdict in words. No bar where a value is suspiciously
far above real images.
"""

import base64
import io
import json
import math
import os
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.config import UserError

from .findings import Finding, Section, Table, medians_of
from .report import save_picture

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 0.8em 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.2em 0; }
th, td { padding: 0.25em 0.8em 0.25em 0; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th:first-child, td:first-child, td.words { text-align: left; }
small { color: #555; display: block; max-width: 32em; }
.bar { position: relative; width: 10em; height: 0.8em; margin-top: 0.35em; border-radius: 0.2em;
       background: linear-gradient(to right, #e9b7a8, #f3ecd2, #a9d3b0); }
.bar span { position: absolute; top: -0.2em; width: 3px; height: 1.2em; margin-left: -1px; background: #1a1a1a; }
.note { border-left: 4px solid #d9a400; padding-left: 0.7em; }
.wide { overflow-x: auto; }
table.words td, table.words th { text-align: left; }
.terms { color: #555; font-size: 0.87em; margin: 0.2em 0; }
img { max-width: 100%; image-rendering: pixelated; }
"""
# nothing may be fetched or run, whatever a file name or a note holds
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MEDIANS = "median, generated", "median, held out"  # in the unit of what is measured
HEADER = ("", "value", "95 % interval", "real images", "worst", *MEDIANS, "worst to real", "")
WORDS = len(HEADER) - 1  # the column of verdicts


def render(title: str, sections: list[Section], about: dict[str, Any]) -> str:
    """The page as text.

    Args:
        about: what the numbers stand on (files, network, seed), in the order in which it is to be read.
    """
    explained: set[str] = set()
    facts = "".join(f"<tr><td>{escape(str(k))}</td>{_cell(v)}</tr>" for k, v in about.items())
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *(_section(section, explained) for section in sections),
            f"<h2>About this report</h2>\n<table>{facts}</table>" if facts else "",
            "</body>\n</html>\n",
        ]
    )


def as_dict(title: str, sections: list[Section], about: dict[str, Any]) -> dict[str, Any]:
    """All that is in a report but its pictures, of which the names: plain values, null where a number is not finite."""
    parts = [
        {
            "title": section.title,
            **({"value_is": section.value_is} if section.value_is else {}),
            "findings": [finding.as_dict() for finding in section.findings],
            "tables": [{"title": t.title, "header": t.header, "rows": t.rows} for t in section.tables],
            "notes": section.notes,
            "pictures": list(section.pictures),
            "data": section.data,
        }
        for section in sections
    ]
    return plain({"title": title, "about": about, "sections": parts})


def plain(value: Any) -> Any:
    """Arrays, tuples and NumPy's numbers as JSON has them; a number that is not finite as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def refuse_unwritable(path, flag: str) -> None:
    """Find out before the work whether a file can be written afterwards; nothing is made.

    Args:
        flag: what an error calls the path.
    Raises:
        UserError: it is a folder, or lies where nothing can be written.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file in it, such as {path / 'report'}")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{flag} {path}: {above} is a file, so nothing can be written below it; give another place")
    if not os.access(above, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{flag} {path} cannot be written: no permission in {above}; give another place")


def write_text(path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        handle.write(text.encode())


def write_json(path, value: Any) -> None:
    """`plain(value)` as a file of JSON."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(folder, title: str, sections: list[Section], about: dict[str, Any]) -> Path:
    """Write report.html, report.json and every picture under its name into a folder; returns the page's path."""
    folder, named = Path(folder), [name for section in sections for name in section.pictures]
    assert len(named) == len(set(named)), f"two pictures have one name: {named}"
    assert all(Path(name).name == name and name.endswith(".png") for name in named), named
    for section in sections:
        for name, picture in section.pictures.items():
            save_picture(picture, folder / name)
    write_json(folder / "report.json", as_dict(title, sections, about))
    write_text(folder / "report.html", render(title, sections, about))
    return folder / "report.html"


# ---- parts of the page -----------------------------------------------------------------------------------------------


def _section(section: Section, explained: set[str]) -> str:
    """A part of the page; terms are explained where they first appear, and join those that are `explained`."""
    new = {term: words for term, words in section.terms.items() if term not in explained}
    explained.update(new)
    terms = [f'<p class="terms"><b>{escape(term)}</b>: {escape(words)}</p>' for term, words in new.items()]
    notes = [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    tables = [table_of(table, of_words=section.tables_first) for table in section.tables]
    return "\n".join(
        [
            f"<h2>{escape(section.title)}</h2>",
            _findings(section) if section.findings else "",
            *([*tables, *terms, *notes] if section.tables_first else [*terms, *notes, *tables]),
            *(_picture(name, picture) for name, picture in section.pictures.items()),
        ]
    )


def _findings(section: Section) -> str:
    """A table without the columns that no finding fills."""
    rows = [_finding(finding) for finding in section.findings]
    filled = [i for i in range(len(HEADER)) if i < 2 or any(row[i] not in ("", "-") for row in rows)]
    header = [section.value_is or word if word == "value" else word for word in HEADER]
    lines = [[f"<th>{escape(word)}</th>" for word in header]]
    kinds = [" class=words" if i == WORDS else "" for i in range(len(HEADER))]
    lines += [[f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)] for row in rows]
    table = "\n".join(f"<tr>{''.join(line[i] for i in filled)}</tr>" for line in lines)
    return f"<table>{table}</table>"


def _finding(finding: Finding) -> list[str]:
    """The cells below HEADER, escaped."""
    about, end = (f"<small>{escape(words)}</small>" if words else "" for words in (finding.about, finding.worst_is))
    interval = " to ".join(finding.shown(end) for end in finding.interval) if finding.interval else "-"
    numbers = [finding.shown(finding.value), interval, finding.shown(finding.real), finding.shown(finding.worst)]
    cells = [escape(number) for number in numbers]
    cells[-1] += end
    bar = "" if finding.beyond else _bar(finding.place)
    return [escape(finding.name) + about, *cells, *medians_of(finding, "-"), bar, escape(finding.verdict)]


def _bar(place: float | None) -> str:
    """The mark stays at an end if the value is beyond it."""
    if place is None or not math.isfinite(place):
        return ""
    left = 100 * min(1.0, max(0.0, place))
    return f'<div class="bar" title="{place:.2f}"><span style="left: {left:.0f}%"></span></div>'


def table_of(table: Table, of_words: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{escape(str(word))}</th>" for word in table.header)
    rows = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.title)}</caption>"
    kind = " class=words" if of_words else ""
    return f'<div class="wide"><table{kind}>{caption}<tr>{head}</tr>\n{rows}</table></div>'


def _cell(value: Any) -> str:
    """A table's cell; floats with three digits, words by commas, and a dash where there is no number."""
    value = value.item() if isinstance(value, np.generic) else value
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    shown = "-" if missing else f"{value:.3g}" if isinstance(value, float) else words
    return f"<td>{escape(shown)}</td>"


def _picture(name: str, picture) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    encoded = base64.b64encode(data.getbuffer()).decode()
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{encoded}"></p>'
