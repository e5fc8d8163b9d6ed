"""Who may use Prefect and MLflow under `make ui`: those with the password, and no web page of another site."""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import psutil
import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st

from dllm.config import recipe_book
from tests.flows.conftest import Project, copy_project, wait_until
from tests.patience import LONGEST_S

INFRA = Path(__file__).parents[2] / "infra"
PASSWORD = "someone:geheim"
CLIENT = httpx.Client(timeout=LONGEST_S, trust_env=False)
SOCKETS = (
    *("/api/events/in", "/api/events/out", "/api/logs/out", "/api/work_pools/x/workers/connect"),
    "/api/task_runs/subscriptions/scheduled",
)


class Desk:
    """The servers that `make ui` started, and what it printed."""

    def __init__(self, project: Project, log: Path) -> None:
        self.project, self.folder, self.log = project, project.folder, log
        api = tomllib.loads((self.folder / "prefect.toml").read_text())["api"]
        self.password = api["auth_string"]
        self.prefect = api["url"].removesuffix("/api")
        self.mlflow = tomllib.loads((self.folder / "mlflow.toml").read_text())["url"]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    copy_project(folder)
    project = Project(folder, folder / ".prefect")
    ports = dict(zip(("MLFLOW_PORT", "PREFECT_PORT"), map(str, free_ports(2)), strict=True))
    log = folder / "ui.log"
    with log.open("w") as stream:
        ui = subprocess.Popen(
            [sys.executable, "infra/services.py", "ui"],
            cwd=folder,
            env=project.environment | ports,
            stdout=stream,
            stderr=stream,
        )
    try:
        wait_until(lambda: "Ctrl-C" in log.read_text() or ui.poll() is not None, LONGEST_S)
        assert ui.poll() is None, log.read_text()
        yield Desk(project, log)
    finally:
        tree = psutil.Process(ui.pid).children(recursive=True) if ui.poll() is None else []
        for _ in range(3):
            ui.send_signal(signal.SIGTERM)
        ui.wait(timeout=LONGEST_S)
    assert not psutil.wait_procs(tree, timeout=LONGEST_S)[1], "three signals leave servers behind"
    assert not list(folder.glob("*.toml*"))


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(password.encode()).decode()}


