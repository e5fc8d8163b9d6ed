"""Stages in one execution: nested runs in a real MLflow store, the names that tell them apart, what they read."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run

from dllm.config import recipe_book
from dllm.config.params import Params, Prepare, Source
from dllm.stages.workspace import open_stage
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking import provenance
from dllm.tracking.execution import Execution, overridden
from flows import artifacts

STAGES = ("prepare", "regenerate", "train")


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return tmp_path


def load(*overrides: str) -> Params:
    values = dict(each.split("=") for each in overrides)
    params = recipe_book.load("tiny-dflash")
    train = params.train.model_copy(update={"epochs": float(values.get("epochs", params.train.epochs))})
    return params.model_copy(update={"train": train})


def run_stage(root: Path, params: Params, name: str, *, fails: bool = False) -> Run:
    """Run a stage that publishes one file, and return its MLflow run."""
    inputs = {"prompts": root / "out" / "prepare" / "prompts.parquet"} if name != "prepare" else {}
    with (
        contextlib.suppress(ValueError),
        open_stage(name, params, sections=[getattr(params, name)], inputs=inputs, root=root) as stage,
    ):
        (stage.work / "prompts.parquet").write_text(name)
        stage.constants.add("size")
        run_id = str(stage.tracker.run_id)
        if fails:
            raise ValueError
        metrics = {"rows": 4, "size": 7, "by_source": {"a": {"rows": 4, "odd": 1}}, "by_number": {"16": 3}}
        files = {"prompts.parquet": stage.work / "prompts.parquet"}
        stage.publish(files, metrics, headline={"score": 2.0, "none": None})
    return get(root, run_id)


def get(root: Path, run_id: str) -> Run:
    return tracking.connect(tracking.tracking_uri(root)).get_run(run_id)


def parent_of(root: Path, run: Run) -> Run:
    return get(root, run.data.tags["mlflow.parentRunId"])


def test_stages_of_one_configuration_are_nested_in_one_run(root: Path) -> None:
    params = load("epochs=7")
    prepared, trained = (run_stage(root, params, name) for name in ("prepare", "train"))
    parent = parent_of(root, trained)
    assert parent_of(root, prepared).info.run_id == parent.info.run_id
    assert (parent.info.run_name, parent.info.status) == ("tiny-dflash epochs=7.0", "FINISHED")
    assert (prepared.info.run_name, trained.info.run_name) == ("prepare tiny-dflash", "train tiny-dflash epochs=7.0")
    assert parent.data.params["train.epochs"] == "7.0"
    assert parent.data.metrics == {"prepare.score": 2.0, "train.score": 2.0}
    assert trained.data.tags["mlflow.source.name"] == "python -m dllm train"
    assert (
        f"/runs/{prepared.info.run_id}?workflowType=machine_learning) | finished"
        in parent.data.tags["mlflow.note.content"]
    )


def test_what_a_stage_reads_is_a_dataset_under_the_digest_of_dvc(root: Path) -> None:
    run_stage(root, load(), "prepare")
    trained = run_stage(root, load(), "train")
    for run in (trained, parent_of(root, trained)):
        (read,) = run.inputs.dataset_inputs
        assert (read.dataset.name, json.loads(read.dataset.source)) == (
            "prompts",
            {"uri": "out/prepare/prompts.parquet"},
        )
        assert read.dataset.digest == "0ee63ccea22773b7b711a299adc32792", "md5 of the file, as in dvc.lock"
        assert [tag.value for tag in read.tags] == ["training"]


def test_the_curves_of_an_execution_are_points_of_the_run_around_its_stages(root: Path) -> None:
    params = load()
    with open_stage("train", params, sections=[params.train], root=root) as stage:
        stage.tracker.log_curves({10: {"loss": 2.0}, 20: {"loss": 1.0, "val_loss": 1.5}})
        run = get(root, str(stage.tracker.run_id))
        stage.publish({}, {})
    around = parent_of(root, run).info.run_id
    client = tracking.connect(tracking.tracking_uri(root))
    history = {name: client.get_metric_history(around, f"curves/{name}") for name in ("loss", "val_loss")}
    points = {name: [(point.step, point.value) for point in found] for name, found in history.items()}
    assert points == {"loss": [(10, 2.0), (20, 1.0)], "val_loss": [(20, 1.5)]}
    assert run.data.metrics == {}


def test_the_description_links_the_report_once_the_last_stage_has_ended(tmp_path: Path) -> None:
    execution = Execution(tmp_path, load(), "train", STAGES)
    execution.note("a", "s", "b", "RUNNING")
    assert "Report" not in execution.describe("1")
    execution.note("a", "s", "b", "FINISHED")
    assert (
        "[Report](#/experiments/1/runs/b/artifacts/report/index.html?workflowType=machine_learning)"
        in execution.describe("1")
    )


def test_runs_of_another_store_are_named_and_not_linked(
    root: Path, tmp_path_factory: pytest.TempPathFactory, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teammate pulls results that were tracked in the other's MLflow, and trains on."""
    prepared = run_stage(root, load(), "prepare").info.run_id
    own = tmp_path_factory.mktemp("teammate") / "mlflow.db"
    shutil.copyfile(empty_mlflow_store, own)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own}")
    trained = run_stage(root, load(), "train")
    told = parent_of(root, trained).data.tags
    assert "dllm.run.prepare" not in told
    assert f"| prepare | {prepared[:8]}, tracked in another store |" in told["mlflow.note.content"]
    assert tracking.known_runs(root, [prepared, trained.info.run_id]) == {trained.info.run_id}
    runs = {
        stage: {"mlflow_run_id": run_id, "mlflow_experiment_id": "1", "seconds": 1.0}
        for stage, run_id in (("prepare", prepared), ("train", trained.info.run_id), ("register", prepared))
    }
    shown = artifacts.summary([], None, runs, tracking.known_runs(root, [prepared, trained.info.run_id]))
    assert f"| prepare | {prepared[:12]}, tracked in another store |" in shown and "[Report]" not in shown
    assert f"[{trained.info.run_id[:12]}](" in shown


