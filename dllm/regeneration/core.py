"""The core of regeneration: a stream of prompts, an engine that generates responses, finished shards on disk.

The stage and the standalone command both call `regenerate`. Responses on disk are not requested again, and where
nothing is missing no engine is started.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.digests import unsealed
from dllm.disk_faults import is_unreadable
from dllm.engines.engine import Engine, request_origin
from dllm.errors import LONGEST_HINT, DataError, ServerError, StageError
from dllm.files import atomic_write
from dllm.outside import MAX_LINE, one_line
from dllm.progress import Progress
from dllm.prompts.table import Prompt
from dllm.regeneration import served_note
from dllm.regeneration.call_stats import CallStats
from dllm.regeneration.earlier import take_over
from dllm.regeneration.rollout import RolloutConfig, num_samples, split_turns
from dllm.regeneration.scheduler import Scheduler
from dllm.regeneration.store import ShardStore
from dllm.registry import ENGINES
from dllm.responses import shards
from dllm.responses.counts import ManifestCounts
from dllm.tracking.runs import NullTracker, Tracker

CAUSE = "server-error.txt"
TRACK_EVERY_S = 10.0
ROOM = 32
"""Rollouts held per decoding slot: a response may take so many times the mean before others wait for it."""


@dataclass(frozen=True)
class Job:
    """What to generate, with which engine, and where to work."""

    config: RolloutConfig
    prompts: Callable[[], Iterable[Prompt]]
    """Returns the prompts, the same ones in the same order at every call."""
    turns: int
    """Turns of all samples of all prompts, for the progress line."""
    work: Path
    open_engine: Callable[[], AbstractContextManager[Engine]]
    tracker: Tracker = field(default_factory=NullTracker)
    save_seconds: Callable[[], object] = lambda: None
    """Called every ten seconds while responses are generated."""
    settings: str | None = None
    """Digest of what the response to a prompt depends on: work of the same one beside `work` is used. None: none is."""


@dataclass(frozen=True)
class Regenerated:
    """All responses, as shards on disk.

    Units: `seconds` and `tokens_per_s` are of this call alone.
    """

    store: ShardStore
    entries: list[dict[str, Any]]
    counts: ManifestCounts
    served: dict[str, Any]
    """What generated the responses, as the engine describes it."""
    asked: int
    """Requests of this call, with a response or refused."""
    seconds: float
    tokens_per_s: float

    @property
    def pace(self) -> dict[str, float]:
        """Figures of this call."""
        return {"asked": self.asked, "seconds": round(self.seconds, 3), "tokens_per_s": round(self.tokens_per_s, 1)}


def num_turns(prompt: Prompt, config: RolloutConfig) -> int:
    """Count the requests for a prompt."""
    return len(split_turns(prompt.messages, config.settings.turns)) * num_samples(prompt, config.settings)


def regenerate(job: Job) -> Regenerated:
    """Generate the responses that are missing, and return all.

    Where the server's model is not the one of an earlier call, it starts in a folder of its own.

    Raises:
        DataError: the input cannot be read, or too many chats do not fit the chat template.
        ServerError: the servers are out of reach or respond wrongly; finished responses are kept.
        StageError: the engine left requests without a response, or the disk is full.
    """
    with _long_causes_kept(job.work / CAUSE):
        return _regenerate(job)


def _regenerate(job: Job) -> Regenerated:
    before, nothing = served_note.read(job.work), CallStats(job.config.settings.max_new_tokens)
    if job.turns == 0:
        return _collect(ShardStore(job.work / served_note.folder_of({})), {}, nothing)
    with contextlib.ExitStack() as stack:
        if before is not None:
            store, feed = stack.enter_context(_feeding(job, before["folder"]))
            if not feed.prime():
                return _collect(store, before["served"], nothing)
        engine = stack.enter_context(job.open_engine())
        served, taken = engine.describe(), 0
        if before is None or not served_note.is_same_model(served, before["served"]):
            folder = served_note.folder_of(served)
            if before is not None:
                print(
                    f"regenerate: another model responds now ({served_note.name_of(served)}) than before "
                    f"({served_note.name_of(before['served'])}): starting anew",
                    file=sys.stderr,
                    flush=True,
                )
            if before is None or not (job.work / folder).exists():
                taken = _take_over(job, folder, served)
            store, feed = stack.enter_context(_feeding(job, folder))
            is_missing_some = feed.prime()
        else:
            folder, is_missing_some = before["folder"], True
        served_note.write(job.work, {"folder": folder, "served": served, "settings": job.settings})
        stats = _generate(job, engine, feed, store, taken > 0) if is_missing_some else nothing
    return _collect(store, served, stats)


def _take_over(job: Job, folder: str, served: dict[str, Any]) -> int:
    """Use what other prompts' work of the same settings and model holds; return how many responses."""
    if job.settings is None:
        return 0
    folders = served_note.same_work(job.work, job.settings, served)
    if taken := take_over(folders, job.prompts(), job.config, ShardStore(job.work / folder, job.config.settings.drop)):
        line = f"regenerate: {taken} of {job.turns} responses are taken over from earlier work with the same settings"
        print(line, file=sys.stderr, flush=True)
    return taken


@contextlib.contextmanager
def _long_causes_kept(path: Path) -> Iterator[None]:
    """Write what a server says into a file where it is too long for one line, and name the file."""
    try:
        yield
    except ServerError as error:
        whole = "; ".join(filter(None, (error.message, error.where, error.hint)))
        if len(whole) < MAX_LINE:
            raise
        atomic_write(path, f"{whole}\n".encode(errors="replace"))
        place = f"its words are in {path}"
        hints = (f"{error.hint}; {place}" if error.hint else place, place)
        hint = next((hint for hint in hints if len(hint) <= LONGEST_HINT), place)
        raise ServerError(error.message, where=error.where, hint=hint) from None


