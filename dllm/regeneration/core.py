"""The core of regeneration: prompts stream in, an engine answers, finished shards pile up.

The stage and the standalone command both call `answer_all`. What is already on disk is not asked again, and where
nothing is missing no engine is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm.engines.engine import Engine, Response, request_origin
from dllm.errors import StageError
from dllm.files import atomic_write
from dllm.progress import Progress
from dllm.prompts.table import Prompt
from dllm.regeneration.rollout import RolloutConfig, num_samples, split_turns
from dllm.regeneration.scheduler import Scheduler
from dllm.regeneration.store import ShardStore
from dllm.registry import ENGINES
from dllm.responses.counts import ManifestCounts
from dllm.tracking.runs import NullTracker, Tracker

SERVED = "served.json"
TRACK_EVERY_S = 10.0
MODEL_KEYS = ("model", "model_path", "revision", "weight_version", "dtype", "quantization")
"""What of an engine's description tells one model from another."""
ROOM = 32
"""Rollouts held for each one that decodes: an answer may take so many times the mean before others wait for it."""


@dataclass(frozen=True)
class Job:
    """What is to be answered, by whom, and where it is kept meanwhile."""

    asking: RolloutConfig
    prompts: Callable[[], Iterable[Prompt]]
    """Gives the prompts, the same ones in the same order at every call."""
    turns: int
    """Turns of all samples of all prompts, for the progress line."""
    work: Path
    open_engine: Callable[[], AbstractContextManager[Engine]]
    tracker: Tracker = field(default_factory=NullTracker)
    beat: Callable[[], object] = lambda: None
    """Called every ten seconds while answers are awaited."""


@dataclass(frozen=True)
class Answered:
    """All answers, as shards on disk.

    Units: `seconds` and `tokens_per_s` are of this call alone.
    """

    store: ShardStore
    entries: list[dict[str, Any]]
    counts: ManifestCounts
    served: dict[str, Any]
    """What answered, as the engine describes it."""
    asked: int
    """Requests of this call that were answered or refused."""
    seconds: float
    tokens_per_s: float

    @property
    def pace(self) -> dict[str, float]:
        """Say how this call went."""
        return {"asked": self.asked, "seconds": round(self.seconds, 3), "tokens_per_s": round(self.tokens_per_s, 1)}


def num_turns(prompt: Prompt, asking: RolloutConfig) -> int:
    """Count the requests that a prompt comes to."""
    return len(split_turns(prompt.messages, asking.settings.turns)) * num_samples(prompt, asking.settings)


def answer_all(job: Job) -> Answered:
    """Answer what is not yet answered, and return the whole.

    Answers of another model than the server's present one are put aside: it starts in a folder of its own.

    Raises:
        DataError: the input cannot be read, or too many chats do not fit the chat template.
        ServerError: the servers are out of reach or answer wrongly; finished answers are kept.
        StageError: the engine left requests unanswered, or the disk is full.
    """
    before = _read_served(job.work)
    if job.turns == 0:
        return _collect(ShardStore(job.work / _new_folder({})), {}, _Sitting())
    with contextlib.ExitStack() as stack:
        if before is not None:
            store, feed = stack.enter_context(_feeding(job, before["folder"]))
            if not feed.prime():
                return _collect(store, before["served"], _Sitting())
        engine = stack.enter_context(job.open_engine())
        served = engine.describe()
        if before is None or not _is_same_model(served, before["served"]):
            folder = _new_folder(served)
            if before is not None:
                print(
                    f"regenerate: another model answers now ({_model(served)}) than before "
                    f"({_model(before['served'])}): starting anew",
                    file=sys.stderr,
                    flush=True,
                )
            store, feed = stack.enter_context(_feeding(job, folder))
            is_missing_some = feed.prime()
        else:
            folder, is_missing_some = before["folder"], True
        note = {"folder": folder, "served": served}
        atomic_write(job.work / SERVED, json.dumps(note, sort_keys=True, default=str).encode())
        sitting = _answer(job, engine, feed, store) if is_missing_some else _Sitting()
    return _collect(store, served, sitting)


