"""A source as a stream of prompts, however long: in the input's order, each once, never all in memory.

Owns what a regeneration without `prepare` reads, and which part of it. `prompts` has the same rules for a table of
prompts that is sorted and split once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.prompts import sources
from dllm.prompts.table import Prompt, prompt_id, split_of
from dllm.prompts.turns import Unusable, to_chat
from dllm.tracking import provenance


@dataclass
class Tally:
    """What became of the rows read so far."""

    rows: int = 0
    prompts: int = 0
    """Those given out."""
    other_parts: int = 0
    """Prompts that another part answers."""
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Rows without a prompt, by reason."""

    def to_json(self) -> dict[str, Any]:
        """Give the counts as they stand in a manifest."""
        return {**vars(self), "refused": dict(sorted(self.refused.items()))}


def stream(
    source: Source,
    root: Path,
    *,
    part: tuple[int, int] | None = None,
    heldout_fraction: float = 0.0,
    tally: Tally | None = None,
) -> Iterator[Prompt]:
    """Read a source's prompts in the order of its rows; what occurs again is left out.

    `source.limit` takes the first so many different prompts, before they are parted. Memory grows by one number a
    prompt, whatever the prompts hold.

    Args:
        part: i and n of `--part i/n`, 0 <= i < n: only prompts whose id, a number, leaves i when divided by n.
        heldout_fraction: share of prompts whose split is `heldout`; 0 holds out none.
        tally: counts along.

    Raises:
        DataError: a row is no chat, or the source cannot be read; it names the place.
    """
    tally = Tally() if tally is None else tally
    name = sources.label(source)
    seen: set[int] = set()
    for where, chat, tools, _ in sources.rows(source, root):
        tally.rows += 1
        try:
            messages, schemas = to_chat(chat, tools, where)
        except Unusable as reason:
            tally.refused[str(reason)] += 1
            continue
        id = prompt_id(messages, schemas)
        number = int(id, 16)
        if number in seen:
            tally.duplicates += 1
            continue
        seen.add(number)
        if part is None or number % part[1] == part[0]:
            tally.prompts += 1
            yield Prompt(id, name, split_of(id, heldout_fraction), messages, schemas)
        else:
            tally.other_parts += 1
        if len(seen) == source.limit:
            return


def input_digest(source: Source, root: Path) -> str:
    """Hash what a source holds into 64 hex digits: the bytes of its files in order, or a dataset's own fingerprint.

    Raises:
        DataError: there is no such source.
    """
    files = sources.files(source, root)
    marks = [provenance.digest(file) for file in files] or [sources.hub_fingerprint(source)]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()
