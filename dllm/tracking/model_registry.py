"""Checkpoints as versions of MLflow registered models, and the gate between challenger and champion.

MLflow holds a URI and a digest; the bytes are where `places` says, and no later run touches them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dllm.errors import ModelError, ServerError
from dllm.outside import markdown
from dllm.secrets import hide_in
from dllm.tracking import model_store, places
from dllm.tracking.address import VARIABLE, sqlite_path, tracking_uri
from dllm.tracking.mlflow_runs import experiment_id
from dllm.tracking.places import STORE, store_path
from dllm.tracking.runs import REGISTERED
from dllm.tracking.store import FAULTS, connect, has_run, one_line, unreachable

__all__ = ["STORE", "Registered", "register", "resolve", "store_path"]
_MODEL_NAME = re.compile(r"[/:.%\"']")
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


def register(
    root: Path,
    name: str,
    *,
    digest: str,
    tau: float,
    heldout_digest: str,
    score_name: str = "τ",
    interval: tuple[float, float] | None = None,
    target: str,
    tags: Mapping[str, str],
    run_id: str | None = None,
    store: str | None = None,
    folder: Path | None = None,
    experiment: str | None = None,
    score_key: str = "score",
    figures: Sequence[tuple[str, str]] = (),
) -> Registered:
    """Create a version for the checkpoint stored under `digest`, set its aliases, and compare it with the champion.

    The same bytes are one version in each store: registering them again updates its tags and judges it anew.

    Args:
        root: the project's folder.
        name: the registered model.
        digest: of the checkpoint's content (`provenance.digest`).
        tau: what versions are ranked by, of a draft its acceptance length on the held-out prompts; larger is better.
        score_name: how the verdict calls it.
        interval: its 95 % interval; the verdict says where that holds the champion's, too.
        heldout_digest: names these prompts; only measurements on the same ones are compared.
        target: the model the draft was made for; only drafts for the same one are compared.
        tags: further facts about the version.
        run_id: the MLflow run that trained it.
        store: `register.store`.
        folder: the checkpoint's files; None takes the project's own folder for registered ones.
        experiment: where MLflow lists the checkpoint as a model, too; None lists none.
        score_key: how MLflow calls the score among the model's metrics.
        figures: labels and values that its description shows.

    Raises:
        ConfigError: `store` is a folder, and MLflow a server.
        ServerError: MLflow is out of reach, or the store of the bytes is.
    """
    store = places.chosen(store, tracking_uri(root))
    client, uri = _client(root)
    facts: dict[str, str] = hide_in(
        {**tags, DIGEST: digest, TAU: repr(float(tau)), HELDOUT: heldout_digest, TARGET: target}
    )
    folder = folder or store_path(root, digest)
    with _answering(uri):
        if run_id is not None and not has_run(client, run_id):
            print(
                f"warning: MLflow has no run {run_id} here: the training was tracked in another store", file=sys.stderr
            )
            run_id = None
        known = _find(client, name, root, digest, store)
        if known is None:
            model_id = None
            if experiment is not None or store == places.MLFLOW:
                score = Metric(score_key, abs(tau), int(time.time() * 1000), 0)
                place = experiment_id(client, uri, root, experiment or name)
                model_id = _listed(client, place, name, facts, run_id, score)
            at = places.folder_in(store, root, digest)
            source = at.as_uri() if at else model_store.upload(client, str(store), folder, digest, model_id)
            if model_id is not None:
                client.finalize_logged_model(model_id, "READY")
            version = _create(client, uri, name, source, facts, run_id, model_id)
            if model_id is not None:  # a server notes it by itself
                noted = json.dumps([{"name": name, "version": int(version.version)}])
                client.set_logged_model_tags(model_id, {"mlflow.modelVersions": noted})
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        else:
            version = known
            for key, value in facts.items():
                if known.tags.get(key) != value:
                    client.set_model_version_tag(name, known.version, key, value)
        text = _description(name, version.version, score_name, tau, tags, target, figures)
        if version.description != text:
            client.update_model_version(name, version.version, text)
        verdict = _judge(client, name, client.get_model_version(name, version.version), score_name, interval)
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
    return model_store.bring(str(version.source), uri, root, expected, reference)


def _judge(
    client: MlflowClient, name: str, version: ModelVersion, score_name: str, interval: tuple[float, float] | None
) -> str:
    champion = _champion(client, name)
    tau = float(version.tags[TAU])
    if champion is None:
        _promote(client, name, version, None)
        return "champion: the first version"
    if champion.version == version.version:
        return "champion already"
    rival = f"version {champion.version}"
    if champion.tags.get(DIGEST) == version.tags[DIGEST]:
        _promote(client, name, version, champion)
        return f"champion: the bytes of {rival}, in another store"
    if any(champion.tags.get(key) != version.tags[key] for key in (HELDOUT, TARGET)):
        return f"challenger: {rival} was measured on other prompts or another target, so the two do not compare"
    best = float(champion.tags[TAU])
    # A figure that should be small is ranked by its negative and reported as it is.
    own, other = f"{score_name} {abs(tau):.3f}", f"{rival}'s {abs(best):.3f}"
    if tau <= best:
        return f"challenger: {own} does not beat {other}"
    _promote(client, name, version, champion)
    low, high = interval or (best, best)
    doubt = f", which lies in its 95 % interval, {low:.3f} to {high:.3f}" if low < best < high else ""
    return f"champion: {own} beats {other}{doubt}"


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


def _find(client: MlflowClient, name: str, root: Path, digest: str, store: str | None) -> ModelVersion | None:
    quote_mark = '"' if "'" in name else "'"
    versions = client.search_model_versions(f"name={quote_mark}{name}{quote_mark}")
    same = (version for version in versions if version.tags.get(DIGEST) == digest)
    return next((version for version in same if places.is_kept(str(version.source), store, root, digest)), None)


def _create(
    client: MlflowClient,
    uri: str,
    name: str,
    source: str,
    facts: Mapping[str, str],
    run_id: str | None,
    model_id: str | None,
) -> ModelVersion:
    try:
        client.create_registered_model(
            name, description=f"Checkpoints of dllm. Load the best one: models:/{name}@{CHAMPION}"
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with model_store.variable(VARIABLE, uri):  # a database is asked for the listed model by a client of MLflow's own
        return client.create_model_version(name, source, run_id=run_id, tags=dict(facts), model_id=model_id)


def _listed(
    client: MlflowClient, experiment_id: str, name: str, facts: Mapping[str, str], run_id: str | None, score: Metric
) -> str:
    """List a checkpoint among the models of its experiment, as the output of the run that trained it."""
    listed = client.search_logged_models([experiment_id], f"tags.`{DIGEST}` = '{facts[DIGEST]}'")
    if listed:
        return str(listed[0].model_id)
    model = client.create_logged_model(
        experiment_id, _MODEL_NAME.sub("-", name), run_id, tags=dict(facts), model_type="dllm checkpoint"
    )
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        scored = Metric(score.key, score.value, score.timestamp, score.step, model_id=model.model_id)
        client.log_batch(run_id, metrics=[scored])
    return str(model.model_id)


def _description(
    name: str,
    version: str | int,
    score_name: str,
    tau: float,
    tags: Mapping[str, str],
    target: str,
    figures: Sequence[tuple[str, str]],
) -> str:
    reference = f"models:/{name}/{version}"
    lines = [f"{score_name} {abs(tau):.3f} on held-out prompts; git commit {tags.get('dllm.git_commit')}.", ""]
    lines += [f"Trained for {_name_of(target)}.", ""]
    if figures:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {markdown(label)} | {markdown(value)} |" for label, value in figures] + [""]
    lines += ["Load it:", ""]
    lines += [f"    python -m dllm generate --checkpoint {reference} --prompt 'Hello'"]
    lines += [f"    python -m dllm export --checkpoint {reference} --to DIR"]
    lines += [f'    mlflow.artifacts.download_artifacts("{reference}")']
    return "\n".join(lines)


def _name_of(target: str) -> str:
    """Name a target by its model and revision; its identity has digests, too."""
    try:
        identity = json.loads(target)
        model, revision = str(identity["model"]), identity.get("revision")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return markdown(target)
    return markdown(f"{model} at {revision}" if revision else model)


def _parse(reference: str) -> tuple[str, str | None, str]:
    name = reference.removeprefix(REGISTERED)
    for separator in ("@", "/"):
        head, found, tail = name.rpartition(separator)
        if found and head and tail:
            return (head, tail, "") if separator == "@" else (head, None, tail)
    raise ModelError("not a registered model", where=reference, hint="write models:/NAME@ALIAS or models:/NAME/VERSION")


def _client(root: Path) -> tuple[MlflowClient, str]:
    uri = tracking_uri(root)
    return connect(uri, root), uri


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
            raise ServerError(f"MLflow refuses: {one_line(error.message)}", where=uri) from None
        raise unreachable(uri, error) from None
