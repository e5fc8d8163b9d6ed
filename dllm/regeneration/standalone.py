"""Regeneration without a project: any input to a folder of shards, with nothing but flags.

A workspace in `--output-dir/.work/` that publishes into `--output-dir`. Defines what its result is made of, its
manifest, and the checks before the first request.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dllm.config.load import params_digest
from dllm.config.params import Params, Source, Target
from dllm.config.regenerate import Regenerate
from dllm.config.section import Section
from dllm.disk_faults import full_disk_in_one_line
from dllm.engines.engine import open_engine
from dllm.errors import ConfigError, DataError
from dllm.models import targets
from dllm.process import signals
from dllm.prompts import sources
from dllm.prompts.protocol import path_of
from dllm.prompts.stream import Tally, no_prompt, stream
from dllm.prompts.table import Prompt
from dllm.regeneration import core, identity, output_folder
from dllm.regeneration.core import Job, Regenerated
from dllm.regeneration.rollout import Rollout, RolloutConfig, num_samples
from dllm.registry import ENGINES
from dllm.responses import shards
from dllm.workspace import Workspace, fingerprint_of

EXPERIMENT = "regenerate"


FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in Source.model_fields},
    **{"name": "--input-data", "column": "--messages-column", "ignore_columns": "--ignore-column"},
}
"""The flag that sets a field of the source."""
LATER = ("ignore_columns", "max_bad_rows")
"""Fields of the source that are no part of the fingerprint while they are null, as in earlier versions."""


class Settings(Section):
    """The sections of params that the flags set."""

    target: Target
    source: Source
    regenerate: Regenerate


@dataclass(frozen=True)
class RegenerateArgs:
    """The command line, parsed."""

    settings: Settings
    output: Path
    root: Path
    """Relative inputs start there, and SGLang's environment lies there."""
    servers: tuple[str, ...] = ()
    """Addresses for engine `openai`; empty takes DLLM_TARGET_URL."""
    part: tuple[int, int] | None = None
    heldout_fraction: float = 0.0
    resume: bool = False
    track: bool = False
    """Whether to leave an MLflow run."""

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return targets.load_tokenizer(self.settings.target)

    @property
    def rollout(self) -> RolloutConfig:
        """What determines the requests for a prompt."""
        return RolloutConfig(self.settings.regenerate, self.settings.target, self.tokenizer)

    def open_engine(self) -> contextlib.AbstractContextManager[Any]:
        """Open the engine. Of params, engines read `target` and `regenerate`, which the settings have as well."""
        return open_engine(cast(Params, self.settings), self.tokenizer, self.root, self.servers or None)

    def prompts(self, tally: Tally) -> Iterator[Prompt]:
        """Stream the prompts of the input."""
        options: Any = {"part": self.part, "heldout_fraction": self.heldout_fraction, "tally": tally}
        with _errors_name_flags(self.settings.source):
            yield from stream(self.settings.source, self.root, **options)


@dataclass
class Survey:
    """Counts of a first pass over the input."""

    tally: Tally = field(default_factory=Tally)
    rollouts: int = 0
    turns: int = 0
    first: Prompt | None = None


def run(args: RegenerateArgs) -> dict[str, Any]:
    """Generate the responses that are missing, publish the result, and return the figures.

    Raises:
        ConfigError: the output lies in the input, or would replace it, or there is no server.
        DataError: the input cannot be read or holds no prompt, or the target generates no token at all.
        ModelError: the tokenizer or the target cannot be loaded.
        ServerError: the servers are out of reach or respond wrongly; finished responses are kept.
        StageError: another process holds the folder, it is not empty, or the disk is full.
        SystemExit: 128 + n after signal n.
    """
    _check_apart(args)
    output, settings = args.output, args.settings
    with signals.handled(), full_disk_in_one_line(output), output_folder.claim(output, args.resume):
        made_of = _made_of(args)
        found = survey(args)
        workspace = Workspace(
            "regenerate",
            args.root,
            works=output / output_folder.WORK,
            out=output,
            made_of=made_of,
            sections=[settings.regenerate, settings.target],
            experiment=EXPERIMENT if args.track else None,
            run_name=output.name,
            publisher=output_folder.publish,
            resume_hint="the same command with --resume continues it",
        )
        output_folder.note_other_work(workspace)
        with workspace.open():
            job = Job(
                config=args.rollout,
                prompts=lambda: args.prompts(Tally()),
                turns=found.turns,
                work=workspace.work,
                open_engine=args.open_engine,
                tracker=workspace.tracker,
                save_seconds=workspace.save_seconds,
            )
            regenerated = core.regenerate(job)
            _check_tokens(args, found, regenerated)
            figures = {**regenerated.counts.to_json(), **regenerated.pace}
            files = core.write_records(regenerated, _manifest(args, workspace, found, regenerated))
            if output_folder.is_published(output, files):
                workspace.log(figures)
            else:
                workspace.publish(files, figures)
                core.remove_others(regenerated)
                output_folder.remove_finished_work(workspace)
    print(f"regenerate: {core.summary(regenerated)} in {output}", file=sys.stderr, flush=True)
    return {"output_dir": str(output), "fingerprint": workspace.fingerprint, "prompts": found.tally.prompts, **figures}


