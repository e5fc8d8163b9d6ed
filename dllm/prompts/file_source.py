"""Files and folders on this machine as a prompt source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import ConfigError, DataError
from dllm.prompts.files import folder
from dllm.prompts.files.readers import KINDS, Record, all_records, kind_of
from dllm.prompts.protocol import SPLIT, key_of, path_of
from dllm.prompts.rows.layout import is_about_others
from dllm.prompts.rows.reading import Reading
from dllm.prompts.rows.source import TableSource


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
                if len(first) == 1 and is_about_others(first[0][1], source.column):
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
                raise DataError(f"cannot read this kind of file, only {KINDS}", where=key_of(source))
            if path.exists() and not path.is_file():
                raise DataError(
                    "no file, but a pipe or a device", where=key_of(source), hint="write its rows to a file"
                )
            if source.split != SPLIT:
                raise ConfigError(
                    f"split {source.split!r} does not apply to a file", where=key_of(source), hint="leave the split out"
                )
            return {path.name: path}
        found, reading.passed_over = folder.files(path, source.split, key_of(source))
        return found
