"""Connect to the MLflow store, and say in one line why it cannot be reached."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic.util.exc import CommandError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store import db_migrations
from mlflow.store.db import utils as mlflow_databases
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import Response
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from dllm import outside
from dllm.disk_faults import is_disk_full
from dllm.errors import ConfigError, DllmError, ServerError, StageError
from dllm.outside import tls_hint
from dllm.secrets import hide
from dllm.tracking import sqlite_store
from dllm.tracking.address import OR_UNSET, VARIABLE, home, is_local, sqlite_path

FAULTS = (MlflowException, SQLAlchemyError, CommandError, OSError, sqlite3.Error, ImportError, ValueError)
"""What MLflow and the libraries under it raise for a store that fails."""
RETRY_AFTER_S = (0.5, 1.5)
"""Pauses between the tries to reach a server at the start of a stage."""
LOCK_PATIENCE_S = 10.0
CAUSE_CHARS = 2000
"""Characters of what a store says that are kept; a line for the terminal is cut where it is printed."""
MAX_REPLY_BYTES = 1 << 20
"""Of the reply to the first question to a server; that of one experiment is far shorter."""
_PING = "/api/2.0/mlflow/experiments/search"


def connect(uri: str, root: Path | None = None) -> MlflowClient:
    """Open a client and check that the store responds.

    Args:
        uri: the store's.
        root: the project's folder: its own store follows it where it is moved.

    Raises:
        ConfigError: the driver of a database is not installed.
        ServerError: the store does not respond, or what does is no MLflow server.
        StageError: the store's file is damaged, or the disk is full.
    """
    _set_up()
    with faults_in_one_line(uri):
        path = sqlite_path(uri)
        if path is not None:
            sqlite_store.open_or_make(path, LOCK_PATIENCE_S)
        elif not is_local(uri) and uri.startswith("http"):
            _check_server(uri)
        try:
            client = _open(uri)
        except FAULTS:
            if path is None or sqlite_store.holds_runs(path):
                raise
            sqlite_store.make(path, instead=True)  # half made by a process that was killed meanwhile
            client = _open(uri)
        if path is not None and root is not None and path == home(root) / "mlflow.db":
            sqlite_store.follow_move(path)
    return client


def has_run(client: MlflowClient, run_id: str) -> bool:
    """Return whether the store has a run; raises as `experiment_of` does."""
    return experiment_of(client, run_id) is not None


def experiment_of(client: MlflowClient, run_id: str) -> str | None:
    """Return the id of a run's experiment; None where another store tracked it.

    Raises:
        MlflowException, or another of `FAULTS`: the store does not respond.
    """
    try:
        return str(client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


@contextmanager
def faults_in_one_line(uri: str) -> Iterator[None]:
    """Raise what a store's failure raises as one line; see `unreachable`."""
    try:
        yield
    except FAULTS as error:
        raise unreachable(uri, error) from None


def unreachable(uri: str, error: Exception) -> DllmError:
    """Return the one-line error for a store that does not respond, with a hint that fits the cause."""
    cause = cause_of(error)
    path = sqlite_path(uri)
    if isinstance(error, ImportError | NoSuchModuleError):
        hint = f"`pip install` that driver, {OR_UNSET}"
        return ConfigError(f"the driver of this MLflow store is not installed: {cause}", where=uri, hint=hint)
    if is_disk_full(error) or "disk is full" in cause:
        hint = "free some space and run again; finished work is kept"
        return StageError("disk is full", where=str(path or uri), hint=hint)
    if path is not None and ("malformed" in cause or "not a database" in cause):
        return sqlite_store.damaged(path, cause)
    return ServerError(f"MLflow out of reach: {cause}", where=uri, hint=_hint(uri, cause))


def cause_of(error: BaseException) -> str:
    """Return the innermost cause of an error in one line: MLflow and requests wrap it in many."""
    inner = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    told = str(inner) or type(inner).__name__
    if isinstance(inner, OSError) and inner.strerror:
        told = inner.strerror if inner.filename is None else f"{inner.strerror}: {inner.filename}"
    told = re.sub(r"\(Background on this error at: \S+\)|\[SQL: .*", "", told, flags=re.DOTALL)
    return one_line(told)


def _open(uri: str) -> MlflowClient:
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _set_up() -> None:
    # A stage must not wait long for a store. MLflow's defaults retry a dead server, and a database, for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Its own lines link to the view for traces, and a bar would fill a log.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    vars(mlflow_databases).update(
        MAX_RETRY_COUNT=1,
        # It would take the quoted path of the URI for the name of a folder.
        _make_parent_dirs_if_sqlite=lambda uri: None,
    )
    for name, level in (("mlflow.store.db.utils", logging.CRITICAL), ("alembic", logging.WARNING)):
        logging.getLogger(name).setLevel(level)


