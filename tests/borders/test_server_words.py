"""What a server says reaches the user whole, with a hint that fits the fault and the command."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from dllm.engines.engine import Refusal
from dllm.engines.openai.faults import Fault, Refused, read_reply
from dllm.engines.openai.pool import MAX_RETRY_AFTER_S, pause_s
from dllm.engines.openai.servers import Server, server_url
from dllm.errors import ConfigError, ServerError
from dllm.responses import shards
from tests.borders.test_replies import call, completion, flags, no_surroundings, tokenizer
from tests.engines.openai.asking import answers, engine, outcomes, refusal
from tests.engines.openai.loopback_server import LoopbackServer, serving
from tests.patience import LONGEST_S

__all__ = ["no_surroundings", "tokenizer"]

START = "start it, or set regenerate.servers"
TIER = {"error": {"message": "This model is overloaded for your tier", "code": 402}}
SGLANG = {"object": "error", "message": "Requested token count exceeds", "type": "BadRequestError", "code": 400}
NGINX = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><center>nginx</center></body></html>"


def said(server: LoopbackServer, status: int, body: Any, always: bool = True, **headers: str) -> None:
    server.complaint = body
    if always:
        server.always = (status, headers)
    else:
        server.faults.append((status, headers))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (TIER, "error 402: This model is overloaded for your tier"),
        (SGLANG, "error 400: Requested token count exceeds"),
        ({"error": {"message": "too long", "code": "400"}}, "error 400: too long"),
        ([{"error": {"message": "too long", "status": "INVALID", "code": 400}}], "error 400: too long"),
        ({"error": {"error": {"message": "too long"}, "status_code": 422}}, "error 422: too long"),
        ({"choices": [{"error": {"code": 400, "message": "too long"}, "finish_reason": "error"}]}, "400: too long"),
        ({"detail": "too long", "status": 413}, "error 413: too long"),
        ({"message": "too long", "status_code": 400}, "error 400: too long"),
        ({"errors": [{"message": "too long", "code": 400}]}, "error 400: too long"),
        ({"msg": "too long", "code": 400}, "error 400: too long"),
        ({"choices": [], "message": "too long", "status": 400}, "error 400: too long"),
        ({"choices": [{"message": {"content": None, "refusal": "I won't"}, "finish_reason": "stop"}]}, "I won't"),
    ],
)
def test_an_error_inside_a_200_is_one_rejected_row_in_the_server_s_words(body: Any, words: str, tokenizer: Any) -> None:
    with serving() as server:
        said(server, 200, body, always=False)
        found = outcomes(engine(server.url, tokenizer, concurrency=1), 3)
    assert len(server.bodies) == 3
    assert isinstance(found[0], Refusal) and words in found[0].reason and not found[0].is_transient


@pytest.mark.parametrize("code", [429, "429", 500, 503])
def test_a_code_inside_a_200_that_passes_is_asked_again(code: Any, tokenizer: Any) -> None:
    with serving() as server:
        said(server, 200, {"error": {"message": "overloaded", "code": code}}, always=False)
        answers(engine(server.url, tokenizer), 2)
        assert len(server.bodies) == 3


def test_an_error_without_a_code_is_asked_again_and_then_rejected_with_its_words(tokenizer: Any) -> None:
    with serving() as server:
        words = "out of cards"
        for body in (
            {"error": words},
            {"error": {"message": words, "type": "odd", "code": None}},
            {"base_resp": {"status_code": 1004, "status_msg": words}},
            {"choices": None, "errors": [{"message": words}]},
            {"choices": [], "msg": words},
        ):
            said(server, 200, body)
            found = refusal(engine(server.url, tokenizer, max_retries=1))
            assert "answered with an error: out of cards" in found.reason and found.is_transient
        for body in ({"choices": [], "state": words}, {"error": {"state": words}}):
            said(server, 200, body)
            assert words in refusal(engine(server.url, tokenizer, max_retries=0)).reason


@pytest.mark.parametrize("code", [401, 403])
def test_access_denied_inside_a_200_ends_the_run(code: int, tokenizer: Any) -> None:
    with serving() as server:
        said(server, 200, {"error": {"message": "no such key", "code": code}})
        with pytest.raises(ServerError, match=f"error {code}: no such key.*set OPENAI_API_KEY"):
            outcomes(engine(server.url, tokenizer), 2)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (502, NGINX, "502 Bad Gateway"),
        (500, b"upstream said no", "upstream said no"),
        (503, [{"error": "try later"}], "try later"),
        (200, NGINX, "502 Bad Gateway"),
        (200, b'data: {"choices": []}', 'data: {"choices"'),
        (200, b"", "not JSON: ''"),
        (204, b"", "answered 204"),
        (206, b"half", "answered 206: half"),
        (200, ["a", "list"], "not a chat completion"),
        (200, '{"choices": "Grüße"}'.encode("latin-1"), "(not UTF-8: "),
        (200, b'{"choices": NaN}', "(NaN is no number of JSON)"),
    ],
)
def test_pages_of_proxies_are_shown(status: int, body: Any, words: str, tokenizer: Any) -> None:
    with serving() as server:
        said(server, status, body)
        found = refusal(engine(server.url, tokenizer, max_retries=1))
    assert words in found.reason and found.is_transient


def test_a_redirect_and_a_proxy_s_login_end_the_run_with_their_hint(tokenizer: Any) -> None:
    with serving() as server:
        said(server, 307, b"", Location="http://elsewhere.example/v1")
        with pytest.raises(ServerError, match=r"answered 307.*to http://elsewhere\.example/v1.*ends in /v1"):
            outcomes(engine(server.url, tokenizer), 2)
        said(server, 407, b"who are you")
        with pytest.raises(ServerError, match=r"answered 407: who are you.*in http_proxy"):
            outcomes(engine(server.url, tokenizer), 2)


@pytest.mark.parametrize(
    ("body", "words"),
    [(TIER, "error 402: This model is overloaded"), (NGINX, "502 Bad Gateway"), ([1], "\\[1\\]"), (7, "7")],
)
def test_what_is_no_list_of_models_is_shown(body: Any, words: str, tokenizer: Any, monkeypatch: Any) -> None:
    with serving() as server:
        server.reports["/v1/models"] = body if not isinstance(body, bytes) else body.decode()
        with pytest.raises(ServerError, match=f"not the OpenAI protocol: .*{words}.*ends in /v1"):
            outcomes(engine(server.url, tokenizer, max_retries=0))


def models(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "model", **entry} for entry in entries]}


def test_a_reply_under_another_name_of_the_same_model_is_accepted(tokenizer: Any) -> None:
    with serving() as server:
        server.answers_as = "long-name"
        server.reports["/v1/models"] = models(
            {"id": "long-name", "root": "/models/x"}, {"id": "builtin:tiny", "root": "/models/x"}
        )
        answers(engine(server.url, tokenizer), 3)
        for other in ({"id": "long-name", "root": "/models/y"}, {"id": "long-name"}):
            server.reports["/v1/models"] = models(other, {"id": "builtin:tiny", "root": "/models/x"})
            with pytest.raises(ServerError, match=r"answered as 'long-name'.*ask for 'long-name'"):
                outcomes(engine(server.url, tokenizer), 3)


def test_a_server_s_limit_is_kept(tokenizer: Any) -> None:
    with serving() as server:
        server.reports["/v1/models"] = models({"id": "builtin:tiny", "max_model_len": 6})
        answers(engine(server.url, tokenizer))  # two tokens in the prompt, eight asked for
        assert server.bodies[0]["max_tokens"] == 3
        server.reports["/v1/models"] = models({"id": "builtin:tiny", "max_model_len": 2})
        assert "the prompt has 2 tokens" in refusal(engine(server.url, tokenizer)).reason
        assert len(server.bodies) == 1


def test_prompts_longer_than_the_model_s_positions_are_rejected_by_every_engine(tmp_path: Path, capsys: Any) -> None:
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ("the word " * 3000, "How many days?")]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    words = ["--input-data", tmp_path / "long.jsonl", "--model", "builtin:tiny", "--max-new-tokens", 8]
    code, err = call(*words, "--output-dir", tmp_path / "local", capsys=capsys)
    assert code == 0, err
    with serving() as server:
        server.reports["/v1/models"] = models({"id": "builtin:tiny", "max_model_len": 2049})
        code, err = call(*words, "--output-dir", tmp_path / "served", "--target-server", server.url, capsys=capsys)
    assert code == 0, err
    for engine_folder in ("local", "served"):
        (line,) = (tmp_path / engine_folder / shards.REJECTED).read_text().splitlines()
        assert "and the model 2048 positions for prompt and response" in json.loads(line)["reason"]


@pytest.mark.parametrize("limit", [-1, 0, None, "4096", True])
def test_a_limit_that_is_none_limits_nothing(limit: Any, tokenizer: Any) -> None:
    with serving() as server:
        server.reports["/v1/models"] = models({"id": "builtin:tiny", "max_model_len": limit})
        answers(engine(server.url, tokenizer))
        assert server.bodies[0]["max_tokens"] == 8


def test_a_response_in_parts_of_text_is_their_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "yes "}, {"type": "text", "text": "it is"}]
    with serving() as server:
        said(server, 200, completion(parts), always=False)
        (found,) = answers(engine(server.url, tokenizer))
        assert found.text == "yes it is"
        said(server, 200, completion([{"type": "image_url", "image_url": "x"}]))
        assert "its content is a list" in refusal(engine(server.url, tokenizer, max_retries=0)).reason


def test_a_long_cause_is_one_line_and_whole_in_a_file(tmp_path: Path, capsys: Any) -> None:
    cause = "the tensor of layer " + " ".join(map(str, range(300))) + " is missing"
    with serving() as server:
        said(server, 400, {"error": {"message": cause}}, always=False)
        code, _ = call(*flags(tmp_path, server), capsys=capsys)
        assert code == 0
        (line,) = (tmp_path / "out" / shards.REJECTED).read_text().splitlines()
        assert cause in json.loads(line)["reason"]
        said(server, 403, {"error": {"message": cause}})
        code, err = call(*flags(tmp_path, server, "--resume", "--seed", 1), capsys=capsys)
    (shown,) = [line for line in err.splitlines() if line.startswith("dllm: ")]
    (file,) = (tmp_path / "out" / ".work").glob("*/server-error.txt")
    assert code == 4 and str(file) in shown and cause in file.read_text()
    assert len(shown) <= len("dllm: ") + 500 and "the tensor of layer 0 1 2" in shown


def test_a_run_whose_requests_are_all_rejected_names_the_cause(tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        said(server, 200, TIER)
        code, err = call(*flags(tmp_path, server), capsys=capsys)
    assert code == 3 and "all 8 requests were rejected, the first because the server answered with error 402" in err
    assert "stop ids" not in err and "run this again with --resume" in err


def test_hints_name_the_command_s_own_flags(tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        said(server, 400, {"error": "no"})
        server.model = "other"
        code, err = call(*flags(tmp_path, server, "--dry-run"), capsys=capsys)
        assert code == 4 and "set --model to the name" in err and "regenerate." not in err.rpartition("dllm: ")[2]
        server.model = "builtin:tiny"
        server.end()
        code, err = call(*flags(tmp_path, server, "--max-retries", 0), capsys=capsys)
        assert code == 4 and "set --target-server or DLLM_TARGET_URL" in err


@pytest.mark.parametrize("key", ["sk-secret\n", "sk\r\nX: y", "sk-secret ", "sk-sëcret", "sk\x00", "\u200bsk-secret"])
def test_a_key_that_no_header_may_hold_is_a_config_error(key: str, tokenizer: Any, monkeypatch: Any) -> None:
    if "\x00" in key:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as server, pytest.raises(ConfigError, match=r"no HTTP header.*OPENAI_API_KEY") as caught:
        outcomes(engine(server.url, tokenizer))
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://a\n:1/v1", "http://a b/v1", "http://a:1/\x00", "http://a\\b/v1", "http://a..b/v1", "http://" + "a" * 70,
     "http://a/v1?x=1", "http://a/v1#f", "http://a:99999", "http://u:p@/v1", "http://\udcff/v1", "http://a:1/v1\x1b[2J"],
)  # fmt: skip
def test_an_address_that_no_server_has_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="not an http address"):
        server_url(url)


@pytest.mark.parametrize("asked", ["1e9", "9" * 20, "-5", "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "nan", ""])
def test_no_server_makes_a_run_wait_for_long(asked: str) -> None:
    with pytest.raises(Fault) as caught:
        read_reply(Server("http://a:1/v1", {}), 429, {"Retry-After": asked}, b"")
    longest_s = min(600.0, MAX_RETRY_AFTER_S)
    assert 0 <= pause_s(0, caught.value.retry_after_s, longest_s) <= MAX_RETRY_AFTER_S + 1


def test_a_row_that_is_refused_is_no_fault_of_the_server() -> None:
    with pytest.raises(Refused, match="answered 400: too long"):
        read_reply(Server("http://a:1/v1", {}), 400, {}, b'{"error": "too long"}')


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a certificate for 127.0.0.1 that no authority has signed, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    plain = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(key.private_bytes(*plain) + made.public_bytes(Encoding.PEM))
    return path


def test_a_certificate_that_nobody_signed_is_named_and_the_variable_works(certificate: Path, tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serving(tls=tls) as server:
        argv = [str(flag).replace("http:", "https:") for flag in flags(tmp_path, server, "--max-retries", 0)]
        environment = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
        for trusted, ended in (({}, 4), ({"SSL_CERT_FILE": str(certificate)}, 0)):
            done = subprocess.run(
                [sys.executable, "-m", "dllm", "regenerate", *argv],
                env={**environment, **trusted},
                capture_output=True,
                text=True,
                timeout=LONGEST_S,
                check=False,
            )
            assert done.returncode == ended, done.stderr
            if ended:
                assert re.search("(?i)certificate.*set SSL_CERT_FILE", done.stderr)
                assert START not in done.stderr


def test_https_to_a_server_that_speaks_http_is_said(tokenizer: Any) -> None:
    with serving() as server, pytest.raises(ServerError, match="speaks http: write http://"):
        answers(engine(server.url.replace("http:", "https:"), tokenizer))
