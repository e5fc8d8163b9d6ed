"""How a diffusion LM was trained, and so how it is decoded: `dllm.json`, beside config.json in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from dllm.errors import ModelError

CONFIG_FILE = "dllm.json"

Context = Literal["full", "block", "causal"]
"""Attention in a pass over noisy text: `full`, every position attends to every other; `block`, a block attends to
itself and to the blocks before it; `causal`, the same, but clean text attends causally."""

Origin = Literal["sequence", "response"]
"""Where blocks are counted from: the first token of the row, or the first token of its response."""


@dataclass(frozen=True)
class Mode:
    """What follows for decoding from the method that a model was trained with."""

    predicts_next: bool
    """Whether it was also trained to predict the next token under a causal mask."""
    block_context: Context
    """Its attention, if it was trained in blocks."""
    block_origin: Origin


MODES = {"mdlm": Mode(False, "block", "sequence"), "hybrid": Mode(True, "causal", "response")}
"""Values of `mode` in dllm.json."""


def _check_mode(name: str) -> str:
    if name not in MODES:
        raise ValueError(f"expected one of {', '.join(MODES)}")
    return name


@dataclass(frozen=True)
class DiffusionConfig:
    """The content of `dllm.json`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    mode: Annotated[str, AfterValidator(_check_mode)]
    mask_token_id: Annotated[int, Field(strict=True, ge=0)]
    block_size: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Tokens per block where no block attends to a later one; null where attention is full."""

    @property
    def predicts_next(self) -> bool:
        """Return whether the model was also trained to predict the next token."""
        return MODES[self.mode].predicts_next

    @property
    def block_origin(self) -> Origin:
        """Return where the blocks of training were counted from."""
        return MODES[self.mode].block_origin

    @property
    def context(self) -> Context:
        """Return the attention of training."""
        return "full" if self.block_size is None else MODES[self.mode].block_context

    def save(self, directory: Path) -> None:
        """Write `dllm.json`."""
        (directory / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_config(directory: Path) -> DiffusionConfig | None:
    """Read a checkpoint's `dllm.json`; None where it has none.

    Raises:
        ModelError: it is malformed.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(DiffusionConfig).validate_python(json.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    raise ModelError(f"cannot read the checkpoint's {CONFIG_FILE}: {wrong}", where=str(path))


def config_at(directory: Path) -> dict[str, Any]:
    """Return the content of config.json; empty where it cannot be read."""
    try:
        found = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
