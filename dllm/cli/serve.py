"""`python -m dllm serve`: a SGLang server with the target, until it is told to go."""

from __future__ import annotations

from pathlib import Path

from dllm.config.params import Params
from dllm.engines import sglang


def run(params: Params, root: Path) -> None:
    """Start SGLang, print its address once it has written a token, and stay.

    Raises:
        ConfigError, ModelError, ServerError, StageError: as `dllm.engines.sglang.served`; ServerError also when the
            server ends later on.
    """
    with sglang.launched(params, root) as server:
        print(server.url, flush=True)
        server.stay()
