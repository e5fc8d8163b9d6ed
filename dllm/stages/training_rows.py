"""The rows that the stage `train` reads: regenerated responses as training and held-out examples."""

from __future__ import annotations

import heapq
import sys
from pathlib import Path

from dllm.config.params import Target, Train
from dllm.errors import DataError
from dllm.models import precision
from dllm.models.positions import max_positions
from dllm.regeneration.identity import THINKING
from dllm.responses.shards import iter_rows, read_manifest
from dllm.training.batches import Examples, make_examples
from dllm.training.distributed import Ranks


def read_splits(folder: Path, target: Target, settings: Train) -> tuple[Examples, Examples]:
    """Read training and held-out examples; rows are streamed, so that their texts are never in memory all at once.

    Raises:
        DataError: no training rows are left, a shard cannot be read, or the responses are of another thinking mode.
    """
    _check_thinking(target, folder)
    longest = max_tokens(target, settings)
    train = make_examples(iter_rows(folder, "train"), longest)
    if not train.kept:
        raise DataError("no training rows", where=str(folder), hint="lower prepare.heldout_fraction or add prompts")
    # Ids are hashes, so the first by id are a fair sample, the same for every seed.
    first = heapq.nsmallest(
        settings.validation_samples,
        iter_rows(folder, "heldout"),
        key=lambda row: (row.prompt_id, row.sample, row.turn),
    )
    return train, make_examples(first, longest)


def max_tokens(target: Target, settings: Train) -> int:
    """Return how long a row may be: `train.max_length`, and no longer than the target has positions."""
    return min(settings.max_length, max_positions(target) or settings.max_length)


def announce(target: Target, settings: Train, train: Examples, heldout: Examples, ranks: Ranks) -> None:
    """Print what is trained on, and on how many ranks that differ from train.nproc."""
    notes = [f"{len(train.kept)} rows, {len(heldout.kept)} held out"]
    if train.dropped:
        notes.append(f"{train.dropped} dropped, with fewer than 2 supervised tokens")
    if train.cut:
        longest = max_tokens(target, settings)
        what = "train.max_length" if longest == settings.max_length else "the end of the target's positions,"
        notes.append(f"{train.cut} truncated at {what} {longest}")
    if ranks.world != settings.nproc:
        notes.append(f"{ranks.world} ranks, while train.nproc is {settings.nproc}: the launcher decides")
    if line := precision.note(settings.compute_dtype, ranks.device):
        notes.append(line)
    print(f"train: {'; '.join(notes)}", file=sys.stderr, flush=True)


def _check_thinking(target: Target, folder: Path) -> None:
    expected = THINKING[target.enable_thinking]
    found = read_manifest(folder).get("thinking", expected)
    if found != expected:
        raise DataError(
            f"the responses were generated with thinking {found}, and target.enable_thinking asks for {expected}",
            where=str(folder),
            hint="regenerate, or set target.enable_thinking as it was",
        )
