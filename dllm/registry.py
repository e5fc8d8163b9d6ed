"""The seams: for each kind of thing that can be added, its members by name.

A member is a line here, "module:attribute", imported when it is first asked for, so that listing names costs nothing.
A package outside this one adds members under the entry-point group `dllm.KIND`, such as `dllm.methods`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from dllm.errors import ConfigError

Member = TypeVar("Member")


class Registry(Generic[Member]):
    """Members of one seam.

    Args:
        kind: plural noun, also the end of the entry-point group: `methods` reads `dllm.methods`.
        members: name to "module:attribute".
    """

    def __init__(self, kind: str, members: Mapping[str, str]) -> None:
        self.kind, self._own = kind, dict(members)
        self._loaded: dict[str, Member] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=f"dllm.{self.kind}") if entry.name not in self._own}

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._installed

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._own or name in self._installed)

    def __getitem__(self, name: str) -> Member:
        """Import a member, once.

        Raises:
            ConfigError: no member has that name; the nearest one is suggested.
        """
        if name not in self._loaded:
            if name in self._own:
                module, _, attribute = self._own[name].partition(":")
                self._loaded[name] = getattr(importlib.import_module(module), attribute)
            elif name in self._installed:
                self._loaded[name] = self._installed[name].load()
            else:
                near = difflib.get_close_matches(name, list(self), n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self)}"
                raise ConfigError(f"no such name among the {self.kind}: {name!r}", hint=hint)
        return self._loaded[name]

    def check(self, name: str) -> str:
        """Return the name of a member; for pydantic, as `AfterValidator(METHODS.check)`.

        Raises:
            ValueError: no member has that name; the nearest one is suggested.
        """
        if name not in self:
            near = difflib.get_close_matches(name, list(self), n=1, cutoff=0.4)
            raise ValueError(f"expected one of {', '.join(self)}" + (f"; did you mean {near[0]}?" if near else ""))
        return name

    def items(self) -> Iterator[tuple[str, Member]]:
        """Import every member, and yield it with its name."""
        for name in self:
            yield name, self[name]


METHODS: Registry[Any] = Registry(
    "methods",
    {
        "dflash": "dllm.methods.dflash.method:DFLASH",
        "mdlm": "dllm.methods.diffusion.method:MDLM",
        "hybrid": "dllm.methods.diffusion.method:HYBRID",
    },
)
"""Training methods, the values of `train.mode`: instances of `dllm.methods.method.Method`."""

DRAFTS: Registry[Any] = Registry(
    "drafts",
    {
        "dflash": "dllm.models.drafts.dflash:DFlashDraft",
        "dflash2": "dllm.models.drafts.dflash2:DFlash2Draft",
    },
)
"""Draft architectures: classes like `dllm.models.drafts.protocol.Draft`; `train.dflash.draft.architecture`."""

DRAFT_SETTINGS: Registry[Any] = Registry(
    "draft_settings", {"dflash2": "dllm.models.drafts.dflash2_settings:DFlash2Settings"}
)
"""Settings that draft architectures have of their own, by the architecture's name: subclasses of
`dllm.config.section.Section`, sections of `train.dflash.draft`. Their modules don't import torch."""

SERVING_ENGINES: Registry[Any] = Registry(
    "serving_engines",
    {
        "sglang": "dllm.models.drafts.serving:SGLANG",
        "vllm": "dllm.models.drafts.serving:VLLM",
        "lmdeploy": "dllm.models.drafts.serving:LMDEPLOY",
        "trtllm": "dllm.models.drafts.serving:TRTLLM",
        "llamacpp": "dllm.models.drafts.serving:LLAMACPP",
        "z-lab": "dllm.models.drafts.serving:ZLAB",
    },
)
"""Who decodes with an exported draft, `export --for`: instances of `dllm.models.drafts.serving.ServingEngine`."""

DIFFUSION_LMS: Registry[Any] = Registry(
    "diffusion_lms",
    {
        "transformers": "dllm.models.diffusion.transformers_lm:TransformersLM",
        "llada": "dllm.models.diffusion.llada:LLaDA",
        "llada2": "dllm.models.diffusion.llada2:LLaDA2",
        "nemotron": "dllm.models.diffusion.nemotron:NemotronLabsDiffusion",
    },
)
"""Families of diffusion LMs: subclasses of `dllm.models.diffusion.protocol.DiffusionLM`."""

OBJECTIVES: Registry[Any] = Registry(
    "objectives",
    {
        "decay": "dllm.methods.dflash.objectives:decay",
        "dpace": "dllm.methods.dflash.objectives:dpace",
    },
)
"""Losses of a draft: functions like `dllm.methods.dflash.objectives.Objective`; `train.dflash.loss`."""

SOURCES: Registry[Any] = Registry(
    "sources",
    {
        "gsm8k": "dllm.prompts.builtin:GSM8K",
        "humaneval": "dllm.prompts.builtin:HUMANEVAL",
        "aime": "dllm.prompts.builtin:AIME",
        "arithmetic": "dllm.prompts.builtin:ARITHMETIC",
        "reasoning-gym": "dllm.prompts.gym:REASONING_GYM",
    },
)
"""Prompt sources, built-in values of `prepare.sources[].name`: instances of `dllm.prompts.protocol.PromptSource`."""

PROMPT_SETS: Registry[Any] = Registry(
    "prompt_sets",
    {
        "gsm8k": "dllm.prompts.sets:GSM8K",
        "math500": "dllm.prompts.sets:MATH500",
        "humaneval": "dllm.prompts.sets:HUMANEVAL",
        "mbpp": "dllm.prompts.sets:MBPP",
        "mt-bench": "dllm.prompts.sets:MT_BENCH",
        "alpaca": "dllm.prompts.sets:ALPACA",
    },
)
"""Published prompt sets, names in `evaluate.sets`: like a prompt source, with instructions around the questions."""

ENGINES: Registry[Any] = Registry(
    "engines",
    {
        "local": "dllm.engines.local:LocalEngine",
        "openai": "dllm.engines.openai.engine:OpenAIEngine",
        "sglang": "dllm.engines.sglang:SglangEngine",
        "dataset": "dllm.engines.dataset:DatasetEngine",
    },
)
"""Who generates the responses in `regenerate`; each member is a `dllm.engines.engine.EngineFactory`."""

SAMPLERS: Registry[Any] = Registry(
    "samplers",
    {
        "dflash": "dllm.decoding.samplers:DFLASH",
        "ar": "dllm.decoding.samplers:AR",
        "llada": "dllm.decoding.samplers:LLADA",
        "llada2": "dllm.decoding.samplers:LLADA2",
        "nemotron": "dllm.decoding.samplers:NEMOTRON",
        "self-spec": "dllm.decoding.samplers:SELF_SPECULATION",
        "own": "dllm.decoding.samplers:OWN",
        "own-ar": "dllm.decoding.samplers:OWN_AR",
        "own-self-spec": "dllm.decoding.samplers:OWN_SELF_SPECULATION",
    },
)
"""`--sampler`: ways to decode, instances of `dllm.decoding.sampler.Sampler`."""
