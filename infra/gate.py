"""Run Prefect's or MLflow's server on loopback, for those who have its password and for no web page.

A web page can send requests to any port of the machine whose browser shows it, and a name that resolves to 127.0.0.1
makes page and server one site (DNS rebinding). Prefect runs the code that it is sent. So every request, on every
route, must name this server as its host, must not come from a page of another site, and must carry the password.

`infra/servers.py` starts this file. The password is in PREFECT_API_AUTH_STRING, as `user:password`. While the server
listens, its client file (mode 0600) has address and password, so that clients on this machine need no typing.

In a container (`infra/compose.yaml`) it listens on DLLM_GATE_BIND instead of loopback, and answers also to the names in
DLLM_GATE_HOSTS (`mlflow:5000`, commas between).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hmac
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from servers import COMPLAINT, HEADER, HOST, PASSWORD, READY

from dllm import secrets
from dllm.errors import DllmError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PREFECT_TOML = (
    HEADER
    + """ The password follows the colon.
[api]
url = {url}
auth_string = {password}
"""
)
MLFLOW_TOML = (
    HEADER
    + """ For clients: MLFLOW_TRACKING_USERNAME, the part before the colon, and
# MLFLOW_TRACKING_PASSWORD, the part after it.
url = {url}
user_and_password = {password}
"""
)
BACKLOG = 128
GRACE_S = 3
"""Seconds that open requests have when the server stops."""
POLICY_VIOLATION = 1008


class Gate:
    """An ASGI app that passes on only what the user of this machine sends.

    Args:
        app: the server's app.
        port: where it listens.
        password: `user:password`.
    """

    def __init__(self, app: App, port: int, password: str) -> None:
        self._app, self._password = app, password
        self._home = f"{HOST}:{port}"
        self._hosts = {self._home, f"localhost:{port}", *_more_hosts()}
        self._origins = {f"http://{host}" for host in self._hosts}
        self._basic = "Basic " + base64.b64encode(password.encode()).decode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or one websocket."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = _headers(scope)
        if self._is_foreign(scope, headers):
            return await _refuse(scope, send, 403, "this server answers only its own pages")
        if scope["type"] == "http" and self._is_page_elsewhere(scope, headers):
            # The pages call one address, whichever they are opened at.
            target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
            return await _refuse(scope, send, 307, self._home, (b"location", f"http://{self._home}".encode() + target))
        is_known = _same(headers.get("authorization", [""])[-1], self._basic)
        if scope["type"] == "websocket" and not is_known and "prefect" in scope.get("subprotocols", ()):
            handshake = _Handshake(self._password, receive, send)
            return await self._app(scope, handshake.receive, handshake.send)
        if not is_known:
            ask = (b"www-authenticate", b'Basic realm="dllm", charset="UTF-8"')
            return await _refuse(scope, send, 401, "user and password needed", ask)
        await self._app(scope, receive, send)

    def _is_foreign(self, scope: Message, headers: dict[str, list[str]]) -> bool:
        """Whether a request names another host, or comes from a page of another site."""
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts or not set(origins) <= self._origins:
            return True
        # Browsers send no Origin with a GET that a page of another site embeds; following a link is the user's act.
        site, mode, goal = (headers.get(f"sec-fetch-{key}", [""])[-1] for key in ("site", "mode", "dest"))
        is_link = scope["type"] == "http" and scope["method"] == "GET" and (mode, goal) == ("navigate", "document")
        return site not in ("", "none", "same-origin") and not is_link

    def _is_page_elsewhere(self, scope: Message, headers: dict[str, list[str]]) -> bool:
        wants_page = scope["method"] == "GET" and "text/html" in headers.get("accept", [""])[-1]
        return wants_page and headers["host"][0].lower() != self._home


class _Handshake:
    """A websocket of Prefect's own protocol, whose first message brings the password.

    Until then the app may accept the connection, and sends nothing else.
    """

    def __init__(self, password: str, receive: Receive, send: Send) -> None:
        self._password, self._receive, self._send = password, receive, send
        self._is_known = self._is_over = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "websocket.receive" or self._is_known:
            return message
        self._is_known = _same(_token(message), self._password)
        if self._is_known:
            return message
        await self.send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": "password needed"})
        return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}

    async def send(self, message: Message) -> None:
        if self._is_over or (message["type"] == "websocket.send" and not self._is_known):
            return
        self._is_over = message["type"] == "websocket.close"
        await self._send(message)


def _more_hosts() -> list[str]:
    return [name.strip().lower() for name in os.environ.get("DLLM_GATE_HOSTS", "").split(",") if name.strip()]


def _headers(scope: Message) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _token(message: Message) -> str:
    try:
        sent = json.loads(message.get("text") or message.get("bytes") or "")
    except (ValueError, RecursionError):
        return ""
    is_auth = isinstance(sent, dict) and sent.get("type") == "auth"
    return str(sent.get("token")) if is_auth else ""


async def _refuse(scope: Message, send: Send, status: int, text: str, *headers: tuple[bytes, bytes]) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": POLICY_VIOLATION})
    plain = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [plain, *headers]})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def prefect_app(port: int) -> App:
    """Build Prefect's API and UI. With PREFECT_UI_ENABLED=0, the API alone."""
    # before Prefect is imported: its settings are read then
    os.environ["PREFECT_SERVER_UI_API_URL"] = f"http://{HOST}:{port}/api"  # else its pages call port 4200
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = f"http://{HOST}:{port}"
    from prefect.server.api.server import create_app

    return cast(App, create_app(final=True))


