"""Places and verdicts: known ends, known words."""

import math

import pytest

from evaluations.findings import Finding, Section

PLACES = [
    (dict(value=0.8, real=1.0, worst=0.0), 0.8, "nearer to real images than to the worst"),
    (dict(value=0.95, real=1.0, worst=0.0), 0.95, "as real images"),
    (dict(value=1.5, real=1.0, worst=0.0), 1.5, "as real images"),
    (dict(value=0.2, real=1.0, worst=0.0), 0.2, "nearer to the worst than to real images"),
    (dict(value=0.05, real=1.0, worst=0.0), 0.05, "no better than the worst"),
    (dict(value=2.0, real=1.0, worst=101.0), 0.99, "as real images"),  # low is good
    (dict(value=2.0, real=1.0, worst=100.0, distance=True), 1 - math.log(2) / math.log(100), "nearer to real images"),
    (dict(value=-0.1, real=0.0, worst=1.0, distance=True), 1.1, "as real images"),  # no logarithm of such a KID
    (dict(value=3.0, real=1.0), None, "-"),
    (dict(value=3.0), None, "-"),
    (dict(value=None, real=1.0, worst=0.0), None, "not measured"),
    (dict(value=0.5, real=0.2, worst=0.2), None, "real images are no better than the worst"),
]


@pytest.mark.parametrize(("numbers", "place", "words"), PLACES)
def test_place_and_verdict(numbers, place, words):
    finding = Finding(name="x", **numbers)
    assert finding.place == (None if place is None else pytest.approx(place))
    assert finding.verdict.startswith(words)
    assert finding.as_dict()["verdict"] == finding.verdict


@pytest.mark.parametrize(
    "numbers, words",
    [
        (dict(value=0.44, real=0.20, worst=0.03, interval=(0.36, 0.53)), "alarm"),
        (dict(value=0.44, real=0.20, worst=0.03, interval=(0.19, 0.53)), "as real images"),  # by chance
        (dict(value=0.205, real=0.20, worst=0.03, interval=(0.201, 0.21)), "as real images"),  # hardly
        (dict(value=0.44, real=0.20, worst=0.03), "as real images"),  # nobody knows
        (dict(value=0.44, real=0.03, worst=0.05, interval=(0.36, 0.53)), "alarm"),  # real images worse than the worst
        (dict(value=0.10, real=0.20, worst=0.03, interval=(0.07, 0.11)), "nearer to the worst than to real images"),
    ],
)
def test_too_much_of_a_good_thing(numbers, words):
    finding = Finding(name="x", above="alarm", **numbers)
    assert finding.verdict == words and finding.beyond == (words == "alarm")
    assert not Finding(name="x", **numbers).beyond
    assert Finding(name="x", caveat="of anybody", above="alarm", **numbers).verdict == f"{words} (of anybody)"


@pytest.mark.parametrize(
    "interval, words",
    [
        ((0.6, 0.8), "nearer to real images than to the worst"),
        ((0.6, 0.95), "not distinguishable from real images"),
        ((0.4, 0.8), "between the worst and real images"),
        ((0.05, 0.8), "not distinguishable from the worst"),
        ((0.05, 0.95), "undecided: the interval holds real images and the worst"),
        ((-9.0, 9.0), "undecided: the interval holds real images and the worst"),
    ],
)
def test_a_verdict_claims_no_more_than_the_interval(interval, words):
    assert Finding(name="x", value=0.7, real=1.0, worst=0.0, interval=interval).verdict == words
    turned = tuple(1 - end for end in reversed(interval))  # low is good
    assert Finding(name="x", value=0.3, real=0.0, worst=1.0, interval=turned).verdict == words


def test_nor_do_the_verdicts_at_the_ends():
    ends = {"name": "x", "real": 1.0, "worst": 0.0}
    assert Finding(value=0.95, interval=(0.6, 1.1), **ends).verdict == "as real images"
    assert Finding(value=0.95, interval=(0.3, 1.1), **ends).verdict == "not distinguishable from real images"
    assert Finding(value=0.05, interval=(-0.1, 0.4), **ends).verdict == "no better than the worst"
    assert Finding(value=0.05, interval=(0.0, 0.85), **ends).verdict == "not distinguishable from the worst"


def test_the_interval_of_a_distance_counts_in_ratios():
    """5.0 to 8.0 between 4 and 64 lies, in logarithms, at 0.92 to 0.75 of the way."""
    ends = {"value": 6.5, "real": 4.0, "worst": 64.0, "distance": True}
    assert Finding(name="x", interval=(5.0, 8.0), **ends).verdict == "not distinguishable from real images"
    assert Finding(name="x", interval=(5.5, 8.0), **ends).verdict == "nearer to real images than to the worst"
    assert Finding(name="x", interval=(0.0, 70.0), **ends).verdict.startswith("undecided")


def test_two_judges_of_one_set_say_the_same():
    """A newcomer's numbers: 50 % of 75 % by one classifier, 44 % of 81 % by three; the halves lie on either side."""
    one = Finding(name="user accuracy", value=0.500, real=0.749, worst=1 / 12, interval=(0.37, 0.64))
    three = Finding(name="TRTS", value=0.435, real=0.814, worst=1 / 12, interval=(0.308, 0.574))
    assert one.place > 0.5 > three.place and one.verdict == three.verdict == "between the worst and real images"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_measured(bad):
    for name in ("value", "real", "worst"):
        finding = Finding(**{"name": "x", "value": 1.0, "real": 2.0, "worst": 0.0, name: bad})
        assert getattr(finding, name) is None and finding.place is None
        assert finding.verdict == ("not measured" if name == "value" else "-")
    assert Finding(name="x", value=1.0, interval=(0.0, bad)).interval is None
    assert finding.shown(finding.worst) == "-"


def test_a_section_reads_as_text():
    finding = Finding(name="TSTR", value=0.41, real=0.6, worst=0.03, interval=(0.38, 0.44), form="{:.0%}")
    text = str(Section(title="Identity", findings=[finding], notes=["one seed"])).splitlines()
    assert text[1:3] == ["Identity", "--------"] and text[-1] == "note: one seed"
    assert text[-2].startswith("TSTR: train on synthetic, test on real")
    assert text[4].split() == "TSTR 41% 38% to 44% 60% 3% nearer to real images than to the worst".split()


def test_what_the_worst_is_and_medians_stand_in_columns_of_their_own():
    options = {"real": 0.5, "worst": 1.1, "form": "{:.2f}"}
    findings = [
        Finding(name="cadence", value=0.62, worst_is="another user", medians=(4.25, 3.5), **options),
        Finding(name="a name longer than any other", value=0.5, **options),
    ]
    text = str(Section(title="Gait", findings=findings, value_is="distance")).splitlines()
    assert text[3:5] == ["value: distance", f"{'':<28}  value  real  worst                generated  held out"]
    assert text[5].split()[1:8] == ["0.62", "0.50", "1.10", "another", "user", "4.25", "3.5"]
    assert len({line.index(word) for line, word in zip(text[5:], ("nearer", "as real"), strict=True)}) == 1
