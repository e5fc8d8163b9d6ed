"""One sample of one prompt: its requests, turn by turn, and the rows made of the responses.

Decides which turns are regenerated and in which context. It uses no engine and no file.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Target
from dllm.config.regenerate import Regenerate
from dllm.engines.engine import Refusal, Request, Response, fit, request_key, request_seed
from dllm.errors import DataError
from dllm.models.positions import max_positions
from dllm.prompts import template as chat
from dllm.prompts.chats.tools import spelt_calls
from dllm.prompts.chats.turns import Message
from dllm.prompts.table import Prompt
from dllm.registry import ENGINES
from dllm.responses import flags
from dllm.responses.shards import Row

Calls = list[dict[str, Any]]


@dataclass(frozen=True)
class _Generated:
    """One response of a rollout; its text and calls are the message at `position`."""

    turn: int
    position: int
    prompt_ids: array[int]
    response_ids: array[int]
    finish_reason: str
    is_overlong: bool


@dataclass(frozen=True)
class Turn:
    """The messages before one response, and the calls of the response that it replaces."""

    number: int
    context: list[Message]
    """The messages since the turn before."""
    old_calls: Calls | None
    """Tool calls of the replaced response, which the next turn's tool messages refer to; None at the end."""


@dataclass(frozen=True)
class RolloutConfig:
    """What determines the requests for a prompt."""

    settings: Regenerate
    target: Target
    tokenizer: PreTrainedTokenizerBase

    @functools.cached_property
    def positions(self) -> int | None:
        """Positions that the target has for prompt and response; None leaves the limit to servers that run already."""
        return None if ENGINES[self.settings.engine].is_external else max_positions(self.target)


@dataclass(frozen=True)
class Rejection:
    """A turn that gets no response, and so ends its rollout."""

    key: str
    reason: str
    is_passing: bool = False
    """Whether the next call tries again."""


def split_turns(messages: list[Message], which: Literal["all", "last"]) -> list[Turn]:
    """Split a chat at the assistant's messages into turns to regenerate, including the one after its last message.

    Adjacent assistant messages are one turn. Assistant messages before the first user or tool message are context.
    """
    turns: list[Turn] = []
    context: list[Message] = []
    old_calls: Calls | None = None
    has_input = False
    for index, message in enumerate(messages, 1):
        if message["role"] == "assistant" and has_input:
            old_calls = [*(old_calls or ()), *(message.get("tool_calls") or _spelt_calls(message, messages[index:]))]
            continue
        if old_calls is not None:
            turns.append(Turn(len(turns), context, old_calls))
            context, old_calls = [], None
        context.append(message)
        has_input = has_input or message["role"] != "system"
    turns.append(Turn(len(turns), context, None))
    return turns if which == "all" else [Turn(turns[-1].number, list(messages), None)]


def _spelt_calls(message: Message, after: list[Message]) -> Calls:
    """Return the calls that a message spells out in its text, with the ids that the results after it refer to."""
    results = [each.get("tool_call_id") for each in itertools.takewhile(lambda each: each["role"] == "tool", after)]
    count = spelt_calls(message["content"], after)
    return [{"id": id} for id in [*results, *[None] * count][:count]]


def num_samples(prompt: Prompt, settings: Regenerate) -> int:
    """Return the number of samples of a prompt: one where it is held out."""
    return settings.samples_per_prompt if prompt.split == "train" else 1


def origin_of(prompt: Prompt, sample: int) -> str:
    """Name one sample of one prompt."""
    return f"{prompt.id}:{sample}"


