"""Calls of tools that an assistant turn spells out in its text, in the ways of the families of models."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from dllm.outside import JsonError, parse_json

_SPELT_CALLS = tuple(
    re.compile(start)
    for start in (
        r"<tool_call>\s*(?:[{<]|[\w.-]+\s*<(?:arg_key>|/tool_call>))",  # Hermes, Qwen, GLM
        r"<functioncall>\s*\{",  # Glaive
        r"<\|python_tag\|>\s*(?:[{<]|\w+\.call\()|<function=\w",  # Llama
        r"<\uff5ctool▁call▁begin\uff5c>|<\uff5cDSML\uff5cinvoke\s+name=",  # DeepSeek
        r"<\|tool_call_begin\|>",  # Kimi
        r"\[TOOL_CALLS\]\s*[\w.-]+\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?\{",  # Mistral since v11
        r"<\|action_start\|>\s*<\|plugin\|>",  # InternLM
        r"\bto=functions\.[\w.-]+[^\n]*?<\|message\|>",  # gpt-oss
        r"(?:<start_function_call>|<\|tool_call>)\s*call:\w",  # Gemma
        r"```tool_code\s*\n\s*[\w.]+\(",  # Gemma 2 and 3
        r"<steptml:invoke\s+name=|<longcat_tool_call>\s*[\w{]|<tool_call>[\w.-]+\s*```json",  # Step, LongCat, Hunyuan
        r"(?m)^Action:[^\n]+\n\s*Action Input:|✿FUNCTION✿:",  # ReAct, the first Qwen
        r"(?m)^>>>(?!all\b)\w+\n|<\|recipient\|>\s*(?!all\b)\w",  # Functionary
        # MiniMax, Claude
        r"(?:<(?:minimax:tool_call|(?:\w+:)?function_calls)>|</(?:\w+:)?invoke>)\s*<(?:\w+:)?invoke\s+name=",
    )
)
"""Beginnings of a call in text; the first that occurs counts, since one family's may stand inside another's."""
_JSON = re.compile(
    r"(?:\[TOOL_CALLS\]|<TOOLCALL>|<\|tool_call\|>|<tool_calls?>|<\|tools_prefix\|>|<\|START_ACTION\|>|Action: ```json)"
    r"\s*(?=[\[{])"
)
"""What a list of calls in JSON begins with: Mistral, Nemotron, Granite and Phi, Jamba and Hunyuan, Apertus, Cohere."""
_PYTHON = re.compile(
    r"(?:<\|tool_call_start\|>|<\|python_start\|>|<function_calls>)(.*?)"
    r"(?:<\|tool_call_end\|>|<\|python_end\|>|</function_calls>|\Z)",
    re.DOTALL,
)
"""Calls as Python writes them: LFM2, Llama 4, Olmo 3."""
_BARE = re.compile(r"\s*\[\s*[\w.]+\(.*\)\s*\]\s*\Z|\s*\[?\s*\{\s*\"(?:type|name)\"\s*:.*\Z", re.DOTALL)
"""How a text may begin that is calls as a whole: Llama 3.2, ToolACE, xLAM."""
_MARK = re.compile(r"[<\[{✿]|```tool_code|Action:|>>>|to=functions")
"""What every form has."""
_ARGUMENTS = ("arguments", "parameters")


def calls_in_text(content: str) -> int:
    """Count the calls that an assistant turn spells out in its text, as models trained for tools generate them."""
    if _MARK.search(content) is None:  # most texts
        return 0
    for start in _SPELT_CALLS:
        if found := start.findall(content):
            return len(found)
    if begin := _JSON.search(content):
        return _count_json(content[begin.end() :])
    if found := _PYTHON.findall(content):
        return sum(map(_count_python, found))
    return _count_bare(content) if _BARE.match(content) else 0


def _count_json(text: str) -> int:
    """Count the calls in a list of JSON, or in mappings that follow one another; 1 where it is damaged."""
    count = 0
    decoder = json.JSONDecoder()
    while (text := text.lstrip(" \t\r\n,")).startswith(("[", "{")):
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return max(count, 1)
        count += len(value) if isinstance(value, list) else 1
        text = text[end:]
    return count


def _count_python(text: str) -> int:
    """Count the calls in a list, or in lines; 1 where a list is damaged."""
    calls = _python_calls(text)
    return (1 if text.lstrip().startswith("[") else 0) if calls is None else len(calls)


def _python_calls(text: str) -> list[ast.Call] | None:
    """Parse a text that is calls, in a list or one a line; None for any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that Python does not know
            lines = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    values = [line.value if isinstance(line, ast.Expr) else None for line in lines]
    found = [each for value in values for each in (value.elts if isinstance(value, ast.List) else [value])]
    calls = [each for each in found if isinstance(each, ast.Call)]
    return calls if calls and len(calls) == len(found) else None


def _count_bare(text: str) -> int:
    """Count calls where the whole text is nothing else: names with arguments."""
    try:
        value = parse_json(text.strip())
    except JsonError:
        calls = _python_calls(text)
        return len(calls) if calls and not any(call.args for call in calls) else 0
    found = value if isinstance(value, list) else [value]
    return len(found) if all(map(_is_call, found)) else 0


def _is_call(value: Any) -> bool:
    given = [value.get(name) for name in _ARGUMENTS] if isinstance(value, Mapping) else []
    return (
        isinstance(value, Mapping) and isinstance(value.get("name"), str) and any(isinstance(x, Mapping) for x in given)
    )
