"""Datasets of the Hugging Face hub as a prompt source."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts.files.readers import Record, as_record
from dllm.prompts.protocol import key_of, label
from dllm.prompts.rows.reading import Reading
from dllm.prompts.rows.source import TableSource
from dllm.registry import SOURCES

_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


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

        from dllm.prompts.files.arrow import BATCH_ROWS, rows

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
            where=key_of(source),
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


def commit_of(urls: Iterable[str]) -> str | None:
    """Return the commit that a dataset's files were loaded from; None where the files do not come from the hub.

    Args:
        urls: addresses of the files, as `datasets` records them beside their checksums.
    """
    return next((found[1] for url in urls if (found := _COMMIT.match(url))), None)