def test_sizes_are_parameters_and_a_breakdown_in_one_part_is_not_repeated(root: Path) -> None:
    run = run_stage(root, load(), "prepare")
    assert run.data.metrics == {"rows": 4.0, "by_source.a.odd": 1.0}
    assert run.data.params["prepare.size"] == "7"


def test_a_stage_that_runs_again_begins_another_execution_which_names_what_is_unchanged(root: Path) -> None:
    prepared, first = (run_stage(root, load(), name) for name in ("prepare", "train"))
    again = run_stage(root, load(), "train")
    other = run_stage(root, load("epochs=9"), "train")
    parents = [parent_of(root, run) for run in (first, again, other)]
    assert len({parent.info.run_id for parent in parents}) == 3
    assert [parent.data.tags.get("dllm.run.prepare") for parent in parents[1:]] == [prepared.info.run_id] * 2
    assert "unchanged" in parents[1].data.tags["mlflow.note.content"]


def test_a_stage_that_failed_goes_on_in_its_execution(root: Path) -> None:
    run_stage(root, load(), "prepare")
    failed = run_stage(root, load(), "train", fails=True)
    assert parent_of(root, failed).info.status == "FAILED"
    resumed = run_stage(root, load(), "train")
    assert resumed.info.run_id == failed.info.run_id
    parent = parent_of(root, resumed)
    assert (parent.info.run_id, parent.info.status) == (failed.data.tags["mlflow.parentRunId"], "FINISHED")


@pytest.mark.parametrize(
    "damage",
    [
        b"[" * 100_000,
        b"\xff",
        b'{"run_id": "a", "store": "s", "stages": {"train": 1}}',
        b'{"run_id": ["a"], "store": "s", "stages": {}}',
        b'{"run_id": "a", "store": "s", "stages": {"train": {"status": "FAILED"}}}',
    ],
    ids=["depth", "bytes", "entry", "run", "key"],
)
def test_a_damaged_record_of_an_execution_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    execution = Execution(tmp_path, load(), "train", STAGES)
    execution.note("a", "s", "b", "FAILED")
    assert execution.run_id("s") == "a"
    (record,) = tmp_path.rglob("*.json")
    record.write_bytes(damage)
    assert execution.run_id("s") is None and "| [" not in execution.describe("1")


def test_names_say_what_differs_from_the_recipe() -> None:
    params = load("epochs=7")
    assert overridden(load()) == {} and overridden(params) == {"train.epochs": 7.0}
    own = params.model_copy(update={"recipe": "of-my-own"})
    assert (overridden(own), Execution(Path(), own, "train", STAGES).name) == ({}, "of-my-own")
    assert Execution(Path(), params, "train", STAGES, experiment="half").name == "half: tiny-dflash epochs=7.0"


def test_lists_are_named_by_their_entries_in_names_that_differ() -> None:
    def named(*sources: dict) -> str:
        prepare = Prepare(
            sources=[Source(**each) for each in sources], heldout_fraction=load().prepare.heldout_fraction
        )
        return Execution(Path(), load().model_copy(update={"prepare": prepare}), "prepare", STAGES).name

    assert named({"name": "gsm8k", "limit": 24}, {"name": "/data/a b.jsonl"}) == (
        "tiny-dflash sources=gsm8k(limit=24)+a b.jsonl"
    )
    many = [{"name": f"data/{number}.jsonl"} for number in range(30)]
    names = {named(*many), named(*many[:-1]), named(*many[:-1], {"name": "data/other.jsonl"})}
    assert len(names) == 3 and all(len(name) < 70 for name in names)


def test_a_folder_has_the_digest_of_dvc_only_while_it_is_what_dvc_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "regenerate"
    folder.mkdir(parents=True)
    (folder / "a").write_text("12345")
    out = {"path": "out/regenerate", "md5": "0" * 32 + ".dir", "size": 5, "nfiles": 1}
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"regenerate": {"outs": [out]}}}))
    assert provenance.dvc_digest(tmp_path, folder) == "0" * 32 + ".dir"
    (folder / "b").write_text("6")
    assert provenance.dvc_digest(tmp_path, folder) == provenance.digest(folder)[:36]


def test_system_metrics_go_through_the_journal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    client = tracking.connect(tracking.tracking_uri(root))
    with open_stage("prepare", load(), sections=[], root=root) as stage:
        run_id = str(stage.tracker.run_id)
        for _ in range(3000):
            if len(client.get_metric_history(run_id, "system/cpu_utilization_percentage")) > 1:
                break
    points = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert [point.step for point in points] == list(range(len(points))) and len(points) > 1
