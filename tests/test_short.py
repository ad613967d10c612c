"""A validation in short, of hand-made sections: every question has its number, every group its verdict."""

import pytest

from evaluations.findings import Finding, Section
from evaluations.short import LEAKS, PHYSICS, TRUST, in_short


def section(*findings, **data):
    return Section(title="t", findings=list(findings), data=data)


def share(name, value, **options):
    return Finding(name=name, value=value, **{"real": 1.0, "worst": 0.0, "form": "{:.0%}", **options})


def fd(value, worst=400.0, real=10.0):
    return Finding(name="FD_user", value=value, real=real, worst=worst, form="{:.1f}", distance=True)


def table(short, title):
    return next((t.rows for t in short.tables if t.title == title), [])


def verdicts(*sections):
    return {row[0]: row[1:] for row in table(in_short(list(sections)), "verdicts")}


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_by_its_number():
    findings = [
        share("TSTR", 0.3),
        share("TRTS", 0.95),
        Finding(name="no question", value=1.0),
        Finding(name="AUC, closed set", value=None, real=1.0, worst=0.5),
    ]
    short = in_short([section(findings[0]), section(*findings[1:])])
    assert table(short, "answers") == [
        ["Do they show the right person?", "TRTS", "95%", "100%", "0%", "as real images"],
        ["Do they vary as that person's walks do?", "TSTR", "30%", "100%", "0%"]
        + ["nearer to the worst than to real images"],
    ]
    assert table(short, "verdicts") == [
        ["Are they the right person?", "yes", "TRTS 95% (real images 100%, the worst 0%)"],
        ["Are they varied?", "hardly", "TSTR 30% (real images 100%, the worst 0%)"],
    ]
    assert not in_short([section()]).tables and not in_short([]).notes


def test_what_matters_comes_first_whatever_was_measured_first():
    names = ["gain", "near copies", "kept by the sifter", "TSTR", "TRTS"]
    found = verdicts(*[section(share(name, 0.95)) for name in names])
    order = ["the right person?", "varied?", "possible?", "new?", "of use?"]
    assert [group.removeprefix("Are they ") for group in found] == order


def test_a_group_is_as_good_as_its_worst_answer():
    found = verdicts(section(share("TRTS", 0.95), Finding(name="AUC, closed set", value=0.6, real=0.9, worst=0.5)))
    assert found["Are they the right person?"][0] == "hardly"
    assert found["Are they the right person?"][1].startswith("AUC, closed set 0.6 (")


@pytest.mark.parametrize(
    "value, interval, word",
    [
        (0.95, None, "yes"),
        (0.7, (0.4, 0.95), "yes, as far as so few images tell"),
        (0.7, (0.6, 0.8), "partly"),
        (0.45, (0.3, 0.6), "partly"),
        (0.2, (0.15, 0.3), "hardly"),
        (0.2, (0.05, 0.3), "not that it could be seen"),
        (0.05, (0.0, 0.09), "no"),
        (0.5, (0.0, 1.0), "undecided: the interval holds real images and the worst"),
    ],
)
def test_the_verdict_in_a_word(value, interval, word):
    (verdict, because) = verdicts(section(share("TRTS", value, interval=interval)))["Are they the right person?"]
    assert verdict == word and ("95 %" in because) == (interval is not None)


@pytest.mark.parametrize("copies, twins, quoted", [(0.0, 0.3, "twins"), (0.3, 0.0, "near"), (0.0, 0.0, "near")])
def test_of_two_signs_of_copying_the_worse_is_quoted(copies, twins, quoted):
    shares = {"near copies": copies, "twins of training images": twins}
    findings = [Finding(name=name, value=value, real=0.0, worst=1.0) for name, value in shares.items()]
    (row,) = table(in_short([section(*findings)]), "answers")
    assert row[0] == "Are they no copies?" and row[1].startswith(quoted)


def test_a_sign_without_a_place_does_not_hide_the_other():
    """Real images that are no better than the worst say nothing."""
    near = Finding(name="near copies", value=1.0, real=1.0, worst=1.0)
    twins = Finding(name="twins of training images", value=0.2, real=0.0, worst=1.0)
    assert table(in_short([section(near, twins)]), "answers")[0][1] == "twins of training images"
    assert table(in_short([section(near)]), "answers")[0][1] == "near copies"


@pytest.mark.parametrize(
    "interval, words, word",
    [
        ((0.01, 0.2), "it helps", "yes"),
        ((-0.2, -0.01), "it harms", "no: they harm"),
        ((-0.1, 0.1), "no difference is seen", "no gain is seen"),
        (None, "too few users for an interval", "undecided"),
    ],
)
def test_a_gain_is_seen_where_its_interval_leaves_0_out(interval, words, word):
    gain = section(Finding(name="gain", value=0.05, interval=interval))
    assert table(in_short([gain]), "answers")[0][5] == words
    assert verdicts(gain)["Are they of use?"][0] == word


