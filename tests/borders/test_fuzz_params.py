"""Whatever stands in params.yaml, it is read as DVC reads it, or refused in one line."""

import copy
import random
import string
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import parse_yaml

from dllm.config import recipe_book
from dllm.config.load import load_params, parse_params, read_yaml
from dllm.errors import ConfigError

SCALARS = [
    "yes",
    "on",
    "off",
    "NO",
    "010",
    "0o10",
    "0x1F",
    "0b11",
    "1:30",
    "12:30:45",
    "1_000",
    "1e3",
    "1.0e3",
    ".5",
    "5.",
    "+1",
    "-0",
    "~",
    "null",
    "Null",
    "TRUE",
    "2001-01-01",
    "08",
    "0o9",
    "1e400",
    ".inf",
    "-.INF",
    ".nan",
    "190:20:30",
    "1e",
    "0x",
    "1__0",
    "!!int 12",
    "!!float 3",
    "!!str 5",
    "!!binary aGk=",
    "'a'",
    '"\\x41"',
]

NEVER_VALID = [
    ("train.epochs", float("inf")),
    ("train.epochs", float("nan")),
    ("train.optimizer.lr", float("inf")),
    ("train.optimizer.lr", 1e6),
    ("train.optimizer.weight_decay", float("inf")),
    ("train.optimizer.clip_norm", float("inf")),
    ("train.optimizer.betas", [2.0, -1.0]),
    ("train.optimizer.betas", [0.9, 1.0]),
    ("train.seed", 2**63),
    ("train.seed", -1),
    ("train.nproc", "1 --no-python true; touch X; echo"),
    ("train.nproc", 100_000),
    ("train.dflash.block_size", 1_000_000),
    ("train.dflash.draft.target_layer_ids", []),
    ("train.dflash.draft.target_layer_ids", [3, 3]),
    ("train.dflash.draft.num_hidden_layers", 10**9),
    ("regenerate.seed", 2**63),
    ("regenerate.concurrency", 10**9),
    ("regenerate.timeout_s", 1e300),
    ("regenerate.sglang.port", 65_536),
    ("regenerate.max_new_tokens", 10**12),
    ("target.model", "builtin:tiny\nx"),
    ("target.model", "\x1b]0;x\x07"),
    ("target.model", "\u202egnp.exe"),
    ("target.model", "a" * 10_000),
]

ODD: list[Any] = [
    None, True, 0, -1, 2**31, 2**64, 10**400, int("f" * 5000, 16), float("inf"), float("nan"), 1e308, "", "x", "null",
    "a" * 5000, "\x1b[2J", "\ud800", "\u202e", "a\nb", "$(touch x)", "${train}", b"x", {"a"}, [], [[]], [None], {},
    {"a" * 300: 1}, {1: 2}, {(1, 2): 3}, {None: 1},
]  # fmt: skip


def _set(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    node: Any = raw
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(last) if isinstance(node, list) else last] = value
    return raw


def _paths(raw: Any, at: str = "") -> list[str]:
    pairs = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [path for key, value in pairs for path in (f"{at}{key}", *_paths(value, f"{at}{key}."))]


def _is_one_line(error: ConfigError) -> bool:
    return len(str(error)) <= 500 and str(error).isprintable()


@pytest.mark.parametrize(("path", "value"), NEVER_VALID, ids=lambda v: str(v)[:24].encode("unicode_escape").decode())
def test_values_that_no_run_can_have_are_refused_by_their_key(path: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_params(_set(read_yaml(recipe_book.text("tiny-dflash")), path, value))
    section, _, key = path.rpartition(".")
    assert section in str(caught.value)
    assert key in str(caught.value)
    assert _is_one_line(caught.value)


@pytest.mark.parametrize("recipe", ["qwen3-8b-dflash", "smollm2-135m-hybrid", "llada-8b-lora"])
def test_any_value_at_any_key_is_taken_or_refused_in_one_line(recipe: str) -> None:
    raw = read_yaml(recipe_book.text(recipe))
    for path in _paths(raw):
        for value in ODD:
            try:
                parse_params(_set(raw, path, value))
            except ConfigError as error:
                assert _is_one_line(error), (path, str(error)[:200])


def test_any_bytes_in_the_file_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Mutations of a real file: bytes replaced, lines moved, markup inserted, at places drawn from a fixed seed."""
    path = tmp_path / "params.yaml"
    whole = recipe_book.text("tiny-dflash").encode()
    draw = random.Random(0)
    markup = [
        b"!!int abc",
        b"? [a]",
        b"&a",
        b"*a",
        b"%YAML 1.1\n---\n",
        b"{",
        b"[",
        b"\t",
        b"\xff",
        b"\x00",
        b"<<: ",
        b"!!bool maybe",
        b"!!python/object:os.system x",
        b"9" * 5000,
        b"'",
        b"---\n",
        b"\xe2\x80\xa8",
        b"- - - ",
    ]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            if draw.random() < 0.5:
                data[at : at + draw.randint(0, 3)] = draw.choice(markup)
            else:
                data[at] = draw.choice(string.printable.encode())
        path.write_bytes(data)
        try:
            load_params(path)
        except ConfigError as error:
            assert _is_one_line(error), bytes(data)


MULTIPLIED = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(14))
HOSTILE = [
    "[" * 100_000,
    "{a: " * 100_000,
    "- " * 100_000,
    "? " * 100_000,
    "a: " + "9" * 5000,
    "a: !!int abc",
    "a: !!bool maybe",
    "[a, b]: 1",
    "a: &a [*a]",
    MULTIPLIED,
    "x" * 2_000_000,
    "",
    "a: 1\na: 2",
    "--- 1\n--- 2",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert _is_one_line(caught.value)


def test_files_that_are_not_text_or_not_there_are_refused_in_one_line(tmp_path: Path) -> None:
    latin = tmp_path / "params.yaml"
    latin.write_bytes("recipe: größe".encode("latin-1"))
    for path in (latin, tmp_path, tmp_path / "none", Path("/dev/zero"), Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError) as caught:
            load_params(path)
        assert len(str(caught.value)) <= 800  # the path itself may be long
        assert "\n" not in str(caught.value)


def test_a_file_is_read_as_dvc_reads_it_or_refused(tmp_path: Path) -> None:
    """`yes` stays a text, `010` is ten, and what DVC refuses is refused here."""
    for value in [*SCALARS, "[http://127.0.0.1:80/v1]", "[1, 2]", "{b: [c, 010]}", "|\n  hi\n  there"]:
        text = f"a: {value}\n"
        try:
            theirs = repr(parse_yaml(text, "params.yaml"))
        except Exception:
            theirs = None
        ours = None
        path = tmp_path / "params.yaml"
        path.write_text(text)
        try:
            load_params(path)
        except ConfigError as error:
            if "DVC" not in str(error) and "not YAML" not in str(error):
                ours = repr(read_yaml(text))
        assert ours == theirs, value


BAD_OVERRIDES = [
    *["", "=", "=1", "a..b=1", ".a=1", "train.=1", "train", "recipe.a=1"],
    *["train.seed=[", "train.seed=!!int abc", "a.b.c=\x1b[2J", "train.epochs=.inf"],
]


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides_are_refused_in_one_line(tmp_path: Path, override: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(recipe_book.text("tiny-dflash"))
    with pytest.raises(ConfigError) as caught:
        load_params(path, [override])
    assert _is_one_line(caught.value)
