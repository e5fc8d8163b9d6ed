"""The engine that params ask for, made ready and taken down again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dllm.config.params import Params
from dllm.engines.engine import Engine
from dllm.models import targets
from dllm.prompts import template as chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def opened(
    params: Params, tokenizer: PreTrainedTokenizerBase, root: Path, servers: Sequence[str] | None = None
) -> Iterator[Engine]:
    """Make `regenerate.engine` for as long as the `with` block lasts.

    Args:
        root: the project's folder, where engine `sglang` finds its environment and leaves its log.
        servers: addresses for engine `openai`; None takes those of the environment, then of params.

    Raises:
        ConfigError: engine `openai` has no server, or engine `sglang` no environment.
        ModelError: the target cannot be loaded.
        ServerError: SGLang does not start.
    """
    settings = params.regenerate
    if settings.engine == "given":
        from dllm.engines.dataset import GivenEngine

        yield GivenEngine(tokenizer, params.target.enable_thinking)
        return
    if settings.engine == "local":
        from dllm.engines.local import LocalEngine

        model = targets.load_target(params.target)
        stops = targets.stop_ids(model, tokenizer) | chat.stop_ids(tokenizer, model.generation_config)
        yield LocalEngine(model, tokenizer, stops, settings.batch_size)
        return
    from dllm.engines.openai import servers as addresses
    from dllm.engines.openai.engine import OpenAIEngine

    if settings.engine == "openai":
        urls = addresses.server_urls(settings.servers) if servers is None else list(servers)
        yield OpenAIEngine(urls, settings, params.target, tokenizer)
        return
    from dllm.engines import sglang

    with sglang.served(params, root) as url:
        named = settings.model_copy(update={"served_model": sglang.served_name(params)})
        yield OpenAIEngine([url], named, params.target, tokenizer)
