"""`data verify`, `data show` and `data merge`: what they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import DataError, ModelError
from dllm.responses import merge as parts
from dllm.responses import shards
from dllm.responses import verify as checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def verify(dir: Path, *, as_json: bool = False) -> None:
    """Check a folder of responses and print the checks, as a table or one JSON object.

    Raises:
        DataError: something does not hold.
    """
    found = checks.verify(dir)
    if as_json:
        print(json.dumps({"folder": str(dir), "whole": True, "checked": found}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{dir} is whole", show_header=False, title_justify="left")
    for check, finding in found.items():
        table.add_row(check, finding)
    Console(soft_wrap=True).print(table)


def show(
    dir: Path,
    *,
    row: int | None = None,
    prompt: str | None = None,
    limit: int = 3,
    tokens: bool = False,
    max_length: int | None = None,
    model: str | None = None,
) -> None:
    """Print rows with their supervised tokens highlighted; see `select` and `show` of `dllm.cli.show`.

    Raises:
        DataError: there is no such row, or the folder is damaged.
        ModelError: the tokenizer cannot be loaded.
    """
    from rich.console import Console

    from dllm.cli import show as picture
    from dllm.config.params import Train

    rows = list(picture.select(dir, row=row, prompt=prompt, limit=limit))
    tokenizer = _tokenizer(dir, shards.read_manifest(dir), model)
    picture.show(iter(rows), tokenizer, Console(), max_length=max_length or Train().max_length, tokens=tokens)


def merge(dirs: Sequence[Path], out: Path) -> None:
    """Merge parts and print the totals.

    Raises:
        DataError: the parts do not fit together, or the folder holds something else.
    """
    merged = parts.merge(dirs, out)
    print(f"{out}: {merged['rows']} rows, {merged['tokens']} tokens of {len(dirs)} parts", flush=True)


def _tokenizer(dir: Path, manifest: dict[str, Any], model: str | None) -> PreTrainedTokenizerBase:
    from dllm.config.params import Target
    from dllm.models import targets
    from dllm.prompts import template as chat

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
