"""What tests of engines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dllm.models.targets import load_tokenizer
from tests.engines.openai.asking import TARGET
from tests.engines.openai.loopback_server import LoopbackServer, serving


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TARGET)


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "DLLM_TARGET_URL"):
        monkeypatch.delenv(name, raising=False)