class Rollout:
    """One sample of one prompt, from its first request to its rows."""

    def __init__(self, prompt: Prompt, sample: int, config: RolloutConfig) -> None:
        self.prompt, self.sample = prompt, sample
        self.rejection: Rejection | None = None
        self.is_unfit = False
        """Whether the rejection is the chat template's rather than an engine's."""
        self._config = config
        self._left = split_turns(prompt.messages, config.settings.turns)[::-1]
        self.turns = len(self._left)
        """All its turns, with a response or not."""
        self._messages: list[Message] = []
        self._generated: list[_Generated] = []
        self._mismatch = False
        self._open()

    @property
    def origin(self) -> str:
        """Its name: prompt and sample."""
        return origin_of(self.prompt, self.sample)

    @property
    def is_begun(self) -> bool:
        """Whether a turn has a response."""
        return bool(self._generated)

    @property
    def turns_left(self) -> int:
        """Number of turns without a response; 0 when the rollout is over."""
        return len(self._left)

    def next_request(self) -> Request | None:
        """Make the request for the next turn; None when the rollout is over.

        A chat that the template refuses, or that is longer than the target's positions, ends the rollout with a
        rejection.
        """
        if not self._left:
            return None
        turn, settings = self._left[-1].number, self._config.settings
        key = request_key(self.prompt.id, self.sample, turn)
        try:
            ids = chat.prompt_ids(
                self._config.tokenizer,
                self._messages,
                self._config.target.enable_thinking,
                tools=self.prompt.tools,
            )
        except DataError as error:
            self.is_unfit = True
            self.reject(key, error.message)
            return None
        request = Request(
            key=key,
            prompt_ids=tuple(ids),
            messages=list(self._messages),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=request_seed(settings.seed, self.prompt.id, self.sample, turn),
            tools=self.prompt.tools,
            response=self.prompt.given if len(self._left) == 1 else None,
        )
        fitted = fit(request, self._config.positions)
        if isinstance(fitted, Refusal):
            self.reject(key, fitted.reason)
            return None
        return fitted

    def accept(self, request: Request, response: Response) -> None:
        """Add the response to the last request; the rollout continues or ends."""
        turn = self._left.pop()
        message: Message = {"role": "assistant", "content": response.text}
        old = turn.old_calls or []
        if response.tool_calls:
            message["tool_calls"] = [
                {**call, "id": _call_id(old, index, turn.number)} for index, call in enumerate(response.tool_calls)
            ]
        ids = array("i", request.prompt_ids), array("i", response.token_ids)
        is_overlong = len(response.token_ids) > request.max_new_tokens
        self._generated.append(_Generated(turn.number, len(self._messages), *ids, response.finish_reason, is_overlong))
        self._messages.append(message)
        if turn.old_calls is not None and len(old) != len(response.tool_calls):
            self._mismatch = True
            self._left.clear()
        self._open()

    def reject(self, key: str, reason: str, is_passing: bool = False) -> None:
        """End the rollout at a turn without a response; the turns before it are kept."""
        self.rejection = Rejection(key, reason, is_passing)
        self._left.clear()

    def rows(self) -> list[Row]:
        """Return a row for each turn with a response."""
        return [self._row(each) for each in self._generated]

    def _row(self, generated: _Generated) -> Row:
        ids, message = generated.response_ids.tolist(), self._messages[generated.position]
        found = flags.flags_of(ids, generated.finish_reason, message["content"], message.get("tool_calls", ()))
        if self._mismatch and generated is self._generated[-1]:
            found.append(flags.TOOL_MISMATCH)
        if generated.is_overlong:
            found.append(flags.OVERLONG)
        return Row(
            prompt_id=self.prompt.id,
            sample=self.sample,
            turn=generated.turn,
            source=self.prompt.source,
            split=self.prompt.split,
            messages=self._messages[: generated.position + 1],
            tools=self.prompt.tools,
            prompt_ids=generated.prompt_ids.tolist(),
            answer_ids=ids,
            finish_reason=generated.finish_reason,
            num_tokens=len(ids),
            flags=found,
        )

    def _open(self) -> None:
        if self._left:
            self._messages.extend(self._left[-1].context)


def _call_id(old: Calls, index: int, turn: int) -> str:
    """Return the id that the chat's tool messages refer to, else one that is the same in every run."""
    found = old[index].get("id") if index < len(old) else None
    # Nine letters and digits, as some templates require; calls of the dataset never have such an id.
    return str(found) if found else f"turn{turn:02d}{index:03d}"