def strangers(address: str, password: str) -> dict[str, dict[str, str]]:
    """Headers that each must be refused, by what is wrong with them."""
    port = address.rpartition(":")[2]
    user = password.partition(":")[0]
    known = basic(password)
    return {
        "no password": {},
        "wrong password": basic(f"{user}:wrong"),
        "empty password": basic(f"{user}:"),
        "another scheme": {"Authorization": f"Bearer {password}"},
        "foreign host": known | {"Host": f"evil.example:{port}"},
        "loopback's name in a foreign host": known | {"Host": f"127.0.0.1.evil.example:{port}"},
        "host of another port": known | {"Host": "127.0.0.1:1"},
        "foreign page": known | {"Origin": "http://evil.example"},
        "page of another port": known | {"Origin": "http://127.0.0.1:1"},
        "sandboxed page": known | {"Origin": "null"},
        "embedded elsewhere": known | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        "frame elsewhere": known
        | {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    }


def routes(desk: Desk, what: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """List methods and paths of a server: all of them, and some of every kind."""
    pages = ["/", "/docs", "/redoc", "/openapi.json", "/health", "/version", "/nothing", "//", "/%2e%2e/api/health"]
    calls = []
    if what == "mlflow":
        verbs = ["experiments/search", "runs/search", "runs/create", "model-versions/search"]
        pages += [f"/{api}/2.0/mlflow/{verb}" for api in ("api", "ajax-api") for verb in verbs]
        pages += ["/get-artifact", "/ajax-api/3.0/jobs", "/graphql", "/api/2.0/mlflow-artifacts/artifacts/x"]
    else:
        described = CLIENT.get(f"{desk.prefect}/openapi.json", headers=basic(desk.password)).json()["paths"]
        assert len(described) > 100
        calls = [(method.upper(), f"/api{path}") for path, methods in described.items() for method in methods]
        pages += ["/api/health", "/api/ready", "/ui-settings", "/v2/", "/assets/x.js", "/api/static/x", "/api/flows/"]
    some = [(method, page) for page in pages for method in ("GET", "POST", "OPTIONS")]
    return [*calls, *some], some


@pytest.mark.flows
@pytest.mark.outage
@pytest.mark.parametrize("what", ["prefect", "mlflow"])
def test_strangers_are_refused_on_every_route(desk: Desk, what: str) -> None:
    address = getattr(desk, what)
    everywhere, pages = routes(desk, what)
    wrong = []
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=LONGEST_S)
    for why, headers in strangers(address, desk.password).items():
        for method, path in everywhere if why in ("no password", "foreign page") else pages:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            response.read()
            if response.status not in (401, 403) or response.headers["access-control-allow-origin"]:
                wrong.append((why, method, path, response.status))
    assert not wrong


@pytest.mark.flows
@pytest.mark.outage
def test_the_password_lets_in(desk: Desk) -> None:
    known = basic(desk.password)
    for address, paths in {
        desk.prefect: ["/", "/ui-settings", "/api/health", "/docs"],
        desk.mlflow: ["/", "/health", "/api/2.0/mlflow/experiments/search?max_results=1"],
    }.items():
        own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        for path in paths:
            for headers in ({}, own, link):
                assert CLIENT.get(address + path, headers=known | headers).status_code in (200, 307)
        asks = CLIENT.get(address, headers={"Accept": "text/html"})
        assert asks.status_code == 401 and asks.headers["www-authenticate"].startswith("Basic ")
        by_name = CLIENT.get(
            address.replace("127.0.0.1", "localhost") + "/runs?x=1", headers={"Accept": "text/html,*/*"}
        )
        assert (by_name.status_code, by_name.headers["location"]) == (307, f"{address}/runs?x=1")
    assert json.loads(CLIENT.get(f"{desk.prefect}/ui-settings", headers=known).text)["auth"] is None, "asked once"


@pytest.mark.flows
@pytest.mark.outage
def test_a_page_cannot_create_a_deployment_and_the_project_can(desk: Desk) -> None:
    body = {"name": "evil", "pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "touch HERE"}}]}
    for headers in strangers(desk.prefect, desk.password).values():
        assert CLIENT.post(f"{desk.prefect}/api/flows/", json={"name": "evil"}, headers=headers).status_code in (
            401,
            403,
        )
        assert CLIENT.post(f"{desk.prefect}/api/deployments/", json=body, headers=headers).status_code in (401, 403)
    made = desk.project.run("prefect", "work-pool", "create", "mine", "--type", "process")
    assert made.returncode == 0, made.stdout
    assert "mine" in desk.project.run("prefect", "work-pool", "ls").stdout
    with sqlite3.connect(desk.folder / ".prefect" / "prefect.db") as database:
        assert database.execute("select count(*) from flow").fetchall() == [(0,)]


@pytest.mark.flows
@pytest.mark.outage
def test_websockets_need_the_password_too(desk: Desk) -> None:
    base = desk.prefect.replace("http", "ws")

    async def first_message(path: str, token: object, said: object = None, **options: object) -> str:
        try:
            async with websockets.connect(base + path, proxy=None, **options) as connection:  # type: ignore[arg-type]
                await connection.send(json.dumps(said or {"type": "auth", "token": token}))
                return str(json.loads(await asyncio.wait_for(connection.recv(), 60))["type"])
        except (websockets.InvalidStatus, websockets.ConnectionClosed, websockets.NegotiationError):
            return "refused"

    own = {"subprotocols": ["prefect"]}
    for path in (
        "events/in",
        "events/out",
        "logs/out",
        "work_pools/x/workers/connect",
        "task_runs/subscriptions/scheduled",
    ):
        path = f"/api/{path}"
        assert asyncio.run(first_message(path, desk.password, **own)) == "auth_success"
        assert asyncio.run(first_message(path, None, additional_headers=basic(desk.password), **own)) == "auth_success"
        for token in (None, "", "wrong", [desk.password], {"type": "auth"}):
            assert asyncio.run(first_message(path, token, **own)) == "refused"
        assert asyncio.run(first_message(path, None, ["auth", desk.password], **own)) == "refused"
        assert asyncio.run(first_message(path, desk.password)) == "refused", "the protocol without a handshake"
        assert asyncio.run(first_message(path, desk.password, origin="http://evil.example", **own)) == "refused"


@pytest.mark.flows
@pytest.mark.outage
def test_the_password_stands_in_its_files_only(desk: Desk) -> None:
    secret = desk.password.partition(":")[2]
    for name in ("prefect.toml", "mlflow.toml"):
        assert (desk.folder / name).stat().st_mode & 0o777 == 0o600
    files = [path for path in desk.folder.rglob("*") if path.is_file() and path.suffix != ".toml"]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    said = desk.log.read_text()
    assert f"Prefect  {desk.prefect}" in said and "prefect.toml" in said and "mlflow.toml" in said
    for process in psutil.process_iter(["cmdline"]):
        assert secret not in " ".join(process.info["cmdline"] or []), "every user of the machine sees command lines"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """infra/gate.py, which is run by its path."""
    monkeypatch.syspath_prepend(str(INFRA))
    import gate

    return gate


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_follow_the_umask_and_secrets_are_private(tmp_path: Path, gate: ModuleType, umask: int) -> None:
    before = os.umask(umask)
    try:
        recipe_book.activate("tiny-dflash", tmp_path / "params.yaml")
        server = gate.Server(None, "http://127.0.0.1:1", tmp_path / "prefect.toml", "secret")
        server._write()
    finally:
        os.umask(before)
    assert (tmp_path / "params.yaml").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "prefect.toml").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "prefect.toml").read_text() == "secret"
    server.remove()
    assert not (tmp_path / "prefect.toml").exists()


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["host", "Host", "origin", "authorization", "sec-fetch-site", "sec-fetch-dest", "x"]),
        st.sampled_from(
            [
                *("127.0.0.1:80", "localhost:80", "evil.example:80", "127.0.0.1:80,evil.example", "[::1]:80", ""),
                *("http://127.0.0.1:80", "http://evil.example", "null", "same-origin", "cross-site", "document"),
                *(basic(PASSWORD)["Authorization"], basic("someone:x")["Authorization"], "Basic", "Basic \xff"),
            ]
        ),
    ),
    max_size=6,
)


@given(headers=HEADERS, method=st.sampled_from(["GET", "POST", "OPTIONS", "HEAD"]))
def test_the_gate_passes_on_nothing_else(headers: list[tuple[str, str]], method: str) -> None:
    sys.path.insert(0, str(INFRA))
    try:
        from gate import Gate
    finally:
        sys.path.remove(str(INFRA))
    passed, sent = [], []

    async def app(scope: object, receive: object, send: object) -> None:
        passed.append(scope)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }
    asyncio.run(Gate(app, 80, PASSWORD)(scope, None, send))
    named = [(name.lower(), value) for name, value in headers]
    hosts = [value for name, value in named if name == "host"]
    if passed:
        assert hosts in (["127.0.0.1:80"], ["localhost:80"])
        assert ("authorization", basic(PASSWORD)["Authorization"]) in named
        assert not {value for name, value in named if name == "origin"} - {"http://127.0.0.1:80"}
    else:
        assert sent[0]["status"] in (401, 403)
