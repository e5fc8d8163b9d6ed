"""A real MLflow store on SQLite."""

from pathlib import Path

import pytest

from dllm.errors import ServerError
from dllm.tracking import delivery
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking.mlflow_runs import MlflowTracker
from dllm.tracking.run_journal import RunJournal
from dllm.tracking.sending import VALUE_CHARS


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return tmp_path


def run_of(tracker: MlflowTracker):
    return tracking.connect(tracker.uri).get_run(tracker.run_id)


def test_a_run_keeps_all_it_is_told(root: Path) -> None:
    tracker = MlflowTracker(root, "kept", "train")
    tracker.log_params({"train": {"optimizer": {"lr": 0.1}, **{f"p{i}": i for i in range(150)}}, "long": "x" * 9000})
    for step in (1, 2):
        tracker.log_metrics({"loss": 3.0 - step, "lr": 0.1}, step)
    tracker.set_tags({"dllm.stage": "train"})
    (root / "curve.txt").write_text("curve")
    tracker.log_artifact(root / "curve.txt", "plots")
    tracker.log_table({"k": [1, 2], "accepted": [0.5, 0.25]}, "acceptance.json")
    tracker.finish("FINISHED")
    run = run_of(tracker)
    assert run.info.status == "FINISHED" and run.info.run_name == "train"
    assert run.data.metrics == {"loss": 1.0, "lr": 0.1}
    assert run.data.params["train.optimizer.lr"] == "0.1" and run.data.params["train.p149"] == "149"
    assert len(run.data.params["long"]) == VALUE_CHARS
    assert run.data.tags["dllm.stage"] == "train"
    folder = root / "mlartifacts" / "kept" / tracker.run_id / "artifacts"
    assert (folder / "plots" / "curve.txt").read_text() == "curve"
    assert (folder / "acceptance.json").is_file()
    history = tracking.connect(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]


def test_names_from_data_are_written_as_mlflow_takes_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MlflowTracker(root, "names", "prepare")
    tracker.set_tags(
        {"dllm.identity.a/b@train[:9].commit": "c", "dllm.input.~/../x//y": "d", "n" * 300: "e", "..": "f"}
    )
    tracker.log_metrics({"by_source.q (1).tau": 2.0})
    tracker.finish("FINISHED")
    data = run_of(tracker).data
    assert data.tags["dllm.identity.a/b_train_:9_.commit"] == "c" and data.tags["n" * 250] == "e"
    assert data.tags["x/y"] == "d" and data.tags["_"] == "f" and data.metrics == {"by_source.q _1_.tau": 2.0}
    assert "MLflow refuses" not in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_its_first_params(root: Path) -> None:
    first = MlflowTracker(root, "resumed", "train")
    first.log_params({"nproc": 1})
    first.log_metrics({"loss": 2.0}, 1)
    first.finish("KILLED")
    second = MlflowTracker(root, "resumed", "train", first.run_id)
    assert second.run_id == first.run_id and run_of(second).info.status == "RUNNING"
    second.log_params({"nproc": 2})
    second.log_metrics({"loss": 1.0}, 2)
    second.finish("FINISHED")
    run = run_of(second)
    assert (run.info.status, run.data.params, run.data.metrics) == ("FINISHED", {"nproc": "1"}, {"loss": 1.0})


def test_a_run_the_store_has_lost_begins_anew(root: Path) -> None:
    tracker = MlflowTracker(root, "lost", "train", "0" * 32)
    assert tracker.run_id != "0" * 32 and not tracker.resumed
    tracker.finish("FINISHED")


def test_a_deleted_experiment_is_one_line(root: Path) -> None:
    tracker = MlflowTracker(root, "deleted", "train")
    client = tracking.connect(tracker.uri)
    client.delete_experiment(run_of(tracker).info.experiment_id)
    with pytest.raises(ServerError, match="'deleted' is deleted"):
        MlflowTracker(root, "deleted", "train")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/no/such/folder/mlflow.db"])
def test_a_store_out_of_reach_is_one_line_with_its_address(
    root: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServerError) as refusal:
        MlflowTracker(root, "x", "train")
    assert uri in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_store_that_goes_away_costs_a_warning_and_not_the_work(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MlflowTracker(root, "gone", "train")
    tracking.connect(tracker.uri).delete_run(tracker.run_id)
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.finish("FINISHED")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert all(line.startswith("warning: MLflow ") and tracker.uri in line for line in warnings)


def test_runs_left_open_are_closed_and_others_kept(root: Path) -> None:
    left, done, alive = (MlflowTracker(root, "open", "train") for _ in range(3))
    done.finish("FAILED")
    left._journal.close()  # as a kill does
    assert delivery.synchronize(root).closed == [left.run_id]
    assert [run_of(t).info.status for t in (left, done, alive)] == ["KILLED", "FAILED", "RUNNING"]


def test_the_default_store_lies_in_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_journal_survives_an_exception_between_its_line_and_its_note(root: Path, monkeypatch) -> None:
    tracker = MlflowTracker(root, "signal", "train")

    def stop(record: object) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tracker._journal, "_take_in", stop)
        tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish("KILLED")
    run = run_of(tracker)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"loss": 1.0})


def test_a_journal_cut_at_any_byte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = RunJournal(path)
    journal.begin(store="s", stage="train", work="")
    for step in range(3):
        journal.add(metrics={"loss": float(step)}, step=step)
    journal.took(2)
    journal.add(status="KILLED")
    journal.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        cut = RunJournal(path)
        cut.add(metrics={"loss": 0.0, "lr": 1.0}, step=0)
        assert "lr" in cut.pending[-1]["metrics"]
        cut.close()
        again = RunJournal(path)
        assert len(again.pending) == len(cut.pending)
        again.close()