def rejections(regenerated: Regenerated) -> bytes:
    """Return the refused requests as JSON Lines, in order: prompt, sample, turn and the reason."""
    lines = []
    for record in regenerated.store.records():
        for each in record.rejected:
            prompt_id, sample, turn = request_origin(each["key"])
            origin = {"prompt_id": prompt_id, "sample": sample, "turn": turn}
            lines.append(json.dumps({**origin, "reason": each["reason"]}, ensure_ascii=False) + "\n")
    return "".join(lines).encode(errors="replace")  # a reason of an earlier version may hold an unpaired surrogate


def no_tokens(regenerated: Regenerated, num_prompts: int, where: str) -> DataError:
    """Make the error of a result without a token to train on: every request was rejected, or responses are empty."""
    reasons = (record.rejected[0]["reason"] for record in regenerated.store.records() if record.rejected)
    first, rejected = next(reasons, None), regenerated.counts.rejected
    if first is not None and not regenerated.counts.rows:
        message = f"all {rejected} requests were rejected, the first because {one_line(first, 300)}"
        return DataError(message, where=where, hint="remove the cause and run this again")
    if regenerated.counts.dropped and not regenerated.counts.rows:
        by_flag = ", ".join(f"{number} for {flag}" for flag, number in sorted(regenerated.counts.dropped.items()))
        hint = "drop fewer flags, or raise max_new_tokens where responses are cut"
        return DataError(f"all responses are dropped: {by_flag}", where="regenerate.drop", hint=hint)
    also = "" if first is None else f"; {rejected} requests were rejected, the first because {one_line(first, 200)}"
    return DataError(
        f"the target's responses to {num_prompts} prompts hold no token to train on",
        where=where,
        hint=f"check the chat template and the stop ids{also}",
    )


def summary(regenerated: Regenerated) -> str:
    """Summarize the result in one line."""
    counts = regenerated.counts
    details = [f"{number} {reason}" for reason, number in sorted(counts.finish_reasons.items())]
    details += [f"{number} flagged {flag}" for flag, number in sorted(counts.flags.items()) if flag != "length"]
    details += [f"{number} dropped for {flag}" for flag, number in sorted(counts.dropped.items())]
    details += [f"{counts.rejected} refused"] if counts.rejected else []
    return f"{counts.rows} rows, {counts.tokens} tokens ({', '.join(details)})"


def remove_others(regenerated: Regenerated) -> None:
    """Remove the shards of other models."""
    for folder in regenerated.store.folder.parent.glob("answers-*"):
        if folder != regenerated.store.folder:
            shutil.rmtree(folder)


def earlier_manifest(regenerated: Regenerated) -> dict[str, Any]:
    """Return the manifest that an earlier call wrote beside the shards; empty where there is none."""
    try:
        return unsealed((regenerated.store.folder / shards.MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        if is_unreadable(error):
            raise
        return {}


def write_records(regenerated: Regenerated, manifest: dict[str, Any]) -> dict[str, Path]:
    """Write the manifest and the rejected requests beside the shards; return the files to publish, manifest last."""
    folder = regenerated.store.folder
    atomic_write(folder / shards.REJECTED, rejections(regenerated))
    shards.write_manifest(folder, manifest)
    names = [*(entry["file"] for entry in regenerated.entries), shards.REJECTED, shards.MANIFEST]
    return {name: folder / name for name in names}


@contextlib.contextmanager
def _feeding(job: Job, folder: str) -> Iterator[tuple[ShardStore, Scheduler]]:
    settings = job.config.settings
    store = ShardStore(job.work / folder, settings.drop)
    decoding = ENGINES[settings.engine].num_slots(settings)
    with contextlib.closing(Scheduler(job.prompts(), job.config, store, ROOM * decoding)) as feed:
        yield store, feed


def _generate(job: Job, engine: Engine, feed: Scheduler, store: ShardStore, is_said: bool) -> CallStats:
    done = store.turns_done + store.responses_kept()
    if done and not is_said:
        print(f"regenerate: {done} of {job.turns} responses are there already", file=sys.stderr, flush=True)
    stats, pace, tracked = CallStats(job.config.settings.max_new_tokens), engine.stats, time.monotonic()
    with Progress("regenerate", total=job.turns, unit="responses", initial=done) as progress:
        for outcome in engine.answer(feed):
            settled = 0
            if outcome is not None:
                settled = feed.settle(outcome)
            stats.add(outcome, pace.tokens)
            left_s = stats.left_s(job.turns - progress.done - settled)
            live = {"tokens/s": round(stats.tokens_per_s, 1), "in flight": pace.in_flight, "retries": pace.retries}
            progress.update(settled, left_s, **live)
            if time.monotonic() - tracked >= TRACK_EVERY_S:
                tracked = time.monotonic()
                figures = {name.replace("/", "_per_").replace(" ", "_"): value for name, value in live.items()}
                done_now = int(progress.done)
                job.tracker.log_metrics({"answers": done_now, **figures, "servers_up": pace.servers_up}, step=done_now)
                job.save_seconds()
    if not feed.is_done:
        raise StageError("the engine left requests without a response", where=str(store.folder), hint="run this again")
    return stats


def _collect(store: ShardStore, served: dict[str, Any], stats: CallStats) -> Regenerated:
    entries, counts = [], ManifestCounts()
    for record in store.records():
        entries.append(record.entry)
        counts += ManifestCounts.from_json(record.entry["counts"])
    pace = (stats.asked, stats.seconds, stats.tokens_per_s)
    return Regenerated(store, entries, counts, served, *pace)
