"""Pages of a gallery: one of all users, one of each, or all of them in one file.

The same functions make all of them; only where pictures and pages are found differs (`Addresses`). A page fetches
nothing but pictures of its own server, and runs one script, which its policy names by its digest: whatever a folder, a
file or a report is called, it is shown, never run. Without the script only sorting, enlarging and the keys are missing.
"""

from html import escape
from itertools import chain, zip_longest
from typing import NamedTuple, Protocol

from .gallery_contents import Gallery, Person
from .gallery_report import HELDOUT, TRAINING
from .gallery_style import POLICY, SCRIPT, STYLE
from .html import table_of
from .report import GENERATED

FEW = 3  # pictures of each side beside a user's name
WORDS = {TRAINING: "real (training)", HELDOUT: "real (held out)", GENERATED: "generated"}
ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"  # empty, lest a browser ask for one


class Shown(NamedTuple):
    """A picture on a page: its address, its size there if known, and the address of the whole one if it is reduced."""

    src: str
    size: tuple[int, int] | None
    whole: str = ""


class Addresses(Protocol):
    """Where the pages and pictures of a gallery are; None for a picture that is not to be had."""

    home: str

    def person(self, place: int) -> str: ...

    def thumb(self, number: int) -> str | None: ...

    def picture(self, number: int) -> Shown | None: ...


