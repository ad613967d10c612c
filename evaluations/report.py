"""What an evaluation found: a table of numbers between their floor and their ceiling, report.json, and a picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from guided_diffusion_vae.checkpoint import atomic_write

from .image_sets import ImageSet

GENERATED, SAME, OTHER = "generated", "real, same sessions", "real, other sessions"
SPLIT, SHUFFLED = "real, split at random", "real, pixels shuffled"
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


@dataclass(frozen=True)
class Report:
    """The scores of every set, what they stand on, and what to beware of."""

    rows: dict[str, Scores]
    about: dict[str, int | float | str]
    accuracy_per_user: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        about, names = self.about, [name.removeprefix("real, ") for name in self.rows]
        lines = [
            " " * 30 + "    real images:",
            " " * 14 + "".join(f"{name:>16}" for name in names),
            *(
                f"{TITLES.get(key, key):<14}"
                + "".join(f"{cell(form, getattr(scores, key)):>16}" for scores in self.rows.values())
                for key, form in FORMATS.items()
            ),
            f"user accuracy: share of all images that the judge names right; chance is {about['chance']:.1%}",
            f"FD_user to coverage: {about['compared']} images against {about['heldout_images']} of other sessions",
            f"feature space: {about['feature_space']}",
            "nearest: median distance to the nearest training image, in units of what held-out real images have",
            "near copies: share that is three times nearer to one training image than to its 50 nearest on average",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

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
