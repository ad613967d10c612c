"""Two ways to do one thing, in turn: how many times as fast is the first?

A machine speeds up and slows down while one measures. So both run in every round, the first to go changing with the
round, the ratio is taken within a round, and its median over the rounds is what counts.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

LOWER_IS_BETTER = ("s",)  # units in which less is faster


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure, and the few things that only the caller knows."""

    tiny: bool = False  # the smallest networks and data, to see that everything runs; its numbers mean nothing
    rounds: int = 7  # at most
    budget_s: float = 25.0  # of one pair's rounds: when it is spent, no further round begins after the third
    model_path: str = ""  # a checkpoint for whole sampling jobs
    num_samples: int = 62  # images of such a job
    launcher: str = ""  # of such a job, such as "mpiexec -n 2"

    @property
    def least_s(self) -> float:
        """What a side of a round takes at least, what is quicker is repeated: a single step is measured with what the
        other side left in the caches."""
        return self.budget_s / (2 * self.rounds)


@dataclass(frozen=True)
class Way:
    """One way to do it.

    Args:
        run: does the work once.
        work: how many units of it (steps, images) that is.
        turn: called before each round, outside its time.
    """

    label: str
    run: Callable[[], object]
    work: float = 1.0
    turn: Callable[[], object] | None = None


def seconds(function: Callable[[], object], times: int = 1, clock=time.perf_counter) -> float:
    """Seconds of one call, of so many in a row."""
    begin = clock()
    for _ in range(times):
        function()
    finish_device()
    return (clock() - begin) / times


def finish_device() -> None:
    """Wait for the GPU, if there is one, so that the clock sees its work."""
    import torch as th

    if th.cuda.is_available():
        th.cuda.synchronize()


def repeats(function: Callable[[], object], least_s: float, clock=time.perf_counter) -> int:
    """How many calls in a row take `least_s`; warms up by the way."""
    took = seconds(function, clock=clock)
    if took < least_s:  # the first call may have been slow for the last time
        took = seconds(function, clock=clock)
    return max(1, min(10_000, round(least_s / max(took, 1e-9))))


def alternate(
    a: Callable[[], object],
    b: Callable[[], object],
    rounds: int,
    *,
    least_s: float = 0.0,
    budget_s: float = float("inf"),
    before: Iterable[Callable[[], object]] = (),
    clock=time.perf_counter,
) -> list[tuple[float, float]]:
    """Seconds of a call of `a` and of `b`, one pair a round, `b` before `a` in every second one.

    Args:
        rounds: at most; a budget that they have spent ends them, but not before the third.
        least_s: a quicker call is repeated until it takes so long.
        before: called before each round, outside its time.
    """
    sides = [(function, repeats(function, least_s, clock)) for function in (a, b)]
    pairs, spent = [], 0.0
    while len(pairs) < rounds and (len(pairs) < 3 or spent < budget_s):
        for function in before:
            function()
        begin, turn = clock(), 1 if len(pairs) % 2 == 0 else -1
        first, second = (seconds(*side, clock) for side in sides[::turn])
        pairs.append((first, second)[::turn])
        spent += clock() - begin
    return pairs


def spread(values) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def in_unit(took: float, work: float, unit: str) -> float:
    """Seconds of a call as what the unit says: work a second, or seconds for each unit of work."""
    return took / work if unit in LOWER_IS_BETTER else work / took


def compare(name: str, ours: Way, rival: Way, unit: str, settings: Settings, **about) -> dict:
    """Both ways in turn, as an entry of a benchmark's `pairs`.

    Args:
        unit: steps/s, images/s and so on, or s for seconds.
        about: what else is to be known of the pair (batch, deviations).
    Returns:
        `ratio` (how many times as fast ours is), `ours` and `rival`: median, least and most over the rounds.
    """
    limits = {"least_s": settings.least_s, "budget_s": settings.budget_s}
    limits["before"] = [side.turn for side in (ours, rival) if side.turn]
    rounds = alternate(ours.run, rival.run, settings.rounds, **limits)
    scale = ours.work / rival.work
    pair = {
        "name": name,
        "unit": unit,
        "ratio": spread(b / a * scale for a, b in rounds),
        "ours": {"label": ours.label, **spread(in_unit(a, ours.work, unit) for a, _ in rounds)},
        "rival": {"label": rival.label, **spread(in_unit(b, rival.work, unit) for _, b in rounds)},
        "rounds": len(rounds),
        **about,
    }
    print(line_of(pair), flush=True)
    return pair


def single(name: str, way: Way, unit: str, settings: Settings, **about) -> dict:
    """One way alone, as an entry of a benchmark's `rows`."""
    times, begin, took = repeats(way.run, settings.least_s / 5), time.perf_counter(), []
    while len(took) < settings.rounds and (len(took) < 3 or time.perf_counter() - begin < settings.budget_s / 5):
        took.append(seconds(way.run, times))
    return row(name, unit, (in_unit(value, way.work, unit) for value in took), **about)


def row(name: str, unit: str, values, **about) -> dict:
    """Measured values of one thing, as an entry of a benchmark's `rows`."""
    entry = {"name": name, "unit": unit, **spread(values), **about}
    print(f"{name}: {entry['median']:.4g} {unit}", flush=True)
    return entry


def line_of(pair: dict) -> str:
    """A pair in words."""
    ratio, ours, rival = pair["ratio"], pair["ours"], pair["rival"]
    return (
        f"{pair['name']}: {ratio['median']:.2f} times [{ratio['least']:.2f}, {ratio['most']:.2f}] "
        f"({ours['label']} {ours['median']:.4g}, {rival['label']} {rival['median']:.4g} {pair['unit']})"
    )


def resident_bytes() -> int:
    """What this process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """What a call has in memory at most beyond what was there before, looked at every 5 ms (Linux, glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what earlier calls left for this one
        libc.malloc_trim(0)
    before, most, done = resident_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], resident_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return most[0]