def thumbs_of(person: Person) -> tuple[list[int], list[int]]:
    """A few of a user's real pictures, from all his sessions, and of the generated ones."""
    training, made = person.pictures[TRAINING], person.pictures[GENERATED]
    count = min(FEW, len(training))
    return [training[i * len(training) // count] for i in range(count)], made[:FEW]


def in_turn(person: Person) -> list[int]:
    """All of a user's pictures, each kind in turn, and those few before all others."""
    few, every = thumbs_of(person), (person.pictures[kind] for kind in (GENERATED, HELDOUT, TRAINING))
    turns = chain(zip_longest(*few), zip_longest(*every))
    return list(dict.fromkeys(number for turn in turns for number in turn if number is not None))


def page_of_all(gallery: Gallery, at: Addresses) -> str:
    """The first page: what was found in all, and a card for each user."""
    return _page("Generated beside real", _index(gallery, at), "")


def page_of_one(gallery: Gallery, at: Addresses, place: int) -> str:
    """One user: all real pictures on the left, all generated ones on the right."""
    return _page(gallery.people[place].name, _user(gallery, at, place, "carry"), "")


def page_of_everything(gallery: Gallery, at: Addresses, said: str) -> str:
    """The first page and every user's in one; `said` stands at its head."""
    users = "\n".join(_user(gallery, at, place, "") for place in range(len(gallery.people)))
    return _page("Generated beside real", _index(gallery, at, said) + users, "whole")


def _page(title: str, body: str, kind: str) -> str:
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="{ICON}">
<style>{STYLE}</style>
</head>
<body class="{kind}">
<main>
{body}
</main>
<dialog aria-label="Picture, enlarged"><header><p></p><button type="button">Close</button></header>
<div><img alt=""><img alt="" hidden></div></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""
    return text.encode(errors="replace").decode()  # names that are no text


# ---- the first page --------------------------------------------------------------------------------------------------


def _index(gallery: Gallery, at: Addresses, said: str = "") -> str:
    users = sum(bool(person.pictures[TRAINING]) for person in gallery.people)
    counts = ", ".join(f"{n} {kind}" for kind in WORDS if (n := gallery.count(kind)))
    about = " · ".join(f"{escape(name)}: {escape(path)}" for name, path in gallery.about.items())
    beware = "\n".join(f'<p class="note">{escape(warning)}</p>' for warning in gallery.warnings)
    notes = "".join(f"<li>{escape(note)}</li>" for note in gallery.notes)
    notes = notes and f"<details><summary>Notes ({len(gallery.notes)})</summary><ul>{notes}</ul></details>"
    cards = "\n".join(_card(gallery, at, place) for place in range(len(gallery.people)))
    return f"""<div class="index">
<h1>Generated beside real</h1>
<p>{users} users; images: {counts}</p>
<p><small>{about}</small></p>
{f"<p><small>{escape(said)}</small></p>" if said else ""}
{beware}
{_found(gallery)}
{notes}
<h2>Users</h2>
{_sorting(gallery)}
<ol class="cards">
{cards}
</ol>
</div>
"""


def _found(gallery: Gallery) -> str:
    """What the report says of all: a table of values between the worst and real images, and verdicts."""
    if not gallery.lines:
        return ""
    before = ["", *(line.about for line in gallery.lines)]
    rows = "\n".join(
        f"<tr><td>{escape(line.name)}{f'<small>{escape(line.about)}</small>' * (line.about != said)}</td>"
        f'<td class="value">{escape(line.value)}</td><td data-is="real">{escape(line.real)}</td>'
        f'<td data-is="worst">{escape(line.worst)}<small> {escape(line.worst_is)}</small></td>'
        f'<td class="place">{_between(line.place)}</td><td class="words">{escape(line.verdict)}</td></tr>'
        for said, line in zip(before, gallery.lines, strict=False)
    )
    header = "<th></th><th>value</th><th>real images</th><th>worst</th>"
    header += '<th class="words">worst to real</th><th class="words">verdict</th>'
    return f'<h2>In all</h2><div class="wide"><table class="found"><tr>{header}</tr>{rows}</table></div>'


def _between(place: float | None) -> str:
    """A bar from the worst to real images that is filled up to a place."""
    if place is None:
        return ""
    return _bar(place, None, f"{place:.2f} of the way from the worst to real images")


def _bar(fill: float, mark: float | None, words: str) -> str:
    """A bar of 0 to 1, filled up to one number and marked at another."""
    at = "" if mark is None else f'<rect class="mark" x="{min(98.5, 100 * mark):.1f}" width="1.5" height="8"/>'
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{escape(words)}">'
        f'<rect class="track" width="100" height="8"/>'
        f'<rect class="fill" width="{100 * min(1.0, max(0.0, fill)):.1f}" height="8"/>{at}</svg>'
    )


def _sorting(gallery: Gallery) -> str:
    if all(person.right is None for person in gallery.people):
        return ""
    orders = {"name": "name", "lowest": "named right, lowest first", "highest": "named right, highest first"}
    links = (f'<a href="#sort={key}"{" aria-current" * (key == "name")}>{words}</a>' for key, words in orders.items())
    said = "Bars: the share of generated images that are named right; the mark: of real images of other sessions."
    return f'<p class="soft">{said}</p><nav class="sort" aria-label="Order of users">Order: {" ".join(links)}</nav>'


def _card(gallery: Gallery, at: Addresses, place: int) -> str:
    person = gallery.people[place]
    counts = {kind: len(numbers) for kind, numbers in person.pictures.items()}
    real = f"{counts[TRAINING]} + {counts[HELDOUT]} held out" if counts[HELDOUT] else str(counts[TRAINING])
    sides = zip((f"real: {real}", f"generated: {counts[GENERATED]}"), thumbs_of(person), strict=True)
    thumbs = "".join(
        f"<div><small>{words}</small><div>{''.join(_thumb(gallery, at, n, person) for n in numbers)}</div></div>"
        for words, numbers in sides
    )
    share = "" if person.right is None else f' data-right="{person.right}"'
    said = "" if person.right is None else f'<span class="count">{person.right:.0%} named right</span>'
    return (
        f'<li class="card" data-place="{place}"{share}>'
        f'<h3><a href="{at.person(place)}">{escape(person.name)}</a>{said}</h3>'
        f'{_right(person)[0]}<div class="thumbs">{thumbs}</div></li>'
    )


def _thumb(gallery: Gallery, at: Addresses, number: int, person: Person) -> str:
    src = at.thumb(number)
    return f'<img loading="lazy" src="{src}" alt="{escape(_alt(gallery, number, person))}">' if src else ""


def _right(person: Person) -> tuple[str, str]:
    """How many of a user's generated images are named right, beside his real ones: as a bar, and in words."""
    if person.right is None:
        return "", ""
    real = "" if person.right_real is None else f"; real images of other sessions (the mark): {person.right_real:.0%}"
    words = f"{person.right:.0%} of the generated images named right{real}"
    return _bar(person.right, person.right_real, words), f"<p>{words}</p>"


def _alt(gallery: Gallery, number: int, person: Person) -> str:
    picture = gallery.pictures[number]
    return f"{person.name}, {WORDS[picture.kind]}, {picture.name}"


# ---- a user's page ---------------------------------------------------------------------------------------------------


def _user(gallery: Gallery, at: Addresses, place: int, carry: str) -> str:
    person = gallery.people[place]
    real = "".join(
        f'<h3>{words} <span class="count">{len(person.pictures[kind])}</span></h3>'
        + _pictures(gallery, at, person, kind)
        for kind, words in ((TRAINING, "Training"), (HELDOUT, "Held out"))
        if person.pictures[kind]
    )
    tables = "".join(map(table_of, person.tables))
    told = f"<details><summary>All that the report says of {escape(person.name)}</summary>{tables}</details>"
    return f"""<article class="user" id="user-{place}">
{_steps(gallery, at, place, carry)}
<h1>{escape(person.name)}</h1>
{"".join(_right(person))}
{told if tables else ""}
<div class="sides">
<section><h2>Real</h2>{real or "<p>none</p>"}</section>
<section class="made"><h2>Generated <span class="count">{len(person.pictures[GENERATED])}</span></h2>
{_only(gallery, person)}{_pictures(gallery, at, person, GENERATED) or "<p>none</p>"}</section>
</div>
</article>"""


def _steps(gallery: Gallery, at: Addresses, place: int, carry: str) -> str:
    """Links to the users before and after, and to all."""

    def link(to: int, rel: str, words: str) -> str:
        if not 0 <= to < len(gallery.people):
            return "<span></span>"
        name = escape(gallery.people[to].name)
        return f'<span><a class="{carry}" rel="{rel}" href="{at.person(to)}">{words.format(name)}</a></span>'

    home = f'<a class="{"back" if carry else ""}" href="{at.home}">All users</a>'
    before, after = link(place - 1, "prev", "← {}"), link(place + 1, "next", "{} →")
    return f'<nav class="steps" aria-label="Users">{before}{home}{after}</nav>'


def _only(gallery: Gallery, person: Person) -> str:
    """The filter, if the sifter has judged any of these."""
    judged = [gallery.pictures[number].accepted for number in person.pictures[GENERATED]]
    if not any(accepted is not None for accepted in judged):
        return ""
    count = sum(accepted is True for accepted in judged)
    return f'<p><label><input type="checkbox" class="only"> accepted by the sifter only ({count})</label></p>'


def _pictures(gallery: Gallery, at: Addresses, person: Person, kind: str) -> str:
    """All pictures of a kind; how many are left out, if any are."""
    numbers = person.pictures[kind]
    items = [item for number in numbers if (item := _item(gallery, at, number, person))]
    lacking = len(numbers) - len(items)
    said = f'<p class="note">{lacking} of these pictures are not in this file</p>' if lacking else ""
    return f'<ul class="pictures">{"".join(items)}</ul>{said}' if numbers else ""


def _item(gallery: Gallery, at: Addresses, number: int, person: Person) -> str:
    """A picture; what the sifter said of it, and beside it the nearest training picture, where they are known."""
    picture, alt = gallery.pictures[number], _alt(gallery, number, person)
    said = {None: "", True: "accepted", False: f"rejected: {picture.reason}"}[picture.accepted]
    button = _button(at.picture(number), alt, f"{alt}; {said}" if said else alt, "picture")
    if not button:
        return ""
    beside = ""
    if picture.near is not None:
        words = f"{picture.near_words}: {gallery.pictures[picture.near].name}"
        beside = _button(at.picture(picture.near), words, words, "picture near")
        beside += f"<small>{escape(picture.near_words)}</small>" if beside else ""
    under = f"<small>{escape(said)}</small>" if picture.accepted is False else "<small></small>" if beside else ""
    state = {None: "", True: "kept", False: "rejected"}[picture.accepted]
    return f'<li class="{state}">{button}{under}{beside}</li>'


def _button(shown: Shown | None, alt: str, said: str, kind: str) -> str:
    if shown is None:
        return ""
    size = f' width="{shown.size[0]}" height="{shown.size[1]}"' if shown.size else ""
    whole = f' data-whole="{shown.whole}"' if shown.whole else ""
    return (
        f'<button type="button" class="{kind}" title="{escape(said)}" data-said="{escape(said)}"{whole}>'
        f'<img loading="lazy" src="{shown.src}"{size} alt="{escape(alt)}"></button>'
    )
