"""The page of a run: whole, loads nothing, and shows text from outside as text."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from dllm.cli import compare
from dllm.config.params import Target
from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.comparison import Pair
from dllm.errors import ConfigError, DataError, StageError
from dllm.methods.dflash import samples
from dllm.methods.dflash.sets import Question
from dllm.models import targets
from dllm.report import drawings, page

METRICS = {
    "regenerate": {"prompts": 3, "rows": 3, "tokens": 30, "tokens_per_response": 10.0, "cut_share": 0.5},
    "train": {"steps": 4, "best_step": 4},
    "evaluate": {
        "tau_micro": 1.5,
        "acceptance_by_offset": [0.5, 0.2],
        "conditional_acceptance_by_offset": [0.5, 0.4],
        "prompts": 1,
    },
}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def _root(folder: Path, tau: float = 1.5, recipe: str = "tiny-dflash") -> Path:
    for stage, metrics in METRICS.items():
        out = folder / "out" / stage
        out.mkdir(parents=True)
        found = {**metrics, "tau_micro": tau} if stage == "evaluate" else metrics
        (out / "metrics.json").write_text(json.dumps(found))
        run = {"recipe": recipe, "identity": {"method": "dflash"}, "inputs": {"prompts": "ab" * 32}, "seconds": 1.0}
        (out / "run.json").write_text(json.dumps(run))
    lines = [
        {"step": step, "kind": kind, name + "loss": 3.0 - step / 10, name + "acceptance_length": 1 + step / 10}
        for step in (1, 2, 3)
        for kind, name in (("train", ""), ("validation", "val_"))
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "out" / "train" / "training.jsonl").write_text(text + "\n")
    return folder


def _page(root: Path, *others: Path) -> str:
    runs = [page.Run.read(each) for each in (root, *others)]
    page.write(runs, root / page.FILE, "a title")
    return (root / page.FILE).read_text()


def test_everything_is_there_and_nothing_is_loaded(tmp_path: Path) -> None:
    text = _page(_root(tmp_path))
    tags = _Tags()
    tags.feed(text)
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") == 4, "acceptance, both ways; loss; acceptance length"
    assert not {"script", "img", "link", "iframe", "object"} & set(names)
    fetched = [
        value for tag, attrs in tags.seen for key, value in attrs.items() if key in ("src", "href", "xlink:href")
    ]
    assert all(value and value.startswith("#") for value in fetched), "references inside the drawings"
    assert re.findall(r"url\((?!#)", text) == []
    for part in ("τ micro", "by offset in the block", "From prompts to version", "abababababab"):
        assert part in text
    assert drawings.INK not in text and "currentColor" in text


def test_text_from_outside_is_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-planted-6f1e2d3c4b5a")
    root = _root(tmp_path, recipe="<script>alert(1)</script>$x$\u202e")
    (root / "params.yaml").write_text("# sk-planted-6f1e2d3c4b5a </pre><b>\n")
    sample = {"prompt_id": "p", "source": "s", "prompt": "<img src=x>", "tau": 1.0, "pieces": [["a\x1b[31m<i>", 2]]}
    (root / "out" / "evaluate" / samples.FILE).write_text(json.dumps({"samples": [sample]}))
    text = _page(root)
    assert "<script" not in text and "<img" not in text and "<i>" not in text and "</pre><b>" not in text
    assert "sk-planted" not in text and "***" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_runs_lie_side_by_side(tmp_path: Path) -> None:
    for name, tau in (("one", 1.5), ("two", 2.5)):
        _root(tmp_path / name, tau)
    printed = io.StringIO()
    to = tmp_path / "compare.html"
    compare.print_comparison(["one", "two"], tmp_path, to, Console(file=printed, width=120))
    (row,) = [line for line in printed.getvalue().splitlines() if "τ micro" in line]
    assert row.index("1.50") < row.index("2.50")
    text = to.read_text()
    assert "<td>1.50</td><td>2.50</td>" in text and text.count("<svg") == 4, "curves lie over one another"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = _root(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for names, error, message in (
        (["one"], ConfigError, "2 to 6 runs, got 1"),
        (["one", "one"], ConfigError, "the same run twice"),
        (["one", "two"], StageError, "no stage has run yet"),
        (["one", "main"], DataError, "no folder, and no git revision or DVC experiment"),
        (["main", "other"], DataError, "no folder, and no git revision or DVC experiment"),
        (["one", "-x"], DataError, "no folder and no revision"),
    ):
        with pytest.raises(error, match=message):
            compare.print_comparison(names, tmp_path, tmp_path / "page.html")
    assert one.is_dir() and not (tmp_path / "page.html").exists()


def test_the_page_takes_the_place_of_nothing_else(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _root(tmp_path / name)
    (tmp_path / "mlflow.db").write_text("precious")
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        compare.print_comparison(["one", "two"], tmp_path, tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_text() == "precious"
    with pytest.raises(StageError, match="in the result of stage train"):
        compare.print_comparison(["one", "two"], tmp_path, tmp_path / "one" / "out" / "train" / "compare.html")


def test_pieces_are_the_rounds_of_the_response(tmp_path: Path) -> None:
    tokenizer = targets.load_tokenizer(Target(model="builtin:tiny"))
    ids = tokenizer.encode("one two three é four", add_special_tokens=False)
    counts = [RoundCounts(2, 1, 4), RoundCounts(1, 0, 4), RoundCounts(len(ids) - 4, len(ids) - 5, 4)]
    pair = Pair("q", "s", 2, len(ids), 1.0, len(ids) - 1, 1.0, 0, True, tuple(counts), tuple(ids))
    samples.write(tmp_path / "samples.json", tokenizer, [Question("q", "s", (1, 2))], [pair])
    (found,) = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert "".join(text for text, _ in found["pieces"]) == "one two three é four"
    assert [tokens for _, tokens in found["pieces"]] == [1, 2, 1, len(ids) - 4]
