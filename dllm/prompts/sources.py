"""Prompt sources: from an entry of `prepare.sources` to rows, each with its place for error messages.

A source's name is a member of `SOURCES` (built in, or of an installed package), else a file or folder, else the id of
a dataset on the Hugging Face hub. `readers` parses the files.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.outside import one_line
from dllm.prompts import folder, row_layout
from dllm.prompts.cells import CHATS
from dllm.prompts.readers import KINDS, BadRow, Record, all_records, as_record, kind_of
from dllm.prompts.reading import Reading, UnusedColumn, read_row
from dllm.prompts.tools import shape
from dllm.prompts.turns import Unusable
from dllm.registry import SOURCES
from dllm.tracking import provenance

SPLIT = str(Source.model_fields["split"].default)
OPTIONS = frozenset({"split", "subset", "revision", "column", "ignore_columns", "size", "seed"})
"""Options of a source that not every kind of source has."""
GIVE_UP_ROWS = 1000
"""Rows without the chat's column after which a source is refused."""
_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


_PATTERN = re.compile(r"[*?\[{]")
_HUB_PATH = re.compile(r"(?:(?:www\.)?(?:huggingface|hf)\.co/)?datasets/[^/]+/")


class SourceRow(NamedTuple):
    """One row, before its chat is parsed."""

    place: str
    """File and line, or what names the row otherwise."""
    chat: Any
    """Turns in OpenAI's or ShareGPT's form, or a bare string, as `turns.parse_chat` takes them; a BadRow or `Unusable`
    where the row has no prompt."""
    tools: Any = None
    """Schemas of the tools that the assistant may call."""
    reference: Any = None
    """The correct result, where the source knows it."""


class PromptSource(Protocol):
    """A member of `SOURCES`."""

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return the files that are read, in order, each by a name that is unique in this source; may be empty.

        Raises:
            DataError: there is no such source.
        """
        ...

    def identity(self, source: Source) -> dict[str, Any]:
        """Return what determines the rows where no file does: ids, commits, fingerprints; may be empty."""
        ...

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Read the rows, in the same order at every call.

        Raises:
            DataError: a row cannot be read; it names the place.
        """
        ...


def label(source: Source) -> str:
    """Name a source in tables and rows."""
    return source.name if source.subset is None else f"{source.name}:{source.subset}"


def path_of(source: Source, root: Path) -> Path:
    """Return the path that a source's name is, where it is one; a name such as `~old.jsonl` is no user's folder."""
    try:
        return root / Path(source.name).expanduser()
    except RuntimeError:
        return root / source.name


def find(source: Source, root: Path) -> PromptSource:
    """Return what reads a source.

    Raises:
        DataError: the name can only be that of a file, and there is none; or it is close to a built-in one.
    """
    if source.name in SOURCES:
        member: PromptSource = SOURCES[source.name]
        return checked(member, source, "a built-in source")
    if path_of(source, root).exists():
        return checked(FILES, source, "files")
    if "://" in source.name:
        hint = "name a file, a folder, or a dataset of the Hugging Face hub as OWNER/NAME"
        raise DataError("an address is not read", where=_key(source), hint=hint)
    if _PATTERN.search(source.name):
        hint = "name the folder, whose files are all read, or each file as a source of its own"
        raise DataError("no such file, and patterns are not read", where=_key(source), hint=hint)
    if _HUB_PATH.match(source.name):
        raise DataError("no such folder", where=_key(source), hint="a dataset of the hub is named OWNER/NAME")
    if source.name.startswith((".", "/", "~")) or kind_of(source.name) is not None or source.name.count("/") > 1:
        raise DataError("no such file or folder", where=_key(source), hint="paths are relative to the project's folder")
    near = difflib.get_close_matches(source.name.lower().replace("_", ""), list(SOURCES), n=1, cutoff=0.7)
    if near and "/" not in source.name:
        raise DataError("no such source", where=_key(source), hint=f"did you mean {near[0]}?")
    return checked(HUB, source, "a dataset of the hub")


