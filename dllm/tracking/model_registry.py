"""Checkpoints as versions of MLflow registered models, and the gate between challenger and champion.

MLflow holds a URI and a digest; the bytes stay on disk, in `registered/<digest>/`, where no later run touches them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dllm.errors import ModelError, ServerError
from dllm.secrets import hide_in
from dllm.tracking import provenance
from dllm.tracking.address import is_local, sqlite_path, tracking_uri
from dllm.tracking.runs import REGISTERED
from dllm.tracking.store import FAULTS, connect, one_line, unreachable

STORE = "registered"
CHAMPION, CHALLENGER = "champion", "challenger"
DIGEST, TAU, HELDOUT, TARGET = "dllm.digest", "dllm.tau", "dllm.heldout_digest", "dllm.target"


@dataclass(frozen=True)
class Registered:
    """A registered model version and its standing."""

    name: str
    version: int
    uri: str
    aliases: tuple[str, ...]
    verdict: str
    """Why it is or is not the champion, in one sentence."""
    is_new: bool
    """False if the same bytes were registered before."""


def store_path(root: Path, digest: str) -> Path:
    """Name the folder that keeps a registered checkpoint's bytes; that of a checkout is a link to the project's."""
    return (root / STORE).resolve() / digest[:16]


def register(
    root: Path,
    name: str,
    *,
    digest: str,
    tau: float,
    heldout_digest: str,
    score_name: str = "τ",
    target: str,
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> Registered:
    """Create a version for the checkpoint stored under `digest`, set its aliases, and compare it with the champion.

    The same bytes are only ever one version: registering them again updates its tags and judges it anew.

    Args:
        root: the project's folder.
        name: the registered model.
        digest: of the checkpoint's content (`provenance.digest`).
        tau: what versions are ranked by, of a draft its acceptance length on the held-out prompts; larger is better.
        score_name: how the verdict calls it.
        heldout_digest: names these prompts; only measurements on the same ones are compared.
        target: the model the draft was made for; only drafts for the same one are compared.
        tags: further facts about the version.
        run_id: the MLflow run that trained it.

    Raises:
        ServerError: MLflow is out of reach.
    """
    client, uri = _client(root)
    facts: dict[str, str] = hide_in(
        {**tags, DIGEST: digest, TAU: repr(float(tau)), HELDOUT: heldout_digest, TARGET: target}
    )
    with _answering(uri):
        known = _find(client, name, digest)
        version = known or _create(client, name, _source(uri, store_path(root, digest)), facts, run_id)
        if known is not None:
            for key, value in facts.items():
                if known.tags.get(key) != value:
                    client.set_model_version_tag(name, known.version, key, value)
        if known is None:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        verdict = _judge(client, name, client.get_model_version(name, version.version), score_name)
        aliases = tuple(sorted(_aliases(client, name, version.version)))
    return Registered(name, int(version.version), str(version.source), aliases, verdict, known is None)


def resolve(reference: str, root: Path) -> Path:
    """Find the checkpoint behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, and check its digest.

    Raises:
        ModelError: there is no such version, or its bytes are gone or have changed.
        ServerError: MLflow is out of reach.
    """
    name, alias, number = _parse(reference)
    store = sqlite_path(tracking_uri(root))
    if store is not None and not store.is_file():  # to open it would make it
        hint = "`make run` registers"
        raise ModelError("not registered: nothing has been, in this project", where=str(store), hint=hint)
    client, uri = _client(root)
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except FAULTS as error:
        known = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        if not isinstance(error, MlflowException) or error.error_code not in known:
            raise unreachable(uri, error) from None
        raise ModelError(
            f"not registered: {one_line(error.message)}", where=uri, hint="`make ui` shows what is"
        ) from None
    expected = version.tags.get(DIGEST)
    if expected is None:
        raise ModelError(f"{reference} was not registered by dllm: it has no digest", where=str(version.source))
    kept = Path(unquote(urlsplit(str(version.source)).path))
    places = [kept, store_path(root, expected), root / "out" / "train" / "checkpoint"]
    there = [place for place in places if place.is_dir()]
    for place in there:
        if provenance.digest(place) == expected:
            return place
    wrong = "has changed since it was registered" if kept in there else "is not on this machine"
    hint = f"expected digest {expected[:16]}; bring {version.source} here, or `dvc checkout` the run that trained it"
    raise ModelError(f"the checkpoint of {reference} {wrong}", where=str(kept), hint=hint)


def _judge(client: MlflowClient, name: str, version: ModelVersion, score_name: str) -> str:
    champion = _champion(client, name)
    tau = float(version.tags[TAU])
    if champion is None:
        _promote(client, name, version, None)
        return "champion: the first version"
    if champion.version == version.version:
        return "champion already"
    rival = f"version {champion.version}"
    if any(champion.tags.get(key) != version.tags[key] for key in (HELDOUT, TARGET)):
        return f"challenger: {rival} was measured on other prompts or another target, so the two do not compare"
    best = float(champion.tags[TAU])
    # A figure that should be small is ranked by its negative and reported as it is.
    own, other = f"{score_name} {abs(tau):.3f}", f"{rival}'s {abs(best):.3f}"
    if tau <= best:
        return f"challenger: {own} does not beat {other}"
    _promote(client, name, version, champion)
    return f"champion: {own} beats {other}"


def _promote(client: MlflowClient, name: str, version: ModelVersion, from_: ModelVersion | None) -> None:
    # MLflow keeps no history of aliases: it is recorded on the version.
    client.set_model_version_tag(name, version.version, "promoted_from", str(from_.version) if from_ else "none")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    client.set_model_version_tag(name, version.version, "promoted_at", now)
    client.set_registered_model_alias(name, CHAMPION, version.version)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(number)) if number is not None else None


def _aliases(client: MlflowClient, name: str, version: str) -> list[str]:
    aliases = client.get_registered_model(name).aliases
    return [alias for alias, number in aliases.items() if str(number) == str(version)]


def _find(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    quote_mark = '"' if "'" in name else "'"
    versions = client.search_model_versions(f"name={quote_mark}{name}{quote_mark}")
    return next((version for version in versions if version.tags.get(DIGEST) == digest), None)


def _create(client: MlflowClient, name: str, source: str, facts: Mapping[str, str], run_id: str | None) -> ModelVersion:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, source, run_id=run_id, tags=dict(facts))


def _source(uri: str, path: Path) -> str:
    """Write a path as a URI; an MLflow server reads `file:` as its own disk and refuses it."""
    where = "file://" if is_local(uri) else f"ssh://{platform.node()}"
    return where + quote(str(path))


def _parse(reference: str) -> tuple[str, str | None, str]:
    name = reference.removeprefix(REGISTERED)
    for separator in ("@", "/"):
        head, found, tail = name.rpartition(separator)
        if found and head and tail:
            return (head, tail, "") if separator == "@" else (head, None, tail)
    raise ModelError("not a registered model", where=reference, hint="write models:/NAME@ALIAS or models:/NAME/VERSION")


def _client(root: Path) -> tuple[MlflowClient, str]:
    uri = tracking_uri(root)
    return connect(uri), uri


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
            raise ServerError(f"MLflow refuses: {one_line(error.message)}", where=uri) from None
        raise unreachable(uri, error) from None
