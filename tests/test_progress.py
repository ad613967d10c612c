"""How far it is, by a clock that is told the time."""

from evaluations import progress
from evaluations.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines(seconds, total, bar=False):
    """What is said where every step takes as long as `seconds` says."""
    said, clock = [], Clock()
    count = Progress("it learns", total, bar=bar, say=said.append, clock=clock)
    for step in seconds:
        clock.now += step
        count.step()
    return said


def test_the_time_left_is_that_of_the_steps_so_far():
    assert lines([30.0, 10.0, 20.0], total=8) == [
        "it learns: 12%, 30 s, about 210 s left",
        "it learns: 38%, 60 s, about 100 s left",
    ]


def test_it_is_no_flood_and_the_end_is_left_to_the_caller():
    assert len(lines([0.1] * 1000, total=1000)) == 4  # 100 s, a line every 20; the last step says nothing
    assert lines([0.1] * 100, total=100) == [] and lines([60.0], total=1) == []


def test_steps_are_counted_as_they_end(monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    said = []
    count = Progress("t", 3, bar=False, say=said.append)
    assert [(step, count.done) for step in count.of("abc")] == [("a", 0), ("b", 1), ("c", 2)] and count.done == 3
    assert [line.split(",")[0] for line in said] == ["t: 33%", "t: 67%"]


def test_a_bar_takes_the_place_of_the_lines(capsys):
    assert lines([60.0] * 3, total=3, bar=True) == []
    assert "it learns: 100%" in capsys.readouterr().err
