"""Responses of earlier work: more prompts, more samples or other shards cost only the responses that are missing.

A result's folder says which settings its responses depend on. One of the same settings, engine and model holds, for the
same prompt and sample, what would be generated again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from dllm.digests import unsealed
from dllm.engines.engine import Response, request_origin
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts.table import Prompt
from dllm.regeneration import journal
from dllm.regeneration.journal import ResponseJournal
from dllm.regeneration.rollout import RolloutConfig, num_samples
from dllm.regeneration.store import ShardStore, response_of
from dllm.responses import shards

Unit = tuple[str, int]
"""A prompt's id and the number of a sample."""

_log = logging.getLogger(__name__)


def take_over(folders: Sequence[Path], prompts: Iterable[Prompt], config: RolloutConfig, store: ShardStore) -> int:
    """Write the responses of earlier folders to this store's journals; return how many.

    The turns of a sample are taken from one folder, and only as far as none before them is missing: each is a response
    to those before it. Call it before anything is generated; after a kill, call it again.

    Args:
        folders: of responses that depend on the same settings, in the order in which they are searched.
        prompts: those of this result, in order.
        store: that of this result.

    Raises:
        OSError: the disk is full.
    """
    settings = config.settings
    units = ((prompt.id, sample) for prompt in prompts for sample in range(num_samples(prompt, settings)))
    shard_of = {unit: number // settings.shard_size for number, unit in enumerate(units)}
    taken = 0
    for folder in folders:
        for responses in _files(folder):
            found: dict[int, list[list[Response]]] = {}
            for unit, rollout in _rollouts(responses, shard_of):
                found.setdefault(shard_of.pop(unit), []).append(rollout)
            for index, rollouts in sorted(found.items()):
                with store.open(index).journal as into:
                    taken += sum(_append(into, rollout, settings.turns) for rollout in rollouts)
    return taken


def _rollouts(responses: Iterable[Response], wanted: Container[Unit]) -> list[tuple[Unit, list[Response]]]:
    """Group the responses of the wanted prompts and samples, in the order of their turns."""
    found: dict[Unit, dict[int, Response]] = {}
    for response in responses:
        try:
            prompt_id, sample, turn = request_origin(response.key)
        except ValueError:  # no version writes such a key
            continue
        if (prompt_id, sample) in wanted:
            found.setdefault((prompt_id, sample), {})[turn] = response
    return [(unit, [by_turn[turn] for turn in sorted(by_turn)]) for unit, by_turn in found.items()]


def _append(into: ResponseJournal, rollout: Sequence[Response], turns: str) -> int:
    taken = 0
    for number, response in enumerate(rollout):
        is_gap = turns == "all" and request_origin(response.key)[2] != number
        if is_gap or (response.key in into and into.read(response.key) != response):
            break
        into.append(response)
        taken += 1
    return taken


def _files(folder: Path) -> Iterator[list[Response]]:
    """Read a folder file by file: all turns of a sample are in one. What cannot be read is left out with a warning.

    Journals are left as they are, since a process may write to one; they come first, so that a shard which is finished
    in the meantime is found as one.
    """
    journals = ((path, journal.read) for path in sorted(folder.glob("journal-*.jsonl")))
    for path, read in itertools.chain(journals, ((path, _shard) for path in sorted(folder.glob("shard-*.json")))):
        try:
            yield list(read(path))
        except FileNotFoundError:  # a journal whose shard has been finished
            continue
        except (DataError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            _log.warning("%s: cannot be read; its responses are generated again: %s", path, one_line(str(error), 200))


def _shard(record: Path) -> Iterator[Response]:
    return map(response_of, shards.read_shard(record.parent, unsealed(record.read_bytes())["entry"]))
