"""Where a project's store lies: its folder, that of the copy DVC makes of it, and none where a flow run clones it."""

import tempfile
from pathlib import Path

import pytest

from dllm.config.load import parse_params
from dllm.errors import ConfigError, StageError
from dllm.stages import register
from dllm.tracking.address import home, page, tracking_uri, vanishes
from tests.stages.test_register import leave
from tests.stages.test_workspace import RAW


def test_temporary_copies_of_dvc_and_checkouts_keep_their_runs_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = Path("/srv/project")
    assert home(project) == project
    for copy in (".dvc/tmp/exps/standalone/tmp1x2y", ".dvc/tmp/exps/tmpabc/sub", "work/checkouts/1/tree/sub"):
        assert home(project / copy) == project
        assert tracking_uri(project / copy) == "sqlite:////srv/project/mlflow.db"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "SQLite:///?x=1"])
def test_a_database_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"a database in memory keeps no runs.*give sqlite:////PATH"):
        tracking_uri(Path("/srv/project"))


def test_a_version_is_not_registered_where_it_would_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tempfile.TemporaryDirectory(suffix="prefect") as folder:
        root = Path(folder, "clone")
        leave(root, "a", 1.9)
        assert vanishes(root)
        with pytest.raises(StageError, match="this checkout is deleted after the flow run"):
            register.run(parse_params(RAW), root)
        assert not (root / "mlflow.db").exists() and not (root / "registered").exists()
    assert not vanishes(Path(tempfile.gettempdir(), "project"))


def test_pages_open_in_the_view_for_training() -> None:
    assert page("http://h:1/", "3") == "http://h:1/#/experiments/3/runs?workflowType=machine_learning"
    assert page("http://h:1", "3", "ab") == "http://h:1/#/experiments/3/runs/ab?workflowType=machine_learning"
    assert (
        page("", "3", "ab", "a/b.html") == "/#/experiments/3/runs/ab/artifacts/a/b.html?workflowType=machine_learning"
    )
