"""Addresses, and how servers at them are spoken to."""

from __future__ import annotations

import pytest

from dllm.engines.openai.servers import Server, server_url, server_urls, without_credentials
from dllm.errors import ConfigError


def test_addresses_come_from_the_environment_first(monkeypatch) -> None:
    assert server_urls(["http://a:1", "http://a:1/v1/", "https://b/openai/v1"]) == [
        "http://a:1/v1",
        "https://b/openai/v1",
    ]
    monkeypatch.setenv("DLLM_TARGET_URL", "http://c:2, http://d:3/v1")
    assert server_urls(["http://a:1"]) == ["http://c:2/v1", "http://d:3/v1"]
    monkeypatch.setenv("DLLM_TARGET_URL", "")
    assert server_urls(["http://a:1"]) == ["http://a:1/v1"]


@pytest.mark.parametrize(
    "bad", ["", "127.0.0.1:3000", "ftp://x", "http://", "http://[", "http://a:notaport", "http:/a"]
)
def test_what_is_no_address_is_refused_with_the_key(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"not an http address.*regenerate\.servers"):
        server_url(bad)


def test_no_address_is_refused_with_the_key() -> None:
    with pytest.raises(ConfigError, match=r"needs a server.*regenerate\.servers.*DLLM_TARGET_URL"):
        server_urls([])


def test_credentials_are_sent_and_not_without_credentials(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    plain, own = Server.at("http://a:1/v1"), Server.at("http://me:p%40ss@a:1/v1")
    assert plain.headers["Authorization"] == "Bearer sk-secret"
    assert own.headers["Authorization"] == "Basic bWU6cEBzcw==" and own.url == plain.url
    assert not [word for word in ("secret", "p%40ss", "bWU6") if word in f"{plain} {own}"]
    for url in ("me:hidden@host:1", "http://me:hidden@host:1/v1", "http://me:hidden@[bad/v1"):
        assert "hidden" not in without_credentials(url)
        if "bad" in url or "//" not in url:
            with pytest.raises(ConfigError) as caught:
                server_url(url)
            assert "hidden" not in str(caught.value)


def test_a_proxy_is_for_the_outside_only(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Server.at("http://far.example/v1").proxy == "http://proxy:3128"
    assert Server.at("http://127.0.0.1:1/v1").proxy is None
    monkeypatch.setenv("http_proxy", "proxy:3128")
    assert Server.at("http://far.example/v1").proxy == "http://proxy:3128"
    monkeypatch.setenv("http_proxy", "socks5://proxy:1080")
    assert Server.at("http://far.example/v1").proxy is None
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "far.example")
    assert Server.at("http://far.example/v1").proxy is None
