"""A proxy in the environment: loopback never goes through it, for no client and no child."""

import asyncio
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from dllm.engines.openai.servers import Server
from dllm.process.proxies import LOOPBACK, bypass_for_loopback, drop_unusable
from tests.flows.conftest import Project, copy_project, prefect_home
from tests.patience import LONGEST_S

__all__ = ["prefect_home"]

DEAD = "127.0.0.1:9"
VARIABLES = [name for each in ("http_proxy", "https_proxy", "all_proxy") for name in (each, each.upper())]
SETTINGS = [
    *({name: f"http://{DEAD}"} for name in VARIABLES),
    {"http_proxy": DEAD, "HTTP_PROXY": "http://user:word@proxy.example:3128", "no_proxy": "corp.example"},
    {"ALL_PROXY": f"socks5://{DEAD}"},
    {"all_proxy": f"socks5h://{DEAD}", "NO_PROXY": ".corp.example , 10.0.0.1"},
    {"https_proxy": "ftp://x", "HTTP_PROXY": "http://[::1"},
    {"HTTP_PROXY": f"http://{DEAD}", "NO_PROXY": "*"},
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on loopback that says hello."""

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment that names none, and gets its own back; urlopen reads it anew in each test, and after them."""
    urllib.request.install_opener(None)  # type: ignore[arg-type]  # urlopen keeps the proxies of its first call
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # so that what is set there is taken back
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    yield
    urllib.request.install_opener(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: ",".join(setting))
def test_every_client_reaches_loopback(address: str, setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    bypass_for_loopback()
    dropped = drop_unusable()
    assert set(dropped) == {
        name for name, value in setting.items() if value.startswith(("socks", "ftp", "http://[::1"))
    }

    async def by_aiohttp(url: str) -> str:
        async with aiohttp.ClientSession(trust_env=True) as session, session.get(url) as response:
            return await response.text()

    for url in (f"http://{address}/", f"http://localhost:{address.partition(':')[2]}/"):
        assert urllib.request.urlopen(url, timeout=LONGEST_S).read() == b"hello"
        assert httpx.get(url, timeout=LONGEST_S).text == "hello"
        assert requests.get(url, timeout=LONGEST_S).text == "hello"
        assert asyncio.run(by_aiohttp(url)) == "hello"
    fetch = f"import urllib.request; print(urllib.request.urlopen('http://{address}/').read())"
    assert subprocess.run([sys.executable, "-c", fetch], capture_output=True, text=True).stdout == "b'hello'\n"
    if "no_proxy" in setting or ("NO_PROXY" in setting and setting["NO_PROXY"] != "*"):
        assert "corp.example" in os.environ["NO_PROXY"] == os.environ["no_proxy"], "what the user has set stays"


@given(names=st.lists(st.text(st.characters(exclude_characters=",*", codec="ascii", exclude_categories=["C"]))))
def test_what_stood_there_stays_and_twice_is_as_once(names: list[str]) -> None:
    before = dict(os.environ)
    try:
        os.environ |= {"http_proxy": DEAD, "no_proxy": ",".join(names), "NO_PROXY": ""}
        bypass_for_loopback()
        once = os.environ["NO_PROXY"]
        assert set(once.split(",")) == {name.strip() for name in names if name.strip()} | set(LOOPBACK)
        bypass_for_loopback()
        assert os.environ["NO_PROXY"] == once == os.environ["no_proxy"]
    finally:
        os.environ.clear()
        os.environ.update(before)


OWN = ["127.0.0.2", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "localhost.", "a.localhost", "ip6-localhost"]


@pytest.mark.parametrize("host", [*OWN, socket.gethostname()])
def test_servers_on_this_machine_are_asked_without_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{DEAD}")
    assert Server.at(f"http://{host}:8000/v1").proxy is None
    assert Server.at("http://192.0.2.1:8000/v1").proxy == f"http://{DEAD}"


def test_without_a_proxy_nothing_is_set() -> None:
    bypass_for_loopback()
    assert not {"no_proxy", "NO_PROXY"} & os.environ.keys(), "they would hide the system's own proxy on macOS"


@pytest.mark.flows
@pytest.mark.outage
def test_the_flow_and_its_server_meet_without_the_proxy(tmp_path: Path, prefect_home: Path) -> None:
    copy_project(tmp_path)
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"prepare": {"cmd": "env > seen"}}}))
    proxies = dict.fromkeys(VARIABLES, f"http://{DEAD}") | {"ALL_PROXY": f"socks5://{DEAD}"}
    done = Project(tmp_path, prefect_home).run(sys.executable, "-m", "flows.pipeline", **proxies)
    assert "warning: ALL_PROXY names a proxy that cannot be used here" in done.stdout
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert "127.0.0.1" in seen["NO_PROXY"] and "127.0.0.1" in seen["no_proxy"], done.stdout
    assert seen["HTTP_PROXY"] == proxies["HTTP_PROXY"] and "ALL_PROXY" not in seen
