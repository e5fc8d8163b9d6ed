"""Regeneration without a project: any input to a folder of shards, with nothing but flags.

Owns what the folder's result is made of and called by: its fingerprint, its manifest, and the order of checks before
the first request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.config.load import params_digest
from dllm.config.params import Params, Source
from dllm.errors import ConfigError, DataError
from dllm.files import full_disk_in_one_line
from dllm.models import targets
from dllm.process import children as process
from dllm.prompts import stream as conversations
from dllm.prompts.stream import Tally
from dllm.prompts.table import Prompt
from dllm.regeneration import core as answering
from dllm.regeneration import engines, identity, output_folder
from dllm.regeneration.core import Answered, Job
from dllm.regeneration.output_folder import Session
from dllm.regeneration.rollout import Rollout, RolloutConfig, num_samples
from dllm.registry import ENGINES
from dllm.responses import shards
from dllm.tracking import provenance
from dllm.tracking.runs import MlflowTracker, NullTracker, Status, Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERIMENT = "regenerate"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    params: Params
    """Its target, its one source and its section `regenerate` count."""
    output: Path
    root: Path
    """Where relative paths of the input start, and SGLang's environment lies."""
    servers: tuple[str, ...] = ()
    """Addresses for engine `openai`; none takes DLLM_TARGET_URL."""
    part: tuple[int, int] | None = None
    heldout_fraction: float = 0.0
    resume: bool = False
    track: bool = False
    """Whether to leave an MLflow run."""

    @property
    def source(self) -> Source:
        """Name the input."""
        return self.params.prepare.sources[0]


@dataclass
class Survey:
    """What a first pass over the input finds."""

    tally: Tally = field(default_factory=Tally)
    rollouts: int = 0
    turns: int = 0
    first: Prompt | None = None


def run(order: Order) -> dict[str, Any]:
    """Answer the input, or what is missing of it, and return the figures.

    Raises:
        ConfigError: the output lies in the input, or there is no server.
        DataError: the input cannot be read or holds no prompt, or the target says nothing at all.
        ModelError: the tokenizer or the target cannot be loaded.
        ServerError: the servers are out of reach or answer wrongly; finished answers are kept.
        StageError: the folder is another process's or not empty, or the disk is full.
        SystemExit: 143 after SIGTERM, 130 after SIGINT.
    """
    _check_apart(order)
    output = order.output
    with process.signals_exit(), full_disk_in_one_line(output), output_folder.claimed(output, order.resume):
        tokenizer = targets.load_tokenizer(order.params.target)
        made_of = _made_of(order, tokenizer)
        fingerprint = _digest(made_of)
        survey = look_over(order, tokenizer)
        work = output_folder.work_folder(output, fingerprint)
        session = Session(work)
        with _tracked(order, session) as tracker:
            asking = RolloutConfig(order.params.regenerate, order.params.target, tokenizer)
            job = Job(
                asking=asking,
                prompts=lambda: _prompts(order, Tally()),
                turns=survey.turns,
                work=work,
                open_engine=lambda: engines.opened(order.params, tokenizer, order.root, order.servers or None),
                tracker=tracker,
                beat=session.save,
            )
            answered = answering.answer_all(job)
            _check_worth(order, survey, answered)
            manifest = output_folder.published(output, fingerprint, answered)
            if manifest is None:
                manifest = _manifest(order, made_of, survey, answered, session)
                output_folder.publish(output, work, answered, manifest)
            figures = {**answered.counts.to_json(), **answered.pace}
            tracker.log_metrics({name: value for name, value in figures.items() if isinstance(value, int | float)})
    print(f"regenerate: {answering.summary(answered)} in {output}", file=sys.stderr, flush=True)
    return {"output_dir": str(output), "fingerprint": fingerprint, "prompts": survey.tally.prompts, **figures}


