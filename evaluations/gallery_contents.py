"""What there is to look at: every user's real and generated images, and what reports say of them.

Nothing is read but names: pictures are numbered here, and whoever shows one reads it then. gallery_page makes pages
of this, gallery_server shows them.
"""

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import FORMATS, MAX_PIXELS, read_rgb
from guided_diffusion_vae.sample_util import read_manifest

from .findings import Table
from .gallery_report import HELDOUT, TRAINING, Line, Told, read_report
from .image_sets import LABELS, ImageSet, beside, list_folder, pngs_of, read_samples, renumber
from .report import GENERATED

NOBODY = "unlabelled"  # who is shown where nobody said
MOST_PORT = 65535
MOST_SIDE = 256  # pixels of a picture on a page, before it is clicked at
ACCEPTED = ["image", "accepted", "reason"]  # the header of the sifter's list


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """What is shown, and where."""

    samples: str = ""  # generated images: the sampler's folder or .npz, or any folder of images
    real_dir: str = ""  # folder of the real images that the generator learned from
    heldout_dir: str = ""  # folder of real images of the same users in other sessions
    report: str = ""  # report.json of evaluate_samples.py or validate.py; empty: looked for by the samples
    port: int = 8000  # of the page on this machine; 0 takes a free one
    open_browser: bool = False  # show the page at once
    out: str = ""  # write one .html file that needs nothing else, instead of serving

    def __post_init__(self):
        if not 0 <= self.port <= MOST_PORT:
            raise UserError(f"--port is {self.port}; it must be 0 (a free one) to {MOST_PORT}")


class Picture(NamedTuple):
    """One image: of which kind, what it is called, and where it is read from when it is asked for."""

    kind: str  # TRAINING, HELDOUT or GENERATED
    name: str
    source: Path | np.ndarray  # a file, or pixels uint8 (H, W, 3)
    accepted: bool | None = None  # by the sifter; None: it was not asked
    reason: str = ""  # why not
    near: int | None = None  # number of the training picture that a search for copies found nearest
    near_words: str = ""

    def read(self) -> Image.Image:
        """The picture as 8-bit RGB.

        Raises:
            UserError: it cannot be read, see `read_rgb`.
        """
        return Image.fromarray(self.source) if isinstance(self.source, np.ndarray) else read_rgb(self.source)

    def size(self) -> tuple[int, int] | None:
        """Width and height as the file's head claims them; None if `read` would not take it."""
        if isinstance(self.source, np.ndarray):
            return self.source.shape[1::-1]
        try:
            if self.source.is_fifo():
                return None
            with Image.open(self.source, formats=FORMATS) as image:
                return image.size if image.width * image.height <= MAX_PIXELS else None
        except Exception:  # as in `read_rgb`, no list of what Pillow raises is whole; `read` tells why
            return None


@dataclass(frozen=True)
class Person:
    """A user: the numbers of the pictures of each kind, and what the report says."""

    name: str
    pictures: dict[str, list[int]]  # kind -> numbers
    right: float | None = None  # share of the generated images that are named right
    right_real: float | None = None  # that of real images of other sessions
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """All that is shown: pictures by number, users in the order of their list, and what is said of all."""

    pictures: list[Picture]
    people: list[Person]
    lines: list[Line]
    notes: list[str]  # of the report
    warnings: list[str]  # that what is said may not be of what is shown
    about: dict[str, str]  # what is shown, and what tells of it: name -> path

    @functools.cached_property
    def side(self) -> int:
        """Pixels a side, beyond which a picture is shown reduced: those of the generated ones, which were made from and
        are judged beside real ones of that size; at most `MOST_SIDE`."""
        sizes = (picture.size() for picture in self.pictures if picture.kind == GENERATED)
        return min(MOST_SIDE, max(next((size for size in sizes if size), (MOST_SIDE,))))

    def count(self, kind: str) -> int:
        """How many pictures are of a kind."""
        return sum(len(person.pictures[kind]) for person in self.people)


