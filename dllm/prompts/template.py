"""The target's chat template: messages to ids, and the ids that end a response.

Every use of a template is here, so that regeneration, training, evaluation and a server see the same ids.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dllm.errors import DataError
from dllm.prompts.turns import Message, Tools

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_PROBE = "Xyzzy answers plainly"


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    enable_thinking: bool | None = None,
    *,
    tools: Tools | None = None,
) -> list[int]:
    """Render a chat up to where the response begins, as ids.

    Args:
        enable_thinking: passed to templates that know it; None leaves it out.
        tools: schemas of the tools the assistant may call, passed to templates that know them.

    Raises:
        DataError: there is no template, it renders no assistant turn, or it refuses these messages.
    """
    _check_template(tokenizer, _template(tokenizer))
    return list(_render(tokenizer, messages, enable_thinking, tools=tools, tokenize=True, return_dict=False))


def answer_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: Message,
    enable_thinking: bool | None = None,
    *,
    tools: Tools | None = None,
) -> list[int]:
    """Render an assistant turn as the ids that generating it would give, including the stop id.

    For responses that a server returns as text and calls, without ids.

    Raises:
        DataError: before this response the template renders another context than the prompt's.
    """
    prompt = prompt_ids(tokenizer, messages, enable_thinking, tools=tools)
    options = {"tokenize": True, "return_dict": False, "add_generation_prompt": False}
    whole = list(_render(tokenizer, [*messages, answer], enable_thinking, tools=tools, **options))
    end = end_of_turn_id(tokenizer)
    rest = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or end not in rest:
        raise DataError(
            "the chat template renders a response after another context than the prompt's", where=_name(tokenizer)
        )
    return rest[: len(rest) - rest[::-1].index(end)]


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the chat template into 16 hex digits.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()[:16]


def stop_ids(tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | PreTrainedConfig | None) -> set[int]:
    """Collect the ids that end a response: the tokenizer's, those of the configs and the template's end of turn.

    Args:
        configs: of the model, `generation_config` and `config.get_text_config()`; None where there is none.

    Raises:
        DataError: the tokenizer has no chat template that renders an assistant turn.
    """
    found = {end_of_turn_id(tokenizer)}
    for ids in (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return found


def framing_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids that frame text: the tokenizer's roles, and special tokens that the chat template names."""
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder
    named = {int(id) for id, token in added.items() if token.special and token.content in template}
    return {int(id) for id in roles if id is not None} | named


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the id the template puts after a response, else the tokenizer's end of sequence.

    Raises:
        DataError: there is no template, it renders no assistant turn, or neither id exists.
    """
    template = _template(tokenizer)
    _check_template(tokenizer, template)
    tail = _answered(tokenizer).rpartition(_PROBE)[2]
    # Not all_special_ids: that has only those with a role, and a turn may end with one that has none.
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for id in tokenizer(tail, add_special_tokens=False)["input_ids"]:
        if id in special:
            return int(id)
    if tokenizer.eos_token_id is None:
        raise DataError("the chat template ends a response with no special token", where=_name(tokenizer))
    return int(tokenizer.eos_token_id)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise DataError(
            "the tokenizer has no chat template", where=_name(tokenizer), hint="use a target that is tuned for chat"
        ) from None


@functools.lru_cache(maxsize=8)
def _check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    # The template is an argument so that a tokenizer whose template was replaced is checked again.
    asked: list[Message] = [{"role": "user", "content": "Say something."}]
    opened = _render(tokenizer, asked, None, tokenize=False)
    if opened == _render(tokenizer, asked, None, tokenize=False, add_generation_prompt=False):
        what = "the chat template opens no assistant turn: it ignores add_generation_prompt"
    elif _PROBE not in _answered(tokenizer):
        what = "the chat template renders no assistant turn"
    else:
        return
    raise DataError(what, where=_name(tokenizer), hint="correct chat_template, or use another target")


def _answered(tokenizer: PreTrainedTokenizerBase) -> str:
    chat: list[Message] = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": _PROBE}]
    return str(_render(tokenizer, chat, None, tokenize=False, add_generation_prompt=False))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    enable_thinking: bool | None,
    *,
    tools: Tools | None = None,
    **options: Any,
) -> Any:
    options.setdefault("add_generation_prompt", True)
    if enable_thinking is not None:
        options["enable_thinking"] = enable_thinking
    if tools is not None:
        options["tools"] = tools
    try:
        return tokenizer.apply_chat_template([_with_mappings(message) for message in messages], **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses turns by {roles}: {error}", where=_name(tokenizer)) from None


def _with_mappings(message: Message) -> Message:
    """Parse the arguments of calls: servers pass mappings to templates, which write JSON themselves."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        with contextlib.suppress(ValueError, TypeError):  # not JSON, or a mapping already: unchanged
            function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
