"""What a task asks of an answer: its generation_kwargs, checked, under the names that the samplers know.

Every argument is honoured or refused; none is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dllm.decoding.settings import Settings
from dllm.errors import ConfigError

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the same thing, in the order in which lm-evaluation-harness reads them."""
DEFAULT_MAX_TOKENS = 256
SAME_AS_NONE: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
}
"""Arguments that no sampler here has, and the values at which that makes no difference."""


@dataclass(frozen=True)
class Asked:
    """How one answer is to be written; alike ones may share a batch.

    `settings` are fields of `Settings`, for those that were named: max_new_tokens, temperature and seed always are.
    """

    until: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]

    @property
    def named(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dict(self.settings)


def put_before(own: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Let what a person names go before a task's own generation_kwargs, other names for the same thing included."""
    replaced = set(named)
    if replaced & set(MAX_TOKENS):
        replaced |= set(MAX_TOKENS)
    if "temperature" in replaced:
        replaced.add("do_sample")
    return {**{name: value for name, value in own.items() if name not in replaced}, **named}


def read(arguments: Mapping[str, Any], seed: int) -> Asked:
    """Check a task's generation_kwargs.

    `do_sample: false` is greedy whatever the temperature; `do_sample: true` alone means a temperature of 1; without
    it the temperature decides, which is 0 unless given.

    Args:
        seed: where the task names none.

    Raises:
        ConfigError: an argument is unknown, or its value is not possible.
    """
    from pydantic import TypeAdapter, ValidationError

    given = {name: value for name, value in arguments.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"until must be a text or a list of texts, not {until!r}", where="generation_kwargs")
    limits = [given.pop(name) for name in MAX_TOKENS if name in given]
    samples = given.pop("do_sample", None)
    temperature = given.pop("temperature", 1.0 if samples else 0.0)
    if samples is False:
        temperature = 0.0
    for name, neutral in SAME_AS_NONE.items():
        if name in given and (given[name] in neutral or (name == "top_k" and temperature == 0)):
            del given[name]
    if unknown := sorted(set(given) - {field.name for field in fields(Settings)}):
        raise ConfigError(f"no sampler here has {', '.join(unknown)}", where="generation_kwargs")
    limit = limits[0] if limits else DEFAULT_MAX_TOKENS
    named = {"seed": seed, **given, "max_new_tokens": limit, "temperature": temperature}
    try:
        checked = TypeAdapter(Settings).validate_python(named)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {first['msg'].lower()}", where="generation_kwargs") from None
    return Asked(tuple(until), tuple((name, getattr(checked, name)) for name in sorted(named)))