@pytest.mark.parametrize("good, word", [(10, "yes"), (5, "partly"), (1, "hardly"), (0, "no")])
def test_physics_alone_is_counted(good, word):
    body = [Finding(name=f"q{i}", value=1.0 if i < good else 2.9, real=1.0, worst=3.0) for i in range(10)]
    words = f"{good} of 10 measured quantities are as in real images or not told from them"
    assert verdicts(Section(title=PHYSICS, findings=body)) == {"Are they possible?": [word, words]}
    sifter = section(share("kept by the sifter", 0.4))
    _, because = verdicts(sifter, Section(title=PHYSICS, findings=body))["Are they possible?"]
    assert because.endswith(f", the worst 0%); {words}")


@pytest.mark.parametrize(
    "kept, alone, word",
    [(0.4, 0.95, "by gait yes, by contrast or colours no"), (0.4, 0.5, "hardly"), (0.95, 0.97, "yes")],
)
def test_what_is_rejected_for_its_contrast_alone_is_still_a_walk(kept, alone, word):
    verdict, because = verdicts(section(share("kept by the sifter", kept), by_gait_alone=[alone, 1.0]))[
        "Are they possible?"
    ]
    assert verdict == word and because.endswith(f"; by gait alone {alone:.0%} (real images 100%)")


def test_what_stands_out_is_named_in_the_last_lines():
    ends = {"real": 1.0, "worst": 3.0, "form": "{:.1f}"}
    body = [Finding(name=name, value=value, **ends) for name, value in (("torso", 1.0), ("noise", 3.2), ("swing", 2.9))]
    judge = Finding(name="shortcut", value=0.4, real=0.2, worst=0.0, interval=(0.3, 0.5), above="alarm", form="{:.0%}")
    notes = in_short([section(share("TRTS", 0.95), judge), Section(title="Physics", findings=body)], ["leaks"]).notes
    assert notes == [
        "unfinished: leaks not there yet",
        "above real images, look why: shortcut (40%, real images 20%)",
        "no better than the worst: noise (3.2, the worst 3.0), swing (2.9, the worst 3.0)",
    ]


# ---- targets, and where FD_user stands -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, at, above", [("TRTS", 0.8, 0.81), ("IS_user", 2.0, 2.1)])
def test_scores_must_be_above_their_target(name, at, above):
    def target(value):
        return table(in_short([section(Finding(name=name, value=value, real=3.0))]), "targets")

    assert [target(value)[0][2:] for value in (at, above)] == [["not met", "real images 3"], ["met", "real images 3"]]
    assert target(None) == []


def test_a_distance_stands_between_its_floor_and_noise():
    short = in_short([section(fd(30.0), FD_user_floor=8.0)])
    assert [row[0] for row in table(short, "where FD_user stands")] == ["8.0", "10.0", "30.0", "400.0"]
    assert table(short, "where FD_user stands")[2][1:] == ["the generated images", "3.8 times the floor"]
    assert not table(short, "targets")
    worse = in_short([section(fd(500.0, worst=None))])
    assert [row[0] for row in table(worse, "where FD_user stands")] == ["10.0", "500.0"]


# ---- can it be trusted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "share, recordings, word, words",
    [
        (0.0, {"in_both": 0, "told": True}, "yes", "no recording is in both"),
        (0.0, {"in_both": 12, "told": True}, "for these recordings alone", "12 recordings are in both"),
        (0.0, {"in_both": 0, "told": False}, "probably", "file names do not tell"),
        (0.0, {}, "probably", "file names do not tell"),
        (0.05, {"in_both": 0, "told": True}, "mostly", "near twins: 5%"),
        (0.4, {"in_both": 0, "told": True}, "no", "held-out images are training images"),
    ],
)
def test_leaks_are_no_praise(share, recordings, word, words):
    shares = {"exact twins": 0.0, "near twins": share}
    findings = [
        Finding(name=name, value=value, real=0.0, worst=0.1, form="{:.0%}", said="none found")
        for name, value in shares.items()
    ]
    short = in_short([Section(title=LEAKS, findings=findings, data={"recordings": recordings})])
    ((question, verdict, because),) = table(short, "verdicts")
    assert (question, verdict) == (TRUST, word) and words in because
    assert not any("as real images" in line for line in str(short).splitlines())


# ---- as text ---------------------------------------------------------------------------------------------------------


def test_the_terminal_shows_verdicts_first_and_explains_what_it_quotes():
    text = str(in_short([section(share("TRTS", 0.95, worst_is="chance"))])).splitlines()
    assert text[1:4] == ["In short", "--------", "verdicts:"]
    assert text[5].split("  ")[0] == "Are they the right person?" and "TRTS 95%" in text[5]
    assert any(line.startswith("TRTS: train on real, test on synthetic") for line in text)
