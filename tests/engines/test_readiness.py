"""When a server counts as ready, against servers on loopback that do each thing wrong in turn."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dllm.engines.readiness import wait_until_ready
from dllm.errors import ServerError
from dllm.process import children as process
from tests.patience import LONGEST_S

Response = tuple[int, Any]
TOKEN = (200, {"choices": [{"message": {"content": "Hi"}}], "usage": {"completion_tokens": 1}})
WELL = {
    "/health": (200, None),
    "/v1/models": (200, {"data": [{"id": "mine"}]}),
    "/model_info": (200, {"model_path": "/models/mine"}),
    "/v1/chat/completions": TOKEN,
}


class Child:
    """Stands for the server's process, which is this one."""

    ended = False
    tail = ("loading",)

    def result(self) -> process.Result:
        raise AssertionError("nobody asks")


@contextmanager
def serving(**faults: Response | Callable[[], Response]) -> Iterator[str]:
    """Answer well but for these paths, written with _ for what is no letter."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wrong = faults.get(self.path.strip("/").replace("/", "_"))
            status, value = (wrong() if callable(wrong) else wrong) or WELL.get(self.path, (404, {}))
            data = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # whoever asked has lost patience
                self.wfile.write(data)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def wait(
    url: str, timeout_s: float = LONGEST_S, path: str | None = "/models/mine", child: process.Background | None = None
):
    wait_until_ready(f"{url}/v1", "mine", child or Child(), name="sglang", path=path, timeout_s=timeout_s)


def late(answer: Response, times: int, otherwise: Response) -> Callable[[], Response]:
    calls = iter([otherwise] * times)
    return lambda: next(calls, answer)


def test_a_token_of_the_right_model_will_do() -> None:
    with serving() as url:
        wait(url)
    with serving(model_info=(404, {})) as url:  # servers of another kind have no such address
        wait(url)
        wait(url, path=None)


def test_it_waits_for_health_and_for_the_token() -> None:
    slow = {
        "health": late((200, None), 2, (503, None)),
        "v1_chat_completions": late(TOKEN, 2, (503, {"error": "loading"})),
    }
    with serving(**slow) as url:
        wait(url)


def mute() -> Response:
    time.sleep(5)
    return TOKEN


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"health": (503, None)}, "sglang never became healthy within 1.5 s"),
        ({"v1_chat_completions": mute}, "is healthy but generated no token within 1.5 s"),
        ({"v1_chat_completions": (503, {})}, "is healthy but generated no token within 1.5 s"),
        (
            {"v1_chat_completions": (200, {"choices": [{"message": {"content": ""}}], "usage": {}})},
            "is healthy but generated no token",
        ),
        (
            {"v1_chat_completions": (400, {"message": "no template"})},
            "refuses its first request: .*no template",
        ),
        ({"v1_chat_completions": (200, b"<html>")}, "fails at its first request: the reply is not JSON: '<html>'"),
        ({"v1_chat_completions": (200, {"choices": []})}, "does not reply in the OpenAI protocol"),
        ({"v1_models": (200, {"data": [{"id": "yours"}, "?"]})}, "serves yours, not mine"),
        ({"v1_models": (200, b"?")}, "the reply to the list of models .* is not the OpenAI protocol"),
        (
            {"model_info": (200, {"model_path": "/models/yours"})},
            "has loaded /models/yours, not /models",
        ),
    ],
)
def test_anything_less_is_an_error_in_one_line(fault: dict[str, Any], complaint: str) -> None:
    with serving(**fault) as url, pytest.raises(ServerError, match=complaint) as caught:
        wait(url, timeout_s=1.5)
    assert "\n" not in str(caught.value)


def test_it_does_not_wait_for_the_dead() -> None:
    class Dead(Child):
        ended = True

    wait("http://127.0.0.1:9", child=Dead())  # else it ends with an error, after its time


def test_whoever_waits_hears_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dllm.engines.readiness.REPORT_EVERY_S", 0.2)
    with serving(health=late((200, None), 3, (503, None))) as url:
        wait(url)
    assert "sglang: not ready after" in (said := capsys.readouterr().err) and "last line: loading" in said
