"""The gallery shows what is there, to whom it may, and runs nothing that is not its own."""

import base64
import contextlib
import csv
import hashlib
import http.client
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, draw_users, script
from PIL import Image

from evaluations.findings import Finding, Section, Table
from evaluations.gallery_contents import GalleryConfig, collect
from evaluations.gallery_page import page_of_all, page_of_one, thumbs_of
from evaluations.gallery_report import HELDOUT, TRAINING, read_report
from evaluations.gallery_server import Embedded, Served, Server, answer, serve, write
from evaluations.html import as_dict, write_json
from evaluations.report import GENERATED, OTHER, SAME, SHUFFLED, SPLIT, Report, Scores
from evaluations.validation import TITLE, in_short
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import read_rgb
from guided_diffusion_vae.sample_util import Batch, PngWriter, save_manifest, save_samples

EVIL = "<script>alert(1)<&\"'"  # a folder's name may hold all but a slash
USERS = [EVIL, "line\nbreak", "user_07", "Ænne 数"]  # in the order of a class list
EACH = {TRAINING: 5, HELDOUT: 2, GENERATED: 4}


def draw_samples(folder, users, each, size=32):
    """What the sampler writes: PNGs with their manifest and an .npz, users in turn. Returns the folder."""
    labels = np.arange(each * len(users)) % len(users)
    pixels = np.random.RandomState(1).randint(0, 255, (len(labels), size, size, 3)).astype(np.uint8)
    batch = Batch(pixels, labels)
    files = [f"png/{name}" for name in PngWriter(folder / "png", users).write(batch)]
    save_manifest(folder, files, batch, users, {"seed": 0})
    save_samples(folder, batch)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a gallery of four users with awkward names."""
    root = tmp_path_factory.mktemp("gallery")
    draw_users(root / "train", USERS, EACH[TRAINING])
    draw_users(root / "test", USERS, EACH[HELDOUT])
    draw_samples(root / "samples", USERS, EACH[GENERATED])
    return {name: str(root / part) for name, part in (("real_dir", "train"), ("heldout_dir", "test"))} | {
        "samples": str(root / "samples")
    }


def gallery_of(world, **more):
    return collect(GalleryConfig(**{**world, **more}))


def words(world, **more):
    return [str(word) for name, value in {**world, **more}.items() for word in (f"--{name}", value)]


# ---- what there is ---------------------------------------------------------------------------------------------------


def test_every_picture_is_listed_under_its_user(world):
    """Also of users whose folder of samples has another name, for no system takes theirs."""
    gallery = gallery_of(world)
    assert [person.name for person in gallery.people] == sorted(USERS)
    for person in gallery.people:
        assert {kind: len(numbers) for kind, numbers in person.pictures.items()} == EACH
        assert {gallery.pictures[n].kind for n in person.pictures[HELDOUT]} == {HELDOUT}
        assert {gallery.pictures[n].name for n in person.pictures[TRAINING]} == {
            f"{person.name}/{i}.png" for i in range(5)
        }
    assert sorted(n for p in gallery.people for ns in p.pictures.values() for n in ns) == list(range(44))
    assert {kind: gallery.count(kind) for kind in EACH} == {kind: 4 * n for kind, n in EACH.items()}


def test_the_samples_are_those_of_the_user(world):
    """A user's generated pictures, told by pixels, are the rows of the .npz with his label; and so from the .npz."""
    (path,) = Path(world["samples"]).glob("*.npz")
    with np.load(path) as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    for samples in (world["samples"], str(path)):
        gallery = gallery_of(world, samples=samples)
        for person in gallery.people:
            shown = [gallery.pictures[n] for n in person.pictures[GENERATED]]
            expected = pixels[labels == USERS.index(person.name)]
            assert np.array_equal([np.asarray(picture.read()) for picture in shown], expected)
            assert len({picture.name for picture in shown}) == 4 and all(p.name.endswith(".png") for p in shown)


def test_one_users_samples_alone_are_his(world, tmp_path):
    """Which a folder's name alone would not tell."""
    draw_samples(tmp_path / "samples", ["user_07"], 3)
    gallery = gallery_of(world, samples=str(tmp_path / "samples"))
    assert [len(person.pictures[GENERATED]) for person in gallery.people] == [
        3 * (n == "user_07") for n in sorted(USERS)
    ]


def test_samples_of_nobody_stand_alone_and_a_line_says_why(world, tmp_path):
    draw_users(tmp_path, ["made"], 3)
    gallery = gallery_of(world, samples=str(tmp_path / "made"))
    assert gallery.people[-1].name == "unlabelled" and len(gallery.people[-1].pictures[GENERATED]) == 3
    assert gallery.count(GENERATED) == 3 and "unlabelled" in gallery.warnings[0]
    assert "4 users; images: 20 training, 8 held out, 3 generated" in page_of_all(gallery, Served(gallery))


