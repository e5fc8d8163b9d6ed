"""What a sampler is: which checkpoints it decodes, the settings it takes, what it requires of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dllm.decoding.settings import LengthSettings
from dllm.errors import ConfigError

if TYPE_CHECKING:  # these import torch
    from dllm.decoding.speculative import Decoder
    from dllm.decoding.unmasking import Generation, Watch
    from dllm.models.diffusion.config import DiffusionConfig
    from dllm.models.diffusion.protocol import DiffusionLM


class Decodable(Protocol):
    """What a sampler must know of a diffusion model, loaded (`DiffusionLM`) or not (`checkpoints.Checkpoint`)."""

    @property
    def config(self) -> DiffusionConfig:
        """Return how the model was trained."""

    @property
    def sets_own_masks(self) -> bool:
        """Return whether its code sets its attention masks, so that none of ours applies."""


def given(named: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings that stand for a default: null, and a block size of 0."""
    return {name: each for name, each in named.items() if each is not None and (name, each) != ("block_size", 0)}


def field_names(settings: type[LengthSettings] | None) -> set[str]:
    """Return the names of a settings class's fields; none for None."""
    return set() if settings is None else {field.name for field in fields(settings)}


class Sampler:
    """A way to decode; subclasses override what differs."""

    name: str
    """As in the registry."""
    settings: ClassVar[Mapping[str, type[LengthSettings]]] = {}
    """Kinds of checkpoints that it decodes (`dllm.models.checkpoints.Checkpoint.kind`), and its settings for each."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Replace the defaults of the settings for diffusion models; a model's own block size comes before them.
    Source: the models' published generation code; LLaDA2.0 (arXiv 2512.15745), section on inference."""
    implementation: str
    """"module:function" behind `decode`, imported when first used."""
    infills: bool = False
    """Whether it can fill masks inside a text."""
    reports_steps: bool = True
    """Whether it calls `watch`, as `--show` requires."""
    evaluated: bool = False
    """Whether `evaluate` decodes with it too, beside a model's default sampler, where attention before a block is
    causal."""
    needs_causal: bool = False
    """Whether a diffusion model must have learned to predict the next token as well."""

    def decode(
        self,
        model: DiffusionLM,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        watch: Watch | None = None,
        copies: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Generate from prompts in one batch with a diffusion model.

        Args:
            settings: from `settle`, or made directly.
            watch: called after each step of a row.
            copies: as in `dllm.decoding.unmasking.sample`.

        Raises:
            ConfigError: the settings do not fit the model.
            DataError: a prompt is empty, or holds the mask token.
        """
        module, _, name = self.implementation.partition(":")
        found: list[Generation] = getattr(importlib.import_module(module), name)(
            model, prompts, settings, watch=watch, copies=copies
        )
        return found

    def decoder(self, model: Any, load_draft: Callable[[], Any], settings: Any) -> Decoder:
        """Make the decoder of an ordinary causal model, with the draft or without it.

        Raises:
            ModelError: the draft does not fit the model or the block size.
        """
        raise NotImplementedError

    def describe(self, settings: Any) -> str:
        """Name a way of decoding in tables, by what decides how many tokens are committed per pass."""
        return self.name

    def check(self, model: Decodable) -> None:
        """Refuse a diffusion model that this sampler cannot decode.

        Raises:
            ConfigError: it cannot.
        """
        if self.needs_causal and not model.config.predicts_next:
            raise ConfigError(
                f"sampler {self.name} needs a model that also learned causal prediction, and this one's mode is "
                f"{model.config.mode}",
                hint="take llada, or llada2 if it is block-causal",
            )

    def settle(self, model: Any, named: Mapping[str, Any], *, infill: bool = False) -> Any:
        """Return the settings for a diffusion model: those named, else the model's, else the sampler's.

        Args:
            model: loaded.
            named: settings by name; null ones, and a block size of 0, count as absent.
            infill: whether they are for `fill`.

        Raises:
            ConfigError: the sampler does not fit the model, or a setting does not fit the sampler or another setting.
        """
        named = given(named)
        if infill and not self.infills:
            raise ConfigError(
                f"sampler {self.name} cannot infill", hint="take a model with full attention, and sampler llada"
            )
        if unused := self.unused(model, named):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ConfigError(f"sampler {self.name} has no use for {flags}", hint="leave it out, or take sampler llada")
        self.check(model)
        defaults = {name: value for name, value in self.defaults_for(model).items() if self._takes(name)}
        if infill:
            defaults.pop("block_size", None)  # spans lie anywhere: the text is one block
        if {"factor", "entropy_bound"} & named.keys() or named.get("remasking") in ("entropy", "random"):
            defaults.pop("threshold", None)
        return self.settings["diffusion"](**{**defaults, **named})

    def unused(self, model: Any, named: Mapping[str, Any]) -> list[str]:
        """List the named settings that would change nothing."""
        return [name for name in named if not self._takes(name)]

    def defaults_for(self, model: Any) -> dict[str, Any]:
        """Return what replaces the defaults of the settings for a diffusion model."""
        own = {} if model.config.block_size is None else {"block_size": model.config.block_size}
        return {**self.defaults, **own}

    def _takes(self, name: str) -> bool:
        return name in field_names(self.settings["diffusion"])
