"""Which rows make up which optimizer step: a pure function of the seed, the epoch and the rows' ids.

Rank, micro-batch and resumption have no say in it. Rows of like length meet in a step, so that little is padding.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence

from dllm.training.strategy import Rows

POOL = 16
"""Steps whose rows are sorted by length together: larger pads less and shuffles less. At most a quarter of an epoch,
or the same rows would share a batch in every epoch."""


def derive_seed(*parts: object) -> int:
    """Hash values into a seed of 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Order:
    """The rows of every step of a run.

    Args:
        rows: what there is to visit.
        global_batch: rows of one optimizer step, over all ranks and micro-batches.
        seed: what all shuffling follows from.
    """

    def __init__(self, rows: Rows, global_batch: int, seed: int) -> None:
        self.rows, self.global_batch, self.seed = rows, global_batch, seed
        self.steps_per_epoch = max(1, -(-len(rows) // global_batch))
        self._epoch, self._steps = -1, [[0]]

    def step_rows(self, step: int) -> list[int]:
        """Return the rows of an optimizer step, shortest first."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._plan(epoch)
        return self._steps[index]

    def epoch(self, step: int) -> int:
        """Return the 0-based epoch a step belongs to."""
        return step // self.steps_per_epoch

    def _plan(self, epoch: int) -> list[list[int]]:
        shuffled = sorted(range(len(self.rows)), key=lambda i: derive_seed(self.seed, epoch, self.rows.ids[i]))
        # No row is dropped and no step is tiny: the steps of an epoch differ by one row at most.
        steps: list[list[int]] = []
        size = max(1, min(POOL, self.steps_per_epoch // 4))
        for begin in range(0, self.steps_per_epoch, size):
            number = min(size, self.steps_per_epoch - begin)
            pool = shuffled[self._start(begin) : self._start(begin + number)]
            pool.sort(key=lambda i: self.rows.lengths[i])
            steps += split_evenly(pool, number)
        random.Random(derive_seed(self.seed, epoch, "steps")).shuffle(steps)
        return steps

    def _start(self, step: int) -> int:
        return step * len(self.rows) // self.steps_per_epoch


def split_evenly(items: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a list into consecutive parts whose sizes differ by one at most; some are empty if items are few."""
    bounds = [i * len(items) // max(1, parts) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(bounds)]


def micro_batches(
    rows: Sequence[int], batch_size: int, rank: int, world: int, *, in_step: bool = False
) -> list[list[int]]:
    """Return one rank's share of rows, cut into micro-batches of up to batch_size, neighbours side by side.

    Micro-batch j of all ranks holds rows of like length when rows are sorted, so no rank waits long for another.

    Args:
        rows: the rows of all ranks.
        batch_size: most rows of one micro-batch.
        rank: whose share.
        world: how many ranks.
        in_step: give all ranks as many, though some are then empty.
    """
    rounds = -(-len(rows) // (batch_size * world))
    parts = split_evenly(rows, rounds * world)[rank::world]
    return [part for part in parts if part or in_step]