def test_nothing_is_read_before_it_is_asked_for(world, monkeypatch):
    opened, whole = [], Image.open

    def watch(path, *args, **kwargs):
        opened.append(Path(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", watch)
    gallery = gallery_of(world)
    at = Served(gallery)
    page_of_all(gallery, at)
    assert not opened
    page_of_one(gallery, at, 2)
    assert len(opened) == sum(EACH.values()) + 1  # and the size of the first generated one
    assert {path.parent.name for path in opened} >= {gallery.people[2].name}


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"samples": ""}, "--samples is empty"),
        ({"samples": "/nowhere"}, "--samples /nowhere does not exist"),
        ({"real_dir": ""}, "--real_dir is empty"),
        ({"real_dir": "/nowhere"}, "--real_dir /nowhere does not exist"),
        ({"heldout_dir": "{other}"}, "--heldout_dir shows none of the users"),
        ({"report": "/nowhere"}, "--report /nowhere does not exist"),
        ({"port": 65536}, "--port is 65536"),
        ({"port": -1}, "--port is -1"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_the_flag(world, tmp_path, flags, words):
    other = draw_users(tmp_path, ["x", "y"], 1)
    flags = {name: value.format(other=other) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(UserError, match=f"^{words}"):
        gallery_of(world, **flags)


# ---- what reports say ------------------------------------------------------------------------------------------------


def short_report(path, users=USERS, intervals=None, **about):
    """As evaluate_samples.py writes it."""
    scores = {
        GENERATED: Scores(user_accuracy=0.5, fd_user=4.0, precision=0.5, near_copies=0.25),
        SAME: Scores(user_accuracy=1.0, fd_user=1.0, precision=0.5, near_copies=0.0),
        OTHER: Scores(user_accuracy=0.9),
        SPLIT: Scores(fd_user=0.75),
        SHUFFLED: Scores(fd_user=16.0, precision=0.0),
    }
    counts = {"training_images": 20, "heldout_images": 8, "generated_images": 16}
    about = {"chance": 0.25, "compared": 8, **counts, **about}
    right = {GENERATED: dict(zip(users, (0.5, 1.0, 0.25, 0.75), strict=True)), OTHER: dict.fromkeys(users, 0.75)}
    Report(scores, about, right, ["beware"], intervals or {}).save(path / "report.json")
    return path


def whole_report(path, samples="runs/samples", near=(), twins=(), users=USERS):
    """As validate.py writes it, of some parts."""
    finding = Finding(name="TRTS", value=0.5, real=0.9, worst=0.1, worst_is="chance", form="{:.1%}", above="odd")
    beyond = Finding(name="near copies", value=9.0, real=1.0, worst=0.0, interval=(8, 10), above="above: look why")
    rows = [[user, 5, 2, 4, 0.75, right] for user, right in zip(users, (0.5, 1.0, 0.25, None), strict=True)]
    header = ["user", "training", "held out", "generated", "TRTR", "TRTS"]
    named = Table(title="accuracy of each user", header=header, rows=rows)
    pairs = {"generated": [i for i, _ in near], "train": [j for _, j in near], "distances": [0.5] * len(near)}
    copies = [{"new_place": i, "known_place": j, "kind": kind} for i, j, kind in twins]
    parts = [
        Section(title="What a classifier learns", findings=[finding], tables=[named], notes=["of the classifier"]),
        Section(title="Memorisation", findings=[beyond], data={"closest_pairs": pairs, "twins": copies}),
    ]
    sections = [in_short(parts, ["leaks"]), *parts]
    write_json(path / "report.json", as_dict(TITLE, sections, {"samples": samples, "skip_bad_images": False}))
    return path


def test_a_short_report_with_floor_ceiling_and_verdicts(tmp_path):
    told = read_report(short_report(tmp_path))
    lines = {line.name: line for line in told.lines}
    accuracy, distance, copies = (lines[name] for name in ("user accuracy", "FD_user", "near copies"))
    assert accuracy[2:6] == ("50.0%", "90.0%", "25.0%", "chance")
    assert accuracy.place == pytest.approx((0.5 - 0.25) / (0.9 - 0.25))
    assert accuracy.verdict == "nearer to the worst than to real images"
    assert distance[2:6] == ("4.00", "1.00", "16.00", "shuffled") and "0.75, the floor" in distance.about
    assert distance.place == pytest.approx(0.5)  # of logarithms: 4 is as far from 1 as from 16
    assert distance.verdict == "nearer to real images than to the worst"
    assert lines["precision"].verdict == "as real images"
    assert copies[2:] == ("25.0%", "0.0%", "-", "", None, "")
    assert lines["recall"].value == "-" and "beware" in told.notes
    assert told.right == dict(zip(USERS, (0.5, 1.0, 0.25, 0.75), strict=True)) and told.right_real[EVIL] == 0.75
    assert told.counts == {TRAINING: 20, HELDOUT: 8, GENERATED: 16}


def test_verdicts_of_a_short_report_are_those_of_its_intervals(tmp_path):
    intervals = {"user_accuracy": (0.4, 0.95), "fd_user": (2.0, 8.0), "precision": None}
    lines = {line.name: line for line in read_report(short_report(tmp_path, intervals=intervals)).lines}
    assert lines["user accuracy"].verdict == "not distinguishable from real images"
    assert lines["FD_user"].verdict == "between the worst and real images"


def test_a_whole_report_is_quoted(tmp_path):
    told = read_report(whole_report(tmp_path / "sub") / "report.json")
    question, copies = told.lines
    assert question[:6] == ("Do they show the right person?", "TRTS", "50.0%", "90.0%", "10.0%", "chance")
    assert question.place == pytest.approx(0.5) and question.verdict == "nearer to real images than to the worst"
    assert copies.place is None and copies.verdict == "above: look why"
    assert told.right == dict(zip(USERS[:3], (0.5, 1.0, 0.25), strict=True)) and told.right_real[EVIL] == 0.75
    assert told.counts == {TRAINING: 20, HELDOUT: 8, GENERATED: 16}
    assert told.notes[0] == "unfinished: leaks not there yet" and not any(n.startswith("Do they") for n in told.notes)


def test_a_whole_report_without_answers_shows_its_findings(tmp_path):
    finding = Finding(name="cadence", value=0.5, real=0.25, worst=1.0, worst_is="shuffled")
    sections = [Section(title="Physics of gait", findings=[finding])]
    write_json(tmp_path / "report.json", as_dict(TITLE, sections, {}))
    (line,) = read_report(tmp_path).lines
    assert line[2:6] == ("0.5", "0.25", "1", "shuffled") and line.place == pytest.approx(2 / 3)
    file = tmp_path / "report.json"
    file.write_text(file.read_text().replace("0.5", "1e999"))
    assert read_report(tmp_path).lines[0].value == "-"


def test_a_person_has_what_the_report_says_of_him(world, tmp_path):
    gallery = gallery_of(world, report=str(whole_report(tmp_path)))
    people = {person.name: person for person in gallery.people}
    assert [people[user].right for user in USERS] == [0.5, 1.0, 0.25, None] and not gallery.warnings
    (table,) = people["user_07"].tables
    assert table.header[0] == "training" and table.rows == [[5, 2, 4, 0.75, 0.25]]


def test_a_report_by_the_samples_is_found_the_fuller_first(world, tmp_path):
    samples = tmp_path / "run" / "samples"
    shutil.copytree(world["samples"], samples)
    assert not gallery_of(world, samples=str(samples)).lines
    for place, write_report in (("../report", short_report), ("report", short_report), ("validation", whole_report)):
        write_report(samples / place)
        for given in (samples, next(samples.glob("*.npz"))):
            path = Path(gallery_of(world, samples=str(given)).about["report"])
            assert path.resolve() == (samples / place / "report.json").resolve()


def test_a_report_of_other_images_is_said_to_be(world, tmp_path):
    report = str(short_report(tmp_path, generated_images=99))
    assert gallery_of(world, report=report).warnings == [
        "the report is about other images: 99 generated images where 16 are here"
    ]


def test_the_nearest_training_image_of_files_and_of_rows(world, tmp_path):
    """Places of files are those of the sorted names, places of rows those of the .npz."""
    (npz,) = Path(world["samples"]).glob("*.npz")
    names = sorted(p.relative_to(f"{world['samples']}/png") for p in Path(world["samples"], "png").rglob("*.png"))
    with open(Path(world["samples"]) / "manifest.csv", newline="") as handle:
        rows = [row["file"].removeprefix("png/") for row in csv.DictReader(handle)]
    assert all(rows[place] != str(names[place]) for place in (1, 6))
    for told_of, order in ((world["samples"], names), (npz, rows)):
        report = whole_report(tmp_path, str(told_of), near=[(1, 3), (6, 4)], twins=[(6, 7, "exact")])
        for shown in (world["samples"], str(npz)):
            gallery = gallery_of(world, samples=shown, report=str(report))
            near = {p.name: (p.near, p.near_words) for p in gallery.pictures if p.near is not None}
            assert near == {
                str(order[1]): (3, "nearest training image"),
                str(order[6]): (7, "training image: exact twin"),
            }
            assert gallery.pictures[7].kind == TRAINING


def accept(folder, images, accepted):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "accepted.csv", "w") as handle:
        rows = zip(images, accepted, strict=True)
        csv.writer(handle).writerows(
            [["image", "accepted", "reason"], *([n, int(ok), "" if ok else "torso below"] for n, ok in rows)]
        )


def test_the_sifters_list_by_name_and_by_row(world, tmp_path):
    samples = tmp_path / "samples"
    shutil.copytree(world["samples"], samples)
    plain = gallery_of(world, samples=str(samples))
    made = [picture.name for picture in plain.pictures if picture.kind == GENERATED]
    with open(samples / "manifest.csv", newline="") as handle:
        row_of = {row["file"].removeprefix("png/"): row["row"] for row in csv.DictReader(handle)}
    accepted = [i % 3 == 0 for i in range(len(made))]
    for names in (made, [row_of[name] for name in made]):
        accept(samples / "validation", names, accepted)
        for given in (samples, next(samples.glob("*.npz"))):
            gallery = gallery_of(world, samples=str(given))
            said = {p.name: (p.accepted, p.reason) for p in gallery.pictures if p.kind == GENERATED}
            assert said == {n: (ok, "" if ok else "torso below") for n, ok in zip(made, accepted, strict=True)}
    accept(samples / "validation", ["else.png", *made[:3]], [True, True, False, True])
    assert gallery_of(world, samples=str(samples)).warnings == [
        "accepted.csv tells of 3 of the 16 generated images: is it of others?"
    ]
    for text in ("", "image,accepted\nx,1\n", "image,accepted,reason\nx,maybe,\n", "\0\n"):
        (samples / "validation" / "accepted.csv").write_text(text)
        with pytest.raises(UserError, match="is not the sifter's list .*remove it$"):
            gallery_of(world, samples=str(samples))


def short(**changes):
    return lambda path: changed(short_report(path), changes)


def whole(**changes):
    return lambda path: changed(whole_report(path), changes)


def changed(path, changes):
    file = path / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def texts(text):
    return lambda path: (path / "report.json").write_bytes(text)


BROKEN = {
    "nothing": (texts(b""), "is not JSON"),
    "bytes": (texts(b"\xff\x00"), "is not JSON"),
    "half": (texts(b'{"rows": {'), "is not JSON"),
    "deep": (texts(b"[" * 100_000), "is not JSON"),
    "a list": (texts(b"[]"), "is no report of generated images"),
    "other": (texts(b'{"title": "Autoencoder", "sections": []}'), r"is about something else \('Autoencoder'\)"),
    "no rows": (short(rows={}), "is damaged"),
    "rows": (short(rows=[1]), "is damaged"),
    "words": (
        short(rows={name: {"fd_user": "low"} for name in (GENERATED, SAME, OTHER, SPLIT, SHUFFLED)}),
        "no number",
    ),
    "no counts": (short(about={"chance": 0.5}), "is damaged"),
    "share": (short(accuracy_per_user={GENERATED: {"user_07": 7}}), "has the share 7"),
    "notes": (short(notes="beware"), "is no list"),
    "sections": (whole(sections={"title": "x"}), "is no list"),
    "no tables": (whole(sections=[{"title": "x", "findings": []}]), "is damaged"),
    "no about": (whole(about=None), "is damaged"),
    "row": (
        whole(sections=[{"title": "x", "findings": [], "tables": [{"title": "t", "header": ["user"], "rows": [[]]}]}]),
        "rows of another length",
    ),
}


@pytest.mark.parametrize("make, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_report_is_a_line(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError, match=f"^--report .*report.json.*{words}") as error:
        read_report(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_numbers_that_are_none_are_dashes(tmp_path):
    """Infinities and what is not a number, as Python's JSON writes them."""
    file = short_report(tmp_path) / "report.json"
    file.write_text(file.read_text().replace('"precision": 0.5', '"precision": NaN').replace("4.0", "1e999"))
    lines = {line.name: line for line in read_report(tmp_path).lines}
    assert lines["precision"].value == "-" and lines["FD_user"].value == "-" and lines["FD_user"].place is None


# ---- pages -----------------------------------------------------------------------------------------------------------

TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body", "main", "dialog", "header", "button", "div", "img"),
    *("script", "h1", "h2", "h3", "p", "small", "table", "caption", "tr", "th", "td", "svg", "rect", "details"),
    *("summary", "ul", "ol", "li", "nav", "a", "span", "article", "section", "label", "input"),
}


class Page(HTMLParser):
    """Elements, text without that of style and script, and what those two hold."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.own, self.inside = [], "", {"style": "", "script": ""}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.own:
            self.own[self.inside] += data
        else:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def evil_world(world, tmp_path):
    """Reports and lists in which every word is hostile."""
    samples = tmp_path / EVIL / "samples"
    shutil.copytree(world["samples"], samples)
    made = [p.name for p in gallery_of(world, samples=str(samples)).pictures if p.kind == GENERATED]
    report = whole_report(samples / "validation", near=[(0, 0)], twins=[(1, 1, EVIL)]) / "report.json"
    found = json.loads(report.read_text())
    for section in found["sections"]:
        section["notes"] = [EVIL]
        for table in section["tables"]:
            table["title"] += EVIL * (table["title"] != "answers")
            table["header"][1:] = [word + EVIL * (word not in COLUMNS) for word in table["header"][1:]]
            table["rows"] = [
                [
                    v + EVIL * (i > 0 or table["header"][0] != "user") if isinstance(v, str) else v
                    for i, v in enumerate(row)
                ]
                for row in table["rows"]
            ]
        for finding in section["findings"]:
            finding["worst_is"] = finding["about"] = EVIL
    report.write_text(json.dumps(found))
    with open(samples / "validation" / "accepted.csv", "w") as handle:
        csv.writer(handle).writerows([["image", "accepted", "reason"], *([n, 0, EVIL] for n in made)])
    return gallery_of(world, samples=str(samples))


COLUMNS = ("training", "held out", "generated", "TRTR", "TRTS")


def test_hostile_words_are_shown_and_never_run(world, tmp_path):
    gallery = evil_world(world, tmp_path)
    assert all(p.reason == EVIL for p in gallery.pictures if p.kind == GENERATED) and gallery.notes
    assert any(picture.near is not None for picture in gallery.pictures)
    at, place = Served(gallery), [person.name for person in gallery.people].index(EVIL)
    write(gallery, tmp_path / "all.html")
    for text in (page_of_all(gallery, at), page_of_one(gallery, at, place), (tmp_path / "all.html").read_text()):
        page = Page(text)
        assert {tag for tag, _ in page.tags} <= TAGS and text.count("<script>") == 1 == len(page.all("script"))
        assert EVIL in page.text and any(EVIL in img["alt"] for img in page.all("img"))
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name == "style"]
        assert "alert" not in page.own["script"] + page.own["style"]


def test_the_policy_names_the_script_and_the_style_by_their_digests(world):
    gallery = gallery_of(world)
    page = Page(page_of_all(gallery, Served(gallery)))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src 'self' data:; style-src 'sha256-")
    for name, text in page.own.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{name}-src 'sha256-{re.escape(digest)}';", policy)
    assert "unsafe" not in policy


def test_the_first_page_has_a_card_for_each_user(world, tmp_path):
    gallery = gallery_of(world, report=str(short_report(tmp_path)))
    page = Page(page_of_all(gallery, Served(gallery)))
    cards = [attrs for attrs in page.all("li") if attrs.get("class") == "card"]
    shares = dict(zip(USERS, ("0.5", "1.0", "0.25", "0.75"), strict=True))
    assert [card["data-right"] for card in cards] == [shares[person.name] for person in gallery.people]
    thumbs = [img for img in page.all("img") if img.get("src", "").startswith("/thumb/")]
    assert len(thumbs) == 4 * 6 and all(img["loading"] == "lazy" for img in thumbs)
    first = sorted(USERS)[0]
    assert thumbs[0]["alt"] == f"{first}, real (training), {first}/0.png"
    assert "4 users; images: 20 training, 8 held out, 16 generated" in page.text
    assert [svg["aria-label"][:3] for svg in page.all("svg")][-4:] == [
        f"{float(card['data-right']):.0%}"[:3] for card in cards
    ]
    assert len(page.all("table")) == 1 and "nearer to the worst than to real images" in page.text


def test_a_few_pictures_come_from_all_sessions(world):
    gallery = gallery_of(world)
    real, made = thumbs_of(gallery.people[0])
    numbers = gallery.people[0].pictures
    assert real == [numbers[TRAINING][i] for i in (0, 1, 3)] and made == numbers[GENERATED][:3]


def test_a_users_page_has_all_his_pictures_true_to_their_pixels(world, tmp_path):
    for size, shown, address in ((48, 96, "/image/"), (200, 200, "/image/"), (400, 256, "/thumb/")):
        real = draw_users(tmp_path / str(size), ["a", "b"], 2, size)
        gallery = collect(GalleryConfig(real_dir=str(real), samples=str(real)))
        page = Page(page_of_one(gallery, Served(gallery), 1))
        images = [img for img in page.all("img") if "src" in img]
        assert [(int(img["width"]), int(img["height"])) for img in images] == [(shown, shown)] * 4
        assert [img["src"] for img in images] == [f"{address}{n}" for n in (2, 3, 6, 7)]
        whole_ones = [button.get("data-whole") for button in page.all("button") if "data-said" in button]
        assert whole_ones == [f"/image/{n}" if size > 256 else None for n in (2, 3, 6, 7)]
    gallery = collect(GalleryConfig(real_dir=str(real), samples=str(tmp_path / "48")))  # to be compared at one size
    images = [img for img in Page(page_of_one(gallery, Served(gallery), 1)).all("img") if "src" in img]
    assert {(img["width"], img["height"]) for img in images} == {("96", "96")}
    assert Image.open(io.BytesIO(answer(gallery, "/thumb/2").body)).size == (48, 48)
    assert Image.open(io.BytesIO(answer(gallery, "/image/2").body)).size == (400, 400)
    links = {attrs.get("rel"): attrs["href"] for attrs in page.all("a")}
    assert links == {"prev": "/user/0", None: "/"}


# ---- one file --------------------------------------------------------------------------------------------------------


def test_one_file_needs_nothing_else(world, tmp_path):
    said = write(gallery_of(world), tmp_path / "all.html")
    page = Page((tmp_path / "all.html").read_text())
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if attrs.get(name)]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#user")} == ids == {f"user-{i}" for i in range(4)}
    assert re.fullmatch(r"written: .*all\.html \(0\.\d MB\); 44 of 44 pictures are in this file", said)
    pixels = [img["src"] for img in page.all("img") if img.get("src")]
    assert len(pixels) == 44 + 24
    first = Image.open(io.BytesIO(base64.b64decode(pixels[0].partition(",")[2])))
    assert np.array_equal(first, read_rgb(Path(world["real_dir"]) / sorted(USERS)[0] / "0.png"))


def test_beyond_the_limit_every_user_keeps_as_many_and_the_file_says_so(world, tmp_path):
    gallery = gallery_of(world)
    one = len(Embedded(gallery).shown[0].src)
    at = Embedded(gallery, limit=30 * one)
    kept = [sum(n in at.shown for numbers in p.pictures.values() for n in numbers) for p in gallery.people]
    assert max(kept) - min(kept) <= 1 and sum(kept) == len(at.shown) == 44 - at.left_out > 0
    said = write(gallery, tmp_path / "all.html", 30 * one)
    words = f"{len(at.shown)} of 44 pictures are in this file; {at.left_out} are left out, for it holds at most"
    text = (tmp_path / "all.html").read_text()
    assert words in said and words in text
    assert 25 * one < sum(len(src) for src in re.findall(r'src="(data:[^"]*)"', text)) <= 30 * one
    assert sum(map(int, re.findall(r">(\d+) of these pictures are not in this file", text))) == at.left_out


def test_large_and_damaged_pictures_in_one_file(tmp_path):
    real = draw_users(tmp_path / "real", ["a", "b"], 1, 600)
    (real / "b" / "9.png").write_bytes(b"no picture")
    gallery = collect(GalleryConfig(real_dir=str(real), samples=str(real)))
    said = write(gallery, tmp_path / "all.html")
    assert said.endswith("; 4 of 6 pictures are in this file, the larger ones reduced to 256 pixels; 2 cannot be read")
    assert {shown.size for shown in Embedded(gallery).shown.values()} == {(256, 256)}


# ---- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(gallery):
    """The port of a server of it."""
    server = Server(gallery, 0)
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def port(world):
    with serving(gallery_of(world)) as number:
        yield number


def ask(port, path, method="GET", **headers):
    """(status, headers, body) of one request; a header of None is not sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply.status, {name: value for name, value in reply.getheaders() if name != "Date"}, body


def test_pages_and_pictures_are_answered(port, world):
    gallery, text = gallery_of(world), "text/html; charset=utf-8"
    at = Served(gallery)
    for path, kind, expected in (
        ("/", text, page_of_all(gallery, at).encode()),
        ("/?sort=1", text, page_of_all(gallery, at).encode()),
        ("/user/3", text, page_of_one(gallery, at, 3).encode()),
        ("/image/40", "image/png", None),
        ("/thumb/40", "image/png", None),
    ):
        status, headers, body = ask(port, path)
        assert status == 200 and headers["Content-Type"] == kind and int(headers["Content-Length"]) == len(body)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"] and "Set-Cookie" not in headers
        if expected is None:
            assert np.array_equal(Image.open(io.BytesIO(body)), gallery.pictures[40].read())
        else:
            assert body == expected
        assert ask(port, path, "HEAD") == (200, headers, b"")


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/user/4", "/user/-1", "/user/", "/user", "/image/44", "/image/0/", "/image/1e1"),
        *("/image/0x1", "/image/9999999999", "/image/../image/0", "/image/%30", "/favicon.ico"),
        *("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/image/../../etc/passwd", "/."),
        *("/thumb/0\\..\\1", "/user/0;/etc", "http://127.0.0.1/", "*", "/train/user_07/0.png"),
    ],
)
def test_no_path_leads_anywhere_else(port, path):
    status, headers, body = ask(port, path)
    assert (status, body) == (404, b"there is no such page; / lists what there is\n")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "host",
    [None, "", "example.org", "127.0.0.1.example.org", "localhost.example.org:80", "0.0.0.0", "[::1]", "127.0.0.1:x"],
)
def test_who_calls_us_by_another_name_is_told_nothing(port, host):
    status, headers, body = ask(port, "/", Host=host)
    assert (status, body) == (421, b"ask for 127.0.0.1 or localhost\n")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1", "127.0.0.1:1"])
