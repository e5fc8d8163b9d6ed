"""The engine for OpenAI-compatible servers, against real ones on loopback: what is asked, met and described."""

from __future__ import annotations

import contextlib
import http.server
import resource
import socket
import threading

import pytest

from dllm.config.params import Target
from dllm.engines.openai import engine as openai_engine
from dllm.errors import ConfigError, ServerError
from dllm.prompts import template as chat
from tests.engines.openai.asking import answers, engine, outcomes, requests
from tests.engines.openai.loopback_server import serving


@pytest.fixture
def nowhere() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_every_request_is_answered_once_and_stop_answers_end_with_the_stop_id(server, tokenizer) -> None:
    asked = engine(server.url, tokenizer)
    found = answers(asked, 30)
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    for answer in found:
        assert f"you said question {int(answer.key[:16], 16)} " in answer.text
        ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        end = [chat.end_of_turn_id(tokenizer)] if answer.finish_reason == "stop" else []
        assert list(answer.token_ids) == ids + end
    assert asked.stats.tokens == sum(len(answer.token_ids) for answer in found)
    assert (asked.stats.in_flight, asked.stats.retries, asked.stats.servers_up) == (0, 0, 1)


def test_settings_seed_and_thinking_reach_the_server(server, tokenizer) -> None:
    answers(engine(server.url, tokenizer, Target(model="builtin:tiny", enable_thinking=False)), 2)
    body = next(body for body in server.bodies if body["seed"] == 1)
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("builtin:tiny", 8, 0.0, 1.0)
    assert body["messages"] == requests(2)[1].messages
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("concurrency", [3, 120])
def test_concurrency_is_kept_and_reached_beyond_the_client_library_s_own_pool(server, tokenizer, concurrency) -> None:
    server.hold_until = concurrency
    answers(engine(server.url, tokenizer, concurrency=concurrency, timeout_s=90.0), concurrency * 2)
    assert server.peak == concurrency


def test_no_server_is_one_line_with_the_address(tokenizer, nowhere) -> None:
    with pytest.raises(ServerError, match=r"cannot reach the server: cannot connect.*regenerate\.servers") as caught:
        outcomes(engine(nowhere, tokenizer, max_retries=0))
    assert nowhere in str(caught.value) and "\n" not in str(caught.value)


def test_one_server_out_of_reach_is_left_out_with_a_warning(server, tokenizer, nowhere, caplog) -> None:
    asked = engine([nowhere, server.url], tokenizer, max_retries=0)
    answers(asked, 20)
    assert f"{nowhere}/v1 is left out until it responds" in caplog.text and asked.stats.servers_up == 1


def test_another_model_is_refused_with_both_names(tokenizer) -> None:
    with serving(model="other/model") as server:
        with pytest.raises(ServerError, match=r"serves other/model, not builtin:tiny.*regenerate\.served_model"):
            outcomes(engine(server.url, tokenizer))
        assert server.bodies == []
        answers(engine(server.url, tokenizer, served_model="other/model"))


def test_the_key_is_sent_and_never_shown(server, tokenizer, monkeypatch) -> None:
    answers(engine(server.url, tokenizer))
    assert server.keys[-1] == "Bearer none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    for url in (server.url, server.url.replace("//", "//me:hidden@")):
        server.faults.append((401, {}))
        with pytest.raises(ServerError, match=r"answered 401: made to fail.*set OPENAI_API_KEY") as caught:
            outcomes(engine(url, tokenizer))
        assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)
        assert "hidden" not in str(engine(url, tokenizer).describe())
    assert server.keys[-2] == "Bearer sk-very-secret" and str(server.keys[-1]).startswith("Basic ")


class _Website(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_of_something_else_is_refused(server, tokenizer) -> None:
    website = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Website)
    threading.Thread(target=website.serve_forever, daemon=True).start()
    try:
        for urls in ([f"http://127.0.0.1:{website.server_address[1]}"], [f"{server.url}/elsewhere"]):
            with pytest.raises(ServerError, match=r"not the OpenAI protocol.*ends in /v1"):
                outcomes(engine(urls, tokenizer))
    finally:
        website.shutdown()
        website.server_close()


@pytest.mark.parametrize("late", ["sglang", "silent"])
def test_it_says_what_answers_as_servers_report_it(tokenizer, late: str) -> None:
    with serving() as sglang, serving() as vllm, serving() as silent:
        {"sglang": sglang, "silent": silent}[late].look_delay_s = 0.2
        sglang.reports = {
            "/model_info": {"model_path": "/models/tiny", "is_generation": True, "weight_version": "default"},
            "/server_info": {"version": "0.5.23", "api_key": "sk-very-secret", "internal_states": [{"x": 1}]},
        }
        entry = {"id": "builtin:tiny", "owned_by": "vllm", "root": "/models/tiny"}
        vllm.reports = {"/v1/models": {"data": [entry]}, "/version": {"version": "0.32.0"}}
        found = engine([sglang.url, silent.url], tokenizer).describe()
        assert found == {
            "engine": "openai",
            "servers": [f"{sglang.url}/v1", f"{silent.url}/v1"],
            "model": "builtin:tiny",
            "model_path": "/models/tiny",
            "version": "0.5.23",
            "weight_version": "default",
        }
        found = engine(vllm.url, tokenizer).describe()
        assert (found["software"], found["version"], found["model_path"]) == ("vllm", "0.32.0", "/models/tiny")
        with pytest.raises(ServerError, match=r"servers differ: version is .*0\.32\.0.*same version everywhere"):
            engine([sglang.url, vllm.url], tokenizer).describe()


def test_it_asks_what_answers_once(server, tokenizer, nowhere) -> None:
    asked = engine(server.url, tokenizer)
    answers(asked)
    server.end()
    assert asked.describe()["model"] == "builtin:tiny"
    with pytest.raises(ServerError, match="cannot reach the server"):
        engine(nowhere, tokenizer, max_retries=0).describe()


def test_more_connections_than_open_files_are_refused(server, tokenizer, monkeypatch) -> None:
    limits = [(256, 1000)]
    monkeypatch.setattr(openai_engine.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(openai_engine.resource, "setrlimit", lambda _, new: limits.append(new))
    engine(server.url, tokenizer, concurrency=500)
    assert limits[-1] == (756, 1000) and resource.RLIM_INFINITY not in limits[-1]
    with pytest.raises(ConfigError, match=r"756 open files|2256 open files.*1000.*regenerate\.concurrency"):
        engine(server.url, tokenizer, concurrency=2000)
