"""`python -m dllm verify`: compare every stored file of a project with its digest, and say how to restore what differs.

Goes over out/, work/, registered checkpoints, DVC's cache, that of built-in targets, the models of the Hugging Face hub
that params.yaml names, and a local MLflow store; what has no digest is listed too. Changes nothing.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.config.load import load_params
from dllm.digests import check_files, is_sealed, unsealed
from dllm.errors import DataError, DllmError, ModelError, ServerError
from dllm.files import LOCK
from dllm.methods.dflash.features import check_part
from dllm.methods.dflash.method import FEATURES
from dllm.models import builtin, hub
from dllm.models.checkpoints import check_bytes
from dllm.publishing import RUN
from dllm.regeneration.journal import count_damaged
from dllm.report.terminal import WIDTH
from dllm.responses import shards
from dllm.stages import STAGES
from dllm.stages.records import OUTPUTS, check_published, read_record
from dllm.tracking import places, provenance
from dllm.tracking.model_registry import STORE
from dllm.tracking.runs import flatten
from dllm.training.checkpoints import AGAIN, read_state

PARAMS = "params.yaml"
OK, UNKNOWN = "ok", "no digests"
DVC_CACHE = Path(".dvc", "cache", "files", "md5")


@dataclass(frozen=True)
class Item:
    """One thing to verify."""

    name: str
    path: Path
    """A file or a folder."""
    check: Callable[[], str]
    """Returns `OK` or `UNKNOWN`; raises DllmError where bytes differ."""
    only: Sequence[Path] = ()
    """Those of the folder's files that are meant, where not all are."""

    def files(self) -> Sequence[Path]:
        """List the files."""
        if self.only or not self.path.is_dir():
            return self.only or [self.path]
        return [path for path in self.path.rglob("*") if path.is_file()]


def verify(root: Path, console: Console | None = None) -> None:
    """Verify all that the project has stored, and print a table: what, files, bytes, state.

    Raises:
        DataError, ModelError, ServerError: something is damaged; of the first such thing, after the table.
    """
    console = console or Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    table = Table("what", "files", "MB", "state", title=f"dllm verify: {root}", title_justify="left", width=WIDTH)
    for column in table.columns:
        column.overflow = "fold"
    errors: list[DllmError] = []
    items = list(_items(root))
    items += _others(root, {item.path for item in items})
    for item in items:
        files = item.files()
        size = sum(map(_size, files))
        try:
            state = item.check()
        except DllmError as error:
            errors.append(error)
            state = "DAMAGED"
        except OSError as error:
            errors.append(DataError(f"cannot be read: {error.strerror}", where=str(error.filename or item.path)))
            state = "DAMAGED"
        table.add_row(item.name, str(len(files)), f"{size / 1e6:.1f}", state)
    console.print(table)
    for found in errors:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if errors:
        first = errors[0]
        raise type(first)(f"{len(errors)} of {len(items)} are damaged, first: {first.message}", where=first.where)


def _items(root: Path) -> Iterator[Item]:
    for stage in STAGES:
        folder = root / "out" / stage
        if folder.is_dir():
            yield Item(f"out/{stage}", folder, partial(_published, root, stage))
    work = root / "work"
    for step in sorted(work.glob("train/*/checkpoints/step-*")):
        yield Item(step.relative_to(root).as_posix(), step, partial(_checkpoint, step))
    for cache in _folders(root / FEATURES):
        yield Item(cache.relative_to(root).as_posix(), cache, partial(_features, cache))
    for journal in sorted(work.glob("regenerate/*/**/journal-*.jsonl")):
        yield Item(journal.relative_to(root).as_posix(), journal, partial(_journal, journal))
    for folder in sorted({record.parent for record in work.glob("regenerate/*/**/shard-*.json")}):
        yield Item(folder.relative_to(root).as_posix(), folder, partial(_shards, folder))
    for kept in _folders(root / STORE):
        yield Item(kept.relative_to(root).as_posix(), kept, partial(_registered, kept))
    if (file := root / PARAMS).is_file():
        yield from _named_in(file, root)
    for place in _folders(builtin.cache_root() / "models"):
        yield Item(f"target {place.name}", place, partial(_target, place))
    if (root / DVC_CACHE).is_dir():
        yield Item("DVC's cache", root / DVC_CACHE, partial(_dvc_cache, root / DVC_CACHE))
    store = root / "mlflow.db"
    if store.is_file():
        yield Item(store.name, store, partial(_database, store))


def _named_in(file: Path, root: Path) -> Iterator[Item]:
    """Yield what params.yaml names: a folder of registered checkpoints, and models of the Hugging Face hub."""
    try:
        params = load_params(file)
    except DllmError as error:
        yield Item(file.name, file, partial(_fail, error))
        return
    store = places.folder_in(params.register_.store, root, "x")
    if store is not None and store.parent != (root / STORE).resolve():
        for kept in _folders(store.parent):
            yield Item(str(kept), kept, partial(_registered, kept))
    names = {value for value in flatten(params.model_dump()).values() if isinstance(value, str)}
    for name in sorted(filter(hub.looks_like_id, names)):
        for snapshot in hub.cached(name):
            yield Item(f"{name} {snapshot.name[:8]}", snapshot, partial(_snapshot, snapshot))