def survey(args: RegenerateArgs) -> Survey:
    """Read the whole input once: errors in it show before the first request, and the work is counted.

    Raises:
        ConfigError: an option has no effect on this input.
        DataError: too many rows, or the input, cannot be read, or no row holds a prompt.
    """
    found, config = Survey(), args.rollout
    try:
        for prompt in args.prompts(found.tally):
            found.first = found.first or prompt
            found.rollouts += num_samples(prompt, config.settings)
            found.turns += core.num_turns(prompt, config)
    finally:
        for line in [*found.tally.lines(), *found.tally.unseen(args.tokenizer)]:
            print(line, file=sys.stderr, flush=True)
    if not found.turns and not found.tally.other_parts:
        reasons = ", ".join(f"{number} with {reason}" for reason, number in found.tally.refused.items())
        raise no_prompt(found.tally.rows, reasons, f"--input-data {args.settings.source.name}")
    return found


def dry_run(args: RegenerateArgs) -> dict[str, Any]:
    """Do all but generate and write: read and count the input, render its first chat, check the servers.

    Raises: as `run`.
    """
    _check_apart(args)
    made_of = _made_of(args)
    found = survey(args)
    rendered = None
    if found.first is not None:
        rollout = Rollout(found.first, 0, args.rollout)
        request = rollout.next_request()
        if request is not None:
            rendered = args.tokenizer.decode(list(request.prompt_ids))
        elif rollout.is_unfit:
            raise DataError("the chat template refuses the first chat", where=f"prompt {found.first.id}")
        elif rollout.rejection is not None:
            rendered = f"(none: {rollout.rejection.reason})"
    served = None
    if ENGINES[args.settings.regenerate.engine].is_external:
        with args.open_engine() as engine:
            served = engine.describe()
    return {
        "fingerprint": fingerprint_of(made_of),
        "input": found.tally.to_json(),
        **found.tally.reading.to_json(),
        "samples": found.rollouts,
        "requests": found.turns,
        "served": served,
        "first_prompt": rendered,
    }


@contextlib.contextmanager
def _errors_name_flags(source: Source) -> Iterator[None]:
    try:
        yield
    except (ConfigError, DataError) as error:
        is_source = (error.where or "").startswith("prepare.sources")
        where = f"--input-data {source.name}" if is_source else error.where
        hint = re.sub(r"prepare\.sources\[\]\.(\w+)", lambda found: FLAGS[found[1]], error.hint or "") or None
        raise type(error)(error.message, where=where, hint=hint) from None


def _check_apart(args: RegenerateArgs) -> None:
    source, output = path_of(args.settings.source, args.root).resolve(), args.output.resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ConfigError("--output-dir lies in the input", where=str(output), hint="it would be read as input later")
    if source.parent == output and output_folder.is_result_name(source.name):
        raise ConfigError("--input-data lies in --output-dir", where=str(source), hint="the result would replace it")


def _made_of(args: RegenerateArgs) -> dict[str, Any]:
    """Collect all that determines the result."""
    settings = args.settings
    named = identity.identity(settings.regenerate, settings.target, args.tokenizer)
    with _errors_name_flags(settings.source):
        digest = sources.input_digest(settings.source, args.root)
    return {
        "stage": "regenerate",
        "schema": shards.SCHEMA,
        "params": params_digest(settings.target, identity.determining(settings.regenerate)),
        "inputs": {settings.source.name: digest},
        "identity": named,
        "source": settings.source.model_dump(
            mode="json", exclude={name for name in LATER if getattr(settings.source, name) is None}
        ),
        "heldout_fraction": args.heldout_fraction,
        "part": None if args.part is None else f"{args.part[0]}/{args.part[1]}",
    }


def _check_tokens(args: RegenerateArgs, found: Survey, regenerated: Regenerated) -> None:
    if found.turns and not regenerated.counts.tokens and not regenerated.counts.dropped:
        model = args.settings.regenerate.served_model or args.settings.target.model
        raise core.no_tokens(regenerated, found.tally.prompts, f"--model {model}")


def _manifest(args: RegenerateArgs, workspace: Workspace, found: Survey, regenerated: Regenerated) -> dict[str, Any]:
    """Describe the result; `made` holds what differs from call to call and from part to part.

    A result that was finished before keeps its manifest, and its time counts where shards had to be made again.
    """
    earlier = core.earlier_manifest(regenerated)
    if earlier.get("shards") == regenerated.entries:
        return earlier
    made, made_of = earlier.get("made", {}), workspace.made_of
    seconds = round(workspace.seconds + made.get("seconds", 0.0), 3)
    return {
        "schema": shards.SCHEMA,
        "fingerprint": workspace.fingerprint,
        "fingerprint_base": fingerprint_of({**made_of, "part": None}),
        **{key: made_of[key] for key in ("part", "heldout_fraction", "source", "inputs")},
        **made_of["identity"],
        **identity.about(args.settings.regenerate, args.settings.target),
        "shard_size": args.settings.regenerate.shard_size,
        **regenerated.counts.to_json(),
        "made": {
            "served": regenerated.served,
            "read": found.tally.to_json(),
            **found.tally.reading.to_json(),
            "started": made.get("started", workspace.record["started"]),
            "seconds": seconds,
            "tokens_per_s": round(regenerated.counts.tokens / max(seconds, 1e-3), 1),
            "versions": workspace.record["libraries"],
            "host": workspace.record["host"],
        },
        "shards": regenerated.entries,
    }
