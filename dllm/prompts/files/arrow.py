"""Rows of Arrow tables (parquet, `save_to_disk` folders, datasets of the hub) as JSON would hold them.

Arrow gives every struct the keys of all rows, null where a row has none: such keys are dropped, at any depth. Columns
of type `arrow.json`, which `datasets` writes where types differ between rows, are parsed at any depth.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dllm.outside import JsonError, parse_json
from dllm.prompts.chats.tools import JsonCell

BATCH_ROWS = 1024
TEXT_KEYS = ("content", "value")
"""Keys of a turn that hold a text."""

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Convert = Callable[[Any], Any]


Row = dict[str, Any] | JsonError
"""A row, or why it cannot be read: a cell of type `arrow.json` is not JSON."""


def read_table(source: Path | pa.Buffer) -> pa.Table:
    """Read a whole parquet file.

    pyarrow's own threads may outlive a read, and then abort the process as it exits, or never let it (apache/arrow
    issues 34314 and 50482). So no thread but this one reads.

    Raises:
        pyarrow.ArrowException, OSError: the file is missing or damaged.
    """
    readable = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
    with pq.ParquetFile(readable, pre_buffer=False) as file:
        return file.read(use_threads=False)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet file.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:  # see read_table
        for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            yield from rows(batch)


def ipc_rows(path: Path) -> Iterator[Row]:
    """Read the rows of an Arrow file, a stream as `save_to_disk` writes or a file with an index; raises as above."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            _check_end(source)
            batches = iter(pa.ipc.open_stream(source))
        for batch in batches:
            yield from rows(batch)


def _check_end(source: pa.NativeFile) -> None:
    """Refuse a stream without the mark of its end: of a writer that was killed it may end after any batch."""
    is_marked = source.read(4) == _END_OF_STREAM[:4]  # since Arrow 0.15; before, nothing told
    source.seek(max(0, source.size() - len(_END_OF_STREAM)))
    if is_marked and source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise pa.ArrowInvalid("the stream has no mark of its end, as where its writer was killed")
    source.seek(0)


def rows(batch: pa.RecordBatch | pa.Table) -> Iterator[Row]:
    """Turn a batch into rows; columns that are null stay, with the value None.

    Raises:
        pyarrow.ArrowException: two columns have one name.
    """
    names = batch.schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise pa.ArrowInvalid(f"the column {twice!r} stands twice")
    converts = {field.name: _convert(field.type, field.name) for field in batch.schema}
    for start in range(0, batch.num_rows, BATCH_ROWS):
        for row in _plain_rows(batch.slice(start, BATCH_ROWS)):
            try:
                yield {name: value if value is None else converts[name](value) for name, value in row.items()}
            except JsonError as error:
                yield JsonError(f"a cell is not JSON: {error}")


def _plain_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a batch; of times that Python does not have, such as those of the year 10000, the numbers."""
    try:
        return list(batch.to_pylist())
    except (OverflowError, ValueError, LookupError):  # a time, or a time zone
        columns = {name: _plain_column(batch.column(name)) for name in batch.schema.names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain_column(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError, LookupError) as error:
        if not pa.types.is_temporal(column.type):
            raise pa.ArrowInvalid(f"a time cannot be read: {error}") from None
        width = pa.int32() if column.type.bit_width == 32 else pa.int64()
        return list(column.cast(width).to_pylist())


def _convert(type: pa.DataType, name: str = "") -> Convert:
    """Return what turns a Python value of an Arrow type into a value of JSON."""
    if isinstance(type, pa.JsonType):
        return _text_cell if name in TEXT_KEYS else _parse
    if isinstance(type, pa.BaseExtensionType):
        return _convert(type.storage_type, name)
    if pa.types.is_dictionary(type):
        return _convert(type.value_type, name)
    if pa.types.is_struct(type):
        inner = {field.name: _convert(field.type, field.name) for field in type}
        return lambda value: {key: inner[key](each) for key, each in value.items() if each is not None}
    if pa.types.is_map(type):
        named = _convert(type.item_type)
        return lambda value: _mapping(value, named)
    if _is_list(type):
        item = _convert(type.value_type, name)
        return lambda value: [None if each is None else item(each) for each in value]
    return _plain


def _mapping(pairs: list[tuple[Any, Any]], item: Convert) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise JsonError(f"the key {str(twice)[:40]!r} stands twice")
    return {name: None if each is None else item(each) for name, each in pairs}


def _is_list(type: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_kind(type) for is_kind in (*kinds, *views))


def _parse(value: Any) -> Any:
    return parse_json(value)


def _text_cell(raw: str) -> Any:
    try:
        value = parse_json(raw)
    except JsonError:
        return raw
    return value if isinstance(value, str) else JsonCell(raw, value)


def _plain(value: Any) -> Any:
    """Return values that JSON has as they are, and others as the text that JSON files hold for them.

    Readers of JSON, that of `datasets` too, take texts such as 2024-05-01 for times.
    """
    if isinstance(value, bytes):  # columns of text by writers that do not mark them as UTF-8
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, datetime.datetime):
        is_day = value.timetz().replace(tzinfo=None) == datetime.time()
        return value.date().isoformat() if is_day else value.isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return json.loads(str(value)) if value.is_finite() else str(value)
    return value
