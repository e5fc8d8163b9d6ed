"""One bad reply is one rejected row; replies are bounded; journals that hold a bad one can be resumed."""

from __future__ import annotations

import gzip
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm import __main__ as command
from dllm.engines.defects import defect
from dllm.engines.engine import Refusal, Response
from dllm.engines.openai import client
from dllm.engines.openai.completions import Completions
from dllm.engines.openai.faults import Fault, Refused, read_reply
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from dllm.models.targets import load_tokenizer
from dllm.outside import visible
from dllm.prompts import template as chat
from dllm.regeneration.journal import ResponseJournal
from dllm.responses import shards, verify
from tests.engines.openai.asking import TARGET, answers, engine, outcomes, requests
from tests.engines.openai.loopback_server import LoopbackServer, serving

CHATS = 8
HALF = "\ud800"
DEEP = "[" * 50_000 + "]" * 50_000
SERVER = Server("http://a:1/v1", {})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TARGET)


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLLM_TARGET_URL", "MLFLOW_TRACKING_URI", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def completion(text: Any = "yes", reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **fields}
    return {"model": "builtin:tiny", "choices": [{"message": message, "finish_reason": reason}]}


def calling(**fields: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": "{}", **fields}
    return completion(None, "tool_calls", tool_calls=[{"id": fields.get("id", "c1"), "function": function}])


BAD = {
    "half a pair in the text": completion(f"yes {HALF}"),
    "half a pair in a name": calling(name=HALF),
    "half a pair in an id": calling(id=HALF),
    "half a pair in arguments": calling(arguments=f'{{"a": "{HALF}"}}'),
    "half a pair that arguments spell": calling(arguments='{"a": "\\ud800"}'),
    "deep arguments": calling(arguments=f'{{"a": {DEEP}}}'),
    "deep arguments behind NaN": calling(arguments=f'{{"a": NaN, "b": {DEEP}}}'),
    "arguments that are a list": calling(arguments="[1, 2]"),
    "a number without end": calling(arguments='{"a": 1e999}'),
    "a call without a name": calling(name=""),
    "deep": f'{{"choices": {DEEP}}}'.encode(),
    "far too long": completion("word " * 20_000),
    "too many tokens": completion("a b " * 400),
}


def reply_bytes(said: Any) -> bytes:
    return said if isinstance(said, bytes) else json.dumps(said).encode()


def call(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        command.main(["regenerate", *map(str, arguments)])
    return int(left.value.code or 0), capsys.readouterr().err


def flags(folder: Path, server: LoopbackServer, *more: object) -> list[object]:
    chats = folder / "chats.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(CHATS)]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--input-data", chats, "--output-dir", folder / "out", "--model", "builtin:tiny"]
    return [*words, "--target-server", server.url, "--max-new-tokens", 16, "--temperature", 0, *more]


@pytest.mark.parametrize("name", BAD)
def test_one_bad_reply_is_one_rejected_row(name: str, tmp_path: Path, capsys: Any) -> None:
    with serving() as server:
        server.complaint = reply_bytes(BAD[name])
        server.faults.append((200, {}))
        code, err = call(*flags(tmp_path, server), capsys=capsys)
        assert code == 0 and "; a bug" not in err, err
        assert len(server.bodies) == CHATS
        output = tmp_path / "out"
        manifest = shards.read_manifest(output)
        assert (manifest["rows"], manifest["rejected"]) == (CHATS - 1, 1)
        (rejected,) = [json.loads(line) for line in (output / shards.REJECTED).read_text().splitlines()]
        assert "\n" not in rejected["reason"] and len(rejected["reason"]) < 500
        # The next call generates it again.
        code, err = call(*flags(tmp_path, server, "--resume"), capsys=capsys)
        assert code == 0 and len(server.bodies) == CHATS + 1, err
        assert shards.read_manifest(output)["rows"] == CHATS
        verify.verify(output)


@pytest.mark.parametrize("where", ["text", "name", "arguments", "id", "ids", "deep"])
def test_a_journal_that_holds_a_bad_reply_is_resumed(where: str, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    with serving() as server:
        server.faults.append((200, {}))
        server.complaint = reply_bytes(completion("yes"))
        server.always = (401, {})
        code, _ = call(*flags(tmp_path, server, "--concurrency", 1), capsys=capsys)
        assert code == 4
        (journal,) = (tmp_path / "out" / ".work").glob("*/answers-*/journal-*.jsonl")
        (key, ids, text, reason) = json.loads(journal.read_bytes().partition(b"\t")[0])
        function = {"name": "add", "arguments": "{}"}
        tool_call = {"id": "c", "type": "function", "function": function}
        if where in ("name", "arguments"):
            function[where] = HALF
        if where == "id":
            tool_call["id"] = HALF
        calls = [[tool_call]] if where in ("name", "arguments", "id") else []
        text = HALF if where == "text" else text
        ids = [-1, "x", 2**40] if where == "ids" else ids
        line = json.dumps([key, ids, text, "tool_calls" if calls else reason, *calls])
        journal.write_text((f"[{DEEP}]" if where == "deep" else line) + "\n")
        server.always = None
        code, err = call(*flags(tmp_path, server, "--resume"), capsys=capsys)
        assert code == 0 and "; a bug" not in err and "1 damaged lines" in caplog.text, err
        assert shards.read_manifest(tmp_path / "out")["rows"] == CHATS
        verify.verify(tmp_path / "out")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([HALF, "", "x", "400", "\x1b[2J", "1e9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "name", HALF]), inner),
    max_leaves=5,
)
FIELDS = [
    *(("choices",), ("choices", 0), ("choices", 0, "message"), ("choices", 0, "message", "content")),
    *(("choices", 0, "finish_reason"), ("choices", 0, "message", "tool_calls"), ("choices", 0, "error")),
    *(("choices", 0, "message", "tool_calls", 0, *path) for path in ((), ("id",), ("function",))),
    *(("choices", 0, "message", "tool_calls", 0, "function", name) for name in ("name", "arguments")),
    *(("model",), ("usage",), ("usage", "completion_tokens"), ("usage", "prompt_tokens"), ("error",), ("object",)),
    ("detail",),
]


def is_one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and visible(text) == text


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for name in path[:-1]:
        value = value[name]
    value[path[-1]] = new


@given(st.sampled_from(FIELDS), json_values)
@settings(max_examples=400)
def test_any_value_in_any_field_is_a_response_or_one_line(tokenizer: Any, path: Any, value: Any) -> None:
    said = calling(arguments='{"a": 1}')
    said |= {"model": "builtin:tiny", "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    put(said, path, value)
    completions, request = Completions("builtin:tiny", TARGET, tokenizer), requests(1)[0]
    try:
        read = read_reply(SERVER, 200, {}, json.dumps(said).encode())
        found = completions.response(request, completions.read(SERVER, read))
    except (Fault, Refused, ServerError) as error:
        assert is_one_line(str(error))
        return
    if isinstance(found, Refusal):
        assert is_one_line(found.reason)
    else:
        assert defect(found, request) is None


@given(st.binary(max_size=200) | st.sampled_from([b"", b"null", b"[]", b"\xef\xbb\xbf{}", b"1" * 5000, DEEP.encode()]))
@settings(max_examples=200)
@pytest.mark.parametrize("status", [200, 204, 302, 400, 404, 429, 500, 503])
def test_any_bytes_with_any_status_are_one_printable_line(status: int, data: bytes) -> None:
    try:
        read_reply(SERVER, status, {}, data)
    except (Fault, Refused, ServerError) as error:
        assert is_one_line(str(error))
    else:
        assert status == 200


def test_what_a_text_spells_is_never_a_special_token(tokenizer: Any) -> None:
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = "a" + "".join(special)
    with serving(reply=lambda body: (text, "stop")) as server:
        (found,) = answers(engine(server.url, tokenizer))
    assert found.text == text and not set(found.token_ids[:-1]) & set(special.values())
    assert found.token_ids[-1] == chat.end_of_turn_id(tokenizer)
    assert tokenizer.decode(found.token_ids[:-1]) == text


def test_a_response_longer_than_asked_for_is_flagged_and_one_far_longer_rejected(tmp_path: Path, capsys: Any) -> None:
    with serving(reply=lambda body: ("a b c d e f g h i j k l m n o p q r s t", "stop")) as server:
        server.complaint = reply_bytes(completion("word " * 15_002))
        server.faults.append((200, {}))
        code, err = call(*flags(tmp_path, server), capsys=capsys)
    assert code == 0, err
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest["rejected"] == 1 and manifest["flags"]["overlong"] == manifest["rows"] == CHATS - 1
    verify.verify(tmp_path / "out")


def test_a_server_that_counts_otherwise_is_named_once(tokenizer: Any, caplog: Any) -> None:
    completions, request = Completions("builtin:tiny", TARGET, tokenizer), requests(1)[0]
    for _ in range(3):
        said = {**completion("yes"), "usage": {"completion_tokens": 15_002}}
        completions.response(request, completions.read(SERVER, said))
    assert len(caplog.records) == 1 and "counts 15002 tokens in response" in caplog.text


def bomb(server: LoopbackServer, data: bytes, headers: dict[str, str]) -> None:
    server.complaint, server.always = data, (200, headers)


@pytest.mark.parametrize("packed", [False, True])
def test_replies_far_beyond_what_was_asked_for_take_no_memory(packed: bool, tokenizer: Any) -> None:
    size = 64 << 20
    data = gzip.compress(b" " * size, 1) if packed else b" " * size
    with serving() as server:
        bomb(server, data, {"Content-Encoding": "gzip"} if packed else {})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = outcomes(engine(server.url, tokenizer, concurrency=8, max_failure_rate=1.0), 16)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << (10 if sys.platform == "linux" else 0)
    assert all(isinstance(each, Refusal) and "which nobody asked for" in each.reason for each in found)
    assert len(found) == len(server.bodies) == 16
    assert grown < size, f"{grown >> 20} MiB"


def test_a_packed_reply_is_read_and_one_of_another_kind_named(tokenizer: Any) -> None:
    with serving() as server:
        bomb(server, gzip.compress(reply_bytes(completion("yes"))), {"Content-Encoding": "gzip"})
        assert answers(engine(server.url, tokenizer))[0].text == "yes"
        bomb(server, reply_bytes(completion("yes")), {"Content-Encoding": ""})
        assert answers(engine(server.url, tokenizer))[0].text == "yes"
        for headers, said in (({"Content-Encoding": "br"}, "packed as br"), ({"Content-Encoding": "gzip"}, "broke")):
            bomb(server, b"no gzip", headers)
            (found,) = outcomes(engine(server.url, tokenizer, max_retries=0))
            assert isinstance(found, Refusal) and said in found.reason


def test_all_replies_in_flight_share_one_bound(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_HELD_BYTES", 128 << 10)
    with serving() as server:
        server.hold_until = 4
        bomb(server, reply_bytes(completion("yes", padding="x" * (60 << 10))), {})
        found = outcomes(engine(server.url, tokenizer, concurrency=4, max_retries=5), 8)
    assert all(isinstance(each, Response) for each in found), found  # some were retried


@pytest.mark.parametrize(
    "line",
    [b"null", b"[]", b"{}", b'["k"]', b'["k", 1, 2, 3]', b'["k", [1], "a", "odd"]', b'[["k"], [1], "a", "stop"]',
     b'["k", [1], "a", "stop", 7]', b'["k", [1], "a", "stop", [7]]', b'["k", [true], "a", "stop"]',
     b'["k", [1], 7, "stop"]'],
)  # fmt: skip
def test_a_journal_s_odd_line_is_left_out(line: bytes, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "j").write_bytes(line + b"\n")
    with ResponseJournal(tmp_path / "j") as journal:
        assert len(journal) == 0
    assert "1 damaged lines" in caplog.text
