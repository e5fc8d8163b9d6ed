"""Names of columns, and of keys of turns, that hold a part of a prompt.

Names are compared as `key` writes them: in lower case, with underscores.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

SYSTEM = re.compile(
    r"(?:custom_)?(?:system(?:_?(?:prompt|message|msg|content|text|instruction)s?)?"
    r"|(?:sys|developer)_?(?:prompt|message|msg|content|text|instruction)s?)"
)
LIKE_SYSTEM = re.compile(r".*system_?(?:prompt|message|msg|instruction)s?(?:_.*)?")
"""Names that are nearly those of a system prompt: which of several it is, or for whom, is not known."""
LIKE_PROMPT = re.compile(r"(?:.*_)?prompts?(?:_.*)?")
_FACTS = re.compile(
    r"id|uuid|key|hash|md5|sha\d*|token|length|len|size|char|word|count|num|number|index|idx|source|origin|dataset|split"
    r"|category|type|kind|name|title|language|lang|locale|domain|topic|intent|task|difficulty|quality|complexity|score"
    r"|rating|level|label|tag|class|cluster|model|generator|author|creator|annotator|license|version|date|time|timestamp"
    r"|url|uri|link|path|file|embedding|logprob|perplexity|moderation|safety|toxicity|violation|explanation|rationale"
    r"|style|format|strategy|variant|method|setting|status"
)
"""Words after `prompt` in names of what is said about a prompt: its length, where it is from, what it is about."""
_OF_OTHERS = re.compile(
    r"labell?ing|judge?(?:ment)?|eval(?:uat(?:ion|or))?|rat(?:ing|er)|scor(?:ing|er)|grad(?:ing|er)|reward|critic|critique"
    r"|negative|generation|revised|rewritten|follow_?up"
)
"""Words before `prompt` in names of what another model was asked, or what is asked in place of it or later."""
TOOLS = ("tools", "functions")
TOOLS_AS_SCHEMAS = ("tool", "function")
"""Names that are those of tools where a list of schemas stands in them."""
MORE_TOOLS = re.compile(
    r".*_(?:tools|functions)|custom_instructions?|apis|plugins|toolset"
    r"|(?:tool|function|api)s?_(?:list|schema|definition|spec|json)s?|tools?_(?:str|string|desc|description)s?"
)
"""Names of tools that are refused, since their form is not known."""
MEDIA = re.compile(
    r"(?:.*_)?(?:image|img|picture|photo|audio|video|pixel_value|attachment)s?"
    r"(?:_(?:path|url|uri|file|filename|byte|base64|b64)s?)?"
)
MEDIA_BY_VALUE = re.compile(r"(?:input_)?media|mm_data|multi_?modal(?:_(?:data|input)s?)?|pdfs?")
"""Names of media that are also names of a kind of thing: decided by the value."""
IS_MEDIUM = re.compile(
    r"data:\w+/.*|\w+://\S+|[^\n]*\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|avif|pdf|docx?|pptx?|xlsx?|mp[34g]|mpe?g"
    r"|m4[av]|wav|flac|ogg|opus|aac|wma|webm|mov|avi|mkv)",
    re.DOTALL | re.IGNORECASE,
)
"""A text that is a file's name, its address, or its bytes in base64."""
FILES = re.compile(r"(?:file|pdf)s?(?:_(?:id|url|path)s?)?")
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
    r"choices?|options?|answer_choices|endings?|(?:option|choice|ending|op)_?(?:[a-e]|\d{1,2})|examples?|stor(?:y|ies)|articles?|evidence|premise|knowledge|tables?|source_text|starter_code"
)
"""Names that belong to the prompt beside a bare question; beside a chat they say something about it."""
TEMPLATE = re.compile(r"(?:.*_)?template_(?:kwarg|arg|argument|param|parameter)s?")
"""Names of a column of arguments of the chat template, as TRL reads it: any of them may change the prompt."""
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

OF_RESPONSES = re.compile(
    r"(?:.*_)?(?:response|answer|completion|generation|output|candidate|choice|chosen|rejected|reply|replies|call)s?"
)
"""Names of what was generated for a prompt, with what was given to the models that did."""
ARGUMENTS = {"properties", "parameters", "arguments"}
"""Keys of schemas and calls under which a name is that of an argument."""
REQUEST = re.compile(r"(?:.*_)?(?:request|req|body|payload|input|prompt|chat|conversation|dialog|dialogue|call)s?")
"""Names of what was sent to a model."""
OF_A_REQUEST = {"messages", "prompt", "tools", "functions", "model"}
"""Keys of a request, beside which `system` and `image` are a part of it."""

_cached = functools.lru_cache(4096)  # all rows of a source have the same names
_CAMEL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
# Bounded, for a cell of one long word would take quadratic time.
_IN_JSON = re.compile(r'(?:sys|developer|tools|functions|template_)\w{0,60}\\{0,8}"\s{0,8}:')


@_cached
def key(name: str) -> str:
    """Return the last part of a name, in the spelling that names are compared in."""
    return _fold(name.rpartition(".")[2]).replace(" ", "_").replace("-", "_")


@_cached
def is_system(name: str) -> bool:
    """Return whether a key names a system prompt."""
    return SYSTEM.fullmatch(name) is not None


@_cached
def is_like_prompt(name: str) -> bool:
    """Return whether a key may name a prompt, or a system prompt, rather than what is said about one."""
    if LIKE_SYSTEM.fullmatch(name) is None and LIKE_PROMPT.fullmatch(name) is None:
        return False
    before, *_, after = re.split("prompts?|system", name)
    if any(map(_OF_OTHERS.fullmatch, (before.strip("_"), *before.split("_")))):
        return False
    return not any(_FACTS.fullmatch(each) or _FACTS.fullmatch(each.removesuffix("s")) for each in after.split("_"))


@_cached
def is_template(name: str) -> bool:
    """Return whether a key names arguments of the chat template."""
    return TEMPLATE.fullmatch(name) is not None


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
    is_like_system = LIKE_SYSTEM.fullmatch(name) is not None and is_like_prompt(name)
    is_medium = MEDIA.fullmatch(name) is not None
    return is_system(name) or is_like_system or is_tools(name) or is_template(name) or is_medium


@_cached
def needs_a_request(name: str) -> bool:
    """Return whether a key names a part of a prompt in a request only: elsewhere `system` is a machine's, say."""
    return name in ("system", "systems") or MEDIA.fullmatch(name) is not None


@_cached
def is_of_responses(name: str) -> bool:
    """Return whether a key names what was generated for a prompt."""
    return OF_RESPONSES.fullmatch(name) is not None


@_cached
def is_closed(name: str) -> bool:
    """Return whether what stands inside a key is no part of the prompt: a call's arguments, or what was generated."""
    return name in ARGUMENTS or is_of_responses(name)


def is_request(name: str, mapping: Mapping[str, Any]) -> bool:
    """Return whether a mapping under a key is what was sent to a model."""
    return REQUEST.fullmatch(name) is not None or not OF_A_REQUEST.isdisjoint(mapping)


def are_in_json(text: str) -> bool:
    """Return whether a text of JSON may have a key that names a system prompt, tools or arguments of the template."""
    return _IN_JSON.search(_fold(text)) is not None


def _fold(text: str) -> str:
    """Write names of camel case in lower case, with underscores."""
    return _CAMEL.sub("_", text).lower()