def mlflow_app(port: int) -> App:
    """Build MLflow's API and UI over the store MLFLOW_BACKEND_STORE_URI, as `mlflow server` does.

    Without job execution, which runs code that clients send and takes three processes more.
    """
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join([f"{HOST}:{port}", f"localhost:{port}", *_more_hosts()])
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    from dllm.tracking.store import connect

    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    connect(uri)  # makes a store that is not there in one step, and says in one line what is wrong with one
    from mlflow.server import constants
    from mlflow.server.handlers import initialize_backend_stores

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    destination = os.environ.get("MLFLOW_ARTIFACTS_DESTINATION", "./mlartifacts")
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = destination
    initialize_backend_stores(uri, uri, os.environ[constants.ARTIFACT_ROOT_ENV_VAR])
    from mlflow.server.fastapi_app import app

    return cast(App, app)


class Server(uvicorn.Server):
    """A server that writes its client file once it listens, and removes it as soon as it is told to stop.

    Args:
        gate: the app.
        address: printed once it listens.
        client_file: the file, or None.
        text: its content.
    """

    def __init__(self, gate: Gate, address: str, client_file: Path | None, text: str) -> None:
        config = uvicorn.Config(gate, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=GRACE_S)
        super().__init__(config)
        self._address, self._client_file, self._text = address, client_file, text
        self._lock: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, write the client file, and print the address."""
        await super().startup(sockets)
        if not self.should_exit:
            self._write()
            print(f"{READY}{self._address}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Remove the client file, then let open requests end."""
        self.remove()
        super().handle_exit(sig, frame)

    def _write(self) -> None:
        if self._client_file is None:
            return
        aside = self._client_file.with_name(f"{self._client_file.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        self._lock = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # till this process ends: a file that nobody locks is left over
        os.write(self._lock, self._text.encode())
        aside.replace(self._client_file)

    def remove(self) -> None:
        """Remove the client file, if it is this server's."""
        if self._lock is None or self._client_file is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._client_file.stat(), os.fstat(self._lock)):
                self._client_file.unlink()


def main(arguments: list[str]) -> None:
    """Run a server until a signal stops it; arguments: `prefect` or `mlflow`, port (0: a free one), client file."""
    what, wanted, *client_files = arguments
    password = os.environ[PASSWORD]
    listener = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )  # named, else asyncio delays packets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((os.environ.get("DLLM_GATE_BIND", HOST), int(wanted)))
    listener.listen(BACKLOG)
    port = listener.getsockname()[1]
    address = f"http://{HOST}:{port}"
    if what == "prefect":
        app, url, text = prefect_app(port), f"{address}/api", PREFECT_TOML
    else:
        app, url, text = mlflow_app(port), address, MLFLOW_TOML
    text = text.format(url=json.dumps(url), password=json.dumps(password))  # TOML quotes as JSON does
    server = Server(Gate(app, port, password), address, Path(client_files[0]) if client_files else None, text)
    try:
        server.run(sockets=[listener])
    finally:
        server.remove()


if __name__ == "__main__":
    secrets.install()
    try:
        main(sys.argv[1:])
    except DllmError as error:
        sys.exit(f"{COMPLAINT}{error}")
