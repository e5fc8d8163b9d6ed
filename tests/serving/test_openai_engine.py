"""The engine for OpenAI-compatible servers, against a real one on loopback."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from dllm.config import Regenerate, Target
from dllm.data import chat
from dllm.errors import ConfigError, ServerError
from dllm.models.targets import load_tokenizer
from dllm.serving.engine import Answer, Request
from dllm.serving.openai_engine import OpenAIEngine, server_url
from tests.serving.loopback_server import LoopbackServer, serving

TARGET = Target(model="builtin:tiny")


@pytest.fixture(scope="module")
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


def requests(count: int) -> list[Request]:
    return [
        Request(f"{n:016x}:0", (1, 2), [{"role": "user", "content": f"question {n}"}], 8, 0.0, 1.0, seed=n)
        for n in range(count)
    ]


def ask(url: str, tokenizer, count: int = 1, target: Target = TARGET, **settings) -> list[Answer]:
    settings = {"timeout_s": 20.0, "max_retries": 3, "concurrency": 8, **settings}
    engine = OpenAIEngine(Regenerate(engine="openai", base_url=url, **settings), target, tokenizer)
    return list(engine.answer(requests(count)))


def test_every_request_is_answered_once_and_stop_answers_end_with_the_stop_id(server, tokenizer) -> None:
    answers = {answer.key: answer for answer in ask(server.url, tokenizer, 30)}
    assert sorted(answers) == [request.key for request in requests(30)]
    assert {answer.finish_reason for answer in answers.values()} == {"stop", "length"}
    for key, answer in answers.items():
        assert f"you said question {int(key[:16], 16)} " in answer.text
        ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        end = [chat.end_of_turn_id(tokenizer)] if answer.finish_reason == "stop" else []
        assert list(answer.token_ids) == ids + end


def test_sampling_settings_and_seed_reach_the_server(server, tokenizer) -> None:
    ask(server.url, tokenizer, 2, target=Target(model="builtin:tiny", enable_thinking=False))
    body = next(body for body in server.bodies if body["seed"] == 1)
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("builtin:tiny", 8, 0.0, 1.0)
    assert body["messages"] == [{"role": "user", "content": "question 1"}]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    ask(server.url, tokenizer)
    assert "chat_template_kwargs" not in server.bodies[-1]


@pytest.mark.parametrize("concurrency", [3, 120])
def test_concurrency_is_kept_and_reached_beyond_the_client_library_s_own_pool(server, tokenizer, concurrency) -> None:
    server.delay_s = 0.1 if concurrency < 100 else 1.5
    ask(server.url, tokenizer, concurrency * 2 if concurrency < 100 else concurrency, concurrency=concurrency)
    assert server.peak == concurrency


def test_busy_and_broken_replies_are_asked_again_after_the_time_the_server_names(server, tokenizer) -> None:
    server.faults.extend([(429, {"Retry-After": "1"}), (503, {"Retry-After": "0.05"})])
    assert len(ask(server.url, tokenizer)) == 1
    assert len(server.times) == 3
    assert server.times[1] - server.times[0] >= 1.0
    assert server.times[2] - server.times[1] < 0.4  # the library's own pause would be longer


def test_a_refused_row_is_named_and_not_asked_again(server, tokenizer) -> None:
    server.faults.append((400, {}))
    with pytest.raises(ServerError, match=r"400 to prompt 0{16}:0: .*made to fail.*context length"):
        ask(server.url, tokenizer)
    assert len(server.bodies) == 1


def test_failing_beyond_patience_is_one_line(server, tokenizer) -> None:
    server.faults.extend([(500, {"Retry-After": "0.01"})] * 2)
    with pytest.raises(ServerError, match=r"500 to prompt") as caught:
        ask(server.url, tokenizer, max_retries=1)
    assert "\n" not in str(caught.value) and server.url in str(caught.value)
    assert len(server.bodies) == 2


def test_what_finished_before_a_failure_is_handed_over(server, tokenizer) -> None:
    engine = OpenAIEngine(Regenerate(engine="openai", base_url=server.url, concurrency=1), TARGET, tokenizer)
    answers = engine.answer(requests(5))
    first = [next(answers), next(answers)]
    server.faults.append((400, {}))
    with pytest.raises(ServerError):
        list(answers)
    assert [answer.key for answer in first] == [request.key for request in requests(2)]


def test_an_abandoned_generator_leaves_nothing_running(server, tokenizer) -> None:
    engine = OpenAIEngine(Regenerate(engine="openai", base_url=server.url, concurrency=4), TARGET, tokenizer)
    answers = engine.answer(requests(40))
    next(answers)
    answers.close()
    assert len(server.bodies) <= 8
    assert threading.active_count() < 20


def test_silence_is_a_timeout_that_names_the_limit(server, tokenizer) -> None:
    server.delay_s = 0.6
    with pytest.raises(ServerError, match=r"within 0\.2 s .*regenerate\.timeout_s"):
        ask(server.url, tokenizer, timeout_s=0.2, max_retries=0)


def test_no_server_is_one_line_with_the_address(tokenizer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"cannot reach the server.*regenerate\.base_url") as caught:
        ask(url, tokenizer, max_retries=0)
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_another_model_is_refused_with_both_names(tokenizer) -> None:
    with serving(model="other/model") as server:
        with pytest.raises(ServerError, match=r"serves other/model, not builtin:tiny.*regenerate\.served_model"):
            ask(server.url, tokenizer)
        assert server.bodies == []
        assert len(ask(server.url, tokenizer, served_model="other/model")) == 1


def test_the_key_is_sent_and_never_shown(server, tokenizer, monkeypatch) -> None:
    ask(server.url, tokenizer)
    assert server.keys[-1] == "Bearer none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    for url in (server.url, server.url.replace("//", "//me:hidden@")):
        server.faults.append((401, {}))
        with pytest.raises(ServerError, match="set OPENAI_API_KEY") as caught:
            ask(url, tokenizer)
        assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)
    assert server.keys[-2] == "Bearer sk-very-secret"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_without_its_reasoning_is_refused(server, tokenizer, field) -> None:
    server.extra = {field: "first I think"}
    with pytest.raises(ServerError, match="reasoning parser"):
        ask(server.url, tokenizer)


def test_an_unknown_ending_is_refused(tokenizer) -> None:
    with (
        serving(reply=lambda body: ("half", "abort")) as server,
        pytest.raises(ServerError, match="'abort'"),
    ):
        ask(server.url, tokenizer)


def test_a_character_cut_in_half_is_left_out(tokenizer) -> None:
    with serving(reply=lambda body: ("fine \ufffd\ufffd", "length")) as server:
        assert ask(server.url, tokenizer)[0].text == "fine "


class _Website(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_of_something_else_is_refused(tokenizer) -> None:
    website = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Website)
    threading.Thread(target=website.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ServerError, match="not the OpenAI protocol"):
            ask(f"http://127.0.0.1:{website.server_address[1]}", tokenizer)
    finally:
        website.shutdown()
        website.server_close()


def test_a_prompt_the_server_counts_otherwise_is_reported_once(tokenizer, caplog) -> None:
    with serving() as server:
        server.prompt_tokens = 99
        ask(server.url, tokenizer, 3)
    assert len(caplog.records) == 1 and "is it the same template?" in caplog.text


def test_the_address_comes_from_the_environment_first(monkeypatch) -> None:
    assert server_url("http://a:1") == "http://a:1/v1"
    assert server_url("http://a:1/v1/") == "http://a:1/v1"
    assert server_url("https://a/openai/v1") == "https://a/openai/v1"
    monkeypatch.setenv("DLLM_TARGET_URL", "http://b:2")
    assert server_url("http://a:1") == "http://b:2/v1"
    monkeypatch.delenv("DLLM_TARGET_URL")
    for bad in (None, "", "127.0.0.1:3000", "ftp://x"):
        with pytest.raises(ConfigError, match=r"regenerate\.base_url"):
            server_url(bad)
