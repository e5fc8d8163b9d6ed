"""Workers on several machines: what a run says whose results others do not see, or nobody will."""

import logging
import tempfile
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import pipeline


@pytest.mark.parametrize(
    ("api", "store", "warns"),
    [
        ("http://prefect.example:4200/api", "", True),
        ("http://prefect.example:4200/api", "sqlite:////project/mlflow.db", True),
        ("http://prefect.example:4200/api", "http://mlflow.example:5000", False),
        ("http://prefect.example:4200/api", "postgresql://db.example/mlflow", False),
        ("http://127.0.0.1:4200/api", "", False),
    ],
)
def test_a_registry_of_one_machine_beside_a_shared_server_is_warned_of(
    api: str, store: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger("flow run"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with temporary_settings({PREFECT_API_URL: api}):
        pipeline._warn_of_places(registers=True)
    told = [message.partition(",")[0] for message in caplog.messages]
    assert [each.startswith("runs and champions go only into") and each.endswith("mlflow.db") for each in told] == (
        [True] * warns
    )


@pytest.mark.parametrize(
    ("folder", "registers", "warns"), [("tmpabcprefect", False, 1), ("tmpabcprefect", True, 0), ("p", False, 0)]
)
def test_a_clone_that_goes_with_its_run_and_registers_nothing_is_warned_of(
    folder: str, registers: bool, warns: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: logging.getLogger("flow run"))
    monkeypatch.setattr(pipeline, "ROOT", Path(tempfile.gettempdir(), folder, "project"))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        pipeline._warn_of_places(registers)
    assert len([message for message in caplog.messages if "only the MLflow runs will stay" in message]) == warns
