"""The same life of a run and a version in each kind of store: moved SQLite, a server with a login, PostgreSQL."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import artifacts

from dllm.errors import ModelError, ServerError
from dllm.tracking import delivery, model_registry, provenance, store
from dllm.tracking.mlflow_runs import MlflowTracker, connect, tracking_uri
from tests import s3_server
from tests.patience import LONGEST_S
from tests.tracking.test_execution import load, parent_of, run_stage

GATE = Path(__file__).resolve().parents[2] / "infra" / "gate.py"
DRIVERS = {"psycopg": "postgresql+psycopg", "psycopg2": "postgresql+psycopg2"}


def register(root: Path, run_id: str | None = None, store: str | None = None) -> str:
    """Register a checkpoint of two files, and return its version's source."""
    folder = root / "made"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text("weights")
    digest = provenance.digest(folder)
    shutil.copytree(folder, model_registry.store_path(root, digest), dirs_exist_ok=True)
    facts = {"tau": 1.5, "heldout_digest": "h", "target": "t", "tags": {}, "run_id": run_id, "store": store}
    return model_registry.register(root, "a draft", digest=digest, experiment="tiny-dflash", **facts).uri


def live(root: Path) -> None:
    """Run two stages, register, and load the champion."""
    prepared, trained = (run_stage(root, load(), stage) for stage in ("prepare", "train"))
    assert parent_of(root, prepared).info.run_id == parent_of(root, trained).info.run_id
    assert parent_of(root, trained).info.status == trained.info.status == "FINISHED"
    register(root, trained.info.run_id)
    kept = model_registry.resolve("models:/a draft@champion", root)
    assert (kept / "model.safetensors").read_text() == "weights"


def test_a_project_that_was_moved_uses_the_files_beside_it(
    tmp_path: Path, empty_mlflow_store: Path, monkeypatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old, new = tmp_path / "old project", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(empty_mlflow_store, old / "mlflow.db")
    waiting = MlflowTracker(old, "tiny-dflash", "train")
    (old / "curve.txt").write_text("curve")
    waiting.log_artifact(old / "curve.txt")
    register(old, waiting.run_id)
    waiting._journal.add(metrics={"loss": 1.0}, step=1)  # not sent
    waiting._journal.close()
    shutil.copytree(old, new)
    (old / "registered").rename(old / "gone")

    assert delivery.synchronize(new).sent == {waiting.run_id: 2}
    client = connect(tracking_uri(new), new)
    run = client.get_run(waiting.run_id)
    assert run.info.artifact_uri.startswith((new / "mlartifacts").as_uri()) and run.data.metrics["loss"] == 1.0
    assert model_registry.resolve("models:/a draft@champion", new).is_relative_to(new)
    of_old = connect(tracking_uri(old), old).get_run(waiting.run_id).info.artifact_uri
    assert of_old.startswith((old / "mlartifacts").as_uri()), "of a copy both go on"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(new))
    got = artifacts.download_artifacts("models:/a draft@champion")
    assert Path(got).is_relative_to(new), "MLflow's own client too"


def test_a_long_cause_keeps_its_end_and_says_where_it_is_cut() -> None:
    told = store.one_line("\n".join(f"frame {number}" for number in range(60)) + "\nno such host\x1b[2J")
    assert "frame 0 frame 1 " in told and "frame 40" in told and told.endswith("no such host\u241b[2J")
    cut = store.one_line("frame " * 3000 + "no such host")
    assert len(cut) <= 2000 and " ... " in cut and cut.endswith("no such host")


@pytest.mark.slow
def test_a_server_with_user_and_password(
    tmp_path: Path, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(empty_mlflow_store, tmp_path / "served.db")
    environment = {"PREFECT_API_AUTH_STRING": "ann:secret", "MLFLOW_BACKEND_STORE_URI": "sqlite:///served.db"}
    argv = [sys.executable, str(GATE), "mlflow", "0"]
    with running(argv, tmp_path, environment) as server:
        assert server.stdout is not None
        address = next(line for line in server.stdout if line.startswith("listening at ")).split()[-1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(ServerError, match=r"asks for a login \(401\)"):
            connect(address)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        root = tmp_path / "project"
        root.mkdir()
        live(root)
        fetched = model_registry.resolve("models:/a draft@champion", tmp_path / "elsewhere")
        assert (fetched / "model.safetensors").read_text() == "weights"


@pytest.mark.slow
def test_an_object_store(tmp_path: Path, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(empty_mlflow_store, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    with s3_server.serving("models") as address:
        for name, value in {**s3_server.KEYS, "MLFLOW_S3_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
        here.mkdir()
        source = register(here, store="s3://models/drafts/")
        assert source.startswith("s3://models/drafts/") and register(here, store="s3://models/drafts") == source
        plain = artifacts.download_artifacts("models:/a draft@champion", dst_path=str(tmp_path / "plain"))
        assert Path(plain, "model.safetensors").read_text() == "weights", "MLflow's own client gets it"
        fetched = model_registry.resolve("models:/a draft@champion", elsewhere)
        assert fetched.is_relative_to(elsewhere) and (fetched / "model.safetensors").read_text() == "weights"

        import boto3

        key = f"{source.removeprefix('s3://models/')}/model.safetensors"
        boto3.client("s3", endpoint_url=address).put_object(Bucket="models", Key=key, Body=b"tampered")
        assert model_registry.resolve("models:/a draft@champion", elsewhere) == fetched, "what is there is not fetched"
        with pytest.raises(ModelError, match="has changed since it was registered"):
            model_registry.resolve("models:/a draft@champion", tmp_path / "third")
        with pytest.raises(ServerError, match="the checkpoint's store failed") as refused:
            register(here, store="s3://no-such-bucket/drafts")
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    driver = next((name for name in DRIVERS if importlib.util.find_spec(name)), None)
    if not programs or driver is None:
        pytest.skip("no PostgreSQL here, or no driver: apt-get install postgresql, pip install -e '.[stack]'")
    # Its server refuses root, and another user does not reach pytest's folders.
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        initdb = [str(programs[-1]), "--auth", "trust", "--username", "dllm", "--no-sync", "-D", data]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)
        free.close()
        argv = [str(programs[-1].with_name("postgres")), "-D", data, "-k", "", "-h", "127.0.0.1", "-p", str(port)]
        with running(argv, Path(folder), {}, **user):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{DRIVERS[driver]}://dllm@127.0.0.1:{port}/postgres")
            end = time.monotonic() + LONGEST_S
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
                time.sleep(0.1)
            live(tmp_path)


@contextmanager
def running(argv: list[str], folder: Path, environment: dict[str, str], **user: str) -> Iterator[subprocess.Popen[str]]:
    server = subprocess.Popen(
        argv,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **user,
    )
    try:
        yield server
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL would wait for its clients at SIGTERM
        server.communicate(timeout=LONGEST_S)
