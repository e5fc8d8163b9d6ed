"""Which files of a folder hold a source's rows: by kind, by split, and as `save_to_disk` lists them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm.errors import ConfigError, DataError
from dllm.outside import JsonError, is_file_name, parse_json
from dllm.prompts.files import dataset_card
from dllm.prompts.files.readers import COMPRESSED, KINDS, kind_of

TRAIN = "train"
_NUMBERED = re.compile(r"(\w+(?:[.-]\w+)*?)([.-])(\d{5,})-of-(\d{5,})(?!\d)")
_MEANINGS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("heldout", "holdout", "held_out", "held-out", "hold_out", "hold-out"), "heldout"),
}
"""Words by which a file, or the folder it lies in, is named after a split, and the split, as `datasets` has them; it
takes held-out rows for training rows where they are named so."""
_WORD = re.compile(rf"(?<![^\W\d_])(?:{'|'.join(_MEANINGS)})(?![^\W\d_])")
STATE, DICT = "state.json", "dataset_dict.json"
"""What `save_to_disk` writes beside the files of one dataset, and beside the folders of several."""

Found = tuple[dict[str, Path], dict[str, str]]
"""The files that are read, and those that are not, with the reason; both by their path in the folder."""


def files(path: Path, split: str, where: str) -> Found:
    """Find the files with the rows of a folder.

    Where files are named after splits as on the hub, those of other splits are left out.

    Raises:
        ConfigError: there is no such split, or there are several and none is chosen.
        DataError: no file holds rows.
    """
    if (path / DICT).is_file():
        return _several_saved(path, split, where)
    if (path / STATE).is_file() and (path / "dataset_info.json").is_file():
        _refuse_split([], split, where)
        return _saved(path)
    found: dict[str, Path] = {}
    passed_over: dict[str, str] = {}
    for file in sorted(_below(path)):
        name = file.relative_to(path).as_posix()
        is_hidden = any(part.startswith(".") for part in Path(name).parts)
        if is_hidden or (file.is_dir() and not file.is_symlink()):
            continue
        if file.is_dir():
            passed_over[name] = "a link to a folder"
            continue
        if kind_of(name) is None or not file.is_file():
            passed_over[name] = "this kind is not read" if file.is_file() else "no file"
        else:
            found[name] = file
    if not found:
        there = ", ".join(list(passed_over)[:3]) + (", ..." if len(passed_over) > 3 else "")
        raise DataError(f"no {KINDS} file in the folder, only {there or 'nothing'}", where=where)
    named = {name: _split_of(name) for name in found}
    words = {each for each in named.values() if each is not None}
    if len(words) == 1 and split == TRAIN and not any(_WORD.search(each.lower()) for each in words):
        # One word that is no split's own is but the name of the files: data-00000-of-00002.
        named = dict.fromkeys(found)
    if listed := dataset_card.splits(path, found):  # `datasets` reads no other files then
        passed_over |= {name: f"not listed in {dataset_card.CARD}" for name in found if name not in listed}
        found = {name: file for name, file in found.items() if name in listed}
        named = dict(listed)
    return _of_split(found, passed_over, named, split, where)


def _below(path: Path) -> Iterator[Path]:
    """Find all files and folders below one.

    Raises:
        DataError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"cannot list the folder: {error.strerror}", where=str(error.filename))

    for folder, folders, names in os.walk(path, onerror=fail):
        yield from (Path(folder, name) for name in (*folders, *names))


def _of_split(
    found: dict[str, Path], passed_over: dict[str, str], named: Mapping[str, str | None], split: str, where: str
) -> Found:
    splits = sorted({each for each in named.values() if each is not None})
    chosen = {each for each in splits if each == split or _meaning(each) == split == TRAIN}
    chosen = chosen or {each for each in splits if _meaning(each) == _meaning(split)}
    if not chosen:
        if split != TRAIN or len(splits) > 1:
            _refuse_split(splits, split, where)
        if None not in named.values() or not splits:
            _check_numbers(found, where)
            return found, passed_over
    # Files without a split in their name stand for the training split; those of another one stay out.
    kept = {*chosen, None} if split == TRAIN else chosen
    others = {name: each for name, each in named.items() if each not in kept}
    passed_over |= {name: "named after no split" if each is None else f"split {each}" for name, each in others.items()}
    found = {name: path for name, path in found.items() if name not in others}
    _check_numbers(found, where)
    return found, passed_over


