import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm.config.load import parse_params
from dllm.config.params import Params
from dllm.errors import DllmError, StageError
from dllm.publishing import publish_tree
from dllm.stages import workspace as contract
from dllm.tracking import mlflow_runs as tracking
from dllm.workspace import SIDECAR
from tests.patience import LONGEST_S

RAW = {
    "recipe": "contract-test",
    "target": {"model": "builtin:tiny"},
    "prepare": {"sources": [{"name": "gsm8k"}]},
    "register": {"model_name": "contract-test"},
}


@pytest.fixture(autouse=True)
def _tracked(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)


@pytest.fixture
def params() -> Params:
    return parse_params(RAW)


def parent_of(run_id: str) -> str:
    client = tracking.connect(tracking.tracking_uri(Path()))
    return str(client.get_run(run_id).data.tags["mlflow.parentRunId"])


def status_of(run_id: str | None) -> str:
    assert run_id is not None
    client = tracking.connect(tracking.tracking_uri(Path()))
    return str(client.get_run(run_id).info.status)


def opened(params: Params, root: Path, **given: object):
    return contract.open_stage("prepare", params, sections=[params.prepare], root=root, **given)  # type: ignore[arg-type]


def test_results_appear_whole_with_their_records(params: Params, tmp_path: Path) -> None:
    with opened(params, tmp_path) as stage:
        (stage.work / "a.parquet").write_bytes(b"rows")
        (stage.work / "notes.jsonl").write_text("{}\n")
        assert not stage.out.exists()
        stage.publish(
            {"deep/a.parquet": stage.work / "a.parquet", "notes.jsonl": stage.work / "notes.jsonl"},
            {"rows": 4, "per": {"x": 0.5}, "nan": float("nan"), "ok": True},
        )
    out = tmp_path / "out" / "prepare"
    assert (out / "deep/a.parquet").samefile(stage.work / "a.parquet"), "big files are linked, not copied"
    assert not (out / "notes.jsonl").samefile(stage.work / "notes.jsonl"), "a file that may grow is copied"
    assert json.loads((out / "metrics.json").read_text()) == {"rows": 4, "per": {"x": 0.5}, "nan": None, "ok": True}
    run = json.loads((out / "run.json").read_text())
    assert (run["stage"], run["status"], run["fingerprint"]) == ("prepare", "finished", stage.fingerprint)
    assert run["git"] == {"commit": None, "dirty": None, "reason": "outside"}, "a folder outside git is no error"
    assert run["seconds"] > 0 and run["started"] and run["libraries"]["python"] and run["host"]["name"]
    assert status_of(run["mlflow_run_id"]) == "FINISHED"
    logged = tracking.connect(tracking.tracking_uri(tmp_path)).get_run(run["mlflow_run_id"]).data
    assert logged.metrics == {"rows": 4.0, "per.x": 0.5, "nan": pytest.approx(float("nan"), nan_ok=True)}
    assert logged.params["prepare.heldout_fraction"] == "0.1"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["prepare"], "nothing is left aside"


def test_publishing_again_leaves_nothing_of_the_old(params: Params, tmp_path: Path) -> None:
    for name in ("old", "new"):
        with opened(params, tmp_path) as stage:
            (stage.work / name).write_text(name)
            stage.publish({name: stage.work / name}, {})
    assert sorted(p.name for p in stage.out.iterdir()) == ["metrics.json", "new", "run.json"]


def test_failed_publication_keeps_the_old(tmp_path: Path) -> None:
    out, file = tmp_path / "out" / "x", tmp_path / "file"
    file.write_text("1")
    publish_tree(out, {"file": file}, {})
    with pytest.raises(StageError, match="missing"):
        publish_tree(out, {"file": file, "other": tmp_path / "absent"}, {})
    assert [p.name for p in out.iterdir()] == ["file"]
    assert [p.name for p in out.parent.iterdir()] == ["x"]