def checked(found: PromptSource, source: Source, what: str) -> PromptSource:
    """Refuse options that would have no effect; a source without `options` takes all.

    Raises:
        ConfigError: there is one.
    """
    options = getattr(found, "options", frozenset(OPTIONS))
    for name in sorted(OPTIONS - options):
        value = getattr(source, name)
        if value != type(source).model_fields[name].default:
            hint = f"leave prepare.sources[].{name} out"
            raise ConfigError(f"{name} {value!r} does not apply to {what}", where=_key(source), hint=hint)
    return found


def inputs(source: Source, root: Path) -> dict[str, Path]:
    """Return the files a source is read from, by name; see `PromptSource.inputs`."""
    return find(source, root).inputs(source, root)


def identity(source: Source, root: Path) -> dict[str, Any]:
    """Return what determines a source's rows besides its files; see `PromptSource.identity`."""
    return find(source, root).identity(source)


def rows(
    source: Source, root: Path, reading: Reading | None = None, found: PromptSource | None = None
) -> Iterator[SourceRow]:
    """Read a source's rows in order; see `PromptSource.rows`.

    Args:
        reading: records what became of columns and files, where the source has any.
        found: what reads the source, where it is known.
    """
    found = find(source, root) if found is None else found
    return found.rows(source, root, reading) if isinstance(found, TableSource) else found.rows(source, root)


def input_digest(source: Source, root: Path) -> str:
    """Hash what a source holds into 64 hex digits: the bytes of its files in order, and its identity.

    Raises:
        DataError: there is no such source.
    """
    marks = [provenance.digest(path) for path in inputs(source, root).values()]
    marks += map(str, identity(source, root).values())
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


class TableSource:
    """A source of rows with columns, one of which is the chat."""

    options = frozenset({"column", "ignore_columns"})

    def records(self, source: Source, root: Path, reading: Reading) -> Iterator[Record]:
        """Read the rows, each with its place."""
        raise NotImplementedError

    def rows(self, source: Source, root: Path, reading: Reading | None = None) -> Iterator[SourceRow]:
        """Read the rows' prompts; `reading` records what became of columns and files."""
        reading = Reading() if reading is None else reading
        return _prompts(self.records(source, root, reading), source, reading)


class FileSource(TableSource):
    """A file, or all files of a folder and its subfolders that hold rows, in order of path."""

    options = frozenset({"column", "ignore_columns", "split"})

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """List the files that are read, by their path in the folder."""
        return self._find(source, root, Reading())

    def identity(self, source: Source) -> dict[str, Any]:
        """Return nothing: the files are the identity."""
        return {}

    def records(self, source: Source, root: Path, reading: Reading) -> Iterator[Record]:
        """Read the rows of all files; files beside them that only describe them are passed over."""
        files = self._find(source, root, reading)
        for name, path in files.items():
            rows = all_records(path)
            if len(files) + len(reading.passed_over) > 1:
                reading.files.setdefault(name, 0)
            if len(files) > 1 and kind_of(name) == ".json":
                first = list(itertools.islice(rows, 2))
                if len(first) == 1 and row_layout.is_about_others(first[0][1], source.column):
                    reading.passed_over[name] = "one object without a chat"
                    reading.files.pop(name, None)
                    continue
                rows = itertools.chain(first, rows)
            for row in rows:
                if len(files) + len(reading.passed_over) > 1:
                    reading.files[name] = reading.files.get(name, 0) + 1
                yield row

    def _find(self, source: Source, root: Path, reading: Reading) -> dict[str, Path]:
        path = path_of(source, root)
        if not path.is_dir():
            if kind_of(path.name) is None:
                raise DataError(f"cannot read this kind of file, only {KINDS}", where=_key(source))
            if path.exists() and not path.is_file():
                raise DataError("no file, but a pipe or a device", where=_key(source), hint="write its rows to a file")
            if source.split != SPLIT:
                raise ConfigError(
                    f"split {source.split!r} does not apply to a file", where=_key(source), hint="leave the split out"
                )
            return {path.name: path}
        found, reading.passed_over = folder.files(path, source.split, _key(source))
        return found


