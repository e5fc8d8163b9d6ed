"""Read a task's generation_kwargs as sampler settings.

Every argument is applied or refused; none is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dllm.config.load import read_yaml
from dllm.decoding.settings import LengthSettings, Settings
from dllm.errors import ConfigError

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the same thing, in the order in which lm-evaluation-harness reads them."""
SAME_AS_NONE: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0, -1),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
}
"""Arguments that no sampler here takes, and the values at which they change nothing."""


@dataclass(frozen=True)
class GenerationArguments:
    """How to generate one response; requests with equal arguments may share a batch.

    `settings` are sampler settings by name, those that were given; max_new_tokens, temperature and seed always are.
    """

    until: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]

    @property
    def named(self) -> dict[str, Any]:
        """Return the settings as a dict."""
        return dict(self.settings)


def parse(pairs: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs, with values in YAML.

    Raises:
        ConfigError: a pair or its value cannot be read.
    """
    named = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"expected KEY=VALUE, not {pair!r}", where="--gen")
        try:
            named[name] = read_yaml(value)
        except ValueError:
            raise ConfigError(f"no value: {value!r}", where=f"--gen {name}") from None
    return named


def override(own: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Override a task's generation_kwargs, including other names for the same thing."""
    replaced = set(named)
    if replaced & set(MAX_TOKENS):
        replaced |= set(MAX_TOKENS)
    if "temperature" in replaced:
        replaced.add("do_sample")
    return {**{name: value for name, value in own.items() if name not in replaced}, **named}


def read(arguments: Mapping[str, Any], seed: int, settings: type[LengthSettings] = Settings) -> GenerationArguments:
    """Check a task's generation_kwargs.

    `do_sample: false` is greedy whatever the temperature; `do_sample: true` alone means a temperature of 1; without
    it the temperature decides, which is 0 unless given.

    Args:
        seed: where the task gives none.
        settings: what the sampler takes.

    Raises:
        ConfigError: an argument is unknown, or its value is invalid.
    """
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
    if unknown := sorted(set(given) - {field.name for field in fields(settings)}):
        raise ConfigError(f"this model's sampler takes no {', '.join(unknown)}", where="generation_kwargs")
    limit = limits[0] if limits else settings.max_new_tokens
    named = {"seed": seed, **given, "max_new_tokens": limit, "temperature": temperature}
    try:
        checked = TypeAdapter(settings).validate_python(named)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {first['msg'].lower()}", where="generation_kwargs") from None
    return GenerationArguments(tuple(until), tuple((name, getattr(checked, name)) for name in sorted(named)))
