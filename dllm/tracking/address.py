"""The address of the MLflow store: MLFLOW_TRACKING_URI, or a SQLite file in the project's folder."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from dllm.errors import ConfigError

VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OR_UNSET = f"or unset {VARIABLE} to track into ./mlflow.db"
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_OF_PREFECT = re.compile(r"tmp\w+prefect")
_IN_MEMORY = re.compile(r"/?(:memory:)?(\?.*)?|/file:.*(:memory:|mode=memory).*", re.DOTALL)
_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w-]+(\.[\w-]+)*)(:\d+)?(/.*)?")


def tracking_uri(root: Path) -> str:
    """Return the store's URI: MLFLOW_TRACKING_URI, else a SQLite file in the project's folder.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI is not the address of an MLflow store.
    """
    uri = os.environ.get(VARIABLE, "").strip()
    if not uri:
        return sqlite_uri(home(root) / "mlflow.db")
    _check(uri)
    return uri


def home(root: Path) -> Path:
    """Return the folder in which a project keeps what outlives a run: runs, their artifacts, registered checkpoints.

    That of the project, and for the temporary copies of it in which `dvc exp run --temp`, `--queue` and flow runs with
    a checkout work too.
    """
    root = root.absolute()
    for at in root.parents:
        if at.parts[-3:] == (".dvc", "tmp", "exps"):
            return at.parents[2]
        if at.parts[-2:] == ("work", "checkouts"):
            return at.parents[1]
    return root


def checkout_of(root: Path) -> str:
    """Return the name of the checkout in which a flow run works, if this is the folder of one; else an empty text."""
    return next((at.name for at in root.absolute().parents if at.parent.parts[-2:] == ("work", "checkouts")), "")


def vanishes(path: Path) -> bool:
    """Return whether a path lies in the temporary folder of a flow run, into which a deployment clones the project."""
    place = Path(tempfile.gettempdir())
    at = path.absolute()
    return (
        at.is_relative_to(place)
        and at.relative_to(place).parts[:1] != ()
        and _OF_PREFECT.fullmatch(at.relative_to(place).parts[0]) is not None
    )


def page(server: str, experiment_id: str, run_id: str = "", artifact: str = "") -> str:
    """Return the address of an experiment's runs, of one run or of its artifact, in MLflow's view for training."""
    run = f"/{quote(run_id)}" if run_id else ""
    more = f"/artifacts/{quote(artifact)}" if artifact else ""
    return f"{server.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs{run}{more}?workflowType=machine_learning"


def is_local(uri: str) -> bool:
    """Return whether a store is a file or a database that this process opens, rather than a server."""
    return not uri.startswith(("http://", "https://", "databricks"))


def sqlite_uri(path: Path) -> str:
    """Write the URI of a SQLite file; `%` and `?` of the path are quoted, since SQLAlchemy reads them as its own."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file behind a SQLite URI; None for other stores and for one in memory."""
    scheme, found, path = uri.partition(":///")
    if not found or scheme.partition("+")[0] != "sqlite":
        return None
    path = unquote(path.partition("?")[0])
    return None if path in ("", ":memory:") or path.startswith("file:") else Path(path).absolute()


def _check(uri: str) -> None:
    scheme = uri.partition(":")[0].lower() if "://" in uri or uri.startswith(("file:", "uc:", "databricks")) else ""
    if scheme in ("http", "https"):
        _check_http(uri)
    elif scheme.partition("+")[0] == "sqlite" and _IN_MEMORY.fullmatch(uri.partition("://")[2]):
        hint = f"give sqlite:////PATH/mlflow.db, {OR_UNSET}"
        raise ConfigError("a database in memory keeps no runs", where=f"{VARIABLE}={uri}", hint=hint)
    elif scheme.partition("+")[0] in DATABASES or scheme == "databricks":
        return
    elif scheme == "file" or not scheme:
        _check_path(uri)
    else:
        raise ConfigError(
            f"MLflow keeps no runs at {scheme}:// addresses",
            where=f"{VARIABLE}={uri}",
            hint=f"give http(s)://HOST:PORT, sqlite:////PATH/mlflow.db, postgresql://... or databricks, {OR_UNSET}",
        )


def _check_http(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        wrong = "" if parts.hostname and parts.port != 0 else "it has no host"
    except ValueError as error:
        wrong = str(error)
    if not wrong and (parts.fragment or parts.query):
        wrong = "it is the address of a page"
    if wrong:
        hint = f"give http://HOST:PORT, and a path only if the server has one, {OR_UNSET}"
        raise ConfigError(f"not the address of an MLflow server: {wrong}", where=f"{VARIABLE}={uri}", hint=hint)


def _check_path(uri: str) -> None:
    """Refuse what MLflow would take for a folder: an address without a scheme, a database's file, an old store."""
    where = f"{VARIABLE}={uri}"
    path = Path(unquote(urlsplit(uri).path) if uri.startswith("file:") else re.sub("^sqlite:/*", "", uri))
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        hint = f"write {sqlite_uri(path.absolute())}, {OR_UNSET}"
        raise ConfigError("a database's file needs its scheme", where=where, hint=hint)
    if not path.is_dir() and not uri.startswith((".", "/", "~", "file:")) and _HOST.fullmatch(uri.rpartition("@")[2]):
        hint = f"write http://{uri} (or https://), {OR_UNSET}"
        raise ConfigError("a server's address needs its scheme", where=where, hint=hint)
    if os.environ.get(_FILE_STORE, "").lower() not in ("1", "true"):
        raise ConfigError(
            "MLflow keeps no runs in folders any more",
            where=where,
            hint=f"unset {VARIABLE} to track into ./mlflow.db; `mlflow migrate-filestore` moves old runs into a "
            f"database, {_FILE_STORE}=true goes on with the folder",
        )
