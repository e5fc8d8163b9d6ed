"""A source as a stream of prompts: parsed, each once, limited and split, and never all in memory.

`prepare` collects the streams of all its sources in a table; `regenerate --input-data` reads one as it goes.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.params import Prepare, Source
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts import sources
from dllm.prompts.chats.turns import Chat, Tools, Unusable, parse_chat
from dllm.prompts.files.readers import BadRow
from dllm.prompts.protocol import PromptSource, label
from dllm.prompts.rows.reading import Reading
from dllm.prompts.table import HELDOUT, TRAIN, Prompt, prompt_id, split_of
from dllm.prompts.template_probes import ignores_tools, unseen_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BAD_ROWS = 0.01
"""Share of a source's rows that may be set aside, where `max_bad_rows` does not say."""
MAX_REASONS = 20
"""Reasons for setting rows aside that are counted apart."""
_TURN = re.compile(r"\bturn \d+")


@dataclass
class Tally:
    """Counts of the rows read so far."""

    rows: int = 0
    prompts: int = 0
    """Those yielded."""
    other_parts: int = 0
    """Prompts of other parts."""
    duplicates: int = 0
    over_limit: int = 0
    """Prompts left out because of `limit`."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows without a prompt, by reason."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be read, by reason."""
    first_place: dict[str, str] = field(default_factory=dict)
    """The first such row for each reason."""
    not_ignored: list[str] = field(default_factory=list)
    """Columns to ignore that no row has."""
    reading: Reading = field(default_factory=Reading)
    tools: Tools | None = None
    """Those of the first prompt that has some."""
    with_role: dict[str, Chat] = field(default_factory=dict)
    """The first prompt with a turn of each role."""

    def set_row_aside(self, reason: str, place: str) -> None:
        """Count a row that cannot be read."""
        reason = _TURN.sub("a turn", reason)
        if reason not in self.set_aside and len(self.set_aside) >= MAX_REASONS:
            reason = "other reasons"
        self.set_aside[reason] += 1
        self.first_place.setdefault(reason, place)

    def check(self, source: Source) -> None:
        """Accept the rows that were set aside.

        Raises:
            DataError: they are too many.
        """
        known = {part for name in self.reading.columns for part in (name, name.split(".")[0])}
        self.not_ignored = [name for name in source.ignore_columns or () if name not in known]
        share = MAX_BAD_ROWS if source.max_bad_rows is None else source.max_bad_rows
        bad = self.set_aside.total()
        if bad > share * self.rows:
            (reason, _), *others = self.set_aside.most_common()
            more = f" and {len(others)} other reasons" if others else ""
            counted = f"{bad} of {self.rows} rows cannot be read, more than the share {share:.3g}"
            hint = f"mend them, or set prepare.sources[].max_bad_rows to {_round_up(bad / self.rows)} or more"
            if bad == self.rows:
                hint = "no row can be read: look whether it is the right file, and prepare.sources[].column"
            raise DataError(f"{one_line(reason, 200)}{more}: {counted}", where=self.first_place[reason], hint=hint)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a manifest has them."""
        counted = ("rows", "prompts", "other_parts", "duplicates", "over_limit")
        counts = {name: getattr(self, name) for name in counted} | {"refused": dict(sorted(self.refused.items()))}
        aside = {
            reason: {"rows": count, "first": self.first_place[reason]}
            for reason, count in sorted(self.set_aside.items())
        }
        return {**counts, **({"set_aside": aside} if aside else {})}

    def unseen(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Warn of tools, and of turns by each role, that the target never sees, a line each."""
        unseen = [unseen_turns(tokenizer, chat.messages, chat.tools) for chat in self.with_role.values()]
        found = [f"{role} turns" for role in self.with_role if role in set().union(*unseen)]
        if self.tools is not None and ignores_tools(tokenizer, self.tools):
            found.insert(0, "tools")
        rest = "which the target's chat template does not render: it never sees them"
        return [f"warning: the rows have {what}, {rest}" for what in found]

    def lines(self) -> list[str]:
        """Describe what became of the rows that have no prompt, and of columns and files, a line each."""
        aside = [
            f"set aside: {count} rows: {one_line(reason, 200)}, the first {one_line(self.first_place[reason], 200)}"
            for reason, count in self.set_aside.most_common()
        ]
        unknown = [f"warning: no row has the column {one_line(name, 80)} to ignore" for name in self.not_ignored]
        return [*self.reading.lines(), *unknown, *aside]


