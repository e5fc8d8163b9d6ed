"""MLflow away, locked, or a stage killed: the journal on disk has all, and each point reaches the store once."""

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from mlflow import MlflowClient

from dllm.errors import ServerError
from dllm.stages.workspace import close
from dllm.tracking import delivery, mlflow_runs, store
from dllm.tracking.mlflow_runs import MlflowTracker
from dllm.tracking.run_journal import FOLDER, RunJournal, journal_path
from dllm.tracking.store import connect
from dllm.workspace import SIDECAR, Workspace
from tests.borders.faulty_proxy import FaultyProxy


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    monkeypatch.setattr(mlflow_runs, "RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(mlflow_runs, "SHARE_OF_TIME", 0.0)
    monkeypatch.setattr(delivery, "LOCK_PATIENCE_S", 0.05)
    return tmp_path


@pytest.fixture
def proxy(root: Path, mlflow_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    yield proxy
    proxy.close()


def points(uri: str, run_id: str, keys: list[str]) -> Counter[tuple[str, int]]:
    client = connect(uri)
    return Counter((key, point.step) for key in keys for point in client.get_metric_history(run_id, key))


def status(uri: str, run_id: str) -> str:
    return str(connect(uri).get_run(run_id).info.status)


def once(keys: list[str], steps: range) -> Counter[tuple[str, int]]:
    return Counter((key, step) for key in keys for step in steps)


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Hold the store's database, as another process that writes to it does."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.outage
def test_a_server_that_fails_in_every_way_gets_each_point_once(
    root: Path, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(root, "outage", "train")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    draws = random.Random(7)
    for step in range(120):
        if step % 10 == 0:
            # It hangs once: each try takes the whole timeout.
            proxy.mode = "hang" if step == 60 else draws.choice(["up", "away", "lose replies"])
        tracker.log_metrics({"loss": step / 7, "lr": 0.1}, step)
        proxy.mode = "lose replies" if proxy.mode == "hang" else proxy.mode
    (root / "curve.txt").write_text("curve")
    proxy.mode = "lose replies"
    tracker.log_artifact(root / "curve.txt")
    tracker.log_table({"k": [1, 2]}, "table.json")
    (root / "curve.txt").write_text("changed since")
    tracker.log_params({"train": {"lr": 0.1}})
    proxy.mode = "away"
    tracker.finish("FINISHED")
    assert "track sync" in capsys.readouterr().err
    with pytest.raises(ServerError):
        delivery.synchronize(root)
    proxy.mode = "up"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    report = delivery.synchronize(root)
    assert report.sent and not report.refused and not report.closed
    found = points(proxy.url, tracker.run_id, ["loss", "lr"])
    assert found == once(["loss", "lr"], range(120))
    client = connect(proxy.url)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"train.lr": "0.1"}
    assert {file.path for file in client.list_artifacts(tracker.run_id)} == {"curve.txt", "table.json"}
    assert Path(client.download_artifacts(tracker.run_id, "curve.txt", str(root))).read_text() == "curve"
    assert list((root / FOLDER).iterdir()) == [], "all is in the store"


def _reply(status: str, kind: str, body: str, missing: int = 0) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) + missing}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


STRANGERS = {
    "a login page with 200": _reply("200 OK", "text/html", "<html>Sign in</html>"),
    "200 cut off": _reply("200 OK", "application/json", '{"run": {', missing=400),
    "a list": _reply("200 OK", "application/json", "[]"),
    "a redirect to a login": _reply("302 Found", "text/html", "moved"),
    "400 of a proxy": _reply("400 Bad Request", "text/html", "<html>plain HTTP to an HTTPS port</html>"),
    "400 of a gateway": _reply("400 Bad Request", "application/json", '{"message": "gateway"}'),
    "401": _reply("401 Unauthorized", "text/html", "login"),
    "403": _reply("403 Forbidden", "application/json", '{"error": "no"}'),
    "404 of a proxy": _reply("404 Not Found", "text/html", "no such site"),
    "409": _reply("409 Conflict", "text/html", "busy"),
    "429": _reply("429 Too Many Requests", "text/html", "slow down"),
    "500": _reply("500 Internal Server Error", "text/html", "oops"),
    "503": _reply("503 Service Unavailable", "text/html", "maintenance"),
}
"""What something else than MLflow says at its address."""


