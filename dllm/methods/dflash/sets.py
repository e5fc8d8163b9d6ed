"""Prompt sets in the evaluation of a draft: their questions in each thinking mode, and figures beside published ones.

The held-out prompts of `prepare` decide the champion; sets are measured beside them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params, Source
from dllm.decoding.speculative import Decoder
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.prompts import sets
from dllm.prompts import template as chat
from dllm.prompts.overlap import asked_in_training
from dllm.prompts.protocol import label
from dllm.prompts.table import TRAIN, Prompt, read_prompts
from dllm.prompts.template_probes import check_thinking_modes

PUBLISHED = Path(__file__).with_name("published.yaml")
MODES = {None: "", True: " thinking on", False: " thinking off"}
"""What follows a set's name where `evaluate.thinking` names modes."""


@dataclass(frozen=True)
class Question:
    """A prompt as ids."""

    id: str
    """The prompt's, with the set and the mode where it is of a set."""
    source: str
    """Its source, or the set and the mode."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class MeasuredSet:
    """One prompt set in one thinking mode."""

    name: str
    """Of its figures: the set, and the mode where `evaluate.thinking` names modes."""
    entry: Source
    thinking: bool | None
    questions: tuple[Question, ...]
    counts: Mapping[str, int]
    """Prompts of the set that are not measured, by reason."""

    @property
    def record(self) -> dict[str, Any]:
        """What metrics.json says of it besides its figures."""
        return {"thinking": self.thinking, **self.counts}


def load(params: Params, root: Path, tokenizer: PreTrainedTokenizerBase, limit: int, number: int) -> list[MeasuredSet]:
    """Read the questions of `evaluate.sets`: of each set the first by id that no training prompt asks.

    Args:
        limit: positions of the target; a prompt must leave room for a response.
        number: questions of a set and mode, where its entry has no limit.

    Raises:
        ConfigError, DataError: a set cannot be read, none of its prompts can be measured, or the chat template does not
            know thinking modes.
    """
    if params.evaluate.thinking is not None:
        check_thinking_modes(tokenizer, "evaluate.thinking")
    read = [(entry, sets.read(entry, root)) for entry in params.evaluate.sets or []]
    found = []
    for place, ((entry, prompts), known) in enumerate(zip(read, _in_training(read, root), strict=True)):
        new = [prompt for prompt in prompts if prompt.id not in known]
        _announce(entry, prompts, known)
        modes: Sequence[bool | None] = params.evaluate.thinking or [params.target.enable_thinking]
        for thinking in modes:
            mode = MODES[thinking] if params.evaluate.thinking else ""
            name, key = f"{label(entry)}{mode}", f"set{place}{mode.replace(' thinking ', '-')}"
            counts = {"prompts_in_training": len(known), "prompts_too_long": 0, "prompts_refused": 0}
            asked = _asked(new, thinking, tokenizer, limit, counts)
            first = itertools.islice(asked, entry.limit or number)
            questions = [Question(f"{id}-{key}", f"set {name}", ids) for id, ids in first]
            if not questions:
                reasons = ", ".join(f"{count} {reason.removeprefix('prompts_')}" for reason, count in counts.items())
                what = f"none of {len(prompts)} prompts can be measured ({reasons})"
                raise DataError(what, where=f"evaluate.sets: {name}", hint="leave the set out")
            found.append(MeasuredSet(name, entry, thinking, tuple(questions), counts))
    return found


def _in_training(read: Sequence[tuple[Source, Sequence[Prompt]]], root: Path) -> list[dict[str, str]]:
    """Return for each set the ids of the prompts that training asks, with the source that does."""
    if not read:
        return []
    questions = {
        (number, prompt.id): sets.texts(entry, prompt)
        for number, (entry, prompts) in enumerate(read)
        for prompt in prompts
    }
    asked = asked_in_training(questions, read_prompts(root / "out" / "prepare", TRAIN))
    return [{id: source for (of, id), source in asked.items() if of == number} for number in range(len(read))]


def _asked(
    prompts: Iterable[Prompt],
    thinking: bool | None,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    counts: dict[str, int],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the id and the token ids of prompts, and count those that cannot be asked."""
    for prompt in prompts:
        try:
            ids = chat.prompt_ids(tokenizer, prompt.messages, thinking, tools=prompt.tools)
        except DataError:
            counts["prompts_refused"] += 1
            continue
        if len(ids) >= limit:
            counts["prompts_too_long"] += 1
        else:
            yield prompt.id, tuple(ids)


def _announce(entry: Source, prompts: Sequence[Prompt], known: Mapping[str, str]) -> None:
    """Name the prompts that are left out because a training prompt asks the same."""
    if not known:
        return
    print(f"evaluate: set {label(entry)}: {len(known)} of {len(prompts)} prompts left out: ", end="")
    first = next(prompt for prompt in prompts if prompt.id in known)
    text = one_line(str(first.messages[-1]["content"]), 80)
    asked = ", ".join(sorted(set(known.values())))
    print(f"training prompts of {one_line(asked, 120)} ask the same, such as {text!r}", flush=True)


def published(
    measured: MeasuredSet, params: Params, decoder: Decoder, *, sampled: bool = False
) -> list[dict[str, Any]]:
    """Return published acceptance lengths of a set for this target, draft and temperature, and by whom.

    Args:
        decoder: with the draft.
        sampled: at `evaluate.temperature`; else those of greedy decoding.
    """
    settings = params.evaluate
    if sampled and (settings.top_p or settings.top_k):
        return []
    return published_of(
        measured.entry.name,
        measured.thinking,
        target=params.target.model,
        draft=type(decoder.draft).architectures[0] if decoder.draft is not None else None,
        block_size=decoder.block_size,
        temperature=settings.temperature if sampled else 0.0,
    )


def published_of(name: str, thinking: bool | None, block_size: int, **kind: Any) -> list[dict[str, Any]]:
    """Return published figures of one kind; those whose thinking mode is stated are of that mode alone.

    Figures of other block sizes, which bound the acceptance length, are returned if there are none of this one; their
    note says so.

    Args:
        name: of the set.
        thinking: whether the prompts ask for it.
        block_size: of the decoding.
        kind: target, draft and temperature.
    """
    found = [
        entry
        for entry in _published()
        if name in entry["tau"]
        and all(entry[key] == value for key, value in kind.items())
        and entry["thinking"] in (None, thinking)
    ]
    same = [entry for entry in found if entry["block_size"] == block_size]
    figures = []
    for entry in same or found:
        notes = [(entry.get("notes") or {}).get(name), None if same else f"block {entry['block_size']}"]
        figures.append({"tau": entry["tau"][name], "by": entry["by"], "note": ", ".join(filter(None, notes)) or None})
    return figures


@functools.cache
def _published() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = YAML(typ="safe", pure=True).load(PUBLISHED.read_text())
    return found
