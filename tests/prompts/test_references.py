"""Right answers: where they come from, and what meets them."""

from pathlib import Path

import pytest

from dllm.config.params import Prepare
from dllm.prompts import stream
from dllm.prompts import table as prompts
from dllm.prompts.builtin import gsm8k_reference
from dllm.prompts.references import FILE, is_right, read_references, write_references


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("She makes $18 a day.", "18", True),
        ("9 * 2 = 18.", "18", True),
        ("18 is wrong, it is 20", "18", False),
        ("no number at all", "18", False),
        ("That is $1,200.00.", "1200", True),
        ("-3", "3", False),
        ("0.50", ".5", False),  # no number as the pattern has it: a last line, then
        ("x = 0.50", "0.5", True),
        ("First this.\n yes \n", "yes", True),
        ("yes, or so", "yes", False),
        ("", "yes", False),
    ],
)
def test_a_text_comes_to_its_last_number_or_its_last_line(text: str, reference: str, right: bool) -> None:
    assert is_right(text, reference) == right


def test_what_follows_four_hashes_is_the_answer() -> None:
    assert gsm8k_reference({"answer": "9 * 2 = <<9*2=18>>18 #1.\n#### 18 "}) == "18"


def test_they_are_kept_by_prompt(tmp_path: Path) -> None:
    assert read_references(tmp_path) == {}
    write_references({"b": "2", "a": "zwölf"}, tmp_path / FILE)
    assert read_references(tmp_path) == {"a": "zwölf", "b": "2"}


def collected(root: Path, *lines: str) -> list[prompts.Prompt]:
    (root / "x.jsonl").write_text("\n".join(lines))
    asked = Prepare.model_validate({"sources": [{"name": "x.jsonl", "column": "q"}], "heldout_fraction": 0.5})
    return stream.collect(asked, root)[0]


def test_a_file_brings_its_own(tmp_path: Path) -> None:
    lines = [f'{{"q": "What is {n} more?", "reference": {n}}}' for n in range(20)]
    found = collected(tmp_path, *lines, '{"q": "And now?"}')
    assert {p.messages[0]["content"]: p.reference for p in found} == {
        **{f"What is {n} more?": str(n) for n in range(20)},
        "And now?": None,
    }


def test_a_column_of_another_kind_is_none_of_ours(tmp_path: Path) -> None:
    kinds = ["[1]", "true", '{"a": 1}', "null", "1.5", '"x"']
    found = collected(tmp_path, *(f'{{"q": "Is it {n}?", "reference": {kind}}}' for n, kind in enumerate(kinds)))
    told = {p.messages[0]["content"]: p.reference for p in found}
    assert [told[f"Is it {n}?"] for n in range(6)] == [None, None, None, None, "1.5", "x"]
