"""Who and when: users and sessions of recordings, and which of their pictures are held out.

Sessions are split, not pictures: of every user the last session is for testing and the one before it for validation.
Pictures of a single session can only be split in time, with a gap wherever two of them would share a pulse.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from ..config import UserError, first_few, words_of
from .image_folder import list_images

SPLITS = ("train", "val", "test")
HELD_OUT = 0.15  # of a single session, for each of val and test
SESSION = re.compile(r"(?i)(s|sess|session|d|day|date|trial|visit)-?\d+$")


class Source(NamedTuple):
    """A recording."""

    path: Path
    user: str
    session: str
    name: str  # of its pictures, before their number


class Take(NamedTuple):
    """What can be cut from a recording: pictures that begin at `starts_s`, each made of `length_s` of it."""

    source: Source
    starts_s: tuple[float, ...]
    length_s: float


class Picture(NamedTuple):
    file: str  # below --out_dir
    split: str
    start_s: float  # of its first column, from the recording's first pulse


def find_sources(data_dir: str, extensions) -> list[Source]:
    """All recordings with user, session and name, in order.

    A session is the folder below the user's, or else the part of the file name that looks like one (s01, day2), or else
    the part before the last; without any, a user has one session, called ''.

    Raises:
        UserError: no recordings, or two that would be called the same.
    """
    folder, sources = list_images(data_dir, extensions, "recordings"), []
    for file, label in zip(folder.paths, folder.labels, strict=True):
        user, path = folder.class_names[label], Path(file)
        below = path.relative_to(data_dir)
        folders = [name for place, name in enumerate(below.parts[:-1]) if place or name != user]
        words = below.stem.removeprefix(user).strip("_").split("_")
        session = [*folders[:1], *filter(SESSION.match, words), *words[-2:-1], ""][0]
        sources.append(Source(path, user, session, "_".join([*folders, below.stem])))
    twice = [key for key, count in Counter((s.user, s.name) for s in sources).items() if count > 1]
    if twice:
        raise UserError(f"--data_dir {data_dir}: two recordings of {twice[0][0]} are called {twice[0][1]}; rename one")
    return sources


def plan_pictures(takes: list[Take], val_sessions: str, test_sessions: str, say) -> dict[Source, list[Picture]]:
    """The pictures of every recording, sessions apart.

    Args:
        val_sessions, test_sessions: names, split by commas; both empty: the last ones of every user.
    """
    sessions = defaultdict(list)  # (user, session) -> its takes, in order
    for take in takes:
        sessions[take.source.user, take.source.session].append(take)
    split_of = split_sessions(list(sessions), words_of(val_sessions), words_of(test_sessions))
    plan: dict[Source, list[Picture]] = {take.source: [] for take in takes}
    alone = [user for user, session in sessions if not split_of[user, session]]
    for key, parts in sessions.items():
        moments = [(take, start) for take in parts for start in take.starts_s]
        splits = [split_of[key]] * len(moments) if split_of[key] else blocks(moments)
        number = Counter()
        for (take, start), split in zip(moments, splits, strict=True):
            user, name, place = take.source.user, take.source.name, number[take.source]
            picture = Picture(f"{split}/{user}/{name}_{place:04d}.png", split, start)
            plan[take.source] += [picture] if split else []
            number[take.source] += 1
    for split in SPLITS:
        names = sorted({session for (_, session), where in split_of.items() if where == split}, key=_natural)
        if names:
            say(f"sessions for {split}: {first_few(names)}")
    if alone:
        say(
            f"{len(alone)} users have one session ({first_few(alone)}): val and test are its last parts, and what is"
            " scored on them is an upper bound; record another day"
        )
    return plan


def split_sessions(keys: list[tuple[str, str]], val=(), test=()) -> dict[tuple[str, str], str]:
    """(user, session) -> split; '' for a user's only session, which is to be split in time.

    Raises:
        UserError: a session that is not there, or for both; a user with none left for training.
    """
    known = sorted({session for _, session in keys}, key=_natural)
    for split, names in (("val", val), ("test", test)):
        for name in names:
            if name not in known:
                there = first_few([session for session in known if session]) or "none"
                raise UserError(f"--{split}_sessions {name} is not there; there are {there}")
            if name in val and name in test:
                raise UserError(f"--{split}_sessions {name} is for both val and test; name it once")
    users = {user: sorted((s for owner, s in keys if owner == user), key=_natural) for user, _ in keys}
    result = {}
    for user, own in users.items():
        if val or test:
            splits = ["val" if session in val else "test" if session in test else "train" for session in own]
        elif len(own) > 1:
            splits = ["train"] * max(1, len(own) - 2) + ["val"] * (len(own) > 2) + ["test"]
        else:
            splits = [""]
        if not {"train", ""} & set(splits):
            raise UserError(f"--val_sessions and --test_sessions leave {user} nothing to train on; name fewer")
        result |= {(user, session): split for session, split in zip(own, splits, strict=True)}
    return result


def blocks(moments: list[tuple[Take, float]]) -> list[str]:
    """The split of each picture of a single session: the last part for testing, the one before it for validation.

    A picture that shares pulses with one of the next part is left out (''); with too few pictures all are for training.
    """
    held = max(1, round(HELD_OUT * len(moments)))
    splits, place = [""] * len(moments), len(moments)
    for split, count in (("test", held), ("val", held), ("train", len(moments))):
        later = moments[place] if place < len(moments) else None
        while place and later and _share(moments[place - 1], later):
            place -= 1
        first = max(0, place - count)
        splits[first:place], place = [split] * (place - first), first
    return splits if "train" in splits else ["train"] * len(moments)


def _share(earlier: tuple[Take, float], later: tuple[Take, float]) -> bool:
    return earlier[0] is later[0] and later[1] - earlier[1] < later[0].length_s


def _natural(name: str):
    """s2 before s10."""
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in re.split(r"(\d+)", name)]