def test_a_forwarded_port_is_no_other_name(port, host):
    assert ask(port, "/image/0", Host=host)[0] == 200


def test_a_head_has_no_body(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(b"HEAD /image/0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        answered = b"".join(iter(lambda: line.recv(4096), b""))
    assert answered.startswith(b"HTTP/1.1 200 ") and answered.endswith(b"\r\nConnection: close\r\n\r\n")


def test_two_names_are_none(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: example.org\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "NONSENSE"])
def test_other_methods_are_refused(port, method):
    status, headers, body = ask(port, "/", method)
    assert (status, headers["Allow"], headers["Connection"]) == (405, "GET, HEAD", "close")
    assert body == b"only GET and HEAD are answered\n" and "Content-Security-Policy" in headers


def test_what_is_no_request_is_answered_in_words_and_closed(port):
    for request, reply in (
        (b"nonsense\r\n\r\n", rb"Bad request syntax \('nonsense'\)\n"),  # as HTTP 0.9, which has no head
        (b"GET / HTTP/9.9\r\n\r\n", rb"Invalid HTTP version \(9.9\)\n"),
        (b"GET /" + b"x" * 70_000, rb"HTTP/1.1 414 .*Connection: close\r\n\r\nRequest-URI Too Long\n"),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line, contextlib.suppress(ConnectionError):
            line.sendall(request)
            answered = b"".join(iter(lambda line=line: line.recv(4096), b""))
            assert re.fullmatch(reply, answered, re.DOTALL), answered


def test_a_connection_is_kept_but_not_after_a_body(port):
    """Or what was sent as a body would be the next request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for path in ("/image/0", "/nothing", "/"):
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        assert reply.getheader("Connection") is None
    connection.request("GET", "/", body=b"GET /image/0 HTTP/1.1\r\n\r\n")
    assert connection.getresponse().getheader("Connection") == "close"


def test_what_a_browser_cannot_show_is_a_png(tmp_path):
    real = draw_users(tmp_path / "real", ["a", "b"], 1)
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    Image.fromarray(ramp).save(real / "a" / "1.png")
    Image.new("CMYK", (32, 32), (10, 20, 30, 40)).save(real / "a" / "2.jpg")
    Image.fromarray(ramp.astype(np.uint8)).save(real / "a" / "3.pgm")
    Image.new("RGB", (700, 350), "red").save(real / "b" / "1.png")
    (real / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (real / "b" / "3.png").symlink_to("/etc/hostname")
    (real / "b" / "4.png").write_bytes((real / "b" / "1.png").read_bytes())
    gallery = collect(GalleryConfig(real_dir=str(real), samples=str(real)))
    (real / "b" / "4.png").unlink()
    with serving(gallery) as port:
        for number, picture in enumerate(gallery.pictures[:6]):
            status, headers, body = ask(port, f"/image/{number}")
            shown = Image.open(io.BytesIO(body))
            assert (status, shown.format, shown.mode) == (200, "PNG", "RGB")
            assert np.array_equal(shown, read_rgb(picture.source))
        assert Image.open(io.BytesIO(ask(port, "/thumb/5")[2])).size == (gallery.side, gallery.side // 2)
        for number in (6, 7, 8):
            status, headers, body = ask(port, f"/image/{number}")
            assert status == 404 and headers["Content-Type"].startswith("text/plain") and body.count(b"\n") == 1
        assert ask(port, "/user/1")[0] == 200  # which shows that they are missing


def test_a_huge_picture_is_refused_by_its_head(tmp_path):
    real = draw_users(tmp_path / "real", ["a", "b"], 1)
    head = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (real / "a" / "1.png").write_bytes(start + struct.pack(">I", 99) + b"IDAT")
    gallery = collect(GalleryConfig(real_dir=str(real), samples=str(real)))
    assert gallery.pictures[1].size() is None
    with pytest.raises(UserError, match="has 9000 x 9000 pixels, more than"):
        gallery.pictures[1].read()


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*flags):
    """The script as a process of its own that has said where it is: (process, address)."""
    command = [sys.executable, str(ROOT / "scripts" / "gallery.py"), *map(str, flags)]
    awake = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in the background it may be ignored
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **awake) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_it_says_where_it_is_needs_no_torch_and_ends_by_ctrl_c(world, tmp_path):
    with started(*words(world, port=0, report=short_report(tmp_path))) as (process, line):
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found, process.stderr.read()
        assert b"nearer to the worst than to real images" in ask(int(found[1]), "/")[2]
        listening = Path(f"/proc/{process.pid}/net/tcp").read_text()
        assert f" 0100007F:{int(found[1]):04X} " in listening  # 127.0.0.1, no other address
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_port_that_is_taken_and_a_broken_report_are_a_line(world, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        done = script("gallery.py", *words(world, port=taken), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --port {taken} is taken by another program; give another, or 0 for a free one\n"
    (tmp_path / "report.json").write_text("{}")
    done = script("gallery.py", *words(world, report=tmp_path), check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: --report ")


def test_one_file_by_the_command(world, tmp_path):
    done = script("gallery.py", *words(world, out=tmp_path / "new" / "all.html"))
    assert done.stdout.startswith(f"written: {tmp_path}/new/all.html (") and done.stdout.count("\n") == 1
    assert "44 of 44" in Page((tmp_path / "new" / "all.html").read_text()).text
    done = script("gallery.py", *words(world, out=tmp_path), check=False)
    assert done.returncode == 2 and "--out" in done.stderr


# ---- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def browse(address):
    """The page as it is after its script has run; fails if anything was said on the console."""
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1200,5000", "--dump-dom"]
        done = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


def names_of(dom):
    return [unescape(name) for name in re.findall(r'<li class="card".*?<h3><a [^>]*>(.*?)</a>', dom, re.DOTALL)]


@needs_a_browser
def test_a_browser_shows_every_user_in_the_order_that_is_asked_for(world, tmp_path):
    gallery = gallery_of(world, report=str(whole_report(tmp_path)))
    with serving(gallery) as port:
        dom = browse(f"http://127.0.0.1:{port}/#sort=highest")
    assert names_of(dom) == [USERS[i] for i in (1, 0, 2, 3)]  # 1, 0.5, 0.25, not known
    assert (
        re.search(r'<a href="#sort=highest" aria-current="">', dom)
        and len(re.findall(r"<a [^>]*aria-current", dom)) == 1
    )


DRIVE = """<script>
const said = {}, all = (query) => [...document.querySelectorAll(query)];
const press = (key) => dispatchEvent(new KeyboardEvent("keydown", { key }));
const seen = () => all("article").filter((user) => user.offsetParent).map((user) => user.id).join();
const settle = () => new Promise((done) => setTimeout(done, 100));
const large = document.querySelector("dialog");
(async () => {
  said.lowest = (location.hash = "#sort=lowest", await settle(), all(".card").map((card) => card.dataset.place).join());
  said.index = seen();
  location.hash = "#user-1"; await settle();
  said.first = seen(); said.hidden = document.querySelector(".index").offsetParent === null;
  press("ArrowRight"); await settle(); said.next = seen();
  press("ArrowLeft"); press("ArrowLeft"); await settle(); said.before = seen();
  press("ArrowLeft"); await settle(); said.end = seen();
  const shown = () => all("article .made li").filter((item) => item.offsetParent).length;
  said.made = shown(); document.querySelector("#user-0 .only").click(); said.accepted = shown();
  press("ArrowRight"); await settle(); said.kept = shown(); document.querySelector("#user-1 .only").click();
  const buttons = all("#user-1 button.picture"); buttons[0].click(); await settle();
  const image = large.querySelector("img"), shows = (place) => image.src === buttons[place].firstElementChild.src;
  said.open = large.open; said.zoom = image.width / image.naturalWidth; said.same = shows(0);
  press("ArrowRight"); await settle(); said.second = shows(1); said.stays = seen();
  large.querySelector("button").click(); said.closed = !large.open;
  said.complete = all("#user-1 img").filter((img) => img.complete && img.naturalWidth === 32).length;
  document.body.textContent = JSON.stringify(said);
})();
</script></body>"""


@needs_a_browser
def test_keys_filter_and_enlargement_in_one_file(world, tmp_path):
    samples = tmp_path / "samples"
    shutil.copytree(world["samples"], samples)
    whole_report(samples / "validation")
    made = [p.name for p in gallery_of(world, samples=str(samples)).pictures if p.kind == GENERATED]
    accept(samples / "validation", made, [i % 4 == 0 for i in range(len(made))])
    write(gallery_of(world, samples=str(samples)), tmp_path / "all.html")
    text = (tmp_path / "all.html").read_text()
    driven = re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", DRIVE)  # the policy would not run it
    (tmp_path / "driven.html").write_text(driven)
    said = json.loads(
        unescape(re.search(r"<body[^>]*>(.*?)</body>", browse((tmp_path / "driven.html").as_uri()), re.DOTALL)[1])
    )
    places = {name: place for place, name in enumerate(sorted(USERS))}
    assert said.pop("lowest") == ",".join(str(places[USERS[i]]) for i in (2, 0, 1, 3))
    assert said.pop("zoom") in range(2, 100)  # a whole number
    assert said == {
        **{"index": "", "first": "user-1", "hidden": True, "next": "user-2", "before": "user-0", "end": "user-0"},
        **{"made": 4, "accepted": 1, "kept": 1, "open": True, "same": True, "second": True, "stays": "user-1"},
        **{"closed": True, "complete": 11},
    }


@needs_a_browser
def test_a_users_page_in_a_browser(world, tmp_path):
    """Under the policy of the server: all pictures have come, and the filter goes along to the next user."""
    samples = tmp_path / "samples"
    shutil.copytree(world["samples"], samples)
    made = [p.name for p in gallery_of(world, samples=str(samples)).pictures if p.kind == GENERATED]
    accept(samples / "validation", made, [i % 4 == 0 for i in range(len(made))])
    gallery = gallery_of(world, samples=str(samples))
    with serving(gallery) as port:
        dom = browse(f"http://127.0.0.1:{port}/user/1#accepted")
    assert len(re.findall(r'<img loading="lazy"', dom)) == sum(EACH.values())
    assert escape(gallery.people[1].name, quote=False) in dom and 'class="only-accepted"' in dom
    assert sorted(re.findall(r'href="http:[^"]*/user/(\d)#accepted"', dom)) == ["0", "2"]
