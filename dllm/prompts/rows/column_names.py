"""Names of columns, and of keys of turns, that hold a part of a prompt.

Names are compared as `key` writes them: in lower case, with underscores.
"""

from __future__ import annotations

import functools
import re

SYSTEM = re.compile(
    r"(?:custom_)?(?:system(?:_?(?:prompt|message|msg|content|text|instruction)s?)?"
    r"|(?:sys|developer)_?(?:prompt|message|msg|content|text|instruction)s?)"
)
TOOLS = ("tools", "functions")
TOOLS_AS_SCHEMAS = ("tool", "function")
"""Names that are those of tools where a list of schemas stands in them."""
MORE_TOOLS = re.compile(
    r".*_(?:tools|functions)|custom_instructions?|apis|plugins|toolset|(?:tool|function|api)s?_(?:list|schema|definition|spec)s?"
)
"""Names of tools that are refused, since their form is not known."""
MEDIA = re.compile(
    r"(?:.*_)?(?:image|img|picture|photo|audio|video|pixel_value|attachment)s?"
    r"(?:_(?:path|url|uri|file|filename|byte|base64|b64)s?)?"
)
FILES = re.compile(r"files?(?:_(?:id|url|path)s?)?")
"""Names of a turn's files; a column of this name may be where the row is from."""
_OF = r"(?:(?:user|chat|conversation|dialog|dialogue|retrieved|reference|bot|agent|sql|db|database)_)?"
_PART = r"(?:_(?:text|content|message|doc|description|card|prompt)s?)?"
TEXT = re.compile(
    rf"{_OF}(?:instruction|input|prompt|question|query|context|passage|paragraph|document|doc|background|persona"
    rf"|scenario|few_?shot|demonstration|exemplar)s?(?:_examples?)?{_PART}"
    rf"|{_OF}(?:history|memory)|queries|memories|(?:role|character)_(?:description|card|prompt)"
    r"|(?:user|bot|agent|character)_profile|(?:db|database|table|sql)_schema|preamble|sys|developer|format_instructions"
    r"|(?:past|previous|prior|context)_(?:turn|message|dialogue|conversation)s?"
    r"|(?:(?:prompt|assistant|response)_)?(?:prefix|prefill)|prompt_suffix"
)
"""Names of texts that belong to a prompt, unless the chat holds them already."""
TEXT_OF_A_QUESTION = re.compile(
    r"choices?|options?|examples?|stor(?:y|ies)|articles?|evidence|premise|knowledge|tables?|source_text|starter_code"
)
"""Names that belong to the prompt beside a bare question; beside a chat they say something about it."""
TEMPLATE = "chat_template_kwargs"
"""A column of arguments of the chat template, as TRL reads it: any of them may change the prompt."""
TEMPLATE_ARGUMENTS = {
    "enable_thinking",
    "thinking_mode",
    "thinking_budget",
    "reasoning_effort",
    "chat_template",
    "continue_final_message",
}
"""Arguments of the chat template that rows have in columns of their own."""
CONTINUED = {"prefix", "partial", "prefill"}
"""Keys of a last turn that is the beginning of the response, as DeepSeek, Moonshot and Mistral name them."""
ROUTES = {"channel": ("final",), "recipient": ("all", "assistant", "user")}
"""Keys of gpt-oss's turns, and their values for a text that the user reads; others are calls or reasoning."""

_cached = functools.lru_cache(4096)  # all rows of a source have the same names
_CAMEL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
_IN_JSON = re.compile(rf'"(?:{SYSTEM.pattern}|{"|".join(TOOLS)})"')


@_cached
def key(name: str) -> str:
    """Return the last part of a name, in the spelling that names are compared in."""
    return _fold(name.rpartition(".")[2]).replace(" ", "_").replace("-", "_")


@_cached
def is_system(name: str) -> bool:
    """Return whether a key names a system prompt."""
    return SYSTEM.fullmatch(name) is not None


@_cached
def is_text(name: str) -> bool:
    """Return whether a key names a text that belongs to a prompt."""
    return TEXT.fullmatch(name) is not None


@_cached
def is_tools(name: str) -> bool:
    """Return whether a key names tools, in whatever form."""
    return name in TOOLS or MORE_TOOLS.fullmatch(name) is not None


@_cached
def belongs(name: str) -> bool:
    """Return whether a key names a part of the prompt also inside a column of other things."""
    return is_system(name) or is_tools(name) or MEDIA.fullmatch(name) is not None


def are_in_json(text: str) -> bool:
    """Return whether a text of JSON may have a key that names a system prompt or tools."""
    return _IN_JSON.search(_fold(text)) is not None


def _fold(text: str) -> str:
    """Write names of camel case in lower case, with underscores."""
    return _CAMEL.sub("_", text).lower()
