"""A real registry on SQLite, and one behind a real MLflow server."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import artifacts

from dllm.errors import ConfigError, ModelError, ServerError, StageError
from dllm.publishing import publish_tree
from dllm.tracking import mlflow_runs as tracking
from dllm.tracking import model_registry, places, provenance
from dllm.tracking.model_registry import Registered
from tests.patience import LONGEST_S


@pytest.fixture
def root(tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return tmp_path


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).replace("[", "-").replace("]", "")


def checkpoint(root: Path, weights: str) -> str:
    """Put a checkpoint into the store and return its digest."""
    source = root / "model.safetensors"
    source.write_text(weights)
    digest = provenance.digest(_folder(root, weights))
    publish_tree(model_registry.store_path(root, digest), {"model.safetensors": source}, {"run.json": {}})
    source.unlink()
    return digest


def _folder(root: Path, weights: str) -> Path:
    folder = root / f"seen-{weights}"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    return folder


def enter(
    root: Path,
    name: str,
    weights: str,
    tau: float,
    heldout: str = "h",
    target: str = "t",
    interval: tuple[float, float] | None = None,
) -> Registered:
    return model_registry.register(
        root,
        name,
        digest=checkpoint(root, weights),
        tau=tau,
        interval=interval,
        heldout_digest=heldout,
        target=target,
        tags={"dllm.git_commit": "None"},
    )


def test_a_champion_of_little_more_is_said_to_be_one(root: Path, name: str) -> None:
    enter(root, name, "a", 1.8)
    near, far = (
        enter(root, name, text, tau, interval=(tau - 0.05, tau + 0.05)) for text, tau in (("b", 1.84), ("c", 2))
    )
    assert near.verdict == (
        "champion: τ 1.840 beats version 1's 1.800, which lies in its 95 % interval, 1.790 to 1.890"
    )
    assert far.verdict == "champion: τ 2.000 beats version 2's 1.840"


def test_first_is_champion_a_better_one_takes_over_a_worse_one_does_not(root: Path, name: str) -> None:
    first = enter(root, name, "a", 1.8)
    assert (first.version, first.aliases, first.is_new) == (1, ("challenger", "champion"), True)
    worse = enter(root, name, "b", 1.7)
    assert (worse.version, worse.aliases) == (2, ("challenger",))
    assert "does not beat version 1's 1.800" in worse.verdict
    equal = enter(root, name, "c", 1.8)
    assert equal.aliases == ("challenger",)
    better = enter(root, name, "d", 1.9)
    assert (better.version, better.aliases) == (4, ("challenger", "champion"))
    client = tracking.connect(tracking.tracking_uri(root))
    assert {k: int(v) for k, v in client.get_registered_model(name).aliases.items()} == {"challenger": 4, "champion": 4}
    tags = client.get_model_version(name, "4").tags
    assert tags["promoted_from"] == "1" and tags["promoted_at"]
    assert tags["dllm.tau"] == "1.9" and tags["dllm.git_commit"] == "None"


@pytest.mark.parametrize("other", [{"heldout": "other"}, {"target": "other"}])
def test_different_prompts_or_targets_do_not_compare(root: Path, name: str, other: dict[str, str]) -> None:
    enter(root, name, "a", 1.8)
    second = enter(root, name, "b", 9.9, **other)
    assert second.aliases == ("challenger",)
    assert "do not compare" in second.verdict


def test_the_same_bytes_are_one_version_and_are_judged_anew(root: Path, name: str) -> None:
    enter(root, name, "a", 1.8)
    assert enter(root, name, "b", 5.0, heldout="long").aliases == ("challenger",)
    again = enter(root, name, "b", 2.0)
    assert (again.version, again.is_new, again.aliases) == (2, False, ("challenger", "champion"))
    old = enter(root, name, "a", 1.8)
    assert (old.version, old.is_new, old.aliases) == (1, False, ()), "an old version does not become challenger again"


def test_a_reference_leads_to_the_bytes_that_were_registered(root: Path, name: str) -> None:
    done = enter(root, name, "a", 1.8)
    kept = model_registry.resolve(f"models:/{name}@champion", root)
    assert (kept / "model.safetensors").read_text() == "a"
    assert model_registry.resolve(f"models:/{name}/{done.version}", root) == kept
    assert done.uri == kept.as_uri()


def test_bytes_that_changed_or_went_are_refused_and_a_checked_out_copy_serves(root: Path, name: str) -> None:
    enter(root, name, "a", 1.8)
    reference = f"models:/{name}@champion"
    weights = model_registry.resolve(reference, root) / "model.safetensors"
    weights.write_text("tampered")
    with pytest.raises(ModelError, match="has changed since it was registered"):
        model_registry.resolve(reference, root)
    weights.unlink()
    weights.with_name("run.json").unlink()
    weights.parent.rmdir()
    with pytest.raises(ModelError, match="is not on this machine"):
        model_registry.resolve(reference, root)
    (root / "out" / "train").mkdir(parents=True)
    _folder(root, "a").rename(root / "out" / "train" / "checkpoint")
    assert model_registry.resolve(reference, root) == root / "out" / "train" / "checkpoint"


@pytest.mark.parametrize("reference", ["models:/absent@champion", "models:/absent/3", "models:/absent", "models:/@x"])
def test_unknown_references_are_one_line(root: Path, reference: str) -> None:
    with pytest.raises(ModelError) as refusal:
        model_registry.resolve(reference, root)
    assert "\n" not in str(refusal.value)


def test_an_alias_nobody_holds_is_one_line(root: Path, name: str) -> None:
    enter(root, name, "a", 1.8)
    with pytest.raises(ModelError, match="not registered"):
        model_registry.resolve(f"models:/{name}@no-such-alias", root)


def test_mlflow_out_of_reach_names_its_address(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServerError, match=r"MLflow out of reach.*http://127\.0\.0\.1:9") as refusal:
        enter(root, name, "a", 1.8)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def server(tmp_path: Path, empty_mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    shutil.copyfile(empty_mlflow_store, tmp_path / "served.db")
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'served.db'}",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    process = subprocess.Popen(
        [*argv, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=LONGEST_S)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=LONGEST_S)


@pytest.mark.slow
def test_what_a_server_keeps_is_fetched_where_nothing_else_is_shared(server: str, tmp_path: Path, name: str) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    done = enter(here, name, "a", 1.8)
    assert done.uri.startswith("models:/m-") and not enter(here, name, "a", 1.8).is_new
    reference = f"models:/{name}@champion"
    fetched = model_registry.resolve(reference, elsewhere)
    assert fetched.is_relative_to(elsewhere) and (fetched / "model.safetensors").read_text() == "a"
    plain = Path(artifacts.download_artifacts(reference, dst_path=str(tmp_path / "plain"), tracking_uri=server))
    assert (plain / "model.safetensors").read_text() == "a", "MLflow's own client gets it"

    fetched.joinpath("model.safetensors").write_text("damaged")
    assert model_registry.resolve(reference, elsewhere) == fetched, "a damaged copy is fetched again"
    assert fetched.joinpath("model.safetensors").read_text() == "a"
    (kept,) = (tmp_path / "a").rglob("model.safetensors")
    kept.write_text("tampered")
    with pytest.raises(ModelError, match="has changed since it was registered"):
        model_registry.resolve(reference, tmp_path / "third")


@pytest.mark.parametrize("store", [None, "mlflow", "shared"])
def test_each_store_of_a_local_mlflow_is_read_by_its_client(root: Path, name: str, store: str | None) -> None:
    digest = checkpoint(root, "a")
    if store == "shared":
        (root / store).mkdir()
        model_registry.store_path(root, digest).rename(root / store / digest[:16])
    done = model_registry.register(
        root, name, digest=digest, tau=1.5, heldout_digest="h", target="t", tags={}, store=store, experiment=name
    )
    uri = tracking.tracking_uri(root)
    got = Path(artifacts.download_artifacts(f"models:/{name}@champion", tracking_uri=uri, registry_uri=uri))
    assert (got / "model.safetensors").read_text() == "a"
    kept = model_registry.resolve(f"models:/{name}/{done.version}", root)
    assert (kept / "model.safetensors").read_text() == "a"
    client = tracking.connect(uri)
    about = client.get_model_version(name, str(done.version)).description
    assert f"generate --checkpoint models:/{name}/{done.version}" in about and "1.500" in about
    place = client.get_experiment_by_name(name)
    assert place is not None
    listed = client.search_logged_models([place.experiment_id])
    assert [model.tags["mlflow.modelVersions"] for model in listed] == [f'[{{"name": "{name}", "version": 1}}]']


@pytest.mark.parametrize("store", ["mlflow", "shared"])
def test_the_champion_moves_to_the_store_that_is_asked_for(root: Path, name: str, store: str) -> None:
    facts = {"tau": 1.5, "heldout_digest": "h", "target": "t", "tags": {}}
    digest = checkpoint(root, "a")
    first = model_registry.register(root, name, digest=digest, **facts)
    shutil.copytree(model_registry.store_path(root, digest), root / "shared" / digest[:16])
    for is_new in (True, False):
        moved = model_registry.register(root, name, digest=digest, store=store, experiment=name, **facts)
        assert (moved.version, moved.is_new, "champion" in moved.aliases) == (2, is_new, True), moved.verdict
        assert moved.uri != first.uri
    shutil.rmtree(root / "registered")
    kept = model_registry.resolve(f"models:/{name}@champion", root)
    assert (kept / "model.safetensors").read_text() == "a"


def test_a_server_takes_no_folder(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # refused before it is asked
    with pytest.raises(ConfigError, match=r"register\.store: /mnt/drafts.*`mlflow`"):
        model_registry.register(
            root, name, digest="0", tau=1.0, heldout_digest="h", target="t", tags={}, store="/mnt/drafts"
        )


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("store", [None, "/mnt/drafts"])
def test_a_clone_that_vanishes_keeps_no_runs_and_no_versions(
    registers: bool, store: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = Path(tempfile.gettempdir(), "tmpabc123prefect", "project")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(StageError, match="deleted after the flow run"):
        places.check(clone, store, registers=registers)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.home()}/mlflow.db")
    if registers and store is None:
        with pytest.raises(StageError, match="deleted after the flow run"):
            places.check(clone, store)
    else:
        places.check(clone, store, registers=registers)
    places.check(tmp_path, store, registers=registers)


def test_a_run_of_another_store_is_named_and_not_linked(
    root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"tau": 1.5, "heldout_digest": "h", "target": "t", "tags": {}}
    model_registry.register(root, name, digest=checkpoint(root, "a"), run_id="0" * 32, **facts)
    assert "tracked in another store" in capsys.readouterr().err
    assert not tracking.connect(tracking.tracking_uri(root)).get_model_version(name, "1").run_id
