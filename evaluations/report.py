"""What an evaluation found: a table of numbers between their floor and their ceiling, report.json, and a picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from guided_diffusion_vae.checkpoint import atomic_write

from .findings import ABOVE, Finding
from .glossary import terms_of
from .image_sets import ImageSet

GENERATED, SAME, OTHER = "generated", "real, same sessions", "real, other sessions"
SPLIT, SHUFFLED = "real, split at random", "real, pixels shuffled"
HELD_OUT = "held-out images"  # what OTHER is called where nothing tells that they are of other sessions
ROWS = (GENERATED, SAME, OTHER, SPLIT, SHUFFLED)
USERS_IN_A_COLUMN, MOST_USERS = 16, 64  # of the picture


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one set of images scores; None where a number has no meaning."""

    user_accuracy: float | None = None  # share that the judge names as their user
    fd_user: float | None = None  # Frechet distance to real images of other sessions
    kid_user: float | None = None  # kernel distance to them
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    nearest: float | None = None  # median distance to the nearest training image; held-out real images: 1
    near_copies: float | None = None  # share much nearer to one training image than to others


FORMATS = {
    "user_accuracy": "{:.1%}",
    "fd_user": "{:.2f}",
    "kid_user": "{:.4f}",
    "precision": "{:.3f}",
    "recall": "{:.3f}",
    "density": "{:.3f}",
    "coverage": "{:.3f}",
    "nearest": "{:.2f}",
    "near_copies": "{:.1%}",
}
TITLES = {"user_accuracy": "user accuracy", "fd_user": "FD_user", "kid_user": "KID_user", "near_copies": "near copies"}
ABOUT = {
    "user_accuracy": "share of generated images that a classifier of real ones names right; real: held-out images",
    "nearest": "median distance to the nearest training image, in units of what held-out real images have",
    "near_copies": "share that is three times nearer to one training image than to its 50 nearest on average",
}


@dataclass(frozen=True)
class Report:
    """The scores of every set, what they stand on, and what to beware of."""

    rows: dict[str, Scores]
    about: dict[str, Any]  # numbers and words
    accuracy_per_user: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)  # 95 %, of scores of GENERATED

    @property
    def heldout_is(self) -> str:
        """What the held-out images are, in two words: of other sessions only where file names tell so."""
        return str(self.about.get("heldout_is", HELD_OUT))

    @property
    def compared_with(self) -> str:
        """What the distances are of, in words."""
        where = self.heldout_is if self.heldout_is == HELD_OUT else f"of {self.heldout_is}"
        return f"{self.about['compared']} images against {self.about['heldout_images']} {where}"

    def finding(self, key: str) -> Finding:
        """A score of the generated images between the ends that belong to it: real images and the worst."""
        identity, copies = key == "user_accuracy", key in ("nearest", "near_copies")
        of = {name: getattr(scores, key) for name, scores in self.rows.items()}
        return Finding(
            name=TITLES.get(key, key),
            value=of[GENERATED],
            real=of.get(OTHER if identity else SAME),
            worst=self.about["chance"] if identity else None if copies else of.get(SHUFFLED),
            worst_is="chance" if identity else "" if copies else "shuffled",
            interval=self.intervals.get(key),
            form=FORMATS[key],
            distance=key in ("fd_user", "kid_user"),
            above=ABOVE if identity else "",
            about=ABOUT.get(key, self.compared_with),
        )

    def __str__(self) -> str:
        about, names = self.about, [name.removeprefix("real, ") for name in self.rows]
        names = [self.heldout_is if name == OTHER.removeprefix("real, ") else name for name in names]
        lines = [
            " " * 30 + "    real images:",
            " " * 14 + "".join(f"{name:>16}" for name in names),
            *(
                f"{TITLES.get(key, key):<14}"
                + "".join(f"{cell(form, getattr(scores, key)):>16}" for scores in self.rows.values())
                for key, form in FORMATS.items()
            ),
            *self._in_words(),
            f"user accuracy: share of all images that the judge names right; chance is {about['chance']:.1%}",
            f"FD_user to coverage: {self.compared_with}{self._left_out()}",
            *(f"{term}: {words}" for term, words in terms_of(TITLES.get(key, key) for key in FORMATS).items()),
            f"feature space: {about['feature_space']}",
            *(f"{TITLES.get(key, key)}: {ABOUT[key]}" for key in ("nearest", "near_copies")),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _in_words(self) -> list[str]:
        """The two scores that are asked for first, with their intervals and verdicts."""
        lines = []
        for key, real in (("user_accuracy", self.heldout_is), ("fd_user", SAME.removeprefix("real, "))):
            f = self.finding(key)
            if f.value is None:
                continue
            span = f" (95 %: {' to '.join(map(f.shown, f.interval))})" if f.interval else ""
            ends = f"real images, {real}, {f.shown(f.real)}; {f.worst_is} {f.shown(f.worst)}"
            lines.append(f"{f.name} {f.shown(f.value)}{span}: {f.verdict} ({ends})")
        return lines

    def _left_out(self) -> str:
        """Why fewer images are compared than there are: a sentence, or nothing."""
        compared, made = self.about["compared"], self.about.get("generated_images", 0)
        if compared >= made:
            return ""
        few = "held-out images" if compared == self.about["heldout_images"] else "real images that the judge never saw"
        return (
            f"; of {made} generated ones {compared}, evenly of all users, as there are only so many {few}, and"
            " distances compare at one number alone"
        )

    def save(self, path) -> None:
        """Write the whole report as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            handle.write(json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())


def cell(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def comparison(
    real: ImageSet, samples: ImageSet, *, each: int = 4, most: int = MOST_USERS, title: str = "real (training)"
) -> Image.Image:
    """Real beside generated: a row for each user, real images on the left, generated ones on the right.

    Args:
        most: users that are shown; of more, these are spread evenly.
    """
    shown = min(most, len(real.class_names))
    users = np.arange(shown) * len(real.class_names) // shown
    height, width = samples.pixels.shape[1:3]
    gap, top, margin = 4, 16, 68  # pixels
    half = each * (width + gap) + 3 * gap
    rows, blocks = min(shown, USERS_IN_A_COLUMN), -(-shown // USERS_IN_A_COLUMN)
    sheet = Image.new("RGB", (blocks * (margin + 2 * half), top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, user in enumerate(users):
        block, row = divmod(number, USERS_IN_A_COLUMN)
        left, y = block * (margin + 2 * half), top + row * (height + gap)
        draw.text((left + gap, y + height // 2 - 6), real.class_names[user][:10], fill="black")
        places = np.flatnonzero(real.labels == user)
        places = places[:: max(1, len(places) // each)][:each]  # from all sessions
        if samples.labels is None:
            generated = np.arange(len(samples.pixels))[number * each : (number + 1) * each]
        else:
            generated = np.flatnonzero(samples.labels == user)[:each]
        made = "generated" if samples.labels is not None else "generated, of anybody"
        for x, words, images in (
            (left + margin, title, real.pixels[places]),
            (left + margin + half, made, samples.pixels[generated]),
        ):
            if row == 0:
                draw.text((x, 2), words, fill="black")
            for place, image in enumerate(images):
                sheet.paste(Image.fromarray(image), (x + place * (width + gap), y))
    return sheet


def save_picture(picture: Image.Image, path) -> None:
    """Write a PNG, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        picture.save(handle, format="PNG")