def _check_server(uri: str) -> None:
    """Ask a server for its experiments; MLflow's client hides the status and the text of most failures.

    Raises:
        ServerError: it cannot be reached, refuses, fails, or is no MLflow server.
    """
    for pause_s in (*RETRY_AFTER_S, None):
        try:
            reply = http_request(
                get_default_host_creds(uri), _PING, "POST", raise_on_status=False, json={"max_results": 1}, stream=True
            )
            text = _read(reply)
        except (MlflowException, OSError) as error:
            problem: DllmError | None = unreachable(uri, error)
            passes = True
        else:
            problem = _judge(uri, reply.status_code, text)
            passes = reply.status_code in (429, 500, 502, 503, 504)
        if problem is None:
            return
        if pause_s is None or not passes:
            raise problem
        time.sleep(pause_s)


def _read(reply: Response) -> str:
    """Read a reply of bounded length in bounded time: the timeout of a request is one for each byte.

    Raises:
        TimeoutError: it comes too slowly.
    """
    end, data = time.monotonic() + float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]), bytearray()
    with reply:
        for part in reply.iter_content(1):  # more would wait until so many are there
            data += part
            if len(data) >= MAX_REPLY_BYTES:
                break
            if time.monotonic() > end:
                raise TimeoutError("timed out amid its reply")
    return data.decode(errors="replace")


def _judge(uri: str, status: int, text: str) -> DllmError | None:
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if status == 200 and isinstance(said, dict) and said.keys() <= {"experiments", "next_page_token"}:
        if said.get("experiments") or _has_version(uri):
            return None
        said = None
    detail = _detail(said, text)
    if status == 401:
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return ServerError(f"the MLflow server asks for a login (401): {detail}", where=uri, hint=hint)
    if status == 403:
        hint = "use a login that may, or have the server allow this host (`mlflow server --allowed-hosts`)"
        return ServerError(f"the MLflow server refuses access (403): {detail}", where=uri, hint=hint)
    if status >= 500 or status == 429:
        hint = "its own log has the cause; run the same command again once it works"
        return ServerError(f"the MLflow server failed ({status}): {detail}", where=uri, hint=hint)
    if "https port" in detail.lower() or "https server" in detail.lower():
        return ServerError(f"the server speaks https ({status}): {detail}", where=uri, hint="write https://")
    hint = f"check host, port and path in {VARIABLE}, {OR_UNSET}"
    return ServerError(f"what responds is no MLflow server ({status}): {detail}", where=uri, hint=hint)


def _has_version(uri: str) -> bool:
    """Return whether a server that shows no experiment is MLflow all the same: this login may see none."""
    reply = http_request(get_default_host_creds(uri), "/version", "GET", raise_on_status=False)
    return reply.status_code == 200 and re.fullmatch(r"\d+\.\d+[\w.+-]*", reply.text.strip()) is not None


def _detail(said: Any, text: str) -> str:
    """Extract a server's message from its reply, JSON or HTML."""
    while isinstance(said, dict):
        said = next((said[name] for name in ("message", "error", "detail") if said.get(name)), None)
    told = (
        said
        if isinstance(said, str)
        else re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", hide(text)[:4000], flags=re.S)
    )
    return one_line(told) or "no text"


def one_line(text: object) -> str:
    """Make one printable line of what a store says, without secrets."""
    return outside.one_line(hide(str(text)), CAUSE_CHARS)


def _hint(uri: str, cause: str) -> str:
    low = cause.lower()
    if uri.startswith("databricks"):
        return f"configure the login with `databricks configure` or DATABRICKS_HOST and DATABRICKS_TOKEN, {OR_UNSET}"
    if "out-of-date database schema" in low and not _is_newer(low):
        return f"copy the database, then run `mlflow db upgrade` with the URI above, {OR_UNSET}"
    if "can't locate revision" in low or "out-of-date database schema" in low:
        return f"a newer MLflow made this database: install that version, {OR_UNSET}"
    if hint := tls_hint(cause, "MLFLOW_TRACKING_SERVER_CERT_PATH"):
        return hint
    if "remote end closed" in low or "reset by peer" in low:
        return "perhaps the server speaks https: write https://; else its own log has the cause"
    if "timed out" in low:
        return "the server is slow or a firewall drops packets: MLFLOW_HTTP_REQUEST_TIMEOUT sets the seconds"
    if "name or service" in low or "resolve" in low or "name resolution" in low:
        return f"check the host's name in {VARIABLE}, {OR_UNSET}"
    if "refused" in low:
        return f"start the server, or check host and port in {VARIABLE}, {OR_UNSET}"
    if sqlite_path(uri) is not None:
        return "check that the file and its folder can be written, and that the disk is not full"
    if is_local(uri):
        return f"check the database's address, user and password in {VARIABLE}, {OR_UNSET}"
    return f"check {VARIABLE}, {OR_UNSET}"


def _is_newer(cause: str) -> bool:
    """Return whether a database's version is none that this MLflow knows: it calls those out of date, too."""
    found = re.search(r"found version (\w+)", cause)
    known = Path(db_migrations.__file__).parent / "versions"
    return found is not None and found[1] != "none" and not any(known.glob(f"{found[1]}_*.py"))