def rejections(answered: Answered) -> bytes:
    """Write the refused requests as JSON Lines, in order: prompt, sample, turn and the reason."""
    lines = []
    for record in answered.store.records():
        for each in record.rejected:
            prompt_id, sample, turn = request_origin(each["key"])
            origin = {"prompt_id": prompt_id, "sample": sample, "turn": turn}
            lines.append(json.dumps({**origin, "reason": each["reason"]}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def first_rejection(answered: Answered) -> str:
    """Say, as the end of a hint, why requests were refused; empty where none was."""
    reasons = [record.rejected[0]["reason"] for record in answered.store.records() if record.rejected]
    return f"; {answered.counts.rejected} requests were refused, the first: {reasons[0]}" if reasons else ""


def summary(answered: Answered) -> str:
    """Say in one line what came of it."""
    counts = answered.counts
    of_what = [f"{number} {reason}" for reason, number in sorted(counts.finish_reasons.items())]
    of_what += [f"{number} flagged {flag}" for flag, number in sorted(counts.flags.items()) if flag != "length"]
    of_what += [f"{number} dropped for {flag}" for flag, number in sorted(counts.dropped.items())]
    of_what += [f"{counts.rejected} refused"] if counts.rejected else []
    return f"{counts.rows} rows, {counts.tokens} tokens ({', '.join(of_what)})"


def forget_others(answered: Answered) -> None:
    """Remove the shards that other models answered."""
    for folder in answered.store.folder.parent.glob("answers-*"):
        if folder != answered.store.folder:
            shutil.rmtree(folder)


@dataclass
class _Sitting:
    """What one call has done."""

    asked: int = 0
    answers: int = 0
    tokens: int = 0
    """Of finished answers."""
    seconds: float = 0.0
    tokens_per_s: float = 0.0


@contextlib.contextmanager
def _feeding(job: Job, folder: str) -> Iterator[tuple[ShardStore, Scheduler]]:
    settings = job.asking.settings
    store = ShardStore(job.work / folder, settings.drop)
    decoding = ENGINES[settings.engine].num_slots(settings)
    with contextlib.closing(Scheduler(job.prompts(), job.asking, store, ROOM * decoding)) as feed:
        yield store, feed


def _answer(job: Job, engine: Engine, feed: Scheduler, store: ShardStore) -> _Sitting:
    done = store.turns_done + store.answers_kept()
    if done:
        print(f"regenerate: {done} of {job.turns} answers are there already", file=sys.stderr, flush=True)
    sitting, pace = _Sitting(), engine.stats
    began = tracked = time.monotonic()
    with Progress("regenerate", total=job.turns, unit="answers", initial=done) as progress:
        for outcome in engine.answer(feed):
            settled = 0
            if outcome is not None:
                settled = feed.settle(outcome)
                sitting.asked += 1
                if isinstance(outcome, Response):
                    sitting.answers += 1
                    sitting.tokens += len(outcome.token_ids)
            now = time.monotonic()
            sitting.seconds = now - began
            sitting.tokens_per_s = max(pace.tokens, sitting.tokens) / max(sitting.seconds, 1e-3)
            left_s = _left_s(sitting, pace.tokens, job.turns - progress.done - settled)
            live = {"tokens/s": round(sitting.tokens_per_s, 1), "in flight": pace.in_flight, "retries": pace.retries}
            progress.update(settled, left_s, **live)
            if now - tracked >= TRACK_EVERY_S:
                tracked = now
                figures = {name.replace("/", "_per_").replace(" ", "_"): value for name, value in live.items()}
                done_now = int(progress.done)
                job.tracker.log_metrics({"answers": done_now, **figures, "servers_up": pace.servers_up}, step=done_now)
                job.beat()
    if not feed.is_done:
        raise StageError("the engine left requests unanswered", where=str(store.folder), hint="run this again")
    return sitting


def _left_s(sitting: _Sitting, tokens: int, answers_left: float) -> float | None:
    """Foresee the time left from tokens: those of unfinished answers count too."""
    if not sitting.answers or not sitting.tokens:
        return None
    unfinished = max(0, tokens - sitting.tokens)
    tokens_left = answers_left * sitting.tokens / sitting.answers - unfinished
    return max(0.0, tokens_left / sitting.tokens_per_s)


def _collect(store: ShardStore, served: dict[str, Any], sitting: _Sitting) -> Answered:
    entries, counts = [], ManifestCounts()
    for record in store.records():
        entries.append(record.entry)
        counts += ManifestCounts.from_json(record.entry["counts"])
    pace = (sitting.asked, sitting.seconds, sitting.tokens_per_s)
    return Answered(store, entries, counts, served, *pace)


def _read_served(work: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((work / SERVED).read_bytes())
        return {"folder": str(found["folder"]), "served": dict(found["served"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compare what both descriptions say: a busy server may leave something out."""
    return all(one[key] == other[key] for key in MODEL_KEYS if key in one and key in other)


def _model(served: dict[str, Any]) -> str:
    return ", ".join(str(served[key]) for key in MODEL_KEYS if key in served)


def _new_folder(served: dict[str, Any]) -> str:
    return f"answers-{hashlib.sha256(_model(served).encode()).hexdigest()[:8]}"
