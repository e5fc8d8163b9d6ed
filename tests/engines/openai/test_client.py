"""One exchange with a server: what each failure is called, and what of a server's words is kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from dllm.engines.openai import client
from dllm.engines.openai.client import Client
from dllm.engines.openai.faults import MAX_REASON, Fault, Refused
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.outside import one_line
from tests.engines.openai.loopback_server import LoopbackServer

BODY = b'{"messages": [{"role": "user", "content": "hello"}]}'


def run(
    use: Callable[[Client, Server], Coroutine[Any, Any, Any]], server: LoopbackServer, timeout_s: float = 5.0
) -> Any:
    async def scene() -> Any:
        async with Client(timeout_s) as opened:
            return await use(opened, Server.at(f"{server.url}/v1"))

    return asyncio.run(scene())


def chat(opened: Client, server: Server) -> Coroutine[Any, Any, Any]:
    return opened.chat(server, BODY)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("drop", "outage", "the connection broke"),
        ("half", "outage", "the connection broke"),
        ("babble", "outage", "the connection broke"),
        ("garbage", "outage", "the reply is not JSON: '{\"choices\": ['"),
        ("stall", "timeout", "no response within 0.4 s"),
        ((429, {}), "busy", "answered 429: made to fail"),
        ((500, {"Retry-After": "3"}), "outage", "answered 500: made to fail"),
        ((503, {"Retry-After": "3"}), "busy", "answered 503: made to fail"),
        ((503, {}), "outage", "answered 503: made to fail"),
        ((404, {}), "not_found", "answered 404: made to fail"),
        ((307, {"Location": "http://127.0.0.1:9/"}), "not_found", "answered 307: made to fail"),
    ],
    ids=str,
)
def test_each_fault_has_its_kind(server, fault, kind, said) -> None:
    server.faults.append(fault)
    with pytest.raises(Fault) as caught:
        run(chat, server, timeout_s=0.4 if fault == "stall" else 5.0)
    assert (caught.value.kind, said in caught.value.reason) == (kind, True), caught.value.reason
    assert "\n" not in caught.value.reason
    assert caught.value.retry_after_s == (3.0 if isinstance(fault, tuple) and "Retry-After" in fault[1] else None)


def test_a_server_that_is_not_there_was_never_reached(server) -> None:
    server.end()
    with pytest.raises(Fault, match="cannot connect") as caught:
        run(chat, server)
    assert caught.value.kind == "unreachable"


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ({"error": {"message": "too\n long"}}, "too long"),
        ({"error": "too long"}, "too long"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"detail": [{"msg": "too long"}]}, "[{'msg': 'too long'}]"),
        (b"<html>too   long</html>", "<html>too long</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, one_line("[" * 8000, MAX_REASON)),
        (b"", ""),
    ],
)
def test_a_refusal_says_in_one_line_what_the_server_says(server, complaint, said) -> None:
    server.complaint = complaint
    server.faults.append((400, {}))
    with pytest.raises(Refused) as caught:
        run(chat, server)
    assert str(caught.value) == f"the server answered 400: {said}"


def test_a_reply_without_end_is_cut(server, monkeypatch) -> None:
    monkeypatch.setattr(client, "MAX_REPLY_BYTES", 1 << 20)
    server.reply = lambda body: ("x" * (2 << 20), "stop")
    with pytest.raises(Refused, match="longer than 1 MiB") as caught:
        run(chat, server)
    assert caught.value.is_transient


def test_models_are_named_or_the_protocol_is_another(server) -> None:
    assert [model["id"] for model in run(Client.models, server)] == ["builtin:tiny"]
    for said in ([], {}, "no", {"data": [{}]}, {"data": 7}):
        server.reports["/v1/models"] = said
        with pytest.raises(ServerError, match="not the OpenAI protocol"):
            run(Client.models, server)
    server.reports["/v1/models"] = {"data": None}
    assert run(Client.models, server) == []


def test_of_a_server_s_facts_no_secret_is_kept(server) -> None:
    server.reports = {
        "/model_info": {"model_path": "/models/tiny", "has_image_understanding": False},
        "/get_server_info": {"version": "0.5.0", "api_key": "sk-secret", "revision": None, "quantization": ["x"]},
        "/version": {"version": "never asked"},
    }
    assert run(Client.facts, server) == {"model_path": "/models/tiny", "version": "0.5.0"}
    server.reports = {"/model_info": [1], "/version": "text"}
    assert run(Client.facts, server) == {}


def test_a_closed_client_leaves_no_thread_and_no_socket(server, recwarn) -> None:
    before = threading.active_count()
    for _ in range(3):
        run(chat, server)
    assert threading.active_count() <= before + 3  # the server's own, which end as they notice
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