def _split_of(name: str) -> str | None:
    """Return the split a file is named after, in its own word: its name counts before the folders it lies in."""
    path = Path(name)
    numbered = _NUMBERED.match(path.name)
    if numbered and numbered[2] == "-" and re.fullmatch(r"\w+", numbered[1]) and _WORD.search(numbered[1].lower()):
        return numbered[1]
    stem = path.name.lower()
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    parts = [stem.rpartition(".")[0], *map(str.lower, path.parts[-2::-1])]
    words = [each for find in (_WORD.fullmatch, _WORD.search) for part in parts if (each := find(part))]
    if words:
        return words[0][0]
    return numbered[1] if numbered else None


def meaning_of(word: Any) -> str | None:
    """Return the split that a word means; None for other words."""
    return _MEANINGS.get(word.lower()) if isinstance(word, str) else None


def _meaning(split: str) -> str:
    return _MEANINGS.get(split.lower(), split)


def _check_numbers(found: Iterable[str], where: str) -> None:
    """Refuse numbered files of which some are not there.

    Raises:
        DataError: names of files say how many there are, and there are fewer.
    """
    series: dict[tuple[str, str], set[int]] = {}
    for name in found:
        path = Path(name)
        if numbered := _NUMBERED.match(path.name):
            start = f"{path.parent / numbered[1]}{numbered[2]}"
            series.setdefault((start, numbered[4]), set()).add(int(numbered[3]))
    for (start, digits), numbers in series.items():
        total = int(digits)
        first = 1 if total in numbers and 0 not in numbers else 0
        expected = range(first, first + total)
        count = total - sum(number in expected for number in numbers)
        missing = [f"{n:0{len(digits)}}" for n in itertools.islice((n for n in expected if n not in numbers), 3)]
        if missing:
            more = f" and {count - len(missing)} more" if count > len(missing) else ""
            what = f"of the files {start}*-of-{digits} the numbers {', '.join(missing)}{more} are missing"
            raise DataError(what, where=where, hint="fetch them, or name the files that are there as sources")


def _refuse_split(splits: Sequence[str], split: str, where: str) -> None:
    if splits:
        what = f"the files are of the splits {', '.join(splits)}, none of {split}"
        raise ConfigError(what, where=where, hint="name one of them in prepare.sources[].split")
    if split != TRAIN:
        hint = "leave prepare.sources[].split out; prepare.sources[].limit takes a part"
        raise ConfigError(f"split {split!r} does not apply: no file is named after a split", where=where, hint=hint)


def _several_saved(path: Path, split: str, where: str) -> Found:
    splits = _strings(_read(path / DICT).get("splits"), path / DICT)
    chosen = splits[0] if split == TRAIN and len(splits) == 1 else split
    if chosen not in splits:
        _refuse_split(splits, split, where)
        raise DataError("the folder of save_to_disk holds no split", where=str(path / DICT))
    found, passed_over = _saved(path / chosen)
    others = {each: f"split {each}" for each in splits if each != chosen}
    return (
        {f"{chosen}/{name}": file for name, file in found.items()},
        {f"{chosen}/{name}": reason for name, reason in passed_over.items()} | others,
    )


def _saved(path: Path) -> Found:
    """List the files of a folder that `save_to_disk` wrote, in their order."""
    state = _read(path / STATE)
    if state.get("_indices_data_files"):
        hint = "save it again after flatten_indices()"
        raise DataError("the folder of save_to_disk selects rows by an index file", where=str(path / STATE), hint=hint)
    entries = state.get("_data_files")
    listed = [
        entry.get("filename") if isinstance(entry, dict) else None
        for entry in (entries if isinstance(entries, list) else ())
    ]
    found = {name: path / name for name in _strings(listed, path / STATE)}
    missing = [name for name, file in found.items() if not file.is_file()]
    if missing or not found:
        what = f"the folder of save_to_disk lacks {', '.join(missing[:3]) or 'its files'}"
        raise DataError(what, where=str(path), hint="save it again")
    about = {STATE: "about the files", "dataset_info.json": "about the files"}
    names = sorted(each.name for each in path.iterdir() if each.is_file() and each.name not in found)
    return found, {name: about.get(name, "not listed in state.json") for name in names}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, JsonError) as error:
        raise DataError(f"cannot read what save_to_disk wrote: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise DataError("not what save_to_disk writes", where=str(path), hint="save it again")
    return value


def _strings(value: Any, where: Path) -> list[str]:
    """Return names of files or folders in the same folder."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise DataError("not what save_to_disk writes", where=str(where), hint="save it again")
    for name in value:
        if not is_file_name(name):
            raise DataError(f"{name[:60]!r} lies elsewhere", where=str(where), hint="save it again")
    return value