def stream(
    source: Source,
    root: Path,
    *,
    part: tuple[int, int] | None = None,
    heldout_fraction: float = 0.0,
    known: Collection[str] = (),
    tally: Tally | None = None,
    found: PromptSource | None = None,
) -> Iterator[Prompt]:
    """Read a source's prompts in the order of its rows; duplicates, and rows that cannot be read, are left out.

    `source.limit` keeps the prompts with the smallest ids, before the parts are made. It takes one more pass over the
    source, so that rows in another order give the same prompts. Memory grows by one number per prompt of the source.

    Args:
        part: i and n of `--part i/n`, 0 <= i < n: only prompts whose id, a number, is i modulo n.
        known: ids of prompts that are left out as duplicates; they do not count towards the limit.
        tally: counts along.
        found: what reads the source, where it is known.

    Raises:
        ConfigError: an option has no effect on this source.
        DataError: more rows than `source.max_bad_rows` cannot be read, or the source cannot; it names the place.
    """
    tally = Tally() if tally is None else tally
    largest = None
    if source.limit is not None:
        smallest = heapq.nsmallest(source.limit, (id for id, *_ in _distinct(source, root, known, Tally(), found)))
        largest = smallest[-1] if smallest else None
    name = label(source)
    for id, chat, reference in _distinct(source, root, known, tally, found):
        if largest is not None and id > largest:
            tally.over_limit += 1
        elif part is not None and int(id, 16) % part[1] != part[0]:
            tally.other_parts += 1
        else:
            tally.prompts += 1
            tally.tools = tally.tools or chat.tools
            for message in chat.messages:
                tally.with_role.setdefault(message["role"], chat)
            yield Prompt(id, name, split_of(id, heldout_fraction), *chat, reference)


def collect(
    prepare: Prepare, root: Path, tallies: dict[str, Tally] | None = None
) -> tuple[list[Prompt], dict[str, Any]]:
    """Read every source; return the prompts in order of id, and the counts.

    Args:
        tallies: the tally of each source is added, by a name of its own.

    Raises:
        DataError: a source cannot be read, or one of the two splits would be empty.
    """
    kept: dict[str, Prompt] = {}
    counts: dict[str, Any] = {}
    tallies = {} if tallies is None else tallies
    for source in prepare.sources:
        tally = Tally()
        tallies[_unlike(label(source), tallies)] = tally
        found = list(stream(source, root, heldout_fraction=prepare.heldout_fraction, known=kept.keys(), tally=tally))
        kept.update((prompt.id, prompt) for prompt in found)
        splits = Counter(prompt.split for prompt in found)
        entry = {
            "rows": tally.rows,
            TRAIN: splits[TRAIN],
            HELDOUT: splits[HELDOUT],
            "duplicates": tally.duplicates,
            "refused": dict(sorted(tally.refused.items())),
            "over_limit": tally.over_limit,
        }
        if tally.set_aside:
            entry["set_aside"] = dict(sorted(tally.set_aside.items()))
        name = label(source)
        counts[name] = _merged(counts[name], entry) if name in counts else entry
    totals = Counter(prompt.split for prompt in kept.values())
    _check_splits(totals, prepare, counts)
    report = {
        "prompts": len(kept),
        TRAIN: totals[TRAIN],
        HELDOUT: totals[HELDOUT],
        "duplicates": sum(entry["duplicates"] for entry in counts.values()),
        "refused": sum(sum(entry["refused"].values()) for entry in counts.values()),
        "sources": counts,
    }
    return [kept[id] for id in sorted(kept)], report


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dict(Counter(one.get(key, {})) + Counter(other.get(key, {})))
        if isinstance(one.get(key, other.get(key)), dict)
        else one[key] + other[key]
        for key in {**one, **other}
    }


def _unlike(name: str, others: Collection[str]) -> str:
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in others)


def _check_splits(totals: Counter[str], prepare: Prepare, counts: dict[str, Any]) -> None:
    total = totals[TRAIN] + totals[HELDOUT]
    if total == 0:
        refused: Counter[str] = sum((Counter(entry["refused"]) for entry in counts.values()), Counter())
        reasons = ", ".join(f"{n} with {reason}" for reason, n in refused.items())
        rows = sum(entry["rows"] for entry in counts.values())
        raise no_prompt(rows, reasons, f"prepare.sources: {', '.join(counts)}")
    for split in (TRAIN, HELDOUT):
        if totals[split] == 0:
            raise DataError(
                f"none of {total} prompts falls into the {split} split",
                where=f"prepare.heldout_fraction: {prepare.heldout_fraction}",
                hint="add prompts or change the fraction",
            )


def no_prompt(rows: int, reasons: str, where: str) -> DataError:
    """Return the error for an input without any prompt."""
    what = f"no usable prompt in {rows} rows" + (f" ({reasons})" if reasons else "")
    return DataError(what, where=where, hint="every row needs a user turn with text" if rows else "the input is empty")


def _distinct(
    source: Source, root: Path, known: Collection[str], tally: Tally, found: PromptSource | None
) -> Iterator[tuple[str, Chat, str | None]]:
    seen: set[int] = set()
    for row in sources.rows(source, root, tally.reading, found):
        tally.rows += 1
        if isinstance(row.chat, BadRow):
            tally.set_row_aside(row.chat.reason, row.place)
            continue
        try:
            if isinstance(row.chat, Unusable):
                raise row.chat
            chat = parse_chat(row.chat, row.tools, row.place)
        except Unusable as reason:
            tally.refused[str(reason)] += 1
            continue
        except DataError as error:
            tally.set_row_aside(error.message, row.place)
            continue
        id = prompt_id(chat.messages, chat.tools)
        number = int(id, 16)
        if number in seen or id in known:
            tally.duplicates += 1
            continue
        seen.add(number)
        yield id, chat, _reference(row.reference)
    tally.check(source)


def _round_up(share: float) -> float:
    return math.ceil(share * 1000) / 1000


def _reference(value: Any) -> str | None:
    """Return a text or number as text; None for anything else: such a column was not meant for us."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
