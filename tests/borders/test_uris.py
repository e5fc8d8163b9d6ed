"""Paths that become URIs, names that become folders, and MLflow addresses of every kind."""

import http.server
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.config.load import load_params
from dllm.errors import ConfigError, DllmError, ServerError
from dllm.tracking import model_registry, provenance
from dllm.tracking.address import sqlite_path, sqlite_uri, tracking_uri
from dllm.tracking.mlflow_runs import MlflowTracker
from dllm.tracking.store import connect

ROOT = Path(__file__).parents[2]
FOLDERS = [
    "ci_feature%2Fdraft",
    "with space",
    "a#b",
    "q?m=1&x",
    "ünï 日本",
    "100%",
    "a%20b",
    "semi;colon:x",
    "it's [x]",
]


@pytest.fixture(params=FOLDERS)
def project(request: pytest.FixtureRequest, tmp_path: Path, empty_mlflow_store: Path, monkeypatch) -> Path:
    """A project's folder under a name that a URI reads otherwise."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / request.param
    root.mkdir()
    shutil.copyfile(empty_mlflow_store, root / "mlflow.db")
    return root


def test_stores_lie_inside_the_project_and_registered_versions_load(project: Path) -> None:
    tracker = MlflowTracker(project, "re cipe 50%2F#?", "train")
    tracker.log_metrics({"loss": 1.0}, 1)
    (project / "curve.txt").write_text("curve")
    tracker.log_artifact(project / "curve.txt")
    tracker.log_table({"k": [1]}, "table.json")
    tracker.finish("FINISHED")
    found = project / "mlartifacts" / "re cipe 50%2F#?" / tracker.run_id / "artifacts"
    assert (found / "curve.txt").read_text() == "curve" and (found / "table.json").is_file()
    client = connect(tracker.uri)
    assert {file.path for file in client.list_artifacts(tracker.run_id)} == {"curve.txt", "table.json"}
    source = project / "seen" / "model.safetensors"
    source.parent.mkdir()
    source.write_text("weights")
    digest = provenance.digest(source.parent)
    shutil.copytree(source.parent, model_registry.store_path(project, digest))
    facts = {"tau": 1.5, "heldout_digest": "h", "target": "t", "tags": {}}
    model_registry.register(project, "it's a model", digest=digest, **facts)
    assert not model_registry.register(project, "it's a model", digest=digest, **facts).is_new
    kept = model_registry.resolve("models:/it's a model@champion", project)
    assert kept == model_registry.store_path(project, digest)
    assert [path.name for path in project.parent.iterdir()] == [project.name], "nothing beside the project"


def test_the_first_start_makes_the_store_inside_the_project(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "ci_feature" / "draft").mkdir(parents=True)
    for name in ("ci_feature%2Fdraft?x", "ci_feature/draft"):
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        MlflowTracker(root, "first", "prepare").finish("FINISHED")
        assert (root / "mlflow.db").is_file()
        assert len(connect(tracking_uri(root)).search_runs(["1"])) == 1, "two projects share no store"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ci_feature", "ci_feature%2Fdraft?x"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=30))
def test_any_path_is_read_back_from_its_uri(name: str) -> None:
    path = Path("/projects") / name / "mlflow.db"
    assert sqlite_path(sqlite_uri(path)) == path.absolute()


ADDRESSES = {
    "127.0.0.1:5000": "write http://127.0.0.1:5000",
    "localhost": "write http://localhost",
    "mlflow.example.org:80/path": "write http://mlflow.example.org:80/path",
    "./mlruns": "mlflow migrate-filestore",
    "/srv/mlruns": "mlflow migrate-filestore",
    "file:///srv/mlruns": "mlflow migrate-filestore",
    "file:mlruns": "mlflow migrate-filestore",
    "runs/mlflow.db": "write sqlite:///",
    "sqlite:mlflow.db": "write sqlite:////[^:]*/mlflow.db",
    "ftp://host/x": "keeps no runs at ftp://",
    "s3://bucket/x": "keeps no runs at s3://",
    "databricks-uc": "keeps no runs",
    "uc:main": "keeps no runs",
    "htp://127.0.0.1:5000": "keeps no runs at htp://",
    "http://": "no host",
    "http://127.0.0.1:99999": "out of range",
    "http://127.0.0.1:5000/#/experiments/1": "address of a page",
    "http://[::1": "Invalid IPv6",
    "postgresql://user:pw@127.0.0.1/x": "driver .* is not installed: No module named",
    "mysql+pymysql://user:pw@127.0.0.1/x": "driver .* is not installed: No module named",
    "postgresql+nonsense://127.0.0.1/x": "driver .* is not installed",
}


@pytest.mark.parametrize("uri", ADDRESSES)
def test_an_address_that_mlflow_cannot_use_gets_its_own_hint(uri: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=ADDRESSES[uri]) as refusal:
        connect(tracking_uri(tmp_path))
    line = str(refusal.value)
    assert "\n" not in line and len(line) <= 500 and "pw@" not in line
    assert list(tmp_path.iterdir()) == []


class Impostor(http.server.BaseHTTPRequestHandler):
    """Replies as told: what stands at an address instead of a working MLflow."""

    status, body, delay_s = 200, b"", 0.0
    ended: threading.Event

    def do_POST(self) -> None:
        # Not a sleep: it would end within another test, and complain of a client that has left.
        if self.ended.wait(self.delay_s):
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def impostor(monkeypatch) -> Iterator[type[Impostor]]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr("dllm.tracking.store.RETRY_AFTER_S", (0.0,))
    handler = type("Told", (Impostor,), {"ended": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    handler.ended.set()
    server.shutdown()
    server.server_close()


REPLIES = [
    (200, b"<html><title>Welcome to nginx</title></html>", "is no MLflow server .*Welcome to nginx"),
    (200, b'{"hello": 1}', "is no MLflow server"),
    (200, b"[1]", "is no MLflow server"),
    (200, b"", "is no MLflow server"),
    (200, b"{}", "is no MLflow server"),
    (200, b'{"experiments": []}', "is no MLflow server"),
    (200, b"[" * 50_000, "is no MLflow server"),
    (200, b"\xff\xfe\x00", "is no MLflow server"),
    (404, b'{"detail": "Not Found"}', r"is no MLflow server \(404\): Not Found"),
    (405, b"", "is no MLflow server"),
    (400, b"The plain HTTP request was sent to HTTPS port", "speaks https.*write https://"),
    (401, b'{"error": "log in first"}', r"asks for a login \(401\): log in first.*MLFLOW_TRACKING_USERNAME"),
    (403, b"Invalid Host header - possible DNS rebinding attack", "refuses access.*Invalid Host header"),
    (429, b"slow down", r"failed \(429\): slow down"),
    (500, b'{"error_code": "INTERNAL_ERROR", "message": "database is locked"}', r"failed \(500\): database is locked"),
    (502, b"<h1>Bad Gateway</h1>" + b"x" * 90_000, r"failed \(502\): Bad Gateway"),
    (503, b"\x1b[31mbusy", r"failed \(503\)"),
]


@pytest.mark.parametrize(("status", "body", "said"), REPLIES)
def test_what_a_server_says_reaches_the_user(impostor, status: int, body: bytes, said: str) -> None:
    impostor.status, impostor.body = status, body
    with pytest.raises(ServerError, match=said) as refusal:
        connect(impostor.url)
    line = str(refusal.value)
    assert "\n" not in line and len(line) <= 500 and impostor.url in line


def test_a_server_that_cannot_be_reached_gets_its_cause_and_hint(impostor, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    causes = {
        f"http://127.0.0.1:{closed}": "Connection refused.*start the server",
        impostor.url.replace("http", "https"): "write http:// instead of https://",
        "http://no-such-host.invalid": "check the host's name",
    }
    for uri, said in causes.items():
        with pytest.raises(ServerError, match=said) as refusal:
            connect(uri)
        assert len(str(refusal.value)) <= 500 and str(refusal.value).count(uri) == 1
    impostor.delay_s = 600.0
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(ServerError, match=r"timed out.*MLFLOW_HTTP_REQUEST_TIMEOUT"):
        connect(impostor.url)


@given(body=st.binary(max_size=300), status=st.integers(200, 599))
@settings(max_examples=40)
def test_no_reply_is_a_bug_of_ours(impostor, body: bytes, status: int) -> None:
    impostor.status, impostor.body = status, body if status not in (204, 304) else b""
    with pytest.raises(DllmError) as refusal:
        connect(impostor.url)
    assert refusal.value.exit_code == 4 and len(str(refusal.value)) <= 500
    assert all(character.isprintable() for character in str(refusal.value))


NAMES = {
    "register.model_name": ["a/b", "a:b", "", " ", "..", "x" * 5000, "x" * 300, "a\nb", "a\x1b[31m", "'\"", " a"],
    "recipe": ["../x", "a/../../b", "..", ".", "", "a\\b", "/etc/x", "x" * 300, "é" * 100, "a\nb"],
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in NAMES.items() for name in names])
def test_names_that_mlflow_or_the_disk_refuse_are_refused_at_once(key: str, name: str) -> None:
    text = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\x1b", "\\e")
    with pytest.raises(ConfigError, match=key) as refusal:
        load_params(ROOT / "params.yaml", [f'{key}="{text}"'])
    assert len(str(refusal.value)) <= 500 and str(refusal.value).isprintable()


def test_usual_names_are_taken() -> None:
    params = load_params(ROOT / "params.yaml", ["register.model_name=it's a-model_v2 (ü)", "recipe=my recipe 50%"])
    assert (params.register_.model_name, params.recipe) == ("it's a-model_v2 (ü)", "my recipe 50%")
    assert os.sep not in params.recipe
