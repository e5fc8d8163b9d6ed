"""The engine that params name, opened."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.config.params import Params
from dllm.engines.engine import Engine, EngineFactory
from dllm.registry import ENGINES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opened(
    params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
) -> AbstractContextManager[Engine]:
    """Open `regenerate.engine`, as `EngineFactory.open` describes, after checking its settings.

    Raises:
        ConfigError: a setting is impossible with this engine, or a server or environment is missing.
        ModelError: the target cannot be loaded.
        ServerError: a server does not start.
    """
    factory: EngineFactory = ENGINES[params.regenerate.engine]
    factory.check(params.regenerate)
    return factory.open(params, tokenizer, root, servers)