def look_over(order: Order, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Read the whole input once: what is wrong with it shows before the first request, and how much there is.

    Raises:
        DataError: a row is no chat, the input cannot be read, or no row holds a prompt.
    """
    survey = Survey()
    asking = RolloutConfig(order.params.regenerate, order.params.target, tokenizer)
    for prompt in _prompts(order, survey.tally):
        survey.first = survey.first or prompt
        samples = num_samples(prompt, asking.settings)
        survey.rollouts += samples
        survey.turns += answering.num_turns(prompt, asking)
    if not survey.turns and not survey.tally.other_parts:
        reasons = ", ".join(f"{number} with {reason}" for reason, number in survey.tally.refused.items())
        raise DataError(
            f"no usable prompt in {survey.tally.rows} rows" + (f" ({reasons})" if reasons else ""),
            where=f"--input-data {order.source.name}",
            hint="every row needs a user turn with text",
        )
    return survey


def rehearse(order: Order) -> dict[str, Any]:
    """Do all but the asking, and write nothing: read and count the input, render its first chat, meet the servers.

    Raises: as `run`.
    """
    _check_apart(order)
    tokenizer = targets.load_tokenizer(order.params.target)
    settings = order.params.regenerate
    made_of = _made_of(order, tokenizer)
    survey = look_over(order, tokenizer)
    rendered = None
    if survey.first is not None:
        request = Rollout(survey.first, 0, RolloutConfig(settings, order.params.target, tokenizer)).next_request()
        rendered = tokenizer.decode(list(request.prompt_ids)) if request is not None else None
        if rendered is None:
            raise DataError("the chat template refuses the first chat", where=f"prompt {survey.first.id}")
    served = None
    if ENGINES[settings.engine].is_external:
        with engines.opened(order.params, tokenizer, order.root, order.servers or None) as engine:
            served = engine.describe()
    return {
        "fingerprint": _digest(made_of),
        "input": survey.tally.to_json(),
        "samples": survey.rollouts,
        "requests": survey.turns,
        "served": served,
        "first_prompt": rendered,
    }


def _prompts(order: Order, tally: Tally) -> Iterator[Prompt]:
    options: Any = {"part": order.part, "heldout_fraction": order.heldout_fraction, "tally": tally}
    with _named_as_a_flag(order):
        yield from conversations.stream(order.source, order.root, **options)


@contextlib.contextmanager
def _named_as_a_flag(order: Order) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if error.where is None or not error.where.startswith("prepare.sources"):
            raise
        hint = (error.hint or "").replace("prepare.sources[].column", "--messages-column") or None
        raise DataError(error.message, where=f"--input-data {order.source.name}", hint=hint) from None


def _check_apart(order: Order) -> None:
    source, output = (order.root / Path(order.source.name).expanduser()).resolve(), order.output.resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ConfigError("--output-dir lies in the input", where=str(output), hint="it would be read as input later")


def _made_of(order: Order, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Collect all that determines the result."""
    settings, target = order.params.regenerate, order.params.target
    with _named_as_a_flag(order):
        digest = conversations.input_digest(order.source, order.root)
    return {
        "schema": shards.SCHEMA,
        "params": params_digest(target, identity.determining(settings)),
        "source": order.source.model_dump(mode="json"),
        "input": digest,
        "heldout_fraction": order.heldout_fraction,
        "identity": identity.identity(settings, target, tokenizer),
        "part": _part_name(order),
    }


def _digest(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _part_name(order: Order) -> str | None:
    return None if order.part is None else f"{order.part[0]}/{order.part[1]}"


def _check_worth(order: Order, survey: Survey, answered: Answered) -> None:
    if survey.turns and not answered.counts.tokens and not answered.counts.dropped:
        raise DataError(
            f"the target's answers to {survey.tally.prompts} prompts hold no token to train on",
            where=f"--model {order.params.regenerate.served_model or order.params.target.model}",
            hint="look at the chat template and the stop ids" + answering.first_rejection(answered),
        )


def _manifest(
    order: Order, made_of: dict[str, Any], survey: Survey, answered: Answered, session: Session
) -> dict[str, Any]:
    """Say what the result is; `made` has what differs from making to making and from part to part."""
    counts = answered.counts.to_json()
    seconds = round(session.seconds, 3)
    return {
        "schema": shards.SCHEMA,
        "fingerprint": _digest(made_of),
        "fingerprint_base": _digest({**made_of, "part": None}),
        "part": made_of["part"],
        **made_of["identity"],
        **identity.about(order.params.regenerate, order.params.target),
        "heldout_fraction": order.heldout_fraction,
        "shard_size": order.params.regenerate.shard_size,
        "source": made_of["source"],
        "inputs": {order.source.name: made_of["input"]},
        **counts,
        "made": {
            "served": answered.served,
            "read": survey.tally.to_json(),
            "started": session.started,
            "seconds": seconds,
            "tokens_per_s": round(answered.counts.tokens / max(seconds, 1e-3), 1),
            "versions": provenance.library_versions(),
            "host": provenance.host(),
        },
        "shards": answered.entries,
    }


@contextlib.contextmanager
def _tracked(order: Order, session: Session) -> Iterator[Tracker]:
    """Keep an MLflow run where one is wanted, and the time spent in any case."""
    tracker: Tracker = NullTracker()
    if order.track:
        tracker = MlflowTracker(order.root, EXPERIMENT, order.output.name, session.mlflow_run_id)
        session.mlflow_run_id = tracker.run_id
        section = order.params.regenerate.model_dump(mode="json")
        tracker.log_params({"regenerate": section, "target": order.params.target.model_dump(mode="json")})
    session.save()
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        print("regenerate: stopped; the same command with --resume goes on", file=sys.stderr, flush=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk costs the time's record, not the complaint
            session.save()
        tracker.finish(status)
