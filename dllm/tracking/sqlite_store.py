"""The store as a SQLite file: made aside and moved into place, mended where half made, probed for locks and damage.

MLflow makes its tables in seconds of migrations, in place. A process killed meanwhile would leave a file that no later
call could use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from mlflow import MlflowClient
from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from dllm.disk_faults import HINTS
from dllm.errors import ServerError, StageError
from dllm.files import aside_of, left_overs
from dllm.tracking.address import sqlite_uri

MAKING_S = 120.0
"""Patience with another process that makes the file, in seconds."""
COMPANIONS = ("-journal", "-wal", "-shm")
FILES = "mlartifacts"
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow records absolute places: table and column."""
ALWAYS = {"experiments", "runs", "metrics", "params", "tags"}
"""Tables of every MLflow store since its first version."""
CHECKED_BYTES = 64 << 20
"""Larger files are not read as a whole at the start of a stage."""


def make(path: Path, *, instead: bool = False) -> None:
    """Make a file with MLflow's tables, in one step as seen from outside.

    Args:
        path: the file; one that another process has made meanwhile is kept.
        instead: replace the file that is there.

    Raises:
        StageError: the disk is full, another process has been making the file for minutes, or MLflow cannot keep runs
            at such a path.
    """
    if "'" in str(path) and '"' in str(path):  # MLflow writes it into SQL as Python does
        what = "the project's path holds both kinds of quotes, with which MLflow cannot make its tables"
        raise StageError(what, where=str(path), hint="move or rename the project")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path):
        if _has_content(path) and not instead:
            return
        for left_over in left_overs(path):
            left_over.unlink()
        aside = aside_of(path)
        try:
            _make_tables(aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            for companion in _companions(path):  # of the file that is replaced: SQLite would play them into the new one
                companion.unlink(missing_ok=True)
            _disconnect(path)
            aside.replace(path)
        finally:
            for each in (aside, *_companions(aside)):
                each.unlink(missing_ok=True)


def open_or_make(path: Path, patience_s: float) -> None:
    """Make the file if there is none, and check that it can be read and written.

    Raises:
        ServerError: another process holds it locked.
        StageError: it is damaged, no file, or a database of another program, or the disk is full.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise StageError("no file stands where MLflow's database should", where=str(path), hint=HINTS[errno.EISDIR])
    if not _has_content(path):
        make(path)
    probe(path, patience_s)
    check(path)
    _refuse_foreign(path)


def probe(path: Path, patience_s: float) -> None:
    """Check that the file can be written now.

    MLflow itself waits for a lock for 20 s with each call.

    Raises:
        ServerError: another process holds it locked.
        StageError: it is damaged.
        OSError: it cannot be opened.
    """
    with path.open("r+b"):
        pass
    try:
        with closing(sqlite3.connect(path, timeout=patience_s, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            check(path)
            hint = "check that it and its folder can be written, and the limits of the process (ulimit -a)"
            raise ServerError(f"MLflow's database cannot be used: {error}", where=str(path), hint=hint) from None
        hint = "another process writes to it: wait for it or stop it (`fuser` names it), then run again"
        raise ServerError("MLflow's database is locked", where=str(path), hint=hint) from None
    except sqlite3.DatabaseError as error:
        raise damaged(path, str(error)) from None


def check(path: Path) -> None:
    """Check a file for damage: its length, and all of its pages where it is not large.

    Raises:
        StageError: it is damaged.
    """
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise damaged(path, "it is not an SQLite file")
    (page,), (changes, pages), (as_of,) = (
        struct.unpack_from(form, head, at) for form, at in ((">H", 16), (">II", 24), (">I", 92))
    )
    size = path.stat().st_size
    if changes == as_of and size < pages * (65536 if page == 1 else page) and not any(_companions_there(path)):
        raise damaged(path, "it is cut short")
    if size <= CHECKED_BYTES:
        with closing(sqlite3.connect(path, timeout=10)) as database:
            try:
                said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.OperationalError:  # locked, or a disk or a limit that lets nothing be written: no damage
                said = "ok"
            except sqlite3.DatabaseError as error:
                said = str(error)
        if said != "ok":
            raise damaged(path, said)


def follow_move(path: Path) -> None:
    """Have a project's store that was moved or copied with its folder point to the files that now lie beside it.

    MLflow records absolute places, of experiments, runs, models and versions, and would go on with the old ones.
    """
    here = path.parent.absolute().as_uri()
    with closing(sqlite3.connect(path, timeout=10)) as database:
        found = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        ends = [(str(place), f"/{FILES}/{quote(name)}") for name, place in found]
        old = {place.removesuffix(end) for place, end in ends if place.startswith("file://") and place.endswith(end)}
        for there in old - {here}:
            if not (path.parent / FILES).is_dir() and Path(unquote(there.removeprefix("file://"))).exists():
                continue  # the file alone was copied
            for table, column in PLACES:
                for folder in (FILES, "registered"):
                    start = f"{there}/{folder}/"
                    move = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                    database.execute(move, (f"{here}/{folder}/", len(start) + 1, len(start), start))
        database.commit()


def holds_runs(path: Path) -> bool:
    """Return whether a store holds a run, a registered model or other tables; of a damaged one it is assumed."""
    with closing(sqlite3.connect(path, timeout=10)) as database:
        try:
            tables = _tables(database)
            if _not_of_mlflow(tables):
                return True
            held = [
                database.execute(f"SELECT EXISTS (SELECT 1 FROM {name})").fetchone()[0]
                for name in {"runs", "registered_models"} & tables
            ]
        except sqlite3.DatabaseError:
            return True
    return any(held)


def _refuse_foreign(path: Path) -> None:
    """Leave a database of another program as it is: MLflow would write its tables into it."""
    with closing(sqlite3.connect(path, timeout=10)) as database:
        tables = _tables(database)
    if not tables >= ALWAYS and (others := _not_of_mlflow(tables)):
        what = f"a database of another program (tables {', '.join(sorted(others)[:3])}), not one of MLflow"
        hint = "name another file in MLFLOW_TRACKING_URI, or move this one away: a new one is made"
        raise StageError(what[:200], where=str(path), hint=hint)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _not_of_mlflow(tables: set[str]) -> set[str]:
    """Leave out MLflow's tables, and those of its migrations and of SQLite."""
    others = tables - Base.metadata.tables.keys() - {"alembic_version"}
    return {name for name in others if not name.startswith(("_alembic_tmp_", "sqlite_"))}


def damaged(path: Path, cause: str) -> StageError:
    """Return the one-line error for a file that SQLite cannot read."""
    hint = (
        f"bring back a copy of it, or move it away (mv {path.name} {path.name}.damaged) and run again: a new one is "
        "made; what out/ and registered/ hold is not affected"
    )
    return StageError(f"MLflow's database is damaged: {' '.join(cause.split())[:120]}", where=str(path), hint=hint)


def _make_tables(path: Path) -> None:
    uri = sqlite_uri(path)
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
    _disconnect(path)


def _disconnect(path: Path) -> None:
    """Close MLflow's connections to a file: they would go on with it under its old name, or after its replacement."""
    for stores in (SqlAlchemyStore, RegistryStore):
        if engine := getattr(stores, "_engine_map", {}).pop(sqlite_uri(path), None):
            engine.dispose()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the folder's own lock, which leaves no file behind."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        end = time.monotonic() + MAKING_S
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end:
                hint = "stop it, and run the same command again"
                raise StageError("another process has been making this file for minutes", where=str(path), hint=hint)
            time.sleep(0.1)
        yield
    finally:
        os.close(folder)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _companions(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in COMPANIONS]


def _companions_there(path: Path) -> list[Path]:
    return [companion for companion in _companions(path) if companion.exists()]
