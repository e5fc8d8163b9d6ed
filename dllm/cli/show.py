"""`data show`: rows as training sees them: which tokens are context, which supervised, which truncated.

The loss mask is the one that `make_examples` and `collate` make of the row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target, Train
from dllm.errors import DataError, ModelError
from dllm.models import targets
from dllm.outside import one_line, visible
from dllm.prompts import template as chat
from dllm.responses import shards
from dllm.responses.shards import Row
from dllm.training.batches import collate, make_examples

GIVEN, SUPERVISED, CUT = "given", "supervised", "cut"
STYLES = {GIVEN: "dim", SUPERVISED: "bold green", CUT: "dim red strike"}
BRACKETS = {GIVEN: ("", ""), SUPERVISED: ("[", "]"), CUT: ("<cut ", ">")}
"""Marks of the parts where there are no colours."""

Part = tuple[str, list[int]]


def show_folder(
    dir: Path,
    *,
    row: int | None = None,
    prompt: str | None = None,
    limit: int = 3,
    tokens: bool = False,
    max_length: int | None = None,
    model: str | None = None,
) -> None:
    """Print rows with their supervised tokens highlighted; see `select` and `show`.

    Raises:
        DataError: there is no such row, or the folder is damaged.
        ModelError: the tokenizer cannot be loaded.
    """
    rows = list(select(dir, row=row, prompt=prompt, limit=limit))
    tokenizer = _tokenizer(dir, shards.read_manifest(dir), model)
    show(iter(rows), tokenizer, Console(), max_length=max_length or Train().max_length, tokens=tokens)


def select(
    dir: Path, *, row: int | None = None, prompt: str | None = None, limit: int = 3
) -> Iterator[tuple[int, Row]]:
    """Find rows and their numbers: one by number, those of one prompt, or the first ones.

    Args:
        row: 0-based, counted over all shards.
        prompt: a prompt's id, or how it begins.
        limit: at most so many rows.

    Raises:
        DataError: there is no such row, or its shard is damaged.
    """
    entries = shards.read_manifest(dir)["shards"]
    first = shown = 0
    for entry in entries:
        if row is None or first <= row < first + entry["rows"]:
            for number, each in enumerate(shards.read_shard(dir, entry), first):
                if row == number or (row is None and each.prompt_id.startswith(prompt or "")):
                    yield number, each
                    shown += 1
                    if shown == limit or row is not None:
                        return
        first += entry["rows"]
    if not shown:
        query = f"row {row}" if row is not None else "row" if prompt is None else f"row of a prompt {prompt}"
        raise DataError(f"no {query} among {first} rows", where=str(dir))


def parts(row: Row, max_length: int) -> list[Part]:
    """Cut a row's ids into runs that training treats alike, each with its kind: given, supervised or cut."""
    ids = [*row.prompt_ids, *row.answer_ids]
    kinds = [CUT] * len(ids)
    try:
        (example,) = make_examples([row], max_length).kept
    except DataError:
        kinds[:max_length] = [GIVEN] * min(max_length, len(ids))  # too short to train on: nothing is supervised
    else:
        _, loss_mask_BS = collate([example])
        mask = loss_mask_BS[0].tolist()
        kinds[: len(mask)] = [SUPERVISED if supervised else GIVEN for supervised in mask]
    runs = groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0])
    return [(kind, [id for _, id in run]) for kind, run in runs]


def header(number: int, row: Row) -> str:
    """Describe a row in one line."""
    notes = [f"row {number}", f"prompt {row.prompt_id} sample {row.sample} turn {row.turn}", row.split, row.source]
    notes += [row.finish_reason, f"{row.num_tokens} tokens"]
    notes += [f"{len(row.tools)} tools"] if row.tools else []
    notes += [f"flags: {', '.join(row.flags)}"] if row.flags else []
    return " · ".join(notes)


def show(
    rows: Iterator[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    max_length: int,
    tokens: bool = False,
) -> None:
    """Print rows; supervised tokens are coloured, or in brackets where the console has no colours.

    Args:
        max_length: as `train.max_length`; what is longer is shown as cut.
        tokens: one token after another with its id, rather than text.
    """
    for number, row in rows:
        line = header(number, row)
        runs = parts(row, max_length)
        if all(kind != SUPERVISED for kind, _ in runs):
            line += " · not trained on: too few supervised tokens"
        console.print(one_line(line), style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(_text(runs, tokenizer, tokens, console.is_terminal), soft_wrap=True)
        console.print()


def _tokenizer(dir: Path, manifest: dict[str, Any], model: str | None) -> PreTrainedTokenizerBase:
    target = manifest.get("target") or {}
    name = model or target.get("model")
    if not isinstance(name, str):
        raise DataError("the manifest names no target", where=str(dir), hint="name a tokenizer with --model")
    try:
        tokenizer = targets.load_tokenizer(Target(model=name, revision=None if model else target.get("revision")))
    except ModelError as error:
        if model:
            raise
        raise ModelError(error.message, where=error.where, hint="name a tokenizer with --model") from None
    if manifest.get("template") not in (None, chat.template_digest(tokenizer)):
        print(f"note: {name} has another chat template than these responses were generated with", file=sys.stderr)
    return tokenizer


def _text(runs: list[Part], tokenizer: PreTrainedTokenizerBase, tokens: bool, coloured: bool) -> Text:
    text = Text()
    for kind, ids in runs:
        if tokens:
            text_of = " ".join(f"{id}:{str(tokenizer.decode([id]))!r}" for id in ids)
        else:
            text_of = visible(str(tokenizer.decode(ids)))
        before, after = ("", "") if coloured else BRACKETS[kind]
        text.append(f"{before}{text_of}{after}{' ' if tokens else ''}", style=STYLES[kind] if coloured else "")
    return text