def collect(config: GalleryConfig) -> Gallery:
    """List all there is, and read the report and the sifter's list if they are there.

    Raises:
        UserError: a folder or file that is missing or is not what it should be; users who do not fit.
    """
    train = list_folder(config.real_dir, "--real_dir")
    names = train.class_names
    real = {TRAINING: _files(train.paths, train.labels, config.real_dir), HELDOUT: []}
    if config.heldout_dir:
        found = list_folder(config.heldout_dir, "--heldout_dir")
        labels = _renumbered(np.array(found.labels), found.class_names, names, "--heldout_dir")
        if labels is None:
            raise UserError("--heldout_dir shows none of the users of --real_dir; give other sessions of the same")
        real[HELDOUT] = _files(found.paths, labels, config.heldout_dir)
    made = _generated(config.samples, names)
    home = beside(config.samples, ".")
    told = _find_report(config.report, home)
    accepted = _find_accepted(told, home)
    warnings = _other_images(told, {kind: len(items) for kind, items in {**real, GENERATED: made}.items()})
    near = _nearest(told, made, len(real[TRAINING])) if told and not warnings else {}

    pictures, of_each = [], {name: {TRAINING: [], HELDOUT: [], GENERATED: []} for name in names}
    if any(item.label is None for item in made):
        of_each.setdefault(NOBODY, {TRAINING: [], HELDOUT: [], GENERATED: []})
        warnings.append(f"the samples are unlabelled: to see each beside its user, give {LABELS} of --real_dir")
    for kind, items in {**real, GENERATED: made}.items():
        for place, item in enumerate(items):
            of_each[NOBODY if item.label is None else names[item.label]][kind].append(len(pictures))
            more = _judged(item, accepted) | near.get(place, {}) if kind == GENERATED else {}
            pictures.append(Picture(kind, item.name, item.source, **more))
    judged = sum(picture.accepted is not None for picture in pictures)
    if accepted and judged < len(made):
        warnings.append(f"accepted.csv tells of {judged} of the {len(made)} generated images: is it of others?")
    about = {"samples": config.samples, "real images": config.real_dir, "held out": config.heldout_dir}
    about["report"] = str(told.path) if told else ""
    people = [_person(name, numbers, told) for name, numbers in of_each.items()]
    lines, notes = (told.lines, told.notes) if told else ([], [])
    return Gallery(pictures, people, lines, notes, warnings, {name: path for name, path in about.items() if path})


def _person(name: str, numbers: dict[str, list[int]], told: Told | None) -> Person:
    if told is None:
        return Person(name, numbers)
    of_user = [
        Table(title=t.title, header=t.header[1:], rows=rows)
        for t in told.tables
        if (rows := [row[1:] for row in t.rows if row[0] == name])
    ]
    return Person(name, numbers, told.right.get(name), told.right_real.get(name), of_user)


# ---- images ----------------------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """An image before it has a number: name, place to read it from, whose it is, and its row in the .npz if known."""

    name: str
    source: Path | np.ndarray
    label: int | None
    row: str = ""


def _files(paths: Iterable[str], labels, folder) -> list[_Item]:
    """Items of files, named by their places in the folder."""
    known = [None if label is None else int(label) for label in labels]
    return [
        _Item(Path(path).relative_to(folder).as_posix(), Path(path), k) for path, k in zip(paths, known, strict=True)
    ]


def _renumbered(labels, class_names: list[str] | None, names: list[str], flag: str) -> np.ndarray | None:
    """Labels as places in `names`; see `renumber`."""
    return renumber(ImageSet(np.empty(0), labels, class_names), names, flag).labels


def _generated(samples: str, names: list[str]) -> list[_Item]:
    """Generated images: files, or rows of an .npz; the sampler's manifest tells which row is which file."""
    home = beside(samples, ".")
    manifest = {row["file"]: row for row in read_manifest(home)} if samples else {}
    if samples and Path(samples).is_dir():
        return _generated_files(Path(samples), home, manifest, names)
    images = read_samples(samples)
    files = {row["row"]: name.removeprefix("png/") for name, row in manifest.items() if name}
    files = files if len(files) == len(images.pixels) else {}
    labels = _renumbered(images.labels, None, names, "--samples")
    whose = [None] * len(images.pixels) if labels is None else labels.tolist()
    return [
        _Item(files.get(str(row), f"image {row}"), pixels, label, str(row))
        for row, (pixels, label) in enumerate(zip(images.pixels, whose, strict=True))
    ]