def test_fingerprint_follows_all_that_determines_the_result(params: Params, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows").write_text("1")

    def fingerprint(params: Params = params, **given: object) -> str:
        with opened(params, tmp_path, is_main=False, **given) as stage:
            return stage.fingerprint

    other = parse_params({**RAW, "prepare": {**RAW["prepare"], "heldout_fraction": 0.2}})
    unrelated = parse_params({**RAW, "train": {"epochs": 2}})
    base = fingerprint(inputs={"data": data})
    seen = {base, fingerprint(), fingerprint(other), fingerprint(identity={"revision": "abc"})}
    assert len(seen) == 4
    assert fingerprint(unrelated, inputs={"data": data}) == base
    (data / "run.json").write_text("{}")
    assert fingerprint(inputs={"data": data}) == base, "records of time and place are no content"
    (data / "rows").rename(data / "renamed")
    assert fingerprint(inputs={"data": data}) != base


def test_missing_input_is_one_line(params: Params, tmp_path: Path) -> None:
    with (
        pytest.raises(StageError, match=r"input is missing \(.*out/x\)"),
        opened(params, tmp_path, inputs={"x": tmp_path / "out/x"}),
    ):
        raise AssertionError("entered")


def test_second_process_is_refused(params: Params, tmp_path: Path) -> None:
    with opened(params, tmp_path), pytest.raises(StageError, match=f"pid {os.getpid()}"), opened(params, tmp_path):
        raise AssertionError("entered")
    with opened(params, tmp_path):
        pass


def test_ranks_above_zero_share_paths_and_publish_nothing(params: Params, tmp_path: Path) -> None:
    with opened(params, tmp_path) as main, opened(params, tmp_path, is_main=False) as other:
        assert (other.work, other.out, other.tracker.run_id) == (main.work, main.out, None)
        other.publish({}, {"rows": 1})
        assert not other.out.exists()


@pytest.mark.parametrize("error", [DllmError("no"), ValueError("bug")])
def test_a_failed_stage_reads_failed_and_its_next_call_goes_on(
    params: Params, tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)), opened(params, tmp_path) as first:
        (first.work / "part").write_text("done")
        spent = first.seconds
        raise error
    assert status_of(first.tracker.run_id) == "FAILED"
    with opened(params, tmp_path) as second:
        assert (second.work / "part").read_text() == "done"
        assert second.seconds > spent - 0.001  # they are saved in milliseconds
    assert second.tracker.run_id == first.tracker.run_id
    assert status_of(second.tracker.run_id) == "FINISHED"
    with opened(params, tmp_path) as third:
        assert third.tracker.run_id != first.tracker.run_id, "a rerun of a finished stage is a new run"


@pytest.mark.parametrize(
    "left",
    [
        b'{"mlflow_run_id": 5, "started": 7, "seconds": "x"}',
        b'{"mlflow_run_id": "../../x", "started": null, "seconds": -1}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=["kinds", "values", "depth", "bytes"],
)
def test_a_damaged_sidecar_counts_as_none(params: Params, tmp_path: Path, left: bytes) -> None:
    with opened(params, tmp_path) as stage:
        work = stage.work
    (work / SIDECAR).write_bytes(left)
    with opened(params, tmp_path) as stage:
        assert stage.work == work and stage.seconds < 3600
        stage.publish({}, {})
    assert not (work / SIDECAR).exists()


def test_full_disk_is_one_line(params: Params, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"disk is full \(shard-7\)"), opened(params, tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "shard-7")


def test_forget_throws_work_away_but_not_under_a_living_stage(params: Params, tmp_path: Path) -> None:
    with opened(params, tmp_path) as stage:
        with pytest.raises(StageError):
            contract.forget(tmp_path, "prepare")
        assert stage.work.exists()
    contract.forget(tmp_path, "prepare")
    assert not stage.work.exists()


CHILD = """
import subprocess, sys, time, pathlib
from dllm.config.load import load_params, parse_params
from dllm.config.params import Params
from dllm.stages import workspace as contract
root = pathlib.Path(sys.argv[1])
params = load_params(root / "params.yaml")
with contract.open_stage("prepare", params, sections=[params.prepare], root=root) as stage:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (root / "up.tmp").write_text(f"{child.pid} {stage.tracker.run_id}")
    (root / "up.tmp").rename(root / "up")
    time.sleep(60)
"""


def start_child(root: Path) -> tuple[subprocess.Popen[str], int, str]:
    (root / "params.yaml").write_text(json.dumps(RAW))
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root)], stderr=subprocess.PIPE, text=True)
    while not (root / "up").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.05)
    grandchild, run_id = (root / "up").read_text().split()
    return child, int(grandchild), run_id


@pytest.mark.kill
@pytest.mark.parametrize(("blow", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_stage_reads_killed_and_takes_its_children_along(tmp_path: Path, blow: int, code: int) -> None:
    child, grandchild, run_id = start_child(tmp_path)
    child.send_signal(blow)
    said = child.communicate(timeout=LONGEST_S)[1]
    assert child.returncode == code
    assert "prepare: stopped; the next call resumes from" in said and "Traceback" not in said
    assert status_of(run_id) == "KILLED"
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)


@pytest.mark.kill
def test_a_stage_killed_outright_is_closed_afterwards(tmp_path: Path) -> None:
    child, grandchild, run_id = start_child(tmp_path)
    assert contract.close(tmp_path) == [], "a living stage is left alone"
    child.kill()
    os.kill(grandchild, signal.SIGKILL)
    child.communicate()
    assert status_of(run_id) == "RUNNING"
    parent = parent_of(run_id)
    assert status_of(parent) == "RUNNING"
    assert sorted(contract.close(tmp_path)) == sorted([run_id, parent])
    assert status_of(run_id) == status_of(parent) == "KILLED"
