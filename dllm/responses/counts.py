"""The counts in a manifest, as sums over shards and parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dllm.responses.shards import Row


@dataclass
class ManifestCounts:
    """Counts of some rows.

    Units: `tokens` and `tokens_by_split` count response ids; the others count rows, `rejected` requests.
    """

    rows: int = 0
    tokens: int = 0
    tokens_by_split: Counter[str] = field(default_factory=lambda: Counter({"train": 0, "heldout": 0}))
    finish_reasons: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    """Rows kept although they have the flag; a row with two flags counts under both."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out of the shards for a flag, each under the first that `drop` names."""
    rejected: int = 0
    """Requests that got no response."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> ManifestCounts:
        """Count rows that are kept."""
        counts = cls()
        for row in rows:
            counts.add(row)
        return counts

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ManifestCounts:
        """Read the counts of a manifest, or of `to_json`.

        Raises:
            KeyError, TypeError: there are none.
        """
        counts = cls()
        for each in fields(cls):
            value = found[each.name]
            numbers = value.values() if isinstance(value, dict) else [value]
            is_counter = isinstance(getattr(counts, each.name), Counter)
            if is_counter != isinstance(value, dict) or not all(type(number) is int for number in numbers):
                raise TypeError(each.name)
            setattr(counts, each.name, Counter(value) if isinstance(value, dict) else value)
        return counts

    def to_json(self) -> dict[str, Any]:
        """Return the counts as keys of a manifest, sorted."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in values.items()
        }

    def add(self, row: Row) -> None:
        """Count one more row that is kept."""
        self.rows += 1
        self.tokens += row.num_tokens
        self.tokens_by_split[row.split] += row.num_tokens
        self.finish_reasons[row.finish_reason] += 1
        self.splits[row.split] += 1
        self.sources[row.source] += 1
        self.flags.update(row.flags)

    def lengths(self) -> dict[str, float]:
        """Return the mean tokens of a response, and the share of responses that the limit of tokens cut."""
        rows = max(1, self.rows)
        return {"tokens_per_response": self.tokens / rows, "cut_share": self.finish_reasons["length"] / rows}

    def __add__(self, other: ManifestCounts) -> ManifestCounts:
        total = ManifestCounts()
        for each in fields(self):
            one, two = getattr(self, each.name), getattr(other, each.name)
            if isinstance(one, Counter):
                getattr(total, each.name).update(one)  # unlike +, update keeps keys that count nothing
                getattr(total, each.name).update(two)
            else:
                setattr(total, each.name, one + two)
        return total
