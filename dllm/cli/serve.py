"""`python -m dllm serve`: a SGLang server with the target, until it is stopped."""

from __future__ import annotations

from pathlib import Path

from dllm.config.params import Params
from dllm.engines import sglang


def run(params: Params, root: Path) -> None:
    """Start SGLang, print its address once it has generated a token, and wait.

    Raises:
        ConfigError, ModelError, ServerError, StageError: as `dllm.engines.sglang.served`; ServerError also when the
            server ends later.
    """
    with sglang.launched(params, root) as server:
        print(server.url, flush=True)
        server.stay()
