"""The target's chat template: messages to ids, and the ids that end a response.

Every use of a template is here, so that regeneration, training, evaluation and a server see the same ids.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dllm.errors import DataError
from dllm.outside import one_line, parse_json
from dllm.process.limits import OverLimit, limited
from dllm.prompts.chats.parquet import to_json
from dllm.prompts.chats.turns import Message, Tools

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_PROBE = "Xyzzy answers plainly"
RENDER_S = 10.0
"""Longest time of one rendering."""
MAX_RENDERED = 1 << 26
"""Most characters of one rendering."""


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
    _check_template(tokenizer, chat_template(tokenizer))
    return _ids(tokenizer, messages, enable_thinking, tools, add_generation_prompt=True)


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
        DataError: before this response the template renders another context than the prompt's, or it
            leaves out calls, and there are no tools.
    """
    prompt = prompt_ids(tokenizer, messages, enable_thinking, tools=tools)
    whole = _ids(tokenizer, [*messages, answer], enable_thinking, tools, add_generation_prompt=False)
    end = end_of_turn_id(tokenizer)
    rest = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or end not in rest:
        raise DataError(
            "the chat template renders a response after another context than the prompt's", where=_name(tokenizer)
        )
    # Where there are tools, and the template renders none, the rows' own check warns of it.
    if not tools and "tool_calls" in answer and whole == _without_calls(tokenizer, messages, answer, enable_thinking):
        raise DataError("nobody offered tools, and the chat template renders no call", where=_name(tokenizer))
    return rest[: len(rest) - rest[::-1].index(end)]


def _without_calls(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answer: Message,
    enable_thinking: bool | None,
) -> list[int] | None:
    """Render an assistant turn without its calls; None where the template refuses that."""
    text = {name: value for name, value in answer.items() if name != "tool_calls"}
    try:
        return _ids(tokenizer, [*messages, text], enable_thinking, None, add_generation_prompt=False)
    except DataError:
        return None


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the chat template into 16 hex digits.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()[:16]


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
    template = chat_template(tokenizer)
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


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the chat template.

    Raises:
        DataError: the tokenizer has none.
    """
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
    opened = render_chat(tokenizer, asked, None)
    if opened == render_chat(tokenizer, asked, None, add_generation_prompt=False):
        what = "the chat template opens no assistant turn: it ignores add_generation_prompt"
    elif _PROBE not in _answered(tokenizer):
        what = "the chat template renders no assistant turn"
    else:
        return
    raise DataError(what, where=_name(tokenizer), hint="correct chat_template, or use another target")


def _answered(tokenizer: PreTrainedTokenizerBase) -> str:
    chat: list[Message] = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": _PROBE}]
    return str(render_chat(tokenizer, chat, None, add_generation_prompt=False))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    """Render a chat as text, within limits: a template comes with a model, and may loop for ever.

    Args:
        options: passed to `apply_chat_template`.

    Raises:
        DataError: the template refuses these messages, or does not end.
    """
    hint = "correct chat_template, or use another target"
    try:
        with limited(RENDER_S):
            rendered = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        roles = one_line(", ".join(str(message["role"]) for message in messages), 200)
        raise DataError(f"the chat template refuses turns by {roles}: {error}", where=_name(tokenizer)) from None
    except OverLimit as error:
        raise DataError(f"the chat template {error}", where=_name(tokenizer), hint=hint) from None
    if len(rendered) > MAX_RENDERED:
        what = f"the chat template makes a text of {len(rendered)} characters"
        raise DataError(what, where=_name(tokenizer), hint=hint)
    return rendered


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    enable_thinking: bool | None,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Render a chat as text, with the options that templates know; raises as `render` does."""
    options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if tools is not None:
        options["tools"] = tools
    turns = [_with_mappings(message) for message in messages]
    return render(tokenizer, turns, add_generation_prompt=add_generation_prompt, **options)


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    enable_thinking: bool | None,
    tools: Tools | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """Render a chat as ids; special tokens that its texts spell out are text, those of the template are special."""
    special, spelt_out = _special_tokens(tokenizer, len(tokenizer))
    texts = to_json([*messages, tools])
    spelt: list[str] = []
    if special and spelt_out.search(texts):  # one pass over the text; tokens may contain each other
        spelt = [content for content in special if content in texts or to_json(content)[1:-1] in texts]
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    if not spelt:
        rendered = render_chat(tokenizer, messages, enable_thinking, **options)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in texts)
    options["tools"] = _marked(tools, spelt, mark)
    rendered = render_chat(tokenizer, _marked(list(messages), spelt, mark), enable_thinking, **options)
    parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", rendered)
    # A letter for each spelt token: shows whether this tokenizer treats the parts of a text one by one.
    plain = [_without(part, spelt, mark) for part in parts]
    if _of_parts(tokenizer, plain) != list(tokenizer("".join(plain), add_special_tokens=False)["input_ids"]):
        what = f"the chat spells out the special token {spelt[0]}, which this tokenizer cannot take as text"
        raise DataError(what, where=_name(tokenizer))
    return _of_parts(tokenizer, [part.replace(mark, "") for part in parts])


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """Return the texts of the special tokens, and a pattern for them in JSON; `size` changes when some are added."""
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    forms = sorted({form for text in special for form in (text, to_json(text)[1:-1])}, key=len, reverse=True)
    return special, re.compile("|".join(map(re.escape, forms)))


def _of_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> list[int]:
    """Tokenize texts and, between them, special tokens."""
    ids: list[int] = []
    for index, part in enumerate(parts):
        if index % 2:
            ids.append(int(str(tokenizer.convert_tokens_to_ids(part))))
        elif part:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _marked(value: Any, spelt: Sequence[str], mark: str) -> Any:
    """Break each spelt token in the texts of a value by a mark after its first character."""
    if isinstance(value, str):
        for content in spelt:
            value = value.replace(content, content[0] + mark + content[1:])
        return value
    if isinstance(value, Mapping):
        return {_marked(key, spelt, mark): _marked(inner, spelt, mark) for key, inner in value.items()}
    return [_marked(inner, spelt, mark) for inner in value] if isinstance(value, list) else value


def _without(text: str, spelt: Sequence[str], mark: str) -> str:
    for content in spelt:
        text = text.replace(content[0] + mark + content[1:], "x")
    return text.replace(mark, "")


def _with_mappings(message: Message) -> Message:
    """Parse the arguments of calls: servers pass mappings to templates, which write JSON themselves."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        with contextlib.suppress(ValueError, TypeError):  # not JSON, or a mapping already: unchanged
            function["arguments"] = parse_json(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
