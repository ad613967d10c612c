"""A page that is whole, shows what was found, and runs nothing."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluations.findings import Finding, Section, Table
from evaluations.html import as_dict, plain, refuse_unwritable, render, write_report
from guided_diffusion_vae.config import UserError

VOID = {"meta", "img", "br"}
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Tags (all closed in order), attributes and the cells of every row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.rows, self.text, self.bars = [], [], [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        self.bars += [value for name, value in attrs if name == "style"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def picture():
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def sections():
    findings = [
        Finding(name="FD", value=4.0, real=1.0, worst=5.0, interval=(3.5, 4.5), form="{:.1f}", about="a distance"),
        Finding(name=EVIL, value=None),
        Finding(name="beyond", value=9.0, real=1.0, worst=5.0),
    ]
    table = Table(title="users", header=["user", EVIL], rows=[["user_00", 0.123456], [EVIL, float("nan")], [1, None]])
    return [Section(title="One", findings=findings, tables=[table], notes=[EVIL], pictures={"a.png": picture()})]


def test_the_page_is_whole_and_nothing_in_it_runs_or_is_fetched():
    page = Page(render(EVIL, sections(), {EVIL: EVIL}))
    assert not page.open
    assert "script" not in page.tags and page.tags.count("html") == 1
    assert page.text.count(EVIL) == 8  # title twice, finding, note, header, cell, fact and its name
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")


def test_the_picture_is_in_the_page():
    data = Page(render("t", sections(), {})).links[0].split(",")[1]
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), picture())


def test_a_finding_is_a_row():
    page = Page(render("t", sections(), {}))
    row = next(row for row in page.rows if row[0].startswith("FD"))
    assert row == ["FDa distance", "4.0", "3.5 to 4.5", "1.0", "5.0", "", "nearer to the worst than to real images"]
    assert [style for style in page.bars if "left" in style] == ["left: 25%", "left: 0%"]  # (5 - 4) / (5 - 1); beyond
    assert next(row for row in page.rows if row[0] == EVIL)[1] == "-"


def test_the_page_says_what_the_value_and_the_worst_are():
    gait = Finding(name="cadence", value=0.6, real=0.5, worst=1.0, worst_is="shuffled", medians=(4.25, 3.5))
    alarm = Finding(name="shortcut", value=0.4, real=0.2, worst=0.0, interval=(0.3, 0.5), above="alarm")
    page = Page(render("t", [Section(title="One", findings=[gait, alarm], value_is="distance")], {}))
    medians = ["median, generated", "median, held out"]
    assert page.rows[0] == ["", "distance", "95 % interval", "real images", "worst", *medians, "worst to real", ""]
    assert page.rows[1][3:7] == ["0.5", "1shuffled", "4.25", "3.5"] and page.rows[2][-1] == "alarm"
    assert len([style for style in page.bars if "left" in style]) == 1  # none of the alarm


def test_terms_are_explained_where_they_first_appear():
    quoting = Section(title="One", quoted=["TRTS"], tables=[Table(title="t", header=["a"], rows=[["b"]])])
    found = Section(title="Two", findings=[Finding(name="TRTS", value=1.0), Finding(name="EER, open set", value=1.0)])
    text = Page(render("t", [quoting, found], {})).text
    assert text.count("train on real, test on synthetic") == 1 and text.index("test on synthetic") < text.index("Two")
    assert text.index("equal error rate") > text.index("Two") < text.index("users that the embedding never saw")


def test_where_the_tables_are_what_matters_they_come_before_the_notes():
    table = Table(title="verdicts", header=["a"], rows=[["b"]])
    for first in (True, False):
        section = Section(title="One", tables=[table], notes=["beware"], tables_first=first)
        text = render("t", [section], {})
        assert (text.index("verdicts") < text.index("beware")) == first == ("<table class=words>" in text)
        assert ("verdicts:" in str(section)) == first


def test_cells_are_short_and_missing_numbers_are_dashes():
    rows = Page(render("t", sections(), {"n": 3, "wide": np.float32(0.25)})).rows
    assert ["user_00", "0.123"] in rows and [EVIL, "-"] in rows and ["1", "-"] in rows
    assert ["n", "3"] in rows and ["wide", "0.25"] in rows


def test_words_are_joined_by_commas():
    assert ["parts", "leaks, physics"] in Page(render("t", [], {"parts": ("leaks", "physics")})).rows


@pytest.mark.parametrize(
    "place, words",
    [("", "is a folder; give the name of a file"), ("file/a.html", "is a file, so nothing can be written below it")],
)
def test_a_place_that_cannot_be_written_is_found_out_before(tmp_path, place, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^--html .*{words}"):
        refuse_unwritable(tmp_path / place, "--html")


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    refuse_unwritable(tmp_path / "new" / "folder" / "a.html", "--html")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions mean nothing to the superuser
    with pytest.raises(UserError, match="^--html .* cannot be written: no permission in"):
        refuse_unwritable(tmp_path / "a.html", "--html")


def test_json_holds_everything_and_no_nan():
    data = {"matrix": np.eye(2), "count": np.int64(3), "bad": [np.nan, np.inf, np.float32(0.5)], 7: (1, True)}
    found = as_dict("t", [Section(title="One", findings=sections()[0].findings, data=data)], {"seed": 1})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    part = found["sections"][0]
    assert part["findings"][0]["interval"] == [3.5, 4.5] and part["findings"][0]["place"] == 0.25
    assert part["data"] == {
        "matrix": [[1.0, 0.0], [0.0, 1.0]],
        "count": 3,
        "bad": [None, None, 0.5],
        "7": [1, True],
    }


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), np.float64("nan")])
def test_what_is_no_number_is_null(value):
    assert plain(value) is None


def test_a_report_is_a_folder_of_whole_files(tmp_path):
    path = write_report(tmp_path / "new" / "report", "t", sections(), {"seed": 1})
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.png", "report.html", "report.json"]
    assert path.read_text() == render("t", sections(), {"seed": 1})
    assert json.loads((path.parent / "report.json").read_text()) == as_dict("t", sections(), {"seed": 1})
    assert np.array_equal(Image.open(path.parent / "a.png"), picture())