def _others(root: Path, known: Set[Path]) -> Iterator[Item]:
    """Yield what else is in work/ and beside the MLflow store: few of these files have digests."""
    for folder in [*sorted(path for path in root.glob("work/*") if path.is_dir()), root / "mlartifacts"]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
        others = [path for path in files if known.isdisjoint({path, *path.parents})]
        name = folder.relative_to(root).as_posix()
        if others:
            name = name if len(others) == len(files) else f"{name}, other files"
            yield Item(name, folder, partial(_sealed, others), others)


def _folders(place: Path) -> list[Path]:
    """List the folders in a place, without those that a killed call has left half made, which start with a dot."""
    return sorted(path for path in place.glob("*") if path.is_dir() and not path.name.startswith("."))


def _published(root: Path, stage: str) -> str:
    has_digests = OUTPUTS in read_record(root, stage, RUN)
    check_published(root, root / "out" / stage)
    for name in provenance.RECORDS:
        if (root / "out" / stage / name).is_file():
            read_record(root, stage, name)
    if has_digests:
        return OK
    folder = root / "out" / stage
    if not (folder / shards.MANIFEST).is_file():
        return UNKNOWN
    for entry in shards.read_manifest(folder)["shards"]:
        for _ in shards.read_shard(folder, entry):
            break
    return OK


def _checkpoint(step: Path) -> str:
    check_files(step, read_state(step)["files"], error=ModelError, hint=AGAIN, but=("state.json",))
    return OK


def _features(cache: Path) -> str:
    for part in sorted(cache.glob("part-*.safetensors")):
        check_part(part)
    return OK


def _journal(journal: Path) -> str:
    if damaged := count_damaged(journal):
        hint = "run `python -m dllm regenerate`, which generates these responses again"
        raise DataError(f"{damaged} lines are damaged", where=str(journal), hint=hint)
    return OK


def _shards(folder: Path) -> str:
    hint = "run `python -m dllm regenerate`, which generates the shard again"
    for path in sorted(folder.glob("shard-*.json")):
        try:
            entry = unsealed(path.read_bytes())["entry"]
            files = {str(entry["file"]): str(entry["sha256"])}
        except (ValueError, KeyError, TypeError):
            raise DataError("the record of a shard is damaged", where=str(path), hint=hint) from None
        check_files(folder, files, error=DataError, hint=hint)
    return OK


def _registered(kept: Path) -> str:
    hint = (
        "restore it by `dvc checkout --force out/train` at the commit that trained it, then `python -m dllm register`; "
        "its tag dllm.git_commit names the commit"
    )
    try:
        check_bytes(kept)  # names the file
    except ModelError as error:
        raise ModelError(error.message, where=error.where, hint=hint) from None
    if provenance.digest(kept)[:16] != kept.name:
        raise ModelError("a registered checkpoint has other bytes than its digest", where=str(kept), hint=hint)
    return OK


def _dvc_cache(cache: Path) -> str:
    """Compare the files of DVC's cache with their names. DVC itself trusts a file whose time of change is as it was."""
    damaged = []
    for path in sorted(cache.glob("??/*")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if found != path.parent.name + path.name.removesuffix(".dir"):
            damaged.append(path)
    if not damaged:
        return OK
    names = " ".join(str(path.relative_to(cache.parents[3])) for path in damaged[:3])
    more = " and so on" if len(damaged) > 3 else ""
    what = f"{len(damaged)} files of DVC's cache have other bytes than their names say"
    hint = f"`rm -f {names}`{more}, then `dvc repro -sf STAGE` for each stage whose out/ is damaged"
    raise DataError(what, where=str(damaged[0]), hint=hint)


def _snapshot(place: Path) -> str:
    for weights in (False, True):
        hub.check_blobs(place, weights=weights)
    return OK


def _sealed(files: Sequence[Path]) -> str:
    """Check the records among some files that hold their own digest, such as the responses of `evaluate`."""
    state = OK
    for path in files:
        try:
            data = path.read_bytes() if path.suffix == ".json" else b""
        except FileNotFoundError:  # a running stage has removed it
            continue
        if not is_sealed(data):
            state = UNKNOWN
            continue
        try:
            unsealed(data)
        except ValueError as error:
            raise DataError(str(error), where=str(path), hint="remove it; its stage makes it again") from None
    return state


def _size(path: Path) -> int:
    """Return a file's size in bytes: 0 of one that a running stage has removed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fail(error: DllmError) -> str:
    raise error


def _target(place: Path) -> str:
    return OK if builtin.check(place) else "weights only"


def _database(store: Path) -> str:
    hint = "restore it from a backup; runs and registered versions are recorded there alone"
    try:
        with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("pragma quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise ServerError(f"the MLflow store is damaged: {' '.join(found.split())[:120]}", where=str(store), hint=hint)
    return OK
