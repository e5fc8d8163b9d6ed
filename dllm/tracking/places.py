"""The places of registered checkpoints (`register.store`), without MLflow, which takes 2 seconds to import.

Three kinds: a folder, by default `registered/` in the project; `mlflow`, the artifacts of MLflow itself, which a server
passes on to every client; and the address of an object store, such as s3://BUCKET/PREFIX.
"""

from __future__ import annotations

from pathlib import Path

from dllm.errors import ConfigError, StageError
from dllm.tracking.address import VARIABLE, home, is_local, sqlite_path, tracking_uri, vanishes

STORE = "registered"
MLFLOW = "mlflow"


def store_path(root: Path, digest: str) -> Path:
    """Name the project's own folder for a registered checkpoint's bytes; that of a checkout is a link to another's."""
    return (home(root) / STORE).resolve() / digest[:16]


def chosen(store: str | None, uri: str) -> str | None:
    """Return the store in effect: MLflow's artifacts where none is named and MLflow is a server.

    Raises:
        ConfigError: a folder is named and MLflow is a server, whose clients fetch nothing from folders.
    """
    if store is not None and store != MLFLOW and "://" not in store and not is_local(uri):
        raise ConfigError(
            "MLflow is a server here, and its clients fetch no checkpoint from a folder",
            where=f"register.store: {store}",
            hint="take `mlflow` (or null), or an address such as s3://BUCKET/PREFIX",
        )
    return store if store is not None or is_local(uri) else MLFLOW


def folder_in(store: str | None, root: Path, digest: str) -> Path | None:
    """Return the folder for a checkpoint's bytes; None where the store is none on this machine."""
    if store is None:
        return store_path(root, digest)
    if store == MLFLOW or "://" in store:
        return None
    return (home(root) / Path(store).expanduser()).resolve() / digest[:16]


def is_kept(source: str, store: str | None, root: Path, digest: str) -> bool:
    """Return whether a version's bytes lie in the store that is asked for; any place does where none is named."""
    if store is None:
        return True
    if store == MLFLOW:
        return source.startswith("models:/")
    folder = folder_in(store, root, digest)
    return source == folder.as_uri() if folder is not None else source.startswith(f"{store.rstrip('/')}/")


def check(root: Path, store: str | None, *, registers: bool = True) -> None:
    """Refuse a place of runs and versions that does not last, or that nobody could fetch from.

    Args:
        root: the project's folder.
        store: `register.store`.
        registers: whether a version is made; False looks at the runs only.

    Raises:
        ConfigError: the store is a folder, and MLflow a server; or MLFLOW_TRACKING_URI is wrong.
        StageError: runs or versions would be deleted with the folder of a flow run.
    """
    uri = tracking_uri(root)
    kept = [sqlite_path(uri)]
    if registers:
        kept.append(folder_in(chosen(store, uri), root, ""))
    if lost := [path for path in kept if path is not None and vanishes(path)]:
        raise StageError(
            "this checkout is deleted after the flow run, and what is tracked or registered here with it",
            where=str(lost[0]),
            hint=f"set {VARIABLE} to a server, or register.store and the database to a place outside {root}",
        )
