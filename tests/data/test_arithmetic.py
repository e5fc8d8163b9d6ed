"""Pages of doublings: right, the same every time, and as long as the recipe counts on."""

from itertools import islice

from dllm import config
from dllm.data import prompts, sources
from dllm.data.arithmetic import ITEMS, PAGES, chats


def test_every_result_is_right_and_stands_where_it_was_asked() -> None:
    for user, assistant in islice(chats(), 50):
        asked, said = user["content"].split(), assistant["content"].split()
        assert len(asked) == len(said) == ITEMS
        for number, (question, item) in enumerate(zip(asked, said, strict=True)):
            assert item == f"{2 * int(question.removesuffix('*2')):07}"
            end = 9 * number + 8
            assert user["content"][:end].endswith(question) and assistant["content"][:end].endswith(item)
        assert len(assistant["content"]) + 1 <= 256


def test_pages_are_the_same_every_time_and_differ() -> None:
    first = [chat[0]["content"] for chat in islice(chats(), 200)]
    assert first == [chat[0]["content"] for chat in islice(chats(), 200)]
    assert len(set(first)) == 200


def test_prompts_keep_the_answers_that_their_source_gives(tmp_path) -> None:
    section = config.Prepare(sources=[config.Source(name="arithmetic", limit=40)], heldout_fraction=0.3)
    found, counts = prompts.collect(section, tmp_path)
    assert counts["sources"]["arithmetic"]["rows"] == PAGES and len(found) == 40
    prompts.write_prompts(found, tmp_path / prompts.FILE)
    for prompt in prompts.read_prompts(tmp_path):
        first = int(prompt.messages[-1]["content"].split("*")[0])
        assert prompt.given is not None and prompt.given.split()[0] == f"{2 * first:07}"
    assert sources.files(section.sources[0], tmp_path) == []
