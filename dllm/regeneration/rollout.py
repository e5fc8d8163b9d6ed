"""One sample of one chat, answered turn by turn: what is asked next, and the rows that come of it.

Owns which turns are answered anew and in what context. It knows no engine and no file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dllm.config.params import Regenerate, Target
from dllm.engines.engine import Request, Response, request_key, request_seed
from dllm.errors import DataError
from dllm.prompts import template as chat
from dllm.prompts.table import Prompt
from dllm.prompts.turns import Message
from dllm.responses import flags
from dllm.responses.shards import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Calls = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """What stands before one answer, and what the chat had in the answer's place."""

    number: int
    context: list[Message]
    """The messages since the turn before."""
    old_calls: Calls | None
    """Tool calls of the answer that is replaced, which the next turn's tool messages refer to; None at the end."""


@dataclass(frozen=True)
class RolloutConfig:
    """How every chat is asked."""

    settings: Regenerate
    target: Target
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rejection:
    """A turn that cannot be answered, and so ends its chat."""

    key: str
    reason: str
    is_passing: bool = False
    """Whether the next call asks again."""


def split_turns(messages: list[Message], which: Literal["all", "last"]) -> list[Turn]:
    """Cut a chat at the assistant's messages into turns to answer, the one after its last message included.

    Neighbouring assistant messages are one turn. What an assistant says before anyone has spoken to it is context.
    """
    turns: list[Turn] = []
    context: list[Message] = []
    old_calls: Calls | None = None
    spoken_to = False
    for message in messages:
        if message["role"] == "assistant" and spoken_to:
            old_calls = [*(old_calls or ()), *message.get("tool_calls", ())]
            continue
        if old_calls is not None:
            turns.append(Turn(len(turns), context, old_calls))
            context, old_calls = [], None
        context.append(message)
        spoken_to = spoken_to or message["role"] != "system"
    turns.append(Turn(len(turns), context, None))
    return turns if which == "all" else [Turn(turns[-1].number, list(messages), None)]


def num_samples(prompt: Prompt, settings: Regenerate) -> int:
    """Tell how often a prompt is answered: those held out once."""
    return settings.samples_per_prompt if prompt.split == "train" else 1


def origin_of(prompt: Prompt, sample: int) -> str:
    """Name one sample of one prompt."""
    return f"{prompt.id}:{sample}"


class Rollout:
    """One sample of one prompt, from its first request to its rows."""

    def __init__(self, prompt: Prompt, sample: int, asking: RolloutConfig) -> None:
        self.prompt, self.sample = prompt, sample
        self.rejection: Rejection | None = None
        self.is_unfit = False
        """Whether the rejection is the chat template's rather than an engine's."""
        self._asking = asking
        self._left = split_turns(prompt.messages, asking.settings.turns)[::-1]
        self.turns = len(self._left)
        """Turns it has, answered or not."""
        self._messages: list[Message] = []
        self._answered: list[tuple[int, int, array[int]]] = []
        """Of each answer: its turn, its place in the messages, and the ids before it."""
        self._mismatch = False
        self._open()

    @property
    def origin(self) -> str:
        """Name it by prompt and sample."""
        return origin_of(self.prompt, self.sample)

    @property
    def is_begun(self) -> bool:
        """Tell whether a turn is answered."""
        return bool(self._answered)

    @property
    def turns_left(self) -> int:
        """Count the turns that still stand to be answered; 0 says that the rollout is over."""
        return len(self._left)

    def next_request(self) -> Request | None:
        """Make the request for the turn that stands to be answered; None where the rollout is over.

        A chat that the template refuses is over too, with a rejection.
        """
        if not self._left:
            return None
        turn, settings = self._left[-1].number, self._asking.settings
        key = request_key(self.prompt.id, self.sample, turn)
        try:
            ids = chat.prompt_ids(
                self._asking.tokenizer,
                self._messages,
                self._asking.target.enable_thinking,
                tools=self.prompt.tools,
            )
        except DataError as error:
            self.is_unfit = True
            self.reject(key, error.message)
            return None
        return Request(
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

    def accept(self, request: Request, answer: Response) -> None:
        """Take the answer to the last request; the rollout goes on, or ends."""
        turn = self._left.pop()
        message: Message = {"role": "assistant", "content": answer.text}
        old = turn.old_calls or []
        if answer.tool_calls:
            message["tool_calls"] = [
                {**call, "id": _call_id(old, index, turn.number)} for index, call in enumerate(answer.tool_calls)
            ]
        self._answered.append((turn.number, len(self._messages), array("i", request.prompt_ids)))
        self._messages.append(message)
        if turn.old_calls is not None and len(old) != len(answer.tool_calls):
            self._mismatch = True
            self._left.clear()
        self._open()

    def reject(self, key: str, reason: str, is_passing: bool = False) -> None:
        """End the rollout at a turn that cannot be answered; the turns before it stay."""
        self.rejection = Rejection(key, reason, is_passing)
        self._left.clear()

    def rows(self, read: Callable[[str], Response]) -> list[Row]:
        """Make the rows of all answered turns.

        Args:
            read: gives the answer to a key.
        """
        made = []
        for turn, place, prompt_ids in self._answered:
            answer = read(request_key(self.prompt.id, self.sample, turn))
            found = flags.flags_of(answer.token_ids, answer.finish_reason, answer.text, answer.tool_calls)
            if self._mismatch and turn == self._answered[-1][0]:
                found.append(flags.TOOL_MISMATCH)
            made.append(
                Row(
                    prompt_id=self.prompt.id,
                    sample=self.sample,
                    turn=turn,
                    source=self.prompt.source,
                    split=self.prompt.split,
                    messages=self._messages[: place + 1],
                    tools=self.prompt.tools,
                    prompt_ids=prompt_ids.tolist(),
                    answer_ids=list(answer.token_ids),
                    finish_reason=answer.finish_reason,
                    num_tokens=len(answer.token_ids),
                    flags=found,
                )
            )
        return made

    def _open(self) -> None:
        if self._left:
            self._messages.extend(self._left[-1].context)


def _call_id(old: Calls, index: int, turn: int) -> str:
    """Keep the id that the chat's own tool messages refer to; else make one that is the same in every run."""
    found = old[index].get("id") if index < len(old) else None
    # Nine letters and digits, as some templates ask; no call of the chat's own is named so.
    return str(found) if found else f"turn{turn:02d}{index:03d}"
