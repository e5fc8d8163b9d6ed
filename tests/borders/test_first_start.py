"""The first start of a project: whatever interrupts the making of mlflow.db, the second call works."""

import contextlib
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dllm.errors import ServerError, StageError
from dllm.tracking.address import sqlite_uri
from dllm.tracking.mlflow_runs import MlflowTracker
from dllm.tracking.sqlite_store import make, probe
from dllm.tracking.store import connect
from tests.patience import LONGEST_S


@pytest.fixture
def store(tmp_path: Path, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's whole mlflow.db, without runs."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path(shutil.copyfile(empty_mlflow_store, tmp_path / "mlflow.db"))


def works(path: Path) -> bool:
    tracker = MlflowTracker(path.parent, "first", "prepare")
    tracker.finish("FINISHED")
    left = [file.name for file in path.parent.iterdir() if file.name.startswith(".mlflow.db")]
    return left == [] and connect(sqlite_uri(path)).get_run(tracker.run_id).info.status == "FINISHED"


# Forked from a process that has imported MLflow, so that blows fall into the making of the file and not before.
FIRST_STARTS = """
import os, random, signal, sys, time
from pathlib import Path
from dllm.tracking import store, sqlite_store
from dllm.tracking.address import sqlite_uri

path, blows, draws = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
began = time.monotonic()
if os.fork() == 0:
    store.connect(sqlite_uri(path))
    os._exit(0)
os.wait()
took, made = time.monotonic() - began, 0
for blow in range(blows):
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        store.connect(sqlite_uri(path))
        os._exit(0)
    time.sleep(draws.uniform(0, took))
    os.kill(child, draws.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    os.waitpid(child, 0)
    made += path.exists()
    if path.exists() and path.stat().st_size:
        sqlite_store.check(path)
        import sqlite3
        sqlite3.connect(path).execute("select count(*) from runs").fetchone()
print(made)
"""


@pytest.mark.kill
def test_the_second_start_works_after_blows_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    argv = [sys.executable, "-c", FIRST_STARTS, str(path), "8", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert works(path)


def test_what_a_killed_start_left_goes_and_what_a_user_keeps_beside_stays(tmp_path: Path) -> None:
    left, kept = tmp_path / ".mlflow.db.0123abcd-wal", tmp_path / ".mlflow.db.bak"
    left.write_text("left over")
    kept.write_text("a copy of last week")
    make(tmp_path / "mlflow.db")
    assert not left.exists() and kept.read_text() == "a copy of last week"


def test_a_path_that_mlflow_cannot_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"both kinds of quotes.*move or rename the project"):
        make(tmp_path / 'it\'s "b"' / "mlflow.db")
    make(tmp_path / "it's; a %41 ?b#" / "mlflow.db")


@pytest.mark.parametrize("statements", [3, 40, 400])
def test_a_half_made_database_is_made_anew(store: Path, statements: int) -> None:
    """What a process killed amid the migrations of an earlier version of this code left behind."""
    with contextlib.closing(sqlite3.connect(store)) as whole:
        dump = list(whole.iterdump())
    store.unlink()
    with contextlib.closing(sqlite3.connect(store)) as half:
        half.execute("PRAGMA foreign_keys = OFF")
        for statement in [s for s in dump if s.startswith("CREATE TABLE")][: statements // 3]:
            half.execute(statement)
        half.execute("DROP TABLE IF EXISTS alembic_version")
        half.commit()
    store.with_name("mlflow.db-journal").write_bytes(b"")
    assert works(store)


@pytest.mark.parametrize("version", ["451aebb31d03", "no-such-version"])
def test_an_older_or_newer_schema_that_holds_runs_is_named_and_kept(store: Path, version: str) -> None:
    MlflowTracker(store.parent, "old", "prepare").finish("FINISHED")
    with contextlib.closing(sqlite3.connect(store)) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
        database.commit()
    store = store.rename(store.with_name("other.db"))  # MLflow keeps stores that it has opened
    before = store.read_bytes()
    with pytest.raises(Exception, match=r"(mlflow db upgrade|install that version)") as refusal:
        connect(sqlite_uri(store))
    assert len(str(refusal.value)) <= 500 and store.read_bytes() == before


VERSIONS = {
    "of a newer MLflow": ("UPDATE alembic_version SET version_num = 'ffffffffffff'", "install that version"),
    "two at once": ("INSERT INTO alembic_version VALUES ('451aebb31d03')", "more than one head"),
}


@pytest.mark.parametrize(("statement", "said"), VERSIONS.values(), ids=VERSIONS.keys())
def test_versions_that_no_upgrade_helps_are_one_line_of_their_own(store: Path, statement: str, said: str) -> None:
    MlflowTracker(store.parent, "kept", "prepare").finish("FINISHED")
    store = store.rename(store.with_name("other.db"))  # MLflow keeps stores that it has opened
    with contextlib.closing(sqlite3.connect(store)) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(ServerError, match=said):
        connect(sqlite_uri(store))


FOREIGN = {
    "notes": ["CREATE TABLE notes (x)", "INSERT INTO notes VALUES ('precious')"],
    "of another program with migrations": [
        "CREATE TABLE flow_run (id)",
        "CREATE TABLE alembic_version (version_num)",
        "INSERT INTO alembic_version VALUES ('abc')",
    ],
    "with names of MLflow's": ["CREATE TABLE runs (id)", "CREATE TABLE experiments (id)", "CREATE TABLE plants (id)"],
}


@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path, statements: list[str]) -> None:
    path = tmp_path / "theirs.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    before = path.read_bytes()
    with pytest.raises(StageError, match=r"database of another program.*name another file"):
        connect(sqlite_uri(path))
    assert path.read_bytes() == before


def test_a_store_with_tables_of_its_owner_works(store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as database:
        database.execute("CREATE TABLE notes (x)")
        database.commit()
    assert works(store)


def test_a_folder_in_place_of_the_database_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(StageError, match=r"no file stands.*tmp.*/mlflow\.db\).*remove it or move it away"):
        connect(sqlite_uri(tmp_path / "mlflow.db"))


DAMAGE = {
    "garbage": lambda data: random.Random(1).randbytes(4096),
    "text": lambda data: b"not a database at all, but text" * 10,
    "one byte": lambda data: b"x",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut in a page": lambda data: data[:-1000],
    "cut to the header": lambda data: data[:100],
    "zeros at the start": lambda data: bytes(1024) + data[1024:],
    "pages overwritten": lambda data: data[:4096] + random.Random(2).randbytes(len(data) - 4096),
    "a page in the middle": lambda data: (
        data[: len(data) // 4096 // 2 * 4096] + bytes(4096) + data[len(data) // 4096 // 2 * 4096 + 4096 :]
    ),
}


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_database_is_one_line_that_says_what_to_do(store: Path, how) -> None:
    MlflowTracker(store.parent, "damage", "prepare").finish("FINISHED")
    store.write_bytes(how(store.read_bytes()))
    before = store.read_bytes()
    with pytest.raises(StageError, match=r"MLflow's database is damaged.*move it away") as refusal:
        connect(sqlite_uri(store))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) <= 500
    assert store.read_bytes() == before, "what may still be saved is left as it is"


def test_an_empty_file_is_no_obstacle(store: Path) -> None:
    store.write_bytes(b"")
    assert works(store)


def test_a_full_disk_at_the_first_start_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from dllm.tracking import store; from dllm.tracking.address import sqlite_uri\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: store.connect(sqlite_uri(Path(sys.argv[1])))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    path = tmp_path / "mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), "200000"],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.stdout.startswith(("StageError", "ServerError")) and len(done.stdout) < 500, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert works(path)


def test_a_disk_that_fails_now_is_no_damage(store: Path) -> None:
    """Another call was stopped in a transaction, and under this limit SQLite cannot undo it: it would be moved away."""
    line = (
        "import os, sqlite3, sys; database = sqlite3.connect(sys.argv[1]); database.execute('PRAGMA cache_size = 1'); "
        "database.execute('CREATE TABLE more (text)'); "
        "database.executemany('INSERT INTO more VALUES (?)', [('x' * 900,)] * 999); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", line, str(store)], check=True)
    assert store.with_name(f"{store.name}-journal").exists()
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, bounds[1]))
    try:
        with pytest.raises(ServerError, match=r"cannot be used: disk I/O error .*limits of the process"):
            probe(store, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    probe(store, 1.0)
