"""How far a long part is: a bar on a terminal; elsewhere, such as in a file, now and then a line with the time left."""

import sys
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any

from tqdm import tqdm

EVERY_S = 20.0  # seconds between two lines: nobody wonders for longer, and an hour is 180 lines


class Progress:
    """Counts steps of known total; every step is expected to take equally long."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        bar: bool | None = None,
        say: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = perf_counter,
    ):
        """Args:
        bar: whether to draw one instead of saying lines; None: where stderr is a terminal.
        say: what takes a line; None prints it.
        """
        self.title, self.total, self.done = title, total, 0
        self.say, self.clock = say or (lambda line: print(line, flush=True)), clock
        self.start = self.said = clock()
        bar = sys.stderr.isatty() if bar is None else bar
        self.bar = tqdm(total=total, desc=title) if bar else None

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
            if self.done == self.total:
                self.bar.close()
            return
        now = self.clock()
        if now - self.said < EVERY_S or self.done >= self.total:  # that it is done the caller says
            return
        self.said, took = now, now - self.start
        left = took / self.done * (self.total - self.done)
        self.say(f"{self.title}: {self.done / self.total:.0%}, {took:.0f} s, about {left:.0f} s left")

    def of(self, steps: Iterable) -> Iterator:
        """The same steps, counted as each ends."""
        for step in steps:
            yield step
            self.step()