def _generated_files(samples: Path, home: Path, manifest: dict[str, dict], names: list[str]) -> list[_Item]:
    """Whose they are says the manifest before folders do.

    A name that no file system takes is another name there, and one user's folder alone is not seen as a user.
    """
    inner = pngs_of(samples, "--samples")
    found = list_folder(inner, "--samples")
    listed = [manifest.get(Path(path).relative_to(home).as_posix(), {}) for path in found.paths]
    labels, classes = found.labels, found.class_names
    if all(listed):
        users = [row["user"] or "" for row in listed]
        classes = sorted(set(users))
        number = {user: place for place, user in enumerate(classes)}
        labels = [number[user] for user in users]
    whose = _renumbered(np.array(labels), classes, names, "--samples")
    items = _files(found.paths, [None] * len(labels) if whose is None else whose, inner)
    return [item._replace(row=row.get("row") or "") for item, row in zip(items, listed, strict=True)]


# ---- what is said of them --------------------------------------------------------------------------------------------


def _find_report(given: str, home: Path) -> Told | None:
    """The report that is given; else the first that lies by the samples, the fuller kind first."""
    if given:
        return read_report(given)
    above = home / ".." if home.name in ("", "..") else home.parent  # of the folder that one stands in: not itself
    places = [home / "validation", home / "report", home, above / "validation", above / "report"]
    found = (place / "report.json" for place in places)
    path = next((path for path in found if path.is_file()), None)
    return read_report(path) if path else None


def _other_images(told: Told | None, here: dict[str, int]) -> list[str]:
    """A note if a report is about other images than those that are here."""
    counted = {kind: n for kind, n in (told.counts if told else {}).items() if here.get(kind) and n != here[kind]}
    said = ", ".join(f"{n} {kind} images where {here[kind]} are here" for kind, n in counted.items())
    return [f"the report is about other images: {said}"] if counted else []


def _find_accepted(told: Told | None, home: Path) -> dict[str, tuple[bool, str]]:
    """The sifter's list by the report or by the samples: name or row -> whether accepted, and why not.

    Raises:
        UserError: it is something else.
    """
    places = [told.path.parent] if told else []
    path = next((p for place in [*places, home / "validation"] if (p := place / "accepted.csv").is_file()), None)
    if path is None:
        return {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as handle:
            header, *rows = csv.reader(handle)
        if header != ACCEPTED or not all(len(row) == 3 and row[1] in ("0", "1") for row in rows):
            raise ValueError("its lines are not image,accepted,reason")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not the sifter's list ({error}): validate again, or remove it") from error
    return {image: (accepted == "1", reason) for image, accepted, reason in rows}


def _judged(item: _Item, accepted: dict[str, tuple[bool, str]]) -> dict[str, Any]:
    """What the sifter said of an image, which it knew as a file or as a row."""
    found = accepted.get(item.name) or accepted.get(item.row)
    return {"accepted": found[0], "reason": found[1]} if found else {}


def _nearest(told: Told, made: list[_Item], count: int) -> dict[int, dict[str, Any]]:
    """Place of a generated image -> the training picture that the report found nearest (training comes first)."""
    if told.of_rows:
        place_of = {item.row: place for place, item in enumerate(made)}
    else:  # files are read in their order; what is only a row of an .npz has no place among them
        files = [place for place, item in enumerate(made) if Path(item.name).suffix]
        files.sort(key=lambda place: Path(made[place].name))
        place_of = {str(i): place for i, place in enumerate(files)}
    return {
        place_of[str(near.generated)]: {"near": near.training, "near_words": near.words}
        for near in told.near
        if str(near.generated) in place_of and 0 <= near.training < count
    }
