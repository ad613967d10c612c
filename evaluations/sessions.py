"""Do two sets of images come from the same recordings? What the names of their files tell.

Held-out images of a recording that was learned from are no test of another day: a judge knows the day, too.
"""

import re
from pathlib import PurePath
from typing import NamedTuple

from .image_sets import ImageSet


class Recordings(NamedTuple):
    """What file names tell of two sets: whether anything, and which (user, recording) both have."""

    told: bool
    both: list[tuple[str, str]]

    @property
    def apart(self) -> bool:
        """Whether they truly are of other recordings."""
        return self.told and not self.both


def recordings_of(known: ImageSet, new: ImageSet, names: dict[str, list[str]] | None = None) -> Recordings:
    """Compare the recordings of two sets.

    Args:
        names: "known" and "new": names of the images' files; None: those of the sets, if they have any.
    """
    names = names or {key: files for key, s in (("known", known), ("new", new)) if (files := s.files) is not None}
    if len(names) < 2:
        return Recordings(False, [])
    found, silent = {}, 0
    for key, images in (("known", known), ("new", new)):
        users = [""] * len(images.pixels) if images.labels is None else [images.class_names[i] for i in images.labels]
        pairs = zip(users, names[key], strict=True)
        told = [(user, recording_of(name, user)) for user, name in pairs]
        found[key] = {(user, recording) for user, recording in told if recording}
        silent += sum(recording is None for _, recording in told)
    if len({recording for _, recording in found["known"] | found["new"]}) == 1:  # in every name: it tells nothing
        return Recordings(False, [])
    both = sorted(found["known"] & found["new"])
    return Recordings(bool(both) or not silent, both)  # one silent name may be of any recording


def recording_of(name: str, user: str) -> str | None:
    """What recording a path tells of: the folders below the user's, and what comes before the file name's last number.

    The latter only where it has a number, too; the user's name says nothing, however it is written; None: nothing does.

    user_00_s02_0004.png -> s02, 002_f00024.png -> 002, user_00/walk/0004.png -> walk, radar_User00_7.png -> None
    """
    whose = _however_written(user)
    *folders, file = PurePath(name).parts
    below = next((place + 1 for place, folder in enumerate(folders) if whose.fullmatch(folder)), len(folders))
    stem = re.sub(r"[ _.-]+", "_", whose.sub("_", PurePath(file).stem)).strip("_")
    found = re.fullmatch(r"(.*?\d.*?)_*[A-Za-z]*(?<!\d)\d+", stem)
    return "/".join(folders[below:] + ([found.group(1)] if found else [])) or None


def _however_written(user: str) -> re.Pattern:
    """Finds a user's name in any case, and with any separators: user_03, User 3, USER03."""
    words = re.findall(r"[^\W\d_]+|\d+", user)
    parts = [rf"0*{int(word)}(?!\d)" if word.isdigit() else rf"{word}(?![^\W\d_])" for word in words]
    return re.compile(r"(?<![^\W_])" + r"[\W_]*".join(parts) if parts else r"(?!)", re.IGNORECASE)
