"""From typed text to records: samplers by name, chats, spans, batches, and the replay."""

import io
import json

import pytest

from dllm import generation
from dllm.diffusion.writing import Wishes, settle, write
from dllm.errors import ConfigError, DataError
from dllm.models.bidirectional import BidirectionalLM, Note, load_bidirectional
from tests.models.small_models import TINY

TEXTS = ["How many hours?", "Why?", "A man sells three books and then one more."]


@pytest.fixture(scope="module")
def model() -> BidirectionalLM:
    return load_bidirectional(TINY)


@pytest.fixture
def hybrid(model: BidirectionalLM):
    model.note = Note("hybrid", model.mask_token_id, 4)
    yield model
    model.note = Note("mdlm", model.mask_token_id)


def short(**settings) -> dict:
    return {"max_new_tokens": 8, "block_size": 4, **settings}


def test_a_record_says_what_was_written_and_at_what_cost(model: BidirectionalLM) -> None:
    records = list(write(model, TEXTS, Wishes(batch_size=2, settings=short())))
    assert [r["prompt"] for r in records] == TEXTS
    for record in records:
        assert record["tokens"] == len(record["token_ids"]) <= 8
        assert record["tokens_per_pass"] == record["tokens"] / record["passes"]
        assert model.mask_token_id not in record["token_ids"]
        assert record["sampler"] == "llada"
    one = list(write(model, TEXTS, Wishes(batch_size=1, settings=short())))
    assert [r["token_ids"] for r in one] == [r["token_ids"] for r in records]


@pytest.mark.parametrize("sampler", ["llada", "llada2", "nemotron", "self-spec", "ar"])
def test_every_sampler_writes_with_a_hybrid(hybrid: BidirectionalLM, sampler) -> None:
    (record,) = write(hybrid, TEXTS[:1], Wishes(sampler=sampler, settings=short()))
    assert record["sampler"] == sampler
    assert record["tokens"] >= 1


def test_self_speculation_says_what_ar_says(hybrid: BidirectionalLM) -> None:
    spec = list(write(hybrid, TEXTS, Wishes(sampler="self-spec", settings=short())))
    plain = list(write(hybrid, TEXTS, Wishes(sampler="ar", settings=short())))
    assert [r["token_ids"] for r in spec] == [r["token_ids"] for r in plain]


@pytest.mark.parametrize("raw", [True, False])
def test_infilling_keeps_the_text_around_its_spans(model: BidirectionalLM, raw: bool) -> None:
    text = "He sells [MASK:3] and [MASK] more."
    (record,) = write(model, [text], Wishes(raw=raw, infill=True))
    assert record["tokens"] == 4
    before, between, after = "He sells ", " and ", " more."
    found = record["text"]
    assert before in found and between in found.split(before)[1] and after in found
    if raw:
        assert found.startswith(before) and found.endswith(after)


def test_what_does_not_go_together_is_refused(model: BidirectionalLM) -> None:
    for wishes, message in [
        (Wishes(sampler="llada2"), "block-causal"),
        (Wishes(sampler="ar", infill=True), "cannot infill"),
        (Wishes(sampler="ar", settings={"threshold": 0.5}), "has no threshold"),
        (Wishes(settings={"threshold": 0.5, "factor": 1.0}), "exclude"),
    ]:
        with pytest.raises(ConfigError, match=message):
            list(write(model, TEXTS[:1], wishes))
    with pytest.raises(DataError, match="nothing to fill"):
        list(write(model, TEXTS[:1], Wishes(infill=True)))


def test_defaults_give_way_to_the_model_and_both_to_what_is_named(hybrid: BidirectionalLM) -> None:
    assert settle(hybrid, "nemotron", Wishes()).block_size == 4
    assert settle(hybrid, "nemotron", Wishes()).threshold == 0.9
    assert settle(hybrid, "nemotron", Wishes(settings={"factor": 1.0})).threshold is None
    assert settle(hybrid, "llada2", Wishes(settings={"block_size": 8})).block_size == 8
    assert settle(hybrid, "llada2", Wishes()).cache == "block"


def test_the_replay_ends_with_the_text(model: BidirectionalLM) -> None:
    stream = io.StringIO()
    (record,) = write(model, TEXTS[:1], Wishes(settings=short()), show=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == record["passes"]
    assert "░" in lines[0]
    whole = str(model.tokenizer.decode(record["token_ids"]))
    assert repr(whole)[1:-1] in lines[-1]


def test_generate_reads_a_saved_checkpoint_and_a_batch_file(model: BidirectionalLM, tmp_path) -> None:
    model.save(tmp_path / "out" / "train" / "checkpoint")
    batch = tmp_path / "prompts.jsonl"
    batch.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS) + "\n")
    stream = io.StringIO()
    records = generation.generate(
        checkpoint=str(tmp_path),
        prompts=generation.read_prompts(batch),
        root=tmp_path,
        max_new_tokens=6,
        as_json=True,
        stream=stream,
        wishes=Wishes(),
    )
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == records
    assert [r["prompt"] for r in records] == TEXTS
    with pytest.raises(ConfigError, match="mode is mdlm"):
        generation.generate(
            checkpoint=str(tmp_path), prompts=["x"], root=tmp_path, sampler="self-spec", wishes=Wishes()
        )


def test_a_batch_file_with_another_line_is_refused(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match="line 2"):
        generation.read_prompts(path)
    plain = tmp_path / "p.txt"
    plain.write_text("a\n\nb\n")
    assert generation.read_prompts(plain) == ["a", "b"]
