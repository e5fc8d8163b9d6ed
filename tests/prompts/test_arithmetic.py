"""Pages of doublings: right, the same every time, and laid out as the recipe counts on."""

from itertools import islice, pairwise

from dllm.config.params import Prepare, Source, Target
from dllm.models import targets
from dllm.prompts import sources, stream
from dllm.prompts import table as prompts
from dllm.prompts import template as chat
from dllm.prompts.builtin import LINES, NUMBERS, PAGES, doubled
from dllm.prompts.builtin import arithmetic_chats as chats


def test_every_line_doubles_the_one_above() -> None:
    for user, assistant in islice(chats(), 50):
        lines = [user["content"], *assistant["content"].split("\n")]
        assert len(lines) == LINES + 1
        for above, line in pairwise(lines):
            assert [int(word) for word in line.split()] == doubled([int(word) for word in above.split()])
            assert [len(word) for word in line.split()] == [6] * NUMBERS


def test_doubling_adds_each_carry_before_it_and_the_first_one_at_the_end() -> None:
    for number in (1, 499_999, 500_000, 714_285, 999_998):
        digits = [int(digit) for digit in f"{number:06}"]
        carries = [digit >= 5 for digit in digits]
        wanted = [2 * digit % 10 + carry for digit, carry in zip(digits, carries[1:] + carries[:1], strict=True)]
        assert f"{doubled([number])[0]:06}" == "".join(map(str, wanted))


def test_every_digit_lies_as_far_from_those_it_is_made_of() -> None:
    """Also those of the first line: what the chat template puts before them is as long as what stands between lines."""
    tokenizer = targets.load_tokenizer(Target(model="builtin:mini"))
    page = next(chats())
    ids = chat.prompt_ids(tokenizer, page[:1])
    words = tokenizer.convert_ids_to_tokens([*ids, *tokenizer(page[1]["content"]).input_ids])
    digits = [place for place, word in enumerate(words) if word in "0123456789"]
    starts = [place for place in digits if place - 1 not in digits and place + 5 in digits]
    assert len(starts) == NUMBERS * (LINES + 1)
    assert {b - a for a, b in zip(starts, starts[NUMBERS:], strict=False)} == {29}
    assert len(words) - len(ids) + 1 <= 256


def test_pages_are_the_same_every_time_and_differ() -> None:
    first = [chat[0]["content"] for chat in islice(chats(), 200)]
    assert first == [chat[0]["content"] for chat in islice(chats(), 200)]
    assert len(set(first)) == 200


def test_prompts_keep_the_answers_that_their_source_gives(tmp_path) -> None:
    section = Prepare(sources=[Source(name="arithmetic", limit=40)], heldout_fraction=0.3)
    found, counts = stream.collect(section, tmp_path)
    assert counts["sources"]["arithmetic"]["rows"] == PAGES and len(found) == 40
    prompts.write_prompts(found, tmp_path / prompts.FILE)
    for prompt in prompts.read_prompts(tmp_path):
        asked = [int(word) for word in prompt.messages[-1]["content"].split()]
        assert prompt.given is not None and [int(word) for word in prompt.given.split()[:NUMBERS]] == doubled(asked)
    assert sources.inputs(section.sources[0], tmp_path) == {}