@pytest.mark.slow
def test_no_reply_of_a_stranger_loses_a_point(
    root: Path, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MlflowTracker(root, "strangers", "train")
    for step, reply in enumerate(STRANGERS.values()):
        proxy.reply, proxy.mode = reply, "answer"
        tracker.log_metrics({"loss": 1.0}, step)
        proxy.mode = "up"
        tracker.log_metrics({"back": 1.0}, step)
    said = capsys.readouterr().err
    assert "refuses" not in said and "lost" not in said
    assert all(len(line) <= 500 for line in said.splitlines()) and said.count("MLflow is away") == len(STRANGERS)
    for reply in STRANGERS.values():
        proxy.reply, proxy.mode = reply, "answer"
        with pytest.raises(ServerError) as caught:
            connect(proxy.url)
        assert len(str(caught.value)) <= 500
    proxy.mode = "up"
    tracker.finish("FINISHED")
    assert points(proxy.url, tracker.run_id, ["loss", "back"]) == once(["loss", "back"], range(len(STRANGERS)))


class Endless:
    """A reply that goes on for ever."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None: ...

    def iter_content(self, size: int) -> Iterator[bytes]:
        while True:
            yield b" " * size


def test_a_reply_without_an_end_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_REPLY_BYTES", 1000)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    assert len(store._read(Endless())) == 1000  # type: ignore[arg-type]
    monkeypatch.setattr(store, "MAX_REPLY_BYTES", 1 << 20)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "-1")
    with pytest.raises(TimeoutError, match="timed out"):
        store._read(Endless())  # type: ignore[arg-type]


@pytest.mark.parametrize("run", ['{"info": {"run_id": ""}}', '{"info": {"run_id": "../../params"}}'])
def test_a_run_without_an_id_that_names_a_file_is_refused(
    root: Path, proxy: FaultyProxy, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f'{{"experiment": {{"experiment_id": "0", "name": "x"}}, "run": {run}}}'
    monkeypatch.setattr(mlflow_runs, "connect", lambda uri, root: MlflowClient(uri, uri))
    proxy.reply, proxy.mode = _reply("200 OK", "application/json", body), "answer"
    with pytest.raises(ServerError, match="gave a new run the id"):
        MlflowTracker(root, "x", "train")
    assert not list(root.rglob("*.jsonl"))


POLITE = ("{}", '{"ok": true}', '{"run": {}}', '{"metrics": []}', '{"experiments": []}', '{"run": {"info": {}}}')
"""What says 200 in JSON to everything: MLflow's client takes it for success."""


@pytest.mark.slow
def test_a_stranger_that_says_yes_to_everything_loses_nothing(root: Path, proxy: FaultyProxy) -> None:
    (root / "curve.txt").write_text("curve")
    for body in POLITE:
        proxy.mode = "up"
        tracker = MlflowTracker(root, "polite", "train")
        proxy.reply = _reply("200 OK", "application/json", body)
        for step in range(4):
            proxy.mode = "answer" if step in (1, 2) else "up"
            tracker.log_metrics({"loss": 1.0}, step)
            if step == 1:
                tracker.log_params({"lr": 0.1})
                tracker.log_artifact(root / "curve.txt")
        proxy.mode = "answer"
        tracker.finish("FINISHED")
        for call in (lambda: delivery.synchronize(root), lambda: connect(proxy.url)):
            with pytest.raises(ServerError, match="is no MLflow server"):
                call()
        proxy.mode = "up"
        delivery.synchronize(root)
        assert points(proxy.url, tracker.run_id, ["loss"]) == once(["loss"], range(4)), body
        client = connect(proxy.url)
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.1"}
        assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["curve.txt"]
        assert not list((root / FOLDER).iterdir())


@pytest.mark.slow
def test_a_locked_database_costs_no_point_and_no_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MlflowTracker(root, "locked", "train")
    tracker.log_metrics({"loss": 1.0}, 0)
    with locked(tracker.uri):
        for step in range(1, 5):
            tracker.log_metrics({"loss": 1.0}, step)
    for step in range(5, 9):
        tracker.log_metrics({"loss": 1.0}, step)
    with locked(tracker.uri):
        tracker.finish("KILLED")
        with pytest.raises(ServerError, match="locked"):
            delivery.synchronize(root)
    assert status(tracker.uri, tracker.run_id) == "RUNNING"
    another = MlflowTracker(root, "locked", "evaluate")
    assert status(tracker.uri, tracker.run_id) == "KILLED", "the next start sends what the last one could not"
    another.finish("FINISHED")
    assert points(tracker.uri, tracker.run_id, ["loss"]) == once(["loss"], range(9))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning: MLflow is away")] == lines[:1] + lines[2:3]
    assert lines[1] == "MLflow is back: 5 records sent"


def test_a_database_locked_at_the_start_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.tracking.store.LOCK_PATIENCE_S", 0.05)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with locked(uri), pytest.raises(ServerError, match=r"locked .*wait for it or stop it") as refusal:
        MlflowTracker(root, "locked", "train")
    assert refusal.value.exit_code == 4


def test_what_the_store_refuses_is_dropped_with_a_warning(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MlflowTracker(root, "refused", "train")
    with locked(tracker.uri):
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker._journal.add(metrics={"a\nbad key!": 1.0}, step=2)  # as an older release would
        tracker.log_metrics({"loss": 1.0}, 3)
    tracker.finish("FINISHED")
    assert points(tracker.uri, tracker.run_id, ["loss"]) == Counter({("loss", 1): 1, ("loss", 3): 1})
    assert status(tracker.uri, tracker.run_id) == "FINISHED"
    assert "MLflow refuses metrics" in capsys.readouterr().err


def test_records_of_another_store_wait_for_it(
    root: Path, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(root, "elsewhere", "train")
    with locked(tracker.uri):
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.finish("FINISHED")
    other = root / "other.db"
    other.write_bytes(empty_mlflow_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert delivery.synchronize(root).elsewhere == {tracker.uri: 2}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    assert delivery.synchronize(root).sent == {tracker.run_id: 2}


def test_a_stage_succeeds_though_its_end_cannot_be_sent(root: Path) -> None:
    made_of = {"inputs": {}, "identity": {}, "params": "p"}
    stage = Workspace("prepare", root, root / "work" / "prepare", root / "out", made_of, experiment="end")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with contextlib.ExitStack() as lock:
        with stage.open():
            lock.enter_context(locked(uri))
            stage.publish({}, {"figure": 1.5})
        assert json.loads((root / "out" / "metrics.json").read_text()) == {"figure": 1.5}
        assert not (stage.work / SIDECAR).exists()
    run_id = str(stage.tracker.run_id)
    assert status(uri, run_id) == "RUNNING"
    assert close(root) == [], "its end is known, and only sent"
    assert status(uri, run_id) == "FINISHED"
    assert points(uri, run_id, ["figure"]) == Counter({("figure", 0): 1})


KILLED_AGAIN_AND_AGAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
import dllm.tracking.mlflow_runs
from dllm.training.journal import MetricsLog
from dllm.workspace import SIDECAR, Workspace

root, kills, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def work():
    made_of = {"inputs": {}, "identity": {}, "params": "p"}
    stage = Workspace("train", root, root / "work" / "train", root / "out", made_of, experiment="kills")
    with stage.open():
        log = MetricsLog(stage.work / "training.jsonl", stage.tracker)
        state = stage.work / "state"
        first = int(state.read_text()) if state.exists() else 0
        log.rewind(first)
        for step in range(first + 1, steps + 1):
            log.write("train", step, 0.0, {"loss": step / 7, "lr": 0.1})
            if step % 5 == 0:
                log.write("validation", step, 0.0, {"val_loss": 1.0})
                (stage.work / "state.tmp").write_text(str(step))
                (stage.work / "state.tmp").rename(state)
        stage.publish({"training.jsonl": stage.work / "training.jsonl"}, {"steps": steps})

draws = random.Random(int(sys.argv[4]))
for count in range(kills + 1):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if count < kills:
        time.sleep(draws.uniform(0.02, 0.5))
        os.kill(child, signal.SIGKILL)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        break  # a fast machine may finish between two kills, and another call would be another run
"""


@pytest.mark.kill
def test_no_kill_loses_a_point_or_tells_it_twice(root: Path, empty_mlflow_store: Path) -> None:
    (root / "mlflow.db").write_bytes(empty_mlflow_store.read_bytes())
    assert check_kills(root, kills=12, steps=60, seed=1) == []


def check_kills(root: Path, kills: int, steps: int, seed: int) -> list[str]:
    """Run a stage that is killed outright over and over; return what went wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    argv = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(root), str(kills), str(steps), str(seed)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    uri = f"sqlite:///{root / 'mlflow.db'}"
    if not (root / "out").exists():
        return [f"not finished: {done.stderr[-500:]}"]
    run_id = json.loads((root / "out" / "run.json").read_text())["mlflow_run_id"]
    lines = [json.loads(line) for line in (root / "out" / "training.jsonl").read_text().splitlines()]
    told = Counter(
        (key, line["step"]) for line in lines for key in line if key not in ("step", "epoch", "time", "kind")
    )
    found = points(uri, run_id, ["loss", "lr", "val_loss"])
    client = connect(uri)
    runs = client.search_runs([client.get_run(run_id).info.experiment_id])
    wrong = [
        f"{key} of step {step}: {found[key, step]}" for key, step in told | found if found[key, step] != told[key, step]
    ]
    wrong += [f"run reads {run.info.status}" for run in runs if run.info.status not in ("KILLED", "FINISHED")]
    status = client.get_run(run_id).info.status
    wrong += [] if status == "FINISHED" else [f"published, and reads {status}"]
    return wrong


ODD_LINES = [
    b"\xff\xfe",
    b'{"head": [1]}',
    b'{"head": {"store": 1}}',
    b'{"taken": "all"}',
    b'{"taken": -5}',
    b'{"metrics": [1], "step": 0, "time": 1}',
    b'{"metrics": {"a": 1}, "time": 1}',
    b'{"metrics": {"a": "x"}, "step": 0, "time": 1}',
    b'{"status": ["FINISHED"], "time": 1}',
    b'{"artifact": "../../../params.yaml", "time": 1}',
    b'{"artifact": "/etc/passwd", "time": 1}',
    b"[" * 100_000,
    b'{"taken": ' + b"9" * 5000 + b"}",
]


def test_an_odd_line_of_a_journal_is_left_out(tmp_path: Path) -> None:
    right = [b'{"head": {"store": "s"}}', b'{"metrics": {"loss": 2.0}, "step": 3, "time": 1}']
    path = journal_path(tmp_path, "a")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(line + b"\n" for line in [*ODD_LINES[:6], *right, *ODD_LINES[6:]]))
    journal = RunJournal(path)
    assert journal.head == {"store": "s"}
    assert [record["metrics"] for record in journal.pending] == [{"loss": 2.0}]
