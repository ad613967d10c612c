"""The order in which data are read, and the random numbers of a step: both follow from (seed, step) alone.

Sample number `i` of the stream is image `permutation(seed, i // N)[i % N]` of N; step `s` with `G` samples over all
processes takes the numbers `s G ... (s + 1) G - 1`, and process `r` its slice of them. So a resumed run only calls
`seek(step)`, two processes with batch b see what one with 2b sees, and a folder smaller than the batch wraps around.

With balanced classes, number `i` of the stream belongs to turn `k = i // U` of U classes. Every class has one place in
a turn, in a permutation that (seed, k) states, so that all are read equally often; of its n images it then gives image
`k % n` of the permutation that (seed, k // n, class) states.

Random numbers of a step are drawn for all its slots and sliced in the same way.
"""

import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset

from .. import dist_util
from ..config import UserError
from ..stop_signals import leave_stopping_to_the_loop

# What random numbers are for: the last of the integers given to `mix`, so that no two uses draw the same. Without one
# are the order of the data, the times of training and the images of sampling, which are published as they are.
POSTERIOR, NOISE, DROPOUT, DROPPED_LABELS, VALIDATION, EXTRACTED, EXTRACTED_FLIP, LIKELIHOOD = range(1, 9)
AMOUNT, TURN, MEMBER, SEEN = range(9, 13)


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers (SeedSequence hashing: nearby inputs give unrelated seeds).

    Zeros at the end count as padding, mix(a, b) == mix(a, b, 0): what must differ from a shorter list ends in another
    number than 0, as the uses above do.
    """
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


def slot_randn(shape, *, seed: int, step: int, use: int, device: th.device | str = "cpu") -> th.Tensor:
    """This process's slice of one step's normal numbers, the same however many processes share the step.

    Args:
        shape: (N, ...) of this process.
        use: what the numbers are for (one of the constants above), so that two uses in one step are independent.
    """
    n, (rank, size) = shape[0], (dist_util.rank(), dist_util.world_size())
    generator = th.Generator(device=device).manual_seed(mix(seed, step, use))
    return th.randn((n * size, *shape[1:]), generator=generator, device=device)[rank * n : (rank + 1) * n]


class Rows(Protocol):
    """A dataset of known length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Order(Dataset):
    """A dataset read by stream position instead of by index; augmentation is seeded by the position, too.

    Args:
        labels: (N,) of the dataset's rows, if classes are to be balanced.
    """

    def __init__(self, dataset: Rows, *, seed: int, shuffle: bool, labels=None):
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self.classes = [] if labels is None else [np.flatnonzero(labels == y) for y in np.unique(labels)]
        self._orders: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}  # for each use the round, and its order

    def index(self, position: int) -> int:
        if not self.classes:
            return self._shuffled(position, len(self.dataset))
        turn = position // len(self.classes)
        number = self._shuffled(position, len(self.classes), TURN)
        members = self.classes[number]
        return int(members[self._shuffled(turn, len(members), number, MEMBER)])

    def _shuffled(self, position: int, count: int, *use: int) -> int:
        """What stands at a position if 0 ... count - 1 come round and round, each round in its own order."""
        turn, place = divmod(position, count)
        if not self.shuffle:
            return place
        if use not in self._orders or self._orders[use][0] != turn:
            rng = np.random.default_rng([self.seed & 0xFFFFFFFF, turn, *use])
            self._orders[use] = turn, rng.permutation(count)
        return int(self._orders[use][1][place])

    def __getitem__(self, position: int):
        if not getattr(self.dataset, "draws", True):  # it asks for no random number, and seeding costs more than a row
            return self.dataset[self.index(position)]
        state = random.getstate()
        random.seed(mix(self.seed, position))
        try:
            return self.dataset[self.index(position)]
        finally:
            random.setstate(state)


class BatchStream(Iterator):
    """Endless batches of a dataset for this process; `seek(step)` goes to any step at once."""

    def __init__(
        self, dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_workers: int = 0, labels=None
    ):
        if batch_size < 1:
            raise UserError(f"--batch_size is {batch_size}; it must be at least 1")
        self.order = Order(dataset, seed=seed, shuffle=shuffle, labels=labels)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.num_samples = len(dataset)
        self.seek(0)

    def positions(self, step: int) -> Iterator[list[int]]:
        """The stream positions of this process's batches, from a step on."""
        while True:
            first = (step * dist_util.world_size() + dist_util.rank()) * self.batch_size
            yield list(range(first, first + self.batch_size))
            step += 1

    def seek(self, step: int) -> None:
        """Continue with the batch of this step (0 = first)."""
        self.step = step
        self._batches = None

    def __next__(self):
        if self._batches is None:
            loader = DataLoader(
                self.order,
                batch_sampler=self.positions(self.step),
                num_workers=self.num_workers,
                worker_init_fn=leave_stopping_to_the_loop,
            )
            self._batches = iter(loader)
        self.step += 1
        try:
            return next(self._batches)
        except UserError as error:  # a worker's comes with its whole traceback in the text
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
