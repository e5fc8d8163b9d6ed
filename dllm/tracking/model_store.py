"""How the bytes of registered checkpoints come into their place, and to another machine.

By the place (`places`), a version's source is a folder's URI, `models:/ID` of a LoggedModel, or an address below the
one that is named.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient, artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from dllm.errors import DllmError, ModelError, ServerError
from dllm.files import aside_of
from dllm.secrets import hide
from dllm.tracking import provenance
from dllm.tracking.places import MLFLOW, store_path
from dllm.tracking.store import cause_of

TRANSFER_S = 3600
"""Patience with one request that carries a file."""


def upload(client: MlflowClient, store: str, folder: Path, digest: str, model_id: str | None) -> str:
    """Copy a folder into a store that is no folder, and return the version's source.

    Raises:
        ServerError: the store does not take it.
    """
    address = f"models:/{model_id}" if store == MLFLOW else f"{store.rstrip('/')}/{digest[:16]}"
    with _transfer(address):
        if store == MLFLOW:
            client.log_model_artifacts(str(model_id), str(folder))
        else:
            get_artifact_repository(address).log_artifacts(str(folder))
    return address


def bring(source: str, uri: str, root: Path, digest: str, reference: str) -> Path:
    """Return a folder of this machine with a version's bytes, fetched where they are not there yet.

    Args:
        source: the version's.
        uri: of the MLflow store.
        root: the project's folder.
        digest: that the bytes must have.
        reference: the version's name in messages.

    Raises:
        ModelError: the bytes are not to be had, or have changed.
        ServerError: the store does not respond.
    """
    is_folder = urlsplit(source).scheme in ("file", "ssh", "")
    kept = Path(unquote(urlsplit(source).path))
    own = store_path(root, digest)
    places = [*([kept] if is_folder else []), own, root / "out" / "train" / "checkpoint"]
    there = [place for place in places if place.is_dir()]
    for place in there:
        if provenance.digest(place) == digest:
            return place
    if not is_folder:
        return _fetch(source, uri, own, digest, reference)
    wrong = "has changed since it was registered" if kept in there else "is not on this machine"
    hint = f"expected digest {digest[:16]}; bring {source} here, or `dvc checkout` the run that trained it"
    raise ModelError(f"the checkpoint of {reference} {wrong}", where=str(kept), hint=hint)


def _fetch(source: str, uri: str, own: Path, digest: str, reference: str) -> Path:
    own.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(own)
    try:
        with _transfer(source):
            # Where it puts them depends on the kind of address.
            found = Path(artifacts.download_artifacts(source, dst_path=str(aside), tracking_uri=uri, registry_uri=uri))
        if provenance.digest(found) != digest:
            hint = f"expected digest {digest[:16]}; register it again from where it was trained"
            raise ModelError(
                f"the checkpoint of {reference} has changed since it was registered", where=hide(source), hint=hint
            )
        shutil.rmtree(own, ignore_errors=True)  # damaged
        found.rename(own)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return own


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while: some of MLflow's settings are read from nowhere else."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _transfer(address: str) -> Iterator[None]:
    """Wait longer for a request that carries a file; raise what goes wrong as one line."""
    try:
        with variable("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TRANSFER_S)):
            yield
    except DllmError:
        raise
    except ImportError as error:
        hint = f"`pip install` it, such as boto3 for s3://, or choose another register.store ({address})"
        raise ServerError(f"this store needs a package that is not installed: {cause_of(error)}", hint=hint) from None
    except Exception as error:  # each object store has exceptions of its own
        told = f"the checkpoint's store failed: {cause_of(error)}"
        hint = "check the address and its login, then run the same command again"
        raise ServerError(told, where=hide(address), hint=hint) from None
