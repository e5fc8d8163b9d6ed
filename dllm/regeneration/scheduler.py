"""From a stream of prompts to requests, a bounded number at a time, and from responses to finished shards.

Rollouts are numbered in the order of the input; rollout n belongs to shard n // shard_size. Memory holds the rollouts
of open shards: their number is bounded, whatever the length of the input. Shards finish in any order, and none waits
for another.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from dllm.engines.defects import defect
from dllm.engines.engine import Refusal, Request, Response
from dllm.errors import DataError
from dllm.prompts.table import Prompt
from dllm.regeneration.rollout import Rollout, RolloutConfig, num_samples, origin_of
from dllm.regeneration.store import OpenShard, ShardStore, origins_digest

OPEN_SHARDS = 256
"""Each has an open file."""
LATEST = 200
FEW = 20
"""Chats to try before the share of unfit ones is checked."""


class Scheduler:
    """Hand out the requests that are missing, and take the outcomes.

    Args:
        prompts: in an order that is the same in every call.
        room: rollouts held at one time, at least; never fewer than two shards' worth.

    Raises:
        DataError: more of the latest chats than `max_failure_rate` do not fit the template.
        StageError: a finished shard does not fit the input, or the disk is full.
    """

    def __init__(self, prompts: Iterable[Prompt], config: RolloutConfig, store: ShardStore, room: int) -> None:
        self._config, self._store = config, store
        self._size = config.settings.shard_size
        self._window = max(room, 2 * self._size)
        self._units = enumerate(_units(prompts, config))
        self._ended = False
        self._ready: deque[Request] = deque()
        self._requested: dict[str, tuple[Request, Rollout, OpenShard]] = {}
        self._open: dict[int, OpenShard] = {}
        self._held = 0
        self._unfit: deque[bool] = deque(maxlen=LATEST)
        self._settled = 0
        self.replayed = 0
        """Responses of earlier calls."""

    @property
    def is_done(self) -> bool:
        """Whether the input is read and every shard is written."""
        return self._ended and not self._open

    def prime(self) -> bool:
        """Find the first request that is missing; return False where none is."""
        request = self.take()
        if request is None:
            return False
        self._ready.appendleft(request)
        return True

    def take(self) -> Request | None:
        """Return the next request; None while the window is full, and at the end of the input."""
        while not self._ready:
            if self._ended or self._held >= self._window or len(self._open) >= OPEN_SHARDS:
                return None
            self._read_next()
        return self._ready.popleft()

    def close(self) -> None:
        """Close the journals; the next call reads them."""
        for shard in self._open.values():
            shard.journal.close()

    def settle(self, outcome: Response | Refusal) -> int:
        """Take a response or refusal; return how many more turns of the input are settled.

        That is more than one where a chat ends before its last turn.
        """
        request, rollout, shard = self._requested.pop(outcome.key)
        before = rollout.turns_left
        if isinstance(outcome, Response) and (reason := defect(outcome, request)) is not None:
            outcome = Refusal(outcome.key, reason, is_transient=True)
        if isinstance(outcome, Response):
            shard.journal.append(outcome)
            rollout.accept(request, outcome)
        else:
            rollout.reject(outcome.key, outcome.reason, outcome.is_transient)
        self._continue(rollout, shard)
        dropped, self._settled = self._settled, 0
        return before - rollout.turns_left + dropped

    def _read_next(self) -> None:
        found = next(self._units, None)
        if found is None:
            self._end()
            return
        number, (prompt, sample) = found
        index = number // self._size
        if index in self._store.finished:
            self._skip_shard(index, prompt, sample)
            return
        if index not in self._open:
            self._open[index] = self._store.open(index)
        shard = self._open[index]
        rollout = Rollout(prompt, sample, self._config)
        shard.rollouts.append(rollout)
        shard.unfinished += 1
        shard.is_full = len(shard.rollouts) == self._size
        self._held += 1
        before = self.replayed
        self._continue(rollout, shard)
        self._settled += rollout.turns - rollout.turns_left - (self.replayed - before)

    def _skip_shard(self, index: int, prompt: Prompt, sample: int) -> None:
        units = itertools.islice(self._units, self._size - 1)
        rest = [origin_of(*unit) for _, unit in units]
        self._store.check(index, origins_digest(iter([origin_of(prompt, sample), *rest])))

    def _continue(self, rollout: Rollout, shard: OpenShard) -> None:
        """Replay what the journal holds, then make the next request or close the rollout."""
        while (request := rollout.next_request()) is not None and request.key in shard.journal:
            response = shard.journal.read(request.key)
            if defect(response, request) is not None:
                shard.journal.forget(request.key)
                break
            rollout.accept(request, response)
            self.replayed += 1
        if request is not None:
            self._requested[request.key] = (request, rollout, shard)
            # Later turns first: a rollout is held in memory until it is over.
            if rollout.is_begun:
                self._ready.appendleft(request)
            else:
                self._ready.append(request)
            return
        self._count_unfit(rollout)
        shard.unfinished -= 1
        self._finish_if_over(shard)

    def _end(self) -> None:
        self._ended = True
        for shard in list(self._open.values()):
            shard.is_full = True
            self._finish_if_over(shard)

    def _finish_if_over(self, shard: OpenShard) -> None:
        if shard.is_full and shard.unfinished == 0:
            del self._open[shard.index]
            self._held -= len(shard.rollouts)
            self._store.finish(shard)

    def _count_unfit(self, rollout: Rollout) -> None:
        self._unfit.append(rollout.is_unfit)
        share = sum(self._unfit) / len(self._unfit)
        if rollout.is_unfit and len(self._unfit) >= FEW and share > self._config.settings.max_failure_rate:
            assert rollout.rejection is not None
            raise DataError(
                f"{share:.0%} of the latest {len(self._unfit)} chats do not fit the chat template, "
                f"the last of them because {rollout.rejection.reason}",
                where=f"target.model: {self._config.target.model}",
                hint="is it the right model, and a chat template that knows these roles and tools?",
            )


def _units(prompts: Iterable[Prompt], config: RolloutConfig) -> Iterator[tuple[Prompt, int]]:
    for prompt in prompts:
        for sample in range(num_samples(prompt, config.settings)):
            yield prompt, sample
