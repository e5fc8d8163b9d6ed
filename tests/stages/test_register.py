"""The stage `register` on records written by hand, with a real registry."""

import json
from pathlib import Path

import pytest

from dllm.config.load import params_digest, parse_params
from dllm.config.params import Params
from dllm.errors import StageError
from dllm.files import lock_folder
from dllm.report.page import write_report
from dllm.stages import register
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking import model_registry, provenance
from tests.stages.test_workspace import RAW

TARGET = {"model": "builtin:tiny", "weights": "abc"}


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return tmp_path


@pytest.fixture
def params(request: pytest.FixtureRequest) -> Params:
    name = request.node.name.replace("/", " ")
    return parse_params({**RAW, "recipe": name, "register": {"model_name": name}})


def leave(root: Path, weights: str, tau: float) -> None:
    """Write what train and evaluate leave for a draft of these weights."""
    checkpoint = root / "out" / "train" / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    (checkpoint / "model.safetensors").write_text(weights)
    (checkpoint / "config.json").write_text("{}")
    trained = {
        "git": {"commit": "c0ffee", "dirty": False},
        "inputs": {"regenerate": "data"},
        "identity": {"target": TARGET},
        "mlflow_run_id": None,
    }
    evaluated = {
        "inputs": {"checkpoint": provenance.digest(checkpoint)},
        "identity": {"target": TARGET},
        "mlflow_run_id": "e",
    }
    (root / "out" / "evaluate").mkdir(exist_ok=True)
    (root / "out" / "train" / "run.json").write_text(json.dumps(trained))
    (root / "out" / "evaluate" / "run.json").write_text(json.dumps(evaluated))
    (root / "out" / "evaluate" / "metrics.json").write_text(json.dumps({"tau_micro": tau, "heldout_digest": "h"}))


def registrations(params: Params, root: Path) -> int:
    client = tracking.connect(tracking.tracking_uri(root))
    experiment = client.get_experiment_by_name(params.recipe)
    assert experiment is not None
    return len(client.search_runs([experiment.experiment_id], "tags.`dllm.stage` = 'register'"))


def test_the_same_bytes_are_registered_by_one_call_at_a_time(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    work = root / "work" / "register" / provenance.digest(root / "out" / "train" / "checkpoint")[:16]
    work.mkdir(parents=True)
    with lock_folder(work), pytest.raises(StageError, match="another process works on this"):
        register.run(params, root)
    assert register.run(params, root)["version"] == 1


def test_a_checkpoint_becomes_a_version_with_all_that_made_it(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    (root / "dvc.lock").write_text("lock")
    found = register.run(params, root)
    assert (found["version"], found["aliases"]) == (1, ["challenger", "champion"])
    assert json.loads((root / "out" / "register" / "metrics.json").read_text()) == found
    tags = tracking.connect(tracking.tracking_uri(root)).get_model_version(params.recipe, "1").tags
    expected = {
        "dllm.digest": found["digest"],
        "dllm.tau": "1.9",
        "dllm.heldout_digest": "h",
        "dllm.git_commit": "c0ffee",
        "dllm.data_digest": "data",
        "dllm.params": params_digest(params),
        "dllm.dvc_lock": provenance.digest(root / "dvc.lock"),
    }
    assert tags.items() >= expected.items()
    about = tracking.connect(tracking.tracking_uri(root)).get_model_version(params.recipe, "1").description
    assert "Trained for builtin:tiny." in about and "τ micro" in about and "1.90 |" in about


def test_mlflow_keeps_the_report_of_the_run(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    register.run(params, root, report=write_report)
    client = tracking.connect(tracking.tracking_uri(root))
    run_id = json.loads((root / "out" / "register" / "run.json").read_text())["mlflow_run_id"]
    (folder,) = client.list_artifacts(run_id)
    (kept,) = client.list_artifacts(run_id, folder.path)
    assert kept.path == "report/index.html"
    page = Path(client.download_artifacts(run_id, kept.path, str(root))).read_text()
    assert f"{params.register_.model_name} version 1 @challenger, @champion" in page


def test_doing_it_again_changes_nothing(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    first = register.run(params, root)
    assert register.run(params, root) == first
    assert registrations(params, root) == 1, "nor does it make another MLflow run"


def test_the_champions_bytes_outlive_the_next_training(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    register.run(params, root)
    leave(root, "b", 1.5)
    second = register.run(params, root)
    assert (second["version"], second["aliases"]) == (2, ["challenger"])
    champion = model_registry.resolve(f"models:/{params.recipe}@champion", root)
    assert (champion / "model.safetensors").read_text() == "a"
    assert json.loads((champion / "run.json").read_text())["identity"]["target"] == TARGET


def test_an_evaluation_of_another_checkpoint_is_refused(params: Params, root: Path) -> None:
    leave(root, "a", 1.9)
    (root / "out" / "train" / "checkpoint" / "config.json").write_text('{"changed": true}')
    with pytest.raises(StageError, match="another checkpoint"):
        register.run(params, root)


@pytest.mark.parametrize("missing", ["train/run.json", "evaluate/metrics.json"])
def test_a_stage_that_has_not_run_is_named(params: Params, root: Path, missing: str) -> None:
    leave(root, "a", 1.9)
    (root / "out" / missing).unlink()
    with pytest.raises(StageError, match=f"stage {missing.split('/')[0]} has left no"):
        register.run(params, root)
