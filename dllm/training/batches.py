"""Responses as training sequences: ids, the supervised span, and padded batches.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.errors import DataError
from dllm.responses.shards import Row

MIN_SUPERVISED = 2
"""Fewest supervised tokens of a usable row: one anchor and one label."""


@dataclass(frozen=True)
class Example:
    """One prompt with one response, cut to length.

    The first `prompt_length` tokens are the prompt; the rest, the response, are supervised.
    """

    id: str
    input_ids: array[int]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Examples:
    """The examples of some rows; how many rows were dropped for too few supervised tokens, and how many were cut."""

    kept: list[Example]
    dropped: int
    cut: int


def make_examples(rows: Iterable[Row], max_length: int) -> Examples:
    """Join prompts and responses, cut on the right at max_length tokens, and drop rows with too little supervision.

    Raises:
        DataError: every row was dropped.
    """
    kept, dropped, cut = [], 0, 0
    for row in rows:
        ids = array("i", row.prompt_ids)
        ids.extend(row.answer_ids)
        cut += len(ids) > max_length
        ids = ids[:max_length]
        if len(ids) - len(row.prompt_ids) < MIN_SUPERVISED:
            dropped += 1
        else:
            kept.append(Example(f"{row.prompt_id}-{row.sample}-{row.turn}", ids, len(row.prompt_ids)))
    if dropped and not kept:
        raise DataError(
            f"none of {dropped} rows has {MIN_SUPERVISED} supervised tokens within {max_length}",
            where="train.max_length",
            hint="raise train.max_length or regenerate.max_new_tokens",
        )
    return Examples(kept, dropped, cut)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Pad examples on the right with id 0, which nothing attends to.

    Shapes: returns input_ids_BS int64 and loss_mask_BS bool (true on answer tokens).
    """
    width = max(len(example) for example in examples)
    input_ids_BS = torch.zeros(len(examples), width, dtype=torch.int64)
    loss_mask_BS = torch.zeros(len(examples), width, dtype=torch.bool)
    for index, example in enumerate(examples):
        input_ids_BS[index, : len(example)] = torch.frombuffer(example.input_ids, dtype=torch.int32)
        loss_mask_BS[index, example.prompt_length : len(example)] = True
    return input_ids_BS, loss_mask_BS