class HubSource(TableSource):
    """A split of a dataset on the Hugging Face hub."""

    options = frozenset({"split", "subset", "revision", "column", "ignore_columns"})

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return nothing: the cache of `datasets` is no input of ours."""
        return {}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return the dataset's fingerprint (its files, subset and split determine it) and the commit it is from.

        Raises:
            DataError: the dataset cannot be loaded.
        """
        dataset = self._load(source)
        commit = commit_of(dataset.info.download_checksums or ())
        return {"fingerprint": str(dataset._fingerprint), **({} if commit is None else {"commit": commit})}

    def records(self, source: Source, root: Path, reading: Reading) -> Iterator[Record]:
        """Load the split and read its rows, as its files hold them."""
        import pyarrow as pa

        from dllm.prompts.arrow import BATCH_ROWS, rows

        number = 0
        try:
            tables = self._load(source).with_format("arrow").iter(BATCH_ROWS)
            for number, row in enumerate(itertools.chain.from_iterable(map(rows, tables)), 1):
                yield f"{label(source)} {source.split} row {number}", as_record(row)
        except (pa.ArrowException, OSError) as error:
            place = f"{label(source)} {source.split} row {number + 1}"
            raise DataError(f"cannot read the dataset: {one_line(str(error), 200)}", where=place) from None

    def failed(self, source: Source, reason: str) -> DataError:
        """Say that a dataset cannot be loaded, and what to do."""
        return DataError(
            f"neither a built-in source ({', '.join(SOURCES)}) nor a file nor a dataset that can be loaded: {reason}",
            where=_key(source),
            hint="check the name, split, subset and revision, and that the Hugging Face hub can be reached",
        )

    def _load(self, source: Source) -> Any:
        # datasets takes 1.2 seconds to import; sources of files and built-in ones do without it.
        import datasets
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if source.name in _PACKAGED_DATASETS_MODULES:  # it would read whatever lies in the working directory
            raise self.failed(source, "a kind of file, and no dataset")
        try:
            return datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
        except Exception as error:  # of datasets, of the hub's client, or of the loader of any format
            reason = one_line((str(error).strip() or type(error).__name__).split("\n")[0], 250)
            raise self.failed(source, reason) from None


FILES, HUB = FileSource(), HubSource()


def commit_of(urls: Iterable[str]) -> str | None:
    """Return the commit that a dataset's files were loaded from; None where the files do not come from the hub.

    Args:
        urls: addresses of the files, as `datasets` records them beside their checksums.
    """
    return next((found[1] for url in urls if (found := _COMMIT.match(url))), None)


def _prompts(rows: Iterable[Record], source: Source, reading: Reading) -> Iterator[SourceRow]:
    """Read a prompt out of each row; what cannot be read is a BadRow.

    Raises:
        DataError: no row has the chat's column.
        UnusedColumn: a column belongs to the prompts, and cannot be used.
    """
    names = CHATS if source.column is None else (source.column,)
    without: DataError | None = None
    is_found = False
    splits: set[str | None] = set()
    for number, (place, row) in enumerate(rows, 1):
        if isinstance(row, BadRow):
            yield SourceRow(place, row)
            continue
        if not isinstance(row, dict):
            yield SourceRow(place, BadRow(f"a row is a mapping of columns, got {shape(row)}"))
            continue
        there = [name for name in names if name in row]
        if not (is_found and there):
            row_layout.refuse_wrapper(row, names, place)
        is_found = is_found or bool(there)
        if not there:
            without = without or row_layout.missing(row, names, place)
            if not is_found and number >= GIVE_UP_ROWS:
                raise without
            yield SourceRow(place, BadRow(without.message))
            continue
        column = row_layout.filled(row, there)
        if column is None:
            yield SourceRow(place, BadRow(f"{there[0]} is null"))
            continue
        row_layout.check_splits(row, splits, source, place)
        try:
            yield SourceRow(place, *read_row(row, column, source, place, reading))
        except Unusable as reason:
            yield SourceRow(place, reason)
        except UnusedColumn:
            raise
        except DataError as error:
            yield SourceRow(place, BadRow(error.message))
    if without is not None and not is_found:
        raise without


def _key(source: Source) -> str:
    return f"prepare.sources: {source.name}"
